"""A connection to a server: bytes in and bytes out, both at once, so that neither side can wait for the other forever.

Memory: 64 KiB for lines and small answers. Large answers go straight into the caller's buffers; only what happens to
have come with the line before is copied. Lengths that the server announces are checked before anything is taken or
touched for them. Not safe for several threads: whoever has borrowed it is alone with it, and reads and writes himself,
so that once it is closed nothing can arrive anywhere.
"""

import re
from collections import deque
from collections.abc import Sequence
from itertools import islice

from kvpool.tiers.dragonfly.commands import Answer, Bytes, ServerError
from kvpool.tiers.dragonfly.faults import LostError, StalledError, SurpriseError
from kvpool.tiers.dragonfly.patience import Patience
from kvpool.tiers.dragonfly.streams import Stream

BUFFER_BYTES = 64 << 10
MAX_ANSWER_BYTES = 16 << 20
"""The most that an answer may take which does not go into a caller's buffer."""
MAX_DEPTH = 8
MAX_DRAINED_BYTES = 1 << 20
"""A bulk of an unexpected length is read past; beyond this the connection is given up instead."""
_LARGE_BYTES = 16 << 10
_ELEMENT_BYTES = 64
_LINE_BYTES = 256
_MAX_PARTS = 64
_CRLF = b"\r\n"
_NUMBERS = re.compile(rb"(?::[0-9]{1,18}\r\n)+")
_INT, _SIMPLE, _ERROR, _BULK, _ARRAY = b":+-$*"


