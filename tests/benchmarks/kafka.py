"""What Kafka costs: a job between topics against the same on files and against kafka-python alone; latency; overload.

    python -m tests.benchmarks --only kafka                        everything, about 10 minutes
    python -m tests.benchmarks --only kafka --parts throughput     one of throughput, latency, overload

How to read it
--------------

Broker, job and load generator share the machine's cores.

*Throughput*: the fraud job, by event time, one process, checkpoints every 10 s, over the same transactions. *Kafka
alone* is a loop with kafka-python that reads them and writes the records that the job writes (predictions and outcomes,
with their keys and headers). If nothing overlapped, the job between topics would take as long as the job on files and
that loop together: the *bound* is 1 / (1/file + 1/kafka). Goal: at least 0.7 of it.

*Latency* is from the moment a transaction is sent (its event time) to the moment its prediction was read by a consumer,
in order of arrival, checkpoints every 30 s, with a linger of 2 ms, at shares of the highest rate (of *throughput*).

*Overload*: for a minute ten times a rate at which the job is at ease, more than it can do; then nothing, until the job
has worked them off. With one process and with two.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from tests.benchmarks.measure import ROOT, BenchmarkError, _steady
from tests.benchmarks.plan import Plan, Result

JOB = Path(__file__).with_name("kafka_job.py")
PARTITIONS = 3
SHARES = (0.5, 0.8)
LATENCY_S = 65.0
"""Two checkpoints lie within."""
INTERVAL_S = 30
OVERLOAD_S = 60.0
NORMAL = 2_000
OVERLOAD = 10 * NORMAL
"""Transactions/s: at which the job is at ease, and ten times as many, which is more than it can do."""
BOUND_MIN = 0.7
P99_MAX_MS = 50.0
PARTS = ("throughput", "latency", "overload")


def kafka(plan: Plan) -> Result:
    """See the module's text."""
    from tests.integration.broker import running
    from tests.integration.topics import Topics

    parts = plan.parts or PARTS
    record: dict[str, Any] = {}
    tables: list[Table] = []
    with running(plan.scratch / "kafka") as broker:
        bench = _Bench(plan, Topics(broker.address, broker))
        highest = 0.0
        if "throughput" in parts or "latency" in parts:
            record["throughput"] = bench.throughput()
            highest = record["throughput"]["topics_events_per_s"]
            tables.append(_throughput_table(record["throughput"]))
        if "latency" in parts:
            record["latency"] = [bench.latency(round(share * highest), share) for share in SHARES]
            tables.append(_latency_table(record["latency"]))
        if "overload" in parts:
            record["overload"] = [bench.overload(workers) for workers in (1, 2)]
            tables.append(_overload_table(record["overload"]))
    return record, tables


