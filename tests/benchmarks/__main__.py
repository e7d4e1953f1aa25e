"""Measures how fast Millrace is, against a plain Python loop that a good engineer would write for the one job.

    make bench                                    everything, under 8 minutes on 2 cores
    make bench ARGS="--quick"                     everything, fewer events and single rounds, under 90 s
    python -m tests.benchmarks --only fraud       one benchmark; --only may be given several times
    python -m tests.benchmarks --only state       the state store: see state.py; runs only when asked for
    python -m tests.benchmarks --only past        state of the past, replays, audits: see past.py; the same

Prints a table for each benchmark and writes all figures, each single run's too, to runs/bench.json.

How to read it
--------------

*The job* is examples/fraud: 12 windowed features of two entities, labels 7 days late, StandardScaler |
LogisticRegression, from a plain file to files. `plain_loop.py` does the same by hand, without checkpoints, a resume,
rejects or an engine. Both answer and score every transaction, or the benchmark fails; ROCAUC says whether they
computed the same.

*Processing* is the figure that is compared. For the loop it is its own clock: from before it opens the input to after
it closes the outputs. For `millrace run` it is from the moment the reader opens the input (its outputs appear) to
the last record written (the outputs' newest modification time). The start of interpreters and imports is in neither.
*To the last commit* adds the checkpoint at the end of input, which the loop has none of. *First to last batch* leaves
out what happens before the first batch is published: the steady state. *Whole process* is from the command to its
end, starts included. Most labels of 100,000 transactions (10 days) come due at the end of input, for both alike.

*Processor µs per event* is processor time (user and system, launcher and workers) less that of a run over one event.
It is the figure to look at on a busy machine: other programs stretch wall time far more.

*Ratios* are taken pair by pair, loop by Millrace, run one after the other; the median is quoted. 1 is as fast as the
loop; less is slower. What lies between the pairs' ratios is noise of the machine.

*Collector as in workers* is the loop with the garbage collector set as `millrace run` sets it in its workers: the loop
would gain from that too, and this says how much. The quoted ratio is to the loop as it stands.

*Peak memory* is of the largest single process.

*Steps* times the parts of `job.play` in one process, batch by batch, in processor time. *Engine* is what `millrace run`
needs beyond `play`: Bytewax, bundles between steps, status, checkpoints.

Nothing here passes or fails by a time. A load average above 1 at the start is a reason to run it again later.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.benchmarks.measure import ROOT, BenchmarkError, fingerprint, machine
from tests.benchmarks.plan import ENTITIES, PARTS, Plan
from tests.benchmarks.suite import ALL, BY_NAME_ONLY

DATA = ROOT.parent / "shared" / "data" / "transactions.jsonl.gz"
WIDTH = 120
"""Columns of tables that go to a file."""


def main() -> None:
    """The command line."""
    options = _arguments()
    out = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    described = machine()
    _introduce(out, described, options)
    results: dict[str, Any] = {"machine": described, "quick": options.quick, "source": _source_name(options.data)}
    results["code"] = fingerprint()
    started = time.monotonic()
    # As an exception, so that programs that run are ended and what they wrote is removed.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(f"benchmarks: stopped by signal {number}"))
    with tempfile.TemporaryDirectory(prefix="millrace-bench-") as scratch:
        plan = _plan(options, Path(scratch))
        for name in options.only or [name for name in ALL if name not in BY_NAME_ONLY]:
            results[name], tables = ALL[name](plan)
            for table in tables:
                out.print(_aligned(table), "")
            # After each, so that what was measured is not lost when the next one is stopped.
            results["seconds"] = round(time.monotonic() - started, 1)
            results["code_changed"] = fingerprint() != results["code"]
            _write(options.json, results)
    if results["code_changed"]:
        out.print("the code changed while it was measured: these figures are of no single version", style="yellow")
    out.print(f"{results['seconds']:.0f} s; all figures in {options.json}", soft_wrap=True, highlight=False)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks", description="How fast Millrace is. How to read it: the top of the module."
    )
    parser.add_argument("--quick", action="store_true", help="fewer events, single rounds: under 90 s")
    parser.add_argument("--only", action="append", choices=list(ALL), metavar="NAME", help=f"one of {', '.join(ALL)}")
    parser.add_argument("--data", type=Path, default=DATA, help="transactions as JSON lines, plain or .gz")
    parser.add_argument("--events", type=int, help="how many of them (default: 100,000; with --quick 20,000)")
    parser.add_argument("--pairs", type=int, help="pairs in `fraud` and `state` (default: 3; with --quick 2)")
    parser.add_argument("--entities", type=int, nargs="+", help="of `state`: for how many entities")
    parser.add_argument("--seconds", type=float, help="of `state`: for how long each run is measured")
    parser.add_argument("--checkpoints", type=int, help="of `state`: how many are kept to see what history takes")
    parser.add_argument(
        "--parts", nargs="+", choices=list(PARTS), metavar="PART", help=f"of `state`: {', '.join(PARTS)}"
    )
    parser.add_argument("--json", type=Path, default=ROOT / "runs" / "bench.json", help="where the figures go")
    options = parser.parse_args()
    if options.data != DATA and not options.data.exists():
        parser.error(f"--data {options.data}: no such file")
    return options


def _plan(options: argparse.Namespace, scratch: Path) -> Plan:
    quick = options.quick
    return Plan(
        source=options.data.resolve() if options.data.exists() else None,
        scratch=scratch,
        events=options.events if options.events is not None else (20_000 if quick else 100_000),
        pairs=options.pairs if options.pairs is not None else (2 if quick else 3),
        rounds=1 if quick else 2,
        quick=quick,
        entities=tuple(options.entities or (ENTITIES[:1] if quick else ENTITIES)),
        seconds=options.seconds if options.seconds is not None else (12.0 if quick else 30.0),
        checkpoints=options.checkpoints if options.checkpoints is not None else (100 if quick else 1_000),
        parts=tuple(options.parts or ()),
    )


def _source_name(data: Path) -> str:
    return data.name if data.exists() else "synthetic"


def _introduce(out: Console, described: dict[str, Any], options: argparse.Namespace) -> None:
    versions = ", ".join(f"{name} {number}" for name, number in described["versions"].items())
    place = f"{described['cores']} cores ({described['processor']}), {described['system']}"
    out.print(f"{place}, {described['python']}, {versions}", soft_wrap=True, highlight=False)
    if not options.data.exists():
        out.print(f"{options.data.name} is not here: synthetic transactions instead", style="yellow")
    load = described["load_average"][0]
    if load > 1:
        out.print(f"load average {load}: the machine is busy, trust ratios and processor times only", style="yellow")
    out.print()


def _aligned(table: Table) -> Table:
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _write(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except BenchmarkError as error:
        sys.exit(f"benchmarks: {error}")
