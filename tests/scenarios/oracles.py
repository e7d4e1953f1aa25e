"""Independent oracles: slow programs that are plainly right, to hold the fast ones against.

Nothing of Millrace is imported. Whatever is asked is computed again from the raw rows, with exact fractions
that are rounded once at the end; there is no state to get wrong but the lists of what has been seen.

- `fraud_features_naive`: the windowed features of the Fraud Detection Handbook for chosen transactions.
- `plain_loop`: questions, late labels, expiries, predictions and learning with plain river.
- `keystone_stream`: small streams full of what goes wrong in large ones.
"""

from __future__ import annotations

import pickle
import random
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any, Literal, NamedTuple

from river import base

SECOND_US = 1_000_000
MINUTE_US = 60 * SECOND_US
HOUR_US = 60 * MINUTE_US
DAY_MS = 86_400_000

Row = dict[str, Any]
Arrival = tuple[Literal["event", "label"], Row]


def exact_mean(values: Iterable[float]) -> float:
    """The mean in rational arithmetic, rounded once; 0.0 of nothing.

    >>> exact_mean([0.1, 0.2, 0.3]), exact_mean([])
    (0.2, 0.0)
    """
    fractions = [Fraction(v) for v in values]
    return float(sum(fractions) / len(fractions)) if fractions else 0.0


# -- the fraud job's features


def fraud_features_naive(rows: Sequence[Row], indices: Iterable[int]) -> list[dict[str, float]]:
    """The 12 windowed features of the transactions at `indices`, from their whole history.

    Customers: count and mean amount over (t − w, t], of what came before in the file and of itself.
    Terminals: count and fraud rate over (t − 7d − w, t − 7d]. w = 1, 7, 30 days.

    Parameters
    ----------
    rows
        All transactions in the order of the file, which is that of time; `ts` in milliseconds.
    indices
        Positions in `rows`; the answers come in this order.

    >>> row = {"ts": 0, "customer": 1, "terminal": 2, "amount": 5.0, "fraud": 1}
    >>> rows = [row, row | {"ts": 7 * DAY_MS, "amount": 6.0, "fraud": 0}]
    >>> first, second = fraud_features_naive(rows, [0, 1])
    >>> first["count_1d_by_customer"], first["count_1d_by_terminal"]
    (1, 0)
    >>> second["count_7d_by_customer"], second["amount_mean_30d_by_customer"]
    (1, 5.5)
    >>> second["count_1d_by_terminal"], second["fraud_mean_1d_by_terminal"]
    (1, 1.0)
    """
    customers, terminals = _grouped(rows, "customer"), _grouped(rows, "terminal")
    return [_fraud_features(rows, i, customers, terminals) for i in indices]


def _grouped(rows: Sequence[Row], key: str) -> dict[Any, tuple[list[int], list[int]]]:
    """Of each key: the times of its rows and their positions, both in the order of the file."""
    groups: dict[Any, tuple[list[int], list[int]]] = {}
    for position, row in enumerate(rows):
        times, positions = groups.setdefault(row[key], ([], []))
        times.append(row["ts"])
        positions.append(position)
    return groups


def _fraud_features(
    rows: Sequence[Row],
    index: int,
    customers: dict[Any, tuple[list[int], list[int]]],
    terminals: dict[Any, tuple[list[int], list[int]]],
) -> dict[str, float]:
    row = rows[index]
    t = row["ts"]
    counts: dict[str, float] = {}
    means: dict[str, float] = {}
    times, positions = customers[row["customer"]]
    end = positions.index(index) + 1
    for days in (1, 7, 30):
        within = positions[bisect_right(times, t - days * DAY_MS) : end]
        counts[f"count_{days}d_by_customer"] = len(within)
        means[f"amount_mean_{days}d_by_customer"] = exact_mean(rows[i]["amount"] for i in within)
    features = counts | means
    counts, means = {}, {}
    times, positions = terminals[row["terminal"]]
    known = t - 7 * DAY_MS
    for days in (1, 7, 30):
        within = positions[bisect_right(times, known - days * DAY_MS) : bisect_right(times, known)]
        counts[f"count_{days}d_by_terminal"] = len(within)
        means[f"fraud_mean_{days}d_by_terminal"] = exact_mean(rows[i]["fraud"] for i in within)
    return features | counts | means


