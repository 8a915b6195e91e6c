"""Matching: how long it takes to find a prompt among 10,000 others, to hold it, and to let it go."""

from array import array
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import cycle
from statistics import median
from time import perf_counter
from typing import NamedTuple

import numpy as np

from kvpool.bench.area import Conditions
from kvpool.bench.engine.forest import BLOCK_TOKENS, Forest
from kvpool.bench.engine.pools import MIB, EngineMemory, Prompts, open_model, pool_config
from kvpool.bench.rounds import Measure, alone, beside, seconds_per_call
from kvpool.bench.row import Figure, Row, at_most, ratio_at_most
from kvpool.blocks.tokens import Tokens
from kvpool.pool.model import Model

OTHER_PREFIXES = 10_000
OTHER_BLOCKS = 16
SPLITS = 16
CALL_PAYLOAD_BYTES = 256
SHORT_ROUNDS = 15
"""Times as many rounds as others take, of few calls each: most end before a scheduler takes the processor away."""
CALLS = 200
COLD_CALLS = 24
COLD_BYTES = 96 << 20
"""Prompts, and their copies in the tree, of so many bytes together: three times a large last-level cache."""
_US = 1e6
_NS = 1e9
_ONE_NODE, _SPLIT = 0, SPLITS


def run(conditions: Conditions) -> Iterator[Row]:
    """Rows of `match`."""
    forest = _forest(conditions)
    for tokens, name in ((1_024, "1k"), (4_096, "4k")):
        for splits, where, target in ((_ONE_NODE, "one-node", at_most(2)), (_SPLIT, "16-splits", at_most(8))):
            prompts = _planted(forest, tokens, splits, 16)
            yield Row(f"match.{name}.{where}", "us", _warm(forest, prompts, conditions), target)
    for splits, where in ((_ONE_NODE, "one-node"), (_SPLIT, "16-splits")):
        yield _cold_row(forest, splits, where, conditions)


def _forest(conditions: Conditions) -> Forest:
    forest = Forest()
    forest.plant_prompts(conditions.scaled(OTHER_PREFIXES), blocks=OTHER_BLOCKS)
    return forest


