"""The specification: pydantic models of `KVCachePool`, and the notations of Kubernetes. Imports no torch, no numpy."""

from kvpool.api.behaviour import Eviction, Granularity, SharingScope
from kvpool.api.codec import Codec
from kvpool.api.duration import Duration
from kvpool.api.models import PoolModel, Quota, Quotas, SharedTierQuota
from kvpool.api.operation import LogLevel, TokenSource, VolumePolicy
from kvpool.api.pool import API_VERSION, KIND, KVCachePool, PoolSpec, Profile
from kvpool.api.quantity import Notation, Quantity
from kvpool.api.serving import Serving
from kvpool.api.status import PoolStatus
from kvpool.api.tiers import Tiers

__all__ = [
    "API_VERSION",
    "KIND",
    "Codec",
    "Duration",
    "Eviction",
    "Granularity",
    "KVCachePool",
    "LogLevel",
    "Notation",
    "PoolModel",
    "PoolSpec",
    "PoolStatus",
    "Profile",
    "Quantity",
    "Quota",
    "Quotas",
    "Serving",
    "SharedTierQuota",
    "SharingScope",
    "Tiers",
    "TokenSource",
    "VolumePolicy",
]
