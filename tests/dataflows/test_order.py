"""The reader: the order of all events, watermarks, what is late, batches, rows and the order log."""

from __future__ import annotations

import json
import random
import time as wall
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dataflows.connectors import Jsonl, Memory
from dataflows.events import Event
from dataflows.order import EVENT, LABEL, Batch, InputError, Reader, ReadMode, Source, Time
from dataflows.orderlog import LogEntry, OrderLog, OrderLogError
from features.rows import MemoryRows


class Ping(Event, id="id", time="t", unit="us"):
    id: int
    t: int


class Word(Event, id="id", time="t", unit="us"):
    id: str
    t: int


class Nameless(Event, time="t", unit="us"):
    t: int


Row = dict[str, Any]
Input = tuple[int, Source]


def row(t: int, id: int = 0) -> Row:
    """An event as a dict."""
    return {"id": id, "t": t}


def memory(name: str, rows: Iterable[Row], kind: int = EVENT, event: type[Event] = Ping) -> Input:
    """An input in memory."""
    return kind, Memory(event=event, items=list(rows), name=name)


def batches(reader: Reader) -> list[Batch]:
    """All batches until the inputs end."""
    taken: list[Batch] = []
    while not reader.finished:
        batch = reader.next_batch()
        if batch is not None:
            taken.append(batch)
    reader.close()
    return taken


def keys(taken: Iterable[Batch]) -> list[tuple[Any, ...]]:
    """Time, kind and id of all items in order."""
    return [item[:3] for batch in taken for item in batch.items]


def shape(taken: Iterable[Batch]) -> list[Any]:
    """All that downstream sees of batches."""
    return [(b.number, [i[:5] for i in b.items], b.rejects, b.watermark, b.end) for b in taken]


def items(taken: Iterable[Batch]) -> tuple[list[Any], list[Any]]:
    """All items and rejects, however they were cut into batches: how soon the end is noticed is no one's concern."""
    listed = list(taken)
    return [item[:5] for b in listed for item in b.items], [reject for b in listed for reject in b.rejects]


def read(inputs: Sequence[Input], time: Time | None = None, **options: Any) -> list[Batch]:
    """All batches of inputs."""
    return batches(Reader(inputs, time or Time(), **options))


# -- the order key


def test_at_equal_times_labels_come_before_events() -> None:
    """A label due at t is known before the question at t, whatever the ids."""
    taken = read([memory("e", [row(5, 1), row(6, 1)]), memory("l", [row(5, 9), row(6, 9)], LABEL)])
    assert keys(taken) == [(5, LABEL, 9), (5, EVENT, 1), (6, LABEL, 9), (6, EVENT, 1)]


def test_integer_ids_sort_as_numbers() -> None:
    """10 comes after 9, and negative numbers come first."""
    taken = read([memory("e", [row(5, id) for id in (10, 9, 100, -3, 0)])])
    assert [key[2] for key in keys(taken)] == [-3, 0, 9, 10, 100]


def test_text_ids_sort_as_text() -> None:
    """Text has its own order, of code points."""
    rows = [{"id": id, "t": 1} for id in ("10", "9", "é", "Z", "a", "")]
    assert [key[2] for key in keys(read([memory("e", rows, event=Word)]))] == ["", "10", "9", "Z", "a", "é"]


def test_events_without_an_id_sort_by_partition_and_offset() -> None:
    """At equal times the place where an event was read decides."""
    taken = read([memory(n, [{"t": 1}, {"t": 1}], event=Nameless) for n in ("b", "a")])
    assert [item[3:5] for batch in taken for item in batch.items] == [("a", 1), ("a", 2), ("b", 1), ("b", 2)]


def test_two_inputs_of_one_name_are_refused() -> None:
    """Positions are kept by name, so names must differ."""
    with pytest.raises(InputError, match=r"two inputs are named 'e'.*Hint"):
        Reader([memory("e", []), memory("e", [], LABEL)], Time())


# -- independence


