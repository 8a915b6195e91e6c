"""The process that has the collection open: answers its parent's questions, and has the graph built from time to time.

What the parent has been told to be stored is in the engine's log, and so survives a kill of either process. While a
graph is built in a copy, changes go to both: to the original at once, to the copy when it takes the original's place.
"""

import os
import selectors
import time
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from uuid import UUID

from kvpool.catalog.vectors import layout
from kvpool.catalog.vectors.edge.building import Build
from kvpool.catalog.vectors.edge.directory import CollectionDirectory, DirectoryBusyError, OtherCollectionError
from kvpool.catalog.vectors.edge.frames import BrokenChannelError, Channel, Frame
from kvpool.catalog.vectors.edge.shard import Shard, Stored

_ANSWER_S = 10.0
_IDLE_S, _BUILDING_S = 1.0, 0.02
_FLUSH_POINTS, _FLUSH_S = 4_096, 30.0
"""A flush holds searches up for some 10 ms, and makes nothing safer: it keeps the log short."""
_MAX_PENDING_BYTES = 64 << 20
"""More changes than that while a graph is built: the build is given up."""
_VECTOR_BYTES = 4 * layout.SIZE

Answer = Mapping[str, Any]


def serve(directory: Path, searches: Channel, updates: Channel, *, max_points: int, index_after: int) -> None:
    """Answer until the parent ends or says so. What cannot be opened is said in the first answer, and is the last."""
    try:
        points = Points(CollectionDirectory(directory), max_points=max_points, index_after=index_after)
    except DirectoryBusyError as error:
        _say(searches, 0, {"busy": str(error)})
    except OtherCollectionError as error:
        _say(searches, 0, {"mismatch": str(error)})
    except Exception as error:  # of the engine, which has no other kind
        _say(searches, 0, {"error": str(error)})
    else:
        _say(searches, 0, {"unreadable": points.unreadable})
        try:
            _answer_all(points, searches, updates)
        finally:
            points.close()


def _answer_all(points: "Points", searches: Channel, updates: Channel) -> None:
    parent = os.getppid()
    with selectors.DefaultSelector() as selector:
        selector.register(searches.socket, selectors.EVENT_READ, searches)
        listening = False
        while os.getppid() == parent:  # a fork of the parent may hold the sockets open
            if listening != points.may_change:
                listening = points.may_change
                if listening:
                    selector.register(updates.socket, selectors.EVENT_READ, updates)
                else:
                    selector.unregister(updates.socket)
            for key, _ in selector.select(_BUILDING_S if points.is_building else _IDLE_S):
                if not _answer(points, key.data) or points.is_stuck:
                    return
            points.care()


def _answer(points: "Points", channel: Channel) -> bool:
    """Answer what has arrived; False when the parent has ended, or says goodbye."""
    try:
        channel.fill()
        while (frame := channel.next()) is not None:
            if frame.said["ask"] == "close":
                points.close()
                _say(channel, frame.number, {})
                return False
            _say(channel, frame.number, _answer_to(points, frame))
    except BrokenChannelError:
        return False
    return True


def _answer_to(points: "Points", frame: Frame) -> Answer:
    try:
        answer = points.answer(frame)
    except Exception as error:  # of the engine, which has no other kind: the disk is full, a file is damaged
        points.is_stuck = True
        return {"error": str(error)}
    fault, points.fault = points.fault, ""
    return {**answer, "fault": fault} if fault else answer


def _say(channel: Channel, number: int, said: Answer) -> None:
    channel.send(Frame(number, said), time.monotonic() + _ANSWER_S)


