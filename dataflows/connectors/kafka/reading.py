"""A topic as an input: one consumer for all its partitions, offsets kept in checkpoints and nowhere else.

The consumer fetches into a buffer for each partition. A partition whose buffer is full is paused, so a slow job slows
reading down and memory stays bounded. Nothing here decides an order: that is the reader's business.
"""

from __future__ import annotations

import time as wall
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Any, ClassVar

from dataflows.events import Event, Message, NoEvent, Raw, Undecodable
from dataflows.order import Feed, InputError, Partition, ReadMode, gap_text

if TYPE_CHECKING:
    from kafka import KafkaConsumer, TopicPartition

    from dataflows.connectors.kafka.topic import Kafka

BUFFER_RECORDS = 8_000
BUFFER_BYTES = 8 << 20
"""A partition of which so much was fetched and not pulled is paused, until half of it was pulled."""

POLL_RECORDS = 100_000
"""All that was fetched is taken at once: what stays behind keeps its broker from being asked for more."""

IDLE_POLL_S = 0.001
"""Seconds between two looks at a consumer that had nothing."""

NEWS_S = 0.25
"""Seconds for which more is expected of a partition that has more, though none came: a transaction may be open."""

DISCOVER_S = 10.0
"""Seconds between two questions to the brokers for partitions that were added."""


class KafkaPartition(Partition):
    """One partition of a topic; its position is the offset of the next record."""

    numbered: ClassVar[bool] = True

    def __init__(self, feed: KafkaFeed, number: int, offset: int, end: int, bounded: bool) -> None:
        self.name = f"{feed.topic}/{number}"
        self._feed = feed
        self._event: type[Event] = feed.declared.event
        self._decoder = feed.declared.decoder
        self._end = end  # as of the start
        self._bounded = bounded
        self.place: TopicPartition = feed.place(number)
        self.paused = False
        self.highwater = end
        self._buffer: deque[tuple[int, Message]] = deque()
        self._bytes = 0
        self._more_until = 0.0
        self.go_on_at(offset)

    def go_on_at(self, position: int) -> None:
        """Pull from this offset on."""
        self._buffer.clear()
        self._bytes = 0
        self._next = self.fetched = position
        self._pulled: list[int] = []
        self._waiting_since = wall.monotonic()
        self._feed.seek_all()
        self._judge()

    def pull(self, limit: int) -> list[tuple[int, Raw]]:
        buffer = self._buffer
        if self.gap is not None:
            return []  # until the reader has taken note of it
        if not buffer:
            if self.done:
                return []
            self._feed.poll()
        count = min(limit, len(buffer))
        records = [buffer.popleft() for _ in range(count)]
        if records:
            self._pulled = [offset for offset, _ in records]
            self._next = self._pulled[-1] + 1
            self._bytes -= sum([_size(message) for _, message in records])
            self._waiting_since = wall.monotonic()
        self._judge()
        return list[tuple[int, Raw]](records)

    def _judge(self) -> None:
        """Whether the end was reached, or more is on its way."""
        empty = not self._buffer
        self.done = self._bounded and empty and self.fetched >= self._end
        self.pending = (
            empty
            and not self.done
            and (self.fetched < self._end or (self.fetched < self.highwater and wall.monotonic() < self._more_until))
        )
        if self.pending:
            self._feed.check_patience(self.name, self._waiting_since)

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
        # Marks of transactions have offsets too, but are no records: where nothing waits, they were fetched.
        return max(self.highwater - (self._next if self._buffer else max(self._next, self.fetched)), 0)

    # -- the feed's side

    def take(self, records: list[Any], fetched: int) -> None:
        """Records from the consumer, which has fetched up to an offset."""
        self.fetched = fetched
        for record in records:
            if self._bounded and record.offset >= self._end:
                self.fetched = self._end
                break
            message = Message(record.value, record.key, tuple(record.headers), record.timestamp)
            self._buffer.append((record.offset, message))
            self._bytes += _size(message)
        if records:
            self._more_until = wall.monotonic() + NEWS_S

    def note_removed(self, first: int) -> None:
        """What comes next is gone; the first there is."""
        before = self.fetched
        self.go_on_at(first)
        self.gap = (before, first)

    @property
    def end_of_buffer(self) -> int:
        """Where the consumer goes on behind what waits here."""
        return self._buffer[-1][0] + 1 if self._buffer else self._next

    @property
    def full(self) -> bool:
        """Whether enough was fetched for now."""
        return len(self._buffer) >= BUFFER_RECORDS or self._bytes >= BUFFER_BYTES

    @property
    def half_empty(self) -> bool:
        """Whether to fetch again."""
        return len(self._buffer) <= BUFFER_RECORDS // 2 and self._bytes <= BUFFER_BYTES // 2

    def close(self) -> None:
        self._buffer.clear()


