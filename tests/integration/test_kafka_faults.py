"""Jobs between topics of a real broker under faults: kills, brokers away, removed records, changed outputs."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.integration import jobs
from tests.integration.test_kafka import Stage, kill, stage, stop, wait_until
from tests.integration.topics import Topics
from tests.scenarios import running

__all__ = ["stage"]  # the fixture


@pytest.mark.parametrize(("mode", "order"), [("immediate", "arrival"), ("transactional", "event_time")])
def test_killed_runs_write_each_record_once(kafka: Topics, tmp_path: Path, mode: str, order: str) -> None:
    """Killed three times under load and started again: Kafka's own consumer finds each prediction exactly once."""
    stage = Stage(kafka, tmp_path, MODE=mode, ORDER=order, IDLE="600")
    options = ("--checkpoint", "0.3", "--linger", "0.01", "--batch-size", "50")
    rows = jobs.payments(4000)
    told = jobs.chargebacks(rows)

    def send(part: int) -> None:
        some = rows[part * 1000 : (part + 1) * 1000]
        kafka.fill(stage.payments, some, key="card")
        kafka.fill(stage.chargebacks, [row for row in told if some[0]["at"] <= row["at"] <= some[-1]["at"]], key="id")

    send(0)
    process = stage.start(*options)
    for part in range(1, 4):
        before = part * 1000 - 500
        wait_until(lambda enough=before: len(set(stage.scored(False))) >= enough, f"{before} scores")  # type: ignore[misc]
        send(part)
        kill(process)
        process = stage.start(*options)
    if order == "arrival":
        wait_until(lambda: len(set(stage.scored())) == 4000, "4,000 scores")
    stop(process)
    if order == "event_time":
        stage.run(*options)
    if kafka.broker is None:
        found = Counter(stage.scored())
    else:
        lines = [json.loads(line) for line in kafka.console(stage.scores) if line.startswith("{")]
        found = Counter(row["id"] for row in lines)
    assert found == Counter(range(4000))
    outcomes = Counter(row["id"] for row in kafka.values(stage.outcomes))
    assert max(outcomes.values()) == 1


def test_removed_records_stop_a_job_until_it_may_go_on(stage: Stage) -> None:
    """The error names topic, partition, wanted and available offsets; `--on-gap earliest` goes on and counts."""
    rows = jobs.payments(600)
    stage.kafka.fill(stage.payments, rows[:300], key="card")
    stage.run()
    stage.kafka.fill(stage.payments, rows[300:], key="card")
    ends = Counter(record.partition for record in stage.kafka.read(stage.payments))
    partition, end = next(iter(sorted(ends.items())))
    stage.kafka.remove_before(stage.payments, partition, end - 5)
    process = stage.start("--until", "end")
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"{stage.payments}/{partition}" in printed
    assert f"the first record there is has {end - 5}" in " ".join(printed.split())
    assert "--on-gap earliest" in printed
    stage.run("--on-gap", "earliest")
    status = json.loads((stage.out / "state" / "status.json").read_bytes())
    assert status["gap"] == 600 - len(set(stage.scored()))
    assert status["gap"] > 0
    assert len(stage.scored()) == len(set(stage.scored()))


def test_brokers_that_are_away_end_the_run_within_the_bound(kafka: Topics, tmp_path: Path) -> None:
    """No broker: a clear error within the bound; a broker that dies under a run ends it, and the next goes on."""
    if kafka.broker is None:
        pytest.skip("KAFKA_BOOTSTRAP's broker is not ours to kill")
    stage = Stage(kafka, tmp_path, PATIENCE="5", ORDER="arrival")
    rows = jobs.payments(600)
    kafka.fill(stage.payments, rows[:300], key="card")
    process = stage.start("--checkpoint", "0.5")
    wait_until(lambda: len(stage.scored()) == 300, "300 scores")
    kafka.fill(stage.payments, rows[300:], key="card")
    kafka.broker.kill()
    try:
        stopped = time.monotonic()
        again = stage.start("--directory", str(tmp_path / "other"))
        printed, _ = again.communicate(timeout=60)
        assert again.returncode == 1
        assert kafka.address in printed
        assert time.monotonic() - stopped < 30
    finally:
        kafka.broker.start()
    if process.poll() is None:
        stop(process)
    else:
        assert "Hint: " in process.communicate()[0]
    stage.run()
    assert Counter(stage.scored()) == Counter(range(600))


