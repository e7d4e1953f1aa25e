"""Versions of models, bundles on another machine, jobs that begin with them: as users do it, killed in between."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from dataflows.events import encode_lines
from dataflows.job import KIND_OF, JobError
from dataflows.learner import Learner
from dataflows.likeness import first_difference
from dataflows.models import Models
from dataflows.settings import RunDirectory
from dataflows.state import StateError
from tests.scenarios import running
from tests.scenarios.learning import ARRIVAL, MODEL, PER_SHOP, Made, Place, command, payments, some

UNSUPERVISED = (
    MODEL,
    "preprocessing.MinMaxScaler() | anomaly.HalfSpaceTrees(n_trees=3, height=3, window_size=20, seed=1)",
)
KINDS: dict[str, list[tuple[str, str]]] = {
    "global": [],
    "arrival": [ARRIVAL],
    "per shop": [PER_SHOP],
    "unsupervised": [UNSUPERVISED],
    "factors": [(MODEL, "preprocessing.StandardScaler() | facto.FMClassifier(n_factors=3, seed=7)")],
}
BEFORE, NEXT = 300, 400


class Kind(Place):
    """A run up to its end, its bundle, and the run going on with further events."""

    def __init__(self, path: Path, *changes: tuple[str, str]) -> None:
        super().__init__(path, *changes, events=BEFORE)
        self.run()
        self.bundle = path / "latest.bundle"
        done = self.command("models", "export", "latest", str(self.bundle))
        assert done.returncode == 0, done.stderr
        self.next = payments(BEFORE, NEXT)
        if ARRIVAL in changes:  # late, and some too late
            self.next[0]["t"] -= 100
            self.next[1]["t"] -= 250
            self.next[2]["t"] -= 1000
        self.feed(self.next)
        self.run()


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kind]:
    """A run of each kind."""
    path = tmp_path_factory.mktemp("models")
    return Made(lambda name: Kind(path / name.replace(" ", "_"), *KINDS[name]))


@pytest.fixture(scope="module")
def source(kinds: dict[str, Kind]) -> Kind:
    """A run with one model for all."""
    return kinds["global"]


# -- another machine


def elsewhere(kind: Place, path: Path, events: list[dict[str, Any]], bundle: Path) -> tuple[str, ...]:
    """A directory with the job file, the bundle and events, and nothing else; what to call there."""
    path.mkdir(parents=True)
    text = kind.file.read_text().replace(str(kind.path), "/nowhere")
    (path / kind.file.name).write_text(text)
    shutil.copyfile(bundle, path / "b.bundle")
    (path / "next.jsonl").write_text("".join(json.dumps(row) + "\n" for row in events))
    return "score", "b.bundle", "next.jsonl", "--job", kind.file.name


@pytest.mark.parametrize("name", some(KINDS, "global", "arrival"))
def test_a_bundle_scores_as_the_run_that_goes_on(kinds: dict[str, Kind], tmp_path: Path, name: str) -> None:
    """On another machine the next events get to the last bit what the run says to them, and the model goes on too."""
    kind = kinds[name]
    words = elsewhere(kind, tmp_path / "there", kind.next, kind.bundle)
    done = command(*words, cwd=tmp_path / "there")
    assert done.returncode == 0, done.stderr
    expected = (kind.out / "predictions.jsonl").read_text().splitlines()[BEFORE:]
    assert len(expected) == (99 if name == "arrival" else 100)
    assert done.stdout.splitlines() == expected
    assert f"{len(expected)} predictions, {len(expected)} outcomes" in done.stderr
    versions = [json.loads(line)["version"] for line in expected]
    assert versions[-1] > versions[0] > 0


def test_records_go_to_a_directory_and_models_to_a_new_bundle(source: Kind, tmp_path: Path) -> None:
    """With --output all kinds of records are files as the run's; with --save the models have learned all of it."""
    there = tmp_path / "there"
    words = elsewhere(source, there, source.next, source.bundle)
    done = command(*words, "--output", "records", "--save", "later.bundle", cwd=there)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    for kind in ("predictions", "outcomes"):
        expected = (source.out / f"{kind}.jsonl").read_text().splitlines()[BEFORE:]
        assert (there / "records" / f"{kind}.jsonl").read_text().splitlines() == expected
    done = command("score", "later.bundle", "next.jsonl", "--job", source.file.name, cwd=there)
    assert "1 predictions" in done.stderr  # the last event is not older than the bundle; its id is unknown there
    assert "99 rejects" in done.stderr
    assert json.loads(done.stdout)["version"] == NEXT
    done = command(*words, "--output", "records", cwd=there)
    assert done.returncode == 1
    assert "not empty" in done.stderr


