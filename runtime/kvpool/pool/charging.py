"""Charges a model for what is about to be allocated, once it has given up what it can of its own."""

from collections.abc import Callable, Sequence

from kvpool.prefix.accounts import Account, Grant
from kvpool.prefix.index import PrefixIndex


def charge(
    index: PrefixIndex, account: Account, level: int, sizes: Sequence[int], *, give_up: Callable[[int], bool]
) -> tuple[int, Grant]:
    """Charge records of these sizes, in bytes, at `level`: how many of them, and why not all.

    At its limit the model is asked to `give_up` so many bytes of its own, until it says that nothing went.
    """
    granted, why = index.charge(account, level, sizes)
    while granted < len(sizes) and why is Grant.OVER_LIMIT and give_up(sum(sizes[granted:])):
        more, why = index.charge(account, level, sizes[granted:])
        granted += more
    return granted, why
