"""Declared prefixes: how they are declared, and that they are known again after a restart."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from kvpool.blocks.identity import BlockKey, Fingerprint, TenantDigest, TreeId
from kvpool.pool.shared_file import SHARED_NAME, load_shared, packed, unpacked
from kvpool.prefix.sharing import SharedMark
from kvpool.tiers.tier import TierName
from tests.pool.kv import BLOCK_TOKENS, RECORD, check, fill_ram, matched, open_pool, prompt, spec, store

SHARING = {"minPrefixTokens": BLOCK_TOKENS}
MARK = SharedMark(TreeId(Fingerprint(bytes(range(32))), TenantDigest(bytes(16)), 7), 3, BlockKey(b"k" * 16), 11)


def test_declaring_says_how_many_tokens_are_held_and_protects_them(tmp_path: Path) -> None:
    with open_pool(tmp_path, ram=8 * RECORD, sharing=SHARING) as pool:
        model = pool.register(spec())
        store(model, prompt(3))
        assert model.declare_shared(prompt(5, extra_tokens=1)) == 3 * BLOCK_TOKENS
        assert model.declare_shared(prompt(2, seed=1)) == 0
        assert pool.stats().shared_bytes[TierName.RAM] == 3 * RECORD
        assert pool.stats().requests == 0
        for seed in range(900, 910):
            fill_ram(model, 2, seed)
        assert matched(model, prompt(3)) == 3
        check(pool, [])


def test_without_a_declaration_the_same_prompt_is_evicted(tmp_path: Path) -> None:
    with open_pool(tmp_path, ram=8 * RECORD, sharing=SHARING) as pool:
        model = pool.register(spec())
        store(model, prompt(3))
        for seed in range(900, 910):
            fill_ram(model, 2, seed)
        assert matched(model, prompt(3)) == 0


def test_a_declaration_is_the_tenants_own(tmp_path: Path) -> None:
    with open_pool(tmp_path) as pool:
        model = pool.register(spec())
        store(model, prompt(2), "acme")
        assert model.declare_shared(prompt(2), tenant="globex") == 0
        assert model.declare_shared(prompt(2), tenant="acme") == 2 * BLOCK_TOKENS


def test_declared_prefixes_and_their_hits_outlive_a_restart(tmp_path: Path) -> None:
    with open_pool(tmp_path, ssd=400 * RECORD) as pool:
        model = pool.register(spec())
        store(model, prompt(6))
        model.declare_shared(prompt(4))
        for _ in range(3):
            matched(model, prompt(6))
    with open_pool(tmp_path, ssd=400 * RECORD) as pool:
        pool.register(spec())
        assert pool.stats().shared_bytes[TierName.SSD] == 4 * RECORD
        assert [(found.depth, found.hits) for found in pool.shared_prefixes()] == [(4, 3)]


def test_a_damaged_file_is_no_marks_and_no_error(tmp_path: Path) -> None:
    with open_pool(tmp_path, ssd=400 * RECORD) as pool:
        model = pool.register(spec())
        store(model, prompt(2))
        model.declare_shared(prompt(2))
    (tmp_path / SHARED_NAME).write_bytes(b"nonsense")
    assert load_shared(tmp_path) == []
    with open_pool(tmp_path, ssd=400 * RECORD) as pool:
        assert pool.stats().shared_bytes[TierName.SSD] == 0
        assert matched(pool.register(spec()), prompt(2)) == 2


def test_shared_prefixes_are_listed_while_others_store_and_evict(tmp_path: Path) -> None:
    with open_pool(tmp_path, ram=64 * RECORD, sharing=SHARING) as pool, ThreadPoolExecutor(2) as threads:
        model = pool.register(spec())

        def work(first: int) -> None:
            for seed in range(150):
                store(model, prompt(2, seed=first + seed % 7) + prompt(2, seed=first + seed + 50))

        busy = [threads.submit(work, first) for first in (0, 1_000)]
        while not all(one.done() for one in busy):
            assert all(shared.depth and shared.tokens for shared in pool.shared_prefixes(5))
        for one in busy:
            one.result()
        assert pool.shared_prefixes(5)
        check(pool, [])


@pytest.mark.parametrize("mode", ["cut", "flipped"])
@settings(deadline=None)
@given(st.data())
def test_any_damaged_byte_is_noticed(mode: str, data: st.DataObject) -> None:
    whole = packed([MARK, MARK])
    at = data.draw(st.integers(0, len(whole) - 1))
    damaged = whole[:at] if mode == "cut" else whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
    assert unpacked(damaged) is None


def test_the_bytes_of_format_1_stay_as_they_are() -> None:
    assert packed([MARK]).hex() == GOLDEN
    assert unpacked(bytes.fromhex(GOLDEN)) == [MARK]


GOLDEN = (
    "6b76706f6f6c00530100000001000000000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"
    "000000000000000000000000000000006b6b6b6b6b6b6b6b6b6b6b6b6b6b6b6b07000000000000000b00000000000000"
    "03000000a17d5b1a0f2b95fe"
)
