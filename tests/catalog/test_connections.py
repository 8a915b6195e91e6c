"""Deadlines that hold, faults that are found out once, and nothing that leaks: against real servers."""

from __future__ import annotations

import shutil
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import psycopg
import pytest

from kvpool.catalog.connections import Connections
from kvpool.catalog.host_lookup import HostLookup
from kvpool.config.service import ServiceAddress
from kvpool.tiers.tier import TierBusyError, TierName, TierUnavailableError
from tests.catalog.connecting import (
    DEADLINE_S,
    SLACK_S,
    Stopwatch,
    bare,
    connections_to,
    frozen,
    kill,
)
from tests.catalog.tls_front import TlsFront, tls_front
from tests.footprint import footprint, holds_no_more_than
from tests.local.servers import Server, postgres_server
from tests.waiting import PROCESS_S, eventually

BUDGET_S = 0.3


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with postgres_server(tmp_path_factory.mktemp("postgres"), connections=12) as server:
        yield server


@pytest.fixture
def connections(server: Server) -> Iterator[Connections]:
    connections = connections_to(server.folder, budget_s=BUDGET_S)
    yield connections
    connections.close()
    assert connections.open_connections == 0


def one(connections: Connections, budget_s: float | None = None) -> object:
    with connections.borrow(budget_s) as connection:
        row = connection.execute("select 1").fetchone()
    assert row is not None
    return row[0]


def test_a_connection_says_who_it_is_and_is_in_autocommit_and_utc(connections: Connections) -> None:
    with connections.borrow() as connection:
        assert connection.autocommit
        row = connection.execute(
            "select current_setting('application_name'), current_setting('timezone'), "
            "current_setting('statement_timeout'), current_setting('transaction_isolation')"
        ).fetchone()
    assert row == ("kvpool", "UTC", "1min", "read committed")


def test_a_connection_is_used_again_and_never_more_are_open_than_its_size(connections: Connections) -> None:
    with ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(lambda _: one(connections, DEADLINE_S), range(200)))
    assert answers == [1] * 200
    assert 1 <= connections.open_connections <= 4


def test_who_finds_no_free_connection_waits_no_longer_than_the_budget(server: Server) -> None:
    connections = connections_to(server.folder, size=1, budget_s=BUDGET_S)
    with connections.borrow():
        watch = Stopwatch()
        with pytest.raises(TierBusyError, match="all 1 connections are in use"), connections.borrow():
            pass
        assert BUDGET_S <= watch.seconds < BUDGET_S + SLACK_S
    assert one(connections) == 1
    connections.close()


# --- stalls ----------------------------------------------------------------------------------------------------------


def test_a_stopped_server_costs_a_statement_its_budget_and_is_used_again_when_it_goes_on(
    server: Server, connections: Connections
) -> None:
    assert one(connections) == 1
    with frozen(server):
        for _ in range(2):  # with a connection, and without
            watch = Stopwatch()
            with pytest.raises(TierUnavailableError, match=r"no answer within"):
                one(connections)
            assert watch.seconds < BUDGET_S + SLACK_S
        assert connections.open_connections == 0
    assert one(connections, DEADLINE_S) == 1


def test_a_server_that_stops_while_it_takes_a_large_parameter_costs_the_budget(
    server: Server, connections: Connections
) -> None:
    with connections.borrow() as connection, frozen(server):
        watch = Stopwatch()
        with pytest.raises(psycopg.OperationalError, match="no answer"):
            connection.execute("select octet_length(%b)", (bytes(8 << 20),), binary=True)
        assert watch.seconds < BUDGET_S + SLACK_S
        assert connection.closed


def test_a_server_that_stops_in_the_middle_of_a_transaction_a_stream_or_a_pipeline_costs_the_budget(
    server: Server, connections: Connections
) -> None:
    def in_a_transaction(connection: psycopg.Connection[tuple[object, ...]]) -> None:
        with connection.transaction():
            connection.execute("select 1")
            with frozen(server):
                connection.execute("select 1")

    def in_a_stream(connection: psycopg.Connection[tuple[object, ...]]) -> None:
        rows = connection.cursor(binary=True).stream("select repeat('x', 100000) from generate_series(1, 1000)")
        next(rows)
        with frozen(server):
            for _ in rows:
                pass

    def in_a_pipeline(connection: psycopg.Connection[tuple[object, ...]]) -> None:
        with connection.pipeline(), connection.transaction():
            connection.execute("select 1").fetchone()
            with frozen(server):
                connection.execute("select 1").fetchone()

    for use in (in_a_transaction, in_a_stream, in_a_pipeline):
        watch = Stopwatch()
        with pytest.raises(TierUnavailableError, match=r"no answer within"), connections.borrow() as connection:
            use(connection)
        assert watch.seconds < BUDGET_S + 2 * SLACK_S, use.__name__
        assert connection.closed


