"""The dragonfly tier over loopback TCP, beside a copy between two processes, and beside a bare socket to its server."""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter

from kvpool.bench.area import Conditions, UnmeasurableError
from kvpool.bench.loopback import Loopback
from kvpool.bench.probes import touched
from kvpool.bench.rounds import beside, bytes_per_second, seconds_per_call
from kvpool.bench.row import Row, Target, at_least, ratio_at_least, ratio_at_most
from kvpool.blocks.identity import BlockKey, Fingerprint, TenantDigest, TreeId
from kvpool.blocks.layout import PAGE_BYTES
from kvpool.config.service import ServiceAddress, read_service
from kvpool.local import LocalServerError, local_redis
from kvpool.tiers.dragonfly.commands import Answer, Command, encoded, plain, write
from kvpool.tiers.dragonfly.exchange import Exchange
from kvpool.tiers.dragonfly.opening import SCHEMES, Opener
from kvpool.tiers.dragonfly.patience import Patience
from kvpool.tiers.dragonfly.tier import DragonflyTier
from kvpool.tiers.dragonfly.wire import Wire
from kvpool.tiers.tier import Found, Sealed

KIB, MIB = 1 << 10, 1 << 20
SERVER_BYTES = 512 * MIB
BUDGET_S, TTL_S = 10.0, 600.0
BATCH = 200
"""The default `batchSize`."""
CALLS, SMALL_CALLS, FOUND_KEYS = 2_000, 20_000, 256
SMALL_BYTES = 100
_NAME = b"kvpool:1:bench:" + b"n" * 80
_TREE = TreeId(Fingerprint(bytes(32)), TenantDigest(bytes(16)), 0)
_GIB_PER_BYTE = 1 / (1 << 30)

SIZES: tuple[tuple[int, int, str, Target | None, Target | None], ...] = (
    (64 * KIB, 256, "256x64KiB", None, None),
    (256 * KIB, 64, "64x256KiB", ratio_at_least(0.5), ratio_at_least(0.3)),
    (2 * MIB, 32, "32x2MiB", ratio_at_least(0.5), ratio_at_least(0.3)),
    (8 * MIB, 8, "8x8MiB", None, None),
    (20 * MIB, 3, "3x20MiB", None, None),
)
"""Payload, blocks of a call, the rows' name, targets of reading and of writing."""


def run(conditions: Conditions) -> Iterator[Row]:
    """Rows of `dragonfly`."""
    with _service(conditions.directory) as address:
        tier = DragonflyTier(
            lambda: address, ttl_s=TTL_S, connections=2, batch_size=BATCH, budget_s=BUDGET_S, tls=False
        )
        with closing(tier):
            for payload_bytes, blocks, name, reading, writing in SIZES:
                moving = _Moving(tier, payload_bytes, conditions.scaled(blocks))
                yield from _moves(moving, name, reading, writing, conditions)
            yield from _lookups(tier, address, conditions)
        yield from _small(address, conditions)


@contextmanager
def _service(directory: Path) -> Iterator[ServiceAddress]:
    """A server of this machine's own that listens on the loopback, as one that is shared does."""
    try:
        server = local_redis(directory, memory_bytes=SERVER_BYTES)
        server.start()
    except LocalServerError as error:
        raise UnmeasurableError(str(error)) from error
    try:
        address = read_service(server.folder, schemes=SCHEMES)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        listen = plain(b"", b"CONFIG", b"SET", b"bind", b"127.0.0.1", b"port", b"%d" % port)
        with _wire(address) as wire:
            [answer] = _asked(wire, [listen])
        if answer != b"OK":
            raise UnmeasurableError(f"the server does not listen where it is told to: {answer!r}")
        yield replace(address, url=f"redis://127.0.0.1:{port}")
    finally:
        server.stop()


@contextmanager
def _wire(address: ServiceAddress) -> Iterator[Wire]:
    wire = Opener(lambda: address, tls=False).open(None, Patience(BUDGET_S))
    try:
        yield wire
    finally:
        wire.close()


# --- records ---------------------------------------------------------------------------------------------------------


class _Moving:
    """Puts and gets the same blocks of noise, all in one call."""

    def __init__(self, tier: DragonflyTier, payload_bytes: int, blocks: int) -> None:
        record_bytes = payload_bytes + PAGE_BYTES
        self.nbytes = record_bytes * blocks
        self._tier = tier
        keys = [BlockKey(os.urandom(16)) for _ in range(blocks)]
        records = touched(self.nbytes).reshape(blocks, record_bytes)
        self._sealed = [Sealed(key, 0, record) for key, record in zip(keys, records, strict=True)]
        self._found = [Found(key, 0, record_bytes) for key in keys]
        self._into = list(touched(self.nbytes).reshape(blocks, record_bytes))

    def remove(self) -> None:
        """So that the next `put` has to write."""
        self._tier.drop(_TREE, self._found)

    def put(self) -> None:
        """Store them all."""
        if not all(self._tier.put(_TREE, self._sealed, []).done):
            raise UnmeasurableError("the server did not take all records")

    def get(self) -> None:
        """Read them all."""
        if not all(self._tier.get(_TREE, self._found, self._into).done):
            raise UnmeasurableError("the server lost a record")

    def written_per_second(self) -> float:
        """Bytes; only the writing is timed."""
        self.remove()
        began_s = perf_counter()
        self.put()
        return self.nbytes / (perf_counter() - began_s)


