"""A topic as an input: one consumer for all its partitions, offsets kept in checkpoints and nowhere else.

A thread of the feed's own fetches into a buffer for each partition, so that pulling never waits for the network. A
partition whose buffer is full is paused, so a slow job slows reading down and memory stays bounded. Nothing here
decides an order: that is the reader's business.

Once the thread runs, only it uses the consumer, which is not made for more: what the reader wants of it goes through
`_ask`. "The end" of a partition is where a consumer that reads committed records can get to: the last stable offset.
"""

from __future__ import annotations

import threading
import time as wall
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import closing
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, ClassVar

from dataflows.events import Event, Message, NoEvent, Raw, Undecodable
from dataflows.order import Feed, InputError, Partition, ReadMode, gap_text

if TYPE_CHECKING:
    from kafka import KafkaConsumer, TopicPartition

    from dataflows.connectors.kafka.topic import Kafka

BUFFER_RECORDS = 8_000
BUFFER_BYTES = 8 << 20
"""A partition that holds so much, fetched and not pulled, is paused until no more than half of it is left."""

POLL_RECORDS = 100_000
"""All that was fetched is taken at once: what stays behind keeps its broker from being asked for more."""

POLL_MS = 20
"""How long the thread waits for records before it looks for questions of the reader."""

NEWS_S = 0.25
"""How long the reader waits for the next records of a partition that has more, as of when some came last. Not longer:
the high watermark counts records of open transactions too, which may not come for a long time."""

DISCOVER_S = 10.0
"""Seconds between two questions to the brokers for partitions that were added."""

CLOSE_S = 5.0
"""Seconds to wait for the thread when the feed is closed."""