class _Bench:
    def __init__(self, plan: Plan, topics: Any) -> None:
        self._plan = plan
        self._kafka = topics
        self._rounds = 1 if plan.quick else plan.pairs

    # -- throughput

    def throughput(self) -> dict[str, Any]:
        source = self._plan.sample(self._plan.events)
        payments = self._kafka.make("payments", PARTITIONS)
        self._kafka.fill(payments, (line for line in source.read_bytes().splitlines()))
        rounds = [self._round(source, payments) for _ in range(self._rounds)]
        found = {name: round(median(each[name] for each in rounds), 3) for name in rounds[0]}
        return found | {"events": self._plan.events, "rounds": rounds}

    def _round(self, source: Path, payments: str) -> dict[str, float]:
        files = self._job(payments, "a", "b", "--data", str(source), FILES="1")
        predictions, outcomes = self._kafka.make("predictions", PARTITIONS), self._kafka.make("outcomes", PARTITIONS)
        topics = self._job(payments, predictions, outcomes, "--until", "end")
        alone = self._kafka_alone(payments, predictions, outcomes)
        bound = 1 / (1 / files + 1 / alone)
        return {
            "file_events_per_s": files, "kafka_events_per_s": alone, "topics_events_per_s": topics,
            "bound_events_per_s": bound, "ratio": topics / bound,
        }  # fmt: skip

    def _job(self, payments: str, predictions: str, outcomes: str, *options: str, **environment: str) -> float:
        """Events/s of a run to the end of its input."""
        with self._running((payments, predictions, outcomes), *options, **environment) as (process, out):
            status, first = out / "state" / "status.json", None
            while process.poll() is None:
                first = first or _status_at(status)
                time.sleep(0.02)
            last = _status_at(status)
        if process.returncode or first is None or last is None:
            raise BenchmarkError(f"the run ended with {process.returncode}")
        return _steady(first, last) or 0.0

    @contextmanager
    def _running(
        self, topics: tuple[str, ...], *options: str, **environment: str
    ) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
        out = self._plan.scratch / f"run-{time.monotonic_ns()}"
        command = [sys.executable, "-m", "dataflows", "run", f"{JOB}:job", "--directory", str(out), *options]
        named = {"TOPICS": ",".join(topics), "MILLRACE_KAFKA_BROKERS": self._kafka.address} | environment
        with (self._plan.scratch / "job.log").open("wb") as log:
            process = subprocess.Popen(command, cwd=ROOT, env=os.environ | named, stdout=log, stderr=log)
        try:
            yield process, out
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.wait(timeout=120)

    def _kafka_alone(self, payments: str, predictions: str, outcomes: str) -> float:
        """Events/s of a loop that reads the payments and writes what the job wrote."""
        from kafka import KafkaConsumer, KafkaProducer, TopicPartition

        written = [
            (topic, record.key, record.value, list(record.headers))
            for kind, topic in ((predictions, self._kafka.make("p", PARTITIONS)), (outcomes, self._kafka.make("o", 3)))
            for record in self._kafka.read(kind)
        ]
        consumer = KafkaConsumer(bootstrap_servers=self._kafka.address, enable_auto_commit=False)
        producer = KafkaProducer(bootstrap_servers=self._kafka.address, linger_ms=5, batch_size=1 << 18)
        places = [TopicPartition(payments, number) for number in range(PARTITIONS)]
        consumer.assign(places)
        consumer.seek_to_beginning(*places)
        began, read, sent, futures = time.monotonic(), 0, 0, []
        each = len(written) / self._plan.events
        while read < self._plan.events:
            read += sum(len(some) for some in consumer.poll(timeout_ms=100, max_records=5000).values())
            due = round(read * each)
            futures += [producer.send(topic, value, key, headers) for topic, key, value, headers in written[sent:due]]
            sent = due
        producer.flush(120)
        for future in futures:
            future.get(1)
        seconds = time.monotonic() - began
        consumer.close(autocommit=False)
        producer.close()
        return self._plan.events / seconds

    # -- latency

    def latency(self, rate: int, share: float) -> dict[str, Any]:
        payments, predictions = self._kafka.make("payments", PARTITIONS), self._kafka.make("predictions", PARTITIONS)
        topics = (payments, predictions, self._kafka.make("outcomes", PARTITIONS))
        options = ("--linger", "0.002", "--checkpoint", str(INTERVAL_S))
        with self._running(topics, *options, LIVE="1") as (process, out):
            self._kafka.fill(payments, [_payment(number) for number in range(PARTITIONS)])
            _wait(lambda: (out / "state" / "status.json").exists() or process.poll() is not None, 60)
            reader = _Reader(self._kafka.address, predictions)
            sent = self._load(payments, rate, LATENCY_S)
            found = reader.until(sent + PARTITIONS)
        # The first seconds warm up; the rest is what users see.
        steady = sorted(ms for at, ms in found if at > found[0][0] + 5.0)
        return {
            "share": share, "rate": rate, "sent": sent, "read": len(found),
            **{f"p{p}_ms": round(steady[min(int(len(steady) * p / 100), len(steady) - 1)], 1) for p in (50, 95, 99)},
            "max_ms": round(steady[-1], 1),
        }  # fmt: skip

    def _load(self, topic: str, rate: float, seconds: float) -> int:
        command = [sys.executable, "-m", "tests.benchmarks.kafka_load", self._kafka.address, topic, str(rate)]
        done = subprocess.run([*command, str(seconds)], cwd=ROOT, capture_output=True, text=True, check=True)
        return int(done.stdout)

    # -- overload

    def overload(self, workers: int) -> dict[str, Any]:
        payments = self._kafka.make("payments", PARTITIONS)
        topics = (payments, self._kafka.make("predictions", PARTITIONS), self._kafka.make("outcomes", PARTITIONS))
        with self._running(topics, "--workers", str(workers), "--linger", "0.002", LIVE="1") as (process, out):
            status = out / "state" / "status.json"
            self._kafka.fill(payments, [_payment(0)])
            _wait(status.exists, 60)
            watch = _Memory(process.pid, status)
            sent = self._load(payments, OVERLOAD, OVERLOAD_S if not self._plan.quick else 5.0)
            lag, began = watch.lag, time.monotonic()
            _wait(lambda: json.loads(status.read_bytes())["questions"] >= sent or process.poll() is not None, 900)
            seconds = time.monotonic() - began
            watch.stop()
            answered = json.loads(status.read_bytes())["questions"]
        return {
            "workers": workers, "sent": sent, "answered": answered, "most_lag": watch.most_lag, "lag_at_end": lag,
            "worked_off_s": round(seconds, 1), "peak_mib": watch.peak_mib, "before_mib": watch.before_mib,
        }  # fmt: skip


