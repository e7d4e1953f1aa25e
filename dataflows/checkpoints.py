"""Checkpoints: a manifest each, written once the engine has committed; retention, savepoints, and pruning after them.

A manifest says what a past state is: the version (branch and batch), where the inputs and outputs stood, the job and
the environment. It pins its version: rows that it needs are not pruned. One agent, in the launcher, writes manifests,
drops those that retention no longer wants, and only then prunes, in this order, so that whatever has a manifest can be
opened.

Retention thins out with age: the newest ones, then the last of each hour, day and month. A savepoint is a manifest kept
by a name until somebody deletes it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec
from pydantic import BaseModel, ConfigDict, Field

from dataflows.control import Control, Phase, write_whole
from dataflows.recovery import Committed
from dataflows.settings import RunDirectory, Start, read_branches
from dataflows.state import READER, Lineage, StateError, StateFile, StateStore, Version

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*")


_CLOCKS = 1000
"""Event times that are remembered with their versions."""


class Retention(BaseModel):
    """Which checkpoints stay: the newest, and the last of each of the newest hours, days and months (wall time).

    Every checkpoint that a branch began at stays, and every savepoint.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    last: int = Field(default=10, ge=1)
    hourly: int = Field(default=24, ge=0)
    daily: int = Field(default=30, ge=0)
    monthly: int = Field(default=12, ge=0)

    def kept(self, manifests: list[Manifest]) -> set[Version]:
        """The versions of those that stay.

        >>> times = [datetime(2026, 1, day, hour, tzinfo=UTC).isoformat() for day in (1, 2) for hour in (1, 2, 3)]
        >>> some = [Manifest(branch=1, batch=i, written_at=time) for i, time in enumerate(times)]
        >>> sorted(v.batch for v in Retention(last=1, hourly=2, daily=2, monthly=0).kept(some))
        [2, 4, 5]
        """
        newest_first = sorted(manifests, key=lambda m: (m.written_at, m.version), reverse=True)
        stay = {m.version for m in newest_first[: self.last]}
        for count, digits in ((self.hourly, 13), (self.daily, 10), (self.monthly, 7)):
            periods: dict[str, Version] = {}
            for manifest in newest_first:
                periods.setdefault(manifest.written_at[:digits], manifest.version)
            stay.update(list(periods.values())[:count])
        return stay


