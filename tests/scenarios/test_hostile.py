"""What hostile use found: each once stopped a job, changed a result, or let the future in."""

from __future__ import annotations

import gzip
import json
import math
import random
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from pydantic import field_validator
from river import ensemble, forest, linear_model, metrics, optim, preprocessing

from dataflows import Event, Job, JobError, Jsonl, Label, Outcome, Outputs, Prediction, Reject
from dataflows.order import EVENT, Reader, Time
from dataflows.orderlog import OrderLog, OrderLogError
from dataflows.settings import output_sinks
from features import Count, Derived, Entity, Fields, Mean
from features.rows import MemoryRows


class Ping(Event, id="id", time="t", unit="s"):
    id: int
    t: int
    card: str = "c"
    n: int = 0
    x: float = 0.0
    y: float = 0.0

    @field_validator("card")
    @classmethod
    def known(cls, card: str) -> str:
        return {"c": "c", "d": "d"}[card]


class Verdict(Event, id="id", time="t", unit="s"):
    id: str
    t: int
    y: float


def job(**parts: Any) -> Job:
    """A regression over pings, with some parts replaced."""
    plain: dict[str, Any] = {
        "name": "pings",
        "events": Jsonl("pings.jsonl", Ping),
        "features": [Fields("x")],
        "model": preprocessing.StandardScaler() | linear_model.LinearRegression(optimizer=optim.SGD(0.01)),
        "label": Label(field="y", delay="1s"),
    }
    return Job(**plain | parts)


def pings(count: int, **fields: Any) -> list[dict[str, Any]]:
    """Pings a second apart."""
    rng = random.Random(1)
    return [{"id": i, "t": i, "x": rng.random(), "y": rng.random()} | fields for i in range(count)]


def of(kind: type, records: Any) -> list[Any]:
    """The records of a kind."""
    return [record for record in records if isinstance(record, kind)]


def test_a_metric_that_raises_is_rejected_and_the_job_goes_on() -> None:
    """A label whose square no float can hold is a reject of the metric; its outcome stays, the others count."""
    rows = [*pings(3), {"id": 3, "t": 3, "y": 1e200}, *({"id": i, "t": i, "y": 0.5} for i in range(4, 8))]
    records = list(job(metrics=[metrics.MSE()]).play(rows))
    assert len(of(Outcome, records)) == 8
    assert {r.reason for r in of(Reject, records)} <= {"metric_error", "model_error"}
    assert [r.reason for r in of(Reject, records)].count("metric_error") >= 1


def test_an_event_that_is_refused_leaves_no_trace_in_features() -> None:
    """An int that no float can hold is refused before any other feature has counted its event."""
    features = [Entity("card", [Count()], over="1d"), Entity("card", [Mean("n")], over="1d")]
    good = pings(8)
    bad = {"id": 100, "t": 4, "n": 10**400}
    with_it = list(job(features=features).play([*good[:5], bad, *good[5:]]))
    assert [r.reason for r in of(Reject, with_it)] == ["function_error"]
    assert of(Prediction, with_it) == of(Prediction, job(features=features).play(good))


def test_a_validator_that_raises_spoils_its_event_only() -> None:
    """A KeyError from a field validator is a reject with the error's name."""
    records = list(job().play([{"id": 1, "t": 1}, {"id": 2, "t": 2, "card": "zzz"}, {"id": 3, "t": 3}]))
    assert [p.id for p in of(Prediction, records)] == [1, 3]
    assert [(r.reason, "KeyError" in r.detail) for r in of(Reject, records)] == [("function_error", True)]


def test_a_delay_beyond_all_dates_is_refused() -> None:
    """A label that would be known after the year 9999 is a mistake of the delay function."""
    late = job(label=Label(field="y", delay=lambda ping: timedelta(days=3_000_000 * ping.n)))
    records = list(late.play([{"id": 1, "t": 1}, {"id": 2, "t": 2, "n": 1}]))
    assert [p.id for p in of(Prediction, records)] == [1]
    assert [r.reason for r in of(Reject, records)] == ["function_error"]


def test_a_derived_value_that_is_no_number_is_refused() -> None:
    """One NaN would make every later answer NaN."""
    derived = Derived(lambda ping: math.nan if ping.id == 5 else ping.x, name="odd")
    records = list(job(features=[derived]).play(pings(20)))
    assert all(math.isfinite(p.output) for p in of(Prediction, records))
    assert len(of(Reject, records)) == 1


