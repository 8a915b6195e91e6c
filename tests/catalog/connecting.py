"""Connections for tests, and what is done to the servers at their other end."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import psycopg

from kvpool.catalog.connections import SCHEMES, Connections
from kvpool.config.service import ServiceAddress, read_service
from tests.local.servers import Server

DEADLINE_S = 20.0
SLACK_S = 3.0
"""How much longer than it has to a busy machine may take."""


def address_of(folder: Path) -> ServiceAddress:
    return read_service(folder, schemes=SCHEMES)


def connections_to(
    folder: Path, *, size: int = 4, budget_s: float = DEADLINE_S, tls: bool = False, prepare_threshold: int | None = 5
) -> Connections:
    return Connections(
        lambda: address_of(folder), size=size, budget_s=budget_s, tls=tls, prepare_threshold=prepare_threshold
    )


@contextmanager
def bare(folder: Path) -> Iterator[psycopg.Connection[tuple[Any, ...]]]:
    """A connection of psycopg's own, in autocommit."""
    address = address_of(folder)
    with psycopg.connect(address.url, user=address.username, password=address.password, autocommit=True) as connection:
        yield connection


@contextmanager
def frozen(server: Server) -> Iterator[None]:
    """Stop the server and all of its processes, and let them go on at the end."""
    postmaster = psutil.Process(server.pid)
    os.kill(postmaster.pid, signal.SIGSTOP)  # first: it must not start others meanwhile
    stopped = [postmaster, *postmaster.children(recursive=True)]
    for process in stopped[1:]:
        os.kill(process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for process in stopped:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)


def kill(server: Server) -> None:
    """`kill -9` to the server and all of its processes."""
    with frozen(server):
        for process in psutil.Process(server.pid).children(recursive=True):
            process.kill()
        server.kill()


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._began_s = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began_s
