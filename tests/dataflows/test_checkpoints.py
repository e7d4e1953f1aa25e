"""Checkpoints: what is kept and how long, savepoints, and the agent that writes manifests, then drops, then prunes."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dataflows import checkpoints
from dataflows.checkpoints import Agent, Checkpoints, Clocks, Manifest, Retention, missing_parts, openable
from dataflows.control import Control, Phase
from dataflows.recovery import Committed
from dataflows.settings import RunDirectory, Start, dump_branches
from dataflows.state import READER, Lineage, StateError, StateFile, StateStore, Version, group_file
from features import Count, Entity, EntityFeatures
from features.rows import APPEND, GONE, PUT, Change, MemoryRows, put

BEGIN = datetime(2026, 1, 30, 21, 0, tzinfo=UTC)

# -- retention

retentions = st.builds(
    Retention, last=st.integers(1, 4), hourly=st.integers(0, 4), daily=st.integers(0, 4), monthly=st.integers(0, 3)
)
moments = st.lists(st.integers(0, 90 * 24 * 60), min_size=1, max_size=30)


def written(minutes: Iterable[int]) -> list[Manifest]:
    """Manifests of growing versions, written so many minutes after the beginning."""
    times = [(BEGIN + timedelta(minutes=m)).isoformat(timespec="milliseconds") for m in sorted(minutes)]
    return [Manifest(branch=1, batch=batch, written_at=time) for batch, time in enumerate(times, 1)]


@settings(max_examples=100)
@given(retentions, moments)
def test_retention_keeps_the_newest_and_no_more_than_its_sum(retention: Retention, minutes: list[int]) -> None:
    """The newest stays, no more stay than are asked for together, and who stayed stays when it is asked again."""
    manifests = written(minutes)
    kept = retention.kept(manifests)
    assert manifests[-1].version in kept
    assert kept <= {m.version for m in manifests}
    assert len(kept) <= retention.last + retention.hourly + retention.daily + retention.monthly
    assert len(kept) >= min(retention.last, len(manifests))
    again = [m for m in manifests if m.version in kept]
    assert retention.kept(again) == kept == retention.kept(again[::-1])


@settings(max_examples=100)
@given(retentions, moments)
def test_thinning_as_time_goes_on_leaves_what_thinning_at_the_end_would(
    retention: Retention, minutes: list[int]
) -> None:
    """Dropping after every checkpoint loses nothing that a later look would have kept."""
    manifests = written(minutes)
    kept: list[Manifest] = []
    for manifest in manifests:
        kept.append(manifest)
        stay = retention.kept(kept)
        kept = [m for m in kept if m.version in stay]
    assert {m.version for m in kept} == retention.kept(manifests)


@settings(max_examples=100)
@given(moments, st.integers(1, 5))
def test_the_last_of_each_period_stays(minutes: list[int], count: int) -> None:
    """Of hours, days and months the newest ones that have a checkpoint are kept, each with its last."""
    manifests = written(minutes)
    for name, digits in (("hourly", 13), ("daily", 10), ("monthly", 7)):
        retention = Retention(**{"last": 1, "hourly": 0, "daily": 0, "monthly": 0} | {name: count})
        last = {m.written_at[:digits]: m.version for m in manifests}
        assert retention.kept(manifests) == set(sorted(last.values())[-count:])


# -- manifests

names = st.text("abcé/.", min_size=1, max_size=5)
whole = st.integers(0, 1 << 62)
manifests = st.builds(
    Manifest,
    branch=st.integers(1, 1000),
    batch=st.integers(0, 1 << 39),
    epoch=whole,
    written_at=st.just(BEGIN.isoformat()),
    clock=st.none() | st.integers(-(1 << 60), 1 << 60),
    watermark=st.none() | whole,
    offsets=st.dictionaries(names, st.none() | whole | st.lists(whole)),
    sinks=st.dictionaries(names, whole),
    read=whole,
    parts=st.dictionaries(names, st.dictionaries(names, whole)),
    forks=st.lists(st.tuples(st.integers(1, 9), whole), max_size=3).map(tuple),
    bytes=whole,
    stall=st.floats(0, 1e6),
    job=st.dictionaries(names, st.none() | st.booleans() | names | st.floats(allow_nan=False, allow_infinity=False)),
    environment=st.dictionaries(names, names),
)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run's directory with empty state files."""
    return make_run(tmp_path / "run")


