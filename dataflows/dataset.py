"""Training sets: the features as they were asked and the labels as they became known; and the same computed again.

The learn log has both as they were (log-and-wait). The same questions asked again, by working on the logged batches
once more, must give the same rows: where they do not, the model was served other features than it would be trained
with.
"""

from __future__ import annotations

import csv
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from functools import lru_cache
from hashlib import blake2b
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dataflows.bundle import models_of
from dataflows.checkpoints import Checkpoints, Manifest
from dataflows.events import EventId, encode, to_datetime, to_time_us
from dataflows.history import Place, ReplayedState
from dataflows.job import Job, JobError
from dataflows.learner import Learner, model_named, shows_probability
from dataflows.learnlog import ASKED, FAILED, OUTCOME, LearnLog, entries_of
from dataflows.learnstore import LearnReader, open_logs
from dataflows.models import names_of_models
from dataflows.pickles import names_of
from dataflows.settings import RunDirectory, Start, read_branches
from dataflows.startup import read_job
from dataflows.state import Version, group_file

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
    """How the rows as logged and as computed again compare.

    `unchecked` rows were asked of the job as it was declared before it was changed, which is not at hand any more;
    `not_kept` are computed, and older than the learn log. Of rows that are only on one side, the ids of the first.
    """

    rows: int = 0
    equal: int = 0
    others: int = 0
    unchecked: int = 0
    only_logged: int = 0
    only_computed: int = 0
    not_kept: int = 0
    unlike: list[Unlike] = field(default_factory=list)
    ids_logged: list[EventId] = field(default_factory=list)
    ids_computed: list[EventId] = field(default_factory=list)

    @property
    def none(self) -> bool:
        """Whether all that could be compared agree."""
        return not (self.others or self.only_logged or self.only_computed)


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
    """The rows of a job's learn log over a span of event time, as of the newest checkpoint.

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
        self.job = job
        self._run, self._span, self._show = run, span, show
        self._probability = shows_probability(job)
        self._branches = read_branches(run)
        branch = self._branches[-1]
        way = branch.lineage.on_from_here()
        # The learn log, the order log and the inputs are ahead of each other, but not at a checkpoint.
        known = [m for m in Checkpoints(run).all() if way.holds(m.version.number)]
        self._retained = sorted(known, key=lambda manifest: manifest.version)
        self._end = self._retained[-1].version if self._retained else Version(branch.branch, 0)
        self._logs = open_logs(run, way.until(self._end), names_of(job))

    def close(self) -> None:
        """Give the logs up."""
        for log in self._logs:
            log.close()

    def rows(self) -> Iterator[tuple[int, Row]]:
        """As logged, by the questions' numbers: one key group of models after the other, in the order of questions."""
        count = 0
        for log in self._logs:
            labels = self._labels(log)
            name = names_of_models(self.job, self._branches, log)
            for head in log.heads:
                names, entries = log.entries(head.version)
                outputs = log.outputs(head.version)
                for number, key, row in self._asked(names, entries, outputs):
                    label, moment, assumed = labels.pop(number, _NOTHING)
                    known = None if moment is None else to_datetime(moment)
                    named = name(head.version, head.begun, key)
                    yield number, row._replace(model=named, label=label, label_time=known, assumed=assumed)
                    count += 1
                    if count % _STEP == 0:
                        self._show(count)

    def _labels(self, log: LearnReader) -> dict[int, tuple[Any, int | None, bool]]:
        """By a question's number: label, when it was known, whether it is assumed."""
        first: int | None = None
        found: dict[int, tuple[Any, int | None, bool]] = {}
        for head in log.heads:
            for entry in log.entries(head.version)[1]:
                if entry[0] == ASKED:
                    if first is None and self._span.holds(entry[4]):
                        first = entry[1]
                elif entry[0] == OUTCOME and first is not None and entry[1] >= first and entry[-1] != FAILED:
                    found[entry[1]] = (entry[3], entry[4], entry[5])
        return found

    def _asked(
        self, names: tuple[str, ...], entries: Iterable[tuple[Any, ...]], outputs: Iterable[Any] | None
    ) -> Iterator[tuple[int, Any, Row]]:
        """The questions of a chunk that were answered: number, key of the model, row without model and label."""
        said = iter(outputs or ())
        for entry in entries:
            if entry[0] != ASKED or entry[-1] == FAILED:
                continue
            output = next(said, None)
            _, number, key, id, time, kept, version, late, _ = entry
            if not self._span.holds(time):
                continue
            values = kept if type(kept) is tuple else [kept.get(name) for name in names]
            features = dict(zip(names, values, strict=True))
            if self._probability and isinstance(output, dict):
                output = output.get(True, 0.0)
            yield number, key, Row(id, to_datetime(time), features, output, "", version, late, None, None, False)

    # -- computed again

    def computed(self) -> Iterator[tuple[str, int, Row]]:
        """The same rows by working on the logged batches once more, each with its key group and number.

        From the checkpoint before them, or where the job was changed since, from there on. What was predicted is not
        read. Rows come with their labels, or at the end without.
        """
        begin = self._beginning()
        if begin is None:
            return
        state = _Again(self.job, self._run, Place(self._branches[-1], begin, self._end.batch))
        waiting: dict[int, tuple[str, Row]] = {}
        try:
            for group, names, entries, outputs in state.learned():
                for number, key, row in self._asked(names, entries, outputs):
                    waiting[number] = group, row._replace(model=model_named(self.job.model_name, self.job.per, key))
                for entry in entries:
                    if entry[0] == OUTCOME and entry[1] in waiting and entry[-1] != FAILED:
                        group, row = waiting.pop(entry[1])
                        known = to_datetime(entry[4])
                        yield group, entry[1], row._replace(label=entry[3], label_time=known, assumed=entry[5])
        finally:
            state.close()
        for number, (group, row) in waiting.items():
            yield group, number, row

    def _beginning(self) -> Manifest | None:
        """The newest place before the span from which it can be computed again, else the first one within.

        None where there is none: the job was changed, and has made no checkpoint since that is retained.
        """
        since = self._since()
        begin = self._span.begin
        places = [m for m in self._retained if since is None or m.version >= since]
        if since is None:
            branch = self._branches[-1]
            places.insert(0, Manifest(branch=branch.branch, batch=0, job=read_job(self._run)))
        before = [m for m in places if m.clock is None or (begin is not None and m.clock < begin)]
        return before[-1] if before else places[0] if places else None

    def _since(self) -> Version | None:
        """The newest version up to which the job was declared otherwise, or no order log is kept; None: there is none.

        Metrics do not matter.
        """
        starts = {start.branch: start for start in self._branches}
        newest = self._branches[-1]
        since: Version | None = None
        ways = [*newest.forks, (newest.branch, 0)]
        for (on, until), (after, _) in pairwise(ways):
            if _served(starts[on]) != _served(starts[after]) or not self._run.order_log(on).exists():
                since = Version(on, until)
        return since

    def compare(self, logged: dict[int, bytes]) -> Skew:
        """Compute the rows again and compare them with the digests of those that were logged, by number."""
        skew = Skew(rows=len(logged))
        unlike: dict[int, Row] = {}
        begin = self._beginning()
        last = None if begin is None else begin.questions
        left = {number: each for number, each in logged.items() if last is not None and number > last}
        skew.unchecked = len(logged) - len(left)
        oldest = {log.path.stem: _first_question(log) for log in self._logs}
        for count, (group, number, row) in enumerate(self.computed()):
            wanted = left.pop(number, None)
            if wanted is not None and wanted == digest(row):
                skew.equal += 1
            elif wanted is not None:
                skew.others += 1
                if len(unlike) < SHOWN:
                    unlike[number] = row
            elif number < oldest.get(group, 0):
                skew.not_kept += 1
            else:
                skew.only_computed += 1
                if skew.only_computed <= SHOWN:
                    skew.ids_computed.append(row.id)
            if count % _STEP == 0:
                self._show(count)
        skew.only_logged = len(left)
        if unlike or left:
            wanted_ids = set(islice(left, SHOWN))
            for number, row in self.rows():
                if number in unlike:
                    skew.unlike.append(_unlike(row, unlike[number]))
                elif number in wanted_ids:
                    skew.ids_logged.append(row.id)
        return skew


