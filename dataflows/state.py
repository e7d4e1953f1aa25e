"""The versioned state store: what every step held after any checkpoint, in SQLite, one file per key group.

A row is (step, key, version) → bytes. It is written once and never changed: a newer version is a row of its own, and so
is a deletion. So a past state is there as long as its rows are, and a checkpoint costs what has changed since the one
before.

A version is (branch, batch): the last batch that the row has seen. Batches of one branch follow each other; a branch
begins at a version of an earlier one. What is visible at a version is the newest row of each key on the way there.

The engine decides which version is committed: it is handed the version after the rows are there. On resume the rows of
later batches are rolled back. Each step of a key group writes in transactions of its own, at any time between two
checkpoints, so that little is left to do at their end.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

from dataflows.pickles import ForeignClass, Name, safe_loads
from features.rows import APPEND, GONE, PUT, Change

FORMAT = 2
"""The layout of the files; another one is refused."""

READER = "reader"
"""The file of what is not in key groups: the reader's state."""

HINT = (
    "Hint: `millrace checkpoints JOB --verify` names the checkpoints that can still be opened, "
    "`millrace run JOB --from CHECKPOINT` goes on from one; or put the file back from a copy"
)

_NO_ROOM = (
    "SQLITE_FULL", "SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_BUSY", "SQLITE_LOCKED", "SQLITE_IOERR_SHM",
    "SQLITE_IOERR_WRITE", "SQLITE_IOERR_FSYNC", "SQLITE_IOERR_TRUNCATE",
)  # fmt: skip
"""How SQLite's names of errors begin that speak of the disk or of others, not of the file."""

_BUSY = 30.0
"""Seconds that a writer waits for another: pruning is done in short transactions beside the run."""

_LOG_PAGES = 20_000
"""Pages in SQLite's log before a writer moves them itself; before that the launcher does."""

_COMPLAINTS = (sqlite3.Error, UnicodeDecodeError)
"""Of SQLite; its messages may quote damaged bytes of the file, which are no text."""

_BRANCH_BITS = 40

_LAYOUT = """
CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE steps (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);
CREATE TABLE rows (
    id INTEGER PRIMARY KEY AUTOINCREMENT, -- grows with the versions; that of a deleted row is not given again
    step INTEGER NOT NULL,
    key TEXT NOT NULL,
    version INTEGER NOT NULL, -- branch * 2^40 + batch
    kind INTEGER NOT NULL,    -- 0 replaces, 1 adds to the row before, 2 ends it
    crc INTEGER NOT NULL,     -- of step, version, kind, key and value
    value BLOB NOT NULL
);
CREATE UNIQUE INDEX place ON rows (step, key, version);
CREATE TABLE commits (        -- which versions a step has written, up to which row, and how much
    step INTEGER NOT NULL,
    version INTEGER NOT NULL,
    last_row INTEGER NOT NULL,
    bytes INTEGER NOT NULL,
    PRIMARY KEY (step, version)
) WITHOUT ROWID;
"""


_INSERT = "INSERT OR REPLACE INTO rows (step, key, version, kind, crc, value) VALUES (?, ?, ?, ?, ?, ?)"

# The last row is that of the whole file by then; the bytes are the step's, since what it completed last.
_COMMIT = """INSERT INTO commits SELECT ?, ?, coalesce(max(id), 0), ? FROM rows WHERE true
    ON CONFLICT DO UPDATE SET last_row = excluded.last_row, bytes = bytes + excluded.bytes"""

_OF_KEY = "SELECT version, kind, crc, value FROM rows WHERE step = ? AND key = ? ORDER BY version DESC"

_OF_PREFIX = """SELECT key, version, kind, crc, value FROM rows
    WHERE step = ? AND key >= ? AND key < ? ORDER BY key, version DESC"""

