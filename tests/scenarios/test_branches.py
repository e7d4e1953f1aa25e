"""Going back and changing jobs in the middle: what open questions and outputs belong to is never mixed up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dataflows.checkpoints import Checkpoints
from dataflows.runtime import load_job
from dataflows.settings import RunDirectory, Settings
from tests.scenarios import running

JOB = """
from river import linear_model, metrics, preprocessing
from dataflows import Event, Job, Jsonl, Label
from features import Count, Entity, Fields, Mean, Sum


class Payment(Event, id="id", time="t", unit="s"):
    id: int
    t: int
    card: str
    shop: str
    amount: float
    fraud: bool


CARD = Entity("card", [Count(), Mean("amount")], over="1h")
OF_CARD = Entity("card", [Mean("fraud")], over="1d", of="labels", name="of_card")
OF_SHOP = Entity("shop", [Mean("fraud")], over="1d", of="labels", name="of_shop")

job = Job(
    name="branches",
    events=Jsonl("EVENTS", Payment),
    features=[Fields("amount"), CARD, OF_CARD, OF_SHOP],
    model=preprocessing.StandardScaler() | linear_model.LogisticRegression(l2=0.0),
    label=Label(field="fraud", delay="10m"),
    metrics=[metrics.ROCAUC()],
)
"""
HOW = ("--groups", "4", "--batch-size", "20", "--checkpoint", "0", "--keep-last", "1000")


class Place:
    """A job file, its events, and a run."""

    def __init__(self, path: Path) -> None:
        self.file = path / "branches_job.py"
        self.out = path / "out"
        self.events = path / "events.jsonl"
        rows = [
            {
                "id": i,
                "t": i * 10,
                "card": f"c{i % 11}",
                "shop": f"s{i % 5}",
                "amount": i * 37 % 101,
                "fraud": i % 7 == 3,
            }
            for i in range(900)
        ]
        self.events.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.declare()

    def declare(self, *changes: tuple[str, str]) -> None:
        """Write the job file, with something in it replaced."""
        text = JOB.replace("EVENTS", str(self.events))
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        self.file.write_text(text)

    def run(self, *options: str) -> str:
        """`millrace run` to its end."""
        return running.run(str(self.file), self.out, *HOW, *options)

    def refused(self, *options: str) -> str:
        """What a run says that must be refused."""
        process = running.start(str(self.file), self.out, *HOW, *options)
        printed, _ = process.communicate(timeout=60)
        assert process.returncode == 1, printed
        return " ".join(printed.split())

    def middle(self) -> str:
        """A checkpoint with questions open."""
        found = [m for m in Checkpoints(RunDirectory(self.out)).all() if m.open > 20 and m.questions < 700]
        return str(found[len(found) // 2].version)

    def outputs(self) -> dict[str, bytes]:
        """All files of records."""
        return {file.name: file.read_bytes() for file in self.out.glob("*.jsonl")}

    def entities(self) -> dict[str, int]:
        """How many entities each step keeps."""
        past = load_job(str(self.file)).at("latest", self.out)
        try:
            return past.counts()
        finally:
            past.close()

    def model(self) -> Any:
        """The model."""
        past = load_job(str(self.file)).at("latest", self.out)
        try:
            found = past.model()
            assert found is not None
            return found.model
        finally:
            past.close()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """A job that ran to its end."""
    made = Place(tmp_path)
    made.run()
    return made


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("CARD, OF_CARD, OF_SHOP]", "CARD, OF_SHOP, OF_CARD]"),
        ("CARD, OF_CARD, OF_SHOP]", "OF_CARD, OF_SHOP]"),
        ('OF_SHOP = Entity("shop", [Mean("fraud")]', 'OF_SHOP = Entity("shop", [Mean("amount"), Mean("fraud")]'),
    ],
    ids=["order", "one less", "a column more"],
)
def test_open_questions_keep_to_their_entities_when_the_job_changes(place: Place, old: str, new: str) -> None:
    """Answers to questions asked before a change reach the features of the cards and shops they were asked of."""
    place.declare((old, new))
    place.run("--from", place.middle())
    counts = place.entities()
    assert counts["features_of_card"] == 11
    assert {rows: count for rows, count in counts.items() if rows.startswith("features_of_shop")}.popitem()[1] == 5
    assert len(running.records(place.out, "predictions")) == len(running.records(place.out, "outcomes")) == 900


def test_a_branch_left_before_can_be_gone_back_to(place: Place) -> None:
    """With another job's records in the files, going back to the first branch gives its records again."""
    before, origin = place.outputs(), place.middle()
    place.declare(('over="1h"', 'over=["1h", "2h"]'))
    place.run("--from", origin)
    assert place.outputs()["predictions.jsonl"] != before["predictions.jsonl"]
    place.declare()
    place.run("--from", str(Checkpoints(RunDirectory(place.out)).find(origin).version))
    assert place.outputs() == before


def test_a_checkpoint_is_compared_with_the_job_it_was_made_by(place: Place) -> None:
    """An old model is not taken up under a new declaration, and a job that is as it was then is not refused."""
    origin = place.middle()
    before = place.outputs()
    place.declare(("l2=0.0", "l2=0.5"))
    place.run("--reset", "learner", "--from", origin)
    assert place.model()["LogisticRegression"].l2 == 0.5
    assert "--reset learner" in place.refused("--from", origin)
    place.declare()
    place.run("--from", origin)
    assert place.outputs() == before
    assert place.model()["LogisticRegression"].l2 == 0.0


def test_fresh_and_from_exclude_each_other(place: Place) -> None:
    """Nothing is deleted for a run that cannot be."""
    before = place.outputs()
    assert "--fresh" in place.refused("--fresh", "--from", place.middle())
    assert place.outputs() == before


def test_an_output_of_somebody_else_is_not_overwritten(tmp_path: Path) -> None:
    """A file that a job names for its records and that has other content is asked about first."""
    place = Place(tmp_path)
    (tmp_path / "mine.txt").write_text("precious\n")
    place.declare(("metrics=[", f"outputs=Outputs(predictions=Jsonl('{tmp_path}/mine.txt')), metrics=["),
                  ("Label\nfrom", "Label, Outputs\nfrom"))  # fmt: skip
    assert "mine.txt" in place.refused()
    assert (tmp_path / "mine.txt").read_text() == "precious\n"


def test_latest_is_of_the_branch_that_goes_on(place: Place) -> None:
    """After going back, the newest checkpoint is not that of the branch that was left."""
    origin = place.middle()
    place.run("--from", origin)
    newest = Checkpoints(RunDirectory.of(load_job(str(place.file)), Settings(directory=place.out))).newest()
    assert newest is not None
    assert newest.branch == 2
