"""Runs what README.md and examples/*/README.md tell a reader to do, in order, in a copy of the examples.

How to write a document so that this finds its commands:

1. Commands stand in ```` ```console ```` blocks on lines that begin with `$ `; a line that ends in a
   backslash goes on in the next one; other lines are output, shown and not compared. They are written for
   the root of the repository. A block is one bash script: it must succeed within 120 s.
2. A block directly under a line that ends in a file name, like `` `my_job.py`: ``, is saved under that name.
3. Other ```` ```python ```` blocks are complete programs and are run; if they begin with `>>>`, as doctests.
4. `<!-- not run: reason -->` directly above a block keeps it from being run. The reason is not optional.
5. `make` targets must exist; they are run by .ci/run, not here (`make test` would run this test again).
6. Data sets are in the current directory under their own names; a document that names one which is not on
   this machine is skipped, or fails, as `find_shared_data` says.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import ROOT, find_shared_data

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "examples").glob("*/README.md"))]
DATA_SETS = ("transactions.jsonl.gz", "toulouse_bikes.csv.gz", "kdd99_http.csv.gz")
TIMEOUT_S = 120

FENCE = re.compile(r"^(?P<indent> *)```(?P<language>[^`\s]*)\s*$")
NOT_RUN = re.compile(r"^<!--\s*not run:\s*(?P<reason>.*?)\s*-->$")
FILE_NAME = re.compile(r"`(?P<name>[\w./-]+\.\w+)`[^`]*:$")


class Unreadable(ValueError):
    """A document that does not keep to the rules above: says where and what to write instead."""


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block: what to do with it, and where it stands (`line` counts from 1)."""

    line: int
    language: str
    text: str
    name: str | None = None
    not_run: str | None = None

    @property
    def script(self) -> str:
        """The commands of a console block, one per line.

        >>> Block(1, "console", "$ ls \\\\\\n  -l\\ntotal 0\\n$ date").script
        'ls \\\\\\n  -l\\ndate'
        """
        kept: list[str] = []
        for line in self.text.splitlines():
            if line.startswith("$ "):
                kept.append(line[2:])
            elif kept and kept[-1].endswith("\\"):
                kept.append(line)
        return "\n".join(kept)


def read_blocks(text: str, where: str = "document") -> list[Block]:
    """The fenced blocks of a Markdown text; raises `Unreadable` where a command would go unseen.

    >>> read_blocks("Save `a.py`:\\n\\n```python\\nprint(1)\\n```")[0].name
    'a.py'
    """
    blocks: list[Block] = []
    lines = iter(enumerate(text.splitlines(), start=1))
    above = ""
    for number, line in lines:
        opening = FENCE.match(line)
        if opening is None:
            above = line.strip() or above
            continue
        body = []
        for _, inner in lines:
            if inner.strip() == "```":
                break
            body.append(inner.removeprefix(opening["indent"]))
        else:
            raise Unreadable(f"{where}:{number}: this block has no end. Hint: close it with ```")
        blocks.append(_block(f"{where}:{number}", number, opening["language"], "\n".join(body), above))
        above = ""
    return blocks


def _block(where: str, line: int, language: str, text: str, above: str) -> Block:
    if language in {"bash", "sh", "shell", "zsh"}:
        raise Unreadable(f"{where}: a {language} block is not run. Hint: ```console with `$ ` before commands")
    if language == "console" and not any(row.startswith("$ ") for row in text.splitlines()):
        raise Unreadable(f"{where}: no line of this console block begins with `$ `, so nothing would be run")
    mark = NOT_RUN.match(above)
    if mark is not None and mark["reason"] == "":
        raise Unreadable(f"{where}: not run, but why? Hint: <!-- not run: needs a broker -->")
    named = FILE_NAME.search(above) if language != "console" else None
    return Block(line, language, text, named and named["name"], mark and mark["reason"])


def run_document(text: str, directory: Path, where: str = "document") -> list[str]:
    """Does in `directory` what a document says; returns what was done, fails the test where that fails."""
    done = []
    for block in read_blocks(text, where):
        if block.not_run is not None:
            done.append(f"not run: {block.not_run}")
        elif block.name is not None:
            path = directory / block.name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text + "\n", "utf-8")
            done.append(f"saved {block.name}")
        else:
            done += _run(block, directory, f"{where}:{block.line}")
    return done


