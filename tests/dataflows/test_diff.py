"""What differs between two runs: found whatever it is and wherever it stands, and nothing else."""

from __future__ import annotations

import io
import json
import tempfile
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner, Result

from dataflows import cli_diff
from dataflows.cli import app
from dataflows.diff import (
    KINDS,
    LEAD,
    MAX_WAITING,
    Change,
    Join,
    Lines,
    RunDiff,
    Side,
    compare,
    distance,
    same,
    side_by_side,
    total_bytes,
    without_partner,
)
from dataflows.events import Metrics, Outcome, Prediction, encode_lines, reject
from dataflows.job import JobError
from dataflows.order import InputError

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)


def _at(minute: int) -> datetime:
    return BEGIN + timedelta(minutes=minute)


def _asked(key: int | str, minute: int = 0, output: Any = 0.5, **features: Any) -> Prediction:
    return Prediction(key, _at(minute), features, output, "LogisticRegression", 7)


def _answered(key: int, minute: int, label: Any = True, label_minute: int = 0, **changed: Any) -> Outcome:
    known: dict[str, Any] = {"output": 0.5, "model": "LogisticRegression", "version": 7, "version_after": 8} | changed
    return Outcome(key, _at(minute), label=label, label_time=_at(label_minute), **known)


def _reported(minute: int, outcomes: int, **values: float | None) -> Metrics:
    return Metrics(_at(minute), outcomes, values)


def _write(run: Path, **kinds: list[Any]) -> Path:
    run.mkdir(parents=True, exist_ok=True)
    for kind, records in kinds.items():
        (run / f"{kind}.jsonl").write_bytes(encode_lines(records))
    return run


def _compare(a: list[Any], b: list[Any], kind: str = "predictions", max_waiting: int = MAX_WAITING) -> RunDiff:
    """What differs between two files of one kind."""
    with tempfile.TemporaryDirectory() as place:
        runs = [_write(Path(place) / name, predictions=[_asked("same")]) for name in "ab"]
        for run, records in zip(runs, (a, b), strict=True):
            _write(run, **{kind: records})
        return compare(runs[0], runs[1], max_waiting)


def _millrace(*arguments: Any) -> Result:
    return CliRunner().invoke(app, ["diff", *map(str, arguments)])


# -- joining


@given(st.randoms(use_true_random=False), st.integers(1, 60), st.integers(0, 15))
def test_order_within_a_window_is_no_difference(random: Any, count: int, window: int) -> None:
    """A file and the same lines in nearly the same order hold the same predictions."""
    records = [_asked(f"p-{i}", i // 3, i / 7, x=i) for i in range(count)]
    mixed = sorted(records, key=lambda record: int(str(record.id)[2:]) + random.uniform(0, window))
    found = _compare(records, mixed)
    assert not found.differs
    assert found.kinds["predictions"].equal == count


ANY_IDS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 9)), max_size=30)


@given(ANY_IDS, ANY_IDS)
def test_records_are_joined_by_id_and_occurrence(ids_a: list[tuple[int, int]], ids_b: list[tuple[int, int]]) -> None:
    """Whatever the order, times and repeats: the n-th record of an id is compared with the n-th of that id."""
    with tempfile.TemporaryDirectory() as place:
        paths = []
        for name, ids in (("a", ids_a), ("b", ids_b)):
            run = _write(Path(place) / name, predictions=[_asked(key, minute) for key, minute in ids])
            paths.append(run / "predictions.jsonl")
        side_a, side_b = (Side(Lines(path, KINDS["predictions"])) for path in paths)
        join = Join(side_a, side_b)
        pairs = {(a.number, b.number) for a, b in join}
    assert pairs == _joined([key for key, _ in ids_a], [key for key, _ in ids_b])
    a, b = join.sides
    assert (a.left.count, b.left.count) == (len(ids_a) - len(pairs), len(ids_b) - len(pairs))
    assert len(a.waiting) == len(b.waiting) == 0


