"""Jobs between topics of a real broker: everything arrives once, in order, as from files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dataflows.events import Prediction
from dataflows.order import Reader
from dataflows.orderlog import OrderLog
from dataflows.replay import PlainRun, inputs_of
from tests.integration import jobs
from tests.integration.topics import Topics
from tests.scenarios import running

JOB = "tests.integration.jobs"


class Stage:
    """Topics of one test and the job between them."""

    def __init__(self, kafka: Topics, directory: Path, partitions: int = 3, **environment: str) -> None:
        self.kafka = kafka
        self.out = directory / "run"
        self.payments, self.chargebacks = kafka.make("payments", partitions), kafka.make("chargebacks", 2)
        self.scores, self.outcomes = kafka.make("scores", 3), kafka.make("outcomes", 2)
        self.rejects, self.models = kafka.make("rejects"), kafka.make("models")
        topics = (self.payments, self.chargebacks, self.scores, self.outcomes, self.rejects, self.models)
        self.environment = {"TOPICS": ",".join(topics), "MILLRACE_KAFKA_BROKERS": kafka.address} | environment

    def run(self, *options: str, job: str = "on_kafka", **environment: str) -> str:
        """A run to the end of the topics."""
        named = self.environment | environment
        return running.run(f"{JOB}:{job}", self.out, "--until", "end", *options, **named)

    def start(self, *options: str, job: str = "on_kafka", **environment: str) -> subprocess.Popen[str]:
        """A run that goes on."""
        return running.start(f"{JOB}:{job}", self.out, *options, **self.environment | environment)

    def scored(self, committed: bool = True) -> list[int]:
        """The ids of the predictions, in the order of the topic."""
        return [row["id"] for row in self.kafka.values(self.scores, committed)]


def wait_until(ready: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
    """Fails the test when it takes too long."""
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.2)


def stop(process: subprocess.Popen[str]) -> str:
    """SIGTERM, as an orchestrator does, once it has started its workers; what was printed."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    wait_until(lambda: process.poll() is not None or children.read_text() != "", "workers")
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0, printed
    return printed


def kill(process: subprocess.Popen[str]) -> None:
    """kill -9 of the launcher; its workers notice."""
    process.kill()
    process.communicate(timeout=60)


@pytest.fixture
def stage(kafka: Topics, tmp_path: Path) -> Stage:
    """Topics with three partitions of payments."""
    return Stage(kafka, tmp_path)


@pytest.mark.parametrize("mode", ["immediate", "transactional"])
@pytest.mark.parametrize("workers", ["1", "2"])
def test_every_payment_is_answered_once(kafka: Topics, tmp_path: Path, mode: str, workers: str) -> None:
    """Predictions and outcomes once each, keyed and in order per card, with headers; bad records are dead letters."""
    stage = Stage(kafka, tmp_path, MODE=mode)
    rows = jobs.payments(2000)
    kafka.fill(stage.payments, rows, key="card", compression_type="zstd")
    kafka.fill(stage.payments, [b"rubbish", b"", None, b'{"id": 5}'])
    kafka.fill(stage.chargebacks, jobs.chargebacks(rows), key="id", compression_type="gzip")
    printed = stage.run("--workers", workers)
    records = kafka.read(stage.scores)
    cards = {row["id"]: row["card"] for row in rows}
    scored = [json.loads(record.value) for record in records]
    assert sorted(row["id"] for row in scored) == list(range(2000))
    assert all(record.key == cards[row["id"]].encode() for record, row in zip(records, scored, strict=True))
    by_card: dict[bytes, list[int]] = {}
    for record, row in zip(records, scored, strict=True):
        by_card.setdefault(record.key, []).append(row["id"])
    assert all(ids == sorted(ids) for ids in by_card.values())
    headers = dict(records[0].headers)
    assert headers["id"] == str(scored[0]["id"]).encode()
    assert headers["version"] == str(scored[0]["version"]).encode()
    assert headers["time"].startswith(scored[0]["time"][:19].encode())
    assert len(kafka.values(stage.outcomes)) == 2000
    letters = kafka.read(stage.rejects)
    assert {record.value for record in letters} == {b"rubbish", b"", b'{"id": 5}'}
    assert {dict(record.headers)["millrace.reason"] for record in letters} == {b"not_json", b"empty", b"invalid"}
    versions = kafka.values(stage.models)
    assert [row["version"] for row in versions] == sorted(row["version"] for row in versions)
    assert versions[-1]["version"] == 2000
    assert "rejects" in printed


def test_topics_and_files_give_the_same_predictions(kafka: Topics, tmp_path: Path) -> None:
    """By event time, three partitions with two workers and one file give the same scores to the last bit."""
    stage = Stage(kafka, tmp_path)
    rows = jobs.payments(4000)
    told = jobs.chargebacks(rows)
    kafka.fill(stage.payments, rows, key="card")
    kafka.fill(stage.chargebacks, told, key="id")
    stage.run("--workers", "2", job="from_kafka")
    files = tmp_path / "files"
    files.mkdir()
    for name, some in (("payments", rows), ("chargebacks", told)):
        (files / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    running.run(f"{JOB}:on_files", tmp_path / "filed", FILES=str(files))
    for kind in ("predictions", "outcomes"):
        found, expected = (running.records(place, kind) for place in (stage.out, tmp_path / "filed"))
        assert len(expected) == 4000
        assert found == expected


def test_a_file_can_take_the_place_of_a_topic(kafka: Topics, tmp_path: Path) -> None:
    """`--data` and `--labels` run a job of topics over files, without a broker."""
    rows = jobs.payments(300)
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in jobs.chargebacks(rows)))
    options = ("--data", str(tmp_path / "p.jsonl"), "--labels", str(tmp_path / "c.jsonl"))
    running.run(f"{JOB}:from_kafka", tmp_path / "run", *options, TOPICS="a,b")
    assert len(running.records(tmp_path / "run", "predictions")) == 300