def test_who_waits_for_a_connection_is_told_when_the_server_stalls(server: Server) -> None:
    connections = connections_to(server.folder, size=1, budget_s=1.0)
    assert one(connections) == 1
    taken = threading.Event()

    def stall() -> None:
        with connections.borrow() as connection:
            taken.set()
            connection.execute("select pg_sleep(5)")

    with ThreadPoolExecutor(1) as threads:
        stalling = threads.submit(stall)
        assert taken.wait(DEADLINE_S)
        with pytest.raises(TierUnavailableError, match="no answer"), connections.borrow(DEADLINE_S):
            pass
        assert isinstance(stalling.exception(DEADLINE_S), TierUnavailableError)
    assert one(connections) == 1
    connections.close()


def test_an_answer_that_keeps_coming_may_take_longer_than_the_budget(connections: Connections) -> None:
    slowly = "select repeat('x', 20000), pg_sleep(0.02) from generate_series(1, 50)"
    watch = Stopwatch()
    with connections.borrow() as connection:
        assert len(connection.execute(slowly).fetchall()) == 50
    assert watch.seconds > 2 * BUDGET_S


def test_a_statement_that_is_too_slow_costs_the_budget_and_does_not_go_on_for_nobody(
    server: Server, connections: Connections
) -> None:
    watch = Stopwatch()
    with pytest.raises(TierUnavailableError, match="no answer"), connections.borrow() as connection:
        connection.execute("select pg_sleep(20) as slowly")
    assert watch.seconds < BUDGET_S + SLACK_S
    with bare(server.folder) as other:

        def gone() -> bool:
            query = "select count(*) from pg_stat_activity where query like %s and pid <> pg_backend_pid()"
            return other.execute(query, ("%slowly%",)).fetchone() == (0,)

        eventually(gone, deadline_s=10.0)


def test_a_borrower_may_set_a_budget_of_its_own(connections: Connections) -> None:
    with connections.borrow(DEADLINE_S) as connection:
        connection.execute("select pg_sleep(%s)", (2 * BUDGET_S,))
    with pytest.raises(TierUnavailableError, match=r"no answer within 50 ms"), connections.borrow(0.05) as connection:
        connection.execute("select pg_sleep(%s)", (2 * BUDGET_S,))


def test_something_that_listens_but_never_speaks_costs_the_budget(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / ".s.PGSQL.5432"))
        listener.listen()
        address = ServiceAddress(url=f"postgresql:///kvpool?host={tmp_path}", username="kvpool")
        connections = Connections(lambda: address, size=1, budget_s=BUDGET_S, tls=False)
        watch = Stopwatch()
        with pytest.raises(TierUnavailableError, match="connecting: no answer"):
            one(connections)
        assert watch.seconds < BUDGET_S + SLACK_S
        assert connections.open_connections == 0


# --- servers that go and come ----------------------------------------------------------------------------------------


def test_a_restart_between_calls_costs_nobody_a_fault(server: Server, connections: Connections) -> None:
    held = [connections.borrow(DEADLINE_S) for _ in range(3)]
    for context in held:
        context.__enter__().execute("select 1")
    for context in held:
        context.__exit__(None, None, None)
    assert connections.open_connections == 3
    server.stop()
    server.start()
    assert [one(connections, DEADLINE_S) for _ in range(4)] == [1] * 4


def test_a_killed_server_is_a_fault_at_once_and_is_used_again_when_it_is_back(
    server: Server, connections: Connections
) -> None:
    with connections.borrow() as connection:
        kill(server)
        with pytest.raises(psycopg.OperationalError):
            connection.execute("select 1")
    watch = Stopwatch()
    with pytest.raises(TierUnavailableError) as raised:
        one(connections)
    assert watch.seconds < SLACK_S
    assert raised.value.tier is TierName.DATABASE
    assert "\n" not in raised.value.reason
    server.start()
    assert one(connections, DEADLINE_S) == 1


