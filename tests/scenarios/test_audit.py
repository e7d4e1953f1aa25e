"""Audit: predictions of killed, resumed, changed runs made again bit for bit; every change of what was kept is named.

What is audited are real runs, killed with -9; the audit is the command, in a process of its own.
"""

from __future__ import annotations

import json
import pickle
import shutil
import sqlite3
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from dataflows import learnstore, state
from dataflows.checkpoints import Checkpoints
from dataflows.learnlog import ASKED, OUTCOME, PROTOTYPE, entries_of
from dataflows.settings import RunDirectory
from tests.scenarios import running
from tests.scenarios.test_keystone import kill_all

JOB = """
from river import anomaly, facto, forest, linear_model, neighbors, preprocessing, tree
from dataflows import Event, Job, Jsonl, Label, Time
from dataflows.job import Audit
from features import Count, Derived, Entity, Fields, Mean, Sum


class Payment(Event, id="id", time="t", unit="s"):
    id: int
    t: int
    card: str
    shop: str
    amount: float
    kind: str
    fraud: bool


class Touchy(linear_model.LogisticRegression):
    def predict_proba_one(self, x):
        if x["amount"] > 150:
            raise ValueError("too much")
        return super().predict_proba_one(x)

    def learn_one(self, x, y):
        if 100 < x["amount"] <= 150:
            self.intercept += 0.25
            raise ValueError("too much to learn")
        super().learn_one(x, y)


class Shy(anomaly.HalfSpaceTrees):
    def learn_one(self, x):
        if x["amount"] > 0.5:
            raise ValueError("too much to learn")
        super().learn_one(x)


CARD = Entity("card", [Count(), Mean("amount")], over="1h")
SHOP = Entity("shop", [Mean("fraud")], over="1d", of="labels")
LARGE = Derived(lambda event: event.amount > 50.0, "large")

job = Job(
    name="audited",
    events=Jsonl("EVENTS", Payment),
    features=[Fields("amount"), CARD, SHOP],
    model=preprocessing.StandardScaler() | linear_model.LogisticRegression(),
    label=Label(field="fraud", delay="10m"),
    audit=Audit(every=200),
)
"""
MODEL = "preprocessing.StandardScaler() | linear_model.LogisticRegression()"
HOW = ("--groups", "4", "--batch-size", "50", "--checkpoint", "0", "--keep-last", "1000")
MANY = 3000
SCALED = "preprocessing.MinMaxScaler() | "


def payments(count: int) -> list[dict[str, Any]]:
    """Payments, some of them fraud; the same in every call."""
    rows = []
    for i in range(count):
        amount = (i * 7919 % 1999) / 20 + (120 if i % 37 == 5 else 0) - (20 if i % 61 == 9 else 0)
        rows.append(
            {
                "id": i,
                "t": i * 7,
                "card": f"c{i * 31 % 41}",
                "shop": f"s{i * 17 % 7}",
                "amount": max(amount, 0.5),
                "kind": ("food", "fuel", "travel")[i * 13 % 7 % 3],
                "fraud": i * 7919 % 1999 > 1500 or i % 11 == 3,
            }
        )
    return rows


def answers(out: Path) -> int:
    """How many predictions a run has written."""
    file = out / "predictions.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


