"""The launcher: starts the workers of a run, watches over them, stops them, and shows how they get on.

Every start: one run per directory (a file lock that the workers share), the state made ready (`dataflows.startup`), the
hash seed fixed in every process. SIGTERM or Ctrl-C ends a run with a last checkpoint; a second one ends it at once. A
worker that dies ends the run, or has all of them started again; no worker outlives the launcher. Beside watching, the
launcher writes the manifests of checkpoints and prunes.
"""

from __future__ import annotations

import errno
import fcntl
import gc
import importlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time as wall
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from zlib import crc32

from dataflows.bundle import models_of
from dataflows.changes import describe, expiry
from dataflows.checkpoints import Agent
from dataflows.connectors import Kafka, Stdin
from dataflows.connectors.files import Jsonl, LineFile
from dataflows.control import Control, Phase
from dataflows.hashing import HASH_SEED
from dataflows.job import Job, JobError, Outputs, SinkError
from dataflows.order import InputError
from dataflows.provenance import provenance
from dataflows.recovery import CommitWatch, committed
from dataflows.settings import RunDirectory, Settings, Start, output_sinks
from dataflows.startup import Request, RunError, Startup, settle

COLLECTOR = (20_000, 50, 20)
"""Thresholds of the garbage collector in workers."""

LONGEST_PAUSE = 60.0
"""Seconds before a restart at the most; it begins at one second and doubles."""


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


def work(reference: str, data: str | None, labels: str | None, outputs: str | None) -> None:
    """The body of a worker process: `MILLRACE_WORKER` tells which, and where the others are."""
    from bytewax.recovery import RecoveryConfig
    from bytewax.run import cli_main

    from dataflows.flow import dataflow

    # State is many small objects without cycles: they go when nothing names them, and looking for cycles is time lost.
    # A look at more of the young ones at once would be a pause of hundreds of ms.
    gc.set_threshold(*COLLECTOR)
    place = json.loads(os.environ["MILLRACE_WORKER"])
    _die_with(place["launcher"])
    settings = Settings.from_environment()
    job = with_outputs(with_inputs(load_job(reference), data, labels), outputs)
    assert settings.start is not None
    recovery = RunDirectory.of(job, settings).recovery(settings.start.branch)
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
        if not isinstance(job.events, LineFile | Kafka):
            raise JobError(f"--data: the events of {job.name} come from {type(job.events).__name__}, not from a file")
        job = job.changed(events=job.events.at(data))
    if labels is not None:
        if not isinstance(job.label.source, LineFile | Kafka):
            raise JobError(f"--labels: the labels of {job.name} do not come from a file")
        label = job.label.model_copy(update={"source": job.label.source.at(labels)})
        job = job.changed(label=label)
    return job


