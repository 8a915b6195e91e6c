"""Removing what has a name of a kind, in steps that are short for the server: `SCAN` and `UNLINK`."""

from collections.abc import Callable

from kvpool.tiers.dragonfly.commands import Answer, ServerError, plain, remove
from kvpool.tiers.dragonfly.faults import RefusedError, SurpriseError
from kvpool.tiers.dragonfly.names import Parts, parts_of
from kvpool.tiers.dragonfly.opening import Node
from kvpool.tiers.dragonfly.patience import Patience
from kvpool.tiers.dragonfly.servers import Servers

STEP_KEYS = 1000
"""So many keys, of all that the server holds, are looked at in a step: some 0.2 ms."""


def sweep(
    servers: Servers, pattern: bytes, is_doomed: Callable[[Parts], bool], patience: Callable[[], Patience], at_once: int
) -> int:
    """Remove the records whose keys match and are doomed; how many those were.

    Each step has a budget of its own. What is there from the beginning to the end is met. Raises `FaultError`.
    """
    removed = 0
    for node in servers.topology(patience()).masters:
        cursor = b"0"
        while True:
            cursor, names = _step(servers, node, cursor, pattern, patience())
            doomed = [name for name in names if (parts := parts_of(name)) is not None and is_doomed(parts)]
            answers = servers.ask([remove(name) for name in doomed], patience(), at_once)
            if answers.faults:
                raise RefusedError(answers.fault)
            removed += sum(answer for answer in answers.each if isinstance(answer, int))
            if cursor == b"0":
                break
    return removed


def _step(
    servers: Servers, node: Node | None, cursor: bytes, pattern: bytes, patience: Patience
) -> tuple[bytes, list[bytes]]:
    """Where the next step begins, and the keys of this one."""
    scan = plain(b"", b"SCAN", cursor, b"MATCH", pattern, b"COUNT", b"%d" % STEP_KEYS)
    [answer] = servers.ask_at(node, [scan], patience, 1)
    match answer:
        case [bytes(following), list(names)]:
            return following, [name for name in names if isinstance(name, bytes)]
    raise SurpriseError(said(answer))


def said(answer: Answer) -> str:
    """An answer that was not expected, in words."""
    return answer.text if isinstance(answer, ServerError) else f"an unexpected answer: {answer!r:.100}"
