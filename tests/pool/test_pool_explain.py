"""Every verdict of `explain`, brought about for real."""

from __future__ import annotations

import dataclasses
import errno
import shutil
import time
from pathlib import Path

import pytest

from kvpool.blocks.record import Buffer
from kvpool.pool.history_file import CAPACITY
from kvpool.pool.model import Model
from kvpool.pool.pool import Pool
from kvpool.pool.results import ModelSpec, Refusal, Verdict
from kvpool.tiers.tier import TierName
from tests.waiting import eventually

from .disks import SickDisk
from .kv import (
    BLOCK_TOKENS,
    MIB,
    RECORD,
    check,
    empty_ram,
    flushed,
    identity,
    load,
    loaded_blocks,
    matched,
    open_pool,
    prompt,
    segment_files,
    spec,
    store,
    stored_below,
)

RAM, SSD = TierName.RAM, TierName.SSD
FOUR = prompt(4, seed=1)


def verdicts(model: Model, tokens: list[int], tenant: str = "default") -> list[Verdict]:
    reports = model.explain(tokens, tenant=tenant)
    assert [report.block for report in reports] == list(range(len(tokens) // BLOCK_TOKENS))
    assert all(report.detail for report in reports)
    return [report.verdict for report in reports]


def damage_first_record(directory: Path) -> None:
    """Of the oldest segment, in its payload: behind the segment's header and the record's head."""
    file = next(segment_files(directory))
    with file.open("r+b") as handle:
        handle.seek(2 * 4096)
        handle.write(b"\xff" * 8)


def test_what_is_held_is_said_to_be_where_it_is(tmp_path: Path) -> None:
    disk = SickDisk()
    with open_pool(tmp_path, ssd=MIB, disk=disk) as pool:
        model = pool.register(spec())
        stored_below(pool, model, FOUR[: 2 * BLOCK_TOKENS])
        load(model, FOUR[:BLOCK_TOKENS])
        disk.errors = {"pwritev": errno.EIO}
        store(model, FOUR)
        flushed(pool)
        reports = model.explain([*FOUR, 7])
        assert [report.tiers for report in reports] == [(RAM, SSD), (SSD,), (RAM,), (RAM,)]
        assert {report.verdict for report in reports} == {Verdict.HELD}
        assert [report.detail for report in reports] == ["in ram and ssd", "in ssd", "in ram", "in ram"]
        assert len({report.key for report in reports}) == 4


def test_in_a_new_pool_nothing_was_ever_stored(tmp_path: Path) -> None:
    with open_pool(tmp_path) as pool:
        model = pool.register(spec())
        store(model, FOUR, "acme")
        assert verdicts(model, FOUR) == [Verdict.NEVER_STORED] * 4
        assert verdicts(model, FOUR + prompt(2, seed=2), "acme") == [Verdict.HELD] * 4 + [Verdict.NEVER_STORED] * 2


def test_after_an_orderly_restart_it_is_still_known_what_was_never_stored(tmp_path: Path) -> None:
    open_pool(tmp_path, ssd=MIB).close()
    with open_pool(tmp_path, ssd=MIB) as pool:
        assert verdicts(pool.register(spec()), FOUR) == [Verdict.NEVER_STORED] * 4


def test_what_went_with_the_process_for_want_of_an_ssd_is_not_known(tmp_path: Path) -> None:
    with open_pool(tmp_path) as pool:
        store(pool.register(spec()), FOUR)
    with open_pool(tmp_path) as pool:
        assert verdicts(pool.model("m"), FOUR) == [Verdict.UNKNOWN] * 4
    with open_pool(tmp_path) as pool:
        assert verdicts(pool.model("m"), FOUR) == [Verdict.UNKNOWN] * 4


def test_what_was_evicted_is_said_to_be_and_when(tmp_path: Path) -> None:
    began = time.time()
    with open_pool(tmp_path, ram=8 * RECORD) as pool:
        model = pool.register(spec())
        store(model, FOUR)
        store(model, prompt(6, seed=2))
        reports = model.explain(FOUR)
        assert [report.verdict for report in reports] == [Verdict.HELD] * 2 + [Verdict.EVICTED] * 2
        assert began <= (reports[3].at_s or 0) <= time.time()
        assert "evicted from ram by the policy at 20" in reports[3].detail
    with open_pool(tmp_path, ram=8 * RECORD) as pool:
        after = pool.model("m").explain(FOUR)[2:]
        assert after == reports[2:], "a restart keeps the reason, and the time"


def test_what_went_with_a_block_before_it_is_orphaned(tmp_path: Path) -> None:
    """The beginning lies in RAM alone, the rest on SSD alone: when the beginning goes, so does the rest."""
    disk = SickDisk()
    with open_pool(tmp_path, ssd=MIB, disk=disk) as pool:
        model = pool.register(spec())
        stored_below(pool, model, FOUR)
        damage_first_record(tmp_path)
        assert load(model, FOUR) == 0
        disk.errors = {"pwritev": errno.EIO}
        store(model, FOUR[:BLOCK_TOKENS])
        flushed(pool)
        assert [report.tiers for report in model.explain(FOUR)] == [(RAM,), (SSD,), (SSD,), (SSD,)]
        empty_ram(pool)
        assert verdicts(model, FOUR) == [Verdict.EVICTED] + [Verdict.ORPHANED] * 3
        check(pool, leases=())


def test_a_damaged_record_is_said_to_be_and_hides_what_follows(tmp_path: Path) -> None:
    with open_pool(tmp_path, ssd=MIB) as pool:
        model = pool.register(spec())
        stored_below(pool, model, FOUR)
        damage_first_record(tmp_path)
        assert verdicts(model, FOUR) == [Verdict.HELD] * 4, "nobody has looked yet"
        assert load(model, FOUR) == 0
        reports = model.explain(FOUR)
        assert [report.verdict for report in reports] == [Verdict.CORRUPT] + [Verdict.UNREACHABLE] * 3
        assert "its record on ssd was damaged" in reports[0].detail
        assert reports[1].detail == "in ssd, but block 0 before it cannot be had"


def test_what_lies_in_a_tier_that_is_out_is_said_to(tmp_path: Path) -> None:
    disk = SickDisk()
    with open_pool(tmp_path, ssd=MIB, disk=disk) as pool:
        model = pool.register(spec())
        stored_below(pool, model, FOUR)
        disk.errors = {"preadv": errno.EIO}
        assert load(model, FOUR) == 0
        reports = model.explain(FOUR)
        assert [report.verdict for report in reports] == [Verdict.TIER_DOWN] * 4
        assert "which is out: " in reports[0].detail
        disk.recover()
        eventually(lambda: verdicts(model, FOUR) == [Verdict.HELD] * 4, "the tier is back")


def test_what_went_with_its_segment_is_said_to(tmp_path: Path) -> None:
    with open_pool(tmp_path, ram=8 * RECORD, ssd=MIB // 2) as pool:
        model = pool.register(spec())
        for seed in range(40):
            stored_below(pool, model, prompt(4, seed=seed))
        assert verdicts(model, prompt(4, seed=0)) == [Verdict.SSD_SEGMENT_FREED] * 4
        before = model.explain(prompt(4, seed=0))
    with open_pool(tmp_path, ram=8 * RECORD, ssd=MIB // 2) as pool:
        assert pool.model("m").explain(prompt(4, seed=0)) == before


def test_what_was_refused_is_said_to_be_until_it_is_stored(tmp_path: Path) -> None:
    with open_pool(tmp_path, ram=8 * RECORD) as pool:
        model = pool.register(spec())
        store(model, prompt(6, seed=2))
        with model.match(prompt(6, seed=2)) as lease:
            assert store(model, FOUR).refused == {Refusal.NO_ROOM: 2}
            assert verdicts(model, FOUR) == [Verdict.HELD] * 2 + [Verdict.REFUSED] * 2
            assert loaded_blocks(lease, model, prompt(6, seed=2)) == 6
        assert store(model, FOUR).stored == 2
        assert verdicts(model, FOUR) == [Verdict.HELD] * 4


def test_what_the_index_had_no_room_for_is_said_to_be(tmp_path: Path) -> None:
    with open_pool(tmp_path, ram=256 * RECORD, index=8_000) as pool:
        model = pool.register(spec())
        for seed in range(20):
            store(model, prompt(2, seed=seed))
        assert verdicts(model, prompt(2, seed=0)) == [Verdict.INDEX_FULL] * 2
        result = store(model, prompt(250, seed=100))
        assert result.refused == {Refusal.INDEX_FULL: 250 - result.stored}
        assert verdicts(model, prompt(250, seed=100))[-1] is Verdict.INDEX_FULL


def test_what_was_erased_is_said_to_be(tmp_path: Path) -> None:
    with open_pool(tmp_path, ssd=MIB) as pool:
        model = pool.register(spec())
        stored_below(pool, model, FOUR, "acme")
        store(model, prompt(2, seed=2), "acme")
        pool.erase(tenant="acme")
        assert verdicts(model, FOUR, "acme") == [Verdict.ERASED] * 4
        assert verdicts(model, prompt(2, seed=2), "acme") == [Verdict.ERASED] * 2
        reports = model.explain(prompt(1, seed=3), tenant="acme")
        assert reports[0].verdict is Verdict.NEVER_STORED
        assert "or erased with its tenant" in reports[0].detail
    with open_pool(tmp_path, ssd=MIB) as pool:
        model = pool.model("m")
        assert verdicts(model, FOUR, "acme") == [Verdict.ERASED] * 4
        store(model, FOUR, "acme")
        assert verdicts(model, FOUR, "acme") == [Verdict.HELD] * 4


def test_what_is_held_for_other_weights_is_said_to_differ_in_them(tmp_path: Path) -> None:
    with open_pool(tmp_path) as pool:
        old = pool.register(spec(weights="old"))
        new = pool.register(ModelSpec(identity=dataclasses.replace(identity(weights="new"), revision="2")))
        store(old, FOUR)
        reports = new.explain(FOUR)
        assert [report.verdict for report in reports] == [Verdict.OTHER_FINGERPRINT] * 4
        assert "which differs in weights, revision" in reports[0].detail
        assert old.identity.fingerprint.hex()[:12] in reports[0].detail
        other_name = pool.register(spec("other", weights="old"))
        assert verdicts(other_name, FOUR) == [Verdict.NEVER_STORED] * 4


def test_after_a_crash_what_is_not_there_is_not_known(tmp_path: Path) -> None:
    with open_pool(tmp_path / "pool", ssd=MIB) as pool:
        model = pool.register(spec())
        stored_below(pool, model, FOUR)
        shutil.copytree(tmp_path / "pool", tmp_path / "copy")
    began = time.time()
    with open_pool(tmp_path / "copy", ssd=MIB) as pool:
        model = pool.model("m")
        assert verdicts(model, FOUR) == [Verdict.HELD] * 4
        assert verdicts(model, prompt(2, seed=2)) == [Verdict.UNKNOWN] * 2
        assert time.strftime("%Y-%m-%dT%H:", time.gmtime(began)) in model.explain(prompt(1, seed=2))[0].detail


def test_what_was_forgotten_for_want_of_room_is_not_known(tmp_path: Path) -> None:
    class Zeros:
        def read_block(self, index: int, into: Buffer) -> None:
            into[:] = 0

    with open_pool(tmp_path, ram=40 * RECORD) as pool:
        model = pool.register(spec())
        store(model, prompt(1, seed=1))
        for seed in range(2, 2 + CAPACITY // 30 + 10):
            model.store(prompt(32, seed=seed), Zeros())
        assert verdicts(model, prompt(1, seed=1)) == [Verdict.UNKNOWN]
        assert verdicts(model, prompt(1, seed=1_000)) == [Verdict.UNKNOWN], "nobody can tell them apart any more"


def test_explaining_changes_nothing(tmp_path: Path) -> None:
    with open_pool(tmp_path, ram=8 * RECORD) as pool:
        model = pool.register(spec())
        store(model, FOUR)
        store(model, prompt(4, seed=2))
        before = pool.stats()
        assert verdicts(model, FOUR) == [Verdict.HELD] * 4
        assert verdicts(model, prompt(4, seed=3)) == [Verdict.NEVER_STORED] * 4
        assert pool.stats() == before
        store(model, prompt(4, seed=3))
        assert matched(model, FOUR) == 0, "it did not become younger"
        assert matched(model, prompt(4, seed=2)) == 4


def test_extra_keys_are_part_of_what_is_asked(tmp_path: Path) -> None:
    with open_pool(tmp_path) as pool:
        model = pool.register(spec())
        store(model, FOUR, extra_keys={1: b"cat"})
        cat = [report.verdict for report in model.explain(FOUR, extra_keys={1: b"cat"})]
        dog = [report.verdict for report in model.explain(FOUR, extra_keys={1: b"dog"})]
        assert cat == [Verdict.HELD] * 4
        assert dog == [Verdict.HELD] + [Verdict.NEVER_STORED] * 3


@pytest.mark.parametrize("second_hit", [False, True])
def test_no_verdict_contradicts_a_match(tmp_path: Path, second_hit: bool) -> None:
    with open_pool(tmp_path, ram=8 * RECORD, ssd=MIB // 2, secondHit=second_hit) as pool:
        model = pool.register(spec())
        for seed in range(30):
            store(model, prompt(1 + seed % 5, seed=seed % 7) + prompt(seed % 4, seed=50 + seed))
            flushed(pool)
            for other in range(30):
                tokens = prompt(1 + other % 5, seed=other % 7) + prompt(other % 4, seed=50 + other)
                assert verdicts(model, tokens).count(Verdict.HELD) == matched(model, tokens)
            flushed(pool)


def test_a_pool_explains_what_an_earlier_process_stored(tmp_path: Path) -> None:
    with open_pool(tmp_path, ssd=MIB) as pool:
        store(pool.register(spec()), FOUR)
    with Pool.open(pool.config, directory=tmp_path) as pool:
        reports = pool.model("m").explain(FOUR)
        assert [(report.verdict, report.tiers) for report in reports] == [(Verdict.HELD, (SSD,))] * 4
