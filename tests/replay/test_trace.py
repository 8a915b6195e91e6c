"""Reading traces: the format, and what is said about a file that is none."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from kvpool.errors import InputError
from kvpool.replay.synthetic import synthetic_trace
from kvpool.replay.trace import BlockNumbers, read_traces


def line(hash_ids: list[object], input_length: int = 1_000) -> str:
    return json.dumps({"timestamp": 0, "input_length": input_length, "output_length": 1, "hash_ids": hash_ids}) + "\n"


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return tmp_path / "trace.jsonl"


def test_requests_come_in_the_files_order_and_blank_lines_are_passed_over(trace: Path) -> None:
    trace.write_text(line([0, 1]) + "\n" + line([0, 2]))
    assert [list(blocks) for blocks in read_traces([trace])] == [[0, 1], [0, 2]]


def test_a_gzipped_trace_reads_as_the_plain_one(trace: Path, tmp_path: Path) -> None:
    trace.write_text(line([7, 8, 9]))
    packed = tmp_path / "trace.jsonl.gz"
    packed.write_bytes(gzip.compress(trace.read_bytes()))
    assert read_traces([packed]) == read_traces([trace])


def test_several_files_are_one_trace_with_one_numbering(trace: Path) -> None:
    trace.write_text(line([5, 6]))
    assert [list(blocks) for blocks in read_traces([trace, trace])] == [[0, 1], [0, 1]]


def test_whole_blocks_leave_out_the_last_part_of_a_prompt(trace: Path) -> None:
    trace.write_text(line([1, 2, 3], input_length=1_025) + line([1, 2], input_length=1_024))
    assert [len(blocks) for blocks in read_traces([trace], whole_blocks=True)] == [2, 2]


def test_an_id_below_another_parent_is_another_block() -> None:
    numbers = BlockNumbers()
    assert list(numbers.number([1, 3])) == [0, 1]
    assert list(numbers.number([2, 3])) == [2, 3]
    assert list(numbers.number([3, 3])) == [4, 5]


def test_ids_may_be_texts_and_wider_than_the_index_keeps(trace: Path) -> None:
    trace.write_text(line(["a", 1 << 80]))
    assert [list(blocks) for blocks in read_traces([trace])] == [[0, 1]]


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("{", "not JSON"),
        ("[1]\n", '"hash_ids"'),
        ('{"input_length": 3}\n', '"hash_ids"'),
        ('{"hash_ids": [1.5]}\n', '"hash_ids"'),
        ('{"hash_ids": [true]}\n', '"hash_ids"'),
        ('{"hash_ids": [1], "input_length": "3"}\n', '"input_length"'),
    ],
)
def test_a_bad_line_is_named_with_its_number(trace: Path, bad: str, said: str) -> None:
    trace.write_text(line([0]) + bad)
    with pytest.raises(InputError, match=rf"trace\.jsonl:2: .*{said}"):
        read_traces([trace])


@pytest.mark.parametrize("content", [b"\x1f\x8b\x08\x00trunc", b"no gzip at all"])
def test_a_file_that_cannot_be_unpacked_is_named(tmp_path: Path, content: bytes) -> None:
    packed = tmp_path / "trace.jsonl.gz"
    packed.write_bytes(content)
    with pytest.raises(InputError, match=r"trace\.jsonl\.gz: cannot be read"):
        read_traces([packed])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.jsonl: cannot be read .*No such file"):
        read_traces([tmp_path / "absent.jsonl"])


def test_a_synthetic_trace_is_the_same_for_the_same_seed() -> None:
    assert synthetic_trace(50, seed=1) == synthetic_trace(50, seed=1) != synthetic_trace(50, seed=2)