# A row that replaces or ends what was before makes all older rows of its key superfluous, down to the retained
# version before. CROSS JOIN: SQLite shall begin with the new rows, which are few.
_SUPERSEDED = f"""DELETE FROM rows WHERE id IN (
    SELECT old.id FROM rows AS new CROSS JOIN rows AS old
    WHERE new.id > :first AND new.id <= :last AND new.kind != {APPEND}
      AND new.version <= :until
      AND old.step = new.step AND old.key = new.key AND old.version > :after AND old.version < new.version)"""

# An end with nothing before it to end, on any branch.
_NOTHING_LEFT = f"""DELETE FROM rows WHERE id > :first AND id <= :last AND kind = {GONE} AND NOT EXISTS (
    SELECT 1 FROM rows AS old WHERE old.step = rows.step AND old.key = rows.key AND old.version < rows.version)"""

# All rows of the keys that have no row outside of the two versions: none is left without its beginning.
_UNTOUCHED = """DELETE FROM rows WHERE step = :step AND version > :after AND version <= :until AND NOT EXISTS (
    SELECT 1 FROM rows AS other WHERE other.step = rows.step AND other.key = rows.key
      AND (other.version > :until OR other.version <= :after))"""

# A step's last completion stays, however old: a manifest names it as long as the step is not touched again.
_COMMITS_BETWEEN = """DELETE FROM commits WHERE version > :after AND version < :until AND EXISTS (
    SELECT 1 FROM commits AS new
    WHERE new.step = commits.step AND new.version > commits.version AND new.version <= :until)"""


class StateError(RuntimeError):
    """A state file that is missing, damaged or of another kind, and what to do."""


class Version(NamedTuple):
    """A place in the history of a job: the branch, and the last batch of it.

    >>> Version.of(Version(2, 17).number)
    Version(branch=2, batch=17)
    >>> str(Version(2, 17))
    '2-17'
    """

    branch: int
    batch: int

    @property
    def number(self) -> int:
        """The version as one whole number that grows with branch and batch."""
        return (self.branch << _BRANCH_BITS) + self.batch

    @classmethod
    def of(cls, number: int) -> Version:
        """The version with this number."""
        return cls(number >> _BRANCH_BITS, number & ((1 << _BRANCH_BITS) - 1))

    def __str__(self) -> str:
        return f"{self.branch}-{self.batch}"


class Lineage:
    """The way to a version: the branches it goes through, each up to where the next begins.

    >>> way = Lineage([Version(1, 500)], Version(2, 700))
    >>> [way.holds(Version(*v).number) for v in [(1, 500), (1, 501), (2, 501), (2, 701)]]
    [True, False, True, False]
    """

    __slots__ = ("ranges", "tip")

    def __init__(self, forks: Iterable[Version], tip: Version) -> None:
        self.tip = tip
        ends = [*forks, tip]
        self.ranges = [(Version(end.branch, 0).number, end.number) for end in ends]

    def holds(self, version: int) -> bool:
        """Whether a version lies on the way."""
        return any(low <= version <= high for low, high in self.ranges)

    def until(self, version: Version) -> Lineage:
        """The part of the way that ends at a version on it."""
        forks = [Version.of(high) for _, high in self.ranges[:-1]]
        return Lineage([fork for fork in forks if fork.branch < version.branch], version)

    def on_from_here(self) -> Lineage:
        """The way of a run that goes on from the tip: whatever it will write is on it."""
        return self.until(Version(self.tip.branch, (1 << _BRANCH_BITS) - 1))


