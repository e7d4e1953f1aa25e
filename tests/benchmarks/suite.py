"""The benchmarks: what each one runs, and the table it makes of it. All figures are medians over rounds.

What is compared takes turns (A B A B …), so that a change in how busy the machine is meets both alike.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from tests.benchmarks.measure import FlowRun, PlainRun, plain_record, run, run_flow, run_plain, run_river
from tests.benchmarks.plan import Plan, Result
from tests.benchmarks.transactions import write_synthetic


def rate(events: float, seconds: float) -> float:
    """Events/s, as whole ones.

    >>> rate(100, 0.003)
    33333
    """
    return round(events / seconds)


# -- fraud


def fraud(plan: Plan) -> Result:
    """The fraud job, file to file, against the hand-written loop."""
    source = plan.sample(plan.events)
    pairs = [(run_plain(source, plan.scratch), run_flow(source, plan.scratch)) for _ in range(plan.pairs)]
    start = _starts(plan)
    record = _fraud_record(pairs, start)
    table = _fraud_table(f"fraud: {plan.events:,} transactions, file to file, one process", pairs, record)
    for measured, row in (_collector(plan, source, pairs), _river(plan, source)):
        record |= measured
        table.add_row(*row)
    tables = [table]
    if not plan.quick:
        everything = plan.sample(None)
        pair = (run_plain(everything, plan.scratch), run_flow(everything, plan.scratch))
        record["all"] = _fraud_record([pair], start)
        tables.append(_fraud_table(f"fraud: all {pair[0].events:,} transactions, once", [pair], record["all"]))
    return record, tables


def _collector(plan: Plan, source: Path, pairs: list[tuple[PlainRun, FlowRun]]) -> tuple[dict[str, Any], list[str]]:
    """The loop with the garbage collector set as `millrace run` sets it, so that nobody takes that for the engine."""
    runs = 1 if plan.quick else plan.pairs
    seconds = median(run_plain(source, plan.scratch, worker_collector=True).processing_s for _ in range(runs))
    speed, ratio = rate(plan.events, seconds), _median(seconds / flow.processing_s for _, flow in pairs)
    row = ["events/s, collector as in workers", f"{speed:,}", "", str(ratio)]
    return {"collector_events_per_s": speed, "collector_ratio": ratio}, row


def _river(plan: Plan, source: Path) -> tuple[dict[str, Any], list[str]]:
    """river's own tools against the loop: one process, one after the other."""
    loop, river = run_river(source, plan.scratch)
    row = ["events/s, river's own tools", f"{river:,.0f}", "", f"loop/river {loop / river:.2f}, at least 4"]
    return {"river_events_per_s": round(river), "loop_over_river": round(loop / river, 2)}, row


@cache
def _starts(plan: Plan) -> tuple[float, float]:
    """Processor seconds that each program needs for a single event: what starting costs."""
    one = plan.sample(1)
    return run_plain(one, plan.scratch).cpu_s, run_flow(one, plan.scratch).cpu_s


def _fraud_record(pairs: list[tuple[PlainRun, FlowRun]], start: tuple[float, float]) -> dict[str, Any]:
    ratios = [plain.processing_s / flow.processing_s for plain, flow in pairs]
    return {
        "events": pairs[0][0].events,
        "plain": [plain_record(plain) for plain, _ in pairs],
        "millrace": [plain_record(flow) for _, flow in pairs],
        "ratios": [round(ratio, 3) for ratio in ratios],
        "ratio": round(median(ratios), 3),
        "ratio_committed": _median(plain.processing_s / flow.committed_s for plain, flow in pairs),
        "ratio_cpu": _median((plain.cpu_s - start[0]) / (flow.cpu_s - start[1]) for plain, flow in pairs),
        "ratio_whole": _median(plain.whole_s / flow.whole_s for plain, flow in pairs),
        "start_cpu_s": [round(each, 3) for each in start],
        "same_rocauc": all(abs(plain.rocauc - flow.rocauc) < 1e-6 for plain, flow in pairs),
    }


