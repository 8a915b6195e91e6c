"""The ssd tier, alone and below a pool, beside raw O_DIRECT of the same size and depth on a file written before."""

import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median

from kvpool.bench.area import Conditions, UnmeasurableError
from kvpool.bench.engine.pools import KIB, MIB, EngineMemory, InPlace, Prompts, layout_of, open_model, pool_config
from kvpool.bench.probes import RawDisk, touched
from kvpool.bench.rounds import beside, bytes_per_second
from kvpool.bench.row import Figure, Row, at_most, ratio_at_least
from kvpool.blocks.identity import BlockKey, Fingerprint, TenantDigest
from kvpool.blocks.record import Buffer, Head, seal
from kvpool.blocks.transfer import BlockSink
from kvpool.pool.fetch import JOB_BYTES
from kvpool.pool.model import Model
from kvpool.tiers.ssd.tier import SsdTier
from kvpool.tiers.tier import TierName

DEPTH = 2
"""As many as a pool has threads that write, and that read."""
SSD_BYTES = 2_048 * MIB
ROUND_BYTES = 256 * MIB
POOL_ROUND_BYTES = 96 * MIB
STORED_PROMPT_BLOCKS = 6
PAYLOAD_BYTES = 2 * MIB
_GIB_PER_BYTE = 1 / (1 << 30)


def run(conditions: Conditions) -> Iterator[Row]:
    """Rows of `ssd`."""
    for payload_bytes, at_once, name in ((256 * KIB, 16, "16x256KiB"), (2 * MIB, 1, "2MiB"), (2 * MIB, 2, "2x2MiB")):
        yield from _tier_rows(payload_bytes, at_once, name, conditions)
    yield from _pool_rows(conditions)


