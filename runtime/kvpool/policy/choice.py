"""The eviction policies by name."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from kvpool.api import Eviction
from kvpool.policy.demand import Demand
from kvpool.policy.hit_density import HitDensityPolicy
from kvpool.policy.lru import LruPolicy
from kvpool.prefix.candidates import EvictionPolicy
from kvpool.prefix.learning import Learner


class PolicyChoice(NamedTuple):
    """How an index makes its policies: `make_policy` is given what `make_learner` has made for the model, if any."""

    make_policy: Callable[..., EvictionPolicy]
    make_learner: Callable[[], Learner] | None = None


LRU = PolicyChoice(LruPolicy)
HIT_DENSITY = PolicyChoice(HitDensityPolicy, Demand)

POLICIES: Mapping[str, PolicyChoice] = {Eviction.LRU.value: LRU, Eviction.HIT_DENSITY.value: HIT_DENSITY}