def test_a_server_that_has_no_connection_left_is_a_fault_and_those_that_are_open_stay(
    server: Server, connections: Connections
) -> None:
    assert one(connections) == 1
    with ExitStack() as others:
        with suppress(psycopg.OperationalError):
            while True:
                others.enter_context(bare(server.folder))
        with connections.borrow() as first:
            with pytest.raises(TierUnavailableError, match=r"too many clients|remaining connection slots"):
                one(connections)
            assert first.execute("select 1").fetchone() == (1,)
        assert connections.open_connections == 1
        assert one(connections) == 1


def test_a_rotated_password_is_read_for_the_next_connection(server: Server, tmp_path: Path) -> None:
    folder = tmp_path / "service"
    shutil.copytree(server.folder, folder)
    connections = connections_to(folder, budget_s=DEADLINE_S)
    with bare(server.folder) as admin:
        admin.execute("create role rotated login password 'first'")
        try:
            (folder / "username").write_text("rotated")
            (folder / "password").write_text("first\n")
            assert one(connections) == 1
            admin.execute("alter role rotated password 'second'")
            with connections.borrow() as busy:
                with pytest.raises(TierUnavailableError, match="password authentication failed") as raised:
                    one(connections)
                assert "first" not in str(raised.value)
                (folder / "password").write_text("second")
                assert one(connections) == 1
                assert busy.execute("select 1").fetchone() == (1,)
        finally:
            connections.close()
            admin.execute("drop role rotated")


def test_a_service_folder_that_cannot_be_read_is_a_fault_of_the_tier(server: Server, tmp_path: Path) -> None:
    connections = connections_to(tmp_path / "nothing-here", budget_s=BUDGET_S)
    with pytest.raises(TierUnavailableError, match="there is no such file"):
        one(connections)
    assert connections.open_connections == 0


# --- what a block may do ---------------------------------------------------------------------------------------------


def test_an_error_of_the_server_closes_the_connection_and_names_no_contents(connections: Connections) -> None:
    with connections.borrow() as connection:
        connection.execute("select 1")
        twice = "do $$ begin raise unique_violation using message = 'twice', detail = 'secret'; end $$"
        with pytest.raises(TierUnavailableError) as raised, connections.borrow() as other:
            other.execute(twice)
    assert isinstance(raised.value.__cause__, psycopg.errors.UniqueViolation)
    assert raised.value.reason == "twice"
    assert other.closed
    assert connections.open_connections == 1


def test_an_open_transaction_never_reaches_the_next_borrower(connections: Connections) -> None:
    with connections.borrow() as connection:
        connection.execute("begin")
    assert connection.closed
    with pytest.raises(KeyError), connections.borrow() as connection, connection.transaction():
        raise KeyError
    assert connection.closed
    assert one(connections) == 1


def test_failures_leave_no_descriptors_and_no_threads(server: Server, connections: Connections) -> None:
    assert one(connections) == 1

    def fail_in_all_ways() -> None:
        with pytest.raises(TierUnavailableError), connections.borrow() as connection:
            connection.execute("select 1 / 0")
        with pytest.raises(TierUnavailableError), connections.borrow(0.02) as connection:
            connection.execute("select pg_sleep(1)")
        with pytest.raises(TierUnavailableError):
            one(connections_to(server.folder.parent / "none"))
        with frozen(server), pytest.raises(TierUnavailableError):
            one(connections, 0.02)

    fail_in_all_ways()
    before = footprint()
    for _ in range(10):
        fail_in_all_ways()
    holds_no_more_than(before)


def test_closing_refuses_new_borrowers_and_closes_what_comes_back(server: Server) -> None:
    connections = connections_to(server.folder)
    with connections.borrow() as lent:
        assert one(connections) == 1
        connections.close()
        assert lent.execute("select 1").fetchone() == (1,)
        with pytest.raises(TierUnavailableError, match="closed"), connections.borrow():
            pass
    assert lent.closed
    assert connections.open_connections == 0
    connections.close()


def test_statements_are_prepared_after_some_uses_and_never_where_that_is_forbidden(server: Server) -> None:
    for threshold, prepared in ((1, 1), (None, 0)):
        connections = connections_to(server.folder, size=1, prepare_threshold=threshold)
        with connections.borrow() as connection:
            for _ in range(3):
                connection.execute("select %s::int", (1,))
            row = connection.execute("select count(*) from pg_prepared_statements", prepare=False).fetchone()
        assert row == (prepared,)
        connections.close()


