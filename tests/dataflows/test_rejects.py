"""Rejects of files: read back, listed, and appended again to a file of the user's."""

from __future__ import annotations

import fcntl
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from river import linear_model

from dataflows import Csv, Event, Job, JobError, Jsonl, Label, Outputs, Stdout
from dataflows.cli import main
from dataflows.events import Message, Reject, encode, reject
from dataflows.rejects import ALL, BATCH, Choice, Origins, RejectLog, Resubmission, Sent, Target
from dataflows.settings import RunDirectory
from features import Fields
from tests.scenarios import running

JOB = """
from river import linear_model
from dataflows import Event, Job, Jsonl, Label, Outputs, Stdout, Time
from features import Fields

class Ping(Event, id="id", time="t", unit="s"):
    id: int
    t: int
    x: float
    y: bool

def job(**changed):
    declared = dict(
        name="pings",
        events=Jsonl("events.jsonl", Ping),
        features=[Fields("x")],
        model=linear_model.LogisticRegression(),
        label=Label(field="y", delay="30s"),
        time=Time(order="arrival", lateness="1h"),
    )
    return Job(**(declared | changed))

def printed():
    return job(outputs=Outputs(rejects=Stdout()))

def silent():
    return job(outputs=Outputs(rejects=None))
"""


class Ping(Event, id="id", time="t", unit="s"):
    id: int
    t: int
    x: float
    y: bool


class Told(Event, id="id", time="t", unit="s"):
    id: int
    t: int
    y: bool


def make(**changed: Any) -> Job:
    """A job of files."""
    declared = {
        "name": "pings",
        "events": Jsonl("events.jsonl", Ping),
        "features": [Fields("x")],
        "model": linear_model.LogisticRegression(),
        "label": Label(field="y", delay="30s"),
    }
    return Job(**(declared | changed))


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a job file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    (tmp_path / job_file(tmp_path)).write_text(JOB)
    (tmp_path / "runs/pings/state").mkdir(parents=True)
    return tmp_path


def job_file(directory: Path) -> str:
    """Modules are imported once per process, by name."""
    return f"pings_{abs(hash(directory))}.py"