@st.composite
def shuffled(draw: st.DrawFn) -> tuple[list[Row], list[list[Row]], int]:
    """Distinct events, and a way to spread them over partitions out of order within a lateness."""
    times = draw(st.lists(st.integers(0, 60), max_size=40))
    lateness = draw(st.sampled_from([0, 1, 7, 30]))
    events = [row(t, id) for id, t in enumerate(sorted(times))]
    rng = random.Random(draw(st.integers(0, 2**32)))
    # Sorted by when they arrive: at most `lateness` after any newer one.
    arrived = sorted(events, key=lambda e: (e["t"] + rng.uniform(0, lateness), rng.random()))
    parts: list[list[Row]] = [[] for _ in range(draw(st.integers(1, 4)))]
    for event in arrived:
        rng.choice(parts).append(event)
    return events, parts, lateness


@given(case=shuffled(), batch_size=st.integers(1, 50), labels=st.booleans())
def test_the_order_is_the_same_however_events_are_split_shuffled_and_batched(
    case: tuple[list[Row], list[list[Row]], int], batch_size: int, labels: bool
) -> None:
    """Sorted by time and id with nothing late, for any partitions, delays within the lateness, and batch size."""
    events, parts, lateness = case
    inputs = [memory(f"p{i}", part) for i, part in enumerate(parts)]
    expected = [(e["t"], EVENT, e["id"]) for e in events]
    if labels:
        inputs.append(memory("labels", events[::2], LABEL))
        expected += [(e["t"], LABEL, e["id"]) for e in events[::2]]
    taken = read(inputs, Time(lateness=lateness), batch_size=batch_size)
    assert keys(taken) == sorted(expected)
    assert not any(batch.rejects for batch in taken)
    assert [batch.number for batch in taken] == list(range(1, len(taken) + 1))
    assert [batch.end for batch in taken] == [False] * (len(taken) - 1) + [True]
    assert all(len(batch.items) <= batch_size for batch in taken)


@given(
    rows=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9)), max_size=40),
    order=st.sampled_from(["event_time", "arrival"]),
    lateness=st.sampled_from([0, 5]),
    buffer=st.sampled_from([1, 3, 1000]),
    sizes=st.tuples(st.integers(1, 7), st.integers(1, 50)),
)
def test_the_batch_size_changes_neither_order_nor_verdicts(
    rows: list[tuple[int, int]], order: Any, lateness: int, buffer: int, sizes: tuple[int, int]
) -> None:
    """Items, rejects and counters of late, damaged and forced events are those of any other batch size."""
    items = [b"damaged" if id == 9 else json.dumps(row(t, id)).encode() for t, id in rows]
    seen = []
    for size in sizes:
        reader = Reader(
            [(EVENT, Memory(event=Ping, items=items))],
            Time(order=order, lateness=lateness, buffer=buffer),
            batch_size=size,
        )
        taken = batches(reader)
        seen.append((keys(taken), [r for b in taken for r in b.rejects], reader.counts, reader.watermark))
    assert seen[0] == seen[1]
    assert len(seen[0][0]) + len(seen[0][1]) == len(rows), "accepted + rejected = read"


# -- watermarks, as transcripts

Step = tuple[Any, ...]


class Play:
    """Carries out a transcript in the form of Apache Beam's: inputs, the watermark then, what is released."""

    def __init__(self, directory: Path, partitions: str, time: Time, kinds: dict[str, int] | None = None) -> None:
        self._directory = directory
        self._id = 0
        inputs: list[Input] = []
        for name in partitions:
            (directory / name).touch()
            inputs.append(((kinds or {}).get(name, EVENT), Jsonl(directory / name, Ping)))
        self.reader = Reader(inputs, time, batch_size=1000, linger=0, mode=ReadMode(follow=True))
        self.released: list[int] = []
        self.refused: list[str] = []

    def carry_out(self, steps: Sequence[Step]) -> None:
        for number, (what, *arguments) in enumerate(steps, 1):
            step = f"step {number}: {what} {arguments}"
            if what == "input":
                self._write(*arguments)
                self._pull()
            elif what == "watermark":
                assert self.reader.watermark == arguments[0], step
            elif what == "expect":
                assert self.released == arguments[0], step
                self.released = []
            elif what == "rejects":
                assert self.refused == arguments[0], step
                self.refused = []
            elif what == "sleep":
                wall.sleep(arguments[0])
                self._pull()

    def _write(self, name: str, *times: int) -> None:
        with (self._directory / name).open("a") as file:
            for t in times:
                self._id += 1
                file.write(json.dumps(row(t, self._id)) + "\n")

    def _pull(self) -> None:
        while (batch := self.reader.next_batch()) is not None:
            self.released += [item[0] for item in batch.items]
            self.refused += [reject.reason for reject in batch.rejects]


