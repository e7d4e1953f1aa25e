"""The declaration of a topic, and its records as bytes; reading and writing are imported when they are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import msgspec
from pydantic import BaseModel, Field, field_validator

from dataflows.connectors.kafka.cluster import Cluster
from dataflows.connectors.kafka.security import Security
from dataflows.events import Event, Message, Outcome, Prediction, Record, Reject, encode, reject, to_time_us
from dataflows.job import JobError, Output, Sink, SinkWriter, faults_of
from dataflows.order import Feed, ReadMode, Source

Encoded = tuple[bytes | None, bytes | None, list[tuple[str, bytes]]]
"""Key, value and headers of a record to be written."""


class Kafka(Source, Sink):
    """A topic of Kafka, as an input or as an output.

    Parameters
    ----------
    topic
        Its name.
    event
        For inputs: the class of its events.
    brokers
        `host:port`, several with commas. Default: `--kafka`, or the variable `MILLRACE_KAFKA_BROKERS`.
    start
        For inputs: where a new job begins to read. `earliest` (default), `latest`, a time (aware datetime or ISO text:
        the first record with that timestamp or a later one), or offsets by partition, `{0: 1200, 1: 1180}` (partitions
        that are not named: from their beginning). A job that resumes goes on where its checkpoint is.
    decoder
        For inputs: a function of a `Message` (value, key, headers, timestamp) that gives a dict or an event, or None
        for a record that says nothing. It is given null values too. Default: the value is JSON. What it raises makes
        the record a reject.
    group
        For inputs: a consumer group to which the offsets of each checkpoint are committed, for monitors of lag. No job
        reads them back.
    encoder
        For outputs: a function of a record (`Prediction`, `Outcome`, …) that gives the bytes of the value. Default:
        JSON.
    mode
        For outputs. `immediate` (default): a record is sent at once. `transactional`: the records between two
        checkpoints are written in one transaction, once the second is complete, so consumers (`read_committed`) see
        each once, up to one checkpoint interval later.
    compression
        For outputs: `gzip`, `snappy`, `lz4` or `zstd`; inputs know by themselves.
    timeout
        Seconds for which brokers may be away; then the job stops with an error, and goes on when it is started again.
        Transactions of a job that died are aborted after it too, or after 600 s if it is longer.
    security
        Default: what the variables `MILLRACE_KAFKA_…` say (`Security`).

    Without a decoder, a null value (a tombstone) says that nothing happened: it is passed over and counted. An empty
    value is a reject.

    Raises `JobError` where a parameter is wrong.

    >>> class Payment(Event, id="payment_id", time="paid_at", unit="ms"):
    ...     payment_id: str
    ...     paid_at: int
    >>> Kafka("payments", Payment, start="latest").describe()
    'topic payments'
    """

    topic: str = Field(pattern=r"^[a-zA-Z0-9._-]{1,249}$")
    event: type[Event] = Event
    brokers: str | None = None
    start: Any = "earliest"
    decoder: Callable[[Message], Any] | None = None
    group: str | None = None
    encoder: Callable[[Any], bytes] | None = None
    mode: Literal["immediate", "transactional"] = "immediate"
    compression: Literal["gzip", "snappy", "lz4", "zstd"] | None = None
    timeout: float = Field(default=120.0, ge=2.0, allow_inf_nan=False)
    security: Security | None = None

    def __init__(self, topic: str, event: type[Event] = Event, /, **named: Any) -> None:
        if not isinstance(named.get("security"), Security | None):
            # Said here, as pydantic would quote what may be a password.
            raise JobError("Kafka: security: is no Security. Hint: Security(protocol='SASL_SSL', ...)")
        with faults_of("Kafka"):
            BaseModel.__init__(self, topic=topic, event=event, **named)

    @field_validator("topic")
    @classmethod
    def _check_topic(cls, topic: str) -> str:
        if topic in (".", ".."):
            raise ValueError("Kafka has no topics of this name")
        return topic

    @field_validator("start")
    @classmethod
    def _check_start(cls, start: Any) -> Any:
        if start in ("earliest", "latest"):
            return start
        if isinstance(start, dict):
            if all(type(n) is int and type(at) is int and n >= 0 and at >= 0 for n, at in start.items()):
                return start
        elif isinstance(start, str | datetime):
            try:
                return to_time_us(start)
            except ValueError:
                pass
        elif type(start) is int:
            return start  # µs, as kept after the first validation
        raise ValueError(f"start={start!r} is none of 'earliest', 'latest', a time, offsets by partition")

    def cluster(self) -> Cluster:
        """What connects to the brokers; see `Cluster` for what it raises."""
        return Cluster(self.brokers, self.security, self.timeout)

    # -- as an input

    @property
    def endless(self) -> bool:
        """A topic has no end of its own."""
        return True

    def names(self) -> list[str]:
        feed = self.feed(ReadMode())
        try:
            return feed.names()
        finally:
            feed.close()

    def feed(self, mode: ReadMode) -> Feed:
        from dataflows.connectors.kafka.reading import KafkaFeed

        return KafkaFeed(self, mode)

    def describe(self) -> str:
        return f"topic {self.topic}" + (f" at {self.brokers}" if self.brokers else "")

    def gaps(self, positions: dict[str, Any]) -> dict[str, tuple[int, int]]:
        from dataflows.connectors.kafka.reading import find_gaps

        return find_gaps(self, positions)

    # -- as an output

    @property
    def keyed(self) -> bool:
        """Records of one entity go to one partition."""
        return True

    @property
    def by_checkpoint(self) -> bool:
        """Transactions are committed once a checkpoint is complete."""
        return self.mode == "transactional"

    def where(self) -> str:
        return f"{self.describe()}, {self.mode}"

    def writer(self, output: Output, position: Any | None) -> SinkWriter:
        from dataflows.connectors.kafka.writing import ImmediateWriter, TransactionalWriter

        writer = TransactionalWriter if self.by_checkpoint else ImmediateWriter
        return writer(self, output, position)

    def accepts(self, position: Any) -> bool:
        return isinstance(position, dict) and "tag" in position

    def settle(self, output: Output, position: Any | None) -> None:
        from dataflows.connectors.kafka.outbox import Outbox

        outbox = Outbox(output.state / "outbox" / f"{output.kind}-{output.branch}")
        if isinstance(position, dict) and any(segment.last <= position["count"] for segment in outbox.complete()):
            self.writer(output, position).close()

    def encode(self, records: list[Record], keys: list[Any]) -> list[Encoded]:
        encoder = self.encoder or _json
        return [_encoded(record, key, encoder) for record, key in zip(records, keys, strict=True)]

    def rejects(self, job: str) -> Iterator[tuple[int, Reject]]:
        from dataflows.connectors.kafka.reading import read_topic

        for record in read_topic(self):
            found = decode_reject(Message(record.value, record.key, tuple(record.headers)), job)
            if found is not None:
                yield record.timestamp, found

    def at(self, path: str | Path) -> Any:
        """The events of this topic from a file of JSON lines: for backtests of a job that runs on Kafka."""
        from dataflows.connectors.files import Jsonl

        if self.decoder is not None:
            raise JobError(
                f"topic {self.topic} has a decoder of its own, so a file of JSON lines cannot take its place"
            )
        return Jsonl(path, self.event)


def _json(record: Record) -> bytes:
    return encode(record)[:-1]


def _encoded(record: Record, key: Any, encoder: Callable[[Any], bytes]) -> Encoded:
    if isinstance(record, Reject):
        return _encoded_reject(record)
    value = encoder(record)
    if isinstance(record, Prediction | Outcome):
        name = str(record.id if key is None else "|".join(map(str, key)) if type(key) is tuple else key)
        at = record.time.isoformat()
        headers = [("id", str(record.id)), ("model", record.model), ("version", str(record.version)), ("time", at)]
        # Text of the user's may hold lone surrogates, which UTF-8 does not know.
        coded = [(header, text.encode(errors="backslashreplace")) for header, text in headers]
        return name.encode(errors="backslashreplace"), value, coded
    # By one key all metrics stay in order, and the versions of each model.
    name = getattr(record, "model", "metrics")
    return name.encode(errors="backslashreplace"), value, [("time", record.time.isoformat().encode())]


LETTER_BYTES = 900_000
"""A dead letter keeps only a part of a larger record. Topics take 1 MB by default, and a dead letter that its topic
refuses would stop the job, again after each restart."""

SAID = ("reason", "detail", "place", "timestamp", "null", "cut")
"""What a dead letter says in headers of ours, `millrace.reason` and so on: in this order, behind those of the original.
`decode_reject` reads them from the back up to `reason`, which is always there, so it has to come first."""


_DETAIL = 20_000
"""Characters of a detail at most; code of the user's may say anything."""


