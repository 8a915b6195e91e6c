"""What is stored is what is loaded: by the same model, tenant and tokens, and by nobody else. All in RAM here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvpool.api import Eviction
from kvpool.blocks.identity import ModelIdentity
from kvpool.blocks.layout import Dtype
from kvpool.blocks.record import Buffer
from kvpool.errors import ConfigError, DirectoryInUseError, InputError, PoolClosedError
from kvpool.pool.model import Model
from kvpool.pool.pool import Pool
from kvpool.pool.results import LeaseState, ModelSpec, Refusal, StoreResult
from kvpool.tiers.tier import TierName

from .kv import (
    BLOCK_TOKENS,
    LAYOUT,
    MIB,
    RECORD,
    WIDE,
    Prompt,
    check,
    config,
    fill_ram,
    identity,
    load,
    loaded_blocks,
    matched,
    open_pool,
    prompt,
    served,
    spec,
    store,
)

FOUR = prompt(4, seed=1)


class BrokenError(Exception):
    """What a user's source or sink may raise."""


class RaisesAt(Prompt):
    """A source and sink that fails at one block."""

    def __init__(self, model: Model, tokens: Any, block: int) -> None:
        super().__init__(model, tokens, "default")
        self.block = block

    def read_block(self, index: int, into: Buffer) -> None:
        if index == self.block:
            into[:] = 0xEE
            raise BrokenError
        super().read_block(index, into)

    def write_block(self, index: int, payload: Buffer) -> None:
        if index == self.block:
            raise BrokenError
        super().write_block(index, payload)


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    with open_pool(tmp_path / "pool") as opened:
        yield opened
        check(opened, leases=())


@pytest.fixture
def model(pool: Pool) -> Model:
    return pool.register(spec())


# -- round trips -------------------------------------------------------------------------------------------------------


def test_a_prompt_comes_back_as_it_was_stored(model: Model) -> None:
    assert store(model, FOUR) == StoreResult(stored=4, already_there=0, refused={})
    assert served(model, FOUR) == {TierName.RAM: 4}


@pytest.mark.parametrize("form", [list, tuple, np.array, lambda tokens: np.array(tokens, np.int32).tobytes()])
def test_the_form_in_which_tokens_come_does_not_matter(model: Model, form: Callable[[list[int]], Any]) -> None:
    store(model, FOUR)
    with model.match(form(FOUR)) as lease:
        assert lease.blocks == 4
    assert model.store(form(FOUR), Prompt(model, FOUR)).already_there == 4


def test_a_longer_prompt_matches_the_prefix_that_is_there(model: Model) -> None:
    store(model, FOUR)
    assert load(model, FOUR + prompt(3, seed=2)) == 4


def test_a_shorter_prompt_matches_all_its_whole_blocks(model: Model) -> None:
    store(model, FOUR)
    with model.match(FOUR[: 2 * BLOCK_TOKENS + 3]) as lease:
        assert (lease.blocks, lease.tokens) == (2, 2 * BLOCK_TOKENS)


def test_an_empty_prompt_is_no_block(pool: Pool, model: Model) -> None:
    assert store(model, []) == StoreResult(0, 0, {})
    assert load(model, []) == 0
    assert model.explain([]) == []
    assert pool.stats().tiers[TierName.RAM].used_bytes == 0


def test_a_prompt_shorter_than_a_block_is_no_block(pool: Pool, model: Model) -> None:
    assert store(model, FOUR[: BLOCK_TOKENS - 1]) == StoreResult(0, 0, {})
    assert load(model, FOUR[: BLOCK_TOKENS - 1]) == 0
    assert pool.stats().tiers[TierName.RAM].used_bytes == 0


def test_a_trailing_partial_block_is_neither_stored_nor_counted(model: Model) -> None:
    tokens = prompt(3, extra_tokens=BLOCK_TOKENS - 1)
    assert store(model, tokens) == StoreResult(3, 0, {})
    assert load(model, tokens) == 3


def test_the_source_is_asked_for_missing_blocks_only_and_in_order(model: Model) -> None:
    store(model, FOUR)
    source = Prompt(model, FOUR + prompt(3, seed=2), "default")
    assert model.store(source.tokens, source) == StoreResult(stored=3, already_there=4, refused={})
    assert source.read == [4, 5, 6]


