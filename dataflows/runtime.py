"""The launcher: starts the workers of a run, watches over them, stops them, and shows how they get on.

Every start: one run per directory (a file lock that the workers share), the engine's stale snapshots removed, the hash
seed fixed in every process. SIGTERM or Ctrl-C ends a run with a last checkpoint; a second one ends it at once. A
worker that dies ends the run; no worker outlives the launcher. The next run goes on from the last checkpoint.
"""

from __future__ import annotations

import fcntl
import gc
import importlib
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time as wall
from collections.abc import Callable
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any
from zlib import crc32

from dataflows.connectors import Stdin
from dataflows.connectors.files import LineFile
from dataflows.evaluate import metric_name
from dataflows.job import KINDS, Job, JobError

HASH_SEED = "0"
"""river walks over sets in places, so sums depend on the hash seed; all workers use this one."""


class RunError(RuntimeError):
    """A run that cannot start or did not end well."""


def load_job(reference: str) -> Job:
    """The job of `path/to/job.py`, `package.module`, either with `:NAME` (default `job`; a function is called).

    Raises `JobError` when there is no such file, module or job.
    """
    place, _, name = reference.partition(":")
    name = name or "job"
    path = Path(place)
    if path.is_file() and path.suffix != ".py":
        raise JobError(f"{path} is no job file. Hint: a job is declared in a .py file; data goes to --data")
    if path.suffix == ".py":
        module = _load_file(path)
    else:
        sys.path.insert(0, str(Path.cwd()))
        try:
            module = importlib.import_module(place)
        except ModuleNotFoundError as error:
            if error.name is None or not (place == error.name or place.startswith(f"{error.name}.")):
                raise
            raise JobError(f"no job {reference!r}: there is no file or module {place!r}") from None
    job = getattr(module, name, None)
    if callable(job) and not isinstance(job, Job):
        job = job()
    if not isinstance(job, Job):
        raise JobError(f"{place} holds no job named {name!r}. Hint: job = Job(...), or name it as {place}:NAME")
    return job


def _load_file(path: Path) -> Any:
    """Import a job file under its package's name, so that what it pickles can be found by every worker."""
    path = path.resolve()
    if not path.is_file():
        raise JobError(f"no job file {path}")
    root, parts = path.parent, [path.stem]
    while (root / "__init__.py").exists():
        parts.insert(0, root.name)
        root = root.parent
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    name = ".".join(parts)
    found = importlib.util.find_spec(name) if name not in sys.modules else sys.modules[name].__spec__
    if found is not None and found.origin is not None and Path(found.origin).resolve() == path:
        return importlib.import_module(name)
    return _load_under_own_name(path)


def _load_under_own_name(path: Path) -> Any:
    """A job file whose name another module has: statistics.py, or a second job.py in this process."""
    name = f"{path.stem}_{crc32(str(path).encode()):08x}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise JobError(f"{path} cannot be imported")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


# -- a worker


def work(reference: str, data: str | None, labels: str | None) -> None:
    """The body of a worker process: `MILLRACE_WORKER` tells which, and where the others are."""
    from bytewax.recovery import RecoveryConfig
    from bytewax.run import cli_main

    from dataflows.flow import Settings, dataflow, run_directory

    # State is many small objects without cycles: they go when nothing names them, and looking for cycles is time lost.
    gc.set_threshold(500_000, 20, 20)
    place = json.loads(os.environ["MILLRACE_WORKER"])
    _die_with(place["launcher"])
    settings = Settings.from_environment()
    job = with_inputs(load_job(reference), data, labels)
    recovery = run_directory(job, settings) / "state" / "recovery"
    cli_main(
        dataflow(job, settings),
        process_id=place["index"] if len(place["addresses"]) > 1 else None,
        addresses=place["addresses"] if len(place["addresses"]) > 1 else None,
        epoch_interval=timedelta(seconds=place["interval"]),
        recovery_config=RecoveryConfig(recovery),
    )


def _die_with(launcher: int) -> None:
    """End this process when the launcher is gone: workers that nobody watches must not go on writing."""

    def watch() -> None:
        while os.getppid() == launcher:
            wall.sleep(0.2)
        os._exit(4)

    threading.Thread(target=watch, daemon=True).start()


def with_inputs(job: Job, data: str | None, labels: str | None) -> Job:
    """The job with other paths for its events and labels ("-": standard input for events).

    Raises `JobError` where there are no files to change.
    """
    if data == "-":
        job = job.changed(events=Stdin(job.events.event))
    elif data is not None:
        if not isinstance(job.events, LineFile):
            raise JobError(f"--data: the events of {job.name} come from {type(job.events).__name__}, not from a file")
        job = job.changed(events=job.events.at(data))
    if labels is not None:
        if not isinstance(job.label.source, LineFile):
            raise JobError(f"--labels: the labels of {job.name} do not come from a file")
        label = job.label.model_copy(update={"source": job.label.source.at(labels)})
        job = job.changed(label=label)
    return job