class Place:
    """A job file, its events, and a run."""

    def __init__(self, path: Path, *changes: tuple[str, str], events: list[dict[str, Any]] | None = None) -> None:
        path.mkdir(exist_ok=True)
        self.file = path / "audited_job.py"
        self.out = path / "out"
        self.events = path / "events.jsonl"
        self.rows = payments(MANY) if events is None else events
        self.declare(*changes)

    def declare(self, *changes: tuple[str, str]) -> None:
        """Write the job file, with something in it replaced."""
        text = JOB
        for old, new in (*changes, ("EVENTS", str(self.events))):
            assert old in text, old
            text = text.replace(old, new)
        self.file.write_text(text)

    def feed(self, begin: int, end: int) -> None:
        """Append events to the input."""
        with self.events.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in self.rows[begin:end])

    def run(self, *options: str) -> str:
        """`millrace run` to the end of the input."""
        return running.run(str(self.file), self.out, *HOW, *options)

    def kill(self, after: int, *options: str) -> None:
        """`millrace run` until there are more predictions than that; then kill -9 of all its processes."""
        process = running.start(str(self.file), self.out, *HOW, "--follow", *options)
        deadline = time.monotonic() + 120
        while answers(self.out) <= after and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.01)
        if process.poll() is None:
            kill_all(process.pid)
        printed, _ = process.communicate()
        assert process.returncode < 0, printed
        assert answers(self.out) > after

    def copy(self, name: str) -> Path:
        """The run's directory once more."""
        target = self.out.parent / name
        shutil.copytree(self.out, target)
        return target

    def middle(self) -> str:
        """A checkpoint with questions open, neither the first nor the last."""
        found = [m for m in Checkpoints(RunDirectory(self.out)).all() if m.open]
        return str(found[len(found) // 2].version)

    def audit(self, *options: str, out: Path | None = None) -> tuple[int, dict[str, Any], str]:
        """`millrace audit --json` in a process of its own: its exit code, what it found, what it said else."""
        command = [sys.executable, "-m", "dataflows", "audit", str(self.file), "--directory", str(out or self.out)]
        done = subprocess.run(
            [*command, "--json", *options], env=running.environment(), cwd=running.ROOT, capture_output=True, text=True,
            timeout=120, check=False,
        )  # fmt: skip
        found: dict[str, Any] = json.loads(done.stdout) if done.stdout.startswith("{") else {}
        return done.returncode, found, " ".join(done.stderr.split())

    def all_equal(self, *options: str) -> dict[str, Any]:
        """What `audit --all` finds; fails the test if anything differs."""
        code, found, said = self.audit("--all", *options)
        assert found.get("wrong") == [], (found, said)
        assert code == 0
        assert found["asked"] == found["equal"] == found["compared"]
        assert found["keyframes"] == found["keyframes_equal"]
        assert found["models"] == found["models_equal"]
        return found


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A job that was killed with -9 three times, twice while it read, and resumed to the end."""
    place = Place(tmp_path_factory.mktemp("killed"))
    for part in range(3):
        place.feed(part * 900, part * 900 + 900)
        place.kill(after=part * 900 + (300, 500, 700)[part])
    place.feed(2700, MANY)
    place.run()
    assert len(running.records(place.out, "predictions")) == MANY
    return place


def bits(value: Any) -> Any:
    """A figure as its bits."""
    return struct.pack("<d", value) if isinstance(value, float) else value


def learn_logs(out: Path) -> list[Path]:
    """The learn logs of a run."""
    return sorted((out / "state" / "learned").glob("*.sqlite3"))


# -- what it must show


def test_a_killed_job_is_made_again_without_its_scores_and_models(killed: Place) -> None:
    """Given neither scores nor models nor outputs, a sample and all are what the killed run had published."""
    blind = killed.copy("blind")
    for path in learn_logs(blind):
        with closing(sqlite3.connect(path)) as database, database:
            database.execute("UPDATE chunks SET outputs = NULL")
    shutil.rmtree(blind / "state" / "groups")
    for file in blind.glob("*.jsonl"):
        file.unlink()
    published = {r["id"]: bits(r["output"]) for r in running.records(killed.out, "predictions")}
    code, found, said = killed.audit("--sample", "1000", out=blind)
    assert code == 0, said
    assert found["asked"] == found["unknown"] == len({r["id"] for r in found["outputs"]}) == 1000
    assert 1000 < found["relearned"] <= MANY
    assert [bits(r["output"]) for r in found["outputs"]] == [published[r["id"]] for r in found["outputs"]]
    code, found, said = killed.audit("--all", out=blind)
    assert code == 0, said
    assert {r["id"]: bits(r["output"]) for r in found["outputs"]} == published
    assert found["relearned"] == MANY


def test_a_killed_job_is_as_it_was(killed: Place) -> None:
    """All predictions, all keyframes, the checkpoint's model and every published line are equal."""
    found = killed.all_equal()
    assert found["asked"] == found["relearned"] == MANY
    assert found["keyframes"] == MANY // 200
    assert (found["models"], found["published"]) == (1, {"predictions": MANY, "outcomes": MANY})


def test_one_prediction_is_explained(killed: Place) -> None:
    """Its features, what its model had learned last, from which keyframe on, and that it is equal."""
    code, found, _ = killed.audit("2345")
    record = next(r for r in running.records(killed.out, "predictions") if r["id"] == 2345)
    assert code == 0
    assert found["equal"]
    assert (bits(found["output"]), found["features"]) == (bits(record["output"]), record["features"])
    assert found["version"] == record["version"]
    assert (found["keyframe"], found["relearned"]) == (record["version"] // 200 * 200, record["version"] % 200)
    learned = [r["id"] for r in running.records(killed.out, "outcomes") if r["version_after"] == record["version"]]
    assert [found["last"]["id"]] == learned


# -- what is changed, its checksum recomputed too


def edit_chunk(out: Path, holds: int, change: Callable[[list[list[Any]], list[Any]], None], honest: bool = True) -> int:
    """Change entries and outputs of the chunk with the question of an id; its batch.

    `honest`: with new checksums and counts; else as a fault of the disk would leave it.
    """
    [path] = learn_logs(out)
    with closing(sqlite3.connect(path)) as database, database:
        columns = f"{learnstore._HEAD}, ids, entries, outputs"
        for row in database.execute(f"SELECT {columns} FROM chunks ORDER BY version").fetchall():
            names, fields = pickle.loads(row[-2])
            entries = [list(entry) for entry in entries_of(fields)]
            if not any(entry[0] == ASKED and entry[3] == holds for entry in entries):
                continue
            outputs = pickle.loads(row[-1])
            change(entries, outputs)
            pickled = pickle.dumps((names, [value for entry in entries for value in entry]), 5)
            said = pickle.dumps(outputs, 5)
            head = learnstore.Head(*row[: len(learnstore.Head._fields)])
            if honest:
                asked = sum(entry[0] == ASKED for entry in entries)
                head = head._replace(asked=asked, learned=len(entries) - asked)
                crcs = learnstore._checksum(head, row[-3], pickled), learnstore._checksum(head, said)
                changed: tuple[Any, ...] = (head.asked, head.learned, pickled, said, *crcs, head.version)
                what = "asked = ?, learned = ?, entries = ?, outputs = ?, crc = ?, outputs_crc = ?"
            else:
                changed = (pickled, said, head.version)
                what = "entries = ?, outputs = ?"
            database.execute(f"UPDATE chunks SET {what} WHERE version = ?", changed)
            return state.Version.of(head.version).batch
    raise AssertionError(f"no chunk has {holds}")


def question(entries: list[list[Any]], id: int) -> list[Any]:
    """The entry that asks an id."""
    return next(entry for entry in entries if entry[0] == ASKED and entry[3] == id)


def change_score(out: Path, id: int) -> None:
    """Change what was said to a question by the last bit."""

    def change(entries: list[list[Any]], outputs: list[Any]) -> None:
        place = [entry[3] for entry in entries if entry[0] == ASKED].index(id)
        outputs[place][True] = float.fromhex(outputs[place][True].hex()) * (1 + 2**-52)

    edit_chunk(out, id, change)


def change_feature(out: Path, id: int) -> None:
    """Change a feature of a question."""

    def change(entries: list[list[Any]], outputs: list[Any]) -> None:
        asked = question(entries, id)
        asked[5] = (asked[5][0] + 1.0, *asked[5][1:])

    edit_chunk(out, id, change)


def number_of(out: Path, id: int) -> int:
    """The number of a question."""
    found: list[int] = []
    edit_chunk(out, id, lambda entries, outputs: found.append(question(entries, id)[1]))
    return found[0]


def change_label(out: Path, id: int) -> None:
    """Change the label that was learned for a question."""
    number = number_of(out, id)
    [path] = learn_logs(out)
    with closing(sqlite3.connect(path)) as database:
        rows = database.execute("SELECT entries FROM chunks ORDER BY version").fetchall()
    for (pickled,) in rows:
        entries = entries_of(pickle.loads(pickled)[1])
        if any(entry[0] == OUTCOME and entry[1] == number for entry in entries):
            holder = next((entry[3] for entry in entries if entry[0] == ASKED), None)
            assert holder is not None

            def change(entries: list[list[Any]], outputs: list[Any]) -> None:
                outcome = next(e for e in entries if e[0] == OUTCOME and e[1] == number)
                outcome[3] = not outcome[3]

            edit_chunk(out, holder, change)
            return
    raise AssertionError


def change_keyframe(out: Path, examples: int, honest: bool = True) -> None:
    """Change a weight of a keyframe's model."""
    [path] = learn_logs(out)
    with closing(sqlite3.connect(path)) as database, database:
        columns = f"{learnstore._FRAME}, model"
        what = f"SELECT {columns} FROM keyframes WHERE examples = ? AND key != ?"
        [row] = database.execute(what, (examples, PROTOTYPE)).fetchall()
        model = pickle.loads(row[-1])
        model["LogisticRegression"].intercept += 1e-9
        pickled = pickle.dumps(model, 5)
        frame = learnstore.Frame(*row[:-1])
        crc = learnstore._checksum(frame, pickled) if honest else 1
        database.execute(
            "UPDATE keyframes SET model = ?, crc = ? WHERE version = ? AND place = ?",
            (pickled, crc, frame.version, frame.place),
        )


def change_state(out: Path) -> None:
    """Change a weight of the model in the state store, everywhere."""
    for path in (out / "state" / "groups").glob("0*.sqlite3"):
        with closing(sqlite3.connect(path)) as database, database:
            rows = database.execute("SELECT id, step, key, version, kind, value FROM rows WHERE key = 'model/null'")
            for row, step, key, version, kind, value in rows.fetchall():
                model, name, learned = pickle.loads(value)
                model["LogisticRegression"].intercept += 1e-9
                changed = pickle.dumps((model, name, learned), 5)
                crc = state._checksum(step, key, version, kind, changed)
                database.execute("UPDATE rows SET value = ?, crc = ? WHERE id = ?", (changed, crc, row))


def change_line(out: Path, kind: str, id: int, change: Callable[[bytes], bytes]) -> int:
    """Change one line of the outputs; its number."""
    file = out / f"{kind}.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    place = next(i for i, line in enumerate(lines) if json.loads(line)["id"] == id)
    lines[place] = change(lines[place])
    file.write_bytes(b"".join(lines))
    return place + 1


@pytest.fixture
def forged(killed: Place, tmp_path: Path) -> Iterator[Path]:
    """A copy of the run, to be changed."""
    target = tmp_path / "forged"
    shutil.copytree(killed.out, target)
    yield target
    shutil.rmtree(target)


WAYS = [("--all",), pytest.param(("--sample", "2500"), marks=pytest.mark.thorough)]


def suspects(text: str) -> list[int]:
    """The ids that a finding names as possibly changed."""
    _, _, named = text.partition("the model learned ")
    return [int(each) for each in named.partition(":")[0].partition(" and ")[0].split(", ")]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way[0][2:])
def test_a_changed_score_is_named(killed: Place, forged: Path, way: tuple[str, ...]) -> None:
    """One bit of one score: its id, and that it is the score."""
    change_score(forged, 1234)
    code, found, said = killed.audit(*way, out=forged)
    assert code == 1, said
    assert [wrong["id"] for wrong in found["wrong"]] == [1234]
    assert "its own score was changed" in found["wrong"][0]["what"]
    assert found["compared"] - found["compared_equal"] == 1


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way[0][2:])
def test_a_changed_feature_is_named(killed: Place, forged: Path, way: tuple[str, ...]) -> None:
    """One feature of one prediction: its id, and that it is what it was asked with."""
    change_feature(forged, 1234)
    code, found, said = killed.audit(*way, out=forged)
    assert code == 1, said
    assert found["wrong"][0]["id"] == 1234
    assert "its own features" in found["wrong"][0]["what"]
    for later in found["wrong"][1:]:  # the example that it became
        assert 1234 in suspects(later["what"])


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way[0][2:])
def test_a_changed_label_is_named(killed: Place, forged: Path, way: tuple[str, ...]) -> None:
    """One outcome: it is among the examples named, and its published line differs."""
    change_label(forged, 1234)
    code, found, said = killed.audit(*way, out=forged)
    assert code == 1, said
    first = found["wrong"][0]
    assert 1234 in suspects(first["what"])
    assert len(suspects(first["what"])) <= 5
    lines = [wrong for wrong in found["wrong"] if "outcomes.jsonl" in wrong["what"]]
    assert [wrong["id"] for wrong in lines] == [1234]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way[0][2:])
