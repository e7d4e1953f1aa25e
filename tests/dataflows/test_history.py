"""State between checkpoints: any batch and any event time, as a fresh run of the same events would have it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dataflows.checkpoints import Checkpoints
from dataflows.cli import app
from dataflows.history import ReplayedState
from dataflows.job import Job
from dataflows.order import Batch, Reader
from dataflows.orderlog import OrderLog
from dataflows.replay import PlainRun, inputs_of
from dataflows.runtime import load_job
from dataflows.settings import RunDirectory
from dataflows.state import StateError
from tests.scenarios.test_branches import Place


class Run:
    """A run to the end, of which every fifth checkpoint is left."""

    def __init__(self, path: Path, order: str) -> None:
        place = Place(path)
        if order == "arrival":
            rows = place.events.read_bytes().splitlines()
            rng = random.Random(4)  # a little out of order
            mixed = [rows[i] for i in sorted(range(len(rows)), key=lambda i: i + rng.uniform(0, 8))]
            place.events.write_bytes(b"\n".join(mixed) + b"\n")
            place.declare(
                ("import Event, Job", "import Event, Job, Time"),
                ("    metrics=[", '    time=Time(order="arrival", lateness="10m"),\n    metrics=['),
            )
        place.run()
        self.place = place
        self.job: Job = load_job(str(place.file))
        self.directory = RunDirectory(place.out)
        for number, manifest in enumerate(Checkpoints(self.directory).all()):
            if number % 5:
                next(self.directory.checkpoints.glob(f"*-{manifest.batch:012d}.json")).unlink()

    def at(self, when: str) -> Any:
        """Its state."""
        return self.job.at(when, self.place.out)

    def batches(self) -> list[Batch]:
        """All batches as they were formed."""
        log = OrderLog(self.directory.order_log(1), writable=False)
        reader = Reader(inputs_of(self.job), self.job.time, log=log)
        found = []
        while reader.replaying:
            batch = reader.next_batch()
            assert batch is not None
            found.append(batch)
        reader.close()
        return found

    def fresh(self, batches: list[Batch]) -> PlainRun:
        """A plain loop that has worked on these batches and no more."""
        plain = PlainRun(self.job, Reader(inputs_of(self.job), self.job.time))
        plain.reader.close()
        for batch in batches:
            list(plain.process(plain.admit.admit(batch)))
        return plain


@pytest.fixture(scope="module", params=["event_time", "arrival"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs in both orders."""
    return Run(tmp_path_factory.mktemp(request.param), request.param)


def assert_same(run: Run, past: Any, plain: PlainRun) -> None:
    """Every feature of every card and shop, every open question, the model, the metrics."""
    clock = plain.admit.clock or 0
    for field, keys in (("card", [f"c{i}" for i in range(11)]), ("shop", [f"s{i}" for i in range(5)])):
        for key in keys:
            expected = {
                name: value
                for declaration, features in zip(run.job.entities, plain.features, strict=True)
                if declaration.key == (field,)
                for name, value in zip(declaration.feature_names, features.read(key, clock), strict=True)
            }
            assert past.features(**{field: key}) == expected
    asked = dict(plain.learner.open_questions())
    assert [(q.number, q.id, q.output, q.model_version) for q in past.open_questions()] == [
        (number, kept[0], kept[3], kept[5]) for number, kept in sorted(asked.items())
    ]
    found, expected_model = past.model(), plain.learner.models().get(None)
    if expected_model is None:
        assert found is None
    else:
        assert found.version == expected_model[1]
        assert dict(found.model["LogisticRegression"].weights) == dict(expected_model[0]["LogisticRegression"].weights)
    assert past.metrics() == plain.publisher.evaluator.values()


@pytest.mark.parametrize("number", [1, 6, 7, 8, 20, 21, 34, 44, 45])
def test_any_batch_can_be_opened(run: Run, number: int) -> None:
    """On a checkpoint, right after one, before the first, at the end: as a fresh run up to that batch."""
    kept = {str(manifest.version) for manifest in Checkpoints(run.directory).all()}
    assert kept
    past = run.at(f"1-{number}")
    try:
        assert isinstance(past, ReplayedState) == (f"1-{number}" not in kept)
        assert str(past.manifest.version) == f"1-{number}"
        assert_same(run, past, run.fresh(run.batches()[:number]))
    finally:
        past.close()


def up_to(run: Run, moment: int) -> list[Batch]:
    """The batches of a fresh run whose input is cut at an event time; in order of arrival: cut at the batch."""
    batches: list[Batch] = []
    for batch in run.batches():
        inside = [item for item in batch.items if item[0] <= moment]
        if len(inside) == len(batch.items):
            batches.append(batch)
            continue
        if run.job.time.order == "event_time":
            batches.append(Batch(batch.number, inside, batch.rejects, batch.watermark, False))
        break
    return batches


@pytest.mark.parametrize("second", [0, 5, 10, 1234, 1390, 1400, 1401, 4567, 8000, 8989, 99_999])
def test_any_event_time_can_be_asked_for(run: Run, second: int) -> None:
    """By event time: all events up to then and no other; in order of arrival: the last batch before a later one."""
    past = run.at(f"1970-01-02T{(second - 86_400) // 3600:02d}:46:39Z" if second > 86_400 else _text(second))
    try:
        assert_same(run, past, run.fresh(up_to(run, second * 1_000_000)))
    finally:
        past.close()


