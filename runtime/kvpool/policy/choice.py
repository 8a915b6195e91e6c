"""The eviction policies by name."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from kvpool.api import Eviction
from kvpool.policy.adaptive import AdaptivePolicy
from kvpool.policy.demand import Demand
from kvpool.policy.lru import LruPolicy
from kvpool.prefix.candidates import EvictionPolicy
from kvpool.prefix.learning import Learner


class PolicyChoice(NamedTuple):
    """How an index makes its policies.

    `make_learner` makes what learns of one model, given how many copies each level holds: a list that is kept up to
    date. Where there is one, `make_policy` is given what it made, and the level.
    """

    make_policy: Callable[..., EvictionPolicy]
    make_learner: Callable[[Sequence[int]], Learner] | None = None


LRU = PolicyChoice(LruPolicy)
ADAPTIVE = PolicyChoice(AdaptivePolicy, Demand)

POLICIES: Mapping[str, PolicyChoice] = {Eviction.LRU.value: LRU, Eviction.ADAPTIVE.value: ADAPTIVE}
