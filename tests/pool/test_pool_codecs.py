"""Codecs in the engine: what is encoded comes back nearly as it was, and nothing that could be wrong is served."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvpool.api.codec import Codec
from kvpool.blocks.layout import PAGE_BYTES, Dtype, KVLayout
from kvpool.blocks.record import Buffer, read_head, sealed_as
from kvpool.config import RuntimeConfig
from kvpool.errors import InputError
from kvpool.pool.model import Model
from kvpool.pool.pool import Pool
from kvpool.pool.results import ModelSpec, Verdict
from kvpool.prefix.integrity import check_integrity
from kvpool.prefix.node import RAM, SSD
from kvpool.tiers.tier import TierName
from tests.waiting import eventually

from .kv import MIB, Payload, config, empty_ram, flushed, identity, prompt, served, spec
from .kv import store as store_bytes

LAYOUT = KVLayout(layers=2, kv_heads=2, head_size=64, dtype=Dtype.FLOAT32, block_tokens=4)
"""8 KiB of payload in float32: a record of 3 pages, of 2 with half of the bytes or less."""
LARGE = KVLayout(layers=4, kv_heads=4, head_size=64, dtype=Dtype.FLOAT32, block_tokens=4)
"""32 KiB: 9 pages, 5 as float16."""
BOUND = {Codec.FP16: 1e-3, Codec.INT8_SYMMETRIC: 0.02, Codec.INT8_ASYMMETRIC: 0.02, Codec.INT4_ASYMMETRIC: 0.2}
"""Relative error, as a Frobenius norm, of normally distributed values."""
LOSSY = list(BOUND)


class Floats:
    """Source and sink of one prompt's blocks of normally distributed floats; remembers what arrived."""

    def __init__(self, model: Model, seed: int = 0, *, poison: float | None = None) -> None:
        self.model = model
        self.seed = seed
        self.poison = poison
        self.arrived: dict[int, Payload] = {}

    def read_block(self, index: int, into: Buffer) -> None:
        into[:] = self.values(index).view(np.uint8)

    def write_block(self, index: int, payload: Buffer) -> None:
        self.arrived[index] = payload.copy()

    def values(self, index: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        generator = np.random.Generator(np.random.PCG64([self.seed, index]))
        values = generator.standard_normal(self.model.layout.payload_bytes // 4, np.float32)
        if self.poison is not None and index == 1:
            values[17] = self.poison
        return values

    def error(self, index: int) -> float:
        """Relative error of a block that arrived."""
        wanted, found = self.values(index), self.arrived[index].view(np.float32)
        return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def with_codecs(
    base: RuntimeConfig, *, ram: Codec = Codec.NONE, ssd: Codec = Codec.NONE, **options: Any
) -> RuntimeConfig:
    plain = base.model_dump(mode="json", by_alias=True)
    plain["ram"]["codec"] = ram
    if plain["ssd"] is not None:
        plain["ssd"]["codec"] = ssd
    plain["compression"] |= {"onEviction": False, "outlierPercentile": 100.0, **options}
    return RuntimeConfig.model_validate(plain)


def open_with(path: Path, *, ram_bytes: int = 8 * MIB, ssd_bytes: int | None = 16 * MIB, **options: Any) -> Pool:
    return Pool.open(with_codecs(config(ram=ram_bytes, ssd=ssd_bytes), **options), directory=path)


def store(model: Model, blocks: int, seed: int = 0, **options: Any) -> Floats:
    values = Floats(model, seed, **options)
    result = model.store(prompt(blocks, seed=seed), values)
    assert result.stored + result.already_there == blocks
    return values


def load(model: Model, blocks: int, seed: int = 0, **options: Any) -> tuple[Floats, dict[TierName, int]]:
    sink = Floats(model, seed, **options)
    with model.match(prompt(blocks, seed=seed)) as lease:
        lease.load(sink)
        return sink, lease.served


def record_lengths(pool: Pool, level: int) -> list[int]:
    """Of every copy at a level."""
    index = pool._engine.index
    with index.lock:
        places = [place for tree in index.trees.values() for node in tree.nodes() for place in node.places[level] or ()]
    return sorted({index._bytes_of[level](place) for place in places})


@pytest.fixture(params=[LAYOUT, LARGE], ids=["small", "large"])
def layout(request: pytest.FixtureRequest) -> KVLayout:
    chosen: KVLayout = request.param
    return chosen


@pytest.mark.parametrize("codec", LOSSY)
def test_what_comes_back_from_ssd_is_nearly_what_was_stored_and_takes_less(
    tmp_path: Path, codec: Codec, layout: KVLayout
) -> None:
    with open_with(tmp_path, ssd=codec) as pool:
        model = pool.register(spec(layout=layout))
        store(model, 6)
        flushed(pool)
        exact, by_tier = load(model, 6)
        assert by_tier == {TierName.RAM: 6}
        assert [exact.error(block) for block in range(6)] == [0.0] * 6, "ram keeps it as it came"
        empty_ram(pool)
        sink, by_tier = load(model, 6)
        assert by_tier == {TierName.SSD: 6}
        assert max(sink.error(block) for block in range(6)) <= BOUND[codec]
        [record_bytes] = record_lengths(pool, SSD)
        assert record_bytes < layout.record_bytes
        assert pool.stats().tiers[TierName.SSD].block_bytes == 6 * record_bytes
        assert pool.stats().encoding.encoded_blocks == {codec.value: 6}
        check_integrity(pool._engine.index)


@pytest.mark.parametrize("codec", LOSSY)
def test_nothing_is_encoded_twice_however_often_it_goes_up_and_down(tmp_path: Path, codec: Codec) -> None:
    def bytes_of(sink: Floats) -> list[bytes]:
        return [block.tobytes() for block in sink.arrived.values()]

    with open_with(tmp_path, ssd=codec, ram=Codec.INT4_ASYMMETRIC) as pool:
        model = pool.register(spec(layout=LARGE))
        pool._engine.ram_encoder.wake = None  # ssd first, then ram: what came from ssd must not become int4
        store(model, 5)
        flushed(pool)
        empty_ram(pool)
        first, _ = load(model, 5)
        pool._engine.ram_encoder.run()
        again, by_tier = load(model, 5)
        assert by_tier == {TierName.RAM: 5}
        assert bytes_of(first) == bytes_of(again)
    with open_with(tmp_path, ssd=codec, ram=Codec.INT4_ASYMMETRIC) as pool:
        last, by_tier = load(pool.model("m"), 5)
        assert by_tier == {TierName.SSD: 5}
        assert bytes_of(first) == bytes_of(last)
        assert len(first.arrived) == 5


def test_a_block_that_is_encoded_in_ram_goes_to_ssd_as_it_is(tmp_path: Path) -> None:
    with open_with(tmp_path, ram=Codec.INT8_ASYMMETRIC, ssd=Codec.FP16) as pool:
        model = pool.register(spec(layout=LARGE))
        with pool._engine.gate:
            pool._engine.store.refuse()  # nothing goes to ssd yet
        store(model, 5)
        eventually(lambda: record_lengths(pool, RAM) != [LARGE.record_bytes], "blocks in ram are encoded")
        eventually(lambda: len(record_lengths(pool, RAM)) == 1, "all of them")
        encoded, _ = load(model, 5)
        assert max(encoded.error(block) for block in range(5)) <= BOUND[Codec.INT8_ASYMMETRIC]
        pool._engine.store.accept()
        pool._engine.writer.want_everything()
        flushed(pool)
        assert record_lengths(pool, SSD) == record_lengths(pool, RAM)
        empty_ram(pool)
        sink, by_tier = load(model, 5)
        assert by_tier == {TierName.SSD: 5}
        assert all(np.array_equal(sink.arrived[block], encoded.arrived[block]) for block in range(5))


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 1e30])
def test_a_block_that_the_codec_cannot_hold_is_stored_as_it_is_and_counted(tmp_path: Path, poison: float) -> None:
    with open_with(tmp_path, ssd=Codec.FP16) as pool:
        model = pool.register(spec(layout=LARGE))
        stored = store(model, 3, poison=poison)
        flushed(pool)
        empty_ram(pool)
        sink, by_tier = load(model, 3, poison=poison)
        assert by_tier == {TierName.SSD: 3}
        assert sink.arrived[1].tobytes() == stored.values(1).tobytes()
        assert 0 < sink.error(0) <= BOUND[Codec.FP16]
        assert sum(pool.stats().encoding.kept_raw_blocks.values()) == 1
        assert len(record_lengths(pool, SSD)) == 2
        check_integrity(pool._engine.index)
    with open_with(tmp_path, ssd=Codec.FP16) as pool:
        again, _ = load(pool.model("m"), 3, poison=poison)
        assert {at: block.tobytes() for at, block in again.arrived.items()} == {
            at: block.tobytes() for at, block in sink.arrived.items()
        }