def test_storing_again_changes_nothing(pool: Pool, model: Model) -> None:
    store(model, FOUR)
    used = pool.stats().tiers[TierName.RAM].used_bytes
    assert store(model, FOUR) == StoreResult(stored=0, already_there=4, refused={})
    assert pool.stats().tiers[TierName.RAM].used_bytes == used == 4 * RECORD


def test_a_prompt_of_more_blocks_than_one_batch_comes_back(tmp_path: Path) -> None:
    with open_pool(tmp_path, ram=100 * RECORD) as pool:
        model = pool.register(spec())
        assert store(model, prompt(97)).stored == 97
        assert load(model, prompt(97)) == 97
        check(pool, leases=())


def test_a_payload_that_ends_within_a_page_comes_back_exactly(pool: Pool) -> None:
    wide = pool.register(spec("wide", layout=WIDE))
    store(wide, FOUR)
    assert load(wide, FOUR) == 4


def test_the_sink_sees_exactly_the_payload_and_cannot_change_it(model: Model) -> None:
    class Vandal(Prompt):
        def write_block(self, index: int, payload: Buffer) -> None:
            assert (payload.shape, payload.dtype) == ((LAYOUT.payload_bytes,), np.uint8)
            with pytest.raises(ValueError, match="read-only"):
                payload[0] = 1

    store(model, FOUR)
    with model.match(FOUR) as lease:
        assert lease.load(Vandal(model, FOUR)) == len(FOUR)
    assert load(model, FOUR) == 4


def test_a_lease_can_be_loaded_again(model: Model) -> None:
    store(model, FOUR)
    with model.match(FOUR) as lease:
        assert loaded_blocks(lease, model, FOUR) == 4
        assert loaded_blocks(lease, model, FOUR) == 4
        assert lease.served == {TierName.RAM: 4}


def test_what_is_stored_while_a_lease_is_open_does_not_lengthen_it(model: Model) -> None:
    store(model, FOUR[: 2 * BLOCK_TOKENS])
    with model.match(FOUR) as lease:
        store(model, FOUR)
        assert loaded_blocks(lease, model, FOUR) == lease.blocks == 2


def test_a_lease_survives_that_its_prefix_is_split(model: Model) -> None:
    store(model, FOUR)
    with model.match(FOUR) as lease:
        store(model, FOUR[: 2 * BLOCK_TOKENS] + prompt(2, seed=5))
        assert loaded_blocks(lease, model, FOUR) == 4


def test_without_remote_tiers_a_lease_is_ready_at_once(model: Model) -> None:
    with model.match(FOUR) as lease:
        assert lease.poll() is LeaseState.READY
        assert lease.wait(deadline_s=0) is LeaseState.READY
        with pytest.raises(ValueError, match="deadline_s"):
            lease.wait(deadline_s=-1)


# -- who shares what ---------------------------------------------------------------------------------------------------


def test_tenants_never_see_each_others_blocks(model: Model) -> None:
    for tenant in ("acme", "other"):
        assert matched(model, FOUR, tenant) == 0
        assert store(model, FOUR, tenant).stored == 4
    assert load(model, FOUR, "acme") == load(model, FOUR, "other") == 4
    assert matched(model, FOUR) == 0


def test_tenants_share_where_the_scope_is_the_pool(tmp_path: Path) -> None:
    with open_pool(tmp_path, sharing={"scope": "pool"}) as pool:
        model = pool.register(spec())
        model.store(FOUR, Prompt(model, FOUR), tenant="acme")
        with model.match(FOUR, tenant="other") as lease:
            sink = Prompt(model, FOUR)
            assert (lease.load(sink), sink.wrong) == (len(FOUR), [])


def test_another_extra_key_is_another_block(model: Model) -> None:
    cat, dog = {0: b"cat"}, {0: b"dog"}
    assert store(model, FOUR, extra_keys=cat).stored == 4
    assert matched(model, FOUR, extra_keys=dog) == matched(model, FOUR) == 0
    assert store(model, FOUR, extra_keys=dog).stored == 4
    assert store(model, FOUR).stored == 4
    assert load(model, FOUR, extra_keys=cat) == load(model, FOUR, extra_keys=dog) == load(model, FOUR) == 4


