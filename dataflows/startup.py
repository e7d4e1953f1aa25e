"""Before a run: whose state is this, does the job still fit it, where does the run go on, is everything there?

Nothing is started before all of this is settled, so that what is wrong is one clear message and nothing is lost. In
this order: the declaration against that of the state; what the engine has committed; the state files, each whole and
holding what the engine was promised; rows of batches that were never committed, rolled back. A changed job, or one that
goes on from an older checkpoint, opens a new branch.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
from pydantic import BaseModel, ConfigDict

from dataflows.bundle import kept_bundle, warm_models
from dataflows.changes import Change, Description, compare, describe, first_layout, next_layout, unchanged
from dataflows.checkpoints import Agent, Checkpoints, Manifest, Retention, openable
from dataflows.connectors import Stdin
from dataflows.control import write_whole
from dataflows.fork import Asked, Fork, copy_rows, follow
from dataflows.job import Job, JobError, Output
from dataflows.learnstore import roll_back
from dataflows.order import gap_text
from dataflows.orderlog import OrderLog
from dataflows.provenance import provenance
from dataflows.recovery import Committed, committed, create_recovery, remove_stale_snapshots, step_ids
from dataflows.replay import inputs_of
from dataflows.rows import entity_step_names
from dataflows.settings import Layout, RunDirectory, Settings, Start, dump_branches, output_sinks, read_branches
from dataflows.state import StateError, StateFile, StateStore, Version, file_names


class RunError(RuntimeError):
    """A run that cannot start or did not end well."""


class Request(BaseModel):
    """What the user asked of a start.

    `origin` is the checkpoint or savepoint to go on from, on a new branch; `reset` the steps that may begin anew;
    `fork` what a new state begins with, or what it follows further where it began so before. With `outputs_anew` the
    branch begins its outputs anew.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    origin: str | None = None
    reset: tuple[str, ...] = ()
    retention: Retention = Retention()
    fork: Fork | None = None
    outputs_anew: bool = False