def test_the_job_file_is_found_where_it_was_or_asked_for(source: Kind, tmp_path: Path) -> None:
    """A bundle knows its job file; once that is moved, --job is the hint."""
    next_ = tmp_path / "next.jsonl"
    next_.write_text(json.dumps(payments(BEFORE, NEXT)[0]) + "\n")
    assert "1 predictions" in command("score", str(source.bundle), str(next_)).stderr
    moved = source.file.with_name("moved")
    source.file.rename(moved)
    try:
        done = command("score", str(source.bundle), str(next_))
    finally:
        moved.rename(source.file)
    assert done.returncode == 1
    assert "--job FILE" in done.stderr


# -- lineage


@pytest.mark.parametrize(("name", "key", "wanted"), [
    ("global", None, (0, 1, 50, 99, 100, 101, 250, 299, 300, 301, 400)),
    ("arrival", None, (1, 137, 240)),
    ("per shop", "s1", (0, 1, 19, 20, 21, 75, 76, 100)),
    pytest.param("unsupervised", None, (0, 1, 99, 100, 137, 400), marks=pytest.mark.thorough),
    pytest.param("factors", None, (1, 100, 137, 240), marks=pytest.mark.thorough),
])  # fmt: skip
def test_every_version_is_the_model_of_a_plain_loop(
    kinds: dict[str, Kind], monkeypatch: pytest.MonkeyPatch, name: str, key: str | None, wanted: tuple[int, ...]
) -> None:
    """Between keyframes and on them: after as many examples it is the same model.

    At its first end of input the run answered what was open, which the loop does later: with late events, and where a
    model changes when it is asked, the two go different ways from there on.
    """
    kind, found = kinds[name], {}
    job = kind.job()

    def noting(method: Any) -> Any:
        def noted(learner: Any, *arguments: Any) -> Any:
            result = method(learner, *arguments)
            for each, (model, version) in learner.models().items():
                if each == key and version not in found:
                    found[version] = pickle.dumps(model)
            return result

        return noted

    monkeypatch.setattr(Learner, "_learn", noting(Learner._learn))
    monkeypatch.setattr(Learner, "_ask", noting(Learner._ask))
    list(job.play())
    with closing(Models(job, RunDirectory(kind.out))) as models:
        for version in wanted:
            shown = models.show(str(version), key)
            expected = pickle.loads(found[version]) if version else job.model
            assert first_difference(shown.model, expected, "model") is None, version
            assert (shown.examples, shown.version) == (version, str(version))
        with pytest.raises(StateError, match=r"has learned|there was never"):
            models.show("1000", key)
        assert models.show("latest", key).examples == max(found)


