"""The demo finds what it is there to find: a changed block, a changed copy, another answer."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvpool.adapters.transformers import TransformersCache
from kvpool.adapters.transformers.block_copy import CacheSink, CacheSource
from kvpool.blocks.record import Buffer
from kvpool.demo.audit import AuditedPool, Ledger, block_keys
from kvpool.demo.memory import InMemoryBlocks
from kvpool.demo.smollm2 import ChatModel
from kvpool.demo.turn import Player, TurnReport
from kvpool.pool.pool import Pool
from tests.adapters.tiny import BLOCK, MIB, llama, opened, prompt

ANSWER = 6


class Spelling:
    """As much of a tokenizer as the player needs."""

    def decode(self, tokens: list[int], **_: Any) -> str:
        return " ".join(str(token) for token in tokens)


def player(pool: Pool, directory: Path, ledger: Ledger, memory: InMemoryBlocks) -> Player:
    cache = TransformersCache(AuditedPool(pool, ledger), llama(), digest_file=directory / "weights.json")
    return Player(ChatModel(cache.model, Spelling()), cache, ledger, memory, ANSWER)


def play(player: Player, tokens: list[int], turn: int = 1) -> tuple[TurnReport, list[int]]:
    return player.play(1, "acme", 1, turn, "why?", tokens)


def chat(seed: int = 0, blocks: int = 4) -> list[int]:
    return prompt(blocks * BLOCK + 3, seed=seed)[0].tolist()


def test_a_chat_through_the_pool_says_what_memory_and_a_cold_run_say(tmp_path: Path) -> None:
    with opened(tmp_path) as pool:
        ledger, memory = Ledger(), InMemoryBlocks(BLOCK)
        playing = player(pool, tmp_path, ledger, memory)
        report, tokens = play(playing, chat())
        assert (report.loaded_tokens, report.memory_s, report.same_as_memory, report.same_as_cold) == (
            0,
            None,
            True,
            True,
        )
        report, _ = play(playing, tokens + chat(seed=1, blocks=1), turn=2)
        assert report.served_tokens == {"ram": len(tokens) // BLOCK * BLOCK}
        assert report.same_as_memory
        assert (ledger.checked, ledger.wrong, playing.mismatched_copies) == (len(tokens) // BLOCK, [], [])


def test_a_second_process_checks_against_what_the_first_one_stored(tmp_path: Path) -> None:
    ledger, memory = Ledger(), InMemoryBlocks(BLOCK)
    with opened(tmp_path, ssd=64 * MIB) as pool:
        _, tokens = play(player(pool, tmp_path, ledger, memory), chat())
    memory.save(tmp_path / "memory")
    again, kept = Ledger(ledger.hashes), InMemoryBlocks.load(tmp_path / "memory", BLOCK)
    with opened(tmp_path, ssd=64 * MIB) as pool:
        report, _ = play(player(pool, tmp_path, again, kept), [*tokens, 7])
    assert report.served_tokens == {"ssd": len(tokens) // BLOCK * BLOCK}
    assert report.same_as_memory
    assert (again.checked, again.wrong) == (len(tokens) // BLOCK, [])


def test_a_block_that_comes_back_changed_is_found(tmp_path: Path) -> None:
    with opened(tmp_path) as pool:
        ledger = Ledger()
        playing = player(pool, tmp_path, ledger, InMemoryBlocks(BLOCK))
        _, tokens = play(playing, chat())
        third = list(block_keys("acme", np.array(tokens, np.int32).tobytes(), 4 * BLOCK))[2]
        ledger.hashes[third] = ledger.hashes[third][::-1]
        play(playing, [*tokens, 7], turn=2)
        assert ledger.wrong == [third]


def test_a_block_that_was_never_stored_is_found(tmp_path: Path) -> None:
    with opened(tmp_path) as pool:
        _, tokens = play(player(pool, tmp_path, Ledger(), InMemoryBlocks(BLOCK)), chat())
        ledger = Ledger()
        with TransformersCache(AuditedPool(pool, ledger), llama(), digest_file=tmp_path / "weights.json").session(
            torch.tensor([tokens]), tenant="acme"
        ):
            assert len(ledger.wrong) == ledger.checked == len(tokens) // BLOCK


def test_a_copy_into_the_pool_that_is_not_what_the_model_has_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = CacheSource.read_block

    def careless(source: CacheSource, index: int, into: Buffer) -> None:
        read(source, index, into)
        if index == 1:
            into[5] ^= 1

    monkeypatch.setattr(CacheSource, "read_block", careless)
    with opened(tmp_path) as pool:
        playing = player(pool, tmp_path, Ledger(), InMemoryBlocks(BLOCK))
        play(playing, chat())
        assert len(playing.mismatched_copies) == 1


def test_an_answer_from_wrong_keys_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = CacheSink.write_block

    def careless(sink: CacheSink, index: int, payload: Buffer) -> None:
        write(sink, 0, payload)

    with opened(tmp_path) as pool:
        playing = player(pool, tmp_path, Ledger(), InMemoryBlocks(BLOCK))
        _, tokens = play(playing, chat())
        monkeypatch.setattr(CacheSink, "write_block", careless)
        report, _ = play(playing, [*tokens, 7], turn=2)
        monkeypatch.setattr(CacheSink, "write_block", write)
        assert not report.same_as_memory


def test_the_tiers_tokens_add_up_to_what_was_loaded(tmp_path: Path) -> None:
    with opened(tmp_path) as pool:
        playing = player(pool, tmp_path, Ledger(), InMemoryBlocks(BLOCK))
        whole = chat()[: 4 * BLOCK]
        play(playing, whole)
        report, _ = play(playing, whole)
        assert report.served_tokens == {"ram": 4 * BLOCK - 1}
        assert replace(report, served_tokens={}).loaded_tokens == 0
