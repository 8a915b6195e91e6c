"""Plays a trace through the real prefix index and an eviction policy, without payloads: a block is one token long.

Each request matches, then stores what was not there, as an engine does: the prompt stays leased meanwhile, and victims
are taken in the policy's order. Protection of shared prefixes is off, so that the figure is the policy's own.
"""

import time
from itertools import count, islice

from kvpool.blocks.identity import SECRET_BYTES, Fingerprint, KeyChain, TenantDigest, TreeId
from kvpool.policy import LRU, PolicyChoice
from kvpool.prefix.index import BATCH_BLOCKS, Pin, PrefixIndex, SharingRules
from kvpool.prefix.node import RAM
from kvpool.prefix.tree import PrefixTree
from kvpool.replay.outcome import Outcome
from kvpool.replay.trace import Blocks, Trace

TOKEN_BYTES = 4
_NO_LIMIT_BYTES = 1 << 62


class IndexReplay:
    """One tree in an index that holds at most `capacity_blocks` blocks in RAM."""

    def __init__(self, capacity_blocks: int, policy: PolicyChoice = LRU) -> None:
        self.capacity_blocks = capacity_blocks
        self.index = PrefixIndex(
            limit_bytes=_NO_LIMIT_BYTES,
            make_policy=policy.make_policy,
            make_learner=policy.make_learner,
            sharing=SharingRules(protect=False),
        )
        self._tree = self.index.add_tree(_one_token_tree())
        self._places = count()

    def request(self, blocks: Blocks) -> int:
        """Match and store one request's blocks; return how many were there."""
        tokens = blocks.tobytes()
        pin = self.index.match(self._tree, tokens, asked=len(blocks))
        hits = pin.depth
        while pin.depth < len(blocks) and self._store_some(pin, tokens, len(blocks)):
            pass
        self.index.unpin(pin)
        self.index.learn(self._tree.account)
        return hits

    def _store_some(self, pin: Pin, tokens: bytes, total: int) -> bool:
        """Store the next blocks after the pin; False when everything else is leased, so that there is no room."""
        room = self._make_room(min(BATCH_BLOCKS, total - pin.depth))
        self.index.attach(pin, tokens, RAM, list(islice(self._places, room)))
        return room > 0

    def _make_room(self, wanted: int) -> int:
        """How many of the blocks wanted find room, after the eviction of others."""
        index = self.index
        while (room := self.capacity_blocks - index.copies[RAM]) < wanted:
            if not index.evict(RAM, wanted - room):
                return room
        return wanted


def play(trace: Trace, capacity_blocks: int, policy: PolicyChoice) -> Outcome:
    """Play a whole trace from an empty index on."""
    replay = IndexReplay(capacity_blocks, policy)
    began_s = time.perf_counter()
    hits = sum(map(replay.request, trace))
    return Outcome(len(trace), sum(map(len, trace)), hits, time.perf_counter() - began_s)


def _one_token_tree() -> PrefixTree:
    identity = TreeId(Fingerprint(bytes(32)), TenantDigest(bytes(16)), 0)
    chain = KeyChain(bytes(SECRET_BYTES), identity.fingerprint, identity.tenant, identity.epoch)
    return PrefixTree(identity, token_bytes=TOKEN_BYTES, record_bytes=1, chain=chain)
