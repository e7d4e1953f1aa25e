"""The handbook's fraud features over two months of transactions: one run, each feature computed again from the file."""

from __future__ import annotations

import gzip
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest

from tests.scenarios import oracles, running

TRANSACTIONS = 585_177
SAMPLE = 20_000
"""Rows after day 30, when the longest window is full."""

WINDOWS = ("1d", "7d", "30d")
EXACT = [f"{name}_{w}_by_{entity}" for w in WINDOWS for name, entity in (
    ("count", "customer"), ("count", "terminal"), ("fraud_mean", "terminal"))]  # fmt: skip
CLOSE = [f"amount_mean_{w}_by_customer" for w in WINDOWS]


class Answered(NamedTuple):
    """The file's rows, what the run wrote, and which rows are to be computed again."""

    rows: list[dict[str, Any]]
    chosen: list[int]
    ids: Counter[int]
    features: dict[int, dict[str, float]]
    metrics: dict[str, float]


@pytest.fixture(scope="module")
def answered(shared_data: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Answered:
    """One run of examples/fraud over all transactions, with two processes."""
    packed = shared_data("transactions.jsonl.gz")
    directory = tmp_path_factory.mktemp("fraud")
    running.run("examples/fraud/job.py", directory, "--data", str(packed), "--workers", "2")
    with gzip.open(packed) as lines:
        rows = [msgspec.json.decode(line) for line in lines]
    chosen = sorted({*sampled(rows, seed=30), *with_equal_times(rows), *at_the_edge_of_a_window(rows)})
    ids: Counter[int] = Counter()
    features = {}
    wanted = {rows[position]["tx_id"] for position in chosen}
    for prediction in predictions(directory):
        ids[prediction.id] += 1
        if prediction.id in wanted:
            features[prediction.id] = prediction.features
    return Answered(rows, chosen, ids, features, running.last_metrics(directory))


class Prediction(msgspec.Struct):
    """What is read back of a prediction."""

    id: int
    features: dict[str, float]


def predictions(directory: Path) -> Iterator[Prediction]:
    """The predictions of a run, one at a time: together they are a third of a gigabyte."""
    decoder = msgspec.json.Decoder(Prediction)
    with (directory / "predictions.jsonl").open("rb") as lines:
        yield from map(decoder.decode, lines)


def sampled(rows: list[dict[str, Any]], seed: int) -> list[int]:
    """Positions drawn from those after the first 30 days."""
    after = rows[0]["ts"] + 30 * oracles.DAY_MS
    return random.Random(seed).sample([i for i, row in enumerate(rows) if row["ts"] > after], SAMPLE)


def with_equal_times(rows: list[dict[str, Any]]) -> Iterable[int]:
    """Positions of the rows whose time another row has too: there the order key decides."""
    seen = Counter(row["ts"] for row in rows)
    return (i for i, row in enumerate(rows) if seen[row["ts"]] > 1)


def at_the_edge_of_a_window(rows: list[dict[str, Any]]) -> Iterator[int]:
    """Positions of the rows one of whose windows begins or ends exactly at the time of another row of their entity."""
    customers = {(row["customer"], row["ts"]) for row in rows}
    terminals = {(row["terminal"], row["ts"]) for row in rows}
    for position, row in enumerate(rows):
        customer, terminal, t = row["customer"], row["terminal"], row["ts"]
        if any((customer, t - days * oracles.DAY_MS) in customers for days in (1, 7, 30)) or any(
            (terminal, t - days * oracles.DAY_MS) in terminals for days in (7, 8, 14, 37)
        ):
            yield position


def recomputed(rows: list[dict[str, Any]], chosen: list[int]) -> list[dict[str, float]]:
    """The oracle's features of the chosen rows, half of them in each of two processes: it is slow."""
    half = len(chosen) // 2
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        parts = pool.map(oracles.fraud_features_naive, [rows, rows], [chosen[:half], chosen[half:]])
        return [features for part in parts for features in part]


def test_every_transaction_is_answered_once(answered: Answered) -> None:
    """All 585,177 transactions have one prediction each."""
    assert len(answered.rows) == TRANSACTIONS
    assert answered.ids == Counter(row["tx_id"] for row in answered.rows)


def test_features_equal_a_naive_recomputation_from_the_file(answered: Answered) -> None:
    """The 12 windowed features of a sample and all rows with equal times: counts and rates exactly, means to 1e-9."""
    expected = recomputed(answered.rows, answered.chosen)
    assert len(expected) >= SAMPLE
    for position, naive in zip(answered.chosen, expected, strict=True):
        ours = answered.features[answered.rows[position]["tx_id"]]
        assert {name: ours[name] for name in EXACT} == {name: naive[name] for name in EXACT}
        for name in CLOSE:
            assert ours[name] == pytest.approx(naive[name], rel=1e-9, abs=1e-9)


def test_the_model_learns_to_spot_fraud(answered: Answered, capsys: pytest.CaptureFixture[str]) -> None:
    """The area under the curve, all of it delayed by seven days, is far above chance; it is shown."""
    found = answered.metrics["ROCAUC"]
    with capsys.disabled():
        print(f"\nfraud: ROCAUC {found:.6f} over {TRANSACTIONS:,} transactions")  # noqa: T201 - a figure to read
    assert found > 0.7