def _fraud_table(title: str, pairs: list[tuple[PlainRun, FlowRun]], record: dict[str, Any]) -> Table:
    table = Table("", "hand-written loop", "millrace run", "ratio", title=title, title_justify="left")
    events = record["events"]
    plain, flow = [p for p, _ in pairs], [f for _, f in pairs]

    def row(name: str, theirs: list[float], ours: list[float], ratio: Any = "", unit: str = ",.0f") -> None:
        cells = [format(median(each), unit) if each else "-" for each in (theirs, ours)]
        table.add_row(name, *cells, str(ratio))

    processing = [events / p.processing_s for p in plain]
    row("events/s, processing", processing, [events / f.processing_s for f in flow], record["ratio"])
    row("  pair by pair", [], [], " ".join(map(str, record["ratios"])))
    row("events/s, to the last commit", processing, [events / f.committed_s for f in flow], record["ratio_committed"])
    row("events/s, first to last batch", [], [s for f in flow if (s := f.steady_events_per_s) is not None])
    whole = [events / p.whole_s for p in plain]
    row("events/s, whole process", whole, [events / f.whole_s for f in flow], record["ratio_whole"])
    first, second = record["start_cpu_s"]
    spent = [(p.cpu_s - first) / events * 1e6 for p in plain]
    row("processor µs per event", spent, [(f.cpu_s - second) / events * 1e6 for f in flow], record["ratio_cpu"], ".1f")
    row("peak memory, MiB", [p.peak_mib for p in plain], [f.peak_mib for f in flow], unit=".0f")
    row("checkpoints", [], [f.checkpoints for f in flow])
    same = "same" if record["same_rocauc"] else "DIFFERENT"
    row("ROCAUC", [plain[0].rocauc], [flow[0].rocauc], same, ".6f")
    return table


def _median(values: Iterable[float]) -> float:
    return round(median(values), 3)


# -- steps


def steps(plan: Plan) -> Result:
    """µs per event of each step, and of the engine around them."""
    source = plan.sample(plan.events)
    start = _starts(plan)
    rounds: list[dict[str, float]] = []
    for _ in range(plan.rounds):
        ended = run([sys.executable, "-m", "tests.benchmarks.steps", source])
        spent = json.loads(ended.stdout)
        for name, cpu_s in (
            ("flow", run_flow(source, plan.scratch).cpu_s),
            ("loop", run_plain(source, plan.scratch).cpu_s),
        ):
            spent[name] = (cpu_s - start[name == "flow"]) / spent["events"] * 1e6
        rounds.append(spent)
    record = {name: _median(spent[name] for spent in rounds) for name in rounds[0]}
    record["engine"] = round(record["flow"] - record["play, unmeasured"], 3)
    return record, [_steps_table(plan.events, record)]


def _steps_table(events: int, record: dict[str, float]) -> Table:
    title = f"steps: processor µs per event, {events:,} transactions, one process"
    table = Table("step", "µs", "share of the flow", title=title, title_justify="left")
    flow = record["flow"]
    for name, spent in record.items():
        if name not in ("events", "flow", "loop", "engine", "play, unmeasured"):
            table.add_row(name, f"{spent:.1f}", f"{spent / flow:.0%}")
    for name in ("play, unmeasured", "engine", "flow", "loop"):
        table.add_row(_MEANING[name], f"{record[name]:.1f}", f"{record[name] / flow:.0%}")
    return table


_MEANING = {
    "play, unmeasured": "play, without clocks inside",
    "engine": "engine (flow − play)",
    "flow": "flow: millrace run, checkpoints included",
    "loop": "the hand-written loop",
}


# -- one thing varied