TRANSCRIPTS: dict[str, tuple[str, Time, list[Step]]] = {
    "one partition releases what lies before its newest event": (
        "a",
        Time(),
        [
            ("watermark", None),
            ("input", "a", 10), ("watermark", 10), ("expect", []),
            ("input", "a", 12, 11), ("watermark", 12), ("expect", [10]), ("rejects", ["too_late"]),
            ("input", "a", 12, 13), ("expect", [12, 12]), ("watermark", 13),
        ],
    ),
    "the allowed lateness holds events back": (
        "a",
        Time(lateness=5),
        [
            ("input", "a", 10, 7), ("watermark", 5), ("expect", []),
            ("input", "a", 13), ("watermark", 8), ("expect", [7]),
            ("input", "a", 8), ("watermark", 8), ("expect", []), ("rejects", []),
            ("input", "a", 7), ("rejects", ["too_late"]),
            ("input", "a", 30), ("expect", [8, 10, 13]),
        ],
    ),
    "the slowest of two partitions decides": (
        "ab",
        Time(idle=60),
        [
            ("input", "a", 10, 20), ("watermark", None), ("expect", []),
            ("input", "b", 5), ("watermark", 5), ("expect", []),
            ("input", "b", 15), ("watermark", 15), ("expect", [5, 10]),
            ("input", "a", 16), ("rejects", []), ("watermark", 15), ("expect", []),
            ("input", "b", 40), ("watermark", 20), ("expect", [15, 16]),
        ],
    ),
    "a partition idle for long no longer holds the others back until it speaks again": (
        "ab",
        Time(idle=0.05, lateness=2),
        [
            ("input", "b", 1), ("input", "a", 10), ("watermark", -1),
            ("sleep", 0.1), ("input", "a", 20), ("watermark", 18), ("expect", [1, 10]),
            ("input", "b", 17, 18), ("rejects", ["too_late"]), ("watermark", 18),
            ("input", "a", 30), ("watermark", 18), ("expect", []),
            ("input", "b", 31), ("watermark", 28), ("expect", [18, 20]),
        ],
    ),
    "in arrival order nothing waits and the newest of all decides what is too late": (
        "ab",
        Time(order="arrival", lateness=5),
        [
            ("input", "a", 10), ("expect", [10]), ("watermark", 5),
            ("input", "b", 5), ("expect", [5]), ("rejects", []),
            ("input", "b", 4), ("expect", []), ("rejects", ["too_late"]),
            ("input", "a", 20), ("expect", [20]), ("watermark", 15),
            ("input", "b", 14, 15), ("expect", [15]), ("rejects", ["too_late"]),
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TRANSCRIPTS)
def test_watermarks_follow_their_transcripts(name: str, tmp_path: Path) -> None:
    """After each input the watermark, the released events and the rejects are those written down."""
    partitions, time, steps = TRANSCRIPTS[name]
    play = Play(tmp_path, partitions, time)
    try:
        play.carry_out(steps)
    finally:
        play.reader.close()


def test_a_label_behind_the_watermark_goes_at_once_and_is_counted(tmp_path: Path) -> None:
    """Labels are of use until their question expires, so they are never too late for the reader."""
    play = Play(tmp_path, "el", Time(idle=60), kinds={"l": LABEL})
    play.carry_out([("input", "e", 10), ("input", "l", 20), ("input", "e", 20), ("expect", [10])])
    play.carry_out([("input", "l", 3), ("expect", [3]), ("rejects", []), ("watermark", 20)])
    assert play.reader.counts["late_labels"] == 1
    play.reader.close()


def test_an_idle_partition_is_written_to_the_order_log(tmp_path: Path) -> None:
    """The wall clock judges once; the log keeps the judgement, and a replay needs no clock for the same batches."""
    for name in "ab":
        (tmp_path / name).touch()
    inputs: list[Input] = [(EVENT, Jsonl(tmp_path / name, Ping)) for name in "ab"]
    time = Time(idle=0.03)
    (tmp_path / "a").write_text(json.dumps(row(1)) + "\n" + json.dumps(row(2, 1)) + "\n")
    reader = Reader(inputs, time, linger=0, mode=ReadMode(follow=True), log=OrderLog(tmp_path / "log"))
    first = reader.next_batch()
    wall.sleep(0.05)
    live = [b for b in (first, reader.next_batch()) if b]
    reader.close()
    assert keys(live) == [(1, EVENT, 0)]
    assert ["b", 0] in json.loads((tmp_path / "log").read_text().splitlines()[0])[1]
    again = Reader(inputs, Time(idle=3600.0), linger=0, mode=ReadMode(follow=True), log=OrderLog(tmp_path / "log"))
    assert shape([b for b in [again.next_batch()] if b]) == shape(live)
    again.close()


# -- bounds


def test_times_out_of_range_and_jumps_are_rejected_and_move_no_watermark() -> None:
    """A single wrong clock does not make all other events late."""
    time = Time(max_jump=100, earliest=10, latest=10_000)
    reader = Reader([memory("e", [row(t, i) for i, t in enumerate((9, 10, 110, 211, 10_000, 2**70, 111, 211))])], time)
    taken = batches(reader)
    assert [key[0] for key in keys(taken)] == [10, 110, 111, 211]
    assert [(r.reason, r.place) for b in taken for r in b.rejects] == [
        ("time_out_of_range", "e:1"),
        ("time_jump", "e:4"),
        ("time_out_of_range", "e:5"),
        ("time_out_of_range", "e:6"),
    ]
    assert reader.counts["rejected_by_reader"] == 4


def test_ids_beyond_64_bits_are_rejected() -> None:
    """Other systems could not hold them; the largest of 64 bits are fine."""
    ids = [2**63, 2**63 - 1, -(2**63), -(2**63) - 1]
    taken = read([memory("e", [row(1, id) for id in ids])])
    assert [key[2] for key in keys(taken)] == [-(2**63), 2**63 - 1]
    assert {r.place for b in taken for r in b.rejects} == {"e:1", "e:4"}


@given(st.lists(st.integers(0, 100), max_size=40), st.integers(1, 8))
def test_a_full_buffer_releases_the_oldest_and_counts_it(times: list[int], bound: int) -> None:
    """Never more than the bound is held; each early release is counted; nothing is lost without a reject."""
    reader = Reader([memory("e", [row(t, i) for i, t in enumerate(times)])], Time(lateness=1000, buffer=bound))
    taken = batches(reader)
    out = keys(taken)
    late = [r.reason for b in taken for r in b.rejects]
    assert set(late) <= {"too_late"}
    assert len(out) + len(late) == len(times)
    assert out == sorted(out, key=lambda key: key[0])
    assert reader.counts["released_by_full_buffer"] == max(0, len(out) - bound)


def test_a_batch_lingers_no_longer_than_declared(tmp_path: Path) -> None:
    """A batch that is not full leaves after the linger time, not before."""
    file = tmp_path / "a"
    file.write_text(json.dumps(row(1)) + "\n")
    reader = Reader([(EVENT, Jsonl(file, Ping))], Time(order="arrival"), linger=0.1, mode=ReadMode(follow=True))
    started = wall.monotonic()
    assert reader.next_batch() is None
    while (batch := reader.next_batch()) is None:
        assert wall.monotonic() - started < 10
    assert wall.monotonic() - started >= 0.1
    assert (len(batch.items), batch.end) == (1, False)
    reader.close()


def test_an_empty_input_ends_in_one_empty_batch() -> None:
    """The end of input is told downstream even when there was nothing."""
    (only,) = read([memory("e", [])])
    assert (only.number, only.items, only.rejects, only.watermark, only.end) == (1, [], [], None, True)


# -- rows and the order log

CASES = st.fixed_dictionaries(
    {
        "a": st.lists(st.tuples(st.integers(0, 30), st.integers(0, 99)), max_size=25),
        "b": st.lists(st.tuples(st.integers(0, 30), st.integers(0, 99)), max_size=25),
        "labels": st.lists(st.tuples(st.integers(0, 30), st.integers(0, 99)), max_size=10),
        "order": st.sampled_from(["event_time", "arrival"]),
        "lateness": st.sampled_from([0, 3, 100]),
        "buffer": st.sampled_from([2, 1000]),
        "batch_size": st.integers(1, 9),
    }
)


class Files:
    """The partitions of a case on disk; closes the readers that it opened."""

    def __init__(self, directory: Path, case: dict[str, Any]) -> None:
        self.directory = directory
        self._opened: list[Reader] = []
        self.log = directory / "log"
        self.log.unlink(missing_ok=True)
        self.time = Time(order=case["order"], lateness=case["lateness"], buffer=case["buffer"])
        self.batch_size = case["batch_size"]
        for name in ("a", "b", "labels"):
            lines = ["damaged" if id == 13 else json.dumps(row(t, id)) for t, id in case[name]]
            (directory / name).write_text("".join(line + "\n" for line in lines))

    def reader(self, rows: MemoryRows | None = None, log: bool = True, batch_size: int | None = None) -> Reader:
        inputs: list[Input] = [(EVENT, Jsonl(self.directory / name, Ping)) for name in "ab"]
        inputs.append((LABEL, Jsonl(self.directory / "labels", Ping)))
        order_log = OrderLog(self.log) if log else None
        reader = Reader(inputs, self.time, batch_size or self.batch_size, log=order_log, rows=rows)
        self._opened.append(reader)
        return reader

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *_: object) -> None:
        for reader in self._opened:
            reader.close()


def some(reader: Reader, count: int) -> list[Batch]:
    """The next `count` batches, fewer if the inputs end before."""
    taken: list[Batch] = []
    while len(taken) < count and not reader.finished:
        batch = reader.next_batch()
        if batch is not None:
            taken.append(batch)
    return taken


HELD_BACK = {
    "a": [(t, t) for t in range(10)], "b": [], "labels": [], "order": "event_time",
    "lateness": 100, "buffer": 1000, "batch_size": 4,
}  # fmt: skip


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=CASES, cut=st.integers(0, 20))
def test_rows_continue_identically(tmp_path: Path, case: dict[str, Any], cut: int) -> None:
    """Kept after any batch, its rows give the same items and rejects to the end as reading on."""
    with Files(tmp_path, case) as files:
        rows = MemoryRows()
        reader = files.reader(rows, log=False)
        some(reader, cut)
        rows.apply(reader.changes())
        rest = batches(reader)
        resumed = files.reader(rows, log=False)
        again = batches(resumed)
        assert items(again) == items(rest)
        assert [b.end for b in again].count(True) == [b.end for b in rest].count(True)
        assert (resumed.counts, resumed.newest, resumed.watermark) == (reader.counts, reader.newest, reader.watermark)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=CASES, checkpoint=st.integers(0, 20), ahead=st.integers(0, 20))
