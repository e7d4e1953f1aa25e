"""Learn logs on disk: rolled back, thinned, forgotten, searched; what is damaged or planted is refused."""

from __future__ import annotations

import os
import pickle
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from dataflows.job import Audit
from dataflows.learnlog import PROTOTYPE, Chunk, LearnLog
from dataflows.learnstore import LearnReader, LearnWriter, learn_file, roll_back
from dataflows.settings import RunDirectory
from dataflows.state import Lineage, StateError, Version

NOWHERE = frozenset[tuple[str, str]]()


def way(branch: int = 1, batch: int = 1 << 30, *forks: Version) -> Lineage:
    """The way to a version."""
    return Lineage(forks, Version(branch, batch))


def chunk(first: int, count: int = 3, id: Any = None, frame: int | None = None) -> Chunk:
    """Some questions, numbered from `first`, at as many seconds; a keyframe of so many examples at their end."""
    log = LearnLog(("a",), every=1)
    for seq in range(first, first + count):
        log.asked(seq, None, f"e{seq}" if id is None else id, seq * 1_000_000, (float(seq),), 0, False, 0.5)
    if frame is not None:
        log.keyframe(None, frame, {"learned": frame})
    return log.take()


def writer(path: Path, branch: int = 1, batch: int = 0, *forks: Version, **audit: Any) -> LearnWriter:
    """Writes a log with these settings."""
    return LearnWriter(path, way(branch, batch, *forks), 1, Audit(**audit), {"python": "3"})


def read_all(path: Path) -> None:
    """Read every chunk."""
    reader = LearnReader(path, way(), NOWHERE)
    try:
        for head in reader.heads:
            reader.entries(head.version)
    finally:
        reader.close()


def versions(path: Path, lineage: Lineage | None = None) -> list[str]:
    """The chunks that are seen."""
    reader = LearnReader(path, lineage or way(), NOWHERE)
    found = [str(Version.of(head.version)) for head in reader.heads]
    reader.close()
    return found


def test_what_was_never_committed_is_rolled_back(tmp_path: Path) -> None:
    """Chunks and keyframes of later batches go, in all files; those of branches left before stay."""
    run = RunDirectory(tmp_path)
    for group in (0, 1):
        log = writer(learn_file(run, group))
        for batch in (3, 5, 9):
            log.write(batch, chunk(batch * 10, frame=batch))
        log.close()
        log = writer(learn_file(run, group), 2, 5, Version(1, 5))
        for batch in (6, 8):
            log.write(batch, chunk(batch * 100, frame=batch))
        log.close()
    roll_back(run, Version(2, 6))
    for group in (0, 1):
        path = learn_file(run, group)
        assert versions(path) == ["1-3", "1-5", "1-9"]
        assert versions(path, way(2, 1 << 30, Version(1, 5))) == ["1-3", "1-5", "2-6"]
        reader = LearnReader(path, way(2, 1 << 30, Version(1, 5)), NOWHERE)
        assert [frame.examples for frame in reader.frames()] == [3, 5, 6]
        reader.close()


def test_old_keyframes_are_thinned(tmp_path: Path) -> None:
    """The newest stay, of older ones each tenth; another branch's are left alone."""
    log = writer(tmp_path / "log", every=1, frames=4)
    for batch in range(1, 31):
        log.write(batch, chunk(batch * 10, frame=batch))
    log.close()
    log = writer(tmp_path / "log", 2, 28, Version(1, 28), every=1, frames=4)
    for batch in range(29, 34):
        log.write(batch, chunk(batch * 10, frame=batch))
    log.close()
    reader = LearnReader(tmp_path / "log", way(), NOWHERE)
    assert [frame.examples for frame in reader.frames()] == [10, 20, 27, 28, 29, 30]
    reader.close()


def test_what_is_older_than_keep_is_forgotten_but_no_prototype(tmp_path: Path) -> None:
    """By event time; after a restart too, when nothing newer came yet."""
    log = writer(tmp_path / "log", keep="60s")
    noted = log.log(("a",))
    noted.prototype(pickle.dumps({"learned": 0}), 0)
    log.write(1, noted.take())
    for batch in range(2, 12):
        log.write(batch, chunk(batch * 10, frame=batch))
    log.close()
    reader = LearnReader(tmp_path / "log", way(), NOWHERE)
    assert [Version.of(head.version).batch for head in reader.heads] == [5, 6, 7, 8, 9, 10, 11]
    assert reader.frames()[0].key == PROTOTYPE
    reader.close()
    log = writer(tmp_path / "log", 1, 11, keep="60s")
    only = LearnLog(("a",), every=1)
    only.keyframe("k", 7, {"learned": 7})
    log.write(12, only.take())
    log.write(13, chunk(115))
    log.close()
    assert "1-12" in versions(tmp_path / "log"), "a chunk without questions is as new as what came before"