def test_an_extra_key_of_a_middle_block_cuts_the_prefix_there(model: Model) -> None:
    store(model, FOUR, extra_keys={2: b"cat"})
    assert load(model, FOUR, extra_keys={2: b"cat"}) == 4
    assert matched(model, FOUR) == matched(model, FOUR, extra_keys={2: b"dog"}) == 2
    assert matched(model, FOUR, extra_keys={1: b"cat"}) == 1
    assert matched(model, FOUR, extra_keys={2: b"cat", 3: b"cat"}) == 3


def test_extra_keys_behind_the_prompt_and_empty_ones_say_nothing(model: Model) -> None:
    store(model, FOUR, extra_keys={4: b"later", 1: b""})
    with model.match(FOUR) as lease:
        assert lease.blocks == 4


OTHER_IDENTITIES: dict[str, Any] = {
    "name": "M",
    "weights": "x",
    "revision": "1",
    "adapter": "a",
    "rope": "r",
    "quantization": "q",
    "kv_scales": "s",
    "tp_size": 2,
    "generation": b"\1",
    "layers": dataclasses.replace(LAYOUT, layers=3),
    "kv_heads": dataclasses.replace(LAYOUT, kv_heads=2),
    "head_size": dataclasses.replace(LAYOUT, head_size=64, kv_heads=2),
    "dtype": dataclasses.replace(LAYOUT, dtype=Dtype.FLOAT16),
    "value_head_size": dataclasses.replace(LAYOUT, value_head_size=0),
}


@pytest.mark.parametrize("field", OTHER_IDENTITIES)
def test_one_changed_field_of_the_identity_is_a_miss(pool: Pool, model: Model, field: str) -> None:
    change = OTHER_IDENTITIES[field]
    name = field if field in {each.name for each in dataclasses.fields(ModelIdentity)} else "layout"
    other = pool.register(ModelSpec(identity=dataclasses.replace(identity(), **{name: change})))
    store(model, FOUR)
    assert matched(other, FOUR) == 0
    assert store(other, FOUR).stored == 4
    assert load(other, FOUR) == load(model, FOUR) == 4


def test_the_other_rank_is_a_miss(pool: Pool) -> None:
    first, second = (
        pool.register(ModelSpec(identity=dataclasses.replace(identity(), tp_size=2, tp_rank=rank))) for rank in (0, 1)
    )
    store(first, FOUR)
    assert matched(second, FOUR) == 0


@pytest.mark.parametrize("at", [0, BLOCK_TOKENS - 1, BLOCK_TOKENS, len(FOUR) - 1])
def test_one_changed_bit_of_a_token_is_a_miss_from_its_block_on(model: Model, at: int) -> None:
    store(model, FOUR)
    other = list(FOUR)
    other[at] ^= 1
    assert load(model, other) == at // BLOCK_TOKENS


def test_the_same_block_after_another_prefix_is_another_block(model: Model) -> None:
    tail = prompt(1, seed=7)
    store(model, prompt(1, seed=1) + tail)
    store(model, prompt(1, seed=2) + tail)
    assert load(model, prompt(1, seed=1) + tail) == load(model, prompt(1, seed=2) + tail) == 2
    assert matched(model, tail) == 0


def test_requests_of_one_model_share_their_prefix(pool: Pool, model: Model) -> None:
    """Also: what sharing spares is counted."""
    system = prompt(4, seed=1)
    first, second = system + prompt(2, seed=2), system + prompt(3, seed=3)
    store(model, first)
    assert store(model, second) == StoreResult(stored=3, already_there=4, refused={})
    assert pool.stats().tiers[TierName.RAM].used_bytes == 9 * RECORD
    assert load(model, first) == 6
    assert load(model, second) == 7
    stats = pool.stats()
    assert stats.shared_hit_blocks == 2 * 4
    assert stats.shared_bytes[TierName.RAM] == 4 * RECORD


def test_counters_say_what_was_asked_stored_matched_and_loaded(pool: Pool, model: Model) -> None:
    model.observe_prefill(tokens=100, seconds=1.0)
    store(model, FOUR)
    store(model, FOUR)
    load(model, FOUR + prompt(4, seed=2))
    stats = pool.stats()
    assert (stats.requests, stats.asked_blocks, stats.matched_blocks, stats.hit_ratio) == (1, 8, 4, 0.5)
    assert (stats.stored_blocks, stats.stored_bytes) == (4, 4 * RECORD)
    assert (stats.already_there_blocks, stats.already_there_bytes) == (4, 4 * RECORD)
    ram = stats.tiers[TierName.RAM]
    assert (ram.blocks, ram.block_bytes, ram.loaded_blocks, ram.loaded_bytes) == (4, 4 * RECORD, 4, 4 * RECORD)
    assert stats.saved_prefill_seconds == pytest.approx(len(FOUR) / 100)
    assert (stats.index.trees, stats.index.blocks) == (1, 4)
    assert 0 < stats.index.bytes <= stats.index.limit_bytes
    assert stats.mode == "normal"
    assert dataclasses.asdict(stats)["tiers"][TierName.RAM]["blocks"] == 4


