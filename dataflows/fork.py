"""A fork: a new run that begins with what another one did, and does it again, with the same job or a changed one.

Its state directory gets the order log of the other run and, where it begins at a checkpoint, the rows of that. The run
that follows forms the logged batches again from the inputs, as any resume does; nothing that was predicted is read. The
run that it was taken from is not touched, and may go on meanwhile.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field

import msgspec

from dataflows.checkpoints import Manifest, missing_parts
from dataflows.job import Job, JobError
from dataflows.order import TO_THE_END
from dataflows.orderlog import LogChain, LogEntry, OrderLog, OrderLogError
from dataflows.replay import inputs_of
from dataflows.settings import RunDirectory
from dataflows.state import StateError, StateFile, StateStore, file_names, open_database


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
    """

    source: RunDirectory
    log: LogChain
    manifest: Manifest | None = None
    renamed: Mapping[str, str] = field(default_factory=dict)


def follow(fork: Fork, target: OrderLog, begin: int) -> None:
    """Append to an order log that begins after a batch what the fork's has more.

    Raises `OrderLogError` where the last batches of the two are not the same: then the target went its own way.
    """
    last = max(target.after(begin), key=lambda entry: entry.number, default=None)
    for entry in fork.log.after(begin if last is None else last.number - 1):
        named = _renamed(entry, fork.renamed)
        if last is None or entry.number > last.number:
            target.append(named)
        elif (named.pulls, named.count) != (last.pulls, last.count):
            raise OrderLogError(
                f"batch {last.number} is not what it is in {fork.source.path}: this run has gone on by itself. "
                "Hint: a new directory"
            )


def _renamed(entry: LogEntry, names: Mapping[str, str]) -> LogEntry:
    if not names:
        return entry
    pulls = [(names.get(name, name), count) for name, count in entry.pulls]
    ends = {names.get(name, name): end for name, end in entry.ends.items()}
    return msgspec.structs.replace(entry, pulls=pulls, ends=ends)


def renames(log: LogChain, job: Job) -> dict[str, str]:
    """How the partitions of an order log are called in the inputs of a job that reads others instead.

    Raises `JobError` where it cannot be told which is which.
    """
    logged = {name for entry in log.after(0) for name, _ in entry.pulls}
    there: set[str] = set()
    for _, source in inputs_of(job):
        with closing(source.feed(TO_THE_END)) as feed:
            there |= set(feed.names())
    return _pairs(sorted(logged - there), sorted(there - logged))


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
    if missing:
        raise StateError(f"checkpoint {manifest.version} cannot be copied, was it dropped just now? {missing[0]}")


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