@example(case=HELD_BACK, checkpoint=0, ahead=1)
def test_a_replay_of_the_order_log_forms_the_same_batches(
    tmp_path: Path, case: dict[str, Any], checkpoint: int, ahead: int
) -> None:
    """What left after the checkpoint is formed again exactly, under another batch size too, and then it goes on."""
    with Files(tmp_path, case) as files:
        rows = MemoryRows()
        reader = files.reader(rows)
        some(reader, checkpoint)
        rows.apply(reader.changes())
        lost = some(reader, ahead)
        reader.close()
        resumed = files.reader(rows, batch_size=case["batch_size"] + 1)
        again = some(resumed, len(lost))
        assert shape(again) == shape(lost)
        assert not resumed.replaying
        straight = files.reader(log=False)
        some(straight, checkpoint)
        assert keys([*again, *batches(resumed)]) == keys(batches(straight))


@pytest.fixture
def logged(tmp_path: Path) -> Iterator[Files]:
    """A run of six events in batches of two, with its log."""
    case = HELD_BACK | {"a": [(t, t) for t in range(6)], "lateness": 0, "batch_size": 2}
    with Files(tmp_path, case) as files:
        batches(files.reader())
        yield files


TORN = [b"[", b'[4,[["a",1]],2', b"\xff\x00", b'{"number": 4']


