"""Every trial on every window; the context is computed once per window, and each trial goes on from it."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from kvpool.bench.quality.outcome import Outcome
from kvpool.bench.quality.scoring import Scorer
from kvpool.bench.quality.trials import Trial, limits_of, trials
from kvpool.bench.quality.windows import Window, Windows

PERCENTILES = (99.99, 99.9)
"""What the profiles have as `compression.outlierPercentile`."""


class Step(NamedTuple):
    """What is known after some of the windows."""

    windows: int
    outcomes: dict[str, Outcome]
    """By the trial's name; the same objects in every step."""


def steps(scorer: Scorer, windows: Windows, percentiles: Sequence[float] = PERCENTILES) -> Iterator[Step]:
    """Calibrate (step 0), then score window by window."""
    tried = list(_calibrated(scorer, windows.calibration, percentiles))
    outcomes = {trial.name: Outcome(scorer.layout) for trial in tried}
    yield Step(0, outcomes)
    for number, window in enumerate(windows.scored, 1):
        _score(scorer, window, tried, outcomes)
        yield Step(number, outcomes)


def _calibrated(scorer: Scorer, windows: Sequence[Window], percentiles: Sequence[float]) -> Iterator[Trial]:
    layout = scorer.layout
    samples = sum(len(window.context) // layout.block_tokens for window in windows)
    blocks = (payload for window in windows for payload in scorer.blocks_of(window.context))
    return trials(layout, limits_of(layout, blocks, samples=samples, percentiles=percentiles))


def _score(scorer: Scorer, window: Window, tried: Iterable[Trial], outcomes: dict[str, Outcome]) -> None:
    payloads = scorer.blocks_of(window.context)
    exact = scorer.going_on(payloads, window.given)
    for trial in tried:
        stored = trial.through(payloads)
        words = scorer.going_on(stored.payloads, window.given)
        outcomes[trial.name].add(words.against(exact, window.expected), stored.payloads, payloads, stored.stored_bytes)
