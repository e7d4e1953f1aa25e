"""What results depend on beside the data: code, libraries, interpreter, machine; noted with whatever is kept."""

from __future__ import annotations

import hashlib
import platform
import subprocess
import sys
from functools import cache
from importlib.metadata import version as package_version
from pathlib import Path

import msgspec

from dataflows.changes import describe
from dataflows.job import Job
from dataflows.pickles import names_of, users_modules

_LIBRARIES = ("bytewax", "river", "pydantic", "msgspec", "numpy", "scipy")

_OURS = Path(__file__).resolve().parent.parent

_DIGITS = 16
"""Of a digest, in hexadecimal: enough to tell two apart, short enough to read."""

_GIT_S = 5.0
"""Seconds that git may take to say which commit this is."""


def environment() -> dict[str, str]:
    """Interpreter, libraries, processor family."""
    found = {"python": platform.python_version(), "implementation": platform.python_implementation()}
    found |= {"machine": platform.machine(), "system": platform.system()}
    for library in _LIBRARIES:
        found[library] = package_version(library)
    return found


def provenance(job: Job, groups: int) -> dict[str, str]:
    """The environment, and digests of the code: Millrace's own, the job's declaration, the job's files; the git commit.

    Equal on two machines exactly where the same code runs in the same environment.
    """
    files = _files_of(job)
    found = environment() | {"millrace": f"{package_version('millrace')} {_own_digest()}"}
    found["job"] = _digest(msgspec.json.encode(describe(job, groups), order="deterministic"))
    for name, path in sorted(files.items()):
        found[f"file {name}"] = _digest(path.read_bytes())
    commit = _commit(next(iter(files.values())).parent) if files else None
    return found | ({} if commit is None else {"commit": commit})


def differences(then: dict[str, str], now: dict[str, str]) -> list[str]:
    """What is not as it was, for people; the commit only where nothing else says so.

    >>> differences({"python": "3.11.7", "commit": "a"}, {"python": "3.12.1", "commit": "b"})
    ['python was 3.11.7 and is 3.12.1']
    """
    names = [name for name in (*then, *(n for n in now if n not in then)) if name != "commit"]
    return [
        f"{name} was {then.get(name, 'not there')} and is {now.get(name, 'not there')}"
        for name in names
        if then.get(name) != now.get(name)
    ]


def _files_of(job: Job) -> dict[str, Path]:
    """The files in which the job's own classes and functions are written, by name."""
    modules = {job.events.event.__module__, job.label_class.__module__} | users_modules(names_of(job))
    found: dict[str, Path] = {}
    for module in modules:
        path = getattr(sys.modules.get(module), "__file__", None)
        if path is not None and module.split(".")[0] not in ("dataflows", "features", *_LIBRARIES):
            found[Path(path).name] = Path(path)
    return found


@cache
def _own_digest() -> str:
    digest = hashlib.sha256()
    for package in ("dataflows", "features"):
        for path in sorted((_OURS / package).rglob("*.py")):
            digest.update(str(path.relative_to(_OURS)).encode() + path.read_bytes())
    return digest.hexdigest()[:_DIGITS]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:_DIGITS]


def _commit(directory: Path) -> str | None:
    """The commit that is checked out, and whether files differ from it; None where there is no repository."""
    said = []
    for command in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no")):
        try:
            done = subprocess.run(
                ["git", "-C", str(directory), *command], capture_output=True, text=True, timeout=_GIT_S, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        if done.returncode:
            return None
        said.append(done.stdout.strip())
    return said[0] + (" with changes" if said[1] else "")
