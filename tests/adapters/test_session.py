"""One prompt at a time: what comes from the pool is what was stored, and generation goes on from it bit for bit."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import StaticCache, TextIteratorStreamer
from transformers.generation.streamers import BaseStreamer

from kvpool.adapters.transformers import TransformersCache
from kvpool.adapters.transformers.block_copy import CacheSink
from kvpool.adapters.transformers.geometry import generate_argument
from kvpool.blocks.record import Buffer
from kvpool.errors import InputError, PoolClosedError, UnsupportedModelError
from kvpool.pool.pool import Pool
from kvpool.tiers.tier import TierName
from tests.adapters.tiny import (
    BLOCK,
    FAMILIES,
    MIB,
    attached,
    continued,
    greedy,
    kept_in_memory,
    llama,
    opened,
    plain_cache,
    prompt,
    same,
)


def mask(ids: torch.Tensor) -> dict[str, Any]:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_from_the_pool_is_generation_from_the_cache_in_memory(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model, ids = FAMILIES[family](dtype), prompt(5 * BLOCK + 3)
    with opened(tmp_path) as pool:
        cache = attached(pool, model, tmp_path)
        with cache.session(ids) as session:
            session.store(greedy(model, session.inputs))
            memory = kept_in_memory(session)
        with cache.session(ids) as session:
            output = greedy(model, session.inputs)
            assert session.loaded_columns == 5 * BLOCK
            assert session.served == {TierName.RAM: 5}
    assert same(output, greedy(model, continued(model, mask(ids), plain_cache(model, memory, 5 * BLOCK))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "deepseek"])
def test_blocks_come_back_bytewise_from_ram_and_after_a_restart_from_ssd(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model, ids = FAMILIES[family](dtype), prompt(5 * BLOCK + 3)
    with opened(tmp_path, ssd=64 * MIB) as pool:
        with (cache := attached(pool, model, tmp_path)).session(ids) as session:
            session.store(greedy(model, session.inputs))
            memory = kept_in_memory(session)
        check_loaded(cache, ids, memory, TierName.RAM)
    with opened(tmp_path, ssd=64 * MIB) as pool:
        check_loaded(attached(pool, model, tmp_path), ids, memory, TierName.SSD)


def check_loaded(cache: TransformersCache, ids: torch.Tensor, memory: list[Any], tier: TierName) -> None:
    with cache.session(ids) as session:
        assert session.served == {tier: 5}
        for (keys, values), layer in zip(memory, session.past_key_values.layers, strict=True):
            assert torch.equal(layer.keys.view(torch.uint8), keys[:, :, : 5 * BLOCK].view(torch.uint8))
            assert torch.equal(layer.values.view(torch.uint8), values[:, :, : 5 * BLOCK].view(torch.uint8))


def test_the_last_token_is_computed_even_when_all_are_held(tmp_path: Path) -> None:
    model, ids = llama(), prompt(4 * BLOCK)
    with opened(tmp_path) as pool:
        cache = attached(pool, model, tmp_path)
        with cache.session(ids) as session:
            session.store(greedy(model, session.inputs))
            memory = kept_in_memory(session)
        with cache.session(ids) as session:
            assert session.loaded_columns == 4 * BLOCK - 1
            output = greedy(model, session.inputs)
    assert same(output, greedy(model, continued(model, mask(ids), plain_cache(model, memory, 4 * BLOCK - 1))))


def test_generated_tokens_are_stored_too_but_the_last_which_has_no_keys_yet(tmp_path: Path) -> None:
    model, ids = llama(), prompt(2 * BLOCK)
    with opened(tmp_path) as pool:
        cache = attached(pool, model, tmp_path)
        with cache.session(ids) as session:
            output = greedy(model, session.inputs, tokens=BLOCK)
            assert session.store(output).stored == 2
            assert cache.blocks.match(output.sequences[0].numpy()).tokens == 2 * BLOCK
        with cache.session(ids) as session:
            output = greedy(model, session.inputs, tokens=BLOCK + 1)
            result = session.store(output)
            assert (result.stored, result.already_there) == (1, 2)
        with cache.blocks.match(output.sequences[0].numpy()) as lease:
            assert lease.tokens == 3 * BLOCK


def test_a_chat_goes_on_from_what_its_last_turn_stored(tmp_path: Path) -> None:
    model, chat = llama(), prompt(3 * BLOCK + 5)
    with opened(tmp_path) as pool:
        cache = attached(pool, model, tmp_path)
        memory: list[tuple[torch.Tensor, torch.Tensor]] = []
        held = 0
        for turn in range(4):
            with cache.session(chat, tenant="acme") as session:
                assert session.loaded_columns == held
                output = greedy(model, session.inputs, tokens=10)
                if turn:
                    reference = continued(model, mask(chat), plain_cache(model, memory, held))
                    assert same(output, greedy(model, reference, tokens=10))
                session.store(output)
                memory = kept_in_memory(session)
            held = (output.sequences.shape[1] - 1) // BLOCK * BLOCK
            chat = torch.cat([output.sequences, prompt(7, seed=turn)], dim=1)


def test_a_session_can_go_on_and_store_again(tmp_path: Path) -> None:
    model, ids = llama(), prompt(2 * BLOCK)
    with opened(tmp_path) as pool:
        cache = attached(pool, model, tmp_path)
        with cache.session(ids) as session:
            first = greedy(model, session.inputs, tokens=4).sequences
            session.store(first)
            chat = torch.cat([first, prompt(BLOCK, seed=9)], dim=1)
            second = greedy(model, {**session.inputs, **mask(chat)}, tokens=6)
            session.store(second)
        with cache.blocks.match(second.sequences[0].numpy()) as lease:
            assert lease.tokens == 4 * BLOCK


def test_tenants_do_not_see_each_other_s_blocks(tmp_path: Path) -> None:
    model, ids = llama(), prompt(3 * BLOCK)
    with opened(tmp_path) as pool:
        cache = attached(pool, model, tmp_path)
        cache.generate(ids, tenant="acme", max_new_tokens=2)
        with cache.session(ids, tenant="globex") as session:
            assert session.loaded_columns == 0
        with cache.session(ids, tenant="acme") as session:
            assert session.loaded_columns == 3 * BLOCK - 1


def test_other_weights_do_not_see_each_other_s_blocks(tmp_path: Path) -> None:
    model, ids = llama(), prompt(3 * BLOCK)
    with opened(tmp_path) as pool:
        attached(pool, model, tmp_path).generate(ids, max_new_tokens=2)
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
        with attached(pool, model, tmp_path).session(ids) as session:
            assert session.loaded_columns == 0
        with attached(pool, llama(), tmp_path, generation=b"reset").session(ids) as session:
            assert session.loaded_columns == 0
        with attached(pool, llama(), tmp_path).session(ids) as session:
            assert session.loaded_columns == 3 * BLOCK - 1


def test_a_prompt_shorter_than_a_block_is_computed(tmp_path: Path) -> None:
    model, ids = llama(), prompt(BLOCK - 3)
    with opened(tmp_path) as pool:
        cache = attached(pool, model, tmp_path)
        expected = greedy(model, mask(ids), tokens=2)
        with cache.session(ids) as session:
            assert session.loaded_columns == 0
            output = greedy(model, session.inputs, tokens=2)
            assert session.store(output) == (0, 0, {})
    assert same(output, expected)


def test_an_empty_prompt_loads_and_stores_nothing(tmp_path: Path) -> None:
    with opened(tmp_path) as pool:
        cache = attached(pool, llama(), tmp_path)
        with cache.session(torch.zeros(1, 0, dtype=torch.long)) as session:
            assert session.loaded_columns == 0
            assert session.store() == (0, 0, {})


def test_the_prompt_can_be_stored_without_having_generated(tmp_path: Path) -> None:
    model, ids = llama(), prompt(3 * BLOCK + 1)
    with opened(tmp_path) as pool:
        cache = attached(pool, model, tmp_path)
        with cache.session(ids) as session:
            with torch.no_grad():
                arguments = session.inputs
                model(**arguments)
            assert session.store().stored == 3


def test_the_cache_grows_beyond_its_room(tmp_path: Path) -> None:
    model, ids = llama(), prompt(2 * BLOCK)
    with opened(tmp_path) as pool:
        cache = attached(pool, model, tmp_path)
        with cache.session(ids, room_tokens=0) as session:
            output = greedy(model, session.inputs, tokens=40)
            session.store(output)
        assert same(output, greedy(model, mask(ids), tokens=40))


def test_generation_that_begins_anew_is_refused_before_it_can_answer_wrongly(tmp_path: Path) -> None:
    model, ids = llama(), torch.cat([prompt(20)] * 3, dim=1)
    with opened(tmp_path) as pool:
        cache = attached(pool, model, tmp_path)
        cache.generate(ids, max_new_tokens=2)
        with cache.session(ids) as session, pytest.raises(InputError, match="begin anew"):
            greedy(model, session.inputs, prompt_lookup_num_tokens=4)
        with cache.session(ids) as session, pytest.raises(InputError, match="beams"):
            model.generate(**session.inputs, max_new_tokens=2, num_return_sequences=2, do_sample=True)


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.24"), reason="a prefill in chunks began anew then, and is refused"
)
def test_a_prefill_in_chunks_goes_on_from_what_was_loaded(tmp_path: Path) -> None:
    model, ids = llama(), prompt(4 * BLOCK + 7)
    with opened(tmp_path) as pool:
        cache = attached(pool, model, tmp_path)
        cache.generate(ids[:, : 2 * BLOCK], max_new_tokens=2)
        with cache.session(ids) as session:
            assert session.loaded_columns == 2 * BLOCK
            output = greedy(model, session.inputs, prefill_chunk_size=5)
            session.store(output)
        expected = greedy(model, mask(ids))
    assert torch.equal(output.sequences, expected.sequences)


class Recorder(BaseStreamer):
    """A streamer that keeps what it was given."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_a_streamer_gets_every_token_and_the_end(tmp_path: Path) -> None:
    model, ids = llama(), prompt(3 * BLOCK)
    with opened(tmp_path) as pool:
        cache = attached(pool, model, tmp_path)
        for _ in range(2):  # once computed, once loaded
            streamer = Recorder()
            output = cache.generate(ids, streamer=streamer, max_new_tokens=6, do_sample=False)
            assert streamer.tokens == output[0].tolist()
            assert streamer.ended