_NOTHING: tuple[Any, int | None, bool] = (None, None, False)
"""In place of a label, its time and whether it was assumed."""


def _served(start: Start) -> Any:
    """What rows depend on of what a branch declares."""
    steps = {step: each for step, each in start.job.get("steps", {}).items() if step != "publish"}
    return steps, start.job.get("names")


def _first_question(log: LearnReader) -> int:
    """The number of the first question in a log; beyond all numbers where there is none."""
    return min((head.first_question for head in log.heads if head.first_question is not None), default=1 << 62)


class _Again(ReplayedState):
    """The logged batches worked on again; what the models were asked and taught is noted as in the learn log.

    Its layout is that of the newest branch, which may begin at the checkpoint of another one.
    """

    def _begin_reading(self, run: RunDirectory) -> None:
        self.layout = read_branches(run)[-1].layout
        self._notes: dict[int, LearnLog] = {}
        super()._begin_reading(run)

    def _learner(self, group: int) -> Learner:
        # No keyframes: nothing begins, and nobody learns so many examples.
        log = self._notes[group] = LearnLog(self.job.feature_names, 1 << 62, begins=False)
        warm = models_of(self.job, self._run)
        return Learner(self.job, self._rows(group_file(group), "learner"), self.layout.models, log, warm)

    def learned(self) -> Iterator[tuple[str, tuple[str, ...], list[tuple[Any, ...]], list[Any]]]:
        """Of each batch, by key group of models: names of the features, entries, what the questions were told."""
        self._begin()
        for batch in self._batches():
            self._take(batch)
            for group, log in self._notes.items():
                if log:
                    chunk = log.take()
                    yield group_file(group), chunk.names, entries_of(chunk.fields), chunk.outputs


