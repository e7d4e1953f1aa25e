"""Bundles: what is damaged or planted is refused and runs nothing; scoring goes on exactly where a bundle stopped."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from river import linear_model, preprocessing, tree
from typer.testing import CliRunner

from dataflows.bundle import FORMAT, Bundle, models_of, read_about, read_bundle, warm_models, write_bundle
from dataflows.changes import describe
from dataflows.cli import app
from dataflows.connectors.files import Jsonl
from dataflows.events import Event, Prediction, Record
from dataflows.job import Job, JobError, Label
from dataflows.order import Reader
from dataflows.provenance import environment
from dataflows.replay import PlainRun, inputs_of
from features import Count, Entity, Fields, Mean
from tests.scenarios.learning import JOB, payments


class Payment(Event, id="id", time="t", unit="s"):
    id: int
    t: int
    card: str
    shop: str
    amount: float
    fraud: bool


def declared(**parts: Any) -> Job:
    """A job; every question is answered when the next event comes."""
    whole: dict[str, Any] = {
        "name": "bundled",
        "events": Jsonl("events.jsonl", Payment),
        "features": (
            Fields("amount"),
            Entity("card", [Count(), Mean("amount")], over="1h"),
            Entity("shop", [Mean("fraud")], over="1d", of="labels"),
        ),
        "model": preprocessing.StandardScaler() | linear_model.LogisticRegression(),
        "label": Label(field="fraud", delay="0s"),
    }
    return Job(**whole | parts)


def played(job: Job, rows: list[dict[str, Any]], begin: Bundle | None = None) -> tuple[list[Record], Bundle]:
    """The records of a plain run, and a bundle of its end."""
    about = {
        "job": job.name, "per": None if job.per is None else list(job.per), "declared": describe(job, 1),
        "made_by": environment(), "clock": None, "metrics": {}, "as_of": "1-1",
    }  # fmt: skip
    before = begin or Bundle(about | {"examples": {}}, {}, {})
    plain = PlainRun(job, Reader(inputs_of(job, rows), job.time), before)
    records = list(plain.run())
    models, features = plain.bundle(before)
    examples = {key: count for key, (_, count) in models.items()}
    return records, Bundle(about | {"examples": examples, "clock": plain.admit.clock}, models, features)


@pytest.fixture(scope="module")
def made() -> Bundle:
    """A bundle of a job that has seen 120 payments."""
    return played(declared(), payments(0, 120))[1]


@pytest.fixture
def path(made: Bundle, tmp_path: Path) -> Path:
    """It as a file."""
    write_bundle(tmp_path / "sub" / "a.bundle", made)
    return tmp_path / "sub" / "a.bundle"


def test_what_is_written_is_read(made: Bundle, path: Path) -> None:
    """Models, features and what it says of itself; nothing else is left beside it."""
    found = read_bundle(path, declared())
    assert found.models == made.models
    assert repr(found.features) == repr(made.features)
    about = read_about(path)
    assert (about["format"], about["examples"], about["job"]) == (FORMAT, {"null": 120}, "bundled")
    assert [file.name for file in path.parent.iterdir()] == ["a.bundle"]
    with zipfile.ZipFile(path) as archive:
        assert json.loads(archive.read("about.json"))["clock"] == about["clock"]


@pytest.mark.parametrize("parts", [1, 2, 7])
@pytest.mark.parametrize(
    "job",
    [declared(), declared(per="shop"), declared(model=tree.HoeffdingTreeClassifier(grace_period=10))],
    ids=["global", "per shop", "tree"],
)
def test_scoring_in_parts_is_scoring_at_once(job: Job, parts: int) -> None:
    """From bundle to bundle, if every question is answered in between, it says to the last bit what one run says."""
    rows = payments(0, 140)
    expected = [record for record in job.play(rows) if isinstance(record, Prediction)]
    found: list[Prediction] = []
    bundle: Bundle | None = None
    for part in range(parts):
        some = rows[part * 140 // parts : (part + 1) * 140 // parts]
        records, bundle = played(job, some, bundle)
        found += [record for record in records if isinstance(record, Prediction)]
    assert found == expected
    assert bundle is not None
    assert sum(count for _, count in bundle.models.values()) == 140


def test_any_damaged_byte_is_told(path: Path) -> None:
    """Cut off anywhere, or with one byte changed: refused with its name, or the same as before."""
    whole = path.read_bytes()
    job = declared()
    wanted = read_bundle(path, job).models
    for place in range(0, len(whole), max(len(whole) // 150, 1)):
        for damaged in (whole[:place], whole[:place] + bytes([whole[place] ^ 0x41]) + whole[place + 1 :]):
            path.write_bytes(damaged)
            found: Any
            try:
                found = read_bundle(path, job).models
            except JobError as error:
                found = str(error)
            assert str(path) in found if isinstance(found, str) else found == wanted


def rewritten(path: Path, **changed: Any) -> Path:
    """The file with parts of what it says of itself replaced."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    about = json.loads(parts["about.json"]) | changed
    parts["about.json"] = json.dumps({name: value for name, value in about.items() if value is not ...}).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize("changed", [
    {"format": 99}, {"format": "1"}, {"sha256": []}, {"sha256": {"nowhere": "00"}}, {"declared": {}}, {"declared": 7},
    {"clock": "noon"}, {"examples": None}, {"per": 5}, {"made_by": 3}, {"sha256": {}},
])  # fmt: skip
def test_nonsense_about_itself_is_refused(path: Path, changed: dict[str, Any]) -> None:
    """Whatever is said wrongly is one message, and no other error."""
    rewritten(path, **changed)
    with pytest.raises(JobError, match=r"a\.bundle"):
        read_bundle(path, declared())
    with pytest.raises(JobError, match=r"a\.bundle"):
        warm_models(declared(), path)