@pytest.fixture
def millrace(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs `millrace rejects` in this process: exit code, output, errors."""

    def command(*arguments: object, function: str = "job") -> tuple[int, str, str]:
        words = ["millrace", "rejects", f"{job_file(here)}:{function}", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", words)
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setenv("TERM", "dumb")
        code: Any = 0
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return command


def keep(*records: Reject, directory: str = "runs/pings") -> None:
    """Write rejects where a run writes them."""
    with (Path(directory) / "rejects.jsonl").open("ab") as file:
        file.writelines(encode(record) for record in records)


def invalid(line: int, original: bytes, reason: str = "invalid", name: str = "events.jsonl") -> Reject:
    """A reject of an input file."""
    return reject(reason, "x: Input should be a valid number", f"{name}:{line}", original)


def lines(path: str) -> list[bytes]:
    """The lines of a file."""
    return Path(path).read_bytes().splitlines()


# -- looking


def test_counts_come_first_and_the_newest_rejects_after_them(millrace: Command) -> None:
    """The table has a row for each reason, the most frequent first; then records are shown, the newest first."""
    keep(*[invalid(n, b'{"n": %d}' % n) for n in range(1, 31)], invalid(31, b"", "empty"))
    code, printed, _ = millrace()
    assert code == 0
    assert printed.startswith("31 rejects of pings in runs/pings/rejects.jsonl")
    assert printed.index("invalid") < printed.index("empty") < printed.index("the newest 20:")
    shown = [line for line in printed.splitlines() if line.startswith("events.jsonl:")]
    assert [line.split()[0] for line in shown] == [f"events.jsonl:{n}" for n in range(31, 11, -1)]
    assert '    {"n": 30}' in printed.splitlines()


def test_what_is_shown_can_be_chosen(millrace: Command) -> None:
    """--reason and --limit narrow it; a limit of 0 shows the table alone."""
    keep(invalid(1, b"a"), invalid(2, b"b", "empty"), invalid(3, b"c", "not_json"))
    _, printed, _ = millrace("--reason", "empty", "--reason", "not_json", "--limit", 1)
    assert printed.startswith("2 rejects")
    assert "the newest 1:" in printed
    assert "events.jsonl:3" in printed
    assert "events.jsonl:2" not in printed
    assert "events.jsonl:" not in millrace("--limit", 0)[1]


def test_nothing_steers_the_terminal(millrace: Command) -> None:
    """Control characters, colours, directions of writing and markup in a record are shown as what they are."""
    keep(
        reject(
            "inva[red]lid", "say \x1b]0;title\x07", "[bold]events.jsonl:1", b"\x1b[2J[link=x]\xe2\x80\xaeabc\nd\xc2\x9b"
        ),
        invalid(2, b"\xff\x1b[2J"),
    )
    _, printed, _ = millrace()
    assert "\x1b" not in printed
    assert "\x07" not in printed
    assert "\x9b" not in printed
    assert "\u202e" not in printed
    assert r"\x1b[2J[link=x]\u202eabc\nd\x9b" in printed
    assert r"b'\xff\x1b[2J'" in printed
    assert "inva[red]lid" in printed
    assert "[bold]events.jsonl:1" in printed


def test_json_gives_each_reject_as_a_line(millrace: Command) -> None:
    """All of them as they are kept, oldest first; with a limit the newest."""
    kept = [invalid(n, b"x" * n) for n in range(1, 5)]
    keep(*kept)
    code, printed, _ = millrace("--json")
    assert code == 0
    assert printed.encode() == b"".join(encode(record) for record in kept)
    assert [json.loads(line)["place"] for line in millrace("--json", "--limit", 2)[1].splitlines()] == [
        "events.jsonl:3",
        "events.jsonl:4",
    ]


def test_a_line_that_is_being_written_is_left_out(millrace: Command) -> None:
    """A run may be writing the last one."""
    keep(invalid(1, b"a"))
    with Path("runs/pings/rejects.jsonl").open("ab") as file:
        file.write(encode(invalid(2, b"b"))[:40])
    assert millrace()[1].startswith("1 reject of pings")


def test_rejects_that_come_while_they_are_read_are_left_for_the_next_time(here: Path) -> None:
    """What is sent again and rejected again is not read by the same command, so that it ends."""
    keep(invalid(1, b"a"), invalid(2, b"b"))
    read = RejectLog(make(), RunDirectory(Path("runs/pings"))).read(ALL)
    next(read)
    keep(invalid(3, b"c"))
    assert [record.place for _, record in read] == ["events.jsonl:2"]


@pytest.mark.parametrize(
    ("function", "options", "said"),
    [
        ("job", ["--directory", "elsewhere"], "rejects.jsonl is not there: the job has not run yet"),
        ("printed", [], "cannot be read back"),
        ("silent", [], "keeps no rejects"),
        ("job", ["--to", "x.jsonl"], "--to says how to send rejects again. Hint: add --resubmit"),
        ("job", ["--again"], "--again says how to send rejects again. Hint: add --resubmit"),
        ("job", ["--resubmit"], "Hint: --to FILE"),
        ("job", ["--resubmit", "--to", "x.jsonl.gz"], "not compressed"),
        ("job", ["--resubmit", "--input", "labels", "--to", "x.jsonl"], "has no such input"),
    ],
)
def test_what_cannot_be_done_is_said(function: str, options: list[str], said: str, millrace: Command) -> None:
    """One message with a hint, and exit code 1."""
    keep(invalid(1, b"a"))
    code, printed, wrong = millrace(*options, function=function)
    assert code == 1
    assert said in wrong
    assert "Traceback" not in wrong + printed


def test_a_file_that_holds_no_rejects_is_named_with_its_line(millrace: Command) -> None:
    """And nothing is guessed."""
    keep(invalid(1, b"a"))
    with Path("runs/pings/rejects.jsonl").open("ab") as file:
        file.write(b'{"record":"prediction"}\n')
    code, _, wrong = millrace()
    assert code == 1
    assert "rejects.jsonl:2 is no reject" in wrong


def test_lone_surrogates_in_a_detail_can_be_read_back() -> None:
    """What code of the user's says may hold text that UTF-8 does not know; the record stays one."""
    record = reject("function_error", "ValueError: \ud800", "\udcff.jsonl:1", b"{}")
    assert record.detail == r"ValueError: \ud800"
    text = encode(Reject("invalid", "\ud800", "a:1", "{}"))
    assert b"UNSET" not in text


# -- sending again


def test_originals_are_appended_once(millrace: Command) -> None:
    """The bytes as they were, oldest first; the second time nothing is left, and --again sends them once more."""
    keep(invalid(1, b'{"a": 1}'), invalid(2, b"\xff\xfe\r", "encoding"), invalid(3, b""))
    code, printed, _ = millrace("--resubmit", "--to", "fixed.jsonl")
    assert code == 0
    assert "3 rejects sent to fixed.jsonl" in printed
    assert Path("fixed.jsonl").read_bytes() == b'{"a": 1}\n\xff\xfe\r\n\n'
    _, printed, _ = millrace("--resubmit", "--to", "fixed.jsonl")
    assert "nothing was sent" in printed
    assert "3 rejects left out: sent before" in printed
    keep(invalid(4, b"d"))
    assert "1 reject sent to fixed.jsonl" in millrace("--resubmit", "--to", "fixed.jsonl")[1]
    assert len(lines("fixed.jsonl")) == 4
    assert "4 rejects sent" in millrace("--resubmit", "--to", "fixed.jsonl", "--again")[1]
    assert len(lines("fixed.jsonl")) == 8
    table = next(line for line in millrace()[1].splitlines() if line.strip().startswith("invalid"))
    assert table.split() == ["invalid", "3", "3"]


def test_a_chosen_part_is_sent(millrace: Command) -> None:
    """--limit sends the oldest that were not sent yet, --reason those of a reason, and --json tells what was done."""
    keep(*[invalid(n, b"%d" % n, "empty" if n % 2 else "invalid") for n in range(1, 9)])
    _, printed, _ = millrace("--resubmit", "--to", "f", "--reason", "empty", "--limit", 2, "--json")
    told = {"sent": {"f": 2}, "sent_before": 0, "left": {}, "failed": 0, "fault": None}
    assert json.loads(printed) == told
    millrace("--resubmit", "--to", "f", "--reason", "empty", "--limit", 1)
    assert lines("f") == [b"1", b"3", b"5"]


def test_a_last_line_without_its_end_gets_one(millrace: Command) -> None:
    """The first line that is appended does not become a part of it."""
    Path("f").write_bytes(b"half")
    keep(invalid(1, b"a"))
    millrace("--resubmit", "--to", "f")
    assert Path("f").read_bytes() == b"half\na\n"


def test_what_cannot_be_sent_is_counted_by_why(millrace: Command) -> None:
    """A model's error, a line that was kept in part, and a record of an input that the job does not have."""
    keep(
        reject("model_error", "no", "event 'events.jsonl:7'", b"{}"),
        reject("metric_error", "no", "event 7", b""),
        invalid(1, b"x" * 9, "too_long"),
        invalid(2, b"EOFError", "broken_file"),
        reject("invalid", "no", "payments/0:17", Message(b"{}", b"k")),
        reject("invalid", "no", "payments/0:18", Message(None, None)),
    )
    code, printed, _ = millrace("--resubmit", "--to", "f")
    assert code == 0
    assert "nothing was sent" in printed
    assert "2 rejects cannot be sent: about an event or a model, not about a record" in printed
    assert "2 rejects cannot be sent: not kept whole" in printed
    assert "1 reject cannot be sent: from no input that the job has now" in printed
    assert "1 reject cannot be sent: without key and value" in printed
    assert not Path("f").exists()


def test_csv_lines_get_the_header_of_their_file(here: Path) -> None:
    """A new file begins with it; to a file with another header nothing is appended, and that is a failure."""
    Path("a.csv").write_text("id,t,x,y\n1,1,?,true\n")
    keep(invalid(2, b"1,1,?,true", name="a.csv"), invalid(3, b"2,1,?,true", name="a.csv"))
    job, run = make(events=Csv("a.csv", Ping)), RunDirectory(Path("runs/pings"))
    sending(job, run, Path("f.csv"), limit=1).run()
    sending(job, run, Path("f.csv")).run()
    assert lines("f.csv") == [b"id,t,x,y", b"1,1,?,true", b"2,1,?,true"]
    Path("g.csv").write_text("id,x,y,t\n")
    work = sending(job, run, Path("g.csv"), again=True)
    work.run()
    assert work.failed == 2
    assert work.fault == "a.csv:2: its header line is not that of g.csv"
    Path("a.csv").unlink()
    work = sending(job, run, Path("f.csv"), again=True)
    work.run()
    assert work.fault == "a.csv:2: its file is gone, and with it the header line that it needs"
    assert len(lines("f.csv")) == 3
    assert lines("g.csv") == [b"id,x,y,t"]


def sending(job: Job, run: RunDirectory, to: Path | None, choice: Choice = ALL, **options: Any) -> Resubmission:
    """What `millrace rejects --resubmit` does."""
    return Resubmission(RejectLog(job, run), choice, Sent(run), to, **options)


def test_events_and_labels_are_told_apart(here: Path) -> None:
    """By the names of their files; both at once are refused, since they would come into one file."""
    for name in ("events.jsonl", "labels.jsonl"):
        Path(name).touch()
    job = make(label=Label(Jsonl("labels.jsonl", Told), field="y", horizon="1h"))
    keep(invalid(1, b"e"), invalid(1, b"l", name="labels.jsonl"), invalid(1, b"?", name="gone.jsonl"))
    run = RunDirectory(Path("runs/pings"))
    with pytest.raises(JobError, match="--input events or --input labels"):
        sending(job, run, Path("f"))
    with pytest.raises(JobError, match="the events and labels of pings come from files"):
        sending(job, run, None)
    sending(job, run, Path("f"), Choice(input="labels")).run()
    sending(job, run, Path("g"), Choice(input="events")).run()
    assert (lines("f"), lines("g")) == ([b"l"], [b"e"])
    assert Origins(job).of("labels.jsonl:3") == "labels"
    assert Origins(job).of("gone.jsonl:3") is None


def test_the_same_place_in_another_file_is_another_record(here: Path) -> None:
    """A file that was replaced has the same line numbers: what is remembered is a place with what stood there."""
    run = RunDirectory(Path("runs/pings"))
    keep(invalid(1, b"a"))
    sending(make(), run, Path("f")).run()
    keep(invalid(1, b"b"), invalid(1, b"b"))
    sending(make(), run, Path("f")).run()
    assert lines("f") == [b"a", b"b"]


def test_two_cannot_send_at_once(here: Path) -> None:
    """The second is told so, and sends nothing."""
    run = RunDirectory(Path("runs/pings"))
    keep(invalid(1, b"a"))
    with (run.state / "resubmitted.jsonl").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(JobError, match="by another process"):
            sending(make(), run, Path("f")).run()
    assert not Path("f").exists()


def test_a_torn_memory_is_read_as_far_as_it_goes(here: Path) -> None:
    """A kill while it was written costs at most the record of the torn line."""
    run = RunDirectory(Path("runs/pings"))
    keep(invalid(1, b"a"), invalid(2, b"b"))
    sending(make(), run, Path("f")).run()
    memory = run.state / "resubmitted.jsonl"
    memory.write_bytes(memory.read_bytes()[:-4])
    sending(make(), run, Path("f")).run()
    sending(make(), run, Path("f")).run()
    assert lines("f") == [b"a", b"b", b"b"]


class Refusing(Target):
    """Acknowledges records until it does no more."""

    name = "there"

    def __init__(self, good: int, breaks: bool = False) -> None:
        self.good = good
        self.breaks = breaks
        self.got: list[str] = []

    def send(self, records: list[Reject]) -> Iterator[tuple[int, str | None]]:
        for number, record in enumerate(records):
            self.got.append(record.place)
            if len(self.got) > self.good and self.breaks:
                raise KeyboardInterrupt
            yield number, None if len(self.got) <= self.good else "the broker is gone"


def test_a_failure_says_how_far_it_got(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was acknowledged is remembered, the first that failed is named, and the rest is not tried in vain."""
    run = RunDirectory(Path("runs/pings"))
    keep(*[invalid(n, b"%d" % n) for n in range(1, 3 * BATCH + 1)])
    target = Refusing(BATCH + 7)
    monkeypatch.setattr(Resubmission, "_open", lambda self, kind: target)
    work = sending(make(), run, Path("f"))
    work.run()
    assert dict(work.counts) == {"there": BATCH + 7}
    assert work.fault == f"events.jsonl:{BATCH + 8}: the broker is gone"
    assert work.failed == 2 * BATCH - 7
    target.good, target.got = 10 * BATCH, []
    work = sending(make(), run, Path("f"))
    work.run()
    assert work.before == BATCH + 7
    assert target.got[0] == f"events.jsonl:{BATCH + 8}"


def test_nothing_is_tried_after_a_batch_of_which_nothing_got_through(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else brokers that are away would be waited for again and again."""
    run = RunDirectory(Path("runs/pings"))
    keep(*[invalid(n, b"%d" % n) for n in range(1, 3 * BATCH + 1)])
    target = Refusing(0)
    monkeypatch.setattr(Resubmission, "_open", lambda self, kind: target)
    work = sending(make(), run, Path("f"))
    work.run()
    assert work.failed == len(target.got) == BATCH


def test_ctrl_c_keeps_what_was_acknowledged(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What got through before is not sent twice."""
    run = RunDirectory(Path("runs/pings"))
    keep(*[invalid(n, b"%d" % n) for n in range(1, 11)])
    target = Refusing(4, breaks=True)
    monkeypatch.setattr(Resubmission, "_open", lambda self, kind: target)
    with pytest.raises(KeyboardInterrupt):
        sending(make(), run, Path("f")).run()
    target.good, target.got = 100, []
    sending(make(), run, Path("f")).run()
    assert target.got == [f"events.jsonl:{n}" for n in range(5, 11)]


def test_a_full_disk_leaves_the_file_as_it_was(here: Path) -> None:
    """Nothing counts as sent, and no half line stays behind."""
    run = RunDirectory(Path("runs/pings"))
    keep(invalid(1, b"a" * 100))
    work = sending(make(), run, Path("/dev/full"))
    work.run()
    assert work.failed == 1
    assert "No space left" in str(work.fault)
    assert not work.counts["/dev/full"]


def test_rejects_that_go_to_standard_output_cannot_be_read() -> None:
    """Whatever cannot be read back says so, with what can."""
    with pytest.raises(JobError, match="cannot be read back"):
        next(Stdout().rejects("pings"))
    with pytest.raises(JobError, match="keeps no rejects"):
        RejectLog(make(outputs=Outputs(rejects=None)), RunDirectory(Path("runs/pings")))


def test_rejected_lines_are_processed_once_the_job_takes_them(here: Path) -> None:
    """A strict field is loosened, the lines are appended to the job's own file, and the next run takes them."""
    rows = [{"id": n, "t": n, "x": n / 2, "y": n % 3 == 0} for n in range(40)]
    strict = JOB.replace("x: float", "x: int")
    Path("job.py").write_text(strict)
    Path("events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    running.run(str(here / "job.py"), here / "runs/pings", "--data", str(here / "events.jsonl"))
    kept = running.records(here / "runs/pings", "rejects")
    assert [record["place"] for record in kept] == [f"events.jsonl:{n}" for n in range(2, 41, 2)]
    Path("job.py").write_text(JOB)
    run = RunDirectory(here / "runs/pings")
    sending(make(), run, Path("events.jsonl")).run()
    sending(make(), run, Path("events.jsonl")).run()
    running.run(str(here / "job.py"), here / "runs/pings", "--data", str(here / "events.jsonl"))
    answered = [record["id"] for record in running.records(here / "runs/pings", "predictions")]
    assert sorted(answered) == list(range(40))
    assert len(running.records(here / "runs/pings", "rejects")) == 20