def with_outputs(job: Job, directory: str | None) -> Job:
    """The job with all records that it writes in files of a directory, wherever its run lies; as it is for None."""
    if directory is None:
        return job
    sinks = {
        kind: None if sink is None else Jsonl(Path(directory) / f"{kind}.jsonl") for kind, sink in job.outputs.by_kind()
    }
    return job.changed(outputs=Outputs(directory=job.outputs.directory, key=job.outputs.key, **sinks))


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
        What the flow is built with.
    request
        What is asked of the start.
    fresh
        Throw the state and outputs of earlier runs away.
    restarts
        How often in a row workers that failed are started again without a new checkpoint between.
    data, labels
        Other inputs, as for `with_inputs`.
    outputs
        A directory for all records, as for `with_outputs`.
    say
        Takes sentences for the user.
    """

    def __init__(
        self, reference: str, job: Job, workers: int, interval: float, settings: Settings,
        request: Request | None = None, fresh: bool = False, restarts: int = 0,
        data: str | None = None, labels: str | None = None, outputs: str | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:  # fmt: skip
        self._reference = reference
        self._job = job
        self._workers = workers
        self._interval = interval
        self._settings = settings.model_copy(update={"maker": provenance(job, settings.groups)})
        self._request = request or Request()
        self._fresh = fresh
        self._restarts = restarts
        self._inputs = [data, labels, outputs]
        self._say = say
        self._run = RunDirectory.of(job, settings)
        self.directory = self._run.path
        self._processes: list[subprocess.Popen[bytes]] = []
        self._agent: Agent | None = None
        self._signals = 0

    def run(self, show: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
        """Run to the end of input or a signal; the last status.

        Raises `RunError` when a worker fails (more often than it may be restarted), and what `Startup.prepare` does.
        """
        if self._fresh and (self._request.origin is not None or self._request.reset):
            raise RunError(
                "--fresh throws the state away, so --from and --reset have nothing to act on. Hint: one of them"
            )
        self._run.state.mkdir(parents=True, exist_ok=True)
        lock = lock_state(self._run.state)
        if self._fresh:
            models_of(self._job)  # what cannot be begun with must not cost the state that is there
            clear(self._job, self.directory)
        before = [signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)]
        try:
            self._run_with_restarts(lock, show)
        finally:
            self._kill()
            for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
                signal.signal(number, handler)
            os.close(lock)
        return self.status()

    def _run_with_restarts(self, lock: int, show: Callable[[dict[str, Any]], None] | None) -> None:
        failures, reached = 0, -1
        while True:
            Control(self._run.control).restart()
            Control(self._run.control).launcher = Phase.START
            start = None
            try:
                start = Startup(self._job, self._settings, self._request, self._say).prepare()
                self._request = Request(retention=self._request.retention)  # a restart goes on where this run got to
                if start.batch > reached:
                    failures, reached = 0, start.batch
                self._attempt(start, lock, show)
                return
            except (RunError, InputError, SinkError) as error:
                if start is None and isinstance(error, RunError):
                    raise  # no restart would change it
                failures += 1
                if failures > self._restarts or self._signals:
                    raise
                pause = min(2.0 ** (failures - 1), LONGEST_PAUSE)
                self._say(f"{error}. Starting again in {pause:.0f} s ({failures} of {self._restarts})")
                self._pause(pause)
                if self._signals:
                    raise

    def _pause(self, seconds: float) -> None:
        """Wait, unless a signal comes."""
        end = wall.monotonic() + seconds
        while wall.monotonic() < end and not self._signals:
            wall.sleep(0.05)

    def _attempt(self, start: Start, lock: int, show: Callable[[dict[str, Any]], None] | None) -> None:
        self._agent = Agent(
            self._run,
            start,
            describe(self._job, self._settings.groups),
            self._request.retention,
            CommitWatch(self._run.recovery(start.branch), self._job.name, start.layout),
            self._settings.maker,
            expiry(self._job, start.layout),
        )
        try:
            self._start(start, lock)
            Control(self._run.control).launcher = Phase.WATCHING
            self._watch(show)
            self._agent.look()
            self._settle(start)
        finally:
            self._kill()
            self._agent.close()

    def _settle(self, start: Start) -> None:
        """Publish what the last checkpoint holds: no other comes after it."""
        positions = committed(self._run.recovery(start.branch), self._job.name, start.layout).sinks
        settle(self._job, self._run, start, positions)

    @property
    def stopped(self) -> bool:
        """Whether a signal ended the run."""
        return self._signals > 0

    def status(self) -> dict[str, Any]:
        """What the run last said of itself; empty before its first batch."""
        try:
            status: dict[str, Any] = json.loads(self._run.status.read_bytes())
        except (FileNotFoundError, json.JSONDecodeError):
            return {}
        return status

    def _start(self, start: Start, lock: int) -> None:
        self._processes = []
        addresses = [f"127.0.0.1:{port}" for port in free_ports(self._workers)]
        settings = self._settings.model_copy(
            update={
                "start": start.model_copy(update={"job": {}}),
                "directory": self.directory,
                "workers": self._workers,
            }
        )
        for index in range(self._workers):
            place = {"index": index, "addresses": addresses, "launcher": os.getpid(), "interval": self._interval}
            environment = os.environ | {
                "PYTHONHASHSEED": HASH_SEED,
                "MILLRACE_WORKER": json.dumps(place),
                "MILLRACE_SETTINGS": settings.model_copy(update={"worker": index}).model_dump_json(),
            }
            environment.pop("BYTEWAX_DATAFLOW_API_ENABLED", None)  # any value would open a port to the world
            command = [sys.executable, "-m", "dataflows.worker", self._reference, json.dumps(self._inputs)]
            # A session of its own: Ctrl-C reaches the launcher alone, which then asks the workers to stop.
            with (self._run.state / f"worker-{index}.log").open("wb") as errors:
                self._processes.append(
                    subprocess.Popen(command, env=environment, start_new_session=True, pass_fds=[lock], stderr=errors)
                )

    def _watch(self, show: Callable[[dict[str, Any]], None] | None) -> None:
        while True:
            codes = [process.poll() for process in self._processes]
            if any(code not in (None, 0) for code in codes):
                self._fail(codes)
            if all(code == 0 for code in codes):
                return
            if show is not None:
                show(self.status())
            if self._agent is not None:
                self._agent.look()
            wall.sleep(0.05)

    def _fail(self, codes: list[int | None]) -> None:
        wall.sleep(0.3)  # the one that failed first often takes the others with it: let them say why
        if self._signals > 1:
            raise RunError("stopped at once, without a last checkpoint; run again to go on from the one before")
        messages = [m for i in range(len(codes)) if (m := self._last_words(i))]
        raise RunError("\n".join(dict.fromkeys(messages)) or f"a worker ended with exit code {codes}")

    def _last_words(self, index: int) -> str:
        """The cause of a worker's end, without the engine's frames around it."""
        log = self._run.state / f"worker-{index}.log"
        lines = log.read_text(errors="replace").strip().splitlines()
        causes = [line for line in lines if _is_cause(line)]
        code = self._processes[index].poll()
        if causes:
            return f"worker {index}: {causes[0]} (all of it: {log})"
        return f"worker {index}: ended by signal {-code}" if code is not None and code < 0 else ""

    def _on_signal(self, number: int, frame: Any) -> None:
        self._signals += 1
        if self._signals == 1:
            Control(self._run.control).stop()
        else:
            self._kill()

    def _kill(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()
        for process in self._processes:
            process.wait()


_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)


def disk_hint(text: str) -> str:
    """What to do about a disk that takes nothing, if an error's text speaks of one."""
    if any(os.strerror(number) in text for number in _DISK):
        return ". Nothing is lost: run again once there is room and the right to write"
    return ""


