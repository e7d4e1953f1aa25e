"""Who may import whom (DESIGN.md, Layout), read from the source: nothing is imported to find out."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.conftest import ROOT

COMMANDS = {
    "dataflows.cli",
    "dataflows.cli_audit",
    "dataflows.cli_models",
    "dataflows.cli_dataset",
    "dataflows.cli_replay",
    "dataflows.cli_state",
    "dataflows.cli_rejects",
    "dataflows.cli_diff",
}

# Lower layers never import higher ones; modules of one layer may import each other. features, below all of
# these, has a rule of its own.
LAYERS = [
    {
        "dataflows.chunks",
        "dataflows.hashing",
        "dataflows.learnlog",
        "dataflows.likeness",
        "dataflows.events",
        "dataflows.orderlog",
        "dataflows.order",
        "dataflows.job",
        "dataflows.rows",
        "dataflows.remembered",
        "dataflows.control",
        "dataflows.pickles",
        "dataflows.settings",
        "dataflows.tally",
    },
    {"dataflows.admit", "dataflows.evaluate", "dataflows.learnstore"},
    {"dataflows.learner", "dataflows.changes", "dataflows.bundle", "dataflows.provenance"},
    {"dataflows.replay", "dataflows.routing", "dataflows.flow", "dataflows.query", "dataflows.rejects"},
    {
        "dataflows.startup",
        "dataflows.fork",
        "dataflows.history",
        "dataflows.relearn",
        "dataflows.findings",
        "dataflows.published",
        "dataflows.audit",
        "dataflows.dataset",
        "dataflows.models",
    },
    {"dataflows.runtime"},
    {*COMMANDS, "dataflows.monitor"},
    {"dataflows.__main__"},
]
# state ← recovery ← checkpoints ← startup
STORE = [
    {"dataflows.state"},
    {"dataflows.settings"},
    {"dataflows.recovery"},
    {"dataflows.checkpoints"},
    {"dataflows.replay", "dataflows.fork", "dataflows.startup", "dataflows.history"},
    {"dataflows.runtime"},
]

# recovery knows the engine's own store.
BYTEWAX = ["dataflows.flow", "dataflows.runtime", "dataflows.recovery", "dataflows.connectors", "dataflows.testing"]
KAFKA = ["dataflows.connectors.kafka"]
# What only the command line and the entry point show or start.
OF_CLI = {"dataflows.report", "dataflows.progress", "dataflows.diff", "dataflows.monitor", *COMMANDS}
CLI = ["dataflows.__main__", *sorted(COMMANDS)]
# The ways up that DESIGN.md wants itself: job.play(events) runs a declaration in a notebook, job.at(...) looks into its
# state. Allowed inside a function only, so that importing the declaration does not load what runs it.
LATE = ("dataflows.job", {"dataflows.replay", "dataflows.query", "dataflows.history"})


def imports(source: str, module: str, is_package: bool = False, at_start: bool = False) -> set[str]:
    """Every dotted name that the source of `module` imports, except under `if TYPE_CHECKING`.

    `from a import b` counts as `a` and `a.b`: `b` may be a module. `at_start` leaves out the imports inside
    functions, which run only when those are called.

    >>> sorted(imports("import river.stats; from .order import Batch", "dataflows.flow"))
    ['dataflows.order', 'dataflows.order.Batch', 'river.stats']
    """
    found: set[str] = set()
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in _running(ast.parse(source), at_start):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level > 0 else []
            base = ".".join([*above, *([node.module] if node.module is not None else [])])
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def _running(node: ast.AST, at_start: bool) -> Iterator[ast.AST]:
    """The nodes of a tree without the bodies of `if TYPE_CHECKING` (and of functions, with `at_start`)."""
    for child in ast.iter_child_nodes(node):
        if at_start and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield from [other, *_running(other, at_start)]
            continue
        yield child
        yield from _running(child, at_start)


def _within(name: str, modules: set[str] | list[str]) -> bool:
    return any(name == m or name.startswith(m + ".") for m in modules)


def _layer(name: str, layers: list[set[str]]) -> int | None:
    return next((i for i, layer in enumerate(layers) if _within(name, layer)), None)


def violations(module: str, source: str, is_package: bool = False) -> list[str]:
    """One sentence for each import of `module` that DESIGN.md's rules forbid."""
    broken: set[str] = set()
    at_start = imports(source, module, is_package, at_start=True)
    for name in imports(source, module, is_package):
        if module == LATE[0] and _within(name, LATE[1]) and name not in at_start:
            continue
        top = name.split(".")[0]
        if _within(module, ["features"]) and top in {"dataflows", "bytewax", "kafka", "examples", "tests"}:
            broken.add(f"{module} imports {top}: features stays pure Python")
        if top == "bytewax" and not _within(module, BYTEWAX):
            broken.add(f"{module} imports bytewax: only {', '.join(BYTEWAX)} may")
        if top == "kafka" and not _within(module, KAFKA):
            broken.add(f"{module} imports kafka: only {', '.join(KAFKA)} may")
        elif top == "kafka" and name in at_start:
            broken.add(f"{module} imports kafka at its start: jobs without Kafka would wait for it")
        if top in {"examples", "tests"}:
            broken.add(f"{module} imports {top}: what is installed does not have it")
        if _within(name, OF_CLI) and module not in CLI:
            broken.add(f"{module} imports {'.'.join(name.split('.')[:2])}: only the command line may")
        broken |= _upward(module, name)
    return sorted(broken)