def told(kind: Place, *options: str, out: Path | None = None) -> Any:
    """What `models --json` tells."""
    done = kind.command("models", *options, "--json", out=out)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_versions_are_listed_and_told(source: Kind) -> None:
    """Each with the version it grew from, the examples between, and the metrics of its time."""
    rows = told(source)
    assert [row["version"] for row in rows] == ["100", "200", "300", "400"]
    assert [row["grew_from"] for row in rows] == ["the model as declared", "100", "200", "300"]
    assert [row["since"] for row in rows] == [100] * 4
    outcomes = source.records("outcomes")
    shown = told(source, "show", "250")
    assert (shown["grew from"], shown["examples"]) == ("200", 250)
    assert f"event {outcomes[200]['id']}," in shown["first example since"]
    assert f"event {outcomes[249]['id']}," in shown["last example"]
    assert "LogisticRegression(optimizer=SGD(lr=Constant(learning_rate=0.01))" in shown["hyperparameters"]
    assert shown["made by"]["river"]
    assert shown["made by"]["job"]
    assert 0 < shown["ROCAUC"] < 1
    assert told(source, "show", "300")["grew from"] == "200"
    assert told(source, "show")["version"] == "400"
    text = source.command("models", "show", "250").stdout
    assert "event 200, label" in text


@pytest.mark.parametrize(("options", "said"), [
    (("show", "1000"), "400 examples by now, not 1,000"),
    (("show", "many"), "is no version"),
    (("show", "7:10"), "not in the learn log"),
    (("export", "100"), "export VERSION FILE"),
    (("show", "100", "--entity", "shop=s1"), "one model for all"),
])  # fmt: skip
def test_what_there_is_not_is_said(source: Kind, options: tuple[str, ...], said: str) -> None:
    """Versions that were never reached, no versions, keys where there are none: one line."""
    done = source.command("models", *options)
    assert done.returncode == 1
    assert said in done.stderr


@pytest.mark.parametrize(("options", "said"), [
    (("show", "10"), "--entity says which"),
    (("show", "10", "--entity", "card=c1"), "shop is missing"),
    (("show", "0", "--entity", "shop=unknown"), "never such a model"),
    (("show", "--entity", "shop=unknown"), "no such model"),
    (("export", "latest", "/nowhere/x.bundle", "--entity", "shop=unknown"), "no model to export"),
])  # fmt: skip
def test_models_per_entity_are_asked_for_by_key(kinds: dict[str, Kind], options: tuple[str, ...], said: str) -> None:
    """Without a key, with another field, with one that never came: one line."""
    done = kinds["per shop"].command("models", *options)
    assert done.returncode == 1
    assert said in done.stderr


def test_a_model_per_entity_has_its_own_versions(kinds: dict[str, Kind]) -> None:
    """Listed for one shop they are this shop's."""
    rows = told(kinds["per shop"], "--entity", "shop=s2")
    assert {row["model"] for row in rows} == {"LogisticRegression/shop=s2"}
    assert [row["examples"] for row in rows] == [20, 40, 60, 80, 100]
    assert len(told(kinds["per shop"])) == 20