class Spelling:
    """As much of a tokenizer as a text streamer needs: a token is a letter."""

    def decode(self, tokens: list[int], **_: Any) -> str:
        return "".join(chr(ord("a") + token % 26) for token in tokens)


def test_text_streams_out_while_another_thread_generates(tmp_path: Path) -> None:
    model, ids = llama(), prompt(3 * BLOCK)
    with opened(tmp_path) as pool:
        cache = attached(pool, model, tmp_path)
        expected = cache.generate(ids, max_new_tokens=9, min_new_tokens=9, do_sample=False)[0, ids.shape[1] :].tolist()
        streamer = TextIteratorStreamer(Spelling(), skip_prompt=True, timeout=60)  # type: ignore[arg-type]
        options = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False, "streamer": streamer}
        thread = threading.Thread(target=cache.generate, args=(ids,), kwargs=options)
        thread.start()
        assert "".join(streamer) == Spelling().decode(expected)
        thread.join()


def test_a_prefill_is_measured_and_a_short_one_is_not(tmp_path: Path) -> None:
    model, ids = llama(), prompt(6 * BLOCK)
    with opened(tmp_path) as pool:
        cache = attached(pool, model, tmp_path)
        assert pool.models()[0].prefill_tokens_per_second is None
        cache.generate(ids[:, : BLOCK - 1], max_new_tokens=2)
        assert pool.models()[0].prefill_tokens_per_second is None
        cache.generate(ids, max_new_tokens=2)
        assert pool.models()[0].prefill_tokens_per_second is not None