class KafkaPartition(Partition):
    """One partition of a topic; its position is the offset of the next record.

    The feed's thread appends to the buffer and then says how far it has fetched; the reader takes from it.

    Parameters
    ----------
    feed
        What reads the topic.
    number
        The partition's.
    offset
        Where to begin.
    end
        The end as of the start, or where a run until a time ends.
    bounded
        Whether the partition is done at `end`.
    """

    numbered: ClassVar[bool] = True

    def __init__(self, feed: KafkaFeed, number: int, offset: int, end: int, bounded: bool) -> None:
        self.name = f"{feed.topic}/{number}"
        self._feed = feed
        self._event: type[Event] = feed.declared.event
        self._decoder = feed.declared.decoder
        self._end = end  # as of the start
        self._bounded = bounded
        self._lock = threading.Lock()
        self._buffer: deque[tuple[int, Message]] = deque()
        # Ever appended and ever pulled. Two counts, as each has one writer; the difference is what the buffer holds.
        self._bytes_in = self._bytes_out = 0
        self._more_until = 0.0  # the reader waits for more up to then
        self.away = False  # its broker cannot be reached: whether there is more, nobody knows
        self.place: TopicPartition = feed.place(number)
        self.paused = False
        self.moved = True  # the consumer has still to seek; what it gives is from elsewhere
        self.removed: tuple[int, int] | None = None  # offsets of a gap behind what the buffer holds
        self.highwater = end
        self.behind_since = wall.monotonic()  # since when nothing came of what was there at the start
        self.go_on_at(offset)

    # -- the reader's side

    def go_on_at(self, position: int) -> None:
        with self._lock:
            self._buffer.clear()
            self._bytes_in = self._bytes_out = 0
            self._next = self.fetched = position
            self._pulled: list[int] = []
            self.removed = None
            self.moved = True
        self._judge()

    def pull(self, limit: int) -> list[tuple[int, Raw]]:
        self._feed.check()
        buffer = self._buffer
        if self.gap is not None:
            return []  # until the reader has taken note of it
        if not buffer and self.removed is not None:
            gap = self.removed
            self.go_on_at(gap[1])
            self.gap = gap
            return []
        records = [buffer.popleft() for _ in range(min(limit, len(buffer)))]
        if records:
            self._pulled = [offset for offset, _ in records]
            self._next = self._pulled[-1] + 1
            self._bytes_out += sum([_size(message) for _, message in records])
        self._judge()
        return list[tuple[int, Raw]](records)

    def _judge(self) -> None:
        """Set `done` (the end was reached) and `pending` (more is on its way)."""
        fetched = self.fetched  # before the buffer is looked at: what was fetched up to here is in it
        empty = not self._buffer
        self.done = self._bounded and empty and fetched >= self._end
        # What came since the reader took from the buffer counts too.
        self.pending = not self.done and (
            not empty
            or self.away
            or fetched < self._end
            or (fetched < self.highwater and wall.monotonic() < self._more_until)
        )

    def position(self, back: int = 0) -> int:
        return self._pulled[-back] if back else self._next

    def decode(self, raw: Raw) -> Event:
        assert isinstance(raw, Message)
        if self._decoder is not None:
            return self._from_decoder(raw)
        if raw.value is None:
            raise NoEvent
        return self._event.decode(raw.value)

    def _from_decoder(self, raw: Message) -> Event:
        assert self._decoder is not None
        found = self._decoder(raw)
        if found is None:
            raise NoEvent
        if isinstance(found, self._event):
            return found
        if isinstance(found, dict):
            return self._event.from_row(found)
        raise Undecodable("invalid", f"the decoder gave {type(found).__name__}, not a dict or {self._event.__name__}")

    def lag(self) -> int:
        # Markers of transactions have offsets too, but are no records. With an empty buffer, all offsets up to
        # `fetched` that were not pulled are such markers, and nothing to wait for.
        return max(self.highwater - (self._next if self._buffer else max(self._next, self.fetched)), 0)

    def close(self) -> None:
        self._feed.drop(self)

    # -- the thread's side

    def take(self, records: list[Any], fetched: int, highwater: int) -> None:
        """Take records from the consumer, which has fetched up to the offset `fetched`.

        `highwater` is the high watermark as of the last fetch, 0 where it is not known.
        """
        with self._lock:
            if self.moved:
                return  # of the offsets before the move
            for record in records:
                if self._bounded and record.offset >= self._end:
                    fetched = self._end
                    break
                message = Message(record.value, record.key, tuple(record.headers), record.timestamp)
                self._buffer.append((record.offset, message))
                self._bytes_in += _size(message)
            now = wall.monotonic()
            if records:
                self._more_until = now + NEWS_S
            if records or self.paused or (fetched >= self._end and not self.away):
                self.behind_since = now
            self.highwater = max(highwater, self.highwater)
            self.fetched = fetched

    def seek(self) -> int:
        """The offset that the consumer is to seek; what it gives from now on is taken."""
        with self._lock:
            self.moved = False
            self.behind_since = wall.monotonic()
            return self.fetched

    @property
    def full(self) -> bool:
        """Whether enough was fetched for now."""
        return (
            len(self._buffer) >= BUFFER_RECORDS
            or self._bytes_in - self._bytes_out >= BUFFER_BYTES
            or self.removed is not None
        )

    @property
    def half_empty(self) -> bool:
        """Whether to fetch again."""
        few = len(self._buffer) <= BUFFER_RECORDS // 2 and self._bytes_in - self._bytes_out <= BUFFER_BYTES // 2
        return few and self.removed is None


def _size(message: Message) -> int:
    return len(message.value or b"") + len(message.key or b"") + 64 + 32 * len(message.headers)