def _upward(module: str, name: str) -> set[str]:
    for layers in (LAYERS, STORE):
        low, high = _layer(module, layers), _layer(name, layers)
        if low is not None and high is not None and low < high:
            return {f"{module} imports {'.'.join(name.split('.')[:2])}, which stands above it"}
    return set()


def _modules() -> Iterator[tuple[str, Path]]:
    for package in ("features", "dataflows"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def test_the_modules_keep_to_the_layers() -> None:
    """No module of features or dataflows imports what the design keeps from it."""
    broken = [
        sentence
        for module, path in _modules()
        for sentence in violations(module, path.read_text("utf-8"), path.name == "__init__.py")
    ]
    assert not broken, "\n".join(broken)


def test_every_module_is_read() -> None:
    """The check above sees the packages it is about."""
    names = {module for module, _ in _modules()}
    assert {"features", "dataflows", "dataflows.events", "dataflows.order"} <= names


def test_a_forbidden_import_is_found() -> None:
    """Upward, engine, broker and relative imports that break a rule are each named."""
    assert violations("features.spec", "from dataflows.events import Event") == [
        "features.spec imports dataflows: features stays pure Python"
    ]
    assert violations("dataflows.learner", "import bytewax.dataflow")[0].startswith("dataflows.learner imports bytewax")
    assert violations("dataflows.connectors.jsonl", "from kafka import KafkaConsumer")
    assert violations("dataflows.connectors.kafka.cluster", "from kafka import KafkaConsumer")
    assert violations("dataflows.events", "from .learner import Learner") == [
        "dataflows.events imports dataflows.learner, which stands above it"
    ]
    assert violations("dataflows.order", "from . import runtime")
    assert violations("dataflows.state", "from dataflows import checkpoints")
    assert violations("dataflows", "from .report import plot_metrics", is_package=True)
    assert violations("dataflows.runtime", "def late():\n    from dataflows import report")
    assert violations("dataflows.job", "import tests.conftest")
    assert violations("dataflows.job", "from dataflows.replay import play")
    assert violations("dataflows.order", "def play():\n    from dataflows.replay import play")


def test_allowed_imports_pass() -> None:
    """What the rules allow is not reported, and what only type checkers read does not count."""
    assert violations("dataflows.flow", "import bytewax\nfrom dataflows.learner import Learner") == []
    assert violations("dataflows.connectors.kafka", "import bytewax.inputs\ndef late():\n    import kafka") == []
    assert violations("dataflows.cli", "from dataflows.report import metric_table") == []
    assert violations("dataflows.job", "from features.spec import Entity\nfrom . import events") == []
    assert violations("dataflows.job", "def play():\n    from dataflows.replay import play") == []
    source = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from dataflows.runtime import Launcher"
    assert violations("dataflows.events", source) == []
    assert violations("dataflows.events", source + "\nelse:\n    import dataflows.runtime") != []