class StateFile:
    """The state of one key group: all its steps, all retained versions.

    Parameters
    ----------
    path
        The file.
    group
        The name of the key group, or `READER`; it is noted in the file, so that files cannot be mixed up.
    create
        Make the file; else a missing file is an error.
    writable
        Whether to write; who only reads sees what was written last and holds nobody up.
    allowed, gone
        What pickles may name beside our own classes, and what is not there any more (`dataflows.pickles`).

    What is written survives the death of any process once `write` returns, and a power loss once `sync` returns.
    Raises `StateError` for a file that is missing, damaged or of another kind.
    """

    def __init__(
        self,
        path: Path,
        group: str,
        create: bool = False,
        writable: bool = True,
        allowed: frozenset[Name] = frozenset(),
        gone: frozenset[Name] = frozenset(),
    ) -> None:
        self.path = path
        self.allowed = allowed
        self.gone = gone
        self._bytes: dict[int, int] = {}
        if not create and not path.exists():
            raise StateError(f"the state file {path} is missing. {HINT}")
        try:
            self._database = open_database(path, writable)
            try:
                if create:
                    self._create(group)
                self._check_format(group)
                self._steps: dict[str, int] = dict(self._database.execute("SELECT name, id FROM steps").fetchall())
            except BaseException:
                self.close()
                raise
        except _COMPLAINTS as error:
            raise self._unreadable(error) from None

    # -- writing

    def write(self, step: str, version: Version, changes: Iterable[Change], complete: bool = False) -> None:
        """Keep changes of a step, in one transaction.

        `complete`: the step has now given all there is of this version, and the engine may be told so.
        """
        number = version.number
        with self._writing() as database:
            place = self._steps.get(step) or self._place(step)
            written = self._bytes.get(place, 0)

            def rows() -> Iterator[tuple[int, str, int, int, int, bytes]]:
                nonlocal written
                for key, kind, value in changes:
                    written += len(key) + len(value)
                    yield place, key, number, kind, _checksum(place, key, number, kind, value), value

            database.executemany(_INSERT, rows())
            if complete:
                database.execute(_COMMIT, (place, number, written))
        self._steps[step] = place  # not before it is there to stay
        self._bytes[place] = 0 if complete else written

    def roll_back(self, to: Version) -> int:
        """Delete what was written after a version; how many rows.

        Newer rows stand at the end of the file. What earlier branches left there has lower versions, and stays.
        """
        with self._writing() as database:
            older = database.execute(
                "SELECT id FROM rows WHERE version <= ? ORDER BY id DESC LIMIT 1", (to.number,)
            ).fetchone()
            removed = database.execute(
                "DELETE FROM rows WHERE id > ? AND version > ?", (older[0] if older else 0, to.number)
            ).rowcount
            database.execute("DELETE FROM commits WHERE version > ?", (to.number,))
        return removed

    def merge(self, after: int, dropped: int, until: int) -> int:
        """Delete what only a dropped version needed; how many rows.

        Versions as numbers: `after` and `until` are the retained ones around `dropped`, of its branch; `after` is the
        beginning of the branch where none is retained before. Between the two a key keeps its newest row, with what was
        added to it.
        """
        with self._writing() as database:
            first = self._last_row(dropped)
            last = self._last_row(until)
            between = {"after": after, "first": first, "last": last, "until": until}
            removed = database.execute(_SUPERSEDED, between).rowcount
            removed += database.execute(_NOTHING_LEFT, between).rowcount
            database.execute(_COMMITS_BETWEEN, between)
        return removed

    def drop_after(self, after: int, branch: int) -> int:
        """Delete what an abandoned branch wrote after its last retained version; how many rows."""
        end = Version(branch + 1, 0).number
        with self._writing() as database:
            removed = database.execute(
                "DELETE FROM rows WHERE id > ? AND version > ? AND version < ?", (self._last_row(after), after, end)
            ).rowcount
            database.execute("DELETE FROM commits WHERE version > ? AND version < ?", (after, end))
        return removed

    def forget(self, step: str, after: int, until: int) -> int:
        """Delete the rows of a step whose keys were touched only between two versions (as numbers); how many rows."""
        with self._writing() as database:
            # Looked up each time: a step may first write, through another connection, long after this was opened.
            found = database.execute("SELECT id FROM steps WHERE name = ?", (step,)).fetchone()
            values = {"step": found[0] if found else -1, "after": after, "until": until}
            return database.execute(_UNTOUCHED, values).rowcount

    def move_log(self) -> None:
        """Let SQLite move what was written from its log into the file, as far as nobody is held up."""
        try:
            self._database.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
        except sqlite3.Error as error:
            raise self._unwritable(error) from None

    # -- reading

    def rows(self, step: str, lineage: Lineage) -> StepRows:
        """The rows of a step as they are at the end of a lineage."""
        return StepRows(self, step, lineage)

    def place(self, step: str) -> int:
        """The number of a step in this file; -1 if it had written nothing when this was opened, nor through this."""
        return self._steps.get(step, -1)

    @property
    def steps(self) -> list[str]:
        """The steps that have ever written here."""
        return sorted(self._steps)

    def holds(self, step: str, version: Version) -> bool:
        """Whether a step has completely given its state of a version."""
        wanted = (self._steps.get(step, -1), version.number)
        return bool(self.query("SELECT 1 FROM commits WHERE step = ? AND version = ?", wanted))

    def bytes_since(self, after: Version, until: Version) -> int:
        """Bytes of keys and values that were written after a version, up to another."""
        found = self.query(
            "SELECT sum(bytes) FROM commits WHERE version > ? AND version <= ?", (after.number, until.number)
        )
        return found[0][0] or 0

    def check(self) -> None:
        """Have SQLite read the whole file. Raises `StateError` where it finds damage."""
        found = self.query("PRAGMA integrity_check(1)")
        if found != [("ok",)]:
            raise self.damaged(str(found[0][0]).replace("\n", " "))

    def verify(self, lineage: Lineage) -> int:
        """Read every row that is visible at the end of a lineage; how many. Raises `StateError` for a damaged one."""
        return sum(1 for step in self.steps for _ in self.rows(step, lineage).parts(""))

    def begin_reading(self) -> None:
        """See the file from now on as it is now."""
        self._database.execute("BEGIN")
        self.query("SELECT 1 FROM about")

    def close(self) -> None:
        """Give the file up."""
        self._database.close()

    def query(self, sql: str, values: tuple[Any, ...] = ()) -> list[Any]:
        """The rows of a query; SQLite's complaints as `StateError`."""
        try:
            return self._database.execute(sql, values).fetchall()
        except _COMPLAINTS as error:
            raise self._unreadable(error) from None

    def damaged(self, what: str, step: str | None = None) -> StateError:
        """The error that says what is wrong with the file, and what to do."""
        of = f" (step {step})" if step else ""
        return StateError(f"the state file {self.path}{of} is damaged: {what}. {HINT}")

    # -- inside

    def _create(self, group: str) -> None:
        if self._database.execute("SELECT 1 FROM sqlite_master").fetchone() is None:
            # At once: a file that was killed half made must not be taken for one of another format.
            about = f"INSERT INTO about VALUES ('format', '{FORMAT}'), ('group', '{group}');"
            self._database.executescript(f"BEGIN IMMEDIATE; {_LAYOUT} {about} COMMIT;")

    def _check_format(self, group: str) -> None:
        about = dict(self._database.execute("SELECT name, value FROM about").fetchall())
        if about.get("format") != str(FORMAT):
            raise StateError(
                f"the state file {self.path} has format {about.get('format')!r}, this is format {FORMAT}. "
                "Hint: open it with the version of millrace that wrote it"
            )
        if about.get("group") != group:
            raise self.damaged(f"it is that of key group {about.get('group')}, not {group}: files were mixed up")

    def _place(self, step: str) -> int:
        """The number of a step, which gets one here if it has none."""
        self._database.execute("INSERT OR IGNORE INTO steps (name) VALUES (?)", (step,))
        place: int = self._database.execute("SELECT id FROM steps WHERE name = ?", (step,)).fetchone()[0]
        return place

    def _last_row(self, version: int) -> int:
        found = self._database.execute("SELECT max(last_row) FROM commits WHERE version <= ?", (version,)).fetchone()
        return found[0] or 0

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        database = self._database
        try:
            database.execute("BEGIN IMMEDIATE")
            try:
                yield database
                database.execute("COMMIT")
            except BaseException:
                if database.in_transaction:
                    database.execute("ROLLBACK")
                raise
        except sqlite3.Error as error:
            raise self._unwritable(error) from None

    def _unwritable(self, error: sqlite3.Error) -> StateError:
        return self._unusable(error) if isinstance(error, sqlite3.OperationalError) else self.damaged(str(error))

    def _unreadable(self, error: Exception) -> StateError:
        """Reading needs room too: for SQLite's log and its shared memory."""
        name = getattr(error, "sqlite_errorname", None) or ""
        return self._unusable(error) if name.startswith(_NO_ROOM) else self.damaged(str(error))

    def _unusable(self, error: Exception) -> StateError:
        return StateError(
            f"the state file {self.path} cannot be written: {error}. Nothing is lost: run again once there is "
            "room and the right to write, and the job goes on from its last checkpoint"
        )