# -- the launcher


class Launcher:
    """One run of a job in worker processes.

    Parameters
    ----------
    reference
        The job, as for `load_job`; each worker loads it anew.
    job
        The loaded job.
    workers
        Number of worker processes.
    interval
        Seconds between checkpoints.
    settings
        What the flow is built with (`dataflows.flow.Settings`).
    fresh
        Throw the state and outputs of earlier runs away.
    """

    def __init__(
        self, reference: str, job: Job, workers: int, interval: float, settings: Any, fresh: bool,
        data: str | None = None, labels: str | None = None,
    ) -> None:  # fmt: skip
        from dataflows.flow import run_directory

        self._reference = reference
        self._job = job
        self._workers = workers
        self._interval = interval
        self._settings = settings
        self._fresh = fresh
        self._inputs = [data, labels]
        self.directory = run_directory(job, settings)
        self._state = self.directory / "state"
        self._processes: list[subprocess.Popen[bytes]] = []
        self._signals = 0

    def run(self, show: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
        """Run to the end of input or a signal; the last status. Raises `RunError` when a worker fails."""
        if self._fresh:
            clear(self._job, self.directory)
        self._state.mkdir(parents=True, exist_ok=True)
        lock = lock_state(self._state)
        try:
            self._prepare()
            before = [signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)]
            try:
                self._start(lock)
                self._watch(show)
            finally:
                self._kill()
                for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
                    signal.signal(number, handler)
        finally:
            os.close(lock)
        return self.status()

    @property
    def stopped(self) -> bool:
        """Whether a signal ended the run."""
        return self._signals > 0

    def status(self) -> dict[str, Any]:
        """What the run last said of itself; empty before its first batch."""
        try:
            status: dict[str, Any] = json.loads((self._state / "status.json").read_bytes())
        except (FileNotFoundError, json.JSONDecodeError):
            return {}
        return status

    def _prepare(self) -> None:
        from bytewax.recovery import init_db_dir

        from dataflows.flow import Control

        Control(self._state / "control").restart()
        recovery = self._state / "recovery"
        made_for = self._state / "job.json"
        if not any(recovery.glob("*.sqlite3")):
            self._refuse_foreign_outputs()
            made_for.write_text(json.dumps(self._fingerprint(), indent=1))
            recovery.mkdir(exist_ok=True)
            init_db_dir(recovery, 1)
            return
        try:
            kept = json.loads(made_for.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            raise RunError(
                f"{made_for} is missing or damaged, so it cannot be told whose state this is. Hint: --fresh"
            ) from None
        self._compare(kept)
        if isinstance(self._job.events, Stdin):
            raise RunError(
                f"standard input cannot be read again, so the run in {self.directory} cannot go on. Hint: --fresh"
            )
        remove_stale_snapshots(recovery)

    def _fingerprint(self) -> dict[str, str]:
        """What the state depends on, part by part, as text to compare and to show."""
        job = self._job
        parts = {
            "name": job.name,
            "features": "; ".join(repr(feature) for feature in job.features),
            "model": repr(job.model),
            "per": repr(job.per),
            "label": repr(job.label.model_copy(update={"source": None, "delay": None})),
            "metrics": ", ".join(metric_name(metric) for metric in job.metrics),
            "time": repr(job.time),
            "key groups": str(self._settings.groups),
        }
        # Functions show where they lie in memory, which says nothing about them.
        return {name: re.sub(r" at 0x[0-9a-f]+", "", text) for name, text in parts.items()}

    def _compare(self, kept: dict[str, str]) -> None:
        for part, now in self._fingerprint().items():
            before = kept.get(part)
            if before != now:
                raise RunError(
                    f"the state in {self._state} was made with other {part}: {before!r}, now {now!r}. "
                    "Hint: undo the change, --fresh to start anew, or another --directory"
                )

    def _refuse_foreign_outputs(self) -> None:
        """A new run begins its outputs anew; what lies there without a state is somebody's, so ask."""
        for kind in KINDS:
            file = self.directory / f"{kind}.jsonl"
            if file.exists() and file.stat().st_size:
                raise RunError(f"{file} is there, but no state to go on from. Hint: move it away, or --fresh")

    def _start(self, lock: int) -> None:
        addresses = [f"127.0.0.1:{port}" for port in free_ports(self._workers)]
        settings = self._settings.model_copy(update={"resume": True, "directory": self.directory})
        for index in range(self._workers):
            place = {"index": index, "addresses": addresses, "launcher": os.getpid(), "interval": self._interval}
            environment = os.environ | {
                "PYTHONHASHSEED": HASH_SEED,
                "MILLRACE_WORKER": json.dumps(place),
                "MILLRACE_SETTINGS": settings.model_dump_json(),
            }
            environment.pop("BYTEWAX_DATAFLOW_API_ENABLED", None)  # any value would open a port to the world
            command = [sys.executable, "-m", "dataflows.worker", self._reference, json.dumps(self._inputs)]
            # A session of its own: Ctrl-C reaches the launcher alone, which then asks the workers to stop.
            self._processes.append(
                subprocess.Popen(
                    command, env=environment, start_new_session=True, pass_fds=[lock], stderr=self._errors(index)
                )
            )

    def _errors(self, index: int) -> Any:
        return (self._state / f"worker-{index}.log").open("wb")

    def _watch(self, show: Callable[[dict[str, Any]], None] | None) -> None:
        while True:
            codes = [process.poll() for process in self._processes]
            if any(code not in (None, 0) for code in codes):
                self._fail(codes)
            if all(code == 0 for code in codes):
                return
            if show is not None:
                show(self.status())
            wall.sleep(0.05)

    def _fail(self, codes: list[int | None]) -> None:
        wall.sleep(0.3)  # the one that failed first often takes the others with it: let them say why
        if self._signals > 1:
            raise RunError("stopped at once, without a last checkpoint; run again to go on from the one before")
        messages = [m for i in range(len(codes)) if (m := self._last_words(i))]
        raise RunError("\n".join(dict.fromkeys(messages)) or f"a worker ended with exit code {codes}")

    def _last_words(self, index: int) -> str:
        """The cause of a worker's end, without the engine's frames around it."""
        log = self._state / f"worker-{index}.log"
        lines = log.read_text(errors="replace").strip().splitlines()
        causes = [line for line in lines if _is_cause(line)]
        code = self._processes[index].poll()
        if causes:
            return f"worker {index}: {causes[0]} (all of it: {log})"
        return f"worker {index}: ended by signal {-code}" if code is not None and code < 0 else ""

    def _on_signal(self, number: int, frame: Any) -> None:
        from dataflows.flow import Control

        self._signals += 1
        if self._signals == 1:
            Control(self._state / "control").stop()
        else:
            self._kill()

    def _kill(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()
        for process in self._processes:
            process.wait()


def _is_cause(line: str) -> bool:
    head = line.split(":")[0]
    return head.endswith(("Error", "Exception")) and " " not in head and "TracedError" not in head


def clear(job: Job, directory: Path) -> None:
    """Remove a run's state and the outputs in its directory."""
    lock_and_release(directory / "state")
    shutil.rmtree(directory / "state", ignore_errors=True)
    for kind in KINDS:
        (directory / f"{kind}.jsonl").unlink(missing_ok=True)


def lock_state(state: Path) -> int:
    """Take the lock of a state directory; the workers inherit it. Raises `RunError` when it is taken."""
    descriptor = os.open(state / "lock", os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise RunError(f"another run uses {state}. Hint: stop it first, or give this one --directory") from None
    return descriptor


def lock_and_release(state: Path) -> None:
    """Make sure that no run uses a state directory."""
    if state.exists():
        os.close(lock_state(state))


def remove_stale_snapshots(recovery: Path) -> int:
    """Delete snapshots of epochs that were never finished; how many there were.

    Bytewax 0.21 leaves rows of an unfinished epoch behind when it is killed between writing the snapshots and
    the frontier, and may load them after a second kill: an event would count twice. The resume epoch is the smallest
    worker frontier of the newest execution.
    """
    removed = 0
    resume = resume_epoch(recovery)
    for file in recovery.glob("*.sqlite3"):
        with closing(sqlite3.connect(file)) as database, database:
            removed += database.execute("DELETE FROM snaps WHERE snap_epoch >= ?", (resume,)).rowcount
    return removed


def resume_epoch(recovery: Path) -> int:
    """The epoch at which the engine will go on: the smallest frontier of the newest execution's workers."""
    executions: dict[int, tuple[int, int]] = {}
    frontiers: dict[int, dict[int, int]] = {}
    for file in recovery.glob("*.sqlite3"):
        with closing(sqlite3.connect(file)) as database:
            for number, workers, epoch in database.execute("SELECT ex_num, worker_count, resume_epoch FROM exs"):
                executions[number] = (workers, epoch)
            for number, worker, epoch in database.execute("SELECT ex_num, worker_index, worker_frontier FROM fronts"):
                frontiers.setdefault(number, {})[worker] = epoch
    if not executions:
        return 1
    newest = max(executions)
    workers, start = executions[newest]
    reached = frontiers.get(newest, {})
    return min(reached.values()) if len(reached) == workers else start


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that nothing listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
