"""Rejects sent again to the topic that they were read from; `rejects.py` says which."""

from __future__ import annotations

import time as wall
from collections.abc import Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Any

from dataflows.connectors.kafka.reading import partitions_of
from dataflows.events import Message

if TYPE_CHECKING:
    from dataflows.connectors.kafka.topic import Kafka

RESUBMITTED = "millrace.resubmitted"
"""The header that holds the place where a record was read the first time; of several such places the last."""


class Returning:
    """Sends records of a topic to it again: value, key, headers and partition as they were, its place in a header.

    The timestamp becomes that of now: retention counts from it, so a record with an old one might be dropped at once.
    Where the topic has a decoder it stays as it was, as the decoder may take the event's time from it.

    Raises `InputError` where the topic is not there or no broker answers.
    """

    def __init__(self, declared: Kafka) -> None:
        self._topic = declared.topic
        self._timeout = declared.timeout
        self._keep_timestamp = declared.decoder is not None
        self._cluster = declared.cluster()
        # Asked by a consumer first: where brokers make topics on demand, a producer would make a deleted one anew.
        with closing(self._cluster.consumer()) as consumer, self._cluster.asking(f"find topic {self._topic!r}"):
            self._partitions = {place.partition for place in partitions_of(consumer, self._topic)}
        self._producer = self._cluster.producer(None)

    def send(self, records: list[tuple[str, Message]]) -> Iterator[tuple[int, str | None]]:
        """Send (place, record) pairs; for each its index in `records`, and None once acknowledged, else the fault.

        All acknowledgements together are waited for `timeout` seconds. A record that fails keeps no other back: the
        client gives a batch up as a whole, so what was refused is sent once more alone, and by another producer: one
        that counts its records, and has missed one, finds no more acknowledged.
        """
        deadline = wall.monotonic() + self._timeout
        futures = [self._begin(place, message) for place, message in records]
        refused = []
        for number, future in enumerate(futures):
            fault = self._fault(future, deadline)
            if fault is None or wall.monotonic() >= deadline:
                yield number, fault
            else:
                refused.append(number)
        for number in refused:
            self._producer.close(timeout=1)
            self._producer = self._cluster.producer(None)
            yield number, self._fault(self._begin(*records[number]), deadline)

    def _begin(self, place: str, message: Message) -> Any:
        """What will tell how it went: a future, or the error that there was at once."""
        from kafka.errors import KafkaError

        try:
            return self._sent(place, message)
        except (KafkaError, ValueError, TypeError) as error:
            return error

    def _fault(self, future: Any, deadline: float) -> str | None:
        """What is wrong with a record that was sent; None once it is acknowledged."""
        from kafka.errors import KafkaError

        wrong = future if isinstance(future, Exception) else None
        if wrong is None:
            try:
                future.get(timeout=max(deadline - wall.monotonic(), 0.001))
            except KafkaError as error:
                wrong = error
        return None if wrong is None else f"{type(wrong).__name__}: {wrong}"

    def _sent(self, place: str, message: Message) -> Any:
        number = int(place.rpartition("/")[2].partition(":")[0])
        headers = [(name, value or b"") for name, value in message.headers if name != RESUBMITTED]
        return self._producer.send(
            self._topic,
            message.value,
            message.key,
            [*headers, (RESUBMITTED, place.encode())],
            partition=number if number in self._partitions else None,
            timestamp_ms=message.timestamp if self._keep_timestamp and message.timestamp > 0 else None,
        )

    def close(self) -> None:
        """End the connection."""
        self._producer.close(timeout=1)
