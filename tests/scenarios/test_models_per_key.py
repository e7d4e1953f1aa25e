"""One model per key: spread over key groups and workers, joined again in order."""

from __future__ import annotations

from pathlib import Path

from dataflows import Metrics, Outcome, Prediction
from dataflows.events import encode
from tests.scenarios import keystone_jobs, oracles, running
from tests.scenarios.test_keystone import Case, write


def test_models_per_key_answer_alike_in_play_and_on_any_number_of_workers(tmp_path: Path) -> None:
    """Predictions, outcomes and metrics of a job with a model per shop are the same bytes from play, 1, 3 workers."""
    case = Case(tmp_path, oracles.keystone_stream(seed=5, n=800).arrivals)
    write(tmp_path / "events.jsonl", case.events)
    write(tmp_path / "labels.jsonl", case.labels)
    for workers in ("1", "3"):
        running.run(
            "tests.scenarios.keystone_jobs:per_shop", tmp_path / workers, *case.inputs, "--workers", workers,
            "--batch-size", "50",
        )  # fmt: skip
    played = list(keystone_jobs.per_shop().play(case.events, case.labels))
    for kind, name in ((Prediction, "predictions"), (Outcome, "outcomes"), (Metrics, "metrics")):
        expected = b"".join(encode(record) for record in played if isinstance(record, kind))
        assert (tmp_path / "1" / f"{name}.jsonl").read_bytes() == expected
        assert (tmp_path / "3" / f"{name}.jsonl").read_bytes() == expected
    models = {record.model for record in played if isinstance(record, Prediction)}
    assert len(models) == len({event["shop"] for event in case.events})