class Startup:
    """Makes a run's state ready to go on.

    Parameters
    ----------
    job, settings
        The job and how it runs.
    request
        What is asked for.
    say
        Takes sentences for the user.
    """

    def __init__(self, job: Job, settings: Settings, request: Request, say: Callable[[str], None]) -> None:
        self._job = job
        self._settings = settings
        self._request = request
        self._say = say
        self._run = RunDirectory.of(job, settings)
        self._now = describe(job, settings.groups)

    def prepare(self) -> Start:
        """Where the run begins. Raises `RunError`, `StateError` or `JobError`; then nothing has changed."""
        if not self._run.job.exists():
            return self._create()
        if self._request.fork is not None:
            self._refuse_changed_fork()
            self._follow(self._request.fork)
        else:
            self._refuse_unfinished_history()
        origin = None if self._request.origin is None else Checkpoints(self._run).find(self._request.origin)
        before = self._before(origin)
        changes = compare(before, self._now, self._reset_steps())
        refused = [change for change in changes if change.refused]
        if refused:
            raise RunError(_refusal(self._run, refused))
        self._check_inputs()
        if not any(change.step == "learner" for change in changes):
            self._tell_other_bundle()
        for step in unchanged(before, self._now, self._request.reset):
            self._say(f"--reset {step}: nothing of it changed, so it goes on with the state it has")
        self._run.status.unlink(missing_ok=True)  # of the run before
        if origin is not None:
            self._check_gaps(origin.offsets)
            return self._branch_from(origin, before, changes)
        start, new, offsets = self._resume()
        gaps = self._check_gaps(offsets)
        start = self._with_outputs_of_now(start)
        return self._branch_changed(start, before, changes, new) if changes or gaps else start

    def _before(self, origin: Manifest | None) -> Description:
        """What the job declared when the state was made that the run goes on from."""
        return read_job(self._run) if origin is None or not origin.job else origin.job

    def changes(self) -> list[Change]:
        """What the job's declaration would change about the state that is there; none where there is no state."""
        if not self._run.job.exists():
            return []
        origin = None if self._request.origin is None else Checkpoints(self._run).find(self._request.origin)
        return compare(self._before(origin), self._now, self._reset_steps())

    # -- a new state

    def _create(self) -> Start:
        fork = self._request.fork
        if fork is None and self._has_begun():  # a fork's directory is its own; killed here, it is made again
            raise RunError(
                f"{self._run.job} is missing, so it cannot be told whose state {self._run.state} holds. "
                "Hint: put it back from a copy, or --fresh to start anew"
            )
        if self._request.origin is not None:
            raise RunError(f"--from {self._request.origin}: there is no state in {self._run.state} yet")
        self._refuse_foreign_outputs()
        warm = self._warm_start()
        shutil.rmtree(self._run.groups, ignore_errors=True)  # empty files of a start that was killed here
        if fork is not None and fork.manifest is not None:
            before, start = self._create_at(fork, fork.manifest)
        else:
            before, start = (), Start(layout=first_layout(self._job), job=self._now)
            StateStore.create(self._run.groups, self._settings.groups)
        self._keep(warm)
        self._write_branches((*before, start))
        create_recovery(self._run.recovery(start.branch))
        self._run.order_log(start.branch).parent.mkdir(exist_ok=True)
        self._run.order_log(start.branch).write_bytes(b"")
        if fork is not None:
            self._follow(fork)
        # Last: a state directory without it was never begun.
        write_whole(self._run.job, _pretty(self._now), durable=True)
        return start

    def _warm_start(self) -> Path | None:
        """The bundle that models shall begin as. Raises `JobError` where they cannot.

        That of a job that is replayed is the copy of its run.
        """
        if self._job.warm_start is None:
            return None
        fork = self._request.fork
        kept = None if fork is None else kept_bundle(self._job, fork.source)
        is_other = fork is not None and fork.regroup and self._job.warm_start.exists()
        bundle = self._job.warm_start if kept is None or is_other else kept
        warm_models(self._job, bundle)
        return bundle

    def _tell_other_bundle(self) -> None:
        """What models began as stays, whatever the file holds by now."""
        kept = kept_bundle(self._job, self._run)
        declared = self._job.warm_start
        if kept is None or declared is None or not declared.is_file():
            return
        if declared.read_bytes() != kept.read_bytes():
            self._say(f"warm_start={declared} is another bundle now; the models go on from the one they began as")

    def _keep(self, bundle: Path | None) -> None:
        """Keep the models that new ones begin as: the file may go, and the run still needs them."""
        if bundle is not None:
            self._run.warm_start.mkdir(parents=True, exist_ok=True)
            write_whole(self._run.warm_start / bundle.name, bundle.read_bytes(), durable=True)

    def _create_at(self, fork: Fork, manifest: Manifest) -> tuple[tuple[Start, ...], Start]:
        """The state of a checkpoint of another run, and a branch that begins there; and the branches before."""
        changes = compare(manifest.job, self._now, self._reset_steps())
        refused = [change for change in changes if change.refused]
        if refused:
            raise RunError(_refusal(fork.source, refused))
        before = tuple(start for start in read_branches(fork.source) if start.branch <= manifest.branch)
        copy_rows(fork.source, self._run, manifest, self._settings.groups)
        Checkpoints(self._run).add(msgspec.structs.replace(manifest, sinks={}))
        self._announce(changes)
        return before, Start(
            branch=manifest.branch + 1,
            batch=manifest.batch,
            forks=(*manifest.forks, (manifest.branch, manifest.batch)),
            layout=next_layout(before[-1].layout, manifest.job, self._job, self._now, self._reset_steps()),
            job=self._now,
        )

    def _follow(self, fork: Fork) -> None:
        """Take over the batches that the fork's order log has more."""
        branch = read_branches(self._run)[-1]
        log = OrderLog(self._run.order_log(branch.branch))
        try:
            follow(fork, log, branch.batch)
        finally:
            log.close()

    def _refuse_changed_fork(self) -> None:
        """What a fork began with one job it does not go on with as another."""
        changes = compare(read_job(self._run), self._now, ())
        if changes:
            said = "; ".join(f"{change.step}: {change.text}" for change in changes)
            raise RunError(f"{self._run.path} was begun with another declaration. {said}. Hint: another directory")

    def _refuse_unfinished_history(self) -> None:
        """What is history does not go to the outputs of a run that goes on."""
        asked = None if self._request.outputs_anew else Asked.of(self._run)
        if asked is not None and asked.history == read_branches(self._run)[-1].branch:
            raise RunError(
                f"the history of {asked.source} was not computed to its end in {self._run.path}. "
                "Hint: `millrace bootstrap` once more, as before"
            )

    def _has_begun(self) -> bool:
        """Whether anything was ever kept here. A start that is killed while it creates the state leaves empty files."""
        if any(log.stat().st_size for log in self._run.order_log(1).parent.glob("*.log")):
            return True
        for path in sorted(self._run.groups.glob("*.sqlite3")):
            file = StateFile(path, path.stem, create=True)
            steps = file.steps
            file.close()
            if steps:
                return True
        return False

    def _refuse_foreign_outputs(self) -> None:
        """A new run begins its outputs anew; what lies there without a state is somebody's, so ask."""
        for kind, sink in output_sinks(self._job, self._run.path).items():
            if sink.size():
                file = getattr(sink, "path", kind)
                raise RunError(f"{file} is there, but no state to go on from. Hint: move it away, or --fresh")

    # -- going on

    def _check_inputs(self) -> None:
        if isinstance(self._job.events, Stdin):
            raise RunError(
                f"standard input cannot be read again, so the run in {self._run.path} cannot go on. Hint: --fresh"
            )

    def _resume(self) -> tuple[Start, bool, dict[str, Any]]:
        """Go on with the newest branch where the engine has got to; whether it got nowhere; where the inputs are."""
        branch = read_branches(self._run)[-1]
        recovery = self._run.recovery(branch.branch)
        self._check_step_ids(recovery)
        remove_stale_snapshots(recovery)
        found = committed(recovery, self._job.name, branch.layout)
        batch = branch.batch if found.reader is None else int(found.reader["batch"])
        start = branch.model_copy(update={"batch": batch, "sinks": branch.sinks | found.sinks})
        if not self._run.order_log(branch.branch).exists():
            raise RunError(
                f"the order log {self._run.order_log(branch.branch)} is missing: what came after the checkpoint cannot "
                "be repeated as it was. Hint: put it back from a copy, or --from CHECKPOINT opens a new branch"
            )
        self._ready_files(start, found)
        if found.reader is None:
            self._put_outputs_back(start)
        maker = self._settings.maker or provenance(self._job, self._settings.groups)
        agent = Agent(self._run, start, read_job(self._run), self._request.retention, lambda: found, maker)
        agent.look()
        agent.close()
        return start, found.reader is None, {} if found.reader is None else found.reader["offsets"]

    def _check_step_ids(self, recovery: Path) -> None:
        known = {"read", "learner", "publish", "write"} | {f"features_{n}" for n in entity_step_names(self._job)}
        known |= {part for start in read_branches(self._run) for part in start.layout.features}
        ids = {step_id.removeprefix(f"{self._job.name}.").split(".")[0] for step_id in step_ids(recovery)}
        if not ids <= known:
            raise RunError(
                f"the engine's recovery store {recovery} holds state of steps {sorted(ids - known)}, which "
                f"{self._job.name} does not have. Hint: is this another job's? Use another --directory"
            )

    def _ready_files(self, start: Start, found: Committed) -> None:
        """Every file whole, and holding what the engine was told it holds; only then what is newer is rolled back.

        Files are read side by side: SQLite works outside the interpreter's lock.
        """
        files: list[StateFile] = []
        try:
            with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
                names = file_names(self._settings.groups)
                files.extend(pool.map(lambda name: self._checked(name, start, found.parts.get(name, {})), names))
                self._drop_newer(start.version)
                list(pool.map(lambda file: file.roll_back(start.version), files))
                roll_back(self._run, start.version)
                list(pool.map(StateFile.close, files))
        except StateError as error:
            for file in files:
                file.close()
            raise StateError(f"{error}. {self._way_out()}") from None

    def _drop_newer(self, version: Version) -> None:
        """A manifest is there only with its rows: so the manifests go first."""
        dropped = Checkpoints(self._run).drop_newer(version)
        if dropped:
            self._say(
                f"the engine has got no further than checkpoint {version}: what came later is made again, and its "
                f"checkpoints are gone: {', '.join(dropped)}"
            )

    def _checked(self, name: str, start: Start, steps: dict[str, int]) -> StateFile:
        file = StateFile(self._run.groups / f"{name}.sqlite3", name)
        try:
            file.check()
            for step, batch in steps.items():
                if not file.holds(step, Version(start.branch, batch)):
                    raise file.damaged(f"batch {batch}, which the engine has committed, is not there", step)
        except BaseException:
            file.close()
            raise
        return file

    def _way_out(self) -> str:
        for manifest in reversed(Checkpoints(self._run).all()):
            if openable(manifest, self._run) is None:
                return f"Checkpoint {manifest.version} can still be opened: --from {manifest.version}"
        return "None of the retained checkpoints can be opened"

    def _check_gaps(self, offsets: dict[str, Any]) -> bool:
        """Whether records are gone that the job would go on with; refused where the user did not allow for it.

        Batches that the order log has after the checkpoint cannot be formed again then: so it is a new branch.
        """
        found: dict[str, tuple[int, int]] = {}
        for _, source in inputs_of(self._job):
            found |= source.gaps(offsets)
        if found and self._settings.read.on_gap == "stop":
            raise RunError("; ".join(gap_text(name, *gap) for name, gap in found.items()))
        for name, (wanted, first) in found.items():
            self._say(
                f"{name}: {first - wanted} records were removed before they were read; going on at offset {first}"
            )
        return bool(found)

    def _with_outputs_of_now(self, start: Start) -> Start:
        """Without the positions of outputs that were of another kind when they were written: these begin anew."""
        sinks = dict(start.sinks)
        for kind, sink in output_sinks(self._job, self._run.path).items():
            if kind in sinks and not sink.accepts(sinks[kind]):
                if sink.size():
                    raise RunError(
                        f"the {kind} went elsewhere before, and {sink.where()} is not empty. Hint: move it away"
                    )
                self._say(f"the {kind} went elsewhere before; they begin anew in {sink.where()}")
                del sinks[kind]
        return start.model_copy(update={"sinks": sinks})

    # -- new branches

    def _branch_from(self, manifest: Manifest, before: Description, changes: list[Change]) -> Start:
        """Go on from a checkpoint on a new branch; the outputs so far are kept aside."""
        wrong = openable(manifest, self._run)
        if wrong is not None:
            raise StateError(f"checkpoint {manifest.version} cannot be opened: {wrong}")
        layout = next(start.layout for start in read_branches(self._run) if start.branch == manifest.branch)
        return self._open_branch(manifest, layout, before, changes)

    def _branch_changed(self, start: Start, before: Description, changes: list[Change], new: bool) -> Start:
        """The job changed: go on from the last checkpoint on a new branch, with the state laid out as it is now.

        `new`: the newest branch has no checkpoint yet; then it is the one that is changed.
        """
        if not new:
            return self._open_branch(Checkpoints(self._run).find(str(start.version)), start.layout, before, changes)
        layout = next_layout(start.layout, before, self._job, self._now, self._reset_steps())
        warm = self._warm_start() if layout.models != start.layout.models else None
        self._announce(changes)
        # What was written without a checkpoint to show for it is of a job that is no more.
        for left in list(self._run.state.glob(f"outputs/*-{start.branch}.json")):
            left.unlink()
        for left in list(self._run.state.glob(f"outbox/*-{start.branch}")):
            shutil.rmtree(left)
        self._keep(warm)
        changed = start.model_copy(update={"layout": layout, "job": self._now})
        self._run.order_log(start.branch).write_bytes(b"")
        self._write_branches((*read_branches(self._run)[:-1], changed))
        return changed

    def _announce(self, changes: list[Change]) -> None:
        for change in changes:
            self._say(f"{change.step}: {change.text}")

    def _open_branch(self, manifest: Manifest, layout: Layout, before: Description, changes: list[Change]) -> Start:
        branches = read_branches(self._run)
        left, branch = branches[-1].branch, branches[-1].branch + 1
        start = Start(
            branch=branch,
            batch=manifest.batch,
            forks=(*manifest.forks, (manifest.branch, manifest.batch)),
            sinks={} if self._request.outputs_anew else manifest.sinks,
            layout=next_layout(layout, before, self._job, self._now, self._reset_steps()),
            outputs_of=None if manifest.branch == left else manifest.branch,
            job=self._now,
        )
        start = self._with_outputs_of_now(start)
        self._check_outputs(start)
        warm = self._warm_start() if start.layout.models != layout.models else None
        self._settle(branches[-1])
        self._keep(warm)
        self._announce(changes)
        self._say(f"branch {branch} begins at checkpoint {manifest.version}")
        self._keep_outputs(left)
        create_recovery(self._run.recovery(branch))
        self._run.order_log(branch).write_bytes(b"")
        Checkpoints(self._run).add(manifest)  # a savepoint may be all there was of it
        # From here on the new branch is the one that goes on.
        self._write_branches((*branches, start))
        self._put_outputs_back(start)
        return start

    def _settle(self, left: Start) -> None:
        """Publish what the last checkpoint of the branch that is left holds."""
        positions = committed(self._run.recovery(left.branch), self._job.name, left.layout).sinks
        settle(self._job, self._run, left, positions)

    def _check_outputs(self, start: Start) -> None:
        """Every output that the branch begins with must be there, before anything is changed."""
        for kind, sink in output_sinks(self._job, self._run.path).items():
            if start.outputs_of is None:
                size = sink.size()
            else:
                kept = self._run.aside(start.outputs_of) / f"{kind}.jsonl"
                size = kept.stat().st_size if kept.exists() else 0 if sink.size() is not None else None
            if size is not None and size < start.sinks.get(kind, 0):
                raise RunError(
                    f"the {kind} up to that checkpoint are not there any more: {start.sinks[kind]} bytes are needed, "
                    f"{size} are there. Hint: put the file back"
                )

    def _put_outputs_back(self, start: Start) -> None:
        """The outputs of the branch that this one goes on from, where other ones came between."""
        if start.outputs_of is not None:
            for kind, sink in output_sinks(self._job, self._run.path).items():
                kept = self._run.aside(start.outputs_of) / f"{kind}.jsonl"
                if kept.exists():
                    sink.put_back(kept)

    def _keep_outputs(self, branch: int) -> None:
        """Copy first: until the new branch is written down, the old one must be able to go on."""
        aside = self._run.aside(branch)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        for kind, sink in output_sinks(self._job, self._run.path).items():
            sink.keep_aside(aside / f"{kind}.jsonl")
        self._say(f"the outputs of branch {branch} are kept in {aside}")

    def _reset_steps(self) -> tuple[str, ...]:
        known = {"learner", "publish", *(f"features_{name}" for name in entity_step_names(self._job))}
        for step in self._request.reset:
            if step not in known:
                raise JobError(f"--reset {step}: there is no such step. Hint: {', '.join(sorted(known))}")
        return self._request.reset

    def _write_branches(self, branches: tuple[Start, ...]) -> None:
        """One file says which branch goes on and what it declares; `job.json` is for people."""
        self._run.state.mkdir(parents=True, exist_ok=True)
        write_whole(self._run.branches, dump_branches(branches), durable=True)
        if self._run.job.exists():
            write_whole(self._run.job, _pretty(branches[-1].job), durable=True)


