"""The versioned state store against a plain dict of histories; damage, other hands on the files, failing writes."""

from __future__ import annotations

import os
import pickle
import shutil
import sqlite3
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, precondition, rule

from dataflows.state import FORMAT, READER, Lineage, StateError, StateFile, StateStore, Version, group_file, sync
from features.rows import APPEND, GONE, PUT, Change, put

STEPS = ("read", "learner")
KEYS = ("", "a", "a/1", '"ü', chr(0x10FFFE))
PREFIXES = ("", "a", "a/", '"', "z")

Held = dict[str, list[int]]
"""What a step holds: by key the parts."""


# -- the store and its model


class StoreMachine(RuleBasedStateMachine):
    """A state file under all that a run, its agent and its restarts do to it, beside dicts that say what it holds."""

    versions = Bundle("versions")
    wishes = st.lists(st.tuples(st.sampled_from(KEYS), st.sampled_from((PUT, APPEND, GONE))), max_size=4)

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp())
        self.file = StateFile(self.directory / "000.sqlite3", "000", create=True)
        self.forks: list[Version] = []
        self.branch = 1
        self.batch = 0
        self.numbers = dict.fromkeys(STEPS, 0)
        self.touched: set[str] = set()
        self.tip: dict[str, Held] = {step: {} for step in STEPS}
        self.complete: dict[str, Version] = {}
        self.retained: dict[Version, tuple[list[Version], dict[str, Held], dict[str, Version]]] = {}
        self.committed: set[Version] = set()
        self.unfinished: list[Version] = []
        self.given: set[tuple[str, str, Version]] = set()
        self.again: set[tuple[str, str, Version]] = set()
        self.parts = 0

    def teardown(self) -> None:
        """Leave nothing behind."""
        self.file.close()
        shutil.rmtree(self.directory)

    # -- a run

    @rule(step=st.sampled_from(STEPS), wishes=wishes, further=st.integers(1, 3))
    def flush(self, step: str, wishes: list[tuple[str, int]], further: int) -> None:
        """Some batches pass, then a step writes before a checkpoint asks for it."""
        self.batch += further
        self.write(step, wishes, self.batch, complete=False)
        self.touched.add(step)

    @rule(target=versions, wishes=st.tuples(wishes, wishes), further=st.integers(1, 2))
    def commit(self, wishes: tuple[list[tuple[str, int]], ...], further: int) -> Version:
        """Batches pass, and a checkpoint: the reader always writes, other steps when something happened to them."""
        self.batch += further
        for step, some in zip(STEPS, wishes, strict=True):
            if step == "read" or some:
                self.write(step, some, self.batch, complete=True)
            elif step in self.touched:
                self.write(step, [], self.numbers[step], complete=True)
        return self.committed_now()

    @precondition(lambda self: self.newest() == Version(self.branch, self.batch))
    @rule(key=st.sampled_from(KEYS))
    def commit_again(self, key: str) -> None:
        """An epoch without a batch: the reader's head is written once more at the version that is there."""
        version = self.committed_now()
        self.again.add(("read", key, version))  # what it supersedes waits for the next pruning after it
        self.write("read", [(key, PUT)], self.batch, complete=True)
        self.committed_now()

    def write(self, step: str, wishes: list[tuple[str, int]], number: int, complete: bool) -> None:
        """Write to the file and to the reference."""
        self.numbers[step] = number
        changes = list(self.changes(step, wishes))
        self.file.write(step, Version(self.branch, number), iter(changes), complete)
        if complete:
            self.complete[step] = Version(self.branch, number)

    def changes(self, step: str, wishes: list[tuple[str, int]]) -> Iterator[Change]:
        """Turn wishes into what holders give."""
        held = self.tip[step]
        version = Version(self.branch, self.numbers[step])
        for key, wish in wishes:
            # A holder adds only to what is there, and asks for no more than one addition per batch.
            kind = PUT if wish == APPEND and (key not in held or (step, key, version) in self.given) else wish
            self.given.add((step, key, version))
            self.parts += 1
            if kind == GONE:
                held.pop(key, None)
            else:
                held[key] = [*(held[key] if kind == APPEND else ()), self.parts]
            yield key, kind, b"" if kind == GONE else pickle.dumps(self.parts)

    def committed_now(self) -> Version:
        """The engine has taken the version."""
        self.touched.clear()
        version = Version(self.branch, self.batch)
        held = {step: dict(some) for step, some in self.tip.items()}
        self.retained[version] = list(self.forks), held, dict(self.complete)
        self.committed.add(version)
        return version

    # -- starts

    @rule()
    def restart(self) -> None:
        """A kill and a start: what was never committed is rolled back."""
        fork = self.forks[-1] if self.forks else None
        start = self.newest() or Version(self.branch, fork.batch if fork else 0)
        self.file.close()
        self.file = StateFile(self.directory / "000.sqlite3", "000")
        self.file.roll_back(start)
        self.go_on(start.batch, self.newest() or fork)

    @rule(origin=versions)
    def new_branch(self, origin: Version) -> None:
        """Go on from an older checkpoint; what the branch before had not committed is left where it is."""
        if origin not in self.retained:
            return
        self.forks = [*self.retained[origin][0], origin]
        self.branch += 1
        self.go_on(origin.batch, origin)

    def go_on(self, batch: int, held: Version | None) -> None:
        """After a start the state is that of a version, and no step has anything unwritten."""
        self.tip = {step: dict(self.retained[held][1][step]) if held else {} for step in STEPS}
        self.complete = dict(self.retained[held][2]) if held else {}
        self.batch = batch
        self.touched.clear()
        self.given = {each for each in self.given if each[2] <= Version(self.branch, batch)}

    # -- the agent

    def newest(self) -> Version | None:
        """The newest checkpoint of the branch that is written."""
        return max((version for version in self.retained if version.branch == self.branch), default=None)

    def needed(self) -> set[Version]:
        """What has a manifest, and where branches began that something with a manifest lies on."""
        return {*self.retained, *self.forks, *(fork for forks, *_ in self.retained.values() for fork in forks)}

    def droppable(self) -> list[Version]:
        """What retention may drop: not the newest, and nothing that a branch began at."""
        forks = {*self.forks, *(fork for forks, *_ in self.retained.values() for fork in forks)}
        return sorted(set(self.retained) - forks - {self.newest()})

    @precondition(lambda self: self.unfinished or self.droppable())
    @rule(chosen=st.sets(st.integers(0, 5), min_size=1), killed=st.booleans())
    def prune(self, chosen: set[int], killed: bool) -> None:
        """Retention drops versions, and rows go; after a kill on the way the agent does it once more, later."""
        droppable = self.droppable()
        dropped = {droppable[place % len(droppable)] for place in chosen} if droppable else set()
        for version in dropped:
            del self.retained[version]
        waiting = sorted({*dropped, *self.unfinished})
        prune(self.file, waiting, self.needed())
        self.unfinished = waiting if killed else []

    @rule()
    def move_log(self) -> None:
        """SQLite moves its log into the file."""
        self.file.move_log()

    # -- what must hold

    @invariant()
    def reads_as_the_reference(self) -> None:
        """Every retained version, and the tip as a run sees it that goes on, reads as the reference says."""
        for version, (forks, expected, complete) in self.retained.items():
            self.compare(Lineage(forks, version), expected)
            assert all(self.file.holds(step, at) for step, at in complete.items()), version
        self.compare(Lineage(self.forks, Version(self.branch, self.batch)).on_from_here(), self.tip)

    def compare(self, lineage: Lineage, expected: dict[str, Held]) -> None:
        """All ways to read give the reference's parts."""
        for step in STEPS:
            rows, held = self.file.rows(step, lineage), expected[step]
            assert {key: parts for key in KEYS if (parts := rows.get(key))} == held, (step, lineage.tip)
            for prefix in PREFIXES:
                found = sorted((key, parts) for key, parts in held.items() if key.startswith(prefix))
                assert list(rows.scan(prefix)) == found, (step, lineage.tip, prefix)
                assert rows.keys(prefix) == [key for key, _ in found]
            assert not (rows.empty() and held)

    @precondition(lambda self: not self.unfinished)
    @invariant()
    def superseded_rows_are_gone(self) -> None:
        """Of all the checkpoints between two retained ones a key has the rows of the last that wrote it."""
        needed = self.needed()
        there: dict[tuple[Any, ...], list[Version]] = {}
        sql = "SELECT steps.name, key, version, kind FROM rows JOIN steps ON steps.id = step ORDER BY version"
        for step, key, number, kind in self.file.query(sql):
            version = Version.of(number)
            checkpoint = min((v for v in self.committed if v.branch == version.branch and v >= version), default=None)
            until = min((v for v in needed if v.branch == version.branch and v >= version), default=None)
            if until is None:
                assert checkpoint is None, f"{key!r} of {version} is there, and all after it was dropped"
                continue
            assert checkpoint is not None
            older = there.setdefault((step, key, until), [])
            if kind != APPEND and (step, key, version) not in self.again:
                assert all(each == checkpoint for each in older), f"{key!r} is there from {older} for {until}"
            older.append(checkpoint)


