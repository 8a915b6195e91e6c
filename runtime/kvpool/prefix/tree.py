"""One path-compressed radix tree of token prefixes, of one (fingerprint, tenant, epoch).

Edges and splits are whole blocks, children are keyed by the bytes of their first block, and tokens themselves are
compared, so a match needs no hash of ours and cannot collide. A block with an extra key always starts an edge, so that
it is always compared. The tree knows structure only; who may read or evict, and locking, are the index's business.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from kvpool.blocks.identity import KEY_BYTES, BlockKey, KeyChain, TreeId
from kvpool.prefix.history import Loss
from kvpool.prefix.node import LEVELS, NO_CHILDREN, NO_COUNTS, NOWHERE, ChildKey, Node

if TYPE_CHECKING:
    from kvpool.prefix.accounts import Account

Extras = Mapping[int, bytes]


class PrefixTree:
    """Structure of one tree. Not thread-safe: the index holds its lock around every call."""

    def __init__(
        self, tree_id: TreeId, *, token_bytes: int, record_bytes: int, chain: KeyChain, model: str = ""
    ) -> None:
        self.id = tree_id
        self.model = model
        """The model's name: whose account its copies are charged to."""
        self.account: Account
        """That account, from when an index enters the tree."""
        self.token_bytes = token_bytes
        """Bytes of one block's token ids."""
        self.record_bytes = record_bytes
        """Bytes of one block's record as it is stored first, not encoded."""
        self.encoded = False
        """Whether some copies may be encoded, and so shorter than `record_bytes`."""
        self.chain = chain
        self.root = Node(self, None, b"", b"", b"", 0, 0)
        self.root.whole = True
        self.gone = False
        """In no index now: erased, or empty and given up until it is matched or entered again."""
        self.gapped = False
        """A record was lost from SSD with others below it: what is used is to be looked at, and saved again."""
        self.erased = False
        """Nothing may be entered any more, and nothing is found."""
        self.loss = Loss.ERASED
        """Why that is, if it is."""

    def find(self, tokens: bytes) -> tuple[Node, int]:
        """Return the deepest node that `tokens` reaches through blocks with copies, and the depth reached."""
        size = self.token_bytes
        node = self.root
        at = 0
        while True:
            child = node.children.get(tokens[at : at + size])
            if child is None:
                return node, node.end
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
        runs = Runs(extras, total)
        node, depth = self.root, 0
        while depth < total:
            child = node.children.get(child_key(tokens, depth, size, extras))
            if child is None:
                break
            limit = min(child.solid, runs.end_after(depth) - depth)
            common = common_blocks(child.tokens, 0, tokens, depth * size, limit, size)
            if common < child.blocks:
                return (child, depth + common) if common else (node, depth)
            node, depth = child, child.end
        return node, depth

    def add_child(self, parent: Node, tokens: bytes, keys: bytes, extra: bytes) -> Node:
        """Hang a new edge with these blocks below `parent`. It has no copies yet."""
        start = parent.end
        child = Node(self, parent, tokens, keys, extra, start, start + len(keys) // KEY_BYTES)
        if parent.children is NO_CHILDREN:
            parent.children = {}
            parent.below = [0, 0, 0]
        parent.children[self.key_in_parent(child)] = child
        return child

    def append(self, leaf: Node, tokens: bytes, keys: bytes) -> None:
        """Lengthen the edge of a leaf by these blocks, which have no copies yet and were never used."""
        if leaf.last_use:
            leaf.heads = [(leaf.end, leaf.last_use), *leaf.live_heads()]
            leaf.last_use = 0
        leaf.tokens += tokens
        leaf.keys += keys
        leaf.end += len(keys) // KEY_BYTES
        leaf.whole = False
        leaf.sent = 0

    def cut(self, leaf: Node, kept: int) -> None:
        """Forget the blocks of a leaf's edge from `kept` on, which have no copies. At least one is kept."""
        age = leaf.used_at(kept - 1)
        leaf.tokens = leaf.tokens[: kept * self.token_bytes]
        leaf.keys = leaf.keys[: kept * KEY_BYTES]
        leaf.traits = leaf.traits[:kept]
        leaf.end = leaf.start + kept
        leaf.heads = [head for head in leaf.live_heads() if head[0] < leaf.end] or None
        leaf.last_use = age
        leaf.solid = min(leaf.solid, kept)
        leaf.whole = leaf.solid == kept
        leaf.save_to = min(leaf.save_to, leaf.end)

    def remove_child(self, child: Node) -> None:
        """Take a leaf without copies out of the tree, and let go of what it held."""
        parent = child.parent
        assert parent is not None
        del parent.children[self.key_in_parent(child)]
        if not parent.children:
            parent.children = NO_CHILDREN
            parent.below = NO_COUNTS
        child.tokens = child.keys = child.traits = b""
        child.end = child.start
        child.heads = None

    def split(self, lower: Node, at: int) -> Node:
        """Cut the edge after its first `at` blocks; return the new upper node. `lower` stays the same object.

        Leases move with the depth at which they end; counts of the parent stay as they are.
        """
        parent = lower.parent
        assert parent is not None
        assert 0 < at < lower.blocks
        size = self.token_bytes
        upper = Node(
            self, parent, lower.tokens[: at * size], lower.keys[: at * KEY_BYTES], lower.extra, lower.start,
            lower.start + at,
        )  # fmt: skip
        parent.children[self.key_in_parent(upper)] = upper
        self._split_uses(upper, lower)
        lower.parent = upper
        lower.tokens = lower.tokens[at * size :]
        lower.keys = lower.keys[at * KEY_BYTES :]
        upper.traits, lower.traits = lower.traits[:at], lower.traits[at:]
        lower.extra = b""
        lower.start = upper.end
        upper.children = {self.key_in_parent(lower): lower}
        self._split_copies(upper, lower, at)
        self._split_leases(upper, lower)
        upper.below = [int(lower.holds(level)) for level in LEVELS]
        upper.shared, upper.busy = lower.shared, lower.busy
        upper.save_to = min(lower.save_to, upper.end)
        upper.sent = lower.sent
        return upper

    def key_in_parent(self, node: Node) -> ChildKey:
        """Under which key `node` hangs in its parent."""
        tokens = node.tokens
        first = tokens if len(tokens) == self.token_bytes else tokens[: self.token_bytes]
        return (first, node.extra) if node.extra else first

    def keys_of(self, node: Node) -> bytes:
        """The block keys of the edge, 16 bytes each."""
        return node.keys

    def parent_key(self, node: Node) -> BlockKey:
        """The key of the block before the edge: the chain's root for a first block."""
        parent = node.parent
        if parent is None or parent.parent is None:
            return self.chain.root
        return BlockKey(parent.keys[-KEY_BYTES:])

    def key_before(self, node: Node, depth: int) -> BlockKey:
        """The key of the block before `depth`, which lies in or at the end of `node`'s edge."""
        if depth == node.start:
            return self.parent_key(node)
        at = (depth - node.start) * KEY_BYTES
        return BlockKey(node.keys[at - KEY_BYTES : at])

    def keys_after(self, parent: BlockKey, first: int, run: bytes, extras: Extras | None) -> bytes:
        """The keys of the blocks of `run`, which follow `parent` from depth `first` on; about 1 us each."""
        return b"".join(self.chain.extend_all(parent, first, run, self.token_bytes, extras))

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
        """Before `lower` has been shortened."""
        heads = lower.live_heads()
        upper.last_use = lower.used_at(upper.blocks - 1)
        upper.heads = [head for head in heads if head[0] < upper.end] or None
        lower.heads = [head for head in heads if head[0] > upper.end] or None


class Runs:
    """Where the edges of one prompt have to end: before every block with an extra key."""

    def __init__(self, extras: Extras | None, total: int) -> None:
        self._stops = sorted(extras, reverse=True) if extras else []
        self._total = total

    def end_after(self, depth: int) -> int:
        """The first depth after `depth` at which an edge has to end. `depth` does not decrease from call to call."""
        stops = self._stops
        while stops and stops[-1] <= depth:
            stops.pop()
        return min(stops[-1], self._total) if stops else self._total


def child_key(tokens: bytes, depth: int, size: int, extras: Extras | None) -> ChildKey:
    """Under which key the block at `depth` of a prompt would hang in its parent."""
    block = tokens[depth * size : (depth + 1) * size]
    extra = extras.get(depth) if extras else None
    return (block, extra) if extra else block


def common_blocks(edge: bytes, edge_at: int, tokens: bytes, at: int, limit: int, size: int) -> int:
    """How many whole blocks, at most `limit`, `edge` from `edge_at` and `tokens` from `at` (in bytes) have in common.

    Compares runs of doubling length, then halves the one that differs: a slice is copied, so a long edge is not
    compared whole when its first blocks differ already.
    """
    equal, run = 0, 1
    while equal < limit:
        run = min(run, limit - equal)
        low = equal * size
        if tokens.startswith(edge[edge_at + low : edge_at + low + run * size], at + low):
            equal += run
            run *= 2
        elif run == 1:
            return equal
        else:
            limit = equal + run - 1
            run //= 2
    return equal


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