def test_a_changed_keyframe_is_named(killed: Place, forged: Path, way: tuple[str, ...]) -> None:
    """One weight of one keyframe: which, in what, and that it is the keyframe itself."""
    change_keyframe(forged, 1400)
    code, found, said = killed.audit(*way, out=forged)
    assert code == 1, said
    text = " ".join(wrong["what"] for wrong in found["wrong"])
    assert "the keyframe of 1,400 examples is not what they give: model.steps['LogisticRegression'].intercept" in text
    if way[0] == "--all":
        assert len(found["wrong"]) == 1
        assert "so the keyframe itself was changed" in text
        assert found["equal"] == MANY


def test_two_changes_far_apart_are_both_named(killed: Place, forged: Path) -> None:
    """One goes on from the next good keyframe: what was changed first does not hide the second."""
    change_label(forged, 500)
    change_score(forged, 2222)
    code, found, _ = killed.audit("--all", out=forged)
    assert code == 1
    assert 500 in suspects(found["wrong"][0]["what"])
    assert any(w["id"] == 2222 and "its own score was changed" in w["what"] for w in found["wrong"])
    assert found["equal"] > MANY - 410


def test_a_changed_model_of_the_state_store_is_named(killed: Place, forged: Path) -> None:
    """One weight of the checkpoint's model: which checkpoint, in what."""
    change_state(forged)
    code, found, _ = killed.audit("--all", out=forged)
    assert code == 1
    [wrong] = found["wrong"]
    assert "the model in checkpoint 1-" in wrong["what"]
    assert ".intercept: " in wrong["what"]
    assert found["equal"] == MANY


