"""Eviction policies: pure objects that order what may go. They know nothing of bytes, tiers or locks."""

from kvpool.policy.adaptive import AdaptivePolicy
from kvpool.policy.choice import ADAPTIVE, LRU, POLICIES, PolicyChoice
from kvpool.policy.demand import Demand
from kvpool.policy.lru import LruPolicy

__all__ = ["ADAPTIVE", "LRU", "POLICIES", "AdaptivePolicy", "Demand", "LruPolicy", "PolicyChoice"]