def _tier_rows(payload_bytes: int, at_once: int, name: str, conditions: Conditions) -> Iterator[Row]:
    """So many records a call, which lie side by side; two calls at once."""
    records = [_record(payload_bytes)] * at_once
    call_bytes = sum(record.nbytes for record in records)
    calls = conditions.scaled(ROUND_BYTES // call_bytes, least=2 * DEPTH)
    nbytes = calls * call_bytes
    with (
        conditions.place(name) as place,
        ThreadPoolExecutor(DEPTH) as threads,
        RawDisk(place / "raw", block_bytes=call_bytes, blocks=calls, depth=DEPTH) as raw,
    ):
        tier = SsdTier.open(place / "tier", capacity_bytes=max(conditions.scaled(SSD_BYTES), 4 * nbytes))
        list(tier.recovered())
        work = _TierWork(tier, threads, records, calls)
        work.write_until_full()
        raw.write_all()
        written = beside(
            bytes_per_second(work.write, nbytes), bytes_per_second(raw.write_all, nbytes), conditions.rounds
        )
        yield Row(f"ssd.write.{name}", "GiB/s", written.in_unit(_GIB_PER_BYTE), ratio_at_least(0.8))
        read = beside(bytes_per_second(work.read, nbytes), bytes_per_second(raw.read_all, nbytes), conditions.rounds)
        yield Row(f"ssd.cold-read.{name}", "GiB/s", read.in_unit(_GIB_PER_BYTE), ratio_at_least(0.9))
        tier.close()


class _TierWork:
    """Writes rounds of records to one tier, so many calls each, and reads the last round back, from several threads."""

    def __init__(self, tier: SsdTier, threads: Executor, records: Sequence[Buffer], calls: int) -> None:
        self._tier = tier
        self._threads = threads
        self._records = records
        self._calls = calls
        self._buffers = [[touched(record.nbytes) for record in records] for _ in range(DEPTH)]
        self._places: list[list[int]] = []

    def write_until_full(self) -> None:
        """So that every later segment lies in a file that was written before."""
        while not self._tier.wants_room():
            self._tier.put(self._records)

    def write(self) -> None:
        """One round; the oldest segments make room, as in a pool."""
        self._places = list(self._threads.map(self._write_some, range(self._calls)))

    def read(self) -> None:
        """The last round's records, in the order in which they lie."""
        list(self._threads.map(self._read_share, range(DEPTH)))

    def _write_some(self, _: int) -> list[int]:
        places: list[int] = []
        while left := self._records[len(places) :]:
            if self._tier.wants_room() or places:
                self._free_oldest()
            places += [place for place in self._tier.put(left) if place is not None]
        return places

    def _read_share(self, worker: int) -> None:
        for places in self._places[worker::DEPTH]:
            if not all(self._tier.get(places, self._buffers[worker])):
                raise UnmeasurableError("the tier lost a record")

    def _free_oldest(self) -> None:
        sealed = [segment for segment in self._tier.segments() if segment.sealed]
        if sealed:
            self._tier.free_segment(min(sealed, key=lambda segment: segment.id).id)


def _record(payload_bytes: int) -> Buffer:
    """A sealed record of noise."""
    layout = layout_of(payload_bytes)
    record = touched(layout.record_bytes)
    head = Head(
        key=BlockKey(bytes(16)), parent=BlockKey(bytes(16)), fingerprint=Fingerprint(bytes(32)),
        tenant=TenantDigest(bytes(16)), epoch=0, depth=0, tokens=bytes(layout.token_bytes),
        payload_bytes=payload_bytes, raw_bytes=payload_bytes,
    )  # fmt: skip
    seal(record, head)
    return record


def _pool_rows(conditions: Conditions) -> Iterator[Row]:
    """The same through the public face, where reading verifies each record and copies it out."""
    blocks = conditions.scaled(POOL_ROUND_BYTES // PAYLOAD_BYTES, least=2)
    nbytes = blocks * layout_of(PAYLOAD_BYTES).record_bytes
    with RawDisk(
        conditions.directory / "raw", block_bytes=JOB_BYTES, blocks=-(-nbytes // JOB_BYTES), depth=DEPTH
    ) as raw:
        raw.write_all()
        memory = EngineMemory(PAYLOAD_BYTES, blocks)
        with conditions.place("stored") as place:
            yield _storing_row(place, blocks, memory, raw, conditions)
        with conditions.place("loaded") as place:
            yield from _loading_rows(place, blocks, memory, raw, conditions)


def _storing_row(place: Path, blocks: int, memory: EngineMemory, raw: RawDisk, conditions: Conditions) -> Row:
    """Several prompts into a full ssd tier: every round frees the oldest segments and writes where they were."""
    nbytes = blocks * layout_of(PAYLOAD_BYTES).record_bytes
    ssd_bytes = max(conditions.scaled(SSD_BYTES), 6 * nbytes)
    config = pool_config(ram_bytes=4 * nbytes, ssd_bytes=ssd_bytes)
    pool, model = open_model(config, place / "pool", PAYLOAD_BYTES)
    prompts, prompt_blocks = Prompts(), min(blocks, STORED_PROMPT_BLOCKS)

    def write() -> None:
        for _ in range(blocks // prompt_blocks):
            model.store(prompts.next(prompt_blocks), memory)
        pool.flush(60)

    with pool:
        for _ in range(ssd_bytes // nbytes + 1):
            write()
        subject, probe = bytes_per_second(write, nbytes), bytes_per_second(raw.write_all, raw.nbytes)
        written = beside(subject, probe, conditions.rounds).in_unit(_GIB_PER_BYTE)
    return Row("ssd.store-and-flush.2MiB", "GiB/s", written)


def _loading_rows(
    place: Path, blocks: int, memory: EngineMemory, raw: RawDisk, conditions: Conditions
) -> Iterator[Row]:
    """Prompts that were stored before the pool was closed and opened again, each loaded once."""
    nbytes = blocks * layout_of(PAYLOAD_BYTES).record_bytes
    config = pool_config(ram_bytes=4 * nbytes, ssd_bytes=2 * (conditions.rounds + 2) * nbytes)
    directory, prompts = place / "pool", Prompts()
    long, single = [[prompts.next(size) for _ in range(conditions.rounds)] for size in (blocks, 1)]
    pool, model = open_model(config, directory, PAYLOAD_BYTES)
    with pool:
        for prompt in long + single:
            model.store(prompt, memory)
            pool.flush(60)
    pool, model = open_model(config, directory, PAYLOAD_BYTES)
    with pool:
        unread = iter(long)
        subject = bytes_per_second(lambda: _load(model, next(unread), memory), nbytes)
        read = beside(subject, bytes_per_second(raw.read_all, raw.nbytes), conditions.rounds)
        yield Row("ssd.cold-load.2MiB", "GiB/s", read.in_unit(_GIB_PER_BYTE), ratio_at_least(0.9))
        peaks = [_traced_peak(partial(_load, model, prompt, InPlace())) for prompt in single]
        yield Row("ssd.load-allocates.2MiB", "KiB", Figure(median(peaks) / KIB), at_most(64))


def _load(model: Model, prompt: bytes, sink: BlockSink) -> None:
    """Load a prompt of which nothing is in RAM."""
    with model.match(prompt) as lease:
        wanted = lease.blocks
        lease.load(sink)
        if lease.served != {TierName.SSD: wanted} or wanted * 4 * model.layout.block_tokens != len(prompt):
            raise UnmeasurableError(f"{lease.served} blocks were served of {wanted}, all expected from ssd")


def _traced_peak(work: Callable[[], None]) -> int:
    """The most bytes that the interpreter and numpy held at once beyond what they held before."""
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    work()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak - before
