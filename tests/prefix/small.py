"""A prefix index of blocks of one token, so that a prompt is a word and its blocks are letters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from kvpool.blocks.identity import BlockKey, Fingerprint, KeyChain, TenantDigest, TreeId
from kvpool.policy import LruPolicy
from kvpool.prefix.index import Pin, PrefixIndex
from kvpool.prefix.node import RAM, SSD
from kvpool.prefix.tree import PrefixTree

RECORD_BYTES = 100


class Record(NamedTuple):
    key: BlockKey
    parent: BlockKey
    depth: int
    tokens: bytes
    extra: bytes
    place: int


class Places:
    """Hands out places that nobody had before."""

    def __init__(self) -> None:
        self.next = 0

    def take(self, count: int) -> list[int]:
        self.next += count
        return list(range(self.next - count, self.next))


PLACES = Places()


def make_index(**options: object) -> PrefixIndex:
    options = {
        "limit_bytes": 1 << 30,
        "make_policy": LruPolicy,
        "region_of": {SSD: lambda place: place // 64},
        **options,
    }
    return PrefixIndex(**options)  # type: ignore[arg-type]


def make_tree(index: PrefixIndex, epoch: int = 0, token_bytes: int = 4) -> PrefixTree:
    tree_id = TreeId(Fingerprint(bytes(32)), TenantDigest(bytes(16)), epoch)
    chain = KeyChain(bytes(32), *tree_id)
    return index.add_tree(PrefixTree(tree_id, token_bytes=token_bytes, record_bytes=RECORD_BYTES, chain=chain))


def tokens(text: str) -> bytes:
    """One block of one token per letter."""
    return b"".join(ord(letter).to_bytes(4, "little") for letter in text)


def store(index: PrefixIndex, tree: PrefixTree, prompt: str | bytes, level: int = RAM) -> Pin:
    """Store a whole prompt and return the open pin."""
    packed = tokens(prompt) if isinstance(prompt, str) else prompt
    pin = index.match(tree, packed)
    while left := len(packed) // tree.token_bytes - pin.depth:
        index.attach(pin, packed, level, PLACES.take(min(left, 32)))
    return pin


def stored(index: PrefixIndex, tree: PrefixTree, prompt: str | bytes, level: int = RAM) -> None:
    index.unpin(store(index, tree, prompt, level))


def depth(index: PrefixIndex, tree: PrefixTree, prompt: str, most_blocks: int | None = None) -> int:
    pin = index.match(tree, tokens(prompt), None, most_blocks)
    index.unpin(pin)
    return pin.depth


def records(tree: PrefixTree, prompts: Sequence[str]) -> list[Record]:
    """One record for each different block of these prompts."""
    found: dict[BlockKey, Record] = {}
    for prompt in prompts:
        keys = [tree.chain.root, *tree.chain.keys(tokens(prompt), 4)]
        for at, letter in enumerate(prompt):
            found.setdefault(keys[at + 1], Record(keys[at + 1], keys[at], at, tokens(letter), b"", PLACES.take(1)[0]))
    return list(found.values())