def prune(file: StateFile, dropped: Iterable[Version], retained: Iterable[Version]) -> int:
    """What `dataflows.checkpoints.Agent` has a file do for dropped versions; how many rows went."""
    removed = 0
    for version in dropped:
        mine = sorted(each for each in retained if each.branch == version.branch)
        after = max((each.number for each in mine if each < version), default=Version(version.branch, 0).number)
        until = min((each.number for each in mine if each > version), default=None)
        if until is None:
            removed += file.drop_after(after, version.branch)
        else:
            removed += file.merge(after, version.number, until)
    return removed


TestStore = StoreMachine.TestCase
TestStore.settings = settings(max_examples=25, stateful_step_count=30)


def open_files(directory: Path) -> list[str]:
    """The files of a directory that this process has open."""
    found = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            found.append(os.readlink(descriptor))
    return [path for path in found if path.startswith(str(directory))]


def held(file: StateFile, version: Version, step: str = "s", forks: Iterable[Version] = ()) -> dict[str, list[Any]]:
    """All that a step holds at a version."""
    return dict(file.rows(step, Lineage(forks, version)).scan(""))


@pytest.fixture
def file(tmp_path: Path) -> Iterator[StateFile]:
    """An empty state file."""
    made = StateFile(tmp_path / "000.sqlite3", "000", create=True)
    yield made
    made.close()


