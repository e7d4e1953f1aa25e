"""Where learn logs are kept: SQLite, one file per key group of models, append-only until their retention ends.

A chunk is what one learner did between two writes, under the version (branch and batch) of its last batch. Chunks of
batches that were never committed are rolled back on resume, as rows of the state store are; those of a branch that was
left stay, so that what was predicted there can be asked about too.

Every chunk has an index of the ids in it, and the range of the questions' numbers: to find one prediction among
millions a few bytes of each are read.
"""

from __future__ import annotations

import pickle
import sqlite3
from array import array
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import msgspec

from dataflows.job import Audit
from dataflows.learnlog import ASKED, OUTCOME, PROTOTYPE, Chunk, Keyframe, LearnLog, entries_of
from dataflows.pickles import ForeignClass, Name, safe_loads
from dataflows.settings import RunDirectory
from dataflows.state import Lineage, StateError, Version, group_file, open_database

FORMAT = 1

THIN = 10
"""Of keyframes beyond the newest `Audit.frames` of a model each so many-th stays."""

_LAYOUT = f"""
CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
INSERT INTO about VALUES ('format', '{FORMAT}');
CREATE TABLE makers (id INTEGER PRIMARY KEY, description TEXT NOT NULL UNIQUE); -- what results depend on beside the job
CREATE TABLE chunks (
    version INTEGER PRIMARY KEY, -- branch * 2^40 + batch
    begun INTEGER NOT NULL,      -- how often the models were begun (--reset learner)
    maker INTEGER NOT NULL,
    asked INTEGER NOT NULL,      -- questions, and below the numbers of the first and the last of them
    first_question INTEGER,
    last_question INTEGER,
    learned INTEGER NOT NULL,    -- outcomes
    newest INTEGER NOT NULL,     -- event time, microseconds
    ids BLOB NOT NULL,           -- crc32 of each question's id, sorted, four bytes each
    entries BLOB NOT NULL,       -- pickled: names of the features, entries
    outputs BLOB,                -- pickled: what the questions were told
    crc INTEGER NOT NULL,        -- of all this without the outputs, and below of these
    outputs_crc INTEGER NOT NULL
);
CREATE INDEX age ON chunks (newest);
CREATE INDEX questions ON chunks (last_question);
CREATE TABLE keyframes (
    version INTEGER NOT NULL,    -- of the chunk, and
    place INTEGER NOT NULL,      -- how many of its entries were carried out before
    begun INTEGER NOT NULL,
    key TEXT NOT NULL,
    examples INTEGER NOT NULL,
    newest INTEGER NOT NULL,     -- event time, microseconds
    model BLOB NOT NULL,
    crc INTEGER NOT NULL,
    PRIMARY KEY (version, place, key)
);
CREATE INDEX of_model ON keyframes (begun, key, examples);
"""

_INSERT_CHUNK = "INSERT OR REPLACE INTO chunks VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
_INSERT_FRAME = "INSERT OR REPLACE INTO keyframes VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
_HINT = "Hint: put the file back from a copy, or move it away: what was predicted so far cannot be audited then"


class Head(NamedTuple):
    """What there is to know of a chunk without reading it."""

    version: int
    begun: int
    maker: int
    asked: int
    first_question: int | None
    last_question: int | None
    learned: int
    newest: int


class Frame(NamedTuple):
    """Where a keyframe is, whose it is, and how many examples the model had learned from."""

    version: int
    place: int
    begun: int
    key: str
    examples: int
    newest: int


_HEAD = ", ".join(Head._fields)
_FRAME = ", ".join(Frame._fields)


def learn_file(run: RunDirectory, group: int) -> Path:
    """The learn log of the models of a key group."""
    return run.learned / f"{group_file(group)}.sqlite3"


