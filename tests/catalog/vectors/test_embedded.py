"""Vectors in a process of their own: killed, stopped, damaged, and built anew, with real signals and real files."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import psutil
import pytest
import qdrant_edge

from kvpool.catalog.vectors.contract import VectorsMismatchError, VectorsUnavailableError
from kvpool.catalog.vectors.embedded import EmbeddedVectors
from kvpool.catalog.vectors.layout import NAME
from kvpool.catalog.vectors.layout import TREE as TREE_FIELD
from kvpool.errors import DirectoryInUseError
from tests.catalog.vectors.points import TREE, VECTORS_S, leaf_of, near, point, points, tree_of, vector_of
from tests.footprint import footprint, holds_no_more_than
from tests.waiting import eventually

SEARCH_S = 20.0


@pytest.fixture
def vectors(tmp_path: Path) -> Iterator[EmbeddedVectors]:
    with closing(EmbeddedVectors(tmp_path)) as opened:
        yield opened


def pid_of(vectors: EmbeddedVectors) -> int:
    pid = vectors.pid
    assert pid is not None
    return pid


def found(vectors: EmbeddedVectors, number: int) -> bool:
    hits = vectors.search(vector_of(number), TREE, 1, deadline_s=SEARCH_S)
    return bool(hits) and hits[0].leaf == leaf_of(number)


def is_back(vectors: EmbeddedVectors) -> bool:
    with suppress(VectorsUnavailableError):
        vectors.search(vector_of(1), TREE, deadline_s=SEARCH_S)
        return True
    return False


def builders(vectors: EmbeddedVectors) -> list[psutil.Process]:
    try:
        return psutil.Process(vectors.pid).children()
    except psutil.NoSuchProcess:
        return []


def files_in(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file() and path.name != "LOCK"}


def test_what_was_acknowledged_survives_kill_9_of_the_process_that_has_it(vectors: EmbeddedVectors) -> None:
    acknowledged: list[int] = []

    def add() -> None:
        with suppress(VectorsUnavailableError):
            for number in range(0, 100_000, 10):
                vectors.upsert(points(range(number, number + 10)))
                acknowledged.append(number)

    thread = threading.Thread(target=add)
    thread.start()
    eventually(lambda: len(acknowledged) >= 30, deadline_s=VECTORS_S)
    os.kill(pid_of(vectors), signal.SIGKILL)
    thread.join()
    eventually(lambda: is_back(vectors), deadline_s=VECTORS_S)
    assert 10 * len(acknowledged) <= vectors.count() <= 10 * len(acknowledged) + 10
    for number in acknowledged[:: max(1, len(acknowledged) // 20)]:
        assert found(vectors, number)


_PARENT = """
import sys
from pathlib import Path
from kvpool.catalog.vectors.embedded import EmbeddedVectors
from tests.catalog.vectors.points import points
vectors = EmbeddedVectors(Path(sys.argv[1]))
print(vectors.pid, flush=True)
for number in range(0, 1_000_000, 10):
    vectors.upsert(points(range(number, number + 10)))
    print(number, flush=True)