class Wire:
    """One connection, logged in. `patience` is that of the call that has borrowed it.

    After an exception it must be closed: what comes next on it belongs to nobody knows which request.
    """

    def __init__(self, stream: Stream, peer: str) -> None:
        self.peer, self.host = peer, peer.rpartition(":")[0]
        self.patience = Patience(0.0)
        self.used_at_s = 0.0
        """When the last call gave it back, on the monotonic clock; 0: none has."""
        self._stream = stream
        self._outgoing: deque[Bytes] = deque()
        self._buffer = bytearray(BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0
        self._room_bytes = 0

    def close(self) -> None:
        """Close the connection. Calling it again does nothing."""
        self._outgoing.clear()
        self._stream.close()

    def cut(self) -> None:
        """End the connection under whoever uses it, from another thread: what he waits for does not come any more."""
        self._stream.cut()

    def is_quiet(self) -> bool:
        """Whether it can be used again: nobody has closed it, and nothing came that nobody asked for."""
        return self._end == self._start and not self._outgoing and self._stream.is_quiet()

    # --- out ---------------------------------------------------------------------------------------------------------

    def send(self, parts: Sequence[Bytes]) -> None:
        """Queue these, and write as much as goes at once; the rest goes while answers are read."""
        self._outgoing.extend(parts)
        self._write()

    def _write(self) -> None:
        """Write what goes without waiting."""
        outgoing = self._outgoing
        while outgoing:
            parts = outgoing if len(outgoing) <= _MAX_PARTS else list(islice(outgoing, _MAX_PARTS))
            try:
                sent = self._stream.send(parts)
            except OSError as error:
                raise self._lost(error) from None
            if not sent:
                return
            self.patience.moved()
            while outgoing and sent >= len(outgoing[0]):
                sent -= len(outgoing.popleft())
            if sent:
                outgoing[0] = memoryview(outgoing[0])[sent:]

    # --- in ----------------------------------------------------------------------------------------------------------

    def answer(self) -> Answer:
        """The next answer, which is small: all of it together takes less than `MAX_ANSWER_BYTES`."""
        self._room_bytes = MAX_ANSWER_BYTES
        return self._element(0)

    def numbers(self, at_most: int) -> list[int]:
        """The next answers that are integers and have come already: many small ones, without a step for each."""
        come = _NUMBERS.match(self._buffer, self._start, self._end)
        if at_most <= 0 or come is None:
            return []
        each = come[0].split(_CRLF, at_most)
        self._start = come.end() - len(each.pop())
        return [int(line[1:]) for line in each]

    def _element(self, depth: int) -> Answer:
        line = self._line()
        kind = line[0] if line else 0
        if kind == _INT:
            return self._number(line)
        if kind == _SIMPLE:
            return bytes(line[1:])
        if kind == _ERROR:
            return ServerError(line[1:].decode(errors="replace"))
        if kind == _BULK:
            return self._text(line)
        if kind == _ARRAY and depth < MAX_DEPTH:
            return self._array(line, depth + 1)
        raise self._surprise(line)

    def _array(self, line: bytearray, depth: int) -> Answer:
        length = self._number(line)
        self._take_room(length * _ELEMENT_BYTES, line)
        if length < 0:
            return None
        return [self._element(depth) for _ in range(length)]

    def _take_room(self, nbytes: int, line: bytearray) -> None:
        self._room_bytes -= nbytes
        if self._room_bytes < 0:
            raise self._surprise(line)

    def answer_into(self, into: memoryview) -> "bool | ServerError":
        """The next answer, a bulk of the length of `into`, straight into it.

        False where it is nil, or has another length; then `into` is as it was.
        """
        nbytes = len(into)
        line = self._line(_LINE_BYTES if nbytes >= _LARGE_BYTES else BUFFER_BYTES)
        kind = line[0] if line else 0
        if kind == _ERROR:
            return ServerError(line[1:].decode(errors="replace"))
        if kind != _BULK:
            raise self._surprise(line)
        announced = self._number(line)
        if announced != nbytes:
            if announced >= 0:
                self._drain(announced)
            return False
        came = min(nbytes, self._end - self._start)
        into[:came] = self._view[self._start : self._start + came]
        self._start += came
        while came < nbytes:
            came += self._receive(into[came:])
        self._end_of_bulk()
        return True

    def _line(self, at_most: int = BUFFER_BYTES) -> bytearray:
        """The next line without its end. For it, no more than `at_most` bytes at once are taken off the stream."""
        while (end := self._buffer.find(_CRLF, self._start, self._end)) < 0:
            if self._end == BUFFER_BYTES:
                self._compact()
            if self._end == BUFFER_BYTES:
                raise SurpriseError(f"{self.peer}: a line of {BUFFER_BYTES} bytes without an end")
            self._fill(at_most)
        line = self._buffer[self._start : end]
        self._start = end + 2
        return line

    def _compact(self) -> None:
        """Move what is left to the buffer's start."""
        left = self._end - self._start
        self._view[:left] = self._view[self._start : self._end]
        self._start, self._end = 0, left

    def _text(self, line: bytearray) -> bytes | None:
        left = self._number(line)
        if left < 0:
            return None
        self._take_room(left, line)
        parts = []
        while left:
            if self._start == self._end:
                self._fill()
            taken = min(left, self._end - self._start)
            parts.append(self._buffer[self._start : self._start + taken])
            self._start += taken
            left -= taken
        self._end_of_bulk()
        return b"".join(parts)

    def _drain(self, nbytes: int) -> None:
        """Read past a value that nobody wants, through the buffer."""
        if nbytes > MAX_DRAINED_BYTES:
            raise SurpriseError(f"{self.peer}: a value of {nbytes} bytes where none can be")
        while nbytes:
            if self._start == self._end:
                self._fill()
            taken = min(nbytes, self._end - self._start)
            self._start += taken
            nbytes -= taken
        self._end_of_bulk()

    def _end_of_bulk(self) -> None:
        while self._end - self._start < len(_CRLF):
            if BUFFER_BYTES - self._end < len(_CRLF):
                self._compact()
            self._fill(_LINE_BYTES)
        if self._buffer[self._start : self._start + 2] != _CRLF:
            raise SurpriseError(f"{self.peer}: a value does not end where it should")
        self._start += 2

    def _fill(self, at_most: int = BUFFER_BYTES) -> None:
        """Take something off the stream into the buffer."""
        if self._start == self._end:
            self._start = self._end = 0
        self._end += self._receive(self._view[self._end : self._end + at_most])

    def _receive(self, into: memoryview) -> int:
        """Bytes off the stream, at least one; what waits to be written is written meanwhile."""
        came: int | None = None
        try:
            while self._outgoing and came is None:
                came = self._stream.receive_unless_writable(into, self.patience)
                if came is None:
                    self._write()
                    if not self.patience.left_s:
                        raise TimeoutError
            if came is None:
                came = self._stream.receive(into, self.patience)
        except TimeoutError:
            raise StalledError(f"{self.peer}: nothing moved for {self.patience.budget_s * 1000:.0f} ms") from None
        except OSError as error:
            raise self._lost(error) from None
        if not came:
            raise LostError(f"{self.peer}: it closed the connection")
        self.patience.moved()
        return came

    def _lost(self, error: OSError) -> LostError:
        return LostError(f"{self.peer}: {error.strerror or error}")

    def _number(self, line: bytearray) -> int:
        try:
            number = int(line[1:])
        except ValueError:
            raise self._surprise(line) from None
        if number < -1 and line[0] != _INT:
            raise self._surprise(line)
        return number

    def _surprise(self, line: bytearray) -> SurpriseError:
        return SurpriseError(f"{self.peer}: it answered {bytes(line[:60])!r}")