class StepRows:
    """The rows of one step of a key group at one version (`features.rows.Rows`)."""

    def __init__(self, file: StateFile, step: str, lineage: Lineage) -> None:
        self._file = file
        self._step = step
        self.lineage = lineage

    @property
    def place(self) -> int:
        """The number of the step. Asked each time: the step may first write, through the same file, long after."""
        return self._file.place(self._step)

    def get(self, key: str) -> list[Any]:
        found = self._file.query(_OF_KEY, (self.place, key))
        return [self._loaded(key, part) for part in self._visible(key, found)] if found else []

    def scan(self, prefix: str) -> Iterator[tuple[str, list[Any]]]:
        for key, parts in self.parts(prefix):
            yield key, [self._loaded(key, part) for part in parts]

    def empty(self) -> bool:
        return not self._file.query("SELECT 1 FROM rows WHERE step = ? LIMIT 1", (self.place,))

    def keys(self, prefix: str = "") -> list[str]:
        """The keys of the rows that are there."""
        return [key for key, _ in self.parts(prefix)]

    def count(self) -> int:
        """How many keys there are, without reading their values."""
        found = self._file.query(
            "SELECT key, version, kind FROM rows WHERE step = ? ORDER BY key, version DESC", (self.place,)
        )
        kinds = ((key, kind) for key, version, kind in found if self.lineage.holds(version))
        return sum(next(rows)[1] != GONE for _, rows in groupby(kinds, key=itemgetter(0)))

    def parts(self, prefix: str) -> Iterator[tuple[str, list[bytes]]]:
        """As `scan`, not unpickled."""
        # Up to the prefix with the last character there is: the same as "begins with", and an index can do it.
        found = self._file.query(_OF_PREFIX, (self.place, prefix, prefix + chr(0x10FFFF)))
        for key, rows in groupby(found, key=itemgetter(0)):
            parts = self._visible(key, [row[1:] for row in rows])
            if parts:
                yield key, parts

    def _visible(self, key: str, found: list[tuple[int, int, int, bytes]]) -> list[bytes]:
        """Of all versions of a row, newest first: the parts it has here, oldest first."""
        parts: list[bytes] = []
        for version, kind, crc, value in found:
            if not self.lineage.holds(version):
                continue
            if type(value) is not bytes or crc != _checksum(self.place, key, version, kind, value):
                raise self._file.damaged(f"row {key!r} of version {Version.of(version)} is not as written", self._step)
            if kind == GONE:
                break
            parts.append(value)
            if kind == PUT:
                break
        else:  # neither replaced nor ended on the way here
            if parts:
                raise self._file.damaged(f"the beginning of row {key!r} is missing", self._step)
        return parts[::-1]

    def _loaded(self, key: str, part: bytes) -> Any:
        try:
            return safe_loads(part, self._file.allowed, self._file.gone)
        except ForeignClass as error:
            raise StateError(
                f"the state file {self._file.path} (step {self._step}) holds in row {key!r} what is not ours: {error}. "
                "Nothing of it was run. Hint: was the job file renamed or moved? If not, somebody may have tampered "
                "with the state: put the file back from a copy"
            ) from None
        except Exception as error:  # noqa: BLE001 - whatever an old pickle of a changed class raises
            raise StateError(
                f"the state file {self._file.path} (step {self._step}): row {key!r} cannot be read: "
                f"{type(error).__name__}: {error}. Hint: did a class or library change? "
                "Run with what wrote it, or --reset the step"
            ) from None


