"""Chats that are larger than each tier, through pools of more and more tiers: what is hit, where, and what it costs.

One node plays alone. What its own disk has, it does not look up: dragonfly and database serve what that lacks.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from kvpool.api.codec import Codec
from kvpool.bench.area import Conditions
from kvpool.bench.engine.pools import BLOCK_TOKENS, KIB, layout_of
from kvpool.bench.row import Figure, Row
from kvpool.bench.sharing.playing import PREFILL_TOKENS_PER_SECOND
from kvpool.bench.sharing.workloads import Request, chatbot, distinct_blocks
from kvpool.bench.waterfall.memory import EngineNumbers
from kvpool.bench.waterfall.nodes import Nodes
from kvpool.bench.waterfall.playing import Played, play
from kvpool.pool.stats import PoolStats, SharedTierStats
from kvpool.tiers.tier import TierName

REQUESTS = 1_000
SYSTEM_PROMPTS, AT_ONCE = 20, 40
PAYLOAD_BYTES = 64 * KIB
LOWER_CODEC = Codec.INT8_ASYMMETRIC
SHARES: Mapping[TierName, float] = {
    TierName.RAM: 0.05,
    TierName.DRAGONFLY: 0.15,
    TierName.DATABASE: 0.30,
    TierName.SSD: 0.60,
}
"""How much of the working set each tier holds, as bytes of records that are not encoded."""
LOWER = (TierName.DRAGONFLY, TierName.DATABASE, TierName.SSD)
ENGINE_BLOCKS = 64
LEAST_BLOCKS = 160
"""So that ram has room for a prompt, and a server for its own needs."""
_US = 1e6


class Outcome(NamedTuple):
    """What the chats came to, and the pool's own counters after them."""

    played: Played
    stats: PoolStats


class Chats:
    """One workload, played through pools of different tiers."""

    def __init__(self, conditions: Conditions) -> None:
        count = conditions.scaled(REQUESTS, least=20)
        self._requests: Sequence[Request] = list(chatbot(count, prompts=SYSTEM_PROMPTS, at_once=AT_ONCE))
        self.blocks = distinct_blocks(self._requests, BLOCK_TOKENS)
        """The working set."""
        self._nodes = Nodes(conditions.directory)
        self._memory = EngineNumbers(layout_of(PAYLOAD_BYTES), ENGINE_BLOCKS)

    def through(self, *tiers: TierName, codec: Codec = Codec.NONE) -> Outcome:
        """Play them in a new pool of ram and these tiers, which have this codec."""
        record_bytes = layout_of(PAYLOAD_BYTES).record_bytes
        blocks = {tier: max(LEAST_BLOCKS, int(self.blocks * SHARES[tier])) for tier in (TierName.RAM, *tiers)}
        capacities = {tier: count * record_bytes for tier, count in blocks.items()}
        with self._nodes.opened(capacities, PAYLOAD_BYTES, codec=codec) as opened:
            played = play(opened, self._requests, self._memory)
            return Outcome(played, opened.pool.stats())


def run(conditions: Conditions) -> Iterator[Row]:
    """Rows of `chat`."""
    chats = Chats(conditions)
    yield Row("chat.working-set", "blocks", Figure(chats.blocks))
    ram = chats.through()
    alone = {tier: chats.through(tier) for tier in LOWER}
    yield from _alone(ram.played, alone)
    steps = [ram, alone[LOWER[0]], *(chats.through(*LOWER[:count]) for count in range(2, len(LOWER) + 1))]
    for count, step in enumerate(steps):
        before = steps[count - 1].played if count else None
        yield from _rows("+".join((TierName.RAM, *LOWER[:count])), step.played, LOWER[:count], beside=before)
    encoded = chats.through(*LOWER, codec=LOWER_CODEC)
    yield from _rows("int8", encoded.played, LOWER, beside=steps[-1].played)
    yield from _held(encoded.stats)


def _alone(ram: Played, alone: Mapping[TierName, Outcome]) -> Iterator[Row]:
    """Each tier below ram by itself, beside ram without it."""
    for tier, (played, stats) in alone.items():
        yield Row(f"chat.{tier}-alone.hits", "%", _beside(played.hits, ram.hits))
        yield Row(f"chat.{tier}-alone.hits-from-it", "%", Figure(played.share(tier)))
        if tier in stats.shared:
            yield Row(f"chat.{tier}-alone.not-taken", "%", Figure(_not_taken(stats.shared[tier])))


def _rows(name: str, played: Played, tiers: Sequence[TierName], *, beside: Played | None) -> Iterator[Row]:
    """`beside` is the play before, with a tier less or without a codec."""
    hits = Figure(played.hits) if beside is None else _beside(played.hits, beside.hits)
    yield Row(f"chat.{name}.hits", "%", hits)
    for tier in (TierName.RAM, *tiers) if tiers else ():
        yield Row(f"chat.{name}.hits-from-{tier}", "%", Figure(played.share(tier)))
    yield Row(f"chat.{name}.weighted-latency", "us/block", Figure(_US * played.seconds_per_served_block))
    rate = PREFILL_TOKENS_PER_SECOND
    with_misses, computed = played.seconds_per_asked_block(rate), BLOCK_TOKENS / rate
    yield Row(f"chat.{name}.with-misses-computed", "us/block", _beside(_US * with_misses, _US * computed))
    yield Row(f"chat.{name}.stored", "tokens/s", Figure(played.stored_tokens_per_second))


def _held(stats: PoolStats) -> Iterator[Row]:
    """What a token takes in each tier, beside a record that is not encoded."""
    raw = layout_of(PAYLOAD_BYTES).record_bytes / BLOCK_TOKENS
    for tier, own in stats.tiers.items():
        shared = stats.shared.get(tier)
        nbytes, blocks = (own.block_bytes, own.blocks) if shared is None else (shared.sent_bytes, shared.sent_blocks)
        if blocks:
            yield Row(f"chat.int8.held.{tier}", "B/token", _beside(nbytes / blocks / BLOCK_TOKENS, raw))


def _not_taken(shared: SharedTierStats) -> float:
    """Percent of the blocks that were to be sent to a tier and were not."""
    dropped = sum(shared.dropped_blocks.values())
    return 100 * dropped / max(dropped + shared.sent_blocks, 1)


def _beside(value: float, other: float) -> Figure:
    return Figure(value, other, value / max(other, 1e-9))
