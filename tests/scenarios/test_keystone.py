"""The keystone: plain river loop = play = Bytewax with 1 process = with 2 = killed and resumed, to the last bit."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from dataflows import Outcome, Prediction
from tests.scenarios import keystone_jobs, oracles, running

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
JOBS = "tests.scenarios.keystone_jobs"
CASES = [(model, order) for model in keystone_jobs.MODELS for order in keystone_jobs.ORDERS]


class Case(NamedTuple):
    """One stream on disk, in the order in which it arrives."""

    directory: Path
    arrivals: list[oracles.Arrival]

    @property
    def events(self) -> list[dict[str, Any]]:
        return [row for kind, row in self.arrivals if kind == "event"]

    @property
    def labels(self) -> list[dict[str, Any]]:
        return [row for kind, row in self.arrivals if kind == "label"]

    @property
    def inputs(self) -> list[str]:
        return ["--data", str(self.directory / "events.jsonl"), "--labels", str(self.directory / "labels.jsonl")]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """The stream that all tests here share."""
    stream = oracles.keystone_stream(seed=11, n=1200)
    made = Case(tmp_path_factory.mktemp("keystone"), stream.arrivals)
    write(made.directory / "events.jsonl", made.events)
    write(made.directory / "labels.jsonl", made.labels)
    return made


def write(path: Path, rows: Sequence[dict[str, Any]], mode: str = "w") -> None:
    """Rows as JSON lines."""
    with path.open(mode) as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def microseconds(text: str) -> int:
    """Text of a time as microseconds."""
    since = datetime.fromisoformat(text) - EPOCH
    return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds


Answers = tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]


def oracle(case: Case, model: str, order: Any, pulls: Sequence[tuple[str, int]]) -> Answers:
    """What the plain river loop says; in arrival order it is given the order in which records were pulled."""
    stream = oracles.keystone_stream(seed=11, n=1200)
    predictions, outcomes = oracles.plain_loop(
        case.events,
        case.labels,
        keystone_jobs.MODELS[model](),
        horizon=stream.horizon,
        order=order,
        arrivals=list(arrivals(case, pulls)) if order == "arrival" else None,
    )
    return [tuple(p) for p in predictions], [tuple(o) for o in outcomes]


def arrivals(case: Case, pulls: Sequence[tuple[str, int]]) -> Iterator[oracles.Arrival]:
    """Records in the order in which they were pulled."""
    rows = {"events.jsonl": iter(case.events), "labels.jsonl": iter(case.labels)}
    for name, count in pulls:
        for _ in range(max(count, 0)):
            yield ("event" if name == "events.jsonl" else "label"), next(rows[name])


def logged_pulls(directory: Path) -> list[tuple[str, int]]:
    """The order of arrival, as anyone can read it from the order log."""
    lines = (directory / "state" / "order" / "1.log").read_text().splitlines()
    return [(name, count) for line in lines for name, count in json.loads(line)[1]]


def written(directory: Path) -> Answers:
    """The answers in the files of a run, in their order."""
    predictions = [
        (r["id"], microseconds(r["time"]), r["features"], r["output"], r["version"])
        for r in running.records(directory, "predictions")
    ]
    outcomes = [
        (r["id"], r["label"], r["version_after"], microseconds(r["time"]), microseconds(r["label_time"]))
        for r in running.records(directory, "outcomes")
    ]
    return predictions, outcomes


def played(case: Case, model: str, order: str) -> Answers:
    """What play says."""
    records = list(keystone_jobs.keystone(model, order).play(case.events, case.labels))
    predictions = [
        (r.id, microseconds(r.time.isoformat()), r.features, r.output, r.version)
        for r in records
        if isinstance(r, Prediction)
    ]
    outcomes = [
        (r.id, r.label, r.version_after, microseconds(r.time.isoformat()), microseconds(r.label_time.isoformat()))
        for r in records
        if isinstance(r, Outcome)
    ]
    return predictions, outcomes


def assert_equal(found: Answers, expected: Answers) -> None:
    """Row by row, so that the first difference shows."""
    for ours, theirs in zip(found, expected, strict=True):
        for mine, other in zip(ours, theirs, strict=False):
            assert mine == other
        assert len(ours) == len(theirs)


@pytest.mark.parametrize(("model", "order"), CASES)
def test_the_engine_and_play_give_what_a_plain_river_loop_gives(
    case: Case, model: str, order: str, tmp_path: Path
) -> None:
    """Play, one process and two processes under two hash seeds equal the plain loop to the last bit."""
    reference = f"{JOBS}:{model}_{order}"
    running.run(reference, tmp_path / "one", *case.inputs, "--batch-size", "64", PYTHONHASHSEED="1")
    running.run(reference, tmp_path / "two", *case.inputs, "--workers", "2", PYTHONHASHSEED="2")
    expected = oracle(case, model, order, logged_pulls(tmp_path / "one"))
    assert len(expected[0]) == 1200
    assert_equal(written(tmp_path / "one"), expected)
    assert_equal(written(tmp_path / "two"), expected)
    assert_equal(played(case, model, order), expected)


@pytest.mark.parametrize(("model", "order"), CASES)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(case: Case, model: str, order: str, tmp_path: Path) -> None:
    """A run fed little by little, killed with -9 (the linear one three times) and resumed, equals the plain loop."""
    inputs, out = tmp_path / "in", tmp_path / "out"
    inputs.mkdir()
    fed = Case(inputs, case.arrivals)
    workers = "2" if order == "event_time" else "1"
    options = [*fed.inputs, "--workers", workers, "--checkpoint", "0.05", "--batch-size", "16"]
    reference = f"{JOBS}:{model}_{order}"
    kills = 3 if model == "linear" else 1
    for quarter in range(kills):
        feed(fed, quarter)
        process = running.start(reference, out, *options, "--follow", PYTHONHASHSEED=str(quarter))
        try:
            wait_for_answers(out, more_than=150 * (quarter + 1))
        finally:
            kill_all(process.pid)
            process.communicate()
    for quarter in range(kills, 4):
        feed(fed, quarter)
    running.run(reference, out, *options)
    assert_equal(written(out), oracle(case, model, order, logged_pulls(out)))


def feed(case: Case, quarter: int) -> None:
    """Append the next quarter of what arrives to both files, as producers would."""
    begin, end = (len(case.arrivals) * part // 4 for part in (quarter, quarter + 1))
    part = Case(case.directory, case.arrivals[begin:end])
    write(case.directory / "events.jsonl", part.events, mode="a")
    write(case.directory / "labels.jsonl", part.labels, mode="a")


def wait_for_answers(directory: Path, more_than: int) -> None:
    """Until the run has written so many predictions."""
    deadline = time.monotonic() + 60
    file = directory / "predictions.jsonl"
    while time.monotonic() < deadline:
        if file.exists() and file.read_bytes().count(b"\n") > more_than:
            return
        time.sleep(0.02)
    raise AssertionError(f"no {more_than} answers: {(directory / 'state' / 'worker-0.log').read_text()}")


def kill_all(launcher: int) -> None:
    """kill -9 of the launcher and all of its workers."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    for pid in [launcher, *map(int, children)]:
        os.kill(pid, signal.SIGKILL)
