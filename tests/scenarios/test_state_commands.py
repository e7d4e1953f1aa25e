"""Looking into the state of a job while it runs: `millrace state`, `checkpoints`, `savepoint`, and `Job.at`."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dataflows import JobError
from dataflows.checkpoints import Checkpoints
from dataflows.runtime import load_job
from dataflows.settings import RunDirectory
from dataflows.state import StateError
from tests.scenarios import running
from tests.scenarios.test_branches import Place

EVENTS = 899
"""Of 900: the last one waits in the buffer until a later one shows that nothing comes before it."""
CARDS = 11


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A job that has read its events, waits for more, and has made a checkpoint of all of it."""
    made = Place(tmp_path_factory.mktemp("live"))
    process = running.start(
        str(made.file), made.out, "--groups", "4", "--batch-size", "20", "--follow", "--checkpoint", "0.2"
    )
    kept = Checkpoints(RunDirectory(made.out))
    try:
        deadline = time.monotonic() + 60
        while max((manifest.questions for manifest in kept.all()), default=0) < EVENTS:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield made
    finally:
        process.terminate()
        process.communicate(timeout=30)


def command(place: Place, name: str, *words: str, fails: bool = False) -> str:
    """A command of millrace on the job that runs."""
    done = subprocess.run(
        [sys.executable, "-m", "dataflows", name, str(place.file), *words, "--directory", str(place.out)],
        env=running.environment(), cwd=running.ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == int(fails), done.stdout + done.stderr
    return done.stdout + done.stderr


def events() -> list[dict[str, Any]]:
    """What the job has read: `tests.scenarios.test_branches.Place` makes it."""
    return [
        {"id": i, "t": i * 10, "card": f"c{i % CARDS}", "shop": f"s{i % 5}", "amount": i * 37 % 101}
        for i in range(EVENTS)
    ]


def test_the_features_of_an_entity_are_those_a_person_would_compute(place: Place) -> None:
    """Count and mean of a card over the last hour, as of the newest event, while the job runs."""
    clock = (EVENTS - 1) * 10
    mine = [row["amount"] for row in events() if row["card"] == "c7" and clock - 3600 < row["t"] <= clock]
    found = json.loads(command(place, "state", "--entity", "card=c7", "--json"))
    assert found["features"]["count_1h_by_card"] == len(mine)
    assert found["features"]["amount_mean_1h_by_card"] == sum(mine) / len(mine)
    assert set(found["features"]) == {"count_1h_by_card", "amount_mean_1h_by_card", "fraud_mean_1d_by_of_card"}


def test_the_open_questions_of_an_entity_are_those_without_a_label_yet(place: Place) -> None:
    """Labels come after ten minutes: the questions of the last ten minutes wait, each with what was said."""
    clock = (EVENTS - 1) * 10
    waiting = [row["id"] for row in events() if row["card"] == "c7" and row["t"] + 600 > clock]
    found = json.loads(command(place, "state", "--entity", "card=c7", "--json"))
    assert [question["id"] for question in found["questions"]] == waiting
    said = {record["id"]: record for record in running.records(place.out, "predictions")}
    for question in found["questions"]:
        assert question["output"]["True"] == said[question["id"]]["output"]
        assert question["features"] == said[question["id"]]["features"]
    assert found["models"] == {"LogisticRegression": len(running.records(place.out, "outcomes"))}


def test_python_gives_the_same(place: Place) -> None:
    """`job.at("latest")` answers as the command does; what is not there is an error that says what is."""
    past = load_job(str(place.file)).at("latest", place.out)
    try:
        found = json.loads(command(place, "state", "--entity", "card=c3", "--json"))
        assert past.features(card="c3") == found["features"]
        assert len(past.open_questions(card="c3")) == len(found["questions"])
        assert len(past.open_questions()) == past.manifest.open
        assert past.metrics().keys() == {"ROCAUC"}
        with pytest.raises(JobError, match=r"keyed by amount.*card; shop"):
            past.features(amount=1.0)
        assert past.features(card="never seen")["count_1h_by_card"] == 0
    finally:
        past.close()
    with pytest.raises(StateError, match=r"no checkpoint or savepoint '7-7'.*There are"):
        load_job(str(place.file)).at("7-7", place.out)


def test_the_whole_state_is_summed_up(place: Place) -> None:
    """Without an entity: how many there are, how far the model is, the metrics."""
    found = json.loads(command(place, "state", "--json"))
    assert found["entities"] == {"features_card": CARDS, "features_of_card": CARDS, "features_of_shop": 5}
    assert found["events"] == EVENTS
    assert "learned from" in command(place, "state")


def test_a_savepoint_of_a_running_job_has_all_that_was_published(place: Place) -> None:
    """It can be listed, looked into, verified and deleted; a name is given once."""
    assert "savepoint now: checkpoint 1-" in command(place, "savepoint", "now")
    rows = json.loads(command(place, "checkpoints", "--json", "--verify"))
    listed = {name: row for row in rows for name in row["savepoints"]}
    assert listed["now"]["events"] == EVENTS
    assert listed["now"]["fault"] is None
    assert json.loads(command(place, "state", "--at", "now", "--json"))["events"] == EVENTS
    assert "already" in command(place, "savepoint", "now", fails=True)
    assert "begins with a letter" in command(place, "savepoint", "1-2", fails=True)
    assert "now" not in command(place, "checkpoints", "--delete", "now")


@pytest.mark.parametrize("words", [["--entity", "card"], ["--entity", "nothing=1"], ["--at", "no-such"]])
def test_what_cannot_be_asked_is_told(place: Place, words: list[str]) -> None:
    """One message with a hint, no traceback."""
    said = command(place, "state", *words, fails=True)
    assert "millrace:" in said
    assert "Traceback" not in said


def test_without_a_run_there_is_nothing_to_see(tmp_path: Path) -> None:
    """A directory without state is named."""
    empty = Place(tmp_path)
    for name in ("state", "checkpoints"):
        assert "holds no state" in command(empty, name, fails=True)
