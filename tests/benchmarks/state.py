"""What the state store costs, by the number of entities: checkpoints, memory, the time after a kill, history.

    python -m tests.benchmarks --only state                                      everything
    python -m tests.benchmarks --only state --entities 1000 100000 --seconds 20  fewer entities, shorter runs
    python -m tests.benchmarks --only state --parts throughput kill              some of the questions

Everything takes an hour or so on 2 cores, and 10 GB of disk.

How to read it
--------------

Each entity has about 1 KB of state, pickled (`state_job`). All runs with as many entities go on from copies of one
state: that after one wide event of each. Entities are then touched at random, all alike. Measuring begins after a
number of events (`SETTLE`), so that entities, which are read from the store when they are first touched, are in memory
as far as the cache lets them. Programs are watched from outside (`state_watch`).

*Throughput* is events/s over whole periods: from one checkpoint to a later one, and without checkpoints over the same
batches. *None* is the same program with an interval of weeks. It still writes rows between checkpoints, when enough
has changed; *nothing kept* does not do that either, so the ratio to it is all that keeping state costs. Pairs are run
one after the other, every other time in reverse; the median of their ratios is quoted. *Processor µs* are of launcher
and worker, per event after settling, and on a busy machine say more than events/s.

*Own snapshots* is the job as a plain Bytewax flow with a key for each entity, whose snapshots are pickles of the state
(`own_snapshots`), again with checkpoints every 5 s and with none.

A checkpoint's *stall* is from the last batch published before it to the first that may leave after it, as manifests
have it; *silence* is the longest time without a batch published around it, as seen from outside: it holds the time of
that batch too. *Snapshot* is from its begin until all rows are written, *commit* from there until the next batch;
*complete* is from its begin until the launcher, which looks 20 times a second, has seen the engine commit it.

*After a kill*: all processes get kill -9 in the middle between two checkpoints, and `millrace run` is started again as
a user would. Files are still in the system's page cache, as after any death of a process. First prediction: until the
first new line in predictions.jsonl. Full speed: until the end of the first 2 s in which 90 % of the rate before the
first kill were reached.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from dataflows.checkpoints import Checkpoints, Manifest
from dataflows.control import Phase
from dataflows.settings import RunDirectory
from dataflows.state import StateStore
from tests.benchmarks.measure import ROOT, STATE_JOB, BenchmarkError
from tests.benchmarks.plan import PARTS, Plan, Result
from tests.benchmarks.state_events import write
from tests.benchmarks.state_job import FLUSH
from tests.benchmarks.state_watch import BATCH, Watched, manifest_fields, percentile, size

INTERVAL_S = 5.0
NEVER_S = 1e6
SETTLE = (20_000, 300_000)
"""Events before measuring: two for each entity, but so many at the least and at the most."""
FASTEST = 30_000
"""Events/s for which there is input."""
START_LIMIT_S = 900.0
KEEP_ALL = ("--keep-last", "10000")
SMALL_CACHE = 50_000
"""Entities in memory at the most, where memory is measured."""
SQLITE_MIB = 8
"""Of each state file a worker keeps so many MiB of pages (`dataflows.state`)."""
GROUPS = 16
QUICK_S = 0.1
"""Seconds between checkpoints where there shall be many."""
LOOK_S = 0.5
KILLS = 3
FULL_SPEED = 0.9
SPEED_WINDOW_S = 2.0

LOSS_MAX = 0.10
FIRST_MAX_S = 5.0
FULL_MAX_S = 30.0
BYTES_GROWTH_MAX = 1.5
HISTORY_MAX = 2.0
"""What the goals allow. The last two: how far bytes per event may grow with the entities, and what the files of many
checkpoints may take of the bytes that they hold."""


# -- what runs start from


@dataclass(frozen=True)
class Scene:
    """Input and states for a number of entities.

    `wide` holds a wide event of each entity, `full` the same and what follows; `base` is a run's directory after the
    wide ones, `first` its last batch.
    """

    entities: int
    scratch: Path
    wide: Path
    full: Path
    first: int

    @property
    def base(self) -> Path:
        """The directory of a run that has seen the wide events."""
        return self.scratch / "base"

    @property
    def own_base(self) -> Path:
        """The same for the engine's own snapshots; made when it is first asked for."""
        directory = self.scratch / "own"
        if not directory.exists():
            directory.mkdir()
            with _own(self, directory, NEVER_S, self.wide) as run:
                run.until(lambda _: False, START_LIMIT_S)
        return directory

    @property
    def settled(self) -> int:
        """The batch from which on is measured."""
        return self.first + min(max(2 * self.entities, SETTLE[0]), SETTLE[1]) // BATCH

    @contextmanager
    def copy(self, base: Path) -> Iterator[Path]:
        """A directory to run in, like a base; gone afterwards."""
        with tempfile.TemporaryDirectory(dir=self.scratch) as name:
            yield Path(shutil.copytree(base, Path(name) / "run"))


