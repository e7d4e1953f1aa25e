"""The measures of a run: what Prometheus is told, while a job runs and when there is little to tell."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import time as wall
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from dataflows.checkpoints import Checkpoints, Manifest
from dataflows.control import Control, Phase
from dataflows.monitor import MEASURES, MOST_MODELS, MOST_PARTITIONS, Monitor, RunCollector, status_samples
from dataflows.runtime import free_ports
from dataflows.settings import RunDirectory, Start, dump_branches
from dataflows.startup import RunError
from dataflows.tally import BOUNDS, Tally
from tests.scenarios import running

JOB = """
from river import linear_model, metrics
from dataflows import Event, Job, Jsonl, Label
from features import Count, Entity, Fields

class Ping(Event, id="id", time="t", unit="s"):
    id: int
    t: int
    key: str
    x: float
    y: bool

job = Job(
    name="watched",
    events=Jsonl("DIRECTORY/events.jsonl", Ping),
    features=[Fields("x"), Entity("key", [Count()], over="1h")],
    model=linear_model.LogisticRegression(),
    label=Label(field="y", delay="30s"),
    metrics=[metrics.ROCAUC()],
)
"""
EVENTS = 300

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def parsed(text: str) -> Samples:
    """By name and labels (without that of the job), the values of an answer to a scrape."""
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = tuple((name, value) for name, value in sorted(sample.labels.items()) if name != "job")
            found[sample.name, labels] = sample.value
    return found


def scraped(port: int) -> str:
    """What the port answers."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text: str = answer.read().decode()
    return text


def told(run: RunDirectory, afresh: bool = False) -> Samples:
    """What a collector of a run tells now."""
    return asked(RunCollector(run, "watched", afresh))


def asked(collector: RunCollector) -> Samples:
    """What a collector tells now."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(collector)
    return parsed(generate_latest(registry).decode())


def say(run: RunDirectory, status: Any) -> None:
    """Leave a status as the publisher does."""
    run.state.mkdir(parents=True, exist_ok=True)
    run.status.write_text(json.dumps(status))


def keep(run: RunDirectory, *manifests: Manifest) -> None:
    """Leave checkpoints of branch 1."""
    run.state.mkdir(parents=True, exist_ok=True)
    run.branches.write_bytes(dump_branches((Start(),)))
    for manifest in manifests:
        Checkpoints(run).add(manifest)


@pytest.fixture
def place(tmp_path: Path) -> RunDirectory:
    """A run's directory, with nothing in it."""
    return RunDirectory(tmp_path / "run")


