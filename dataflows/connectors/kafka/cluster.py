"""The brokers of a topic, and the clients of kafka-python that talk to them.

kafka-python is imported when the first connection is made, so that jobs without Kafka do not pay for it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dataflows.connectors.kafka.errors import CONNECTION_ERRORS, hint, said
from dataflows.connectors.kafka.security import Security
from dataflows.job import JobError
from dataflows.order import InputError

if TYPE_CHECKING:
    from kafka import KafkaConsumer, KafkaProducer

BROKERS = "MILLRACE_KAFKA_BROKERS"
"""The environment variable that names the brokers of topics that name none: host:port, several with commas."""

CONNECT_S = 30.0
"""Seconds to wait for the first answer of a broker at most."""

FETCH_WAIT_MS = 50
"""How long a broker may hold a request for records back. Short, because one that waits for an idle partition keeps
those of the others, which became free meanwhile, from being asked for."""

FETCH_BYTES = 1 << 19
"""Bytes of one partition that a request fetches at most; a larger record comes alone."""

BATCH_BYTES = 1 << 18
LINGER_MS = 2
"""A producer sends a batch of one partition when it has so many bytes, or its first record has waited so long."""

_ADDRESS = re.compile(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+(%[A-Za-z0-9._-]+)?\]):[0-9]{1,5}")


class Cluster:
    """Connects to the brokers of one topic.

    Parameters
    ----------
    brokers
        `host:port`, several with commas; None: what `MILLRACE_KAFKA_BROKERS` says.
    security
        None: what the other variables `MILLRACE_KAFKA_…` say.
    timeout
        Seconds for which a broker may be away.

    Raises `JobError` where no brokers are named, an address is none, or a file of `security` cannot be read. Nothing is
    connected yet.
    """

    def __init__(self, brokers: str | None, security: Security | None, timeout: float) -> None:
        named = brokers or os.environ.get(BROKERS)
        if not named:
            raise JobError(
                f"Kafka: no brokers are named. Hint: --kafka localhost:9092, the variable {BROKERS}, "
                "or brokers= in the job"
            )
        addresses = [each.strip() for each in named.split(",") if each.strip()]
        for address in addresses:
            if not _ADDRESS.fullmatch(address):
                raise JobError(f"Kafka: {address!r} is no address of a broker. Hint: host:port, several with commas")
        self.brokers = named
        CONNECTION_ERRORS.listen()
        self.timeout = timeout
        self._options = {
            "bootstrap_servers": addresses,
            "bootstrap_timeout_ms": round(min(timeout, CONNECT_S) * 1000),
            "metrics_enabled": False,
            "reconnect_backoff_max_ms": 1000,
            **(security or Security.from_environment()).options(),
        }

    def consumer(self, committed: bool = True, group: str | None = None, discover: float = 300.0) -> KafkaConsumer:
        """A consumer without any partition. Raises `InputError` where no broker answers.

        Parameters
        ----------
        committed
            Read the records of a transaction only once it is committed, and end where the first open one begins.
        group
            The consumer group to commit offsets to; None: none.
        discover
            Seconds between two questions to the brokers for partitions that were added.
        """
        from kafka import KafkaConsumer

        with self.asking("connect"):
            return KafkaConsumer(
                **self._options,
                group_id=group,
                enable_auto_commit=False,
                auto_offset_reset="none",
                isolation_level="read_committed" if committed else "read_uncommitted",
                allow_auto_create_topics=False,
                fetch_max_wait_ms=FETCH_WAIT_MS,
                max_partition_fetch_bytes=FETCH_BYTES,
                metadata_max_age_ms=round(discover * 1000),
            )

    def producer(self, compression: str | None, transactional: str | None = None) -> KafkaProducer:
        """An idempotent producer. Raises `InputError` where no broker answers.

        Parameters
        ----------
        compression
            `gzip`, `snappy`, `lz4`, `zstd` or None.
        transactional
            The transactional id; None: without transactions.
        """
        from kafka import KafkaProducer

        patience_ms = round(self.timeout * 1000)
        with self.asking("connect"):
            return KafkaProducer(
                **self._options,
                acks="all",
                enable_idempotence=True,
                compression_type=compression,
                batch_size=BATCH_BYTES,
                linger_ms=LINGER_MS,
                delivery_timeout_ms=patience_ms,
                request_timeout_ms=max(min(patience_ms // 2, 30_000), 1_000),
                max_block_ms=patience_ms,
                transactional_id=transactional,
                transaction_timeout_ms=min(patience_ms, 600_000),
            )

    @contextmanager
    def asking(self, what: str) -> Iterator[None]:
        """Turns what kafka-python raises into an `InputError` that names the brokers, `what` we asked of them, and no
        secret.
        """
        from kafka.errors import KafkaError

        try:
            yield
        except (KafkaError, OSError) as error:
            away = type(error).__name__ in ("KafkaTimeoutError", "NoBrokersAvailable")
            why = (CONNECTION_ERRORS.recent() if away else None) or said(error)
            raise InputError(f"Kafka at {self.brokers}: could not {what}: {why}. Hint: {hint(why)}") from None