def test_inputs_that_were_written_in_transactions_are_repeated(kafka: Topics, tmp_path: Path) -> None:
    """Marks of transactions and aborted records have offsets too; killed and resumed, each payment is answered once."""
    stage = Stage(kafka, tmp_path, ORDER="arrival")
    rows = jobs.payments(600)
    told = jobs.chargebacks(rows)
    kafka.fill_in_transactions(stage.payments, rows[:300], "card", 20)
    kafka.fill_in_transactions(stage.chargebacks, told[:100], "id", 10)
    options = ("--checkpoint", "5", "--linger", "0.01", "--batch-size", "30")
    process = stage.start(*options)
    wait_until(lambda: len(stage.scored()) == 300, "300 scores")
    kill(process)  # before a checkpoint: all is repeated
    kafka.fill_in_transactions(stage.payments, rows[300:], "card", 20)
    stage.run(*options)
    assert Counter(stage.scored()) == Counter(range(600))
    assert kafka.values(stage.rejects) == []


@pytest.mark.parametrize(("before", "after"), [("immediate", "transactional"), ("transactional", "immediate")])
def test_the_mode_of_an_output_may_change(kafka: Topics, tmp_path: Path, before: str, after: str) -> None:
    """Killed in one mode and resumed in the other: each record once."""
    stage = Stage(kafka, tmp_path, ORDER="arrival", MODE=before)
    rows = jobs.payments(800)
    kafka.fill(stage.payments, rows[:400], key="card")
    process = stage.start("--checkpoint", "1")
    wait_until(lambda: len(stage.scored()) >= 400, "400 scores")
    kafka.fill(stage.payments, rows[400:], key="card")
    time.sleep(0.5)
    kill(process)
    stage.run("--checkpoint", "1", MODE=after)
    assert Counter(stage.scored()) == Counter(range(800))


def test_outputs_may_move_from_files_to_topics(kafka: Topics, tmp_path: Path) -> None:
    """What was written before stays in the files; the topics begin with what comes after, and the run says so."""
    stage = Stage(kafka, tmp_path, ORDER="arrival")
    rows = jobs.payments(400)
    kafka.fill(stage.payments, rows[:200], key="card")
    process = stage.start("--checkpoint", "0.5", job="from_kafka")
    predictions = stage.out / "predictions.jsonl"
    wait_until(lambda: predictions.exists() and predictions.read_bytes().count(b"\n") == 200, "200 predictions")
    stop(process)
    kafka.fill(stage.payments, rows[200:], key="card")
    printed = stage.run()
    assert "predictions went elsewhere before" in " ".join(printed.split())
    assert sorted(stage.scored()) == list(range(200, 400))
    assert len(running.records(stage.out, "predictions")) == 200


def test_a_changed_job_without_a_checkpoint_leaves_nothing_out(kafka: Topics, tmp_path: Path) -> None:
    """Records of a run that was killed before its first checkpoint are not taken for those of the changed job."""
    stage = Stage(kafka, tmp_path, ORDER="arrival")
    rows = jobs.payments(100)
    kafka.fill(stage.payments, rows, key="card")
    process = stage.start("--checkpoint", "600")
    wait_until(lambda: len(stage.scored()) == 100, "100 scores")
    kill(process)
    stage.run("--reset", "features_card", WINDOW="2h")
    versions = Counter(row["id"] for row in kafka.values(stage.scores) if "count_2h_by_card" in row["features"])
    assert versions == Counter(range(100))