# -- a run


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A job file with its events."""
    events = [{"id": i, "t": i, "key": f"k{i % 3}", "x": i % 10, "y": i % 10 > 6} for i in range(EVENTS)]
    lines = [json.dumps(event) for event in events]
    (tmp_path / "events.jsonl").write_text("\n".join(["broken", *lines, ""]))
    path = tmp_path / "watched_job.py"
    path.write_text(JOB.replace("DIRECTORY", str(tmp_path)))
    return path


@contextmanager
def started(job: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """A run that waits for more at the end of its file; ended with a checkpoint."""
    process = running.start(str(job), job.parent / "out", "--follow", "--checkpoint", "0.5", *options)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)


def until_known(port: int, process: subprocess.Popen[str], name: str) -> str:
    """The first answer that has a metric; fails the test when none comes, or the run ends."""
    end = wall.monotonic() + 60
    while wall.monotonic() < end and process.poll() is None:
        try:
            text = scraped(port)
        except OSError:
            text = ""
        if f"\n{name}{{" in text:
            return text
        wall.sleep(0.1)
    pytest.fail(f"{name} never came: {process.communicate(timeout=10)[0] if process.poll() is not None else ''}")


def until_there(path: Path, process: subprocess.Popen[str]) -> None:
    """Wait for a file that a run writes; fails the test when it does not come, or the run ends."""
    end = wall.monotonic() + 60
    while not path.exists() and wall.monotonic() < end and process.poll() is None:
        wall.sleep(0.1)
    assert path.exists()
    assert process.poll() is None


def test_a_run_can_be_scraped_while_it_is_on(job: Path) -> None:
    """On the port that was asked for, a run tells its records, its checkpoint and its phase; after it nothing does."""
    (port,) = free_ports(1)
    with started(job, "--metrics-port", str(port)) as process:
        until_known(port, process, "millrace_checkpoint_batch")
        text = until_known(port, process, "millrace_events_total")
    found = parsed(text)
    assert 0 < found["millrace_events_total", ()] <= EVENTS
    assert found["millrace_predictions_total", ()] > 0
    assert found["millrace_rejects_total", (("reason", "not_json"),)] == 1
    assert found["millrace_checkpoints_retained", ()] >= 1
    assert found["millrace_phase", (("phase", "watching"), ("process", "launcher"))] in {0, 1}
    assert 'millrace_events_total{job="watched"}' in text
    with pytest.raises(OSError, match="refused"):
        scraped(port)


def listening(process: int) -> list[str]:
    """The local addresses that a process and its children listen on, as the kernel writes them."""
    inodes = {
        os.readlink(f).removeprefix("socket:[").rstrip("]")
        for one in _family(process)
        for f in Path(f"/proc/{one}/fd").iterdir()
        if f.is_symlink() and _target(f).startswith("socket:")
    }
    rows = [
        line.split()
        for table in ("tcp", "tcp6")
        if Path(f"/proc/net/{table}").exists()
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
    ]
    return [row[1] for row in rows if row[3] == "0A" and row[9] in inodes]


def _family(process: int) -> list[int]:
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [process, *(one for child in children for one in _family(int(child)))]


def _target(link: Path) -> str:
    try:
        return os.readlink(link)
    except FileNotFoundError:
        return ""


def test_no_port_is_opened_unless_one_is_asked_for(job: Path) -> None:
    """A run of one worker listens on nothing by default, and with --metrics-port on that port of the loopback alone."""
    (port,) = free_ports(1)
    for options, addresses in (((), []), (("--metrics-port", str(port)), [f"0100007F:{port:04X}"])):
        with started(job, "--fresh", *options) as process:
            until_there(job.parent / "out/state/status.json", process)
            assert listening(process.pid) == addresses
        (job.parent / "out/state/status.json").unlink()


def test_a_taken_port_ends_the_run_before_it_starts(job: Path) -> None:
    """A port that something listens on is one clear message and exit code 1, and no state is made."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        process = running.start(str(job), job.parent / "out", "--metrics-port", str(port))
        printed, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"--metrics-port {port}: cannot listen on 127.0.0.1: Address already in use. Hint: another port" in printed
    assert "Traceback" not in printed
    assert not (job.parent / "out").exists()


def test_a_host_that_is_not_here_is_refused(place: RunDirectory) -> None:
    """An address of another machine is an error that names the option."""
    with pytest.raises(RunError, match="--metrics-host has to be"), Monitor(place, "watched", "192.0.2.1", 9100):
        pass


# -- what is told


def full_status() -> dict[str, Any]:
    """A status with all there can be."""
    latency = Tally()
    latency.observe(0.0015, 3)
    latency.observe(1e9)
    return {
        "clock": 5_000_000, "watermark": 4_000_000, "open": 7, "read": 20, "questions": 12, "late_events": 1,
        "end": False, "batch": 9, "outcomes": 3, "metrics": {"ROCAUC": 0.75, "LogLoss": None},
        "counts": {"predictions": 12, "outcomes": 3, "rejects": 5, "rejects.malformed": 4, "rejects.duplicate": 1},
        "lag": {"payments-0": 4, "payments-1": 0}, "position": {"payments-0": 30, "payments-1": 2},
        "latency": latency.state(), "backlog": Tally().state(), "versions": {"LogisticRegression": 3},
        "tombstones": 2, "gap": 6, "models": 1,
    }  # fmt: skip


