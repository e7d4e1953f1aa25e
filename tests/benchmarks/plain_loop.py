"""The fraud job as one plain Python program: what Millrace's speed is measured against.

Nothing of Millrace is imported. A good engineer who needs this one job, and neither resumes nor replays,
would write about this:

1. Labels come 7 days after their transaction. Those due at or before a transaction's time are revealed before
   it, in the order (due, order of question); as the delay is constant, a queue keeps that order.
2. A customer's windows (t − w, t] hold the asking transaction. A terminal's windows run on the moment its
   labels are revealed, so they hold the transactions of (t − 7d − w, t − 7d].
3. Predict before learning; learn with the features as they were asked; score when the label is revealed.

The features are those of the Fraud Detection Handbook (Le Borgne and others). Sums are plain floats, so means
agree with exact arithmetic to about 1e-9, not to the last bit.

    python tests/benchmarks/plain_loop.py transactions.jsonl.gz OUTDIR [--limit N] [--river]

prints one JSON line; with `--river` a second one, of the same job with river's own tools.
"""

from __future__ import annotations

import argparse
import datetime as dt
import gzip
import io
import json
import resource
import sys
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
from river import compose, evaluate, feature_extraction, linear_model, metrics, preprocessing, stats
from river import utils as river_utils

DAY_US = 86_400_000_000
DELAY_US = 7 * DAY_US
MODEL = "LogisticRegression"
BLOCK = 1_000
"""Records encoded and written at once."""

HISTORY = 256
"""Left-behind entries of a history that are dropped together: rare enough to cost nothing per event."""


class Payment(msgspec.Struct, frozen=True, gc=False):
    """A line of the transactions; `ts` in milliseconds."""

    tx_id: int
    ts: int
    customer: int
    terminal: int
    amount: float
    fraud: int


class Prediction(msgspec.Struct, gc=False):
    """What the model said; `time` in microseconds, `version` counts the examples it had learned."""

    id: int
    time: int
    features: dict[str, float]
    output: float
    model: str
    version: int


class Outcome(msgspec.Struct, gc=False):
    """A prediction with its label; times in microseconds, `version` after learning."""

    id: int
    label: bool
    output: float
    time: int
    label_time: int
    version: int


class History:
    """Times and running sums of one customer or terminal, with where its windows begin."""

    __slots__ = ("times", "sums", "day", "week", "month")

    def __init__(self) -> None:
        self.times: list[int] = []
        self.sums = [0.0]
        self.day = self.week = self.month = 0

    def add(self, t: int, value: float) -> None:
        """Append; times never decrease."""
        self.times.append(t)
        self.sums.append(self.sums[-1] + value)
        if self.month > HISTORY:
            self._trim()

    def _trim(self) -> None:
        drop = self.month
        del self.times[:drop]
        del self.sums[:drop]
        self.day -= drop
        self.week -= drop
        self.month = 0

    def read(self, t: int) -> tuple[int, int, int, float, float, float]:
        """Counts, then means, over (t − w, t] for w = 1, 7, 30 days; 0.0 is the mean of nothing."""
        times, sums = self.times, self.sums
        self.day = day = bisect_right(times, t - DAY_US, self.day)
        self.week = week = bisect_right(times, t - 7 * DAY_US, self.week)
        self.month = month = bisect_right(times, t - 30 * DAY_US, self.month)
        n, total = len(times), sums[-1]
        return (
            n - day,
            n - week,
            n - month,
            (total - sums[day]) / (n - day) if n > day else 0.0,
            (total - sums[week]) / (n - week) if n > week else 0.0,
            (total - sums[month]) / (n - month) if n > month else 0.0,
        )


NOTHING = (0, 0, 0, 0.0, 0.0, 0.0)
"""What a terminal without any revealed label reads."""


class Lines:
    """A file of JSON lines, encoded and written in blocks."""

    __slots__ = ("_file", "_records", "_encode")

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._records: list[Any] = []
        self._encode = msgspec.json.Encoder().encode_lines

    def write(self, record: Any) -> None:
        """Keep the record for the next block."""
        self._records.append(record)
        if len(self._records) == BLOCK:
            self._flush()

    def _flush(self) -> None:
        self._file.write(self._encode(self._records))
        self._records.clear()

    def close(self) -> None:
        """Write what is left."""
        self._flush()
        self._file.close()


