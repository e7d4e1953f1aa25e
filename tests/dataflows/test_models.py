"""Versions of models from a learn log made here: keyframes that are there, and those that are not."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from dataflows.job import JobError
from dataflows.likeness import first_difference
from dataflows.models import Models
from dataflows.settings import RunDirectory
from dataflows.state import StateError
from tests.scenarios.learning import Place


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A run with a keyframe each 50 examples."""
    made = Place(tmp_path_factory.mktemp("models"), ("every=100", "every=50"), events=200)
    made.run()
    return made


def models(place: Place) -> Any:
    """Its models."""
    return closing(Models(place.job(), RunDirectory(place.out)))


def edit(place: Place, sql: str) -> None:
    """Change the learn log."""
    [path] = (place.out / "state" / "learned").glob("*.sqlite3")
    with closing(sqlite3.connect(path)) as database, database:
        database.execute(sql)


def test_the_limit_keeps_the_newest(place: Place) -> None:
    """Of four keyframes two, and the older of them knows what it grew from all the same."""
    with models(place) as found:
        rows = found.list(limit=2)
        assert [(row.version, row.grew_from, row.since) for row in rows] == [("150", "100", 50), ("200", "150", 50)]
        assert len(found.list(limit=100)) == 4
        assert found.list(key="nobody") == []


def test_what_is_asked_is_looked_at_before(place: Place) -> None:
    """Negative numbers, words, other notations of numbers are no versions; too many examples never were learned."""
    with models(place) as found:
        for text in ("-1", "1.5", "", "1:", ":1", "one", "1:2:3"):
            with pytest.raises(JobError, match="is no version"):
                found.show(text)
        for text in ("201", "99999999999999999999", "0:5", "2:5"):
            with pytest.raises(StateError, match=r"by now|not in the learn log"):
                found.show(text)
        assert found.show("1:60").version == found.show("060").version == "60"


def test_the_range_of_examples_ends_at_the_version(place: Place) -> None:
    """From the version before to this one every example counts, also where the version is a keyframe."""
    outcomes = place.records("outcomes")
    with models(place) as found:
        for version, before in ((60, 50), (100, 50), (50, 0), (1, 0)):
            shown = found.show(str(version))
            assert shown.grew_from == ("the model as declared" if before == 0 else str(before))
            assert (shown.first.id, shown.last.id) == (outcomes[before]["id"], outcomes[version - 1]["id"])
            assert shown.last.label == outcomes[version - 1]["label"]
        assert (found.show("0").first, found.show("0").last) == (None, None)


def test_without_keyframes_models_are_made_from_the_beginning_and_without_chunks_from_keyframes(
    tmp_path: Path,
) -> None:
    """Whatever is left is enough, or it is said what is missing."""
    place = Place(tmp_path, ("every=100", "every=50"), events=200)
    place.run()
    with models(place) as found:
        whole = {version: found.show(version).model for version in ("40", "100", "130")}
    edit(place, "DELETE FROM keyframes WHERE examples IN (50, 100)")
    with models(place) as found:
        for version, model in whole.items():
            assert first_difference(found.show(version).model, model) is None
        assert found.show("130").grew_from == "the model as declared"
    edit(place, "DELETE FROM chunks WHERE version < (SELECT version FROM keyframes WHERE examples = 150)")
    with models(place) as found:
        assert found.show("150").examples == 150
        for version in ("40", "130"):
            with pytest.raises(StateError, match=r"cannot be made again|not in the learn log|by now"):
                found.show(version)


def test_export_has_what_was_asked_for(place: Place) -> None:
    """The newest, or a version with what taught it; with and without features."""
    with models(place) as found:
        latest = found.export("latest")
        assert latest.about["examples"] == {"null": 200}
        assert len(latest.features) == 2
        old = found.export("120", features=False)
        assert (old.features, old.about["examples"], old.about["grew_from"]) == ({}, {"null": 120}, "100")
        outcomes = place.records("outcomes")
        assert [each["id"] for each in old.about["taught_by"]] == [outcomes[100]["id"], outcomes[119]["id"]]
        with pytest.raises(StateError):
            found.export("500")