def test_a_pool_without_codecs_serves_nothing_lossy_that_an_earlier_one_left(tmp_path: Path) -> None:
    with open_with(tmp_path, ssd=Codec.INT8_SYMMETRIC) as pool:
        store(pool.register(spec(layout=LARGE)), 4)
        flushed(pool)
    with open_with(tmp_path) as pool:
        assert pool.stats().restored.dropped["codec-or-length"] == 4
        model = pool.model("m")
        assert load(model, 4)[0].arrived == {}
        stored = store(model, 4)
        flushed(pool)
        empty_ram(pool)
        sink, by_tier = load(model, 4)
        assert by_tier == {TierName.SSD: 4}
        assert sink.arrived[2].tobytes() == stored.values(2).tobytes()


def test_exact_blocks_of_an_earlier_configuration_are_served_by_one_with_codecs(tmp_path: Path) -> None:
    with open_with(tmp_path) as pool:
        store(pool.register(spec(layout=LARGE)), 4)
        flushed(pool)
    with open_with(tmp_path, ssd=Codec.INT8_SYMMETRIC) as pool:
        sink, by_tier = load(pool.model("m"), 4)
        assert by_tier == {TierName.SSD: 4}
        assert sink.error(3) == 0.0


def test_a_codec_that_this_program_does_not_know_is_a_miss(tmp_path: Path) -> None:
    with open_with(tmp_path, ssd=Codec.INT8_SYMMETRIC) as pool:
        model = pool.register(spec(layout=LARGE))
        store(model, 3)
        flushed(pool)
        empty_ram(pool)
        _reseal_on_disk(pool, depth=1, codec=99)
        sink, _ = load(model, 3)
        assert sorted(sink.arrived) == [0]
        assert pool.stats().tiers[TierName.SSD].corrupt == {"codec": 1}
        assert model.explain(prompt(3))[1].verdict is Verdict.CORRUPT


