"""Looking into state: what `Job.at` refuses, and what it finds after a change."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dataflows.checkpoints import Checkpoints, Manifest
from dataflows.job import Job
from dataflows.runtime import load_job
from dataflows.settings import RunDirectory
from dataflows.state import StateError, StateFile
from tests.dataflows.test_state import open_files
from tests.scenarios.test_branches import Place


class Run:
    """A copy of a run of a job with a model for each card, and a checkpoint of it with questions open."""

    def __init__(self, job: Job, path: Path) -> None:
        self.job = job
        self.directory = RunDirectory(path)
        found = [m for m in Checkpoints(self.directory).all() if m.open > 20]
        self.middle: Manifest = found[len(found) // 2]
        self.older: Manifest = found[len(found) // 2 - 1]

    def at(self, **changed: Any) -> Any:
        """Its state there."""
        return self.job.changed(**changed).at(str(self.middle.version), self.directory.path)

    def file(self, name: str) -> Path:
        """A state file."""
        return self.directory.groups / f"{name}.sqlite3"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A run to the end, with many checkpoints."""
    place = Place(tmp_path_factory.mktemp("whole"))
    place.declare(("    label=", '    per="card",\n    label='))
    place.run()
    return place


@pytest.fixture
def run(whole: Place, tmp_path: Path) -> Run:
    """A copy of it, to damage."""
    return Run(load_job(str(whole.file)), Path(shutil.copytree(whole.out, tmp_path / "out")))


def lose_rows(run: Run) -> None:
    """What one file held after an older checkpoint."""
    file = StateFile(run.file("001"), "001")
    file.roll_back(run.older.version)
    file.close()


def mix_up(run: Run) -> None:
    """A key group's file in the place of another."""
    shutil.copy(run.file("003"), run.file("002"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lose_rows, r"checkpoint .* cannot be opened: .*001\.sqlite3 lacks step .* of batch \d+\. Hint: "),
        (mix_up, "key group 003, not 002"),
    ],
)
def test_a_state_that_is_not_whole_is_refused(run: Run, damage: Callable[[Run], None], message: str) -> None:
    """Nothing is answered from half of the rows; and no file stays open."""
    run.at().close()
    damage(run)
    with pytest.raises(StateError, match=message) as caught:
        run.at()
    assert caught.value is not None, "held on to, as a notebook does"
    assert open_files(run.directory.groups) == []


def test_open_questions_are_found_whatever_per_was(run: Run) -> None:
    """Those asked of models that are gone wait as well, in the key groups of the old keys."""
    for per in ("card", "shop", None):
        past = run.at(per=per)
        assert len(past.open_questions()) == run.middle.open
        assert all(question.features.keys() == set(run.job.feature_names) for question in past.open_questions())
        past.close()
