"""The whole play, with real servers and a model that costs little: every tier serves, and no server stays."""

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console

from kvpool.demo.result import Result
from kvpool.demo.script import FIRST, QUICK_OUTAGES, SECOND, ProcessReport, Setting, play_first, play_second
from kvpool.demo.servers import PROCESSES, left_running, read_processes

from .tiny_chat import load_tiny_chat

LAPTOP = Path(__file__).parents[2] / "examples" / "laptop.yaml"


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The model is so small that threads would only take the cores from the servers."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Setting:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pool, work = tmp_path / "pool.yaml", tmp_path / "work"
    pool.write_text(LAPTOP.read_text().replace("capacity: 96Mi", "capacity: 64Mi"))  # words are fewer than tokens
    work.mkdir()
    return Setting(
        pool=pool, directory=tmp_path / "pool", work=work, quick=True, load_model=load_tiny_chat
    )  # fmt: skip


def played(setting: Setting) -> Result:
    console = Console(file=io.StringIO())
    play_first(setting, console)
    play_second(setting, console)
    first, second = (ProcessReport.read(setting.work / f"{name}.json") for name in (FIRST, SECOND))
    return Result(first, second, 0.0, left_running=left_running(read_processes(setting.work / PROCESSES)))


def test_every_tier_serves_whichever_server_is_away_and_answers_are_those_from_memory(setting: Setting) -> None:
    found = played(setting)
    assert found.failures == []
    assert list(found.served_tokens) == ["ram", "dragonfly", "database", "ssd"], "all tiers but the GPU's"
    assert all(found.served_tokens.values())
    assert [(one.server, one.how) for one in found.outages] == [(one.server, one.how) for one in QUICK_OUTAGES]
    during = {(turn.tenant, turn.chat, turn.turn): turn for turn in found.turns}
    without_dragonfly = during["globex", 2, 1]
    assert "dragonfly" in without_dragonfly.out
    assert "dragonfly" not in without_dragonfly.served_tokens
    assert without_dragonfly.served_tokens["database"] > 0
    assert "database" in during["globex", 1, 2].out
    assert "database" not in during["globex", 1, 2].served_tokens
    assert {process.name for process in read_processes(setting.work / PROCESSES)} == {"dragonfly", "postgres", "qdrant"}


@pytest.mark.slow
def test_a_second_demo_in_the_same_directory_is_served_nothing_of_the_first_one(setting: Setting) -> None:
    play_first(setting, Console(file=io.StringIO()))
    play_first(setting, Console(file=io.StringIO()))
    again = ProcessReport.read(setting.work / f"{FIRST}.json")
    assert again.turns[0].loaded_tokens == 0
    assert again.blocks_wrong == 0
