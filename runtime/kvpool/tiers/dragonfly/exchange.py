"""One pipeline on one connection: requests go out ahead of the answers, as many as are allowed to be in flight.

Measured against a Redis of one thread, over loopback: what is asked for at once the server first copies out as a whole,
into memory that it has to touch anew. Of values of 256 KiB, 16 MiB in flight gave half of what 1 to 4 MiB gave.
"""

from collections.abc import Sequence

from kvpool.tiers.dragonfly.commands import Answer, Bytes, Command
from kvpool.tiers.dragonfly.wire import Wire

IN_FLIGHT_BYTES = 4 << 20
"""Of answers that were asked for and have not come; one larger than that is asked for alone."""


class Exchange:
    """Asks `commands` on a connection, `at_once` of them in flight, and appends to `answers` in their order."""

    def __init__(self, wire: Wire, commands: Sequence[Command], at_once: int, answers: list[Answer]) -> None:
        self._wire = wire
        self._answers = answers
        self._commands = commands
        self._at_once = max(at_once, 1)
        self._are_small = not [command for command in commands if command.into is not None or len(command.request) > 1]
        self._asked = 0
        self._in_flight_bytes = 0

    def start(self) -> None:
        """Send the first requests, as far as that needs no waiting."""
        self._ask(0)

    def finish(self) -> None:
        """Take all answers, and send the rest of the requests meanwhile. Raises `FaultError`; then close the wire."""
        wire, answers, commands = self._wire, self._answers, self._commands
        at = 0
        while at < len(commands):
            if self._asked < len(commands) and self._has_room(at):
                self._ask(at)
            into = commands[at].into
            if into is not None:
                answers.append(wire.answer_into(into))
                self._in_flight_bytes -= len(into)
            else:
                answers.append(wire.answer())
                if self._are_small:
                    numbers = wire.numbers(self._asked - at - 1)
                    answers += numbers
                    at += len(numbers)
            at += 1

    def _has_room(self, answered: int) -> bool:
        """Whether half of what may be in flight has come: to ask for one at a time would be a system call for each."""
        return 2 * (self._asked - answered) <= self._at_once and 2 * self._in_flight_bytes <= IN_FLIGHT_BYTES

    def _ask(self, answered: int) -> None:
        if self._are_small:
            more = self._commands[self._asked : answered + self._at_once]
            self._asked += len(more)
            return self._wire.send([b"".join([command.request[0] for command in more])])
        parts: list[Bytes] = []
        small: list[bytes] = []
        last = min(answered + self._at_once, len(self._commands))
        while self._asked < last:
            command = self._commands[self._asked]
            nbytes = 0 if command.into is None else len(command.into)
            if nbytes and self._in_flight_bytes and self._in_flight_bytes + nbytes > IN_FLIGHT_BYTES:
                break
            self._in_flight_bytes += nbytes
            self._asked += 1
            for part in command.request:
                if isinstance(part, bytes):
                    small.append(part)
                else:
                    parts += [b"".join(small), part]
                    small.clear()
        if small:
            parts.append(b"".join(small))
        return self._wire.send(parts)
