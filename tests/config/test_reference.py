"""docs/configuration.md and the examples keep up with the models."""

from pathlib import Path

import pytest
import yaml

from kvpool.config import effective_settings, load_config, load_pool
from kvpool.config.reference import reference

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
MiB = 1 << 20


def test_the_reference_is_what_the_models_say() -> None:
    command = "python -m kvpool.config.reference > docs/configuration.md"
    assert (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8") == reference(), f"run: {command}"


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.name)
def test_the_examples_can_be_used(file: Path) -> None:
    assert load_config(file).name == load_pool(file).metadata.name


def test_the_cluster_example_sets_every_field_that_a_profile_would() -> None:
    rows = effective_settings(load_pool(ROOT / "examples" / "cluster.yaml"))
    assert not [row for row in rows if row.source.startswith("profile")]


def test_the_laptop_example_evicts_chats_of_3000_tokens_to_shared_tiers_and_disk() -> None:
    config = load_config(ROOT / "examples" / "laptop.yaml")
    block_bytes = 30 * 2 * 3 * 64 * config.block_tokens * 4 + 4096  # float32, and the record's head
    chat_bytes = 3000 // config.block_tokens * block_bytes
    assert config.models[0].name == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert config.ssd is not None
    system_prompt_bytes = 1500 // config.block_tokens * block_bytes
    assert system_prompt_bytes < config.ram.capacity_bytes < chat_bytes
    assert config.sharing.max_shared_bytes < config.ram.capacity_bytes
    assert config.ssd.capacity_bytes > 12 * chat_bytes
    assert config.gpu is None
    assert config.dragonfly is not None
    assert config.dragonfly.secret is None, "it needs no server but those that it starts"
    assert config.database is not None
    assert config.database.postgres.secret is None
    assert config.database.inline_max_bytes > block_bytes
    demo_bytes = 2 * system_prompt_bytes + chat_bytes
    assert config.database.inline_bytes > demo_bytes


def test_examples_are_plain_yaml() -> None:
    for file in EXAMPLES:
        assert yaml.safe_load(file.read_text(encoding="utf-8"))["kind"] == "KVCachePool"
