"""SmolLM2 on real text: the rows."""

import sys
from collections.abc import Iterator
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any

from kvpool.bench.area import Conditions, UnmeasurableError
from kvpool.bench.quality.text import code, prose
from kvpool.bench.quality.windows import Scheme, Windows
from kvpool.bench.row import Figure, Row, Target, at_least, at_most

if TYPE_CHECKING:
    from kvpool.bench.quality.outcome import Outcome

BLOCK_TOKENS = 64
_LIMITS = {"fp16": 0.01, "int8-symmetric.auto": 0.05, "int8-asymmetric.auto": 0.05}
"""How far a codec that one may use without a thought moves the perplexity, in percent, up or down."""


def scheme_of(conditions: Conditions) -> Scheme:
    """14 windows: 21,518 tokens, 7,168 of them scored; or less of it."""
    full = Scheme()
    blocks = conditions.scaled(full.context_tokens // BLOCK_TOKENS, least=2)
    return Scheme(
        context_tokens=blocks * BLOCK_TOKENS,
        scored_tokens=conditions.scaled(full.scored_tokens, least=32),
        windows=conditions.scaled(full.windows, least=2),
        calibration_windows=conditions.scaled(full.calibration_windows, least=2),
    )


def run(dtype: str, conditions: Conditions) -> Iterator[Row]:
    """Rows of the benchmark that is named for the `dtype` of the blocks; the model itself computes in float32."""
    chat_model = _loaded()
    import torch

    from kvpool.bench.quality.measure import steps
    from kvpool.bench.quality.scoring import Scorer

    scorer = Scorer(chat_model.model, BLOCK_TOKENS, rounded_to=getattr(torch, dtype))
    windows = Windows.of([_tokens(chat_model, text) for text in (prose(), code())], scheme_of(conditions))
    began_s = perf_counter()
    outcomes: dict[str, Outcome] = {}
    for step in steps(scorer, windows):
        outcomes = step.outcomes
        minutes = (perf_counter() - began_s) / 60
        print(f"{dtype}: {step.windows} of {len(windows.scored)} windows, {minutes:.1f} minutes", file=sys.stderr)
    yield from rows(dtype, outcomes)


def rows(prefix: str, outcomes: "dict[str, Outcome]") -> Iterator[Row]:
    """Of the model itself, then those of each trial."""
    plain = next(iter(outcomes.values()))
    yield Row(f"{prefix}.none.scored", "tokens", Figure(plain.tokens))
    yield Row(f"{prefix}.none.perplexity", "", Figure(plain.exact_perplexity))
    for name, outcome in outcomes.items():
        yield from _rows_of(f"{prefix}.{name}", outcome, _LIMITS.get(name))


def _rows_of(name: str, outcome: "Outcome", limit: float | None) -> Iterator[Row]:
    change = 100 * outcome.perplexity_change
    yield Row(f"{name}.perplexity-change", "%", Figure(change), _within(limit, change))
    yield Row(f"{name}.perplexity-change-error", "%", Figure(100 * outcome.perplexity_error))
    yield Row(f"{name}.divergence", "nats", Figure(outcome.divergence))
    yield Row(f"{name}.greedy-agreement", "%", Figure(100 * outcome.agreement))
    yield Row(f"{name}.key-error", "%", Figure(100 * outcome.keys.share))
    yield Row(f"{name}.value-error", "%", Figure(100 * outcome.values.share))
    yield Row(f"{name}.compression", "x", Figure(outcome.compression))


def _within(limit: float | None, change: float) -> Target | None:
    """A change is no better for being downwards."""
    if limit is None:
        return None
    return at_most(limit) if change >= 0 else at_least(-limit)


def _loaded() -> Any:
    try:
        from kvpool.demo.smollm2 import ModelMissingError, load_smollm2
    except ModuleNotFoundError as error:
        raise UnmeasurableError(f"{error.name} is not installed: pip install 'kvpool[demo]'") from None
    try:
        return load_smollm2()
    except ModelMissingError as error:
        raise UnmeasurableError(str(error)) from None


def _tokens(chat_model: Any, text: str) -> list[int]:
    return list(chat_model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


run_float32 = partial(run, "float32")
run_bfloat16 = partial(run, "bfloat16")
