"""Files as inputs and outputs: JSON lines, CSV, either gzipped, a directory as partitions; standard input and output.

A record's offset is its line number, so that a reject names `payments.jsonl:17`. Positions count bytes of the
uncompressed stream, so that a resume of a plain file seeks and one of a gzipped file reads up to there.
"""

from __future__ import annotations

import gzip
import os
import select
import shutil
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from zlib import crc32

import msgspec
from pydantic import BaseModel

from dataflows.events import Event, Raw, Reject, Undecodable, csv_fields, csv_row
from dataflows.job import JobError, Output, Sink, SinkWriter
from dataflows.order import InputError, Partition, Source
from dataflows.orderlog import OrderLogError

MAX_RECORD_BYTES = 1 << 20
"""A longer record is rejected as `too_long`; of its bytes this many are kept."""

_READ_BYTES = 1 << 18
_HEAD_BYTES = 1 << 12
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_REJECTS: msgspec.json.Decoder[Reject] = msgspec.json.Decoder(Reject)


class Position(NamedTuple):
    """Where a line file is read next: bytes and lines already taken; and how the file began, to know it again."""

    byte: int = 0
    line: int = 0
    head_size: int = 0
    head_crc: int = 0


class _Broken(bytes):
    """Stands, as the last record, for what a damaged compressed file no longer gives."""


class LineFile(Source):
    """What JSON lines and CSV files have in common."""

    path: Path
    event: type[Event] = Event

    def _files(self) -> list[Path]:
        if self.path.is_dir():
            files = sorted(p for p in self.path.iterdir() if p.is_file() and not p.name.startswith("."))
            if not files:
                raise FileNotFoundError(f"{self.path}: the directory holds no files to read")
            return files
        if not self.path.exists():
            raise FileNotFoundError(f"{self.path}: no such file. Hint: paths are relative to {Path.cwd()}")
        return [self.path]

    def names(self) -> list[str]:
        return [file.name for file in self._files()]

    def _find(self, name: str) -> Path:
        return next(file for file in self._files() if file.name == name)

    def header(self, name: str) -> bytes:
        """The line that one of its files needs before all others."""
        return b""

    def at(self, path: str | Path) -> Any:
        """The same declaration for another path."""
        return self.model_copy(update={"path": Path(path)})


class Jsonl(LineFile, Sink):
    """JSON lines, plain or gzipped (by the ending .gz); a directory is one partition per file. Also an output.

    >>> Jsonl("scores.jsonl").path.name
    'scores.jsonl'
    """

    def __init__(self, path: str | Path, event: type[Event] = Event) -> None:
        BaseModel.__init__(self, path=Path(path), event=event)

    def open(self, name: str, position: Any | None, follow: bool) -> Partition:
        return _JsonPartition(name, self.event, _open(self._find(name)), position or Position(), follow)

    def writer(self, output: Output, position: Any | None) -> SinkWriter:
        return FileWriter(self.path, position)

    def where(self) -> str:
        return str(self.path)

    def rejects(self, job: str) -> Iterator[tuple[int, Reject]]:
        if not self.path.exists():
            raise JobError(f"{self.path} is not there: the job has not run yet. Hint: --directory says where runs lie")
        # As of now: what is sent again may be rejected again, and would be read here for ever.
        left = self.path.stat().st_size
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                left -= len(line)
                if left < 0 or not line.endswith(b"\n"):
                    return  # a run is writing it
                try:
                    yield number, _REJECTS.decode(line)
                except (msgspec.DecodeError, UnicodeDecodeError):
                    raise JobError(f"{self.path}:{number} is no reject. Hint: the file was changed by hand?") from None

    def keep_aside(self, target: Path) -> None:
        if self.path.exists():
            shutil.copy2(self.path, target)

    def put_back(self, source: Path) -> None:
        temporary = self.path.with_name(self.path.name + ".tmp")
        shutil.copy2(source, temporary)
        temporary.replace(self.path)

    def size(self) -> int | None:
        return self.path.stat().st_size if self.path.exists() else 0