class OutOfMemoryError(Exception):
    """What a device raises when a copy does not fit."""


def test_a_sink_that_raises_leaves_no_lease_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = llama(), prompt(6 * BLOCK)
    with opened(tmp_path) as pool:
        cache = attached(pool, model, tmp_path)
        cache.generate(ids, max_new_tokens=2)
        write = CacheSink.write_block

        def write_three(sink: CacheSink, index: int, payload: Buffer) -> None:
            if index == 3:
                raise OutOfMemoryError
            write(sink, index, payload)

        monkeypatch.setattr(CacheSink, "write_block", write_three)
        with pytest.raises(OutOfMemoryError):
            cache.session(ids)
        monkeypatch.setattr(CacheSink, "write_block", write)
        assert pool.erase(tenant="default").leased_blocks == 0


def test_a_model_that_raises_stores_nothing_and_leaves_no_lease_behind(tmp_path: Path) -> None:
    model, ids = llama(), prompt(6 * BLOCK)

    class Broken(BaseStreamer):
        def put(self, value: torch.Tensor) -> None:
            raise OutOfMemoryError

        def end(self) -> None:
            raise AssertionError

    with opened(tmp_path) as pool:
        cache = attached(pool, model, tmp_path)
        with pytest.raises(OutOfMemoryError):
            cache.generate(ids, streamer=Broken(), max_new_tokens=2)
        assert pool.stats().stored_blocks == 0
        assert pool.erase(tenant="default").leased_blocks == 0