class Manifest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What there is to know of a checkpoint. Times in microseconds, positions as inputs and outputs understand them."""

    branch: int
    batch: int
    epoch: int = 0
    written_at: str = ""
    clock: int | None = None
    """The newest event time."""
    newest: int | None = None
    """No event or label that features have seen is later; at the end of input labels come ahead of the clock."""
    watermark: int | None = None
    offsets: dict[str, Any] = {}
    """By input partition, where the next record is."""
    sinks: dict[str, Any] = {}
    """By kind of record, the size of the output."""
    read: int = 0
    questions: int = 0
    open: int = 0
    parts: dict[str, dict[str, int]] = {}
    """By state file and step, the last batch it worked on: what must be there to open this."""
    forks: tuple[tuple[int, int], ...] = ()
    """Where the branches on the way here were left."""
    bytes: int = 0
    """Written to the state store since the checkpoint before."""
    stall: float = 0.0
    """Seconds for which the checkpoint before let nothing pass."""
    job: dict[str, Any] = {}
    """What the job declares (`dataflows.changes.describe`)."""
    environment: dict[str, str] = {}

    @property
    def version(self) -> Version:
        """Branch and batch."""
        return Version(self.branch, self.batch)

    @property
    def lineage(self) -> Lineage:
        """The way to this version."""
        return Lineage([Version(*fork) for fork in self.forks], self.version)


class Checkpoints:
    """The manifests of a run."""

    def __init__(self, run: RunDirectory) -> None:
        self._run = run

    def all(self) -> list[Manifest]:
        """All retained checkpoints, oldest first; those that are only savepoints too."""
        found = {m.version: m for m in (*_manifests(self._run.savepoints), *_manifests(self._run.checkpoints))}
        return [found[version] for version in sorted(found)]

    def savepoints(self) -> dict[str, Manifest]:
        """The savepoints by name."""
        found = {path.stem: _read_if_there(path) for path in sorted(self._run.savepoints.glob("*.json"))}
        return {name: manifest for name, manifest in found.items() if manifest is not None}

    def newest(self) -> Manifest | None:
        """The newest checkpoint of the branch that goes on: its own, or the one it began at."""
        found = self.all()
        if found and self._run.branches.exists():
            branch = read_branches(self._run)[-1]
            found = [m for m in found if m.branch == branch.branch or tuple(m.version) in branch.forks[-1:]]
        return found[-1] if found else None

    def find(self, text: str) -> Manifest:
        """A checkpoint by its version (`1-420`), a savepoint by its name, or `latest`. Raises `StateError`."""
        named = self.savepoints()
        if text in named:
            return named[text]
        newest = self.newest() if text == "latest" else None
        if newest is not None:
            return newest
        found = self.all()
        for manifest in found:
            if str(manifest.version) == text:
                return manifest
        there = ", ".join(str(m.version) for m in found[-5:]) or "none"
        raise StateError(
            f"no checkpoint or savepoint {text!r}. There are: {there}{''.join(f', {name}' for name in named)}. "
            "Hint: `millrace checkpoints JOB` lists them all"
        )

    def add(self, manifest: Manifest) -> None:
        """Keep a checkpoint's manifest: from now on its version is pinned."""
        self._run.checkpoints.mkdir(parents=True, exist_ok=True)
        write_whole(self._path(manifest.version), _encode(manifest), durable=True)

    def name(self, name: str, manifest: Manifest) -> None:
        """Keep a checkpoint as a savepoint. Raises `StateError` for a bad or taken name, or one dropped meanwhile."""
        if not _NAME.fullmatch(name) or name == "latest":
            raise StateError(
                f"savepoint {name!r}: a name begins with a letter and holds letters, digits, '_', '-', '.'"
            )
        path = self._run.savepoints / f"{name}.json"
        if path.exists():
            raise StateError(f"there is a savepoint {name!r} already, of {_read(path).version}. Hint: another name")
        self._run.savepoints.mkdir(parents=True, exist_ok=True)
        write_whole(path, _encode(manifest), durable=True)
        # The launcher first takes a manifest away and then looks for savepoints; here it is the other way round.
        if not self._path(manifest.version).exists() and manifest.version not in self._pinned(but=path):
            path.unlink()
            raise StateError(f"checkpoint {manifest.version} was dropped just now. Hint: try again with a newer one")

    def unname(self, name: str) -> None:
        """Delete a savepoint; its rows go with the next pruning."""
        path = self._run.savepoints / f"{name}.json"
        if not path.exists():
            raise StateError(f"there is no savepoint {name!r}")
        self._run.checkpoints.mkdir(parents=True, exist_ok=True)
        manifest = _read(path)
        if not self._path(manifest.version).exists():
            path.rename(self._path(manifest.version).with_suffix(".dropped"))
        else:
            path.unlink()

    def drop_newer(self, version: Version) -> list[str]:
        """Drop all manifests of what is newer than a version and will be rolled back; the versions, savepoints by name.

        Nothing of them waits to be pruned: the rows will have gone, and there will be others of the same versions.
        """
        dropped: dict[str, None] = {}
        for directory, pattern in ((self._run.checkpoints, "*.*"), (self._run.savepoints, "*.json")):
            for path in sorted(directory.glob(pattern)):
                if path.suffix in (".json", ".dropped") and (found := _read(path).version) > version:
                    path.unlink()
                    if path.suffix == ".json":
                        dropped[str(found) if directory == self._run.checkpoints else path.stem] = None
        return list(dropped)

    def thin(self, retention: Retention, forks: Iterable[Version]) -> list[Version]:
        """Drop manifests that retention does not want; the versions that are waiting to be pruned.

        Those of before are among them, if a kill came between. A dropped manifest is a renamed one, until it is pruned.
        """
        manifests = list(_manifests(self._run.checkpoints))
        newest = {m.branch: m.version for m in sorted(manifests, key=lambda m: m.version)}
        stay = retention.kept(manifests) | set(forks) | set(list(newest.values())[-1:])
        for manifest in manifests:
            if manifest.version not in stay:
                path = self._path(manifest.version)
                path.rename(path.with_suffix(".dropped"))
        dropped = [manifest.version for manifest in _manifests(self._run.checkpoints, "*.dropped")]
        pinned = self._pinned()
        for version in dropped:
            if version in pinned:
                self.forget(version)
        return sorted(set(dropped) - pinned)

    def forget(self, version: Version) -> None:
        """A dropped version was pruned."""
        self._path(version).with_suffix(".dropped").unlink(missing_ok=True)

    def _pinned(self, but: Path | None = None) -> set[Version]:
        paths = [*self._run.savepoints.glob("*.json"), *self._run.checkpoints.glob("*.json")]
        found = (_read_if_there(path) for path in paths if path != but)
        return {manifest.version for manifest in found if manifest is not None}

    def _path(self, version: Version) -> Path:
        return self._run.checkpoints / f"{version.branch}-{version.batch:012d}.json"