def test_a_full_state_is_told_whole(place: RunDirectory) -> None:
    """Of a run with status, checkpoints and shared memory, every declared measure has its value."""
    say(place, full_status())
    keep(
        place,
        Manifest(branch=1, batch=3, written_at="2026-01-30T21:00:00+00:00", bytes=10),
        Manifest(branch=1, batch=8, written_at="2026-01-30T21:00:10+00:00", bytes=4096),
    )
    control = Control(place.control)
    control.workers, control.launcher = Phase.SNAPSHOT, Phase.WATCHING
    assert {metric.name for metric in RunCollector(place, "watched").collect()} == {m.name for m in MEASURES}
    found = told(place)
    for name, value in {
        "millrace_records_read_total": 20, "millrace_events_total": 12, "millrace_predictions_total": 12,
        "millrace_outcomes_total": 3, "millrace_late_events_total": 1, "millrace_tombstones_total": 2,
        "millrace_gap_records_total": 6, "millrace_open_questions": 7, "millrace_newest_batch": 9,
        "millrace_clock_timestamp_seconds": 5.0, "millrace_checkpoint_bytes": 4096, "millrace_checkpoint_batch": 8,
        "millrace_checkpoint_timestamp_seconds": datetime(2026, 1, 30, 21, 0, 10, tzinfo=UTC).timestamp(),
        "millrace_checkpoints_retained": 2, "millrace_checkpoint_stall_seconds": 0,
    }.items():  # fmt: skip
        assert found[name, ()] == value, name
    assert found["millrace_watermark_lag_seconds", ()] == pytest.approx(wall.time() - 4.0, abs=60)
    assert found["millrace_rejects_total", (("reason", "malformed"),)] == 4
    assert found["millrace_lag_records", (("partition", "payments-0"),)] == 4
    assert found["millrace_lag_records", (("partition", "payments-1"),)] == 0
    assert found["millrace_partition_position", (("partition", "payments-0"),)] == 30
    assert found["millrace_model_metric", (("metric", "ROCAUC"),)] == 0.75
    assert ("millrace_model_metric", (("metric", "LogLoss"),)) not in found
    assert found["millrace_model_version", (("model", "LogisticRegression"),)] == 3
    assert found["millrace_phase", (("phase", "snapshot"), ("process", "workers"))] == 1
    assert found["millrace_phase", (("phase", "running"), ("process", "workers"))] == 0


def test_durations_are_a_histogram(place: RunDirectory) -> None:
    """Each bucket holds what is below its bound, the last one all, beside the count and the sum."""
    say(place, full_status())
    found = told(place)
    name = "millrace_prediction_latency_seconds"
    assert found[f"{name}_bucket", (("le", "0.001"),)] == 0
    assert found[f"{name}_bucket", (("le", "0.002"),)] == 3
    assert found[f"{name}_bucket", (("le", "86400.0"),)] == 3
    assert found[f"{name}_bucket", (("le", "+Inf"),)] == found[f"{name}_count", ()] == 4
    assert found[f"{name}_sum", ()] == pytest.approx(1e9 + 0.0045)


def test_nothing_is_told_of_a_run_that_is_not_there(place: RunDirectory) -> None:
    """Without a directory there are no checkpoints and there is nothing else to tell, and none is made."""
    assert told(place) == {("millrace_checkpoints_retained", ()): 0}
    assert not place.path.exists()


@pytest.mark.parametrize("content", [b"", b'{"read": 20, "coun', b"[1, 2]", b"null", b"\xff"])
def test_a_status_that_cannot_be_read_is_left_out(place: RunDirectory, content: bytes) -> None:
    """A status that is empty, cut off or of another form leaves the rest of the answer as it is."""
    keep(place, Manifest(branch=1, batch=3, written_at="2026-01-30T21:00:00+00:00"))
    place.status.write_bytes(content)
    found = told(place)
    assert found["millrace_checkpoint_batch", ()] == 3
    assert ("millrace_records_read_total", ()) not in found