@pytest.mark.parametrize("kind", ["predictions", "outcomes"])
def test_a_changed_line_of_the_outputs_is_named(killed: Place, forged: Path, kind: str) -> None:
    """One digit of one record: file and line, and the id."""
    row = change_line(forged, kind, 1234, lambda line: line.replace(b'"version":', b'"version":1', 1))
    code, found, _ = killed.audit("--all", out=forged)
    assert code == 1
    [wrong] = found["wrong"]
    assert wrong["id"] == 1234
    assert f"{kind}.jsonl:{row} is not what was said" in wrong["what"]


def test_a_line_that_is_taken_out_or_put_in_is_named(killed: Place, forged: Path) -> None:
    """A record that is missing among the others, and one that the learn log does not have."""
    change_line(forged, "predictions", 1234, lambda line: b"")
    change_line(forged, "predictions", 1500, lambda line: line + line.replace(b'"id":1500', b'"id":987654'))
    code, found, _ = killed.audit("--all", out=forged)
    assert code == 1
    assert [(w["id"], "does not have" in w["what"]) for w in found["wrong"]] == [(987654, True), (1234, True)]


@pytest.mark.parametrize(
    "which", [pytest.param(0, marks=pytest.mark.thorough), 7, pytest.param(-1, marks=pytest.mark.thorough)],
    ids=["first", "middle", "last"],
)  # fmt: skip
def test_a_chunk_that_is_taken_out_is_named(killed: Place, forged: Path, which: int) -> None:
    """Wherever it was, something says so, and near it."""
    [path] = learn_logs(forged)
    with closing(sqlite3.connect(path)) as database, database:
        versions = [v for (v,) in database.execute("SELECT version FROM chunks ORDER BY version")]
        assert len(versions) > 8
        ranges = database.execute("SELECT first_question, last_question FROM chunks ORDER BY version").fetchall()
        database.execute("DELETE FROM chunks WHERE version = ?", (versions[which],))
    code, found, said = killed.audit("--all", out=forged)
    assert code == 1, (found, said)
    assert found["wrong"]
    if which == 7:
        first, last = ranges[which]
        near = [w for w in found["wrong"] if w["id"] is not None and first - 250 < w["id"] < last + 250]
        assert near, found["wrong"]


