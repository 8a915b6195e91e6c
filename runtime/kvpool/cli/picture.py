"""How a pool's counters are shown: as a screen, and as a line. Pure: the same counters in, the same picture out."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from kvpool.cli.output import figure, size, table
from kvpool.pool.stats import PoolStats, TierStats

_BAR_COLUMNS = 24


def line(stats: PoolStats) -> str:
    """Everything that one looks for first, on one line."""
    tiers = [f"{tier.name} {_used(tier)}{_blocks(stats, tier, ' (', ' blocks)')}" for tier in stats.tiers.values()]
    hits = f"{stats.requests:,} requests, {_percent(stats.hit_ratio)} of blocks hit"
    return "; ".join([f"mode {stats.mode}", *tiers, hits, f"{stats.stored_blocks:,} blocks stored"])


def screen(stats: PoolStats, directory: Path, open_s: float, *, shared: RenderableType | None = None) -> RenderableType:
    """Tiers, traffic, models and, where there are any, shared prefixes, to be drawn again and again."""
    mode = Text(stats.mode, style="green" if stats.mode == "normal" else "bold red")
    head = Text.assemble(
        ("pool ", "dim"), (stats.name, "bold"), ("  mode ", "dim"), mode, ("  open for ", "dim"), _span(open_s),
        ("  in ", "dim"), str(directory), ("  Ctrl-C closes it", "dim"),
    )  # fmt: skip
    parts: list[RenderableType] = [head, Text(), _tiers(stats), Text(), _counters(stats)]
    if stats.models:
        parts += [Text(), _models(stats)]
    if stats.accounts:
        parts += [Text(), _accounts(stats)]
    if shared is not None:
        parts += [Text(), shared]
    return Group(*parts)


def _tiers(stats: PoolStats) -> Table:
    made = table(
        ("tier", "", "used", "capacity", "blocks", "loaded", "corrupt", "state"),
        (),
        right=("used", "capacity", "blocks", "loaded", "corrupt"),
    )
    for tier in stats.tiers.values():
        bar = ProgressBar(max(tier.capacity_bytes, 1), tier.used_bytes, width=_BAR_COLUMNS)
        made.add_row(
            tier.name, bar, size(tier.used_bytes), _capacity(tier), _blocks(stats, tier),
            f"{tier.loaded_blocks:,}", f"{sum(tier.corrupt.values()):,}", _state(tier),
        )  # fmt: skip
    return made


def _used(tier: TierStats) -> str:
    return f"{size(tier.used_bytes)} of {_capacity(tier)}" if tier.capacity_bytes else size(tier.used_bytes)


def _capacity(tier: TierStats) -> str:
    return size(tier.capacity_bytes) if tier.capacity_bytes else "-"


def _blocks(stats: PoolStats, tier: TierStats, before: str = "", after: str = "") -> str:
    """How many blocks a tier holds; nothing where that is not known, for it is shared."""
    return "" if tier.name in stats.shared else f"{before}{tier.blocks:,}{after}"


def _shared(stats: PoolStats) -> Iterator[tuple[str, str]]:
    """Two pairs for each tier that is shared: what went there, and what came from there."""
    for name, tier in stats.shared.items():
        yield f"sent to {name}", f"{tier.sent_blocks:,} blocks, {size(tier.sent_bytes)}"
        yield f"not sent to {name}", _by_reason(tier.dropped_blocks.items())
        yield f"fetched from {name}", f"{tier.fetched_blocks:,} blocks, {size(tier.fetched_bytes)}"
        yield f"{name} fell out", f"{tier.fell_out:,} times"


def _counters(stats: PoolStats) -> Table:
    """Pairs of a name and a value, side by side."""
    down, index = stats.write_behind, stats.index
    pairs = (
        ("requests", f"{stats.requests:,}"),
        ("hit ratio", f"{_percent(stats.hit_ratio)} of {stats.asked_blocks:,} blocks"),
        ("shared hits", f"{stats.shared_hit_blocks:,} blocks"),
        ("prefill saved", _span(stats.saved_prefill_seconds)),
        ("stored", f"{stats.stored_blocks:,} blocks, {size(stats.stored_bytes)}"),
        ("there already", f"{stats.already_there_blocks:,} blocks, {size(stats.already_there_bytes)}"),
        ("refused", _by_reason(stats.refused_blocks.items())),
        ("loads cut short", f"{stats.short_loads:,}"),
        ("saved to ssd", f"{down.saved_blocks:,} blocks, {size(down.saved_bytes)}"),
        ("not saved", _by_reason(down.dropped_blocks.items())),
        ("write queue", f"{down.queued_edges:,} edges"),
        ("write amplification", f"{down.write_amplification:.2f}"),
        ("index", f"{size(index.bytes)} of {size(index.limit_bytes)}"),
        ("restored at start", f"{stats.restored.blocks:,} blocks in {stats.restored.seconds:.2f} s"),
        *_shared(stats),
    )
    made = Table.grid(padding=(0, 3, 0, 0))
    for (name, value), (other_name, other_value) in zip(pairs[::2], pairs[1::2], strict=True):
        made.add_row(Text(name, "dim"), value, Text(other_name, "dim"), other_value)
    return made


def _models(stats: PoolStats) -> Table:
    rows = (
        (model.name, size(model.record_bytes), _rate(model.prefill_tokens_per_second), model.fingerprint[:12])
        for model in stats.models
    )
    columns = ("model", "a block", "prefill", "fingerprint")
    return table(columns, rows, right=columns[1:3])


def _accounts(stats: PoolStats) -> Table:
    """What each model holds of each tier, against its quotas."""
    columns = ("model", "tier", "used", "guaranteed", "limit", "blocks", "hit ratio")
    rows: list[tuple[str, ...]] = []
    for account in stats.accounts:
        hit_ratio = _percent(account.hit_ratio)
        for tier, share in account.tiers.items():
            limit = "-" if share.limit_bytes is None else size(share.limit_bytes)
            rows.append(
                (
                    account.name,
                    tier,
                    size(share.used_bytes),
                    size(share.guaranteed_bytes),
                    limit,
                    f"{share.blocks:,}",
                    hit_ratio,
                )
            )
        for tier, part in account.shared.items():
            rows.append((account.name, tier, size(part.used_bytes), "-", size(part.limit_bytes), "-", hit_ratio))
    return table(columns, rows, right=columns[2:])


def _state(tier: TierStats) -> Text:
    if tier.available:
        return Text("in use", "green")
    return Text(f"out: {tier.last_error}" if tier.last_error else "out", "bold red")


def _by_reason(counts: Iterable[tuple[str, int]]) -> str:
    """`120 blocks (no-room 100, index-full 20)`."""
    found = [(reason, blocks) for reason, blocks in counts if blocks]
    reasons = ", ".join(f"{reason} {blocks:,}" for reason, blocks in found)
    return f"{sum(blocks for _, blocks in found):,} blocks" + (f" ({reasons})" if reasons else "")


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _rate(tokens_per_second: float | None) -> str:
    return "unknown" if tokens_per_second is None else f"{figure(tokens_per_second)} tokens/s"


def _span(seconds: float) -> str:
    """`42 s`, `3 min 5 s`, `2 h 7 min`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes_left} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
