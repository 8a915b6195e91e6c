"""The demo as one picture: where each prompt's tokens came from, and when its first token was there."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullFormatter

from kvpool.demo.result import Result, times
from kvpool.demo.turn import TurnReport

INK, FAINT, COLD = "#22303c", "#8a97a3", "#b9c2ca"
COLOURS = {
    "ram": "#2a9d8f",
    "dragonfly": "#3f7cc4",
    "database": "#9067b5",
    "ssd": "#e9a23b",
    "computed": "#dfe4e8",
    "memory": "#22303c",
}


def draw(result: Result, path: Path) -> None:
    """Write the picture."""
    matplotlib.rcParams.update({"font.family": "sans-serif", "text.color": INK, "axes.edgecolor": FAINT})
    figure = Figure(figsize=(13.5, 2.15 + 0.36 * (len(result.turns) + 1)), dpi=150, facecolor="white")
    tokens, times = figure.subplots(1, 2, sharey=True, width_ratios=(1, 1.25))
    rows = _rows(result)
    for row, turn in rows:
        _tokens_of(tokens, row, turn, result.tiers)
        _times_of(times, row, turn)
    _frame(tokens, times, rows, result)
    _title(figure, result)
    figure.savefig(path)


def _rows(result: Result) -> list[tuple[float, TurnReport]]:
    """A line per turn, from the top, with a gap between the processes."""
    gap = len(result.first.turns)
    return [(index + (1.0 if index >= gap else 0.0), turn) for index, turn in enumerate(result.turns)]


def _tokens_of(axes: Any, row: float, turn: TurnReport, tiers: Sequence[str]) -> None:
    left = 0
    for name in tiers:
        axes.barh(row, turn.served_tokens.get(name, 0), left=left, height=0.62, color=COLOURS[name])
        left += turn.served_tokens.get(name, 0)
    axes.barh(row, turn.prompt_tokens - left, left=left, height=0.62, color=COLOURS["computed"])


def _times_of(axes: Any, row: float, turn: TurnReport) -> None:
    axes.plot([turn.pool_s, turn.cold_s], [row, row], color=COLD, linewidth=2.2, zorder=1, solid_capstyle="round")
    axes.plot(turn.cold_s, row, "o", color=COLD, markersize=8, zorder=2)
    if turn.memory_s is not None:
        axes.plot(turn.memory_s, row, "|", color=COLOURS["memory"], markersize=11, markeredgewidth=1.6, zorder=4)
    main = max(turn.served_tokens, key=lambda tier: turn.served_tokens[tier], default="computed")
    colour = COLD if main == "computed" else COLOURS[main]
    axes.plot(turn.pool_s, row, "o", color=colour, markersize=9, zorder=3)
    if turn.loaded_tokens:
        label = f"{turn.pool_s:.2f} s, {times(turn)} sooner"
        middle = (turn.pool_s * turn.cold_s) ** 0.5
        axes.text(middle, row - 0.14, label, fontsize=8, color=INK, ha="center", va="bottom")


def _frame(tokens: Any, times: Any, rows: list[tuple[float, TurnReport]], result: Result) -> None:
    tokens.set_yticks([row for row, _ in rows], [_name(turn) for _, turn in rows])
    tokens.set_ylim(rows[-1][0] + 0.7, -0.7)
    tokens.set_title("Where the prompt's tokens came from", loc="left", fontsize=10.5, pad=24)
    times.set_title("Time to the first token, in seconds (logarithmic)", loc="left", fontsize=10.5, pad=24)
    times.set_xscale("log")
    times.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    times.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    times.xaxis.set_minor_formatter(NullFormatter())
    times.set_xmargin(0.03)
    for axes in (tokens, times):
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="both", length=0, labelsize=9, colors=INK)
        axes.grid(axis="x", color="#eef1f3", linewidth=1)
        axes.set_axisbelow(True)
        between = len(result.first.turns)
        axes.axhline(between, color=FAINT, linewidth=0.8, linestyle=(0, (4, 4)))
    tokens.text(
        0,
        len(result.first.turns) - 0.06,
        "the process ends; a new one opens the pool",
        fontsize=8.5,
        color=FAINT,
        va="bottom",
        style="italic",
    )
    tokens.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    _legends(tokens, times, result.tiers)


def _name(turn: TurnReport) -> str:
    away = "".join(f" · no {tier}" for tier in turn.out)
    return f"{turn.tenant} {turn.chat}, turn {turn.turn}{away}"


def _legends(tokens: Any, times: Any, tiers: Sequence[str]) -> None:
    place: dict[str, Any] = {
        "loc": "lower left",
        "frameon": False,
        "fontsize": 8.5,
        "borderaxespad": 0,
        "columnspacing": 1.2,
    }
    bars = [Patch(color=COLOURS[name], label=name) for name in (*tiers, "computed")]
    tokens.legend(handles=bars, ncols=len(bars), bbox_to_anchor=(0, 1.005), **place)
    dot: dict[str, Any] = {"marker": "o", "linestyle": "none", "markersize": 7}
    times.legend(
        handles=[
            Line2D([], [], color=COLD, label="cold", **dot),
            Line2D([], [], color=COLOURS["ram"], label="kvpool, coloured by its main tier", **dot),
            Line2D([], [], color=COLOURS["memory"], label="same cache kept in memory", marker="|", linestyle="none",
                   markersize=10, markeredgewidth=1.6),
        ],
        ncols=3, bbox_to_anchor=(0, 1.005), **place,
    )  # fmt: skip


def _title(figure: Figure, result: Result) -> None:
    headline = result.headline
    figure.suptitle(
        f"A prompt of {headline.prompt_tokens:,} tokens again: {headline.pool_s:.2f} s to the first token "
        f"instead of {headline.cold_s:.1f} s",
        x=0.012, y=1 - 0.1 / figure.get_figheight(), va="top", ha="left", fontsize=14.5, fontweight="bold",
    )  # fmt: skip
    machine = result.as_json()["machine"]
    figure.text(
        0.012, 1 - 0.5 / figure.get_figheight(),
        "Chats of two tenants with one service desk, on a pool whose ram is too small for all of them; "
        "its servers are stopped in the middle",
        fontsize=10, color=FAINT, ha="left", va="center",
    )  # fmt: skip
    figure.text(
        0.012, 0.1 / figure.get_figheight(),
        f"SmolLM2-135M-Instruct, float32, {machine['threads']} threads of {machine['cpu']}; "
        f"blocks of {result.first.block_tokens} tokens; "
        f"torch {machine['torch']}, transformers {machine['transformers']}",
        fontsize=8, color=FAINT, ha="left", va="bottom",
    )  # fmt: skip
    figure.subplots_adjust(
        left=0.175,
        right=0.985,
        top=1 - 1.35 / figure.get_figheight(),
        bottom=0.62 / figure.get_figheight(),
        wspace=0.05,
    )
