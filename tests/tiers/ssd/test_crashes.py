"""Processes that are killed, and machines that lose power, in the middle of writing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

import kvpool
from kvpool.blocks.layout import PAGE_BYTES
from kvpool.tiers.ssd.place import segment_of
from kvpool.tiers.ssd.tier import SsdTier

from .disks import FaultyDisk, MemoryDisk
from .records import all_recovered, is_record, put_although_full, read, records, sound

KILLS = int(os.environ.get("KVPOOL_KILLS", "40"))
"""`KVPOOL_KILLS=500 pytest tests/tiers/ssd/test_crashes.py` kills more often, with another seed each time."""
SEGMENT_BYTES = 10 * PAGE_BYTES
CAPACITY_BYTES = 4 * PAGE_BYTES + 6 * SEGMENT_BYTES
DIRECTORY = Path("/on-a-disk-in-memory")


def test_what_was_put_outlives_any_kill_and_what_was_freed_does_not(tmp_path: Path) -> None:
    seed = 1 if "KVPOOL_KILLS" not in os.environ else Random().randrange(1 << 30)
    paths = [str(Path(kvpool.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    result = subprocess.run(
        [sys.executable, "-m", "tests.tiers.ssd.killing", str(tmp_path / "ssd"), str(KILLS), str(seed)],
        cwd=Path(__file__).parents[3], env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True, text=True, timeout=60 + KILLS, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    told = json.loads(result.stdout)
    assert told["kills"] == KILLS
    assert told["stored"] > 10 * KILLS
    assert not told["torch"]


class Durable:
    """A tier on a disk that loses power before a certain call: what is left then, and what must be among it."""

    def __init__(self, seed: int, cut_at: int = 0) -> None:
        self.must: set[int] = set()
        """What a `seal_all` that returned had sealed, and nobody dropped or freed since."""
        self.left: MemoryDisk | None = None
        self.must_be_left: set[int] = set()
        self.disk = FaultyDisk(MemoryDisk(), self._cut)
        self._cut_at = cut_at
        self._random = Random(seed)
        self._numbers: dict[int, int] = {}
        """By place."""

    def work(self) -> None:
        self._tier = self._opened()
        for number in range(200, 240):
            act = self._random.choice([self._put, self._put, self._put, self._seal, self._drop, self._free])
            act(number)
            if number % 20 == 19:
                self._tier.close()
                self._tier = self._opened()

    def _cut(self, number: int, name: str) -> None:
        if number == self._cut_at:
            assert isinstance(self.disk.disk, MemoryDisk)
            self.left = self.disk.disk.power_lost(Random(number))
            self.must_be_left = set(self.must)

    def _opened(self) -> SsdTier:
        tier = SsdTier.open(
            DIRECTORY, capacity_bytes=CAPACITY_BYTES, segment_bytes=SEGMENT_BYTES, daily_write_bytes=1 << 20,
            disk=self.disk,
        )  # fmt: skip
        self._numbers = {record.place: record.depth for record in all_recovered(tier)}
        return tier

    def _put(self, number: int) -> None:
        numbers = [2 * number, 2 * number + 1]
        model = number % 2
        if self._tier.wants_room():
            self._free(number)
        for stored, place in zip(numbers, self._tier.put(records(numbers, model=model)), strict=True):
            if place is not None:
                self._numbers[place] = stored

    def _seal(self, number: int) -> None:
        self._tier.seal_all()
        self.must = set(self._numbers.values())

    def _drop(self, number: int) -> None:
        if self._numbers:
            place = self._random.choice(sorted(self._numbers))
            self.must.discard(self._numbers.pop(place))
            self._tier.drop([place])

    def _free(self, number: int) -> None:
        sealed = [info.id for info in self._tier.segments() if info.sealed]
        if sealed:
            segment = self._random.choice(sealed)
            for place in [place for place in self._numbers if segment_of(place) == segment]:
                self.must.discard(self._numbers.pop(place))
            assert self._tier.free_segment(segment)


@pytest.mark.parametrize("seed", range(4))
def test_a_loss_of_power_at_any_moment_costs_nothing_that_was_sealed(seed: int) -> None:
    whole = Durable(seed)
    whole.work()
    assert whole.disk.calls > 150
    for number in range(1, whole.disk.calls + 1, 2):
        life = Durable(seed, cut_at=number)
        life.work()
        assert life.left is not None
        judge(life.left, life.must_be_left)


def judge(left: MemoryDisk, must: set[int]) -> None:
    tier = SsdTier.open(
        DIRECTORY, capacity_bytes=CAPACITY_BYTES, segment_bytes=SEGMENT_BYTES, daily_write_bytes=1 << 20, disk=left
    )
    found = all_recovered(tier)
    whole = {number for _, number in sound(tier, found)}
    assert must <= whole
    assert left.used_bytes() <= tier.used_bytes <= CAPACITY_BYTES
    place = put_although_full(tier, 9999, model=1)
    assert is_record(read(tier, place), 9999, model=1)
    tier.close()
