"""The dragonfly tier: sealed records in a server of the Redis protocol, for so long, shared between processes.

Nothing is written without a TTL. A TTL is only ever made longer, and of a chain's blocks the last is kept longer first
and the first last, so that no block outlives one that it needs: on one server to the millisecond, in a cluster to the
duration of a call. (Redis before 7 cannot make a TTL longer only: there, pools with other TTLs cut each other's short.)

Memory: records are read straight into the caller's buffers and written straight from them; 64 KiB per connection.
Threads: any number call at once; a call has a connection of its own (in a cluster, one per node). A call that times out
closes its connection before it returns. Limits: `connections` to each server; `batch_size` requests, and 4 MiB of
records, of a call are in flight at once. Names of hosts are looked up by the system, which has time limits of its own.
"""

from collections.abc import Callable, Sequence
from contextlib import closing
from itertools import islice
from typing import TypeGuard

from kvpool.blocks.identity import BlockKey, Fingerprint, TenantDigest, TreeId
from kvpool.blocks.layout import PAGE_BYTES
from kvpool.blocks.record import Buffer
from kvpool.config.service import ServiceAddress
from kvpool.tiers.dragonfly import commands
from kvpool.tiers.dragonfly.commands import Answer, Command, ServerError
from kvpool.tiers.dragonfly.epochs import highest_epoch, note_epoch
from kvpool.tiers.dragonfly.faults import BusyError, FaultError
from kvpool.tiers.dragonfly.names import Names, Parts, is_of_model, model_pattern, tenant_pattern
from kvpool.tiers.dragonfly.patience import Patience
from kvpool.tiers.dragonfly.server_info import ServerInfo, info_of_all
from kvpool.tiers.dragonfly.servers import Answers, Call, Servers
from kvpool.tiers.dragonfly.sweeping import sweep
from kvpool.tiers.tier import Found, Inquiry, Moved, Sealed, TierBusyError, TierName, TierUnavailableError, Usage

MIN_RECORD_BYTES = 2 * PAGE_BYTES
MAX_RECORD_BYTES = 512 << 20
"""No server of this protocol holds longer values."""
PIECE_BYTES = 512 << 10
"""Longer records are read in such pieces: a server copies out what is read at once, into memory that it has to touch
anew. Measured against Redis 8.2, reading in pieces gave 1.5 times as much of 2 MiB records, and 2.5 times of 8 MiB."""


