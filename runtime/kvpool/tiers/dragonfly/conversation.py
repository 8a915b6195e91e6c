"""One call's requests to one server: a connection that is borrowed, used, and given back or closed."""

from kvpool.tiers.dragonfly.commands import Answer, Command, ServerError
from kvpool.tiers.dragonfly.connections import Connections
from kvpool.tiers.dragonfly.exchange import Exchange
from kvpool.tiers.dragonfly.faults import FaultError, LostError, RefusedError
from kvpool.tiers.dragonfly.patience import Patience
from kvpool.tiers.dragonfly.wire import Wire


class Conversation:
    """Borrows a connection and sends what can be sent without waiting; `finish` waits for the answers.

    Raises `FaultError` where there is no connection to be had. Ends with `close`, which may be called at any time.
    """

    def __init__(self, pool: Connections, commands: list[Command], patience: Patience, at_once: int) -> None:
        self.answers: list[Answer] = []
        """Those that came, in the order of the requests."""
        self._pool, self._commands, self._patience, self._at_once = pool, commands, patience, at_once
        self._wire: Wire | None = pool.borrow(patience)
        self.host = self._wire.host
        self._exchange = Exchange(self._wire, commands, at_once, self.answers)
        try:
            self._exchange.start()
        except LostError:
            pass  # `finish` meets it again
        except BaseException:
            self.close()
            raise

    def finish(self) -> FaultError | None:
        """Take the answers. What the server said of itself as a whole, where that was an error. Raises `FaultError`."""
        assert self._wire is not None
        try:
            self._exchange.finish()
        except LostError:
            if not self._wire.used_at_s:
                raise
            self._ask_rest_anew()
        wire, self._wire = self._wire, None
        if ServerError not in map(type, self.answers):
            self._pool.give_back(wire)
            return None
        errors = [
            (command.is_extra, answer.text)
            for command, answer in zip(self._commands, self.answers, strict=True)
            if isinstance(answer, ServerError) and answer.is_of_the_tier
        ]
        if not errors:
            self._pool.give_back(wire)
            return None
        self._pool.discard(wire)  # the address may mean another server by now
        faults = [text for is_extra, text in errors if not is_extra]
        return RefusedError(f"{wire.peer}: {faults[0]}") if faults else None

    def close(self) -> None:
        """Close the connection, if it is still borrowed: nobody knows what would come on it."""
        wire, self._wire = self._wire, None
        if wire is not None:
            self._pool.discard(wire)

    def _ask_rest_anew(self) -> None:
        """Ask for what was not answered on a new connection."""
        lost, self._wire = self._wire, None
        assert lost is not None
        self._wire = self._pool.replace(lost, self._patience)
        rest = self._commands[len(self.answers) :]
        self._exchange = Exchange(self._wire, rest, self._at_once, self.answers)
        self._exchange.start()
        self._exchange.finish()