class Agent:
    """The one that writes manifests, drops and prunes; it lives in the launcher.

    Parameters
    ----------
    run
        Where.
    start
        The branch that the run writes.
    job
        What the job declares, for the manifests.
    retention
        What stays.
    committed
        Gives what the engine has committed, or None when that is what it gave last.
    maker
        What results depend on beside the job, for the manifests (`dataflows.provenance`).
    expiry
        By the name of rows of a feature step, how long (µs of event time) after its last event an entity equals one
        never seen.
    """

    def __init__(
        self,
        run: RunDirectory,
        start: Start,
        job: dict[str, Any],
        retention: Retention,
        committed: Callable[[], Committed | None],
        maker: dict[str, str],
        expiry: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        self._run = run
        self._checkpoints = Checkpoints(run)
        self._start = start
        self._job = job
        self._retention = retention
        self._committed = committed
        self._expiry = expiry
        self._clocks = Clocks(run.state / "clocks.json", start.version)
        self._environment = maker
        self._control = Control(run.control)
        self._forks = sorted({Version(*fork) for branch in read_branches(run) for fork in branch.forks})
        self._files: dict[str, StateFile] = {}
        # The newest checkpoint of this branch, and the version since which bytes are counted.
        self._newest = max((m.version for m in self._checkpoints.all() if m.branch == start.branch), default=None)
        self._before = self._newest or start.version
        # What the engine does not know of, as it began with this branch: steps that were not touched since.
        fork = next((m for m in self._checkpoints.all() if start.forks and m.version == start.forks[-1]), None)
        self._parts = {} if fork is None else fork.parts

    def look(self) -> Manifest | None:
        """Write a manifest if the engine has committed since the last look, then drop and prune; the manifest."""
        found = self._committed()
        if found is None or found.reader is None or Version(self._start.branch, found.reader["batch"]) == self._newest:
            return None
        phase = self._control.launcher
        self._control.launcher = Phase.MANIFEST
        manifest = self._manifest(found)
        self._checkpoints.add(manifest)
        # Steps of an eighth: rows stay at most so much longer than they have to, and few times need to be remembered.
        self._clocks.note(manifest, min(self._expiry.values(), default=0) // 8)
        self._newest = self._before = manifest.version
        self._control.launcher = Phase.PRUNE
        self._prune()
        self._control.launcher = phase
        return manifest

    def close(self) -> None:
        """Give the files up."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _manifest(self, found: Committed) -> Manifest:
        reader = found.reader or {}
        version = Version(self._start.branch, reader["batch"])
        return Manifest(
            branch=version.branch,
            batch=version.batch,
            epoch=found.epoch,
            written_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
            clock=reader["clock"],
            newest=reader.get("newest"),
            watermark=reader["watermark"],
            offsets=reader["offsets"],
            read=reader["read"],
            questions=reader["questions"],
            open=reader["open"],
            sinks=self._start.sinks | found.sinks,
            parts={name: self._parts.get(name, {}) | found.parts.get(name, {}) for name in self._names()},
            forks=self._start.forks,
            bytes=sum(self._file(name).bytes_since(self._before, version) for name in self._names()),
            stall=round(self._control.stall, 6),
            job=self._job,
            environment=self._environment,
        )

    def _prune(self) -> None:
        """Drop what retention does not want, and with it the rows that nothing else needs."""
        dropped = self._checkpoints.thin(self._retention, self._forks)
        retained = [m.version for m in self._checkpoints.all()] + self._forks
        for version in dropped:
            after = max((v for v in retained if v.branch == version.branch and v < version), default=None)
            until = min((v for v in retained if v.branch == version.branch and v > version), default=None)
            low = after.number if after is not None else Version(version.branch, 0).number
            for name in self._names():
                if until is None:
                    self._file(name).drop_after(low, version.branch)
                else:
                    self._file(name).merge(low, version.number, until.number)
            self._checkpoints.forget(version)
        self._forget_expired()
        for name in self._names():
            self._file(name).move_log()

    def _forget_expired(self) -> None:
        """Delete entities that equal one never seen in every retained checkpoint.

        No step will ever ask for them as they were, so they need not go one by one with rows that say so.
        """
        branch = self._start.branch
        oldest = next(m for m in self._checkpoints.all() if m.branch == branch)
        if oldest.clock is None:
            return
        for rows, after in self._expiry.items():
            until = self._clocks.last_before(rows, oldest.clock - after)
            if until is not None and until > Version(branch, 0).number:
                for name in self._names():
                    self._file(name).forget(rows, Version(branch, 0).number, until)

    def _names(self) -> list[str]:
        return sorted(path.stem for path in self._run.groups.glob("*.sqlite3"))

    def _file(self, name: str) -> StateFile:
        if name not in self._files:
            self._files[name] = StateFile(self._run.groups / f"{name}.sqlite3", name)
        return self._files[name]


class Clocks:
    """The newest event time that some versions had seen, remembered for longer than manifests stay.

    `last_before` gives each version once to each asker, as what it was for is done then. What is newer than `start`
    was rolled back. A file that is damaged is begun anew: expired entities stay a while longer then.
    """

    def __init__(self, path: Path, start: Version) -> None:
        self._path = path
        self._times: list[tuple[int, int]] = []
        self._done: dict[str, int] = {}
        try:
            times = msgspec.json.decode(path.read_bytes(), type=list[tuple[int, int]])
        except (FileNotFoundError, msgspec.DecodeError):
            return
        self._times = [(number, time) for number, time in times if number <= start.number]

    def note(self, manifest: Manifest, step: int) -> None:
        """Remember a checkpoint, if event time has moved on by more than `step` µs."""
        newest = manifest.newest if manifest.newest is not None else manifest.clock
        if newest is None or (self._times and newest - self._times[-1][1] <= step):
            return
        self._times = [*self._times[-_CLOCKS:], (manifest.version.number, newest)]
        write_whole(self._path, msgspec.json.encode(self._times))

    def last_before(self, asker: str, clock: int) -> int | None:
        """The newest version (as a number) that had seen nothing from `clock` on, unless it was given before."""
        found = max((number for number, time in self._times if time < clock), default=None)
        if found is None or self._done.get(asker) == found:
            return None
        self._done[asker] = found
        return found


def missing_parts(manifest: Manifest, store: StateStore) -> list[str]:
    """What a checkpoint needs and the state store does not hold: one sentence each."""
    missing = []
    for name, steps in sorted(manifest.parts.items()):
        for step, batch in sorted(steps.items()):
            # The branch that the step wrote this on: the first on the way that was left no sooner.
            holder = next((fork for fork in manifest.forks if fork[1] >= batch), (manifest.branch, 0))
            if not store.file(name).holds(step, Version(holder[0], batch)):
                missing.append(f"{store.directory / name}.sqlite3 lacks step {step} of batch {batch}")
    return missing


def openable(manifest: Manifest, run: RunDirectory) -> str | None:
    """None if every row of a checkpoint can be read, else what is wrong."""
    try:
        retained = _is_retained(manifest, run)
        store = StateStore(run.groups, manifest.lineage, writable=False)
        try:
            for name in {READER, *manifest.parts}:
                store.file(name).begin_reading()
            if retained and not _is_retained(manifest, run):
                return None  # it was dropped just now, so there is nothing to open
            missing = missing_parts(manifest, store)
            if missing:
                return missing[0]
            for name in {READER, *manifest.parts}:
                store.file(name).verify(manifest.lineage)
        finally:
            store.close()
    except StateError as error:
        return str(error)
    return None


def _is_retained(manifest: Manifest, run: RunDirectory) -> bool:
    return manifest.version in {m.version for m in Checkpoints(run).all()}


def _manifests(directory: Path, pattern: str = "*.json") -> list[Manifest]:
    found = (_read_if_there(path) for path in sorted(directory.glob(pattern)))
    return [manifest for manifest in found if manifest is not None]


def _read_if_there(path: Path) -> Manifest | None:
    """Others drop manifests and delete savepoints at any time."""
    try:
        return _read(path)
    except FileNotFoundError:
        return None


def _read(path: Path) -> Manifest:
    status = path.stat()
    return _decoded(path, status.st_mtime_ns, status.st_size, status.st_ino)


@lru_cache(maxsize=4096)
def _decoded(path: Path, *_: int) -> Manifest:
    """A manifest is written once, so it is read once: the launcher looks at all of them at each checkpoint."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Manifest)
    except msgspec.DecodeError as error:
        raise StateError(
            f"the manifest {path} is damaged: {error}. Hint: move it away; others can still be opened"
        ) from None


def _encode(manifest: Manifest) -> bytes:
    return msgspec.json.format(msgspec.json.encode(manifest), indent=1)
