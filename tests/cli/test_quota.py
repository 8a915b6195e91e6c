"""`kvpool quota`: shows quotas, and edits them in the pool's file without touching anything else."""

from __future__ import annotations

import fcntl
import os
import stat
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from kvpool.cli.exits import ExitCode
from kvpool.cli.pool_file import held
from kvpool.cli.quotas import Assignment, assignment, edit, edited
from kvpool.config import parse_config
from kvpool.config.document import parse_document
from kvpool.errors import ConfigError
from tests.cli.command import kvpool

FILE = Path("pool.yaml")
BLOCK = """\
# The pool of the lab.
apiVersion: kvpool.dev/v1alpha1
kind: KVCachePool
metadata: {name: lab}
spec:
  tiers:
    ram: {capacity: 64Mi}   # small
    ssd:
      capacity: 1Gi
  models:   # two of them

  - name: a
    prefillTokensPerSecond: 350   # until measured

  # The other one.
  - quotas:
      ram:
        # for the demo
        limit: 32Mi     # half
        guaranteed: 8Mi
    name: b
  # The end of the models.
  telemetry: {logLevel: info}
"""
FLOW = """\
apiVersion: kvpool.dev/v1alpha1
kind: KVCachePool
metadata: {name: lab}
spec: {tiers: {ram: {capacity: 64Mi}, ssd: {capacity: 1Gi}}, models: [{name: a}, {quotas: {ram: {limit: 32Mi,
  guaranteed: 8Mi}}, name: b}]}   # all in one
"""
NONE = """\
apiVersion: kvpool.dev/v1alpha1
kind: KVCachePool
metadata: {name: lab}
spec:
  tiers: {ram: {capacity: 64Mi}, ssd: {capacity: 1Gi}}"""


def after(text: str, model: str, *assigned: str, add: bool = False) -> str:
    return edited(FILE, text, model, [assignment(one) for one in assigned], add=add)


def changed_lines(before: str, now: str) -> tuple[list[str], list[str]]:
    """Lines that went and lines that came."""
    old, new = before.splitlines(), now.splitlines()
    return [line for line in old if line not in new], [line for line in new if line not in old]


def test_a_value_is_replaced_where_it_stands() -> None:
    assert after(BLOCK, "b", "ram.limit=48Mi") == BLOCK.replace("limit: 32Mi", "limit: 48Mi")
    assert after(FLOW, "b", "ram.limit=48Mi") == FLOW.replace("limit: 32Mi", "limit: 48Mi")


def test_a_missing_field_comes_behind_the_others_of_its_section() -> None:
    assert changed_lines(BLOCK, after(BLOCK, "a", "ssd.limit=500Mi")) == ([], ["    quotas: {ssd: {limit: 500Mi}}"])
    lines = after(BLOCK, "a", "ssd.limit=500Mi").splitlines()
    assert lines[lines.index("    quotas: {ssd: {limit: 500Mi}}") - 1].startswith("    prefillTokensPerSecond")
    assert after(BLOCK, "b", "ssd.limit=500Mi").index("ssd: {limit") < BLOCK.index("    name: b") + 60
    assert after(FLOW, "a", "ram.limit=1Mi") == FLOW.replace("{name: a}", "{name: a, quotas: {ram: {limit: 1Mi}}}")


def test_none_takes_a_field_out_and_the_sections_that_are_empty_then() -> None:
    assert changed_lines(BLOCK, after(BLOCK, "b", "ram.limit=none")) == (["        limit: 32Mi     # half"], [])
    without = after(BLOCK, "b", "ram.limit=none", "ram.guaranteed=none")
    assert "quotas" not in without
    assert "  - name: b\n  # The end of the models.\n" in without
    assert after(FLOW, "b", "ram.limit=none", "ram.guaranteed=none").endswith("{name: b}]}   # all in one\n")


def test_none_for_what_is_not_there_changes_nothing() -> None:
    for text in (BLOCK, FLOW):
        assert after(text, "a", "ram.limit=none", "ssd.guaranteed=none") == text


def test_an_added_model_comes_last_in_the_style_of_the_others() -> None:
    added = after(BLOCK, "c", "ram.guaranteed=2Mi", "ram.limit=4Mi", add=True)
    new = ["  - name: c", "    quotas: {ram: {guaranteed: 2Mi, limit: 4Mi}}"]
    assert changed_lines(BLOCK, added) == ([], new)
    assert "    name: b\n" + "\n".join(new) + "\n  # The end" in added
    assert after(NONE, "c", "ram.limit=4Mi", add=True) == NONE + (
        "\n  models: [{name: c, quotas: {ram: {limit: 4Mi}}}]\n"
    )
    assert after(FLOW, "c", add=True) == FLOW.replace("name: b}]", "name: b}, {name: c}]")


