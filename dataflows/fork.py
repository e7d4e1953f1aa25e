"""A fork: a new run that begins with what another one did, and does it again, with the same job or a changed one.

Its state directory gets the order log of the other run and, where it begins at a checkpoint, the rows of that. The run
that follows forms the logged batches again from the inputs, as any resume does; nothing that was predicted is read. The
run that it was taken from is not touched, and may go on meanwhile.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from pydantic import BaseModel, ConfigDict, ValidationError

from dataflows.checkpoints import Checkpoints, Manifest, missing_parts
from dataflows.connectors.files import LineFile
from dataflows.control import write_whole
from dataflows.job import Job, JobError
from dataflows.order import TO_THE_END, Source
from dataflows.orderlog import ALL_READY, LogChain, LogEntry, OrderLog, OrderLogError
from dataflows.replay import inputs_of
from dataflows.settings import RunDirectory
from dataflows.state import HINT, StateError, StateFile, StateStore, file_names, open_database


@dataclass(frozen=True)
class Fork:
    """What a new run begins with.

    Parameters
    ----------
    source
        The run that it is taken from.
    log
        The order log that it follows; the batches after the checkpoint are worked on.
    manifest
        The checkpoint that it begins at; None: before the first event.
    renamed
        Input partitions that have another name now, by the name in the log.
    regroup
        Each batch takes all that is ready when the logged one was formed, however many items that one had: for a job
        that holds events back otherwise, or reads other records, than the one that wrote the log.
    """

    source: RunDirectory
    log: LogChain
    manifest: Manifest | None = None
    renamed: Mapping[str, str] = field(default_factory=dict)
    regroup: bool = False

    def entries(self, number: int) -> Iterator[LogEntry]:
        """What the order log of the new run has after a batch."""
        for entry in self.log.after(number):
            yield self._taken(entry)

    def _taken(self, entry: LogEntry) -> LogEntry:
        if self.regroup:
            entry = msgspec.structs.replace(entry, count=ALL_READY)
        if not self.renamed:
            return entry
        pulls = [(self.renamed.get(name, name), count) for name, count in entry.pulls]
        ends = {self.renamed.get(name, name): end for name, end in entry.ends.items()}
        return msgspec.structs.replace(entry, pulls=pulls, ends=ends)


class Asked(BaseModel):
    """What a fork was asked for, and what that meant then; kept beside its state.

    So the same command, used again after it was interrupted, goes on with the same, whatever `latest` is by now.

    Parameters
    ----------
    source
        The run that it is taken from.
    job, origin, until
        As they were given.
    branch, last
        The branch of the source that is followed, and its last batch; None: all there are.
    quiet
        The batches up to this one give no records.
    history
        The branch whose records are history, while a bootstrap is under way; None when it is complete, and for others.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    job: str = ""
    origin: str = "start"
    until: str = "end"
    branch: int = 1
    last: int | None = None
    quiet: int = 0
    history: int | None = None

    @classmethod
    def of(cls, target: RunDirectory) -> Asked | None:
        """What is noted in a state directory; None where nothing is."""
        try:
            return cls.model_validate_json(_note(target).read_bytes())
        except FileNotFoundError:
            return None
        except ValidationError as error:
            raise StateError(f"{_note(target)} is damaged: {str(error).splitlines()[0]}. {HINT}") from None

    def keep(self, target: RunDirectory) -> None:
        """Note it in a state directory. Before anything else is made there: it tells whose the directory is."""
        target.state.mkdir(parents=True, exist_ok=True)
        write_whole(_note(target), self.model_dump_json(indent=1).encode(), durable=True)


def _note(target: RunDirectory) -> Path:
    return target.state / "fork.json"


def follow(fork: Fork, target: OrderLog, begin: int) -> None:
    """Append to an order log that begins after a batch what the fork's has more.

    Raises `OrderLogError` where it has a batch that the fork's has not: then one of the two went its own way.
    """
    entries = fork.entries(begin)
    for mine in list(target.after(begin)):
        if next(entries, None) != mine:  # also in when they were formed, by which batches of two runs are told apart
            raise OrderLogError(
                f"batch {mine.number} is not one of {fork.source.path}: this run has gone on by itself, or that one "
                "has gone another way since. Hint: a new directory"
            )
    for entry in entries:
        target.append(entry)