def make_run(path: Path) -> RunDirectory:
    """A run's directory with the files of two key groups."""
    made = RunDirectory(path)
    StateStore.create(made.groups, 2)
    return made


@settings(max_examples=50)
@given(manifests)
def test_a_manifest_comes_back_as_it_was(manifest: Manifest) -> None:
    """What is written is what is read, to the last digit."""
    with tempfile.TemporaryDirectory() as directory:
        kept = Checkpoints(RunDirectory(Path(directory)))
        kept.add(manifest)
        assert kept.all() == [manifest]
        assert kept.newest() == kept.find(str(manifest.version)) == manifest


def test_a_damaged_manifest_is_a_clear_error(run: RunDirectory) -> None:
    """Whatever a manifest's file holds that is none, the error names the file and says what to do."""
    kept = Checkpoints(run)
    kept.add(Manifest(branch=1, batch=5))
    kept.add(Manifest(branch=1, batch=7))
    path = next(run.checkpoints.glob("*5.json"))
    content = path.read_bytes()
    for wrong in (
        b"",
        content[: len(content) // 2],
        b'{"branch": 1}',
        b"[]",
        b"\xff\xfe",
        content.replace(b"5", b'"x"'),
    ):
        path.write_bytes(wrong)
        for read in (kept.all, kept.newest, lambda: kept.find("1-7"), lambda: kept.thin(Retention(), ())):
            with pytest.raises(StateError) as caught:
                read()
            assert str(path) in str(caught.value)
            assert "is damaged" in str(caught.value)
            assert "Hint: move it away" in str(caught.value)
    path.rename(run.path / "away")
    assert [m.version for m in kept.all()] == [Version(1, 7)]


# -- finding and naming


@pytest.fixture
def some(run: RunDirectory) -> Checkpoints:
    """Three checkpoints of two branches."""
    kept = Checkpoints(run)
    for minute, (branch, batch) in enumerate([(1, 5), (1, 9), (2, 7)]):
        at = (BEGIN + timedelta(minutes=minute)).isoformat()
        kept.add(Manifest(branch=branch, batch=batch, written_at=at, forks=((1, 5),) if branch == 2 else ()))
    return kept


def test_checkpoints_are_found_by_version_name_and_latest(some: Checkpoints) -> None:
    """A version, a savepoint's name and `latest` each find theirs; the newest is that of the newest branch."""
    some.name("before-monday", some.find("1-9"))
    assert [str(m.version) for m in some.all()] == ["1-5", "1-9", "2-7"]
    assert some.find("1-5").version == Version(1, 5)
    assert some.find("before-monday").version == Version(1, 9)
    assert some.find("latest").version == Version(2, 7)
    assert some.savepoints().keys() == {"before-monday"}


def test_what_is_not_there_is_an_error_that_says_what_is(run: RunDirectory, some: Checkpoints) -> None:
    """An unknown version or name is answered with those that there are."""
    some.name("monday", some.find("1-9"))
    for text in ("1-6", "01-5", "tuesday", ""):
        with pytest.raises(StateError, match=f"no checkpoint or savepoint '{text}'.*1-5, 1-9, 2-7, monday. Hint: "):
            some.find(text)
    empty = Checkpoints(RunDirectory(run.path / "other"))
    assert empty.all() == []
    assert empty.newest() is None
    with pytest.raises(StateError, match=r"no checkpoint or savepoint 'latest'\. There are: none"):
        empty.find("latest")


@pytest.mark.parametrize("name", ["", "latest", "1-5", "a/b", "../a", ".hidden", "a b", "ü", "a\n"])
def test_a_bad_name_is_refused(some: Checkpoints, name: str) -> None:
    """A savepoint's name is no version, no path and nothing that means something else."""
    with pytest.raises(StateError, match="a name begins with a letter"):
        some.name(name, some.find("1-5"))
    assert some.savepoints() == {}


def test_a_name_is_given_once(some: Checkpoints) -> None:
    """A second savepoint of a name is refused, and the first stays; names with dots are names like others."""
    some.name("v1.0", some.find("1-5"))
    some.name("v1.1", some.find("1-9"))
    with pytest.raises(StateError, match=r"there is a savepoint 'v1\.0' already, of 1-5"):
        some.name("v1.0", some.find("1-9"))
    assert {name: m.version.batch for name, m in some.savepoints().items()} == {"v1.0": 5, "v1.1": 9}
    with pytest.raises(StateError, match="there is no savepoint 'v1'"):
        some.unname("v1")


def test_a_checkpoint_dropped_meanwhile_cannot_be_named(some: Checkpoints) -> None:
    """Who names a checkpoint that the launcher has just dropped is told so, and no savepoint without rows is left."""
    manifest = some.find("1-9")
    some.thin(Retention(last=1, hourly=0, daily=0, monthly=0), ())
    with pytest.raises(StateError, match=r"checkpoint 1-9 was dropped just now\. Hint: "):
        some.name("late", manifest)
    assert some.savepoints() == {}


ONE = Retention(last=1, hourly=0, daily=0, monthly=0)


def test_thinning_drops_what_nobody_wants(some: Checkpoints) -> None:
    """What retention does not keep waits to be pruned until it is forgotten; forks and the newest stay."""
    assert some.thin(ONE, [Version(1, 5)]) == [Version(1, 9)]
    assert [str(m.version) for m in some.all()] == ["1-5", "2-7"]
    assert some.thin(ONE, [Version(1, 5)]) == [Version(1, 9)], "as after a kill before it was pruned"
    some.forget(Version(1, 9))
    assert some.thin(ONE, [Version(1, 5)]) == []


def test_a_savepoint_pins_its_checkpoint(some: Checkpoints) -> None:
    """A named checkpoint is neither pruned nor lost by thinning; when the last name goes, it is pruned."""
    some.name("one", some.find("1-9"))
    some.name("other", some.find("1-9"))
    assert some.thin(ONE, [Version(1, 5)]) == []
    assert [str(m.version) for m in some.all()] == ["1-5", "1-9", "2-7"]
    some.unname("one")
    assert some.thin(ONE, [Version(1, 5)]) == []
    assert some.find("1-9") == some.find("other")
    some.unname("other")
    assert [str(m.version) for m in some.all()] == ["1-5", "2-7"]
    assert some.thin(ONE, [Version(1, 5)]) == [Version(1, 9)]


def test_a_savepoint_of_a_checkpoint_that_is_kept_anyway_goes_without_a_trace(some: Checkpoints) -> None:
    """Taking a name away leaves the checkpoint itself alone."""
    some.name("now", some.find("latest"))
    some.unname("now")
    assert some.thin(Retention(), [Version(1, 5)]) == []
    assert [str(m.version) for m in some.all()] == ["1-5", "1-9", "2-7"]


def test_the_newest_stays_when_the_clock_goes_back(some: Checkpoints) -> None:
    """Retention goes by the wall clock, but what a resume needs does not depend on it."""
    some.add(Manifest(branch=2, batch=8, written_at=(BEGIN - timedelta(hours=1)).isoformat(), forks=((1, 5),)))
    some.thin(ONE, [Version(1, 5)])
    assert some.find("latest").version == Version(2, 8)


# -- opening


def commit(run: RunDirectory, version: Version, changes: dict[tuple[str, str], list[Change]]) -> None:
    """What the steps of a run write at a checkpoint."""
    for (name, step), some in changes.items():
        file = StateFile(run.groups / f"{name}.sqlite3", name)
        file.write(step, version, some, complete=True)
        file.close()


@pytest.fixture
def opened(run: RunDirectory) -> Manifest:
    """A checkpoint of which everything is there: of branch 2, which began at 1-5."""
    commit(run, Version(1, 5), {(READER, "read"): [put("head", 1)], ("000", "learner"): [put("model/null", [1, 2])]})
    commit(run, Version(1, 8), {("000", "learner"): [put("model/null", "of the branch that was left")]})
    commit(run, Version(2, 9), {(READER, "read"): [put("head", 2)], ("001", "learner"): [put("model/null", [3])]})
    parts = {READER: {"read": 9}, "000": {"learner": 5}, "001": {"learner": 9}}
    return Manifest(branch=2, batch=9, forks=((1, 5),), parts=parts)


def test_a_whole_checkpoint_can_be_opened(run: RunDirectory, opened: Manifest) -> None:
    """Where every row is as written there is nothing to say, also without the right to write."""
    assert openable(opened, run) is None
    store = StateStore(run.groups, opened.lineage, writable=False)
    assert missing_parts(opened, store) == []
    assert store.step("000", "learner").rows.get("model/null") == [[1, 2]]
    store.close()


def test_what_is_missing_of_a_checkpoint_is_said(run: RunDirectory, opened: Manifest) -> None:
    """A file that was put back from before the checkpoint lacks a step's state; a file that is gone is missing."""
    older = StateFile(run.groups / "001.sqlite3", "001")
    older.roll_back(Version(2, 5))
    older.close()
    assert openable(opened, run) == f"{run.groups / '001.sqlite3'} lacks step learner of batch 9"
    for name in (READER, "000", "001"):
        away = run.path / name
        (run.groups / f"{name}.sqlite3").rename(away)
        wrong = openable(opened, run)
        assert wrong is not None
        assert f"the state file {run.groups / name}.sqlite3 is missing. Hint: " in wrong
        away.rename(run.groups / f"{name}.sqlite3")


def test_the_fork_of_another_branch_does_not_stand_in(run: RunDirectory, opened: Manifest) -> None:
    """A batch of the same number that another branch wrote is not the one a checkpoint needs."""
    parts = opened.parts | {"000": {"learner": 8}}
    assert openable(Manifest(branch=2, batch=9, forks=((1, 5),), parts=parts), run) is not None
    assert openable(Manifest(branch=1, batch=8, parts={"000": {"learner": 8}}), run) is None


@pytest.mark.parametrize("name", [READER, "000", "001"])
def test_a_damaged_row_makes_only_the_checkpoints_unopenable_that_need_it(
    run: RunDirectory, opened: Manifest, name: str
) -> None:
    """What is wrong with a checkpoint names file and step; a checkpoint that does not read the row can be opened."""
    commit(run, Version(2, 12), {("000", "learner"): [put("model/null", 12)], (READER, "read"): [put("head", 3)]})
    file = StateFile(run.groups / f"{name}.sqlite3", name)
    file.query("UPDATE rows SET value = x'4e2e' WHERE version IN (?, ?)", (opened.version.number, Version(1, 5).number))
    file.close()
    wrong = openable(opened, run)
    assert wrong is not None
    step = "read" if name == READER else "learner"
    assert f"{name}.sqlite3 (step {step}) is damaged" in wrong
    later = Manifest(branch=2, batch=12, forks=((1, 5),), parts={"000": {"learner": 12}, READER: {"read": 12}})
    assert (openable(later, run) is None) == (name != "001" or "001" not in later.parts)


# -- the agent


class Engine:
    """Stands for the workers and the engine: writes state, and says what is committed."""

    def __init__(self, run: RunDirectory) -> None:
        self.run = run
        self.start = Start()
        self.branches = [self.start]
        run.branches.write_bytes(dump_branches((self.start,)))
        self.found = Committed(1, None, {}, {})
        self.agent = self.new_agent(Retention())

    def new_agent(self, retention: Retention, expiry: dict[str, int] | None = None) -> Agent:
        """The launcher's agent, as after a start."""
        self.agent = Agent(
            self.run, self.start, {"name": "sums"}, retention, lambda: self.found, {"python": "3"}, expiry or {}
        )
        return self.agent

    def commit(self, batch: int, changes: list[Change], group: int = 0, sinks: dict[str, int] | None = None) -> None:
        """A checkpoint: the reader and a learner write, the engine commits."""
        version = Version(self.start.branch, batch)
        some = {(READER, "read"): [put("head", batch)], (group_file(group), "learner"): changes}
        commit(self.run, version, some)
        parts = {name: dict(steps) for name, steps in self.found.parts.items()}
        parts[READER] = {"read": batch}
        parts[group_file(group)] = {"learner": batch}
        reader = {
            "batch": batch,
            "clock": batch * 10,
            "watermark": batch * 10 - 5,
            "offsets": {"events.jsonl": [batch * 100, batch]},
            "read": batch * 2,
            "questions": batch,
            "open": 3,
        }
        self.found = Committed(self.found.epoch + 1, reader, parts, self.found.sinks | (sinks or {}))

    def commit_features(self, batch: int, clock: int, changes: Iterable[Change]) -> None:
        """A checkpoint at an event time, with what a feature step of group 0 writes."""
        commit(self.run, Version(self.start.branch, batch), {("000", "features_card"): list(changes)})
        self.commit(batch, [])
        assert self.found.reader is not None
        self.found.reader["clock"] = clock

    def branch(self, origin: Manifest) -> None:
        """Go on from a checkpoint, as a start with --from does."""
        forks = (*origin.forks, (origin.branch, origin.batch))
        self.start = Start(branch=self.start.branch + 1, batch=origin.batch, forks=forks, sinks=origin.sinks)
        self.branches.append(self.start)
        self.run.branches.write_bytes(dump_branches(tuple(self.branches)))
        self.found = Committed(1, None, {}, {})
        Checkpoints(self.run).add(origin)


@pytest.fixture
def engine(run: RunDirectory) -> Iterator[Engine]:
    """An engine and its agent in a run's directory."""
    made = Engine(run)
    yield made
    made.agent.close()


def test_a_manifest_says_what_the_engine_committed(run: RunDirectory, engine: Engine) -> None:
    """Batch, positions, counts, the state's parts, what it cost, the job and the environment are in the manifest."""
    assert engine.agent.look() is None, "nothing is committed yet"
    Control(run.control).note_published()
    Control(run.control).note_resumed()
    engine.commit(4, [put("model/null", 4)], sinks={"predictions": 70})
    before = datetime.now(UTC)
    manifest = engine.agent.look()
    assert manifest is not None
    assert manifest == Checkpoints(run).newest()
    assert manifest.version == Version(1, 4)
    assert (manifest.epoch, manifest.clock, manifest.watermark) == (2, 40, 35)
    assert (manifest.read, manifest.questions, manifest.open) == (8, 4, 3)
    assert manifest.offsets == {"events.jsonl": [400, 4]}
    assert manifest.sinks == {"predictions": 70}
    assert manifest.parts == {READER: {"read": 4}, "000": {"learner": 4}, "001": {}}
    assert manifest.forks == ()
    assert manifest.job == {"name": "sums"}
    assert manifest.environment == {"python": "3"}
    assert before - timedelta(seconds=1) <= datetime.fromisoformat(manifest.written_at) <= datetime.now(UTC)
    assert 0 < manifest.stall < 1
    assert manifest.bytes == sum(len(key) + len(value) for key, _, value in (put("head", 4), put("model/null", 4)))
    assert openable(manifest, run) is None
    assert engine.agent.look() is None, "nothing is new"

    engine.commit(6, [("model/null", APPEND, b"")], group=1)
    second = engine.agent.look()
    assert second is not None
    assert second.parts == {READER: {"read": 6}, "000": {"learner": 4}, "001": {"learner": 6}}
    assert second.sinks == {"predictions": 70}
    assert second.bytes == len("head") + len(put("head", 6)[2]) + len("model/null")


def test_a_start_without_news_writes_no_second_manifest(run: RunDirectory, engine: Engine) -> None:
    """A new launcher knows what the one before wrote, and writes what it did not come to write."""
    engine.commit(4, [put("a", 4)])
    first = engine.agent.look()
    assert engine.new_agent(Retention()).look() is None
    engine.commit(5, [put("a", 5)])
    second = engine.new_agent(Retention()).look()
    assert first is not None
    assert second is not None
    assert Checkpoints(run).all() == [first, second]
    assert second.bytes == len("head") + len(put("head", 5)[2]) + len("a") + len(put("a", 5)[2])


def test_the_manifest_is_there_before_anything_goes(
    run: RunDirectory, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pin, then drop, then prune, then forget: a kill at any place leaves every manifest with all its rows."""
    agent = engine.new_agent(Retention(last=1, hourly=0, daily=0, monthly=0))
    seen: list[tuple[str, list[str], Phase]] = []

    def watched(self: StateFile, after: int, dropped: int, until: int) -> int:
        files = sorted(path.name for path in run.checkpoints.iterdir())
        seen.append((self.path.stem, files, Control(run.control).launcher))
        for manifest in Checkpoints(run).all():
            assert openable(manifest, run) is None
        return merge(self, after, dropped, until)

    merge = StateFile.merge
    monkeypatch.setattr(StateFile, "merge", watched)
    engine.commit(4, [put("a", 4)])
    agent.look()
    assert seen == []
    engine.commit(6, [put("a", 6)])
    Control(run.control).launcher = Phase.WATCHING
    agent.look()
    there = ["1-000000000004.dropped", "1-000000000006.json"]
    assert seen == [(name, there, Phase.PRUNE) for name in ("000", "001", READER)]
    assert [path.name for path in run.checkpoints.iterdir()] == there[1:]
    assert Control(run.control).launcher == Phase.WATCHING
    file = StateFile(run.groups / "000.sqlite3", "000")
    assert file.query("SELECT count(*) FROM rows") == [(1,)]
    file.close()


@pytest.mark.parametrize("merges", [0, 1, 2])
def test_what_a_kill_left_half_pruned_is_pruned_after_the_next_start(
    run: RunDirectory, engine: Engine, monkeypatch: pytest.MonkeyPatch, merges: int
) -> None:
    """A launcher killed between dropping and pruning, in any file, leaves a note that the next one acts on."""
    agent = engine.new_agent(ONE)
    engine.commit(4, [put("a", 4), put("b", 4)])
    agent.look()
    engine.commit(6, [put("a", 6)])
    left = iter([None] * merges)

    def killed(self: StateFile, after: int, dropped: int, until: int) -> int:
        next(left)
        return merge(self, after, dropped, until)

    merge = StateFile.merge
    monkeypatch.setattr(StateFile, "merge", killed)
    with pytest.raises(StopIteration):
        agent.look()
    agent.close()
    monkeypatch.undo()
    assert [str(m.version) for m in Checkpoints(run).all()] == ["1-6"]
    assert list(run.checkpoints.glob("*.dropped"))
    engine.commit(7, [("b", GONE, b"")])
    engine.new_agent(ONE).look()
    assert [path.name for path in run.checkpoints.iterdir()] == ["1-000000000007.json"]
    file = StateFile(run.groups / "000.sqlite3", "000")
    assert file.query("SELECT key, version FROM rows") == [("a", Version(1, 6).number)]
    file.close()


def test_on_a_new_branch_forks_and_untouched_parts_stay(run: RunDirectory, engine: Engine) -> None:
    """A branch's manifests name the state of steps that nothing happened to since the fork, and the fork stays."""
    agent = engine.new_agent(ONE)
    engine.commit(4, [put("a", 4)], sinks={"predictions": 70, "rejects": 5})
    origin = agent.look()
    assert origin is not None
    engine.branch(origin)
    agent.close()
    agent = engine.new_agent(ONE)
    for batch in (5, 7, 9):
        engine.commit(batch, [put("b", batch)], group=1, sinks={"predictions": batch * 20})
        newest = agent.look()
        assert newest is not None
        assert newest.parts == {READER: {"read": batch}, "000": {"learner": 4}, "001": {"learner": batch}}
        assert newest.sinks == {"predictions": batch * 20, "rejects": 5}
        assert newest.forks == ((1, 4),)
        assert openable(newest, run) is None
        assert openable(origin, run) is None
        assert [str(m.version) for m in Checkpoints(run).all()] == ["1-4", f"2-{batch}"]


def test_a_fork_stays_when_the_run_goes_on_from_elsewhere(run: RunDirectory, engine: Engine) -> None:
    """A savepoint of a branch that was left can still be opened: where the branch began is not pruned."""
    engine.new_agent(ONE)
    origins = []
    for batch in (4, 6, 8):
        engine.commit(batch, [put("a", batch), put(f"of {batch}", batch)])
        origin = engine.agent.look()
        assert origin is not None
        Checkpoints(run).name(f"at{batch}", origin)
        origins.append(origin)
    engine.branch(origins[0])
    engine.new_agent(ONE)
    engine.commit(5, [put("b", 5)])
    trial = engine.agent.look()
    assert trial is not None
    Checkpoints(run).name("trial", trial)
    engine.branch(origins[1])
    engine.new_agent(ONE)
    for batch in (4, 6, 8):
        Checkpoints(run).unname(f"at{batch}")
    for batch in (7, 8, 9):
        engine.commit(batch, [put("a", batch)])
        engine.agent.look()
    assert [str(m.version) for m in Checkpoints(run).all()] == ["1-4", "1-6", "2-5", "3-9"]
    assert openable(trial, run) is None
    file = StateFile(run.groups / "000.sqlite3", "000")
    assert dict(file.rows("learner", trial.lineage).scan("")) == {"a": [4], "b": [5], "of 4": [4]}
    assert [key for (key,) in file.query("SELECT key FROM rows ORDER BY version")].count("of 8") == 0
    file.close()


def test_retention_follows_the_wall_clock(run: RunDirectory, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two days of checkpoints every hour leave the newest, the last of some hours and of each day."""

    class Clock:
        now_ = BEGIN

        @classmethod
        def now(cls, zone: Any) -> datetime:
            return cls.now_

    monkeypatch.setattr(checkpoints, "datetime", Clock)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # no power is lost here
    agent = engine.new_agent(Retention(last=2, hourly=2, daily=9, monthly=9))
    for batch in range(1, 2 * 24 * 2 + 1):
        Clock.now_ = BEGIN + timedelta(minutes=30 * (batch - 1))
        engine.commit(batch, [put("a", batch)])
        agent.look()
    kept = Checkpoints(run).all()
    times = [datetime.fromisoformat(m.written_at).strftime("%m-%dT%H:%M") for m in kept]
    assert times == ["01-30T23:30", "01-31T23:30", "02-01T19:30", "02-01T20:00", "02-01T20:30"]
    assert all(openable(manifest, run) is None for manifest in kept)
    file = StateFile(run.groups / "000.sqlite3", "000")
    assert file.query("SELECT count(*) FROM rows") == [(len(kept),)]
    file.close()


HOUR = 3_600_000_000


def test_entities_that_expired_leave_no_rows_and_may_come_back(run: RunDirectory, engine: Engine) -> None:
    """Rows of entities that equal one never seen in all retained checkpoints go, and a later event is kept whole."""
    cards = Entity("card", [Count()], over="1h")
    engine.new_agent(ONE, {"features_card": HOUR})
    features = EntityFeatures(cards, rows=MemoryRows())
    gone, stays, back = ("c-gone", 0), ("c-stays", 10), ("c-back", 0)
    for hours, some in ((0, (gone, back)), (2, (stays,)), (4, (stays,)), (6, (stays,))):
        for card, minute in some:
            features.observe(card, hours * HOUR + minute, ())
        engine.commit_features(hours + 1, hours * HOUR, features.changes())
        engine.agent.look()
    file = StateFile(run.groups / "000.sqlite3", "000")

    def found() -> list[str]:
        return file.rows("features_card", Lineage([], Version(1, 100))).keys()

    assert found() == ['"c-stays']
    features.observe("c-back", 6 * HOUR + 1, ())
    features.observe("c-back", 6 * HOUR + 2, ())
    engine.commit_features(8, 6 * HOUR + 2, features.changes())
    engine.agent.look()
    assert found() == ['"c-back', '"c-stays']
    rebuilt = EntityFeatures(cards, rows=file.rows("features_card", Lineage([], Version(1, 8))))
    assert rebuilt.read("c-back", 6 * HOUR + 3) == features.read("c-back", 6 * HOUR + 3) == (2,)
    assert rebuilt.read("c-gone", 6 * HOUR + 3) == (0,)
    file.close()


def test_damaged_clocks_do_not_stop_a_start(run: RunDirectory, engine: Engine) -> None:
    """What is remembered of event times only says what may go: a damaged file of it is begun anew."""
    path = run.state / "clocks.json"
    for wrong in (b"", b"[[1,", b'{"1": 2}', b"[[1]]", b"\xff\xfe"):
        path.write_bytes(wrong)
        assert Clocks(path, Version(1, 9)).last_before("anyone", HOUR) is None
        engine.new_agent(ONE, {"features_card": HOUR})
    engine.commit(4, [put("a", 4)])
    engine.agent.look()
    assert Clocks(path, Version(1, 9)).last_before("anyone", HOUR) == Version(1, 4).number


def test_event_times_of_what_was_rolled_back_are_not_remembered(run: RunDirectory) -> None:
    """A version that is made again may reach other event times."""
    run.state.mkdir(exist_ok=True)
    clocks = Clocks(run.state / "clocks.json", Version(1, 0))
    for batch in (3, 5, 8):
        clocks.note(Manifest(branch=1, batch=batch, clock=batch * HOUR), 0)
    again = Clocks(run.state / "clocks.json", Version(1, 5))
    assert again.last_before("anyone", 9 * HOUR) == Version(1, 5).number
    again.note(Manifest(branch=1, batch=6, clock=6 * HOUR), 0)
    assert again.last_before("anyone", 9 * HOUR) == Version(1, 6).number


def test_manifests_of_what_will_be_rolled_back_are_dropped(run: RunDirectory, engine: Engine) -> None:
    """Checkpoints and savepoints that are newer go by name; nothing of them is pruned, as the rows are others' then."""
    agent = engine.new_agent(Retention(last=9))
    for batch in (4, 6, 8):
        engine.commit(batch, [put("a", batch)])
        manifest = agent.look()
        assert manifest is not None
        Checkpoints(run).name(f"at{batch}", manifest)
    engine.commit(9, [put("a", 9)])
    agent.look()
    (run.checkpoints / "1-000000000009.json").rename(run.checkpoints / "1-000000000009.dropped")
    assert Checkpoints(run).drop_newer(Version(1, 4)) == ["1-6", "1-8", "at6", "at8"]
    assert [str(m.version) for m in Checkpoints(run).all()] == ["1-4"]
    assert Checkpoints(run).savepoints().keys() == {"at4"}
    assert [path.name for path in run.checkpoints.iterdir()] == ["1-000000000004.json"]
    assert Checkpoints(run).drop_newer(Version(1, 4)) == []


class AgentMachine(RuleBasedStateMachine):
    """The agent under commits, restarts, kills, branches and savepoints: what has a manifest reads as it was."""

    names = st.sampled_from("abc")

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp())
        self.engine = Engine(make_run(self.directory))
        self.held: dict[str, int] = {}
        self.was: dict[Version, dict[str, int]] = {}
        self.batch = 0
        self.retention = ONE

    def teardown(self) -> None:
        """Leave nothing behind."""
        self.engine.agent.close()
        shutil.rmtree(self.directory)

    @property
    def kept(self) -> Checkpoints:
        """The manifests."""
        return Checkpoints(self.engine.run)

    @initialize(last=st.integers(1, 3))
    def begin(self, last: int) -> None:
        """Some retention."""
        self.retention = Retention(last=last, hourly=0, daily=0, monthly=0)
        self.engine.agent.close()
        self.engine.new_agent(self.retention)

    @rule(
        changes=st.dictionaries(names, st.booleans(), min_size=1),
        further=st.integers(1, 3),
        seen=st.sampled_from([1, 1, 0]),
    )
    def commit(self, changes: dict[str, bool], further: int, seen: int) -> None:
        """A checkpoint; the agent may be too late to see it before the next."""
        self.batch += further
        some: list[Change] = []
        for key, stays in changes.items():
            if stays:
                self.held[key] = self.batch
                some.append((key, PUT, put(key, self.batch)[2]))
            else:
                self.held.pop(key, None)
                some.append((key, GONE, b""))
        self.engine.commit(self.batch, some)
        self.was[Version(self.engine.start.branch, self.batch)] = dict(self.held)
        if seen:
            self.engine.agent.look()

    @rule(which=st.integers(0, 9))
    def branch(self, which: int) -> None:
        """Go on from any checkpoint."""
        found = self.kept.all()
        if not found:
            return
        origin = found[which % len(found)]
        self.engine.branch(origin)
        self.engine.agent.close()
        self.engine.new_agent(self.retention)
        self.batch, self.held = origin.batch, dict(self.was[origin.version])

    @precondition(lambda self: len(self.kept.savepoints()) < 3)
    @rule(which=st.integers(0, 9))
    def name(self, which: int) -> None:
        """A savepoint of any checkpoint."""
        found = self.kept.all()
        if found:
            manifest = found[which % len(found)]
            name = next(name for name in "xyz" if name not in self.kept.savepoints())
            self.kept.name(name, manifest)

    @precondition(lambda self: self.kept.savepoints())
    @rule(which=st.integers(0, 2))
    def unname(self, which: int) -> None:
        """A savepoint goes."""
        names = sorted(self.kept.savepoints())
        self.kept.unname(names[which % len(names)])

    @rule()
    def restart(self) -> None:
        """Another launcher."""
        self.engine.agent.close()
        self.engine.new_agent(self.retention).look()

    @invariant()
    def every_manifest_can_be_opened_and_reads_as_it_was(self) -> None:
        """Also those of branches that were left."""
        for manifest in self.kept.all():
            assert openable(manifest, self.engine.run) is None
            file = StateFile(self.engine.run.groups / "000.sqlite3", "000", writable=False)
            found = {key: parts[0] for key, parts in file.rows("learner", manifest.lineage).scan("")}
            file.close()
            assert found == self.was[manifest.version], manifest.version


TestAgent = AgentMachine.TestCase
TestAgent.settings = settings(max_examples=12, stateful_step_count=20)