def entities(plan: Plan) -> Result:
    """Events/s by how many customers, and as many terminals, there are."""
    count = 20_000 if plan.quick else 200_000
    sizes = (1_000, 10_000, 100_000)
    files = {size: write_synthetic(plan.scratch / f"entities-{size}.jsonl", count, size, size) for size in sizes}
    measured = _rounds(plan, sizes, lambda size: run_flow(files[size], plan.scratch))
    return _varied(measured, f"entities: {count:,} synthetic transactions", "customers, and terminals")


def processes(plan: Plan) -> Result:
    """Events/s by how many worker processes there are."""
    source = plan.sample(plan.events)
    measured = _rounds(plan, (1, 2), lambda workers: run_flow(source, plan.scratch, workers=workers))
    return _varied(measured, f"processes: {plan.events:,} transactions", "worker processes")


def groups(plan: Plan) -> Result:
    """Events/s by how many key groups there are."""
    source = plan.sample(plan.events)
    measured = _rounds(plan, (8, 16, 32), lambda number: run_flow(source, plan.scratch, groups=number))
    return _varied(measured, f"groups: {plan.events:,} transactions, one process", "key groups")


def batches(plan: Plan) -> Result:
    """Events/s by how many events a batch may hold; fewer events where batches are small."""
    counts = {1: 4_000, 10: 20_000, 1_000: 20_000} if plan.quick else {1: 10_000, 10: 50_000, 1_000: 100_000}
    files = {size: plan.sample(count) for size, count in counts.items()}
    measured = _rounds(plan, tuple(counts), lambda size: run_flow(files[size], plan.scratch, batch_size=size))
    return _varied(measured, "batches: transactions, one process", "events in a batch")


def _rounds(plan: Plan, values: tuple[int, ...], measure: Callable[[int], FlowRun]) -> dict[int, list[FlowRun]]:
    """Each value in turn, round after round."""
    measured: dict[int, list[FlowRun]] = {value: [] for value in values}
    for _ in range(plan.rounds):
        for value in values:
            measured[value].append(measure(value))
    return measured


def _varied(measured: dict[int, list[FlowRun]], title: str, name: str) -> Result:
    table = Table(
        name, "events", "events/s, processing", "to the last commit", "ratio to the first", "whole cpu s", "peak MiB",
        title=title, title_justify="left",
    )  # fmt: skip
    record: dict[str, Any] = {"runs": {}, "events_per_s": {}}
    first: float | None = None
    for value, runs in measured.items():
        speed = median(each.events / each.processing_s for each in runs)
        first = speed if first is None else first
        record["runs"][str(value)] = [plain_record(each) for each in runs]
        record["events_per_s"][str(value)] = round(speed)
        committed = rate(1, median(each.committed_s / each.events for each in runs))
        table.add_row(
            f"{value:,}", f"{runs[0].events:,}", f"{speed:,.0f}", f"{committed:,}", f"{speed / first:.2f}",
            f"{median(each.cpu_s for each in runs):.1f}", f"{median(each.peak_mib for each in runs):.0f}",
        )  # fmt: skip
    return record, [table]


def state(plan: Plan) -> Result:
    """What the state store costs; see the module of that name."""
    # Not before it is asked for: it imports much of what it measures, and this process must be small (see `measure`).
    from tests.benchmarks.state import state

    return state(plan)


def _past(plan: Plan) -> Result:
    # As for `state`.
    from tests.benchmarks.past import past

    return past(plan)


def _kafka(plan: Plan) -> Result:
    # kafka-python is loaded only for this: the process that measures must be the smallest of all.
    from tests.benchmarks.kafka import kafka

    return kafka(plan)


ALL: dict[str, Callable[[Plan], Result]] = {
    "fraud": fraud,
    "steps": steps,
    "entities": entities,
    "processes": processes,
    "groups": groups,
    "batches": batches,
    "state": state,
    "kafka": _kafka,
    "past": _past,
}

BY_NAME_ONLY = {"state", "kafka", "past"}
"""What takes too long to be run unless it is asked for."""
