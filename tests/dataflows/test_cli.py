"""The command: help, what it prints, its messages and exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dataflows.cli import main
from dataflows.progress import status_line
from tests.scenarios import running

JOB = """
from river import linear_model, metrics, preprocessing
from dataflows import DISCARD, Event, Job, Jsonl, Csv, Label, Report, Stdout, Outputs
from features import Count, Entity, Fields, Mean

class Ping(Event, id="id", time="t", unit="s"):
    id: int
    t: int
    key: str
    x: float
    y: bool

class Told(Event, id="id", time="t", unit="s"):
    id: int
    t: int
    y: bool

def make(**changed):
    declared = dict(
        name="tiny",
        events=Jsonl("DIRECTORY/events.jsonl", Ping),
        features=[Fields("x"), Entity("key", [Count(), Mean("x")], over=["1h", "1d"])],
        model=preprocessing.StandardScaler() | linear_model.LogisticRegression(),
        label=Label(field="y", delay="30s"),
        metrics=[metrics.ROCAUC()],
        report=Report(outcomes=50),
    )
    return Job(**(declared | changed))

def job():
    return make()

def streamed():
    return make(label=Label(Jsonl("DIRECTORY/labels.jsonl", Told), field="y", horizon="1h", otherwise=False))

def same_names():
    return make(label=Label(Jsonl("DIRECTORY/labels/events.jsonl", Told), field="y"))

def leaking():
    return make(features=[Fields("y")])

def mistyped():
    return make(max_ids="many")

def csv():
    return make(events=Csv("DIRECTORY/events.jsonl", Ping))

def kept():
    return make(label=Label(field="y", delay="30s", horizon="1h", otherwise=False, max_open=10, revisions="last"))

def piped():
    return make(outputs=Outputs(predictions=Stdout()))

nothing = 5
"""

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job file with 200 events and labels in a directory of its own, which is the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    events: list[dict[str, Any]] = [
        {"id": i, "t": i, "key": f"k{i % 3}", "x": i % 10, "y": i % 10 > 6} for i in range(200)
    ]
    labels = [{"id": row["id"], "t": row["t"] + 60, "y": row["y"]} for row in events]
    (tmp_path / "labels").mkdir()
    for file, rows in (("events.jsonl", events), ("labels.jsonl", labels), ("labels/events.jsonl", labels)):
        (tmp_path / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = tmp_path / f"tiny_{abs(hash(tmp_path))}.py"  # modules are imported once per process, by name
    job.write_text(JOB.replace("DIRECTORY", str(tmp_path)))
    return job


@pytest.fixture
def millrace(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs the command in this process: exit code, output and errors with each run of blanks as one."""

    def command(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["millrace", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setenv("TERM", "dumb")
        code: Any = 0
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        captured = capsys.readouterr()
        return code, " ".join(captured.out.split()), " ".join(captured.err.split())

    return command


# -- help


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--help"], ["run", "backtest", "check", "checkpoints", "savepoint", "state"]),
        (["run", "--help"], ["--workers", "--data", "--labels", "--checkpoint", "--fresh", "--follow", "--batch-size"]),
        (["run", "--help"], ["--from", "--reset", "--restart", "--keep-last", "--cache", "--durability"]),
        (["backtest", "--help"], ["--delay", "--data", "--directory"]),
        (["check", "--help"], ["--data", "JOB"]),
    ],
)
def test_each_command_has_help(arguments: list[str], words: list[str], millrace: Command) -> None:
    """With its options."""
    code, printed, _ = millrace(*arguments)
    assert code == 0
    for word in words:
        assert word in printed


@pytest.mark.parametrize(
    "arguments",
    [
        ["walk"],
        ["run"],
        ["run", "x", "--workers", "0"],
        ["run", "x", "--wrong"],
        ["run", "x", "--groups", "a"],
        ["run", "x", "--keep-last", "0"],
        ["run", "x", "--cache", "0"],
        ["run", "x", "--durability", "perhaps"],
    ],
)
def test_wrong_usage_has_exit_code_2(arguments: list[str], millrace: Command) -> None:
    """As commands have it; nothing is started."""
    code, _, errors = millrace(*arguments)
    assert code == 2
    assert "Usage" in errors


# -- check


def test_check_draws_the_job(tiny: Path, millrace: Command) -> None:
    """Steps, keys, windows and the names of the features."""
    code, printed, errors = millrace("check", f"{tiny}:streamed")
    assert (code, errors) == (0, "")
    for word in ("Ping from events.jsonl", "Told from labels.jsonl", "horizon 1h", "otherwise False", "Entity key",
                 "x_mean_1d_by_key", "LogisticRegression", "ROCAUC", "tiny is valid"):  # fmt: skip
        assert word in printed


# -- messages


@pytest.mark.parametrize("command", ["run", "backtest", "check"])
@pytest.mark.parametrize(
    ("reference", "options", "words"),
    [
        ("nowhere.py", [], "no job file"),
        ("no.such.module", [], "there is no file or module"),
        ("TINY:other", [], "no job named 'other'. Hint"),
        ("TINY:nothing", [], "no job named 'nothing'. Hint"),
        ("TINY", ["--data", "gone.jsonl"], "gone.jsonl: no such file. Hint"),
        ("TINY", ["--labels", "labels.jsonl"], "--labels: the labels of tiny do not come from a file"),
        ("TINY:leaking", [], "'y' is the label"),
        ("TINY:mistyped", [], "max_ids"),
    ],
)
def test_what_is_wrong_is_one_message_and_exit_code_1(
    command: str, reference: str, options: list[str], words: str, tiny: Path, millrace: Command
) -> None:
    """For each command: the message, no traceback, nothing on standard output, nothing written."""
    before = sorted(tiny.parent.rglob("*.jsonl"))
    code, printed, errors = millrace(command, reference.replace("TINY", str(tiny)), *options)
    assert code == 1
    assert errors.startswith("millrace: ")
    assert words in errors
    assert printed == ""
    assert sorted(tiny.parent.rglob("*.jsonl")) == before
    assert not (tiny.parent / "runs").exists()


