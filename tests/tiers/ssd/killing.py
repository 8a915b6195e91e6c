"""Kills writers with SIGKILL, again and again, over one directory. A program of its own: no torch, no pytest.

`python -m tests.tiers.ssd.killing DIRECTORY KILLS SEED`. A nursery forks a writer, which first judges what the last one
left behind, then writes until it dies: by its own hand before, after or in the middle of a chosen call to the disk, or
by the nursery's at a random moment. What a put returned must outlive all that; what a free returned for must not.
Prints one JSON object, and ends with 1 where a writer found something wrong.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from kvpool.blocks.layout import PAGE_BYTES
from kvpool.tiers.ssd.disk import PosixDisk
from kvpool.tiers.ssd.tier import SsdTier

from .disks import Fault, FaultyDisk
from .records import all_recovered, records, sound

SEGMENT_BYTES = 16 * PAGE_BYTES
CAPACITY_BYTES = 4 * PAGE_BYTES + 12 * SEGMENT_BYTES
MODELS = 3
CALLS_AT_START, CALLS_AT_WORK = 60, 150
LONGEST_LIFE_S, SHORT_LIFE_S = 20.0, 0.06
DEATHS = ["start", "work", "work", "any"]
"""When a writer dies: in a call to the disk while it starts, or while it works; or at any moment, by the nursery."""
WRONG = 99
"""The exit status of a writer that found something wrong."""


class KillingDisk(FaultyDisk):
    """Kills its process in the call of a number that `arm` says, counted from then."""

    def __init__(self) -> None:
        super().__init__(PosixDisk())

    def arm(self, number: int, fault: Fault) -> None:
        last = self.calls + number
        self.plan = lambda at, name: fault if at == last else None

    def _oserror(self) -> OSError:
        os.kill(os.getpid(), signal.SIGKILL)
        return super()._oserror()


@dataclass
class Truth:
    """What the writers said that they did."""

    stored: set[int] = field(default_factory=set)
    """Numbers whose put returned, and for which no drop or free began."""
    freed: set[int] = field(default_factory=set)
    """Numbers in a segment whose free returned."""
    next_number: int = 0

    def hear(self, line: str) -> None:
        word, *numbers = line.split()
        heard = set(map(int, numbers))
        if word == "begin":
            self.next_number = max(self.next_number, *(number + 1 for number in heard))
        elif word == "stored":
            self.stored |= heard
        elif word == "lost":
            self.stored -= heard
        elif word == "freed":
            self.freed |= heard


def model_of(number: int) -> int:
    return number % MODELS


def pages_of(number: int) -> int:
    return 2 + number % 3


class Writer:
    """Judges, then writes until it dies."""

    def __init__(
        self, directory: Path, truth: Truth, say: Callable[[str], None], *, dies_at_start: bool, dies_at_work: bool
    ) -> None:
        self._directory = directory
        self._truth = truth
        self._say = say
        self._disk = KillingDisk()
        self._dies_at_start = dies_at_start
        self._dies_at_work = dies_at_work
        self._places: dict[int, int] = {}
        self._lock = threading.Lock()
        self._next_number = truth.next_number

    def live(self, random: Random) -> None:
        fault = random.choice([Fault.FAIL, Fault.LATE, Fault.TORN])
        if self._dies_at_start:
            self._disk.arm(random.randint(1, CALLS_AT_START), fault)
        tier = SsdTier.open(
            self._directory, capacity_bytes=CAPACITY_BYTES, segment_bytes=SEGMENT_BYTES, daily_write_bytes=1 << 40,
            disk=self._disk,
        )  # fmt: skip
        self._judge(tier)
        if self._dies_at_work:
            self._disk.arm(random.randint(1, CALLS_AT_WORK), fault)
        other = threading.Thread(target=self._write, args=(tier, Random(random.random()), False), daemon=True)
        other.start()
        self._write(tier, random, True)

    def _judge(self, tier: SsdTier) -> None:
        assert bytes_on_disk(self._directory) <= CAPACITY_BYTES, "the files are larger than the capacity"
        found = all_recovered(tier)
        whole = {number for _, number in sound(tier, found)}
        assert self._truth.stored <= whole, f"lost: {sorted(self._truth.stored - whole)}"
        assert not self._truth.freed & whole, f"came back: {sorted(self._truth.freed & whole)}"
        assert not tier.recovery.dropped["over-capacity"], "files had to go to keep the capacity"
        self._places = {record.depth: record.place for record in found}
        self._say(f"judged {len(whole)}")

    def _write(self, tier: SsdTier, random: Random, may_free: bool) -> None:
        while True:
            self._put(tier, random.randint(1, 4))
            assert tier.used_bytes <= CAPACITY_BYTES
            if may_free and tier.wants_room():
                self._free(tier)
            if random.random() < 0.1:
                self._drop(tier, random)
            if random.random() < 0.05:
                tier.seal_all()

    def _put(self, tier: SsdTier, count: int) -> None:
        with self._lock:
            numbers = range(self._next_number, self._next_number + count)
            self._next_number += count
        self._say("begin " + " ".join(map(str, numbers)))
        buffers = [records([number], model=model_of(number), pages=pages_of(number))[0] for number in numbers]
        places = tier.put(buffers)
        stored = {number: place for number, place in zip(numbers, places, strict=True) if place is not None}
        with self._lock:
            # A segment may have been freed since: then its records are not there, and nothing is said of them.
            live = {number: place for number, place in stored.items() if place in tier.places_in(place >> 40)}
            self._places.update(live)
            self._say("stored " + " ".join(map(str, live)))

    def _free(self, tier: SsdTier) -> None:
        sealed = sorted((info.created, info.id) for info in tier.segments() if info.sealed)
        for _, segment in sealed[:1]:
            with self._lock:
                gone = [number for number, place in self._places.items() if place >> 40 == segment]
                self._say("lost " + " ".join(map(str, gone)))
                if tier.free_segment(segment):
                    self._say("freed " + " ".join(map(str, gone)))
                    for number in gone:
                        del self._places[number]

    def _drop(self, tier: SsdTier, random: Random) -> None:
        with self._lock:
            if self._places:
                number = random.choice(sorted(self._places))
                self._say(f"lost {number}")
                tier.drop([self._places.pop(number)])


def bytes_on_disk(directory: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in directory.iterdir())


def one_life(directory: Path, truth: Truth, random: Random) -> str:
    """Fork a writer, let it die, and take over what it said. Returns when it died; raises where it found a fault."""
    death = random.choice(DEATHS)
    ear, mouth = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(ear)
        try:
            dies = {"dies_at_start": death == "start", "dies_at_work": death == "work"}
            Writer(directory, truth, lambda line: _say(mouth, line), **dies).live(random)
        except BaseException:
            _say(mouth, "wrong " + traceback.format_exc().replace("\n", " | "))
        finally:
            os._exit(WRONG)
    os.close(mouth)
    lines = _listen(ear, child, random.random() * SHORT_LIFE_S if death == "any" else LONGEST_LIFE_S)
    _, status = os.waitpid(child, 0)
    wrong = [line for line in lines if line.startswith("wrong")]
    if wrong or os.WIFEXITED(status):
        raise AssertionError(wrong[0] if wrong else f"a writer ended with {os.waitstatus_to_exitcode(status)}")
    for line in lines:
        truth.hear(line)
    return death


def _say(mouth: int, line: str) -> None:
    os.write(mouth, f"{line}\n".encode())  # less than PIPE_BUF: one piece, whoever else speaks


def _listen(ear: int, child: int, life_s: float) -> list[str]:
    """All that the child says until it is dead; it is killed after so many seconds."""
    end = time.monotonic() + life_s
    heard = bytearray()
    while True:
        ready, _, _ = select.select([ear], [], [], min(60.0, max(0.0, end - time.monotonic())))
        if not ready or time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            end = float("inf")
            continue
        piece = os.read(ear, 1 << 16)
        if not piece:
            os.close(ear)
            return heard.decode().splitlines()
        heard += piece


def main(directory: Path, kills: int, seed: int) -> int:
    random = Random(seed)
    truth = Truth()
    deaths = dict.fromkeys(DEATHS, 0)
    for life in range(kills):
        try:
            deaths[one_life(directory, truth, random)] += 1
        except AssertionError as error:
            print(json.dumps({"kills": life, "seed": seed, "wrong": str(error)}))
            return 1
    result = {"kills": kills, "deaths": deaths, "stored": truth.next_number, "freed": len(truth.freed),
              "torch": "torch" in sys.modules}  # fmt: skip
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