@pytest.mark.thorough
def test_versions_before_a_reset_and_on_branches(tmp_path: Path) -> None:
    """Models that began anew count from 0; those before are named by which they were; the commit is noted."""
    place = Place(tmp_path)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=b"]
    for words in (["init", "-q"], ["add", "learning_job.py"], ["commit", "-q", "-m", "a job"]):
        subprocess.run([*git, *words], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    place.run()
    assert told(place)[0]["commit"] == commit
    place.declare((MODEL, "tree.HoeffdingTreeClassifier(grace_period=20)"), PER_SHOP)
    place.feed(payments(400, 500))
    place.run("--reset", "learner")
    rows = told(place, "--limit", "100")
    assert [row["version"] for row in rows[:4]] == ["1:100", "1:200", "1:300", "1:400"]
    assert {row["model"] for row in rows[:4]} == {"LogisticRegression"}
    assert {row["examples"] for row in rows[4:]} == {20}
    old = told(place, "show", "1:150")
    assert (old["version"], old["model"], old["made by"]["commit"]) == ("1:150", "LogisticRegression", commit)
    new = told(place, "show", "10", "--entity", "shop=s1")
    assert (new["grew from"], new["made by"]["commit"]) == ("the model as declared", f"{commit} with changes")


# -- warm start


def warm(bundle: Path) -> tuple[str, str]:
    """A change to a job file: it begins with a bundle."""
    return "    audit=", f"    warm_start={str(bundle)!r},\n    audit="


class Warm(Place):
    """A job that begins with a bundle."""

    def __init__(self, path: Path, bundle: Path, *changes: tuple[str, str], events: int = 150) -> None:
        path.mkdir(parents=True)
        self.bundle = path / "warm.bundle"
        shutil.copyfile(bundle, self.bundle)
        super().__init__(path, warm(self.bundle), *changes, events=0)
        self.feed(payments(BEFORE, BEFORE + events))


@pytest.fixture(scope="module")
def begun(source: Kind, tmp_path_factory: pytest.TempPathFactory) -> Warm:
    """A job that began with the model of another and ran to its end."""
    place = Warm(tmp_path_factory.mktemp("warm") / "a", source.bundle)
    place.run()
    return place


def test_a_job_begins_with_a_bundle(begun: Warm, source: Kind) -> None:
    """Its first prediction is of the bundle's version; what it grew from is told; the audit makes all of it again."""
    assert begun.records("predictions")[0]["version"] == BEFORE
    assert begun.records("outcomes")[-1]["version_after"] == BEFORE + 150
    rows = told(begun)
    assert rows[0]["grew_from"] == "the bundle of learning, 300 examples"
    assert [row["version"] for row in rows] == ["300", "400"]
    assert told(begun, "show", "300")["grew from"] == "the bundle of learning, 300 examples"
    assert told(begun, "show", "350")["grew from"] == "the bundle of learning, 300 examples"
    assert begun.command("models", "show", "0").returncode == 1
    done = begun.command("audit", "--all")
    assert done.returncode == 0, done.stdout + done.stderr
    done = begun.command("dataset", "--output", str(begun.path / "x.parquet"))
    assert "all 150 rows are the same" in done.stdout, done.stdout + done.stderr


@pytest.mark.thorough
def test_killed_and_without_its_bundle_it_is_the_same(begun: Warm, source: Kind, tmp_path: Path) -> None:
    """After kill -9 the run goes on from its own copy of the bundle, as undisturbed; so does a replay of it."""
    place = Warm(tmp_path / "b", source.bundle, events=60)
    place.kill(after=30)
    place.bundle.unlink()
    place.feed(payments(BEFORE + 60, BEFORE + 150))
    place.run()
    for kind in ("predictions", "outcomes"):
        assert (place.out / f"{kind}.jsonl").read_bytes() == (begun.out / f"{kind}.jsonl").read_bytes()
    done = place.command("audit", "--all")
    assert done.returncode == 0, done.stdout + done.stderr
    again = tmp_path / "again"
    done = place.command("replay", "--output", str(again))
    assert done.returncode == 0, done.stderr
    for kind in ("predictions", "outcomes"):
        assert (again / f"{kind}.jsonl").read_bytes() == (place.out / f"{kind}.jsonl").read_bytes()


def test_play_and_the_engine_alone_begin_with_it_too(begun: Warm, tmp_path: Path) -> None:
    """`job.play()` and `python -m bytewax.run` give the same predictions."""
    expected = (begun.out / "predictions.jsonl").read_bytes()
    said = [record for record in begun.job().play() if KIND_OF[type(record)] == "predictions"]
    assert encode_lines(said) == expected
    flow = tmp_path / "flow_job.py"
    text = begun.file.read_text().replace(
        "    warm_start=", f"    outputs=Outputs(directory='{tmp_path}/out'),\n    warm_start="
    )
    flow.write_text(text + "\nfrom dataflows.flow import dataflow\nflow = dataflow(job)\n")
    subprocess.run(
        [sys.executable, "-m", "bytewax.run", "flow_job:flow"], cwd=tmp_path, check=True, timeout=60,
        env=running.environment(PYTHONHASHSEED="0"), capture_output=True,
    )  # fmt: skip
    assert (tmp_path / "out" / "predictions.jsonl").read_bytes() == expected


@pytest.mark.thorough
def test_a_bootstrap_begins_with_it(begun: Warm, source: Kind, tmp_path: Path) -> None:
    """Computed over the history of another run, the models begin as the bundle's."""
    out = tmp_path / "boot"
    done = command("bootstrap", str(begun.file), "--from-run", str(begun.out), "--directory", str(out))
    assert done.returncode == 0, done.stderr
    [history] = out.glob("history/*/predictions.jsonl")
    assert history.read_bytes() == (begun.out / "predictions.jsonl").read_bytes()


@pytest.mark.thorough
def test_models_per_entity_begin_with_a_global_bundle_or_with_their_own(
    kinds: dict[str, Kind], source: Kind, tmp_path: Path
) -> None:
    """From one model for all each shop's begins there; of a bundle with one for each, each begins with its own."""
    place = Warm(tmp_path / "a", source.bundle, PER_SHOP)
    place.run()
    firsts = {said["model"]: said["version"] for said in reversed(place.records("predictions"))}
    assert firsts == {f"LogisticRegression/shop=s{i}": BEFORE for i in range(4)}
    rows = told(place, "--entity", "shop=s3")
    assert rows[0]["grew_from"] == "the bundle of learning, 300 examples"
    assert place.command("audit", "--all").returncode == 0
    each = kinds["per shop"]
    place = Warm(tmp_path / "b", each.bundle, PER_SHOP)
    place.run()
    versions = {s["model"]: s["version_after"] for s in reversed(each.records("outcomes")[BEFORE - 4 : BEFORE])}
    firsts = {said["model"]: said["version"] for said in reversed(place.records("predictions"))}
    assert set(firsts.values()) == {BEFORE // 4}
    assert firsts.keys() == versions.keys()
    assert place.command("audit", "--all").returncode == 0
    with pytest.raises(JobError, match="model for each shop"):
        list(Warm(tmp_path / "c", each.bundle).job().play())


@pytest.mark.parametrize(("change", "said"), [
    ((MODEL, "linear_model.LogisticRegression()"), "its model is"),
    (('Fields("amount")', 'Fields("amount", "y")'), "only one of the two has the features y"),
    (PER_SHOP, None),
])  # fmt: skip
def test_a_bundle_that_does_not_fit_is_refused_before_anything_is_written(
    source: Kind, tmp_path: Path, change: tuple[str, str], said: str | None
) -> None:
    """Another model, other features, a file that is none: said, and nothing is there but an empty directory."""
    place = Warm(tmp_path / "a", source.bundle, change, events=5)
    if said is None:
        place.bundle.write_bytes(b"nonsense")
    assert (said or "no bundle, or damaged") in place.refused()
    written = (".sqlite3", ".bundle", ".json", ".log")
    assert [path for path in place.out.rglob("*") if path.suffix in written] == []


@pytest.mark.thorough
def test_a_bundle_that_comes_goes_or_changes_later(source: Kind, begun: Warm, tmp_path: Path) -> None:
    """Declared after the start, or not any more: refused with a hint; with --reset learner the models begin so."""
    place = Place(tmp_path / "a", events=BEFORE)
    place.run()
    bundle = tmp_path / "other.bundle"
    shutil.copyfile(source.bundle, bundle)
    place.declare(warm(bundle))
    assert "--reset learner" in place.refused()
    place.feed(payments(BEFORE, BEFORE + 20))
    place.run("--reset", "learner")
    assert place.records("predictions")[BEFORE]["version"] == BEFORE
    assert told(place)[-1]["grew_from"] == "the bundle of learning, 300 examples"
    assert place.command("audit", "--all").returncode == 0
    bundle.write_bytes(begun.bundle.read_bytes()[:-10] + b"0123456789")
    assert "another bundle now" in place.run()
    place.declare()
    assert "--reset learner" in place.refused()
    place.feed(payments(BEFORE + 20, BEFORE + 40))
    place.run("--reset", "learner")
    assert place.records("predictions")[BEFORE + 20]["version"] == 0
