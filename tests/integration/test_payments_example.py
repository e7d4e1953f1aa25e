"""The payments example on Kafka: its producer sends, its job answers, both as a reader of its README starts them."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.conftest import ROOT
from tests.integration.broker import free_port
from tests.integration.topics import Topics
from tests.scenarios import running
from tests.test_documents import read_blocks

RATE, PAYMENTS = 100, 1_400
DAY = timedelta(seconds=1)
HORIZON = 7 * DAY
PATIENCE_S = 90


def wait_until(is_so: Callable[[], bool], what: str) -> None:
    """Wait; fails the test when it takes too long."""
    deadline = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline, f"not within {PATIENCE_S} s: {what}"
        time.sleep(0.1)


class Program:
    """A command in the background, its output in a file."""

    def __init__(self, command: str, directory: Path, name: str, **env: str) -> None:
        self._output = directory / f"{name}.txt"
        bin_first = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        with self._output.open("wb") as file:
            self.process = subprocess.Popen(
                shlex.split(command), cwd=directory, stdout=file, stderr=subprocess.STDOUT,
                env=running.environment(PATH=bin_first, PYTHONUNBUFFERED="1", COLUMNS="120", **env),
            )  # fmt: skip

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    @property
    def output(self) -> str:
        """What it has said so far."""
        return self._output.read_text("utf-8")

    def wait_for(self, text: str) -> None:
        """Until it has said this."""
        wait_until(lambda: text in self.output or self.process.poll() is not None, f"{text!r} in {self.output}")
        assert text in self.output, self.output

    def end(self, number: int | None = None) -> str:
        """Wait for its end, after a signal if one is named; what it said. Fails the test when it failed."""
        if number is not None:
            self.process.send_signal(number)
        self.process.wait(timeout=PATIENCE_S)
        assert self.process.returncode == 0, self.output
        return self.output


class Session(NamedTuple):
    """What was in the topics after some seconds of payments, and what was said."""

    sent: str
    metrics: list[dict[str, Any]]
    payments: list[Any]
    chargebacks: list[Any]
    scores: list[Any]
    outcomes: list[Any]
    rejects: list[Any]


@pytest.fixture(scope="module")
def session(kafka: Topics, tmp_path_factory: pytest.TempPathFactory) -> Session:
    """Fourteen days of a second, in topics of its own."""
    directory, prefix = tmp_path_factory.mktemp("payments"), kafka.name("example") + "-"
    (directory / "job.py").write_text(
        "from datetime import timedelta\n\nfrom examples.payments.job import on_kafka\n\n\n"
        f"def job():\n    return on_kafka(prefix={prefix!r}, day=timedelta(seconds={DAY.total_seconds():g}))\n"
    )
    command = (
        f"{sys.executable} -m examples.payments.produce --prefix {prefix} --rate {RATE} --payments {PAYMENTS} "
        f"--day {DAY.total_seconds():g}"
    )
    with Program(command, directory, "produce", MILLRACE_KAFKA_BROKERS=kafka.address) as producer:
        producer.wait_for("made the topics")
        job = running.start(
            f"{directory}/job.py", directory / "run", "--checkpoint", "2", MILLRACE_KAFKA_BROKERS=kafka.address
        )
        try:
            sent = producer.end()
            payments, chargebacks = kafka.read(f"{prefix}payments"), kafka.read(f"{prefix}chargebacks")
            kafka.fill(f"{prefix}payments", [b"no payment"])
            kafka.fill(f"{prefix}chargebacks", [chargebacks[0].value])
            wait_until(lambda: job.poll() is not None or len(kafka.read(f"{prefix}scores")) >= PAYMENTS, "all scores")
            wait_until(lambda: job.poll() is not None or len(kafka.read(f"{prefix}rejects")) >= 2, "the rejects")
        finally:
            job.terminate()
            printed, _ = job.communicate(timeout=PATIENCE_S)
    assert job.returncode == 0, printed
    written = [kafka.read(f"{prefix}{name}") for name in ("scores", "outcomes", "rejects")]
    return Session(sent, running.records(directory / "run", "metrics"), payments, chargebacks, *written)


def values(records: list[Any]) -> list[dict[str, Any]]:
    """Records from JSON."""
    return [json.loads(record.value) for record in records]


def by_payment(records: list[Any], name: str = "payment_id") -> dict[str, Any]:
    """Records by the payment they are about, each about another."""
    found = {value[name]: record for record, value in zip(records, values(records), strict=True)}
    assert len(found) == len(records)
    return found


def at(text: str) -> datetime:
    """A time as it stands in records."""
    return datetime.fromisoformat(text)


def test_the_producer_sends_what_it_says_at_the_rate_asked_for(session: Session) -> None:
    """Payments lie evenly spaced in time, were sent about when they say, and are counted rightly."""
    assert f"sent {PAYMENTS:,} payments and {len(session.chargebacks)} chargebacks in" in session.sent
    assert len(session.payments) == PAYMENTS
    paid = sorted(at(value["paid_at"]) for value in values(session.payments))
    seconds = PAYMENTS / RATE
    assert (paid[-1] - paid[0]).total_seconds() == pytest.approx(seconds, rel=0.01)
    arrived = [record.timestamp / 1000 for record in session.payments]
    assert seconds * 0.9 < max(arrived) - min(arrived) < seconds * 1.5
    late = [
        record.timestamp / 1000 - at(json.loads(record.value)["paid_at"]).timestamp() for record in session.payments
    ]
    assert -0.1 < sorted(late)[PAYMENTS // 2] < 2


def test_payments_of_a_card_share_a_partition(session: Session) -> None:
    """Payments are keyed by card over three partitions."""
    partitions: dict[str, set[int]] = {}
    for record, value in zip(session.payments, values(session.payments), strict=True):
        assert record.key.decode() == value["card_id"]
        partitions.setdefault(value["card_id"], set()).add(record.partition)
    assert all(len(each) == 1 for each in partitions.values())
    assert {number for each in partitions.values() for number in each} == {0, 1, 2}


def test_every_payment_has_one_score_keyed_by_its_card(session: Session) -> None:
    """The scores are about the payments sent, each about one, in the partition of its card and with its time."""
    scores, payments = by_payment(session.scores, "id"), by_payment(session.payments)
    assert scores.keys() == payments.keys()
    for name, payment in payments.items():
        score, paid = json.loads(scores[name].value), json.loads(payment.value)
        assert scores[name].key == payment.key
        assert at(score["time"]) == at(paid["paid_at"])
        assert score["features"]["amount"] == paid["amount"]
        assert 0 <= score["output"] <= 1


def test_outcomes_come_when_chargebacks_come_or_the_horizon_ends(session: Session) -> None:
    """Reported frauds are outcomes at once, payments older than seven days good ones; each payment has one at most."""
    outcomes, payments = by_payment(session.outcomes, "id"), by_payment(session.payments)
    reports: dict[str, datetime] = {}
    for report in values(session.chargebacks):
        reports.setdefault(report["payment_id"], at(report["reported_at"]))
    newest = max(at(value["paid_at"]) for value in values(session.payments))
    for name, payment in payments.items():
        paid = at(json.loads(payment.value)["paid_at"])
        reported = name in reports and reports[name] - paid <= HORIZON
        if reported or newest - paid > HORIZON:
            outcome = json.loads(outcomes.pop(name).value)
            assert (outcome["label"], outcome["assumed"]) == (reported, not reported)
    assert not outcomes
    assert any(name in payments for name in reports)


def test_what_cannot_be_used_is_a_reject_as_it_came(session: Session) -> None:
    """Bytes that are no payment, and reports that are late, doubled or about unknown payments; nothing else."""
    reasons = {dict(record.headers)["millrace.reason"].decode(): record.value for record in session.rejects}
    assert reasons["not_json"] == b"no payment"
    assert reasons.keys() - {"not_json"} <= {"late_label", "duplicate_label", "orphan_label"}
    assert session.chargebacks[0].value in [record.value for record in session.rejects]


def test_metrics_are_in_a_file(session: Session) -> None:
    """The metrics of each simulated day are where the README looks for them."""
    assert [record["outcomes"] for record in session.metrics] == sorted(r["outcomes"] for r in session.metrics)
    assert session.metrics[-1]["outcomes"] > 100


def test_the_readme_works_as_it_stands(kafka: Topics, tmp_path: Path) -> None:
    """The commands of the README, in their order and until Ctrl-C, show scores, outcomes and metrics."""
    readme = (ROOT / "examples" / "payments" / "README.md").read_text("utf-8")
    blocks = [block.script for block in read_blocks(readme) if block.not_run == "needs a broker"]
    commands = "\n".join(blocks).replace("localhost:9092", kafka.address).splitlines()
    produce, run, scores, outcomes, rejects, metrics = commands
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    with ExitStack() as stack:

        def start(command: str, name: str) -> Program:
            return stack.enter_context(Program(command, tmp_path, name))

        producer = start(produce, "produce")
        producer.wait_for("chargebacks sent")
        readers = {
            '"record":"prediction"': start(scores, "scores"),
            '"label":true': start(outcomes, "outcomes"),
        }
        rejected = start(rejects, "rejects")
        job = start(run, "run")
        file = tmp_path / "runs" / "payments-on-kafka" / "metrics.jsonl"
        wait_until(lambda: file.exists() or job.process.poll() is not None, "a file of metrics")
        readers['"record":"metrics"'] = start(metrics, "metrics")
        for text, reader in readers.items():
            reader.wait_for(text)
        assert rejected.process.poll() is None, rejected.output
        assert "stopped with a checkpoint" in job.end(signal.SIGINT)
        assert "all acknowledged" in producer.end(signal.SIGTERM)


def test_a_producer_without_a_broker_says_so(tmp_path: Path) -> None:
    """Where nobody answers, the producer ends soon with one message that names the address."""
    address = f"127.0.0.1:{free_port()}"
    with Program(f"{sys.executable} -m examples.payments.produce --kafka {address}", tmp_path, "produce") as producer:
        assert producer.process.wait(timeout=PATIENCE_S) == 1
        assert f"Kafka at {address}" in producer.output
        assert "Hint: is a broker running there?" in producer.output
        assert len(producer.output.splitlines()) == 1
