"""`kvpool bench codecs` has a row for each codec, dtype and figure. What it measures is never looked at."""

from __future__ import annotations

from pathlib import Path

from kvpool.bench.area import benchmarks_of
from tests.cli.command import kvpool


def test_every_codec_has_size_speed_and_error_for_each_dtype_that_it_is_for(tmp_path: Path) -> None:
    ended = kvpool("bench", "codecs", "--quick", "--directory", tmp_path, "--json")
    assert ended.code == 0
    names = [row["name"] for row in ended.objects if row["value"] is not None]
    figures = ["ratio", "encode", "decode"]
    figures += [f"error.{data}.{plane}" for data in ("normal", "outliers") for plane in ("keys", "values")]
    wanted = [f"fp16.float32.{figure}" for figure in figures]
    for codec in ("int8-symmetric", "int8-asymmetric", "int4-asymmetric"):
        wanted += [f"{codec}.{dtype}.{figure}" for dtype in ("float32", "float16", "bfloat16") for figure in figures]
    assert names[: len(wanted)] == wanted
    assert {name.split(".")[0] for name in names[len(wanted) :]} == {"granularity"}


def test_each_says_what_it_is_for() -> None:
    assert all(benchmark.about for benchmark in benchmarks_of("codecs"))
