"""Which server is asked for which key, and one call's round trips to all of them.

Requests to several nodes are sent before the first answer is waited for. A connection that was used before and turns
out to be closed is replaced once: all that is asked for here may be asked for twice. In a cluster, a `MOVED` or `ASK`
is followed once, and a node that failed is let alone for `PAUSE_S`, so that it does not cost every call a budget. (A
node that stalls while it is connected to costs one of its own.)
"""

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from kvpool.config.service import ServiceAddress
from kvpool.tiers.dragonfly.commands import UNANSWERED, Answer, Command, ServerError
from kvpool.tiers.dragonfly.connections import Connections
from kvpool.tiers.dragonfly.conversation import Conversation
from kvpool.tiers.dragonfly.faults import BusyError, FaultError, RefusedError, StalledError
from kvpool.tiers.dragonfly.opening import Node, Opener
from kvpool.tiers.dragonfly.patience import Patience
from kvpool.tiers.dragonfly.topology import ASK_FOR_SLOTS, ASKING, Topology, elsewhere, topology_of

PAUSE_S = 1.0
"""For so long a failed node of a cluster is let alone; and no more often is a cluster asked what it looks like."""


@dataclass(slots=True)
class Answers:
    """The answers of one call, in the order of its requests."""

    each: list[Answer]
    faults: list[str] = field(default_factory=list)
    """Why some are `UNANSWERED`, or what a server said of itself: one text per server at most."""
    busy: int = 0
    """For how many of these all connections were in use."""
    asked: int = 0
    """How many servers there were to ask."""

    @property
    def fault(self) -> str:
        """Why the call did not come to its end; empty if it did."""
        return self.faults[0] if self.faults else ""

    @property
    def nobody_answered(self) -> bool:
        """Whether every server failed."""
        return len(self.faults) >= self.asked > 0


class _PausedError(RefusedError):
    """A node is let alone for now."""


class _Part(NamedTuple):
    """What one server is asked, and whose answers those are; -1: nobody's."""

    node: Node | None
    commands: list[Command]
    positions: Sequence[int]