class _File:
    """An SQLite file of a learn log, its errors as ours."""

    def __init__(self, path: Path, writable: bool) -> None:
        self.path = path
        if writable:
            path.parent.mkdir(parents=True, exist_ok=True)
        elif not path.exists():
            raise StateError(f"there is no learn log {path}. Hint: a job without `audit=None` keeps one from its start")
        with self._complaints():
            self._database = open_database(path, writable)
            if writable and self._database.execute("SELECT 1 FROM sqlite_master").fetchone() is None:
                self._database.executescript(f"BEGIN IMMEDIATE; {_LAYOUT} COMMIT;")
            found = self._query("SELECT value FROM about WHERE name = 'format'")
        if found != [(str(FORMAT),)]:
            self._database.close()
            raise StateError(f"the learn log {path} is of another format. Hint: the version that wrote it can read it")

    @contextmanager
    def _complaints(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, UnicodeDecodeError) as error:
            if "full" in str(error) or "readonly" in str(error) or "unable to open" in str(error):
                raise StateError(
                    f"the learn log {self.path} cannot be written: {error}. Nothing is lost: run again once there is "
                    "room and the right to write"
                ) from None
            raise StateError(f"the learn log {self.path} is damaged: {error}. {_HINT}") from None

    def _query(self, sql: str, values: tuple[Any, ...] = ()) -> list[Any]:
        with self._complaints():
            return self._database.execute(sql, values).fetchall()

    def close(self) -> None:
        """Give the file up."""
        self._database.close()


class LearnWriter(_File):
    """Keeps what one learner notes.

    Parameters
    ----------
    path
        The file; made where it is missing.
    lineage
        The way to the version that the run goes on from; what is written belongs to its last branch.
    begun
        How often the models were begun.
    audit
        Between how many examples there are keyframes, and how long all this is kept.
    maker
        What results depend on beside the job: code, libraries, interpreter, machine.
    """

    def __init__(self, path: Path, lineage: Lineage, begun: int, audit: Audit, maker: dict[str, str]) -> None:
        super().__init__(path, writable=True)
        self._branch = lineage.tip.branch
        self._begun = begun
        self._audit = audit
        ranges = " OR ".join(f"version BETWEEN {low} AND {high}" for low, high in lineage.ranges)
        known = f"SELECT 1 FROM keyframes WHERE begun = ? AND key = ? AND ({ranges})"
        self._is_new = not self._query(known, (begun, PROTOTYPE))
        text = msgspec.json.encode(maker, order="deterministic").decode()
        self._query("INSERT OR IGNORE INTO makers (description) VALUES (?)", (text,))
        self._maker: int = self._query("SELECT id FROM makers WHERE description = ?", (text,))[0][0]
        # What a resumed run adds is not older than what is there.
        newest = self._query(f"SELECT max(newest) FROM chunks WHERE {ranges}")[0][0]
        self._newest: int = newest or 0

    def log(self, names: tuple[str, ...]) -> LearnLog:
        """What the learner shall note to."""
        return LearnLog(names, self._audit.every, self._is_new)

    def write(self, batch: int, chunk: Chunk) -> None:
        """Keep what was noted up to a batch; survives the death of any process once this returns."""
        version = Version(self._branch, batch).number
        before, entries = self._newest, entries_of(chunk.fields)
        row = self._row(version, chunk, entries)
        # Of the time of what was done last before it.
        times = [before, *(entry[4] for entry in entries)]
        frames = [self._frame(version, frame, times[frame.place]) for frame in chunk.frames]
        with self._complaints():
            self._database.execute("BEGIN IMMEDIATE")
            self._database.execute(_INSERT_CHUNK, row)
            self._database.executemany(_INSERT_FRAME, frames)
            for frame in chunk.frames:
                self._thin(frame)
            self._forget()
            self._database.execute("COMMIT")

    def _row(self, version: int, chunk: Chunk, entries: list[tuple[Any, ...]]) -> tuple[Any, ...]:
        asked = [entry for entry in entries if entry[0] == ASKED]
        times = [entry[4] for entry in entries]  # of a question its event time, of an outcome its moment
        self._newest = max(self._newest, *times) if times else self._newest
        ids = array("I", sorted(_id_hash(entry[3]) for entry in asked)).tobytes()
        fields = pickle.dumps((chunk.names, chunk.fields), 5)
        outputs = pickle.dumps(chunk.outputs, 5)
        questions = [entry[1] for entry in entries if entry[0] != OUTCOME]
        first, last = (min(questions), max(questions)) if questions else (None, None)
        learned = len(entries) - len(questions)
        head = Head(version, self._begun, self._maker, len(asked), first, last, learned, self._newest)
        return (*head, ids, fields, outputs, _checksum(head, ids, fields), _checksum(head, outputs))

    def _frame(self, version: int, frame: Keyframe, time: int) -> tuple[Any, ...]:
        head = Frame(version, frame.place, self._begun, frame.key, frame.examples, time)
        return (*head, frame.pickled, _checksum(head, frame.pickled))

    def _thin(self, frame: Keyframe) -> None:
        """Take the keyframe away that is none of the newest ones any more."""
        old = frame.examples - self._audit.frames * self._audit.every
        if old > 0 and old // self._audit.every % THIN:
            of_branch = (Version(self._branch, 0).number, Version(self._branch + 1, 0).number)
            self._database.execute(
                "DELETE FROM keyframes WHERE begun = ? AND key = ? AND examples = ? AND version > ? AND version < ?",
                (self._begun, frame.key, old, *of_branch),
            )

    def _forget(self) -> None:
        """Delete what is older than it has to be kept, but no prototype."""
        if self._audit.keep is None or not self._newest:
            return
        before = self._newest - self._audit.keep
        if self._database.execute("DELETE FROM chunks WHERE newest < ?", (before,)).rowcount:
            self._database.execute(
                "DELETE FROM keyframes WHERE key != ? AND version NOT IN (SELECT version FROM chunks)", (PROTOTYPE,)
            )