def _payment(number: int) -> dict[str, Any]:
    return {
        "tx_id": -1 - number, "ts": int(time.time() * 1000), "customer": 1, "terminal": 1, "amount": 1.0, "fraud": False
    }  # fmt: skip


def _status_at(path: Path) -> tuple[float, int] | None:
    try:
        return path.stat().st_mtime, json.loads(path.read_bytes())["questions"]
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def _wait(ready: Any, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            raise BenchmarkError(f"not ready within {seconds:.0f} s")
        time.sleep(0.05)


class _Reader:
    """Reads predictions as they come, in a thread: (when, ms since the event was sent)."""

    def __init__(self, address: str, topic: str) -> None:
        self._found: list[tuple[float, float]] = []
        self._enough = threading.Event()
        self._wanted = sys.maxsize
        self._thread = threading.Thread(target=self._read, args=(address, topic), daemon=True)
        self._thread.start()

    def _read(self, address: str, topic: str) -> None:
        from kafka import KafkaConsumer, TopicPartition

        consumer = KafkaConsumer(bootstrap_servers=address, enable_auto_commit=False, fetch_max_wait_ms=20)
        places = [TopicPartition(topic, number) for number in range(PARTITIONS)]
        consumer.assign(places)
        consumer.seek_to_beginning(*places)
        while len(self._found) < self._wanted and not self._enough.is_set():
            for records in consumer.poll(timeout_ms=20).values():
                now = time.time()
                self._found += [(now, (now - _event_time(record.headers)) * 1000) for record in records]
        consumer.close(autocommit=False)

    def until(self, wanted: int) -> list[tuple[float, float]]:
        """All of them, once so many came."""
        self._wanted = wanted
        self._thread.join(timeout=60)
        self._enough.set()
        return self._found


def _event_time(headers: Any) -> float:
    from datetime import datetime

    return datetime.fromisoformat(dict(headers)["time"].decode()).timestamp()


class _Memory:
    """Watches the memory of a run's workers, and how far it is behind."""

    def __init__(self, launcher: int, status: Path) -> None:
        self._launcher = launcher
        self._status = status
        self.before_mib = self._now()
        self.peak_mib = self.before_mib
        self.most_lag = self.lag = 0
        self._stopped = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def _now(self) -> float:
        children = Path(f"/proc/{self._launcher}/task/{self._launcher}/children").read_text().split()
        return round(sum(_resident_mib(int(pid)) for pid in children), 1)

    def _watch(self) -> None:
        while not self._stopped.wait(0.2):
            try:
                self.peak_mib = max(self.peak_mib, self._now())
                self.lag = sum(json.loads(self._status.read_bytes())["lag"].values())
            except (OSError, json.JSONDecodeError, KeyError):
                continue
            self.most_lag = max(self.most_lag, self.lag)

    def stop(self) -> None:
        self._stopped.set()


def _resident_mib(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


# -- tables


def _throughput_table(found: dict[str, Any]) -> Table:
    table = Table(title=f"kafka: {found['events']:,} transactions, events/s; goal: at least {BOUND_MIN} of the bound")
    for name in ("files", "kafka-python alone", "bound", "topics", "of the bound", "each", "goal"):
        table.add_column(name)
    table.add_row(
        *(f"{found[f'{name}_events_per_s']:,.0f}" for name in ("file", "kafka", "bound", "topics")),
        f"{found['ratio']:.2f}", " ".join(f"{each['ratio']:.2f}" for each in found["rounds"]),
        "met" if found["ratio"] >= BOUND_MIN else "missed",
    )  # fmt: skip
    return table


def _latency_table(found: list[dict[str, Any]]) -> Table:
    table = Table(title=f"kafka: ms from sent to readable; goal: p99 under {P99_MAX_MS:.0f} at half load")
    for name in ("of the highest", "events/s", "sent", "read", "p50", "p95", "p99", "most", "goal"):
        table.add_column(name)
    for each in found:
        goal = ("met" if each["p99_ms"] < P99_MAX_MS else "missed") if each["share"] == SHARES[0] else ""
        table.add_row(
            f"{each['share']:.0%}", f"{each['rate']:,}", f"{each['sent']:,}", f"{each['read']:,}",
            *(str(each[f"{p}_ms"]) for p in ("p50", "p95", "p99", "max")), goal,
        )  # fmt: skip
    return table


def _overload_table(found: list[dict[str, Any]]) -> Table:
    table = Table(title="kafka: overload; nothing lost, memory bounded")
    for name in ("processes", "sent", "answered", "most behind", "worked off in s", "MiB before", "MiB at most"):
        table.add_column(name)
    for each in found:
        table.add_row(
            str(each["workers"]), f"{each['sent']:,}", f"{each['answered']:,}", f"{each['most_lag']:,}",
            str(each["worked_off_s"]), str(each["before_mib"]), str(each["peak_mib"]),
        )  # fmt: skip
    return table