def settle(job: Job, run: RunDirectory, start: Start, positions: Mapping[str, Any]) -> None:
    """Have outputs that publish by the checkpoint publish what the last one of a branch holds.

    Raises `SinkError` or `InputError`.
    """
    for kind, sink in output_sinks(job, run.path).items():
        position = positions.get(kind, start.sinks.get(kind))
        if position is not None and sink.accepts(position):
            sink.settle(Output(job.name, kind, start.branch, run.state), position)


def read_job(run: RunDirectory) -> Description:
    """What the job of a state declared. Raises `RunError`."""
    try:
        found = msgspec.json.decode(run.job.read_bytes())
    except (FileNotFoundError, msgspec.DecodeError) as error:
        raise RunError(
            f"{run.job} is missing or damaged ({error}), so it cannot be told whose state this is. "
            "Hint: put it back from a copy, or --fresh to start anew"
        ) from None
    if not isinstance(found, dict) or not {"name", "groups", "names", "steps"} <= found.keys():
        raise RunError(f"{run.job} is not what this version of millrace writes. Hint: --fresh to start anew")
    return read_branches(run)[-1].job or found


def _refusal(run: RunDirectory, refused: Collection[Change]) -> str:
    lines = [f"{change.step}: {change.text}" for change in refused]
    steps = sorted({change.step for change in refused if change.step.startswith(("features_", "learner", "publish"))})
    stuck = [change.step for change in refused if change.step not in steps]
    begin = "undo the change, --fresh to start anew, or another --directory"
    if not stuck:
        begin = f"undo the change, or begin anew with {' '.join(f'--reset {step}' for step in steps)}"
    return f"the state in {run.state} was made with another declaration. " + "; ".join(lines) + f". Hint: {begin}"


def _pretty(value: Any) -> bytes:
    return msgspec.json.format(msgspec.json.encode(value), indent=1)
