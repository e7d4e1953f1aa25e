"""Training sets: predictions.jsonl and outcomes.jsonl joined; computed again the same, or it is told where not.

What runs are real runs, some killed with -9; the joins here are naive, and so is what reads the files.
"""

from __future__ import annotations

import csv
import json
import shutil
import time
from collections import defaultdict, deque
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

from tests.scenarios import running
from tests.scenarios.learning import ARRIVAL, FIELDS, LABEL, MODEL, PER_SHOP, Made, Place, command, payments, some
from tests.scenarios.test_audit import change_feature, change_label
from tests.scenarios.test_keystone import kill_all

OWN = ("prediction", "model", "version", "late", "label", "label_time", "assumed")
STREAM = 'Label(Jsonl("VERDICTS", Verdict), field="fraud", horizon="20m"'
TOUCHY = """class Touchy(linear_model.LogisticRegression):
    def predict_proba_one(self, x):
        if x["amount"] > 98:
            raise ValueError("too much")
        return super().predict_proba_one(x)

    def learn_one(self, x, y):
        if x["amount"] > 90:
            raise ValueError("too much to learn")
        super().learn_one(x, y)


CARD = """
MIXED = """Fields("amount", "count", "kind", "good"),
    Derived(lambda e: e.y if e.y % 2 else e.y / 2, "mixed"), Derived(lambda e: 2**60 + e.y, "wide"),
    Derived(lambda e: 10**30 if e.y else 0, "huge"), Derived(lambda e: e.kind * 2, "label"),
    Derived(lambda e: e.amount, "version"), Derived(lambda e: e.y if e.y > 3 else e.kind, "either")"""
VARIANTS: dict[str, list[tuple[str, str]]] = {
    "global": [],
    "arrival": [ARRIVAL],
    "per shop": [PER_SHOP],
    "mixed": [(FIELDS, MIXED), (MODEL, "dummy.PriorClassifier()")],
    "classes": [(FIELDS, 'Fields("amount", "count")'), (", SHOP]", "]"), ('field="fraud"', 'field="kind"'),
                (MODEL, "tree.HoeffdingTreeClassifier(grace_period=30)"), ("metrics.ROCAUC()", "metrics.Accuracy()")],
    "regressor": [(", SHOP]", "]"), ('field="fraud"', 'field="y"'), ("metrics.ROCAUC()", "metrics.MAE()"),
                  (MODEL, "preprocessing.StandardScaler() | linear_model.LinearRegression()")],
    "unsupervised": [(MODEL, "preprocessing.MinMaxScaler() | anomaly.HalfSpaceTrees(n_trees=3, height=3, seed=1)")],
    "assumed": [(LABEL, STREAM + ", otherwise=False)")],
    "discarded": [(LABEL, STREAM + ")")],
    "revised": [(LABEL, STREAM + ', revisions="last")')],
    "repeated ids": [("    audit=", "    max_ids=10,\n    audit=")],
    "touchy": [("CARD = ", TOUCHY), (MODEL, "Touchy()")],
}  # fmt: skip
COUNT = 400


def verdicts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A verdict for three of four payments, some of them revised, at times out of the order of the payments."""
    found = [{"id": r["id"], "t": r["t"] + 200 + r["id"] % 9 * 50, "fraud": r["fraud"]} for r in rows if r["id"] % 4]
    found += [{"id": r["id"], "t": r["t"] + 900, "fraud": not r["fraud"]} for r in rows if r["id"] % 13 == 5]
    return sorted(found, key=lambda verdict: verdict["t"])


def run_variant(path: Path, name: str) -> Place:
    """A run of a job, to its end."""
    labels = path / "verdicts.jsonl"
    place = Place(path, *[(old, new.replace("VERDICTS", str(labels))) for old, new in VARIANTS[name]], events=0)
    rows = payments(0, COUNT)
    labels.write_text("".join(json.dumps(verdict) + "\n" for verdict in verdicts(rows)))
    if name == "repeated ids":
        rows = [row | {"id": row["id"] % 50} for row in rows]
    place.feed(rows)
    place.run()
    return place


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Place]:
    """A run of each kind."""
    path = tmp_path_factory.mktemp("datasets")
    return Made(lambda name: run_variant(path / name.replace(" ", "_"), name))


@pytest.fixture(scope="module")
def plain(places: dict[str, Place]) -> Place:
    """A run that nothing happened to."""
    return places["global"]


def joined(out: Path) -> list[dict[str, Any]]:
    """Predictions and outcomes, joined by id and turn; in the order of their times and ids."""
    outcomes: dict[Any, deque[dict[str, Any]]] = defaultdict(deque)
    for outcome in running.records(out, "outcomes"):
        outcomes[outcome["id"], outcome["time"]].append(outcome)
    rows = []
    for said in running.records(out, "predictions"):
        found = outcomes[said["id"], said["time"]]
        known = found.popleft() if found else {"label": None, "label_time": None, "assumed": False}
        features = {f"feature_{name}" if name in OWN else name: value for name, value in said["features"].items()}
        own = {"prediction": said["output"], **{name: said[name] for name in ("model", "version", "late")}}
        label = {name: known[name] for name in ("label", "label_time", "assumed")}
        rows.append({"id": said["id"], "time": said["time"]} | features | own | label)
    return sorted(rows, key=lambda row: (row["time"], str(row["id"])))


def in_order(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows in the order of `joined`."""
    return sorted(rows, key=lambda row: (row["time"], str(row["id"])))


