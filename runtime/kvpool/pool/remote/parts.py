"""What only a pool with shared tiers has: made by `assembly`, and looked after by a thread of its own."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from kvpool.blocks.identity import Fingerprint
from kvpool.config import RuntimeConfig
from kvpool.pool.remote.connecting import Connector, RunsServer
from kvpool.pool.remote.erasing import Eraser
from kvpool.pool.remote.lookup import Lookup, LookupParts, Prompt, Sources
from kvpool.pool.remote.sender import Sender
from kvpool.pool.remote.share import Limit
from kvpool.pool.remote.store import RemoteStore
from kvpool.prefix.index import Pin, PrefixIndex
from kvpool.prefix.sending import Parcel, new_parcel, prompt_parcel, used_parcel
from kvpool.tiers.tier import TierName, TierUnavailableError, Usage

MAX_LOOKUPS = 64
"""At once; a request beyond that is served from what is here."""
ROUNDS_PER_TTL = 4
"""How often, within the time for which the shared tiers keep a block, one that is used here is offered to them."""
if TYPE_CHECKING:
    from kvpool.local import LocalServer
    from kvpool.pool.remote.prompts import PromptMemory
    from kvpool.pool.remote.reporter import Reporter

_log = logging.getLogger(__name__)


class Remote:
    """The shared tiers: their stores, what sends to them, and what looks prompts up there."""

    def __init__(
        self,
        index: PrefixIndex,
        lookups: LookupParts,
        senders: Sequence[Sender],
        connectors: Sequence[Connector],
        *,
        ttl_s: Callable[[], float],
        budget_s: Callable[[], float],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.senders = senders
        self.stores: Sequence[RemoteStore] = [sender.store for sender in senders]
        self.reporter: Reporter | None = None
        """Tells the catalog, where there is one; set before the pool is open."""
        self.prompts: PromptMemory | None = None
        """Remembers prompts by their vectors, where there is Qdrant; set before the pool is open."""
        self.eraser = Eraser(self.stores)
        self.round = 1
        """Goes up a few times within a TTL: see `kvpool.prefix.sending`."""
        self.skipped_lookups = 0
        """Requests that were not looked up, since too many were."""
        self._index = index
        self._lookups = lookups
        self._connectors = connectors
        self._ttl_s = ttl_s
        self._budget_s = budget_s
        self._clock = clock
        self._round_ends_s = clock() + ttl_s() / ROUNDS_PER_TTL
        self._returned = 0
        self._running: set[Lookup] = set()
        self._changed = threading.Condition()

    @property
    def usable(self) -> bool:
        """Whether any shared tier can be asked."""
        return any(store.usable for store in self.stores)

    @property
    def servers(self) -> list[LocalServer]:
        """Those that are ours to run, and were started."""
        found = [connector.server for connector in self._connectors if isinstance(connector, RunsServer)]
        return [server for server in found if server is not None]

    def store(self, name: TierName) -> RemoteStore | None:
        """The store of a tier; None where there is no such tier."""
        return next((store for store in self.stores if store.name is name), None)

    def send_new(self, pin: Pin, first: int, tier: TierName) -> None:
        """The pinned blocks from `first` on were stored in `tier` just now: send and report them. Never waits."""
        parcel = new_parcel(self._index, pin, first, self.round)
        if parcel is not None and self.reporter is not None:
            self.reporter.stored(parcel, tier)
        self._send(parcel, self.senders)

    def note_prompt(self, pin: Pin) -> None:
        """The pinned blocks are a prompt of which something was stored: remember it. Never waits."""
        if self.reporter is None and self.prompts is None:
            return
        parcel = prompt_parcel(self._index, pin)
        if parcel is not None and self.reporter is not None:
            self.reporter.asked(parcel)
        if parcel is not None and self.prompts is not None:
            self.prompts.asked(parcel)

    def send_again(self, pin: Pin) -> None:
        """The pinned blocks are used: once in a round, see that they are there still. Never waits."""
        parcel = used_parcel(self._index, pin, self.round)
        if parcel is not None and self.reporter is not None:
            self.reporter.used(parcel)
        self._send(parcel, self.senders)

    def promote(self, pin: Pin) -> None:
        """The pinned blocks were read from dragonfly or a slower tier: see that all are there, the first ones longest.

        Who read a prompt's end alone has made that live longer than its beginning. Never waits.
        """
        faster = [sender for sender in self.senders if sender.store.name is TierName.DRAGONFLY]
        if faster and faster[0].store.writable:
            self._send(used_parcel(self._index, pin, None), faster)

    @staticmethod
    def _send(parcel: Parcel | None, senders: Sequence[Sender]) -> None:
        if parcel is not None:
            for sender in senders:
                sender.send(parcel)

    def lookup(self, prompt: Prompt, sources: Sources, deadline_s: float, *, here: bool) -> Lookup | None:
        """Begin to look a prompt up, and note in `sources` what comes.

        None where no tier can be asked, or too many lookups are under way.
        `here`: the first question may be asked in this thread, if the deadline is no shorter than the tiers' budgets.
        """
        if not self.usable:
            return None
        lookup = Lookup(self._lookups, prompt, sources, finished=self._finished)
        with self._changed:
            if len(self._running) >= MAX_LOOKUPS:
                self.skipped_lookups += 1
                return None
            self._running.add(lookup)
        if here and deadline_s >= self._budget_s():
            lookup.start_here(deadline_s)
        else:
            lookup.start(deadline_s)
        return lookup

    def _finished(self, lookup: Lookup) -> None:
        with self._changed:
            self._running.discard(lookup)
            self._changed.notify_all()

    def chores(self) -> list[Callable[[], None]]:
        """In the order in which they run."""
        return [
            self.begin_round,
            self.connect,
            *(store.note_usage for store in self.stores),
            self.tend,
        ]

    def tend(self) -> None:
        """Have connectors do what is to be done from time to time, where their tier is in use."""
        for store, connector in zip(self.stores, self._connectors, strict=True):
            if store.usable:
                self._noting(store, connector.tend)()

    def connect(self) -> None:
        """Start servers of ours that do not run, all at once; then connect what is not, and probe what is out.

        In turn, the authority on epochs first: the others wait for it.
        """
        away = [
            (store, connector)
            for store, connector in zip(self.stores, self._connectors, strict=True)
            if not store.usable and (store.tier is not None or store.breaker.allows())
        ]
        starting = [
            threading.Thread(target=self._noting(store, connector.start), name="kvpool-start", daemon=True)
            for store, connector in away
        ]
        for thread in starting:
            thread.start()
        for thread in starting:
            thread.join()
        for store, connector in reversed(away):
            self._noting(store, partial(self._connect, store, connector))()
        for store in self.stores:
            store.let_changes_through()
        returned = sum(store.returned for store in self.stores)
        if returned != self._returned:  # what was used meanwhile did not go there
            self._returned = returned
            self.round += 1

    @staticmethod
    def _connect(store: RemoteStore, connector: Connector) -> None:
        if store.tier is None:
            store.publish(connector.connect())
        else:
            store.probe()

    @staticmethod
    def _noting(store: RemoteStore, act: Callable[[], None]) -> Callable[[], None]:
        """`act`, with what goes wrong noted in the store."""

        def noting() -> None:
            try:
                act()
            except TierUnavailableError as error:
                store.fell_out(error.reason)
            except Exception as error:  # the thread's top: a tier that cannot be connected must not end the others
                _log.exception("%s tier: connecting", store.name)
                store.fell_out(f"{type(error).__name__}: {error}")

        return noting

    def set_limits(self, limits: Mapping[TierName, Mapping[Fingerprint, Limit]]) -> None:
        """Replace what models may have in shared tiers."""
        for connector in self._connectors:
            connector.set_limits(limits.get(connector.name, {}))

    def shares(self) -> dict[TierName, Mapping[str, Usage]]:
        """What the models that have a limit hold in each shared tier, by name, and the limit."""
        return {connector.name: connector.shares() for connector in self._connectors}

    def reconfigure(self, config: RuntimeConfig) -> None:
        """Take over what of another configuration can change while the pool is open."""
        for connector in self._connectors:
            connector.reconfigure(config)

    def begin_round(self) -> None:
        """Begin another round if it is time."""
        now = self._clock()
        if now >= self._round_ends_s:
            self.round += 1
            self._round_ends_s = now + self._ttl_s() / ROUNDS_PER_TTL

    def flush(self, deadline_s: float | None) -> bool:
        """Wait until all that is to be sent was sent, or dropped; False at the deadline."""
        until = None if deadline_s is None else time.monotonic() + deadline_s
        return all(
            sender.flush(None if until is None else max(0.0, until - time.monotonic())) for sender in self.senders
        )

    def close(self, until_s: float) -> None:
        """End lookups, senders and connections; `until_s` is on `time.monotonic`.

        Connections are closed under what is in flight, so that nothing is written to memory that is given back.
        """
        with self._changed:
            for lookup in self._running:
                lookup.end()
        for sender in self.senders:
            sender.close(min(until_s, time.monotonic() + self._budget_s()))
        for store in self.stores:
            tier = store.withdraw("the pool is closed")
            if tier is not None:
                tier.close()
        for connector in self._connectors:
            connector.close()
        self._lookups.workers.shutdown(wait=False, cancel_futures=True)
        with self._changed:
            while self._running and (left := until_s - time.monotonic()) > 0:
                self._changed.wait(left)