# -- what goes and what stays


def test_a_part_of_a_lineage_ends_where_it_is_said_to() -> None:
    """The way to a version of an earlier branch knows nothing of what came after it, on its own branch and later."""
    lineage = Lineage([Version(1, 10), Version(2, 12)], Version(3, 15))
    for until, inside, outside in (
        (Version(3, 13), [(1, 10), (2, 12), (3, 13)], [(1, 11), (2, 13), (3, 14)]),
        (Version(2, 11), [(1, 10), (2, 11)], [(1, 11), (2, 12), (3, 11)]),
        (Version(1, 4), [(1, 0), (1, 4)], [(1, 5), (1, 10), (2, 11), (3, 11)]),
    ):
        part = lineage.until(until)
        assert all(part.holds(Version(*each).number) for each in inside), until
        assert not any(part.holds(Version(*each).number) for each in outside), until
        assert part.on_from_here().holds(Version(until.branch, 1 << 39).number)


def test_a_place_in_the_file_is_not_given_twice(file: StateFile) -> None:
    """A deletion that goes as the file's last row leaves no place that makes a newer row look older than it is."""
    file.write("s", Version(1, 3), [put("j", 3), put("k", 3)], complete=True)
    file.write("s", Version(1, 5), [("k", APPEND, pickle.dumps(5))], complete=True)
    file.write("s", Version(1, 10), [put("j", 10), ("k", GONE, b"")], complete=True)
    retained = {Version(1, 10)}
    prune(file, [Version(1, 3), Version(1, 5)], retained)
    file.write("s", Version(1, 11), [put("j", 11)], complete=True)
    prune(file, [Version(1, 3)], retained)  # once more, as after a kill
    assert held(file, Version(1, 10)) == {"j": [10]}
    assert held(file, Version(1, 11)) == {"j": [11]}


def test_rows_are_bounded_by_what_is_retained(file: StateFile) -> None:
    """Of keys that are rewritten, added to, and that come and go, pruning leaves what the newest versions need."""
    counts = []
    for batch in range(1, 201):
        changes = [put(f"rewritten/{key}", batch) for key in range(20)]
        changes += [put(f"passing/{batch}", batch), (f"passing/{batch - 1}", GONE, b"")]
        changes += [("added", PUT if batch % 10 == 1 else APPEND, pickle.dumps(batch))]
        file.write("s", Version(1, batch), changes, complete=True)
        if batch > 3:
            prune(file, [Version(1, batch - 3)], [Version(1, batch - back) for back in range(3)])
        counts.append(file.query("SELECT count(*) FROM rows")[0][0])
    assert max(counts) <= 3 * 20 + 3 * 2 + 20
    assert max(counts[100:]) == max(counts[50:100]), "the file grows without an end"
    assert file.query("SELECT count(*) FROM commits") == [(3,)]
    assert held(file, Version(1, 200))["added"] == list(range(191, 201))