@pytest.mark.parametrize(
    "feature",
    [
        Derived(lambda ping: ping.y * 2, name="leak"),
        Entity("card", [Count()], over="1d", where=lambda ping: ping.y > 0.5),
    ],
)
def test_a_function_that_reads_the_label_is_refused(feature: Any) -> None:
    """Nothing from the future, through functions either."""
    with pytest.raises(JobError, match="is the label"):
        job(features=[Fields("x"), feature])


def test_labels_that_could_never_match_are_refused() -> None:
    """Ids of different types are never equal, so every label would be an orphan."""
    with pytest.raises(JobError, match="different types"):
        job(label=Label(Jsonl("verdicts.jsonl", Verdict), field="y", horizon="1d"))


def test_randomness_is_found_inside_ensembles() -> None:
    """An unseeded forest in a list of models is refused like one that stands alone."""
    stack = ensemble.StackingClassifier(
        [forest.ARFClassifier(n_models=3), linear_model.LogisticRegression()], linear_model.LogisticRegression()
    )
    with pytest.raises(JobError, match="unseeded"):
        job(model=stack)


def test_two_kinds_of_records_may_not_share_a_file(tmp_path: Path) -> None:
    """Two writers on one file would overwrite each other."""
    both = Jsonl(tmp_path / "both.jsonl")
    with pytest.raises(JobError, match="one kind"):
        output_sinks(job(outputs=Outputs(predictions=both, outcomes=both)), tmp_path)


def write(path: Path, rows: list[dict[str, Any]], opener: Callable[..., Any] = open) -> Path:
    """Rows as JSON lines."""
    with opener(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def test_an_archive_that_breaks_off_gives_what_it_has_and_one_reject(tmp_path: Path) -> None:
    """The lines before the damage are answered; the rest is a reject that says so."""
    path = write(tmp_path / "pings.jsonl.gz", pings(60_000), gzip.open)
    path.write_bytes(path.read_bytes()[:-40_000])
    records = list(job(events=Jsonl(path, Ping)).play())
    assert len(of(Prediction, records)) > 1_000
    assert [r.reason for r in of(Reject, records)] == ["broken_file"]


@pytest.mark.parametrize("count", [50, 500])
def test_an_input_that_was_replaced_is_not_read_on(tmp_path: Path, count: int) -> None:
    """Neither a shorter nor a longer file of that name is taken for the one that was read before."""
    path = write(tmp_path / "pings.jsonl", pings(200))
    rows = MemoryRows()
    first = Reader([(EVENT, Jsonl(path, Ping))], Time(), rows=rows)
    while not first.finished:
        first.next_batch()
    rows.apply(first.changes())
    first.close()
    write(path, [row | {"x": 7.0} for row in pings(count)])
    with pytest.raises(OrderLogError, match="cut or replaced"):
        Reader([(EVENT, Jsonl(path, Ping))], Time(), rows=rows)


def test_a_file_that_appears_does_not_disturb_what_is_formed_again(tmp_path: Path) -> None:
    """A resume first forms the logged batches from the files there were, then takes the new one in."""
    folder = tmp_path / "in"
    folder.mkdir()
    write(folder / "a.jsonl", pings(50))
    source = Jsonl(folder, Ping)
    before = Reader([(EVENT, source)], Time(), batch_size=10, log=OrderLog(tmp_path / "log"))
    numbers = [[item[2] for item in batch.items] for _ in range(3) if (batch := before.next_batch())]
    before.close()
    write(folder / "b.jsonl", [{"id": 1000 + i, "t": 100 + i} for i in range(20)])
    after = Reader([(EVENT, source)], Time(), batch_size=10, log=OrderLog(tmp_path / "log"))
    again = [[item[2] for item in batch.items] for _ in range(3) if (batch := after.next_batch())]
    assert again == numbers
    seen = {item for numbers in again for item in numbers}
    while not after.finished:
        batch = after.next_batch()
        seen |= {item[2] for item in batch.items} if batch else set()
    after.close()
    assert seen == {*range(50), *range(1000, 1020)}
    shutil.rmtree(folder)