def _reseal_on_disk(pool: Pool, *, depth: int, codec: int) -> None:
    """Let a record in its segment be a sound one of another codec."""
    index, tier = pool._engine.index, pool._engine.store.tier
    assert tier is not None
    [node] = [node for tree in index.trees.values() for node in tree.nodes()]
    place = node.place(depth, SSD)
    record = np.zeros(index._bytes_of[SSD](place), np.uint8)
    assert tier.get([place], [record]) == [True]
    head = read_head(record)
    forged = record.copy()
    sealed_as(forged, head, codec, b"", head.payload_bytes)
    _overwrite(pool, record[PAGE_BYTES:].tobytes(), forged.tobytes(), record.tobytes())


def _overwrite(pool: Pool, payload: bytes, forged: bytes, record: bytes) -> None:
    for path in (pool.directory / "ssd").rglob("*"):
        if path.is_file() and (at := path.read_bytes().find(payload)) >= PAGE_BYTES:
            with path.open("r+b") as file:
                fd = file.fileno()
                was = os.pread(fd, 8, at - 8)
                tag = int.from_bytes(was, "little") ^ int.from_bytes(record[PAGE_BYTES - 8 : PAGE_BYTES], "little")
                checksum = int.from_bytes(forged[PAGE_BYTES - 8 : PAGE_BYTES], "little") ^ tag
                os.pwrite(fd, forged[: PAGE_BYTES - 8] + checksum.to_bytes(8, "little"), at - PAGE_BYTES)
            return
    raise AssertionError("the record is in no segment")