def test_a_retained_version_costs_what_changed(file: StateFile) -> None:
    """1,000 retained versions of 10,000 keys of 1 KB, 100 of them changed in each, take 10 MB + 100 MB, not 10 GB."""
    keys, versions, changed, size = 10_000, 1_000, 100, 1024
    value = bytes(size)
    file.write("s", Version(1, 1), ((f"{key:05d}", PUT, value) for key in range(keys)), complete=True)
    for batch in range(2, versions + 1):
        some = ((batch * changed + place) % keys for place in range(changed))
        file.write("s", Version(1, batch), ((f"{key:05d}", PUT, value) for key in some), complete=True)
    file.move_log()
    content = (keys + (versions - 1) * changed) * size
    assert content < file.path.stat().st_size < 1.5 * content
    for batch in (1, 2, 500, versions):
        rows = file.rows("s", Lineage([], Version(1, batch)))
        assert len(rows.keys("00")) == 1000
    assert file.bytes_since(Version(1, 1), Version(1, versions)) == (versions - 1) * changed * (size + 5)


def test_bytes_since_counts_what_checkpoints_wrote(file: StateFile) -> None:
    """What was flushed before a checkpoint counts to it, whatever the step; and nothing counts twice."""
    file.write("s", Version(1, 2), [("ab", PUT, b"12345")])
    file.write("s", Version(1, 3), [("ab", PUT, b"1")], complete=True)
    file.write("t", Version(1, 3), [("c", GONE, b"")], complete=True)
    file.write("s", Version(1, 4), [], complete=True)
    assert file.holds("s", Version(1, 4))
    assert not file.holds("t", Version(1, 4))
    assert file.bytes_since(Version(1, 0), Version(1, 3)) == 7 + 3 + 1
    assert file.bytes_since(Version(1, 3), Version(1, 4)) == 0


def test_a_version_that_is_written_again_counts_as_one(file: StateFile) -> None:
    """An epoch without a batch writes the reader's head once more at its version: bytes add up, older rows still go."""
    file.write("s", Version(1, 7), [("head", PUT, b"123")], complete=True)
    file.write("s", Version(1, 10), [("other", PUT, b"12345")], complete=True)
    file.write("s", Version(1, 10), [("head", PUT, b"1")], complete=True)
    file.write("s", Version(1, 10), [("head", PUT, b"12")], complete=True)
    assert file.bytes_since(Version(1, 7), Version(1, 10)) == 10 + 5 + 6
    assert prune(file, [Version(1, 7)], [Version(1, 10)]) == 1
    found = file.query("SELECT key, version, value FROM rows ORDER BY key")
    assert found == [("head", Version(1, 10).number, b"12"), ("other", Version(1, 10).number, b"12345")]


def test_a_step_sees_its_own_first_rows(tmp_path: Path) -> None:
    """The rows of a step that never wrote are empty, and filled after its first write; files may be made twice."""
    StateStore.create(tmp_path, 2)
    StateStore.create(tmp_path, 2)
    store = StateStore(tmp_path, Lineage([], Version(1, 0)))
    state = store.step(group_file(1), "learner")
    assert state.rows.empty()
    assert state.rows.get("a") == state.rows.keys() == []
    state.write(1, [put("a", 1)], complete=True)
    assert state.rows.get("a") == [1]
    assert not state.rows.empty()
    assert store.file("001").steps == ["learner"]
    assert store.file(READER).steps == []
    sync(tmp_path)
    store.close()


def test_forgotten_keys_leave_no_rows_and_others_all_of_theirs(file: StateFile) -> None:
    """Keys that were not touched after a version go from every state; those that were keep what came before, too."""
    file.write("s", Version(1, 1), [put("gone", 1), put("back", 1), put("late", 1)], complete=True)
    file.write("t", Version(1, 1), [put("gone", 1)], complete=True)
    file.write("s", Version(1, 2), [("gone", APPEND, pickle.dumps(2)), put("ended", 2)], complete=True)
    file.write("s", Version(1, 3), [("back", APPEND, pickle.dumps(3)), ("ended", GONE, b"")], complete=True)
    file.write("s", Version(1, 4), [put("late", 4)], complete=True)
    assert file.forget("s", 0, Version(1, 2).number) == 2
    assert held(file, Version(1, 3)) == {"back": [1, 3], "late": [1]}
    assert held(file, Version(1, 2)) == {"back": [1], "ended": [2], "late": [1]}
    assert held(file, Version(1, 4), "t") == {"gone": [1]}
    assert file.forget("s", 0, Version(1, 2).number) == file.forget("never", 0, Version(1, 2).number) == 0


