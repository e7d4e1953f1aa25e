"""What results depend on is noted so that a change of it can be named."""

from __future__ import annotations

import subprocess
from pathlib import Path

from dataflows.job import Job
from dataflows.provenance import differences, environment, provenance
from dataflows.runtime import load_job

JOB = """
from river import linear_model
from dataflows import Event, Job, Label
from dataflows.connectors import Jsonl
from features import Fields

class Thing(Event, id="id", time="at", unit="s"):
    id: int
    at: float
    amount: float
    label: bool

job = Job(name="things", events=Jsonl("things.jsonl", Thing), features=[Fields("amount")],
          model=linear_model.LogisticRegression(), label=Label(field="label", delay="1d"))
"""


def load(path: Path, text: str = JOB) -> Job:
    """A job from a file of its own."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return load_job(str(path))


def test_interpreter_libraries_and_processor_are_named() -> None:
    """The environment has all that river's arithmetic runs on."""
    found = environment()
    assert {"python", "machine", "river", "numpy", "bytewax"} <= found.keys()
    assert all(found.values())


def test_a_changed_job_file_is_named(tmp_path: Path) -> None:
    """Code of the job that its declaration does not show: only the digest of its file differs."""
    one = provenance(load(tmp_path / "a" / "job.py"), 16)
    other = provenance(load(tmp_path / "b" / "job.py", JOB + "# changed"), 16)
    said = differences(one, other)
    assert len(said) == 1
    assert said[0].startswith("file job.py was ")


def test_a_changed_declaration_is_named(tmp_path: Path) -> None:
    """Another model, or other features, make another fingerprint."""
    one = provenance(load(tmp_path / "a" / "job.py"), 16)
    other = provenance(load(tmp_path / "b" / "job.py", JOB.replace("Regression()", "Regression(l2=0.1)")), 16)
    assert one["job"] != other["job"]
    assert one["millrace"] == other["millrace"]


def test_the_commit_is_noted(tmp_path: Path) -> None:
    """In a repository: the commit that is checked out, and whether files differ from it."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@x", *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    job = load(tmp_path / "job.py")
    git("init", "-q")
    git("add", "job.py")
    git("commit", "-qm", "one")
    head = git("rev-parse", "HEAD")
    assert provenance(job, 16)["commit"] == head
    (tmp_path / "job.py").write_text(JOB + "# more")
    assert provenance(job, 16)["commit"] == f"{head} with changes"


def test_the_commit_alone_is_no_difference() -> None:
    """What runs is told by digests; a commit may change documents only."""
    assert differences({"river": "1", "commit": "a"}, {"river": "1", "commit": "b"}) == []
    assert differences({}, {"river": "1"}) == ["river was not there and is 1"]
