"""Training sets: the features as they were asked and the labels as they became known; and the same computed again.

The learn log has both as they were (log-and-wait). The same questions asked again, by working on the logged batches
once more, must give the same rows: where they do not, the model was served other features than it would be trained
with.
"""

from __future__ import annotations

import csv
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from datetime import datetime
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from dataflows.events import EventId, Outcome, Prediction, encode, to_datetime, to_time_us
from dataflows.history import Place, ReplayedState, find
from dataflows.job import Job, JobError
from dataflows.learner import model_named, shows_probability
from dataflows.learnlog import ASKED, FAILED
from dataflows.learnstore import LearnReader
from dataflows.pickles import names_of
from dataflows.settings import RunDirectory, read_branches
from dataflows.state import Lineage, StateError, Version

SHOWN = 20
"""Rows that differ are shown, no more of them."""

_CHUNK = 10_000
"""Rows that are written at once."""

_STEP = 20_000
"""Rows between two reports of progress."""


class Row(NamedTuple):
    """A question as it was asked, what was said, and its label; `label_time` is None as long as there is none."""

    id: EventId
    time: datetime
    features: dict[str, Any]
    prediction: Any
    model: str
    version: int
    late: bool
    label: Any
    label_time: datetime | None
    assumed: bool


class Unlike(NamedTuple):
    """A row that is another one when it is computed again: what was logged, and what is computed, by column."""

    id: EventId
    columns: dict[str, tuple[Any, Any]]


@dataclass
class Skew:
    """How the rows as logged and as computed again compare."""

    rows: int = 0
    equal: int = 0
    only_logged: int = 0
    only_computed: int = 0
    unlike: list[Unlike] = field(default_factory=list)

    @property
    def none(self) -> bool:
        """Whether all agree."""
        return self.equal == self.rows and not self.only_computed


class Span(NamedTuple):
    """Event times (µs), `begin` included and `end` not; None: no bound."""

    begin: int | None = None
    end: int | None = None

    @classmethod
    def of(cls, begin: str, end: str) -> Span:
        """From texts: `start` or a time, `end` or a time. Raises `JobError`."""
        bounds = []
        for name, text, none in (("--from", begin, "start"), ("--until", end, "end")):
            try:
                bounds.append(None if text == none else to_time_us(text))
            except ValueError:
                raise JobError(f"{name} {text}: neither `{none}` nor an event time such as 2026-03-01") from None
        return cls(*bounds)

    def holds(self, time: int) -> bool:
        """Whether a time lies within."""
        return (self.begin is None or time >= self.begin) and (self.end is None or time < self.end)