def test_shared_prefixes_stay_exact_unless_they_may_be_compressed(tmp_path: Path) -> None:
    with open_with(tmp_path, ssd=Codec.INT8_SYMMETRIC) as pool:
        model = pool.register(spec(layout=LARGE))
        store(model, 4)
        model.declare_shared(prompt(4))
        flushed(pool)
        pool._engine.writer.want_everything()
        store(model, 4, seed=1)
        flushed(pool)
        empty_ram(pool)
        assert load(model, 4, seed=1)[0].error(0) > 0
        fingerprint = model.identity.fingerprint
        assert pool._engine.encodings.codec(fingerprint, SSD) is not None


def test_ram_is_encoded_only_when_it_is_nearly_full_if_that_is_asked_for(tmp_path: Path) -> None:
    ram = 100 * LARGE.record_bytes
    with open_with(tmp_path, ram=Codec.INT8_SYMMETRIC, ram_bytes=ram, ssd_bytes=None, onEviction=True) as pool:
        model = pool.register(spec(layout=LARGE))
        store(model, 10)
        pool._engine.ram_encoder.run()
        assert record_lengths(pool, RAM) == [LARGE.record_bytes]
        for seed in range(1, 12):
            store(model, 10, seed=seed)
            pool._engine.ram_encoder.run()
        assert len(record_lengths(pool, RAM)) == 2, "and no further than it takes"
        assert pool.stats().tiers[TierName.RAM].blocks == 120, "more than fit uncompressed"
        check_integrity(pool._engine.index)