# --- names, hosts and TLS --------------------------------------------------------------------------------------------


def test_a_name_that_does_not_resolve_is_a_fault_that_names_it() -> None:
    address = ServiceAddress(url="postgresql://no-such-host.invalid/kvpool")
    connections = Connections(lambda: address, size=1, budget_s=DEADLINE_S, tls=False)
    with pytest.raises(TierUnavailableError, match=r"no-such-host\.invalid.*cannot be resolved"):
        one(connections)


def test_a_silent_name_server_costs_the_budget_and_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = threading.Event()
    resolve = socket.getaddrinfo

    def slow(*arguments: object, **options: object) -> object:
        assert answers.wait(DEADLINE_S)
        return resolve("127.0.0.1", None)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    lookup = HostLookup()
    threads = threading.active_count()
    for _ in range(5):
        watch = Stopwatch()
        with pytest.raises(TimeoutError):
            lookup.addresses("database", 0.05)
        assert watch.seconds < 0.05 + SLACK_S
    assert threading.active_count() == threads + 1
    answers.set()
    assert lookup.addresses("database", DEADLINE_S) == ["127.0.0.1"]
    eventually(lambda: threading.active_count() == threads, deadline_s=PROCESS_S)


@pytest.fixture(scope="module")
def front(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TlsFront]:
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl to make certificates with")
    with tls_front(server.folder, tmp_path_factory.mktemp("tls")) as front:
        yield front


def test_tls_is_used_where_it_is_asked_for_and_not_where_it_is_not(front: TlsFront) -> None:
    for tls in (True, False):
        connections = connections_to(front.service_folder(), tls=tls)
        with connections.borrow() as connection:
            assert connection.execute("select 1").fetchone() == (1,)
            assert connection.pgconn.ssl_in_use == tls
        assert one(connections) == 1
        assert connections.open_connections == 1
        connections.close()


def test_a_server_that_cannot_prove_its_name_is_refused_whatever_the_url_says(front: TlsFront) -> None:
    with pytest.raises(TierUnavailableError, match="certificate verify failed"):
        one(connections_to(front.service_folder(ca="other-ca.crt"), tls=True))
    url = f"postgresql://elsewhere:{front.port}/kvpool?hostaddr={front.host}&sslmode=disable"
    with pytest.raises(TierUnavailableError, match="does not match host name"):
        one(connections_to(front.service_folder(url=url), tls=True))


def test_a_server_without_tls_is_refused_where_tls_is_asked_for(server: Server, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as threads:

        def refuse_tls() -> None:
            client, _ = listener.accept()
            with client:
                client.recv(8)
                client.sendall(b"N")
                client.recv(1)

        refusing = threads.submit(refuse_tls)
        host, port = listener.getsockname()
        address = ServiceAddress(url=f"postgresql://{host}:{port}/kvpool", username="kvpool", password="secret")  # noqa: S106
        connections = Connections(lambda: address, size=1, budget_s=DEADLINE_S, tls=True)
        with pytest.raises(TierUnavailableError, match="server does not support SSL"):
            one(connections)
        refusing.result(DEADLINE_S)


def test_a_tls_connection_that_stalls_costs_the_budget(server: Server, front: TlsFront) -> None:
    connections = connections_to(front.service_folder(), budget_s=BUDGET_S, tls=True)
    assert one(connections, DEADLINE_S) == 1
    with frozen(server):
        for _ in range(2):
            watch = Stopwatch()
            with pytest.raises(TierUnavailableError, match="no answer"):
                one(connections)
            assert watch.seconds < BUDGET_S + SLACK_S
    assert one(connections, DEADLINE_S) == 1
    connections.close()


def test_a_name_with_several_addresses_is_tried_until_one_answers(front: TlsFront) -> None:
    url = f"postgresql://localhost:{front.port}/kvpool"  # it listens on one address of this name
    connections = connections_to(front.service_folder(url=url))
    assert one(connections) == 1
    connections.close()


def test_the_next_host_is_asked_when_one_is_silent_or_unknown(front: TlsFront) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        url = f"postgresql://127.0.0.1:{port},no-such-host.invalid:1,{front.host}:{front.port}/kvpool"
        connections = connections_to(front.service_folder(url=url), budget_s=4.0)
        assert one(connections) == 1
        connections.close()