def test_a_load_that_arrives_short_leaves_the_rest_to_the_model(tmp_path: Path) -> None:
    model, ids = llama(), prompt(6 * BLOCK + 2)
    with opened(tmp_path, ssd=64 * MIB) as pool:
        cache = attached(pool, model, tmp_path)
        with cache.session(ids) as session:
            session.store(greedy(model, session.inputs))
            memory = kept_in_memory(session)
    damage(tmp_path, memory, block=4)
    with opened(tmp_path, ssd=64 * MIB) as pool:
        cache = attached(pool, model, tmp_path)
        with cache.session(ids) as session:
            assert session.loaded_columns == 4 * BLOCK
            output = greedy(model, session.inputs)
            assert session.store(output).stored > 0
    assert same(output, greedy(model, continued(model, mask(ids), plain_cache(model, memory, 4 * BLOCK))))


def damage(directory: Path, memory: list[Any], block: int) -> None:
    """Flip a bit of the block's payload, wherever in the pool's files it lies."""
    keys = memory[0][0][0, 0, block * BLOCK : (block + 1) * BLOCK].contiguous().view(torch.uint8).numpy().tobytes()
    for file in (directory / "pool").rglob("*"):
        content = bytearray(file.read_bytes()) if file.is_file() else bytearray()
        if (at := content.find(keys)) >= 0:
            content[at] ^= 1
            file.write_bytes(content)
            return
    raise AssertionError("the block is in no file")


def test_a_pool_that_is_closed_while_generating_does_not_cost_the_answer(tmp_path: Path) -> None:
    model, ids = llama(), prompt(3 * BLOCK)

    class Closing(Recorder):
        def end(self) -> None:
            pool.close()

    pool = opened(tmp_path)
    cache = attached(pool, model, tmp_path)
    output = cache.generate(ids, streamer=Closing(), max_new_tokens=3)
    assert output.shape[1] == ids.shape[1] + 3
    with pytest.raises(PoolClosedError):
        cache.session(ids)


