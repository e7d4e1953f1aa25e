"""Running jobs as users do: the command in a process of its own, records read back from the files it wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def environment(**changed: str) -> dict[str, str]:
    """This process's environment, with the repository on the path."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("MILLRACE_")}
    return kept | {"PYTHONPATH": str(ROOT)} | changed


def start(reference: str, directory: Path, *options: str, **env: str) -> subprocess.Popen[str]:
    """`millrace run` in the background."""
    command = [sys.executable, "-m", "dataflows", "run", reference, "--directory", str(directory), *options]
    return subprocess.Popen(
        command, env=environment(**env), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=ROOT
    )


def run(reference: str, directory: Path, *options: str, **env: str) -> str:
    """`millrace run` to its end; what it printed. Fails the test when the run fails."""
    process = start(reference, directory, *options, **env)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    return printed


def records(directory: Path, kind: str) -> list[dict[str, Any]]:
    """The records of a kind that a run wrote."""
    return [json.loads(line) for line in (directory / f"{kind}.jsonl").read_bytes().splitlines()]


def last_metrics(directory: Path) -> dict[str, float]:
    """The values of the last metrics record."""
    values: dict[str, float] = records(directory, "metrics")[-1]["values"]
    return values
