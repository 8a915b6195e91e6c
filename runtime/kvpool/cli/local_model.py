"""Loads a language model and its tokenizer from this machine, for commands that run one. Nothing is downloaded."""

from typing import Any, NamedTuple

from kvpool.cli.prompts import Prompt
from kvpool.errors import ConfigError, InputError


class LocalModel(NamedTuple):
    """A `transformers` model with its tokenizer, and its name in the pool; None: as it calls itself."""

    model: Any
    tokenizer: Any
    name: str | None

    @property
    def most_tokens(self) -> int | None:
        """How many positions the model has, where it says so."""
        found = getattr(self.model.config, "max_position_embeddings", None)
        return int(found) if isinstance(found, int) and found > 0 else None

    def tokens(self, prompt: Prompt) -> list[int]:
        """A prompt's token ids, messages in the model's chat format. Raises `InputError` naming the prompt's place."""
        if prompt.text is not None:
            return list(self.tokenizer(prompt.text)["input_ids"])
        from jinja2 import TemplateError

        try:
            made = self.tokenizer.apply_chat_template([dict(one) for one in prompt.messages], return_dict=True)
        except (TemplateError, ValueError) as error:  # also where the tokenizer has no template
            raise InputError(f"{prompt.place}: the model's chat template cannot say this: {error}") from None
        return list(made["input_ids"])


def load_model(asked: str | None, name: str | None) -> LocalModel:
    """The model in a directory, or of a name that transformers has at hand; None: SmolLM2. On a GPU where there is one.

    Raises `ConfigError`, and `ModelMissingError` where SmolLM2 is not installed.
    """
    try:
        import torch

        loaded = _loaded(asked, name)
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error.name} is not installed: pip install 'kvpool[transformers]'") from None
    if torch.cuda.is_available():
        loaded.model.to("cuda")
    return loaded


def _loaded(asked: str | None, name: str | None) -> LocalModel:
    from kvpool.demo import smollm2

    if asked in (None, smollm2.NAME):
        return LocalModel(*smollm2.load_smollm2(), name or smollm2.NAME)
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    messages: Any = logging
    messages.disable_progress_bar()
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(asked, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(asked, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"--model {asked} cannot be loaded from this machine: {reason}") from None
    return LocalModel(model.eval(), tokenizer, name)
