"""Replay and bootstrap from the command line: the same again, what would have been, and the way over to a new job."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner

from dataflows.checkpoints import Checkpoints
from dataflows.cli import app
from dataflows.orderlog import OrderLogError
from dataflows.settings import RunDirectory
from dataflows.state import StateError
from tests.scenarios import replaying, running
from tests.scenarios.replaying import DELAYED, STREAM, Original, files, millrace, outputs, plain, wait_until

LINEAR = "linear_model.LogisticRegression()"
LATENESS = 'lateness="1h"'
MORE = ("[Fields(", '[Entity("shop", [Count(), Max("amount")], over="6h", name="more"), Fields(')


@pytest.fixture(scope="module", params=["event_time", "arrival"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Original:
    """A run in each order, with a stream of labels, that was killed in between."""
    made = Original(tmp_path_factory.mktemp(request.param), STREAM, request.param)
    replaying.write_inputs(made.events, made.labels)
    made.run_and_kill(6)
    return made


@pytest.fixture(scope="module")
def delayed(tmp_path_factory: pytest.TempPathFactory) -> Original:
    """A run whose labels are in the events and known after three days."""
    made = Original(tmp_path_factory.mktemp("delayed"), DELAYED)
    replaying.write_inputs(made.events, made.labels, mixed=0)
    made.run()
    return made


def tail(run: Original, manifest: Any) -> dict[str, bytes]:
    """What a run wrote after a checkpoint."""
    return {kind: content[manifest.sinks.get(kind, 0) :] for kind, content in run.outputs().items()}


# -- the same again


@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_second_half_again_is_computed_and_the_same(run: Original, tmp_path: Path, workers: str) -> None:
    """With the records and the learn log deleted a replay gives their bytes, and changes no file of the run."""
    manifest = run.checkpoint(0.5)
    wanted = tail(run, manifest)
    assert all(wanted.values())
    assert len(wanted["predictions"]) < len(run.outputs()["predictions"])
    bare = Original(tmp_path)
    bare.file.write_text(run.file.read_text())
    shutil.copytree(run.out, bare.out)
    shutil.rmtree(bare.out / "state/learned")
    for kind in wanted:
        (bare.out / f"{kind}.jsonl").unlink()
    before = files(bare.out)
    bare.replay(tmp_path / "again", "--from", str(manifest.version), "--workers", workers)
    assert outputs(tmp_path / "again") == wanted
    assert files(bare.out) == before


def test_a_batch_between_checkpoints_is_where_records_begin(run: Original, tmp_path: Path) -> None:
    """The batches from the checkpoint to there are worked on and give no record of any kind, rejects included."""
    log = run.log()
    for manifest in Checkpoints(run.directory).all():
        if 3 < manifest.batch < len(log) - 1:
            next(run.directory.checkpoints.glob(f"*-{manifest.batch:012d}.json")).rename(tmp_path / f"{manifest.batch}")
    try:
        number = len(log) // 3
        run.replay(tmp_path / "again", "--from", f"1-{number}", "--until", f"1-{number * 2}")
    finally:
        for kept in tmp_path.iterdir():
            if kept.name.isdecimal():
                kept.rename(run.directory.checkpoints / f"1-{int(kept.name):012d}.json")
    assert outputs(tmp_path / "again") == plain(run.file, log[: number * 2], quiet=number)


def test_state_and_audit_work_in_a_fork_from_the_middle(run: Original, tmp_path: Path) -> None:
    """The state is that of the run, also between checkpoints and at wall times; the audit passes."""
    manifest, log = run.checkpoint(0.4), run.log()
    run.replay(tmp_path / "again", "--from", str(manifest.version))
    there, here = (["--directory", str(each), "--json"] for each in (run.out, tmp_path / "again"))
    job, last = str(run.file), len(log)
    moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(log[-3].at // 1000)) + f".{log[-3].at % 1000:03d}Z"
    for branch, options in (
        (2, ["--at", "latest"]),
        (2, ["--at", "%d-" + str(manifest.batch + 3)]),
        (2, ["--at", "1970-01-04T02:00:05Z"]),
        (2, ["--known-at", moment]),
        (1, ["--at", str(manifest.version)]),
    ):
        told = []
        for number, words in ((1, there), (branch, here)):
            asked = [option % number if "%" in option else option for option in options]
            told.append(json.loads(look("state", job, *asked, *words)))
        for one in told:
            del one["written_at"], one["bytes"], one["stall"], one["checkpoint"]
        assert told[0] == told[1], options
    listed = json.loads(look("checkpoints", job, "--verify", *here))
    assert [row["checkpoint"] for row in listed][-1] == f"2-{last}"
    assert not any(row["fault"] for row in listed)
    assert "all is as it was" in millrace("audit", job, "--all", "--directory", str(tmp_path / "again"))
    with pytest.raises(OrderLogError, match=r"order log .* is missing"):
        look("state", job, "--at", "1-3", *here)
    assert "order log" in run_replay(run, tmp_path / "again", tmp_path / "more", "--from", "start")
    run_replay(run, tmp_path / "again", tmp_path / "third", "--from", f"2-{last - 4}", fails=False)
    assert all(outputs(tmp_path / "again")[kind].endswith(some) for kind, some in outputs(tmp_path / "third").items())


def look(*words: str) -> str:
    """A command that changes nothing, in this process."""
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def run_replay(run: Original, source: Path, output: Path, *options: str, fails: bool = True) -> str:
    """A replay of another directory of a run."""
    return millrace("replay", str(run.file), "--directory", str(source), "--output", str(output), *options, fails=fails)


@pytest.mark.thorough
def test_a_killed_replay_goes_on_with_the_same_command(run: Original, tmp_path: Path) -> None:
    """Killed -9 at several moments, then the same command: the same bytes; `latest` stays what it was."""
    words = ["replay", str(run.file), "--directory", str(run.out), "--output", str(tmp_path / "again")]
    words += ["--until", "latest"]
    target = RunDirectory(tmp_path / "again")
    moments = [
        lambda: (target.state / "fork.json").exists(),
        lambda: target.branches.exists(),
        lambda: target.job.exists(),
        lambda: target.status.exists(),
    ]
    for moment in moments:
        process = replaying.begin(*words)
        wait_until(lambda moment=moment, process=process: moment() or process.poll() is not None, "a replay")  # type: ignore[misc]
        process.send_signal(signal.SIGKILL)
        process.communicate()
    millrace(*words)
    assert outputs(tmp_path / "again") == run.outputs()
    assert "another --output" in run.replay(tmp_path / "again", "--from", "1-4", fails=True)


@pytest.mark.thorough
def test_a_fork_killed_while_its_rows_are_copied_is_made_again(run: Original, tmp_path: Path) -> None:
    """Files of rows, branches and an order log without a job: the same command begins anew there."""
    manifest = run.checkpoint(0.5)
    words = ("--from", str(manifest.version))
    target = RunDirectory(tmp_path / "again")
    run.replay(tmp_path / "again", *words)
    wanted = outputs(target.path)
    target.job.unlink()
    for kind in wanted:
        (target.path / f"{kind}.jsonl").unlink()
    run.replay(tmp_path / "again", *words)
    assert outputs(target.path) == wanted == tail(run, manifest)


@pytest.mark.thorough
def test_a_run_that_goes_on_meanwhile_can_be_replayed(tmp_path: Path) -> None:
    """While a run follows its inputs, drops checkpoints and prunes, replays of it are exact."""
    live = Original(tmp_path)
    replaying.write_inputs(live.events, live.labels)
    rows = [path.read_bytes().splitlines(keepends=True) for path in (live.events, live.labels)]
    for path in (live.events, live.labels):
        path.write_bytes(b"")
    how = [*replaying.HOW[:-4], "--checkpoint", "0.2", "--keep-last", "3", "--follow", "--linger", "0.01"]
    process = running.start(str(live.file), live.out, *how)
    try:

        def feed(begin: int, end: int) -> None:
            for at in range(begin, end, 30):
                for path, some in zip((live.events, live.labels), rows, strict=True):
                    with path.open("ab") as file:
                        file.write(b"".join(some[at : at + 30]))
                time.sleep(0.1)

        feed(0, 300)
        wait_until(lambda: len(Checkpoints(live.directory).all()) > 0, "checkpoints")
        replays = [
            replaying.begin(
                "replay", str(live.file), "--directory", str(live.out), "--output", str(tmp_path / name), *options
            )
            for name, options in (("all", []), ("half", ["--from", "latest"]))
        ]
        feed(300, 600)
        for each in replays:
            printed, _ = each.communicate(timeout=60)
            assert each.returncode == 0, printed
    finally:
        process.terminate()
        process.communicate(timeout=30)
    written = live.outputs()
    again, half = outputs(tmp_path / "all"), outputs(tmp_path / "half")
    assert again["predictions"].count(b"\n") > 200
    for kind, content in again.items():
        assert written[kind].startswith(content)
        assert half.get(kind, b"") in written[kind]
    live.replay(tmp_path / "all")  # what came since
    assert outputs(tmp_path / "all") == live.outputs()


@pytest.mark.thorough
def test_each_way_of_a_run_with_branches_can_be_gone_again(tmp_path: Path) -> None:
    """After going back: the newest way, the one that was left, and a time on either."""
    run = Original(tmp_path)
    replaying.write_inputs(run.events, run.labels, 300, mixed=0)
    run.run()
    old, first = run.outputs(), run.log()
    manifest = run.checkpoint(0.5)
    run.events.write_text(run.events.read_text() + json.dumps({"id": 900, "t": 185_000, "card": "c1", "shop": "s1",
                                                               "amount": 3.5, "fraud": False}) + "\n")  # fmt: skip
    run.run("--from", str(manifest.version), "--batch-size", "7")
    new, begin = run.outputs(), f"1-{max(manifest.batch - 3, 1)}"
    assert new["predictions"] != old["predictions"]
    run.replay(tmp_path / "new")
    assert outputs(tmp_path / "new") == new
    run.replay(tmp_path / "old", "--until", f"1-{len(first)}")
    assert outputs(tmp_path / "old") == old
    run.replay(tmp_path / "a", "--from", begin)
    run.replay(tmp_path / "b", "--from", begin, "--until", f"1-{len(first)}")
    for name, whole in (("a", new), ("b", old)):
        made = outputs(tmp_path / name)
        assert all(whole[kind].endswith(content) for kind, content in made.items())
        assert made["predictions"]
    later = "1970-01-02T23:00:05Z"
    run.replay(tmp_path / "c", "--from", later, "--until", f"1-{len(first)}")
    run.replay(tmp_path / "d", "--from", f"1-{len(first) - 2}", "--until", later.replace("-02T", "-03T"))
    assert old["predictions"].endswith(outputs(tmp_path / "c")["predictions"])
    branch = Checkpoints(run.directory).newest()
    assert branch is not None
    said = run.replay(tmp_path / "e", "--from", f"1-{len(first)}", "--until", str(branch.version), fails=True)
    assert "does not go through" in said


# -- what would have been


def counts(a: dict[str, bytes], b: dict[str, bytes], kind: str) -> tuple[int, int, Counter[str]]:
    """By a naive comparison: records with a partner, those that are equal, and by field those that differ."""
    rows = [{row["id"]: row for row in map(json.loads, some[kind].splitlines())} for some in (a, b)]
    both = rows[0].keys() & rows[1].keys()
    differ: Counter[str] = Counter()
    for id in both:
        one, other = rows[0][id], rows[1][id]
        differ.update(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
        names = one.get("features", {}).keys() | other.get("features", {}).keys()
        differ.update(f"features.{name}" for name in names if one["features"].get(name) != other["features"].get(name))
        del differ["features"]
    return len(both), sum(rows[0][id] == rows[1][id] for id in both), differ


def assert_diff(a: Path, b: Path) -> None:
    """`millrace diff` finds what a naive comparison finds, and says by its exit code whether that is anything."""
    differ = outputs(a) != outputs(b)
    result = CliRunner().invoke(app, ["diff", str(a), str(b), "--json"], catch_exceptions=False)
    assert result.exit_code == int(differ)
    found = json.loads(result.output)["kinds"]
    for kind in ("predictions", "outcomes"):
        both, equal, fields = counts(outputs(a), outputs(b), kind)
        assert (found[kind]["both"], found[kind]["equal"]) == (both, equal)
        told = found[kind]["fields"] | {f"features.{name}": each for name, each in found[kind]["parts"].items()}
        assert {name: each["differ"] for name, each in told.items() if each["differ"]} == fields


def test_another_model_over_the_same_order(run: Original, tmp_path: Path) -> None:
    """Records and differences are those of a plain loop of the changed job over the order log."""
    other = run.changed("other_model", (LINEAR, "linear_model.LogisticRegression(l2=0.5)"))
    run.replay(tmp_path / "other", "--with", str(other))
    wanted = plain(other, run.log())
    assert outputs(tmp_path / "other") == wanted
    assert wanted["predictions"] != run.outputs()["predictions"]
    assert_diff(run.out, tmp_path / "other")


@pytest.mark.thorough
def test_the_same_model_differs_in_nothing(run: Original, tmp_path: Path) -> None:
    """A copy of the job file over the same order log gives the same bytes, and the diff says so by its exit code."""
    run.replay(tmp_path / "same", "--with", str(run.changed("copy")), "--workers", "2")
    assert outputs(tmp_path / "same") == run.outputs()
    assert_diff(run.out, tmp_path / "same")


def test_labels_two_days_earlier(delayed: Original, tmp_path: Path) -> None:
    """A shorter delay: what the changed job, played over everything, gives."""
    other = delayed.changed("earlier", ('delay="3d"', 'delay="1d"'))
    delayed.replay(tmp_path / "other", "--with", str(other))
    job = replaying.load(other)
    assert outputs(tmp_path / "other") == {
        kind: some for kind, some in replaying.by_kind(job.play(), job).items() if some
    }
    assert_diff(delayed.out, tmp_path / "other")


@pytest.mark.thorough
@pytest.mark.parametrize("lateness", ["1m", "5h"])
def test_another_lateness(run: Original, tmp_path: Path, lateness: str) -> None:
    """Held back longer or less long, all events are answered as by the changed job, played over everything."""
    other = run.changed(f"late_{lateness}", (LATENESS, f'lateness="{lateness}"'))
    run.replay(tmp_path / "other", "--with", str(other))
    job = replaying.load(other)
    found, wanted = outputs(tmp_path / "other"), replaying.by_kind(job.play(), job)
    rejects = [sorted(some.pop("rejects").splitlines()) for some in (found, wanted)]  # those of a batch come first
    assert found == wanted
    assert rejects[0] == rejects[1]
    if lateness == "1m":  # more comes too late; nothing comes later than an hour
        assert outputs(tmp_path / "other")["predictions"] != run.outputs()["predictions"]
    assert_diff(run.out, tmp_path / "other")
    at = "1970-01-03T02:00:05Z"  # between checkpoints of a directory whose batches are other ones
    past, job = job.at(at, tmp_path / "other"), job
    try:
        assert 0 < past.manifest.questions <= 310
        assert past.manifest.open == len(past.open_questions())
    finally:
        past.close()


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["corrected.jsonl", "labels.jsonl"])
def test_corrected_labels(run: Original, tmp_path: Path, name: str) -> None:
    """Other verdicts, other times and one that was broken before: as many lines, and the changed truth."""
    rows = [json.loads(line) for line in run.labels.read_text().splitlines() if "broken" not in line]
    for row in rows[::5]:
        row["fraud"] = not row["fraud"]
    for row in rows[::7]:
        row["t"] += 4000
    lines = [json.dumps(row) for row in rows]
    place = run.labels.read_text().splitlines().index("{broken")
    lines.insert(place, json.dumps({"id": 3, "t": rows[place]["t"], "fraud": True}))
    (tmp_path / "new").mkdir()
    corrected = tmp_path / "new" / name
    corrected.write_text("".join(line + "\n" for line in lines))
    run.replay(tmp_path / "other", "--labels", str(corrected))
    log = [json.loads(json.dumps(entry.pulls).replace("labels.jsonl", name)) for entry in run.log()]
    entries = [
        msgspec.structs.replace(entry, pulls=[(part, count) for part, count in pulls])
        for entry, pulls in zip(run.log(), log, strict=True)
    ]
    assert outputs(tmp_path / "other") == plain(run.file, entries, regroup=True, labels=corrected)
    assert_diff(run.out, tmp_path / "other")
    said = run.replay(
        tmp_path / "late", "--from", str(run.checkpoint(0.5).version), "--labels", str(corrected), fails=True
    )
    assert "--from start" in said or "cut or replaced" in said


@pytest.mark.thorough
def test_a_change_from_the_middle_is_taken_up_or_refused(run: Original, tmp_path: Path) -> None:
    """A feature more begins empty there; another model needs --reset learner, and with it the replay works."""
    origin = ("--from", str(run.checkpoint(0.5).version))
    run.replay(tmp_path / "more", *origin, "--with", str(run.changed("more", MORE)))
    first = json.loads(outputs(tmp_path / "more")["predictions"].splitlines()[0])
    assert first["features"]["count_6h_by_more"] <= 20
    asked = {json.loads(line)["id"] for line in outputs(tmp_path / "more")["predictions"].splitlines()}
    assert asked == {json.loads(line)["id"] for line in tail(run, run.checkpoint(0.5))["predictions"].splitlines()}
    other = str(run.changed("other", (LINEAR, "linear_model.LogisticRegression(l2=0.5)")))
    assert "--reset learner" in run.replay(tmp_path / "other", *origin, "--with", other, fails=True)
    run.replay(tmp_path / "other", *origin, "--with", other, "--reset", "learner")
    assert outputs(tmp_path / "other")["predictions"]


def test_what_cannot_be_replayed_is_said(run: Original, tmp_path: Path) -> None:
    """No such checkpoint, the end before the beginning, a directory that is taken, inputs that were cut."""
    new = tmp_path / "new"
    assert "no checkpoint or savepoint" in run.replay(new, "--from", "1-99999x", fails=True)
    assert "lies before" in run.replay(new, "--from", "1-9", "--until", "1-5", fails=True)
    assert "is the run itself" in run.replay(run.out, fails=True)
    assert "not empty" in run.replay(run.path, fails=True)
    assert not new.exists()
    cut = tmp_path / "cut" / run.events.name
    cut.parent.mkdir()
    cut.write_bytes(b"".join(run.events.read_bytes().splitlines(keepends=True)[:-50]))
    assert "more records than are there now" in run.replay(new, "--data", str(cut), fails=True)


def test_what_was_known_at_a_time_of_the_clock(run: Original) -> None:
    """Between two batches as a plain loop up to the first of them; with an event time what of it was known by then."""
    log, where = run.log(), ("--directory", str(run.out), "--json")

    def clock(at: int) -> str:
        return datetime.fromtimestamp(at / 1000, UTC).isoformat(timespec="milliseconds")

    for place in (len(log) // 4, len(log) // 2, len(log) - 1):
        number = max(entry.number for entry in log if entry.at <= log[place].at)
        told = json.loads(look("state", str(run.file), "--known-at", clock(log[place].at), *where))
        made = plain(run.file, log[:number])
        assert told["events"] == made["predictions"].count(b"\n")
        assert told["open"] == told["events"] - made["outcomes"].count(b"\n")
        at = json.loads(
            look("state", str(run.file), "--known-at", clock(log[place].at), "--at", "1970-01-02T00:00:05Z", *where)
        )
        assert at["events"] <= told["events"]
        assert at["event_time"] <= "1970-01-02 00:00"
    for options, said in (
        (["--known-at", "1999-01-01"], "nothing yet"),
        (["--known-at", "noon"], "is no time"),
        (["--known-at", clock(log[5].at), "--at", "1-3"], "is one batch"),
    ):
        with pytest.raises(StateError, match=said):
            look("state", str(run.file), *options, *where)


@pytest.mark.thorough
def test_a_run_without_batches_gives_none(tmp_path: Path) -> None:
    """Of empty inputs nothing is made again, without an error."""
    empty = Original(tmp_path)
    for path in (empty.events, empty.labels):
        path.write_text("")
    empty.run()
    empty.replay(tmp_path / "again")
    assert not any(outputs(tmp_path / "again").values())