# -- the keystone: a plain river loop over any small stream


class Prediction(NamedTuple):
    """What the model said to the question `id` at `t` (µs), when it had learned `version` examples."""

    id: int
    t: int
    features: dict[str, float]
    output: Any
    version: int


class Outcome(NamedTuple):
    """The label of a question, known at `moment` (µs); `version` after learning from it."""

    id: int
    label: Any
    version: int
    t: int
    moment: int


CARD_WINDOWS = {"1h": HOUR_US, "6h": 6 * HOUR_US}
SHOP_WINDOWS = {"6h": 6 * HOUR_US}


def plain_loop(
    events: Sequence[Row],
    labels: Sequence[Row],
    model: Any,
    *,
    horizon: int,
    order: Literal["event_time", "arrival"] = "event_time",
    arrivals: Sequence[Arrival] | None = None,
    otherwise: Any = False,
    card_windows: Mapping[str, int] = CARD_WINDOWS,
    shop_windows: Mapping[str, int] = SHOP_WINDOWS,
    metrics: Sequence[Any] = (),
) -> tuple[list[Prediction], list[Outcome]]:
    """Ask, predict, answer, score, learn: one item after the other, everything recomputed from lists.

    Parameters
    ----------
    events
        Dicts of id, t (µs), card, shop, amount.
    labels
        Dicts of id, t (µs, when the label became known), y.
    model
        A river classifier, regressor or anomaly detector; a copy of it is used.
    horizon
        How long a question waits (µs); a label at exactly t + horizon is in time.
    order
        `event_time` sorts by (t, labels before events, id). `arrival` takes `arrivals` as they are.
    arrivals
        ("event", dict) and ("label", dict) as they came; needed for the order `arrival` only.
    otherwise
        The label of questions that expire.
    card_windows, shop_windows
        Name and length (µs) of each window.
    metrics
        river metrics; updated in place with each label and the output it belongs to. An empty prediction
        counts as 0.0 here; river's `progressive_val_score` leaves it out.

    Returns predictions in the order of the questions, and outcomes in the order of the answers. Raises
    `ValueError` for an order that is not known, or `arrival` without `arrivals`.

    >>> from river import dummy, stats
    >>> mean = dummy.StatisticRegressor(stats.Mean())
    >>> events = [{"id": i, "t": i * HOUR_US, "card": "c", "shop": "s", "amount": 2.0 + i} for i in range(3)]
    >>> labels = [{"id": 0, "t": HOUR_US, "y": 10}]
    >>> predictions, outcomes = plain_loop(events, labels, mean, horizon=2 * HOUR_US, otherwise=0)
    >>> [p.output for p in predictions], [p.version for p in predictions]
    ([0.0, 10.0, 10.0], [0, 1, 1])
    >>> predictions[1].features["amount_mean_6h_by_card"], predictions[1].features["y_mean_6h_by_shop"]
    (2.5, 10.0)
    >>> [(o.id, o.label, o.version, o.moment // HOUR_US) for o in outcomes]
    [(0, 10, 1, 1), (1, 0, 2, 3), (2, 0, 3, 4)]
    """
    loop = _Loop(model, horizon, otherwise, card_windows, shop_windows, metrics)
    for kind, row in _ordered(events, labels, order, arrivals):
        loop.clock = max(loop.clock, row["t"])
        loop.expire(loop.clock)
        if kind == "event":
            loop.take_event(row)
        else:
            loop.take_label(row)
    loop.expire(None)
    return loop.predictions, loop.outcomes


def _ordered(
    events: Sequence[Row],
    labels: Sequence[Row],
    order: str,
    arrivals: Sequence[Arrival] | None,
) -> Sequence[Arrival]:
    if order == "arrival":
        if arrivals is None:
            raise ValueError("order 'arrival' needs arrivals=[('event' or 'label', dict), ...]")
        return arrivals
    if order != "event_time":
        raise ValueError(f"order is {order!r}; it is one of 'event_time', 'arrival'")
    items: list[Arrival] = [("label", row) for row in labels]
    items += [("event", row) for row in events]
    return sorted(items, key=lambda item: (item[1]["t"], item[0] == "event", item[1]["id"]))


class _Open(NamedTuple):
    """A question that waits; `due` is the first moment at which it is too late for its label."""

    due: int
    number: int
    event: Row
    features: dict[str, float]
    output: Any