def dataset(place: Place, *options: str, name: str = "x.jsonl", out: Path | None = None) -> tuple[int, dict[str, Any]]:
    """`millrace dataset --json`: exit code, and what it told."""
    file = (out or place.out) / "sets" / name
    done = place.command("dataset", "--output", str(file), "--json", *options, out=out)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def lines(file: str | Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl file."""
    return [json.loads(line) for line in Path(file).read_bytes().splitlines()]


def assert_whole(place: Place, *options: str) -> list[dict[str, Any]]:
    """All rows are those of the join, and computed again the same; the rows."""
    code, told = dataset(place, *options)
    assert code == 0, told
    expected = joined(place.out)
    rows = lines(told["file"])
    assert in_order(rows) == expected
    labelled = sum(row["label_time"] is not None for row in expected)
    assert (told["rows"], told["labelled"]) == (len(expected), labelled)
    skew = told["skew"]
    assert (skew["rows"], skew["equal"]) == (len(expected), len(expected) - skew["unchecked"])
    return rows


@pytest.mark.parametrize("name", some(VARIANTS, "global", "arrival", "mixed"))
def test_rows_are_predictions_and_outcomes_joined(places: dict[str, Place], name: str) -> None:
    """Whatever model and label a job has: all columns, floats exactly, and no skew."""
    rows = assert_whole(places[name])
    assert len(rows) == len(running.records(places[name].out, "predictions")) > COUNT * 0.9
    unknown = [row for row in rows if row["label_time"] is None]
    assert bool(unknown) == (name in ("discarded", "revised", "touchy"))
    assert any(row["assumed"] for row in rows) == (name == "assumed")


def expected_cell(value: Any) -> Any:
    """A value as a cell of CSV has it; what has parts is read back."""
    if isinstance(value, dict):
        return value
    return "" if value is None else str(value)


@pytest.mark.parametrize("name", some(VARIANTS, "mixed"))
def test_csv_and_parquet_hold_the_same(places: dict[str, Place], name: str) -> None:
    """Read with other programs, every cell is that of the join; numbers are numbers where all of a column are."""
    place = places[name]
    expected = joined(place.out)
    _, told = dataset(place, "--no-check", name="x.csv")
    with Path(told["file"]).open(newline="") as file:
        cells: list[dict[str, Any]] = list(csv.DictReader(file))
    times = ("time", "label_time")
    for row in cells:
        for column in times:
            row[column] = row[column].replace("+00:00", "Z")
        row["prediction"] = json.loads(row["prediction"]) if row["prediction"].startswith("{") else row["prediction"]
    wanted = [{column: expected_cell(value) for column, value in row.items()} for row in expected]
    assert sorted(map(repr, cells)) == sorted(map(repr, wanted))
    _, told = dataset(place, "--no-check", name="x.parquet")
    table = parquet.read_table(told["file"])
    assert table.column_names == list(expected[0])
    found = sorted(table.to_pylist(), key=lambda row: (row["time"], str(row["id"])))
    for row, want in zip(found, expected, strict=True):
        for column, value in want.items():
            if column in times:
                assert row[column] == (None if value is None else datetime.fromisoformat(value))
            elif isinstance(value, dict):
                assert json.loads(row[column]) == value
            elif isinstance(row[column], str):
                assert row[column] == str(value)
            else:
                assert repr(row[column]) == repr(value) or row[column] == float(value)
    if name == "mixed":
        kinds = {field.name: str(field.type) for field in table.schema}
        assert [kinds[each] for each in ("amount", "count", "kind", "good", "mixed", "wide", "huge", "either")] == [
            "double", "int64", "string", "bool", "double", "int64", "string", "string",
        ]  # fmt: skip


def test_a_span_takes_from_and_leaves_until(plain: Place) -> None:
    """The first event time is included, the last is not; labels that came after the span are there."""
    expected = joined(plain.out)
    begin, end = expected[100]["time"], expected[150]["time"]
    code, told = dataset(plain, "--from", begin, "--until", end)
    assert code == 0
    assert lines(told["file"]) == expected[100:150]
    assert (told["labelled"], told["skew"]["equal"]) == (50, 50)


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_an_empty_span_gives_an_empty_file(plain: Place, suffix: str) -> None:
    """No row, and still the columns, where the format has them; the check finds nothing to object to."""
    code, told = dataset(plain, "--from", "2020-01-01", name=f"none{suffix}")
    assert (code, told["rows"], told["skew"]["rows"]) == (0, 0, 0)
    columns = list(joined(plain.out)[0])
    if suffix == ".parquet":
        assert parquet.read_table(told["file"]).column_names == columns
    elif suffix == ".csv":
        assert Path(told["file"]).read_text().strip() == ",".join(columns)
    else:
        assert Path(told["file"]).read_bytes() == b""


@pytest.mark.thorough
def test_a_killed_run_has_every_row_once(tmp_path: Path) -> None:
    """Killed with -9 twice and resumed; before the resume too the file agrees with itself."""
    place = Place(tmp_path, ARRIVAL, events=200)
    place.kill(after=60)
    code, told = dataset(place)
    assert (code, told["rows"] == told["skew"]["equal"]) == (0, True)
    place.feed(payments(200, 400))
    place.kill(after=250)
    place.run()
    assert len(assert_whole(place)) == 400


def test_a_branch_has_the_rows_of_its_own_way(tmp_path: Path) -> None:
    """After going back, what the left branch was asked is not there; a span before the fork is checked as well."""
    place = Place(tmp_path)
    place.run()
    origin = place.middle()
    place.feed(payments(400, 500))
    place.run("--from", origin)
    rows = assert_whole(place)
    assert len(rows) == 500
    code, told = dataset(place, "--from", rows[50]["time"], "--until", rows[450]["time"])
    assert (code, told["rows"], told["skew"]["equal"]) == (0, 400, 400)


def test_features_that_were_added_are_missing_before(tmp_path: Path) -> None:
    """Columns differ between the parts of a run: files have all of them, and what cannot be compared is counted."""
    place = Place(tmp_path)
    place.run()
    place.feed(payments(400, 600))
    place.declare((FIELDS, 'Fields("amount", "y")'), ("[Count(), Mean", "[Count(), Sum('amount'), Mean"))
    place.run()
    code, told = dataset(place)
    assert code == 0, told
    assert (told["skew"]["unchecked"], told["skew"]["equal"]) == (400, 200)
    assert in_order(lines(told["file"])) == joined(place.out)
    for suffix in (".csv", ".parquet"):
        code, told = dataset(place, "--no-check", name=f"x{suffix}")
        assert (code, told["rows"]) == (0, 600)
    values = parquet.read_table(told["file"]).to_pydict()
    assert values["y"] == [None] * 400 + [i % 7 for i in range(400, 600)]
    assert list(values)[-len(OWN) :] == list(OWN)


@pytest.mark.thorough
def test_features_that_went_are_missing_after(tmp_path: Path) -> None:
    """A feature that the job has no more stays a column, with the values it had."""
    place = Place(tmp_path, (FIELDS, 'Fields("amount", "y")'))
    place.run()
    place.feed(payments(400, 500))
    place.declare()
    place.run()
    code, told = dataset(place, name="x.parquet")
    assert (code, told["skew"]["unchecked"], told["skew"]["equal"]) == (0, 400, 100)
    assert parquet.read_table(told["file"]).to_pydict()["y"] == [i % 7 for i in range(400)] + [None] * 100


@pytest.mark.thorough
def test_models_that_began_anew_keep_their_names(tmp_path: Path) -> None:
    """With another model, and one for each shop, rows from before name the model that answered then."""
    place = Place(tmp_path)
    place.run()
    place.feed(payments(400, 500))
    place.declare(PER_SHOP, (MODEL, "tree.HoeffdingTreeClassifier()"))
    place.run("--reset", "learner")
    rows = assert_whole(place)
    names = {row["model"] for row in rows}
    assert names == {"LogisticRegression", *(f"HoeffdingTreeClassifier/shop=s{i}" for i in range(4))}


@pytest.mark.thorough
def test_while_the_run_goes_on_nothing_is_skewed(tmp_path: Path) -> None:
    """The learn log, the order log and the outputs are at different places, and the file agrees with itself."""
    place = Place(tmp_path, events=3000)
    process = running.start(str(place.file), place.out, "--groups", "4", "--batch-size", "10", "--follow",
                            "--checkpoint", "0.1")  # fmt: skip
    try:
        found = []
        for _ in range(200):
            if (place.out / "predictions.jsonl").exists() and list(place.out.glob("state/checkpoints/*.json")):
                break
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.05)
        for number in range(3):
            code, told = dataset(place, name=f"{number}.jsonl")
            assert code == 0, told
            assert told["rows"] == told["skew"]["equal"]
            found.append(told["rows"])
        assert found == sorted(found)
    finally:
        kill_all(process.pid)
        process.communicate()


def forged(place: Place, name: str, change: Callable[[Path, int], None]) -> tuple[dict[str, Any], Path]:
    """A copy of a run in which something was changed of payment 123; what the dataset tells."""
    out = place.path / name
    shutil.copytree(place.out, out)
    change(out, 123)
    code, told = dataset(place, out=out)
    assert code == 1, told
    return told["skew"], out


def test_a_changed_feature_is_named(plain: Place) -> None:
    """One feature of one question, with its checksum: the id, the column, both values."""
    skew, out = forged(plain, "forged_feature", change_feature)
    [unlike] = skew["unlike"]
    assert (unlike["id"], list(unlike["columns"]), skew["others"]) == (123, ["amount"], 1)
    logged, computed = unlike["columns"]["amount"]
    assert logged == computed + 1.0
    said = plain.command("dataset", "--output", str(out / "x.csv"), out=out)
    assert said.returncode == 1
    assert "1 of 400 rows are others" in said.stdout
    assert "amount" in said.stdout
    assert "123" in said.stdout


def test_a_changed_label_is_named(plain: Place) -> None:
    """One label, with its checksum."""
    skew, _ = forged(plain, "forged_label", change_label)
    [unlike] = skew["unlike"]
    assert (unlike["id"], list(unlike["columns"])) == (123, ["label"])


def test_without_a_check_nothing_is_computed(plain: Place) -> None:
    """With --no-check a forged log is believed, and the inputs need not be there."""
    code, told = dataset(plain, "--no-check", "--data", "/dev/null")
    assert (code, "skew" in told, told["rows"]) == (0, False, 400)


def test_an_input_that_was_changed_since_is_told(tmp_path: Path) -> None:
    """One amount in the file of events: this question and those of the same card after it are others."""
    place = Place(tmp_path)
    place.run()
    text = place.events.read_text().splitlines()
    text[200] = json.dumps(json.loads(text[200]) | {"amount": 50.5})
    place.events.write_text("\n".join(text) + "\n")
    code, told = dataset(place)
    assert code == 1
    first = told["skew"]["unlike"][0]
    assert first["id"] == 200
    assert "amount" in first["columns"]
    assert 1 < told["skew"]["others"] <= 200
    place.events.write_text("\n".join(text[:300]) + "\n")
    done = place.command("dataset", "--output", str(tmp_path / "x.csv"))
    assert done.returncode == 1
    assert "300" in done.stderr or "events.jsonl" in done.stderr


@pytest.mark.thorough
def test_code_that_was_changed_since_is_told(tmp_path: Path) -> None:
    """A function of the job that gives something else by now: trained again, the model would not be what it is."""
    place = Place(tmp_path, (FIELDS, 'Fields("amount"), Derived(lambda e: e.amount * 2, "double")'))
    place.run()
    place.declare((FIELDS, 'Fields("amount"), Derived(lambda e: e.amount * 3, "double")'))
    code, told = dataset(place)
    assert (code, told["skew"]["others"]) == (1, 400)
    assert "double" in told["skew"]["unlike"][0]["columns"]


@pytest.mark.thorough
def test_what_is_not_kept_any_more_is_no_skew(tmp_path: Path) -> None:
    """With a retention the file has the newest rows; that the older ones are gone is said."""
    place = Place(tmp_path, ("Audit(every=100)", 'Audit(every=100, keep="20m")'))
    place.run()
    code, told = dataset(place)
    assert code == 0, told
    assert 50 < told["rows"] < 400
    assert told["skew"]["not_kept"] == 400 - told["rows"]
    assert in_order(lines(told["file"])) == joined(place.out)[-told["rows"] :]


def test_what_is_asked_wrongly_is_said(plain: Place, tmp_path: Path) -> None:
    """Another suffix, a directory, a time that is none: one line each, and nothing is written."""
    for options, said in (
        (("--output", str(tmp_path / "x.xls")), ".parquet, .csv, .jsonl"),
        (("--output", str(tmp_path)), "a dataset is one of"),
        (("--output", str(tmp_path / "x.csv"), "--from", "soon"), "neither `start` nor an event time"),
    ):
        done = plain.command("dataset", *options)
        assert done.returncode == 1
        assert said in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_without_a_learn_log_there_is_no_dataset(tmp_path: Path) -> None:
    """A job with audit=None says so."""
    place = Place(tmp_path, ("audit=Audit(every=100)", "audit=None"), events=50)
    place.run()
    done = place.command("dataset", "--output", str(tmp_path / "x.csv"))
    assert done.returncode == 1
    assert "audit=None" in done.stderr
    done = command("dataset", str(place.file), "--output", str(tmp_path / "x.csv"), "--directory", str(tmp_path / "no"))
    assert "holds no state" in done.stderr