def test_an_order_log_repeats_a_run_as_events_arrived(
    kafka: Topics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a live run in arrival order predicted, a plain loop over topics and order log predicts again."""
    stage = Stage(kafka, tmp_path, ORDER="arrival")
    process = stage.start("--checkpoint", "0.5", job="from_kafka", BROKER="")
    rows = jobs.payments(1500)
    told = jobs.chargebacks(rows)
    for part in range(5):
        kafka.fill(stage.payments, rows[part * 300 : (part + 1) * 300], key="card")
        kafka.fill(stage.chargebacks, told[part::5], key="id")
        if part == 2:
            kill(process)
            process = stage.start("--checkpoint", "0.5", job="from_kafka")
    predictions = stage.out / "predictions.jsonl"
    wait_until(lambda: predictions.exists() and predictions.read_bytes().count(b"\n") == 1500, "1,500 predictions")
    stop(process)
    logs = list((stage.out / "state" / "order").glob("*.log"))
    assert len(logs) == 1
    for name, value in (stage.environment | {"ORDER": "arrival"}).items():
        monkeypatch.setenv(name, value)
    job = jobs.from_kafka()
    again = PlainRun(job, Reader(inputs_of(job), job.time, log=OrderLog(logs[0])))
    found = [record for record in again.run() if isinstance(record, Prediction)]
    expected = running.records(stage.out, "predictions")
    assert [(p.id, p.version, p.output, p.features) for p in found] == [
        (row["id"], row["version"], row["output"], row["features"]) for row in expected
    ]


def test_added_partitions_are_taken_up(kafka: Topics, tmp_path: Path) -> None:
    """Partitions that are added while the job runs are read from their beginning; also after a resume."""
    stage = Stage(kafka, tmp_path, partitions=1, ORDER="arrival")
    process = stage.start("--checkpoint", "0.5")
    rows = jobs.payments(900)
    kafka.fill(stage.payments, rows[:300], key="card")
    wait_until(lambda: len(stage.scored()) == 300, "300 scores")
    kafka.grow(stage.payments, 4)
    kafka.fill(stage.payments, rows[300:600], key="card")
    wait_until(lambda: len(stage.scored()) == 600, "600 scores")
    stop(process)
    kafka.grow(stage.payments, 6)
    kafka.fill(stage.payments, rows[600:], key="card")
    stage.run(START="latest")
    assert sorted(stage.scored()) == list(range(900))


def test_empty_topics_are_an_end_at_once_and_no_error(stage: Stage) -> None:
    """A run over nothing ends with nothing."""
    stage.run()
    assert stage.kafka.read(stage.scores) == []


def test_a_topic_that_is_not_there_is_named(stage: Stage) -> None:
    """The error says which topic, at which brokers, and how to make one."""
    process = stage.start(TOPICS=f"nowhere,{stage.chargebacks},a,b,c,d")
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "no topic 'nowhere'" in printed
    assert stage.kafka.address in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize("start", ["latest", "1970-01-01T00:00:05Z"])
def test_a_new_job_begins_where_it_is_told(stage: Stage, start: str) -> None:
    """At the end, or at a time of the records; what came before is not read."""
    rows = jobs.payments(200)
    stage.kafka.fill(stage.payments, rows, key="card")
    stage.run(START=start)
    assert len(stage.scored()) == (0 if start == "latest" else 200)


def test_a_run_until_a_time_ends_there(stage: Stage) -> None:
    """Records with a later timestamp are left for the next run."""
    rows = jobs.payments(200)
    stage.kafka.fill(stage.payments, rows[:120], key="card")
    time.sleep(1.1)
    until = time.time()
    time.sleep(0.1)
    stage.kafka.fill(stage.payments, rows[120:], key="card")
    named = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(until))
    running.run(f"{JOB}:on_kafka", stage.out, "--until", named, **stage.environment)
    assert sorted(stage.scored()) == list(range(120))


def test_offsets_go_to_a_group_for_monitors(stage: Stage) -> None:
    """With `group=`, tools that show lag see how far checkpoints are; nothing is read from there."""
    from kafka import KafkaAdminClient
    from kafka.errors import CoordinatorNotAvailableError

    stage.kafka.fill(stage.payments, jobs.payments(200), key="card")
    group = stage.kafka.name("group")
    process = stage.start("--checkpoint", "0.3", GROUP=group, ORDER="arrival")
    admin = KafkaAdminClient(bootstrap_servers=stage.kafka.address)
    try:

        def told() -> int:
            try:
                found: Any = admin.list_group_offsets([group])
            except CoordinatorNotAvailableError:  # it is made with the first group
                return 0
            return sum(one.offset for one in found.get(group, found).values() if one.offset > 0)

        wait_until(lambda: told() == 200, "offsets of the group")
    finally:
        admin.close()
        stop(process)


def test_nothing_of_the_environment_is_needed_when_brokers_are_given(stage: Stage) -> None:
    """`--kafka` names the brokers, for workers as well; without any the error says how to name them."""
    stage.kafka.fill(stage.payments, jobs.payments(50), key="card")
    environment = {"TOPICS": stage.environment["TOPICS"]}
    bare = running.start(f"{JOB}:on_kafka", stage.out, **environment)
    printed, _ = bare.communicate(timeout=60)
    assert bare.returncode == 1
    assert "--kafka" in printed
    options = ("--kafka", stage.kafka.address, "--until", "end")
    running.run(f"{JOB}:on_kafka", stage.out, *options, **environment)
    assert len(stage.scored()) == 50
    assert "MILLRACE_KAFKA_BROKERS" not in os.environ