def _joined(ids_a: list[int], ids_b: list[int]) -> set[tuple[int, int]]:
    """The line numbers of all pairs, found slowly."""
    places = []
    for ids in (ids_a, ids_b):
        seen: Counter[int] = Counter()
        place = {}
        for number, key in enumerate(ids, 1):
            seen[key] += 1
            place[key, seen[key]] = number
        places.append(place)
    return {(number, places[1][key]) for key, number in places[0].items() if key in places[1]}


@given(st.permutations(range(20)), st.permutations(range(10, 30)), st.integers(1, 30))
def test_what_is_given_up_is_never_said_to_be_alone(ids_a: list[int], ids_b: list[int], limit: int) -> None:
    """With room for few waiting records, what is counted as only in one run is, and the rest as not compared."""
    found = _compare([_asked(key) for key in ids_a], [_asked(key) for key in ids_b], max_waiting=limit)
    kind = found.kinds["predictions"]
    assert kind.both <= 10
    assert kind.only_a <= 10
    assert kind.only_b <= 10
    assert kind.both + kind.only_a + kind.uncompared_a == len(ids_a)
    assert kind.both + kind.only_b + kind.uncompared_b == len(ids_b)
    if kind.first_only_a is not None:
        assert kind.first_only_a.key < 10


def test_no_more_than_declared_wait(tmp_path: Path) -> None:
    """Runs that share nothing hold only so many records in memory."""
    run = _write(tmp_path / "a", predictions=[_asked(i, i) for i in range(500)])
    other = _write(tmp_path / "b", predictions=[_asked(-i - 1, i) for i in range(500)])
    sides = [Side(Lines(path / "predictions.jsonl", KINDS["predictions"])) for path in (run, other)]
    most = 0

    def watch(_: Any) -> None:
        nonlocal most
        most = max(most, len(sides[0].waiting) + len(sides[1].waiting))

    sides[1]._seen = watch
    assert list(Join(sides[0], sides[1], max_waiting=40)) == []
    assert most == 40
    assert without_partner(sides[0], sides[1]) == []
    assert sides[0].left.count + sides[0].given_up.count == 500


def test_a_run_that_begins_later_is_joined_all_the_same() -> None:
    """A replay from the middle: what came before is only in A, though there is no room to hold it."""
    records = [_asked(i, i) for i in range(5_000)]
    kind = _compare(records, records[3_000:], max_waiting=100).kinds["predictions"]
    assert (kind.equal, kind.only_a, kind.only_b) == (2_000, 3_000, 0)
    assert (kind.uncompared_a, kind.uncompared_b) == (0, 0)
    assert kind.first_only_a is not None
    assert (kind.first_only_a.key, kind.first_only_a.line) == (0, 1)


def test_a_run_that_ends_sooner_needs_no_room() -> None:
    """A replay up to the middle: what came after is only in A."""
    records = [_asked(i, i) for i in range(3_000)]
    kind = _compare(records, records[:1_000], max_waiting=1).kinds["predictions"]
    assert (kind.equal, kind.only_a, kind.uncompared_a) == (1_000, 2_000, 0)
    assert kind.first_only_a is not None
    assert kind.first_only_a.line == 1_001


def test_one_wild_time_does_not_hold_a_file_back() -> None:
    """A question far in the future that only one run has: the other file does not wait for it to the end."""
    records = [_asked(i, i) for i in range(6 * LEAD)]
    wild = [*records[:50], _asked("wild", 10**8), *records[50:]]
    kind = _compare(wild, records, max_waiting=2 * LEAD).kinds["predictions"]
    assert (kind.equal, kind.only_a, kind.only_b) == (6 * LEAD, 1, 0)
    assert kind.uncompared_a == kind.uncompared_b == 0


def test_ids_of_another_type_are_others() -> None:
    """The number 1 and the text "1" are two ids."""
    kind = _compare([_asked(1)], [_asked("1")]).kinds["predictions"]
    assert (kind.both, kind.only_a, kind.only_b) == (0, 1, 1)


