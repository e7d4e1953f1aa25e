"""Files as inputs and outputs: lines, CSV, gzip, directories, positions, standard input."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dataflows.connectors import Csv, Jsonl
from dataflows.connectors.files import MAX_RECORD_BYTES, FileWriter
from dataflows.events import Event, Undecodable
from dataflows.order import EVENT, Batch, InputError, Partition, Reader, Time
from tests.scenarios import running


class Ping(Event, id="id", time="t", unit="us"):
    id: int
    t: int
    note: str = "-"
    level: float | None = None


def line(id: int, **more: Any) -> bytes:
    """An event as JSON."""
    return json.dumps({"id": id, "t": id} | more).encode()


def drain(part: Partition, limit: int = 100) -> list[tuple[int, Any]]:
    """All records of a partition."""
    records: list[tuple[int, Any]] = []
    while not part.done:
        records += part.pull(limit)
    return records


def records_of(source: Any, position: Any = None) -> list[tuple[int, Any]]:
    """All records of a source with one partition, from a position."""
    (name,) = source.names()
    with closing(source.open(name, position, False)) as part:
        return drain(part)


def read(source: Any) -> tuple[list[Any], list[tuple[str, str]]]:
    """Ids and (reason, place) of the rejects of a whole source."""
    reader = Reader([(EVENT, source)], Time())
    batches: list[Batch] = []
    while not reader.finished:
        batch = reader.next_batch()
        if batch is not None:
            batches.append(batch)
    reader.close()
    return [i[2] for b in batches for i in b.items], [(r.reason, r.place) for b in batches for r in b.rejects]


def write_plain(path: Path, content: bytes) -> Path:
    """Write as it is."""
    path.write_bytes(content)
    return path


def write_gzip(path: Path, content: bytes) -> Path:
    """Write gzipped, with the ending for it."""
    path = path.with_name(path.name + ".gz")
    path.write_bytes(gzip.compress(content))
    return path


WRITERS = pytest.mark.parametrize("write", [write_plain, write_gzip])
Writer = Callable[[Path, bytes], Path]


@WRITERS
@pytest.mark.parametrize("ending", [b"\n", b"\r\n"])
@pytest.mark.parametrize("last", [True, False])
def test_lines_end_in_any_way(write: Writer, ending: bytes, last: bool, tmp_path: Path) -> None:
    """Unix and Windows endings, with and without one after the last line, plain and gzipped."""
    content = ending.join([line(1), line(2), line(3)]) + (ending if last else b"")
    file = write(tmp_path / "a.jsonl", content)
    assert read(Jsonl(file, Ping)) == ([1, 2, 3], [])
    rows = ending.join([b"id,t", b"1,1", b"2,2", b"3,3"]) + (ending if last else b"")
    file = write(tmp_path / "a.csv", rows)
    assert read(Csv(file, Ping)) == ([1, 2, 3], [])


@WRITERS
def test_an_empty_file_holds_nothing(write: Writer, tmp_path: Path) -> None:
    """No line, no record, no reject; a CSV file with a header alone likewise."""
    assert read(Jsonl(write(tmp_path / "a.jsonl", b""), Ping)) == ([], [])
    assert read(Csv(write(tmp_path / "a.csv", b"id,t\n"), Ping)) == ([], [])
    assert read(Csv(write(tmp_path / "b.csv", b"id,t"), Ping)) == ([], [])


def test_empty_lines_are_rejects_with_their_number(tmp_path: Path) -> None:
    """Nothing is skipped in silence."""
    file = write_plain(tmp_path / "a.jsonl", b"\n" + line(1) + b"\n\n\r\n")
    assert read(Jsonl(file, Ping)) == ([1], [("empty", f"a.jsonl:{n}") for n in (1, 3, 4)])


def test_a_byte_order_mark_is_no_part_of_the_first_record(tmp_path: Path) -> None:
    """Files from Windows begin with one; the first event and the first column are read all the same."""
    assert read(Csv(write_plain(tmp_path / "a.csv", b"\xef\xbb\xbfid,t\n1,1\n"), Ping)) == ([1], [])
    assert read(Jsonl(write_plain(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + line(1) + b"\n"), Ping)) == ([1], [])


@pytest.mark.parametrize("size", [MAX_RECORD_BYTES + 1, 3 * MAX_RECORD_BYTES + 12_345])
@pytest.mark.parametrize("last", [True, False])
def test_overlong_lines_are_rejects_and_those_after_them_are_read(size: int, last: bool, tmp_path: Path) -> None:
    """What is kept of such a line is its beginning; the memory for it is bounded."""
    pattern = b"".join(b"%07d," % n for n in range(size // 8 + 1))[:size]
    content = line(1) + b"\n" + pattern + (b"" if last else b"\n" + line(3) + b"\n")
    source = Jsonl(write_plain(tmp_path / "a.jsonl", content), Ping)
    assert read(source) == ([1] if last else [1, 3], [("too_long", "a.jsonl:2")])
    kept = records_of(source)[1][1]
    assert MAX_RECORD_BYTES < len(kept) <= MAX_RECORD_BYTES + (1 << 18) + 1
    assert pattern.startswith(kept), "the beginning, without holes"


def test_a_line_of_just_the_allowed_length_is_read(tmp_path: Path) -> None:
    """The limit itself is not beyond it."""
    long = line(1, note="")
    long = line(1, note="x" * (MAX_RECORD_BYTES - len(long)))
    assert len(long) == MAX_RECORD_BYTES
    assert read(Jsonl(write_plain(tmp_path / "a.jsonl", long + b"\n" + line(2)), Ping)) == ([1, 2], [])


def test_a_directory_is_one_partition_per_file(tmp_path: Path) -> None:
    """Sorted by name, hidden files left out, gzipped and plain side by side; places name the file."""
    write_plain(tmp_path / "b.jsonl", line(2) + b"\nx\n")
    write_gzip(tmp_path / "a.jsonl", line(1) + b"\n" + line(3))
    write_plain(tmp_path / ".hidden", b"x")
    (tmp_path / "more").mkdir()
    source = Jsonl(tmp_path, Ping)
    assert source.names() == ["a.jsonl.gz", "b.jsonl"]
    assert read(source) == ([1, 2, 3], [("not_json", "b.jsonl:2")])


def test_files_that_are_not_there_are_told(tmp_path: Path) -> None:
    """With the path and a hint; an empty directory too."""
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl.*Hint"):
        Jsonl(tmp_path / "none.jsonl", Ping).names()
    with pytest.raises(FileNotFoundError, match="holds no files"):
        Jsonl(tmp_path, Ping).names()


def test_empty_cells_are_missing_except_in_text(tmp_path: Path) -> None:
    """An empty number is None where None is allowed and a reject elsewhere; an empty text is text."""
    file = write_plain(tmp_path / "a.csv", b"id,t,note,level\n1,1,,\n2,2,x,0\n,3,x,1\n4,,,\n")
    source = Csv(file, Ping)
    assert read(source) == ([1, 2], [("invalid", "a.csv:4"), ("invalid", "a.csv:5")])
    with closing(source.open("a.csv", None, False)) as part:
        events = [part.decode(raw) for _, raw in part.pull(2)]
    assert [(e.note, e.level) for e in events if isinstance(e, Ping)] == [("", None), ("x", 0.0)]


def test_cells_may_be_quoted(tmp_path: Path) -> None:
    """Commas and doubled quotes within quotes belong to the cell, in the header too."""
    file = write_plain(tmp_path / "a.csv", b'"id",t,"note"\n1,1,"a ""b"", c"\n')
    with closing(Csv(file, Ping).open("a.csv", None, False)) as part:
        ((number, raw),) = part.pull(9)
        event = part.decode(raw)
    assert isinstance(event, Ping)
    assert (number, event.note) == (2, 'a "b", c')


@pytest.mark.parametrize(
    ("header", "words"), [(b"", "lacks id, t of Ping"), (b"id\n", "lacks t of Ping"), (b"\xff\n", "cannot be read")]
)
def test_a_header_that_does_not_fit_is_refused(header: bytes, words: str, tmp_path: Path) -> None:
    """With the file, what it has and what is missing."""
    file = write_plain(tmp_path / "a.csv", header)
    with pytest.raises(InputError, match=f"a.csv:1: .*{words}"):
        Csv(file, Ping).open("a.csv", None, False)


def test_columns_in_any_order_and_more_than_needed(tmp_path: Path) -> None:
    """The header says which is which; what the event does not declare is ignored."""
    assert read(Csv(write_plain(tmp_path / "a.csv", b"more,t,id\nx,5,1\n"), Ping)) == ([1], [])


# -- positions

LINES = st.lists(st.binary(max_size=12).filter(lambda raw: b"\n" not in raw), max_size=12)


@WRITERS
@pytest.mark.parametrize("kind", [Jsonl, Csv])
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=LINES, taken=st.integers(0, 12), limit=st.integers(1, 5), last=st.booleans())
def test_reading_from_any_position_is_reading_on(
    kind: Any, write: Writer, tmp_path: Path, lines: list[bytes], taken: int, limit: int, last: bool
) -> None:
    """Whatever bytes the lines hold, a position continues with the same records and line numbers."""
    content = b"id,t\n" if kind is Csv else b""
    file = write(tmp_path / "a", content + b"\n".join(lines) + (b"\n" if last and lines else b""))
    source = kind(file, Ping)
    with closing(source.open(file.name, None, False)) as part:
        before: list[Any] = []
        while len(before) < taken and not part.done:
            before += part.pull(min(limit, taken - len(before)))
        position = part.position()
        after = drain(part, limit)
    assert records_of(source, position) == after
    assert [*before, *after] == records_of(source)
    start = 2 if kind is Csv else 1
    assert [number for number, _ in [*before, *after]] == list(range(start, start + len(before) + len(after)))


@pytest.mark.parametrize("taken", [0, 1, 2, 3])
def test_positions_count_what_was_cut_from_overlong_lines(taken: int, tmp_path: Path) -> None:
    """A resume after, before or between overlong lines reads the same."""
    long = b"x" * (2 * MAX_RECORD_BYTES + 77)
    source = Jsonl(write_plain(tmp_path / "a", b"\n".join([long, line(2), long, line(4)])), Ping)
    with closing(source.open("a", None, False)) as part:
        first: list[Any] = []
        while len(first) < taken:
            first += part.pull(1)
        position = part.position()
        rest = drain(part)
    assert records_of(source, position) == rest
    assert len(first) + len(rest) == 4


def test_a_file_that_grows_is_followed(tmp_path: Path) -> None:
    """With `follow` the end is not an end, and half a line waits for its other half."""
    file = tmp_path / "a"
    file.write_bytes(line(1) + b'\n{"id":')
    with closing(Jsonl(file, Ping).open("a", None, True)) as part:
        assert [n for n, _ in part.pull(9)] == [1]
        assert part.pull(9) == []
        assert not part.done
        with file.open("ab") as more:
            more.write(b'2,"t":2}\n' + line(3))
        assert part.pull(9) == [(2, b'{"id":2,"t":2}')]
        assert part.pull(9) == []
        assert not part.done


# -- writing


def test_a_writer_goes_on_where_the_checkpoint_was(tmp_path: Path) -> None:
    """What was written after the position is cut, so every record is there once."""
    path = tmp_path / "new" / "out.jsonl"
    with closing(FileWriter(path, None)) as writer:
        writer.write(b"one\n")
        position = writer.position()
        writer.write(b"two\n")
    with closing(FileWriter(path, position)) as writer:
        writer.write(b"2\n")
        assert writer.position() == 6
    assert path.read_bytes() == b"one\n2\n"


def test_a_writer_refuses_a_file_that_was_cut(tmp_path: Path) -> None:
    """Records that a checkpoint promises are gone: say so instead of going on with a hole."""
    path = write_plain(tmp_path / "out.jsonl", b"one\n")
    with pytest.raises(RuntimeError, match=r"out\.jsonl has 4 bytes.*wrote 9.*Hint"):
        FileWriter(path, 9)


# -- standard input

STDIN_JOB = """
from river import dummy, stats
from dataflows import Event, Job, Label, Stdin
from features import Fields

