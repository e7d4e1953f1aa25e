"""Changing a job that has state: what each change does to it, and how the state lies afterwards."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from river import compose, linear_model, metrics, optim, preprocessing, stats, utils

from dataflows import Event, Job, Jsonl, Label, Time
from dataflows.changes import Change, compare, declared, describe, expiry, first_layout, gone_names, next_layout
from dataflows.pickles import names_of
from dataflows.settings import Layout
from dataflows.state import Lineage, StateError, StateStore, Version
from features import Count, Derived, Entity, EntityFeatures, Fields, Hopping, Max, Mean, River, Sum, Tumbling
from features.parts import FeatureParts
from tests.scenarios import running


class Sale(Event, id="id", time="t", unit="s"):
    id: int
    t: int
    card: str
    shop: str
    amount: float
    y: bool


class Verdict(Event, id="id", time="t", unit="s"):
    id: int
    t: int
    y: bool


def is_large(sale: Sale) -> bool:
    """A filter, and a derived feature."""
    return sale.amount > 100


def is_small(sale: Sale) -> bool:
    """Another."""
    return sale.amount < 10


CARD = Entity("card", [Count(), Mean("amount")], over=["1h", "6h"])
SHOP = Entity("shop", [Mean("y")], over="6h", of="labels")
LOGISTIC = preprocessing.StandardScaler() | linear_model.LogisticRegression(optimizer=optim.SGD(0.1))


def job(**changed: Any) -> Job:
    """A job with two feature steps and two metrics, with some parts changed."""
    parts: dict[str, Any] = {
        "name": "sales",
        "events": Jsonl("events.jsonl", Sale),
        "features": [Fields("amount"), CARD, SHOP],
        "model": LOGISTIC,
        "label": Label(Jsonl("labels.jsonl", Verdict), field="y", horizon="1d", otherwise=False),
        "metrics": [metrics.ROCAUC(), metrics.FBeta(beta=2.0)],
        "time": Time(lateness="10m"),
    }
    return Job(**(parts | changed))


def card(**changed: Any) -> dict[str, Any]:
    """The features with another declaration of the cards'."""
    parts: dict[str, Any] = {"key": "card", "aggregates": [Count(), Mean("amount")], "over": ["1h", "6h"]}
    parts |= changed
    return {"features": [Fields("amount"), Entity(parts.pop("key"), parts.pop("aggregates"), **parts), SHOP]}


def features(*some: Any) -> dict[str, Any]:
    """Other features altogether."""
    return {"features": list(some)}


def label(**changed: Any) -> dict[str, Any]:
    """Another label of the same stream."""
    return {"label": Label(Jsonl("labels.jsonl", Verdict), **({"field": "y", "horizon": "1d"} | changed))}


def effects(before: Job, now: Job, *reset: str, groups: int = 16) -> list[Change]:
    """What `compare` says of a job against the state of another, whose description lay on the disk."""
    kept = msgspec.json.decode(msgspec.json.encode(describe(before, 16)))
    return compare(kept, describe(now, groups), reset)


NEW, GONE = "is new and starts empty", "is gone and dropped"
RENAMED = Entity("card", [Count(), Mean("amount")], over=["1h", "6h"], name="customer")

