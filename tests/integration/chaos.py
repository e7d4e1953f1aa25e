"""Kill a job between topics, and its broker, at random moments under load; then every record must be there once.

    python -m tests.integration.chaos                              transactional and immediate, both orders
    python -m tests.integration.chaos --mode transactional --order arrival --kills 20 --broker-kills 2

Payments and chargebacks are sent at a steady rate with quiet spells between. Kills hit the launcher, one worker or all
of them. At the end Kafka's own console consumer (read_committed) must find each prediction exactly once, with the
values of a plain loop, undisturbed, over the same topics and the job's order log; and each outcome too.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dataflows.events import Outcome, Prediction, encode
from dataflows.order import Reader
from dataflows.orderlog import OrderLog
from dataflows.replay import PlainRun, inputs_of
from tests.integration import jobs
from tests.integration.broker import Broker, running
from tests.integration.topics import Topics
from tests.scenarios import running as runs

JOB = "tests.integration.jobs:on_kafka"
CHUNK = 50


@dataclass
class Trial:
    """One job under fire."""

    kafka: Topics
    broker: Broker
    directory: Path
    mode: str
    order: str
    workers: int
    rate: int
    rng: random.Random
    sent: int = 0
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.payments, self.chargebacks = self.kafka.make("payments", 3), self.kafka.make("chargebacks", 2)
        self.scores, self.outcomes = self.kafka.make("scores", 3), self.kafka.make("outcomes", 2)
        topics = [self.payments, self.chargebacks, self.scores, self.outcomes, self.kafka.make("rejects")]
        self.environment = {
            "TOPICS": ",".join(topics), "MODE": self.mode, "ORDER": self.order, "PATIENCE": "20", "IDLE": "0.5",
            "MILLRACE_KAFKA_BROKERS": self.kafka.address,
        }  # fmt: skip
        self._done = threading.Event()
        self._load = threading.Thread(target=self._send_load, daemon=True)

    # -- the load

    def _send_load(self) -> None:
        rng = random.Random(self.rng.random())
        told: list[dict[str, Any]] = []
        while not self._done.is_set():
            rows = jobs.payments(CHUNK, first=self.sent)
            told += jobs.chargebacks(rows)
            due = [row for row in told if row["at"] <= rows[-1]["at"]]
            told = [row for row in told if row["at"] > rows[-1]["at"]]
            self._send(self.payments, rows, "card")
            self._send(self.chargebacks, due, "id")
            self.sent += CHUNK
            self._done.wait(CHUNK / self.rate)
            if rng.random() < 0.5 * CHUNK / self.rate / 5:
                self.counts["quiet spells"] += 1
                self._done.wait(rng.uniform(1, 4))

    def _send(self, topic: str, rows: list[dict[str, Any]], key: str) -> None:
        """Until it is there: what comes twice is a reject of the job's."""
        while rows:
            try:
                self.kafka.fill(topic, rows, key=key, delivery_timeout_ms=15_000, request_timeout_ms=5_000)
                return
            except Exception:  # noqa: BLE001 - the broker was killed
                self.counts["sent again"] += 1
                time.sleep(0.5)

    # -- the kills

    def run(self, kills: int, broker_kills: int) -> None:
        """Kill, start again, and let it finish."""
        self._load.start()
        moments = ["job"] * kills + ["broker"] * broker_kills
        self.rng.shuffle(moments)
        process = self._start()
        for number, what in enumerate(moments, 1):
            if self.rng.random() < 0.8:
                self._wait_for_work(process)
            time.sleep(self.rng.uniform(0.0, 3.0))
            if what == "broker":
                self._kill_broker()
                if process.poll() is not None:
                    process = self._start()
                continue
            self._kill_job(process)
            process = self._start()
            print(f"\r{number}/{len(moments)} kills, {self.sent} payments", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
        self._done.set()
        self._load.join()
        self._finish(process)

    def _start(self) -> subprocess.Popen[str]:
        log = (self.directory / "job.log").open("a")
        command = [sys.executable, "-m", "dataflows", "run", JOB, "--directory", str(self.directory / "run")]
        command += ["--checkpoint", "0.7", "--linger", "0.01", "--batch-size", "100", "--workers", str(self.workers)]
        return subprocess.Popen(
            command, env=runs.environment(**self.environment), stdout=log, stderr=log, text=True, cwd=runs.ROOT
        )

    def _wait_for_work(self, process: subprocess.Popen[str]) -> None:
        """Until the run has done something since it was started; the other kills hit it on its way there."""
        began, deadline = time.time(), time.monotonic() + 30
        status = self.directory / "run" / "state" / "status.json"
        while process.poll() is None and time.monotonic() < deadline:
            if status.exists() and status.stat().st_mtime > began:
                return
            time.sleep(0.05)

    def _kill_broker(self) -> None:
        self.counts["broker killed"] += 1
        self.broker.kill()
        time.sleep(self.rng.uniform(0.2, 3.0))
        self.broker.start()

    def _kill_job(self, process: subprocess.Popen[str]) -> None:
        if process.poll() is not None:
            self.counts["ended by itself"] += 1
            return
        workers = _children(process.pid)
        victim = self.rng.choice(["launcher", "worker", "all"]) if workers else "launcher"
        self.counts[f"{victim} killed"] += 1
        named = {"launcher": [process.pid], "worker": workers[:1], "all": [process.pid, *workers]}[victim]
        for pid in named:
            _kill(pid)
        process.wait(timeout=60)
        for pid in workers:
            _wait_gone(pid)

    def _finish(self, process: subprocess.Popen[str]) -> None:
        """Until everything that was sent was answered; then a stop, which publishes what is left."""
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline:
            if process.poll() is not None:
                process = self._start()
            status = self._status()
            if status.get("questions", 0) >= self.sent or (
                self.order == "event_time" and status.get("read", 0) >= self.sent and not sum(status["lag"].values())
            ):
                break
            time.sleep(0.5)
        time.sleep(2)
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=90)
        if code:
            raise AssertionError(f"the last run ended with {code}: {(self.directory / 'job.log').read_text()[-1500:]}")

    def _status(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads((self.directory / "run" / "state" / "status.json").read_bytes())
        except (OSError, json.JSONDecodeError):
            return {}
        return found

    # -- the verdict

    def verdict(self) -> list[str]:
        """What is wrong; empty where nothing is."""
        expected = self._undisturbed()
        wrong = []
        for topic, kind in ((self.scores, Prediction), (self.outcomes, Outcome)):
            lines = [line for line in self.kafka.console(topic) if line.startswith("{")]
            found = Counter(lines)
            wanted = Counter(encode(record)[:-1].decode() for record in expected if isinstance(record, kind))
            self.counts[kind.__name__.lower()] = len(lines)
            twice = sum(found.values()) - len(found)
            lost, other = wanted - found, found - wanted
            if twice or lost or other:
                wrong.append(f"{kind.__name__}: {twice} twice, {len(lost)} lost, {len(other)} unexpected")
                wrong += [f"  lost {line[:150]}" for line in list(lost)[:3]]
                wrong += [f"  unexpected {line[:150]}" for line in list(other)[:3]]
        return wrong

    def _undisturbed(self) -> list[Any]:
        """A plain loop over the same topics in the order that the job logged."""
        os.environ |= self.environment
        (log,) = (self.directory / "run" / "state" / "order").glob("*.log")
        copied = self.directory / "order.log"
        copied.write_bytes(log.read_bytes())
        job = jobs.on_kafka()
        plain = PlainRun(job, Reader(inputs_of(job), job.time, log=OrderLog(copied)))
        records: list[Any] = []
        while plain.reader.replaying:
            batch = plain.reader.next_batch()
            if batch is not None:
                records += plain.process(plain.admit.admit(batch))
        plain.reader.close()
        return records


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _wait_gone(pid: int) -> None:
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)