def test_twenty_random_times_are_those_of_fresh_runs(run: Run) -> None:
    """Features, models, open questions and metrics, wherever between checkpoints the times fall, or on one."""
    rng = random.Random(12)
    clocks = [manifest.clock for manifest in Checkpoints(run.directory).all() if manifest.clock is not None]
    moments = [rng.randrange(9_000) * 1_000_000 for _ in range(17)] + rng.sample(clocks, 3)
    for moment in moments:
        past = run.at(_text(moment // 1_000_000))
        try:
            assert_same(run, past, run.fresh(up_to(run, moment)))
        finally:
            past.close()


def _text(second: int) -> str:
    return f"1970-01-01T{second // 3600:02d}:{second // 60 % 60:02d}:{second % 60:02d}Z"


@pytest.mark.parametrize(("when", "said"), [("1-4600", "batch 4600"), ("2-3", "'2-3'"), ("noon", "'noon'")])
def test_what_was_never_there_is_said(run: Run, when: str, said: str) -> None:
    """A batch beyond the end, a branch that is not there, no time at all."""
    with pytest.raises(StateError, match=said):
        run.at(when)


def test_looking_changes_nothing(run: Run) -> None:
    """The order log, the state files and the records stay as they are."""
    files = [file for file in sorted(run.place.out.rglob("*")) if file.is_file() and "sqlite3-" not in file.name]
    before = {file: file.read_bytes() for file in files}
    run.at("1-10").close()
    assert {file: file.read_bytes() for file in files} == before


@pytest.mark.parametrize("origin", ["start", "1-11", "checkpoint", "1970-01-01T01:10:05Z"])
def test_a_replay_makes_the_records_again(run: Run, tmp_path: Path, origin: str) -> None:
    """From the start, a batch, a checkpoint or a time to the end: byte for byte the rest of what the run wrote."""
    kept = Checkpoints(run.directory).all()
    named = str(kept[0].version) if origin == "checkpoint" else origin
    command = ["replay", str(run.place.file), "--directory", str(run.place.out), "--output", str(tmp_path / "again")]
    result = CliRunner().invoke(app, [*command, "--from", named])
    assert result.exit_code == 0, result.output
    for kind in ("predictions", "outcomes", "metrics"):
        whole = (run.place.out / f"{kind}.jsonl").read_bytes()
        again = (tmp_path / "again" / f"{kind}.jsonl").read_bytes()
        assert again
        assert whole.endswith(again)
        if origin == "start":
            assert whole == again
        if origin == "checkpoint":
            assert whole[kept[0].sinks.get(kind, 0) :] == again


def test_a_replay_ends_where_it_is_told(run: Run, tmp_path: Path) -> None:
    """Up to a batch, a time before a later event, and a batch that is not there."""
    command = ["replay", str(run.place.file), "--directory", str(run.place.out)]
    CliRunner().invoke(app, [*command, "--output", str(tmp_path / "a"), "--from", "1-5", "--until", "1-9"])
    fresh = [b for b in run.batches() if 5 < b.number <= 9]
    assert len((tmp_path / "a/predictions.jsonl").read_bytes().splitlines()) == sum(len(b.items) for b in fresh)
    CliRunner().invoke(app, [*command, "--output", str(tmp_path / "b"), "--until", "1970-01-01T01:10:05Z"])
    early = next(b for b in run.batches() if any(item[0] > 4_205_000_000 for item in b.items))
    again = load_job(str(run.place.file)).at("latest", tmp_path / "b")
    assert again.manifest.batch == early.number - 1
    again.close()
    for options, said in (
        (["--until", "1-4600"], "batch 4600"),
        (["--from", "1-9", "--until", "1-5"], "lies before"),
        (["--output", str(run.place.out)], "the run itself"),
    ):
        result = CliRunner().invoke(app, [*command, "--output", str(tmp_path / "c"), *options])
        assert said in str(result.exception)


def test_a_replay_goes_into_a_directory_of_its_own(run: Run, tmp_path: Path) -> None:
    """Where other files lie nothing is written; where it was begun it goes on, and what is complete stays as it is."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    command = ["replay", str(run.place.file), "--directory", str(run.place.out), "--output"]
    assert "not empty" in str(CliRunner().invoke(app, [*command, str(tmp_path / "full")]).exception)
    for _ in range(2):
        result = CliRunner().invoke(app, [*command, str(tmp_path / "again")])
        assert result.exit_code == 0, result.output
        for kind in ("predictions", "outcomes", "metrics"):
            assert (tmp_path / f"again/{kind}.jsonl").read_bytes() == (run.place.out / f"{kind}.jsonl").read_bytes()


@pytest.mark.parametrize("when", ["1-6", "1-20", "1970-01-01T00:30:05Z"])
def test_all_that_a_checkpoint_tells_is_told_between_them(run: Run, when: str) -> None:
    """How many entities there are, each of them, and where the reader stands: as of then, not as of the checkpoint."""
    past = run.at(when)
    try:
        plain = run.fresh(run.batches()[: past.manifest.batch])
        for step, declaration, features in zip(past.layout.features, run.job.entities, plain.features, strict=True):
            keys = dict(past.entities(step))
            assert past.counts()[step] == len(keys)
            for key in keys:
                found = past.features(**{declaration.key[0]: key})
                assert tuple(found[name] for name in declaration.feature_names) == features.read(key, past.clock)
        # At a time within a batch the reader has formed that batch.
        assert past.reader()["reader"][0]["number"] - past.manifest.batch in ({0} if "-" in when[:3] else {0, 1})
    finally:
        past.close()
