"""`kvpool warm`: prompts are read, run through a model, and found again by whoever opens the pool next."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from kvpool import Pool
from kvpool.cli.exits import ExitCode
from kvpool.cli.prompts import parse_prompts, read_prompts
from kvpool.cli.warming import Asked, warm
from kvpool.errors import ConfigError, InputError
from tests.cli.command import kvpool, started

BLOCK = 8
WORDS = ["the", "bike", "shop", "in", "utrecht", "is", "open", "on", "monday", "and", "closed", "sunday"]
VOCABULARY = ["<unk>", *WORDS]
LONG = " ".join(WORDS * 3)
"""36 tokens: four whole blocks and a half."""
POOL = f"""\
apiVersion: kvpool.dev/v1alpha1
kind: KVCachePool
metadata: {{name: warming}}
spec:
  blockTokens: {BLOCK}
  tiers:
    ram: {{capacity: 64Mi, indexBytes: 16Mi}}
    ssd: {{capacity: 64Mi}}
"""


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with random weights, and a tokenizer that knows a few words and a chat format."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from tests.adapters.tiny import llama

    directory = tmp_path_factory.mktemp("models") / "tiny-llama"
    vocabulary = {word: number for number, word in enumerate(VOCABULARY)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token=VOCABULARY[0]))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    fast: Any = PreTrainedTokenizerFast
    tokenizer = fast(tokenizer_object=made, unk_token=VOCABULARY[0])
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
        "{{ m.content + ' ' }}{% endfor %}"
    )
    llama().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def pool_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "pool.yaml"
    path.write_text(POOL)
    return path


class Warming:
    """Calls of the command in this process, on one pool."""

    def __init__(self, pool_file: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.pool_file = pool_file
        self.directory = pool_file.parent / "pool"
        self._model = model
        self._capsys = capsys
        self.complaints = ""

    def __call__(self, *lines: dict[str, Any] | str, **options: Any) -> list[dict[str, Any]]:
        """Warm these prompts; what was printed."""
        prompts = self.pool_file.parent / "prompts"
        prompts.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
        settings: dict[str, Any] = {
            "directory": self.directory, "model": str(self._model), "name": None, "tenant": "default",
            "shared": False, "max_tokens": None, **options,
        }  # fmt: skip
        try:
            warm(Asked(pool=self.pool_file, prompts=str(prompts), **settings), as_json=True)
        finally:
            captured = self._capsys.readouterr()
            self.complaints = captured.err
        return [json.loads(line) for line in captured.out.splitlines()]

    def opened(self) -> Pool:
        return Pool.open(self.pool_file, directory=self.directory)


@pytest.fixture
def warming(pool_file: Path, model_directory: Path, capsys: pytest.CaptureFixture[str]) -> Warming:
    return Warming(pool_file, model_directory, capsys)


def test_every_whole_block_is_found_by_the_next_process_even_past_a_second_hit_filter(warming: Warming) -> None:
    first, summary = warming({"prompt": LONG})
    assert (first["tokens"], first["already_tokens"], first["stored_tokens"]) == (36, 0, 4 * BLOCK)
    assert (summary["prompts"], summary["done"], summary["stored_tokens"]) == (1, 1, 4 * BLOCK)
    with warming.opened() as pool:
        assert pool.stats().tiers["ssd"].blocks == 4  # type: ignore[index]
        assert pool.model("tiny-llama").match(_ids(LONG)).blocks == 4


def test_what_is_there_is_not_computed_again(warming: Warming) -> None:
    warming({"prompt": LONG})
    again, longer, summary = warming({"prompt": LONG}, {"prompt": LONG + " " + LONG})
    assert (again["already_tokens"], again["stored_tokens"]) == (4 * BLOCK, 0)
    assert (longer["already_tokens"], longer["stored_tokens"]) == (4 * BLOCK, 5 * BLOCK)
    assert summary["already_tokens"] == 8 * BLOCK


def test_messages_go_through_the_chat_template_and_each_tenant_has_its_own(warming: Warming) -> None:
    messages = [{"role": "system", "content": LONG}, {"role": "user", "content": "is the shop open"}]
    first, _ = warming({"messages": messages}, tenant="acme", name="served-as")
    assert (first["tokens"], first["stored_tokens"]) == (40, 5 * BLOCK)
    with warming.opened() as pool:
        model = pool.model("served-as")
        assert model.match(_ids(LONG + " is the shop open"), tenant="acme").blocks == 5
        assert model.match(_ids(LONG), tenant="globex").blocks == 0


def test_shared_declares_the_prompts_and_that_outlives_the_command(warming: Warming) -> None:
    first, _ = warming({"prompt": LONG}, shared=True)
    assert first["shared_tokens"] == 4 * BLOCK
    with warming.opened() as pool:
        (shared,) = pool.shared_prefixes()
        assert shared.tokens == 4 * BLOCK


def test_declaring_where_nothing_is_protected_is_said(warming: Warming) -> None:
    warming.pool_file.write_text(POOL + "  sharing: {enabled: false}\n")
    warming({"prompt": LONG}, shared=True)
    assert "nothing is protected" in warming.complaints
    warming.pool_file.write_text(POOL + "  sharing: {maxSharedBytes: 4Ki}\n")
    warming({"prompt": LONG}, shared=True)
    assert "above sharing.maxSharedBytes" in warming.complaints


def test_prompts_are_cut_where_that_is_asked_for_or_the_model_ends(warming: Warming) -> None:
    asked, _ = warming({"prompt": LONG}, max_tokens=20)
    assert (asked["tokens"], asked["cut_tokens"], asked["stored_tokens"]) == (20, 16, 2 * BLOCK)
    fits, _ = warming({"prompt": " ".join([LONG] * 20)})
    assert (fits["tokens"], fits["cut_tokens"]) == (512, 20 * 36 - 512)


def test_a_prompt_shorter_than_a_block_stores_nothing(warming: Warming) -> None:
    first, _ = warming({"prompt": "the bike"})
    assert (first["tokens"], first["already_tokens"], first["stored_tokens"]) == (2, 0, 0)


def test_what_the_template_refuses_is_named_by_its_line(warming: Warming) -> None:
    with pytest.raises(InputError, match=r"prompts:2: .*no tools"):
        warming({"prompt": LONG}, {"messages": [{"role": "tool", "content": "x"}]})


def test_a_pool_without_ssd_is_refused(warming: Warming) -> None:
    warming.pool_file.write_text(POOL.replace("    ssd: {capacity: 64Mi}\n", ""))
    with pytest.raises(ConfigError, match="has no tiers"):
        warming({"prompt": LONG})


def test_a_model_that_is_not_here_is_named(warming: Warming, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="absent cannot be loaded"):
        warming({"prompt": LONG}, model=str(tmp_path / "absent"))


def test_ctrl_c_ends_it_and_keeps_what_was_stored(pool_file: Path, model_directory: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "many.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{LONG} {LONG} " * (at % 6 + 1)}) + "\n" for at in range(500)))
    directory = tmp_path / "pool"
    running = started("warm", pool_file, prompts, "--model", model_directory, "--directory", directory, "--json")
    assert running.stdout is not None
    first = json.loads(running.stdout.readline())
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert running.returncode == ExitCode.INTERRUPTED
    assert "Traceback" not in err
    summary = json.loads(out.splitlines()[-1])
    assert 1 <= summary["done"] < 500
    with Pool.open(pool_file, directory=directory) as pool:
        assert pool.model("tiny-llama").match(_ids(LONG)).blocks * BLOCK >= min(first["stored_tokens"], 4 * BLOCK)


def test_a_pool_that_is_open_elsewhere_is_named_with_its_process(pool_file: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("hello\n")
    with Pool.open(pool_file, directory=tmp_path / "pool"):
        ended = kvpool("warm", pool_file, prompts, "--directory", tmp_path / "pool")
    assert ended.code == ExitCode.IN_USE
    assert "process " in ended.complaint


def test_plain_text_is_paragraphs_or_else_lines() -> None:
    assert [(one.place, one.text) for one in parse_prompts("f", "\none\ntwo\n\n\nthree\n")] == [
        ("f:2", "one\ntwo"), ("f:6", "three"),
    ]  # fmt: skip
    assert [(one.place, one.text) for one in parse_prompts("f", "\none\ntwo\n")] == [("f:2", "one"), ("f:3", "two")]
    assert parse_prompts("f", " \n\n") == []


def test_json_lines_are_a_prompt_or_messages_and_other_keys_are_passed_over() -> None:
    text = '{"prompt": "a", "id": 3}\n\n{"messages": [{"role": "user", "content": "b", "name": "x"}]}\n'
    first, second = parse_prompts("f", text)
    assert (first.place, first.text, first.messages) == ("f:1", "a", ())
    assert (second.place, second.text, second.messages) == ("f:3", None, ({"role": "user", "content": "b"},))


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("hello", "is no JSON"),
        ("[1]", "is no JSON object"),
        ('{"text": "a"}', "neither prompt nor messages"),
        ('{"prompt": "a", "messages": []}', "both prompt and messages"),
        ('{"prompt": 3}', "must be a text"),
        ('{"prompt": ""}', "must be a text"),
        ('{"messages": []}', "at least one message"),
        ('{"messages": [{"role": "user"}]}', "messages[0] must be"),
        ('{"messages": [3]}', "messages[0] must be"),
    ],
)
def test_a_wrong_line_is_named_with_what_is_wrong(line: str, says: str) -> None:
    with pytest.raises(InputError) as raised:
        parse_prompts("prompts.jsonl", f'{{"prompt": "a"}}\n{line}\n{{"prompt": 4}}\n')
    first, second = str(raised.value).splitlines()
    assert first.startswith("prompts.jsonl:2")
    assert says in first
    assert second.startswith("prompts.jsonl:3")


def test_a_file_that_is_not_there_or_has_no_prompts_is_named(tmp_path: Path) -> None:
    empty, binary = tmp_path / "empty", tmp_path / "binary"
    empty.write_text("\n")
    binary.write_bytes(b"\xff\xfe")
    for path, says in ((tmp_path / "absent", "No such file"), (empty, "has no prompts"), (binary, "not UTF-8")):
        with pytest.raises(InputError, match=says):
            read_prompts(str(path))


def _ids(text: str) -> list[int]:
    return [VOCABULARY.index(word) for word in text.split()]