TAKEN: dict[str, tuple[dict[str, Any], list[tuple[str, str]]]] = {
    "nothing": ({}, []),
    "inputs": ({"events": Jsonl("other.jsonl", Sale)}, []),
    "how long a question waits": (label(horizon="2d", otherwise=False), []),
    "an aggregate more": (
        card(aggregates=[Count(), Mean("amount"), Max("amount")]),
        [("features_card", f"amount_max_{over}_by_card {NEW}") for over in ("1h", "6h")],
    ),
    "an aggregate less": (
        card(aggregates=[Mean("amount")]),
        [("features_card", f"count_{over}_by_card {GONE}") for over in ("1h", "6h")],
    ),
    "an aggregate for another": (
        card(aggregates=[Count(), Sum("amount")]),
        [("features_card", f"amount_sum_{over}_by_card {NEW}") for over in ("1h", "6h")]
        + [("features_card", f"amount_mean_{over}_by_card {GONE}") for over in ("1h", "6h")],
    ),
    "a window more": (
        card(over=["1h", "6h", "1d"]),
        [("features_card", f"{name}_1d_by_card {NEW}") for name in ("count", "amount_mean")],
    ),
    "a window less": (
        card(over="6h"),
        [("features_card", f"{name}_1h_by_card {GONE}") for name in ("count", "amount_mean")],
    ),
    "the order of aggregates": (
        card(aggregates=[Mean("amount"), Count()]),
        [("features", "their order changed, their state stays")],
    ),
    "a step more": (
        features(Fields("amount"), CARD, SHOP, Entity(["card", "shop"], Count())),
        [("features_card_and_shop", "count_by_card_and_shop: new, starts empty")],
    ),
    "a step less": (
        features(Fields("amount"), CARD),
        [("features_shop", "y_mean_6h_by_shop: gone, dropped")],
    ),
    "a feature of the event alone": (
        features(Fields("amount"), Derived(is_large), CARD, SHOP),
        [("features", "those of the event alone changed; they have no state")],
    ),
    "a metric more": (
        {"metrics": [metrics.Accuracy(), metrics.ROCAUC(), metrics.FBeta(beta=2.0)]},
        [("publish", f"metric Accuracy {NEW}")],
    ),
    "a metric less": ({"metrics": [metrics.FBeta(beta=2.0)]}, [("publish", f"metric ROCAUC {GONE}")]),
    "a metric over another window": (
        {"metrics": [metrics.FBeta(beta=2.0), utils.Rolling(metrics.ROCAUC, window_size=10)]},
        [("publish", f"metric ROCAUC_rolling_10 {NEW}"), ("publish", f"metric ROCAUC {GONE}")],
    ),
}


@pytest.mark.parametrize("change", TAKEN)
def test_what_is_added_starts_empty_and_what_is_removed_is_dropped(change: str) -> None:
    """Additions and removals are taken, each said with the feature's or metric's name; nothing else is said."""
    changed, expected = TAKEN[change]
    assert effects(job(), job(**changed)) == [Change(*each) for each in expected]


REFUSED: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "a window of another length": (card(over=["1h", "1d"]), "features_card", ["window 6h is 1d now"]),
    "a window of another kind": (card(over=["1h", Tumbling("6h")]), "features_card", ["6h is tumbling_6h now"]),
    "the key": (card(key="shop", name="card"), "features_card", ["key was ['card'] and is ['shop']"]),
    "which events": (card(where=is_large), "features_card", ["where was None and is '<function is_large>'"]),
    "the ttl": (card(ttl="30d"), "features_card", ["ttl was None and is 2592000000000"]),
    "events or labels": (card(of="labels"), "features_card", ["of was 'events' and is 'labels'"]),
    "the name of a step": (
        features(Fields("amount"), RENAMED, SHOP),
        "features_customer",
        ["step features_card is gone and this one is new", "its state would be lost"],
    ),
    "the class of the model": (
        {"model": linear_model.LogisticRegression(optimizer=optim.SGD(0.1))},
        "learner",
        ["model was (StandardScaler(", "and is LogisticRegression("],
    ),
    "a parameter of the model": (
        {"model": preprocessing.StandardScaler() | linear_model.LogisticRegression(optimizer=optim.SGD(0.100000001))},
        "learner",
        ["learning_rate=0.1)", "and is", "learning_rate=0.100000001"],
    ),
    "one model for each": ({"per": ("shop",)}, "learner", ["per was [] and is ['shop']"]),
    "a parameter of a metric": (
        {"metrics": [metrics.ROCAUC(), metrics.FBeta(beta=1.0)]},
        "publish",
        ["metric FBeta was FBeta(beta=2.0", "and is FBeta(beta=1.0"],
    ),
}


@pytest.mark.parametrize("change", REFUSED)
def test_a_change_of_meaning_is_refused_until_its_step_is_reset(change: str) -> None:
    """What would keep state under another meaning is refused with old and new; --reset of that step alone takes it."""
    changed, step, texts = REFUSED[change]
    now = job(**changed)
    refused = [each for each in effects(job(), now) if each.refused]
    assert {each.step for each in refused} == {step}
    for text in texts:
        assert any(text in each.text for each in refused), refused
    others = {"features_card", "features_shop", "features_customer", "learner", "publish"} - {step}
    assert [each for each in effects(job(), now, *others) if each.refused] == refused
    taken = effects(job(), now, step)
    assert not [each for each in taken if each.refused]
    assert [each for each in taken if each.step == step and ("anew" in each.text or "starts empty" in each.text)]