class StateStore:
    """The state files of a job, opened as they are needed.

    Parameters
    ----------
    directory
        Where the files are: `state/groups` of a run.
    lineage
        The version that is read.
    writable, allowed, gone
        As for `StateFile`.
    """

    def __init__(
        self,
        directory: Path,
        lineage: Lineage,
        writable: bool = True,
        allowed: frozenset[Name] = frozenset(),
        gone: frozenset[Name] = frozenset(),
    ) -> None:
        self.directory = directory
        self.lineage = lineage
        self._writable = writable
        self._allowed = allowed
        self._gone = gone
        self._files: dict[str, StateFile] = {}

    @staticmethod
    def create(directory: Path, groups: int) -> None:
        """Make the empty files of a new state; harmless where they are there."""
        directory.mkdir(parents=True, exist_ok=True)
        for name in file_names(groups):
            StateFile(directory / f"{name}.sqlite3", name, create=True).close()
        _sync_path(directory)

    def file(self, name: str) -> StateFile:
        """The file of a key group (its number with three digits) or of the reader."""
        if name not in self._files:
            path = self.directory / f"{name}.sqlite3"
            self._files[name] = StateFile(path, name, writable=self._writable, allowed=self._allowed, gone=self._gone)
        return self._files[name]

    def step(self, name: str, step: str) -> StepState:
        """One step of a key group, to read and to write."""
        return StepState(self.file(name), step, self.lineage)

    def close(self) -> None:
        """Give all files up."""
        for file in self._files.values():
            file.close()
        self._files.clear()


