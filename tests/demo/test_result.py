"""What the demo prints, writes and draws, and when it fails."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from kvpool.demo.catalog import CatalogReport
from kvpool.demo.measure import FirstTokenFigures
from kvpool.demo.neighbour import NeighbourReport
from kvpool.demo.plot import draw
from kvpool.demo.result import Result
from kvpool.demo.script import ProcessReport
from kvpool.demo.servers import How, OutageReport, Process
from kvpool.demo.turn import TurnReport

FIGURES = FirstTokenFigures(
    prompt_tokens=2000,
    loaded_tokens=1984,
    rounds=3,
    cold_s=4.8,
    pool_s=0.12,
    pool_load_s=0.01,
    memory_s=0.1,
    memory_same_tokens_s=0.11,
)

ACCOUNT = {
    "name": "lab/small-model",
    "asked_blocks": 200,
    "matched_blocks": 150,
    "tiers": {
        "ram": {"blocks": 90, "used_bytes": 64 << 20, "guaranteed_bytes": 32 << 20, "limit_bytes": 96 << 20},
        "ssd": {"blocks": 900, "used_bytes": 640 << 20, "guaranteed_bytes": 0, "limit_bytes": None},
    },
}
NEIGHBOUR = NeighbourReport(
    prompts=12,
    tokens=12_288,
    loaded_tokens=0,
    most_used_bytes={"ram": 24 << 20, "ssd": 100 << 20},
    limit_bytes={"ram": 24 << 20, "ssd": None},
    guarantees_kept=True,
)
OUTAGE = OutageReport(server="postgres", version="postgres 18.1", how=How.KILLED, chat="globex 2.2", back_s=2.75)
CATALOG = CatalogReport(tenant="globex", blocks=120, similar_prompts=3, best_similarity=0.875)
TIERS: dict[str, Any] = {tier: {} for tier in ("ram", "dragonfly", "database", "ssd")}
SERVED = {"ram": 512, "dragonfly": 256, "database": 128, "ssd": 640}


def turn(process: int, number: int, served: dict[str, int], **options: Any) -> TurnReport:
    values: dict[str, Any] = {
        "process": process,
        "tenant": "globex",
        "chat": 2,
        "turn": number,
        "question": "Where?",
        "answer": "Here.",
        "prompt_tokens": 1700,
        "served_tokens": served,
        "cold_s": 12.345,
        "pool_s": 0.25,
        "memory_s": 0.24 if served else None,
        "same_as_memory": True,
        "same_as_cold": False,
    }
    return TurnReport(**{**values, **options})


def report(turns: tuple[TurnReport, ...], **options: Any) -> ProcessReport:
    values: dict[str, Any] = {
        "chats": {"globex 2": [1, 2]},
        "hashes": {"aa": "bb"},
        "blocks_stored": 25,
        "blocks_checked": 24,
        "blocks_wrong": 0,
        "stats": {"write_behind": {"saved_blocks": 20}, "accounts": [ACCOUNT], "tiers": TIERS},
        "block_tokens": 64,
        "first_token": FIGURES,
        "neighbour": NEIGHBOUR,
        "outages": (OUTAGE,),
        "catalog": CATALOG,
    }
    return ProcessReport(turns=turns, **{**values, **options})


def result(second: TurnReport | None = None, *, left: tuple[Process, ...] = (), **options: Any) -> Result:
    options = {"turns": (turn(1, 1, {}), turn(1, 2, SERVED)), **options}
    last = second or turn(2, 3, {"ssd": 1664}, out=("dragonfly",))
    return Result(report(**options), report((last,), first_token=None, outages=()), 183.0, left_running=left)


def printed(found: Result, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, soft_wrap=True)
    found.print(console)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_a_demo_in_which_all_went_well_does_not_fail() -> None:
    assert result().failures == []
    assert result().as_json()["ok"]


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (result(blocks_wrong=1), "1 blocks came back other than they were stored"),
        (result(turn(2, 3, {"ssd": 64}, same_as_memory=False)), "globex 2, turn 3: the answer differs"),
        (result(turn(2, 3, {})), "the second process was served nothing"),
        (result(turns=(turn(1, 2, {**SERVED, "database": 0}),)), "nothing was served from database"),
        (result(catalog=replace(CATALOG, blocks=0)), "the catalog knows no block"),
        (result(catalog=replace(CATALOG, similar_prompts=0)), "no prompt was remembered"),
        (
            result(left=(Process(name="dragonfly", version="redis 8.2.3", pid=4711, started="9"),)),
            "dragonfly (redis 8.2.3), process 4711, was left running",
        ),
        (result(neighbour=replace(NEIGHBOUR, guarantees_kept=False)), "lost what is guaranteed"),
        (result(neighbour=replace(NEIGHBOUR, most_used_bytes={"ram": 25 << 20})), "more than its limit"),
    ],
)
def test_what_must_not_be_fails_and_is_said(found: Result, reason: str) -> None:
    assert not found.as_json()["ok"]
    assert reason in found.failures[0]
    assert "FAILED" in printed(found)


def test_a_cold_run_that_differs_is_told_but_does_not_fail() -> None:
    assert not result().as_json()["turns"][0]["same_as_cold"]
    assert result().failures == []


def test_the_table_fits_a_terminal_of_80_columns_uncut() -> None:
    lines = printed(result()).splitlines()
    table = [line for line in lines if line.strip().startswith("globex 2.")]
    assert [line.split() for line in table] == [
        ["globex", "2.1", "1,700", "-", "-", "-", "-", "12.35", "0.25", "yes", "no"],
        ["globex", "2.2", "1,700", "512", "256", "128", "640", "12.35", "0.25", "49x", "yes", "no"],
        ["globex", "2.3", "1,700", "-", "out", "-", "1,664", "12.35", "0.25", "49x", "yes", "no"],
    ]
    assert ["all", "5,100", "512", "256", "128", "2,304"] in [line.split() for line in lines]
    assert max(map(len, lines[: lines.index(table[-1])])) <= 80
    assert "…" not in printed(result())


def test_the_quotas_of_both_models_are_shown() -> None:
    lines = [line.split() for line in printed(result()).splitlines() if "small-model" in line]
    assert lines == [
        ["small-model", "ram", "90", "64", "32", "96", "75", "%"],
        ["small-model", "ssd", "900", "640", "-", "-", "75", "%"],
    ]


def test_servers_that_were_stopped_and_what_the_catalog_knows_are_told() -> None:
    text = printed(result())
    assert "postgres killed in globex 2.2, back in 2.8 s" in text
    assert "120 blocks of globex's; 3 past prompts are like a question that is new, the best of them by 0.88" in text


def test_a_pool_without_servers_needs_none_to_be_stopped() -> None:
    found = result(outages=(), catalog=None, stats={**report(()).stats, "tiers": {"ram": {}, "ssd": {}}})
    assert found.failures == []
    assert "Servers" not in printed(found)


def test_what_a_process_reports_reaches_the_next_one_unchanged(tmp_path: Path) -> None:
    for written in (result().first, result().second):
        written.write(tmp_path / "report.json")
        assert ProcessReport.read(tmp_path / "report.json") == written


def test_everything_is_in_the_json_file(tmp_path: Path) -> None:
    result().write(tmp_path / "demo.json")
    content = json.loads((tmp_path / "demo.json").read_bytes())
    assert content["headline"]["times_sooner_than_cold"] == pytest.approx(40)
    assert content["blocks"] == {"stored": 50, "checked": 48, "wrong": 0}
    assert [entry["process"] for entry in content["turns"]] == [1, 1, 2]
    assert content["turns"][2]["out"] == ["dragonfly"]
    assert content["served_tokens"] == {"ram": 512, "dragonfly": 256, "database": 128, "ssd": 2304}
    assert content["outages"][0]["how"] == "killed"
    assert content["catalog"]["blocks"] == 120
    assert content["left_running"] == []


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    draw(result(), tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
