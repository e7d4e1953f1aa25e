"""What can go wrong with state on disk: each time a clear error, a non-zero exit, and nothing lost."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.scenarios import running
from tests.scenarios.oracles import keystone_stream

JOB = "tests.scenarios.keystone_jobs:linear_event_time"
KINDS = ("predictions", "outcomes", "metrics", "rejects")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A stream of events and labels on disk, as options of `millrace run`."""
    directory = tmp_path_factory.mktemp("inputs")
    arrivals = keystone_stream(seed=5, n=3000).arrivals
    for name, kind in (("--data", "event"), ("--labels", "label")):
        rows = [json.dumps(row) + "\n" for of, row in arrivals if of == kind]
        (directory / f"{name[2:]}.jsonl").write_text("".join(rows))
    return [part for name in ("--data", "--labels") for part in (name, str(directory / f"{name[2:]}.jsonl"))]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, inputs: list[str]) -> Path:
    """A run to the end."""
    directory = tmp_path_factory.mktemp("undisturbed")
    running.run(JOB, directory, *inputs)
    return directory


@pytest.fixture(scope="module")
def halfway(tmp_path_factory: pytest.TempPathFactory, inputs: list[str]) -> Path:
    """A run that was killed in the middle, after a few checkpoints."""
    directory = tmp_path_factory.mktemp("halfway")
    process = running.start(JOB, directory, *inputs, "--checkpoint", "0", "--batch-size", "20", "--keep-last", "1000")
    checkpoints = directory / "state" / "checkpoints"
    deadline = time.monotonic() + 60
    while len(list(checkpoints.glob("*.json"))) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.communicate(timeout=30)
    assert len(list(checkpoints.glob("*.json"))) >= 4
    return directory


@pytest.fixture
def directory(tmp_path: Path, halfway: Path) -> Path:
    """The killed run, to damage."""
    wait_for_workers(halfway)
    return Path(shutil.copytree(halfway, tmp_path / "run"))


def locked(directory: Path) -> bool:
    """Whether a run has the state."""
    return subprocess.run(["flock", "-n", directory / "state" / "lock", "true"]).returncode != 0


def wait_for_workers(directory: Path) -> None:
    """Workers end soon after their launcher; until then they hold the lock."""
    deadline = time.monotonic() + 20
    while locked(directory) and time.monotonic() < deadline:
        time.sleep(0.05)


def refused(directory: Path, *options: str) -> str:
    """What a run that must fail says."""
    process = running.start(JOB, directory, *options)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode not in (0, None), printed
    assert "Traceback" not in printed
    return printed


def assert_same(directory: Path, undisturbed: Path) -> None:
    """The outputs are those of the undisturbed run, byte for byte."""
    for kind in KINDS:
        assert (directory / f"{kind}.jsonl").read_bytes() == (undisturbed / f"{kind}.jsonl").read_bytes(), kind


def truncate(file: Path) -> None:
    """Cut a file in the middle."""
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def flip_page(file: Path) -> None:
    """Overwrite the inner structure of a page of the database."""
    settle(file)
    content = bytearray(file.read_bytes())
    content[4096:4104] = b"\xff" * 8
    file.write_bytes(content)


def flip_value(file: Path) -> None:
    """Flip one bit in each value that the next run needs first, as a bad disk would: SQLite cannot know."""
    settle(file)
    with sqlite3.connect(file) as database:
        needed = "key = 'reader' OR key LIKE 'model/%' OR key LIKE '\"%'"
        for row, value in database.execute(f"SELECT id, value FROM rows WHERE {needed}").fetchall():
            place = len(value) // 2
            flipped = value[:place] + bytes([value[place] ^ 4]) + value[place + 1 :]
            database.execute("UPDATE rows SET value = ? WHERE id = ?", (flipped, row))
    database.close()


def settle(file: Path) -> None:
    """Have everything in the file itself, nothing in SQLite's log."""
    database = sqlite3.connect(file)
    database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    database.close()


def remove(file: Path) -> None:
    """Delete a file with SQLite's log."""
    for each in file.parent.glob(f"{file.name}*"):
        each.unlink()


@pytest.mark.parametrize("damage", [truncate, flip_page, flip_value, remove])
@pytest.mark.parametrize("name", ["reader", "001", "000"])
def test_a_damaged_state_file_is_refused(
    directory: Path, undisturbed: Path, inputs: list[str], damage: Callable[[Path], None], name: str
) -> None:
    """Cut, altered or deleted: the error names the file and a way out; with the file put back the run goes on."""
    file = directory / "state" / "groups" / f"{name}.sqlite3"
    settle(file)
    whole = shutil.copy(file, directory / "copy")
    damage(file)
    printed = refused(directory, *inputs)
    assert str(file) in printed
    assert "--from" in printed
    remove(file)
    shutil.copy(whole, file)
    running.run(JOB, directory, *inputs)
    assert_same(directory, undisturbed)