@pytest.mark.parametrize("kind", [ASKED, OUTCOME], ids=["question", "outcome"])
def test_an_entry_that_is_taken_out_is_named(killed: Place, forged: Path, kind: int) -> None:
    """An outcome is missed by the next prediction, a question by its outcome."""
    batch = 0

    def change(entries: list[list[Any]], outputs: list[Any]) -> None:
        place = entries.index(question(entries, 1234))
        if kind == ASKED:
            del outputs[[entry[3] for entry in entries if entry[0] == ASKED].index(1234)]
        else:
            place = max(i for i, entry in enumerate(entries[:place]) if entry[0] == OUTCOME)
        del entries[place]

    batch = edit_chunk(forged, 1234, change)
    code, found, _ = killed.audit("--all", out=forged)
    assert code == 1
    assert found["wrong"][0]["batch"] == f"1-{batch}" or kind == ASKED
    text = " ".join(wrong["what"] for wrong in found["wrong"])
    if kind == ASKED:
        assert f"the question was taken out of batch 1-{batch}" in text
        assert any(w["id"] == 1234 and "predictions.jsonl" in w["what"] for w in found["wrong"]) or found["broken"]
    else:
        assert found["wrong"][0]["id"] == 1234
        assert "others were taken out of the learn log" in text


def test_without_new_checksums_the_batch_is_named(killed: Place, forged: Path) -> None:
    """Whoever changes bytes alone is told at once: file and batch."""
    batch = edit_chunk(forged, 1234, lambda entries, outputs: outputs.reverse(), honest=False)
    code, found, said = killed.audit("--all", out=forged)
    assert (code, found) == (1, {})
    assert "000.sqlite3" in said or "sqlite3" in said
    assert f"of batch 1-{batch}, is not as it was written" in said


