"""Dead letters read back from their topic, and sent again to the topic they came from."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from dataflows import Event, Kafka, Message
from dataflows.connectors.kafka.returning import Returning
from tests.integration.topics import Topics
from tests.scenarios import running

JOB = """
import os
from river import linear_model
from dataflows import Event, Job, Kafka, Label, Outputs, Time
from features import Fields

class Ping(Event, id="id", time="t", unit="s"):
    id: int
    t: int
    x: TYPE
    y: bool

payments, scores, rejects = os.environ["TOPICS"].split(",")
job = Job(
    name="pings",
    events=Kafka(payments, Ping, timeout=20),
    features=[Fields("x")],
    model=linear_model.LogisticRegression(),
    label=Label(field="y", delay="30s"),
    time=Time(order="arrival", lateness="1h"),
    outputs=Outputs(predictions=Kafka(scores, mode=MODE), rejects=Kafka(rejects, mode=MODE)),
)
"""


class Stage:
    """Topics, a job file whose event class is strict at first, and the commands."""

    def __init__(self, kafka: Topics, directory: Path, mode: str = "immediate") -> None:
        self.kafka = kafka
        self.directory = directory
        self.mode = mode
        self.payments, self.scores, self.rejects = (
            kafka.make("pings", 2),
            kafka.make("scores"),
            kafka.make("rejects", 2),
        )
        self.environment = {
            "TOPICS": f"{self.payments},{self.scores},{self.rejects}",
            "MILLRACE_KAFKA_BROKERS": kafka.address,
        }
        self.declare("int")

    def declare(self, kind: str) -> None:
        """The job with another class of events."""
        (self.directory / "job.py").write_text(JOB.replace("TYPE", kind).replace("MODE", repr(self.mode)))

    def run(self) -> str:
        """A run to the end of the topic."""
        reference = str(self.directory / "job.py")
        return running.run(reference, self.directory / "run", "--until", "end", **self.environment)

    def millrace(self, *words: str, code: int = 0, **variables: str) -> tuple[str, str]:
        """`millrace rejects`; what it printed."""
        command = [sys.executable, "-m", "dataflows", "rejects", str(self.directory / "job.py")]
        command += ["--directory", str(self.directory / "run"), *words]
        named = running.environment(**self.environment | variables)
        done = subprocess.run(
            command, env=named, text=True, capture_output=True, timeout=120, cwd=running.ROOT, check=False
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout, done.stderr

    def send(self, rows: Iterable[tuple[Any, bytes | None, list[tuple[str, bytes]], int]]) -> None:
        """Records with key, headers and timestamp."""
        from kafka import KafkaProducer

        producer = KafkaProducer(bootstrap_servers=self.kafka.address)
        futures = [
            producer.send(self.payments, json.dumps(row).encode(), key, headers, timestamp_ms=at)
            for row, key, headers, at in rows
        ]
        for future in futures:
            future.get(30)
        producer.close()

    def answered(self) -> list[int]:
        """The ids of the predictions."""
        return sorted(row["id"] for row in self.kafka.values(self.scores))


@pytest.mark.parametrize("mode", ["immediate", "transactional"])
def test_rejects_are_processed_once_the_job_takes_them(kafka: Topics, tmp_path: Path, mode: str) -> None:
    """Nobody mends the records: the class is loosened, and the originals are sent again, once, as they were."""
    stage = Stage(kafka, tmp_path, mode)
    at = round(time.time() * 1000) - 3_600_000
    rows = [
        ({"id": n, "t": n, "x": n / 2, "y": n % 3 == 0}, b"k%d" % (n % 4), [("trace", b"\xff%d" % n)], at + n)
        for n in range(20)
    ]
    stage.send(rows)
    stage.run()
    assert stage.answered() == list(range(0, 20, 2))
    printed, _ = stage.millrace()
    assert printed.startswith(f"10 rejects of pings in topic {stage.rejects}")
    assert f"{stage.payments}/" in printed
    assert '{"id": 1, "t": 1, "x": 0.5, "y": false}' in printed

    printed, _ = stage.millrace("--resubmit", "--limit", "3")
    assert "3 rejects sent to topic " + stage.payments in printed
    printed, _ = stage.millrace("--resubmit")
    assert "7 rejects sent to topic " + stage.payments in printed
    assert "3 rejects left out: sent before" in printed
    assert "nothing was sent" in stage.millrace("--resubmit")[0]
    records = kafka.read(stage.payments)
    assert len(records) == 30
    first = {json.loads(record.value)["id"]: record for record in records if len(record.headers) == 1}
    again = [record for record in records if len(record.headers) == 2]
    for record in again:
        before = first[json.loads(record.value)["id"]]
        assert (record.value, record.key, record.partition) == (before.value, before.key, before.partition)
        assert record.timestamp > before.timestamp + 3_000_000
        place = f"{stage.payments}/{before.partition}:{before.offset}"
        assert record.headers == [*before.headers, ("millrace.resubmitted", place.encode())]

    stage.declare("float")
    stage.run()
    assert stage.answered() == list(range(20))
    told = [json.loads(line) for line in stage.millrace("--json")[0].splitlines()]
    assert len(told) == 10
    assert "nothing was sent" in stage.millrace("--resubmit")[0]
    stage.millrace("--resubmit", "--again", "--limit", "1")
    stage.run()
    assert stage.answered() == list(range(20))
    (twice,) = [json.loads(line) for line in stage.millrace("--json", "--reason", "duplicate_event")[0].splitlines()]
    assert sum(name == "millrace.resubmitted" for name, _ in twice["headers"]) == 1


def test_only_the_jobs_own_dead_letters_are_read(kafka: Topics, tmp_path: Path) -> None:
    """A topic may hold those of several jobs, and records that are none."""
    stage = Stage(kafka, tmp_path)
    kafka.fill(stage.payments, [b"rubbish", b"\xff\x1b[2J"])
    kafka.fill(stage.rejects, [b"foreign"])
    other = [("millrace.reason", b"r"), ("millrace.detail", b"d"), ("millrace.place", b"p/0:1"), ("millrace", b"x/1/1")]
    from kafka import KafkaProducer

    producer = KafkaProducer(bootstrap_servers=kafka.address)
    producer.send(stage.rejects, b"{}", None, other).get(30)
    producer.close()
    stage.run()
    told = [json.loads(line) for line in stage.millrace("--json")[0].splitlines()]
    assert sorted(row["reason"] for row in told) == ["encoding", "not_json"]
    printed, _ = stage.millrace("--limit", "5")
    assert "\x1b" not in printed
    assert r"b'\xff\x1b[2J'" in printed


def test_what_could_not_be_sent_is_said_and_tried_again(kafka: Topics, tmp_path: Path) -> None:
    """Brokers that are away, or a record that the topic takes no more: an error, exit code 1; it is not remembered."""
    stage = Stage(kafka, tmp_path)
    kafka.fill(stage.payments, [b"rubbish", b"r" * 60_000])
    stage.run()
    _, wrong = stage.millrace("--resubmit", "--kafka", "127.0.0.1:1", code=1)
    assert "Hint: are the brokers up" in wrong
    assert "Traceback" not in wrong
    kafka.alter(stage.payments, **{"max.message.bytes": "10000"})
    printed, wrong = stage.millrace("--resubmit", code=1)
    assert "1 reject sent to topic" in printed
    assert "1 reject could not be sent. The first: " in wrong
    assert "MessageSizeTooLargeError" in wrong
    kafka.alter(stage.payments, **{"max.message.bytes": "1000000"})
    printed, _ = stage.millrace("--resubmit")
    assert "1 reject sent to topic" in printed
    assert "1 reject left out" in printed


def test_the_timestamp_stays_where_a_decoder_may_read_it(kafka: Topics) -> None:
    """It may be the event's time; a partition that is not there any more is chosen by the key."""
    topic = kafka.make("stamped", 2)
    declared = Kafka(topic, Event, brokers=kafka.address, decoder=lambda message: {"t": message.timestamp})
    at = round(time.time() * 1000) - 3_600_000
    with closing(Returning(declared)) as returning:
        sent = returning.send(
            [
                (f"{topic}/1:7", Message(b"a", None, (("x", None), ("millrace.resubmitted", b"old")), at)),
                (f"{topic}/5:1", Message(None, b"k", (), -1)),
                (f"{topic}/0:2", Message(None, None)),
            ]
        )
        told = dict(sent)
    assert told.pop(2) == "ValueError: Need at least one: key or value"
    assert told == {0: None, 1: None}
    stamped, tombstone = sorted(kafka.read(topic), key=lambda record: record.value is None)
    assert (stamped.timestamp, stamped.partition) == (at, 1)
    assert stamped.headers == [("x", b""), ("millrace.resubmitted", f"{topic}/1:7".encode())]
    assert (tombstone.key, tombstone.timestamp > at) == (b"k", True)


def test_a_topic_that_is_gone_is_not_made_anew(kafka: Topics, tmp_path: Path) -> None:
    """Records are not sent into the void of a topic that nobody has set up."""
    stage = Stage(kafka, tmp_path)
    kafka.fill(stage.payments, [b"rubbish"])
    stage.run()
    kafka.remove(stage.payments)
    _, wrong = stage.millrace("--resubmit", code=1)
    assert f"there is no topic '{stage.payments}'" in wrong
