"""A new job takes over from an old one: history without a gap and without a double, warm from its first live event."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dataflows.checkpoints import Checkpoints
from dataflows.orderlog import OrderLog
from dataflows.settings import RunDirectory, read_branches
from tests.scenarios import replaying, running
from tests.scenarios.replaying import STREAM, Original, millrace, outputs, plain, wait_until

NEW = (
    ("linear_model.LogisticRegression()", "naive_bayes.GaussianNB()"),
    ("[Fields(", '[Entity("card", [Max("amount")], over="2d", name="more"), Fields('),
)
FOLLOW = ("--groups", "4", "--checkpoint", "0.2", "--follow", "--linger", "0.01", "--durability", "process")


class Handover:
    """An old job that runs and follows its inputs, which are written little by little."""

    def __init__(self, path: Path, order: str, text: str = STREAM) -> None:
        if order == "arrival":  # labels that are at hand first move the clock far ahead of events still to come
            text = text.replace('lateness="1h"', 'lateness="2d"')
        self.old = Original(path, text, order)
        replaying.write_inputs(self.old.events, self.old.labels)
        self.paths = (self.old.events, self.old.labels)
        self.lines = [path.read_bytes().splitlines(keepends=True) for path in self.paths]
        for each in self.paths:
            each.write_bytes(b"")
        self.out = path / "new"
        self.process = running.start(str(self.old.file), self.old.out, *FOLLOW)

    def feed(self, begin: int, end: int) -> None:
        """Append some of the lines, and wait until the job has taken them."""
        for at in range(begin, end, 50):
            for path, lines in zip(self.paths, self.lines, strict=True):
                with path.open("ab") as file:
                    file.write(b"".join(lines[at : min(at + 50, end)]))
            time.sleep(0.05)

    def taken(self, directory: Path) -> int:
        """How many records a run has taken."""
        try:
            found: int = json.loads((directory / "state/status.json").read_bytes())["read"]
        except (FileNotFoundError, json.JSONDecodeError):
            return 0
        return found

    def fed(self, end: int) -> int:
        """How many records there are in the first so many lines."""
        return sum(len(lines[:end]) for lines in self.lines)

    def stop(self) -> None:
        """End what follows."""
        self.process.terminate()
        printed, _ = self.process.communicate(timeout=30)
        assert self.process.returncode == 0, printed

    def bootstrap(self, job: Path, fails: bool = False, out: Path | None = None) -> str:
        """`millrace bootstrap` of a job."""
        words = ["--from-run", str(self.old.out), "--directory", str(out or self.out)]
        return millrace("bootstrap", str(job), *words, fails=fails)

    def history(self) -> dict[str, bytes]:
        """The records of history, one part after the other."""
        found: dict[str, bytes] = {}
        for part in sorted((self.out / "history").iterdir(), key=lambda path: int(path.name)):
            for kind, content in outputs(part).items():
                found[kind] = found.get(kind, b"") + content
        return found


@pytest.fixture(params=["event_time", pytest.param("arrival", marks=pytest.mark.thorough)])
def handover(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Handover]:
    """An old job that runs, in each order."""
    made = Handover(tmp_path, request.param)
    yield made
    if made.process.poll() is None:
        made.process.kill()
        made.process.communicate()


def ids(content: bytes) -> list[int]:
    """Of predictions."""
    return [json.loads(line)["id"] for line in content.splitlines()]


@pytest.mark.parametrize("own", [pytest.param(False, marks=pytest.mark.thorough), True], ids=["", "own"])
def test_a_new_job_takes_over_without_a_gap(handover: Handover, own: bool) -> None:
    """Caught up with twice, then live: each event once in history or the new outputs, as a plain loop over all."""
    elsewhere = handover.old.path / "elsewhere.jsonl"
    place = [("models=Sink()", f"models=Sink(), predictions=Jsonl('{elsewhere}')")] if own else []
    job = handover.old.changed("new_job", *NEW, *place)
    handover.feed(0, 200)
    wait_until(lambda: handover.taken(handover.old.out) >= handover.fed(200), "events")
    handover.bootstrap(job)
    handover.feed(200, 300)
    wait_until(lambda: handover.taken(handover.old.out) >= handover.fed(300), "events")
    handover.bootstrap(job)
    handover.feed(300, 350)
    handover.stop()
    handover.bootstrap(job)
    history = handover.history()
    assert len(ids(history["predictions"])) > 200
    assert not any(outputs(handover.out).values())
    assert not elsewhere.exists() or not elsewhere.read_bytes()

    process = running.start(str(job), handover.out, *FOLLOW)
    handover.feed(350, 500)
    wait_until(lambda: handover.taken(handover.out) >= handover.fed(500), "live events")
    process.terminate()
    process.communicate(timeout=30)
    handover.feed(500, 1000)
    running.run(str(job), handover.out, *replaying.HOW)
    live = outputs(handover.out)
    if own:
        live["predictions"] = elsewhere.read_bytes()
    both = {kind: history.get(kind, b"") + live.get(kind, b"") for kind in history | live}
    found = ids(both["predictions"])
    assert len(found) == len(set(found))
    run = RunDirectory(handover.out)
    entries = [entry for start in read_branches(run) for entry in OrderLog(
        run.order_log(start.branch), writable=False).after(0)]  # fmt: skip
    assert both == plain(job, entries)
    assert "gone on by itself" in handover.bootstrap(job, fails=True)
    assert outputs(handover.out) | ({"predictions": live["predictions"]} if own else {}) == live


@pytest.mark.thorough
def test_what_cannot_be_bootstrapped_is_said(tmp_path: Path) -> None:
    """Into the run itself, a run of another kind, over the old job's outputs, with a changed job, from nowhere."""
    made = Handover(tmp_path, "event_time")
    try:
        made.feed(0, 100)
        wait_until(lambda: made.taken(made.old.out) >= made.fed(100), "events")
        job = made.old.changed("new_job", *NEW)
        assert "is the run itself" in made.bootstrap(job, fails=True, out=made.old.out)
        taken = made.old.changed(
            "taking", *NEW, ("models=Sink()", f"models=Sink(), predictions=Jsonl('{made.old.out}/predictions.jsonl')")
        )
        before = (made.old.out / "predictions.jsonl").read_bytes()
        assert "not empty" in made.bootstrap(taken, fails=True)
        assert (made.old.out / "predictions.jsonl").read_bytes().startswith(before)
        made.bootstrap(job)
        other = made.old.changed("new_job", *NEW, ('over="1d"', 'over="3d"'))
        assert "another declaration" in made.bootstrap(other, fails=True)
        job = made.old.changed("new_job", *NEW)
        made.bootstrap(job)
    finally:
        made.process.kill()
        made.process.communicate()
    words = ("--from-run", str(tmp_path / "nowhere"), "--directory", str(tmp_path / "third"))
    assert "holds no run" in millrace("bootstrap", str(job), *words, fails=True)