def _encoded_reject(record: Reject) -> Encoded:
    """A dead letter: value, key and headers as they came, with what is wrong in headers of ours.

    kafka-python sends no header without a value: a null there becomes empty. Nor does it send a record of null key and
    null value: that gets an empty key, and `millrace.null` says so.
    """
    message = record.message()
    said = {"reason": record.reason, "detail": record.detail[:_DETAIL], "place": record.place}
    if record.timestamp is not msgspec.UNSET:
        said["timestamp"] = str(record.timestamp)
    key = message.key
    if key is None and message.value is None:
        said["null"] = "key"
        key = b""
    value = message.value
    headers = [(name, value if value is not None else b"") for name, value in message.headers]
    size = len(key or b"") + len(value or b"") + sum(2 * len(name) + len(text) for name, text in headers)
    if size > LETTER_BYTES:
        said["cut"] = str(size)
        headers = []
        key = None if key is None else key[: LETTER_BYTES // 4]
        value = None if value is None else value[: LETTER_BYTES // 2]
    # Whatever a detail quotes must not stop a job.
    headers += [(f"millrace.{name}", text.encode(errors="backslashreplace")) for name, text in said.items()]
    return key, value, headers


def decode_reject(letter: Message, job: str) -> Reject | None:
    """The reject of a dead letter of a job; None for all other records.

    The original may be a dead letter itself, with headers of the same names: those that stand behind are ours.
    """
    from dataflows.connectors.kafka.writing import HEADER

    headers = list(letter.headers)
    if not headers or headers[-1][0] != HEADER or not (headers.pop()[1] or b"").startswith(f"{job}/".encode()):
        return None
    said: dict[str, str] = {}
    while "reason" not in said:
        prefix, _, name = headers[-1][0].partition(".") if headers else ("", "", "")
        if prefix != HEADER or name not in SAID or name in said:
            return None
        said[name] = (headers.pop()[1] or b"").decode(errors="backslashreplace")
    key = None if "null" in said else letter.key
    raw = Message(letter.value, key, tuple(headers), int(said.get("timestamp", 0)))
    original = raw if "timestamp" in said else letter.value or b""
    found = reject(said["reason"], said.get("detail", ""), said.get("place", ""), original)
    return msgspec.structs.replace(found, cut=int(said["cut"])) if "cut" in said else found
