"""The commands of README.md that need a broker, run with one."""

from __future__ import annotations

from pathlib import Path

from tests.conftest import ROOT
from tests.integration.topics import Topics
from tests.test_documents import _call, _copy_examples, read_blocks

MARK = "needs a broker"


def test_the_commands_of_the_readme_work_on_kafka(kafka: Topics, tmp_path: Path) -> None:
    """A reader with a broker can follow them from the top."""
    _copy_examples(tmp_path)
    blocks = [block for block in read_blocks((ROOT / "README.md").read_text("utf-8")) if block.not_run == MARK]
    assert blocks
    for block in blocks:
        assert "localhost:9092" in block.script
        script = block.script.replace("localhost:9092", kafka.address)
        _call(["bash", "-xeuo", "pipefail", "-c", script], tmp_path, f"README.md:{block.line}")
    assert kafka.read("scores")