class Planted:
    """When it is unpickled, a file is made."""

    def __init__(self, target: Path) -> None:
        self._target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._target),)


def planted(made: Bundle, where: str, target: Path) -> Bundle:
    """A bundle with something planted."""
    evil = pickle.dumps(Planted(target))
    if where == "model":
        return made._replace(models={"null": (evil, 5)})
    if where == "models":
        return made._replace(models={"null": (Planted(target), 5)})  # type: ignore[dict-item]
    step = next(iter(made.features))
    names, text, rows = made.features[step][0]
    if where == "features":
        return made._replace(features={step: [(names, text, {"c1": [Planted(target)]})]})
    import base64

    return made._replace(features={step: [(names, base64.b64encode(evil).decode(), rows)]})


@pytest.mark.parametrize("where", ["model", "models", "features", "declaration"])
def test_what_is_planted_is_not_run(made: Bundle, tmp_path: Path, where: str) -> None:
    """A pickle that calls something, in every place where pickles are: refused, and not called."""
    target = tmp_path / "was_run"
    file = tmp_path / "evil.bundle"
    write_bundle(file, planted(made, where, target))
    with pytest.raises(JobError, match="cannot be opened"):
        read_bundle(file, declared())
    assert not target.exists()


@pytest.mark.parametrize("models", [None, [], {"null": 5}, {"null": (b"x", 1)}, {"null": (pickle.dumps(7), 1)},
                                    {"null": (pickle.dumps(preprocessing.StandardScaler()), 1)}, {"null": ("x", 1, 2)}])  # fmt: skip # noqa: E501
def test_what_is_no_model_is_refused(made: Bundle, tmp_path: Path, models: Any) -> None:
    """Of the right classes and the wrong shape: one message."""
    write_bundle(tmp_path / "x.bundle", made._replace(models=models))
    with pytest.raises(JobError, match="another job"):
        read_bundle(tmp_path / "x.bundle", declared())


@pytest.mark.parametrize("parts", [5, [(1, 2)], [((), "", 3)], [((), "", {})]])
def test_what_are_no_features_is_refused(made: Bundle, tmp_path: Path, parts: Any) -> None:
    """As with models."""
    features = {"features_card": parts}
    write_bundle(tmp_path / "x.bundle", made._replace(features=features))
    with pytest.raises(JobError, match="another job"):
        read_bundle(tmp_path / "x.bundle", declared())


