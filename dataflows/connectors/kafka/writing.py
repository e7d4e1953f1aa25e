"""A topic as an output: each record once, whatever was killed when.

Every record has a number, which depends on the logged order of events alone, and carries it in the header `millrace`
together with a tag of this run and output. After a resume the same records are made again under the same numbers, and
what is in the topic already is found by them and not sent twice.

`immediate`: a record is sent at once. A checkpoint waits until all before it are acknowledged, so only records after
the checkpoint are looked for in the topic.

`transactional`: records wait in an outbox until the checkpoint after them is complete, then go out in one transaction.
After a kill the outbox knows what the checkpoint held, and the topic (its last number) what was published of that.
"""

from __future__ import annotations

import threading
import time as wall
from collections import deque
from contextlib import suppress
from queue import Empty, Full, Queue
from typing import TYPE_CHECKING, Any, NoReturn
from uuid import uuid4

import msgspec

from dataflows.connectors.kafka.outbox import Outbox, Segment, read
from dataflows.connectors.kafka.reading import partitions_of, read_topic
from dataflows.control import write_whole
from dataflows.job import Output, SinkWriter

if TYPE_CHECKING:
    from dataflows.connectors.kafka.topic import Encoded, Kafka

HEADER = "millrace"
"""The header that holds job, tag and number of a record."""

UNACKNOWLEDGED = 50_000
"""Records that may be under way to the brokers at once; then writing waits."""

SEGMENTS = 8
"""Checkpoints whose records may wait for their transactions at once; then writing waits."""


class SinkError(RuntimeError):
    """An output that cannot be written."""


class _Begin(msgspec.Struct, frozen=True):
    """Of an output of one run: the tag of its records, and where the topic ended before the first of them."""

    tag: str
    offsets: dict[str, int]


class _Writer(SinkWriter):
    """What both modes have in common: numbers, tags, what is in the topic already."""

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
        self._prefix = f"{output.job}/{self._begin.tag}/"

    def _begun(self) -> _Begin:
        """Written before the first record is sent: a run that is killed before its first checkpoint must find it."""
        path = self._output.state / "outputs" / f"{self._output.kind}-{self._output.branch}.json"
        if path.exists():
            return msgspec.json.decode(path.read_bytes(), type=_Begin)
        begin = _Begin(uuid4().hex[:12], self._ends())
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, msgspec.json.encode(begin), durable=True)
        return begin

    def _ends(self) -> dict[str, int]:
        """Where the topic ends now, by partition; it is made here, where brokers make topics on demand."""
        from kafka import KafkaProducer  # noqa: F401 - a broken installation fails here, with its own message

        producer = self._cluster.producer(None)
        try:
            with self._cluster.asking(f"find or make topic {self._topic!r}"):
                producer.partitions_for(self._topic)
        finally:
            producer.close(timeout=5)
        consumer = self._cluster.consumer(committed=False)
        try:
            with self._cluster.asking(f"find topic {self._topic!r}"):
                ends = consumer.end_offsets(partitions_of(consumer, self._topic))
        finally:
            consumer.close(autocommit=False, timeout_ms=1000)
        return {str(place.partition): end for place, end in ends.items()}

    def _numbers_there(self, committed: bool) -> set[int]:
        """The numbers of this output's records that are in the topic, of those after the checkpoint."""
        found = set()
        begin = {int(number): at for number, at in self._offsets.items()}
        for record in read_topic(self._declared, begin, committed):
            for name, value in record.headers:
                if name == HEADER and value is not None and value.decode().startswith(self._prefix):
                    found.add(int(value[len(self._prefix) :]))
        return found

    def _header(self, number: int) -> tuple[str, bytes]:
        return HEADER, f"{self._prefix}{number}".encode()

    def _note(self, future: Any) -> None:
        """An acknowledged record: where the topic goes on behind it. Raises `SinkError` for one that failed."""
        if future.failed():
            self._fail(future.exception)
        where = future.value
        self._offsets[str(where.partition)] = where.offset + 1

    def _fail(self, error: BaseException) -> NoReturn:
        raise SinkError(
            f"{self._output.kind} could not be written to topic {self._topic!r} at {self._cluster.brokers} within "
            f"{self._declared.timeout:.0f} s: {type(error).__name__}: {error}. "
            "Hint: the job goes on from its checkpoint when it is started again"
        ) from None

    def _position(self) -> dict[str, Any]:
        return {"tag": self._begin.tag, "count": self._count, "offsets": dict(self._offsets)}


