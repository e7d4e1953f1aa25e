"""Topics for tests: made, filled and read with kafka-python, or read with Kafka's own console consumer."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterable
from itertools import count
from typing import Any
from uuid import uuid4

from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition
from kafka.admin import ConfigResource, ConfigResourceType, NewPartitions, NewTopic

from tests.integration.broker import Broker


class Topics:
    """The topics of a broker."""

    def __init__(self, address: str, broker: Broker | None = None) -> None:
        self.address = address
        self.broker = broker
        self._numbers = count(1)
        self._run = uuid4().hex[:6]

    def name(self, of: str) -> str:
        """A name that no other test has."""
        return f"{of}-{self._run}-{next(self._numbers)}"

    def make(self, of: str = "topic", partitions: int = 1, **settings: str) -> str:
        """A new topic; its name."""
        name = self.name(of)
        admin = KafkaAdminClient(bootstrap_servers=self.address)
        try:
            admin.create_topics([NewTopic(name, partitions, 1, topic_configs=settings)])
        finally:
            admin.close()
        return name

    def grow(self, topic: str, partitions: int) -> None:
        """Add partitions."""
        admin = KafkaAdminClient(bootstrap_servers=self.address)
        try:
            admin.create_partitions({topic: NewPartitions(partitions)})
        finally:
            admin.close()

    def remove_before(self, topic: str, partition: int, offset: int) -> None:
        """Delete the records before an offset, as retention does."""
        admin = KafkaAdminClient(bootstrap_servers=self.address)
        try:
            admin.delete_records({TopicPartition(topic, partition): offset})
        finally:
            admin.close()

    def alter(self, topic: str, **settings: str) -> None:
        """Change settings of a topic."""
        admin = KafkaAdminClient(bootstrap_servers=self.address)
        try:
            admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, topic, configs=settings)])
        finally:
            admin.close()

    def remove(self, topic: str) -> None:
        """Delete a topic."""
        admin = KafkaAdminClient(bootstrap_servers=self.address)
        try:
            admin.delete_topics([topic])
        finally:
            admin.close()

    def fill(self, topic: str, rows: Iterable[Any], key: str | None = None, **options: Any) -> None:
        """Send rows as JSON (bytes and None as they are), keyed by one of their fields; returns when they are there."""
        producer = KafkaProducer(bootstrap_servers=self.address, linger_ms=5, batch_size=1 << 18, **options)
        try:
            futures = []
            for row in rows:
                value = row if isinstance(row, bytes) or row is None else json.dumps(row).encode()
                name = str(row[key]).encode() if key is not None and isinstance(row, dict) else None
                futures.append(producer.send(topic, value, name if name or value is not None else b"k"))
            producer.flush(60)
            for future in futures:
                future.get(30)
        finally:
            producer.close()

    def fill_in_transactions(self, topic: str, rows: list[Any], key: str, size: int) -> None:
        """Send rows in transactions of so many each, with an aborted one behind each."""
        producer = KafkaProducer(bootstrap_servers=self.address, transactional_id=self.name("filler"))
        try:
            producer.init_transactions()
            for begin in range(0, len(rows), size):
                producer.begin_transaction()
                for row in rows[begin : begin + size]:
                    producer.send(topic, json.dumps(row).encode(), str(row[key]).encode())
                producer.commit_transaction()
                producer.begin_transaction()
                producer.send(topic, b"never meant", b"x")
                producer.flush(30)
                producer.abort_transaction()
        finally:
            producer.close()

    def read(self, topic: str, committed: bool = True) -> list[Any]:
        """All records of a topic, partition by partition."""
        consumer = KafkaConsumer(
            bootstrap_servers=self.address, auto_offset_reset="earliest", enable_auto_commit=False,
            isolation_level="read_committed" if committed else "read_uncommitted",
        )  # fmt: skip
        try:
            places = [TopicPartition(topic, n) for n in sorted(consumer.partitions_for_topic(topic) or ())]
            ends = consumer.end_offsets(places)
            consumer.assign(places)
            consumer.seek_to_beginning(*places)
            found: list[Any] = []
            deadline = time.monotonic() + 60
            while any(consumer.position(place) < ends[place] for place in places):
                assert time.monotonic() < deadline, f"{topic} could not be read"
                for some in consumer.poll(timeout_ms=200, max_records=10_000).values():
                    found += some
            return sorted(found, key=lambda record: (record.partition, record.offset))
        finally:
            consumer.close(autocommit=False)

    def values(self, topic: str, committed: bool = True) -> list[Any]:
        """The values of a topic, from JSON."""
        return [json.loads(record.value) for record in self.read(topic, committed)]

    def console(self, topic: str, committed: bool = True) -> list[str]:
        """What Kafka's own console consumer reads."""
        assert self.broker is not None
        level = "read_committed" if committed else "read_uncommitted"
        command = self.broker.java(
            "org.apache.kafka.tools.consumer.ConsoleConsumer", "--bootstrap-server", self.address, "--topic", topic,
            "--from-beginning", "--timeout-ms", "5000", "--isolation-level", level,
        )  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
        return done.stdout.splitlines()