# -- comparing

VALUES = st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from([0.0, 0.5, 1.0]) | st.sampled_from(["", "a"])


@given(VALUES, VALUES)
def test_values_are_equal_as_json_has_them(a: Any, b: Any) -> None:
    """Numbers are equal as numbers; True is not 1, null is not 0 and not empty text."""
    plain = isinstance(a, int | float) and isinstance(b, int | float) and isinstance(a, bool) is isinstance(b, bool)
    assert same(a, b) is (a == b if plain or type(a) is type(b) else False)
    assert same({"x": [a]}, {"x": [b]}) is same(a, b)


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=30),
    st.data(),
    st.sampled_from(["output", "model", "version", "late", "time", "features"]),
)
def test_a_changed_line_is_always_found(outputs: list[float], data: st.DataObject, field: str) -> None:
    """One changed value among equal predictions is found, under its name, with its line and both values."""
    records = [_asked(i, i, output, x=output) for i, output in enumerate(outputs)]
    place = data.draw(st.integers(0, len(records) - 1))
    new: Any = {"output": 2.0, "model": "other", "version": 8, "late": True, "time": _at(-1), "features": {"x": 2.0}}[
        field
    ]
    values = {name: getattr(records[place], name) for name in Prediction.__struct_fields__} | {field: new}
    changed = [*records[:place], Prediction(**values), *records[place + 1 :]]
    kind = _compare(records, changed).kinds["predictions"]
    assert (kind.both, kind.equal) == (len(records), len(records) - 1)
    assert kind.first is not None
    assert (kind.first.key, kind.first.line_a, kind.first.line_b) == (place, place + 1, place + 1)
    named = "features.x" if field == "features" else field
    assert list(kind.first.fields) == [named]
    assert list(kind.parts if field == "features" else kind.fields) == [named.removeprefix("features.")]


def test_features_that_are_missing_are_counted() -> None:
    """null or nothing on one side counts as missing there; null is not nothing, and equals null."""
    a = [_asked(0, x=None), _asked(1, x=1.0), _asked(2, x=1.0), _asked(3, x=None), _asked(4)]
    b = [_asked(0, x=None), _asked(1, x=None), _asked(2), _asked(3, x=2.0), _asked(4, x=None)]
    change = _compare(a, b).kinds["predictions"].parts["x"]
    assert (change.differ, change.missing_a, change.missing_b, change.sizes) == (4, 1, 2, None)


def test_numbers_written_differently_are_no_difference() -> None:
    """1 and 1.0, and features in another order, are counted beside the equal ones."""
    found = _compare([_asked(0, output=1, x=0.0, y=2)], [_asked(0, output=1.0, y=2.0, x=-0.0)])
    assert not found.differs
    assert (found.kinds["predictions"].equal, found.kinds["predictions"].respelled) == (1, 1)


def test_integers_beyond_64_bits_are_compared_exactly() -> None:
    """Two large integers that are the same float are not the same."""
    kind = _compare([_asked(0, x=2**80)], [_asked(0, x=2**80 + 1)]).kinds["predictions"]
    sizes = kind.parts["x"].sizes
    assert sizes is not None
    assert (kind.equal, sizes.largest) == (0, 1.0)


def test_distributions_differ_by_their_label_that_differs_most() -> None:
    """A label without a probability has 0; what holds no numbers is just unequal."""
    assert distance({"a": 0.5, "b": 0.5}, {"a": 0.25, "c": 0.75}) == 0.75
    assert distance({"a": "x"}, {"a": "y"}) is None
    assert distance(-1e308, 1e308) == 1.7e308
    kind = _compare([_asked(0, output={"a": 1.0})], [_asked(0, output={"a": 0.5, "b": 0.5})]).kinds["predictions"]
    sizes = kind.fields["output"].sizes
    assert sizes is not None
    assert sizes.largest == 0.5