def test_a_step_that_wrote_later_is_forgotten_too(tmp_path: Path, file: StateFile) -> None:
    """Whoever prunes opens a file once, maybe before a step of another process has ever written to it."""
    pruner = StateFile(tmp_path / "000.sqlite3", "000")
    file.write("s", Version(1, 1), [put("gone", 1)], complete=True)
    file.write("s", Version(1, 5), [put("stays", 5)], complete=True)
    assert pruner.forget("s", 0, Version(1, 2).number) == 1
    assert held(file, Version(1, 5)) == {"stays": [5]}
    pruner.close()


# -- damage


def make_file(path: Path) -> Path:
    """A file with three branches, from 1-10 and 2-12."""
    file = StateFile(path, "000", create=True)
    file.write("learner", Version(1, 4), [put("old", "of branch 1")], complete=True)
    file.write("learner", Version(1, 10), [put("model/null", [1] * 50), put("many/1", 1)], complete=True)
    file.write(
        "features_card", Version(1, 10), [put('"c1', (None, [1])), ('"c2', PUT, b"\x80\x05K\x02.")], complete=True
    )
    file.write("learner", Version(2, 12), [("many/1", APPEND, pickle.dumps(2))], complete=True)
    file.write("learner", Version(3, 11), [put("many/2", 3)], complete=True)
    file.write("features_card", Version(3, 15), [("many/2", GONE, b""), put('"c3', "text")], complete=True)
    file.close()
    return path


TIP = Lineage([Version(1, 10), Version(2, 12)], Version(3, 15))


def alter(path: Path, key: str, column: str, to: Callable[[Any], Any]) -> None:
    """Change a column of a row behind the store's back."""
    with closing(sqlite3.connect(path)) as database, database:
        where = "key = ? AND kind = 0"
        [(was,)] = database.execute(f"SELECT {column} FROM rows WHERE {where}", (key,)).fetchall()
        assert database.execute(f"UPDATE rows SET {column} = ? WHERE {where}", (to(was), key)).rowcount == 1


# A version that leaves the way to what is read is no row of it any more; on the disk SQLite's index still tells, see
# test_no_flipped_bit_changes_what_is_read_unnoticed.
FLIPS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "a bit of the value": ("value", lambda value: value[:9] + bytes([value[9] ^ 4]) + value[10:]),
    "the end of the value": ("value", lambda value: value[:-1]),
    "the value's type": ("value", lambda value: "text"),
    "a bit of the key": ("key", lambda key: chr(ord(key[0]) ^ 1) + key[1:]),
    "a bit of the kind": ("kind", lambda kind: kind ^ 1),
    "another bit of the kind": ("kind", lambda kind: kind ^ 2),
    "the step": ("step", lambda step: 3 - step),
    "a bit of the checksum": ("crc", lambda crc: crc ^ 4096),
    "a bit of the version": ("version", lambda version: version ^ 2),
    "another bit of the version": ("version", lambda version: version ^ 8),
}


@pytest.mark.parametrize("flip", FLIPS)
def test_a_row_that_is_not_as_written_is_an_error(tmp_path: Path, flip: str) -> None:
    """A bit changed in any part of a row is noticed when it is read; the error names file and step, and what to do."""
    path = make_file(tmp_path / "000.sqlite3")
    column, to = FLIPS[flip]
    alter(path, "model/null", column, to)
    step = "features_card" if column == "step" else "learner"
    with closing(StateFile(path, "000")) as file:
        rows = file.rows(step, TIP)
        ways: list[Callable[[], Any]] = [lambda: file.verify(TIP), lambda: list(rows.scan("")), rows.keys]
        if column != "key":
            ways.append(lambda: rows.get("model/null"))
        for read in ways:
            with pytest.raises(StateError) as caught:
                read()
            for part in (str(path), f"step {step}", "is not as written", "Hint: `millrace checkpoints", "--from"):
                assert part in str(caught.value)


def test_a_row_moved_to_another_branch_is_an_error(tmp_path: Path) -> None:
    """The checksum covers the branch too: 3-11 made into 2-11 lies on the way, and is noticed."""
    path = make_file(tmp_path / "000.sqlite3")
    alter(path, "many/2", "version", lambda version: version ^ 1 << 40)
    wrong = "'many/2' of version 2-11 is not as written"
    with closing(StateFile(path, "000")) as file, pytest.raises(StateError, match=wrong):
        file.rows("learner", TIP).get("many/2")


