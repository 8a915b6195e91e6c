"""A chat model for a whole play of the demo: random weights, little to compute, and blocks as large as SmolLM2's."""

import zlib
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvpool.demo.smollm2 import ChatModel

VOCABULARY = 1000
_FIRST_WORD = 10
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 90,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 45,
    "num_key_value_heads": 45,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


class Words:
    """As much of a tokenizer as the demo needs: a token for each word."""

    eos_token_id = 2

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        words = (zlib.crc32(word.encode()) for word in text.split())
        return {"input_ids": [_FIRST_WORD + word % (VOCABULARY - _FIRST_WORD) for word in words]}

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> dict[str, list[int]]:
        return self(" ".join(f"<{message['role']}> {message['content']}" for message in messages))

    def decode(self, tokens: list[int], **_: Any) -> str:
        return " ".join(str(token) for token in tokens)


def load_tiny_chat() -> ChatModel:
    """The same weights each time."""
    torch.manual_seed(7)
    model: Any = LlamaForCausalLM(LlamaConfig(**_SHAPE))
    return ChatModel(model.eval(), Words())
