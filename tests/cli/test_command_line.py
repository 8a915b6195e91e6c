"""What holds for every command: help, versions, usage errors in one line, exit codes, a start without heavy imports."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kvpool import __version__
from kvpool.bench.area import AREAS
from kvpool.cli.exits import ExitCode, code_of
from kvpool.errors import (
    ConfigError,
    DirectoryInUseError,
    IncompatibleDataError,
    InputError,
    KvpoolError,
    PoolClosedError,
    SharedTierOutError,
    UnsupportedModelError,
)
from tests.cli.command import kvpool, started

COMMANDS = ("run", "status", "quota", "warm", "explain", "replay", "bench", "version")


def test_version_prints_the_version() -> None:
    ended = kvpool("version")
    assert (ended.code, ended.out, ended.err) == (0, f"kvpool {__version__}\n", "")


def test_version_and_help_import_nothing_heavy() -> None:
    program = (
        "import sys\n"
        "from kvpool.cli.main import main\n"
        "sys.argv = ['kvpool', *sys.argv[1:]]\n"
        "try:\n    main()\n"
        "finally:\n    print(sorted({'numpy', 'rich', 'torch', 'xxhash', 'kvpool.pool'} & set(sys.modules)))\n"
    )
    for argument in ("version", "--help"):
        ran = subprocess.run([sys.executable, "-c", program, argument], capture_output=True, text=True, check=True)
        assert ran.stdout.splitlines()[-1] == "[]"


def test_help_lists_every_command_and_every_exit_code() -> None:
    ended = kvpool("--help")
    assert ended.code == 0
    for command in COMMANDS:
        assert f"\n  {command} " in ended.out
    for code in ExitCode:
        assert f"  {code.value}  " in ended.out


@pytest.mark.parametrize("command", COMMANDS[:-1])
def test_help_of_a_command_has_examples(command: str) -> None:
    ended = kvpool(command, "--help")
    assert ended.code == 0
    assert f"    kvpool {command} " in ended.out.split("Examples:\n")[1]


def test_no_command_prints_the_help_and_is_a_usage_error() -> None:
    ended = kvpool()
    assert ended.code == ExitCode.USAGE
    assert ended.out == ""
    assert "Commands:" in ended.err


@pytest.mark.parametrize(
    "arguments",
    [
        ("fly",),
        ("run",),
        ("run", "a.yaml", "b.yaml"),
        ("run", "a.yaml", "--every", "0"),
        ("status",),
        ("quota",),
        ("warm", "pool.yaml"),
        ("warm", "pool.yaml", "prompts", "--max-tokens", "0"),
        ("explain", "--tokens", "-"),
        ("explain", "--model", "llama"),
        ("explain", "--shared", "--top", "0"),
        ("bench", "--seconds", "soon"),
        ("bench", "--json", "--markdown"),
        ("replay",),
    ],
)
def test_a_wrong_command_line_is_one_line_that_names_the_help(arguments: tuple[str, ...]) -> None:
    ended = kvpool(*arguments)
    assert ended.code == ExitCode.USAGE
    assert ended.complaint.endswith("--help")


def test_each_error_of_the_library_has_its_exit_code() -> None:
    public = [error for error in KvpoolError.__subclasses__() if error.__module__ == KvpoolError.__module__]
    codes = {error: code_of(error("")) for error in public}
    assert codes == {
        ConfigError: ExitCode.USAGE,
        InputError: ExitCode.USAGE,
        DirectoryInUseError: ExitCode.IN_USE,
        IncompatibleDataError: ExitCode.FAILED,
        PoolClosedError: ExitCode.FAILED,
        SharedTierOutError: ExitCode.FAILED,
        UnsupportedModelError: ExitCode.FAILED,
    }


def test_a_reader_that_goes_away_ends_the_command_quietly(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"hash_ids": [1, 2]}\n' * 1_000)
    command = started("replay", trace, "--json", "--capacity-blocks", ",".join(["10"] * 500))
    assert command.stdout is not None
    assert command.stderr is not None
    command.stdout.readline()
    command.stdout.close()
    assert command.wait(timeout=60) == ExitCode.PIPE_CLOSED
    assert command.stderr.read() == ""
    command.stderr.close()


def test_the_help_of_bench_names_every_area() -> None:
    assert f"{', '.join(AREAS)}." in " ".join(kvpool("bench", "--help").out.split())
