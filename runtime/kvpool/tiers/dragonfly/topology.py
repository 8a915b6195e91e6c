"""Which node of a cluster has which key, as `CLUSTER SLOTS` says."""

from collections.abc import Sequence
from typing import NamedTuple

from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot

from kvpool.tiers.dragonfly.commands import Answer, ServerError, plain
from kvpool.tiers.dragonfly.opening import Node

ASK_FOR_SLOTS = plain(b"", b"CLUSTER", b"SLOTS")
ASKING = plain(b"", b"ASKING")
"""Goes before a request that an `ASK` sent us to a node with."""
MAX_NODES = 1000
_PORTS = range(1, 1 << 16)


class Topology(NamedTuple):
    """The masters of a cluster. `node` None is the service's address itself: all there is where there is no cluster."""

    masters: Sequence[Node | None] = (None,)
    by_slot: Sequence[int] = ()
    """Per slot the index in `masters`; empty where there is but one."""

    @property
    def is_cluster(self) -> bool:
        """Whether keys have to be asked for at different nodes."""
        return len(self.masters) > 1

    def owner(self, name: bytes) -> Node | None:
        """The node that has, or would have, this key."""
        return self.masters[self.by_slot[key_slot(name)]] if self.by_slot else self.masters[0]


def topology_of(answer: Answer, host: str) -> Topology:
    """What `CLUSTER SLOTS` answered at `host`, which is meant where a node does not know its own name.

    An error is the answer of a server that is no cluster, or does not tell us: then there is one node. Where all slots
    lie on one master it is asked by the service's address too: what it calls itself may mean nothing out here.
    """
    if not isinstance(answer, list):
        return Topology()
    masters: dict[Node, int] = {}
    by_slot = [0] * REDIS_CLUSTER_HASH_SLOTS
    for row in answer:
        match row:
            case [int(first), int(last), [name, int(port), *_], *_] if port in _PORTS:
                named = name.decode(errors="replace") if isinstance(name, bytes) else ""
                node = Node(named or host, port)
                index = masters.setdefault(node, len(masters))
                if 0 <= first <= last < len(by_slot) and len(masters) <= MAX_NODES:
                    by_slot[first : last + 1] = [index] * (last + 1 - first)
    if len(masters) < 2:
        return Topology()
    return Topology(tuple(masters), tuple(by_slot))


def elsewhere(answer: ServerError) -> Node | None:
    """The node that a `MOVED` or an `ASK` names; None where it names none."""
    host, _, port = answer.text.split(" ")[-1].rpartition(":")
    is_port = port.isdigit() and len(port) <= len(str(_PORTS.stop)) and int(port) in _PORTS
    return Node(host, int(port)) if host and is_port else None