def test_a_chunk_is_found_by_any_id_in_it(tmp_path: Path) -> None:
    """The newest first; an int is no text; ids of any text."""
    log = writer(tmp_path / "log")
    for batch, id in enumerate((None, 7, "7", chr(0xD800), 7), 1):
        log.write(batch, chunk(batch * 10, id=id))
    log.write(9, LearnLog(("a",), 1).take())
    log.close()
    reader = LearnReader(tmp_path / "log", way(), NOWHERE)
    batches = {id: [Version.of(v).batch for v in reader.holding(id)] for id in ("e11", 7, "7", chr(0xD800), "e99")}
    assert batches == {"e11": [1], 7: [5, 2], "7": [3], chr(0xD800): [4], "e99": []}
    reader.close()


def test_readers_see_the_log_as_it_was_when_they_opened_it(tmp_path: Path) -> None:
    """While the run goes on."""
    log = writer(tmp_path / "log")
    log.write(1, chunk(10))
    reader = LearnReader(tmp_path / "log", way(), NOWHERE)
    log.write(2, chunk(20, frame=9))
    assert [len(reader.heads), len(reader.frames()), len(list(reader.holding("e20")))] == [1, 0, 0]
    reader.close()
    log.close()
    assert versions(tmp_path / "log") == ["1-1", "1-2"]


@pytest.mark.parametrize("column", ["ids", "entries", "outputs", "crc", "outputs_crc", "asked", "learned", "newest"])
def test_any_changed_column_is_told(tmp_path: Path, column: str) -> None:
    """File and batch are named."""
    log = writer(tmp_path / "log")
    log.write(4, chunk(10, frame=3))
    log.close()
    with closing(sqlite3.connect(tmp_path / "log")) as database, database:
        changed = "x'00000000'" if column in ("ids", "entries", "outputs") else f"{column} + 1"
        database.execute(f"UPDATE chunks SET {column} = {changed}")
    reader = LearnReader(tmp_path / "log", way(), NOWHERE)
    with pytest.raises(StateError, match=r"log: .* of batch 1-4, is not as it was written"):
        reader.outputs(reader.heads[0].version), reader.entries(reader.heads[0].version)
    reader.close()


def test_without_outputs_the_entries_are_still_checked(tmp_path: Path) -> None:
    """What was said may be taken out; what was asked and learned may not be changed."""
    log = writer(tmp_path / "log")
    log.write(4, chunk(10))
    log.close()
    with closing(sqlite3.connect(tmp_path / "log")) as database, database:
        database.execute("UPDATE chunks SET outputs = NULL")
    reader = LearnReader(tmp_path / "log", way(), NOWHERE)
    version = reader.heads[0].version
    assert reader.outputs(version) is None
    assert len(reader.entries(version)[1]) == 3
    reader.close()


class Planted:
    def __reduce__(self) -> Any:
        return os.mkdir, ("planted",)


@pytest.mark.parametrize("where", ["model", "entries"])
def test_a_planted_pickle_is_not_run(tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither as a model nor as entries, though its checksum be right."""
    monkeypatch.chdir(tmp_path)
    log = writer(tmp_path / "log")
    noted = chunk(10, frame=3)
    if where == "model":
        noted = noted._replace(frames=[noted.frames[0]._replace(pickled=pickle.dumps(Planted()))])
    else:
        noted.fields[5] = Planted()
    log.write(4, noted)
    log.close()
    reader = LearnReader(tmp_path / "log", way(), NOWHERE)
    with pytest.raises(StateError, match=r"batch 1-4, holds what is not ours"):
        reader.model(reader.frames()[0]) if where == "model" else reader.entries(reader.heads[0].version)
    assert not (tmp_path / "planted").exists()
    reader.close()


def test_files_that_are_no_logs_are_refused(tmp_path: Path) -> None:
    """Missing, no database, another format, cut off: a clear error."""
    with pytest.raises(StateError, match="there is no learn log"):
        LearnReader(tmp_path / "none", way(), NOWHERE)
    (tmp_path / "text").write_text("this is no database, and long enough to be taken for one" * 20)
    with pytest.raises(StateError, match="damaged"):
        LearnReader(tmp_path / "text", way(), NOWHERE)
    log = writer(tmp_path / "log")
    for batch in range(1, 40):
        log.write(batch, chunk(batch * 100, 50))
    log.close()
    with closing(sqlite3.connect(tmp_path / "log")) as database, database:
        database.execute("UPDATE makers SET description = '{'")
    with pytest.raises(StateError, match="damaged"):
        LearnReader(tmp_path / "log", way(), NOWHERE)
    with closing(sqlite3.connect(tmp_path / "log")) as database, database:
        database.execute("UPDATE about SET value = '9'")
    with pytest.raises(StateError, match="another format"):
        LearnReader(tmp_path / "log", way(), NOWHERE)
    with closing(sqlite3.connect(tmp_path / "log")) as database, database:
        database.execute("UPDATE about SET value = '1'")
        database.execute("UPDATE makers SET description = '{}'")
    content = (tmp_path / "log").read_bytes()
    (tmp_path / "log").write_bytes(content[: len(content) // 3])
    with pytest.raises(StateError, match="damaged"):
        read_all(tmp_path / "log")