def test_a_row_without_its_beginning_is_an_error(tmp_path: Path) -> None:
    """An addition to a row that is not there is not mistaken for the row."""
    path = make_file(tmp_path / "000.sqlite3")
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("DELETE FROM rows WHERE key = 'many/1' AND kind = 0")
    wrong = r"step learner.*beginning of row 'many/1' is missing"
    with closing(StateFile(path, "000")) as file, pytest.raises(StateError, match=wrong):
        file.rows("learner", TIP).get("many/1")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undamaged file."""
    return make_file(tmp_path_factory.mktemp("whole") / "000.sqlite3")


def everything(path: Path) -> list[Any]:
    """All that a file says, having looked it through as a start does."""
    with closing(StateFile(path, "000")) as file:
        file.check()
        said: list[Any] = [file.steps]
        for lineage in (TIP, TIP.until(Version(2, 12)), TIP.until(Version(1, 10))):
            said.append([list(file.rows(step, lineage).scan("")) for step in ("learner", "features_card")])
            said.append([file.rows("learner", lineage).get(key) for key in ("old", "model/null", "many/1", "many/2")])
        versions = (Version(1, 4), Version(1, 10), Version(2, 12), Version(3, 11), Version(3, 15))
        said.append([file.holds(step, version) for version in versions for step in ("learner", "features_card")])
        return said


@settings(max_examples=150)
@given(place=st.integers(0, 1 << 20), bit=st.integers(0, 7))
def test_no_flipped_bit_changes_what_is_read_unnoticed(whole: Path, place: int, bit: int) -> None:
    """Any bit of the file changed on the disk: the start refuses it, or what is read is what was written."""
    damaged = bytearray(whole.read_bytes())
    used = [at for at, byte in enumerate(damaged) if byte]
    damaged[used[place % len(used)]] ^= 1 << bit
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "000.sqlite3"
        path.write_bytes(damaged)
        found: list[Any] = []
        refusal = None
        try:
            found = everything(path)
        except StateError as error:
            refusal = str(error)
    if refusal is not None:
        assert str(path) in refusal
        assert "Hint: " in refusal
    else:
        expected = everything(whole)
        lost = [was for was, now in zip(expected[-1], found[-1], strict=True) if was and not now]
        assert lost or found == expected  # a commit that is missing stops the start


@pytest.mark.parametrize("left", [0.0, 0.02, 0.3, 0.6, 0.97])
def test_a_cut_file_is_an_error(tmp_path: Path, whole: Path, left: float) -> None:
    """A file that was cut, down to nothing, is refused when it is opened or looked through."""
    path = tmp_path / "000.sqlite3"
    content = whole.read_bytes()
    path.write_bytes(content[: int(left * len(content))])
    with pytest.raises(StateError, match=r"state file .*000\.sqlite3.* damaged.*Hint: "):
        everything(path)


def test_another_file_in_its_place_is_an_error(tmp_path: Path) -> None:
    """A text file is no state file, and neither is somebody else's database."""
    path = tmp_path / "000.sqlite3"
    path.write_text("id,amount\n" * 1000)
    with pytest.raises(StateError, match=r"000\.sqlite3 is damaged: file is not a database.*Hint: "):
        StateFile(path, "000")
    path.unlink()
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("CREATE TABLE about (name, value)")
    with pytest.raises(StateError, match=f"has format None, this is format {FORMAT}"):
        StateFile(path, "000")


def test_a_missing_file_is_an_error_and_not_made_anew(tmp_path: Path) -> None:
    """A deleted file is not taken for one that is still empty."""
    path = tmp_path / "000.sqlite3"
    for writable in (True, False):
        with pytest.raises(StateError, match=r"000\.sqlite3 is missing\. Hint: "):
            StateFile(path, "000", writable=writable)
    assert not path.exists()


def test_a_deleted_log_is_noticed(tmp_path: Path, file: StateFile) -> None:
    """Without SQLite's log a file lacks what was written last, and says so when it is asked for the version."""
    nothing = tmp_path / "copy-0" / "000.sqlite3"
    some = tmp_path / "copy-1" / "000.sqlite3"
    for copy in (nothing, some):
        file.write("s", Version(1, 3), [put("a", 3)], complete=True)
        copy.parent.mkdir()
        shutil.copy(file.path, copy)  # the file alone, and its owner does not get to close it
        file.move_log()
    file.write("s", Version(1, 4), [put("a", 4)], complete=True)
    shutil.copy(file.path, some)
    with pytest.raises(StateError, match="is damaged: no such table: about"):
        StateFile(nothing, "000")
    with closing(StateFile(some, "000")) as cut:
        assert cut.holds("s", Version(1, 3))
        assert not cut.holds("s", Version(1, 4))
    assert file.holds("s", Version(1, 4))


