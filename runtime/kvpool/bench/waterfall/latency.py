"""How long a prompt takes that one tier alone has: matched, waited for, verified, and copied to the engine.

Several times as many prompts as ram holds are loaded in a circle, so that ram, which keeps the latest, never has one.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from statistics import median
from time import perf_counter

from kvpool.api import Eviction
from kvpool.bench.area import Conditions, UnmeasurableError
from kvpool.bench.engine.pools import KIB, OpenModel, Prompts, layout_of
from kvpool.bench.loopback import Loopback
from kvpool.bench.probes import Memcpy, RawDisk
from kvpool.bench.rounds import of_pairs, percentile
from kvpool.bench.row import Figure, Row
from kvpool.bench.waterfall.memory import EngineNumbers
from kvpool.bench.waterfall.nodes import BUDGET_S, Nodes
from kvpool.pool.model import Model
from kvpool.tiers.tier import TierName

PAYLOAD_BYTES = 256 * KIB
PROMPT_BLOCKS = 16
"""1,024 tokens."""
PROMPTS, TURNS = 40, 6
LEAST_PROMPTS = 8
RAM_PROMPTS = 3
FLUSH_S = 120.0
DISK_DEPTH = 2
"""As many reads at once as a pool has threads that read."""
_US = 1e6

Probe = Callable[[], object]


def run(conditions: Conditions) -> Iterator[Row]:
    """Rows of `latency`; gpu is measured by the area of that name."""
    nodes = Nodes(conditions.directory)
    for tier in (TierName.RAM, TierName.DRAGONFLY, TierName.DATABASE, TierName.SSD):
        with _probe(tier, conditions) as probe:
            yield from _rows(tier, nodes, probe, conditions)


@contextmanager
def _probe(tier: TierName, conditions: Conditions) -> Iterator[Probe | None]:
    """Moves a prompt's bytes as the tier's medium does by itself; None where there is no such thing."""
    layout = layout_of(PAYLOAD_BYTES)
    nbytes = PROMPT_BLOCKS * layout.record_bytes
    match tier:
        case TierName.RAM:
            memcpy = Memcpy(layout.payload_bytes, 2 * PROMPT_BLOCKS)
            yield partial(memcpy.copy_some, PROMPT_BLOCKS)
        case TierName.DRAGONFLY:
            with Loopback(nbytes) as loopback:
                yield loopback.receive
        case TierName.SSD:
            each = nbytes // DISK_DEPTH
            with RawDisk(conditions.directory / "raw", block_bytes=each, blocks=DISK_DEPTH, depth=DISK_DEPTH) as raw:
                raw.write_all()
                yield raw.read_all
        case _:
            yield None


def _rows(tier: TierName, nodes: Nodes, probe: Probe | None, conditions: Conditions) -> Iterator[Row]:
    prompts = conditions.scaled(PROMPTS, least=LEAST_PROMPTS)
    prompt_bytes = PROMPT_BLOCKS * layout_of(PAYLOAD_BYTES).record_bytes
    capacities = {TierName.RAM: RAM_PROMPTS * prompt_bytes, tier: 2 * (prompts + 1) * prompt_bytes}
    with nodes.opened(capacities, PAYLOAD_BYTES, eviction=Eviction.LRU) as opened:
        pairs = _pairs(tier, opened, prompts, probe)
    per_block = [(_US * took / PROMPT_BLOCKS, _US * beneath / PROMPT_BLOCKS) for took, beneath in pairs]
    took = [one for one, _ in per_block]
    yield Row(f"latency.{tier}.median", "us/block", Figure(median(took)) if probe is None else of_pairs(per_block))
    yield Row(f"latency.{tier}.p99", "us/block", Figure(percentile(took, 99)))


def _pairs(tier: TierName, opened: OpenModel, count: int, probe: Probe | None) -> list[tuple[float, float]]:
    """Seconds of each load that the tier served, and of the probe right after it."""
    pool, model = opened
    memory, made = EngineNumbers(model.layout, 2 * PROMPT_BLOCKS), Prompts()
    prompts = [made.next(PROMPT_BLOCKS) for _ in range(count)]
    for prompt in prompts:
        model.store(prompt, memory)
        if not pool.flush(FLUSH_S):
            raise UnmeasurableError(f"{tier} does not take what is stored")
    pairs = []
    for turn in range(1 + TURNS):
        for prompt in prompts:
            took, served = _load(model, prompt, memory)
            beneath = 0.0 if probe is None else _seconds(probe)
            if turn and served == {tier: PROMPT_BLOCKS}:  # in the first one connections are made, and pages touched
                pairs.append((took, beneath))
    if len(pairs) < TURNS * count / 2:
        raise UnmeasurableError(f"{tier} served {len(pairs)} of {TURNS * count} prompts that it should have")
    return pairs


def _load(model: Model, prompt: bytes, memory: EngineNumbers) -> tuple[float, dict[TierName, int]]:
    """How long it took, and where the blocks came from."""
    began_s = perf_counter()
    with model.match(prompt) as lease:
        lease.wait(BUDGET_S)
        lease.load(memory)
        return perf_counter() - began_s, lease.served


def _seconds(work: Probe) -> float:
    began_s = perf_counter()
    work()
    return perf_counter() - began_s