class Points:
    """The collection on disk, and the graph that is built for it."""

    def __init__(self, directory: CollectionDirectory, *, max_points: int, index_after: int) -> None:
        self._directory = directory
        self._max_points = max_points
        self._index_after = index_after
        self.unreadable = ""
        """Why what was there before could not be opened, if so; it was set aside."""
        self.is_stuck = False
        """The engine has failed: it does so from then on, until it is opened again, by the next process."""
        self.fault = ""
        """What went wrong between questions, to be said with the next answer."""
        self._shard = self._opened()
        self._most = self._shard.count()
        """No fewer than there are."""
        self._changed = self._shard.outside_graph()
        """Points that came or went since the graph was built."""
        self._unflushed = 0
        self._flushed_s = time.monotonic()
        self._closed = False
        self._build: Build | None = None
        self._pending: list[Frame] = []
        self._pending_bytes = 0
        self._copied = False

    @property
    def is_building(self) -> bool:
        """Whether a graph is being built."""
        return self._build is not None

    @property
    def may_change(self) -> bool:
        """Whether updates may be answered: not while the points are copied."""
        return self._build is None or self._copied

    def answer(self, frame: Frame) -> Answer:
        """The answer to a question. Raises whatever the engine does."""
        match frame.said:
            case {"ask": "search", "tree": tree, "k": k}:
                (vector,) = _vectors(frame.vectors)
                return {"hits": self._shard.search(vector, tree, k)}
            case {"ask": "count"}:
                return {"count": self._shard.count(), "outside_graph": self._shard.outside_graph()}
            case _:
                if self._build is not None:
                    self._remember(frame)
                return {"count": self._change(self._shard, frame)}

    def care(self) -> None:
        """What is to be done between questions: flush, and have the graph built.

        Raises where the engine cannot flush, or a new copy cannot take the place of the old: then this process is of no
        use. A graph that cannot be built is built another time.
        """
        is_time = time.monotonic() > self._flushed_s + _FLUSH_S
        if self._unflushed >= _FLUSH_POINTS or (self._unflushed and is_time):
            self._flush()
        if self._build is not None:
            self._look_after(self._build)
        elif self._changed >= self._index_after:
            self._changed = 0  # if this fails, the next is begun after as many changes again
            self._flush()
            self._begin_build()

    def close(self) -> None:
        """Close the files. Safe to call again."""
        if not self._closed:
            self._closed = True
            self._give_up_build()
            self._shard.close()

    def _opened(self) -> Shard:
        current = self._directory.current()
        if current is not None:
            try:
                return Shard.load(current)
            except Exception as error:  # of the engine, which has no other kind
                self.unreadable = str(error)
                self._directory.set_aside(current)
        copy = self._directory.next()
        copy.mkdir(mode=0o700)
        shard = Shard.create(copy)
        self._directory.switch(copy)
        return shard

    def _change(self, shard: Shard, frame: Frame) -> int:
        match frame.said:
            case {"ask": "upsert", "points": points}:
                stored = [
                    Stored(UUID(point_id), vector, payload)
                    for (point_id, payload), vector in zip(points, _vectors(frame.vectors), strict=True)
                ]
                self._make_room(shard, len(stored))
                shard.upsert(stored)
                changed = len(stored)
            case {"ask": "erase", "tenant": tenant, "before_epoch": epoch}:
                changed = shard.erase(tenant, epoch)
            case {"ask": "forget", "model": model}:
                changed = shard.forget_model(model)
            case _:
                raise ValueError(f"nobody knows how to {frame.said.get('ask')}")
        self._changed += changed
        self._unflushed += changed
        return changed

    def _make_room(self, shard: Shard, wanted: int) -> None:
        """Remove the oldest points for so many new ones, and one in a hundred more, so that it is rarely done."""
        self._most += wanted
        if self._most > self._max_points:
            there = shard.count()
            if there + wanted > self._max_points:
                excess = min(there, there + wanted - self._max_points + self._max_points // 100)
                shard.remove_oldest(excess)
                self._changed += excess
                there -= excess
            self._most = there + wanted

    def _remember(self, frame: Frame) -> None:
        self._pending.append(frame)
        self._pending_bytes += len(frame.vectors)
        if self._pending_bytes > _MAX_PENDING_BYTES:
            self._give_up_build()

    def _flush(self) -> None:
        self._flushed_s = time.monotonic()
        self._shard.flush()
        self._unflushed = 0

    def _begin_build(self) -> None:
        current = self._directory.current()
        assert current is not None
        try:
            self._build = Build(current, self._directory.next())
        except OSError as error:
            self.fault = f"the graph was not built: {error}"

    def _look_after(self, build: Build) -> None:
        self._copied, result = build.progress()
        if result == 0:
            self._take(build)
        elif result is not None:
            self.fault = f"the graph was not built: the process that builds it ended with {result}"
            self._give_up_build()

    def _take(self, build: Build) -> None:
        """The copy takes the original's place, with what has changed since it was made."""
        try:
            fresh = Shard.load(build.copy)
            for frame in self._pending:
                self._change(fresh, frame)
            fresh.flush()
        except Exception as error:  # of the engine, which has no other kind
            self.fault = f"the graph that was built cannot be used: {error}"
            self._give_up_build()
            return
        self._end_build()
        self._shard.abandon()
        self._shard = fresh
        self._directory.switch(build.copy)
        self._changed = fresh.outside_graph()

    def _give_up_build(self) -> None:
        if self._build is not None:
            copy = self._build.copy
            self._end_build()
            self._directory.remove(copy)

    def _end_build(self) -> None:
        assert self._build is not None
        self._build.stop()
        self._build = None
        self._copied = False
        self._pending, self._pending_bytes = [], 0


def _vectors(data: bytes) -> Iterator[list[float]]:
    for begin in range(0, len(data), _VECTOR_BYTES):
        yield array("f", data[begin : begin + _VECTOR_BYTES]).tolist()