class DragonflyTier:
    """Holds sealed records; implements `KeyedTier`. `ttl_s`, `batch_size` and `budget_s` may be changed at any time.

    `address` is called for each new connection, from any thread. `tls`: also where the url does not say `rediss`.
    A block is kept longer in every codec that this tier was ever asked for or given. Where a user may read and not
    write, records come and are not kept longer. In a cluster, what lies on a node that fails is absent, or not done;
    the others are used.
    """

    name = TierName.DRAGONFLY

    def __init__(
        self, address: Callable[[], ServiceAddress], *, ttl_s: float, connections: int, batch_size: int,
        budget_s: float, tls: bool,
    ) -> None:  # fmt: skip
        self.ttl_s = ttl_s
        """For how long what is written or read is kept from then on."""
        self.batch_size = batch_size
        """Requests of a call that are in flight at once, at most."""
        self.budget_s = budget_s
        """For how long a call waits without any progress."""
        self._servers = Servers(address, tls=tls, connections=connections)
        self._codecs: frozenset[int] = frozenset()
        self._keep = commands.keep_longer

    def find(self, tree: TreeId, keys: Sequence[BlockKey], codecs: Sequence[int]) -> list[Found | None]:
        """As `KeyedTier` says."""
        with closing(self.inquire(tree, keys, codecs)) as inquiry:
            return inquiry.answer()

    def inquire(self, tree: TreeId, keys: Sequence[BlockKey], codecs: Sequence[int]) -> Inquiry:
        """As `KeyedTier` says."""
        self._know(codecs)
        names = Names(tree)
        questions = [commands.length_of(name) for name in names.of_all(keys, codecs)]
        with _FAULTS_ARE_OUTAGES:
            return _Lengths(self._servers.begin(questions, self._patience(), self.batch_size), keys, codecs)

    def get(self, tree: TreeId, wanted: Sequence[Found], into: Sequence[Buffer]) -> Moved:
        """As `KeyedTier` says."""
        self._know([found.codec for found in wanted])
        names = Names(tree)
        reads = [
            _reads(names.of(found.key, found.codec), _room_for(found, buffer))
            for found, buffer in zip(wanted, into, strict=True)
        ]
        kept = self._every(names, [found.key for found in wanted])
        answers = self._ask([command for each in reads for command in each], kept, self._patience())
        arrived = iter(answers.each)
        done = [list(islice(arrived, len(each))).count(True) == len(each) for each in reads]
        return _moved(done, answers)

    def put(self, tree: TreeId, records: Sequence[Sealed], ancestors: Sequence[BlockKey]) -> Moved:
        """As `KeyedTier` says."""
        self._know([sealed.codec for sealed in records])
        names = Names(tree)
        named = [names.of(sealed.key, sealed.codec) for sealed in records]
        views = [_bytes_of(sealed.record) for sealed in records]
        patience = self._patience()
        lengths = self._lengths(named, patience)
        done = [length == len(view) for length, view in zip(lengths, views, strict=True)]
        absent = [at for at, is_there in enumerate(done) if not is_there]
        writes = [commands.write(named[at], views[at], self._ttl_ms) for at in absent]
        kept = self._every(names, [*ancestors, *(sealed.key for sealed in records)])
        answers = self._ask(writes, kept, patience)
        for at, answer in zip(absent, answers.each, strict=False):
            done[at] = answer == b"OK"
        return _moved(done, answers)

    def touch(self, tree: TreeId, keys: Sequence[BlockKey], codecs: Sequence[int]) -> None:
        """As `KeyedTier` says."""
        self._know(codecs)
        names = Names(tree)
        _check(self._ask_to_keep(names.of_all(keys, codecs), self._patience()))

    def drop(self, tree: TreeId, found: Sequence[Found]) -> None:
        """As `KeyedTier` says."""
        names = Names(tree)
        removals = [commands.remove(names.of(key, codec)) for key, codec, _ in found]
        _check(self._ask(removals, [], self._patience()))

    def erase(self, tenant: TenantDigest, before_epoch: int) -> int:
        """As `KeyedTier` says. What a process that does not know of it yet writes meanwhile goes with its TTL."""
        return self._sweep(tenant_pattern(tenant), lambda parts: parts.epoch < before_epoch)

    def forget_model(self, fingerprint: Fingerprint) -> int:
        """As `KeyedTier` says. A model is known by the first 8 bytes of its fingerprint here."""
        return self._sweep(model_pattern(fingerprint), lambda parts: is_of_model(parts, fingerprint))

    def epoch_hint(self, tenant: TenantDigest) -> int | None:
        """The highest epoch that anybody noted here for a tenant; None: not known. Raises `TierUnavailableError`."""
        with _FAULTS_ARE_OUTAGES:
            return highest_epoch(self._servers, tenant, self._patience())

    def note_epoch(self, tenant: TenantDigest, epoch: int) -> None:
        """Note a tenant's epoch, for 30 days; a lower one changes nothing. Raises `TierUnavailableError`."""
        with _FAULTS_ARE_OUTAGES:
            note_epoch(self._servers, tenant, epoch, self._patience())

    def info(self) -> ServerInfo:
        """What the server says of itself; memory is that of all nodes together. Raises `TierUnavailableError`."""
        with _FAULTS_ARE_OUTAGES:
            return info_of_all(self._servers, self._patience())

    def usage(self) -> Usage:
        """As `KeyedTier` says: all of the server's memory, whoever it is used for; zeros where we may not know."""
        info = self.info()
        return Usage(info.used_bytes, info.max_bytes)

    def close(self) -> None:
        """As `KeyedTier` says. Calling it again does nothing."""
        self._servers.close()

    @property
    def _ttl_ms(self) -> int:
        return max(int(self.ttl_s * 1000), 1)

    def _patience(self) -> Patience:
        return Patience(self.budget_s)

    def _know(self, codecs: Sequence[int]) -> None:
        if not self._codecs.issuperset(codecs):
            self._codecs = self._codecs.union(codecs)

    def _every(self, names: Names, keys: Sequence[BlockKey]) -> list[bytes]:
        """The keys of all records that there may be of these blocks."""
        codecs = sorted(self._codecs)
        return names.of_all(keys, codecs)

    def _lengths(self, named: Sequence[bytes], patience: Patience) -> list[Answer]:
        answers = self._ask([commands.length_of(name) for name in named], [], patience)
        _check(answers)
        return answers.each

    def _ask(self, requests: list[Command], kept: Sequence[bytes], patience: Patience) -> Answers:
        """Ask, then keep `kept` as if written now; the answers to the requests."""
        answers = self._answers(requests + self._keeps(kept), patience)
        if any(map(_is_unknown, answers.each[len(requests) :])):
            self._ask_to_keep(kept, patience)
        del answers.each[len(requests) :]
        return answers

    def _ask_to_keep(self, kept: Sequence[bytes], patience: Patience) -> Answers:
        """Keep these records as if written now. A server that does not know `GT` is asked without from now on."""
        answers = self._answers(self._keeps(kept), patience)
        if self._keep is commands.keep_longer and any(map(_is_unknown, answers.each)):
            self._keep = commands.keep
            answers = self._answers(self._keeps(kept), patience)
        return answers

    def _answers(self, requests: list[Command], patience: Patience) -> Answers:
        with _FAULTS_ARE_OUTAGES:
            return self._servers.ask(requests, patience, self.batch_size)

    def _keeps(self, kept: Sequence[bytes]) -> list[Command]:
        """What keeps these records as if written now, the last of them first."""
        keep, ttl_ms = self._keep, self._ttl_ms
        return [keep(name, ttl_ms) for name in reversed(kept)]

    def _sweep(self, pattern: bytes, is_doomed: Callable[[Parts], bool]) -> int:
        with _FAULTS_ARE_OUTAGES:
            return sweep(self._servers, pattern, is_doomed, self._patience, self.batch_size)