class Servers:
    """The server at an address, or all masters of its cluster. Safe from any thread."""

    def __init__(self, address: Callable[[], ServiceAddress], *, tls: bool, connections: int) -> None:
        self._opener = Opener(address, tls=tls)
        self._limit = connections
        self._lock = threading.Lock()
        self._pools: dict[Node | None, Connections] = {}
        self._paused: dict[Node | None, tuple[float, str]] = {}
        """Nodes that failed the last time: until when they are let alone, and why."""
        self._closed = False
        self._asking_topology = threading.Lock()
        self._topology: Topology | None = None
        self._asked_at_s = 0.0
        self._outdated = False

    def ask(self, commands: list[Command], patience: Patience, at_once: int) -> Answers:
        """Ask each at the server that has its key. Raises `FaultError` where it is not even known which that is."""
        with closing(self.begin(commands, patience, at_once)) as call:
            return call.answers()

    def begin(self, commands: list[Command], patience: Patience, at_once: int) -> "Call":
        """Ask as `ask` does, and leave the waiting for later. Raises `FaultError` as that does."""
        return Call(self, commands, patience, at_once)

    def ask_at(self, node: Node | None, commands: list[Command], patience: Patience, at_once: int) -> list[Answer]:
        """Ask one server. Raises `FaultError` where it did not answer."""
        answers = Answers([UNANSWERED] * len(commands), asked=1)
        with closing(_Round(self, [_Part(node, commands, range(len(commands)))], answers, patience, at_once)) as asked:
            asked.finish()
        if answers.faults:
            raise RefusedError(answers.fault)
        return answers.each

    def topology(self, patience: Patience) -> Topology:
        """What is known of the cluster; asked for first, and when it turned out to be outdated. Raises `FaultError`."""
        if not self._must_learn():
            return self._topology or Topology()
        if not self._asking_topology.acquire(timeout=patience.left_s):
            raise StalledError("the cluster does not say what it looks like")
        try:
            if self._must_learn():
                self._learn(self._topology, patience)
            return self._topology or Topology()
        finally:
            self._asking_topology.release()

    def close(self) -> None:
        """Close all connections. Calling it again does nothing."""
        with self._lock:
            self._closed = True
            pools = list(self._pools.values())
        for pool in pools:
            pool.close()

    # --- for calls ---------------------------------------------------------------------------------------------------

    def in_order(self, parts: Sequence[_Part]) -> Sequence[_Part]:
        """As they are asked: in the nodes' order, for two calls that wait for each other's connections wait in vain.

        Nodes that failed the last time come after the others, which have been asked by the time that those fail again.
        """
        if len(parts) == 1:
            return parts
        return sorted(parts, key=lambda part: (part.node in self._paused, part.node or ("", 0)))

    def converse(self, part: _Part, patience: Patience, at_once: int) -> Conversation:
        """Ask a part of its server. Raises `FaultError`."""
        if self._paused:
            self._check_pause(part.node)
        return Conversation(self._pool(part.node), part.commands, patience, at_once)

    def note(self, node: Node | None, fault: FaultError | None) -> None:
        """What came of asking a node."""
        if fault is not None:
            self._pause(node, fault)
        elif self._paused:
            self._paused.pop(node, None)

    def followed(self, moved: Sequence[int], commands: Sequence[Command], answers: Answers) -> list[_Part]:
        """What is to be asked elsewhere, as the answers say."""
        self._outdated = True
        parts: dict[Node, _Part] = {}
        for at in moved:
            answer = answers.each[at]
            assert isinstance(answer, ServerError)
            node = elsewhere(answer)
            if node is None:
                continue
            part = parts.setdefault(node, _Part(node, [], []))
            assert isinstance(part.positions, list)
            if answer.code == "ASK":
                part.commands.append(ASKING)
                part.positions.append(-1)
            part.commands.append(commands[at])
            part.positions.append(at)
        return list(parts.values())

    def _pause(self, node: Node | None, fault: FaultError) -> None:
        """Let a node of a cluster alone for a while; the address itself is for others to let alone."""
        if node is not None and not isinstance(fault, _PausedError | BusyError):
            self._outdated = True
            self._paused[node] = time.monotonic() + PAUSE_S, str(fault)

    def _check_pause(self, node: Node | None) -> None:
        until_s, fault = self._paused.get(node, (0.0, ""))
        if time.monotonic() < until_s:
            raise _PausedError(f"a moment ago: {fault}")

    def _pool(self, node: Node | None) -> Connections:
        with self._lock:
            if self._closed:
                raise RefusedError("it was closed")
            if node not in self._pools:
                self._pools[node] = Connections(partial(self._opener.open, node), self._limit)
            return self._pools[node]

    # --- the cluster -------------------------------------------------------------------------------------------------

    def _must_learn(self) -> bool:
        return self._topology is None or (self._outdated and time.monotonic() >= self._asked_at_s + PAUSE_S)

    def _learn(self, known: Topology | None, patience: Patience) -> None:
        """Ask the nodes that are known, then the address, what the cluster looks like.

        Where nobody says, what was known counts for a while longer. Raises `FaultError` if that is nothing.
        """
        self._asked_at_s = time.monotonic()
        self._outdated = False
        failed: FaultError | None = None
        masters = sorted((known or Topology()).masters, key=self._paused.__contains__)
        for node in dict.fromkeys((*masters, None)):
            try:
                self._check_pause(node)
                self._topology = self._asked_topology(node, patience)
            except FaultError as fault:
                failed = fault
                self._pause(node, fault)
                patience.moved()
            else:
                return self._forget_others(self._topology)
        self._outdated = True
        if failed is not None and known is None:
            raise failed
        return None

    def _asked_topology(self, node: Node | None, patience: Patience) -> Topology:
        conversation = Conversation(self._pool(node), [ASK_FOR_SLOTS], patience, 1)
        try:
            fault = conversation.finish()
            [answer] = conversation.answers
        finally:
            conversation.close()
        if fault is not None:
            raise fault
        return topology_of(answer, conversation.host)

    def _forget_others(self, topology: Topology) -> None:
        """Let go of nodes that are no masters any more."""
        kept = {None, *topology.masters}
        with self._lock:
            gone = [self._pools.pop(node) for node in list(self._pools) if node not in kept]
        for node in list(self._paused):
            if node not in kept:
                self._paused.pop(node, None)
        for pool in gone:
            pool.retire()


