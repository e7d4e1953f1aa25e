"""Two models are the same exactly where no bit of what they hold differs."""

from __future__ import annotations

import math
import pickle
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from river import anomaly, facto, forest, linear_model, neighbors, preprocessing, tree

from dataflows.likeness import first_difference, same

MODELS: dict[str, Any] = {
    "linear": lambda: preprocessing.StandardScaler() | linear_model.LogisticRegression(),
    "tree": lambda: tree.HoeffdingTreeClassifier(grace_period=20),
    "forest": lambda: forest.ARFClassifier(n_models=2, seed=1),
    "neighbors": lambda: neighbors.KNNClassifier(n_neighbors=2),
    "factors": lambda: facto.FMClassifier(n_factors=2, seed=3),
    "half space": lambda: anomaly.HalfSpaceTrees(n_trees=3, height=3, window_size=20, seed=4),
}


def taught(kind: str, seed: int = 1, examples: int = 120) -> Any:
    """A model that has learned."""
    model, draw = MODELS[kind](), random.Random(seed)
    for _ in range(examples):
        x = {"a": draw.random(), "b": draw.gauss(0, 1)}
        if kind == "half space":
            model.score_one(x)
            model.learn_one(x)
        else:
            model.predict_proba_one(x)
            model.learn_one(x, x["a"] + x["b"] > 0.5)
    return model


def floats(found: Any, seen: set[int]) -> Iterator[tuple[dict[str, Any], str]]:
    """Every attribute within an object that is a float."""
    if id(found) in seen:
        return
    seen.add(id(found))
    if isinstance(found, dict):
        for each in found.values():
            yield from floats(each, seen)
    elif isinstance(found, list | tuple):
        for each in found:
            yield from floats(each, seen)
    elif hasattr(found, "__dict__") and not isinstance(found, type):
        for name, value in vars(found).items():
            if type(value) is float:
                yield vars(found), name
            else:
                yield from floats(value, seen)


@pytest.mark.parametrize("kind", MODELS)
def test_models_are_the_same_after_pickling_and_when_taught_alike(kind: str) -> None:
    """A pickle round trip, or the same examples again, make no difference; one example more does."""
    model = taught(kind)
    assert first_difference(model, pickle.loads(pickle.dumps(model))) is None
    assert first_difference(model, taught(kind)) is None
    assert first_difference(model, taught(kind, examples=121)) is not None
    assert first_difference(model, taught(kind, seed=2)) is not None


@settings(max_examples=40, deadline=None)
@given(data=st.data(), kind=st.sampled_from(sorted(MODELS)))
def test_any_changed_float_is_found(data: st.DataObject, kind: str) -> None:
    """The last bit of any one figure."""
    model = taught(kind, examples=60)
    other = pickle.loads(pickle.dumps(model))
    places = list(floats(other, set()))
    if not places:
        return
    holder, name = data.draw(st.sampled_from(places))
    if math.isnan(holder[name]):
        return
    holder[name] = math.nextafter(holder[name], math.inf if holder[name] < math.inf else 0.0)
    said = first_difference(model, other, "model")
    assert said is not None
    assert said.startswith("model")


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner),
)


@given(PLAIN)
def test_plain_values_are_the_same_after_pickling(value: Any) -> None:
    """Whatever a label or a feature may be, NaN among it."""
    assert same(value, pickle.loads(pickle.dumps(value)))


@given(PLAIN, PLAIN)
def test_what_is_unequal_is_not_the_same(one: Any, other: Any) -> None:
    """Same implies equal text, so that nothing else is taken for it."""
    if same(one, other):
        assert repr(one) == repr(other)


def test_order_sharing_and_kinds() -> None:
    """The order of a dict counts, what is shared does not; arrays are compared with their types; cycles end."""
    assert not same({"a": 1, "b": 2}, {"b": 2, "a": 1})
    inner = [1.0]
    assert same([inner, inner], [[1.0], [1.0]])
    assert not same(np.array([1.0]), np.array([1]))
    assert not same(np.array([0.0]), np.array([-0.0]))
    one: list[Any] = []
    one.append(one)
    other: list[Any] = []
    other.append(other)
    assert same(one, other)
    assert not same({None: 1}, {})
    assert not same([None], [])


def test_very_deep_objects_end_too() -> None:
    """Deeper than Python goes."""
    one: Any = 1.0
    other: Any = 2.0
    for _ in range(3000):
        one, other = (one,), (other,)
    said = first_difference(one, other, "model")
    assert said is not None
    assert "deep" in said


def test_generators_without_a_seed_are_left_out() -> None:
    """Leaves of trees hold one each that is never drawn from; a seeded one counts."""

    class Holder:
        def __init__(self, seed: int | None, drawn: int) -> None:
            self.seed = seed
            self._rng = random.Random(drawn)

    assert same(Holder(None, 1), Holder(None, 2))
    assert not same(Holder(7, 1), Holder(7, 2))
