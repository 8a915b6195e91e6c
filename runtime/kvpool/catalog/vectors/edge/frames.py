"""Messages between the process that embeds the cache and the one that keeps vectors, over a pair of sockets.

    0   4   length of what follows       4   4   number of the question, which its answer repeats
    8   4   length of the JSON           12  ..  JSON object, then vectors as float32

Little-endian. Both sides are this program, so nothing is checked but the length.
"""

import json
import socket
import struct
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple

_HEAD = struct.Struct("<III")
_LENGTH = struct.Struct("<I")
MAX_FRAME_BYTES = 16 << 20
_RECEIVE_BYTES = 1 << 18


class Frame(NamedTuple):
    """One message."""

    number: int
    said: Mapping[str, Any]
    vectors: bytes = b""


class BrokenChannelError(Exception):
    """The other side has ended, or what it sent is no frame: nothing more can be said here."""


class Channel:
    """One end of a pair of sockets. Not safe for several threads."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self._received = bytearray()

    def send(self, frame: Frame, deadline: float) -> None:
        """Send it whole by this time of the monotonic clock. Raises `BrokenChannelError` where that fails."""
        said = json.dumps(frame.said, separators=(",", ":")).encode()
        head = _HEAD.pack(_HEAD.size - _LENGTH.size + len(said) + len(frame.vectors), frame.number, len(said))
        self._wait_until(deadline)
        try:
            self.socket.sendall(head + said + frame.vectors)
        except OSError as error:  # of a timeout too: half a frame has been sent, perhaps
            raise BrokenChannelError(str(error)) from None

    def receive(self, deadline: float) -> Frame:
        """The next frame. Raises `TimeoutError`, after which it may be asked again, or `BrokenChannelError`."""
        while (frame := self.next()) is None:
            self._wait_until(deadline)
            self.fill()
        return frame

    def fill(self) -> None:
        """Take what has arrived, once. Raises as `receive` does."""
        try:
            data = self.socket.recv(_RECEIVE_BYTES)
        except TimeoutError:
            raise
        except OSError as error:
            raise BrokenChannelError(str(error)) from None
        if not data:
            raise BrokenChannelError("the other side has ended")
        self._received += data

    def next(self) -> Frame | None:
        """The next of the frames that have arrived."""
        if len(self._received) < _HEAD.size:
            return None
        length, number, json_bytes = _HEAD.unpack_from(self._received)
        if length > MAX_FRAME_BYTES:
            raise BrokenChannelError(f"a frame of {length} bytes")
        end = _LENGTH.size + length
        if len(self._received) < end:
            return None
        body = bytes(memoryview(self._received)[_HEAD.size : end])
        del self._received[:end]
        return Frame(number, json.loads(body[:json_bytes]), body[json_bytes:])

    def close(self) -> None:
        """Close this end, from any thread; one that waits on it wakes."""
        with suppress(OSError):  # the other side has ended
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()

    def _wait_until(self, deadline: float) -> None:
        remaining_s = deadline - time.monotonic()
        if remaining_s <= 0:
            raise TimeoutError
        self.socket.settimeout(remaining_s)
