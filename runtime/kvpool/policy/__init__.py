"""Eviction policies: pure objects that order what may go. They know nothing of bytes, tiers or locks."""

from kvpool.policy.choice import HIT_DENSITY, LRU, POLICIES, PolicyChoice
from kvpool.policy.demand import Demand
from kvpool.policy.hit_density import HitDensityPolicy
from kvpool.policy.lru import LruPolicy

__all__ = ["HIT_DENSITY", "LRU", "POLICIES", "Demand", "HitDensityPolicy", "LruPolicy", "PolicyChoice"]
