"""A hint at tenants' epochs, for processes that cannot reach the authority: the highest that anybody noted.

It is a sorted set of one member: the epoch in 20 decimal digits, all of the same score, so that they are sorted as
text. Adding, and removing all but the highest, can be done by anybody in any order, and never lower it.
"""

from kvpool.blocks.identity import TenantDigest
from kvpool.tiers.dragonfly.commands import ServerError, plain
from kvpool.tiers.dragonfly.faults import RefusedError
from kvpool.tiers.dragonfly.names import epoch_name
from kvpool.tiers.dragonfly.patience import Patience
from kvpool.tiers.dragonfly.servers import Servers

TTL_MS = 30 * 24 * 3600 * 1000
_DIGITS = 20


def highest_epoch(servers: Servers, tenant: TenantDigest, patience: Patience) -> int | None:
    """The highest that was noted; None where none was, or something else is there. Raises `FaultError`."""
    answers = servers.ask([plain((name := epoch_name(tenant)), b"ZRANGE", name, b"-1", b"-1")], patience, 1)
    if answers.faults:
        raise RefusedError(answers.fault)
    match answers.each:
        case [[bytes(text)]] if text.isdigit() and len(text) == _DIGITS:
            return int(text)
    return None


def note_epoch(servers: Servers, tenant: TenantDigest, epoch: int, patience: Patience) -> None:
    """Note an epoch, if it is the highest. Raises `FaultError`."""
    name = epoch_name(tenant)
    member = str(epoch).zfill(_DIGITS).encode()
    answers = servers.ask(
        [
            plain(name, b"MULTI"),
            plain(name, b"ZADD", name, b"0", member),
            plain(name, b"ZREMRANGEBYRANK", name, b"0", b"-2"),
            plain(name, b"PEXPIRE", name, b"%d" % TTL_MS),
            plain(name, b"EXEC"),
        ],
        patience,
        5,
    )
    if answers.faults:
        raise RefusedError(answers.fault)
    for answer in answers.each:
        if isinstance(answer, ServerError) and answer.code != "EXECABORT":
            raise RefusedError(answer.text)