def test_a_damaged_keyframe_is_named(killed: Place, forged: Path) -> None:
    """The checksum of a keyframe does not fit."""
    change_keyframe(forged, 1400, honest=False)
    code, found, said = killed.audit("--all", out=forged)
    assert (code, found) == (1, {})
    assert "the keyframe of 1400 examples, of batch 1-" in said
    assert "is not as it was written" in said


def test_other_code_and_libraries_are_named(killed: Place, forged: Path) -> None:
    """A job file with another comment and a library of another version: both are said, and all is still equal."""
    text = killed.file.read_text()
    try:
        killed.file.write_text(text + "# one more comment\n")
        [path] = learn_logs(forged)
        with closing(sqlite3.connect(path)) as database, database:
            for number, maker in database.execute("SELECT id, description FROM makers").fetchall():
                found = json.loads(maker) | {"river": "0.1.2", "machine": "pdp11"}
                database.execute("UPDATE makers SET description = ? WHERE id = ?", (json.dumps(found), number))
        code, found, said = killed.audit("--all", out=forged)
    finally:
        killed.file.write_text(text)
    assert code == 0, said
    assert found["equal"] == MANY
    changed = " ".join(found["changed"])
    assert "file audited_job.py was " in changed
    assert "river was 0.1.2 and is " in changed
    assert "machine was pdp11 and is " in changed


# -- models of all kinds

FEW = 450
KINDS: dict[str, list[tuple[str, str]]] = {
    "forest": [(MODEL, "forest.ARFClassifier(n_models=3, seed=1)")],
    "shy": [(MODEL, SCALED + "Shy(n_trees=5, height=4, window_size=50, seed=42)")],
    "at once": [('delay="10m"', 'delay="0s"')],
    "neighbors": [(MODEL, "neighbors.KNNClassifier(n_neighbors=3)"), ('field="fraud"', 'field="kind"'), ('Mean("fraud")', "Count()")],  # noqa: E501
    "touchy": [(MODEL, "Touchy()")],
    "factors per shop": [(MODEL, "facto.FMClassifier(n_factors=3, seed=7)" + ',\n    per="shop"'), ("every=200", "every=9")],  # noqa: E501
}  # fmt: skip
ORDERS = ("event_time", "arrival")


def killed_once(path: Path, kind: str, order: str) -> tuple[Place, tuple[int, dict[str, Any], str]]:
    """A run of a kind of model, killed once, then finished; and its audit."""
    changes = [*KINDS[kind], ("every=200", "every=60")] if "every" not in str(KINDS[kind]) else KINDS[kind]
    place = Place(path, *changes, ("audit=", f'time=Time(order="{order}", lateness="1m"),\n    audit='),
                  events=payments(FEW))  # fmt: skip
    place.feed(0, 250)
    place.kill(after=120)
    place.feed(250, FEW)
    place.run()
    return place, place.audit("--all")