def _size(message: Message) -> int:
    return len(message.value or b"") + len(message.key or b"") + 64 + 32 * len(message.headers)


class KafkaFeed(Feed):
    """A topic while it is read."""

    grows: ClassVar[bool] = True

    def __init__(self, declared: Kafka, mode: ReadMode) -> None:
        self.declared = declared
        self.topic = declared.topic
        self._mode = mode
        self._cluster = declared.cluster()
        self._consumer = self._cluster.consumer(group=declared.group, discover=DISCOVER_S)
        self._parts: dict[TopicPartition, KafkaPartition] = {}
        self._moved = False
        self._next_poll = 0.0
        try:
            with self._cluster.asking(f"find topic {self.topic!r}"):
                known = partitions_of(self._consumer, self.topic)
                self._first = self._consumer.beginning_offsets(known)
                self._ends = self._find_ends(known)
        except BaseException:
            self.close()
            raise

    def place(self, number: int) -> TopicPartition:
        """A partition as kafka-python names it."""
        from kafka import TopicPartition

        return TopicPartition(self.topic, number)

    def _find_ends(self, known: list[TopicPartition]) -> dict[TopicPartition, int]:
        """Where a bounded run ends: at a time, or where the topic ends now."""
        ends: dict[TopicPartition, int] = self._consumer.end_offsets(known)
        if self._mode.until is not None:
            after = self._consumer.offsets_for_times(dict.fromkeys(known, self._mode.until // 1000))
            ends |= {place: found.offset for place, found in after.items() if found is not None}
        return ends

    # -- the reader's side

    def names(self) -> list[str]:
        known = self._consumer.partitions_for_topic(self.topic) or ()
        return [f"{self.topic}/{number}" for number in sorted(known)]

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
        part = KafkaPartition(self, place.partition, max(wanted, first), end, bounded=not self._mode.follow)
        if wanted < first and position is not None:
            part.gap = (wanted, first)
        self._parts[place] = part
        self._moved = True
        return part

    def open_added(self, name: str) -> KafkaPartition:
        return self.open(name, self._bounds(self._named(name))[0])

    def _named(self, name: str) -> TopicPartition:
        return self.place(int(name.rpartition("/")[2]))

    def _bounds(self, place: TopicPartition) -> tuple[int, int]:
        """The first offset there is and the end; of a partition that was added they must be asked for."""
        if place not in self._first:
            with self._cluster.asking(f"find {place.topic}/{place.partition}"):
                self._first |= self._consumer.beginning_offsets([place])
                self._ends |= self._consumer.end_offsets([place])
        return self._first[place], self._ends[place]

    def _start_of(self, place: TopicPartition) -> int:
        """Where a new job begins."""
        start, (first, end) = self.declared.start, self._bounds(place)
        if start == "earliest":
            return first
        if start == "latest":
            return end
        if isinstance(start, dict):
            return int(start.get(place.partition, first))
        with self._cluster.asking(f"find {self.topic!r} by time"):
            found = self._consumer.offsets_for_times({place: start // 1000})[place]
        return end if found is None else int(found.offset)

    def note_checkpoint(self, positions: dict[str, Any]) -> None:
        if self.declared.group is not None:
            from kafka import OffsetAndMetadata

            offsets = {self._named(name): OffsetAndMetadata(at, "", -1) for name, at in positions.items()}
            self._consumer.commit_async(offsets)

    def close(self) -> None:
        self._consumer.close(autocommit=False, timeout_ms=1000)

    # -- the partitions' side

    def seek_all(self) -> None:
        """Before the next poll let the consumer go on where the partitions are."""
        self._moved = True

    def check_patience(self, name: str, since: float) -> None:
        """Raise `InputError` when brokers kept silent for too long though they have records."""
        if wall.monotonic() - since > self.declared.timeout:
            raise InputError(
                f"{name}: no answer from {self._cluster.brokers} for {self.declared.timeout:.0f} s, though there are "
                "records. Hint: the job goes on from its checkpoint when it is started again"
            )

    def poll(self) -> None:
        """Hand on what has come; never waits for more."""
        from kafka.errors import OffsetOutOfRangeError

        now = wall.monotonic()
        if now < self._next_poll or not self._parts:
            return
        if self._moved:
            self._assign()
        try:
            with self._cluster.asking(f"read topic {self.topic!r}"):
                try:
                    found = self._consumer.poll(timeout_ms=0, max_records=POLL_RECORDS)
                except OffsetOutOfRangeError as error:
                    self._find_removed(error.args[0])
                    return
        finally:
            self._next_poll = now
        for place, part in self._parts.items():
            records = found.get(place, [])
            part.highwater = max(self._consumer.highwater(place) or 0, part.highwater)
            part.take(records, self._fetched(place, part))
            if part.full and not part.paused:
                part.paused = True
                self._consumer.pause(place)
            elif part.paused and part.half_empty:
                part.paused = False
                self._consumer.resume(place)
        if not found:
            self._next_poll = now + IDLE_POLL_S

    def _fetched(self, place: TopicPartition, part: KafkaPartition) -> int:
        # `KafkaConsumer.position` goes to the network thread and back for what stands here.
        position = self._consumer._subscription.assignment[place].position
        return part.fetched if position is None else int(position.offset)

    def _assign(self) -> None:
        self._moved = False
        self._consumer.assign(list(self._parts))
        for place, part in self._parts.items():
            # Of what the consumer has fetched behind our back nothing is kept: it is fetched again.
            self._consumer.seek(place, part.end_of_buffer)

    def _find_removed(self, wanted: dict[TopicPartition, int]) -> None:
        """Records that come next were removed, by retention most likely: stop, or go on behind them."""
        self._first |= self._consumer.beginning_offsets(list(wanted))
        for place, offset in wanted.items():
            part, first = self._parts[place], self._first[place]
            if self._mode.on_gap == "stop" or first <= offset:
                raise InputError(gap_text(part.name, offset, first))
            part.note_removed(first)


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


def read_topic(declared: Kafka, begin: dict[int, int] | None = None, committed: bool = True) -> Iterator[Any]:
    """The records of a topic as kafka-python gives them, up to its end as of now.

    `begin` are offsets by partition; partitions that are not named are read from their beginning.
    """
    cluster = declared.cluster()
    with closing(cluster.consumer(committed)) as consumer, cluster.asking(f"read topic {declared.topic!r}"):
        places = partitions_of(consumer, declared.topic)
        first, ends = consumer.beginning_offsets(places), consumer.end_offsets(places)
        left = {}
        consumer.assign(places)
        for place in places:
            at = max((begin or {}).get(place.partition, 0), first[place])
            consumer.seek(place, min(at, ends[place]))
            if at < ends[place]:
                left[place] = ends[place]
        silent_since = wall.monotonic()
        while left:
            found = consumer.poll(timeout_ms=100, max_records=POLL_RECORDS)
            if found:
                silent_since = wall.monotonic()
            elif wall.monotonic() - silent_since > declared.timeout:
                raise InputError(f"topic {declared.topic!r}: no answer from {cluster.brokers}")
            for place, records in found.items():
                yield from (record for record in records if record.offset < ends[place])
            for place in [place for place, end in left.items() if (consumer.position(place) or 0) >= end]:
                del left[place]
