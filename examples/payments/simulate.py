"""A seeded simulator of card payments and of the chargebacks that reveal, later, which were fraud.

The idea is that of the Fraud Detection Handbook's simulator (Le Borgne and others, chapter 3), written anew
and small: customers live on a map, pay at terminals within their reach, each with habits of their own. Three
things go wrong:

1. `amount`: a payment far above what the customer spends.
2. `terminal`: a compromised terminal; for about two weeks half of the payments there are fraud.
3. `card`: a stolen card; for several days a third of its payments are fraud, of five times the amount.

Reports are as untidy as in life: hours to days late, some twice, some for payments nobody knows, and a few
frauds are never reported.

    python -m examples.payments.simulate             # payments.jsonl and chargebacks.jsonl beside this file
    python -m examples.payments.simulate /tmp/small --days 3 --customers 50

The same arguments give the same bytes under CPython 3.11 and 3.12 and any PYTHONHASHSEED: only
`random.Random` with a seed of its own for each purpose, no sets, no sums of floats (3.12 rounds those anew).
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

START = datetime(2026, 1, 5, tzinfo=UTC)
"""Midnight of a Monday: the first day that is simulated."""

MAP_KM = 100.0
REACH_KM = 12.0
DAY_S = 86_400

# How often things go wrong: together about 1 % of the payments.
LARGE_AMOUNT_RATE = 0.002
TERMINALS_PER_COMPROMISE_DAY = 1_500  # one terminal in so many is compromised each day
COMPROMISED_SHARE = 0.5
COMPROMISED_DAYS = (11, 17)
CARDS_PER_THEFT_DAY = 450  # one card in so many is stolen each day
STOLEN_SHARE = 1 / 3
STOLEN_FACTOR = 5
STOLEN_DAYS = (3, 8)

# How reports come in.
REPORT_MEDIAN_H = 36
REPORT_SIGMA = 0.9
REPORT_MAX_S = 12 * DAY_S
NEVER_REPORTED = 0.03
REPORTED_TWICE = 0.01
REPORTED_UNKNOWN = 0.005

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Customer:
    """A card and its holder's habits: what is spent (mean and standard deviation), how often, and where."""

    card_id: str
    amount_mean: float
    amount_std: float
    payments_per_day: float
    terminals: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Troubles:
    """Which terminals and cards are bad, and when: id → spans of (first day, day after the last)."""

    terminals: dict[str, list[tuple[int, int]]]
    cards: dict[str, list[tuple[int, int]]]


def simulate(
    days: int = 30, customers: int = 1_000, terminals: int = 400, seed: int = 7
) -> tuple[list[Row], list[Row]]:
    """Payments and chargebacks, each sorted by time; by default some 60,000 payments, 1 % of them fraud.

    Raises `ValueError` when a size is below 1.

    >>> payments, chargebacks = simulate(days=2, customers=20, terminals=10)
    >>> sorted(payments[0])
    ['amount', 'card_id', 'paid_at', 'payment_id', 'terminal_id']
    >>> payments[0]["payment_id"]
    'p-000001'
    """
    payments, frauds = simulate_payments(days, customers, terminals, seed)
    return payments, report(payments, frauds, seed)


def simulate_payments(days: int, customers: int, terminals: int, seed: int) -> tuple[list[Row], dict[str, str]]:
    """The payments, and of those that are fraud which of the three things went wrong (by payment id)."""
    for name, size in (("days", days), ("customers", customers), ("terminals", terminals)):
        if size < 1:
            raise ValueError(f"{name} is {size}. Hint: simulate at least one")
    people = _customers(customers, terminals, seed)
    troubles = _troubles(range(days), [c.card_id for c in people], _ids("t", terminals), str(seed))
    drawn: list[tuple[int, Row, str | None]] = []
    for number, customer in enumerate(people):
        # One generator per customer: what one draws does not shift the draws of the next.
        drawn += _spend(customer, range(days), troubles, Random(f"{seed} payments {number}"))
    drawn.sort(key=lambda one: (one[0], one[1]["card_id"]))
    rows, frauds = [], {}
    for number, (second, row, fraud) in enumerate(drawn, start=1):
        payment_id = f"p-{number:06d}"
        rows.append({"payment_id": payment_id, "paid_at": _iso(second), **row})
        if fraud is not None:
            frauds[payment_id] = fraud
    return rows, frauds


