"""The stream of payments and chargebacks that the payments example sends to Kafka."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any

import pytest

from examples.payments.produce import Message, main, stream

START = datetime(2026, 1, 5, 12, tzinfo=UTC)
DAY = timedelta(seconds=10)


def take(count: int, seed: int = 7, start: datetime = START) -> list[Message]:
    """The first messages."""
    return list(islice(stream(200, DAY, seed, start), count))


def test_the_seed_decides_everything_but_the_start() -> None:
    """The same seed and start give the same messages; another start changes times and ids alone."""
    messages = take(5_000)
    assert take(5_000) == messages
    assert take(5_000, seed=8) != messages
    later = take(5_000, start=START + timedelta(days=1))
    assert later != messages

    def rest(message: Message) -> Any:
        due, topic, _, row = message
        return due, topic, {name: row[name] for name in row if name in ("card_id", "terminal_id", "amount", "fraud")}

    assert [rest(message) for message in later] == [rest(message) for message in messages]


def test_messages_come_in_order_at_the_rate_asked_for() -> None:
    """Payments are 5 ms apart at 200 a second, chargebacks between them, and times are those at which they are due."""
    messages = take(20_000)
    dues = [due for due, *_ in messages]
    assert dues == sorted(dues)
    paid = [due for due, topic, *_ in messages if topic == "payments"]
    assert paid == [timedelta(milliseconds=5) * number for number in range(len(paid))]
    for due, _, _, row in messages:
        text = row.get("paid_at") or row["reported_at"]
        assert timedelta() <= START + due - datetime.fromisoformat(text) < timedelta(milliseconds=1)


def test_a_percent_is_fraud_and_reported_in_compressed_days() -> None:
    """Chargebacks come within 12 days of ten seconds after their payment, half of them within 36 hours."""
    messages = take(60_000)
    paid = {row["payment_id"]: due for due, topic, _, row in messages if topic == "payments"}
    delays = sorted(
        (due - paid[row["payment_id"]]) / DAY
        for due, topic, _, row in messages
        if topic == "chargebacks" and row["payment_id"] in paid
    )
    assert 0.005 < len(delays) / len(paid) < 0.02
    assert delays[0] > 0
    assert delays[-1] <= 12
    assert 1 < delays[len(delays) // 2] < 2


def test_there_is_fraud_from_the_beginning() -> None:
    """The first simulated day has its share of frauds that are reported, as terminals were compromised before."""
    first_day = {row["payment_id"] for due, topic, _, row in take(4_000) if topic == "payments" and due < DAY}
    reported = {row["payment_id"] for _, topic, _, row in take(30_000) if topic == "chargebacks"}
    assert 0.005 < len(first_day & reported) / len(first_day) < 0.04


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rate", "0"], "positive number"),
        (["--seconds", "3", "--payments", "3"], "not allowed with"),
        (["--rate", "1000000"], "Hint: shorter days or a lower rate"),
    ],
)
def test_what_cannot_be_sent_is_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Senseless options end the producer with a message before it connects to anything."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert message in f"{capsys.readouterr().err} {ended.value.code}"
