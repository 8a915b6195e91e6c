"""Proves that a prefix index is what it claims to be. The oracle of the property tests, and of a debugging session.

It recounts everything from the nodes up, so it takes time in proportion to the whole index and holds the lock for all
of it: never in a serving path.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from kvpool.blocks.identity import KEY_BYTES
from kvpool.prefix.accounts import Account
from kvpool.prefix.candidates import Candidates
from kvpool.prefix.index import PLACE_BYTES, TREE_BYTES, Pin, PrefixIndex, node_bytes
from kvpool.prefix.node import LEVELS, NO_CHILDREN, NO_COUNTS, NOWHERE, Node
from kvpool.prefix.tree import PrefixTree, count_solid


class IntegrityError(AssertionError):
    """The index contradicts itself; the message says where."""


def check_integrity(index: PrefixIndex, pins: Iterable[Pin] | None = None) -> None:
    """Raise `IntegrityError` unless every invariant of the index holds.

    `pins` are all that are open; without them reference counts are checked for consistency only. Checked are:

    - structure: edges are whole blocks, children hang under the bytes and extra key of their first block, depths and
      parents agree, keys are the chain's; only a root is empty. An edge may be followed by a single child (after an
      eviction, or where an edge may not be longer): matching does not depend on paths being compressed;
    - copies: no place twice in a tier, arrays end with a copy, `solid`, `whole` and `below` are what a recount gives,
      `residents` has exactly the nodes with copies in each region, a leaf has a copy or a lease, a tree too;
    - leases: `refs` and `ends` are those of the open pins, and each pin finds its blocks;
    - eviction: a node is on offer exactly once if its last block may go, at an age not later than its own; what the
      policies hold are nodes of a tree;
    - sharing: the ancestors of a shared node are shared;
    - accounts: blocks, bytes, copies, their bytes, the shared and the leased ones, of all and of each model, are what a
      recount gives.
    """
    with index.lock:
        open_pins = None if pins is None else list(pins)
        trees = _known_trees(index, open_pins)
        nodes = [node for tree in trees for node in tree.nodes()]
        for tree in trees:
            _check_structure(tree)
        for node in nodes:
            _check_copies(node)
            _check_ages(index, node)
            _check_need(index, node)
        _check_places(nodes)
        _check_residents(index, nodes)
        _check_leases(trees, nodes, open_pins)
        _check_candidates(index, nodes)
        _check_counts(index, nodes)


def _require(holds: bool, what: str, node: object = None) -> None:
    if not holds:
        raise IntegrityError(f"{what}: {_text(node)}" if node is not None else what)


def _text(node: object) -> str:
    if not isinstance(node, Node):
        return repr(node)
    return f"blocks {node.start} to {node.end}, places {node.places}, refs {node.refs}, ends {node.ends}"


def _known_trees(index: PrefixIndex, pins: list[Pin] | None) -> list[PrefixTree]:
    """Those that are entered, those still being buried, and those that only a pin at depth 0 keeps."""
    trees = {id(tree): tree for tree in index.trees.values()}
    for tree in trees.values():
        _require(not tree.gone and not tree.erased, "a tree that can be found is not gone", tree.id)
    for tree_id, tree in index.trees.items():
        _require(tree.id == tree_id, "a tree lies under its own identity", tree_id)
        leased = pins is None or any(pin.tree is tree for pin in pins)
        _require(bool(tree.root.children) or leased, "a tree without copies is given up", tree_id)
    for tree in index.buried_trees():
        _require(tree.gone and tree.erased, "a tree that is being buried is gone", tree.id)
        trees[id(tree)] = tree
    for pin in pins or ():
        trees.setdefault(id(pin.tree), pin.tree)
    return list(trees.values())


def _check_structure(tree: PrefixTree) -> None:
    root = tree.root
    _require(root.end == 0 and root.parent is None and root.whole and not any(root.places), "the root is empty", root)
    for node in (root, *tree.nodes()):
        _require(node.tree is tree, "a node knows its tree", node)
        _require((node.children is NO_CHILDREN) == (not node.children), "a leaf has the shared empty children", node)
        _require((node.below is NO_COUNTS) == (node.children is NO_CHILDREN), "a leaf has the shared counts", node)
        for key, child in node.children.items():
            _require(child.parent is node and child.start == node.end, "a child follows its parent", child)
            _require(tree.key_in_parent(child) == key, "a child hangs under its first block", child)
            _check_edge(tree, child)


def _check_edge(tree: PrefixTree, node: Node) -> None:
    blocks = node.blocks
    _require(blocks > 0 and len(node.tokens) == blocks * tree.token_bytes, "an edge is whole blocks", node)
    extras = {node.start: node.extra} if node.extra else None
    keys = tree.keys_after(tree.parent_key(node), node.start, node.tokens, extras)
    _require(node.keys == keys and len(keys) == blocks * KEY_BYTES, "keys are the chain's", node)
    traits = 0 if tree.account.learner is None else blocks
    _require(len(node.traits) == traits, "each block has a trait where something learns, and none elsewhere", node)
    parent = node.parent
    assert parent is not None
    _require(not node.shared or parent.shared or parent.parent is None, "a shared node's parent is shared", node)


def _check_copies(node: Node) -> None:
    for places in node.places:
        if places is not None:
            _require(0 < len(places) <= node.blocks, "an array of places fits its edge", node)
            _require(places[-1] != NOWHERE, "an array ends with a copy", node)
    solid = count_solid(node, 0)
    _require(node.solid == solid and node.whole == (solid == node.blocks), "solid counts the blocks with copies", node)
    for level in LEVELS:
        below = sum(child.holds(level) for child in node.children.values())
        _require(node.below[level] == below, f"below counts the children with copies at level {level}", node)


def _check_ages(index: PrefixIndex, node: Node) -> None:
    heads = node.live_heads()
    ends = [end for end, _ in heads]
    uses = [node.last_use, *(use for _, use in heads)]
    _require(ends == sorted(set(ends), reverse=True) and uses == sorted(set(uses)), "longer uses are older", node)
    _require(all(node.start < end < node.end for end in ends), "partial uses end within the edge", node)
    _require(uses[-1] <= index.uses, "no use is of the future", node)
    parent = node.parent
    if parent is not None and parent.parent is not None:
        _require(parent.used_at(parent.blocks - 1) >= uses[-1], "a parent was used whenever its child was", node)


def _check_need(index: PrefixIndex, node: Node) -> None:
    needed = node.children or any(node.places) or node.leased_to() > node.start
    _require(bool(needed), "a leaf has a copy or a lease", node)


def _check_places(nodes: list[Node]) -> None:
    for level in LEVELS:
        used = Counter(place for node in nodes for place in node.places[level] or () if place != NOWHERE)
        twice = [place for place, count in used.items() if count > 1]
        _require(not twice, f"no two blocks lie at one place of level {level}", twice)


def _check_residents(index: PrefixIndex, nodes: list[Node]) -> None:
    for level, region_of in index.region_of.items():
        expected: dict[int, set[Node]] = {}
        for node in nodes:
            for place in node.places[level] or ():
                if place != NOWHERE:
                    expected.setdefault(region_of(place), set()).add(node)
        _require(index.residents[level] == expected, f"residents of level {level} has the nodes of each region")


def _check_leases(trees: list[PrefixTree], nodes: list[Node], pins: list[Pin] | None) -> None:
    roots = [tree.root for tree in trees]
    for node in (*roots, *nodes):
        for depth, count in (node.ends or {}).items():
            inside = node.start < depth <= node.end or (node.parent is None and depth == 0)
            _require(count > 0 and inside, "a lease ends within the edge that counts it", node)
        through = sum(child.refs + sum((child.ends or {}).values()) for child in node.children.values())
        _require(node.refs == through, "refs are the leases of the children", node)
        _require(node.ends is None or bool(node.ends), "no empty dictionary of leases", node)
    if pins is None:
        return
    expected: dict[Node, Counter[int]] = {}
    for pin in pins:
        node = pin.node
        while node.start >= pin.depth and node.parent is not None:
            node = node.parent
        expected.setdefault(node, Counter())[pin.depth] += 1
        _require(node.start < pin.depth <= node.end or pin.depth == 0, "a pin finds its blocks", node)
        _require(pin.key is None or pin.key == pin.tree.key_before(node, pin.depth), "a pin knows its last key", node)
    actual = {node: Counter(node.ends) for node in (*roots, *nodes) if node.ends}
    _require(actual == expected, "leases are those of the open pins")


def _check_candidates(index: PrefixIndex, nodes: list[Node]) -> None:
    for account in index.ledger.accounts.values():
        for candidates in account.candidates:
            _check_offers(candidates, [node for node in nodes if node.tree.account is account])


def _check_offers(candidates: Candidates, nodes: list[Node]) -> None:
    level, bit = candidates.level, 1 << candidates.level
    offered = [node for node in nodes if node.offered & bit]
    held = len(candidates.ordinary) + len(candidates.protected)
    _require(len(offered) == held, f"policies of level {level} hold {held} nodes, {len(offered)} know of it")
    parked = sum(1 for node in nodes if node.parked & bit)
    _require(parked == candidates.parked, f"{candidates.parked} nodes are parked at level {level}, not {parked}")
    for node in nodes:
        _require(not (node.offered & node.parked & bit), "no node is parked and on offer", node)
        if node.parked & bit:
            _require(node.leased_to() > node.start, "a parked node is leased", node)
        tail = node.tail(level)
        if tail != NOWHERE:
            _require(bool(node.offered & bit), f"what may leave level {level} is on offer", node)
        if node.offered & bit and tail != NOWHERE:
            offers = (candidates.ordinary.offered_at(node), candidates.protected.offered_at(node))
            ages = [age for age in offers if age is not None]
            _require(len(ages) == 1, "a node is on offer once", node)
            _require(ages[0] <= node.used_at(tail), "a node is not on offer as younger than it is", node)


def _check_counts(index: PrefixIndex, nodes: list[Node]) -> None:
    shared_bytes = [0, 0, 0]
    for node in nodes:
        for level in LEVELS:
            shared_bytes[level] += node.shared * index.size(node, level)
    totals = [_recount(index, account, nodes) for account in index.ledger.accounts.values()]
    copies = [sum(total["copies"][level] for total in totals) for level in LEVELS]
    structure = TREE_BYTES * len(index.trees) + sum(node_bytes(node) for node in nodes)
    _require_same(
        index,
        "index",
        {
            "blocks": sum(node.blocks for node in nodes),
            "bytes": structure + PLACE_BYTES * sum(copies),
            "copies": copies,
            "copy_bytes": [sum(total["bytes"][level] for total in totals) for level in LEVELS],
            "shared_bytes": shared_bytes,
        },
    )


def _recount(index: PrefixIndex, account: Account, nodes: list[Node]) -> dict[str, list[int]]:
    """What one model holds; its account must say the same."""
    counts = {"copies": [0, 0, 0], "bytes": [0, 0, 0]}
    for node in (node for node in nodes if node.tree.account is account):
        for level in LEVELS:
            counts["copies"][level] += sum(place != NOWHERE for place in node.places[level] or ())
            counts["bytes"][level] += index.size(node, level)
    _require_same(account, f"account of {account.name!r}", counts)
    if index.ledger.guards:
        _check_leased(index, account, nodes)
    _require(min(account.in_flight) >= 0, f"more of {account.name!r} was entered than charged", account.in_flight)
    return counts


def _check_leased(index: PrefixIndex, account: Account, nodes: list[Node]) -> None:
    own = [node for node in nodes if node.tree.account is account]
    ends = {node for node in own if node.ends}
    noted = {node for node in account.lease_ends if node.parent is not None}
    _require(noted == ends, f"the edges in which leases of {account.name!r} end are noted")
    pinned = sum(depth * count * node.tree.record_bytes for node in ends for depth, count in (node.ends or {}).items())
    _require(account.pinned == pinned, f"what is leased of {account.name!r} is {pinned}, not {account.pinned}")
    for level in LEVELS:
        leased = sum(index.size(node, level, node.leased_to() - node.start) for node in own)
        _require(index.leased(account, level) == leased, f"leased bytes of {account.name!r} at {level} are {leased}")


def _require_same(holder: object, name: str, expected: Mapping[str, object]) -> None:
    actual = {field: getattr(holder, field) for field in expected}
    _require(actual == expected, f"{name}: it counts {actual}, a recount gives {expected}")