def endless(customers: int, terminals: int, seed: int) -> Iterator[tuple[Row, str | None]]:
    """Payments without end, in order: (the row without id and time, what is wrong with it).

    It keeps one day at a time. Terminals and cards went bad before the first day too, so that there is fraud from the
    beginning.
    """
    people = _customers(customers, terminals, seed)
    cards, places = [c.card_id for c in people], _ids("t", terminals)
    recent: deque[Troubles] = deque(maxlen=max(*COMPROMISED_DAYS, *STOLEN_DAYS))
    for day in count(-max(*COMPROMISED_DAYS, *STOLEN_DAYS)):
        today = range(day, day + 1)
        recent.append(_troubles(today, cards, places, f"{seed} day {day}"))
        if day >= 0:
            troubles, rng = _together(recent), Random(f"{seed} payments of day {day}")
            drawn = [one for customer in people for one in _spend(customer, today, troubles, rng)]
            for _, row, fraud in sorted(drawn, key=lambda one: (one[0], one[1]["card_id"])):
                yield row, fraud


def _ids(letter: str, count: int) -> list[str]:
    return [f"{letter}-{number:04d}" for number in range(1, count + 1)]


def _customers(count: int, terminals: int, seed: int) -> list[Customer]:
    rng = Random(f"{seed} terminals")
    places = [(name, rng.uniform(0, MAP_KM), rng.uniform(0, MAP_KM)) for name in _ids("t", terminals)]
    rng = Random(f"{seed} customers")
    people = []
    for card_id in _ids("c", count):
        x, y = rng.uniform(0, MAP_KM), rng.uniform(0, MAP_KM)
        amount_mean = rng.uniform(5, 100)
        rate = rng.uniform(0, 4)
        people.append(Customer(card_id, amount_mean, amount_mean / 2, rate, _within_reach(x, y, places)))
    return people


def _within_reach(x: float, y: float, places: Sequence[tuple[str, float, float]]) -> tuple[str, ...]:
    """The terminals within reach of a home; where there is none, the nearest."""
    near = tuple(name for name, tx, ty in places if math.hypot(tx - x, ty - y) <= REACH_KM)
    if near:
        return near
    return (min(places, key=lambda place: math.hypot(place[1] - x, place[2] - y))[0],)


def _troubles(days: range, cards: Sequence[str], terminals: Sequence[str], seed: str) -> Troubles:
    return Troubles(
        terminals=_spans(
            days, terminals, TERMINALS_PER_COMPROMISE_DAY, COMPROMISED_DAYS, Random(f"{seed} compromised")
        ),
        cards=_spans(days, cards, CARDS_PER_THEFT_DAY, STOLEN_DAYS, Random(f"{seed} stolen")),
    )


def _together(several: Iterable[Troubles]) -> Troubles:
    """All the troubles of some days as one."""
    terminals: dict[str, list[tuple[int, int]]] = {}
    cards: dict[str, list[tuple[int, int]]] = {}
    for troubles in several:
        for into, spans in ((terminals, troubles.terminals), (cards, troubles.cards)):
            for name, added in spans.items():
                into.setdefault(name, []).extend(added)
    return Troubles(terminals, cards)


def _spans(
    days: range, names: Sequence[str], per_day: int, length: tuple[int, int], rng: Random
) -> dict[str, list[tuple[int, int]]]:
    """Each day one name in `per_day`, on average, goes bad for a number of days within `length`."""
    spans: dict[str, list[tuple[int, int]]] = {}
    for day in days:
        for _ in range(_poisson(len(names) / per_day, rng)):
            spans.setdefault(rng.choice(names), []).append((day, day + rng.randint(*length)))
    return spans


def _poisson(mean: float, rng: Random) -> int:
    """A Poisson number (Knuth's multiplication; made for means below some tens, halved above)."""
    if mean > 30:
        return _poisson(mean / 2, rng) + _poisson(mean / 2, rng)
    limit, product, count = math.exp(-mean), rng.random(), 0
    while product > limit:
        product *= rng.random()
        count += 1
    return count