def _moves(
    moving: _Moving, name: str, reading: Target | None, writing: Target | None, conditions: Conditions
) -> Iterator[Row]:
    with Loopback(moving.nbytes) as loopback:
        written = beside(
            moving.written_per_second, bytes_per_second(loopback.send, moving.nbytes), conditions.rounds
        ).in_unit(_GIB_PER_BYTE)
        read = beside(
            bytes_per_second(moving.get, moving.nbytes), bytes_per_second(loopback.receive, moving.nbytes),
            conditions.rounds,
        ).in_unit(_GIB_PER_BYTE)  # fmt: skip
    moving.remove()
    yield Row(f"dragonfly.get.{name}", "GiB/s", read, reading)
    yield Row(f"dragonfly.put.{name}", "GiB/s", written, writing)


def _lookups(tier: DragonflyTier, address: ServiceAddress, conditions: Conditions) -> Iterator[Row]:
    """Asking for blocks that are not there, as a prompt that nobody has seen does."""
    calls = conditions.scaled(CALLS // 10, least=5)
    for keys in (1, FOUND_KEYS):
        absent = [BlockKey(os.urandom(16)) for _ in range(keys)]
        with _Bare(address) as bare:
            probe = seconds_per_call(partial(bare.ask, encoded(b"STRLEN", _NAME), keys, len(b":0\r\n")), calls)
            find = seconds_per_call(partial(tier.find, _TREE, absent, [0]), calls)
            found = beside(find, probe, conditions.rounds)
        yield Row(f"dragonfly.find-absent.{keys}", "us", found.in_unit(1e6))


# --- small values ----------------------------------------------------------------------------------------------------


class _Bare:
    """A socket to the server with nothing around it. Answers are counted in bytes, not looked at."""

    def __init__(self, address: ServiceAddress) -> None:
        host, port = address.parts.hostname, address.parts.port
        self._socket = socket.create_connection((host, port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._into = memoryview(bytearray(1 << 20))
        self.ask(encoded(b"AUTH", (address.username or "").encode(), (address.password or "").encode()), 1, 5)

    def __enter__(self) -> "_Bare":
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def ask(self, request: bytes, times: int, answer_bytes: int) -> None:
        """Send a request so many times, as many of them ahead as the tier sends."""
        sent, came = min(times, BATCH), 0
        self._socket.sendall(request * sent)
        while came < times * answer_bytes:
            more = self._socket.recv_into(self._into)
            if not more:
                raise UnmeasurableError("the server closed the probe's connection")
            came += more
            ahead = sent - came // answer_bytes
            if sent < times and 2 * ahead <= BATCH:
                count = min(times - sent, BATCH - ahead)
                self._socket.sendall(request * count)
                sent += count


def _small(address: ServiceAddress, conditions: Conditions) -> Iterator[Row]:
    """Values far smaller than any record, on one connection of the tier's: what a request costs."""
    calls, many = conditions.scaled(CALLS, least=20), conditions.scaled(SMALL_CALLS, least=20)
    with _wire(address) as wire, _Bare(address) as bare:
        request, one = encoded(b"GET", _NAME), _reading(wire, KIB)
        read = beside(
            seconds_per_call(lambda: _asked(wire, [one]), calls),
            seconds_per_call(partial(bare.ask, request, 1, _answer_bytes(KIB)), calls),
            conditions.rounds,
        ).in_unit(1e6)  # fmt: skip
        yield Row("dragonfly.one-get.1KiB", "us", read, ratio_at_most(1.3))
        small = [_reading(wire, SMALL_BYTES)] * many
        per_second = beside(
            _per_second(lambda: _asked(wire, small), many),
            _per_second(partial(bare.ask, request, many, _answer_bytes(SMALL_BYTES)), many),
            conditions.rounds,
        )  # fmt: skip
        yield Row("dragonfly.pipelined-gets.100B", "1/s", per_second, at_least(200_000))


def _reading(wire: Wire, nbytes: int) -> Command:
    """A request for a value of this size, which is there."""
    _asked(wire, [write(_NAME, memoryview(bytes(nbytes)), int(TTL_S * 1000))])
    return Command(_NAME, (encoded(b"GET", _NAME),), memoryview(bytearray(nbytes)))


def _asked(wire: Wire, commands: list[Command]) -> list[Answer]:
    wire.patience = Patience(BUDGET_S)
    answers: list[Answer] = []
    exchange = Exchange(wire, commands, BATCH, answers)
    exchange.start()
    exchange.finish()
    return answers


def _answer_bytes(nbytes: int) -> int:
    return len(b"$%d\r\n" % nbytes) + nbytes + 2


def _per_second(work: Callable[[], object], calls: int) -> Callable[[], float]:
    return bytes_per_second(work, calls)