def test_recent_prefills_count_more_than_old_ones_and_than_the_configured_rate(pool: Pool) -> None:
    model = pool.register(ModelSpec(identity=identity(), prefill_tokens_per_second=5.0))
    assert model.prefill_tokens_per_second == 5.0
    model.observe_prefill(tokens=100, seconds=1.0)
    assert model.prefill_tokens_per_second == 100.0
    model.observe_prefill(tokens=200, seconds=1.0)
    assert 100.0 < model.prefill_tokens_per_second < 200.0
    before = model.prefill_tokens_per_second
    model.observe_prefill(tokens=0, seconds=1.0)
    model.observe_prefill(tokens=10, seconds=0.0)
    assert model.prefill_tokens_per_second == before


# -- little room -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ssd", [None, 4 * MIB])
def test_of_a_prompt_larger_than_ram_the_beginning_is_kept(tmp_path: Path, ssd: int | None) -> None:
    with open_pool(tmp_path, ram=8 * RECORD, ssd=ssd) as pool:
        model = pool.register(spec())
        assert store(model, prompt(20)) == StoreResult(stored=8, already_there=0, refused={Refusal.NO_ROOM: 12})
        assert load(model, prompt(20)) == 8
        assert pool.stats().refused_blocks == {Refusal.NO_ROOM: 12}
        assert pool.flush(20)
        check(pool, leases=())


@pytest.mark.parametrize("ssd", [None, 4 * MIB])
def test_a_prompt_larger_than_ram_takes_the_place_of_what_was_there(tmp_path: Path, ssd: int | None) -> None:
    with open_pool(tmp_path, ram=8 * RECORD, ssd=ssd) as pool:
        model = pool.register(spec())
        store(model, FOUR)
        assert pool.flush(20)
        assert store(model, prompt(20)).stored == 8
        assert load(model, FOUR) == (0 if ssd is None else 4)
        assert pool.flush(20)
        check(pool, leases=())


def test_the_least_recently_used_prompt_goes_first(tmp_path: Path) -> None:
    with open_pool(tmp_path, ram=8 * RECORD) as pool:
        model = pool.register(spec())
        store(model, prompt(4, seed=1))
        store(model, prompt(4, seed=2))
        assert matched(model, prompt(4, seed=1)) == 4
        store(model, prompt(4, seed=3))
        assert [load(model, prompt(4, seed=seed)) for seed in (1, 2, 3)] == [4, 0, 4]


def test_a_prompt_loses_its_end_first(tmp_path: Path) -> None:
    with open_pool(tmp_path, ram=8 * RECORD) as pool:
        model = pool.register(spec())
        store(model, prompt(6, seed=1))
        store(model, prompt(4, seed=2))
        assert load(model, prompt(6, seed=1)) == 4


def test_a_leased_block_outlives_memory_pressure(tmp_path: Path) -> None:
    with open_pool(tmp_path, ram=8 * RECORD) as pool:
        model = pool.register(spec())
        store(model, FOUR)
        with model.match(FOUR) as lease:
            for seed in range(10, 20):
                assert store(model, prompt(8, seed=seed)).stored == 4
            assert loaded_blocks(lease, model, FOUR) == 4
            check(pool, leases=[lease])
        assert store(model, prompt(8, seed=30)).stored == 8


def test_where_everything_is_leased_a_store_is_refused(tmp_path: Path) -> None:
    with open_pool(tmp_path, ram=8 * RECORD) as pool:
        model = pool.register(spec())
        store(model, prompt(8, seed=2))
        with model.match(prompt(8, seed=2)) as lease:
            other = Prompt(model, FOUR, "default")
            assert model.store(FOUR, other) == StoreResult(0, 0, {Refusal.NO_ROOM: 4})
            assert other.read == []
            assert loaded_blocks(lease, model, prompt(8, seed=2)) == 8
        assert store(model, FOUR).stored == 4
        check(pool, leases=())


