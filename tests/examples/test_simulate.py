"""The payments simulator: what it promises about sizes, order, fraud, reports and repeatability."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections import Counter
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from examples.payments.simulate import main, report, simulate, simulate_payments, write
from tests.conftest import ROOT

Row = dict[str, Any]
SMALL = {"days": 4, "customers": 60, "terminals": 30, "seed": 3}


@pytest.fixture(scope="module")
def month() -> tuple[list[Row], dict[str, str], list[Row]]:
    """Payments, frauds and chargebacks of the default size."""
    payments, frauds = simulate_payments(days=30, customers=1_000, terminals=400, seed=7)
    return payments, frauds, report(payments, frauds, seed=7)


def _at(text: str) -> datetime:
    assert text.endswith("Z")
    return datetime.fromisoformat(text)


def test_the_default_size_has_about_one_percent_fraud(month) -> None:
    """60,000 payments more or less, one in a hundred fraud, and each of the three patterns among them."""
    payments, frauds, _ = month
    assert 54_000 < len(payments) < 66_000
    assert 0.007 < len(frauds) / len(payments) < 0.014
    counts = Counter(frauds.values())
    assert set(counts) == {"amount", "terminal", "card"}
    assert min(counts.values()) > 50


def test_payments_are_numbered_in_the_order_of_time(month) -> None:
    """Ids are unique and rise with the time of payment; amounts are positive and in whole cents."""
    payments, _, _ = month
    ids = [p["payment_id"] for p in payments]
    assert ids == sorted(set(ids))
    times = [_at(p["paid_at"]) for p in payments]
    assert times == sorted(times)
    assert all(p["amount"] > 0 and round(p["amount"], 2) == p["amount"] for p in payments)


def test_each_pattern_is_one_that_features_can_see(month) -> None:
    """Large amounts exceed what the card spends; bad terminals and cards are bad for a limited time."""
    payments, frauds, _ = month
    paid: dict[str, list[float]] = {}
    days: dict[tuple[str, str], list[datetime]] = {}
    for p in payments:
        kind = frauds.get(p["payment_id"])
        if kind is None:
            paid.setdefault(p["card_id"], []).append(p["amount"])
        elif kind in {"terminal", "card"}:
            days.setdefault((kind, p[f"{kind}_id"]), []).append(_at(p["paid_at"]))
    for p in payments:
        normal = paid.get(p["card_id"], [])
        if frauds.get(p["payment_id"]) == "amount" and len(normal) > 10:
            assert p["amount"] > 2 * sum(normal) / len(normal)
    spans = Counter(kind for (kind, _), times in days.items() if times[-1] - times[0] <= timedelta(days=17))
    assert spans.total() >= 0.9 * len(days)  # now and then one thing goes bad twice
    assert spans["terminal"] >= 2
    assert spans["card"] >= 20


def test_reports_are_late_and_untidy(month) -> None:
    """Reports follow their payment within 12 days; some are missing, doubled, or about unknown payments."""
    payments, frauds, chargebacks = month
    paid = {p["payment_id"]: _at(p["paid_at"]) for p in payments}
    reported = [_at(c["reported_at"]) for c in chargebacks]
    assert reported == sorted(reported)
    known = [c for c in chargebacks if c["payment_id"] in paid]
    delays = [_at(c["reported_at"]) - paid[c["payment_id"]] for c in known]
    assert timedelta(0) < min(delays) < timedelta(hours=12)
    assert timedelta(days=7) < max(delays) <= timedelta(days=12)
    times_reported = Counter(c["payment_id"] for c in known)
    assert set(times_reported) < set(frauds)
    assert 0.94 < len(times_reported) / len(frauds) < 1
    assert 0 < sum(n == 2 for n in times_reported.values()) < 0.03 * len(frauds)
    assert 0 < len(chargebacks) - len(known) < 0.02 * len(frauds)
    assert all(c["fraud"] is True for c in chargebacks)


def test_the_seed_decides_everything() -> None:
    """The same seed gives the same rows, another seed others."""
    assert simulate(**SMALL) == simulate(**SMALL)
    assert simulate(**SMALL) != simulate(**{**SMALL, "seed": 4})


def _digest(python: str, hash_seed: str, directory: Path) -> str:
    size = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
    subprocess.run(
        [python, "-m", "examples.payments.simulate", str(directory), *size],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        check=True,
        capture_output=True,
    )
    files = sorted(directory.iterdir())
    assert [f.name for f in files] == ["chargebacks.jsonl", "payments.jsonl"]
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()


EXPECTED = "8eb2d6082220a396d8a9ab5144abc17e0bbfe0b1e955018f3cec8f45150ebed6"
"""Of the small simulation, as CPython 3.11.7 and 3.12.1 both wrote it."""


@pytest.mark.parametrize("hash_seed", ["0", "12345"])
def test_the_bytes_are_the_same_everywhere(hash_seed: str, tmp_path: Path) -> None:
    """Neither the hash seed nor the interpreter's version changes a byte of what is written."""
    assert _digest(sys.executable, hash_seed, tmp_path) == EXPECTED


def test_other_interpreters_write_the_same_bytes(tmp_path: Path) -> None:
    """Where the other supported CPython is installed too, it writes the same bytes."""
    ran = [
        _digest(path, "1", tmp_path / name)
        for name in ("python3.11", "python3.12")
        if (path := shutil.which(name)) is not None
        and subprocess.run([path, "-c", ""], capture_output=True, check=False).returncode == 0
    ]
    assert set(ran) <= {EXPECTED}


def test_files_hold_what_is_simulated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each line is one row in order, and nothing else stays in the directory."""
    payments, chargebacks = write(tmp_path / "new" / "place", **SMALL)
    rows = simulate(**SMALL)
    assert len(payments.read_bytes().splitlines()) == len(rows[0])
    assert len(chargebacks.read_bytes().splitlines()) == len(rows[1])
    assert len(list(payments.parent.iterdir())) == 2
    main([str(tmp_path / "by_main"), "--days", "1", "--customers", "5"])
    assert "payments.jsonl" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["days", "customers", "terminals"])
def test_a_size_below_one_is_refused(name: str) -> None:
    """A simulation of nothing says which size is wrong."""
    with pytest.raises(ValueError, match=f"{name} is 0"):
        simulate(**{**SMALL, name: 0})


def test_one_terminal_out_of_reach_still_serves(tmp_path: Path) -> None:
    """Customers with no terminal within reach pay at the nearest."""
    payments, _ = simulate(days=2, customers=30, terminals=1)
    assert {p["terminal_id"] for p in payments} == {"t-0001"}
