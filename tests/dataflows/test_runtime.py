"""The launcher: loading jobs, locks, refusals, stopping and going on, and what dies with whom."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from dataflows import JobError
from dataflows.recovery import remove_stale_snapshots, resume_epoch
from dataflows.runtime import free_ports, is_running, load_job, lock_state
from dataflows.settings import RunDirectory
from dataflows.startup import RunError
from tests.scenarios import running

JOB = """
from river import linear_model, metrics, preprocessing
from dataflows import Event, Job, Jsonl, Label, Time
from features import Count, Entity, Fields, Mean

class Ping(Event, id="id", time="t", unit="s"):
    id: int
    t: int
    key: str
    x: float
    y: bool

job = Job(
    name="NAME",
    events=Jsonl("EVENTS", Ping),
    features=[Fields("x"), Entity("key", [Count(), Mean("x")], over="1h")],
    model=preprocessing.StandardScaler() | linear_model.LogisticRegression(),
    label=Label(field="y", delay="30s"),
    metrics=[metrics.ROCAUC()],
    time=Time(lateness="10s"),
)
"""

OWN = """
from river import base, stats
from features import River

class Node:
    def __init__(self, y):
        self.y = y

class Own(base.Classifier):
    def __init__(self):
        self.nodes = []
        self.share = self.mean
    def mean(self):
        return sum(node.y for node in self.nodes) / max(len(self.nodes), 1)
    def predict_proba_one(self, x, **kwargs):
        return {True: self.share() / (1 + x["x_lasting_by_key"])}
    def learn_one(self, x, y):
        self.nodes.append(Node(y))

class Lasting(stats.base.Univariate):
    def __init__(self):
        self.sum = 0
    def update(self, x):
        self.sum += x
    def get(self):
        return self.sum

job = job.changed(model=Own(), features=[Entity("key", [River(Lasting(), "x")])])
"""
"""What a user may declare of their own: a model that makes objects of its own while it learns, a statistic."""

KINDS = ("predictions", "outcomes", "metrics", "rejects")


@pytest.fixture
def imports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo what loading a job does to the import path."""
    monkeypatch.setattr(sys, "path", sys.path[:])


@pytest.fixture(scope="module")
def job_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job with its events on disk."""
    return write_job(tmp_path_factory.mktemp("job"), 2000)


def write_job(directory: Path, events: int, name: str = "runtime_job") -> Path:
    """Write a job file with its events beside it."""
    file = directory / f"{name}.py"
    feed(directory / "events.jsonl", 0, events)
    file.write_text(JOB.replace("EVENTS", str(directory / "events.jsonl")).replace("NAME", name))
    return file


def feed(file: Path, begin: int, end: int) -> None:
    """Append events to a file, as a producer would."""
    with file.open("a") as out:
        for i in range(begin, end):
            row = {"id": i, "t": i, "key": f"k{i % 7}", "x": (i * 37) % 101 / 10, "y": (i * 37) % 101 > 60}
            out.write(json.dumps(row) + "\n")


@pytest.fixture(scope="module")
def undisturbed(job_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The outputs of a run that nothing happened to."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    running.run(str(job_file), out)
    return out


def outputs(directory: Path, kinds: tuple[str, ...] = KINDS) -> dict[str, bytes]:
    """What was written of each kind; no file is as good as an empty one."""
    files = {kind: directory / f"{kind}.jsonl" for kind in kinds}
    return {kind: file.read_bytes() if file.exists() else b"" for kind, file in files.items()}


def answers(directory: Path) -> int:
    """How many predictions were written so far."""
    file = directory / "predictions.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def wait_until(reached: Callable[[], bool], what: str, seconds: float = 30) -> None:
    """Wait for something, or fail."""
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, f"not in {seconds} s: {what}"
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    """Process ids of the children."""
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    """Whether a process runs."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


class Run:
    """A run in the background that leaves nothing behind."""

    def __init__(self, job: Path, out: Path, *options: str) -> None:
        self.out = out
        self.process = running.start(str(job), out, *options)
        self.workers: list[int] = []

    def find_workers(self) -> list[int]:
        self.workers = children(self.process.pid) or self.workers
        return self.workers

    def end(self, seconds: float = 30) -> tuple[int, str]:
        printed, _ = self.process.communicate(timeout=seconds)
        return self.process.returncode, printed

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.find_workers()
            self.process.kill()
        self.process.communicate()
        for pid in self.workers:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)