def test_line_ends_and_a_byte_order_mark_stay(tmp_path: Path) -> None:
    file = tmp_path / "pool.yaml"
    file.write_bytes(b"\xef\xbb\xbf" + BLOCK.replace("\n", "\r\n").encode())
    assert kvpool("quota", file, "a", "ram.limit=4Mi").code == 0
    now = file.read_bytes()
    assert now.startswith(b"\xef\xbb\xbf#")
    assert now.count(b"\r\n") == now.count(b"\n") == BLOCK.count("\n") + 1


def test_a_quota_that_is_shared_through_an_alias_is_left_alone() -> None:
    anchored = BLOCK.replace("  - name: a\n", "  - name: a\n    quotas: &q {ram: {limit: 1Mi}}\n")
    aliased = anchored.replace("  - quotas:\n      ram:\n        # for the demo\n        limit: 32Mi     # half\n"
                               "        guaranteed: 8Mi\n", "  - quotas: *q\n")  # fmt: skip
    assert parse_config(FILE, aliased)
    for model in ("a", "b"):
        with pytest.raises(ConfigError, match="cannot be changed in place"):
            after(aliased, model, "ram.limit=2Mi")
    assert "  - quotas: *q\n" in after(aliased, "c", "ram.limit=2Mi", add=True)


HEAD = NONE + "\n"
LAYOUTS = [
    "  models: []   # none\n  telemetry: {}\n",
    "  models:\n  - name: a\n  # c\n  - name: c\n  telemetry: {}\n",
    "  models:\n      -   name: a\n          quotas:\n              ram:\n                  limit: 1Mi\n",
    '  "models": [{"name": "a", "quotas": {"ram": {"limit": "1Mi"}}}]\n',
    "  models: [\n    {name: a,   # first\n     quotas: {\n       ram: {limit: 1Mi},\n     }},\n  ]   # end\n",
    "  models:\n    - name: a",
    "  models:\n    -\n      name: a\n",
    "  models:\n    - prefillTokensPerSecond: 3\n      name: >-\n        a\n  telemetry: {}\n",
    "  models:\n    - name: a\n\n\n# end of file\n",
    "  models:\n    - quotas: {ram: {}, ssd: {limit: 1Gi}}\n      name: a\n...\n",
    "  # ä🚲\n  models: [{name: a}]   # 🚲🚲\n",
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_whatever_the_layout_only_the_quota_changes(layout: str) -> None:
    for model in "ab":
        now = after(HEAD + layout, model, "ram.limit=2Mi", "ssd.guaranteed=4Ki", add=True)
        assert parse_config(FILE, now)
        assert now.count("#") == layout.count("#")
        assert after(now, model, "ram.limit=none", "ssd.guaranteed=none").count("limit: 2Mi") == 0


FIELDS = st.builds(
    Assignment,
    st.sampled_from(["ram", "ssd"]),
    st.sampled_from(["guaranteed", "limit"]),
    st.sampled_from([None, "4Mi", 4096, "1.5Gi"]),
)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from([BLOCK, FLOW, NONE]), st.lists(st.tuples(st.sampled_from("abcd"), FIELDS), max_size=5))
def test_any_edits_in_a_row_say_what_was_meant_and_keep_every_comment(
    text: str, edits: list[tuple[str, Assignment]]
) -> None:
    now = text
    wanted: dict[str, dict[tuple[str, str], object]] = {name: {} for name in "abcd"}
    if text is not NONE:
        wanted["b"] = {("ram", "limit"): "32Mi", ("ram", "guaranteed"): "8Mi"}
    for model, one in edits:
        now = edited(FILE, now, model, [one], add=True)
        wanted[model][one.tier, one.field] = one.value
    content = parse_document(FILE, now).content
    for model in content["spec"].get("models", []):
        said = {
            (tier, field): value for tier, quota in model.get("quotas", {}).items() for field, value in quota.items()
        }
        assert said == {key: value for key, value in wanted[model["name"]].items() if value is not None}
    for comment in ("# The pool of the lab.", "# small", "# until measured", "# The other one.", "# The end of"):
        assert (comment in text) == (comment in now)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("ram.limit", "TIER.limit=SIZE"),
        ("disk.limit=1Gi", "gpu, ram, dragonfly, database, ssd"),
        ("ram.limit=8Gb", "512Mi"),
        ("ram.limit=", "TIER.limit=SIZE"),
    ],
)
def test_what_is_no_quota_is_answered_with_one(wrong: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        assignment(wrong)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "pool.yaml"
    path.write_text(BLOCK)
    return path


@pytest.mark.parametrize(
    ("assigned", "says"),
    [
        ("ssd.guaranteed=2Gi", "above the tier's capacity of 1Gi"),
        ("ram.limit=1Mi", "below guaranteed of 8Mi"),
        ("gpu.limit=1Gi", "a tier that the pool does not have"),
        ("dragonfly.guaranteed=1Gi", "takes a limit only"),
    ],
)
def test_what_does_not_fit_is_refused_by_field_and_nothing_is_written(file: Path, assigned: str, says: str) -> None:
    before = file.stat()
    with pytest.raises(ConfigError, match=says) as raised:
        edit(file, "b", [assigned], add=False, as_json=True)
    assert f"{file}:" in str(raised.value)
    assert file.stat() == before
    assert [path.name for path in file.parent.iterdir()] == ["pool.yaml"]


def test_an_unknown_model_is_answered_with_the_known_ones(file: Path) -> None:
    ended = kvpool("quota", file, "huge", "ram.limit=1Mi")
    assert ended.code == ExitCode.USAGE
    assert "it has a, b" in ended.complaint
    assert "--add" in ended.complaint


def test_a_wrong_file_can_be_mended(file: Path) -> None:
    file.write_text(BLOCK.replace("limit: 32Mi", "limit: 1Mi"))
    assert kvpool("quota", file, "b").code == ExitCode.USAGE
    assert kvpool("quota", file, "b", "ram.limit=16Mi").code == 0
    assert kvpool("quota", file, "b").code == 0


def test_mode_and_owner_stay_and_links_are_followed(file: Path, tmp_path: Path) -> None:
    file.chmod(0o640)
    if os.geteuid() == 0:
        os.chown(file, 1234, 2345)
    before = file.stat()
    link = tmp_path / "link.yaml"
    link.symlink_to(file.name)
    edit(link, "a", ["ram.limit=2Mi"], add=False, as_json=True)
    now = file.stat()
    assert link.is_symlink()
    assert (now.st_uid, now.st_gid, stat.S_IMODE(now.st_mode)) == (before.st_uid, before.st_gid, 0o640)
    assert now.st_ino != before.st_ino, "replaced whole"
    assert "limit: 2Mi" in file.read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.yaml", "pool.yaml"]


def test_a_file_that_was_changed_meanwhile_is_not_written_over(file: Path) -> None:
    for change in ("written", "replaced", "removed"):
        file.write_text(BLOCK)
        with held(file) as opened:
            if change == "written":
                file.write_text(BLOCK + "# mine\n")
            elif change == "replaced":
                (file.parent / "new").write_text(BLOCK)
                (file.parent / "new").rename(file)
            else:
                file.unlink()
            left = file.read_text() if file.exists() else None
            with pytest.raises(ConfigError, match="changed by somebody else"):
                opened.replace(BLOCK + "# ours\n")
        assert (file.read_text() if file.exists() else None) == left
        assert {path.name for path in file.parent.iterdir()} <= {"pool.yaml"}


def test_two_edits_at_a_time_exclude_each_other(file: Path) -> None:
    with file.open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="being edited"):
            edit(file, "a", ["ram.limit=2Mi"], add=False, as_json=True)