@pytest.mark.parametrize(("parts", "said"), [
    ({"model": linear_model.LogisticRegression()}, "its model is"),
    ({"features": (Fields("amount"),)}, "only one of the two has the features amount_mean_1h_by_card"),
])  # fmt: skip
def test_a_job_of_another_kind_does_not_begin_with_it(path: Path, parts: dict[str, Any], said: str) -> None:
    """Another model, other features: said; so is a file that is not there."""
    with pytest.raises(JobError, match=said):
        list(declared(warm_start=path, **parts).play(payments(0, 1)))
    with pytest.raises(JobError, match="there is no bundle"):
        models_of(declared(warm_start=path.with_name("none")))


def test_whose_models_they_are_has_to_fit(tmp_path: Path, path: Path) -> None:
    """One for all serves each; one for each shop serves neither all nor cards."""
    assert models_of(declared(warm_start=path, per="card")).keys() == {"null"}
    each = played(declared(per="shop"), payments(0, 30))[1]
    write_bundle(tmp_path / "each", each)
    assert len(models_of(declared(warm_start=tmp_path / "each", per="shop"))) == 4
    for per in (None, "card"):
        with pytest.raises(JobError, match="it has a model for each shop"):
            models_of(declared(warm_start=tmp_path / "each", per=per))