@given(st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=50))
def test_sizes_are_those_of_all_differences(sizes: list[float]) -> None:
    """The largest is exact, the mean within rounding, quantiles within 1 % of a difference that there is."""
    change = Change()
    for size in sizes:
        change.add(0.0, size)
    found = change.result().sizes
    assert found is not None
    assert (found.count, found.largest) == (len(sizes), max(sizes))
    assert found.mean == pytest.approx(sum(sizes) / len(sizes))
    for q, value in zip((0.5, 0.9, 0.99), found.quantiles.values(), strict=True):
        assert value == pytest.approx(sorted(sizes)[int(q * (len(sizes) - 1))], rel=0.0101)


def test_the_first_difference_is_the_first_of_a() -> None:
    """Also where the partner of a later line comes sooner."""
    a = [_asked("x", 0, 0.5), _asked("y", 0, 0.5)]
    b = [_asked("y", 0, 0.75), _asked("x", 0, 0.25)]
    first = _compare(a, b).kinds["predictions"].first
    assert first is not None
    assert (first.key, first.line_a, first.line_b) == ("x", 1, 2)
    assert first.fields == {"output": {"a": 0.5, "b": 0.25}}


def test_outcomes_are_compared_field_by_field() -> None:
    """Labels, their times, outputs and versions that differ are each counted."""
    a = [_answered(i, i) for i in range(5)]
    b = [
        _answered(0, 0, label=False), _answered(1, 1, label_minute=3), _answered(2, 2, output=0.75),
        _answered(3, 3, version=5), _answered(9, 4),
    ]  # fmt: skip
    kind = _compare(a, b, "outcomes").kinds["outcomes"]
    assert (kind.both, kind.equal, kind.only_a, kind.only_b) == (4, 0, 1, 1)
    assert {name: change.differ for name, change in kind.fields.items()} == {
        "label": 1, "label_time": 1, "output": 1, "version": 1
    }  # fmt: skip
    assert kind.first is not None
    assert kind.first.fields == {"label": {"a": True, "b": False}}


def test_rejects_are_compared_by_where_they_were_read() -> None:
    """A record refused for another reason, and one that only one run refused."""
    a = [reject("late", "too late", "events.jsonl:3", b"{}"), reject("empty", "", "events.jsonl:5", b"")]
    b = [reject("invalid", "too late", "events.jsonl:3", b"{}")]
    kind = _compare(a, b, "rejects").kinds["rejects"]
    assert (kind.both, kind.equal, kind.only_a) == (1, 0, 1)
    assert list(kind.fields) == ["reason"]


# -- files


def test_a_last_line_that_is_cut_off_is_left_out_and_said(tmp_path: Path) -> None:
    """A run that is still writing can be compared up to what it has written."""
    records = [_asked(i, i) for i in range(3)]
    a, b = _write(tmp_path / "a", predictions=records), _write(tmp_path / "b", predictions=records)
    for cut in (1, 20, 90):
        whole = encode_lines(records)
        (b / "predictions.jsonl").write_bytes(whole[:-cut])
        kind = compare(a, b).kinds["predictions"]
        # Without its end of line alone the last record is whole.
        assert (kind.equal, kind.only_a, kind.file_b.cut) == ((3, 0, None) if cut == 1 else (2, 1, 3))
    assert f"{b / 'predictions.jsonl'}:3: the last line is not complete" in _millrace(a, b).output


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff\xfe", b'{"record": "outcome"}', b"\0\0\0"])
def test_a_damaged_line_is_an_error_that_says_where(tmp_path: Path, damage: bytes) -> None:
    """Lines before the last that are no predictions end the comparison, by file and line."""
    a, b = (_write(tmp_path / name, predictions=[_asked(0)]) for name in "ab")
    lines = encode_lines([_asked(0)]).splitlines()
    (b / "predictions.jsonl").write_bytes(b"\n".join([lines[0], damage, lines[0], b""]))
    with pytest.raises(InputError, match=r"predictions\.jsonl:2: not a prediction"):
        compare(a, b)
    result = _millrace(a, b)
    assert result.exit_code == 2
    assert "predictions.jsonl:2" in result.stderr