class Call:
    """What was asked of the servers that have the keys. For one thread; ends with `close`."""

    def __init__(self, servers: Servers, commands: list[Command], patience: Patience, at_once: int) -> None:
        parts = _by_owner(commands, servers.topology(patience)) if commands else []
        self._servers, self._commands, self._patience, self._at_once = servers, commands, patience, at_once
        self._answers = Answers([UNANSWERED] * len(commands), asked=len(parts))
        self._round = _Round(servers, parts, self._answers, patience, at_once)

    def answers(self) -> Answers:
        """Wait for the answers, and follow those that lead elsewhere."""
        answers = self._answers
        self._round.finish()
        if ServerError not in map(type, answers.each):
            return answers
        moved = [
            at for at, answer in enumerate(answers.each) if isinstance(answer, ServerError) and answer.is_elsewhere
        ]
        if moved:
            followed = self._servers.followed(moved, self._commands, answers)
            answers.asked += len(followed)
            self._round.close()
            self._round = _Round(self._servers, followed, answers, self._patience, self._at_once)
            self._round.finish()
        return answers

    def close(self) -> None:
        """Close the connections on which something may come still. Calling it again does nothing."""
        self._round.close()


class _Round:
    """Asks every part of its server; `finish` puts what comes into `answers`."""

    def __init__(
        self, servers: Servers, parts: Sequence[_Part], answers: Answers, patience: Patience, at_once: int
    ) -> None:
        self._servers, self._answers = servers, answers
        self._begun: list[tuple[_Part, Conversation]] = []
        try:
            for part in servers.in_order(parts):
                try:
                    self._begun.append((part, servers.converse(part, patience, at_once)))
                except FaultError as error:
                    self._note(part, error)
                    patience.moved()  # those that come now have not been asked yet
        except BaseException:
            self.close()
            raise

    def finish(self) -> None:
        """Wait for the answers."""
        for part, conversation in self._begun:
            try:
                fault = conversation.finish()
            except FaultError as error:
                fault = error
            if isinstance(part.positions, range) and len(conversation.answers) == len(part.positions):
                self._answers.each[:] = conversation.answers
            else:
                for position, answer in zip(part.positions, conversation.answers, strict=False):
                    if position >= 0:
                        self._answers.each[position] = answer
            self._note(part, fault)

    def close(self) -> None:
        """Give up what has not been answered."""
        for _, conversation in self._begun:
            conversation.close()

    def _note(self, part: _Part, fault: FaultError | None) -> None:
        self._servers.note(part.node, fault)
        if fault is not None:
            self._answers.faults.append(str(fault))
            self._answers.busy += isinstance(fault, BusyError)


def _by_owner(commands: list[Command], topology: Topology) -> list[_Part]:
    if not topology.is_cluster:
        return [_Part(topology.masters[0], commands, range(len(commands)))] if commands else []
    parts: dict[Node | None, _Part] = {}
    for at, command in enumerate(commands):
        owner = topology.owner(command.name)
        part = parts.setdefault(owner, _Part(owner, [], []))
        part.commands.append(command)
        assert isinstance(part.positions, list)
        part.positions.append(at)
    return list(parts.values())