@pytest.mark.parametrize("torn", TORN)
def test_a_torn_tail_of_the_log_is_cut(torn: bytes, logged: Files) -> None:
    """A line that was not written to its end never left the reader, so nothing is lost with it."""
    whole = logged.log.read_bytes()
    logged.log.write_bytes(whole + torn)
    expected = keys(batches(logged.reader(log=False)))
    assert keys(batches(logged.reader())) == expected
    assert logged.log.read_bytes() == whole


@pytest.mark.parametrize("damage", [b"", b"{}", b"null", b"[1,2", b"[2,[],[],null,0]", b"\xff"])
def test_a_damaged_entry_in_the_middle_of_the_log_is_refused(damage: bytes, logged: Files) -> None:
    """Only a tail can be torn; anything else is said with file and line."""
    first, _, *rest = logged.log.read_bytes().splitlines()
    logged.log.write_bytes(b"\n".join([first, damage, *rest]) + b"\n")
    log = OrderLog(logged.log)
    try:
        with pytest.raises(OrderLogError, match=r"log:2: damaged"):
            list(log.after(0))
    finally:
        log.close()


def test_a_missing_entry_of_the_log_is_refused(logged: Files) -> None:
    """A gap in the numbers means that the log is not the one of the checkpoint."""
    first, _, *rest = logged.log.read_bytes().splitlines()
    logged.log.write_bytes(b"\n".join([first, *rest]) + b"\n")
    reader = logged.reader()
    reader.next_batch()
    with pytest.raises(OrderLogError, match=r"from batch 1 to 3.*missing"):
        reader.next_batch()