def test_what_is_leased_is_encoded_when_its_lease_has_ended(tmp_path: Path) -> None:
    with open_with(tmp_path, ram=Codec.FP16, ssd_bytes=None) as pool:
        model = pool.register(spec(layout=LARGE))
        pool._engine.ram_encoder.wake = None
        store(model, 4)
        with model.match(prompt(4)):
            pool._engine.ram_encoder.run()
            assert record_lengths(pool, RAM) == [LARGE.record_bytes]
        pool._engine.ram_encoder.run()
        assert record_lengths(pool, RAM) == [PAGE_BYTES + LARGE.payload_bytes // 2]
        assert load(model, 4)[0].error(0) > 0
        account = pool._engine.index.ledger.account("m")
        assert account.in_flight[RAM] == 0
        assert account.bytes[RAM] == pool._engine.ram.used_bytes


def test_a_model_may_have_a_codec_of_its_own_and_keeps_it_over_a_restart(tmp_path: Path) -> None:
    with open_with(tmp_path) as pool:
        plain = pool.register(spec("plain", layout=LARGE))
        own = pool.register(
            ModelSpec(identity=identity("own", layout=LARGE), codecs={TierName.SSD: Codec.INT8_SYMMETRIC})
        )
        for model in (plain, own):
            store(model, 3)
        flushed(pool)
        empty_ram(pool)
        assert load(plain, 3)[0].error(0) == 0.0
        assert 0 < load(own, 3)[0].error(0) <= BOUND[Codec.INT8_SYMMETRIC]
    with open_with(tmp_path) as pool:
        assert 0 < load(pool.model("own"), 3)[0].error(0) <= BOUND[Codec.INT8_SYMMETRIC]


def test_codecs_of_a_model_in_use_stay_as_they_are(tmp_path: Path) -> None:
    lossy = ModelSpec(identity=identity(layout=LARGE), codecs={TierName.RAM: Codec.INT4_ASYMMETRIC})
    exact = ModelSpec(identity=identity(layout=LARGE), codecs={TierName.RAM: Codec.NONE})
    with open_with(tmp_path, ssd_bytes=None) as pool:
        store(pool.register(lossy), 3)
        with pytest.raises(InputError, match="in use with codecs"):
            pool.register(exact)
        pool.unregister("m")
        model = pool.register(exact)
        store(model, 3)
        pool._engine.ram_encoder.run()
        assert load(model, 3)[0].error(0) == 0.0


def test_what_is_leased_of_a_model_that_is_unregistered_can_be_read_to_its_end(tmp_path: Path) -> None:
    with open_with(tmp_path, ssd=Codec.INT8_SYMMETRIC) as pool:
        model = pool.register(spec(layout=LARGE))
        store(model, 5)
        flushed(pool)
        empty_ram(pool)
        sink = Floats(model)
        with model.match(prompt(5)) as lease:
            pool.unregister("m")
            assert lease.load(sink) == 5 * LARGE.block_tokens
        assert sink.error(4) <= BOUND[Codec.INT8_SYMMETRIC]
        assert pool.stats().tiers[TierName.SSD].corrupt == {}


def test_a_quota_counts_encoded_bytes(tmp_path: Path) -> None:
    with open_with(tmp_path, ssd=Codec.INT8_SYMMETRIC) as pool:
        model = pool.register(spec(layout=LARGE))
        store(model, 6)
        flushed(pool)
        [account] = pool.stats().accounts
        assert account.tiers[TierName.SSD].used_bytes == 6 * record_lengths(pool, SSD)[0]


def test_clip_limits_are_learnt_once_kept_and_used_after_a_restart(tmp_path: Path) -> None:
    options: dict[str, Any] = {"ssd": Codec.INT8_SYMMETRIC, "outlierPercentile": 99.0, "calibrationSamples": 6}
    with open_with(tmp_path, **options) as pool:
        model = pool.register(spec(layout=LARGE))
        store(model, 8)
        flushed(pool)
    [limits] = (tmp_path / "calibration").iterdir()
    learnt = limits.read_bytes()
    with open_with(tmp_path, **options) as pool:
        model = pool.model("m")
        store(model, 8, seed=1)
        flushed(pool)
        empty_ram(pool)
        clipped = load(model, 8, seed=1)[0].error(0)
        assert clipped > BOUND[Codec.INT8_SYMMETRIC] / 4, "the largest values are clipped"
    assert limits.read_bytes() == learnt
    with open_with(tmp_path, **{**options, "calibrationSamples": 1000}) as pool:
        store(pool.model("m"), 4, seed=2)
        flushed(pool)
    assert limits.read_bytes() == learnt, "a calibration that was not finished leaves the old limits"
    limits.write_bytes(learnt[:-1] + bytes([learnt[-1] ^ 1]))
    with open_with(tmp_path, **options) as pool:
        store(pool.model("m"), 8, seed=3)
        flushed(pool)
    assert limits.read_bytes() != learnt, "damaged ones are learnt anew"


def test_a_calibration_that_is_killed_leaves_the_old_limits_in_force(tmp_path: Path) -> None:
    options: dict[str, Any] = {"ssd": Codec.INT8_SYMMETRIC, "outlierPercentile": 99.0, "calibrationSamples": 4}
    with open_with(tmp_path, **options) as pool:
        store(pool.register(spec(layout=LARGE)), 6)
        flushed(pool)
    [limits] = (tmp_path / "calibration").iterdir()
    learnt = limits.read_bytes()
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.pool.test_pool_codecs", str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    for _ in range(3):
        assert child.stdout.readline() == "stored and saved\n", "it learns anew, from more blocks than it ever gets"
    child.kill()
    child.communicate()
    assert limits.read_bytes() == learnt
    with open_with(tmp_path, **options) as pool:
        store(pool.model("m"), 6, seed=500)
        flushed(pool)
        empty_ram(pool)
        assert load(pool.model("m"), 6, seed=500)[0].error(0) > BOUND[Codec.INT8_SYMMETRIC] / 4, "they clip"
    assert limits.read_bytes() == learnt


def calibrate_for_ever(directory: Path) -> None:
    """Store and save until somebody kills it, as a process of its own: learning limits from blocks without end."""
    options: dict[str, Any] = {"ssd": Codec.INT8_SYMMETRIC, "outlierPercentile": 99.9, "calibrationSamples": 100_000}
    with open_with(directory, **options) as pool:
        for seed in count(1):
            store(pool.model("m"), 6, seed=seed)
            flushed(pool)
            print("stored and saved", flush=True)


def test_records_that_are_no_floats_are_kept_as_they_are(tmp_path: Path) -> None:
    bytes_layout = KVLayout(layers=2, kv_heads=2, head_size=64, dtype=Dtype.UINT8, block_tokens=4)
    with open_with(tmp_path, ssd=Codec.INT8_SYMMETRIC, ram=Codec.FP16) as pool:
        model = pool.register(spec(layout=bytes_layout))
        store_bytes(model, prompt(4))
        flushed(pool)
        empty_ram(pool)
        assert served(model, prompt(4)) == {TierName.SSD: 4}


if __name__ == "__main__":
    calibrate_for_ever(Path(sys.argv[1]))