@pytest.fixture(scope="module")
def audits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By kind of model: a run that was killed, and its audit. Side by side: most of it is waiting."""
    path = tmp_path_factory.mktemp("kinds")
    with ThreadPoolExecutor(max_workers=4) as pool:
        begun = {
            kind: pool.submit(killed_once, path / kind.replace(" ", "_"), kind, ORDERS[number % 2])
            for number, kind in enumerate(KINDS)
        }
        return {kind: future.result() for kind, future in begun.items()}


@pytest.mark.thorough
@pytest.mark.parametrize("kind", KINDS)
def test_models_of_all_kinds_are_made_again(audits: dict[str, Any], kind: str) -> None:
    """Whatever learns, however it is asked and taught: after a kill all of it is equal, and so are keyframes, models
    and outputs."""
    place, (code, found, said) = audits[kind]
    assert found.get("wrong") == [], (found, said)
    assert code == 0
    predictions = len(running.records(place.out, "predictions"))
    assert found["asked"] == found["equal"] == found["published"]["predictions"] == predictions
    assert found["keyframes"] == found["keyframes_equal"] > 3
    assert found["models"] == found["models_equal"] == (7 if "per shop" in kind else 1)
    outcomes = len(running.records(place.out, "outcomes"))
    assert found["published"]["outcomes"] == outcomes
    if kind in ("touchy", "shy"):
        assert len(running.records(place.out, "rejects")) > 5


# -- branches


@pytest.fixture
def branched(tmp_path: Path) -> Place:
    """A job that ran to its end, with checkpoints everywhere."""
    place = Place(tmp_path / "place", ("every=200", "every=60"), events=payments(FEW))
    place.feed(0, FEW)
    place.run()
    return place


def test_predictions_of_all_branches_are_made_again(branched: Place) -> None:
    """Gone back to a checkpoint: what goes on there is equal, and so is what was left, by --branch."""
    before = running.records(branched.out, "predictions")
    branched.run("--from", branched.middle())
    assert branched.all_equal()["asked"] == FEW
    found = branched.all_equal("--branch", "1")
    assert (found["asked"], found["published"]["predictions"]) == (FEW, len(before))
    code, _, said = branched.audit("--all", "--branch", "7")
    assert (code, "there is no branch 7" in said) == (1, True)


@pytest.mark.thorough
def test_other_models_in_the_middle_are_made_again(branched: Place) -> None:
    """The job declares its model of now alone; the one before is in the log, and taught questions go to the new one."""
    every = ("every=200", "every=60")
    branched.declare(every, (MODEL, "tree.HoeffdingTreeClassifier(grace_period=30)"))
    branched.run("--reset", "learner", "--from", branched.middle())
    found = branched.all_equal()
    assert found["asked"] == found["published"]["predictions"] == FEW
    assert {r["model"] for r in running.records(branched.out, "predictions")} == {
        "LogisticRegression", "HoeffdingTreeClassifier",
    }  # fmt: skip
    code, found, said = branched.audit("--sample", "200")
    assert (code, found["asked"], found["equal"]) == (0, 200, 200), said
    assert branched.audit("3")[1]["model"] == "LogisticRegression"
    branched.declare(every, (MODEL, MODEL + ",\n    per='card'"))
    branched.run("--reset", "learner", "--from", branched.middle())
    assert branched.all_equal()["published"]["predictions"] == FEW


@pytest.mark.thorough
def test_features_that_came_in_the_middle_are_no_difference(branched: Place) -> None:
    """Questions asked with fewer features are learned from as they were asked."""
    branched.declare(("every=200", "every=60"), ("CARD, SHOP]", "CARD, SHOP, LARGE]"))
    branched.run("--from", branched.middle())
    found = branched.all_equal()
    assert found["asked"] == found["published"]["outcomes"] == FEW
    assert any("job was" in text for text in found["changed"])


# -- what is kept


def test_what_is_not_kept_any_more_is_counted_and_not_wrong(tmp_path: Path) -> None:
    """With keep= the oldest cannot be made again, what can is equal, and one that cannot is refused with a reason."""
    changes = ("every=200", "every=50, keep='45m'")
    place = Place(tmp_path / "place", changes, events=payments(1200))
    place.feed(0, 1200)
    place.run()
    code, found, said = place.audit("--all")
    assert code == 0, (found, said)
    assert found["wrong"] == []
    assert found["asked"] == found["equal"] > 100
    with closing(sqlite3.connect(learn_logs(place.out)[0])) as database:
        [(kept,)] = database.execute("SELECT sum(asked) FROM chunks").fetchall()
    assert found["asked"] + found["unkept"] == kept < 600
    code, found, said = place.audit("--sample", "100")
    assert (code, found["wrong"], found["asked"] + found["unkept"]) == (0, [], 100), said
    assert found["asked"] == found["equal"] > 0
    code, _, said = place.audit("3")
    assert (code, "is it older than Audit(keep=...)" in said) == (1, True)
    code, _, said = place.audit(str(1200 - kept + 1))
    assert (code, "cannot be made again" in said) == (1, True), said
    assert place.audit("1199")[1]["equal"]


@pytest.mark.thorough
def test_models_per_entity_are_cut_off_too(tmp_path: Path) -> None:
    """With keep= and a model per card, some older and some younger than what is kept: none is wrong, most is equal."""
    events = payments(1200)
    for row in events[900:]:
        row["card"] += "b"
    model = "facto.FMClassifier(n_factors=3, seed=7)"
    place = Place(
        tmp_path / "place", ("every=200", "every=4, keep='45m'"), (MODEL, model + ",\n    per='card'"), events=events
    )
    place.feed(0, 1200)
    place.run()
    code, found, said = place.audit("--all")
    assert (code, found.get("wrong")) == (0, []), said
    assert found["asked"] == found["equal"] > 20
    code, found, said = place.audit("--sample", "200")
    assert (code, found.get("wrong"), found["asked"]) == (0, [], found["equal"]), said


@pytest.mark.thorough
def test_thinned_keyframes_are_no_hindrance(tmp_path: Path) -> None:
    """Of older keyframes each tenth is left: more is learned again, and all is equal."""
    place = Place(tmp_path / "place", ("every=200", "every=10, frames=3"), events=payments(FEW))
    place.feed(0, FEW)
    place.run()
    assert place.all_equal()["keyframes"] == 3 + FEW // 10 // 10
    assert place.audit("300")[1]["relearned"] > 10


def test_a_job_that_keeps_no_log_says_so(tmp_path: Path) -> None:
    """audit=None: nothing to audit; and a job that begins its log later is audited from there on."""
    nothing = ("audit=Audit(every=200)", "audit=None")
    place = Place(tmp_path / "place", nothing, events=payments(FEW))
    place.feed(0, 200)
    place.run()
    code, _, said = place.audit("--all")
    assert (code, "audit=None" in said) == (1, True)
    place.declare(("every=200", "every=50"))
    place.feed(200, FEW)
    place.run()
    code, found, said = place.audit("--all")
    assert (code, found.get("wrong")) == (0, []), (found, said)
    assert found["asked"] == found["equal"] > 100


# -- how it is asked


@pytest.mark.thorough
def test_a_run_that_goes_on_can_be_audited(tmp_path: Path) -> None:
    """While it reads, learns and drops checkpoints, what it has said so far is equal."""
    place = Place(tmp_path / "place", events=payments(6000))
    place.feed(0, 300)
    process = running.start(
        str(place.file), place.out, "--groups", "4", "--batch-size", "20", "--checkpoint", "0", "--follow"
    )
    try:
        fed, audits = 300, 0
        with ThreadPoolExecutor(max_workers=1) as pool:
            while audits < 3:
                audit = pool.submit(place.audit, *(("--all",), ("--sample", "100"))[audits % 2])
                while not audit.done():
                    place.feed(fed, fed + 40)
                    fed += 40
                    time.sleep(0.05)
                code, found, said = audit.result()
                if "no prediction yet" in said or "missing" in said or "no learn log" in said:
                    continue  # it has just been started
                assert (code, found.get("wrong")) == (0, []), (found, said)
                audits += 1
    finally:
        kill_all(process.pid)
        process.communicate()
    code, found, said = place.audit("--all")  # killed, and not resumed yet
    assert (code, found.get("wrong")) == (0, []), (found, said)


def test_an_id_is_found_as_the_events_have_it(branched: Place) -> None:
    """A number is no text; what is unknown, no number, or not said at all is refused with a reason."""
    assert branched.audit("449")[0] == 0
    for asked, reason in ((("4999",), "no prediction of event 4999"), (("x",), "'x' is no id"),
                          ((), "say what to audit"), (("1", "--all"), "say what to audit")):  # fmt: skip
        code, _, said = branched.audit(*asked)
        assert (code, reason in said) == (1, True), said


@pytest.mark.thorough
def test_ids_of_text_ids_asked_twice_and_events_without(tmp_path: Path) -> None:
    """Text ids, each used twice because nobody remembers them; and events that have no id of their own."""
    events = payments(300)
    for row in events:
        row["id"] = f"p{row['id'] % 150}"
    place = Place(tmp_path / "text", ("id: int", "id: str"), ("audit=", "max_ids=10,\n    audit="), events=events)
    place.feed(0, 300)
    place.run()
    assert len(running.records(place.out, "predictions")) == 300
    assert place.all_equal()["published"]["predictions"] == 300
    last = [r for r in running.records(place.out, "predictions") if r["id"] == "p7"][-1]
    assert bits(place.audit("p7")[1]["output"]) == bits(last["output"])
    place = Place(tmp_path / "none", ('Event, id="id", time', "Event, time"), events=payments(300))
    place.feed(0, 300)
    place.run()
    assert place.all_equal()["published"]["predictions"] == 300
    name = running.records(place.out, "predictions")[7]["id"]
    assert place.audit(name)[1]["equal"]
