"""Which nodes may lose their last block at one tier, in the order of the eviction policy.

The policy orders by pure computation and never sees leases, quotas or protection; those are settled here. A node is in
one of four states per tier: not a candidate; *on offer* to the policy; on offer as *protected*, behind all others; or
*parked*, for its last block is leased, until the lease ends. The age on offer is never later than the true one, so that
a use costs nothing: it is found out when the node is taken, which is then offered again.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Protocol, TypeAlias

from kvpool.prefix.node import Node

Candidate: TypeAlias = Hashable
"""What a policy orders; it looks at nothing of it."""


class EvictionPolicy(Protocol):
    """Orders candidates. Each is on offer at most once."""

    def offer(self, candidate: Candidate, last_use: int, trait: int) -> None:
        """This one may go, and was used at `last_use` (larger is later). Replaces what was offered of it before.

        `trait` is what the model's learner says of it; 0 without one.
        """
        ...

    def withdraw(self, candidate: Candidate) -> None:
        """This one is no candidate any more; nothing happens when it was none."""
        ...

    def take(self) -> tuple[Candidate, int] | None:
        """Return the one to go next and its `last_use` as offered, no longer on offer; None when there is none."""
        ...

    def date(self, last_use: int, trait: int) -> int:
        """That of one like this, at present. The earliest goes first, among the candidates of several policies too."""
        ...

    def next_date(self) -> int | None:
        """The earliest date of those on offer, which that of the next `take` has; None when there is none."""
        ...

    def offered_at(self, candidate: Candidate) -> int | None:
        """The `last_use` with which this one is on offer, or None."""
        ...

    def __len__(self) -> int:
        """How many are on offer."""
        ...


class Candidates:
    """The candidates of one tier. Guarded by the index's lock."""

    def __init__(
        self,
        level: int,
        make_policy: Callable[[], EvictionPolicy],
        *,
        protects: Callable[[int], bool],
        is_protected: Callable[[Node], bool],
    ) -> None:
        self.level = level
        self.ordinary = make_policy()
        self.protected = make_policy()
        self.parked = 0
        self._bit = 1 << level
        self._protects = protects
        """Whether protection holds at this level now."""
        self._is_protected = is_protected

    def offer(self, node: Node) -> None:
        """Put the node on offer if its last block at this level is a leaf there, and it is not yet."""
        if not node.offered & self._bit and node.is_leaf_at(self.level):
            self._offer(node)

    def offer_deeper(self, node: Node) -> None:
        """`offer`, after the last block at this level became a deeper one: that may be older than the one on offer."""
        if node.is_leaf_at(self.level):
            self.protected.withdraw(node)
            self._offer(node)

    def withdraw(self, node: Node) -> None:
        """The node has left the tree."""
        if node.offered & self._bit:
            node.offered &= ~self._bit
            self.ordinary.withdraw(node)
            self.protected.withdraw(node)
        if node.parked & self._bit:
            self._unpark(node)

    def release(self, node: Node) -> None:
        """A lease of the node has ended: offer it again if it was parked."""
        if node.parked & self._bit:
            self._unpark(node)
            self.offer(node)

    def next_date(self, *, spare_protected: bool = False) -> int | None:
        """That of the node that `take` would return, at the earliest; None when there is none."""
        date = self.ordinary.next_date()
        return self.protected.next_date() if date is None and not spare_protected else date

    def date(self, node: Node) -> int:
        """That of the node's last block at this level."""
        last = len(node.places[self.level] or ()) - 1
        return self.ordinary.date(node.used_at(last), node.trait(last))

    def take(self, *, spare_protected: bool = False) -> Node | None:
        """Return the node whose last block at this level goes next, no longer on offer; None when none may go.

        `spare_protected`: nor may those that are protected now.
        """
        while True:
            protecting = self._protects(self.level)
            if not protecting and (unprotected := self.protected.take()):
                self._offer_to(self.ordinary, *unprotected)
            queue = self.ordinary
            taken = queue.take()
            if taken is None and not spare_protected:
                queue = self.protected
                taken = queue.take()
            if taken is None:
                return None
            node, age = taken
            assert isinstance(node, Node)
            if self._may_go(node):
                index = len(node.places[self.level] or ()) - 1
                if protecting and queue is self.ordinary and self._is_protected(node):
                    self.protected.offer(node, node.used_at(index), node.trait(index))
                elif node.used_at(index) > age:
                    queue.offer(node, node.used_at(index), node.trait(index))
                else:
                    node.offered &= ~self._bit
                    return node

    def run_from(self, node: Node, last: int) -> int:
        """The first index from which on to `last` blocks may go together: of one age, and as the policy would choose.

        `node` was just taken, and `last` is its last block at this level.
        """
        first = node.same_trait_from(last)
        if first:
            least, age = node.same_age_from(last), node.used_at(last)
            next_date = self.ordinary.next_date()
            while first > least:
                if next_date is not None and self.ordinary.date(age, node.trait(first - 1)) > next_date:
                    break
                first = node.same_trait_from(first - 1)
            first = max(first, least)
        return first

    def _may_go(self, node: Node) -> bool:
        """Whether the node just taken is a candidate still; takes it off offer, or parks it, when it is none."""
        if node.tail(self.level) >= 0:
            return True
        node.offered &= ~self._bit
        if node.is_leaf_at(self.level) and node.leased_to() > node.start:
            node.parked |= self._bit
            self.parked += 1
        return False

    def _offer(self, node: Node) -> None:
        places = node.places[self.level]
        assert places is not None
        node.offered |= self._bit
        if node.parked & self._bit:
            self._unpark(node)
        self._offer_to(self.ordinary, node, node.used_at(len(places) - 1))

    def _offer_to(self, queue: EvictionPolicy, node: Candidate, age: int) -> None:
        assert isinstance(node, Node)
        queue.offer(node, age, node.trait(len(node.places[self.level] or ()) - 1))

    def _unpark(self, node: Node) -> None:
        node.parked &= ~self._bit
        self.parked -= 1