def test_a_full_index_refuses_only_what_leases_leave_no_room_for(tmp_path: Path) -> None:
    with open_pool(tmp_path, ram=512 * RECORD, index=12_000) as pool:
        model = pool.register(spec())
        for seed in range(40):
            assert store(model, prompt(2, seed=seed)).stored == 2
            assert pool.stats().index.bytes <= 12_000
        assert load(model, prompt(2, seed=39)) == 2
        result = store(model, prompt(400, seed=100))
        assert 0 < result.stored < 400
        assert result.refused == {Refusal.INDEX_FULL: 400 - result.stored}
        assert pool.stats().index.bytes <= 12_000
        check(pool, leases=())


def test_models_with_records_of_different_sizes_share_ram(tmp_path: Path) -> None:
    """Memory moves between the sizes, whatever comes first, and nothing that is kept is damaged by that."""
    with open_pool(tmp_path, ram=16 * WIDE.record_bytes, eviction=Eviction.LRU) as pool:
        small, wide = pool.register(spec("small")), pool.register(spec("wide", layout=WIDE))
        for round_ in range(4):
            for seed in range(8):
                assert store(small, prompt(4, seed=seed)).stored == 4
            assert sum(load(small, prompt(4, seed=seed)) for seed in range(8)) == 32
            for seed in range(4):
                assert store(wide, prompt(4, seed=seed)).stored == 4
            assert [load(wide, prompt(4, seed=seed)) for seed in range(4)] == [4] * 4, round_
            assert sum(load(small, prompt(4, seed=seed)) for seed in range(8)) == 0
            fill_ram(small, 32, seed=1000 + round_)
            check(pool, leases=())


def test_a_leased_block_outlives_that_memory_moves_to_another_size(tmp_path: Path) -> None:
    with open_pool(tmp_path, ram=16 * WIDE.record_bytes) as pool:
        small, wide = pool.register(spec("small")), pool.register(spec("wide", layout=WIDE))
        store(small, prompt(3, seed=1))
        with small.match(prompt(3, seed=1)) as lease:
            fill_ram(small, 24)
            assert store(wide, prompt(16, seed=2)).stored >= 12
            assert loaded_blocks(lease, small, prompt(3, seed=1)) == 3
            check(pool, leases=[lease])


# -- faults of the user ------------------------------------------------------------------------------------------------


def test_what_the_source_raises_ends_the_store_and_leaks_nothing(pool: Pool, model: Model) -> None:
    store(model, FOUR[: 2 * BLOCK_TOKENS])
    with pytest.raises(BrokenError):
        model.store(FOUR, RaisesAt(model, FOUR, block=3))
    check(pool, leases=())
    assert load(model, FOUR) == 2
    assert store(model, FOUR) == StoreResult(stored=2, already_there=2, refused={})
    assert load(model, FOUR) == 4


def test_what_the_source_raises_spares_the_batches_before_it(tmp_path: Path) -> None:
    tokens = prompt(40)
    with open_pool(tmp_path) as pool:
        model = pool.register(spec())
        with pytest.raises(BrokenError):
            model.store(tokens, RaisesAt(model, tokens, block=35))
        check(pool, leases=())
        assert load(model, tokens) == 32


def test_what_the_sink_raises_ends_the_load_and_leaks_nothing(pool: Pool, model: Model) -> None:
    store(model, FOUR)
    sink = RaisesAt(model, FOUR, block=2)
    with model.match(FOUR) as lease:
        with pytest.raises(BrokenError):
            lease.load(sink)
        assert (sink.written, sink.wrong) == ([0, 1], [])
        assert loaded_blocks(lease, model, FOUR) == 4
    check(pool, leases=())


@pytest.mark.parametrize(
    ("tokens", "says"),
    [
        ([1, 2, 3, 2**31], r"tokens\[3\] = 2147483648 is no int32"),
        ([-(2**31) - 1], r"tokens\[0\] = -2147483649 is no int32"),
        ([1, None], r"tokens\[1\] = None is no int32"),
        ([1, 2.0], r"tokens\[1\] = 2.0 is no int32"),
        ([True, False], r"tokens\[0\] = True .*mask"),
        (b"12345", "5 bytes are not a multiple of 4"),
        ([[1, 2], [3, 4]], r"tokens\[0\] = \[1, 2\] is no int32"),
        (np.zeros((2, 4), np.int64), "2 dimensions"),
        (np.array([1, 2**40]), r"tokens\[1\] = 1099511627776 is no int32"),
        (7, "tokens are int; they must be a sequence"),
    ],
)
def test_what_is_no_token_id_is_refused_and_named(pool: Pool, model: Model, tokens: Any, says: str) -> None:
    source = Prompt(model, FOUR)
    for call in (model.match, model.explain, lambda tokens: model.store(tokens, source)):
        with pytest.raises(InputError, match=says):
            call(tokens)
    assert source.read == []


