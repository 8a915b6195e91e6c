"""A connection: answers in pieces, requests larger than any buffer, and the other side's nonsense."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpool.blocks.record import CODEC_NONE
from kvpool.config.service import ServiceAddress
from kvpool.tiers.dragonfly.commands import Answer, ServerError, plain, read_end, write
from kvpool.tiers.dragonfly.exchange import Exchange
from kvpool.tiers.dragonfly.faults import LostError, StalledError, SurpriseError
from kvpool.tiers.dragonfly.patience import Patience
from kvpool.tiers.dragonfly.streams import stream_of
from kvpool.tiers.dragonfly.wire import MAX_ANSWER_BYTES, MAX_DRAINED_BYTES, Wire
from kvpool.tiers.tier import Moved, TierUnavailableError
from tests.tiers.dragonfly.servers import tier_at
from tests.tiers.keyed_conformance import chain, found_of, keys_of, tree_of

BUDGET_S, SHORT_S = 10.0, 0.02
PAGE = 4096


@contextmanager
def connected(budget_s: float = BUDGET_S) -> Iterator[tuple[Wire, socket.socket]]:
    """A wire, and the other end of it."""
    near, far = socket.socketpair()
    wire = Wire(stream_of(near, near.close), "other:1")
    wire.patience = Patience(budget_s)
    try:
        yield wire, far
    finally:
        wire.close()
        far.close()


def said(answer: Answer | bool) -> bytes:
    """An answer as a server sends it."""
    if isinstance(answer, int):
        return b":%d\r\n" % answer
    if isinstance(answer, bytes):
        return b"$%d\r\n%b\r\n" % (len(answer), answer)
    if isinstance(answer, ServerError):
        return b"-%b\r\n" % answer.text.encode()
    if isinstance(answer, list):
        return b"*%d\r\n" % len(answer) + b"".join(said(each) for each in answer)
    return b"$-1\r\n"


def send_in_pieces(far: socket.socket, data: bytes, sizes: Sequence[int]) -> None:
    """Send it in pieces of these sizes by turns; the receiver may have gone."""
    at = turn = 0
    with suppress(OSError):
        while at < len(data):
            size = sizes[turn % len(sizes)]
            far.sendall(data[at : at + size])
            at, turn = at + size, turn + 1


texts = st.text(st.characters(codec="ascii", exclude_characters="\r\n"), min_size=1, max_size=20)
leaves = st.one_of(
    st.integers(-(2**63), 2**63), st.binary(max_size=100), st.none(), texts.map(ServerError), st.binary(max_size=70_000)
)
answers = st.recursive(leaves, lambda inner: st.lists(inner, max_size=4), max_leaves=8)
pieces = st.lists(st.integers(1, 5000), min_size=1, max_size=5)


@settings(max_examples=150, deadline=None)
@given(expected=st.lists(answers, min_size=1, max_size=8), sizes=pieces)
def test_answers_are_the_same_however_they_are_cut(expected: list[Any], sizes: list[int]) -> None:
    data = b"".join(said(answer) for answer in expected)
    with connected() as (wire, far):
        sender = threading.Thread(target=send_in_pieces, args=(far, data, sizes))
        sender.start()
        assert [wire.answer() for _ in expected] == expected
        assert wire.is_quiet()
        sender.join()


bulks = st.lists(st.tuples(st.integers(1, 3), st.sampled_from([1, 100, PAGE, 20_000, 300_000])), min_size=1, max_size=6)


@settings(max_examples=80, deadline=None)
@given(bulks=bulks, sizes=pieces, absent=st.sets(st.integers(0, 5)), longer=st.sets(st.integers(0, 5)))
def test_values_land_in_their_buffers_and_nowhere_else(
    bulks: list[tuple[int, int]], sizes: list[int], absent: set[int], longer: set[int]
) -> None:
    memory = [bytearray(b"\x11" * (nbytes + 128)) for _, nbytes in bulks]
    views = [memoryview(each)[64:-64] for each in memory]
    values = [bytes([number]) * (nbytes + (at in longer)) for at, (number, nbytes) in enumerate(bulks)]
    data = b"".join(said(None if at in absent else value) + said(at) for at, value in enumerate(values))
    with connected() as (wire, far):
        sender = threading.Thread(target=send_in_pieces, args=(far, data, [size * 20 for size in sizes]))
        sender.start()
        for at, view in enumerate(views):
            came = at not in absent and at not in longer
            assert wire.answer_into(view) == came
            assert view == (values[at] if came else b"\x11" * len(view))
            assert wire.answer() == at
        sender.join()
    assert all(each[:64] == each[-64:] == b"\x11" * 64 for each in memory)


def test_two_sides_that_both_send_more_than_buffers_hold_do_not_wait_for_each_other() -> None:
    """The server answers each request before it takes the next, as one does that has no room for answers."""
    record, count = bytes(1 << 20), 8
    into = [memoryview(bytearray(1 << 20)) for _ in range(count)]
    commands = [
        c for at in range(count) for c in (write(b"name", memoryview(record), 1000), read_end(b"n", 0, into[at]))
    ]

    def serve(far: socket.socket) -> None:
        reader = far.makefile("rb")
        for _ in range(2 * count):
            words = []
            for _ in range(int(reader.readline()[1:])):
                nbytes = int(reader.readline()[1:])
                words.append(reader.read(nbytes + 2)[:-2])
            far.sendall(b"+OK\r\n" if words[0] == b"SET" else said(bytes([7]) * (1 << 20)))

    with connected() as (wire, far):
        server = threading.Thread(target=serve, args=(far,))
        server.start()
        came: list[Answer] = []
        exchange = Exchange(wire, commands, 100, came)
        exchange.start()
        exchange.finish()
        server.join()
    assert came == [b"OK", True] * count
    assert all(view == bytes([7]) * (1 << 20) for view in into)


def test_no_more_is_asked_for_at_once_than_may_be_in_flight() -> None:
    commands = [plain(b"n", b"PING") for _ in range(100)]
    with connected() as (wire, far):
        came: list[Answer] = []
        exchange = Exchange(wire, commands, 10, came)
        exchange.start()
        assert far.recv(1 << 16).count(b"PING") == 10
        far.sendall(b"+PONG\r\n" * 100)
        exchange.finish()
        assert came == [b"PONG"] * 100
        assert far.recv(1 << 16).count(b"PING") == 90


@pytest.mark.parametrize("data", [b"", b"$5\r\nab", b":1", b"*2\r\n:1\r\n"])
def test_who_says_nothing_more_is_waited_for_as_long_as_the_budget(data: bytes) -> None:
    with connected(budget_s=0.2) as (wire, far):
        far.sendall(data)
        began_s = time.monotonic()
        with pytest.raises(StalledError, match="nothing moved for 200 ms"):
            wire.answer()
        assert 0.15 < time.monotonic() - began_s < 1.5
        far.close()
        wire.patience = Patience(0.2)
        with pytest.raises(LostError):
            wire.answer()


def test_who_has_no_patience_left_takes_what_is_there_and_waits_for_nothing() -> None:
    with connected(budget_s=0.0) as (wire, far):
        with pytest.raises(StalledError):
            wire.answer()
        far.sendall(b"+OK\r\n")
        assert wire.answer() == b"OK"


@pytest.mark.parametrize(
    "data",
    [
        b"\r\n", b"hello\r\n", b"$x\r\n", b"$-2\r\n", b"*-5\r\n", b":\r\n", b"$3\r\nabcd\r\n", b"!3\r\nabc\r\n",
        b"*1\r\n" * 100, b"$%d\r\n" % (MAX_ANSWER_BYTES + 1), b"*%d\r\n" % MAX_ANSWER_BYTES, b"+" + b"x" * 70_000,
        b"*9\r\n" + b"$2000000\r\n%b\r\n" % bytes(2_000_000) * 9,
    ],
)  # fmt: skip
def test_what_is_no_answer_is_a_surprise(data: bytes) -> None:
    with connected(budget_s=1.0) as (wire, far):
        sender = threading.Thread(target=send_in_pieces, args=(far, data, [1 << 16]))
        sender.start()
        with pytest.raises(SurpriseError):
            wire.answer()
        wire.close()
        sender.join()


def test_a_value_beyond_what_is_read_past_is_a_surprise() -> None:
    with connected() as (wire, far):
        far.sendall(b"$%d\r\n" % (MAX_DRAINED_BYTES + 1))
        with pytest.raises(SurpriseError):
            wire.answer_into(memoryview(bytearray(100)))


def test_a_connection_on_which_something_unasked_came_is_not_quiet() -> None:
    with connected() as (wire, far):
        assert wire.is_quiet()
        far.sendall(b"+OK\r\n:1\r\n")
        assert not wire.is_quiet()
        assert wire.answer() == b"OK"
        assert not wire.is_quiet()
        assert wire.answer() == 1
        assert wire.is_quiet()
        far.close()
        assert not wire.is_quiet()


def test_who_waits_is_woken_when_the_connection_is_cut() -> None:
    with connected() as (wire, _):
        threading.Timer(0.1, wire.cut).start()
        began_s = time.monotonic()
        with pytest.raises(LostError):
            wire.answer()
        assert time.monotonic() - began_s < BUDGET_S / 2


# --- a server of nonsense --------------------------------------------------------------------------------------------

GREETING = b"+OK\r\n+OK\r\n"
"""What redis-py wants to hear before it leaves a connection to us: the answers to two `CLIENT SETINFO`."""
NO_CLUSTER = b"-ERR This instance has cluster support disabled\r\n"
nonsense = st.one_of(
    st.binary(max_size=300),
    st.lists(st.sampled_from([b"$-1\r\n", b":12288\r\n", b"+OK\r\n", b"-ERR no\r\n", b"$8\r\nabcdefgh\r\n", b"*0\r\n",
                              b"*2\r\n$1\r\n0\r\n*0\r\n", b"-MOVED 1 127.0.0.1:1\r\n", b"$12288\r\n", b"-OOM no\r\n",
                              b"-LOADING\r\n", b"$12288\r\n" + b"z" * 12288 + b"\r\n", b"-\r\n", b":99999999999\r\n"]),
             max_size=12).map(b"".join),
)  # fmt: skip


@contextmanager
def server_of(data: bytes, ends: bool) -> Iterator[int]:
    """Sends `data` to whoever connects, and closes or says nothing more; its port."""
    listener = socket.create_server(("127.0.0.1", 0))
    accepted: list[socket.socket] = []

    def serve() -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                accepted.append(client)
                client.sendall(data)
                if ends:
                    client.shutdown(socket.SHUT_WR)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
        for each in [listener, *accepted]:
            each.close()


@settings(max_examples=80, deadline=None)
@given(data=nonsense, start=st.sampled_from([b"", GREETING, GREETING + NO_CLUSTER]), ends=st.booleans())
def test_nonsense_holds_nobody_up_and_writes_nowhere_else(data: bytes, start: bytes, ends: bool) -> None:
    [sealed] = chain(1)
    tree, found = tree_of(), found_of(sealed)
    memory = bytearray(b"\x44" * (found.record_bytes + 2 * PAGE))
    with server_of(start + data, ends) as port:
        tier = tier_at(lambda: ServiceAddress(url=f"redis://127.0.0.1:{port}"), budget_s=SHORT_S)
        for call in (
            lambda: tier.find(tree, keys_of([sealed]), [CODEC_NONE]),
            lambda: tier.get(tree, [found], [memoryview(memory)[PAGE:-PAGE]]),
            lambda: tier.put(tree, [sealed], []),
            lambda: tier.erase(tree.tenant, 1),
            lambda: tier.epoch_hint(tree.tenant),
            tier.usage,
        ):
            began_s = time.monotonic()
            with suppress(TierUnavailableError):
                answered = call()
                assert answered is None or isinstance(answered, (list, Moved, int, tuple))
            assert time.monotonic() - began_s < 3 * SHORT_S + 1.5
        tier.close()
    assert memory[:PAGE] == memory[-PAGE:] == b"\x44" * PAGE
