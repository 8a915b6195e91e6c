"""What the demo found: the table, the JSON file, and whether all was as it must be."""

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from kvpool.demo.catalog import CatalogReport
from kvpool.demo.neighbour import NeighbourReport
from kvpool.demo.script import ProcessReport
from kvpool.demo.servers import OutageReport, Process
from kvpool.demo.turn import TurnReport
from kvpool.tiers.tier import TierName

MIB = 1 << 20
OUT = "out"
_HEADING = {"dragonfly": "dragon-\nfly", "database": "data-\nbase"}
"""So that the table fits 80 columns."""


class Result:
    """Both processes' reports."""

    def __init__(
        self, first: ProcessReport, second: ProcessReport, seconds: float, *, left_running: Sequence[Process] = ()
    ) -> None:
        """`left_running`: servers that outlived the process that had started them."""
        self.first = first
        self.second = second
        self.seconds = seconds
        self.left_running = tuple(left_running)
        self.turns = (*first.turns, *second.turns)
        self.outages = (*first.outages, *second.outages)
        self.tiers = tuple(str(tier) for tier in first.stats["tiers"] if tier != TierName.GPU)
        """All that the pool has, in the waterfall's order; none on a GPU, for the model is on the CPU."""
        assert first.first_token is not None
        self.headline = first.first_token

    @property
    def failures(self) -> list[str]:
        """What must not be; empty when all is well."""
        wrong = self.first.blocks_wrong + self.second.blocks_wrong
        failures = [f"{wrong} blocks came back other than they were stored"] if wrong else []
        failures += [
            f"{turn.tenant} {turn.chat}, turn {turn.turn}: the answer differs from the one that goes on from the same "
            "cache kept in memory"
            for turn in self.turns
            if not turn.same_as_memory
        ]
        for report in (self.first, self.second):
            failures += _broken_quotas(report)
            failures += _broken_catalog(report.catalog)
        if not any(turn.loaded_tokens for turn in self.second.turns):
            failures.append("the second process was served nothing")
        failures += [f"nothing was served from {tier}" for tier, tokens in self.served_tokens.items() if not tokens]
        failures += [
            f"{process.name} ({process.version}), process {process.pid}, was left running"
            for process in self.left_running
        ]
        return failures

    @property
    def served_tokens(self) -> dict[str, int]:
        """By tier, over all turns."""
        return {tier: sum(turn.served_tokens.get(tier, 0) for turn in self.turns) for tier in self.tiers}

    def as_json(self) -> dict[str, Any]:
        """Everything, for `demo.json`."""
        headline = {
            **asdict(self.headline),
            "times_sooner_than_cold": self.headline.times_sooner_than_cold,
            "against_memory": self.headline.against_memory,
            "against_memory_same_tokens": self.headline.against_memory_same_tokens,
        }
        return {
            "ok": not self.failures,
            "failures": self.failures,
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(self.seconds, 1),
            "machine": machine(),
            "block_tokens": self.first.block_tokens,
            "headline": headline,
            "blocks": {
                "stored": self.first.blocks_stored + self.second.blocks_stored,
                "checked": self.first.blocks_checked + self.second.blocks_checked,
                "wrong": self.first.blocks_wrong + self.second.blocks_wrong,
            },
            "served_tokens": self.served_tokens,
            "outages": [asdict(outage) for outage in self.outages],
            "left_running": [asdict(process) for process in self.left_running],
            "catalog": asdict(self.first.catalog) if self.first.catalog else None,
            "neighbour": [asdict(report.neighbour) for report in (self.first, self.second) if report.neighbour],
            "turns": [asdict(turn) for turn in self.turns],
            "pool": {"first": self.first.stats, "second": self.second.stats},
        }

    def write(self, path: Path) -> None:
        """Write `demo.json`."""
        path.write_text(json.dumps(self.as_json(), indent=2) + "\n")

    def print(self, console: Console) -> None:
        """Print the table and what it comes to."""
        console.print()
        console.print(self._table())
        console.print(self._quotas())
        console.print(*self._sentences(), sep="\n", highlight=False)
        for failure in self.failures:
            console.print(f"FAILED: {failure}", style="bold red")

    def _table(self) -> Table:
        title = "Tokens of each prompt by the tier they came from; seconds to the first token"
        table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=0)
        table.add_column("chat.turn", no_wrap=True)
        table.add_column("prompt", justify="right")
        for tier in self.tiers:
            table.add_column(_HEADING.get(tier, tier), justify="right")
        for name in ("cold", "kvpool", "sooner"):
            table.add_column(name, justify="right")
        for name in ("as in\nmemory", "as\ncold"):
            table.add_column(name, justify="right")
        for turn in self.turns:
            is_last = turn is self.first.turns[-1] or turn is self.turns[-1]
            table.add_row(*_cells(turn, self.tiers), end_section=is_last)
        prompts = sum(turn.prompt_tokens for turn in self.turns)
        table.add_row("all", f"{prompts:,}", *(f"{tokens:,}" for tokens in self.served_tokens.values()), *[""] * 5)
        return table

    def _quotas(self) -> Table:
        """Both models' use of each tier, as the first process left it."""
        title = "Two models on one pool, in MiB: what each held when the first process closed, and its quota"
        table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, collapse_padding=True)
        table.add_column("model", no_wrap=True)
        for name in ("tier", "blocks", "used", "guaranteed", "limit", "hits"):
            table.add_column(name, justify="right")
        for account in self.first.stats["accounts"]:
            for tier, share in account["tiers"].items():
                table.add_row(*_share_cells(account, tier, share))
        return table

    def _sentences(self) -> list[str]:
        headline, blocks = self.headline, self.as_json()["blocks"]
        saved = self.first.stats["write_behind"]["saved_blocks"]
        return [
            f"A prompt of {headline.prompt_tokens:,} tokens again: first token after {headline.pool_s:.3f} s, "
            f"{headline.times_sooner_than_cold:.0f} times sooner than cold ({headline.cold_s:.2f} s).",
            f"With its DynamicCache in memory already: {headline.memory_same_tokens_s:.3f} s from the same "
            f"{headline.loaded_tokens:,} tokens ({headline.against_memory_same_tokens:.2f} times), "
            f"{headline.memory_s:.3f} s when only the last token is missing ({headline.against_memory:.2f} times).",
            f"Blocks of {self.first.block_tokens} tokens: {blocks['stored']} stored, {saved} written to ssd by the "
            f"first process, {blocks['checked']} loaded and compared with what was stored, {blocks['wrong']} wrong.",
            *_outages_sentence(self.outages),
            *_catalogs_sentence(self.first.catalog),
            *_neighbours_sentence(self.first.neighbour),
            "Same as memory: the answer is that of a run which goes on from the same cache kept in memory. A cold",
            "prefill may differ in the last bits, for floating point is not associative, and so in a token.",
        ]