def open_lines(path: Path) -> io.BufferedReader:
    """Open a plain or gzipped file for reading; buffered once more, as GzipFile walks its lines in Python."""
    return io.BufferedReader(gzip.open(path), 1 << 16) if path.suffix == ".gz" else path.open("rb")


def plain_loop(source: Path, directory: Path, limit: int | None = None) -> dict[str, Any]:
    """Run the job, file to file; writes predictions.jsonl and outcomes.jsonl into `directory`.

    Parameters
    ----------
    source
        Transactions as JSON lines in order of time, plain or .gz.
    directory
        Where to write; made if missing.
    limit
        How many transactions to read (default: all).

    Returns events, seconds, events_per_s, rocauc.
    """
    directory.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    model = preprocessing.StandardScaler() | linear_model.LogisticRegression()
    predict, learn = model.predict_proba_one, model.learn_one
    rocauc = new_rocauc()
    decode = msgspec.json.Decoder(Payment).decode
    predictions, outcomes = Lines(directory / "predictions.jsonl"), Lines(directory / "outcomes.jsonl")
    customers: dict[int, History] = {}
    terminals: dict[int, History] = {}
    waiting: deque[tuple[int, Payment, dict[str, float], float]] = deque()
    version = events = 0

    def reveal() -> None:
        nonlocal version
        due, payment, x, p = waiting.popleft()
        label = payment.fraud == 1
        terminal = terminals.get(payment.terminal)
        if terminal is None:
            terminal = terminals[payment.terminal] = History()
        terminal.add(due, payment.fraud)
        rocauc.update(label, p)
        learn(x, label)
        version += 1
        outcomes.write(Outcome(payment.tx_id, label, p, due - DELAY_US, due, version))

    with open_lines(source) as lines:
        for line in islice(lines, limit):
            payment = decode(line)
            events += 1
            t = payment.ts * 1_000
            while waiting and waiting[0][0] <= t:
                reveal()
            customer = customers.get(payment.customer)
            if customer is None:
                customer = customers[payment.customer] = History()
            amount = payment.amount
            customer.add(t, amount)
            c1, c7, c30, a1, a7, a30 = customer.read(t)
            terminal = terminals.get(payment.terminal)
            n1, n7, n30, f1, f7, f30 = NOTHING if terminal is None else terminal.read(t)
            hours = payment.ts // 3_600_000
            x = {
                "amount": amount,
                "is_night": 1 if hours % 24 <= 6 else 0,
                "is_weekend": 1 if (hours // 24 + 3) % 7 >= 5 else 0,  # 1970-01-01 was a Thursday
                "count_1d_by_customer": c1,
                "count_7d_by_customer": c7,
                "count_30d_by_customer": c30,
                "amount_mean_1d_by_customer": a1,
                "amount_mean_7d_by_customer": a7,
                "amount_mean_30d_by_customer": a30,
                "count_1d_by_terminal": n1,
                "count_7d_by_terminal": n7,
                "count_30d_by_terminal": n30,
                "fraud_mean_1d_by_terminal": f1,
                "fraud_mean_7d_by_terminal": f7,
                "fraud_mean_30d_by_terminal": f30,
            }
            p = predict(x)[True]
            predictions.write(Prediction(payment.tx_id, t, x, p, MODEL, version))
            waiting.append((t + DELAY_US, payment, x, p))
    while waiting:
        reveal()
    predictions.close()
    outcomes.close()
    return figures(events, time.perf_counter() - started, rocauc)


def new_rocauc() -> Any:
    """river's ROCAUC, as Any: its methods carry no types."""
    rocauc: Any = metrics.ROCAUC
    return rocauc()


def figures(events: int, seconds: float, rocauc: Any) -> dict[str, Any]:
    """The result of a run as a flat dict.

    >>> figures(1000, 0.5, new_rocauc())["events_per_s"]
    2000
    """
    return {
        "events": events,
        "seconds": round(seconds, 3),
        "events_per_s": round(events / seconds),
        "rocauc": float(rocauc.get()),
    }


# -- the same job with river's own tools

EPOCH = dt.datetime(1970, 1, 1)  # noqa: DTZ001 - naive datetimes are the quickest river can be given


def _aggregates(by: str, value: str) -> list[Any]:
    """Sum and mean per window, of `by`: river's Count cannot run in a window, so ones are summed up."""
    windows = [dt.timedelta(days=days) for days in (1, 7, 30)]
    sums = [river_utils.TimeRolling(stats.Sum, period=w) for w in windows]
    means = [river_utils.TimeRolling(stats.Mean, period=w) for w in windows]
    aggregates = [feature_extraction.Agg("one", by, rolling) for rolling in sums]
    return aggregates + [feature_extraction.Agg(value, by, rolling) for rolling in means]


def _river_examples(source: Path, limit: int | None) -> Iterator[tuple[dict[str, Any], bool]]:
    """(features with their `ts`, label) of each transaction, the features by river's aggregates."""
    names = [f"{kind}_{w}" for kind in ("count", "mean") for w in ("1d", "7d", "30d")]
    by_customer, by_terminal = _aggregates("customer", "amount"), _aggregates("terminal", "fraud")
    waiting: deque[dict[str, Any]] = deque()
    delay = dt.timedelta(days=7)
    with open_lines(source) as lines:
        for line in islice(lines, limit):
            row = msgspec.json.decode(line)
            row["one"] = 1
            t = row["ts"] = EPOCH + dt.timedelta(milliseconds=row["ts"])
            while waiting and waiting[0]["ts"] + delay <= t:
                revealed = waiting.popleft()
                for agg in by_terminal:
                    agg.learn_one(revealed, t=revealed["ts"] + delay)
            waiting.append(row)
            x = {
                "ts": t,
                "amount": row["amount"],
                "is_night": int(t.hour <= 6),
                "is_weekend": int(t.weekday() >= 5),
            }
            for name, agg in zip(names, by_customer, strict=True):
                agg.learn_one(row, t=t)
                x[f"{name}_by_customer"] = next(iter(agg.transform_one(row).values()))
            for name, agg in zip(names, by_terminal, strict=True):
                x[f"{name}_by_terminal"] = next(iter(agg.transform_one(row).values()))
            yield x, row["fraud"] == 1


def river_progressive(source: Path, limit: int | None = None) -> dict[str, Any]:
    """The job as river's users write it: `Agg` over `TimeRolling`, and `evaluate.progressive_val_score`.

    It does less than `plain_loop`: nothing is written, and a terminal's windows move only when a label of
    that terminal is revealed (TimeRolling forgets on update, not on reading), so some features are stale.

    Returns events, seconds, events_per_s, rocauc.
    """
    started = time.perf_counter()
    model = compose.Discard("ts") | preprocessing.StandardScaler() | linear_model.LogisticRegression()
    rocauc = new_rocauc()
    events = 0

    def counted() -> Iterator[tuple[dict[Any, Any], bool]]:
        nonlocal events
        for example in _river_examples(source, limit):
            events += 1
            yield example

    evaluate.progressive_val_score(counted(), model, rocauc, moment="ts", delay=dt.timedelta(days=7))
    return figures(events, time.perf_counter() - started, rocauc)


def peak_rss_mib() -> float:
    """Most memory this process ever held; the kernel counts in KiB, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1 << 20 if sys.platform == "darwin" else 1 << 10), 1)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="The fraud job as a plain Python loop.")
    parser.add_argument("source", type=Path, help="transactions.jsonl or .jsonl.gz")
    parser.add_argument("directory", type=Path, help="where predictions.jsonl and outcomes.jsonl go")
    parser.add_argument("--limit", type=int, help="how many transactions (default: all)")
    parser.add_argument("--river", action="store_true", help="the same with river's own tools afterwards")
    arguments = parser.parse_args()
    result = plain_loop(arguments.source, arguments.directory, arguments.limit)
    print(json.dumps({**result, "peak_rss_mib": peak_rss_mib()}))
    if arguments.river:
        print(json.dumps({**river_progressive(arguments.source, arguments.limit), "by": "river"}))


if __name__ == "__main__":
    main()