class Csv(LineFile):
    """CSV files with a header line; otherwise as `Jsonl`. An input only.

    Quoting is that of RFC 4180, but a record is one line: a stray quote then spoils its own line, not those after it.
    """

    def __init__(self, path: str | Path, event: type[Event] = Event) -> None:
        BaseModel.__init__(self, path=Path(path), event=event)

    def header(self, name: str) -> bytes:
        with _open(self._find(name)) as file:
            return file.readline(MAX_RECORD_BYTES).rstrip(b"\r\n").removeprefix(_BYTE_ORDER_MARK)

    def open(self, name: str, position: Any | None, follow: bool) -> Partition:
        return _CsvPartition(name, self.event, self._find(name), position or Position(), follow)


class Stdin(Source):
    """JSON lines from standard input. Cannot be read again, so a run from it cannot resume."""

    def __init__(self, event: type[Event]) -> None:
        BaseModel.__init__(self, event=event)

    def names(self) -> list[str]:
        return ["stdin"]

    def open(self, name: str, position: Any | None, follow: bool) -> Partition:
        return _JsonPartition(name, self.event, _Pipe(sys.stdin.fileno()), Position(), False)


class Stdout(Sink):
    """Records as JSON lines to standard output."""

    def writer(self, output: Output, position: Any | None) -> SinkWriter:
        return _StdoutWriter()


# -- reading


def _open(path: Path) -> BinaryIO:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