class Ping(Event, id="id", time="t", unit="us"):
    id: int
    t: int

job = Job(name="pipe", events=Stdin(Ping), features=[Fields("id")], model=dummy.StatisticRegressor(stats.Mean()),
          label=Label(field="t", delay=1))
"""


def test_standard_input_is_read_through_a_pipe_and_cannot_resume(tmp_path: Path) -> None:
    """Lines from a pipe are answered; a warning says that the run cannot be resumed, and a second run is refused."""
    job = tmp_path / "pipe_job.py"
    job.write_text(STDIN_JOB)
    command = f"{sys.executable} -m dataflows run {job} --directory {tmp_path / 'out'}"
    lines = "\\n".join(line(i).decode() for i in range(5))
    for attempt in range(2):
        result = subprocess.run(
            ["sh", "-c", f"printf '{lines}\\nbroken' | {command}"],
            env=running.environment(), capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        if attempt == 0:
            assert result.returncode == 0, result.stderr
            assert "cannot be resumed" in " ".join(result.stderr.split())
            assert [r["id"] for r in running.records(tmp_path / "out", "predictions")] == list(range(5))
            assert [r["place"] for r in running.records(tmp_path / "out", "rejects")] == ["stdin:6"]
        else:
            assert (result.returncode, "Hint: --fresh" in " ".join(result.stderr.split())) == (1, True)


def test_a_record_is_refused_by_its_partition_not_the_reader() -> None:
    """Decoding says why in the words of `Undecodable`."""
    with pytest.raises(Undecodable):
        Ping.decode(b"x")