def test_an_input_that_was_cut_since_is_refused(logged: Files) -> None:
    """A replay that no longer finds its records says which input and what to do."""
    file = logged.directory / "a"
    file.write_text(file.read_text().splitlines()[0] + "\n")
    with pytest.raises(OrderLogError, match=r"a: batch 1 had \d+ more records.*Hint.*--fresh"):
        batches(logged.reader())


def test_an_input_that_was_replaced_since_is_refused(logged: Files) -> None:
    """Records that are damaged now and were not then cannot give the same batches."""
    (logged.directory / "a").write_text("damaged\n" * 6)
    with pytest.raises(OrderLogError, match=r"batch 1 had 2 items.*changed since.*Hint"):
        batches(logged.reader())


def test_a_partition_that_is_gone_is_refused(logged: Files) -> None:
    """Both a checkpoint and a log entry name the partition that they miss."""
    inputs: list[Input] = [(EVENT, Jsonl(logged.directory / "a", Ping)), (LABEL, Jsonl(logged.directory / "b", Ping))]
    reader = Reader(inputs, logged.time, log=OrderLog(logged.log))
    with closing(reader), pytest.raises(OrderLogError, match=r"partition 'labels' of batch 1 is gone.*Hint"):
        batches(reader)
    rows = MemoryRows()
    with closing(logged.reader(rows, log=False)) as first:
        first.next_batch()
        rows.apply(first.changes())
    with pytest.raises(OrderLogError, match=r"gone: a, labels.*Hint"):
        Reader([memory("b", [])], logged.time, rows=rows)


def test_entries_are_small_and_read_back(tmp_path: Path) -> None:
    """An entry takes some tens of bytes and is what was appended."""
    log = OrderLog(tmp_path / "log")
    entries = [LogEntry(n, [("events.jsonl", 1000), ("labels.jsonl", -1)], 1000, 10**15, n == 3) for n in (1, 2, 3)]
    for entry in entries:
        log.append(entry)
    assert list(log.after(1)) == entries[1:]
    assert (tmp_path / "log").stat().st_size < 3 * 90
    log.close()


def test_a_file_that_grows_after_its_end_is_read_on(tmp_path: Path) -> None:
    """The end of input was logged; the next run begins after it with what came since."""
    file = tmp_path / "a"
    file.write_text(json.dumps(row(1)) + "\n")
    inputs: list[Input] = [(EVENT, Jsonl(file, Ping))]
    rows = MemoryRows()
    reader = Reader(inputs, Time(), log=OrderLog(tmp_path / "log"), rows=rows)
    assert [b.end for b in batches(reader)] == [True]
    rows.apply(reader.changes())
    assert batches(Reader(inputs, Time(), log=OrderLog(tmp_path / "log"), rows=rows)) == []
    with file.open("a") as more:
        more.write(json.dumps(row(2, 2)) + "\n")
    (last,) = batches(Reader(inputs, Time(), log=OrderLog(tmp_path / "log"), rows=rows))
    assert (last.number, keys([last]), last.end) == (2, [(2, EVENT, 2)], True)


@pytest.mark.parametrize("wrong", [{"lateness": "soon"}, {"order": "random"}, {"buffer": 0}, {"idle": 0}, {"late": 1}])
def test_wrong_declarations_of_time_are_refused_with_the_value(wrong: dict[str, Any]) -> None:
    """The message names the field and the value."""
    with pytest.raises(ValueError, match=next(iter(wrong))) as caught:
        Time(**wrong)
    assert str(next(iter(wrong.values()))) in str(caught.value)