def _spend(customer: Customer, days: range, troubles: Troubles, rng: Random) -> Iterator[tuple[int, Row, str | None]]:
    """One customer's payments: (seconds since START, the row without id and time, what is wrong with it)."""
    stolen = troubles.cards.get(customer.card_id, [])
    for day in days:
        for _ in range(_poisson(customer.payments_per_day, rng)):
            second = day * DAY_S + _time_of_day(rng)
            terminal_id = rng.choice(customer.terminals)
            amount = rng.gauss(customer.amount_mean, customer.amount_std)
            if amount <= 0:
                amount = rng.uniform(0, 2 * customer.amount_mean)
            fraud = None
            if _bad(stolen, day) and rng.random() < STOLEN_SHARE:
                fraud, amount = "card", amount * STOLEN_FACTOR
            elif _bad(troubles.terminals.get(terminal_id, []), day) and rng.random() < COMPROMISED_SHARE:
                fraud = "terminal"
            elif rng.random() < LARGE_AMOUNT_RATE:
                fraud, amount = "amount", amount + customer.amount_mean * rng.uniform(4, 8)
            row = {
                "card_id": customer.card_id,
                "terminal_id": terminal_id,
                "amount": max(round(amount, 2), 0.01),
            }
            yield second, row, fraud


def _bad(spans: Sequence[tuple[int, int]], day: int) -> bool:
    return any(first <= day < after for first, after in spans)


def _time_of_day(rng: Random) -> int:
    """Seconds since midnight: mostly around 13 o'clock, few at night."""
    while True:
        second = int(rng.gauss(13 * 3_600, 5.5 * 3_600))
        if 0 <= second < DAY_S:
            return second


def report(payments: Iterable[Row], frauds: dict[str, str], seed: int) -> list[Row]:
    """The chargebacks of simulated payments, sorted by the time they are reported.

    A report comes a log-normal time after the payment (median 36 h, 12 days at most). 3 % of the frauds are
    never reported, 1 % are twice, and another 0.5 % are about payments that do not exist.
    """
    rng = Random(f"{seed} reports")
    reports: list[tuple[int, str]] = []
    for row in payments:
        if row["payment_id"] in frauds:
            paid = _second(row["paid_at"])
            reports += [(paid + delay, name) for delay, name in report_fraud(row["payment_id"], rng)]
    return [{"payment_id": name, "reported_at": _iso(second), "fraud": True} for second, name in sorted(reports)]


def report_fraud(payment_id: str, rng: Random) -> Iterator[tuple[int, str]]:
    """The reports that one fraud leads to: (seconds after the payment, the id in the report)."""
    if rng.random() < NEVER_REPORTED:
        return
    first = _delay(rng)
    yield first, payment_id
    if rng.random() < REPORTED_TWICE:
        yield min(first + _delay(rng), REPORT_MAX_S), payment_id
    if rng.random() < REPORTED_UNKNOWN:
        yield first + _delay(rng), f"x-{rng.randrange(10**6):06d}"


def _delay(rng: Random) -> int:
    """Seconds until a report."""
    return min(int(REPORT_MEDIAN_H * 3_600 * rng.lognormvariate(0, REPORT_SIGMA)), REPORT_MAX_S)


def _iso(second: int) -> str:
    return (START + timedelta(seconds=second)).strftime("%Y-%m-%dT%H:%M:%SZ")


def _second(iso: str) -> int:
    return round((datetime.fromisoformat(iso) - START).total_seconds())


def write(
    directory: Path | str, days: int = 30, customers: int = 1_000, terminals: int = 400, seed: int = 7
) -> tuple[Path, Path]:
    """Writes payments.jsonl and chargebacks.jsonl into a directory, made if need be; returns their paths.

    A file appears under its name only when it is complete: an interrupted run leaves nothing half.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    payments, chargebacks = simulate(days, customers, terminals, seed)
    paths = directory / "payments.jsonl", directory / "chargebacks.jsonl"
    for path, rows in zip(paths, (payments, chargebacks), strict=True):
        partial = path.with_suffix(".partial")
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        os.replace(partial, path)
    return paths


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: `python -m examples.payments.simulate [DIRECTORY] [--days N] …`."""
    parser = argparse.ArgumentParser(description="Simulate card payments and their chargebacks.")
    parser.add_argument("directory", nargs="?", type=Path, default=Path(__file__).parent)
    parser.add_argument("--days", type=int, default=30)
    parser.add_argument("--customers", type=int, default=1_000)
    parser.add_argument("--terminals", type=int, default=400)
    parser.add_argument("--seed", type=int, default=7)
    chosen = parser.parse_args(arguments)
    try:
        paths = write(chosen.directory, chosen.days, chosen.customers, chosen.terminals, chosen.seed)
    except ValueError as error:
        parser.error(str(error))
    for path in paths:
        with path.open("rb") as file:
            print(f"{path}: {len(file.readlines())} lines")


if __name__ == "__main__":
    main()
