"""Batches padded on the left: each row is matched by itself, and none gets another's blocks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpool.adapters.transformers import TransformersCache
from kvpool.errors import InputError
from tests.adapters.tiny import (
    BLOCK,
    FAMILIES,
    attached,
    continued,
    greedy,
    kept_in_memory,
    llama,
    opened,
    padded,
    plain_cache,
    prompt,
    same,
)


def unpadded(model: Any, ids: torch.Tensor, tokens: int) -> list[int]:
    return greedy(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, tokens).sequences[0].tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_batch_from_the_pool_is_the_batch_from_the_cache_in_memory(family: str, tmp_path: Path) -> None:
    model = FAMILIES[family](torch.float32)
    batch = padded(prompt(5 * BLOCK + 2, seed=1), prompt(3 * BLOCK + 5, seed=2), prompt(4 * BLOCK, seed=3))
    with opened(tmp_path) as pool:
        cache = attached(pool, model, tmp_path)
        with cache.session(**batch) as session:
            session.store(greedy(model, session.inputs))
            memory = kept_in_memory(session)
        with cache.session(**batch) as session:
            assert session.loaded_tokens == (4 * BLOCK + 5, 3 * BLOCK, 3 * BLOCK + 3)
            output = greedy(model, session.inputs)
            columns = session.loaded_columns
    assert same(output, greedy(model, continued(model, dict(batch), plain_cache(model, memory, columns))))


def test_blocks_stored_from_a_padded_batch_serve_the_prompt_alone_and_the_other_way_round(tmp_path: Path) -> None:
    model, rows = llama(), [prompt(5 * BLOCK + 2, seed=1), prompt(3 * BLOCK + 5, seed=2)]
    with opened(tmp_path) as pool:
        cache = attached(pool, model, tmp_path)
        cache.generate(**padded(*rows), max_new_tokens=6, min_new_tokens=6, do_sample=False)
        for row in rows:
            with cache.session(row) as session:
                assert session.loaded_columns == row.shape[1] // BLOCK * BLOCK
                assert greedy(model, session.inputs).sequences[0].tolist() == unpadded(model, row, 12)
        cache = attached(pool, model, tmp_path, generation=b"empty")
        for row in rows:
            cache.generate(row, max_new_tokens=6, min_new_tokens=6, do_sample=False)
        with cache.session(**padded(*rows)) as session:
            assert session.loaded_tokens == (4 * BLOCK + 5, 3 * BLOCK)
            output = greedy(model, session.inputs).sequences
        assert output[0].tolist() == unpadded(model, rows[0], 12)
        assert output[1, 2 * BLOCK - 3 :].tolist() == unpadded(model, rows[1], 12)


def test_the_columns_before_a_row_s_tokens_are_zero(tmp_path: Path) -> None:
    batch = padded(prompt(4 * BLOCK, seed=1), prompt(2 * BLOCK, seed=2))
    with opened(tmp_path) as pool:
        cache = attached(pool, llama(), tmp_path)
        cache.generate(**batch, max_new_tokens=2)
        with cache.session(**batch) as session:
            for layer in session.past_key_values.layers:
                assert not layer.keys[1, :, : 2 * BLOCK].any()
                assert not layer.values[1, :, : 2 * BLOCK].any()


def test_a_row_that_begins_after_what_is_loaded_takes_no_part(tmp_path: Path) -> None:
    model, long, short = llama(), prompt(4 * BLOCK, seed=1), prompt(BLOCK, seed=2)
    with opened(tmp_path) as pool:
        cache = attached(pool, model, tmp_path)
        cache.generate(long[:, : 2 * BLOCK], max_new_tokens=2)
        with cache.session(**padded(long, short)) as session:
            assert session.loaded_tokens == (2 * BLOCK, 0)
            output = greedy(model, session.inputs).sequences
    assert output[1, 3 * BLOCK :].tolist() == unpadded(model, short, 12)


def test_a_row_that_ended_early_is_stored_without_what_pads_it(tmp_path: Path) -> None:
    model, rows = llama(), [prompt(2 * BLOCK, seed=1), prompt(2 * BLOCK, seed=2)]
    with opened(tmp_path) as pool:
        cache = attached(pool, model, tmp_path)
        alone = [unpadded(model, row, 4 * BLOCK)[2 * BLOCK :] for row in rows]
        end = next(token for token in alone[0] if token not in alone[1])
        model.generation_config.eos_token_id = end
        output = cache.generate(**padded(*rows), max_new_tokens=4 * BLOCK, do_sample=False)
        ended, going_on = (row.tolist() for row in output)
        kept = 2 * BLOCK + alone[0].index(end) + 1
        assert ended[kept:] == [0] * (6 * BLOCK - kept)
        with cache.blocks.match(ended) as lease:
            assert lease.tokens == kept // BLOCK * BLOCK
        with cache.blocks.match(going_on) as lease:
            assert lease.tokens == 5 * BLOCK


def test_each_row_has_a_tenant_of_its_own(tmp_path: Path) -> None:
    rows = [prompt(2 * BLOCK + 1, seed=1), prompt(2 * BLOCK + 1, seed=2)]
    with opened(tmp_path) as pool:
        cache = attached(pool, llama(), tmp_path)
        cache.generate(**padded(*rows), tenant=["acme", "globex"], max_new_tokens=2)
        held = {
            (row, tenant): cache.blocks.match(rows[row][0].numpy(), tenant=tenant).tokens
            for row in (0, 1)
            for tenant in ("acme", "globex")
        }
        assert held == {(0, "acme"): 2 * BLOCK, (0, "globex"): 0, (1, "acme"): 0, (1, "globex"): 2 * BLOCK}
        with pytest.raises(InputError, match="3 names for 2 rows"):
            cache.session(**padded(*rows), tenant=["a", "b", "c"])


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("batches")
    with opened(directory) as pool:
        yield attached(pool, llama(), directory)


@settings(max_examples=12, deadline=None)
@given(lengths=st.lists(st.tuples(st.integers(1, 6 * BLOCK), st.integers(0, 2)), min_size=1, max_size=4))
def test_any_batch_says_what_its_rows_say_alone(
    shared_cache: TransformersCache, lengths: list[tuple[int, int]]
) -> None:
    rows = [prompt(6 * BLOCK, seed=seed)[:, :length] for length, seed in lengths]
    output = shared_cache.generate(**padded(*rows), max_new_tokens=5, min_new_tokens=5, do_sample=False)
    width = max(length for length, _ in lengths)
    for row, generated in zip(rows, output, strict=True):
        assert generated[width - row.shape[1] :].tolist() == unpadded(shared_cache.model, row, 5)