def main() -> int:
    """The command line; 1 where a record was lost, came twice or differs."""
    parser = argparse.ArgumentParser(prog="python -m tests.integration.chaos", description=__doc__.split("\n")[0])
    parser.add_argument("--mode", choices=["immediate", "transactional"])
    parser.add_argument("--order", choices=["arrival", "event_time"])
    parser.add_argument("--kills", type=int, default=50, help="of the job, for each mode and order")
    parser.add_argument("--broker-kills", type=int, default=5)
    parser.add_argument("--rate", type=int, default=400, help="payments/s")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    modes = [options.mode] if options.mode else ["transactional", "immediate"]
    orders = [options.order] if options.order else ["arrival", "event_time"]
    failed = 0
    for mode in modes:
        for order in orders:
            failed += _one(mode, order, options)
    return 1 if failed else 0


def _one(mode: str, order: str, options: argparse.Namespace) -> bool:
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="millrace-chaos-") as scratch, running(Path(scratch) / "kafka") as broker:
        trial = Trial(
            Topics(broker.address, broker), broker, Path(scratch), mode, order, options.workers, options.rate,
            random.Random(f"{options.seed} {mode} {order}"),
        )  # fmt: skip
        trial.run(options.kills, options.broker_kills)
        wrong = trial.verdict()
        print(f"{mode}, {order}: {trial.sent} payments in {time.monotonic() - began:.0f} s; {dict(trial.counts)}")
        print("\n".join(wrong) or "every record once, as undisturbed", flush=True)
        if wrong:
            kept = Path(tempfile.mkdtemp(prefix="millrace-chaos-kept-"))
            (Path(scratch) / "run").rename(kept / "run")
            (Path(scratch) / "job.log").rename(kept / "job.log")
            print(f"kept in {kept}")
        return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