def test_a_damaged_manifest_is_left_out(place: RunDirectory) -> None:
    """A manifest that cannot be read costs the measures of checkpoints and no others."""
    say(place, full_status())
    keep(place, Manifest(branch=1, batch=3, written_at="2026-01-30T21:00:00+00:00"))
    for path in place.checkpoints.iterdir():
        path.write_text("{")
    found = told(place)
    assert found["millrace_events_total", ()] == 12
    assert ("millrace_checkpoint_batch", ()) not in found


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200)
@given(st.dictionaries(st.sampled_from(sorted(full_status())), anything), st.data())
def test_any_status_can_be_told(status: dict[str, Any], data: st.DataObject) -> None:
    """Whatever parts of a status are missing, or of a form that nobody expects, what is told are numbers."""
    for name in data.draw(st.sets(st.sampled_from(sorted(full_status())))):
        status[name] = full_status()[name]
    for measure, labels, value in status_samples(status, 0.0):
        assert len(labels) == len(measure.labels)
        assert isinstance(value, Mapping) or float(value) == float(value)


def test_models_and_partitions_are_bounded(place: RunDirectory) -> None:
    """Of very many models those that learned most are shown, of partitions the first; the others are counted."""
    say(
        place,
        {
            "versions": {f"m{i}": i for i in range(MOST_MODELS + 7)},
            "lag": {f"p{i:05}": 1 for i in range(MOST_PARTITIONS + 3)},
        },
    )
    found = told(place)
    assert sum(name == "millrace_model_version" for name, _ in found) == MOST_MODELS
    assert ("millrace_model_version", (("model", "m6"),)) not in found
    assert found["millrace_model_version", (("model", "m7"),)] == 7
    assert found["millrace_left_out", (("of", "models"),)] == 7
    assert found["millrace_left_out", (("of", "partitions"),)] == 3
    say(place, {"versions": {"m1": 1}, "models": MOST_MODELS + 900})
    assert told(place)["millrace_left_out", (("of", "models"),)] == 900


def test_counters_never_go_back(place: RunDirectory) -> None:
    """What a restarted run does again is not counted again, not even by a launcher that came later."""
    say(place, {"read": 100, "open": 5})
    collector = RunCollector(place, "watched")
    say(place, {"read": 80, "open": 3})
    assert asked(collector)["millrace_records_read_total", ()] == 100
    assert asked(collector)["millrace_open_questions", ()] == 3
    say(place, {"read": 130})
    assert asked(collector)["millrace_records_read_total", ()] == 130


def test_a_fresh_run_begins_to_count_anew(place: RunDirectory) -> None:
    """With --fresh or --from, what the run before said of itself is neither shown nor gone on from."""
    say(place, {"read": 100})
    hour_ago = wall.time() - 3600
    os.utime(place.status, (hour_ago, hour_ago))
    collector = RunCollector(place, "watched", afresh=True)
    assert ("millrace_records_read_total", ()) not in asked(collector)
    say(place, {"read": 10})
    assert asked(collector)["millrace_records_read_total", ()] == 10


def test_names_keep_to_the_conventions_of_prometheus() -> None:
    """Names are lower case with the project's prefix, in base units, without a `_total` of their own; each has help."""
    names = [measure.name for measure in MEASURES]
    assert len(set(names)) == len(names)
    for measure in MEASURES:
        assert re.fullmatch(r"millrace_[a-z]+(_[a-z]+)*", measure.name)
        assert not measure.name.endswith(("_total", "_count", "_sum", "_bucket", "_ms", "_us"))
        assert measure.help.endswith(".")
        assert len(measure.help) > 30
        assert "job" not in measure.labels


# -- durations


@settings(max_examples=200)
@given(st.lists(st.tuples(st.floats(-10, 1e6) | st.sampled_from(BOUNDS), st.integers(0, 50))))
def test_tally_counts_as_a_naive_loop_does(durations: list[tuple[float, int]]) -> None:
    """Every duration is in the first bucket whose bound it does not exceed, in the last one above all; sums agree."""
    tally = Tally()
    for seconds, count in durations:
        tally.observe(seconds, count)
    state = tally.state()
    below = 0.0
    for bound, counted in zip([*BOUNDS, float("inf")], state["counts"], strict=True):
        expected = sum(
            n for seconds, n in durations if max(seconds, 0.0) <= bound and (below == 0.0 or seconds > below)
        )
        assert counted == expected
        below = bound
    assert state["sum"] == pytest.approx(sum(max(seconds, 0.0) * n for seconds, n in durations))
    assert state["buckets"] == sorted(BOUNDS)
