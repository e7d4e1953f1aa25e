"""Streams for the crash tests: what producers write to the input files, damaged lines included."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tests.scenarios import oracles

Kind = Literal["stream", "field"]


class Line(NamedTuple):
    """What a producer writes, in the order of arrival: to which file, and the line with its end."""

    file: str
    text: bytes


class Inputs:
    """The input files of a run, fed line by line or all at once. Lines are also cut anywhere, as writes are.

    Parameters
    ----------
    directory
        Where the files are; made if need be.
    lines
        All that will ever be written.
    """

    def __init__(self, directory: Path, lines: list[Line]) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.lines = lines
        self.fed = 0
        self._paths = {name: directory / f"{name}.jsonl" for name in dict.fromkeys(line.file for line in lines)}
        for path in self._paths.values():
            path.touch()
        self._rest = b""  # of a line that was written in part
        self._file = ""

    @property
    def options(self) -> list[str]:
        """For `millrace run`."""
        options = {"events": "--data", "labels": "--labels"}
        return [word for name, path in self._paths.items() for word in (options[name], str(path))]

    @property
    def paths(self) -> dict[str, Path]:
        """The files by name."""
        return self._paths

    @property
    def left(self) -> int:
        """Lines not written yet."""
        return len(self.lines) - self.fed

    def feed(self, count: int, cut: float = 0.0) -> None:
        """Write the next lines; of the last one only this part, the rest with the next call."""
        written: dict[str, bytes] = {self._file: self._rest} if self._rest else {}
        self._rest = b""
        some = self.lines[self.fed : self.fed + count]
        self.fed += len(some)
        for line in some:
            written[line.file] = written.get(line.file, b"") + line.text
        if some and cut:
            self._file, at = some[-1].file, int(len(some[-1].text) * cut)
            self._rest = some[-1].text[at:]
            written[self._file] = written[self._file].removesuffix(self._rest)
        for name, content in written.items():
            with self._paths[name].open("ab") as file:
                file.write(content)

    def feed_all(self) -> None:
        """Write what is left."""
        self.feed(self.left)


def lines(kind: Kind, seed: int, events: int, cards: int = 40, shops: int = 12) -> list[Line]:
    """A keystone stream in its order of arrival, with one damaged line in a hundred.

    `stream`: labels come in a file of their own, early, late, twice, revised or never. `field`: the label is in the
    event and known after `delay` µs; some events come too late.
    """
    stream = oracles.keystone_stream(seed, events, cards=cards, shops=shops)
    rng = random.Random(seed)
    rows = stream.arrivals if kind == "stream" else _with_labels(stream, rng)
    result = []
    for what, row in rows:
        name = f"{what}s"
        if rng.random() < 0.01:
            result.append(Line(name, _damaged(row, rng)))
        result.append(Line(name, _encoded(row)))
    return result


def _with_labels(stream: oracles.Stream, rng: random.Random) -> list[oracles.Arrival]:
    first: dict[int, dict[str, Any]] = {}
    for label in stream.labels:
        first.setdefault(label["id"], label)
    rows: list[oracles.Arrival] = []
    for what, row in stream.arrivals:
        if what == "label":
            continue
        known: dict[str, Any] = {"y": None, "delay": 0}
        if row["id"] in first:
            label = first[row["id"]]
            known = {"y": label["y"], "delay": max(label["t"] - row["t"], 0)}
        rows.append(("event", row | known))
        if rng.random() < 0.01:
            rows.append(("event", row | known | {"id": -1 - row["id"], "t": row["t"] - 2 * oracles.HOUR_US}))
    return rows


def _damaged(row: dict[str, Any], rng: random.Random) -> bytes:
    options = [_encoded(row)[:-9] + b"\n", b"\n", b"[1]\n", _encoded(row | {"t": "never"}), b"\xff\xfe\n"]
    return rng.choice(options)


def _encoded(row: dict[str, Any]) -> bytes:
    return json.dumps(row).encode() + b"\n"
