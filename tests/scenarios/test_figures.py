"""Figures that river itself gives, found again: bikes with late labels, phishing, network attacks."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from river import anomaly, datasets, evaluate, metrics, preprocessing, stream

from tests.scenarios import running

JOBS = "tests.scenarios.figure_jobs"

BIKES = {"bikes_now": "3.933442", "bikes_late": "4.231299", "whole_now": "3.933442", "whole_late": "4.233166"}
"""MAE of river 0.26.1 (`progressive_val_score`): the target mean as our feature, or inside the model."""

PHISHING = {"phishing_0": 0.9506961340902946, "phishing_10": 0.9486776571630585, "phishing_100": 0.9372998419531267}
"""ROCAUC of river 0.26.1 (`progressive_val_score`), by the delay in samples."""

ATTACK_ROWS = (280_000, 340_000)
"""The rows that the test learns from: all 567,498 take too long, and the first 200,000 hold no attack."""

WAYS = {"play": 0, "one process": 1, "two processes": 2}

PLAY = """
import json, sys
from dataflows import Metrics
from dataflows.runtime import load_job, with_inputs
job = with_inputs(load_job(sys.argv[1]), sys.argv[2], None)
print(json.dumps([record.values for record in job.play() if isinstance(record, Metrics)][-1]))
"""


def figures(reference: str, way: str, data: Path, directory: Path) -> dict[str, float]:
    """The metrics of a job at the end of its data, played (in a process of its own) or run."""
    if WAYS[way]:
        running.run(reference, directory, "--data", str(data), "--workers", str(WAYS[way]))
        return running.last_metrics(directory)
    command = [sys.executable, "-c", PLAY, reference, str(data)]
    done = subprocess.run(command, env=running.environment(), cwd=running.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    values: dict[str, float] = json.loads(done.stdout)
    return values


@pytest.fixture(scope="module")
def bikes(
    shared_data: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[tuple[str, str], Future[dict[str, float]]]]:
    """All runs over the bikes, begun at once, two at a time: the tests wait for theirs."""
    data = shared_data("toulouse_bikes.csv.gz")
    with ThreadPoolExecutor(2) as pool:
        begun = {}
        for way in WAYS:
            for name in BIKES:
                directory = tmp_path_factory.mktemp(f"bikes-{name}")
                begun[name, way] = pool.submit(figures, f"{JOBS}:{name}", way, data, directory)
        yield begun
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", BIKES)
def test_bikes_give_the_mean_absolute_error_of_river(
    name: str, way: str, bikes: dict[tuple[str, str], Future[dict[str, float]]]
) -> None:
    """The four MAE figures, with no delay and 30 minutes late, to the six digits that river prints."""
    assert f"{bikes[name, way].result()['MAE']:.6f}" == BIKES[name]


@pytest.fixture(scope="module")
def phishing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """river's phishing sites, numbered: the delays count samples."""
    path = tmp_path_factory.mktemp("phishing") / "phishing.jsonl"
    with path.open("w") as file:
        for number, (features, truth) in enumerate(datasets.Phishing()):
            file.write(json.dumps(features | {"i": number, "phishing": truth}) + "\n")
    return path


@pytest.mark.parametrize("way", ["play", "one process"])
@pytest.mark.parametrize("name", PHISHING)
def test_phishing_gives_the_area_under_the_curve_of_river(name: str, way: str, phishing: Path, tmp_path: Path) -> None:
    """The three ROCAUC figures, with labels 0, 10 and 100 samples late, to the last digit."""
    assert figures(f"{JOBS}:{name}", way, phishing, tmp_path)["ROCAUC"] == PHISHING[name]


def numbered_attacks(packed: Path, path: Path, begin: int, end: int | None) -> None:
    """The connections with a running number `i` in place of the time they have not."""
    with gzip.open(packed, "rt") as lines, path.open("w") as file:
        file.write(f"i,{next(lines)}")
        file.writelines(f"{number},{line}" for number, line in enumerate(islice(lines, begin, end)))


def river_on_attacks(path: Path) -> float:
    """What river's own loop says of the same rows."""
    fields: dict[Hashable, Callable[[Any], Any]]
    fields = {"duration": float, "src_bytes": float, "dst_bytes": float, "service": int}
    rows = stream.iter_csv(str(path), target="service", converters=fields, drop=["i"])
    model = preprocessing.MinMaxScaler() | anomaly.HalfSpaceTrees(seed=42)
    found: float = evaluate.progressive_val_score(rows, model, metrics.ROCAUC()).get()
    return found


def test_attacks_give_the_area_under_the_curve_of_rivers_own_loop(
    shared_data: Callable[[str], Path], tmp_path: Path
) -> None:
    """An anomaly detector that learns without labels ranks attacks exactly as in river's own loop.

    The figure is below 0.5 (over all 567,498 rows 0.2457961238450077): nearly all attacks stand in one burst.
    """
    path = tmp_path / "kdd99_http.csv"
    numbered_attacks(shared_data("kdd99_http.csv.gz"), path, *ATTACK_ROWS)
    with ThreadPoolExecutor(2) as pool:
        played = pool.submit(figures, f"{JOBS}:attacks", "play", path, tmp_path)
        run = pool.submit(figures, f"{JOBS}:attacks", "one process", path, tmp_path / "run")
        expected = river_on_attacks(path)
    assert 0 < expected < 1, "there are attacks among the rows"
    assert played.result()["ROCAUC"] == expected
    assert run.result()["ROCAUC"] == expected