def machine() -> dict[str, Any]:
    """Where this was measured."""
    import torch

    return {
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "kvpool")},
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _cells(turn: TurnReport, tiers: Sequence[str]) -> tuple[str, ...]:
    return (
        f"{turn.tenant} {turn.chat}.{turn.turn}",
        f"{turn.prompt_tokens:,}",
        *(_tokens(turn, tier) for tier in tiers),
        f"{turn.cold_s:.2f}",
        f"{turn.pool_s:.2f}",
        times(turn) if turn.loaded_tokens else "",
        "yes" if turn.same_as_memory else "NO",
        "yes" if turn.same_as_cold else "no",
    )


def times(turn: TurnReport) -> str:
    """How many times sooner than cold; with a decimal while that says something."""
    ratio = turn.cold_s / turn.pool_s
    return f"{ratio:.0f}x" if ratio >= 9.5 else f"{ratio:.1f}x"


def _tokens(turn: TurnReport, tier: str) -> str:
    """What a tier served; whether it was out all the same is for those cells that are empty."""
    if tier in turn.served_tokens:
        return f"{turn.served_tokens[tier]:,}"
    return OUT if tier in turn.out else "-"


def _broken_quotas(report: ProcessReport) -> list[str]:
    neighbour = report.neighbour
    if neighbour is None:
        return []
    failures = [] if neighbour.limits_kept else ["the second model held more than its limit"]
    return failures if neighbour.guarantees_kept else [*failures, "the first model lost what is guaranteed to it"]


def _broken_catalog(catalog: CatalogReport | None) -> list[str]:
    if catalog is None:
        return []
    failures = [] if catalog.blocks else ["the catalog knows no block of what was stored"]
    return failures if catalog.similar_prompts != 0 else [*failures, "no prompt was remembered"]


def _outages_sentence(outages: Sequence[OutageReport]) -> list[str]:
    if not outages:
        return []
    named = (f"{one.server} {one.how.value} in {one.chat}, back in {one.back_s:.1f} s" for one in outages)
    return [f"Servers were stopped or killed in the middle: {'; '.join(named)}."]


def _catalogs_sentence(catalog: CatalogReport | None) -> list[str]:
    if catalog is None:
        return []
    known = f"The catalog knows {catalog.blocks:,} blocks of {catalog.tenant}'s"
    if catalog.similar_prompts is None:
        return [f"{known}."]
    return [
        f"{known}; {catalog.similar_prompts} past prompts are like a question that is new, the best of them "
        f"by {catalog.best_similarity:.2f}."
    ]


def _neighbours_sentence(neighbour: NeighbourReport | None) -> list[str]:
    if neighbour is None:
        return []
    verdict = "kept its guarantee" if neighbour.guarantees_kept else "LOST WHAT IS GUARANTEED TO IT"
    return [
        f"The second model (random weights) computed {neighbour.tokens:,} tokens in {neighbour.prompts} prompts beside "
        f"the chats, and was held to its limit; the first one {verdict}."
    ]


def _share_cells(account: Mapping[str, Any], tier: str, share: Mapping[str, Any]) -> tuple[str, ...]:
    asked = account["asked_blocks"]
    return (
        account["name"].rpartition("/")[2],
        tier,
        f"{share['blocks']:,}",
        f"{share['used_bytes'] / MIB:,.0f}",
        f"{share['guaranteed_bytes'] / MIB:,.0f}" if share["guaranteed_bytes"] else "-",
        f"{share['limit_bytes'] / MIB:,.0f}" if share["limit_bytes"] is not None else "-",
        f"{100 * account['matched_blocks'] / asked:.0f} %" if asked else "-",
    )