def _planted(forest: Forest, tokens: int, splits: int, prompts: int) -> list[bytes]:
    planted = [forest.prompt(tokens // BLOCK_TOKENS) for _ in range(prompts)]
    for prompt in planted:
        forest.plant_split(prompt, splits)
    return planted


def _warm(forest: Forest, prompts: Sequence[bytes], conditions: Conditions) -> Figure:
    """A few prompts by turns, beside a memcmp of as many bytes."""
    matching, comparing = _matching(forest, prompts, CALLS), _comparing(prompts, CALLS)
    return beside(matching, comparing, SHORT_ROUNDS * conditions.rounds).in_unit(_US)


def _matching(forest: Forest, prompts: Sequence[bytes], calls: int) -> Measure:
    """Seconds of one match; the leases that it opens are closed outside of the time."""
    index, tree, turns = forest.index, forest.tree, cycle(prompts)

    def measure() -> float:
        match = index.match
        began_s = perf_counter()
        pins = [match(tree, next(turns)) for _ in range(calls)]
        seconds = perf_counter() - began_s
        for pin in pins:
            index.unpin(pin)
        return seconds / calls

    return measure


def _comparing(prompts: Sequence[bytes], calls: int) -> Measure:
    """Seconds of comparing a prompt with a copy of it; begins in the middle, far from where `_matching` is."""
    copies = [(prompt, bytes(bytearray(prompt))) for prompt in prompts]
    turns = cycle(copies[len(copies) // 2 :] + copies[: len(copies) // 2])

    def measure() -> float:
        began_s = perf_counter()
        for _ in range(calls):
            ours, theirs = next(turns)
            ours == theirs  # noqa: B015 - the comparison is what is measured
        return (perf_counter() - began_s) / calls

    return measure


class _Leasing(NamedTuple):
    """Seconds of one call each: of finding a prompt, of that and opening a lease, of closing it."""

    find_s: float
    open_s: float
    close_s: float


def _leasing(forest: Forest, prompts: Iterator[bytes]) -> _Leasing:
    """Open some leases, then close them."""
    index, tree = forest.index, forest.tree
    find, match, unpin = tree.find, index.match, index.unpin
    began_s = perf_counter()
    for _ in range(CALLS):
        find(next(prompts))
    found_s = perf_counter()
    pins = [match(tree, next(prompts)) for _ in range(CALLS)]
    opened_s = perf_counter()
    for pin in pins:
        unpin(pin)
    closed_s = perf_counter()
    return _Leasing((found_s - began_s) / CALLS, (opened_s - found_s) / CALLS, (closed_s - opened_s) / CALLS)


def _cold_row(forest: Forest, splits: int, where: str, conditions: Conditions) -> Row:
    """Prompts of 32k tokens, so many that none is in a cache at its turn; beside a memcmp of equally cold ones."""
    prompts = _planted(forest, 32_768, splits, conditions.scaled(COLD_BYTES // 2 // (4 * 32_768), least=2))
    matching, comparing = _matching(forest, prompts, COLD_CALLS), _comparing(prompts, COLD_CALLS)
    figure = beside(matching, comparing, SHORT_ROUNDS * conditions.rounds).in_unit(_US)
    return Row(f"match.32k.{where}.cold", "us", figure, ratio_at_most(1.5))


def run_leases(conditions: Conditions) -> Iterator[Row]:
    """Rows of `lease`: what holding a prompt adds to finding it, and how much of that is each node's."""
    forest = _forest(conditions)
    whole, split = (cycle(_planted(forest, 4_096, splits, 16)) for splits in (_ONE_NODE, _SPLIT))
    pairs = [(_leasing(forest, whole), _leasing(forest, split)) for _ in range(SHORT_ROUNDS * conditions.rounds)]
    held = median(one.open_s - one.find_s + one.close_s for one, _ in pairs)
    taken = median((many.open_s - many.find_s - (one.open_s - one.find_s)) / SPLITS for one, many in pairs)
    given = median((many.close_s - one.close_s) / SPLITS for one, many in pairs)
    yield Row("lease.open-and-close", "us", Figure(held * _US), at_most(1.035))
    yield Row("lease.reference-taken-per-node", "ns", Figure(taken * _NS), at_most(35))
    yield Row("lease.reference-given-up-per-node", "ns", Figure(given * _NS), at_most(35))


def run_calls(conditions: Conditions) -> Iterator[Row]:
    """Rows of `call`: `Model.match` and `Lease.close`, as a user calls them, by the form of the tokens."""
    config = pool_config(ram_bytes=256 * MIB)
    pool, model = open_model(config, conditions.directory / "pool", CALL_PAYLOAD_BYTES)
    memory, prompts = EngineMemory(CALL_PAYLOAD_BYTES, 64), Prompts()
    with pool:
        for _ in range(conditions.scaled(OTHER_PREFIXES)):
            model.store(prompts.next(2), memory)
        for tokens, name in ((1_024, "1k"), (4_096, "4k"), (32_768, "32k")):
            prompt = prompts.next(tokens // BLOCK_TOKENS)
            model.store(prompt, memory)
            ids = array("i", prompt)
            forms = {"bytes": prompt, "array": ids, "numpy": np.frombuffer(prompt, np.int32), "list": ids.tolist()}
            for form, value in forms.items():
                held = seconds_per_call(partial(_match_and_close, model, value), 10 if form == "list" else CALLS)
                target = at_most(3.04) if form == "bytes" and tokens <= 4_096 else None
                figure = alone(held, SHORT_ROUNDS * conditions.rounds).in_unit(_US)
                yield Row(f"call.{name}.{form}", "us", figure, target)


def _match_and_close(model: Model, tokens: Tokens) -> None:
    model.match(tokens).close()
