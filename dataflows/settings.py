"""How a job runs, as its launcher hands it to the workers; and where a run lies on disk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from dataflows.connectors.files import Jsonl
from dataflows.job import KINDS, Job, JobError, Sink
from dataflows.order import TO_THE_END, ReadMode
from dataflows.state import HINT, Lineage, StateError, Version


class FeaturePart(BaseModel):
    """Some features of an Entity declaration that share their state.

    A declaration has one part, until features are added to it: these begin with a part of their own, and the state of
    the others stays as it is. `rows` names the part's rows in the state store, `names` the features that are still
    declared, `declaration` is the pickled Entity (base64) that the part was made for.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rows: str
    names: tuple[str, ...]
    declaration: str


class Layout(BaseModel):
    """How the state of a branch lies.

    `features` gives the parts of each feature step; `dropped` are the names of rows that are not used any more.
    `models`, and `metrics` by name, count how often they were begun: once, where they are not named.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    features: dict[str, tuple[FeaturePart, ...]] = Field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    models: int = 1
    metrics: dict[str, int] = Field(default_factory=dict)


class Start(BaseModel):
    """Where a run begins: the branch it writes, the forks on the way there, the last batch that counts.

    `sinks` are the positions of the outputs, by kind, where the engine does not know them: on a new branch.
    `outputs_of` is the branch whose outputs it begins with, where that is not the one left last; `job` is what the job
    declares on this branch (`dataflows.changes.describe`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    branch: int = 1
    batch: int = 0
    forks: tuple[tuple[int, int], ...] = ()
    sinks: dict[str, Any] = Field(default_factory=dict)
    layout: Layout = Field(default_factory=Layout)
    outputs_of: int | None = None
    job: dict[str, Any] = Field(default_factory=dict)

    @property
    def version(self) -> Version:
        """The version that is read first."""
        return Version(self.branch, self.batch)

    @property
    def lineage(self) -> Lineage:
        """The way to that version."""
        return Lineage([Version(*fork) for fork in self.forks], self.version)


class Settings(BaseModel):
    """How a job runs; none of it changes results.

    Parameters
    ----------
    directory
        The run's directory: outputs, and in `state/` what a resume needs. Default `runs/NAME`.
    batch_size
        Items in a batch at the most.
    linger
        Seconds an item may wait for its batch to fill.
    groups
        Key groups; fixed when the job's state is created.
    in_flight
        Batches under way at once.
    read
        How the inputs are read.
    cache
        Entities of each Entity declaration that all workers together keep in memory; others are fetched from the state
        store when they are touched. 100,000 entities with 20 events of one column each take about 150 MB.
    durability
        What a checkpoint survives. `power` (default): a power loss, once it is complete. `process`: the death of any
        process, but after a power loss the newest checkpoints may be gone, and older ones must be opened. The price of
        `power` is one fsync for each state file and output at each checkpoint: measured on a virtual disk, 17 files
        take 2 to 10 ms.
    measures
        Measure how long predictions take; costs some tenths of a microsecond each.
    quiet
        Batches up to this one are worked on and their records are not written: a replay that begins in the middle.
    maker
        What results depend on beside the job, noted with what is learned (`dataflows.provenance`).
    start, worker, workers
        For workers only: where the launcher has them go on, which of them this is, and how many there are.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    directory: Path | None = None
    batch_size: int = Field(default=1000, gt=0)
    linger: float = Field(default=0.05, ge=0)
    groups: int = Field(default=16, gt=0, le=1024)
    in_flight: int = Field(default=8, gt=0)
    read: ReadMode = TO_THE_END
    cache: int = Field(default=500_000, gt=0)
    durability: Literal["power", "process"] = "power"
    measures: bool = False
    quiet: int = 0
    maker: dict[str, str] = Field(default_factory=dict)
    start: Start | None = None
    worker: int = 0
    workers: int = 1

    @classmethod
    def from_environment(cls) -> Settings:
        """The settings that the launcher hands to its workers in `MILLRACE_SETTINGS`."""
        text = os.environ.get("MILLRACE_SETTINGS")
        return cls.model_validate_json(text) if text else cls()


_BRANCHES = TypeAdapter(tuple[Start, ...])


class RunDirectory:
    """Where the parts of a run lie."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state = path / "state"
        self.groups = self.state / "groups"
        self.checkpoints = self.state / "checkpoints"
        self.savepoints = self.state / "savepoints"
        self.learned = self.state / "learned"
        self.warm_start = self.state / "warm_start"
        self.control = self.state / "control"
        self.status = self.state / "status.json"
        self.job = self.state / "job.json"
        self.branches = self.state / "branches.json"

    @classmethod
    def of(cls, job: Job, settings: Settings | None = None) -> RunDirectory:
        """The directory of a job's run: as set, as declared, or `runs/NAME`."""
        named = settings.directory if settings is not None else None
        return cls(named or job.outputs.directory or Path("runs") / job.name)

    def recovery(self, branch: int) -> Path:
        """The engine's recovery store of a branch."""
        return self.state / "recovery" / str(branch)

    def order_log(self, branch: int) -> Path:
        """How the batches of a branch were made."""
        return self.state / "order" / f"{branch}.log"

    def aside(self, branch: int) -> Path:
        """The outputs of a branch that was left."""
        return self.path / "branches" / str(branch)

    def output(self, kind: str) -> Path:
        """The default file of a kind of records."""
        if kind not in KINDS:
            raise JobError(f"there are no records of kind {kind!r}, only {', '.join(KINDS)}")
        return self.path / f"{kind}.jsonl"


def output_sinks(job: Job, directory: Path) -> dict[str, Sink]:
    """The sink of each kind of record that is not switched off."""
    sinks: dict[str, Sink] = {}
    for kind in KINDS:
        declared = getattr(job.outputs, kind)
        if declared is not None:
            sinks[kind] = Jsonl(directory / f"{kind}.jsonl") if type(declared) is Sink else declared
    paths = [sink.path.resolve() for sink in sinks.values() if isinstance(sink, Jsonl)]
    for path in paths:
        if paths.count(path) > 1:
            raise JobError(f"Outputs: two kinds of records go to {path}. Hint: a file holds one kind")
    return sinks


def read_branches(run: RunDirectory) -> tuple[Start, ...]:
    """The branches of a state, oldest first. Raises `StateError`."""
    try:
        return _BRANCHES.validate_json(run.branches.read_bytes())
    except (FileNotFoundError, ValidationError) as error:
        raise StateError(f"{run.branches} is missing or damaged: {str(error).splitlines()[0]}. {HINT}") from None


def dump_branches(branches: tuple[Start, ...]) -> bytes:
    """What `read_branches` reads."""
    return _BRANCHES.dump_json(branches, indent=1)