def test_a_closed_session_has_no_cache(tmp_path: Path) -> None:
    with opened(tmp_path) as pool:
        with attached(pool, llama(), tmp_path).session(prompt(4)) as session:
            pass
        with pytest.raises(PoolClosedError, match="session was closed"):
            _ = session.inputs


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_beams": 2}, "beam_search"),
        ({"prompt_lookup_num_tokens": 3}, "assisted_generation"),
        ({"custom_generate": "nobody/nothing"}, "custom_generate"),
        ({"num_return_sequences": 2, "do_sample": True}, "num_return_sequences"),
        ({"use_cache": False}, "use_cache"),
        ({"cache_implementation": "static"}, "cache_implementation"),
        ({"past_key_values": object()}, "past_key_values"),
        ({"position_ids": torch.zeros(1, 4)}, "position_ids"),
        ({"inputs_embeds": torch.zeros(1, 4, 64)}, "inputs_embeds"),
        ({"pixel_values": torch.zeros(1, 3, 4, 4)}, "pixel_values"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options_whose_keys_could_not_be_kept_are_refused(options: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with opened(tmp_path) as pool:
        cache = attached(pool, llama(), tmp_path)
        with pytest.raises(InputError, match=reason):
            cache.generate(prompt(4), **options)


def test_a_model_whose_generation_uses_another_cache_is_refused(tmp_path: Path) -> None:
    model = llama()
    with opened(tmp_path) as pool:
        cache = attached(pool, model, tmp_path)
        model.generation_config.cache_implementation = "quantized"
        with pytest.raises(UnsupportedModelError, match="quantized"):
            cache.session(prompt(4))


def test_a_cache_of_another_kind_is_never_stored(tmp_path: Path) -> None:
    model, ids = llama(), prompt(2 * BLOCK)
    with opened(tmp_path) as pool:
        with attached(pool, model, tmp_path).session(ids) as session:
            static = StaticCache(config=model.config, max_cache_len=32)
            with torch.no_grad():
                model(ids, use_cache=True, **{generate_argument(): static})
            session.past_key_values.layers = static.layers
            with pytest.raises(InputError):
                session.store()
        assert pool.stats().stored_blocks == 0


def test_what_another_prompt_generated_is_refused(tmp_path: Path) -> None:
    model = llama()
    with opened(tmp_path) as pool, attached(pool, model, tmp_path).session(prompt(2 * BLOCK)) as session:
        other = greedy(model, mask(prompt(2 * BLOCK, seed=1)))
        greedy(model, session.inputs)
        with pytest.raises(InputError, match="does not begin with"):
            session.store(other)
        with pytest.raises(InputError, match="used for another prompt"):
            session.store(prompt(2 * BLOCK))
        with pytest.raises(InputError, match="token ids as a tensor"):
            session.store([1, 2])


def test_a_model_in_training_mode_gets_no_session(tmp_path: Path) -> None:
    model = llama()
    with opened(tmp_path) as pool:
        cache = attached(pool, model, tmp_path)
        model.train()
        with pytest.raises(InputError, match=r"model\.eval\(\)"):
            cache.session(prompt(4))


def test_many_threads_share_one_cache(tmp_path: Path) -> None:
    model = llama()
    prompts = [torch.cat([prompt(3 * BLOCK), prompt(2 * BLOCK, seed=seed)], dim=1) for seed in range(4)]
    with opened(tmp_path) as pool:
        cache = attached(pool, model, tmp_path)
        wrong = []

        def chat(ids: torch.Tensor) -> None:
            expected = greedy(model, mask(ids)).sequences
            for _ in range(3):
                with cache.session(ids) as session:
                    output = greedy(model, session.inputs)
                    session.store(output)
                if not torch.equal(output.sequences, expected):
                    wrong.append(ids)

        threads = [threading.Thread(target=chat, args=(ids,)) for ids in prompts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert pool.stats().matched_blocks > 0


def test_the_pool_is_an_argument_like_any_other(tmp_path: Path) -> None:
    with opened(tmp_path) as pool:
        assert isinstance(pool, Pool)
        one, other = attached(pool, llama(), tmp_path), attached(pool, llama(), tmp_path)
        assert one.blocks is other.blocks