# -- loading jobs


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("nowhere.py", "no job file"),
        ("no_such_module_anywhere", "there is no file or module 'no_such_module_anywhere'"),
        ("tests.scenarios.figure_jobs", "no job named 'job'.*Hint"),
        ("tests.scenarios.figure_jobs:PHISHING_FIELDS", "no job named 'PHISHING_FIELDS'"),
        ("tests.scenarios.figure_jobs:nothing", "no job named 'nothing'"),
    ],
)
def test_a_job_that_is_not_there_is_told(reference: str, words: str, imports: None) -> None:
    """With what was looked for and how to name it."""
    with pytest.raises(JobError, match=words):
        load_job(reference)


def test_a_job_is_loaded_from_a_file_a_module_or_a_function(imports: None, tmp_path: Path) -> None:
    """All three ways name the same kind of thing; a function is called."""
    assert load_job("tests.scenarios.figure_jobs:bikes_now").name == "bikes"
    assert load_job("tests.scenarios.figure_jobs:attacks").name == "attacks"
    assert load_job(str(write_job(tmp_path, 0, "loaded_job"))).name == "loaded_job"
    assert load_job(f"{tmp_path / 'loaded_job.py'}:job").name == "loaded_job"


def test_a_missing_module_that_a_job_imports_is_named(imports: None, tmp_path: Path) -> None:
    """The job is there; what it needs is not."""
    (tmp_path / "needy_job.py").write_text("import no_such_package_anywhere\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_package_anywhere"):
        load_job(str(tmp_path / "needy_job.py"))


@pytest.mark.parametrize("name", ["same_job", "statistics"])
def test_two_job_files_of_one_name_are_two_jobs(name: str, imports: None, tmp_path: Path) -> None:
    """What was imported before under the same name, by whomever, is not taken for the file."""
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        file = write_job(tmp_path / place, 0, name)
        file.write_text(file.read_text().replace(f'name="{name}"', f'name="job-{place}"'))
    assert [load_job(str(tmp_path / place / f"{name}.py")).name for place in ("a", "b")] == ["job-a", "job-b"]


# -- locks and ports


def test_a_state_directory_is_locked_once(tmp_path: Path) -> None:
    """The second taker is refused with a hint until the first lets go."""
    lock = lock_state(tmp_path)
    try:
        with pytest.raises(RunError, match=r"another run uses.*Hint"):
            lock_state(tmp_path)
        run = RunDirectory(tmp_path)
        run.state = tmp_path
        assert is_running(run)
    finally:
        os.close(lock)
    assert not is_running(run)
    assert not is_running(RunDirectory(tmp_path / "not there"))


def test_ports_differ() -> None:
    """Each worker has an address of its own."""
    ports = free_ports(5)
    assert len(set(ports)) == 5


# -- recovery


def recovery_database(directory: Path, worker_frontiers: list[int], resume: int = 1) -> Path:
    """The engine's tables with a snapshot in each of the epochs 1 to 9."""
    directory.mkdir()
    with closing(sqlite3.connect(directory / "part-0.sqlite3")) as database, database:
        database.execute("CREATE TABLE exs (ex_num INTEGER, worker_count INTEGER, resume_epoch INTEGER)")
        database.execute("CREATE TABLE fronts (ex_num INTEGER, worker_index INTEGER, worker_frontier INTEGER)")
        database.execute("CREATE TABLE snaps (step_id TEXT, state_key TEXT, snap_epoch INTEGER, ser_change BLOB)")
        database.execute("INSERT INTO exs VALUES (0, 1, 1), (1, 2, ?)", (resume,))
        database.execute("INSERT INTO fronts VALUES (0, 0, 99)")
        rows = [(1, worker, frontier) for worker, frontier in enumerate(worker_frontiers)]
        database.executemany("INSERT INTO fronts VALUES (?, ?, ?)", rows)
        database.executemany("INSERT INTO snaps VALUES ('step', 'key', ?, NULL)", [(n,) for n in range(1, 10)])
    return directory


@pytest.mark.parametrize(("frontiers", "epoch"), [([5, 7], 5), ([8, 6], 6), ([9], 3), ([], 3)])
def test_the_resume_epoch_is_the_smallest_frontier_of_the_newest_execution(
    frontiers: list[int], epoch: int, tmp_path: Path
) -> None:
    """Of an execution in which a worker wrote nothing yet, it is where it began; snapshots from then on are removed."""
    recovery = recovery_database(tmp_path / "recovery", frontiers, resume=3)
    assert resume_epoch(recovery) == epoch
    assert remove_stale_snapshots(recovery) == 10 - epoch
    assert remove_stale_snapshots(recovery) == 0


