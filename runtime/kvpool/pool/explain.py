"""Says of each block of a prompt where it is, or why it was a miss. Reads only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from kvpool.blocks.identity import BlockKey, Fingerprint, ModelIdentity, TreeId
from kvpool.pool.engine import Tenants
from kvpool.pool.remote.store import RemoteStore
from kvpool.pool.results import BlockReport, Verdict
from kvpool.pool.ssd_store import SsdStore
from kvpool.prefix.history import Fate, Loss
from kvpool.prefix.index import LEVEL_NAMES, PrefixIndex
from kvpool.prefix.looking import levels_of
from kvpool.prefix.node import SSD
from kvpool.prefix.tree import Extras
from kvpool.tiers.tier import TierName, TierUnavailableError

if TYPE_CHECKING:
    from kvpool.catalog.trail import Eviction

_WHY = {
    Loss.EVICTED: (Verdict.EVICTED, "evicted from {tier} by the policy"),
    Loss.ORPHANED: (Verdict.ORPHANED, "went from {tier} with a block before it, without which it cannot be matched"),
    Loss.CORRUPT: (Verdict.CORRUPT, "its record on {tier} was damaged, and was dropped"),
    Loss.SEGMENT_FREED: (Verdict.SSD_SEGMENT_FREED, "its {tier} segment was freed to make room"),
    Loss.REFUSED: (Verdict.REFUSED, "not stored: no room in {tier}, everything there was leased"),
    Loss.INDEX_FULL: (Verdict.INDEX_FULL, "forgotten, since the prefix index reached ram.indexBytes"),
    Loss.ERASED: (Verdict.ERASED, "its tenant was erased"),
    Loss.UNREGISTERED: (Verdict.UNREGISTERED, "its model was unregistered"),
    Loss.OVER_QUOTA: (Verdict.OVER_QUOTA, "its model was over its quota in {tier}"),
    Loss.TIER_OUT: (Verdict.TIER_DOWN, "its only copy was in {tier}, which fell out"),
}


class Explainer:
    """Answers `Model.explain`. `models` are the identities that this pool knows."""

    def __init__(
        self,
        index: PrefixIndex,
        tenants: Tenants,
        store: SsdStore,
        models: Callable[[], Iterable[ModelIdentity]],
        shared: Sequence[RemoteStore] = (),
        readable: Callable[[Fingerprint], Iterable[int]] = lambda _: (),
        trail: Callable[[Sequence[BlockKey]], Mapping[BlockKey, Eviction]] | None = None,
    ) -> None:
        self._trail = trail
        self._index = index
        self._tenants = tenants
        self._store = store
        self._models = models
        self._shared = shared
        self._readable = readable

    def explain(self, identity: ModelIdentity, tokens: bytes, tenant: str, extras: Extras | None) -> list[BlockReport]:
        """One report for each whole block of `tokens`. Shared tiers are asked for those that are not here."""
        tree_id = self._tenants.tree_id(identity.fingerprint, tenant)
        keys = self._tenants.chain(tree_id).keys(tokens, identity.layout.token_bytes, extras)
        levels = self._levels(tree_id, tokens, extras, len(keys))
        here = [bool(held) and (held != [SSD] or self._store.readable) for held in levels]
        elsewhere = self._held_elsewhere(tree_id, keys, here)
        reachable = [bool(found) or is_here for found, is_here in zip(elsewhere, here, strict=True)]
        first_hole = reachable.index(False) if False in reachable else len(levels)
        erased = self._keys_before_erasure(identity, tree_id, tokens, extras)
        gone = self._gone_elsewhere([key for key, found in zip(keys, reachable, strict=True) if not found])
        others = self._held_by_others(identity, tenant, tokens, extras, len(keys)) if first_hole < len(keys) else {}
        reports = []
        for index, (key, held) in enumerate(zip(keys, levels, strict=True)):
            tiers = _in_order(*(TierName(LEVEL_NAMES[level]) for level in held), *elsewhere[index])
            if held or elsewhere[index]:
                verdict, at_s, detail = self._held(index, held, elsewhere[index], tiers, first_hole)
            else:
                fate = self._index.history.fate(key) or (self._index.history.fate(erased[index]) if erased else None)
                verdict, at_s, detail = self._lost(fate, others.get(index), tree_id.epoch)
                detail += gone.get(key, "") + self._unasked()
            reports.append(BlockReport(index, key, tiers, verdict, at_s, detail))
        return reports

    def _levels(self, tree_id: TreeId, tokens: bytes, extras: Extras | None, total: int) -> list[list[int]]:
        tree = self._index.tree(tree_id)
        return [[] for _ in range(total)] if tree is None else levels_of(self._index, tree, tokens, extras)

    def _held_elsewhere(
        self, tree_id: TreeId, keys: Sequence[BlockKey], here: Sequence[bool]
    ) -> list[tuple[TierName, ...]]:
        """The shared tiers that have each block which is not here."""
        asked = [at for at, is_here in enumerate(here) if not is_here]
        found: list[tuple[TierName, ...]] = [()] * len(keys)
        for store in self._shared if asked else ():
            codecs = sorted(self._readable(tree_id.fingerprint))
            answer = store.find(tree_id, [keys[at] for at in asked], codecs)
            for at, block in zip(asked, answer, strict=True):
                if block is not None:
                    found[at] += (store.name,)
        return found

    def _gone_elsewhere(self, keys: Sequence[BlockKey]) -> Mapping[BlockKey, str]:
        """What the catalog says of how these blocks went from other nodes and shared tiers, as far as it answers."""
        if self._trail is None or not keys:
            return {}
        try:
            found = self._trail(keys)
        except TierUnavailableError as error:
            return dict.fromkeys(keys, f"; the catalog, which may know more, does not answer ({error.reason})")
        return {
            key: f"; went last from {eviction.tier} of {eviction.node} at {_time(eviction.at_s)} ({eviction.reason})"
            for key, eviction in found.items()
        }

    def _unasked(self) -> str:
        """What is to be said of shared tiers that could not be asked."""
        out = [
            f"{store.name} is out and may have it ({store.last_error})" for store in self._shared if not store.usable
        ]
        return "".join(f"; {sentence}" for sentence in out)

    def _held(
        self, index: int, held: list[int], elsewhere: Sequence[TierName], tiers: tuple[TierName, ...], first_hole: int
    ) -> tuple[Verdict, float | None, str]:
        where = " and ".join(tiers)
        if held == [SSD] and not elsewhere and not self._store.readable:
            return Verdict.TIER_DOWN, None, f"in {where} only, which is out: {self._store.last_error}"
        if index > first_hole:
            return Verdict.UNREACHABLE, None, f"in {where}, but block {first_hole} before it cannot be had"
        if not held:
            return Verdict.HELD, None, f"in {where}, which is asked by Lease.wait and not by a match"
        return Verdict.HELD, None, f"in {where}"

    def _lost(self, fate: Fate | None, other: str | None, epoch: int) -> tuple[Verdict, float | None, str]:
        if fate is not None:
            verdict, why = _WHY[fate.loss]
            return verdict, fate.at_s, f"{why.format(tier=fate.tier)} at {_time(fate.at_s)}"
        if other is not None:
            return Verdict.OTHER_FINGERPRINT, None, f"never stored for these weights; held for {other}"
        since = self._index.history.complete_since_s
        erased = f", or erased with its tenant (epoch {epoch})" if epoch else ""
        if since is None:
            return Verdict.NEVER_STORED, None, f"never stored{erased}"
        return Verdict.UNKNOWN, None, f"not stored since {_time(since)}, and not known from before{erased}"

    def _keys_before_erasure(
        self, identity: ModelIdentity, tree_id: TreeId, tokens: bytes, extras: Extras | None
    ) -> list[BlockKey]:
        """The keys that these blocks had before their tenant was erased last; none if it never was."""
        if not tree_id.epoch:
            return []
        before = self._tenants.chain(tree_id._replace(epoch=tree_id.epoch - 1))
        return before.keys(tokens, identity.layout.token_bytes, extras)

    def _held_by_others(
        self, identity: ModelIdentity, tenant: str, tokens: bytes, extras: Extras | None, total: int
    ) -> dict[int, str]:
        """For blocks that another model of this name holds: which one that is."""
        found: dict[int, str] = {}
        for other in self._models():
            alike = other.layout.block_tokens == identity.layout.block_tokens
            if other.name != identity.name or other.fingerprint == identity.fingerprint or not alike:
                continue
            tree_id = self._tenants.tree_id(other.fingerprint, tenant)
            for index, held in enumerate(self._levels(tree_id, tokens, extras, total)):
                if held:
                    found.setdefault(index, _difference(identity, other))
        return found


def _in_order(*tiers: TierName) -> tuple[TierName, ...]:
    """Fastest first."""
    return tuple(tier for tier in TierName if tier in tiers)


def _difference(ours: ModelIdentity, theirs: ModelIdentity) -> str:
    names = [name for name in ours.__slots__ if name != "fingerprint" and getattr(ours, name) != getattr(theirs, name)]
    return f"fingerprint {theirs.fingerprint.hex()[:12]}, which differs in {', '.join(names)}"


def _time(at_s: float) -> str:
    return datetime.fromtimestamp(at_s, UTC).isoformat(timespec="seconds")