def test_all_models_are_shown_in_every_tier_with_what_is_left_for_all(file: Path) -> None:
    shown = kvpool("quota", file)
    rows = [line.split() for line in shown.out.splitlines()]
    assert ["b", "ram", "8Mi", "32Mi", "64Mi"] in rows
    assert ["a", "ssd", "0", "-", "1Gi"] in rows
    assert "ram: 8Mi of 64Mi guaranteed, 56Mi for all" in shown.out.splitlines()
    one = kvpool("quota", file, "b", "--json").objects
    assert one[0] == {"model": "b", "tier": "ram", "guaranteed_bytes": 8 << 20, "limit_bytes": 32 << 20,
                      "capacity_bytes": 64 << 20}  # fmt: skip
    assert [row["model"] for row in one] == ["b", "b"]


def test_an_edit_says_what_it_changed(file: Path) -> None:
    ended = kvpool("quota", file, "a", "ram.limit=4Mi")
    assert ended.out.splitlines()[0] == 'spec.models["a"].quotas.ram.limit: absent -> 4Mi'
    assert kvpool("quota", file, "a", "ram.limit=4Mi").out.splitlines()[0].endswith("nothing was written")


def test_a_runtime_config_and_json_are_not_edited(tmp_path: Path) -> None:
    rendered, as_json = tmp_path / "config.yaml", tmp_path / "pool.json"
    rendered.write_text("apiVersion: kvpool.dev/v1alpha1\nkind: RuntimeConfig\nname: a\nmodels: [{name: a}]\n")
    as_json.write_text("{}")
    for path, says in ((rendered, "KVCachePool"), (as_json, "JSON")):
        with pytest.raises(ConfigError, match=says):
            edit(path, "a", ["ram.limit=1Mi"], add=False, as_json=True)
