"""One path-compressed radix tree of token prefixes, of one (fingerprint, tenant, epoch).

Edges and splits are whole blocks, children are keyed by the bytes of their first block, and tokens themselves are
compared, so a match needs no hash of ours and cannot collide. A block with an extra key always starts an edge, so that it
is always compared. The tree knows structure only; who may read, evict or write is the index's business, and so is locking.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from kvpool.blocks.identity import KEY_BYTES, BlockKey, Fingerprint, KeyChain, TenantDigest
from kvpool.prefix.node import LEVELS, NO_CHILDREN, NO_COUNTS, NOWHERE, ChildKey, Node

Extras = Mapping[int, bytes]


class TreeId(NamedTuple):
    """What a tree is for."""

    fingerprint: Fingerprint
    tenant: TenantDigest
    epoch: int


class PrefixTree:
    """Structure of one tree. Not thread-safe: the index holds its lock around every call."""

    def __init__(
        self, tree_id: TreeId, *, token_bytes: int, payload_bytes: int, record_bytes: int, chain: KeyChain
    ) -> None:
        self.id = tree_id
        self.token_bytes = token_bytes
        """Bytes of one block's token ids."""
        self.payload_bytes = payload_bytes
        self.record_bytes = record_bytes
        self.chain = chain
        self.root = Node(self, None, b"", b"", 0, 0)
        self.root.whole = True
        self.gone = False
        """Erased, or empty and given up: nothing may be entered any more, and nothing is found."""

    def find(self, tokens: bytes) -> tuple[Node, int]:
        """Return the deepest node that `tokens` reaches through blocks with copies, and the depth reached."""
        size = self.token_bytes
        node = self.root
        at = 0
        while True:
            child = node.children.get(tokens[at : at + size])
            if child is None:
                return node, at // size
            edge = child.tokens
            if not (child.whole and tokens.startswith(edge, at)):
                common = common_blocks(edge, 0, tokens, at, min(child.solid, len(tokens) // size - child.start), size)
                return (child, child.start + common) if common else (node, child.start)
            at += len(edge)
            node = child

    def find_with_extras(self, tokens: bytes, extras: Extras) -> tuple[Node, int]:
        """`find` for a prompt some of whose blocks have extra keys (block index -> digest)."""
        size = self.token_bytes
        total = len(tokens) // size
        node, depth = self.root, 0
        while depth < total:
            child = node.children.get(child_key(tokens, depth, size, extras))
            if child is None:
                break
            limit = min(child.solid, run_end(depth, total, extras) - depth)
            common = common_blocks(child.tokens, 0, tokens, depth * size, limit, size)
            if common < child.blocks:
                return (child, depth + common) if common else (node, depth)
            node, depth = child, child.end
        return node, depth

    def add_child(self, parent: Node, tokens: bytes, extra: bytes) -> Node:
        """Hang a new edge with these blocks below `parent`. It has no copies yet."""
        child = Node(self, parent, tokens, extra, parent.end, parent.end + len(tokens) // self.token_bytes)
        if parent.children is NO_CHILDREN:
            parent.children = {}
            parent.below = [0, 0, 0]
        parent.children[self.key_in_parent(child)] = child
        return child

    def remove_child(self, child: Node) -> None:
        """Take a leaf out of the tree and let go of what it held. Its parent's counts must not include it any more."""
        parent = child.parent
        assert parent is not None
        del parent.children[self.key_in_parent(child)]
        if not parent.children:
            parent.children = NO_CHILDREN
            parent.below = NO_COUNTS
        child.parent = None
        child.tokens = b""
        child.end = child.start

    def split(self, lower: Node, at: int) -> Node:
        """Cut the edge after its first `at` blocks; return the new upper node. `lower` stays the same object.

        Leases move with the depth at which they end; counts of the parent stay as they are.
        """
        parent = lower.parent
        assert parent is not None
        size = self.token_bytes
        upper = Node(self, parent, lower.tokens[: at * size], lower.extra, lower.start, lower.start + at)
        parent.children[self.key_in_parent(upper)] = upper
        lower.parent = upper
        lower.tokens = lower.tokens[at * size :]
        lower.extra = b""
        lower.start = upper.end
        upper.children = {self.key_in_parent(lower): lower}
        self._split_copies(upper, lower, at)
        self._split_leases(upper, lower)
        self._split_uses(upper, lower)
        upper.below = [int(lower.holds(level)) for level in LEVELS]
        if lower.keys is not None:
            upper.keys, lower.keys = lower.keys[: at * KEY_BYTES], lower.keys[at * KEY_BYTES :]
        upper.shared, upper.busy = lower.shared, lower.busy
        upper.save_to = min(lower.save_to, upper.end)
        return upper

    def key_in_parent(self, node: Node) -> ChildKey:
        """Under which key `node` hangs in its parent."""
        tokens = node.tokens
        first = tokens if len(tokens) == self.token_bytes else tokens[: self.token_bytes]
        return (first, node.extra) if node.extra else first

    def keys_of(self, node: Node) -> bytes:
        """The block keys of the edge, 16 bytes each; computed once, about 0.7 us a block."""
        blocks = node.blocks
        known = node.keys or b""
        if len(known) >= blocks * KEY_BYTES:
            return known
        done = len(known) // KEY_BYTES
        parent = BlockKey(known[-KEY_BYTES:]) if known else self.parent_key(node)
        size, extra, keys = self.token_bytes, node.extra if not done else b"", [known]
        for index in range(done, blocks):
            parent = self.chain.extend(parent, node.tokens[index * size : (index + 1) * size], extra)
            keys.append(parent)
            extra = b""
        node.keys = b"".join(keys)
        return node.keys

    def parent_key(self, node: Node) -> BlockKey:
        """The key of the block before the edge: the chain's root for a first block."""
        parent = node.parent
        if parent is None or parent.parent is None:
            return self.chain.root
        return BlockKey(self.keys_of(parent)[(parent.blocks - 1) * KEY_BYTES : parent.blocks * KEY_BYTES])

    def nodes(self) -> Iterator[Node]:
        """Every node but the root, parents before children."""
        pending = list(self.root.children.values())
        while pending:
            node = pending.pop()
            yield node
            pending.extend(node.children.values())

    @staticmethod
    def _split_copies(upper: Node, lower: Node, at: int) -> None:
        for level in LEVELS:
            places = lower.places[level]
            if places is not None:
                upper.places[level] = stripped(places[:at])
                lower.places[level] = places[at:] or None
        solid = lower.solid
        upper.solid = min(solid, at)
        upper.whole = upper.solid == at
        lower.solid = solid - at if solid >= at else count_solid(lower, 0)
        lower.whole = lower.solid == lower.blocks

    @staticmethod
    def _split_leases(upper: Node, lower: Node) -> None:
        below = {depth: count for depth, count in (lower.ends or {}).items() if depth > upper.end}
        above = {depth: count for depth, count in (lower.ends or {}).items() if depth <= upper.end}
        upper.refs = lower.refs + sum(below.values())
        upper.ends, lower.ends = above or None, below or None

    @staticmethod
    def _split_uses(upper: Node, lower: Node) -> None:
        upper.last_use = lower.last_use
        if lower.head_end >= upper.end:
            upper.last_use = max(lower.last_use, lower.head_use)
            if lower.head_end == upper.end:
                lower.head_use = lower.head_end = 0
        else:
            upper.head_use, upper.head_end = lower.head_use, lower.head_end
            lower.head_use = lower.head_end = 0


def child_key(tokens: bytes, depth: int, size: int, extras: Extras) -> ChildKey:
    """Under which key the block at `depth` of a prompt would hang in its parent."""
    block = tokens[depth * size : (depth + 1) * size]
    extra = extras.get(depth)
    return (block, extra) if extra else block


def run_end(depth: int, total: int, extras: Extras | None) -> int:
    """The first depth after `depth` at which an edge has to end: the next block with an extra key, or `total`."""
    return min((at for at in extras if at > depth), default=total) if extras else total


def common_blocks(edge: bytes, edge_at: int, tokens: bytes, at: int, limit: int, size: int) -> int:
    """How many whole blocks, at most `limit`, `edge` from `edge_at` and `tokens` from `at` have in common. Bytes offsets."""
    if limit <= 0:
        return 0
    if edge[edge_at : edge_at + limit * size] == tokens[at : at + limit * size]:
        return limit
    equal, differ = 0, limit
    while differ - equal > 1:
        middle = (equal + differ) // 2
        low, high = equal * size, middle * size
        if edge[edge_at + low : edge_at + high] == tokens[at + low : at + high]:
            equal = middle
        else:
            differ = middle
    same = edge[edge_at + equal * size : edge_at + differ * size] == tokens[at + equal * size : at + differ * size]
    return differ if same else equal


def stripped(places: array[int]) -> array[int] | None:
    """`places` without the empty entries at its end; None when there is no other."""
    while places and places[-1] == NOWHERE:
        places.pop()
    return places or None


def count_solid(node: Node, known: int) -> int:
    """How many leading blocks of the edge have a copy, of which the first `known` are known to."""
    while known < node.blocks and node.has_copy(known):
        known += 1
    return known
