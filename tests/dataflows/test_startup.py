"""Before a run: changed jobs, refusals, older checkpoints, kills, damage; by the real command and by `Startup`."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest
from river import metrics

from dataflows import startup
from dataflows.checkpoints import Checkpoints, openable
from dataflows.job import Job, JobError
from dataflows.recovery import remove_stale_snapshots, resume_epoch
from dataflows.runtime import load_job
from dataflows.settings import RunDirectory, Settings, Start, read_branches
from dataflows.startup import Request, RunError, Startup, read_job
from dataflows.state import StateError, StateFile, Version
from tests.scenarios import running

JOB = """
from river import linear_model, metrics, preprocessing
from dataflows import Event, Job, Jsonl, Label, Time
from features import Count, Entity, Fields, Max, Mean


class Ping(Event, id="id", time="t", unit="s"):
    id: int
    t: int
    key: str
    x: float
    y: bool


job = Job(
    name="changing",
    events=Jsonl("EVENTS", Ping),
    features=[Fields("x"), Entity("key", [Count(), Mean("x")], over="1h")],
    model=preprocessing.StandardScaler() | linear_model.LogisticRegression(),
    label=Label(field="y", delay="30s"),
    metrics=[metrics.ROCAUC(), metrics.Accuracy()],
    time=Time(order="arrival"),
)
"""

HOW = ("--batch-size", "50", "--groups", "2")
FIRST = 300
"""Events that the run before the change has read."""


def event(number: int) -> dict[str, Any]:
    """One of the events."""
    x = (number * 37) % 101 / 10
    return {"id": number, "t": number, "key": f"k{number % 7}", "x": x, "y": x > 6}


class Place:
    """A directory with a job file, its events and its run."""

    def __init__(self, path: Path, events: int) -> None:
        path.mkdir(exist_ok=True)
        self.path = path
        self.out = path / "out"
        self.run_directory = RunDirectory(self.out)
        self.file = path / "changing_job.py"
        self.events = 0
        self.feed(events)
        self.declare()

    def feed(self, until: int) -> None:
        """Have more events."""
        with (self.path / "events.jsonl").open("a") as file:
            file.writelines(json.dumps(event(number)) + "\n" for number in range(self.events, until))
        self.events = until

    def declare(self, *changes: tuple[str, str]) -> None:
        """Write the job file, with something in it replaced."""
        text = JOB
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        self.file.write_text(text.replace("EVENTS", str(self.path / "events.jsonl")))

    def run(self, *options: str, refused: bool = False) -> str:
        """`millrace run` to its end; what it said, on one line."""
        process = running.start(str(self.file), self.out, *HOW, *options)
        printed, _ = process.communicate(timeout=60)
        assert process.returncode == (1 if refused else 0), printed
        assert "Traceback" not in printed
        return " ".join(printed.split())

    def run_and_feed(self, *until: int, end: int = signal.SIGTERM, checkpoint: float = 0.05) -> str:
        """`millrace run` that is fed piece by piece, each with a checkpoint, and then gets a signal; what it said."""
        kept = Checkpoints(self.run_directory)
        process = running.start(str(self.file), self.out, *HOW, "--follow", "--checkpoint", str(checkpoint))
        deadline = time.monotonic() + 60
        try:
            for number in until:
                self.feed(number)
                while len(self.written("predictions")) < number or (
                    checkpoint < 1 and max((manifest.questions for manifest in kept.all()), default=0) < number
                ):
                    assert process.poll() is None, process.communicate()
                    assert time.monotonic() < deadline, f"not {number} answers"
                    time.sleep(0.02)
            process.send_signal(end)
            printed, _ = process.communicate(timeout=30)
        finally:
            process.kill()
            process.communicate()
        return " ".join(printed.split())

    def written(self, kind: str) -> list[bytes]:
        """The whole lines of a kind."""
        path = self.out / f"{kind}.jsonl"
        return path.read_bytes().splitlines(keepends=True) if path.exists() else []

    def records(self, kind: str) -> list[dict[str, Any]]:
        """The records of a kind."""
        return running.records(self.out, kind)

    # -- in this process

    def job(self) -> Job:
        """The job, loaded anew."""
        for name in [name for name in sys.modules if name.startswith("changing_job")]:
            del sys.modules[name]
        return load_job(str(self.file))

    def prepare(self, **request: Any) -> Start:
        """What a start would do before the workers, done; what it said is kept."""
        settings = Settings(directory=self.out, batch_size=50, groups=2)
        self.said: list[str] = []
        return Startup(self.job(), settings, Request(**request), self.said.append).prepare()


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A run with some checkpoints that was stopped after the first events."""
    place = Place(tmp_path_factory.mktemp("stopped"), 0)
    place.run_and_feed(100, 200, FIRST)
    return place