@pytest.mark.thorough
def test_a_bootstrap_that_was_killed_goes_on_and_is_not_run_before(tmp_path: Path) -> None:
    """Killed -9 with history half made: `run` refuses to publish the rest of it, `bootstrap` once more completes it."""
    old = Original(tmp_path)
    replaying.write_inputs(old.events, old.labels, 6000)
    running.run(str(old.file), old.out, "--groups", "4", "--batch-size", "20", "--durability", "process")
    job, out = old.changed("new_job", *NEW), RunDirectory(tmp_path / "new")
    words = ("bootstrap", str(job), "--from-run", str(old.out), "--directory", str(out.path))
    process = replaying.begin(*words)
    wait_until(lambda: out.status.exists() or process.poll() is not None, "a bootstrap")
    assert process.poll() is None
    process.kill()
    process.communicate()
    refused = running.start(str(job), out.path)
    printed, _ = refused.communicate(timeout=60)
    assert refused.returncode == 1
    assert "millrace bootstrap" in " ".join(printed.split())
    millrace(*words)
    assert outputs(out.path / "history/1") == plain(job, old.log(), regroup=True)
    assert not any(outputs(out.path).values())
    running.run(str(job), out.path)
    assert Checkpoints(out).newest() is not None


@pytest.mark.thorough
def test_another_lateness_takes_over_too(tmp_path: Path) -> None:
    """A job that holds events back longer: what waited at the end of history is answered live, and nothing twice."""
    made = Handover(tmp_path, "event_time")
    job = made.old.changed("new_job", *NEW, ('lateness="1h"', 'lateness="5h"'))
    try:
        made.feed(0, 300)
        wait_until(lambda: made.taken(made.old.out) >= made.fed(300), "events")
    finally:
        made.stop()
    made.bootstrap(job)
    made.feed(300, 1000)
    running.run(str(job), made.out, *replaying.HOW)
    history, live = made.history(), outputs(made.out)
    found: Any = ids(history["predictions"] + live["predictions"])
    assert len(found) == len(set(found)) == 600
    loaded = replaying.load(job)
    whole = replaying.by_kind(loaded.play(), loaded)
    assert history["predictions"] + live["predictions"] == whole["predictions"]
    assert history["outcomes"] + live["outcomes"] == whole["outcomes"]