def test_a_lost_log_of_sqlite_is_noticed(directory: Path, undisturbed: Path, inputs: list[str]) -> None:
    """A state file that lacks what the engine has committed is refused; the checkpoint that is named does to go on."""
    groups = directory / "state" / "groups"
    checkpoints = sorted((directory / "state" / "checkpoints").glob("*.json"))
    kept = json.loads(checkpoints[1].read_bytes())
    with sqlite3.connect(
        groups / "001.sqlite3"
    ) as database:  # as if what came after the second checkpoint was never written
        database.execute("DELETE FROM rows WHERE version > ?", ((kept["branch"] << 40) + kept["batch"],))
        database.execute("DELETE FROM commits WHERE version > ?", ((kept["branch"] << 40) + kept["batch"],))
    database.close()
    printed = refused(directory, *inputs)
    assert "001.sqlite3" in printed
    assert "is not there" in printed
    assert f"--from {kept['branch']}-{kept['batch']}" in printed
    running.run(JOB, directory, *inputs, "--from", f"{kept['branch']}-{kept['batch']}")
    assert_same(directory, undisturbed)
    assert (directory / "branches" / "1" / "predictions.jsonl").exists()


def test_a_pickle_with_a_foreign_class_is_not_run(directory: Path, inputs: list[str], tmp_path: Path) -> None:
    """A planted pickle that would run a command is refused by name, and the command was not run."""
    proof = tmp_path / "it_ran"
    planted = f"cos\nsystem\n(S'touch {proof}'\ntR.".encode()
    file = directory / "state" / "groups" / "001.sqlite3"
    from dataflows.state import _checksum

    with sqlite3.connect(file) as database:
        rows = database.execute(
            "SELECT r.id, r.step, key, version, kind FROM rows r JOIN steps s ON s.id = r.step "
            "WHERE s.name = 'learner' AND key LIKE 'model/%'"
        ).fetchall()
        assert rows
        for row, step, key, version, kind in rows:  # in all versions: which is the committed one depends on the kill
            crc = _checksum(step, key, version, kind, planted)
            database.execute("UPDATE rows SET value = ?, crc = ? WHERE id = ?", (planted, crc, row))
    database.close()
    printed = refused(directory, *inputs)
    assert "os.system" in printed or "posix.system" in printed
    assert "001.sqlite3" in printed
    assert not proof.exists()


def test_a_second_run_is_refused(directory: Path, undisturbed: Path, inputs: list[str]) -> None:
    """While one run has the state, another says so and ends; the first is not disturbed."""
    first = running.start(JOB, directory, *inputs, "--follow", "--checkpoint", "0.2")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not locked(directory):
        time.sleep(0.02)
    printed = refused(directory, *inputs)
    assert "another run uses" in printed
    first.terminate()
    said, _ = first.communicate(timeout=60)
    assert first.returncode == 0, said
    running.run(JOB, directory, *inputs)
    assert_same(directory, undisturbed)


@pytest.mark.parametrize("what", ["full", "read-only"])
def test_a_full_or_read_only_disk(
    tmp_path: Path, directory: Path, undisturbed: Path, inputs: list[str], what: str
) -> None:
    """Without room, or the right, to write, a run ends with an error that says so; later it goes on."""
    for file in directory.rglob("*.sqlite3"):
        settle(file)  # the run would do so and find room again
    place, kept = tmp_path / "disk", tmp_path / "kept"
    place.mkdir()
    size = f"size=$(( $(df -k --output=used {place} | tail -1) + 60 ))k"
    limit = f"mount -o remount,{'ro' if what == 'read-only' else size} {place}"
    command = " ".join([sys.executable, "-m", "dataflows", "run", JOB, "--directory", f"{place}/run", *inputs])
    script = (
        f"mount -t tmpfs -o size=200m none {place} && cp -a {directory} {place}/run && {limit} && "
        f"{{ {command}; code=$?; cp -a {place}/run {kept}; exit $code; }}"
    )
    done = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", script],
        env=running.environment(), cwd=running.ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    printed = done.stdout + done.stderr
    assert done.returncode == 1, printed
    assert "Traceback" not in printed
    assert ("full" in printed or "No space left" in printed) if what == "full" else "read-only" in printed.lower()
    assert "Nothing is lost" in printed
    running.run(JOB, kept, *inputs)
    assert_same(kept, undisturbed)
