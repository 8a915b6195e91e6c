"""How much a use should count beside how long ago it was: learned from one model's requests.

LRU goes by the time of the last use alone. Where prompts are of several kinds, a block that was used more often
deserves a later date. How much later depends on the requests and on how much is held; so it is measured, in hindsight:
see `Hindsight`. LRU is among the choices.

What was evicted is remembered for a while, so that its return counts too, and finds its uses again.
"""

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager

from kvpool.blocks.identity import KEY_BYTES
from kvpool.policy.hindsight import Event, Hindsight
from kvpool.policy.remembered import Remembered
from kvpool.policy.traits import LAST, STEP

DIGESTED_BLOCKS = 96
"""After so many blocks of requests these are digested, or after ..."""
DIGESTED_SHARE = 1 / 32
"""... this share of what is held, whichever is more."""
MOST_EVENTS = 4_096
"""With so many events somebody is asked to digest them: they take memory."""


class Demand:
    """What is known of one model's demand. Guarded by the index's lock, but for `learn`; deterministic.

    Times are those of a clock that advances with each use of the index. `copies` are how many blocks each tier holds:
    kept by the index, and looked at here, for what is best for one tier need not be for another.
    """

    step = STEP

    def __init__(self, copies: Sequence[int]) -> None:
        self.now = 0
        self.due = 0
        """So many of the events are to be digested: those before room was made for what a request stored."""
        self._copies = copies
        self._then = (0, list(copies), 0, 0)
        """The clock, the copies, the blocks held and those not digested, when the last of these events had happened."""
        self._events: list[Event] = []
        self._overdue_at = MOST_EVENTS
        self._undigested = 0
        self._digested_at = DIGESTED_BLOCKS
        self._held = 0
        self._remembered = Remembered()
        self._hindsight = Hindsight(len(copies))
        self._digesting = threading.Lock()

    @property
    def remembered(self) -> int:
        """How many evicted blocks are remembered; never more than `2 * MOST_REMEMBERED`."""
        return len(self._remembered)

    @property
    def undigested(self) -> int:
        """How many events are kept until they are digested."""
        return len(self._events)

    @property
    def hindsight(self) -> Hindsight:
        """What was learned."""
        return self._hindsight

    # -- what happens --------------------------------------------------------------------------------------------------

    def asked(self, uses: Sequence[Event], blocks: int, now: int) -> bool:
        """A request asks for so many known blocks. True: it is time that somebody lets `learn` run."""
        self.now = now
        self._events += uses
        self._undigested += blocks
        if self._undigested >= self._digested_at and not self.due:
            self.due = len(self._events)
            self._then = (now, list(self._copies), self._held, self._undigested)
        if len(self._events) < self._overdue_at:
            return False
        self._overdue_at += MOST_EVENTS
        return True

    def entered(self, keys: bytes, depth: int, now: int) -> bytes:
        """Blocks that were nowhere are stored, the first at `depth`: return their traits."""
        self.now = now
        blocks = len(keys) // KEY_BYTES
        dated = now + 1  # when the lease is lengthened over them
        traits = self._returned(keys, dated) if self._remembered else b""
        fresh = blocks - len(traits)
        self._held += blocks
        self._undigested += blocks
        if fresh:
            new = bytes([1]) * (fresh - 1) + bytes([LAST])
            self._events.append((new, 0, dated))
            traits += new
        return traits

    def extended(self, traits: bytes) -> bytes:
        """The last block with these traits, which might have been a prompt's last, was not."""
        if traits[-1] != LAST:
            return traits
        return traits[:-1] + bytes([1])

    def lost(self, keys: Sequence[bytes], trait: int, last_use: int) -> None:
        """Blocks of one trait, used at one time, leave for good."""
        self._held = max(self._held - len(keys), 0)
        self._remembered.add(keys, trait, last_use, self._held)

    def erased(self, blocks: int, trait: int, last_use: int) -> None:
        """Blocks used at one time leave because they must, and are not remembered."""
        self._held = max(self._held - blocks, 0)
        self._events.append((bytes([trait]) * blocks, last_use, 0))

    def adopted(self, blocks: int) -> None:
        """So many blocks came from another account, of which nothing is known here; or went there, if negative."""
        self._held = max(self._held + blocks, 0)
        if blocks > 0:
            self._undigested += blocks
            self._events.append((bytes([1]) * blocks, 0, self.now))

    def _returned(self, keys: bytes, dated: int) -> bytes:
        """The traits, one use on, of as many of the first blocks as are remembered.

        A block is forgotten no later than those above it, so that none after the first unknown one is remembered.
        """
        traits = bytearray()
        for at in range(0, len(keys), KEY_BYTES):
            known = self._remembered.pop(keys[at : at + KEY_BYTES])
            if known is None:
                break
            trait, last_use = known
            self._events.append((bytes([trait]), last_use, dated))
            traits.append(STEP[trait])
        return bytes(traits)

    # -- what follows from it ------------------------------------------------------------------------------------------

    def learn(self, lock: AbstractContextManager[object]) -> None:
        """Digest what is due. Takes the index's `lock` only to get it; does nothing while another thread is at it."""
        if not self._digesting.acquire(blocking=False):
            return
        try:
            with lock:
                events, self._events = self._events[: self.due], self._events[self.due :]
                (now, copies, held, digested), self.due = self._then, 0
                self._undigested -= digested if events else 0
                self._overdue_at = len(self._events) + MOST_EVENTS
                self._digested_at = max(DIGESTED_BLOCKS, int(held * DIGESTED_SHARE))
            if events:
                self._hindsight.digest(events, now, copies, held)
        finally:
            self._digesting.release()