class KafkaFeed(Feed):
    """A topic while it is read, with the thread that fetches it.

    Raises `InputError` where the topic is not there or no broker answers. What goes wrong in the thread later is raised
    by the next `pull`.
    """

    grows: ClassVar[bool] = True

    def __init__(self, declared: Kafka, mode: ReadMode) -> None:
        self.declared = declared
        self.topic = declared.topic
        self._mode = mode
        self._cluster = declared.cluster()
        self._consumer = self._cluster.consumer(discover=DISCOVER_S)
        self._committer: KafkaConsumer | None = None
        self._parts: dict[TopicPartition, KafkaPartition] = {}
        self._asked: SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = SimpleQueue()
        self._error: BaseException | None = None
        self._closing = False
        self._looped_at = wall.monotonic()
        self._thread: threading.Thread | None = None
        try:
            with self._cluster.asking(f"find topic {self.topic!r}"):
                known = partitions_of(self._consumer, self.topic)
                self._names = [f"{self.topic}/{place.partition}" for place in known]
                self._first = self._consumer.beginning_offsets(known)
                self._ends = self._consumer.end_offsets(known)
                self._until = self._find_until(known)
        except BaseException:
            self.close()
            raise
        self._thread = threading.Thread(target=self._run, name=f"reads {self.topic}", daemon=True)
        self._thread.start()

    def place(self, number: int) -> TopicPartition:
        """A partition as kafka-python names it."""
        from kafka import TopicPartition

        return TopicPartition(self.topic, number)

    def _find_until(self, known: list[TopicPartition]) -> dict[TopicPartition, int]:
        """Of a run until a time, by partition: the first offset with that time or a later one, where there is one."""
        if self._mode.until is None:
            return {}
        after = self._consumer.offsets_for_times(dict.fromkeys(known, self._mode.until // 1000))
        return {place: found.offset for place, found in after.items() if found is not None}

    # -- the reader's side

    def names(self) -> list[str]:
        return self._names

    def open(self, name: str, position: Any | None) -> KafkaPartition:
        place = self._named(name)
        first, end = self._bounds(place)
        wanted = self._start_of(place) if position is None else int(position)
        if wanted > end and position is not None:
            raise InputError(
                f"{name}: the job has read up to offset {wanted}, but the partition ends at {end}: the topic was "
                "deleted and made anew, or this is another cluster. Hint: the right brokers, or --fresh"
            )
        if wanted < first and position is not None and self._mode.on_gap == "stop":
            raise InputError(gap_text(name, wanted, first))
        end = max(min(end, self._until.get(place, end)), 0 if position is None else wanted)
        part = KafkaPartition(self, place.partition, max(wanted, first), end, bounded=not self._mode.follow)
        if wanted < first and position is not None:
            part.gap = (wanted, first)
        self._parts = {**self._parts, place: part}
        return part

    def open_added(self, name: str) -> KafkaPartition:
        return self.open(name, self._bounds(self._named(name))[0])

    def drop(self, part: KafkaPartition) -> None:
        """A partition is not read any more."""
        self._parts = {place: other for place, other in self._parts.items() if other is not part}

    def _named(self, name: str) -> TopicPartition:
        return self.place(int(name.rpartition("/")[2]))

    def _bounds(self, place: TopicPartition) -> tuple[int, int]:
        """The first offset there is and the end; of a partition that was added they must be asked for."""
        if place not in self._first:
            self._first |= self._ask(lambda: self._consumer.beginning_offsets([place]))
            self._ends |= self._ask(lambda: self._consumer.end_offsets([place]))
        return self._first[place], self._ends[place]

    def _start_of(self, place: TopicPartition) -> int:
        """Where a new job begins to read a partition, as declared."""
        start, (first, end) = self.declared.start, self._bounds(place)
        if start == "earliest":
            return first
        if start == "latest":
            return end
        if isinstance(start, dict):
            return int(start.get(place.partition, first))
        found = self._ask(lambda: self._consumer.offsets_for_times({place: start // 1000}))[place]
        return end if found is None else int(found.offset)

    def note_checkpoint(self, positions: dict[str, Any]) -> None:
        if self.declared.group is None or not positions:
            return
        from kafka import OffsetAndMetadata

        offsets = {self._named(name): OffsetAndMetadata(at, "", -1) for name, at in positions.items()}
        self._asked.put((lambda: self._commit(offsets), Future()))

    def _commit(self, offsets: Any) -> None:
        """Commit by a consumer of its own, so that a fault of the group's coordinator does not end the reading one."""
        if self._committer is None:
            self._committer = self._cluster.consumer(group=self.declared.group)
        self._committer.commit_async(offsets)

    def check(self) -> None:
        """Raise what ended the thread, or that it hangs."""
        if self._error is not None:
            raise self._error
        if wall.monotonic() - self._looped_at > 2 * self.declared.timeout:
            raise InputError(
                f"topic {self.topic!r}: kafka-python has not come back for {2 * self.declared.timeout:.0f} s"
            )

    def _ask(self, question: Callable[[], Any]) -> Any:
        """Have the thread ask the consumer something; waits up to `timeout` seconds for the answer."""
        answer: Future[Any] = Future()
        self._asked.put((question, answer))
        with self._cluster.asking(f"find out about topic {self.topic!r}"):
            return answer.result(timeout=self.declared.timeout)

    def close(self) -> None:
        self._closing = True
        if self._thread is not None:
            self._thread.join(timeout=CLOSE_S)
        for consumer in (self._consumer, self._committer):
            if consumer is not None:
                consumer.close(autocommit=False, timeout_ms=1000)

    # -- the thread

    def _run(self) -> None:
        try:
            while not self._closing:
                self._looped_at = wall.monotonic()
                self._answer()
                with self._cluster.asking(f"read topic {self.topic!r}"):
                    self._fetch()
        except BaseException as error:  # noqa: BLE001 - told to the reader, which ends the run
            self._error = error

    def _answer(self) -> None:
        """Do what the reader asked for."""
        while True:
            try:
                question, answer = self._asked.get_nowait()
            except Empty:
                return
            try:
                answer.set_result(question())
            except BaseException as error:  # noqa: BLE001 - told to whoever asked
                answer.set_exception(error)

    def _fetch(self) -> None:
        """Fetch for up to `POLL_MS`, hand records to their partitions, pause and resume these."""
        from kafka.errors import OffsetOutOfRangeError

        parts = self._parts
        # `KafkaConsumer.partitions_for_topic` would ask brokers, each time, for a topic that is gone.
        known = self._consumer._cluster.partitions_for_topic(self.topic)
        if known:
            self._names = [f"{self.topic}/{number}" for number in sorted(known)]
        self._assign(parts)
        if not parts:
            wall.sleep(POLL_MS / 1000)
            return
        try:
            found = self._consumer.poll(timeout_ms=POLL_MS, max_records=POLL_RECORDS)
        except OffsetOutOfRangeError as error:
            self._note_removed(error.args[0], parts)
            return
        for place, part in parts.items():
            part.away = self._is_away(place)
            part.take(found.get(place, []), self._fetched(place, part), self._consumer.highwater(place) or 0)
            if part.full and not part.paused:
                part.paused = True
                self._consumer.pause(place)
            elif part.paused and part.half_empty:
                part.paused = False
                self._consumer.resume(place)
            elif wall.monotonic() - part.behind_since > self.declared.timeout:
                raise InputError(
                    f"{part.name}: nothing came from {self._cluster.brokers} for {self.declared.timeout:.0f} s, though "
                    "there are records, or its broker is away. Hint: the job goes on from its checkpoint when it is "
                    "started again"
                )

    def _is_away(self, place: TopicPartition) -> bool:
        leader = self._consumer._cluster.leader_for_partition(place)
        return leader is None or leader < 0 or not self._consumer._client.connected(leader)

    def _assign(self, parts: dict[TopicPartition, KafkaPartition]) -> None:
        """Give the consumer the partitions of now, and seek where the reader has moved one."""
        if self._consumer.assignment() != set(parts):
            self._consumer.assign(list(parts))
        for place, part in parts.items():
            if part.moved:
                self._consumer.seek(place, part.seek())

    def _fetched(self, place: TopicPartition, part: KafkaPartition) -> int:
        # `KafkaConsumer.position` would ask the brokers, and wait, where there is no position yet.
        position = self._consumer._subscription.assignment[place].position
        return part.fetched if position is None else int(position.offset)

    def _note_removed(self, wanted: dict[TopicPartition, int], parts: dict[TopicPartition, KafkaPartition]) -> None:
        """The offsets to go on at are out of range, most likely as retention removed records: stop, or go on behind.

        `wanted` are these offsets.
        """
        self._first |= self._consumer.beginning_offsets(list(wanted))
        for place, offset in wanted.items():
            part, first = parts[place], self._first[place]
            if self._mode.on_gap == "stop" or first <= offset:
                raise InputError(gap_text(part.name, offset, first))
            # The reader pulls what was fetched before first; then it takes note of the gap.
            part.removed = (offset, first)
            part.paused = True
            self._consumer.pause(place)


def partitions_of(consumer: KafkaConsumer, topic: str) -> list[TopicPartition]:
    """A topic's partitions. Raises `InputError` where there is no such topic."""
    from kafka import TopicPartition

    numbers = consumer.partitions_for_topic(topic)
    if not numbers:
        raise InputError(
            f"there is no topic {topic!r} at {', '.join(consumer.config['bootstrap_servers'])}. Hint: make it first, "
            f"for example: kafka-topics.sh --create --topic {topic} --partitions 3 --bootstrap-server …"
        )
    return [TopicPartition(topic, number) for number in sorted(numbers)]


def find_gaps(declared: Kafka, positions: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """See `Source.gaps`."""
    from kafka import TopicPartition

    wanted = {
        TopicPartition(declared.topic, int(name.rpartition("/")[2])): int(at)
        for name, at in positions.items()
        if name.rpartition("/")[0] == declared.topic
    }
    if not wanted:
        return {}
    cluster = declared.cluster()
    with closing(cluster.consumer()) as consumer, cluster.asking(f"find topic {declared.topic!r}"):
        known = set(partitions_of(consumer, declared.topic))
        first = consumer.beginning_offsets([place for place in wanted if place in known])
    return {
        f"{place.topic}/{place.partition}": (wanted[place], begin)
        for place, begin in first.items()
        if begin > wanted[place]
    }


def read_topic(declared: Kafka, begin: dict[int, int] | None = None) -> Iterator[Any]:
    """The committed records of a topic as kafka-python gives them, up to its end as of now.

    `begin` are offsets by partition. A partition that is not named is read from its beginning; so is one that ends
    before its offset, as it was made anew since. Transactions that are open now are waited for. Raises `InputError`
    where nothing came for the declared `timeout`.
    """
    cluster = declared.cluster()
    with closing(cluster.consumer()) as consumer, cluster.asking(f"read topic {declared.topic!r}"):
        places = partitions_of(consumer, declared.topic)
        first, ends = consumer.beginning_offsets(places), _true_ends(cluster, places)
        left = {}
        consumer.assign(places)
        for place in places:
            at = (begin or {}).get(place.partition, 0)
            if at > ends[place]:
                at = 0
            consumer.seek(place, max(at, first[place]))
            if max(at, first[place]) < ends[place]:
                left[place] = ends[place]
        silent_since = wall.monotonic()
        while left:
            found = consumer.poll(timeout_ms=100, max_records=POLL_RECORDS)
            if found:
                silent_since = wall.monotonic()
            elif wall.monotonic() - silent_since > declared.timeout:
                raise InputError(
                    f"topic {declared.topic!r} at {cluster.brokers} could not be read to its end within "
                    f"{declared.timeout:.0f} s. Hint: are the brokers up? Does a transaction stay open?"
                )
            for place, records in found.items():
                yield from (record for record in records if record.offset < ends[place])
            for place in [place for place, end in left.items() if (consumer.position(place) or 0) >= end]:
                del left[place]


def _true_ends(cluster: Any, places: list[TopicPartition]) -> dict[TopicPartition, int]:
    """Where partitions end, open transactions included."""
    with closing(cluster.consumer(committed=False)) as consumer:
        ends: dict[TopicPartition, int] = consumer.end_offsets(places)
        return ends
