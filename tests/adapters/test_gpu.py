"""A model on a device with a gpu tier: blocks stay there. On memory of the CPU, and on a GPU where there is one."""

from pathlib import Path
from typing import Any

import pytest
import torch

from kvpool.config import RuntimeConfig
from kvpool.pool.gpu_store import TorchDevice
from kvpool.pool.pool import Pool
from kvpool.prefix.integrity import check_integrity
from kvpool.prefix.node import GPU
from kvpool.tiers.tier import TierName
from tests.adapters.tiny import (
    BLOCK,
    FAMILIES,
    MIB,
    attached,
    config,
    continued,
    greedy,
    kept_in_memory,
    padded,
    plain_cache,
    prompt,
    same,
)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    return str(request.param)


def opened(path: Path, device: str, *, gpu_bytes: int = 64 * MIB) -> Pool:
    plain = config().model_dump(mode="json", by_alias=True)
    plain["gpu"] = {"capacityBytes": gpu_bytes}
    return Pool.open(RuntimeConfig.model_validate(plain), directory=path / "pool", gpu=TorchDevice(device))


def check(pool: Pool) -> None:
    """Fail unless every slot of the device is one block's."""
    engine = pool._engine
    check_integrity(engine.index)
    assert engine.gpu is not None
    assert engine.gpu.store.used_bytes == engine.index.copy_bytes[GPU]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "deepseek"])
def test_generation_from_the_gpu_tier_is_generation_from_the_cache_in_memory(
    family: str, dtype: torch.dtype, device: str, tmp_path: Path
) -> None:
    model, ids = FAMILIES[family](dtype).to(device), prompt(5 * BLOCK + 3).to(device)
    with opened(tmp_path, device) as pool:
        cache = attached(pool, model, tmp_path, gpu_types=[device])
        with cache.session(ids) as session:
            session.store(greedy(model, session.inputs))
            memory = kept_in_memory(session)
        with cache.session(ids) as session:
            output = greedy(model, session.inputs)
            assert session.served == {TierName.GPU: 5}
        check(pool)
    mask: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert same(output, greedy(model, continued(model, mask, plain_cache(model, memory, 5 * BLOCK))))


def test_a_padded_batch_goes_through_the_gpu_tier_and_ram_alike(device: str, tmp_path: Path) -> None:
    model = FAMILIES["llama"](torch.float32).to(device)
    batch = {name: each.to(device) for name, each in padded(prompt(6 * BLOCK, 1), prompt(4 * BLOCK + 2, 2)).items()}
    outputs = []
    for gpu_bytes in (64 * MIB, 3 * MIB // 64):
        with opened(tmp_path / str(gpu_bytes), device, gpu_bytes=gpu_bytes) as pool:
            cache = attached(pool, model, tmp_path, gpu_types=[device])
            with cache.session(**batch) as session:
                session.store(greedy(model, session.inputs))
            with cache.session(**batch) as session:
                outputs.append(greedy(model, session.inputs))
                tiers = set(session.served)
            check(pool)
    assert same(*outputs)
    assert tiers == {TierName.GPU, TierName.RAM}, "the second device was too small"