@pytest.mark.parametrize("tenant", ["", None, 7, "\ud800"])
def test_what_is_no_tenant_is_refused(pool: Pool, model: Model, tenant: Any) -> None:
    source = Prompt(model, FOUR)
    for call in (
        lambda: model.match(FOUR, tenant=tenant),
        lambda: model.store(FOUR, source, tenant=tenant),
        lambda: model.explain(FOUR, tenant=tenant),
        lambda: pool.erase(tenant=tenant),
    ):
        with pytest.raises(InputError, match="tenant"):
            call()


@pytest.mark.parametrize(
    ("extra_keys", "says"), [({-1: b"x"}, r"extra_keys\[-1\].*0 or more"), ({0: bytes(1025)}, r"extra_keys\[0\].*1024")]
)
def test_extra_keys_that_no_block_can_have_are_refused(model: Model, extra_keys: dict[int, bytes], says: str) -> None:
    for call in (
        lambda: model.match(FOUR, extra_keys=extra_keys),
        lambda: model.store(FOUR, Prompt(model, FOUR), extra_keys=extra_keys),
        lambda: model.explain(FOUR, extra_keys=extra_keys),
    ):
        with pytest.raises(InputError, match=says):
            call()


# -- models ------------------------------------------------------------------------------------------------------------


def test_the_same_identity_is_the_same_model(pool: Pool, model: Model) -> None:
    assert pool.register(spec()) is model
    assert pool.models() == [model]
    assert pool.model("m") is model


def test_a_model_with_other_block_tokens_is_refused(pool: Pool) -> None:
    layout = dataclasses.replace(LAYOUT, block_tokens=8)
    with pytest.raises(InputError, match=r"'m' has blocks of 8 tokens; this pool's blockTokens is 4: .*block_tokens=4"):
        pool.register(spec(layout=layout))
    assert pool.models() == []
    assert pool.known_models() == []


def test_a_model_whose_block_is_larger_than_ram_is_refused(pool: Pool) -> None:
    layout = dataclasses.replace(LAYOUT, layers=1000)
    with pytest.raises(InputError, match=r"tiers\.ram\.capacity is 786432: raise it"):
        pool.register(spec(layout=layout))


def test_a_model_that_is_not_known_is_refused_and_the_known_ones_are_named(pool: Pool) -> None:
    with pytest.raises(InputError, match=r"'m' is not known .*; none was ever registered here"):
        pool.model("m")
    pool.register(spec("b"))
    pool.register(spec("a"))
    with pytest.raises(InputError, match=r"'m' is not known .*; known are a, b"):
        pool.model("m")


def test_a_model_is_known_by_name_after_a_restart(tmp_path: Path) -> None:
    with open_pool(tmp_path) as pool:
        pool.register(spec(weights="old"))
        pool.register(spec(weights="new"))
        pool.register(spec("other"))
    with open_pool(tmp_path) as pool:
        assert [model.name for model in pool.known_models()] == ["other", "m", "m"]
        assert pool.models() == []
        assert pool.model("m").identity == identity(weights="new")
        assert pool.register(spec(weights="new")) is pool.model("m")


def test_a_known_model_of_other_block_tokens_is_refused_by_name_too(tmp_path: Path) -> None:
    with open_pool(tmp_path) as pool:
        pool.register(spec())
    with (
        Pool.open(config().model_copy(update={"block_tokens": 8}), directory=tmp_path) as pool,
        pytest.raises(InputError, match="this pool's blockTokens is 8"),
    ):
        pool.model("m")


