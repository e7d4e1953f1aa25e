"""What a fork takes over from the order log of another run, and how it knows its inputs again."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import pytest

from dataflows import Event, Job, Jsonl, Label
from dataflows.checkpoints import Manifest
from dataflows.fork import Asked, Fork, follow, renames
from dataflows.history import LaidOver
from dataflows.job import JobError
from dataflows.orderlog import ALL_READY, LogChain, LogEntry, OrderLog, OrderLogError
from dataflows.settings import RunDirectory
from dataflows.state import StateError
from features import Count, Entity
from features.rows import APPEND, GONE, MemoryRows, put


class Sale(Event, id="id", time="t", unit="s"):
    id: int
    t: int
    shop: str
    y: bool


def _job(path: Path) -> Job:
    from river import linear_model

    return Job(
        name="sales",
        events=Jsonl(path, Sale),
        features=[Entity("shop", [Count()], over="1h")],
        model=linear_model.LogisticRegression(),
        label=Label(field="y", delay="1h"),
    )


def _entries(count: int, name: str = "a.jsonl", at: int = 5) -> list[LogEntry]:
    return [LogEntry(i, [(name, 3)], 3, i, False, [], {}, at + i) for i in range(1, count + 1)]


def _log(path: Path, entries: list[LogEntry]) -> Path:
    log = OrderLog(path)
    for entry in entries:
        log.append(entry)
    log.close()
    return path


def _fork(path: Path, entries: list[LogEntry], **options: object) -> Fork:
    return Fork(RunDirectory(path.parent), LogChain([(_log(path, entries), None)]), **options)  # type: ignore[arg-type]


def test_what_the_source_has_more_is_appended_once(tmp_path: Path) -> None:
    """Also when it has grown, and when nothing is new."""
    with closing(OrderLog(tmp_path / "target")) as target:
        for count in (2, 2, 5):
            (tmp_path / "source").unlink(missing_ok=True)
            follow(_fork(tmp_path / "source", _entries(count)), target, 0)
            assert list(target.after(0)) == _entries(count)
    fork = _fork(tmp_path / "renamed", _entries(2), renamed={"a.jsonl": "b"}, regroup=True)
    with closing(OrderLog(tmp_path / "other")) as target:
        follow(fork, target, 1)
        (last,) = target.after(0)
    assert (last.number, last.pulls, last.count) == (2, [("b", 3)], ALL_READY)


@pytest.mark.parametrize("source", [_entries(2), _entries(3, at=6), []], ids=["shorter", "other times", "empty"])
def test_a_run_that_has_gone_on_by_itself_is_not_followed(tmp_path: Path, source: list[LogEntry]) -> None:
    """Whether it has more batches than the source, or others of the same size, and nothing is appended."""
    with closing(OrderLog(_log(tmp_path / "target", _entries(3)))) as target:
        with pytest.raises(OrderLogError, match="gone on by itself"):
            follow(_fork(tmp_path / "source", source), target, 0)
        assert list(target.after(0)) == _entries(3)


def test_a_chain_needs_only_the_logs_it_reads(tmp_path: Path) -> None:
    """Of a branch before a fork nothing is needed after the fork; before it, what is missing is said."""
    second = _log(tmp_path / "2.log", _entries(6)[4:])
    chain = LogChain([(tmp_path / "1.log", 4), (second, None)])
    assert [entry.number for entry in chain.after(4)] == [5, 6]
    with pytest.raises(OrderLogError, match=r"1\.log is missing"):
        list(chain.after(3))
    with second.open("ab") as file:
        file.write(b"[7,[[")  # a run is writing it
    assert [entry.number for entry in chain.after(5)] == [6]


def test_inputs_are_known_again(tmp_path: Path) -> None:
    """By name, or one for one from the start; from a checkpoint only where it stopped at the end of as many lines."""
    lines = [json.dumps({"id": i, "t": i, "shop": "s", "y": True}) + "\n" for i in range(9)]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    log = LogChain([(_log(tmp_path / "log", _entries(3)), None)])
    job = _job(tmp_path / "a.jsonl")
    assert renames(log, job) == {}
    assert renames(LogChain([(_log(tmp_path / "none", []), None)]), job) == {}
    byte = sum(map(len, lines[:4]))
    at = Manifest(branch=1, batch=1, offsets={"a.jsonl": [byte, 4, 0, 0]})
    assert renames(log, job, 1, at) == {}
    for position in ([byte, 3, 0, 0], [byte + 1, 4, 0, 0]):
        moved = Manifest(branch=1, batch=1, offsets={"a.jsonl": position})
        with pytest.raises(OrderLogError, match="no such line ends there"):
            renames(log, job, 1, moved)
    (tmp_path / "b.jsonl").write_text("".join(lines))
    other = _job(tmp_path / "b.jsonl")
    assert renames(log, other) == {"a.jsonl": "b.jsonl"}
    with pytest.raises(JobError, match="--from start"):
        renames(log, other, 1, at)


def test_what_was_asked_is_kept(tmp_path: Path) -> None:
    """And damage is said."""
    target = RunDirectory(tmp_path / "run")
    assert Asked.of(target) is None
    asked = Asked(source="x", origin="latest", quiet=7)
    asked.keep(target)
    assert Asked.of(target) == asked
    (target.state / "fork.json").write_text("{")
    with pytest.raises(StateError, match="damaged"):
        Asked.of(target)


def test_rows_with_changes_over_them_are_new_each_time() -> None:
    """Who asks may change what it gets, as those do who put a row's parts together."""
    rows = MemoryRows()
    rows.apply([put("a", [1])])
    over = LaidOver(rows, [("a", APPEND, put("a", [2])[2]), put("b", [3]), ("c", GONE, b"")])
    for _ in range(2):
        assert [parts for _, parts in over.scan("")] == [[[1], [2]], [[3]]]
        over.get("a")[1].append(9)
        over.get("b")[0].append(9)
