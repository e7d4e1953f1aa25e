"""The one reader: it decides the order of all events, forms numbered batches, and writes down how.

A model that learns on every event depends on the order of all events, so the order is decided in one place:

1. The reader pulls records from the partitions of all inputs, always the one whose next record is earliest in
   event time, so none runs ahead of the others. While a partition's next records are on their way, it waits for them.
2. Each record is decoded, or becomes a reject. Its event time moves the watermark. Data alone moves it, never a
   clock; a clock only judges a partition idle, which then holds the watermark back no longer.
3. With the order `event_time` a buffer releases what lies before the watermark, sorted by the order key:
   event time; at equal times labels before events; then the id, or partition and offset where there is none.
   The watermark is the smallest, over the partitions, of the newest event time seen, less the allowed lateness.
   With `arrival` events pass in the order they were pulled, and the watermark is the newest event time of all,
   less the allowed lateness: so the lateness alone bounds what features must keep to answer a late question.
4. Released items leave in batches, closed by size or by a linger time. Before a batch leaves, its make-up is
   appended to the order log: what was pulled, in which order, which partitions were judged idle, and how many items
   left.
5. A resume pulls just as the log says, so that every batch after the checkpoint is formed again.
"""

from __future__ import annotations

import heapq
import time as wall
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from math import inf
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from dataflows.chunks import Chunks
from dataflows.events import Event, EventId, NoEvent, Raw, Reject, Undecodable, reject, to_datetime, to_time_us
from dataflows.orderlog import ALL_READY, DONE, IDLE, JUMPED, OPENED, LogChain, LogEntry, OrderLog, OrderLogError
from features.rows import Change, Rows, put
from features.spec import duration

LABEL = 0
EVENT = 1
"""Kinds of items; at equal event times labels come first, so the kind is part of the order key."""

CHUNK = 256
"""Records pulled from a partition at the most before looking for a fuller batch."""

DISCOVER_S = 1.0
"""Seconds between two looks for partitions that were added."""

Item = tuple[int, int, EventId | None, str, int, Event, Raw]
"""Event time (µs), kind, id, partition, offset, the decoded event, and the record as it was read."""