@pytest.mark.parametrize(("job", "words"), [("same_names", "two inputs are named 'events.jsonl'"), ("csv", "lacks id")])
@pytest.mark.parametrize("command", ["backtest", "check"])
def test_inputs_that_do_not_fit_are_one_message(
    command: str, job: str, words: str, tiny: Path, millrace: Command
) -> None:
    """Files of one name, and a header that lacks fields, are told before anything runs, without a traceback."""
    code, _, errors = millrace(command, f"{tiny}:{job}")
    assert code == 1
    assert errors.startswith("millrace: ")
    assert words in errors


def test_a_file_that_is_no_python_is_one_message(tiny: Path, millrace: Command) -> None:
    """Someone gives the data in place of the job."""
    code, _, errors = millrace("check", tiny.parent / "events.jsonl")
    assert code == 1
    assert errors.startswith("millrace: ")
    assert "events.jsonl" in errors


# -- backtest


def test_backtest_makes_a_table_and_plots(tiny: Path, millrace: Command) -> None:
    """The metrics in a table, a PNG and a self-contained HTML beside the run."""
    code, printed, errors = millrace("backtest", tiny, "--delay", "2m")
    assert (code, errors) == (0, "")
    for word in ("ROCAUC", "200 predictions, 200 outcomes, 0 rejects", "metrics.png", "metrics.html"):
        assert word in printed
    target = tiny.parent / "runs" / "tiny" / "backtest"
    assert (target / "metrics.png").read_bytes().startswith(b"\x89PNG")
    page = (target / "metrics.html").read_text()
    assert "labels after 2m" in page
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_the_delay_changes_what_the_model_has_learned(tiny: Path, millrace: Command) -> None:
    """Labels after a day teach nothing in time: all predictions are those of a model that knows nothing."""
    printed = {delay: millrace("backtest", tiny, "--delay", delay)[1] for delay in ("0s", "1d")}
    assert "0.5" in printed["1d"]
    assert printed["0s"] != printed["1d"]


@pytest.mark.parametrize(
    ("job", "delay", "words"),
    [
        ("job", "banana", "'banana'"),
        ("job", "-5d", "-5d"),
        ("job", "x", "'x'"),
        ("streamed", "7d", "--delay 7d: the labels of tiny come with times of their own. Hint"),
    ],
)
def test_a_delay_that_cannot_be_is_refused(job: str, delay: str, words: str, tiny: Path, millrace: Command) -> None:
    """No backtest of nothing but rejects: the value is told before anything runs."""
    code, _, errors = millrace("backtest", f"{tiny}:{job}", f"--delay={delay}")
    assert code == 1
    assert errors.startswith("millrace: ")
    assert words in errors


def test_a_backtest_keeps_the_rest_of_the_label(tiny: Path, millrace: Command) -> None:
    """Another delay, the same horizon and bounds."""
    from dataflows.cli import with_delay
    from dataflows.runtime import load_job

    declared = load_job(f"{tiny}:kept").label
    changed = with_delay(load_job(f"{tiny}:kept"), "10m").label
    assert changed.delay == 600_000_000
    assert changed.model_dump(exclude={"delay"}) == declared.model_dump(exclude={"delay"})


# -- run


def test_run_shows_plain_lines_without_a_terminal_and_a_summary(tiny: Path, tmp_path: Path) -> None:
    """No control sequences; a table with counts and metrics; where the records are; exit code 0."""
    printed = running.run(str(tiny), tmp_path / "out", COLUMNS="200")
    assert "\x1b" not in printed
    assert "\r" not in printed
    for word in ("tiny: LogisticRegression", "events", "200", "ROCAUC", f"records in {tmp_path / 'out'}"):
        assert word in printed
    assert len(running.records(tmp_path / "out", "predictions")) == 200


def test_records_on_standard_output_are_clean(tiny: Path, tmp_path: Path) -> None:
    """What goes to the next program in a pipe is records and nothing else."""
    result = subprocess.run(
        [sys.executable, "-m", "dataflows", "run", f"{tiny}:piped", "--directory", str(tmp_path / "out")],
        env=running.environment(), capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert [record["id"] for record in records] == list(range(200))
    assert "LogisticRegression" in result.stderr


def test_the_status_line_tells_how_a_run_gets_on() -> None:
    """Events, speed, watermark, open questions, rejects and metrics; what is not known is left out."""
    status = {
        "questions": 12345, "watermark": 1_704_110_400_000_000, "open": 7, "outcomes": 3,
        "counts": {"rejects": 2}, "metrics": {"ROCAUC": 0.5, "MAE": None},
    }  # fmt: skip
    assert status_line(status, 1000.4) == (
        "12,345 events · 1,000/s · watermark 2024-01-01 12:00 · 7 open · 2 rejects · ROCAUC 0.5000"
    )
    assert status_line({}, 0.0) == "0 events · 0 open · 0 rejects"