def test_the_prefill_rate_comes_from_the_configuration_where_the_model_names_none(tmp_path: Path) -> None:
    rates = [{"name": "m", "prefillTokensPerSecond": 80}]
    configured = type(config()).model_validate({**config().model_dump(by_alias=True), "models": rates})
    with Pool.open(configured, directory=tmp_path) as pool:
        assert pool.register(spec()).prefill_tokens_per_second == 80
        other = ModelSpec(identity=identity(weights="x"), prefill_tokens_per_second=7.0)
        assert pool.register(other).prefill_tokens_per_second == 7.0
        assert pool.register(spec("other")).prefill_tokens_per_second is None


# -- closing -----------------------------------------------------------------------------------------------------------


def test_a_closed_lease_says_so(model: Model) -> None:
    store(model, FOUR)
    lease = model.match(FOUR)
    lease.close()
    lease.close()
    assert (lease.blocks, lease.tokens) == (0, 0)
    sink = Prompt(model, FOUR)
    for call in (lambda: lease.load(sink), lease.poll, lambda: lease.wait(0)):
        with pytest.raises(PoolClosedError, match="lease was closed"):
            call()
    assert sink.written == []


def test_a_lease_that_outlives_its_pool_says_so_and_harms_nobody(tmp_path: Path) -> None:
    pool = open_pool(tmp_path)
    model = pool.register(spec())
    store(model, FOUR)
    lease = model.match(FOUR)
    pool.close()
    sink = Prompt(model, FOUR)
    for call in (lambda: lease.load(sink), lease.poll, lambda: lease.wait(0)):
        with pytest.raises(PoolClosedError, match="pool was closed"):
            call()
    assert sink.written == []
    lease.close()
    lease.close()


def test_a_closed_pool_says_so(tmp_path: Path) -> None:
    pool = open_pool(tmp_path, ssd=MIB)
    model = pool.register(spec())
    pool.close()
    pool.close()
    for call in (
        lambda: model.match(FOUR),
        lambda: store(model, FOUR),
        lambda: model.explain(FOUR),
        lambda: pool.register(spec()),
        lambda: pool.model("m"),
        lambda: pool.erase(tenant="a"),
        lambda: pool.reload(config()),
        lambda: pool.flush(0),
        lambda: pool.subscribe(print),
    ):
        with pytest.raises(PoolClosedError, match="pool was closed"):
            call()


def test_the_directory_is_free_once_the_pool_is_closed(tmp_path: Path) -> None:
    with open_pool(tmp_path, ssd=MIB), pytest.raises(DirectoryInUseError):
        open_pool(tmp_path, ssd=MIB)
    open_pool(tmp_path, ssd=MIB).close()


def test_a_pool_opens_from_the_file_of_a_kvcachepool(tmp_path: Path) -> None:
    file = tmp_path / "pool.yaml"
    file.write_text(
        "apiVersion: kvpool.dev/v1alpha1\nkind: KVCachePool\nmetadata: {name: chat}\n"
        f"spec: {{blockTokens: {BLOCK_TOKENS}, tiers: {{ram: {{capacity: 16Mi}}}}}}\n"
    )
    with Pool.open(file, directory=tmp_path / "pool") as pool:
        model = pool.register(spec())
        store(model, FOUR)
        assert load(model, FOUR) == 4
        assert pool.config.name == "chat"
    file.write_text("kind: KVCachePool")
    with pytest.raises(ConfigError, match=r"pool\.yaml"):
        Pool.open(str(file), directory=tmp_path / "pool")


def test_what_is_asked_for_and_cannot_be_done_with_the_rest_is_said(tmp_path: Path) -> None:
    plain = config().model_dump(mode="json", by_alias=True)
    asked = type(config()).model_validate({**plain, "prefetch": {"semantic": True}})
    with Pool.open(asked, directory=tmp_path) as pool:
        assert any("prefetch.semantic is not used" in notice for notice in pool.notices)


def test_a_server_that_cannot_be_reached_is_said_with_the_file_that_lacks(tmp_path: Path) -> None:
    dragonfly = {"codec": "none", "ttlS": 60.0, "connections": 1, "batchSize": 1, "budgetS": 0.1, "tls": False}
    plain = config().model_dump(mode="json", by_alias=True)
    asked = type(config()).model_validate({**plain, "dragonfly": {**dragonfly, "secret": "elsewhere"}})
    with Pool.open(asked, directory=tmp_path) as pool:
        assert pool.stats().mode == "no-dragonfly"
        assert str(tmp_path / "services" / "elsewhere" / "url") in pool.stats().tiers[TierName.DRAGONFLY].last_error