class Time(BaseModel):
    """How a job treats time and order.

    Parameters
    ----------
    order
        `event_time` (default): sorted by event time, so results do not depend on partitions and delays.
        `arrival`: as events came; nothing waits, and the order log keeps the run repeatable.
    lateness
        How far behind the newest event time an event may come (a duration, default 0). `event_time` holds
        events back that long; `arrival` answers late events at once, marked late, with the features as of
        their time. What comes later than that is rejected as `too_late`.
    buffer
        How many events the `event_time` buffer may hold; beyond, the oldest are released early and counted.
    max_jump
        An event whose time lies further than this ahead of the newest so far is rejected as `time_jump`
        (default: no limit). Protects the watermark from a single wrong clock.
    earliest, latest
        Event times outside are rejected as `time_out_of_range`.
    idle
        Seconds of silence (wall clock) after which a live partition no longer holds the watermark back.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    order: Literal["event_time", "arrival"] = "event_time"
    lateness: Any = 0
    buffer: int = Field(default=100_000, gt=0)
    max_jump: Any = None
    earliest: Any = "1970-01-01"
    latest: Any = "2200-01-01"
    idle: float = Field(default=5.0, gt=0)

    def model_post_init(self, _: Any) -> None:
        for name in ("lateness", "max_jump"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, duration(getattr(self, name)))
        for name in ("earliest", "latest"):
            object.__setattr__(self, name, to_time_us(getattr(self, name)))


class Partition(ABC):
    """One input file, topic partition or iterable: records in a fixed order, each with its offset."""

    name: str
    done: bool = False
    """No more records will ever come."""
    pending: bool = False
    """Nothing is at hand, but more records are there and on their way here: others should not run ahead."""
    numbered: ClassVar[bool] = False
    """Whether records have numbers of their own (Kafka's offsets): then `position` gives one, and the order log keeps
    where partitions begin and end."""
    gap: tuple[int, int] | None = None
    """Where reading would have gone on and where it does, if the records between are gone. The partition sets it, and
    gives nothing until the reader has counted it and set it to None."""

    @abstractmethod
    def pull(self, limit: int) -> list[tuple[int, Raw]]:
        """Up to `limit` next records as (offset, record); empty when there is nothing now. Never blocks."""

    @abstractmethod
    def position(self, back: int = 0) -> Any:
        """Where the next pull begins, or `back` records before; picklable, and what `Source.open` takes.

        `back` is at most the number of records that the last pull gave.
        """

    @abstractmethod
    def decode(self, raw: Raw) -> Event:
        """The event of a record; raises `Undecodable`."""

    def go_on_at(self, position: int) -> None:
        """Pull from a later place; of numbered partitions only."""
        raise NotImplementedError

    def lag(self) -> int | None:
        """How many records are in the input that were not pulled; None where nobody can tell."""
        return None

    def close(self) -> None:  # noqa: B027 - most partitions have nothing to close
        """Give up files and connections."""


class ReadMode(BaseModel):
    """How inputs are read, whatever they are.

    Parameters
    ----------
    follow
        Treat the end of an input as "nothing yet".
    until
        Read records up to this time (µs since 1970), the input's timestamp and not the event's; only inputs that keep
        timestamps with their records know it.
    on_gap
        When records that come next are gone (retention removed them): `stop` with an error, or go on with the
        `earliest` there is, and count what is missing.
    logged
        Form the batches that the order log has, and no others: to do once more what was done.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    follow: bool = False
    until: int | None = None
    on_gap: Literal["stop", "earliest"] = "stop"
    logged: bool = False


TO_THE_END = ReadMode()
"""Read what is there, then end."""


class Feed:
    """An input while it is read: its partitions, which may become more.

    This one serves sources that open their partitions themselves (`Source.open`); others have a feed of their own.
    """

    grows: ClassVar[bool] = False
    """Whether `names` may give more than before."""

    def __init__(self, source: Source, mode: ReadMode) -> None:
        self._source = source
        self._mode = mode

    def names(self) -> list[str]:
        """Names of the partitions that are there now. Never blocks for long."""
        return self._source.names()

    def open(self, name: str, position: Any | None) -> Partition:
        """Open a partition at a position (None: where the source begins)."""
        return self._source.open(name, position, self._mode.follow)

    def open_added(self, name: str) -> Partition:
        """Open a partition that was added since the job began: from its beginning, wherever the source begins."""
        return self.open(name, None)

    def note_checkpoint(self, positions: dict[str, Any]) -> None:
        """Tell what watches the job from outside that a checkpoint has these positions, by partition. Never blocks."""

    def close(self) -> None:
        """Give up connections; the partitions are closed before."""


class Source(BaseModel):
    """Declares an input; the reader opens its partitions. Subclasses live in `dataflows.connectors`."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    event: type[Event]

    @property
    def endless(self) -> bool:
        """Whether a run goes on at its end, unless an end is asked for (`--until`)."""
        return False

    def names(self) -> list[str]:
        """Names of the partitions, unique within the job."""
        raise NotImplementedError

    def open(self, name: str, position: Any | None, follow: bool) -> Partition:
        """Open a partition at a position (None: the beginning); with `follow` its end is not an end."""
        raise NotImplementedError

    def feed(self, mode: ReadMode) -> Feed:
        """Begin to read."""
        if mode.until is not None:
            raise InputError(f"{type(self).__name__} keeps no times with its records. Hint: leave --until out")
        return Feed(self, mode)

    def describe(self) -> str:
        """What it reads, for people."""
        return ", ".join(self.names())

    def gaps(self, positions: dict[str, Any]) -> dict[str, tuple[int, int]]:
        """Of these positions (by partition, to go on from), those whose next records are gone, each with the first
        position that is there.

        Raises `InputError` where the input cannot be asked.
        """
        return {}


class InputError(RuntimeError):
    """An input that cannot be read as it is declared."""


def gap_text(name: str, wanted: int, first: int) -> str:
    """What to say of records that are gone: wanted at one offset, while the first that is there has a later one."""
    return (
        f"{name}: the job would go on at offset {wanted}, but the first record there is has {first}: {first - wanted} "
        "records were removed before they were read. Hint: --on-gap earliest goes on without them and counts them"
    )


class Batch:
    """Consecutive items of the total order, and the rejects met on the way to them."""

    __slots__ = ("number", "items", "rejects", "watermark", "end")

    def __init__(self, number: int, items: list[Item], rejects: list[Reject], watermark: int | None, end: bool) -> None:
        self.number = number
        self.items = items
        self.rejects = rejects
        self.watermark = watermark
        self.end = end


def decoded(kind: int, part: Partition, offset: int, raw: Raw) -> Item:
    """The item of a record; raises `Undecodable` whatever is wrong with it, a user's validator included."""
    try:
        event = part.decode(raw)
        return (event.event_time(), kind, event.event_id(), part.name, offset, event, raw)
    except Undecodable:
        raise
    except OverflowError as error:
        raise Undecodable("time_out_of_range", str(error)) from None
    except Exception as error:  # noqa: BLE001 - code of the event class, which is the user's
        raise Undecodable("function_error", f"{type(error).__name__}: {error}") from None


class _Faulty:
    """A record without an event."""

    __slots__ = ("offset", "raw", "wrong")

    def __init__(self, offset: int, raw: Raw, wrong: Undecodable) -> None:
        self.offset = offset
        self.raw = raw
        self.wrong = wrong


class _Lane:
    """A partition with what the reader knows of it."""

    __slots__ = ("kind", "part", "newest", "silent", "done", "heard_at", "queue")

    def __init__(self, kind: int, part: Partition, newest: int | None, silent: bool, done: bool) -> None:
        self.kind = kind
        self.part = part
        self.newest = newest
        self.silent = silent  # idle or at its end: holds no watermark back until it speaks again
        self.done = done  # its end is in the log; `part.done` may be true before
        self.heard_at = wall.monotonic()  # when it gave records last
        self.queue: deque[Item | _Faulty] = deque()  # pulled to see their times, not taken yet

    @property
    def ended(self) -> bool:
        """Everything was taken and nothing will come."""
        return self.part.done and not self.queue

    def position(self) -> Any:
        """Where the next record to take is."""
        return self.part.position(len(self.queue))

    def look_ahead(self) -> int:
        """Pull and decode the next records; how many they are."""
        records = self.part.pull(CHUNK)
        for offset, raw in records:
            try:
                self.queue.append(decoded(self.kind, self.part, offset, raw))
            except Undecodable as wrong:
                self.queue.append(_Faulty(offset, raw, wrong))
        return len(records)

    def next_time(self) -> float:
        """Event time of the next record to take; a record without one delays nothing."""
        head = self.queue[0]
        return -inf if isinstance(head, _Faulty) else head[0]


class Reader:
    """Pulls, orders and batches; see the module's text for the protocol.

    Parameters
    ----------
    inputs
        (kind, source) of each input, events before labels.
    time
        The job's declaration of time and order.
    batch_size
        Items in a batch at the most.
    linger
        Seconds that items may wait for their batch to fill when no more are at hand.
    mode
        How the inputs are read.
    log
        Where the make-up of batches is kept; None for runs that need not be resumed.
    rows
        Where its state is kept; `changes` says what to keep. The batches that the log has after it are formed again
        first.
    """

    def __init__(
        self,
        inputs: Iterable[tuple[int, Source]],
        time: Time,
        batch_size: int = 1000,
        linger: float = 0.05,
        mode: ReadMode = TO_THE_END,
        log: OrderLog | LogChain | None = None,
        rows: Rows | None = None,
    ) -> None:
        self._time = time
        self._lateness: int = time.lateness
        self._earliest: int = time.earliest
        self._latest: int = time.latest
        self._max_jump: int | None = time.max_jump
        self._batch_size = batch_size
        self._linger = linger
        self._log = log
        self._sorted = time.order == "event_time"
        kept = rows.get("reader") if rows is not None else []
        state: dict[str, Any] = kept[0] if kept else {}
        self.number: int = state.get("number", 0)
        self.watermark: int | None = state.get("watermark")
        self.newest: int | None = state.get("newest")
        self.counts: Counter[str] = Counter(state.get("counts", {}))
        self._ended: bool = state.get("ended", False)
        self._chunks = Chunks("item")
        self._kept: dict[tuple[str, int], int] = {}  # place of an item that waits here → number of its row
        self._newest_item: int = state.get("newest_item", 0)
        self._replay = deque(log.after(self.number)) if log is not None else deque()
        self._mode = mode
        self._discover_at = 0.0
        saved = state.get("lanes", {})
        self._feeds: list[tuple[int, Feed]] = []
        self._lanes: dict[str, _Lane] = {}
        self._new: dict[str, _Lane] = {}  # opened, but not taken in yet: that is logged with a batch
        try:
            self._open_inputs(inputs, saved, _logged_begins(self._replay), resumed=bool(state) or bool(self._replay))
        except BaseException:
            self._close_inputs()
            raise
        self._alone = len(self._lanes) == 1
        items: dict[int, Item] = {}
        if rows is not None:
            for number, item in self._chunks.restore(rows):
                items[number] = self._decode_again(*item)
                self._kept[item[1], item[2]] = number
        self._ready: deque[Item] = deque(items.pop(number) for number in state.get("ready", []))
        self._buffer: list[Item] = list(items.values())
        heapq.heapify(self._buffer)
        self._pulls: list[tuple[str, int]] = state.get("pulls", [])  # of the batch to come
        self._begins: list[int | None] = state.get("begins", [])  # of those that were opened or jumped
        self._rejects: list[Reject] = state.get("rejects", [])
        self._waiting_since: float | None = None

    @property
    def finished(self) -> bool:
        """All inputs are at their end and every batch has left."""
        if self._mode.logged:
            return not self._replay
        return self._ended and not self._replay and not self._new and self._all_ended()

    @property
    def replaying(self) -> bool:
        """Whether the next batch comes from the order log."""
        return bool(self._replay)

    def next_batch(self) -> Batch | None:
        """The next batch, or None when nothing is to be had now (or, if `finished`, ever)."""
        if self._replay or self._mode.logged:
            return self._logged_batch(self._replay[0]) if self._replay else None
        now = wall.monotonic()
        if now >= self._discover_at:
            self._discover(now)
        for name in list(self._new):
            self._open(name)
        self._fill()
        at_end = self._all_ended()
        if not self._ready and not self._rejects and (self._ended or not at_end):
            return None
        if len(self._ready) < self._batch_size and not at_end and not self._lingered(now):
            return None
        count = min(len(self._ready), self._batch_size)
        end = at_end and count == len(self._ready)
        if self._log is not None:
            ends = {name: self._lanes[name].position() for name in self._numbered_pulls()}
            made = (self.number + 1, self._pulls, count, self.watermark, end, self._begins, ends)
            self._log.append(LogEntry(*made, at=int(wall.time() * 1000)))
        return self._take(count, end)

    def changes(self) -> Iterator[Change]:
        """What the rows need to follow since the last call, so that a later reader goes on after the last batch."""
        waiting = {(item[3], item[4]): item for queue in (self._buffer, self._ready) for item in queue}
        kept = self._kept
        gone = [number for place, number in kept.items() if place not in waiting]
        new = [item for place, item in waiting.items() if place not in kept]
        self._kept = {place: number for place, number in kept.items() if place in waiting}
        added = []
        for item in new:
            self._newest_item += 1
            self._kept[item[3], item[4]] = self._newest_item
            added.append((self._newest_item, _kept(item)))
        yield from self._chunks.changes(added, gone)
        state = {
            "number": self.number,
            "watermark": self.watermark,
            "newest": self.newest,
            "counts": dict(self.counts),
            "ended": self._ended,
            "lanes": {n: (lane.position(), lane.newest, lane.silent, lane.done) for n, lane in self._lanes.items()},
            "newest_item": self._newest_item,
            "ready": [self._kept[item[3], item[4]] for item in self._ready],
            "pulls": self._pulls,
            "begins": self._begins,
            "rejects": self._rejects,
        }
        yield put("reader", state)

    def offsets(self) -> dict[str, Any]:
        """By partition, where the next record to take is."""
        return {name: lane.position() for name, lane in self._lanes.items()}

    def lag(self) -> dict[str, int]:
        """By partition, how many records are there that were not taken, where that can be told."""
        known = ((name, lane.part.lag(), len(lane.queue)) for name, lane in self._lanes.items())
        return {name: behind + waiting for name, behind, waiting in known if behind is not None}

    def note_checkpoint(self, offsets: dict[str, Any]) -> None:
        """These offsets are in a checkpoint that the engine has committed."""
        for _, feed in self._feeds:
            feed.note_checkpoint({name: offsets[name] for name in feed.names() if name in offsets})

    def close(self) -> None:
        """Close the inputs and the log."""
        self._close_inputs()
        if self._log is not None:
            self._log.close()

    def _close_inputs(self) -> None:
        for lane in (*self._lanes.values(), *self._new.values()):
            lane.part.close()
        for _, feed in self._feeds:
            feed.close()

    # -- partitions

    def _open_inputs(
        self,
        inputs: Iterable[tuple[int, Source]],
        saved: dict[str, tuple[Any, int | None, bool, bool]],
        logged: dict[str, int | None],
        resumed: bool,
    ) -> None:
        """Open all partitions: those of the checkpoint, where it left them; others as the log has them, or anew."""
        for kind, source in inputs:
            feed = source.feed(self._mode)
            self._feeds.append((kind, feed))
            for name in feed.names():
                if name in self._lanes or name in self._new:
                    raise InputError(
                        f"two inputs are named {name!r}. Hint: files need different names, a topic is one input only"
                    )
                if name in saved:
                    position, newest, silent, done = saved[name]
                    self._lanes[name] = _Lane(kind, feed.open(name, position), newest, silent, done)
                else:
                    self._add(kind, feed, name, logged.get(name), came_later=resumed)
        gone = sorted(set(saved) - set(self._lanes))
        if gone:
            raise OrderLogError(f"inputs of the checkpoint are gone: {', '.join(gone)}. Hint: put them back")

    def _add(self, kind: int, feed: Feed, name: str, position: int | None, came_later: bool) -> None:
        part = feed.open(name, position) if position is not None or not came_later else feed.open_added(name)
        self._new[name] = _Lane(kind, part, None, False, False)

    def _discover(self, now: float) -> None:
        """Take up partitions that were added since the last look."""
        self._discover_at = now + DISCOVER_S
        if not self._mode.follow:
            self._discover_at = inf
            return
        for kind, feed in self._feeds:
            if feed.grows:
                for name in feed.names():
                    if name not in self._lanes and name not in self._new:
                        self._add(kind, feed, name, None, came_later=True)

    def _numbered_pulls(self) -> set[str]:
        return {name for name, _ in self._pulls if self._lanes[name].part.numbered}

    # -- live batches

    def _fill(self) -> None:
        """Pull until a batch is full or nothing is at hand."""
        lanes = list(self._lanes.values())
        pull = self._pull_chunk if self._alone else self._take_earliest
        while len(self._ready) < self._batch_size and pull(lanes):
            pass

    def _pull_chunk(self, lanes: list[_Lane]) -> bool:
        """From the only lane there is."""
        lane = lanes[0]
        pulled = self._pull(lane, CHUNK)
        if lane.part.gap is not None:
            self._jump(lane)
        self._listen(lane, bool(pulled))
        return bool(pulled)

    def _take_earliest(self, lanes: list[_Lane]) -> bool:
        """The record that is next in event time among the lanes' next ones.

        While records of a lane are on their way none is taken: another lane would run ahead.
        """
        chosen: _Lane | None = None
        earliest = inf
        for lane in lanes:
            if not lane.queue and not self._look_ahead(lane):
                if lane.part.pending and not lane.silent:
                    return False
                continue
            time = lane.next_time()
            if chosen is None or time < earliest:
                chosen, earliest = lane, time
        if chosen is None:
            return False
        record = chosen.queue.popleft()
        self._note_pull(chosen, 1)
        if isinstance(record, _Faulty):
            self._refuse_faulty(record.wrong, chosen.part.name, record.offset, record.raw)
        else:
            self._take_item(chosen, record)
        if chosen.ended:
            self._silence(chosen, DONE)
        return True

    def _look_ahead(self, lane: _Lane) -> bool:
        if lane.part.done:
            if not lane.done:
                self._silence(lane, DONE)
            return False
        heard = lane.look_ahead() > 0
        if lane.part.gap is not None and not heard:
            self._jump(lane)
        self._listen(lane, heard)
        return heard

    def _listen(self, lane: _Lane, heard: bool) -> None:
        """Judge, by the wall clock and once, whether a lane is idle; notice its end."""
        if heard:
            lane.heard_at = wall.monotonic()
        if lane.done:
            return
        if lane.ended:
            self._silence(lane, DONE)
        elif (
            not lane.silent
            and not heard
            and not lane.part.pending
            and wall.monotonic() - lane.heard_at > self._time.idle
        ):
            self._silence(lane, IDLE)

    def _lingered(self, now: float) -> bool:
        if self._waiting_since is None:
            self._waiting_since = now
        return now - self._waiting_since >= self._linger

    def _open(self, name: str) -> None:
        """Take a new partition in; logged, as from now on the order depends on it."""
        lane = self._lanes[name] = self._new.pop(name)
        self._alone = len(self._lanes) == 1
        self._pulls.append((name, OPENED))
        self._begins.append(lane.position() if lane.part.numbered else None)

    def _jump(self, lane: _Lane) -> None:
        """What came next is gone, and the job is to go on behind it; logged, as the order depends on it."""
        assert lane.part.gap is not None
        before, after = lane.part.gap
        lane.part.gap = None
        self.counts["gap"] += after - before
        self._pulls.append((lane.part.name, JUMPED))
        self._begins.append(after)

    def _all_ended(self) -> bool:
        return all(lane.ended for lane in self._lanes.values())

    def _take(self, count: int, end: bool) -> Batch:
        self.number += 1
        self._ended = end
        items = [self._ready.popleft() for _ in range(count)]
        batch = Batch(self.number, items, self._rejects, self.watermark, end)
        self._pulls, self._begins, self._rejects = [], [], []
        self._waiting_since = None
        return batch

    # -- batches formed again

    def _logged_batch(self, entry: LogEntry) -> Batch | None:
        """Form a batch as it was formed before; None while its records are on their way."""
        if entry.number != self.number + 1:
            raise OrderLogError(f"the order log goes from batch {self.number} to {entry.number}: entries are missing")
        for name, count in _pulls_left(entry.pulls, self._pulls):
            if count in (OPENED, JUMPED):
                self._begin_logged(name, count, entry)
            elif not self._pull_logged(self._lanes[name], count, entry.number):
                return None
        for name, end in entry.ends.items():
            # It may stand before `end`: markers of transactions have offsets too, and no record has to be pulled there.
            if self._lanes[name].position() > end:
                raise OrderLogError(
                    f"{name}: batch {entry.number} ended before offset {end}, but its records now end before "
                    f"{self._lanes[name].position()}: some were removed. {_BRANCH_HINT}"
                )
        count = len(self._ready) if entry.count == ALL_READY else entry.count
        if len(self._ready) < count:
            raise OrderLogError(
                f"batch {entry.number} had {entry.count} items, but the inputs now give {len(self._ready)}: "
                "they changed since. Hint: restore the inputs, or start with --fresh"
            )
        self._replay.popleft()
        return self._take(count, entry.end)

    def _begin_logged(self, name: str, what: int, entry: LogEntry) -> None:
        begin = entry.begins[len(self._begins)] if len(self._begins) < len(entry.begins) else None
        if what == OPENED and name in self._new:
            self._open(name)
        elif what == JUMPED and name in self._lanes and begin is not None:
            part = self._lanes[name].part
            part.gap = (part.position(), begin)
            part.go_on_at(begin)
            self._jump(self._lanes[name])
        if name not in self._lanes:
            raise OrderLogError(f"partition {name!r} of batch {entry.number} is gone. Hint: put the file or topic back")

    def _pull_logged(self, lane: _Lane, count: int, number: int) -> bool:
        """Pull as many records as were pulled then; False while some are on their way."""
        if count in (IDLE, DONE):
            self._silence(lane, count)
        while count > 0:
            pulled = self._pull(lane, count)
            if lane.part.gap is not None:
                raise OrderLogError(
                    f"{lane.part.name}: batch {number} began at offset {lane.part.gap[0]}, but the first that is there "
                    f"is {lane.part.gap[1]}: others were removed. {_BRANCH_HINT}"
                )
            if not pulled:
                if lane.part.pending:
                    return False
                raise OrderLogError(
                    f"{lane.part.name}: batch {number} had {count} more records than are there now. "
                    "Hint: the input was cut or replaced since; restore it, or start with --fresh"
                )
            count -= pulled
        return True

    # -- one record

    def _pull(self, lane: _Lane, limit: int) -> int:
        """Take up to `limit` records of a lane into the buffer (or straight to ready); how many they were."""
        part, kind = lane.part, lane.kind
        records = part.pull(limit)
        if records:
            self._note_pull(lane, len(records))
        for offset, raw in records:
            try:
                item = decoded(kind, part, offset, raw)
            except Undecodable as wrong:
                self._refuse_faulty(wrong, part.name, offset, raw)
            else:
                self._take_item(lane, item)
        return len(records)

    def _note_pull(self, lane: _Lane, count: int) -> None:
        lane.silent = lane.done = False
        self.counts["read"] += count
        pulls = self._pulls
        if pulls and pulls[-1][0] == lane.part.name and pulls[-1][1] > 0:
            count += pulls.pop()[1]
        pulls.append((lane.part.name, count))

    def _silence(self, lane: _Lane, why: int) -> None:
        """The lane holds the watermark back no longer; logged, as the order depends on when."""
        lane.silent = True
        self._pulls.append((lane.part.name, why))
        self._advance()
        if why == DONE:
            lane.done = True
            if all(lane.done for lane in self._lanes.values()):
                self._release(None)

    def _take_item(self, lane: _Lane, item: Item) -> None:
        """Check an item and put it where it belongs. One function, as every event passes here."""
        time, kind = item[0], item[1]
        late = self.watermark is not None and time < self.watermark
        if not self._earliest <= time < self._latest or (late and kind == EVENT) or self._max_jump is not None:
            fault = self._fault(time, kind)
            if fault is not None:
                self._refuse(*fault, item[3], item[4], item[6])
                return
        if not self._sorted:
            self._ready.append(item)
        elif late:  # only labels get here: they stay useful until their question expires, so they go at once
            self.counts["late_labels"] += 1
            self._ready.append(item)
        else:
            heapq.heappush(self._buffer, item)
            if len(self._buffer) > self._time.buffer:
                self._force_release()
        if lane.newest is None or time > lane.newest:
            lane.newest = time
            if self.newest is None or time > self.newest:
                self.newest = time
            # After every record, so that no verdict depends on how many were pulled at once.
            self._advance()

    def _fault(self, time: int, kind: int) -> tuple[str, str] | None:
        """Why no run should act upon an event of this time, as (reason, detail)."""
        if not self._earliest <= time < self._latest:
            return "time_out_of_range", f"event time {_text(time)} is outside the declared range"
        if self._max_jump is not None and self.newest is not None and time > self.newest + self._max_jump:
            return "time_jump", f"event time {_text(time)} is too far ahead of {_text(self.newest)}"
        if kind == EVENT and self.watermark is not None and time < self.watermark:
            return "too_late", f"event time {_text(time)} is before the watermark {_text(self.watermark)}"
        return None

    def _refuse_faulty(self, wrong: Undecodable, name: str, offset: int, raw: Raw) -> None:
        if isinstance(wrong, NoEvent):
            self.counts["tombstones"] += 1
        else:
            self._refuse(wrong.reason, str(wrong), name, offset, raw)

    def _refuse(self, reason: str, detail: str, name: str, offset: int, raw: Raw) -> None:
        self.counts["rejected_by_reader"] += 1
        self._rejects.append(reject(reason, detail, f"{name}:{offset}", raw))

    # -- the watermark

    def _advance(self) -> None:
        """Move the watermark: to what the slowest partition still speaking allows; in `arrival`, the newest."""
        floor = self._slowest() if self._sorted and not self._alone else self.newest
        if floor is None:
            return
        watermark = floor - self._lateness
        if self.watermark is None or watermark > self.watermark:
            self.watermark = watermark
            if self._buffer and self._buffer[0][0] < watermark:
                self._release(watermark)

    def _slowest(self) -> int | None:
        """The newest event time of the lane furthest behind; None while one that speaks has shown none."""
        slowest = None
        for lane in self._lanes.values():
            if lane.silent:
                continue
            if lane.newest is None:
                return None
            if slowest is None or lane.newest < slowest:
                slowest = lane.newest
        return self.newest if slowest is None else slowest

    def _release(self, before: int | None) -> None:
        """Hand on what lies before a time (all, for None): nothing that is still allowed can sort before it."""
        buffer, ready = self._buffer, self._ready
        while buffer and (before is None or buffer[0][0] < before):
            ready.append(heapq.heappop(buffer))

    def _force_release(self) -> None:
        item = heapq.heappop(self._buffer)
        self._ready.append(item)
        self.watermark = item[0] if self.watermark is None else max(self.watermark, item[0])
        self.counts["released_by_full_buffer"] += 1

    def _decode_again(self, kind: int, name: str, offset: int, raw: Raw) -> Item:
        return decoded(kind, self._lanes[name].part, offset, raw)


_BRANCH_HINT = "Hint: --from CHECKPOINT --on-gap earliest goes on with what is there, on a new branch"


def _logged_begins(entries: Iterable[LogEntry]) -> dict[str, int | None]:
    """Where the partitions were opened that the log says are new."""
    found: dict[str, int | None] = {}
    for entry in entries:
        begun = [name for name, count in entry.pulls if count in (OPENED, JUMPED)]
        opened = {name for name, count in entry.pulls if count == OPENED}
        for name, begin in zip(begun, entry.begins, strict=False):
            if name in opened:
                found.setdefault(name, begin)
    return found


def _pulls_left(pulls: list[tuple[str, int]], done: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """The pulls of a batch without those at its beginning that were done before a checkpoint.

    >>> _pulls_left([("a", 8), ("b", 2)], [("a", 5)]), _pulls_left([("a", 8), ("b", 2)], [("a", 8), ("b", 2)])
    ([('a', 3), ('b', 2)], [])
    """
    left = list(pulls)
    for name, count in done:
        logged, pulled = left.pop(0) if left else ("", 0)
        rest = pulled - count
        if logged != name or (rest and (count <= 0 or rest < 0)):
            raise OrderLogError(f"the order log does not agree with the checkpoint on what was read of {name!r}")
        if rest:
            left.insert(0, (name, rest))
    return left


def _kept(item: Item) -> tuple[int, str, int, Raw]:
    return item[1], item[3], item[4], item[6]


def _text(time_us: int) -> str:
    try:
        return to_datetime(time_us).isoformat()
    except OverflowError:
        return f"{time_us} µs"