class _Loop:
    """The state of `plain_loop`: lists of what has been seen, in the order in which it was."""

    def __init__(
        self,
        model: Any,
        horizon: int,
        otherwise: Any,
        card_windows: Mapping[str, int],
        shop_windows: Mapping[str, int],
        metrics: Sequence[Any],
    ) -> None:
        # The round trip leaves the caller's model alone. DESIGN.md lets models enter service the same way: a
        # pickle may change the order of a set, and with it the last bits of a sum.
        self.model: Any = pickle.loads(pickle.dumps(model))
        self.horizon = horizon
        self.otherwise = otherwise
        self.card_windows = card_windows
        self.shop_windows = shop_windows
        self.metrics = metrics
        self.clock = -(2**63)
        self.version = 0
        self.unsupervised = isinstance(model, base.AnomalyDetector)
        self.classifies = isinstance(model, base.Classifier)
        self.asked: set[int] = set()
        self.open: dict[int, _Open] = {}
        self.early: dict[int, Row] = {}
        self.payments: dict[str, list[tuple[int, float]]] = {}  # by card: (time, amount)
        self.answers: dict[str, list[tuple[int, Any]]] = {}  # by shop: (moment, label)
        self.predictions: list[Prediction] = []
        self.outcomes: list[Outcome] = []

    def take_event(self, event: Row) -> None:
        id, t = event["id"], event["t"]
        if id in self.asked:
            return  # a duplicate
        self.asked.add(id)
        features = self.features(event)
        output = self.predict(features)
        self.predictions.append(Prediction(id, t, features, output, self.version))
        if self.unsupervised:
            self.model.learn_one(features)
            self.version += 1
        self.open[id] = _Open(t + self.horizon + 1, len(self.predictions), event, features, output)
        if id in self.early:
            label = self.early.pop(id)
            self.answer(id, label["y"], max(label["t"], t))

    def take_label(self, label: Row) -> None:
        id = label["id"]
        if id in self.open:
            self.answer(id, label["y"], label["t"])
        elif id not in self.asked:
            self.early.setdefault(id, label)
        # else: answered or expired before; the first answer stays

    def expire(self, clock: int | None) -> None:
        """Answer with `otherwise` what is due at the clock (None: whatever is open), in order."""
        waiting = sorted((question.due, question.number, id) for id, question in self.open.items())
        for due, _, id in waiting:
            if clock is None or due <= clock:
                self.answer(id, self.otherwise, due)

    def answer(self, id: int, y: Any, moment: int) -> None:
        question = self.open.pop(id)
        self.answers.setdefault(question.event["shop"], []).append((moment, y))
        for metric in self.metrics:
            metric.update(y, question.output)
        if not self.unsupervised:
            self.model.learn_one(question.features, y)
            self.version += 1
        self.outcomes.append(Outcome(id, y, self.version, question.event["t"], moment))

    def predict(self, features: dict[str, float]) -> Any:
        if self.unsupervised:
            return self.model.score_one(features)
        if self.classifies:
            return self.model.predict_proba_one(features).get(True, 0.0)
        return self.model.predict_one(features)

    def features(self, event: Row) -> dict[str, float]:
        """As of the event's time: earlier payments of the card and this one; answers known for the shop."""
        t = event["t"]
        payments = self.payments.setdefault(event["card"], [])
        payments.append((t, event["amount"]))
        by_card = _windowed(payments, t, self.card_windows, "amount", "card")
        by_shop = _windowed(self.answers.get(event["shop"], []), t, self.shop_windows, "y", "shop")
        return {"amount": event["amount"], **by_card, **by_shop}


def _windowed(
    seen: Sequence[tuple[int, Any]], t: int, windows: Mapping[str, int], field: str, key: str
) -> dict[str, float]:
    """Counts, then means, over (t − w, t]."""
    within = {name: [v for at, v in seen if t - w < at <= t] for name, w in windows.items()}
    counts: dict[str, float] = {f"count_{name}_by_{key}": len(values) for name, values in within.items()}
    means = {f"{field}_mean_{name}_by_{key}": exact_mean(values) for name, values in within.items()}
    return counts | means


# -- streams


class Stream(NamedTuple):
    """A made-up stream: `arrivals` has the same items, out of order by less than `lateness` (µs)."""

    events: list[Row]
    labels: list[Row]
    arrivals: list[Arrival]
    horizon: int
    lateness: int


