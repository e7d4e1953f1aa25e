"""What all tests share: where the data sets are, and how hypothesis runs."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent

# deadline: a shared core makes single examples slow now and then. derandomize: a run that must pass to land
# tries the same examples every time; at a desk new ones are welcome.
settings.register_profile("desk", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("MILLRACE_REQUIRE_SHARED") == "1" else "desk")


def shared_directory() -> Path:
    """The directory of the data sets: `MILLRACE_SHARED`, else `../shared/data` beside the repository."""
    named = os.environ.get("MILLRACE_SHARED")
    return Path(named) if named is not None else ROOT.parent / "shared" / "data"


def find_shared_data(name: str) -> Path:
    """The path of a data set too large for the repository; skips the test where it is not there.

    With `MILLRACE_REQUIRE_SHARED=1` (set in .ci/run) the test fails instead: there nothing may pass unseen.
    """
    path = shared_directory() / name
    if path.exists():
        return path
    reason = f"data set {name} is not in {shared_directory()}. Hint: set MILLRACE_SHARED to its directory"
    if os.environ.get("MILLRACE_REQUIRE_SHARED") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """Finds a data set by name: `shared_data("transactions.jsonl.gz")`."""
    return find_shared_data
