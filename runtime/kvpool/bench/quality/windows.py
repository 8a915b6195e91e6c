"""Windows of text: a context, whose keys and values go through a codec, and the tokens after it, which are scored."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self


class Window(NamedTuple):
    """Token ids. What the model says after each token of `given` is compared with the one of `expected`."""

    context: Sequence[int]
    given: Sequence[int]
    expected: Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """How many windows there are, and of which size. Half of them are prose, half are code."""

    context_tokens: int = 1024
    scored_tokens: int = 512
    windows: int = 14
    calibration_windows: int = 16
    """Others than those that are scored; of them the context alone is used."""

    def cut(self, tokens: Sequence[int]) -> Window:
        """The window that these tokens are, the first of which are its context."""
        at = self.context_tokens
        return Window(tokens[:at], tokens[at : at + self.scored_tokens], tokens[at + 1 : at + 1 + self.scored_tokens])

    @property
    def window_tokens(self) -> int:
        """Tokens of a window: after the last that is given, one more is expected."""
        return self.context_tokens + self.scored_tokens + 1


class Windows(NamedTuple):
    """No token is in two of them."""

    scored: list[Window]
    calibration: list[Window]

    @classmethod
    def of(cls, texts: Sequence[Sequence[int]], scheme: Scheme) -> Self:
        """Windows of these texts by turns, spread over each from its beginning to its end."""
        scored, calibration = [], []
        for number, text in enumerate(texts):
            pieces = _pieces(text, scheme.window_tokens)
            scored.append(_spread(pieces[0::2], _share(scheme.windows, number, len(texts))))
            calibration.append(_spread(pieces[1::2], _share(scheme.calibration_windows, number, len(texts))))
        return cls(_by_turns(scored, scheme), _by_turns(calibration, scheme))


def _pieces(tokens: Sequence[int], size: int) -> list[Sequence[int]]:
    return [tokens[start : start + size] for start in range(0, len(tokens) - size + 1, size)]


def _share(count: int, number: int, parts: int) -> int:
    """How many of `count` part `number` has."""
    return count // parts + (number < count % parts)


def _spread(pieces: Sequence[Sequence[int]], count: int) -> list[Sequence[int]]:
    """So many of them, at equal distances; all of them where there are fewer."""
    count = min(count, len(pieces))
    return [pieces[at * len(pieces) // count] for at in range(count)]


def _by_turns(parts: Sequence[Sequence[Sequence[int]]], scheme: Scheme) -> list[Window]:
    longest = max(map(len, parts))
    return [scheme.cut(part[at]) for at in range(longest) for part in parts if at < len(part)]
