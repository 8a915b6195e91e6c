"""A made-up trace for where no recorded one is at hand: chats of several turns below a few shared system prompts."""

import random
from itertools import count

from kvpool.replay.trace import BlockNumbers, Trace

_SYSTEM_PROMPTS = 12
_OPEN_CHATS = 400
"""So many chats are remembered; the oldest is forgotten for a new one."""
_CONTINUES = 2 / 3
"""Share of the requests that continue a chat."""
_ENDS = 1 / 9
"""Share of the requests that are a chat's last."""


def synthetic_trace(requests: int, *, seed: int) -> Trace:
    """The same trace for the same seed; about seven in ten blocks were asked for before.

    A request either opens a chat, with a system prompt that is more or less popular, or continues one of the open
    chats, a late one rather than an old one, with all that was said there before.
    """
    rng = random.Random(seed)  # noqa: S311 - a trace, not a secret
    numbers, fresh = BlockNumbers(), count()

    def text(least: int, mean: float) -> list[int]:
        return [next(fresh) for _ in range(least + int(rng.expovariate(1 / mean)))]

    system_prompts = [text(1, 4) for _ in range(_SYSTEM_PROMPTS)]
    chats: list[list[int]] = []
    trace = []
    for _ in range(requests):
        if chats and rng.random() < _CONTINUES:
            chat = chats.pop(-1 - min(int(rng.expovariate(4 / _OPEN_CHATS)), len(chats) - 1))
        else:
            popularity = min(int(rng.expovariate(1 / 2)), _SYSTEM_PROMPTS - 1)
            chat = system_prompts[popularity] + text(0, 8)
        chat = chat + text(1, 3)
        trace.append(numbers.number(chat))
        if rng.random() >= _ENDS:
            chats = [*chats, chat][-_OPEN_CHATS:]
    return trace