STUCK: dict[str, tuple[dict[str, Any], str, str]] = {
    "name": ({"name": "sold"}, "job", "name was 'sales' and is 'sold'"),
    "order": ({"time": Time(order="arrival", lateness="10m")}, "read", "order was 'event_time' and is 'arrival'"),
    "lateness": ({"time": Time(lateness="20m")}, "read", "lateness was 600000000 and is 1200000000"),
    "label field": (label(field="id") | features(Fields("amount"), CARD), "admit", "field was 'y' and is 'id'"),
    "label kind": ({"label": Label(field="y", delay="1h")}, "admit", "kind was 'stream' and is 'field'"),
    "label revisions": (label(revisions="last"), "admit", "revisions was 'first' and is 'last'"),
    "label match": (
        {"label": Label(Jsonl("labels.jsonl", Verdict), field="y", on=("id",), at="t")},
        "admit",
        "on was None and is ['id']",
    ),
}


@pytest.mark.parametrize("change", STUCK)
def test_a_change_that_no_reset_can_take_is_refused(change: str) -> None:
    """What all state depends on cannot be changed step by step; the refusal shows old and new."""
    changed, step, text = STUCK[change]
    before = {"features": changed["features"]} if "features" in changed else {}
    for reset in ((), ("features_card", "features_shop", "learner", "publish")):
        refused = [each for each in effects(job(**before), job(**changed), *reset) if each.refused]
        assert {each.step for each in refused} == {step}
        assert any(text in each.text for each in refused)


def test_the_number_of_key_groups_is_fixed() -> None:
    """Entities would be looked for in other files."""
    assert effects(job(), job(), groups=8) == [Change("job", "groups was 16 and is 8", True)]


def test_an_aggregate_with_other_parameters_is_refused() -> None:
    """The same feature name with another meaning does not take the old state, a river statistic's neither."""
    before = job(**card(over="lifetime", aggregates=[Count(), River(stats.EWMean(0.5), "amount")]))
    now = job(**card(over="lifetime", aggregates=[Count(), River(stats.EWMean(0.25), "amount")]))
    (change,) = effects(before, now)
    assert change.step == "features_card"
    assert change.refused
    assert "fading_factor=0.5" in change.text
    assert "fading_factor=0.25" in change.text
    assert not effects(before, now, "features_card")[0].refused


def test_a_rolling_metric_with_other_parameters_is_refused() -> None:
    """What a rolling metric wraps counts, too."""
    before, now = (job(metrics=[utils.Rolling(metrics.FBeta, window_size=10, beta=beta)]) for beta in (1.0, 2.0))
    (change,) = effects(before, now)
    assert change.refused
    assert "metric FBeta_rolling_10 was Rolling(FBeta(beta=1.0" in change.text
    assert effects(before, before) == []


def test_a_window_with_other_parameters_is_refused() -> None:
    """A hopping window that hops otherwise keeps its feature's name, or not; the old state is not taken for it."""
    before, now = (job(**card(over=Hopping("1h", hop=hop))) for hop in ("5m", "10m"))
    assert effects(before, before) == []
    assert all(change.refused for change in effects(before, now))
    assert effects(before, now)


def test_several_changes_are_told_each() -> None:
    """All that is wrong is said at once, and a reset takes its own step only."""
    now = job(name="sold", per=("shop",), **card(over=["1h", "1d"]), metrics=[metrics.ROCAUC()])
    changes = effects(job(), now)
    assert {(each.step, each.refused) for each in changes} == {
        ("job", True),
        ("learner", True),
        ("features_card", True),
        ("publish", False),
    }
    refused = {each.step for each in effects(job(), now, "learner", "features_card") if each.refused}
    assert refused == {"job"}