class _Pipe:
    """A file descriptor read without ever blocking; `read` gives None when there is nothing now."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def read(self, size: int) -> bytes | None:
        ready, _, _ = select.select([self._descriptor], [], [], 0)
        return os.read(self._descriptor, size) if ready else None

    def close(self) -> None:
        return


class _LinePartition(Partition):
    """Cuts a byte stream into lines and remembers where it is."""

    def __init__(self, name: str, event: type[Event], stream: Any, position: Position, follow: bool) -> None:
        self.name = name
        self._event = event
        self._stream = stream
        self._follow = follow
        self._start = position  # of the first of _lines
        self._head = b""  # how the file begins
        if position.byte:
            self._head = self._recognise(position)
        self._lines: list[bytes] = []  # read and cut; those before _next were pulled
        self._next = 0
        self._tail = b""
        self._skipped: dict[int, int] = {}  # by line number: bytes of an overlong line that were read and not kept
        self._exhausted = False

    def pull(self, limit: int) -> list[tuple[int, Raw]]:
        if self._next == len(self._lines) and not self._exhausted:
            self._read_more()
        lines = self._lines[self._next : self._next + limit]
        first = self._start.line + self._next + 1
        self._next += len(lines)
        self.done = self._exhausted and self._next == len(self._lines)
        return list(zip(range(first, first + len(lines)), lines, strict=True))

    def position(self, back: int = 0) -> Position:
        taken = self._lines[: self._next - back]
        line = self._start.line + len(taken)
        skipped = sum(size for number, size in self._skipped.items() if self._start.line < number <= line)
        byte = self._start.byte + sum(map(len, taken)) + len(taken) + skipped
        head = self._head[:byte]
        return Position(byte, line, len(head), crc32(head))

    def _recognise(self, position: Position) -> bytes:
        """Go on at a position, if this is still the file that was read up to there; how it begins."""
        head: bytes = self._stream.read(_HEAD_BYTES)
        self._stream.seek(position.byte - 1)
        before = self._stream.read(1)
        if len(before) < 1 or crc32(head[: position.head_size]) != position.head_crc:
            self._stream.close()
            raise OrderLogError(
                f"{self.name}: {position.byte} bytes of it were read before, but it was cut or replaced since. "
                "Hint: restore it, or start with --fresh"
            )
        return head

    def close(self) -> None:
        self._stream.close()

    def _read_more(self) -> None:
        try:
            chunk = self._stream.read(_READ_BYTES)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            self._end_broken(error)
            return
        if not self._head and chunk and not self._start.byte:
            self._head = chunk[:_HEAD_BYTES]
        if chunk is None:
            return
        self._start = self.position()
        self._skipped = {number: size for number, size in self._skipped.items() if number > self._start.line}
        self._next = 0
        if chunk:
            *self._lines, self._tail = (self._tail + chunk).split(b"\n")
            if self._lines:
                self._lines[0] = self._shortened(self._lines[0], self._start.line + 1)
            self._tail = self._shortened(self._tail, self._start.line + len(self._lines) + 1)
        else:
            self._lines = []
            self._at_end()

    def _shortened(self, line: bytes, number: int) -> bytes:
        """An overlong line is kept in part: enough to be recognised and to be looked at, its bytes still counted.

        Only the first line of what was read, joined with what was left before, and the rest at the end can be so.
        """
        if len(line) <= MAX_RECORD_BYTES + 1:
            return line
        self._skipped[number] = self._skipped.get(number, 0) + len(line) - MAX_RECORD_BYTES - 1
        return line[: MAX_RECORD_BYTES + 1]

    def _end_broken(self, error: Exception) -> None:
        """A compressed file that breaks off: what came before is good, the rest is one reject."""
        self._start = self.position()
        self._next = 0
        self._lines = [_Broken(f"{type(error).__name__}: {error}".encode())]
        self._exhausted = True

    def _at_end(self) -> None:
        if self._follow:
            return
        self._exhausted = True
        if self._tail:
            self._lines = [self._tail]
            number = self._start.line + 1
            self._skipped[number] = self._skipped.get(number, 0) - 1  # it has no line break
            self._tail = b""


class _JsonPartition(_LinePartition):
    def decode(self, raw: Raw) -> Event:
        if len(raw) > MAX_RECORD_BYTES:  # type: ignore[arg-type]
            raise Undecodable("too_long", f"longer than {MAX_RECORD_BYTES} bytes")
        try:
            return self._event.decode(raw)  # type: ignore[arg-type]
        except Undecodable:
            if isinstance(raw, _Broken):
                raise Undecodable("broken_file", raw.decode()) from None
            if raw[:3] == _BYTE_ORDER_MARK:  # type: ignore[index]
                return self._event.decode(raw[3:])  # type: ignore[index, arg-type]
            raise


class _CsvPartition(_LinePartition):
    def __init__(self, name: str, event: type[Event], path: Path, position: Position, follow: bool) -> None:
        with _open(path) as file:
            first = file.readline(MAX_RECORD_BYTES)
        try:
            self._header = csv_fields(first.rstrip(b"\r\n").removeprefix(_BYTE_ORDER_MARK))
        except Undecodable as wrong:
            raise InputError(f"{path}:1: the header cannot be read: {wrong}") from None
        missing = [n for n, f in event.model_fields.items() if f.is_required() and (f.alias or n) not in self._header]
        if missing:
            raise InputError(
                f"{path}:1: the header ({', '.join(self._header)}) lacks {', '.join(missing)} of {event.__name__}"
            )
        start = position if position.byte else Position(len(first), 1)
        super().__init__(name, event, _open(path), start, follow)

    def decode(self, raw: Raw) -> Event:
        if len(raw) > MAX_RECORD_BYTES:  # type: ignore[arg-type]
            raise Undecodable("too_long", f"longer than {MAX_RECORD_BYTES} bytes")
        if isinstance(raw, _Broken):
            raise Undecodable("broken_file", raw.decode())
        line = raw.removesuffix(b"\r")  # type: ignore[union-attr]
        return self._event.from_row(csv_row(self._header, line, self._event.text_fields))


# -- writing


class FileWriter(SinkWriter):
    """Appends to a file; a resume cuts it back to the checkpoint, so every record is there once."""

    def __init__(self, path: Path, position: int | None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("r+b" if path.exists() else "w+b")
        size = self._file.seek(0, os.SEEK_END)
        if position is not None and size < position:
            self._file.close()
            raise RuntimeError(
                f"{path} has {size} bytes, but the checkpoint wrote {position}. "
                "Hint: it was cut or replaced since; restore it, or start with --fresh"
            )
        self._file.truncate(position or 0)
        self._file.seek(0, os.SEEK_END)

    def write(self, chunk: bytes) -> None:
        self._file.write(chunk)

    def position(self) -> int:
        """Flush to the disk, so that the checkpoint never promises bytes that a power loss takes."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class _StdoutWriter(SinkWriter):
    def write(self, chunk: bytes) -> None:
        sys.stdout.buffer.write(chunk)

    def flush(self) -> None:
        sys.stdout.buffer.flush()

    def position(self) -> int:
        self.flush()
        return 0

    def close(self) -> None:
        self.flush()