def test_stale_snapshots_are_removed_from_a_real_recovery_database(undisturbed: Path, tmp_path: Path) -> None:
    """A row of an epoch that was never finished goes; the engine's own rows stay."""
    shutil.copytree(undisturbed, tmp_path / "out")
    recovery = tmp_path / "out" / "state" / "recovery" / "1"
    remove_stale_snapshots(recovery)
    (file,) = recovery.glob("*.sqlite3")
    with closing(sqlite3.connect(file)) as database, database:
        before = database.execute("SELECT count(*) FROM snaps").fetchone()
        database.execute("CREATE TEMP TABLE stale AS SELECT * FROM snaps LIMIT 1")
        database.execute("UPDATE stale SET snap_epoch = ?", (resume_epoch(recovery),))
        database.execute("INSERT INTO snaps SELECT * FROM stale")
    assert before[0] > 0
    assert remove_stale_snapshots(recovery) == 1
    with closing(sqlite3.connect(file)) as database:
        assert database.execute("SELECT count(*) FROM snaps").fetchone() == before


# -- starting


def test_a_second_run_on_the_same_directory_is_refused(job_file: Path, tmp_path: Path) -> None:
    """While the first runs, another one, or --fresh, would spoil its state; the first does not notice."""
    with Run(job_file, tmp_path / "out", "--follow") as first:
        wait_until(lambda: answers(first.out) > 100, "answers")
        for more in ([], ["--fresh"]):
            with Run(job_file, tmp_path / "out", *more) as second:
                code, printed = second.end()
            assert code == 1
            assert "another run uses" in " ".join(printed.split())
            assert "Traceback" not in printed
        assert first.process.poll() is None
        assert answers(first.out) > 100
        first.process.send_signal(signal.SIGTERM)
        assert first.end()[0] == 0