class ImmediateWriter(_Writer):
    """Sends at once; what the topic has already is left out."""

    def __init__(self, declared: Kafka, output: Output, position: Any | None) -> None:
        super().__init__(declared, output, position)
        self._there = {number for number in self._numbers_there(committed=False) if number > self._count}
        self._producer = self._cluster.producer(declared.compression)
        self._under_way: deque[tuple[float, Any]] = deque()

    def write(self, chunk: list[Encoded]) -> None:
        now = wall.monotonic()
        for key, value, headers in chunk:
            self._count += 1
            if self._there and self._count in self._there:
                self._there.discard(self._count)
            else:
                self._under_way.append((now, self._send(key, value, [*headers, self._header(self._count)])))
        self._collect()
        while len(self._under_way) > UNACKNOWLEDGED:
            self._wait()

    def _send(self, key: bytes | None, value: bytes | None, headers: list[tuple[str, bytes]]) -> Any:
        from kafka.errors import KafkaError

        try:
            return self._producer.send(self._topic, value, key, headers)
        except KafkaError as error:
            self._fail(error)

    def _collect(self) -> None:
        """Take note of what was acknowledged, in order."""
        under_way = self._under_way
        while under_way and under_way[0][1].is_done:
            self._note(under_way.popleft()[1])
        if under_way and wall.monotonic() - under_way[0][0] > self._declared.timeout:
            # The client's own bound does not always hold when a broker vanishes from the metadata.
            self._fail(TimeoutError("not acknowledged"))

    def _wait(self) -> None:
        """Until the oldest record is acknowledged."""
        from kafka.errors import KafkaError

        sent, future = self._under_way[0]
        try:
            future.get(timeout=max(sent + self._declared.timeout - wall.monotonic(), 0.001))
        except KafkaError as error:
            self._fail(error)
        self._collect()

    def flush(self) -> None:
        return  # under way already

    def position(self) -> dict[str, Any]:
        while self._under_way:
            self._wait()
        return self._position()

    def close(self) -> None:
        self._producer.close(timeout=1)


class TransactionalWriter(_Writer):
    """Keeps records in an outbox, and publishes them by checkpoint from a thread of its own."""

    def __init__(self, declared: Kafka, output: Output, position: Any | None) -> None:
        super().__init__(declared, output, position)
        self._outbox = Outbox(output.state / "outbox" / f"{output.kind}-{output.branch}")
        self._outbox.begin(self._count)
        self._closed_at = self._count
        self._error: BaseException | None = None
        self._busy_since: float | None = None
        # Beginning fences a run that may still be somewhere, and ends what it left open.
        self._producer = self._cluster.producer(declared.compression, f"millrace-{output.job}-{self._begin.tag}")
        self._producing = threading.Lock()
        self._queue: Queue[Segment | None] = Queue(SEGMENTS)
        with self._cluster.asking("begin transactions"):
            self._producer.init_transactions()
        self._publish_left()
        self._thread = threading.Thread(target=self._publish_queued, daemon=True)
        self._thread.start()

    def _publish_left(self) -> None:
        """What a checkpoint holds and the topic does not."""
        left = self._outbox.complete()
        if not left:
            return
        published = max(self._numbers_there(committed=True), default=0)
        for segment in left:
            if segment.last > published:
                self._publish(segment)
            segment.path.unlink()

    def write(self, chunk: list[Encoded]) -> None:
        self._check()
        records = []
        for key, value, headers in chunk:
            self._count += 1
            records.append((key, value, [*headers, self._header(self._count)]))
        self._outbox.add(records)

    def begin_epoch(self) -> None:
        self._check()
        for segment in self._outbox.complete():
            if segment.first > self._queued:
                self._enqueue(segment)

    _queued = 0

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
                segment.path.unlink()
                self._busy_since = None
        except BaseException as error:  # noqa: BLE001 - told to whoever writes next
            self._error = error

    def _publish(self, segment: Segment) -> None:
        """One transaction."""
        self._producer.begin_transaction()
        futures = [self._producer.send(self._topic, value, key, headers) for key, value, headers in read(segment)]
        self._producer.commit_transaction()
        for future in futures:
            self._note(future)

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
        with suppress(Empty, Full):
            self._queue.put(None, timeout=0.1)
        self._outbox.close()
        self._thread.join(timeout=5)
        self._producer.close(timeout=1)
