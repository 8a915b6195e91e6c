"""What a pool is worth to a real model, through the `transformers` adapter. The only benchmark that needs torch."""

from collections.abc import Iterator

from kvpool.bench.area import Conditions, UnmeasurableError
from kvpool.bench.row import Figure, Row, at_least, at_most, ratio_at_most

PROMPT_TOKENS = 2_000
OVERHEAD_PROMPTS = 4
_MS = 1e3


def run(conditions: Conditions) -> Iterator[Row]:
    """Rows of `model`: SmolLM2 on a pool of its own."""
    try:
        from kvpool.demo.measure import measure_smollm2
        from kvpool.demo.smollm2 import ModelMissingError
    except ModuleNotFoundError as error:
        raise UnmeasurableError(f"{error.name} is not installed: pip install 'kvpool[demo]'") from None
    try:
        figures = measure_smollm2(
            rounds=conditions.rounds,
            prompt_tokens=conditions.scaled(PROMPT_TOKENS, least=64),
            overhead_prompts=conditions.scaled(OVERHEAD_PROMPTS),
        )
    except ModelMissingError as error:
        raise UnmeasurableError(str(error)) from None
    first, overhead = figures.first_token, figures.no_repeats
    seconds = Figure(first.pool_s, first.memory_s, first.against_memory)
    yield Row("model.first-token-again", "ms", seconds.in_unit(_MS), ratio_at_most(1.15))
    same = Figure(first.pool_s, first.memory_same_tokens_s, first.against_memory_same_tokens)
    yield Row("model.first-token-again.same-tokens", "ms", same.in_unit(_MS))
    yield Row("model.first-token-cold", "ms", Figure(first.cold_s * _MS))
    yield Row("model.sooner-than-cold", "x", Figure(first.times_sooner_than_cold), at_least(12))
    yield Row("model.no-repeats-overhead", "%", Figure(100 * overhead.share), at_most(3))
    yield Row("model.no-repeats-end-to-end", "%", Figure(100 * (overhead.end_to_end - 1)))