@contextmanager
def _scene(plan: Plan, entities: int) -> Iterator[Scene]:
    with tempfile.TemporaryDirectory(dir=plan.scratch) as name:
        scratch = Path(name)
        seconds = {"kill": plan.seconds + KILLS * 2 * FULL_MAX_S, "retained": 0.3 * plan.checkpoints}
        longest = max(seconds.get(part, plan.seconds) for part in plan.parts or PARTS)
        wide, full = write(scratch, entities, SETTLE[1] + int(longest * FASTEST))
        scene = Scene(entities, scratch, wide, full, -(-entities // BATCH))
        with _millrace(scene, scene.base, INTERVAL_S, "--follow", data=wide) as run:
            run.batches(scene.first, START_LIMIT_S)
            run.stop()
        yield scene


def _millrace(
    scene: Scene,
    directory: Path,
    interval_s: float = INTERVAL_S,
    *options: str,
    data: Path | None = None,
    flush: int | None = None,
) -> Watched:
    """`millrace run`, by default as a user would start it."""
    command: list[str | Path] = ["dataflows", "run", STATE_JOB, "--data", data or scene.full, "--directory", directory]
    environment = {} if flush is None else {FLUSH: str(flush)}
    return Watched(
        [*command, "--checkpoint", str(interval_s), *options],
        RunDirectory(directory).control,
        scene.scratch / "log",
        **environment,
    )


def _own(scene: Scene, directory: Path, interval_s: float, data: Path | None = None) -> Watched:
    command: list[str | Path] = ["tests.benchmarks.own_snapshots", data or scene.full, directory, str(interval_s)]
    return Watched(command, directory / "control", scene.scratch / "log")


# -- throughput


@dataclass(frozen=True)
class Speed:
    """One run: `rate` in events/s over the batches `measured`, processor time per event, and what was seen beside."""

    rate: float
    measured: tuple[int, int]
    cpu_us: dict[str, float]
    peak_mib: dict[str, float | None]
    checkpoints: dict[str, list[float]]
    store_bytes: int

    def record(self) -> dict[str, Any]:
        """For the JSON file."""
        return vars(self) | {"rate": round(self.rate)}


def _speed(
    scene: Scene, run: Watched, directory: Path, settled: int, seconds: float, target: int | None
) -> tuple[Watched, Speed]:
    """Watch a run from when it has settled, up to a batch or for some seconds."""
    run.batches(settled, START_LIMIT_S)
    before = run.cpu_s()
    if target is None:
        run.for_seconds(seconds)
    else:
        run.batches(target, START_LIMIT_S)
    reached = run.timeline.batches[-1]
    if reached <= settled or run.process.poll() is not None:
        raise BenchmarkError(f"nothing can be measured from batch {settled} to {reached}: too little input, or time")
    events = (reached - settled) * BATCH
    cpu_us = {who: round((s - before[who]) / events * 1e6, 2) for who, s in run.cpu_s().items()}
    peaks = run.peak_mib()
    run.kill()
    seen = run.timeline
    measured = seen.whole_periods(settled, reached) or (settled, reached)
    checkpoints: dict[str, list[float]] = {
        "silence": seen.silences(),
        "snapshot": seen.lasted(Phase.SNAPSHOT),
        "committing": seen.lasted(Phase.COMMITTING),
        "manifest": seen.lasted(Phase.MANIFEST, "launcher"),
        "prune": seen.lasted(Phase.PRUNE, "launcher"),
        "complete": _completed(seen.began(Phase.SNAPSHOT), seen.began(Phase.MANIFEST, "launcher")),
    }
    store = 0
    if (directory / "state").exists():
        checkpoints |= manifest_fields(_manifests(directory, scene.settled))
        store = size(RunDirectory(directory).groups)
    rounded = {name: [round(value, 4) for value in values] for name, values in checkpoints.items()}
    return run, Speed(seen.rate(*measured), measured, cpu_us, peaks, rounded, store)


def _completed(began: list[float], seen: list[float]) -> list[float]:
    """For each checkpoint the time until its manifest."""
    return [after - moment for moment in began if (after := min((s for s in seen if s > moment), default=None))]


def _manifests(directory: Path, after: int) -> list[Manifest]:
    return [manifest for manifest in Checkpoints(RunDirectory(directory)).all() if manifest.batch >= after]


_ARMS: dict[str, tuple[float, int | None]] = {
    "checkpoints": (INTERVAL_S, None),
    "none": (NEVER_S, None),
    "nothing_kept": (NEVER_S, 10**12),
}
"""Seconds between checkpoints, and changes after which rows are written without one."""


def throughput(plan: Plan, scene: Scene) -> dict[str, Any]:
    """Runs with checkpoints, without, and with the engine's own, in turn."""
    pairs: list[dict[str, Speed]] = []
    target: int | None = None
    for number in range(plan.pairs):
        names = [*_ARMS, "own_checkpoints", "own_none"]
        speeds: dict[str, Speed] = {}
        watched: dict[str, Watched] = {}
        for name in names if number % 2 == 0 else reversed(names):
            if name.startswith("own_"):
                speeds[name] = _own_speed(plan, scene, INTERVAL_S if name == "own_checkpoints" else NEVER_S)
                continue
            interval_s, flush = _ARMS[name]
            with (
                scene.copy(scene.base) as directory,
                _millrace(scene, directory, interval_s, "--keep-last", _kept(plan), flush=flush) as run,
            ):
                watched[name], speeds[name] = _speed(scene, run, directory, scene.settled, plan.seconds, target)
            if target is None:
                target = run.timeline.batches[-1]
        for name in ("none", "nothing_kept"):
            measured = speeds["checkpoints"].measured
            speeds[name] = replace(
                speeds[name], rate=watched[name].timeline.rate(*measured), measured=measured, checkpoints={}
            )
        pairs.append(speeds)
    return {name: [pair[name].record() for pair in pairs] for name in pairs[0]}


def _kept(plan: Plan) -> str:
    """As many checkpoints as are measured, so that their manifests can be read; those before are pruned meanwhile."""
    return str(int(plan.seconds / INTERVAL_S) + 2)


def _own_speed(plan: Plan, scene: Scene, interval_s: float) -> Speed:
    with scene.copy(scene.own_base) as directory, _own(scene, directory, interval_s) as run:
        return _speed(scene, run, directory, scene.first + 20, plan.seconds, None)[1]


def _throughput_tables(records: dict[int, dict[str, Any]]) -> list[Table]:
    ours = _table(
        f"throughput: events/s with checkpoints every {INTERVAL_S:.0f} s, and without; goal: at most {LOSS_MAX:.0%} "
        "lost at 100,000 entities, to none and to nothing kept",
        "entities", "every 5 s", "none", "ratio", "each", "nothing kept", "ratio", "each", "cpu µs", "none",
        "nothing kept", "goal",
    )  # fmt: skip
    own = _table(
        "the same with the engine's own snapshots, a key for each entity",
        "entities", "every 5 s", "each", "none", "each", "ratio", "Millrace / own, every 5 s", "cpu µs", "none",
        "peak MiB",
    )  # fmt: skip
    for entities, record in records.items():
        rates = {name: [each["rate"] for each in runs] for name, runs in record.items()}
        cpu = {name: f"{median(sum(each['cpu_us'].values()) for each in runs):.1f}" for name, runs in record.items()}
        none, kept = (_ratios(rates["checkpoints"], rates[name]) for name in ("none", "nothing_kept"))
        goal = ", ".join(_goal(median(each) >= 1 - LOSS_MAX) for each in (none, kept)) if entities == 100_000 else ""
        ours.add_row(
            f"{entities:,}", _rate(rates["checkpoints"]), _rate(rates["none"]),
            f"{median(none):.3f}", _list(none, ".3f"), _rate(rates["nothing_kept"]),
            f"{median(kept):.3f}", _list(kept, ".3f"), cpu["checkpoints"], cpu["none"], cpu["nothing_kept"], goal,
        )  # fmt: skip
        with_, without = rates["own_checkpoints"], rates["own_none"]
        peaks = [each["peak_mib"]["workers"] for each in record["own_checkpoints"]]
        own.add_row(
            f"{entities:,}", _rate(with_), _list(with_, ",.0f"), _rate(without), _list(without, ",.0f"),
            f"{median(_ratios(with_, without)):.3f}", f"{median(_ratios(rates['checkpoints'], with_)):.1f}",
            cpu["own_checkpoints"], cpu["own_none"], f"{median(peaks):,.0f}",
        )  # fmt: skip
    return [ours, *_checkpoint_tables(records), own]


def _checkpoint_tables(records: dict[int, dict[str, Any]]) -> list[Table]:
    sizes = _table(
        f"what checkpoints every {INTERVAL_S:.0f} s write; goal: bytes follow the events since the one before, not the "
        f"entities (bytes per event, at most × {BYTES_GROWTH_MAX} those of fewer entities)",
        "entities", "checkpoints", "events each", "MB each", "MB at most", "bytes per event", "state files MB", "goal",
    )  # fmt: skip
    times = _table(
        f"how long checkpoints every {INTERVAL_S:.0f} s take, in ms",
        "entities", "stall", "p99", "silence", "p99", "snapshot", "commit", "complete", "p99", "manifest", "prune",
    )  # fmt: skip
    fewer: float | None = None
    for entities, record in records.items():
        runs = record["checkpoints"]
        found = {name: [v for run in runs for v in run["checkpoints"][name]] for name in runs[0]["checkpoints"]}
        if not found["bytes"]:
            continue
        per_event = sum(found["bytes"]) / sum(found["events"])
        sizes.add_row(
            f"{entities:,}", f"{len(found['bytes'])}", f"{median(found['events']):,.0f}",
            f"{median(found['bytes']) / 1e6:.2f}", f"{max(found['bytes']) / 1e6:.2f}", f"{per_event:.0f}",
            f"{median(run['store_bytes'] for run in runs) / 1e6:,.0f}",
            "" if fewer is None else _goal(per_event <= BYTES_GROWTH_MAX * fewer),
        )  # fmt: skip
        fewer = per_event
        cells = [_ms(found[name], part) for name, part in _TIMES]
        times.add_row(f"{entities:,}", *cells)
    return [sizes, times]


_TIMES = [
    ("stall", None), ("stall", 0.99), ("silence", None), ("silence", 0.99), ("snapshot", None), ("committing", None),
    ("complete", None), ("complete", 0.99), ("manifest", None), ("prune", None),
]  # fmt: skip


# -- memory


def memory(plan: Plan, scene: Scene) -> dict[str, Any]:
    """Peak memory with a small cache, after as many events as make it forget."""
    with (
        scene.copy(scene.base) as directory,
        _millrace(scene, directory, INTERVAL_S, "--cache", str(SMALL_CACHE)) as run,
    ):
        run.batches(scene.settled, START_LIMIT_S)
        run.for_seconds(plan.seconds)
        return {"peak_mib": run.peak_mib(), "events": (run.timeline.batches[-1] - scene.first) * BATCH}


_ONE_ENTITY = """
import os
from itertools import islice
from pathlib import Path
from features.state import EntityFeatures
from tests.benchmarks.state_events import events
from tests.benchmarks.state_job import entity, job

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

count, features, sizes = 20_000, EntityFeatures(entity, trusted=job.trusted_columns), []
lines, before = events(count), resident()
for each in (1, 20):
    for line in islice(lines, each * count):
        features.ask(line.entity, line.at, (line.amount, line.profile))
    sizes.append((resident() - before) / count)
print(max(sizes))
"""


def _entity_bytes() -> float:
    """Memory that an entity of the benchmark takes: after its wide event, or 20 narrow ones, whichever is more."""
    done = subprocess.run(
        [sys.executable, "-c", _ONE_ENTITY], cwd=ROOT, capture_output=True, text=True, check=True
    )  # fmt: skip
    return float(done.stdout)


def _memory_tables(records: dict[int, dict[str, Any]]) -> list[Table]:
    one = _entity_bytes()
    table = _table(
        f"memory with a cache of {SMALL_CACHE:,} entities, {one:,.0f} bytes each; goal: under the bound, which is "
        f"the fewest entities' peak, and what the cache and {GROUPS + 1} state files ({SQLITE_MIB} MiB each) may take",
        "entities", "events", "peak MiB, worker", "bound MiB", "launcher MiB", "goal",
    )  # fmt: skip
    fewest = min(records)
    base = records[fewest]["peak_mib"]["workers"] or 0.0
    bound = base + (SMALL_CACHE - min(fewest, SMALL_CACHE)) * one / (1 << 20) + (GROUPS + 1) * SQLITE_MIB
    for entities, record in records.items():
        peak = record["peak_mib"]["workers"] or 0.0
        table.add_row(
            f"{entities:,}", f"{record['events']:,}", f"{peak:,.0f}", f"{bound:,.0f}",
            f"{record['peak_mib']['launcher']:,.0f}", "" if entities == fewest else _goal(peak <= bound),
        )  # fmt: skip
    return [table]


# -- after a kill


def kill(plan: Plan, scene: Scene) -> dict[str, Any]:
    """kill -9 between two checkpoints, again and again, each time until full speed."""
    with scene.copy(scene.base) as directory:
        with _millrace(scene, directory) as run:
            run.batches(scene.settled, START_LIMIT_S)
            run.for_seconds(plan.seconds)
            before = _rate_before(run, scene.settled)
            _await_middle(run)
        after = []
        for _ in range(1 if plan.quick else KILLS):
            run, seen = _restart(scene, directory, before)
            with run:
                run.for_seconds(INTERVAL_S)
                _await_middle(run)
            after.append(seen)
    return {"rate_before": round(before), "after": after}


def _rate_before(run: Watched, settled: int) -> float:
    seen = run.timeline
    return seen.rate(*(seen.whole_periods(settled, seen.batches[-1]) or (settled, seen.batches[-1])))


def _await_middle(run: Watched) -> None:
    """Watch until half a period after a checkpoint that is yet to come."""
    checkpoints = len(run.timeline.began(Phase.SNAPSHOT))
    run.until(lambda seen: len(seen.began(Phase.SNAPSHOT)) > checkpoints, 4 * INTERVAL_S)
    run.for_seconds(INTERVAL_S / 2)


def _restart(scene: Scene, directory: Path, before: float) -> tuple[Watched, dict[str, Any]]:
    """Start again, and watch until full speed: seconds from the start of the command."""
    predictions = RunDirectory(directory).output("predictions")
    low = killed = predictions.stat().st_size
    first: float | None = None
    full: float | None = None
    run = _millrace(scene, directory)

    def fast(seen: Any) -> bool:
        nonlocal low, first, full
        now = time.monotonic()
        if first is None:
            # The file is cut back to the checkpoint, then it grows.
            there = predictions.stat().st_size
            if there > low and (low < killed or there > killed):
                first = now - run.started
            low = min(low, there)
        elif seen.batches and full is None and now - run.started - first > SPEED_WINDOW_S:
            done = seen.batches[-1] - seen.batch_at(now - SPEED_WINDOW_S)
            if done * BATCH / SPEED_WINDOW_S >= FULL_SPEED * before:
                full = now - run.started
        return full is not None

    try:
        run.until(fast, 4 * FULL_MAX_S)
    except BaseException:
        run.kill()
        raise
    steps = {
        "prepared": _since(run, run.timeline.began(Phase.WATCHING, "launcher")),
        "reading": run.timeline.times[0] - run.started if run.timeline.times else None,
        "first": first,
        "full": full,
    }
    return run, {name: None if value is None else round(value, 3) for name, value in steps.items()}


def _since(run: Watched, moments: list[float]) -> float | None:
    return moments[0] - run.started if moments else None


def _kill_tables(records: dict[int, dict[str, Any]]) -> list[Table]:
    table = _table(
        f"after kill -9, seconds from the start; goal: first prediction < {FIRST_MAX_S:.0f} s, full speed < "
        f"{FULL_MAX_S:.0f} s",
        "entities", "events/s before", "state ready", "reading", "first prediction", "each", "full speed", "each",
        "goal",
    )  # fmt: skip
    for entities, record in records.items():
        found = {name: [each[name] for each in record["after"]] for name in record["after"][0]}
        first, full = _worst(found["first"]), _worst(found["full"])
        table.add_row(
            f"{entities:,}", f"{record['rate_before']:,}", _seconds(found["prepared"]), _seconds(found["reading"]),
            _seconds(found["first"]), _each(found["first"]), _seconds(found["full"]), _each(found["full"]),
            _goal(first < FIRST_MAX_S and full < FULL_MAX_S),
        )  # fmt: skip
    return [table]


def _worst(values: list[float | None]) -> float:
    return max(float("inf") if value is None else value for value in values)


def _seconds(values: list[float | None]) -> str:
    return "never" if None in values else f"{median(v for v in values if v is not None):.2f}"


def _each(values: list[float | None]) -> str:
    return " ".join("never" if value is None else f"{value:.2f}" for value in values)


# -- history


def retained(plan: Plan, scene: Scene) -> dict[str, Any]:
    """Many checkpoints in quick succession, all kept."""
    with scene.copy(scene.base) as directory:
        run_directory = RunDirectory(directory)
        before = len(Checkpoints(run_directory).all())
        with _millrace(scene, directory, QUICK_S, *KEEP_ALL) as run:
            start = run.cpu_s()
            cpu = start
            while _count(run_directory.checkpoints) < before + plan.checkpoints and run.process.poll() is None:
                cpu = run.cpu_s()
                run.for_seconds(LOOK_S)
            seconds = time.monotonic() - run.started
            seen = run.timeline
            run.kill()
        manifests = Checkpoints(run_directory).all()
        fields = manifest_fields(manifests)
        return {
            "checkpoints": len(manifests),
            "seconds": round(seconds, 1),
            "first_bytes": _visible_bytes(run_directory, manifests[0]),
            "last_bytes": _visible_bytes(run_directory, manifests[-1]),
            "changed_bytes": int(sum(fields["bytes"])),
            "changed_events": int(sum(fields["events"])),
            "files_bytes": size(run_directory.groups),
            "base_bytes": size(RunDirectory(scene.base).groups),
            "cpu_s": {who: round(after - start.get(who, 0.0), 2) for who, after in cpu.items()},
            "stall": [round(each, 4) for each in fields["stall"]],
            "manifest": [round(each, 4) for each in seen.lasted(Phase.MANIFEST, "launcher")],
            "prune": [round(each, 4) for each in seen.lasted(Phase.PRUNE, "launcher")],
        }


def _count(checkpoints: Path) -> int:
    return sum(1 for file in checkpoints.iterdir() if file.suffix == ".json")


def _visible_bytes(run: RunDirectory, manifest: Manifest) -> int:
    """Keys and values of all rows of a checkpoint."""
    store = StateStore(run.groups, manifest.lineage, writable=False)
    try:
        total = 0
        for path in run.groups.glob("*.sqlite3"):
            file = store.file(path.stem)
            for step in file.steps:
                for key, parts in file.rows(step, manifest.lineage).parts(""):
                    total += len(key) + sum(map(len, parts))
        return total
    finally:
        store.close()


def _retained_tables(records: dict[int, dict[str, Any]]) -> list[Table]:
    sizes = _table(
        f"history, all checkpoints kept; goal: files at most {HISTORY_MAX:.0f} × (the first checkpoint + what changed)",
        "entities", "kept", "events between", "first MB", "changed MB", "bytes per event", "files MB",
        "/ (first + changed)", "last MB", "last × kept", "goal",
    )  # fmt: skip
    times = _table(
        "history: what keeping so many takes", "entities", "seconds", "stall ms", "p99", "manifest ms", "p99",
        "prune ms", "p99", "cpu s, launcher", "worker",
    )  # fmt: skip
    for entities, record in records.items():
        checkpoints, events = record["checkpoints"], record["changed_events"]
        first, changed, files = record["first_bytes"], record["changed_bytes"], record["files_bytes"]
        share = files / (first + changed)
        sizes.add_row(
            f"{entities:,}", f"{checkpoints:,}", f"{events / max(checkpoints - 1, 1):,.0f}",
            f"{first / 1e6:,.1f}", f"{changed / 1e6:,.1f}", f"{changed / max(events, 1):.0f}", f"{files / 1e6:,.1f}",
            f"{share:.2f}", f"{record['last_bytes'] / 1e6:,.1f}", f"{record['last_bytes'] * checkpoints / 1e6:,.0f}",
            _goal(share <= HISTORY_MAX),
        )  # fmt: skip
        both = [_ms(record[name], part) for name in ("stall", "manifest", "prune") for part in (None, 0.99)]
        cpu = record["cpu_s"]
        times.add_row(
            f"{entities:,}", f"{record['seconds']:,.0f}", *both, f"{cpu['launcher']:.1f}", f"{cpu['workers']:.1f}"
        )
    return [sizes, times]


# -- all of it

_Part = tuple[Callable[[Plan, Scene], dict[str, Any]], Callable[[dict[int, dict[str, Any]]], list[Table]]]

_PARTS: dict[str, _Part] = {
    "throughput": (throughput, _throughput_tables),
    "memory": (memory, _memory_tables),
    "kill": (kill, _kill_tables),
    "retained": (retained, _retained_tables),
}


def state(plan: Plan) -> Result:
    """Every question for every number of entities; history for one of them."""
    wanted = plan.parts or PARTS
    records: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in wanted}
    history = 100_000 if 100_000 in plan.entities else plan.entities[0]
    for entities in plan.entities:
        with _scene(plan, entities) as scene:
            for name in wanted:
                if name != "retained" or entities == history:
                    records[name][entities] = _PARTS[name][0](plan, scene)
    tables = [table for name, found in records.items() for table in _PARTS[name][1](found)]
    return {
        name: {str(entities): record for entities, record in found.items()} for name, found in records.items()
    }, tables


def _table(title: str, *columns: str) -> Table:
    return Table(*columns, title=f"state, {title}", title_justify="left")


def _goal(met: bool) -> str:
    return "met" if met else "missed"


def _ratios(ours: list[float], theirs: list[float]) -> list[float]:
    return [mine / other for mine, other in zip(ours, theirs, strict=True)]


def _rate(rates: list[float]) -> str:
    return f"{median(rates):,.0f}"


def _list(values: list[float], form: str) -> str:
    return " ".join(format(value, form) for value in values)


def _ms(seconds: list[float], part: float | None = None) -> str:
    value = None if not seconds else median(seconds) if part is None else percentile(seconds, part)
    return "-" if value is None else f"{value * 1e3:.0f}"
