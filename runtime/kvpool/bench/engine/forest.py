"""A prefix index with one tree in it and any number of prompts, each block with a copy in RAM; no payloads."""

import random
from itertools import count, islice

from kvpool.blocks.identity import SECRET_BYTES, Fingerprint, KeyChain, TenantDigest, TreeId
from kvpool.policy import LruPolicy
from kvpool.prefix.index import BATCH_BLOCKS, PrefixIndex, SharingRules
from kvpool.prefix.node import RAM
from kvpool.prefix.tree import PrefixTree

BLOCK_TOKENS = 64
BLOCK_BYTES = 4 * BLOCK_TOKENS
RECORD_BYTES = 2 << 20


class Forest:
    """Plants prompts. The same seed gives the same tokens."""

    def __init__(self, *, seed: int = 1) -> None:
        self.index = PrefixIndex(limit_bytes=1 << 40, make_policy=LruPolicy, sharing=SharingRules())
        identity = TreeId(Fingerprint(bytes(32)), TenantDigest(bytes(16)), 0)
        chain = KeyChain(bytes(range(SECRET_BYTES)), identity.fingerprint, identity.tenant, identity.epoch)
        tree = PrefixTree(identity, token_bytes=BLOCK_BYTES, record_bytes=RECORD_BYTES, chain=chain)
        self.tree = self.index.add_tree(tree)
        self._rng = random.Random(seed)  # noqa: S311 - tokens, not secrets
        self._places = count()

    def prompt(self, blocks: int) -> bytes:
        """Random tokens."""
        return self._rng.randbytes(blocks * BLOCK_BYTES)

    def plant(self, tokens: bytes) -> None:
        """Enter every block of these tokens that is not there."""
        pin = self.index.match(self.tree, tokens)
        blocks = len(tokens) // BLOCK_BYTES
        while pin.depth < blocks:
            wanted = min(BATCH_BLOCKS, blocks - pin.depth)
            self.index.attach(pin, tokens, RAM, list(islice(self._places, wanted)))
        self.index.unpin(pin)

    def plant_prompts(self, prompts: int, *, blocks: int, head: bytes = b"") -> None:
        """Enter so many random prompts of so many blocks after `head`."""
        for _ in range(prompts):
            self.plant(head + self.prompt(blocks))

    def plant_split(self, tokens: bytes, splits: int) -> None:
        """Enter these tokens so that their path has so many splits, evenly spaced; fewer where it has fewer blocks."""
        self.plant(tokens)
        blocks = len(tokens) // BLOCK_BYTES
        splits = min(splits, blocks - 1)
        for number in range(1, splits + 1):
            at = number * blocks // (splits + 1)
            self.plant(tokens[: at * BLOCK_BYTES] + self.prompt(1))