def _is_cause(line: str) -> bool:
    head = line.split(":")[0]
    return head.endswith(("Error", "Exception")) and " " not in head and "TracedError" not in head


def clear(job: Job, directory: Path) -> None:
    """Remove a run's state and the outputs in its directory; whoever does so holds the lock, which stays."""
    shutil.rmtree(directory / "branches", ignore_errors=True)
    for part in (directory / "state").iterdir():
        if part.is_dir():
            shutil.rmtree(part)
        elif part.name != "lock":
            part.unlink()
    for sink in output_sinks(job, directory).values():
        if isinstance(sink, LineFile):
            sink.path.unlink(missing_ok=True)


def lock_state(state: Path) -> int:
    """Take the lock of a state directory; the workers inherit it. Raises `RunError` when it is taken.

    Who only looks whether a job runs takes it for a moment, so one refusal is not the end.
    """
    descriptor = os.open(state / "lock", os.O_CREAT | os.O_RDWR, 0o644)
    for attempt in range(10):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            if attempt < 9:
                wall.sleep(0.02)
    os.close(descriptor)
    raise RunError(f"another run uses {state}. Hint: stop it first, or give this one --directory")


def is_running(run: RunDirectory) -> bool:
    """Whether a run uses a directory now."""
    if not run.state.exists():
        return False
    descriptor = os.open(run.state / "lock", os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


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
