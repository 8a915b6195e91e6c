"""Looks up the addresses of host names in threads, so that a name server that is silent holds nobody up."""

import socket
import threading
from concurrent.futures import Future


class HostLookup:
    """Looks names up. Safe from any thread; there is never more than one thread per name."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[str, Future[list[str]]] = {}

    def addresses(self, host: str, budget_s: float) -> list[str]:
        """The addresses of `host`, best first; none of them twice.

        Raises `OSError`, of which `TimeoutError` is one: no answer yet. The lookup goes on then, and the next call for
        this name waits for the same answer.
        """
        return self._start(host).result(budget_s)

    def _start(self, host: str) -> Future[list[str]]:
        with self._lock:
            lookup = self._running.get(host)
            if lookup is None:
                lookup = self._running[host] = Future()
                threading.Thread(target=self._run, args=(host, lookup), name="kvpool-lookup", daemon=True).start()
            return lookup

    def _run(self, host: str, lookup: Future[list[str]]) -> None:
        try:
            found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
            answer: list[str] | Exception = list(dict.fromkeys(str(address[0]) for *_, address in found))
        except (OSError, UnicodeError) as error:  # UnicodeError: a label that is too long, or empty
            answer = error if isinstance(error, OSError) else OSError(f"{host!r} is no host name")
        with self._lock:
            del self._running[host]
        if isinstance(answer, Exception):
            lookup.set_exception(answer)
        else:
            lookup.set_result(answer)
