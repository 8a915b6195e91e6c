"""One turn of a chat, three times: cold, through the pool, and from the same keys and values kept in memory."""

import time
from array import array
from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from kvpool.adapters.transformers import TransformersCache
from kvpool.adapters.transformers.geometry import generate_argument
from kvpool.demo.audit import Ledger, block_keys, payload_hash
from kvpool.demo.memory import InMemoryBlocks
from kvpool.demo.smollm2 import ChatModel


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnReport:
    """What one turn cost. Times are from the request to its first token, in seconds."""

    process: int
    tenant: str
    chat: int
    turn: int
    question: str
    answer: str
    prompt_tokens: int
    served_tokens: dict[str, int]
    """By the tier that they came from."""
    cold_s: float
    pool_s: float
    memory_s: float | None
    """Generating from the cache in memory; None where the pool had nothing, for that is the cold run."""
    same_as_memory: bool
    same_as_cold: bool
    out: tuple[str, ...] = ()
    """Tiers that did not answer at some time during the turn, whoever saw to that."""

    @property
    def loaded_tokens(self) -> int:
        """Tokens of the prompt that were not computed."""
        return sum(self.served_tokens.values())


class FirstToken(BaseStreamer):
    """Notes when the first token is there."""

    def __init__(self) -> None:
        self._calls = 0
        self.at_s = 0.0

    def put(self, value: torch.Tensor) -> None:
        """The prompt comes first, then token by token."""
        self._calls += 1
        if self._calls == 2:
            self.at_s = time.perf_counter()

    def end(self) -> None:
        """Nothing to do."""


class Player:
    """Plays turns on one model and one pool, and compares."""

    def __init__(
        self,
        chat_model: ChatModel,
        cache: TransformersCache,
        ledger: Ledger,
        memory: InMemoryBlocks,
        answer_tokens: int,
    ) -> None:
        self._model = chat_model.model
        self._text = chat_model.text
        self._cache = cache
        self._ledger = ledger
        self._memory = memory
        self._answer_tokens = answer_tokens
        self.mismatched_copies: list[str] = []
        """Blocks that reached the pool's memory other than the model's cache had them."""

    def cold(self, prompt: list[int]) -> tuple[list[int], float]:
        """Answer without any cache from before; the answer's tokens, and the seconds to the first."""
        return self._timed(_inputs(prompt), time.perf_counter())

    def through_pool(self, prompt: list[int], tenant: str) -> tuple[list[int], float, dict[str, int]]:
        """Answer with what the pool holds, and store what is new; also says how many tokens each tier served."""
        began = time.perf_counter()
        with self._cache.session(**_inputs(prompt), tenant=tenant, room_tokens=self._answer_tokens) as session:
            answer, seconds = self._timed(session.inputs, began)
            session.store(torch.tensor([prompt + answer]))
            self._keep(prompt + answer, tenant, session.past_key_values)
            block_tokens, left = self._cache.blocks.layout.block_tokens, session.loaded_columns
            served: dict[str, int] = {}
            for tier, blocks in session.served.items():
                served[tier.value] = min(left, blocks * block_tokens)
                left -= served[tier.value]
            return answer, seconds, served

    def from_memory(self, prompt: list[int], tenant: str, tokens: int) -> tuple[list[int], float]:
        """Answer going on from the first `tokens` tokens' keys and values as they were kept in memory."""
        keys = list(block_keys(tenant, _packed(prompt), self._cache.blocks.layout.token_bytes))
        cache = self._memory.cache(self._model.config, keys, tokens)
        return self._timed({**_inputs(prompt), generate_argument(): cache}, time.perf_counter())

    def play(
        self, process: int, tenant: str, chat: int, turn: int, question: str, prompt: list[int]
    ) -> tuple[TurnReport, list[int]]:
        """Play one turn in all three ways; also returns the chat's tokens, for its next turn."""
        answer, pool_s, served = self.through_pool(prompt, tenant)
        loaded = sum(served.values())
        expected, memory_s = self.from_memory(prompt, tenant, loaded) if loaded else (None, None)
        cold, cold_s = self.cold(prompt)
        report = TurnReport(
            process=process,
            tenant=tenant,
            chat=chat,
            turn=turn,
            question=question,
            answer=self._text(answer),
            prompt_tokens=len(prompt),
            served_tokens=served,
            cold_s=cold_s,
            pool_s=pool_s,
            memory_s=memory_s,
            same_as_memory=answer == (cold if expected is None else expected),
            same_as_cold=answer == cold,
        )
        return report, prompt + answer

    def _timed(self, inputs: dict[str, Any], began: float) -> tuple[list[int], float]:
        first = FirstToken()
        output = self._model.generate(**inputs, max_new_tokens=self._answer_tokens, do_sample=False, streamer=first)
        return output[0, inputs["input_ids"].shape[1] :].tolist(), first.at_s - began

    def _keep(self, tokens: list[int], tenant: str, cache: Any) -> None:
        """Keep in memory what the store has just written, and see that it was written as it was."""
        keys = list(block_keys(tenant, _packed(tokens), self._cache.blocks.layout.token_bytes))
        for index in self._ledger.just_stored:
            self._memory.keep(keys[index], index, cache)
            if payload_hash(self._memory.payload(keys[index])) != self._ledger.hashes[keys[index]]:
                self.mismatched_copies.append(keys[index])


def _inputs(prompt: list[int]) -> dict[str, torch.Tensor]:
    ids = torch.tensor([prompt])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _packed(tokens: list[int]) -> bytes:
    return array("i", tokens).tobytes()
