"""`kvpool explain`, on a directory that a pool has left."""

from __future__ import annotations

import json
from array import array
from pathlib import Path

import pytest

from kvpool.cli.exits import ExitCode
from tests.cli.command import kvpool, started
from tests.cli.conftest import LAYOUT, STORED_BLOCKS, TOKENS, share, use

PROMPT = json.dumps(TOKENS).encode()
WHO = ("--model", "tiny", "--tenant", "acme", "--tokens", "-")


def test_each_whole_block_is_held_or_says_why_not(used_directory: Path) -> None:
    ended = kvpool("explain", "--directory", used_directory, *WHO, "--json", stdin=PROMPT)
    assert ended.code == 0
    reports = ended.objects
    assert [report["verdict"] for report in reports] == ["held"] * STORED_BLOCKS + ["never-stored"] * 2
    assert [report["tiers"] for report in reports] == [["ssd"]] * STORED_BLOCKS + [[], []]
    assert len({report["key"] for report in reports}) == len(reports)


def test_people_read_one_line_for_like_blocks_and_what_they_come_to(used_directory: Path) -> None:
    ended = kvpool("explain", "--directory", used_directory, *WHO, stdin=PROMPT)
    assert ended.code == 0
    lines = ended.out.splitlines()
    assert lines[0] == "3 of 5 blocks held: 192 of 327 tokens can be loaded"
    assert lines[1] == "the last 7 tokens are no whole block, and are never stored"
    assert [line.split()[:3] for line in lines[-2:]] == [["0-2", "0-191", "held"], ["3-4", "192-319", "never-stored"]]


def test_tokens_are_json_or_raw_int32_from_a_file_or_standard_input(used_directory: Path, tmp_path: Path) -> None:
    as_json, raw = tmp_path / "tokens.json", tmp_path / "tokens.bin"
    as_json.write_bytes(PROMPT)
    raw.write_bytes(array("i", TOKENS).tobytes())
    outputs = {
        kvpool("explain", "--directory", used_directory, *WHO[:-1], source, "--json", stdin=stdin).out
        for source, stdin in (("-", PROMPT), (str(as_json), b""), (str(raw), b""), ("-", raw.read_bytes()))
    }
    assert len(outputs) == 1
    assert outputs != {""}


def test_another_tenant_has_none_of_it(used_directory: Path) -> None:
    ended = kvpool("explain", "--directory", used_directory, *WHO[:2], "--tokens", "-", "--json", stdin=PROMPT)
    assert {report["verdict"] for report in ended.objects} == {"never-stored"}


def test_the_pools_file_names_the_directory_and_whether_tenants_share(pool_file: Path, tmp_path: Path) -> None:
    pool_file.write_text(pool_file.read_text() + "  sharing: {scope: pool}\n")
    use(pool_file, tmp_path / "share" / "kvpool" / "testing")
    who = ("--model", "tiny", "--tenant", "somebody", "--tokens", "-")
    ended = kvpool(
        "explain", "--pool", pool_file, *who, "--json", stdin=PROMPT, env={"XDG_DATA_HOME": f"{tmp_path}/share"}
    )
    assert [report["verdict"] for report in ended.objects].count("held") == STORED_BLOCKS


def test_explaining_changes_nothing_that_is_held(used_directory: Path) -> None:
    first = kvpool("explain", "--directory", used_directory, *WHO, "--json", stdin=PROMPT)
    assert kvpool("explain", "--directory", used_directory, *WHO, "--json", stdin=PROMPT).out == first.out


def test_a_directory_in_use_names_the_process_that_holds_it(pool_file: Path, used_directory: Path) -> None:
    holder = started("run", pool_file, "--directory", used_directory)
    assert holder.stdout is not None
    assert "is open" in holder.stdout.readline()
    ended = kvpool("explain", "--directory", used_directory, *WHO, stdin=PROMPT)
    holder.terminate()
    holder.communicate(timeout=60)
    assert ended.code == ExitCode.IN_USE
    assert f"process {holder.pid} " in ended.complaint


def test_a_directory_without_a_pool_is_refused_and_left_alone(tmp_path: Path) -> None:
    for where in (tmp_path / "absent", tmp_path):
        ended = kvpool("explain", "--directory", where, *WHO, stdin=PROMPT)
        assert ended.code == ExitCode.USAGE
        assert str(where) in ended.complaint
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_model_is_answered_with_the_known_ones(used_directory: Path) -> None:
    ended = kvpool("explain", "--directory", used_directory, "--model", "huge", "--tokens", "-", stdin=PROMPT)
    assert ended.code == ExitCode.USAGE
    assert "tiny" in ended.complaint


@pytest.mark.parametrize("tokens", [b"[1, 2", b'["a"]', b"[1.5]", b"[4294967296]", b"12345"])
def test_what_is_no_list_of_token_ids_is_refused(used_directory: Path, tokens: bytes) -> None:
    ended = kvpool("explain", "--directory", used_directory, *WHO, stdin=tokens)
    assert ended.code == ExitCode.USAGE
    assert ended.complaint


def test_the_pool_is_named_in_exactly_one_way(pool_file: Path, used_directory: Path) -> None:
    for named in ((), ("--pool", str(pool_file), "--directory", str(used_directory))):
        ended = kvpool("explain", *named, *WHO, stdin=PROMPT)
        assert ended.code == ExitCode.USAGE
        assert "--pool" in ended.complaint
        assert "--directory" in ended.complaint


def test_shared_prefixes_are_listed_with_what_they_take_and_who_used_them(pool_file: Path, directory: Path) -> None:
    share(pool_file, directory)
    (shared,) = kvpool("explain", "--shared", "--directory", directory, "--json").objects
    assert (shared["model"], shared["blocks"], shared["tokens"]) == ("tiny", 2, 2 * LAYOUT.block_tokens)
    assert (shared["requests"], shared["continuations"]) == (1, 1)
    assert shared["bytes"] == {"gpu": 0, "ram": 0, "ssd": 2 * LAYOUT.record_bytes}
    blocks = kvpool("explain", "--directory", directory, *WHO, "--json", stdin=PROMPT).objects
    assert shared["key"] == blocks[1]["key"]
    shown = kvpool("explain", "--shared", "--directory", directory)
    assert shown.out.splitlines()[-1].split()[1:2] == ["tiny"]


def test_where_nothing_is_shared_that_is_said(used_directory: Path) -> None:
    ended = kvpool("explain", "--shared", "--directory", used_directory)
    assert (ended.code, ended.out.startswith("no prefix is shared")) == (0, True)