"""


def test_what_was_acknowledged_survives_kill_9_of_the_parent_and_nothing_of_it_stays(tmp_path: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", _PARENT, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    for _ in range(30):
        parent.stdout.readline()
    parent.kill()
    acknowledged = 30 + len(parent.stdout.read().split())
    parent.wait()
    parent.stdout.close()
    with closing(EmbeddedVectors(tmp_path)) as vectors:
        assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE
        assert 10 * (acknowledged - 1) <= vectors.count() <= 10 * (acknowledged + 1)
        assert found(vectors, 290)


def test_a_process_that_stands_still_costs_a_search_its_deadline_and_then_answers_again(
    vectors: EmbeddedVectors,
) -> None:
    vectors.upsert(points(range(50)))
    os.kill(pid_of(vectors), signal.SIGSTOP)
    for _ in range(20):  # more than it may have unanswered
        began_s = time.monotonic()
        with pytest.raises(VectorsUnavailableError):
            vectors.search(vector_of(7), TREE, deadline_s=0.05)
        assert time.monotonic() - began_s < 0.5
    os.kill(pid_of(vectors), signal.SIGCONT)
    eventually(lambda: is_back(vectors), deadline_s=VECTORS_S)
    assert all(found(vectors, number) for number in range(50)), "late answers are passed over"


def test_an_update_that_cannot_be_sent_costs_its_budget_and_the_process_is_replaced(tmp_path: Path) -> None:
    with closing(EmbeddedVectors(tmp_path, budget_s=0.3)) as vectors:
        vectors.upsert(points(range(50)))
        stopped = pid_of(vectors)
        os.kill(stopped, signal.SIGSTOP)
        began_s = time.monotonic()
        with pytest.raises(VectorsUnavailableError):
            vectors.upsert(points(range(50, 1_000)))
        assert time.monotonic() - began_s < 3
        eventually(lambda: is_back(vectors), deadline_s=VECTORS_S)
        assert not psutil.pid_exists(stopped)
        assert found(vectors, 49)


def test_a_disk_that_takes_no_more_costs_what_is_new_and_nothing_else(vectors: EmbeddedVectors) -> None:
    vectors.upsert(points(range(100)))
    psutil.Process(vectors.pid).rlimit(psutil.RLIMIT_FSIZE, (1 << 20, psutil.RLIM_INFINITY))

    def fill() -> None:
        for number in range(1_000, 101_000, 250):
            vectors.upsert(points(range(number, number + 250)))

    with pytest.raises(VectorsUnavailableError):
        fill()
    eventually(lambda: is_back(vectors), deadline_s=VECTORS_S)
    vectors.upsert(points(range(100, 110)))
    assert found(vectors, 42)
    assert found(vectors, 105)


def test_ctrl_c_is_not_for_the_process_that_has_the_points(vectors: EmbeddedVectors) -> None:
    pid = pid_of(vectors)
    assert os.getpgid(pid) != os.getpgid(0)
    os.kill(pid, signal.SIGINT)
    vectors.upsert([point(1)])
    assert vectors.pid == pid


def test_a_second_process_on_the_directory_is_refused(vectors: EmbeddedVectors, tmp_path: Path) -> None:
    with pytest.raises(DirectoryInUseError, match=f"{tmp_path}.* is in use by another process"):
        EmbeddedVectors(tmp_path)
    vectors.upsert([point(1)])
    assert found(vectors, 1)


def test_points_of_another_dimension_are_refused_and_left_alone(tmp_path: Path) -> None:
    copy = tmp_path / NAME / "points-1"
    copy.mkdir(parents=True)
    config = qdrant_edge.EdgeConfig(vectors=qdrant_edge.EdgeVectorParams(256, qdrant_edge.Distance.Cosine))
    shard = qdrant_edge.EdgeShard.create(str(copy), config)
    shard.update(qdrant_edge.UpdateOperation.upsert_points([qdrant_edge.Point(1, [1.0] * 256, {})]))
    shard.close()
    (tmp_path / NAME / "CURRENT").write_text("points-1\n")
    before = files_in(tmp_path)
    with pytest.raises(VectorsMismatchError, match=r"another kind: .*256.*; needed are 512"):
        EmbeddedVectors(tmp_path)
    assert files_in(tmp_path) == before


def test_points_whose_tree_was_indexed_as_a_keyword_are_found_and_indexed_anew(tmp_path: Path) -> None:
    with closing(EmbeddedVectors(tmp_path)) as vectors:
        vectors.upsert(points(range(50)))
    copy = str(tmp_path / NAME / "points-1")
    shard = qdrant_edge.EdgeShard.load(copy)
    keyword = qdrant_edge.KeywordIndexParams(is_tenant=True)
    shard.update(qdrant_edge.UpdateOperation.create_field_index(TREE_FIELD, keyword))
    shard.flush()
    shard.close()
    with closing(EmbeddedVectors(tmp_path)) as vectors:
        assert all(found(vectors, number) for number in range(50))
    shard = qdrant_edge.EdgeShard.load(copy)
    assert shard.info().payload_schema[TREE_FIELD].data_type == qdrant_edge.PayloadSchemaType.Uuid
    shard.close()


@pytest.mark.parametrize("damaged", ["segment.json", "mutable_id_tracker.mappings", "wal", "edge_config.json"])
def test_damaged_files_cost_the_points_at_most_and_never_give_those_of_others(tmp_path: Path, damaged: str) -> None:
    with closing(EmbeddedVectors(tmp_path)) as vectors:
        vectors.upsert(points(range(100)))
        vectors.upsert(points(range(100), tree_of(tenant=1)))
    for path in tmp_path.rglob("*"):
        if path.is_file() and (path.name == damaged or path.parent.name == damaged):
            path.write_bytes(os.urandom(max(100, min(path.stat().st_size, 1 << 20))))
    with closing(EmbeddedVectors(tmp_path)) as vectors:
        for number in range(0, 100, 10):
            for hit in vectors.search(vector_of(number), TREE, 100, deadline_s=SEARCH_S):
                assert hit.leaf in {leaf_of(other) for other in range(100)}
        vectors.upsert(points(range(100, 110)))
        assert found(vectors, 105)


def test_points_that_cannot_be_opened_are_set_aside_and_that_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):  # what was set aside before is replaced
        with closing(EmbeddedVectors(tmp_path)) as vectors:
            vectors.upsert(points(range(10)))
        for path in (tmp_path / NAME).glob("points-*/segments/*/segment.json"):
            path.write_bytes(b"nothing")
        with closing(EmbeddedVectors(tmp_path)) as vectors:
            assert vectors.count() == 0
        assert "could not be opened" in caplog.text
        names = sorted(path.name for path in (tmp_path / NAME).iterdir())
        assert names == ["CURRENT", "LOCK", "points-1", "unreadable"]


def test_a_graph_is_built_while_searches_and_changes_go_on(tmp_path: Path) -> None:
    with closing(EmbeddedVectors(tmp_path, index_after=3_000)) as vectors:
        vectors.upsert(points(range(3_000)))
        eventually(lambda: builders(vectors), deadline_s=VECTORS_S)
        vectors.upsert(points(range(50), tree_of(tenant=1)))
        assert vectors.erase(tree_of(tenant=1).tenant, 1) == 50
        later = 3_000
        while vectors.outside_graph() >= 3_000:
            assert found(vectors, 2_000)
            if later < 3_200:
                vectors.upsert(points(range(later, later + 5)))
                later += 5
        assert vectors.count() == later
        assert vectors.erase(tree_of(tenant=1).tenant, 1) == 0
        eventually(lambda: not builders(vectors), deadline_s=VECTORS_S)
        for number in (0, 2_999, 3_000, later - 1):
            assert found(vectors, number)
        assert [path.name for path in (tmp_path / NAME).glob("points-*")] == ["points-2"]


def test_neighbours_are_found_in_the_graph(tmp_path: Path) -> None:
    with closing(EmbeddedVectors(tmp_path, index_after=3_000)) as vectors:
        centres = [vector_of(10_000 + centre) for centre in range(300)]
        vectors.upsert([point(number, vector=near(centres[number % 300], number, 0.5)) for number in range(3_000)])
        eventually(lambda: vectors.outside_graph() == 0, deadline_s=VECTORS_S)
        right = 0
        for centre in range(0, 300, 10):
            hits = vectors.search(centres[centre], TREE, 10, deadline_s=SEARCH_S)
            right += sum(hit.leaf in {leaf_of(number) for number in range(centre, 3_000, 300)} for hit in hits)
        assert right >= 0.95 * 300


def test_a_build_that_is_killed_is_told_and_tried_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with closing(EmbeddedVectors(tmp_path, index_after=1_500)) as vectors:
        vectors.upsert(points(range(1_500)))
        eventually(lambda: builders(vectors), deadline_s=VECTORS_S)
        for builder in builders(vectors):
            builder.kill()
        eventually(lambda: not builders(vectors), deadline_s=VECTORS_S)
        vectors.upsert(points(range(1_500, 3_100)))
        eventually(lambda: vectors.outside_graph() < 1_500, deadline_s=VECTORS_S)
        assert "the graph was not built" in caplog.text
        assert vectors.count() == 3_100


def test_a_build_ends_with_the_process_that_began_it_and_what_it_left_is_removed(tmp_path: Path) -> None:
    with closing(EmbeddedVectors(tmp_path, index_after=2_000)) as vectors:
        vectors.upsert(points(range(2_000)))
        eventually(lambda: builders(vectors), deadline_s=VECTORS_S)
        (builder,) = builders(vectors)
        os.kill(pid_of(vectors), signal.SIGKILL)
        eventually(lambda: not builder.is_running() or builder.status() == psutil.STATUS_ZOMBIE, deadline_s=VECTORS_S)
        eventually(lambda: is_back(vectors), deadline_s=VECTORS_S)
        assert vectors.count() == 2_000
        eventually(lambda: vectors.outside_graph() == 0, deadline_s=VECTORS_S)


def test_closing_leaves_no_process_and_no_descriptor(tmp_path: Path) -> None:
    def once(number: int) -> int:
        with closing(EmbeddedVectors(tmp_path)) as vectors:
            vectors.upsert([point(number)])
            return pid_of(vectors)

    once(0)
    before = footprint()
    pids = [once(number) for number in range(1, 5)]
    holds_no_more_than(before)
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_the_directory_is_for_its_owner_only(vectors: EmbeddedVectors, tmp_path: Path) -> None:
    assert (tmp_path / NAME).stat().st_mode & 0o077 == 0
    assert found(vectors, 1) is False