class Keeper(metrics.Accuracy):
    """Keeps its parameters as river wants it."""

    def __init__(self, depth: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.depth = depth


class Hider(metrics.Accuracy):
    """Does not."""

    def __init__(self, depth: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._depth = depth


def test_classes_of_ones_own_are_told_apart_as_far_as_they_show_themselves() -> None:
    """Parameters kept as river wants it count; a class that hides them is known by its name."""
    assert effects(job(metrics=[Keeper(2)]), job(metrics=[Keeper(2)])) == []
    assert "depth=2" in effects(job(metrics=[Keeper(2)]), job(metrics=[Keeper(3)]))[0].text
    assert effects(job(metrics=[Hider(2)]), job(metrics=[Hider(3)])) == []


def test_a_description_outlives_the_disk_and_the_process() -> None:
    """A job is described alike after JSON, in another process, and with another hash seed."""
    script = (
        "import json, sys\n"
        "from river import compose\n"
        "from tests.dataflows.test_changes import LOGISTIC, describe, is_large, card, job\n"
        "model = compose.Select('amount', *map(str, range(20))) | LOGISTIC\n"
        "print(json.dumps(describe(job(model=model, **card(where=is_large)), 16)))\n"
    )
    command = [sys.executable, "-c", script]
    environment = running.environment(PYTHONHASHSEED="17")
    done = subprocess.run(command, env=environment, cwd=running.ROOT, check=True, capture_output=True, text=True)
    model = compose.Select("amount", *map(str, range(20))) | LOGISTIC
    assert json.loads(done.stdout) == describe(job(model=model, **card(where=is_large)), 16)


# -- how the state lies


def step(layout: Layout, now: Job, before: Job, *reset: str) -> Layout:
    """The layout after a change, which has been on the disk."""
    changed = next_layout(layout, describe(before, 16), now, describe(now, 16), reset)
    again = Layout.model_validate_json(changed.model_dump_json())
    assert again == changed
    return again


def rows(layout: Layout, name: str) -> dict[str, tuple[str, ...]]:
    """Of a feature step, by the names of its parts' rows, their features."""
    return {part.rows: part.names for part in layout.features[name]}


def test_a_new_job_has_one_part_for_each_step() -> None:
    """Without a history a step's rows have its name, and hold what is declared."""
    layout = first_layout(job())
    assert rows(layout, "features_card") == {"features_card": CARD.feature_names}
    assert rows(layout, "features_shop") == {"features_shop": SHOP.feature_names}
    assert declared(layout.features["features_card"][0], job()) == CARD
    assert layout.dropped == ()
    assert layout.models == 1
    assert Layout.model_validate_json(layout.model_dump_json()) == layout


def test_what_is_added_gets_rows_of_its_own() -> None:
    """The part that was there stays as it is; the new part declares no more than it needs."""
    now = job(**card(aggregates=[Max("amount"), Count(), Mean("amount")]))
    before = first_layout(job())
    layout = step(before, now, job())
    added = ("amount_max_1h_by_card", "amount_max_6h_by_card")
    assert rows(layout, "features_card") == {"features_card": CARD.feature_names, "features_card.2": added}
    assert layout.features["features_card"][0] == before.features["features_card"][0]
    assert declared(layout.features["features_card"][1], job()) == Entity("card", Max("amount"), over=["1h", "6h"])
    assert layout.features["features_shop"] == before.features["features_shop"]
    assert layout.dropped == ()


def test_what_comes_back_begins_empty() -> None:
    """A feature or a step that was removed and comes back gets rows that were never used."""
    less, nothing = job(**card(aggregates=[Count()])), job(**features(Fields("amount"), SHOP))
    layout = step(first_layout(job()), less, job())
    assert rows(layout, "features_card") == {"features_card": ("count_1h_by_card", "count_6h_by_card")}
    layout = step(layout, job(), less)
    means = ("amount_mean_1h_by_card", "amount_mean_6h_by_card")
    assert rows(layout, "features_card")["features_card.2"] == means
    layout = step(layout, nothing, job())
    assert "features_card" not in layout.features
    assert layout.dropped == ("features_card", "features_card.2")
    layout = step(layout, job(), nothing)
    assert rows(layout, "features_card") == {"features_card.3": CARD.feature_names}
    assert layout.dropped == ("features_card", "features_card.2")


def test_a_reset_begins_its_step_anew_and_no_other() -> None:
    """Rows, models and metrics that begin anew are new ones; what has not changed is left alone, reset or not."""
    every = ("features_card", "features_shop", "learner", "publish")
    before = first_layout(job())
    now = job(**card(over=["1h", "1d"]))
    layout = step(before, now, job(), *every)
    assert rows(layout, "features_card") == {
        "features_card.2": declared(layout.features["features_card"][0], job()).feature_names
    }
    assert layout.dropped == ("features_card",)
    assert layout.features["features_shop"] == before.features["features_shop"]
    assert (layout.models, layout.metrics) == (1, {})
    assert step(layout, now, now, *every) == layout

    other = job(**card(over=["1h", "1d"]), per=("shop",), metrics=[metrics.ROCAUC(), metrics.FBeta(beta=1.0)])
    layout = step(layout, other, now, "learner", "publish")
    assert (layout.models, layout.metrics) == (2, {"FBeta": 2})
    layout = step(layout, now, other, "learner", "publish")
    assert (layout.models, layout.metrics) == (3, {"FBeta": 3})


def test_a_metric_that_comes_back_begins_anew() -> None:
    """A metric that was removed is another one when it comes back, under whatever parameters."""
    none, lower = job(metrics=[metrics.ROCAUC()]), job(metrics=[metrics.ROCAUC(), metrics.FBeta(beta=1.0)])
    layout = step(first_layout(job()), none, job())
    assert layout.metrics == {"FBeta": 2}
    assert step(layout, lower, none).metrics == {"FBeta": 2}


def test_a_function_in_a_declaration_is_no_obstacle() -> None:
    """Which events are observed is decided before the state, so a lambda need not be kept with it."""
    now = job(**card(where=lambda sale: sale.amount > 5))
    layout = step(first_layout(job()), now, job(), "features_card")
    assert declared(layout.features["features_card"][0], job()).where is None


def test_entities_expire_as_the_part_that_holds_them_says() -> None:
    """Each part's rows expire by its own windows, late events included; a lifetime never does."""
    hour = 3_600_000_000
    now = job(**card(over=["1h", "6h", "1d"]))
    layout = step(first_layout(job()), now, job())
    assert expiry(now, layout) == {"features_card": 6 * hour, "features_card.2": 24 * hour, "features_shop": 6 * hour}
    late = now.changed(time=Time(order="arrival", lateness="10m"))
    assert expiry(late, layout)["features_card"] == 6 * hour + hour // 6
    ever = job(**card(over=["1h", "6h", "lifetime"]))
    assert "features_card.2" not in expiry(ever, step(first_layout(job()), ever, job()))


OWN = """
from river import stats


class Spread(stats.base.Univariate):
    def __init__(self):
        self.seen = Seen()

    def update(self, x):
        self.seen.append(x)

    def get(self):
        return max(self.seen, default=0) - min(self.seen, default=0)


class Seen(list):
    pass
"""
HOUR = 3_600_000_000


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """Imports a module of the user's with a statistic, or takes it away again."""
    monkeypatch.syspath_prepend(str(tmp_path))
    names = ("own_statistics", "moved_statistics")

    def there(name: str) -> Any:
        for other in names:
            sys.modules.pop(other, None)
            (tmp_path / f"{other}.py").unlink(missing_ok=True)
        importlib.invalidate_caches()
        if not name:
            return None
        (tmp_path / f"{name}.py").write_text(OWN)
        return importlib.import_module(name).Spread()

    yield there
    there("")


def opened(directory: Path, layout: Layout, now: Job, version: Version) -> tuple[StateStore, FeatureParts, list[Any]]:
    """The features of cards as a worker opens them at a version, and what keeps them."""
    store = StateStore(directory, Lineage([], version), allowed=names_of(now), gone=gone_names(layout, now))
    parts, kept = [], []
    for part in layout.features["features_card"]:
        state = store.step("000", part.rows)
        features = EntityFeatures(declared(part, now), rows=state.rows)
        parts.append((features, part.names))
        kept.append((features, state))
    entity = next(each for each in now.entities if each.key == ("card",))
    return store, FeatureParts(entity, parts), kept


@pytest.mark.parametrize("leaves", ["", "own_statistics"], ids=["the module is gone too", "the module stays"])
def test_a_feature_with_a_statistic_of_ones_own_can_be_removed(
    tmp_path: Path, own: Callable[[str], Any], leaves: str
) -> None:
    """The state of the others goes on as if nothing had happened, and nothing of the statistic's class is needed."""
    with_own = [Count(), River(own("own_statistics"), "amount"), Mean("amount")]
    before = job(**card(over="lifetime", aggregates=with_own))
    now = job(**card(over="lifetime", aggregates=[Count(), Mean("amount"), Max("amount")]))
    directory, layout = tmp_path / "groups", first_layout(before)
    StateStore.create(directory, 1)
    undisturbed = EntityFeatures(Entity("card", [Count(), Mean("amount")], over="lifetime"))
    store, features, kept = opened(directory, layout, before, Version(1, 0))
    for t in range(60):
        if t == 40:
            store.close()
            own(leaves)
            layout = step(layout, now, before)
            assert "features_card" not in expiry(now, layout)
        if t in (40, 50):
            store.close()
            store, features, kept = opened(directory, layout, now, Version(1, t))
        card_, amount = f"c{t % 2}", float(t * 7 % 11)
        answer = features.ask(card_, t, (amount,))
        assert (answer[0], answer[2 if t < 40 else 1]) == undisturbed.ask(card_, t, (amount,))
        for some, state in kept:
            state.write(t + 1, some.changes(), complete=True)
    store.close()


def test_a_statistic_that_moved_is_told(own: Callable[[str], Any]) -> None:
    """A feature that is still declared does not go on without its statistic: the error names class and feature."""
    aggregates = [Count(), River(own("own_statistics"), "amount")]
    before = job(**card(over="lifetime", aggregates=aggregates))
    layout = first_layout(before)
    now = job(**card(over="lifetime", aggregates=[Count(), River(own("moved_statistics"), "amount")]))
    assert effects(before, now) == [], "a class is known by its name alone"
    with pytest.raises(StateError, match=r"amount_spread_by_card.*own_statistics\.Spread.*Hint: was a class renamed"):
        expiry(now, layout)


AGGREGATES = [Count(), Mean("amount"), Sum("amount"), Max("amount")]
declarations = st.none() | st.tuples(
    st.lists(st.sampled_from(AGGREGATES), min_size=1, unique_by=lambda each: each.stem),
    st.lists(st.sampled_from(["1h", "6h", "1d"]), min_size=1, unique=True),
)


@settings(max_examples=60)
@given(st.lists(st.tuples(declarations, st.booleans()), min_size=2, max_size=6))
def test_through_any_changes_every_feature_has_one_place(history: list[tuple[Any, bool]]) -> None:
    """Whatever was added, removed and reset before: each feature lies in one part, kept ones where they were."""
    jobs = [
        job(**(features(Fields("amount"), SHOP) if some is None else card(aggregates=some[0], over=some[1])))
        for some, _ in history
    ]
    layout = first_layout(jobs[0])
    used = {part.rows for parts in layout.features.values() for part in parts}
    for (_, reset), before, now in zip(history[1:], jobs[:-1], jobs[1:], strict=True):
        asked = ("features_card",) if reset else ()
        changes = effects(before, now, *asked)
        if any(each.refused for each in changes):
            asked = ("features_card",)
        was = {name: part.rows for part in layout.features.get("features_card", ()) for name in part.names}
        layout = step(layout, now, before, *asked)
        parts = layout.features.get("features_card", ())
        found = {name: part.rows for part in parts for name in part.names}
        entity = next((each for each in now.entities if each.key == ("card",)), None)
        assert sorted(found) == sorted(() if entity is None else entity.feature_names)
        assert sum(len(part.names) for part in parts) == len(found)
        assert all(part.names for part in parts), "a part that nobody asks is work in vain"
        begun = {name for name, place in found.items() if place not in used}
        if asked and describe(before, 16)["steps"].get("features_card") != describe(now, 16)["steps"].get(
            "features_card"
        ):
            assert begun == set(found)
        else:
            assert begun == set(found) - set(was)
            assert all(found[name] == was[name] for name in found if name in was)
        used |= {part.rows for some in layout.features.values() for part in some}
        assert set(layout.dropped) == used - {part.rows for some in layout.features.values() for part in some}
        if entity is not None:
            both = FeatureParts(entity, [(EntityFeatures(declared(part, now)), part.names) for part in parts])
            assert len(both.ask("c-1", 0, (1.0,) * len(entity.columns))) == len(entity.feature_names)
