"""Sends simulated payments and chargebacks to Kafka, as if they happened now: for `job.py:on_kafka`.

    python -m examples.payments.produce --kafka localhost:9092 --rate 200

Nobody waits days for a chargeback at a demonstration, so time is compressed: a simulated day takes ten seconds (a
factor of 8,640; `--day` sets another). Payments come evenly at the rate asked for, each stamped with the moment it is
due, which is now; there are as many cards as it takes to pay so often. A chargeback that would come 36 hours after its
payment comes 15 seconds after it. `job.py:on_kafka` measures in the same days: its horizon of 7 is 70 seconds, its
window of 28 is 280. So a model that needs weeks to become good takes minutes.

The seed decides everything but the moment of the start, which is in all times and ids: what a second run sends is new
to a job that has seen the first. Chargebacks that are not due when it ends are never sent.
"""

from __future__ import annotations

import argparse
import heapq
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from random import Random
from threading import BoundedSemaphore, Event
from typing import Any

from kafka import KafkaAdminClient, KafkaProducer
from kafka.errors import KafkaError, TopicAlreadyExistsError

from dataflows import JobError, Security
from examples.payments.job import DAY
from examples.payments.simulate import DAY_S, Row, endless, report_fraud

PARTITIONS = {"payments": 3, "chargebacks": 1, "scores": 3, "outcomes": 3, "rejects": 1}
"""The topics of `job.py:on_kafka`: what is sent, and what the job writes."""

PAYMENTS_PER_CARD_DAY = 2
TERMINALS = 400
MAX_CARDS = 100_000

MAX_UNDER_WAY = 2_000
"""Records that may be sent and not acknowledged at once; then sending waits."""

PATIENCE_S = 60
"""How long the brokers may be away."""

PROGRESS_S = 5.0

Message = tuple[timedelta, str, str, Row]
"""When it is due after the start, topic without prefix, key, and what is sent."""


def stream(rate: float, day: timedelta, seed: int, start: datetime) -> Iterator[Message]:
    """Payments and chargebacks in the order in which they are due, without end.

    Raises `ValueError` where that would take too many cards.

    >>> at = datetime(2026, 1, 5, tzinfo=UTC)
    >>> due, topic, key, row = next(stream(rate=10, day=timedelta(seconds=10), seed=7, start=at))
    >>> topic, key == row["card_id"], row["payment_id"], row["paid_at"]
    ('payments', True, 'p-19b8b741800-1', '2026-01-05T00:00:00.000+00:00')
    """
    cards = max(round(rate * day.total_seconds() / PAYMENTS_PER_CARD_DAY), 1)
    if cards > MAX_CARDS:
        raise ValueError(
            f"{rate:g} payments a second in days of {day} take {cards:,} cards, more than {MAX_CARDS:,}. "
            "Hint: shorter days or a lower rate"
        )
    return _stream(rate, day, seed, start, cards)


def _stream(rate: float, day: timedelta, seed: int, start: datetime, cards: int) -> Iterator[Message]:
    run = f"{round(start.timestamp() * 1000):x}"
    rng = Random(f"{seed} reports")
    to_come: list[tuple[timedelta, str]] = []  # a heap of chargebacks: at most those of 12 days and a few
    for number, (row, fraud) in enumerate(endless(cards, TERMINALS, seed), start=1):
        due = timedelta(seconds=(number - 1) / rate)
        while to_come and to_come[0][0] <= due:
            reported, about = heapq.heappop(to_come)
            report = {"payment_id": about, "reported_at": _iso(start + reported), "fraud": True}
            yield reported, "chargebacks", about, report
        payment_id = f"p-{run}-{number}"
        yield due, "payments", row["card_id"], {"payment_id": payment_id, "paid_at": _iso(start + due), **row}
        if fraud is not None:
            for delay, about in report_fraud(payment_id, rng):
                heapq.heappush(to_come, (due + delay * day / DAY_S, about))


def _iso(moment: datetime) -> str:
    return moment.isoformat(timespec="milliseconds")


class NotSent(RuntimeError):
    """Not all could be sent: why, and how many were."""


class Sender:
    """Sends rows as JSON and counts what was acknowledged; a bounded number is under way at once."""

    def __init__(self, connection: dict[str, Any]) -> None:
        self._producer = KafkaProducer(
            **connection, acks="all", enable_idempotence=True, linger_ms=5, delivery_timeout_ms=PATIENCE_S * 1000
        )
        self._free = BoundedSemaphore(MAX_UNDER_WAY)
        self._error: BaseException | None = None
        self.sent = 0
        self.acknowledged = {"payments": 0, "chargebacks": 0}

    def send(self, kind: str, topic: str, key: str, row: Row) -> None:
        """Send one row. Raises `KafkaError` when one could not be delivered, maybe an earlier one."""
        if self._error is not None:
            raise self._error
        if not self._free.acquire(timeout=PATIENCE_S):
            raise KafkaError(f"nothing was acknowledged for {PATIENCE_S} s")
        future = self._producer.send(topic, json.dumps(row).encode(), key.encode())
        self.sent += 1
        future.add_callback(self._note, kind)
        future.add_errback(self._fail)

    def _note(self, kind: str, _: object) -> None:
        self.acknowledged[kind] += 1
        self._free.release()

    def _fail(self, error: BaseException) -> None:
        self._error = error
        self._free.release()

    def finish(self) -> None:
        """Wait until all is acknowledged. Raises `KafkaError` when it is not."""
        self._producer.flush(PATIENCE_S)
        if self._error is not None:
            raise self._error

    @property
    def under_way(self) -> int:
        """How many are not acknowledged yet."""
        return self.sent - sum(self.acknowledged.values())

    def __str__(self) -> str:
        return f"{self.acknowledged['payments']:,} payments and {self.acknowledged['chargebacks']:,} chargebacks"

    def close(self) -> None:
        """Give up the connection, and what is not acknowledged by now."""
        self._producer.close(timeout=1)


