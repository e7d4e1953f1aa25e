"""Declarations: names, order, defaults and errors that help."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import pytest
from pydantic import ValidationError
from river import stats

from features import (
    Count,
    Derived,
    Entity,
    EWMean,
    Fields,
    Hopping,
    Last,
    Lifetime,
    Mean,
    Quantile,
    River,
    Session,
    Sliding,
    Sum,
    Tiled,
    Tumbling,
    Var,
    Window,
    duration,
    duration_text,
)


def test_names_say_aggregate_window_and_key() -> None:
    """Every kind of window has its part in the feature's name, lifetime none."""
    over: list[str | Window] = [
        "7d",
        Tumbling("1h"),
        Hopping("1h", hop="5m"),
        Session(gap="30m"),
        Last(10),
        Tiled("30d", resolution="1h"),
        "lifetime",
    ]
    assert Entity("card_id", [Mean("amount")], over=over).feature_names == (
        "amount_mean_7d_by_card_id",
        "amount_mean_tumbling_1h_by_card_id",
        "amount_mean_hopping_1h_5m_by_card_id",
        "amount_mean_session_30m_by_card_id",
        "amount_mean_last_10_by_card_id",
        "amount_mean_tiled_30d_1h_by_card_id",
        "amount_mean_by_card_id",
    )


def test_names_come_by_aggregate_then_window() -> None:
    """The order of the values is that of the declaration: all windows of the first aggregate first."""
    names = Entity("c", [Count(), Sum("x")], over=["1d", "7d"]).feature_names
    assert names == ("count_1d_by_c", "count_7d_by_c", "x_sum_1d_by_c", "x_sum_7d_by_c")


def test_a_name_replaces_the_key() -> None:
    """Two declarations over one key can be told apart."""
    assert Entity(["a", "b"], [Count()], name="pair").feature_names == ("count_by_pair",)
    assert Entity(["a", "b"], [Count()]).feature_names == ("count_by_a_and_b",)


def test_columns_are_the_distinct_fields_in_order() -> None:
    """Each field that an aggregate reads is asked for once."""
    assert Entity("k", [Count(), Sum("y"), Mean("x"), Var("y")]).columns == ("y", "x")


@pytest.mark.parametrize(
    ("declare", "message"),
    [
        (lambda: Entity("k", [Count(), Count()]), "count_by_k"),
        (lambda: Entity("k", [Count()], over=["24h", "1d"]), "count_1d_by_k"),
        (lambda: Entity("k", [EWMean("x")], over="7d"), "Hint: over=Lifetime"),
        (lambda: Entity("k", [River(stats.Mean(), "x")], over=Tumbling("1h")), "take no value back"),
        (lambda: Entity("k", [Count()], over="7d", ttl="1d"), "ttl=1d is shorter"),
        (lambda: Entity("k", []), "needs a key"),
        (lambda: Entity("k", [Count()], over=[]), "needs a key"),
        (lambda: Entity("", [Count()]), "needs a key"),
        (lambda: Entity("k", [Count()], of="questions"), "'events' or 'labels'"),  # type: ignore[arg-type]
        (lambda: Sum(""), "needs the name of a field"),
        (lambda: Var("x", ddof=-1), "ddof cannot be negative: -1"),
        (lambda: Quantile("x", q=2), "q must lie between 0 and 1: 2"),
        (lambda: Sliding(0), "longer than nothing"),
        (lambda: Hopping("5m", hop="1h"), "hop is longer than size"),
        (lambda: Tiled("5m", resolution="1h"), "resolution is longer"),
        (lambda: Tiled("30d", resolution="1ms"), "more than 100,000"),
        (lambda: Last(0), "Last needs at least one event: 0"),
        (lambda: Derived(lambda event: 1), "lambda has no name"),
        (lambda: Fields("a", "a"), "twice"),
        (lambda: Entity("k", [Count()], over="7 days"), "not a duration: '7 days'"),
    ],
)
def test_errors_show_what_failed(declare: Callable[[], object], message: str) -> None:
    """A declaration that cannot work raises at once and shows the value."""
    with pytest.raises(ValueError, match=message):
        declare()


def test_declarations_are_frozen_and_compare_by_value() -> None:
    """A declaration cannot change once it is checked."""
    assert Entity("k", [Count()], over="7d") == Entity(["k"], Count(), over=[timedelta(days=7)])
    with pytest.raises(ValidationError):
        Count().empty = 1


def test_over_defaults_to_lifetime() -> None:
    """Without over= an entity remembers everything."""
    assert Entity("k", [Count()]).over == (Lifetime(),)


def test_derived_may_be_no_feature() -> None:
    """With feature=False a derived value is only there for keys and aggregates."""
    assert Derived(str, name="text", feature=False).feature_names == ()


@pytest.mark.parametrize("text", ["500ms", "30s", "5m", "1h", "7d"])
def test_durations_keep_their_text(text: str) -> None:
    """What duration reads, duration_text writes."""
    assert duration_text(duration(text)) == text


@pytest.mark.parametrize("value", [True, 1.5, None, -1, "-1d", "", "7", timedelta(days=-1)])
def test_what_is_no_duration_is_refused(value: object) -> None:
    """Neither bools, floats, negative spans nor text without a unit are durations."""
    with pytest.raises((TypeError, ValueError), match="duration"):
        duration(value)  # type: ignore[arg-type]