class _Lengths:
    """An inquiry for the lengths of all values that there may be of some blocks."""

    def __init__(self, call: Call, keys: Sequence[BlockKey], codecs: Sequence[int]) -> None:
        self._call, self._keys, self._codecs = call, keys, codecs

    def answer(self) -> list[Found | None]:
        """As `Inquiry` says."""
        with _FAULTS_ARE_OUTAGES:
            answers = self._call.answers()
        _check(answers)
        if not any(answers.each):
            return [None] * len(self._keys)
        lengths = iter(answers.each)
        return [_first(key, [(codec, next(lengths)) for codec in self._codecs]) for key in self._keys]

    def close(self) -> None:
        """As `Inquiry` says."""
        self._call.close()


def _is_unknown(answer: Answer) -> bool:
    """Whether a server does not know a command, or not this form of it."""
    return isinstance(answer, ServerError) and answer.code == "ERR"


def _bytes_of(record: Buffer) -> memoryview:
    return memoryview(record).cast("B")


def _room_for(found: Found, buffer: Buffer) -> memoryview:
    """The bytes of a buffer, which must be as many as the record's."""
    view = _bytes_of(buffer)
    if len(view) != found.record_bytes or view.readonly:
        raise ValueError(f"a buffer for {found.record_bytes} bytes has {len(view)}, or cannot be written")
    return view


def _reads(name: bytes, into: memoryview) -> list[Command]:
    """What asks for a record, piece after piece. A value that is longer, or shorter, shows in the last."""
    last = (len(into) - 1) // PIECE_BYTES * PIECE_BYTES
    pieces = [
        commands.read_piece(name, start, into[start : start + PIECE_BYTES]) for start in range(0, last, PIECE_BYTES)
    ]
    return [*pieces, commands.read_end(name, last, into[last:])]


def _first(key: BlockKey, lengths: Sequence[tuple[int, Answer]]) -> Found | None:
    """The first codec under which there is what can be a record."""
    for codec, length in lengths:
        if _may_be_a_record(length):
            return Found(key, codec, length)
    return None


def _may_be_a_record(length: Answer) -> TypeGuard[int]:
    return isinstance(length, int) and MIN_RECORD_BYTES <= length <= MAX_RECORD_BYTES and not length % PAGE_BYTES


def _refusal(answers: Answers) -> str:
    """What the first of the keys that were refused was refused with, unless it is that something else is there."""
    refusals = (a.text for a in answers.each if isinstance(a, ServerError) and a.code != "WRONGTYPE")
    return next(refusals, "")


def _outage(answers: Answers) -> TierUnavailableError:
    is_busy = answers.busy == len(answers.faults)
    return (TierBusyError if is_busy else TierUnavailableError)(TierName.DRAGONFLY, answers.fault)


def _check(answers: Answers) -> None:
    """Raise `TierUnavailableError` where no server answered, or all that was asked for was refused."""
    if answers.nobody_answered:
        raise _outage(answers)
    if ServerError not in map(type, answers.each):
        return
    refusal = _refusal(answers)
    if refusal and all(isinstance(answer, ServerError) for answer in answers.each):
        raise TierUnavailableError(TierName.DRAGONFLY, refusal)


def _moved(done: list[bool], answers: Answers) -> Moved:
    if answers.faults and not any(done):
        raise _outage(answers)
    return Moved(done, answers.fault or _refusal(answers))


class _FaultsAreOutages:
    """A context in which they are. One serves all, since to make one for each call takes longer than to enter it."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, fault: BaseException | None, traceback: object) -> None:
        if isinstance(fault, BusyError):
            raise TierBusyError(TierName.DRAGONFLY, str(fault)) from None
        if isinstance(fault, FaultError):
            raise TierUnavailableError(TierName.DRAGONFLY, str(fault)) from None


_FAULTS_ARE_OUTAGES = _FaultsAreOutages()