@pytest.fixture(scope="module")
def killed(stopped: Place, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A run that was killed later on, when nothing more had been committed."""
    place = copied(stopped, tmp_path_factory.mktemp("killed"))
    place.run_and_feed(2 * FIRST, end=signal.SIGKILL, checkpoint=3600)
    return place


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A run to which nothing happened."""
    place = Place(tmp_path_factory.mktemp("undisturbed"), 2 * FIRST)
    place.run()
    return place


@pytest.fixture
def imports(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Undo what loading jobs does to the import path."""
    monkeypatch.setattr(sys, "path", sys.path[:])
    yield
    for name in [name for name in sys.modules if name.startswith("changing_job")]:
        del sys.modules[name]


def copied(place: Place, path: Path) -> Place:
    """A place with the same events and the same run, to go on from."""
    copy = Place(path / "copy", place.events)
    shutil.copytree(place.out, copy.out)
    return copy


ADDED = ("[Count(), Mean(", '[Max("x"), Count(), Mean(')
LONGER = ('over="1h"', 'over="2h"')
"""Changes of the job file."""


# -- a changed job goes on


def test_added_features_start_empty_and_the_others_go_on(stopped: Place, undisturbed: Place, tmp_path: Path) -> None:
    """What is new begins with an empty window, what stays is as if nothing had happened, what comes back is new again.

    First the mean goes and a maximum is added, then the mean comes back.
    """
    second, place = FIRST + 150, copied(stopped, tmp_path)
    place.declare(('Mean("x")', 'Max("x")'))
    said = place.run_and_feed(second)
    assert "features_key: x_max_1h_by_key is new and starts empty features_key: x_mean_1h_by_key is gone" in said
    assert "branch 2 begins at checkpoint 1-" in said
    place.declare(ADDED)
    place.feed(2 * FIRST)
    said = place.run()
    assert "features_key: x_mean_1h_by_key is new and starts empty branch 3 begins at checkpoint 2-" in said

    found, usual = place.records("predictions"), undisturbed.records("predictions")
    assert [each["id"] for each in found] == list(range(2 * FIRST))
    assert [each["version"] for each in found] == [each["version"] for each in usual], "the model goes on learning"
    assert place.written("predictions")[:FIRST] == stopped.written("predictions")
    for number, each in enumerate(found):
        features = each["features"]
        begun = {"count": 0}
        begun |= {"x_max": FIRST} if number >= FIRST else {}
        begun |= {"x_mean": 0} if number < FIRST else {"x_mean": second} if number >= second else {}
        assert features.keys() == {"x", *(f"{name}_1h_by_key" for name in begun)}
        for name, begin in begun.items():
            since = [event(i)["x"] for i in range(begin, number + 1) if i % 7 == number % 7]
            expected = {"count": len(since), "x_max": max(since), "x_mean": sum(since) / len(since)}[name]
            assert features[f"{name}_1h_by_key"] == pytest.approx(expected, rel=1e-12), (name, number)
    for kind in ("predictions", "outcomes"):
        old, new = place.out / "branches/1" / f"{kind}.jsonl", place.out / "branches/2" / f"{kind}.jsonl"
        assert old.read_bytes() == b"".join(stopped.written(kind))
        assert b"".join(place.written(kind)).startswith(new.read_bytes())
        assert new.read_bytes().startswith(old.read_bytes())
    assert [each["id"] for each in place.records("outcomes")] == list(range(2 * FIRST))


def test_a_reset_begins_a_step_anew_and_leaves_the_rest(stopped: Place, undisturbed: Place, tmp_path: Path) -> None:
    """--reset takes what is refused: models begin at version 0 and learn from open questions; metrics come and go."""
    place = copied(stopped, tmp_path)
    place.feed(2 * FIRST)
    place.declare(("LogisticRegression()", "LogisticRegression(l2=0.5)"), ("metrics.Accuracy()", "metrics.Precision()"))
    said = place.run("--reset", "learner")
    assert "learner: the models begin anew, open questions stay (model was " in said
    assert "publish: metric Precision is new and starts empty publish: metric Accuracy is gone and dropped" in said
    found, usual = place.records("predictions"), undisturbed.records("predictions")
    assert [each["features"] for each in found] == [each["features"] for each in usual]
    assert found[FIRST - 1]["version"] == usual[FIRST - 1]["version"] > 200
    learned = len(stopped.records("outcomes"))
    assert learned < FIRST, "questions are open when the job changes"
    outcomes = place.records("outcomes")
    assert [each["id"] for each in outcomes] == list(range(2 * FIRST))
    assert [each["version_after"] for each in outcomes[learned:]] == list(range(1, 2 * FIRST - learned + 1))
    assert found[-1]["version"] == usual[-1]["version"] - learned
    values = place.records("metrics")[-1]["values"]
    assert values.keys() == {"ROCAUC", "Precision"}
    since = [each["label"] for each in outcomes[learned:] if each["output"] > 0.5]
    ever = [each["label"] for each in outcomes if each["output"] > 0.5]
    assert sum(since) / len(since) != sum(ever) / len(ever)
    assert values["Precision"] == pytest.approx(sum(since) / len(since))
    roc = metrics.ROCAUC()
    for each in outcomes:
        roc.update(each["label"], each["output"])
    assert values["ROCAUC"] == roc.get()


def test_models_begin_for_other_keys_while_questions_are_open(
    stopped: Place, undisturbed: Place, tmp_path: Path
) -> None:
    """--reset learner with another `per`: what was asked before is scored as the old model's, and nobody learns it."""
    place = copied(stopped, tmp_path)
    place.feed(2 * FIRST)
    place.declare(("    label=", '    per=("key", "id"),\n    label='))
    said = place.run("--reset", "learner")
    assert "open questions stay to be scored, and no model learns from them (per was [] and is ['key', 'id'])" in said
    learned = len(stopped.records("outcomes"))
    outcomes, usual = place.records("outcomes"), undisturbed.records("outcomes")
    assert [each["id"] for each in outcomes] == list(range(2 * FIRST))
    assert learned < FIRST, "questions are open when the job changes"
    for each, as_ever in zip(outcomes[learned:FIRST], usual[learned:FIRST], strict=True):
        assert each == as_ever | {"version_after": each["version"]}
    for each in outcomes[FIRST:]:
        assert each["model"] == f"LogisticRegression/key=k{each['id'] % 7},id={each['id']}"
        assert (each["version"], each["version_after"]) == (0, 1)
    assert not place.written("rejects")


# -- refusals


def test_a_refused_change_is_told_and_loses_nothing(stopped: Place, undisturbed: Place, tmp_path: Path) -> None:
    """A window of another length ends the run with step, old, new and --reset; undone, the job goes on as ever."""
    place = copied(stopped, tmp_path)
    place.feed(2 * FIRST)
    place.declare(LONGER)
    said = place.run(refused=True)
    assert "features_key: window 1h is 2h now" in said
    assert f"the state in {place.out / 'state'} was made with another declaration" in said
    assert "Hint: undo the change, or begin anew with --reset features_key" in said
    assert place.written("predictions") == stopped.written("predictions")
    place.declare()
    place.run()
    for kind in ("predictions", "outcomes", "metrics", "rejects"):
        assert place.written(kind) == undisturbed.written(kind)
    assert not (place.out / "branches").exists()


CARD = 'Entity("key", [Count(), Mean("x")], over="1h")'
REFUSED: dict[str, tuple[tuple[str, str], str, str]] = {
    "window": (LONGER, "features_key: window 1h is 2h now", "--reset features_key"),
    "key": (
        (CARD, 'Entity("id", [Count(), Mean("x")], over="1h", name="key")'),
        "features_key: key was ['key'] and is ['id']",
        "--reset features_key",
    ),
    "renamed": (
        (CARD, 'Entity("key", [Count(), Mean("x")], over="1h", name="device")'),
        "features_device: step features_key is gone and this one is new",
        "--reset features_device",
    ),
    "model": (("Regression()", "Regression(l2=0.1)"), "l2=0.0, l1=0.0", "--reset learner"),
    "per": (("    label=", '    per="key",\n    label='), "learner: per was [] and is ['key']", "--reset learner"),
    "label": (('delay="30s"', 'after="30s", by="key"'), "admit: kind was 'field' and is 'later'", "--fresh"),
    "lateness": (('"arrival"', '"arrival", lateness="1m"'), "read: lateness was 0 and is 60000000", "--fresh"),
    "order": (('"arrival"', '"event_time"'), "read: order was 'arrival' and is 'event_time'", "--fresh"),
    "name": (('"changing"', '"changed"'), "job: name was 'changing' and is 'changed'", "another --directory"),
}


@pytest.mark.parametrize("change", REFUSED)
def test_every_refusal_names_step_old_new_and_the_way_out(
    stopped: Place, tmp_path: Path, imports: None, change: str
) -> None:
    """What a change would do wrong is said with what to do; nothing on the disk is touched before it is settled."""
    changed, text, way_out = REFUSED[change]
    place = copied(stopped, tmp_path)
    before = {path: path.read_bytes() for path in sorted(place.out.rglob("*")) if path.is_file()}
    place.declare(changed)
    for request in ({}, {"origin": "latest"}):
        with pytest.raises(RunError) as caught:
            place.prepare(**request)
        assert text in str(caught.value)
        assert way_out in str(caught.value).split("Hint: ")[1]
    assert {path: path.read_bytes() for path in sorted(place.out.rglob("*")) if path.is_file()} == before
    place.declare()
    newest = Checkpoints(place.run_directory).newest()
    assert newest is not None
    assert place.prepare().version == newest.version


def test_a_reset_of_what_is_not_there_is_refused(stopped: Place, tmp_path: Path, imports: None) -> None:
    """A misspelt step is answered with those that there are."""
    place = copied(stopped, tmp_path)
    with pytest.raises(JobError, match=r"--reset features_card: .*no such step\. Hint: features_key, learner, publish"):
        place.prepare(reset=("features_card",))


def test_a_reset_without_a_change_resets_nothing(stopped: Place, tmp_path: Path, imports: None) -> None:
    """A command line that is used again, as a supervisor does, throws no state away a second time, and says so."""
    place = copied(stopped, tmp_path)
    start = place.prepare()
    steps = ("features_key", "learner", "publish")
    assert place.prepare(reset=steps) == start
    assert place.said == [
        f"--reset {step}: nothing of it changed, so it goes on with the state it has" for step in steps
    ]
    assert start.branch == 1
    place.declare(ADDED)
    layout = place.prepare(reset=("learner",)).layout
    assert layout.models == 1
    assert [part.rows for part in layout.features["features_key"]] == ["features_key", "features_key.2"]


# -- older checkpoints


def test_a_run_goes_on_from_any_checkpoint_or_savepoint(
    stopped: Place, undisturbed: Place, tmp_path: Path, imports: None
) -> None:
    """--from opens a branch at an older state: the same job gives the same records again, the old ones are kept."""
    place = copied(stopped, tmp_path)
    kept = Checkpoints(place.run_directory)
    older = next(manifest for manifest in kept.all() if 0 < manifest.questions < FIRST)
    kept.name("half-way", older)
    place.feed(2 * FIRST)
    said = place.run("--from", "half-way")
    assert f"branch 2 begins at checkpoint {older.version}" in said
    for kind in ("predictions", "outcomes", "metrics", "rejects"):
        assert place.written(kind) == undisturbed.written(kind)
    assert (place.out / "branches/1/predictions.jsonl").read_bytes() == b"".join(stopped.written("predictions"))
    assert kept.newest().version.branch == 2  # type: ignore[union-attr]
    start = place.prepare(origin=str(older.version))
    assert (start.branch, start.batch, start.forks) == (3, older.batch, ((1, older.batch),))
    assert start.sinks == older.sinks
    with pytest.raises(StateError, match="no checkpoint or savepoint '1-999'"):
        place.prepare(origin="1-999")


def test_a_change_can_begin_at_an_older_checkpoint(stopped: Place, tmp_path: Path, imports: None) -> None:
    """--from and a changed job together: what is new starts empty there."""
    place = copied(stopped, tmp_path)
    older = Checkpoints(place.run_directory).all()[0]
    place.declare(ADDED)
    start = place.prepare(origin=str(older.version))
    assert start.batch == older.batch
    assert [part.rows for part in start.layout.features["features_key"]] == ["features_key", "features_key.2"]
    assert "features_key: x_max_1h_by_key is new and starts empty" in place.said
    assert place.prepare() == start, "the new branch is the one that goes on"


def test_a_branch_goes_on_with_the_layout_of_the_branch_it_leaves(
    stopped: Place, tmp_path: Path, imports: None
) -> None:
    """A feature that was gone on the branch of the checkpoint is new after it, whatever older branches know of it."""
    place = copied(stopped, tmp_path)
    older = Checkpoints(place.run_directory).all()[0]
    place.declare(("[Count(), Mean(", "[Max("))
    assert [part.names for part in place.prepare(origin=str(older.version)).layout.features["features_key"]] == [
        ("x_max_1h_by_key",)
    ]
    # As if the second branch had had a checkpoint at once.
    forks = ((1, older.batch),)
    second = msgspec.structs.replace(older, branch=2, forks=forks, job=read_job(place.run_directory))
    Checkpoints(place.run_directory).add(second)
    place.declare(ADDED)
    third = place.prepare(origin=str(second.version))
    parts = {part.rows: part.names for part in third.layout.features["features_key"]}
    added = ("count_1h_by_key", "x_mean_1h_by_key")
    assert parts == {"features_key.2": ("x_max_1h_by_key",), "features_key.3": added}
    assert third.layout.dropped == ("features_key",)
    assert (third.branch, third.forks) == (3, (*forks, (2, older.batch)))


def test_from_needs_a_state(tmp_path: Path, imports: None) -> None:
    """Without a state there is nothing to go on from, and none is made."""
    place = Place(tmp_path / "new", 10)
    with pytest.raises(RunError, match=r"--from 1-5: there is no state in .* yet"):
        place.prepare(origin="1-5")
    assert not place.run_directory.job.exists()


# -- kills


def test_what_was_not_committed_is_rolled_back(killed: Place, tmp_path: Path, imports: None) -> None:
    """After a kill the run begins at the engine's last checkpoint; state files and the engine hold nothing newer."""
    place = copied(killed, tmp_path)
    newest = Checkpoints(place.run_directory).newest()
    assert newest is not None
    assert len(place.written("predictions")) > newest.questions
    late = StateFile(place.run_directory.groups / "000.sqlite3", "000")
    late.write("learner", Version(1, newest.batch + 3), [("model/null", 0, b"late")])
    late.close()
    with closing(sqlite3.connect(place.run_directory.recovery(1) / "part-0.sqlite3")) as database, database:
        database.execute("CREATE TEMP TABLE stale AS SELECT * FROM snaps WHERE step_id LIKE '%learner%' LIMIT 1")
        database.execute("UPDATE stale SET snap_epoch = ?", (resume_epoch(place.run_directory.recovery(1)) + 1,))
        database.execute("INSERT INTO snaps SELECT * FROM stale")
    start = place.prepare()
    assert remove_stale_snapshots(place.run_directory.recovery(1)) == 0
    assert start.version == newest.version
    assert start.sinks == newest.sinks
    for path in place.run_directory.groups.glob("*.sqlite3"):
        file = StateFile(path, path.stem)
        assert file.query("SELECT count(*) FROM rows WHERE version > ?", (newest.version.number,)) == [(0,)]
        assert file.query("SELECT count(*) FROM commits WHERE version > ?", (newest.version.number,)) == [(0,)]
        file.close()
    assert place.prepare() == start


def test_checkpoints_of_what_was_rolled_back_are_gone(stopped: Place, tmp_path: Path, imports: None) -> None:
    """Where the engine got less far than checkpoints say, as after a power loss, these go, and it is told."""
    place = copied(stopped, tmp_path)
    kept = Checkpoints(place.run_directory)
    older = kept.newest()
    assert older is not None
    shutil.copytree(place.run_directory.recovery(1), tmp_path / "older")
    place.run_and_feed(FIRST + 100)
    newer = [manifest for manifest in kept.all() if manifest.version > older.version]
    kept.name("before", older)
    kept.name("after", newer[-1])
    shutil.rmtree(place.run_directory.recovery(1))
    shutil.copytree(tmp_path / "older", place.run_directory.recovery(1))
    start = place.prepare()
    assert start.version == older.version
    (said,) = place.said
    assert f"no further than checkpoint {older.version}" in said
    assert said.endswith(", ".join([*(str(manifest.version) for manifest in newer), "after"]))
    assert kept.newest() == older
    assert kept.savepoints().keys() == {"before"}
    assert all(openable(manifest, place.run_directory) is None for manifest in kept.all())
    assert place.prepare() == start
    assert place.said == []


def test_a_checkpoint_without_a_manifest_gets_it_at_the_next_start(
    stopped: Place, tmp_path: Path, imports: None
) -> None:
    """A launcher that was killed after the engine had committed, and before it wrote the manifest, loses nothing."""
    place = copied(stopped, tmp_path)
    kept = Checkpoints(place.run_directory)
    newest = kept.newest()
    assert newest is not None
    (path,) = place.run_directory.checkpoints.glob(f"*{newest.batch}.json")
    path.unlink()
    place.prepare()
    again = kept.newest()
    assert again is not None
    # The stop was an epoch of its own, without a batch.
    same = {"written_at": again.written_at, "stall": again.stall, "epoch": again.epoch, "bytes": again.bytes}
    same["environment"] = again.environment  # the copy's job file names other inputs, and its digest differs
    assert again == msgspec.structs.replace(newest, **same)


class Killed(BaseException):
    """Stands for a kill."""


@pytest.mark.parametrize("request_", [{}, {"origin": "latest"}], ids=["changed", "from"])
def test_a_kill_while_a_branch_is_opened_loses_nothing(
    stopped: Place, tmp_path: Path, imports: None, monkeypatch: pytest.MonkeyPatch, request_: dict[str, str]
) -> None:
    """Wherever the opening of a branch is cut short, the next start opens it with the same state and outputs."""
    whole = copied(stopped, tmp_path)
    whole.declare(ADDED)
    expected = whole.prepare(**request_)
    assert (expected.branch, len(expected.layout.features["features_key"])) == (2, 2)
    for calls in range(20):
        (tmp_path / str(calls)).mkdir()
        place = copied(stopped, tmp_path / str(calls))
        place.declare(ADDED)
        left = iter([None] * calls)

        def dies(function: Callable[..., Any], left: Iterator[None] = left) -> Callable[..., Any]:
            def died(*arguments: Any, **named: Any) -> Any:
                if next(left, "none") == "none":
                    raise Killed
                return function(*arguments, **named)

            return died

        with monkeypatch.context() as patched:
            for name in ("create_recovery", "write_whole", "output_sinks"):
                patched.setattr(startup, name, dies(getattr(startup, name)))
            patched.setattr(Checkpoints, "add", dies(Checkpoints.add))
            patched.setattr(shutil, "copy2", dies(shutil.copy2))
            try:
                place.prepare(**request_)
                break
            except Killed:
                pass
        again = (
            place.prepare()
            if place.run_directory.branches.read_text().count('"branch": 2')
            else place.prepare(**request_)
        )
        assert again == expected, f"killed at call {calls}"
        assert (place.out / "branches/1/predictions.jsonl").read_bytes() == b"".join(stopped.written("predictions"))
        assert place.prepare() == expected
    assert 5 < calls < 20


# -- damage


def damage_job(place: Place) -> None:
    """Half of the file that says whose state this is."""
    place.run_directory.job.write_bytes(place.run_directory.job.read_bytes()[:100])


def damage_row(place: Place) -> None:
    """The model of the newest checkpoint."""
    for path in place.run_directory.groups.glob("*.sqlite3"):
        file = StateFile(path, path.stem)
        newest = "SELECT max(version) FROM rows WHERE key = 'model/null'"
        file.query(f"UPDATE rows SET value = x'00' WHERE key = 'model/null' AND version = ({newest})")
        file.close()


def cut_file(place: Place) -> None:
    """Half of a state file."""
    for path in place.run_directory.groups.glob("*.sqlite3"):
        StateFile(path, path.stem).close()
    os.truncate(place.run_directory.groups / "reader.sqlite3", 10_000)


def other_engine(place: Place) -> None:
    """The recovery store of another job."""
    with closing(sqlite3.connect(place.run_directory.recovery(1) / "part-0.sqlite3")) as database, database:
        database.execute(
            "UPDATE snaps SET step_id = 'changing.features_other.stateful_batch' WHERE step_id LIKE '%feat%'"
        )


DAMAGE: dict[str, tuple[Callable[[Place], Any], str]] = {
    "no job": (
        lambda place: place.run_directory.job.unlink(),
        r"job\.json is missing, so it cannot be told whose state",
    ),
    "half a job": (damage_job, r"job\.json is missing or damaged .*whose state this is"),
    "no branches": (lambda place: place.run_directory.branches.unlink(), r"branches\.json is missing or damaged"),
    "no order log": (lambda place: place.run_directory.order_log(1).unlink(), r"order log .*1\.log is missing"),
    "no engine": (
        lambda place: shutil.rmtree(place.run_directory.recovery(1)),
        r"recovery store .*part-0\.sqlite3 is missing.*Hint: `millrace run JOB --from",
    ),
    "another's engine": (other_engine, r"holds state of steps \['features_other'\], which changing does not have"),
    "no state file": (
        lambda place: (place.run_directory.groups / "001.sqlite3").unlink(),
        r"state file .*001\.sqlite3 is missing\. Hint: ",
    ),
    "half a state file": (cut_file, r"state file .*reader\.sqlite3.* is damaged: .*Hint: "),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_missing_or_damaged_is_told_before_anything_is_started(
    killed: Place, tmp_path: Path, imports: None, damage: str
) -> None:
    """One clear message with a hint; and once the damage is undone the run begins where it would have."""
    spoil, message = DAMAGE[damage]
    place = copied(killed, tmp_path)
    spoil(place)
    with pytest.raises((RunError, StateError), match=message) as caught:
        place.prepare()
    assert "Hint: " in str(caught.value)
    assert len(place.written("predictions")) == 2 * FIRST
    shutil.rmtree(place.out)
    shutil.copytree(killed.out, place.out)
    assert place.prepare().branch == 1


def test_the_way_out_of_damage_is_an_older_checkpoint(killed: Place, tmp_path: Path, imports: None) -> None:
    """Damage to the newest state is answered with the newest checkpoint that can be opened, and --from opens it."""
    place = copied(killed, tmp_path)
    kept = Checkpoints(place.run_directory).all()
    older = kept[-2].version
    file = StateFile(place.run_directory.groups / "reader.sqlite3", "reader")
    file.roll_back(older)
    file.close()
    with pytest.raises(
        StateError, match=f"batch {kept[-1].batch}, which the engine has committed, is not there"
    ) as caught:
        place.prepare()
    assert f"Checkpoint {older} can still be opened: --from {older}" in str(caught.value)
    assert place.prepare(origin=str(older)).batch == older.batch


def test_a_damaged_checkpoint_is_not_begun_from(killed: Place, tmp_path: Path, imports: None) -> None:
    """--from looks at every row of the checkpoint first, and says which is damaged."""
    place = copied(killed, tmp_path)
    damage_row(place)
    with pytest.raises(
        StateError, match=r"checkpoint 1-\d+ cannot be opened: .*step learner\) is damaged: row 'model/null'"
    ):
        place.prepare(origin="latest")
    assert [start.branch for start in read_branches(place.run_directory)] == [1]


def test_standard_input_cannot_go_on(stopped: Place, tmp_path: Path, imports: None) -> None:
    """A run from standard input has no second start."""
    place = copied(stopped, tmp_path)
    place.declare(('Jsonl("EVENTS", Ping)', "Stdin(Ping)"), ("Jsonl, Label", "Jsonl, Label, Stdin"))
    with pytest.raises(RunError, match=r"standard input cannot be read again.*--fresh"):
        place.prepare()