def test_outputs_that_are_not_ours_are_refused_until_fresh(job_file: Path, undisturbed: Path, tmp_path: Path) -> None:
    """A file without a state to it is not overwritten; --fresh throws it away; a refusal settles nothing."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "predictions.jsonl").write_text("precious\n")
    with Run(job_file, out, "--groups", "4") as refused:
        code, printed = refused.end()
    assert code == 1
    assert "Hint: move it away, or --fresh" in " ".join(printed.split())
    assert (out / "predictions.jsonl").read_text() == "precious\n"
    (out / "predictions.jsonl").rename(tmp_path / "moved")
    running.run(str(job_file), out, "--groups", "8")
    assert outputs(out) == outputs(undisturbed)


def test_key_groups_are_fixed_with_the_state_until_fresh(job_file: Path, undisturbed: Path, tmp_path: Path) -> None:
    """Another number is refused with both numbers; --fresh begins anew with it and gives the same."""
    out = tmp_path / "out"
    shutil.copytree(undisturbed, out)
    with Run(job_file, out, "--groups", "3") as refused:
        code, printed = refused.end()
    assert code == 1
    assert "job: groups was 16 and is 3" in " ".join(printed.split())
    running.run(str(job_file), out, "--groups", "3", "--fresh")
    assert outputs(out) == outputs(undisturbed)


# -- stopping


def test_a_stopped_run_goes_on_as_if_nothing_had_happened(tmp_path: Path, undisturbed: Path) -> None:
    """SIGTERM ends it with a checkpoint and exit code 0; fed the rest, the next run ends like one never stopped."""
    job = write_job(tmp_path, 1000)
    with Run(job, tmp_path / "out", "--follow", "--checkpoint", "3600", "--batch-size", "50", "--workers", "2") as run:
        wait_until(lambda: answers(run.out) >= 900, "900 answers")
        run.process.send_signal(signal.SIGTERM)
        code, printed = run.end()
    assert code == 0, printed
    assert "stopped with a checkpoint" in " ".join(printed.split())
    kept = outputs(tmp_path / "out", ("predictions", "outcomes"))
    assert undisturbed.joinpath("predictions.jsonl").read_bytes().startswith(kept["predictions"])
    feed(tmp_path / "events.jsonl", 1000, 2000)
    running.run(str(job), tmp_path / "out")
    assert outputs(tmp_path / "out") == outputs(undisturbed)


def test_what_a_job_declares_of_its_own_survives(tmp_path: Path) -> None:
    """Classes of the job file are found in the state again, also those that its model began to use in the meantime."""
    job = write_job(tmp_path, 300, "own_job")
    job.write_text(job.read_text() + OWN)
    with Run(job, tmp_path / "out", "--follow", "--batch-size", "50") as run:
        wait_until(lambda: answers(run.out) >= 250, "250 answers")
        run.process.send_signal(signal.SIGTERM)
        code, printed = run.end()
    assert code == 0, printed
    feed(tmp_path / "events.jsonl", 300, 400)
    running.run(str(job), tmp_path / "out", "--cache", "16")
    running.run(str(job), tmp_path / "straight")
    assert answers(tmp_path / "out") == 400
    assert outputs(tmp_path / "out") == outputs(tmp_path / "straight")


def test_a_small_cache_changes_no_output(tmp_path: Path) -> None:
    """A new run that may keep one entity of each key group in memory fetches the others again, and says the same."""
    job = write_job(tmp_path, 2000, "cached_job")
    job.write_text(job.read_text().replace("key: str", "key: int"))
    rows = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    lines = [json.dumps(row | {"key": row["id"] * 31 % 97}) + "\n" for row in rows]
    (tmp_path / "events.jsonl").write_text("".join(lines))
    running.run(str(job), tmp_path / "straight", "--batch-size", "50")
    running.run(str(job), tmp_path / "cached", "--batch-size", "50", "--cache", "1", "--checkpoint", "0")
    assert outputs(tmp_path / "cached") == outputs(tmp_path / "straight")


def test_a_stop_during_the_start_is_not_forgotten(job_file: Path, tmp_path: Path) -> None:
    """A run that is asked to stop before its workers are up stops all the same."""
    with Run(job_file, tmp_path / "out", "--follow") as run:
        wait_until(lambda: bool(run.find_workers()), "a worker process")
        time.sleep(0.1)
        run.process.send_signal(signal.SIGTERM)
        code, printed = run.end(seconds=10)
    assert code == 0, printed


def test_when_a_worker_is_killed_the_run_ends_with_a_message(job_file: Path, tmp_path: Path) -> None:
    """Exit code 1, the signal named, and no worker left; the next run goes on."""
    with Run(job_file, tmp_path / "out", "--follow", "--workers", "2") as run:
        wait_until(lambda: answers(run.out) > 100, "answers")
        workers = run.find_workers()
        assert len(workers) == 2
        os.kill(workers[1], signal.SIGKILL)
        code, printed = run.end()
    assert code == 1
    assert "millrace: " in printed
    assert "Traceback" not in printed
    wait_until(lambda: not any(map(alive, workers)), "workers gone", 5)


def test_workers_that_die_are_started_again_if_asked_for(job_file: Path, undisturbed: Path, tmp_path: Path) -> None:
    """With --restart the run goes on by itself after a kill, tells so, and ends as if nothing had happened."""
    out = tmp_path / "out"
    with Run(job_file, out, "--follow", "--restart", "2", "--checkpoint", "0.2", "--batch-size", "100") as run:
        wait_until(lambda: answers(run.out) > 100, "answers")
        (worker,) = run.find_workers()
        os.kill(worker, signal.SIGKILL)
        wait_until(lambda: run.find_workers() != [worker] and answers(run.out) >= 1900, "1900 answers")
        run.process.send_signal(signal.SIGTERM)
        code, printed = run.end()
    assert code == 0, printed
    assert "Starting again" in " ".join(printed.split())
    running.run(str(job_file), out)
    assert outputs(out) == outputs(undisturbed)


def test_when_the_launcher_is_killed_its_workers_die(job_file: Path, undisturbed: Path, tmp_path: Path) -> None:
    """Nobody goes on writing unwatched: the workers end within moments, the lock is free, the next run completes."""
    with Run(job_file, tmp_path / "out", "--follow", "--workers", "2") as run:
        wait_until(lambda: answers(run.out) > 100, "answers")
        workers = run.find_workers()
        run.process.kill()
        run.end()
        wait_until(lambda: not any(map(alive, workers)), "workers gone", 5)
    assert not is_running(RunDirectory(tmp_path / "out"))
    running.run(str(job_file), tmp_path / "out")
    assert outputs(tmp_path / "out") == outputs(undisturbed)


def test_a_worker_that_fails_says_why(tmp_path: Path) -> None:
    """The cause in one line, and where all of it lies; no traceback on the terminal."""
    job = write_job(tmp_path, 10)
    trap = "import os\nif 'MILLRACE_WORKER' in os.environ:\n    raise RuntimeError('no database here')\n"
    job.write_text(job.read_text() + trap)  # all is well where the launcher looks
    with Run(job, tmp_path / "out") as run:
        code, printed = run.end()
    flat = " ".join(printed.split())
    assert code == 1
    assert "no database here" in flat
    assert "worker-0.log" in flat
    assert "Traceback" not in printed