def make_topics(connection: dict[str, Any], prefix: str) -> None:
    """Make the topics that are not there."""
    admin = KafkaAdminClient(**connection)
    try:
        there = set(admin.list_topics())
        wanted = {f"{prefix}{name}": {"num_partitions": count} for name, count in PARTITIONS.items()}
        missing = {name: options for name, options in wanted.items() if name not in there}
        if missing:
            admin.create_topics(missing, wait_for_metadata=True)
            print(f"made the topics {', '.join(missing)}", flush=True)
    except TopicAlreadyExistsError:
        pass  # another producer was quicker
    finally:
        admin.close()


class Progress:
    """Says now and then how many were sent, and how fast."""

    def __init__(self, sender: Sender) -> None:
        self._sender = sender
        self._began = self._said = time.monotonic()
        self._before = 0

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._began

    def show(self, behind: float) -> None:
        """A line every few seconds; `behind` is how late the newest was sent, in seconds."""
        now = time.monotonic()
        if now - self._said < PROGRESS_S:
            return
        payments = self._sender.acknowledged["payments"]
        line = f"{self._sender} sent, {(payments - self._before) / (now - self._said):,.0f} payments/s"
        if self._sender.under_way > MAX_UNDER_WAY // 4:
            line += f", {self._sender.under_way:,} not acknowledged yet"
        if behind >= 1:
            line += f", {behind:,.0f} s behind"
        print(line, flush=True)
        self._said, self._before = now, payments


def produce(
    connection: dict[str, Any], prefix: str, rate: float, day: timedelta, seed: int, payments: int | None, stop: Event
) -> str:
    """Send, each message when it is due, until so many payments are sent or `stop` is set; what was sent."""
    start = datetime.now(UTC)
    messages = stream(rate, day, seed, start)
    make_topics(connection, prefix)
    sender = Sender(connection)
    sent = 0
    try:
        progress = Progress(sender)
        for due, kind, key, row in messages:
            if kind == "payments":
                if sent == payments:
                    break
                sent += 1
            wait = due.total_seconds() - progress.seconds
            if stop.wait(wait) if wait > 0 else stop.is_set():
                break
            sender.send(kind, f"{prefix}{kind}", key, row)
            progress.show(behind=-wait)
        seconds = progress.seconds
        sender.finish()
        return f"sent {sender} in {seconds:.1f} s, all acknowledged"
    except KafkaError as error:
        raise NotSent(f"{error}; {sender} were acknowledged") from None
    finally:
        sender.close()


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError(text)
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


_count.__name__ = "number of payments"
_positive.__name__ = "positive number"  # argparse says: invalid positive number value


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: `python -m examples.payments.produce [--kafka HOST:PORT] [--rate N] …`."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.payments.produce",
        description="Send simulated card payments and their chargebacks to Kafka, as if they happened now. Makes the "
        "topics that are not there. Ctrl-C ends it.",
    )
    brokers = os.environ.get("MILLRACE_KAFKA_BROKERS", "localhost:9092")
    parser.add_argument("--kafka", metavar="HOST:PORT", default=brokers, help=f"brokers (default: {brokers})")
    parser.add_argument("--rate", type=_positive, default=200.0, help="payments per second (default: 200)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=_positive, help="end after so many seconds (default: never)")
    length.add_argument("--payments", type=_count, metavar="N", help="end after so many payments")
    parser.add_argument(
        "--day", type=_positive, metavar="SECONDS", default=DAY.total_seconds(),
        help=f"how long a simulated day takes (default: {DAY.total_seconds():g}); the job has to take it for as long: "
        "on_kafka(day=...)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=7, help="which payments (default: 7)")
    parser.add_argument("--prefix", default="", help="what the topics' names begin with; on_kafka(prefix=...)")
    chosen = parser.parse_args(arguments)
    payments = chosen.payments if chosen.seconds is None else max(round(chosen.rate * chosen.seconds), 1)

    stop = Event()

    def end(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_DFL)  # a second one ends it at once
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    logging.getLogger("kafka").setLevel(logging.CRITICAL)  # what fails is said below, once
    try:
        connection = {
            "bootstrap_servers": chosen.kafka.split(","),
            "bootstrap_timeout_ms": 5_000,
            "reconnect_backoff_max_ms": 1_000,  # 30 s by default: a broker that was away would be found again late
            **Security.from_environment().options(),
        }
        day = timedelta(seconds=chosen.day)
        print(produce(connection, chosen.prefix, chosen.rate, day, chosen.seed, payments, stop), flush=True)
    except (JobError, ValueError) as error:
        sys.exit(f"produce: {error}")
    except (KafkaError, NotSent, OSError) as error:
        sys.exit(
            f"produce: Kafka at {chosen.kafka}: {error}. "
            "Hint: is a broker running there? MILLRACE_KAFKA_PROTOCOL and the like say how to log in"
        )


if __name__ == "__main__":
    main()