def test_lone_surrogates_are_read(tmp_path: Path) -> None:
    """Text that only the standard library writes is compared as well."""
    runs = [_write(tmp_path / name, predictions=[_asked(0, x=f"\ud800{name}")]) for name in "ab"]
    assert compare(runs[0], runs[1]).kinds["predictions"].parts["x"].differ == 1


def test_without_any_predictions_there_is_nothing_to_compare(tmp_path: Path) -> None:
    """No directory, or two without predictions: an error with a hint."""
    with pytest.raises(JobError, match=r"missing is not a directory\. Hint"):
        compare(tmp_path, tmp_path / "missing")
    with pytest.raises(JobError, match=r"there are no predictions in .* Hint"):
        compare(tmp_path, _write(tmp_path / "b", predictions=[]))
    assert _millrace(tmp_path, tmp_path).exit_code == 2


# -- metrics over time


def test_metrics_are_put_side_by_side_at_the_same_moments() -> None:
    """Reports at other times: each run has what it had last reported, where both had begun and neither had ended."""
    a = [_reported(0, 1, MAE=0.5), _reported(10, 2, MAE=0.25), _reported(30, 3, MAE=0.125)]
    b = [_reported(5, 1, MAE=0.75), _reported(10, 2, MAE=None), _reported(20, 4, MAE=1.0), _reported(99, 9, MAE=2.0)]
    moments = side_by_side(a, b)
    assert [(moment.time, moment.values["MAE"], moment.outcomes) for moment in moments] == [
        (_at(5), (0.5, 0.75, 0.25), (1, 1, 0)),
        (_at(10), (0.25, None, None), (2, 2, 0)),
        (_at(20), (0.25, 1.0, 0.75), (2, 4, 2)),
        (_at(30), (0.125, 1.0, 0.875), (3, 4, 1)),
    ]
    assert side_by_side(a, []) == side_by_side(a[:1], b) == []


@given(st.integers(1, 400), st.integers(1, 10))
def test_moments_are_few_and_end_with_the_last(count: int, limit: int) -> None:
    """However many reports there are, so many moments at most, the last report among them."""
    reports = [_reported(i, i) for i in range(count)]
    moments = side_by_side(reports, reports, limit)
    assert len(moments) == min(count, limit)
    assert moments[-1].time == reports[-1].time


# -- the command


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    """A run, and one that differs from it in one output and all metrics after the first."""
    predictions = [_asked(f"[red]p-{i}", i * 600, 0.5, x=0.25) for i in range(10)]
    metrics = [_reported(i * 600, i, **{"MAE": 0.5, "MAE_rolling_100": 0.5, "$R^2$": None}) for i in range(1, 9)]
    a = _write(tmp_path / "as it was", predictions=predictions, metrics=metrics, outcomes=[], rejects=[])
    predictions[4] = _asked("[red]p-4", 2400, 0.75, x=0.25)
    metrics[1:] = [_reported(i * 600, i, **{"MAE": 0.25, "MAE_rolling_100": 0.25, "$R^2$": 0.5}) for i in range(2, 9)]
    return a, _write(tmp_path / "what [if]", predictions=predictions, metrics=metrics)


def test_the_exit_code_says_whether_anything_differs(runs: tuple[Path, Path]) -> None:
    """0 for a run and itself, 1 for a run and another, 2 for what cannot be compared."""
    assert _millrace(runs[0], runs[0]).exit_code == 0
    assert _millrace(*runs).exit_code == 1
    assert _millrace(*runs, "--json").exit_code == 1
    assert _millrace(runs[0], "nowhere").exit_code == 2
    assert "nothing differs" in _millrace(runs[0], runs[0]).output