class Dataset:
    """The rows of a job's learn log over a span of event time.

    Parameters
    ----------
    job, run
        The job, and where its run lies; it may go on meanwhile.
    span
        Of the questions' event times.
    show
        Takes the number of rows, now and then.

    Raises `StateError` where there is no learn log.
    """

    def __init__(
        self, job: Job, run: RunDirectory, span: Span, show: Callable[[int], None] = lambda rows: None
    ) -> None:
        self._job, self._run, self._span, self._show = job, run, span, show
        self._probability = shows_probability(job)
        branch = read_branches(run)[-1]
        lineage = Lineage([Version(*fork) for fork in branch.forks], Version(branch.branch, 0)).on_from_here()
        paths = sorted(run.learned.glob("*.sqlite3"))
        if not paths:
            raise StateError(f"{run.learned} holds no learn log. Hint: was the job run with audit=None?")
        self._closing = ExitStack()
        self._logs = [self._closing.enter_context(closing(LearnReader(p, lineage, names_of(job)))) for p in paths]

    def close(self) -> None:
        """Give the logs up."""
        self._closing.close()

    def rows(self) -> Iterator[Row]:
        """As logged, one key group of models after the other, in the order they were asked."""
        count = 0
        for log in self._logs:
            labels = self._labels(log)
            for row in self._asked(log, labels):
                yield row
                count += 1
                if count % _STEP == 0:
                    self._show(count)

    def _labels(self, log: LearnReader) -> dict[int, tuple[Any, int, bool]]:
        """By a question's number: label, when it was known, whether it is assumed."""
        first: int | None = None
        found: dict[int, tuple[Any, int, bool]] = {}
        for head in log.heads:
            for entry in log.entries(head.version)[1]:
                if entry[0] == ASKED:
                    if first is None and self._span.holds(entry[4]):
                        first = entry[1]
                elif first is not None and entry[1] >= first:
                    found[entry[1]] = (entry[3], entry[4], entry[5])
        return found

    def _asked(self, log: LearnReader, labels: dict[int, tuple[Any, int, bool]]) -> Iterator[Row]:
        for head in log.heads:
            names, entries = log.entries(head.version)
            said = iter(log.outputs(head.version) or ())
            for entry in entries:
                if entry[0] != ASKED or entry[-1] == FAILED:
                    continue
                output = next(said, None)
                _, number, key, id, time, kept, version, late, _ = entry
                if not self._span.holds(time):
                    continue
                values = kept if type(kept) is tuple else [kept.get(name) for name in names]
                features = dict(zip(names, values, strict=True))
                label, moment, assumed = labels.pop(number, (None, None, False))
                if self._probability and isinstance(output, dict):
                    output = output.get(True, 0.0)
                name = model_named(self._job.model_name, self._job.per, key)
                known = None if moment is None else to_datetime(moment)
                yield Row(id, to_datetime(time), features, output, name, version, late, label, known, assumed)

    # -- computed again

    def computed(self) -> Iterator[Row]:
        """The same rows by working on the logged batches once more, from the checkpoint before them.

        What was predicted is not read. Rows come with their labels, or at the end without.
        """
        state = ReplayedState(self._job, self._run, self._place())
        waiting: dict[EventId, Prediction] = {}
        try:
            for record in state.records():
                if isinstance(record, Prediction) and self._span.holds(to_time_us(record.time)):
                    waiting[record.id] = record
                elif isinstance(record, Outcome) and (asked := waiting.pop(record.id, None)) is not None:
                    yield _row(asked, record)
        finally:
            state.close()
        for asked in waiting.values():
            yield _row(asked, None)

    def _place(self) -> Place:
        if self._span.begin is None:
            return find(self._run, "start")
        before = to_datetime(self._span.begin - 1).isoformat()
        return find(self._run, before)._replace(moment=None)

    def compare(self, logged: dict[EventId, bytes]) -> Skew:
        """Compute the rows again and compare them with the digests of those that were logged."""
        skew = Skew(rows=len(logged))
        unlike: set[EventId] = set()
        left = dict(logged)
        for count, row in enumerate(self.computed()):
            wanted = left.pop(row.id, None)
            if wanted is None:
                skew.only_computed += 1
            elif wanted == digest(row):
                skew.equal += 1
            elif len(unlike) < SHOWN:
                unlike.add(row.id)
            if count % _STEP == 0:
                self._show(count)
        skew.only_logged = len(left)
        if unlike:
            ours = {row.id: row for row in self.rows() if row.id in unlike}
            skew.unlike = [_unlike(ours[row.id], row) for row in self.computed() if row.id in unlike]
        return skew


def _row(asked: Prediction, outcome: Outcome | None) -> Row:
    known = (None, None, False) if outcome is None else (outcome.label, outcome.label_time, outcome.assumed)
    return Row(
        asked.id, asked.time, asked.features, asked.output, asked.model, asked.version, asked.late, *known
    )  # fmt: skip


