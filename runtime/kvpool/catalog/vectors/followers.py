"""Finds out which prompts followed which: holds each prompt back until others of its tree have come. Pure."""

from collections import OrderedDict, deque
from dataclasses import replace

from kvpool.blocks.identity import BlockKey, Fingerprint, TreeId
from kvpool.catalog.vectors.contract import Point

FOLLOWERS = 5
"""Measured: with the next five, what was asked for after similar prompts is found where there is such a thing."""


class FollowerBook:
    """Prompts that wait for their followers: at most `FOLLOWERS` of each of the `most_trees` latest trees.

    Not safe for several threads.
    """

    def __init__(self, most_trees: int = 512) -> None:
        self._most_trees = most_trees
        self._waiting: OrderedDict[TreeId, deque[Point]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def add(self, point: Point) -> list[Point]:
        """A prompt was asked for; those that need wait no longer, with their followers."""
        waiting = self._waiting.setdefault(point.tree, deque())
        self._waiting.move_to_end(point.tree)
        for at, earlier in enumerate(waiting):
            waiting[at] = _followed(earlier, point.leaf)
        waiting.append(point)
        done = [waiting.popleft()] if len(waiting) > FOLLOWERS else []
        if len(self._waiting) > self._most_trees:
            _, others = self._waiting.popitem(last=False)
            done += others
        return done

    def take(self, before_ms: int) -> list[Point]:
        """Those that were asked for before this time, with the followers that they have by now."""
        done = []
        for tree in list(self._waiting):
            waiting = self._waiting[tree]
            while waiting and waiting[0].at_ms < before_ms:
                done.append(waiting.popleft())
            if not waiting:
                del self._waiting[tree]
        return done

    def forget_model(self, fingerprint: Fingerprint) -> None:
        """Drop a model's prompts."""
        for tree in [tree for tree in self._waiting if tree.fingerprint == fingerprint]:
            del self._waiting[tree]


def _followed(point: Point, leaf: BlockKey) -> Point:
    if leaf == point.leaf or leaf in point.followers:
        return point
    return replace(point, followers=(*point.followers, leaf))
