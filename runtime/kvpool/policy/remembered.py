"""Evicted blocks that are remembered for a while, each by its key: when it was used last, and its trait."""

from collections.abc import Sequence

LEAST_REMEMBERED = 8_192
MOST_REMEMBERED = 1 << 16
REMEMBERED_PER_HELD = 4
_SHIFT = 8


class Remembered:
    """Two generations; the older one is forgotten when the younger one is full."""

    def __init__(self) -> None:
        self._young: dict[bytes, int] = {}
        self._old: dict[bytes, int] = {}

    def __len__(self) -> int:
        return len(self._young) + len(self._old)

    def add(self, keys: Sequence[bytes], trait: int, last_use: int, held: int) -> None:
        """Remember these, a few. `held` blocks are not evicted: the more, the more is remembered."""
        young = self._young
        if len(young) >= LEAST_REMEMBERED and len(young) >= min(REMEMBERED_PER_HELD * held // 2, MOST_REMEMBERED):
            self._old, self._young = young, {}
        self._young.update(dict.fromkeys(keys, last_use << _SHIFT | trait))

    def pop(self, key: bytes) -> tuple[int, int] | None:
        """The trait and the last use of a block that is held again, if it is remembered."""
        known = self._young.pop(key, 0) or self._old.pop(key, 0)
        return (known & 0xFF, known >> _SHIFT) if known else None

    def __bool__(self) -> bool:
        return bool(self._young or self._old)
