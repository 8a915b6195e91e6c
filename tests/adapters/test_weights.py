"""The digest stands for the whole content of the weights that are in memory, and is computed once per file."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvpool.adapters.transformers.weights import DigestFile, weight_files, weights_digest
from kvpool.errors import InputError
from tests.adapters.tiny import llama


def saved(directory: Path, *, shard_bytes: str = "1GB") -> Path:
    llama().save_pretrained(directory / "model", max_shard_size=shard_bytes)
    return directory / "model"


def loaded(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path)


def digest(model: Any, directory: Path) -> str:
    return weights_digest(model, directory / "weights.json")


def remembered(directory: Path) -> dict[str, str]:
    return json.loads((directory / "weights.json").read_bytes())  # type: ignore[no-any-return]


def test_one_bit_of_one_weight_makes_another_digest(tmp_path: Path) -> None:
    model = llama()
    before = digest(model, tmp_path)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.view(torch.int32)[3, 5] ^= 1
    assert digest(model, tmp_path) != before


def test_a_model_from_files_is_known_by_their_content_wherever_they_lie(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    one, other = loaded(saved(tmp_path)), loaded(saved(tmp_path / "elsewhere"))
    assert digest(one, tmp_path) == digest(other, tmp_path)
    assert len(remembered(tmp_path)) == 2


def test_every_shard_counts(tmp_path: Path) -> None:
    path = saved(tmp_path, shard_bytes="100KB")
    model = loaded(path)
    shards = weight_files(model)
    assert len(shards) > 1
    before = digest(model, tmp_path)
    content = bytearray(shards[-1].read_bytes())
    content[-1] ^= 1
    shards[-1].write_bytes(content)
    assert digest(loaded(path), tmp_path) != before


def test_a_file_is_hashed_once(tmp_path: Path) -> None:
    model = loaded(saved(tmp_path))
    before = digest(model, tmp_path)
    (key,) = remembered(tmp_path)
    (tmp_path / "weights.json").write_text(json.dumps({key: "known"}))
    assert digest(model, tmp_path) != before  # what is remembered was believed


def test_a_file_that_was_written_again_is_hashed_again(tmp_path: Path) -> None:
    path = saved(tmp_path)
    file, known = path / "model.safetensors", DigestFile(tmp_path / "weights.json")
    before, times = known.digest(file), file.stat()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # the same size, inode and mtime; ctime gives it away
    assert known.digest(file) != before


def test_a_blob_of_the_hub_is_known_by_its_name(tmp_path: Path) -> None:
    blob = tmp_path / "blobs" / ("ab" * 32)
    blob.parent.mkdir()
    blob.write_bytes(b"weights")
    link = tmp_path / "model.safetensors"
    link.symlink_to(blob)
    assert DigestFile(tmp_path / "weights.json").digest(link) == "ab" * 32


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe"])
def test_a_damaged_digest_file_costs_hashing_again(content: bytes, tmp_path: Path) -> None:
    model = loaded(saved(tmp_path))
    before = digest(model, tmp_path)
    (tmp_path / "weights.json").write_bytes(content)
    assert digest(model, tmp_path) == before
    assert len(remembered(tmp_path)) == 1


def test_a_digest_file_that_cannot_be_written_costs_hashing_again(tmp_path: Path) -> None:
    model = loaded(saved(tmp_path))
    (tmp_path / "file").write_bytes(b"")
    assert weights_digest(model, tmp_path / "file" / "weights.json") == digest(model, tmp_path)


def test_the_digest_file_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvpool.adapters.transformers.weights.MAX_REMEMBERED", 2)
    known = DigestFile(tmp_path / "weights.json")
    for number in range(4):
        (tmp_path / f"{number}.safetensors").write_bytes(b"weights")
        known.digest(tmp_path / f"{number}.safetensors")
    assert [json.loads(key)[0][-13:] for key in remembered(tmp_path)] == ["2.safetensors", "3.safetensors"]


def test_weights_that_were_changed_after_loading_do_not_pass_for_their_files(tmp_path: Path) -> None:
    path = saved(tmp_path)
    model = loaded(path)
    before = digest(model, tmp_path)
    with torch.no_grad():
        model.model.layers[2].self_attn.v_proj.weight += 0.01  # as merging an adapter does
    assert digest(model, tmp_path) != before


def test_files_that_were_replaced_after_loading_do_not_stand_for_what_is_in_memory(tmp_path: Path) -> None:
    path = saved(tmp_path)
    model = loaded(path)
    before = digest(model, tmp_path)
    twice = llama()
    with torch.no_grad():
        twice.model.layers[0].mlp.down_proj.weight *= 2
    twice.save_pretrained(path)
    assert digest(model, tmp_path) != before
    assert digest(loaded(path), tmp_path) not in (before, digest(model, tmp_path))


def test_a_name_that_is_no_directory_here_is_no_error(tmp_path: Path) -> None:
    model = llama()
    model.name_or_path = "/no/such/place/at all"
    assert weight_files(model) == []
    model.name_or_path = "nobody/nothing"
    assert digest(model, tmp_path) == digest(llama(), tmp_path)


def test_weights_that_are_not_in_memory_need_an_id(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="pass weights="):
        digest(llama().to("meta"), tmp_path)