def keystone_stream(
    seed: int,
    n: int,
    *,
    cards: int = 5,
    shops: int = 4,
    horizon: int = 3 * HOUR_US,
    lateness: int = 10 * MINUTE_US,
) -> Stream:
    """A stream of `n` questions with gaps, many equal times, duplicates, and labels early, late and never.

    Times are mostly whole minutes, so that windows, labels and horizons meet to the microsecond. Ids are
    shuffled, so that at equal times the id decides and not the order of the list. Labels come at once, later,
    exactly at the horizon, 1 µs after it, long after it, never, twice, revised, before their question, or
    without one; and in `arrivals` some more come before their question.

    Parameters
    ----------
    seed
        The same seed gives the same stream.
    n
        Number of different events.
    cards, shops
        How many of each there are.
    horizon
        How long questions wait (µs).
    lateness
        Bound of what is out of order in `arrivals` (µs).

    >>> stream = keystone_stream(1, 50)
    >>> len({event["id"] for event in stream.events}), keystone_stream(1, 50) == stream
    (50, True)
    """
    rng = random.Random(seed)
    events = _events(rng, n, cards, shops)
    labels = _labels(rng, events, horizon)
    events += [dict(event) for event in events if rng.random() < 0.04]  # duplicates
    items: list[Arrival] = [("event", row) for row in events]
    items += [("label", row) for row in labels]
    # Whoever is held back by less than the lateness is overtaken only by what is less than that ahead of it.
    jitters = [rng.randrange(lateness) if lateness > 0 and rng.random() < 0.4 else 0 for _ in items]
    by_arrival = sorted(range(len(items)), key=lambda i: (items[i][1]["t"] + jitters[i], rng.random()))
    return Stream(events, labels, [items[i] for i in by_arrival], horizon, lateness)


def _events(rng: random.Random, n: int, cards: int, shops: int) -> list[Row]:
    ids = list(range(n))
    rng.shuffle(ids)
    t = 1_700_000_040 * SECOND_US  # a whole minute
    events = []
    for id in ids:
        t += _gap(rng)
        card, shop = f"card-{rng.randrange(cards)}", f"shop-{rng.randrange(shops)}"
        amount = 0.0 if rng.random() < 0.03 else round(rng.lognormvariate(3.0, 1.0), 2)
        events.append({"id": id, "t": t, "card": card, "shop": shop, "amount": amount})
    return events


def _gap(rng: random.Random) -> int:
    """From one event to the next (µs)."""
    chance = rng.random()
    if chance < 0.35:
        return 0
    if chance < 0.85:
        return MINUTE_US * rng.randint(1, 10)
    if chance < 0.95:
        return rng.randint(1, 5 * MINUTE_US)
    if chance < 0.99:
        return HOUR_US
    return 7 * HOUR_US


def _labels(rng: random.Random, events: Sequence[Row], horizon: int) -> list[Row]:
    labels: list[Row] = []
    for event in events:
        delay = _delay(rng, horizon)
        if delay is None:
            continue
        risky = event["amount"] > 30 or event["shop"] == "shop-0"
        label = {"id": event["id"], "t": event["t"] + delay, "y": rng.random() < (0.8 if risky else 0.1)}
        labels.append(label)
        chance = rng.random()
        if chance < 0.03:
            labels.append(dict(label))
        elif chance < 0.06:
            labels.append({**label, "t": label["t"] + rng.randint(1, 60) * MINUTE_US, "y": not label["y"]})
        elif chance < 0.07:
            labels.append({**label, "id": len(events) + event["id"]})  # of an event that never comes
    return labels


def _delay(rng: random.Random, horizon: int) -> int | None:
    """From a question to its label (µs); None: it never comes."""
    chance = rng.random()
    if chance < 0.12:
        return None
    if chance < 0.18:
        return 0
    if chance < 0.22:
        return horizon
    if chance < 0.26:
        return horizon + 1
    if chance < 0.34:
        return horizon + MINUTE_US * rng.randint(1, 120)
    if chance < 0.36:
        return -MINUTE_US * rng.randint(1, 5)
    if chance < 0.50:
        return rng.randint(1, 5 * MINUTE_US)
    return MINUTE_US * rng.randint(1, max(1, horizon // MINUTE_US - 1))