class StepState:
    """Where one step of a key group keeps its rows: reads along a lineage, writes on its last branch."""

    def __init__(self, file: StateFile, step: str, lineage: Lineage) -> None:
        self._file = file
        self._step = step
        self._branch = lineage.tip.branch
        self.rows = file.rows(step, lineage.on_from_here())

    def write(self, batch: int, changes: Iterable[Change], complete: bool = False) -> None:
        """Keep what changed up to a batch; `complete` at a checkpoint."""
        self._file.write(self._step, Version(self._branch, batch), changes, complete)


def file_names(groups: int) -> list[str]:
    """The state files of a job with this many key groups.

    >>> file_names(2)
    ['reader', '000', '001']
    """
    return [READER, *(group_file(group) for group in range(groups))]


def group_file(group: int) -> str:
    """The name of a key group's file."""
    return f"{group:03d}"


def sync(*directories: Path) -> None:
    """Make all that was written to the state files of these directories safe against power loss.

    Whoever wrote it: files are synced, not connections. SQLite writes to its logs first, and syncs what it moves from
    there. All at once: the disk takes them together.
    """
    with ThreadPoolExecutor(max_workers=8) as pool:
        list(pool.map(_sync_path, (log for each in directories for log in each.glob("*.sqlite3-wal"))))


def _sync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_database(path: Path, writable: bool) -> sqlite3.Connection:
    """An SQLite file of ours: to be read as it is, also while others write, or to be written by several."""
    # isolation_level None: transactions are ours to begin. Steps of one process share a file, one after the other.
    if not writable:
        logged = path.with_name(path.name + "-wal").exists()
        way = "mode=ro" if logged or os.access(path.parent, os.W_OK) else "immutable=1"
        return sqlite3.connect(f"{path.resolve().as_uri()}?{way}", uri=True, isolation_level=None, timeout=_BUSY)
    database = sqlite3.connect(path, isolation_level=None, timeout=_BUSY, check_same_thread=False)
    try:
        database.execute("PRAGMA journal_mode = WAL").fetchall()
        database.execute("PRAGMA synchronous = NORMAL")  # never damaged by power loss; `sync` makes it lose nothing
        database.execute(f"PRAGMA wal_autocheckpoint = {_LOG_PAGES}")
        database.execute("PRAGMA cache_size = -8000")
    except BaseException:
        database.close()
        raise
    return database


def _checksum(step: int, key: str, version: int, kind: int, value: bytes) -> int:
    return crc32(value, crc32(f"{step} {version} {kind} {key}".encode()))
