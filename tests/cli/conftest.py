"""A pool's file and directory, and a pool that was used and closed."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvpool import Dtype, KVLayout, ModelIdentity, ModelSpec, Pool
from kvpool.blocks.record import Buffer
from tests.cli.command import POOL

LAYOUT = KVLayout(layers=1, kv_heads=1, head_size=8, dtype=Dtype.FLOAT16)
TOKENS = list(range(100, 100 + 5 * LAYOUT.block_tokens + 7))
"""Five whole blocks, and a part of one."""
STORED_BLOCKS = 3


class Zeros:
    """A source of blocks that hold nothing but zeros."""

    def read_block(self, index: int, into: Buffer) -> None:
        into[:] = 0


@pytest.fixture
def pool_file(tmp_path: Path) -> Path:
    path = tmp_path / "pool.yaml"
    path.write_text(POOL)
    return path


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "pool"


@pytest.fixture
def used_directory(pool_file: Path, directory: Path) -> Path:
    """The directory of a pool that kept the first blocks of a prompt of tenant `acme`."""
    use(pool_file, directory)
    return directory


def share(pool_file: Path, directory: Path) -> None:
    """Use it, and declare the first two blocks shared after one request for them."""
    use(pool_file, directory)
    with Pool.open(pool_file, directory=directory) as pool:
        model = pool.model("tiny")
        model.declare_shared(TOKENS[: 2 * LAYOUT.block_tokens], tenant="acme")
        model.match(TOKENS, tenant="acme").close()


def use(pool_file: Path, directory: Path) -> None:
    with Pool.open(pool_file, directory=directory) as pool:
        model = pool.register(ModelSpec(identity=ModelIdentity(name="tiny", weights="1", layout=LAYOUT)))
        model.store(TOKENS[: STORED_BLOCKS * LAYOUT.block_tokens], Zeros(), tenant="acme")
