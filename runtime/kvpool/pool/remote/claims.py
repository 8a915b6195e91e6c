"""Who fetches which block: several requests for one prompt fetch each of its blocks once, and wait for each other."""

import threading
from collections.abc import Sequence

from kvpool.blocks.identity import BlockKey


class Claim:
    """The blocks that one lookup fetches. Ends with `release`."""

    __slots__ = ("_claims", "_released", "blocks")

    def __init__(self, claims: "Claims", blocks: Sequence[BlockKey]) -> None:
        self.blocks = blocks
        self._claims = claims
        self._released = threading.Event()

    def wait(self, seconds: float) -> bool:
        """Wait until it is released: the blocks are in the tree now, or could not be had. False: not within the time.

        Whoever waits must have no claim of its own.
        """
        return self._released.wait(seconds)

    def release(self) -> None:
        """Let others go on. Calling it again does nothing."""
        self._claims._end(self)
        self._released.set()


class Claims:
    """All claims of a pool. Safe from any thread."""

    def __init__(self) -> None:
        self._of: dict[BlockKey, Claim] = {}
        self._lock = threading.Lock()

    def claim(self, keys: Sequence[BlockKey]) -> tuple[Claim, bool]:
        """Claim the leading blocks that nobody has claimed, and whether that is any; else who has the first one."""
        with self._lock:
            others = self._of.get(keys[0])
            if others is not None:
                return others, False
            free = next((at for at, key in enumerate(keys) if key in self._of), len(keys))
            claim = Claim(self, keys[:free])
            self._of.update(dict.fromkeys(claim.blocks, claim))
            return claim, True

    def _end(self, claim: Claim) -> None:
        with self._lock:
            for key in claim.blocks:
                if self._of.get(key) is claim:
                    del self._of[key]