def digest(row: Row) -> bytes:
    """Sixteen bytes that tell rows apart: as `repr` shows them, floats to the last bit."""
    return blake2b(repr(tuple(row)).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _unlike(logged: Row, computed: Row) -> Unlike:
    ours, theirs = columns_of(logged), columns_of(computed)
    return Unlike(
        logged.id, {name: (ours.get(name), theirs.get(name)) for name in ours | theirs
                    if repr(ours.get(name)) != repr(theirs.get(name))}
    )  # fmt: skip


_FIRST = ("id", "time")
_OWN = tuple(name for name in Row._fields if name != "features")
_LAST = tuple(name for name in _OWN if name not in _FIRST)


@lru_cache(maxsize=64)
def _columns_for(names: tuple[str, ...]) -> tuple[str, ...]:
    """The columns of features: under a name of their own where one of a row's other columns has theirs."""
    taken = {*_OWN, *names}
    found = []
    for name in names:
        column = name
        while column in _OWN or (column != name and column in taken):
            column = f"feature_{column}"
        taken.add(column)
        found.append(column)
    return tuple(found)


def columns_of(row: Row) -> dict[str, Any]:
    """A row flat: features stand among the other columns."""
    named = zip(_columns_for(tuple(row.features)), row.features.values(), strict=True)
    first = {name: getattr(row, name) for name in _FIRST}
    return first | dict(named) | {name: getattr(row, name) for name in _LAST}


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
    def __init__(self, path: Path, columns: Iterable[str]) -> None:
        self._file = path.open("w", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, list(columns))
        self._writer.writeheader()

    def write(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            self._writer.writerow({name: _cell(_plain(value)) for name, value in row.items()})

    def close(self) -> None:
        self._file.close()


class _Columns(Writer):
    """Parquet, by pyarrow; a column of several types becomes float64 where all are numbers, else text."""

    def __init__(self, path: Path, kinds: dict[str, set[str]]) -> None:
        import pyarrow as pa
        from pyarrow import parquet

        self._kinds = kinds
        self._schema = pa.schema([(name, _arrow(some)) for name, some in kinds.items()])
        self._types = {name: self._schema.field(name).type for name in kinds}
        self._writer = parquet.ParquetWriter(path, self._schema)

    def write(self, rows: list[dict[str, Any]]) -> None:
        import pyarrow as pa

        columns = {}
        for name, kind in self._types.items():
            values = [_plain(row.get(name)) for row in rows]
            if kind == pa.string():
                values = [value if value is None or type(value) is str else _cell(value) for value in values]
            elif kind == pa.float64():
                values = [None if value is None else float(value) for value in values]
            columns[name] = values
        self._writer.write_table(pa.table(columns, schema=self._schema))

    def close(self) -> None:
        self._writer.close()


def _plain(value: Any) -> Any:
    """As a plain Python value: numpy's numbers as numbers, members of enumerations as what they stand for."""
    if isinstance(value, Enum):
        return _plain(value.value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, float):
        return float(value)
    return str(value) if isinstance(value, str) else value


def _kind(value: Any) -> str:
    """What a column has to hold for this value. Of integers that a double cannot hold, and that 64 bits cannot."""
    if type(value) is int:
        return "int" if abs(value) <= 1 << 53 else "long" if -(1 << 63) <= value < 1 << 63 else "huge"
    return type(value).__name__


def _arrow(kinds: set[str]) -> Any:
    """The column type that holds values of these kinds."""
    import pyarrow as pa

    kinds = kinds - {"NoneType"}
    if kinds == {"datetime"}:
        return pa.timestamp("us", tz="UTC")
    if kinds == {"bool"}:
        return pa.bool_()
    if kinds and kinds <= {"int", "long"}:
        return pa.int64()
    return pa.float64() if kinds and kinds <= {"int", "float"} else pa.string()


def _cell(value: Any) -> str:
    """As text: nothing for None, JSON for what has parts, ISO for times."""
    if value is None:
        return ""
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, dict | list | tuple):
        return encode(value).decode()[:-1]
    return str(value)


FORMATS = (".parquet", ".csv", ".jsonl")


def write_dataset(dataset: Dataset, path: Path, keep_digests: bool = True) -> tuple[dict[int, bytes], int, int]:
    """Write the rows to a file, by its suffix; their digests by number, how many they are, and how many have labels.

    Raises `JobError` for another suffix, or where pyarrow is missing.
    """
    if path.suffix not in FORMATS:
        raise JobError(f"--output {path}: a dataset is one of {', '.join(FORMATS)}")
    if path.is_dir():
        raise JobError(f"--output {path} is a directory. Hint: a file in it")
    digests: dict[int, bytes] = {}
    counts = [0, 0]

    def noted(rows: Iterable[tuple[int, Row]]) -> Iterator[dict[str, Any]]:
        for number, row in rows:
            if keep_digests:
                digests[number] = digest(row)
            counts[0] += 1
            counts[1] += row.label_time is not None
            yield columns_of(row)

    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with closing(_writer(dataset, path.suffix, temporary)) as writer:
            rows = noted(dataset.rows())
            while some := list(islice(rows, _CHUNK)):
                writer.write(some)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return digests, counts[0], counts[1]


def _writer(dataset: Dataset, suffix: str, path: Path) -> Writer:
    if suffix == ".parquet":
        try:
            import pyarrow  # noqa: F401 - an extra
        except ImportError:
            raise JobError(
                "a .parquet file needs pyarrow. Hint: pip install 'millrace[parquet]', or a .csv file"
            ) from None
    path.parent.mkdir(parents=True, exist_ok=True)
    if suffix == ".jsonl":
        return _Lines(path)
    kinds = _kinds(dataset)
    return _Cells(path, kinds) if suffix == ".csv" else _Columns(path, kinds)


def _kinds(dataset: Dataset) -> dict[str, set[str]]:
    """All columns, with the kinds of values in each: they have one type, and a later row may need a wider one.

    Features may have come and gone while the job ran.
    """
    found: dict[str, set[str]] = {}
    for _, row in dataset.rows():
        for name, value in columns_of(row).items():
            found.setdefault(name, set()).add(_kind(_plain(value)))
    features = [name for name in found if name not in _OWN] or _columns_for(dataset.job.feature_names)
    return {name: found.get(name, set()) for name in (*_FIRST, *features, *_LAST)}
