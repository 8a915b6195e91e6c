"""Made-up requests, the same for the same seed: what a chatbot, an agent, and a mixed service ask for.

Lengths are in tokens. A prompt begins with what many requests have in common (instructions, tools, a template); every
request says how much that is, and what follows is its own. Texts are random token ids: no two are alike by accident.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

_TOKEN_BYTES = 4


class Request(NamedTuple):
    """A prompt, what the model answers, and how many of the prompt's first tokens are common to many requests."""

    prompt: bytes
    answer: bytes
    common_tokens: int


class Text:
    """Makes texts of random token ids."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)  # noqa: S311 - tokens, not secrets

    def of(self, least: int, most: int) -> bytes:
        """So many tokens."""
        return self.rng.randbytes(_TOKEN_BYTES * self.rng.randint(least, most))


class Popular:
    """Common beginnings, the first asked for most: the n-th with a share of 1 / n ** `exponent` (Zipf)."""

    def __init__(self, text: Text, count: int, least: int, most: int, *, exponent: float) -> None:
        self._texts = [text.of(least, most) for _ in range(count)]
        self._shares = list(accumulate(1 / (number + 1) ** exponent for number in range(count)))
        self._rng = text.rng

    def next(self) -> bytes:
        """One of them."""
        (chosen,) = self._rng.choices(self._texts, cum_weights=self._shares)
        return chosen


@dataclass(slots=True)
class _Talk:
    """A conversation, or a task: it grows by what is asked and answered, turn by turn."""

    common: int
    turns: int
    said: bytes = field(repr=False)


Turn = Callable[[], tuple[bytes, bytes]]
"""What is asked next, and answered."""


def chatbot(requests: int, seed: int = 1, *, prompts: int = 60, at_once: int = 300) -> Iterator[Request]:
    """Chats of 1 to 8 turns, `at_once` of them open; 60 system prompts of 1,000 to 3,000 tokens."""
    text = Text(seed)
    systems = Popular(text, prompts, 1_000, 3_000, exponent=1.0)
    return _talks(
        requests,
        text.rng,
        begin=systems.next,
        turns=lambda: text.rng.randint(1, 8),
        turn=lambda: (text.of(20, 200), text.of(50, 400)),
        at_once=at_once,
    )


def agent(requests: int, seed: int = 2, *, tools: int = 24, at_once: int = 100) -> Iterator[Request]:
    """Tasks of 4 to 16 steps, `at_once` of them running; 24 sets of tools and rules of 2,000 to 6,000 tokens.

    Each step sends the transcript so far, with what a tool returned: 100 to 1,500 tokens.
    """
    text = Text(seed)
    sets = Popular(text, tools, 2_000, 6_000, exponent=1.0)
    return _talks(
        requests,
        text.rng,
        begin=sets.next,
        turns=lambda: text.rng.randint(4, 16),
        turn=lambda: (text.of(100, 1_500), text.of(40, 150)),
        at_once=at_once,
    )


def varied(requests: int, seed: int = 3) -> Iterator[Request]:
    """Two fifths prompts that nobody asks twice, a third templates with documents, the rest short chats."""
    text = Text(seed)
    templates = Popular(text, 40, 200, 800, exponent=1.0)
    documents = Popular(text, 400, 300, 1_200, exponent=0.8)
    chats = chatbot(requests, seed + 1, prompts=20, at_once=100)
    for _ in range(requests):
        kind = text.rng.random()
        if kind < 0.4:
            yield Request(text.of(500, 4_000), text.of(50, 400), 0)
        elif kind < 0.7:
            template = templates.next()
            found = b"".join(documents.next() for _ in range(3))
            yield Request(template + found + text.of(20, 100), text.of(50, 400), len(template) // _TOKEN_BYTES)
        else:
            yield next(chats)


def _talks(
    requests: int,
    rng: random.Random,
    *,
    begin: Callable[[], bytes],
    turns: Callable[[], int],
    turn: Turn,
    at_once: int,
) -> Iterator[Request]:
    """Turns of many talks, in a random order; a talk that has ended is followed by another."""
    talks: list[_Talk] = []
    for _ in range(requests):
        at = rng.randrange(at_once)
        if at >= len(talks):
            at = len(talks)
            talks.append(_begun(begin, turns))
        elif not talks[at].turns:
            talks[at] = _begun(begin, turns)
        talk = talks[at]
        asked, answered = turn()
        yield Request(talk.said + asked, answered, talk.common)
        talk.said += asked + answered
        talk.turns -= 1


def _begun(begin: Callable[[], bytes], turns: Callable[[], int]) -> _Talk:
    common = begin()
    return _Talk(len(common) // _TOKEN_BYTES, turns(), common)


def distinct_blocks(requests: Sequence[Request], block_tokens: int) -> int:
    """How many different blocks these requests store: the working set."""
    size = block_tokens * _TOKEN_BYTES
    seen: set[int] = set()
    for request in requests:
        whole, key = request.prompt + request.answer, 0
        for at in range(0, len(whole) - size + 1, size):
            key = hash((key, whole[at : at + size]))
            seen.add(key)
    return len(seen)
