"""A topic as an output: each record once, whatever was killed when.

Every record has a number, which depends on the logged order of events alone, and carries it in its last header:
`millrace: JOB/TAG/NUMBER`. The tag is drawn once for each output, topic and branch. After a resume the same records are
made again under the same numbers, and those that are in the topic already are found by them and not sent twice.

`immediate`: a record is sent at once. A checkpoint waits until all records before it are acknowledged, so a resume
looks only for later ones in the topic.

`transactional`: records wait in an outbox until the checkpoint after them is complete, then go out in one transaction.
After a kill the outbox has what the checkpoint held, and the topic tells what was published of that.

A checkpoint keeps: the tag, `count` (the number of the last record made), `published` (the number up to which all
records are in the topic), and `offsets` (by partition, an offset that no record after `published` lies before).
"""

from __future__ import annotations

import threading
import time as wall
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from queue import Full, Queue
from typing import TYPE_CHECKING, Any, NoReturn
from uuid import uuid4

import msgspec

from dataflows.connectors.kafka.outbox import Outbox, Segment, read
from dataflows.connectors.kafka.reading import partitions_of, read_topic
from dataflows.control import write_whole
from dataflows.job import Output, SinkError, SinkWriter

if TYPE_CHECKING:
    from dataflows.connectors.kafka.topic import Encoded, Kafka

HEADER = "millrace"
"""The header that holds job, tag and number of a record; the last one of that name counts."""

UNACKNOWLEDGED = 50_000
UNACKNOWLEDGED_BYTES = 64 << 20
"""Records, and bytes of them, that may be sent and not acknowledged at once; beyond, writing waits."""

SEGMENTS = 8
"""Checkpoints whose records may wait for their transactions at once; beyond, writing waits."""


class Begin(msgspec.Struct, frozen=True):
    """How an output began on a branch: the tag of its records, the topic, and by partition where that ended before."""

    tag: str
    topic: str
    offsets: dict[str, int]


