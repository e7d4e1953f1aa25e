"""The broker that integration tests share, one for each process that runs tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.integration.broker import NoBroker, running
from tests.integration.topics import Topics


@pytest.fixture(scope="session")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Topics]:
    """Topics of a real broker: that of KAFKA_BOOTSTRAP, or one that is started here."""
    named = os.environ.get("KAFKA_BOOTSTRAP")
    if named is not None:
        yield Topics(named)
        return
    try:
        with running(tmp_path_factory.mktemp("kafka")) as broker:
            yield Topics(broker.address, broker)
    except NoBroker as error:
        if os.environ.get("KAFKA_REQUIRED") == "1":
            pytest.fail(f"KAFKA_REQUIRED=1, but {error}")
        pytest.skip(str(error))