def test_the_tables_show_what_differs(runs: tuple[Path, Path]) -> None:
    """Names are no markup; the first difference has both values, metrics have both and their difference."""
    text = _millrace(*runs).output
    assert 'first prediction that differs: "[red]p-4", event time 2026-01-02T16:00:00Z (line 5 of A, 5 of B)' in text
    assert "what [if]/outcomes.jsonl: taken as empty" in text
    assert "MAE last 100" in text
    assert "-0.25" in text
    rows = [line.split() for line in text.splitlines()]
    assert ["predictions", "10", "9", "1", "0", "0", "0"] in rows
    assert ["output", "0.5", "0.75"] in rows


def test_the_json_has_all_of_it(runs: tuple[Path, Path]) -> None:
    """One object: counts, fields, sizes, the first difference, the moments."""
    found = json.loads(_millrace(*runs, "--json").stdout)
    assert found["differs"] is True
    assert set(found["kinds"]) == {"predictions", "outcomes", "metrics", "rejects"}
    output = found["kinds"]["predictions"]["fields"]["output"]
    assert (output["differ"], output["sizes"]["largest"]) == (1, 0.25)
    assert found["kinds"]["predictions"]["first"]["fields"] == {"output": {"a": 0.5, "b": 0.75}}
    assert found["moments"][-1]["values"]["MAE"] == [0.5, 0.25, -0.25]
    assert found["kinds"]["rejects"]["file_b"]["missing"] is True


def test_what_was_given_up_is_said(tmp_path: Path) -> None:
    """Too many records without a counterpart: how many were not compared, and what helps."""
    a = _write(tmp_path / "a", predictions=[_asked(i) for i in range(50)])
    b = _write(tmp_path / "b", predictions=[_asked(i) for i in reversed(range(50))])
    result = _millrace(a, b, "--max-waiting", 10)
    assert result.exit_code == 1
    assert "were not compared: too many waited for their counterpart. Hint: a larger --max-waiting" in result.output
    assert _millrace(a, b, "--max-waiting", 100).exit_code == 0


def test_the_picture_shows_both_lines_where_they_coincide(runs: tuple[Path, Path], tmp_path: Path) -> None:
    """A run and itself: the lines of both are there, one over the other, and the page has all numbers."""
    result = _millrace(runs[0], runs[0], "--directory", tmp_path / "new")
    assert result.exit_code == 0
    pixels = matplotlib.image.imread(io.BytesIO((tmp_path / "new" / "diff.png").read_bytes()))[..., :3]
    for colour in cli_diff.COLOURS:
        wanted = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        assert (abs(pixels - wanted).max(axis=2) < 0.02).sum() > 2_000
    _millrace(*runs, "--directory", tmp_path / "new")
    page = (tmp_path / "new" / "diff.html").read_text("utf-8")
    assert "what [if]" in page
    assert "$R^2$ B − A" in page
    assert page.count("<tr>") == 9


def test_runs_without_metrics_have_a_picture_too(tmp_path: Path) -> None:
    """One run without reports, or both: nothing fails."""
    a = _write(tmp_path / "a", predictions=[_asked(0)])
    b = _write(tmp_path / "b", predictions=[_asked(0)])
    assert _millrace(a, b, "--directory", tmp_path).exit_code == 0
    _write(b, metrics=[_reported(0, 1, MAE=0.5)])
    assert _millrace(a, b, "--directory", tmp_path).exit_code == 1


def test_on_a_terminal_long_work_shows_how_far_it_is(runs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The bar names the kind that is read, on standard error, and is gone at the end."""
    shown = io.StringIO()
    monkeypatch.setattr(cli_diff, "errors", Console(file=shown, force_terminal=True))
    monkeypatch.setattr(cli_diff, "_PATIENCE_S", -1.0)
    assert _millrace(*runs).exit_code == 1
    assert "comparing" in shown.getvalue()
    assert total_bytes(*runs) == sum(file.stat().st_size for run in runs for file in run.iterdir())
