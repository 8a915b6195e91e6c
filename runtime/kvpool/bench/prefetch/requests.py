"""Streams of requests: what each asked for as numbered blocks, and as tokens for those who compare prompts."""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from kvpool.bench.engine.pools import BLOCK_TOKENS
from kvpool.bench.sharing.workloads import Request, Text
from kvpool.replay.trace import BlockNumbers, Trace

_TOKEN_BYTES = 4
_MADE_UP_TOKENS = 16
_ODD, _STEP, _KEPT_BITS = 2_654_435_761, 40_503, 17


class Asked(NamedTuple):
    """One request."""

    blocks: "array[int]"
    """All that it stores, each a number that stands for its whole path from the prompt's start."""
    prompt_blocks: int
    """So many of them are its prompt's; the others are the answer's."""
    tokens: bytes
    """The prompt."""


def asked_of_trace(trace: Trace) -> list[Asked]:
    """A trace has no tokens: each block stands for 16 that are made up from its number, and are the same every time."""
    return [Asked(blocks, len(blocks), _made_up(blocks)) for blocks in trace]


def asked_of_workload(requests: Iterable[Request]) -> list[Asked]:
    """Whole blocks of prompts and answers."""
    numbers = BlockNumbers()
    size = BLOCK_TOKENS * _TOKEN_BYTES
    asked = []
    for prompt, answer, _ in requests:
        whole = prompt + answer
        blocks = numbers.number(whole[at : at + size] for at in range(0, len(whole) - size + 1, size))
        asked.append(Asked(blocks, len(prompt) // size, prompt))
    return asked


def distinct(asked: Sequence[Asked]) -> int:
    """How many different blocks these are."""
    return len({block for request in asked for block in request.blocks})


def stages(requests: int, seed: int = 5, *, flows: int = 150, at_once: int = 3) -> Iterator[Request]:
    """What semantic prefetch is made for: users go through the 6 stages of a flow, few of them at once.

    Each stage has a prompt of 600 to 1,500 tokens of its own, before 50 to 150 tokens of the user's. All 150 flows are
    equally popular, so that frequency says nothing, and what was asked says which stage is next.
    """
    text = Text(seed)
    prompts = [[text.of(600, 1_500) for _ in range(6)] for _ in range(flows)]
    running: list[Iterator[bytes]] = []
    for _ in range(requests):
        stage = None
        while stage is None:
            if len(running) < at_once:
                running.append(iter(text.rng.choice(prompts)))
            user = text.rng.randrange(len(running))
            stage = next(running[user], None)
            if stage is None:
                del running[user]
        yield Request(stage + text.of(50, 150), text.of(20, 100), len(stage) // _TOKEN_BYTES)


def _made_up(blocks: "array[int]") -> bytes:
    numbers = np.asarray(blocks, np.uint32)[:, None] * np.uint32(_ODD)
    tokens = numbers + np.arange(_MADE_UP_TOKENS, dtype=np.uint32) * np.uint32(_STEP)
    return (tokens >> np.uint32(32 - _KEPT_BITS)).astype(np.int32).tobytes()