def _run(block: Block, directory: Path, where: str) -> list[str]:
    if block.language == "console":
        script = _without_make(block.script, where)
        _call(["bash", "-xeuo", "pipefail", "-c", script], directory, where)
        return script.splitlines()
    if block.language == "python":
        path = directory / f"block_{block.line}.py"
        path.write_text(block.text + "\n", "utf-8")
        doctest = ["-m", "doctest"] if block.text.lstrip().startswith(">>>") else []
        if doctest:
            path = path.rename(path.with_suffix(".txt"))
        _call([sys.executable, *doctest, path.name], directory, where)
        return [f"ran {path.name}"]
    return []


def _without_make(script: str, where: str) -> str:
    """The script without its `make` lines, whose targets must be there."""
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    kept = []
    for line in script.splitlines():
        words = shlex.split(line, comments=True) if line.startswith("make") else []
        if words[:1] != ["make"]:
            kept.append(line)
            continue
        missing = [w for w in words[1:] if "=" not in w and not w.startswith("-") and w not in targets]
        assert not missing, f"{where}: the Makefile has no target {', '.join(missing)}; it has {targets}"
    return "\n".join(kept)


def _call(command: list[str], directory: Path, where: str) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "COV_"))}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    # A wide, plain terminal: what the reader's terminal is like must not change what happens.
    environment |= {"COLUMNS": "120", "NO_COLOR": "1", "TERM": "dumb"}
    process = subprocess.Popen(
        command,
        cwd=directory,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that the workers of a job that hangs end with it
    )
    try:
        output, _ = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"{where}: not done after {TIMEOUT_S} s\n{output[-4000:]}")
    if process.returncode != 0:
        pytest.fail(f"{where}: ended with exit code {process.returncode}\n{output[-4000:]}")


def _copy_examples(directory: Path) -> None:
    ignore = shutil.ignore_patterns("__pycache__", "out", "state", "*.jsonl", "*.jsonl.gz")
    shutil.copytree(ROOT / "examples", directory / "examples", ignore=ignore)
    for name in ("Makefile", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, directory)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_document_does_what_it_says(document: Path, tmp_path: Path) -> None:
    """Every command and program of a document works for a reader who follows it from the top."""
    text = document.read_text("utf-8")
    _copy_examples(tmp_path)
    for name in DATA_SETS:
        if name in text:
            (tmp_path / name).symlink_to(find_shared_data(name))
    run_document(text, tmp_path, str(document.relative_to(ROOT)))


def test_blocks_are_saved_run_or_named_as_not_run(tmp_path: Path) -> None:
    """Files are saved under the name above them, programs and commands run, and reasons are kept."""
    text = """
Save `answer.py`:

```python
print(6 * 7)
```

```console
$ python answer.py > answer.txt
$ make test
$ test "$(cat answer.txt)" \\
    = 42
output that is not a command
```

```python
from pathlib import Path
assert Path("answer.txt").read_text() == "42\\n"
```

```python
>>> 6 * 7
42
```

<!-- not run: needs a broker -->
```console
$ false
```
"""
    assert run_document(text, tmp_path) == [
        "saved answer.py",
        "python answer.py > answer.txt",
        'test "$(cat answer.txt)" \\',
        "    = 42",
        "ran block_16.py",
        "ran block_21.txt",
        "not run: needs a broker",
    ]


@pytest.mark.parametrize(
    "block",
    [
        "console\n$ false\n$ true",
        "console\n$ false | true",
        "console\n$ make no-such-target",
        "python\nassert False",
        "python\n>>> 6 * 7\n41",
    ],
)
def test_what_does_not_work_fails(block: str, tmp_path: Path) -> None:
    """A failing command, pipe, make target, program or doctest fails the document's test."""
    with pytest.raises((pytest.fail.Exception, AssertionError), match="document:1"):
        run_document(f"```{block}\n```", tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```bash\nls\n```", "console"),
        ("```console\nls\n```", "begins with"),
        ("<!-- not run: -->\n```console\n$ ls\n```", "why"),
        ("```python\nprint()", "no end"),
    ],
)
def test_a_command_that_would_go_unseen_is_refused(text: str, message: str) -> None:
    """Blocks that would silently not be run are errors that say what to write instead."""
    with pytest.raises(Unreadable, match=message):
        read_blocks(text)


def test_a_command_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command with a child that never ends is killed after the bound, and the test fails."""
    monkeypatch.setattr("tests.test_documents.TIMEOUT_S", 0.5)
    with pytest.raises(pytest.fail.Exception, match="not done after"):
        run_document("```console\n$ sleep 60 & wait\n```", tmp_path)