def renames(log: LogChain, job: Job, begin: int = 0, manifest: Manifest | None = None) -> dict[str, str]:
    """How the partitions of an order log are called in the inputs of a job that reads others instead.

    `begin` is the last batch that need not be formed again, `manifest` the checkpoint that a new run begins at.
    Raises `JobError` where it cannot be told which is which, or where positions in the old ones are needed.
    """
    logged = {name for entry in log.after(begin) for name, _ in entry.pulls}
    logged |= set() if manifest is None else manifest.offsets.keys()
    there: set[str] = set()
    for _, source in inputs_of(job):
        with closing(source.feed(TO_THE_END)) as feed:
            there |= set(feed.names())
        if manifest is not None:
            _check_positions(source, manifest)
    found = _pairs(sorted(logged - there), sorted(there - logged))
    if found and manifest is not None:
        names = ", ".join(f"{old} with {new}" for old, new in found.items())
        raise JobError(
            f"checkpoint {manifest.version} knows where it stopped in other inputs: {names} cannot be told. "
            "Hint: --from start, or files of the same names"
        )
    return found


def _check_positions(source: Source, manifest: Manifest) -> None:
    """Other files of the same names: where the checkpoint stopped there must be the end of as many lines."""
    if not isinstance(source, LineFile):
        return
    for name, position in manifest.offsets.items():
        path = source.path / name if source.path.is_dir() else source.path
        if path.name != name or not path.is_file() or path.suffix == ".gz":
            continue
        byte, line = position[:2]
        if byte <= path.stat().st_size and _lines_before(path, byte) != line:
            raise OrderLogError(
                f"{path}: checkpoint {manifest.version} stopped after line {line}, at byte {byte}, and no such line "
                "ends there. Hint: restore the file, or --from start where it was corrected"
            )


def _lines_before(path: Path, byte: int) -> int:
    """How many lines end before a byte; -1 where it is in the middle of one."""
    lines, last = 0, b"\n"
    with path.open("rb") as file:
        while byte > 0 and (chunk := file.read(min(byte, 1 << 20))):
            byte -= len(chunk)
            lines += chunk.count(b"\n")
            last = chunk[-1:]
    return lines if last == b"\n" else -1


def _pairs(gone: list[str], new: list[str]) -> dict[str, str]:
    """Old names with new ones: of one file each, or of partitions with equal numbers.

    >>> _pairs(["labels.jsonl"], ["corrected.jsonl"])
    {'labels.jsonl': 'corrected.jsonl'}
    >>> _pairs(["a/0", "a/1"], ["b/0", "b/1", "b/2"])
    {'a/0': 'b/0', 'a/1': 'b/1'}
    """
    if len(gone) == 1 and len(new) == 1:
        return {gone[0]: new[0]}
    numbered = {name.rpartition("/")[2]: name for name in new if "/" in name}
    pairs = {name: numbered[number] for name in gone if (number := name.rpartition("/")[2]) in numbered}
    if len(pairs) < len(gone) or len(numbered) < sum("/" in name for name in new):
        raise JobError(
            f"the run read {', '.join(gone)}, and the job reads {', '.join(new) or 'no other input'}. "
            "Hint: give it the same inputs, or others with as many files or partitions (--data, --labels)"
        )
    return pairs


def copy_rows(source: RunDirectory, target: RunDirectory, manifest: Manifest, groups: int) -> None:
    """Copy the state files of a run as they are at a checkpoint, also while it writes them.

    Raises `StateError` when the checkpoint was dropped meanwhile.
    """
    target.groups.mkdir(parents=True, exist_ok=True)
    names = file_names(groups)
    with ThreadPoolExecutor(max_workers=2) as pool:
        list(pool.map(lambda name: _copy(source, target, name, manifest), names))
    store = StateStore(target.groups, manifest.lineage, writable=False)
    try:
        missing = missing_parts(manifest, store)
    finally:
        store.close()
    # Pruning takes the manifest away first: one that is still there had all its rows while they were copied.
    if manifest.version not in {kept.version for kept in Checkpoints(source).all()}:
        raise StateError(f"checkpoint {manifest.version} was dropped just now. Hint: try again, with a newer one")
    if missing:
        raise StateError(f"checkpoint {manifest.version} cannot be copied: {missing[0]}. {HINT}")


def _copy(source: RunDirectory, target: RunDirectory, name: str, manifest: Manifest) -> None:
    path = target.groups / f"{name}.sqlite3"
    path.unlink(missing_ok=True)
    try:
        with (
            closing(open_database(source.groups / path.name, writable=False)) as old,
            closing(sqlite3.connect(path)) as new,
        ):
            old.backup(new)
    except sqlite3.Error as error:
        raise StateError(f"the state file {source.groups / path.name} cannot be copied: {error}") from None
    file = StateFile(path, name)
    try:
        file.roll_back(manifest.version)
    finally:
        file.close()