def test_another_format_is_refused(tmp_path: Path) -> None:
    """A file of a later format is not read by guess."""
    path = make_file(tmp_path / "000.sqlite3")
    other_format(path)
    message = rf"has format '{FORMAT + 1}', this is format {FORMAT}\. Hint: .*the version of millrace"
    with pytest.raises(StateError, match=message):
        StateFile(path, "000")


def test_files_put_back_in_the_wrong_place_are_refused(tmp_path: Path) -> None:
    """Two key groups' files that were swapped are noticed, whole as they are."""
    StateStore.create(tmp_path, 2)
    one, other = tmp_path / "000.sqlite3", tmp_path / "001.sqlite3"
    one.rename(tmp_path / "third")
    other.rename(one)
    (tmp_path / "third").rename(other)
    store = StateStore(tmp_path, Lineage([], Version(1, 0)))
    with pytest.raises(StateError, match="001, not 000: files were mixed up"):
        store.file("000")
    with pytest.raises(StateError, match="000, not 001: files were mixed up"):
        store.file("001")
    store.close()


def other_format(path: Path) -> None:
    """A file of a later format."""
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("UPDATE about SET value = ? WHERE name = 'format'", (str(FORMAT + 1),))


def other_group(path: Path) -> None:
    """That of another key group."""
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("UPDATE about SET value = '001' WHERE name = 'group'")


@pytest.mark.parametrize("writable", [True, False])
@pytest.mark.parametrize("spoil", [other_format, other_group, lambda path: path.write_bytes(b"no database" * 100)])
def test_a_file_that_is_refused_is_given_up(tmp_path: Path, spoil: Callable[[Path], Any], writable: bool) -> None:
    """Nothing of it stays open: a notebook may try again and again."""
    path = make_file(tmp_path / "000.sqlite3")
    spoil(path)
    with pytest.raises(StateError) as caught:
        StateFile(path, "000", writable=writable)
    assert caught.value is not None, "held on to, as a debugger does, and with it everything on the stack"
    assert open_files(tmp_path) == []


class Touch:
    """Leaves a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_foreign_pickle_is_refused_and_not_run(tmp_path: Path, file: StateFile) -> None:
    """A row that names code which is not ours is an error with its name, and nothing of it happens."""
    file.write("learner", Version(1, 1), [put("model/null", Touch(tmp_path / "touched"))], complete=True)
    with pytest.raises(
        StateError, match=r"step learner.*'model/null'.*pathlib.Path.touch.*Hint: was the job file renamed"
    ):
        file.rows("learner", Lineage([], Version(1, 1))).get("model/null")
    assert not (tmp_path / "touched").exists()


def test_a_pickle_of_a_class_that_changed_is_an_error(file: StateFile) -> None:
    """What cannot be unpickled any more is an error that asks whether a class changed."""
    lost = b"\x80\x04\x95\x1e\x00\x00\x00\x00\x00\x00\x00\x8c\x0ccollections.x\x94\x8c\x05Thing\x94\x93\x94."
    file.write("learner", Version(1, 1), [("a", PUT, lost[:-3])], complete=True)
    with pytest.raises(StateError, match=r"step learner\): row 'a' cannot be read: .*Hint: .*--reset the step"):
        file.rows("learner", Lineage([], Version(1, 1))).get("a")


# -- readers beside a writer


def test_a_reader_sees_one_state_while_a_writer_and_a_pruner_go_on(tmp_path: Path) -> None:
    """A reader that has begun sees every key of one version until it ends, whatever is written and pruned meanwhile."""
    path = tmp_path / "000.sqlite3"
    keys = [f"k{number}" for number in range(10)]
    file = StateFile(path, "000", create=True)
    file.write("s", Version(1, 1), [put(key, 1) for key in keys], complete=True)
    failed: list[BaseException] = []

    def write() -> None:
        try:
            with closing(StateFile(path, "000")) as writer:
                for batch in range(2, 200):
                    writer.write("s", Version(1, batch), [put(key, batch) for key in keys], complete=True)
                    file.merge(Version(1, 0).number, Version(1, batch - 1).number, Version(1, batch).number)
        except BaseException as error:  # noqa: BLE001 - handed to the test
            failed.append(error)

    thread = threading.Thread(target=write)
    seen: list[int] = []
    thread.start()
    while thread.is_alive():
        with closing(StateFile(path, "000", writable=False)) as reader:
            reader.begin_reading()
            rows = reader.rows("s", Lineage([], Version(1, 1000)))
            first = [rows.get(key) for key in keys]
            assert first == [rows.get(key) for key in keys] == [parts for _, parts in rows.scan("")]
            assert len({parts[0] for parts in first}) == 1
            seen.append(first[0][0])
    thread.join()
    assert not failed
    assert seen == sorted(seen)
    assert len(set(seen)) > 1, "the reader saw nothing of the writer"
    assert held(file, Version(1, 199)) == {key: [199] for key in keys}
    file.close()


def test_who_only_reads_cannot_write(file: StateFile) -> None:
    """A reader's attempt to write is a clear error and changes nothing."""
    file.write("s", Version(1, 1), [put("a", 1)], complete=True)
    with closing(StateFile(file.path, "000", writable=False)) as reader:
        with pytest.raises(StateError, match="cannot be written: attempt to write a readonly database"):
            reader.write("s", Version(1, 2), [put("a", 2)])
        assert held(reader, Version(1, 2)) == {"a": [1]}