def digest(row: Row) -> bytes:
    """Sixteen bytes that tell rows apart: as `repr` shows them, floats to the last bit."""
    return blake2b(repr(tuple(row)).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _unlike(logged: Row, computed: Row) -> Unlike:
    ours, theirs = _columns(logged), _columns(computed)
    return Unlike(
        logged.id, {name: (ours.get(name), theirs.get(name)) for name in ours | theirs
                    if repr(ours.get(name)) != repr(theirs.get(name))}
    )  # fmt: skip


def _columns(row: Row) -> dict[str, Any]:
    """A row flat: features stand among the other columns, under a name of their own where one of these is taken."""
    own = row._asdict()
    features = own.pop("features")
    before = {"id": own.pop("id"), "time": own.pop("time")}
    taken = before | own
    return before | {(f"feature_{name}" if name in taken else name): value for name, value in features.items()} | own


# -- files


class Writer(ABC):
    """Writes rows to a file."""

    @abstractmethod
    def write(self, rows: list[dict[str, Any]]) -> None:
        """Some rows."""

    @abstractmethod
    def close(self) -> None:
        """Finish the file."""


class _Lines(Writer):
    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")

    def write(self, rows: list[dict[str, Any]]) -> None:
        self._file.write(b"".join(encode(row) for row in rows))

    def close(self) -> None:
        self._file.close()


class _Cells(Writer):
    def __init__(self, path: Path) -> None:
        self._file = path.open("w", newline="")
        self._writer: csv.DictWriter[str] | None = None

    def write(self, rows: list[dict[str, Any]]) -> None:
        if self._writer is None:
            self._writer = csv.DictWriter(self._file, list(rows[0]))
            self._writer.writeheader()
        for row in rows:
            self._writer.writerow({name: _cell(value) for name, value in row.items()})

    def close(self) -> None:
        self._file.close()


class _Columns(Writer):
    """Parquet, by pyarrow; a column of several types becomes float64 where all are numbers, else text."""

    def __init__(self, path: Path, kinds: dict[str, set[type]]) -> None:
        import pyarrow as pa
        from pyarrow import parquet

        self._kinds = kinds
        self._schema = pa.schema([(name, _arrow(some)) for name, some in kinds.items()])
        self._texts = {name for name in kinds if self._schema.field(name).type == pa.string()}
        self._writer = parquet.ParquetWriter(path, self._schema)

    def write(self, rows: list[dict[str, Any]]) -> None:
        import pyarrow as pa

        columns = {name: [row.get(name) for row in rows] for name in self._kinds}
        for name in self._texts:
            columns[name] = [value if value is None or type(value) is str else _cell(value) for value in columns[name]]
        self._writer.write_table(pa.table(columns, schema=self._schema))

    def close(self) -> None:
        self._writer.close()


def _arrow(kinds: set[type]) -> Any:
    """The column type that holds values of these types."""
    import pyarrow as pa

    kinds = kinds - {type(None)}
    if kinds == {datetime}:
        return pa.timestamp("us", tz="UTC")
    for kind, column in ((bool, pa.bool_()), (int, pa.int64()), (str, pa.string())):
        if kinds == {kind}:
            return column
    return pa.float64() if kinds and kinds <= {int, float} else pa.string()


def _cell(value: Any) -> str:
    """As text: nothing for None, JSON for what has parts, ISO for times."""
    if value is None:
        return ""
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, dict | list | tuple):
        return json.dumps(msgspec.to_builtins(value, str_keys=True))
    return str(value)


FORMATS = (".parquet", ".csv", ".jsonl")


def write_dataset(dataset: Dataset, path: Path, keep_digests: bool = True) -> tuple[dict[EventId, bytes], int, int]:
    """Write the rows to a file, by its suffix; their digests by id, how many they are, and how many have labels.

    Raises `JobError` for another suffix, or where pyarrow is missing.
    """
    if path.suffix not in FORMATS:
        raise JobError(f"--output {path}: a dataset is one of {', '.join(FORMATS)}")
    digests: dict[EventId, bytes] = {}
    counts = [0, 0]

    def noted(rows: Iterable[Row]) -> Iterator[dict[str, Any]]:
        for row in rows:
            if keep_digests:
                digests[row.id] = digest(row)
            counts[0] += 1
            counts[1] += row.label_time is not None
            yield _columns(row)

    temporary = path.with_name(f".{path.name}.tmp")
    writer = _writer(dataset, path.suffix, temporary)
    try:
        rows = noted(dataset.rows())
        while some := list(islice(rows, _CHUNK)):
            writer.write(some)
    except BaseException:
        writer.close()
        temporary.unlink(missing_ok=True)
        raise
    writer.close()
    temporary.replace(path)
    return digests, counts[0], counts[1]


def _writer(dataset: Dataset, suffix: str, path: Path) -> Writer:
    path.parent.mkdir(parents=True, exist_ok=True)
    if suffix == ".jsonl":
        return _Lines(path)
    if suffix == ".csv":
        return _Cells(path)
    try:
        import pyarrow  # noqa: F401 - an extra
    except ImportError:
        raise JobError("a .parquet file needs pyarrow. Hint: pip install 'millrace[parquet]', or a .csv file") from None
    kinds: dict[str, set[type]] = {}
    for row in dataset.rows():  # columns have one type, and a later row may need a wider one
        for name, value in _columns(row).items():
            kinds.setdefault(name, set()).add(type(value))
    return _Columns(path, kinds)