def test_a_bundle_is_written_whole_or_not_at_all(made: Bundle, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When writing fails, the one that was there is there still, and nothing beside it."""
    before = path.read_bytes()

    def fail(*arguments: Any) -> None:
        raise OSError("full")

    monkeypatch.setattr(zipfile.ZipFile, "writestr", fail)
    with pytest.raises(OSError, match="full"):
        write_bundle(path, made)
    assert [file.read_bytes() for file in path.parent.iterdir()] == [before]


# -- the command `score`, in this process


class Desk:
    """A job file, a bundle of it, and the command."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = path / f"desk_{abs(hash(str(path)))}.py"
        text = JOB.replace('delay="10m"', 'delay="0s"').replace("EVENTS", "/nowhere").replace(", SHOP]", "]")
        self.file.write_text(text)
        from dataflows.runtime import load_job

        self.job = load_job(str(self.file))
        _, self.bundle = played(self.job, payments(0, 100))
        self.bundle.about["job_file"] = str(self.file)
        self.bundle_file = path / "b.bundle"
        write_bundle(self.bundle_file, self.bundle)
        self.events = self.write("next.jsonl", payments(100, 140))

    def write(self, name: str, rows: list[dict[str, Any]]) -> Path:
        """A file of events."""
        file = self.path / name
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return file

    def score(self, *words: Any) -> Any:
        """`millrace score`."""
        return CliRunner().invoke(app, ["score", *map(str, words)])


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    """All there is to score."""
    return Desk(tmp_path)


def test_saved_models_go_on(desk: Desk) -> None:
    """Two files one after the other, through a saved bundle, give what both at once give."""
    first, second = desk.write("1.jsonl", payments(100, 115)), desk.write("2.jsonl", payments(115, 140))
    at_once = desk.score(desk.bundle_file, desk.events).stdout
    saved = desk.path / "saved.bundle"
    found = desk.score(desk.bundle_file, first, "--save", saved).stdout + desk.score(saved, second).stdout
    assert found == at_once
    assert found.count("\n") == 40
    about = read_about(saved)
    assert (about["grew_from"], about["examples"]) == ({"null": 100}, {"null": 115})


def test_without_features_they_start_empty_and_are_saved(desk: Desk) -> None:
    """Of a bundle without features any time is taken; what is saved has those that came, and goes on with them."""
    bare = desk.path / "bare.bundle"
    write_bundle(bare, desk.bundle._replace(features={}))
    old = desk.write("old.jsonl", payments(0, 20))
    both = desk.write("both.jsonl", payments(0, 20) + payments(100, 140))
    at_once = desk.score(bare, both).stdout
    saved = desk.path / "saved.bundle"
    first = desk.score(bare, old, "--save", saved)
    assert "20 predictions" in first.stderr
    assert json.loads(first.stdout.splitlines()[0])["features"]["count_1h_by_card"] == 1
    assert first.stdout + desk.score(saved, desk.events).stdout == at_once


def test_events_before_the_bundle_are_rejected_and_counted(desk: Desk) -> None:
    """Features of then cannot be had any more; a file without any newer one leaves the bundle as it was."""
    mixed = desk.write("mixed.jsonl", payments(90, 110))
    done = desk.score(desk.bundle_file, mixed, "--output", desk.path / "records")
    assert "11 predictions" in done.stderr  # the bundle's last event came at its clock: that time is not before it
    assert "9 rejects" in done.stderr
    reasons = {json.loads(line)["reason"] for line in (desk.path / "records/rejects.jsonl").read_text().splitlines()}
    assert reasons == {"time_out_of_range"}
    saved = desk.path / "saved.bundle"
    desk.score(desk.bundle_file, desk.write("old.jsonl", payments(0, 20)), "--save", saved)
    assert read_about(saved)["clock"] == desk.bundle.about["clock"]
    assert desk.score(saved, desk.events).stdout == desk.score(desk.bundle_file, desk.events).stdout


@pytest.mark.parametrize(("old", "new", "said"), [
    ('Mean("amount")], over="1h"', 'Mean("amount")], over="2h"', "features_card is not what it was"),
    ('Fields("amount")', 'Fields("amount", "y")', "was made with the features"),
    ("preprocessing.StandardScaler() | ", "", "its model is"),
    ("LogisticRegression()", "LogisticRegression(l2=0.5)", "its model is"),
    ("    audit=", '    per="shop",\n    audit=', "per was None"),
])  # fmt: skip
def test_a_job_that_was_changed_is_refused(desk: Desk, old: str, new: str, said: str) -> None:
    """Other features, another model, a model for each: said before anything is answered."""
    other = desk.path / f"other_{desk.file.name}"
    assert old in desk.file.read_text()
    other.write_text(desk.file.read_text().replace(old, new))
    done = desk.score(desk.bundle_file, desk.events, "--job", other)
    assert done.exit_code == 1
    assert isinstance(done.exception, JobError)
    assert said in str(done.exception)
    assert done.stdout == ""


def _no_file(desk: Desk) -> list[Any]:
    write_bundle(desk.bundle_file, desk.bundle._replace(about=desk.bundle.about | {"job_file": "/gone/job.py:mine"}))
    return [desk.bundle_file, desk.events]


def _unnamed(desk: Desk) -> list[Any]:
    write_bundle(desk.bundle_file, desk.bundle._replace(about=desk.bundle.about | {"job_file": None}))
    return [desk.bundle_file, desk.events]


def _taken(desk: Desk) -> list[Any]:
    return [desk.bundle_file, desk.events, "--output", desk.path]


def _a_file(desk: Desk) -> list[Any]:
    return [desk.bundle_file, desk.events, "--output", desk.events]


def _no_bundle(desk: Desk) -> list[Any]:
    return [desk.events, desk.events]


def _no_events(desk: Desk) -> list[Any]:
    return [desk.bundle_file, desk.path / "none.jsonl"]


@pytest.mark.parametrize(("words", "said"), [
    (_no_file, "--job FILE"), (_unnamed, "--job FILE"), (_taken, "not empty"), (_a_file, "not empty"),
    (_no_bundle, "is no bundle"), (_no_events, "none.jsonl"),
])  # fmt: skip
def test_what_is_asked_wrongly_is_said(desk: Desk, words: Callable[[Desk], list[Any]], said: str) -> None:
    """Files that are not there, or not what they should be: one message."""
    done = desk.score(*words(desk))
    assert done.exit_code == 1
    assert said in str(done.exception)


def test_another_environment_is_told(desk: Desk) -> None:
    """Libraries of other versions may give other predictions: it is said, and answered."""
    about = desk.bundle.about | {"made_by": environment() | {"river": "0.1.2"}}
    write_bundle(desk.bundle_file, desk.bundle._replace(about=about))
    done = desk.score(desk.bundle_file, desk.events)
    assert done.exit_code == 0
    assert "river was 0.1.2" in done.stderr
    assert done.stdout.count("\n") == 40
