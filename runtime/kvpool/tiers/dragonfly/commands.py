"""Requests and answers as data: pure, but for the buffers of records that they point to.

The protocol is RESP2, which every server speaks. A request is a list of bulk strings; records are never copied into it.
"""

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, TypeAlias

Bytes: TypeAlias = bytes | bytearray | memoryview

_WHOLE_TIER = frozenset(
    ("READONLY", "LOADING", "MASTERDOWN", "CLUSTERDOWN", "NOAUTH", "WRONGPASS", "MISCONF", "BUSY", "NOREPLICAS")
)
_ELSEWHERE = frozenset({"MOVED", "ASK"})


class Unanswered(Enum):
    """What stands for an answer that did not come."""

    UNANSWERED = "unanswered"


UNANSWERED = Unanswered.UNANSWERED


@dataclass(frozen=True, slots=True)
class ServerError:
    """An error that a server answered with."""

    text: str

    @property
    def code(self) -> str:
        """Its first word."""
        return self.text.partition(" ")[0]

    @property
    def is_of_the_tier(self) -> bool:
        """Whether it is about the server as a whole, not about one key."""
        return self.code in _WHOLE_TIER

    @property
    def is_elsewhere(self) -> bool:
        """Whether another node of a cluster has the key, which it names."""
        return self.code in _ELSEWHERE


Answer: TypeAlias = "int | bytes | ServerError | Unanswered | list[Answer] | None"


class Command(NamedTuple):
    """One request. `name` is the key that it is about, by which it finds its server."""

    name: bytes
    request: tuple[Bytes, ...]
    into: memoryview | None = None
    """Where the bulk of the answer goes: then the answer is True or False, whether it came and had that length."""
    is_extra: bool = False
    """Whether it may be refused without that being a fault: what was asked for with it was done all the same."""


def encoded(*words: bytes) -> bytes:
    """A request of small words."""
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in words)


def plain(name: bytes, *words: bytes) -> Command:
    """Any command of small words."""
    return Command(name, (encoded(*words),))


def length_of(name: bytes) -> Command:
    """The length of a value, 0 where there is none; `WRONGTYPE` where it is no string."""
    return Command(name, (b"*2\r\n$6\r\nSTRLEN\r\n$%d\r\n%b\r\n" % (len(name), name),))


def read_piece(name: bytes, start: int, into: memoryview) -> Command:
    """As many bytes of a value from `start` on as `into` has."""
    return _read_range(name, start, start + len(into) - 1, into)


def read_end(name: bytes, start: int, into: memoryview) -> Command:
    """All bytes of a value from `start` on, if `into` is as long as they are: one more is asked for, and not wanted."""
    return _read_range(name, start, start + len(into), into)


def _read_range(name: bytes, first: int, last: int, into: memoryview) -> Command:
    start, end = b"%d" % first, b"%d" % last
    request = b"*4\r\n$8\r\nGETRANGE\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n"
    return Command(name, (request % (len(name), name, len(start), start, len(end), end),), into)


def write(name: bytes, record: memoryview, ttl_ms: int) -> Command:
    """Set a value, and for how long it is kept."""
    before = b"*5\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n" % (len(name), name, len(record))
    ttl = b"%d" % ttl_ms
    return Command(name, (before, record, b"\r\n$2\r\nPX\r\n$%d\r\n%b\r\n" % (len(ttl), ttl)))


def keep_longer(name: bytes, ttl_ms: int) -> Command:
    """Keep a value for so long from now on, unless it is kept longer already. Redis >= 7, Valkey, Dragonfly."""
    ttl = b"%d" % ttl_ms
    request = b"*4\r\n$7\r\nPEXPIRE\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n$2\r\nGT\r\n" % (len(name), name, len(ttl), ttl)
    return Command(name, (request,), is_extra=True)


def keep(name: bytes, ttl_ms: int) -> Command:
    """Keep a value for so long from now on."""
    ttl = b"%d" % ttl_ms
    request = b"*3\r\n$7\r\nPEXPIRE\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n" % (len(name), name, len(ttl), ttl)
    return Command(name, (request,), is_extra=True)


def remove(name: bytes) -> Command:
    """Remove a value; its memory is freed beside other work."""
    return Command(name, (b"*2\r\n$6\r\nUNLINK\r\n$%d\r\n%b\r\n" % (len(name), name),))
