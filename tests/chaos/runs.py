"""Runs of a job in real processes, seen from outside: what each is at, who belongs to it, kill -9."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from dataflows.control import Control, Phase
from dataflows.recovery import Committed, committed
from dataflows.runtime import is_running, load_job
from dataflows.settings import RunDirectory, read_branches
from dataflows.state import StateError
from tests.scenarios.running import ROOT, environment

PATIENCE = 120.0
"""Seconds after which a run that should have ended is a fault."""


class Fault(AssertionError):
    """A run did what it should not: it did not go on, ended by itself, or gave something else."""


class Run:
    """`millrace run` in the background.

    Parameters
    ----------
    reference
        The job, as `millrace run` takes it.
    directory
        The run's directory. What is printed goes to a file beside it.
    options
        Further options of `millrace run`.
    env
        Additions to the environment.
    """

    def __init__(self, reference: str, directory: Path, options: list[str], env: dict[str, str]) -> None:
        self.directory = directory
        self._printed = directory.parent / f"{directory.name}.printed"
        command = [sys.executable, "-m", "dataflows", "run", reference, "--directory", str(directory), *options]
        self._control: Control | None = None
        self._known: set[tuple[int, str]] = set()  # with when they began: numbers of processes come again
        if self.control is not None:
            self.control.restart()  # as the launcher will: what the run before was at is not to be taken for this one
        with self._printed.open("wb") as file:
            self._process = subprocess.Popen(
                command, env=environment(**env), stdout=file, stderr=subprocess.STDOUT, cwd=ROOT
            )

    @property
    def control(self) -> Control | None:
        """What the processes say of themselves; None until there is a state directory."""
        path = RunDirectory(self.directory).control
        if self._control is None and path.exists():
            self._control = Control(path)
        return self._control

    @property
    def has_begun(self) -> bool:
        """Whether the reader has opened its state and reads."""
        return self.control is not None and self.control.workers not in (Phase.NONE, Phase.START)

    @property
    def code(self) -> int | None:
        """The exit code; None while the launcher lives."""
        return self._process.poll()

    @property
    def launcher(self) -> int:
        """The launcher's process id."""
        return self._process.pid

    def workers(self) -> list[int]:
        """The process ids of the workers, oldest first."""
        try:
            found = Path(f"/proc/{self.launcher}/task/{self.launcher}/children").read_text().split()
        except FileNotFoundError:
            return []
        pids = [int(pid) for pid in found]
        self._known |= {(pid, begun) for pid in pids if (begun := _begun(pid)) is not None}
        return pids

    def kill(self, pids: list[int]) -> None:
        """kill -9, one right after the other."""
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass

    def stop(self) -> None:
        """SIGTERM once it has begun, and wait for the last checkpoint."""
        until(lambda: self.code is not None or self.has_begun, f"the run in {self.directory} does not begin")
        self._process.terminate()
        self.end()

    def end(self) -> None:
        """Wait for the end. Raises `Fault` when it is not a good one."""
        self.wait()
        if self.code != 0:
            raise Fault(f"the run in {self.directory} ended with {self.code}: {self.printed()}")

    def wait(self) -> None:
        """Wait until no process of it is left, whoever was killed."""
        self.workers()
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.clean_up()
            raise Fault(f"the run in {self.directory} did not end in {PATIENCE:.0f} s: {self.printed()}") from None
        # The lock, too: of a worker that was started the moment before the launcher died nobody knows.
        until(lambda: not self._left() and not is_running(RunDirectory(self.directory)), "workers outlive the launcher")

    def clean_up(self) -> None:
        """Leave no process behind."""
        if self.code is None:
            self.kill([self.launcher, *self.workers()])
        self.kill(self._left())
        self._process.wait()

    def _left(self) -> list[int]:
        return [pid for pid, begun in self._known if _begun(pid) == begun]

    def printed(self) -> str:
        """The end of what it has printed; workers' own words are in its state directory."""
        return self._printed.read_text(errors="replace").strip()[-1500:]


def until(reached: Callable[[], bool], otherwise: str, seconds: float = 60.0) -> None:
    """Wait for something. Raises `Fault` when it does not come."""
    deadline = time.monotonic() + seconds
    while not reached():
        if time.monotonic() > deadline:
            raise Fault(f"{otherwise} (for {seconds:.0f} s)")
        time.sleep(0.02)


def what_is_committed(reference: str, directory: Path) -> Committed | None:
    """What the engine would go on from; None before there is anything."""
    run = RunDirectory(directory)
    try:
        branch = read_branches(run)[-1]
        return committed(run.recovery(branch.branch), load_job(reference).name, branch.layout)
    except StateError:
        return None


class Quiet:
    """Notices that a run has read all of its input and that all of it went through, by what the engine commits.

    Items wait for their batch to fill, but not as long as an epoch is: once three epochs in a row have ended at the
    same batch with everything read, nothing waits.

    Parameters
    ----------
    reference
        The job.
    directory
        The run's directory.
    sizes
        Bytes of each input file.
    """

    def __init__(self, reference: str, directory: Path, sizes: dict[str, int]) -> None:
        self._reference = reference
        self._directory = directory
        self._sizes = sizes
        self._batch = -1
        self._epochs: set[int] = set()

    def reached(self) -> bool:
        """Ask again and again."""
        found = what_is_committed(self._reference, self._directory)
        if found is None or found.reader is None:
            return False
        offsets = found.reader["offsets"]
        if not all(name in offsets and offsets[name][0] == size for name, size in self._sizes.items()):
            return False
        if found.reader["batch"] != self._batch:
            self._batch = found.reader["batch"]
            self._epochs = {found.epoch}  # of which it is not known when it was
        self._epochs.add(found.epoch)
        return len(self._epochs) > 3


def _begun(pid: int) -> str | None:
    """When a process began, in ticks of the machine; None if it does not live."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else fields[19]