def roll_back(run: RunDirectory, to: Version) -> None:
    """Delete what all learn logs of a run have of later batches than a version."""
    for path in sorted(run.learned.glob("*.sqlite3")):
        file = _File(path, writable=True)
        try:
            file._query("DELETE FROM chunks WHERE version > ?", (to.number,))
            file._query("DELETE FROM keyframes WHERE version > ?", (to.number,))
        finally:
            file.close()


class LearnReader(_File):
    """Reads a learn log along the way to a branch, as it is when this is opened.

    Parameters
    ----------
    path
        The file.
    lineage
        The way; later chunks and other branches are not seen.
    allowed
        What pickles may name beside our own classes.

    Raises `StateError` for what is missing or damaged.
    """

    def __init__(self, path: Path, lineage: Lineage, allowed: frozenset[Name]) -> None:
        super().__init__(path, writable=False)
        self._allowed = allowed
        self._on_the_way = " OR ".join(f"version BETWEEN {low} AND {high}" for low, high in lineage.ranges)
        self.makers: dict[int, dict[str, str]] = {}
        self.heads: list[Head] = []
        try:
            self._begin()
        except BaseException:
            self.close()
            raise

    def _begin(self) -> None:
        """See the log from now on as it is now."""
        self._query("BEGIN")
        for number, text in self._query("SELECT id, description FROM makers"):
            try:
                self.makers[number] = msgspec.json.decode(text, type=dict[str, str])
            except msgspec.DecodeError as error:
                raise StateError(f"the learn log {self.path} is damaged: what wrote it: {error}. {_HINT}") from None
        rows = self._query(f"SELECT {_HEAD} FROM chunks WHERE {self._on_the_way} ORDER BY version")
        self.heads = [Head(*row) for row in rows]

    def frames(self) -> list[Frame]:
        """Where the keyframes are, oldest first; prototypes among them."""
        order = "ORDER BY version, place"
        return [Frame(*row) for row in self._query(f"SELECT {_FRAME} FROM keyframes WHERE {self._on_the_way} {order}")]

    def model(self, frame: Frame) -> Any:
        """The model of a keyframe."""
        place = (frame.version, frame.place, frame.key)
        found = self._query("SELECT model, crc FROM keyframes WHERE version = ? AND place = ? AND key = ?", place)
        if not found:
            raise StateError(f"the learn log {self.path} lost the keyframe of {frame.examples} examples. {_HINT}")
        pickled, crc = found[0]
        if type(pickled) is not bytes or crc != _checksum(frame, pickled):
            raise self.not_as_written(frame.version, f"the keyframe of {frame.examples} examples")
        return self._loaded(pickled, frame.version)

    def entries(self, version: int) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
        """The names of the features, and the entries, of a chunk."""
        head, (ids, pickled, crc) = self._chunk(version, "ids, entries, crc")
        if type(ids) is not bytes or type(pickled) is not bytes or crc != _checksum(head, ids, pickled):
            raise self.not_as_written(version, "a chunk of it")
        names, fields = self._loaded(pickled, version)
        try:
            entries = entries_of(fields)
        except (KeyError, TypeError):
            raise self.not_as_written(version, "a chunk of it") from None
        asked = sum(entry[0] == ASKED for entry in entries)
        learned = sum(entry[0] == OUTCOME for entry in entries)
        if (asked, learned) != (head.asked, head.learned):
            what = f"a chunk of {head.asked} questions and {head.learned} outcomes, with {asked} and {learned} in it"
            raise self.not_as_written(version, what)
        return tuple(names), entries

    def outputs(self, version: int) -> list[Any] | None:
        """What the answered questions of a chunk were told; None where that was taken out."""
        head, (outputs, crc) = self._chunk(version, "outputs, outputs_crc")
        if outputs is None:
            return None
        if type(outputs) is not bytes or crc != _checksum(head, outputs):
            raise self.not_as_written(version, "what was said in a chunk of it")
        return list(self._loaded(outputs, version))

    def holding(self, id: Any) -> Iterator[int]:
        """The chunks that may hold a question with this id, newest first."""
        wanted = _id_hash(id)
        rows = f"SELECT version, ids FROM chunks WHERE {self._on_the_way} ORDER BY version DESC"
        for version, ids in self._each(rows):
            if type(ids) is not bytes or len(ids) % 4:
                raise self.not_as_written(version, "a chunk of it")
            hashes = array("I", ids)
            place = bisect_left(hashes, wanted)
            if place < len(hashes) and hashes[place] == wanted:
                yield version

    def not_as_written(self, version: int, what: str) -> StateError:
        """The error that says where the log was changed."""
        return StateError(
            f"the learn log {self.path}: {what}, of batch {Version.of(version)}, is not as it was written. {_HINT}"
        )

    def _each(self, sql: str) -> Iterator[Any]:
        """The rows one by one: all together they may be many."""
        with self._complaints():
            yield from self._database.execute(sql)

    def _chunk(self, version: int, columns: str) -> tuple[Head, tuple[Any, ...]]:
        row = self._query(f"SELECT {_HEAD}, {columns} FROM chunks WHERE version = ?", (version,))[0]
        return Head(*row[: len(Head._fields)]), row[len(Head._fields) :]

    def _loaded(self, pickled: bytes, version: int) -> Any:
        try:
            return safe_loads(pickled, self._allowed)
        except ForeignClass as error:
            raise StateError(
                f"the learn log {self.path}, batch {Version.of(version)}, holds what is not ours: {error}. Nothing of "
                "it was run. Hint: was a class of the job renamed or moved?"
            ) from None
        except Exception as error:  # noqa: BLE001 - whatever an old pickle of a changed class raises
            raise StateError(
                f"the learn log {self.path}, batch {Version.of(version)}, cannot be read: {type(error).__name__}: "
                f"{error}. {_HINT}"
            ) from None


def _id_hash(id: Any) -> int:
    return crc32(repr(id).encode("utf-8", "surrogatepass"))


def _checksum(head: tuple[Any, ...], *parts: bytes) -> int:
    found = crc32(repr(tuple(head)).encode())
    for part in parts:
        found = crc32(part, found)
    return found


def open_logs(run: RunDirectory, lineage: Lineage, allowed: frozenset[Name]) -> list[LearnReader]:
    """The learn logs of a run, one for each key group of models, along a way; to be closed by the caller.

    Raises `StateError` where there is none, or one is damaged.
    """
    paths = sorted(run.learned.glob("*.sqlite3"))
    if not paths:
        raise StateError(f"{run.learned} holds no learn log. Hint: was the job run with audit=None?")
    with ExitStack() as opened:
        logs = [opened.enter_context(closing(LearnReader(path, lineage, allowed))) for path in paths]
        opened.pop_all()  # all went well: they stay open
    return logs