# -- writes that fail


def contents(file: StateFile) -> list[Any]:
    """All rows of all tables that matter."""
    return [file.query(f"SELECT * FROM {table} ORDER BY 1, 2") for table in ("rows", "steps", "commits")]


def test_a_holder_that_fails_leaves_the_file_as_it_was(file: StateFile) -> None:
    """An error in the midst of changes undoes those before it; the next write finds the file in order."""

    def changes() -> Iterator[Change]:
        yield put("a", 2)
        yield "b", GONE, b""
        raise ZeroDivisionError("in the holder")

    file.write("s", Version(1, 1), [put("a", 1), put("b", 1)], complete=True)
    before = contents(file)
    for step in ("s", "new"):
        with pytest.raises(ZeroDivisionError, match="in the holder"):
            file.write(step, Version(1, 2), changes(), complete=True)
        assert contents(file) == before
    assert file.steps == ["s"]
    file.write("other", Version(1, 2), [put("a", "other")], complete=True)
    file.write("new", Version(1, 2), [put("a", "new")], complete=True)
    assert held(file, Version(1, 2), "s") == {"a": [1], "b": [1]}
    assert held(file, Version(1, 2), "other") == {"a": ["other"]}
    assert held(file, Version(1, 2), "new") == {"a": ["new"]}
    assert file.bytes_since(Version(1, 1), Version(1, 2)) == 2 + len(pickle.dumps("other")) + len(pickle.dumps("new"))


def test_a_full_disk_is_a_clear_error_and_nothing_is_lost(file: StateFile) -> None:
    """A write for which there is no room changes nothing; once there is room the same write succeeds."""
    file.write("s", Version(1, 1), [put("a", 1)], complete=True)
    before = contents(file)
    pages = file.query("PRAGMA page_count")[0][0]
    large = [put(f"k{number}", bytes(1000)) for number in range(500)]
    file.query(f"PRAGMA max_page_count = {pages + 10}")
    for step in ("s", "new"):
        with pytest.raises(StateError) as caught:
            file.write(step, Version(1, 2), large, complete=True)
        for part in (str(file.path), "cannot be written: database or disk is full", "run again once there is room"):
            assert part in str(caught.value)
        assert contents(file) == before
    file.query("PRAGMA max_page_count = 1000000")
    file.write("new", Version(1, 2), large, complete=True)
    assert len(held(file, Version(1, 2), "new")) == 500
    assert held(file, Version(1, 2)) == {"a": [1]}


def test_a_roll_back_leaves_nothing_of_what_was_not_committed(file: StateFile) -> None:
    """Rows and commits after a version go, those of other steps too, and the count says how many."""
    file.write("s", Version(1, 5), [put("a", 5)], complete=True)
    before = contents(file)[2]
    file.write("s", Version(1, 6), [put("a", 6), put("b", 6)])
    file.write("t", Version(1, 7), [put("a", 7)], complete=True)
    assert file.roll_back(Version(1, 5)) == 3
    assert contents(file)[2] == before
    assert held(file, Version(1, 9)) == {"a": [5]}
    assert held(file, Version(1, 9), "t") == {}
    assert file.roll_back(Version(1, 5)) == 0