class _Writer(SinkWriter):
    """What both modes have in common: numbers, tags, what is in the topic already, what is not acknowledged yet.

    Raises `SinkError` where a record cannot be written within `timeout` seconds, and `InputError` where the topic
    cannot be found or read at the start.
    """

    def __init__(self, declared: Kafka, output: Output, position: Any | None) -> None:
        self._declared = declared
        self._cluster = declared.cluster()
        self._topic = declared.topic
        self._output = output
        kept: dict[str, Any] = position or {}
        self._begin = self._begun()
        self._count: int = kept.get("count", 0)
        same = kept.get("tag") == self._begin.tag
        self._offsets: dict[str, int] = dict(kept["offsets"] if same else self._begin.offsets)
        self._published: int = kept.get("published", 0) if same else 0
        # Both as of one moment, for the checkpoint: `_offsets` moves on with each acknowledgement. One tuple, as
        # another thread may read it.
        self._settled = (self._published, dict(self._offsets))
        self._prefix = f"{output.job}/{self._begin.tag}/"
        self._under_way: deque[tuple[float, int, Any]] = deque()  # sent when, bytes, future; oldest first
        self._bytes = 0  # of those under way
        self._outbox = Outbox(output.state / "outbox" / f"{output.kind}-{output.branch}")
        self._outbox.begin(self._count)
        self._there: set[int] = set()  # numbers that the topic has, of records to be made again

    def _begun(self) -> Begin:
        """How this output began: read back, or written now, where it is new or its topic has another name.

        Written before the first record is sent: a run that is killed before its first checkpoint must find the tag.
        """
        path = self._output.begun
        if path.exists():
            begin = msgspec.json.decode(path.read_bytes(), type=Begin)
            if begin.topic == self._topic:
                return begin
        begin = Begin(uuid4().hex[:12], self._topic, self._ends())
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, msgspec.json.encode(begin), durable=True)
        return begin

    def _ends(self) -> dict[str, int]:
        """Where the topic ends now, by partition; it is made here, where brokers make topics on demand."""
        from kafka.errors import KafkaError

        producer = self._cluster.producer(None)
        try:
            with self._cluster.asking(f"find or make topic {self._topic!r}"):
                producer.partitions_for(self._topic)
        finally:
            with suppress(KafkaError):
                producer.close(timeout=5)
        consumer = self._cluster.consumer(committed=False)
        try:
            with self._cluster.asking(f"find topic {self._topic!r}"):
                ends = consumer.end_offsets(partitions_of(consumer, self._topic))
        finally:
            consumer.close(autocommit=False, timeout_ms=1000)
        return {str(place.partition): end for place, end in ends.items()}

    def _numbers_there(self) -> set[int]:
        """The numbers of this output's records that the topic has at or after `offsets`."""
        found = set()
        prefix = self._prefix.encode()
        begin = {int(number): at for number, at in self._offsets.items()}
        for record in read_topic(self._declared, begin):
            # Dead letters have the headers of their originals before ours.
            name, value = record.headers[-1] if record.headers else ("", None)
            if name == HEADER and value is not None and value.startswith(prefix) and value[len(prefix) :].isdigit():
                found.add(int(value[len(prefix) :]))
        return found

    def _numbered(self, number: int, headers: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
        return [*headers, (HEADER, f"{self._prefix}{number}".encode())]

    # -- sending

    def _send(self, producer: Any, record: Encoded, number: int) -> None:
        """Send one; wait where too much is under way."""
        from kafka.errors import KafkaError

        key, value, headers = record
        size = len(value or b"") + len(key or b"") + 64
        try:
            # Without a key kafka-python draws a partition; a resume has to find the record where it was.
            partition = None if key is not None else number % len(self._begin.offsets)
            future = producer.send(self._topic, value, key, headers, partition)
        except (KafkaError, OSError) as error:
            self._fail(error)
        self._under_way.append((wall.monotonic(), size, future))
        self._bytes += size
        while len(self._under_way) > UNACKNOWLEDGED or self._bytes > UNACKNOWLEDGED_BYTES:
            self._wait()

    def _collect(self) -> None:
        """Take note of acknowledgements, oldest first, up to the first that is missing."""
        under_way = self._under_way
        while under_way and under_way[0][2].is_done:
            _, size, future = under_way.popleft()
            self._bytes -= size
            if future.failed():
                self._fail(future.exception)
            where = future.value
            self._offsets[str(where.partition)] = where.offset + 1
        if under_way and wall.monotonic() - under_way[0][0] > self._declared.timeout:
            # The client's own bound does not always hold when a broker vanishes from the metadata.
            self._fail(TimeoutError("not acknowledged"))

    def _wait(self) -> None:
        """Until the oldest record is acknowledged."""
        from kafka.errors import KafkaError

        sent, _, future = self._under_way[0]
        try:
            future.get(timeout=max(sent + self._declared.timeout - wall.monotonic(), 0.001))
        except KafkaError as error:
            self._fail(error)
        self._collect()

    def _wait_for_all(self) -> None:
        while self._under_way:
            self._wait()

    def _fail(self, error: BaseException) -> NoReturn:
        if isinstance(error, SinkError):
            raise error
        raise SinkError(
            f"{self._output.kind} could not be written to topic {self._topic!r} at {self._cluster.brokers} within "
            f"{self._declared.timeout:.0f} s: {type(error).__name__}: {error}. "
            "Hint: the job goes on from its checkpoint when it is started again"
        ) from None

    def _settle(self, number: int) -> None:
        """All records up to this one are in the topic."""
        self._published = number
        self._settled = (number, dict(self._offsets))

    def _position(self) -> dict[str, Any]:
        published, offsets = self._settled
        return {"tag": self._begin.tag, "count": self._count, "published": published, "offsets": offsets}


class ImmediateWriter(_Writer):
    """Sends at once, except what the topic has already."""

    def __init__(self, declared: Kafka, output: Output, position: Any | None) -> None:
        super().__init__(declared, output, position)
        self._there = self._numbers_there()
        self._producer = self._cluster.producer(declared.compression)
        for segment in self._outbox.complete():  # left from a run in transactional mode
            for number, (key, value, headers) in enumerate(read(segment), segment.first):
                if number not in self._there and number > self._published:
                    self._send(self._producer, (key, value, headers), number)
            self._wait_for_all()
            segment.path.unlink()

    def write(self, chunk: list[Encoded]) -> None:
        for key, value, headers in chunk:
            self._count += 1
            if self._there and self._count in self._there:
                self._there.discard(self._count)
            else:
                self._send(self._producer, (key, value, self._numbered(self._count, headers)), self._count)
        self._collect()

    def flush(self) -> None:
        return  # the producer sends by itself

    def position(self) -> dict[str, Any]:
        self._wait_for_all()
        self._settle(self._count)
        return self._position()

    def close(self) -> None:
        from kafka.errors import KafkaError

        with suppress(KafkaError):
            self._producer.close(timeout=1)


class TransactionalWriter(_Writer):
    """Keeps records in an outbox, and publishes those of each checkpoint from a thread of its own."""

    def __init__(self, declared: Kafka, output: Output, position: Any | None) -> None:
        super().__init__(declared, output, position)
        self._error: BaseException | None = None
        self._busy_since: float | None = None
        self._producer = self._cluster.producer(declared.compression, f"millrace-{output.job}-{self._begin.tag}")
        # Fences a process of before that may still be alive, and ends its open transaction: before the topic is read,
        # which would wait for it.
        self._within_bound(self._producer.init_transactions)
        self._there = self._numbers_there()
        for segment in self._outbox.complete():
            self._within_bound(lambda left=segment: self._publish(left))  # type: ignore[misc]
        self._queued = self._count
        self._queue: Queue[Segment | None] = Queue(SEGMENTS)
        self._thread = threading.Thread(target=self._publish_queued, name=f"writes {self._topic}", daemon=True)
        self._thread.start()

    def _within_bound(self, work: Callable[[], Any]) -> None:
        """Do within `timeout` seconds what kafka-python would wait for without an end."""
        failed: list[BaseException] = []

        def body() -> None:
            try:
                work()
            except BaseException as error:  # noqa: BLE001 - raised below
                failed.append(error)

        thread = threading.Thread(target=body, daemon=True)
        thread.start()
        thread.join(self._declared.timeout)
        if thread.is_alive():
            self._fail(TimeoutError("no answer"))
        if failed:
            self._fail(failed[0])

    def write(self, chunk: list[Encoded]) -> None:
        self._check()
        records = []
        for key, value, headers in chunk:
            self._count += 1
            records.append((key, value, self._numbered(self._count, headers)))
        self._outbox.add(records)

    def begin_epoch(self) -> None:
        self._check()
        for segment in self._outbox.complete():
            if segment.first > self._queued:
                self._enqueue(segment)

    def _enqueue(self, segment: Segment) -> None:
        deadline = wall.monotonic() + self._declared.timeout
        while True:
            try:
                self._queue.put(segment, timeout=0.1)
            except Full:
                self._check()
                if wall.monotonic() > deadline:
                    self._fail(TimeoutError("transactions do not get through"))
            else:
                self._queued = segment.last
                return

    def _publish_queued(self) -> None:
        try:
            while (segment := self._queue.get()) is not None:
                self._busy_since = wall.monotonic()
                self._publish(segment)
                self._busy_since = None
        except BaseException as error:  # noqa: BLE001 - told to whoever writes next
            self._error = error

    def _publish(self, segment: Segment) -> None:
        """Send what the topic does not have of a segment, in one transaction; then delete the segment.

        Nothing is committed before all of it is acknowledged.
        """
        if segment.last > self._published:
            numbered = enumerate(read(segment), segment.first)
            left = [(number, record) for number, record in numbered if number not in self._there]
            if left:
                self._producer.begin_transaction()
                for number, record in left:
                    self._send(self._producer, record, number)
                self._wait_for_all()
                self._producer.commit_transaction()
            self._there -= set(range(segment.first, segment.last + 1))
            self._settle(segment.last)
        segment.path.unlink()

    def _check(self) -> None:
        if self._error is not None:
            self._fail(self._error)
        if self._busy_since is not None and wall.monotonic() - self._busy_since > self._declared.timeout:
            self._fail(TimeoutError("a transaction does not get through"))

    def flush(self) -> None:
        self._check()

    def position(self) -> dict[str, Any]:
        self._check()
        self._outbox.close_at(self._count)
        return self._position()

    def close(self) -> None:
        from kafka.errors import KafkaError

        with suppress(Full):
            self._queue.put(None, timeout=0.1)
        self._outbox.close()
        self._thread.join(timeout=5)
        if not self._thread.is_alive():
            with suppress(KafkaError):
                self._producer.close(timeout=1)
