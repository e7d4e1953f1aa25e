"""Pickles from disk: what is ours comes back to the last bit, what is not runs nothing."""

from __future__ import annotations

import collections
import datetime as dt
import functools
import inspect
import math
import operator
import os
import pickle
import subprocess
import uuid
import warnings
from collections.abc import Callable, Iterator
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pytest
import river.api
from river import (
    base,
    compose,
    datasets,
    evaluate,
    feature_extraction,
    feature_selection,
    imblearn,
    linear_model,
    metrics,
    misc,
    model_selection,
    preprocessing,
    stats,
    stream,
    tree,
    utils,
)

from dataflows import Event, Job, Label
from dataflows.changes import declared, first_layout
from dataflows.connectors import Memory
from dataflows.connectors.files import Position
from dataflows.evaluate import RocTally
from dataflows.events import reject
from dataflows.orderlog import OrderLog
from dataflows.pickles import ForeignClass, Name, names_in, names_of, safe_loads
from dataflows.rows import NO_LABEL
from dataflows.runtime import Launcher
from features import Count, Entity, Fields, Mean, River
from features.missing import MISSING
from features.state import EntityFeatures

# -- what is refused


class Call:
    """Pickles to a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> Any:
        return self._call

    def __call__(self) -> None:
        """What is called here is called when it is unpickled."""


def named(module: str, name: str) -> bytes:
    """A pickle that finds something by module and name, by the opcode that takes names with dots."""
    return (
        b"\x80\x04\x8c"
        + bytes([len(module)])
        + module.encode()
        + b"\x8c"
        + bytes([len(name)])
        + name.encode()
        + b"\x93."
    )


def dumped(value: Any) -> bytes:
    """A pickle, of a protocol of today."""
    return pickle.dumps(value, 5)


MARK = "ran.txt"
"""What every attack here would leave behind in the working directory."""

ATTACKS: dict[str, tuple[Callable[[], bytes], str]] = {
    "a command": (lambda: dumped(Call(os.system, f"touch {MARK}")), "posix.system"),
    "the oldest protocol": (lambda: b"cos\nsystem\n(S'touch " + MARK.encode() + b"'\ntR.", "os.system"),
    "names of Python 2": (lambda: b"\x80\x02c__builtin__\neval\nX\x01\x00\x00\x001\x85R.", "__builtin__.eval"),
    "a process": (lambda: dumped(Call(subprocess.Popen, ["touch", MARK])), "subprocess.Popen"),
    "code as text": (lambda: dumped(Call(eval, f"open({MARK!r}, 'w')")), "builtins.eval"),
    "executed text": (lambda: dumped(Call(exec, f"open({MARK!r}, 'w')")), "builtins.exec"),
    "an opened file": (lambda: dumped(Call(open, MARK, "w")), "io.open"),
    "an import": (lambda: dumped(Call(__import__, "os")), "builtins.__import__"),
    "a pickle in a pickle": (lambda: dumped(Call(pickle.loads, b"")), "_pickle.loads"),
    "code objects": (lambda: named("types", "CodeType"), "types.CodeType"),
    "functions of code": (lambda: named("types", "FunctionType"), "types.FunctionType"),
    "types": (lambda: dumped(type), "builtins.type"),
    "a caller of methods": (lambda: dumped(Call(operator.methodcaller, "system", MARK)), "operator.methodcaller"),
    "a getter of attributes": (lambda: dumped(operator.attrgetter), "operator.attrgetter"),
    "a written array": (lambda: dumped(Call(np.save, MARK, np.ones(1))), "numpy.save"),
    "files of numpy": (lambda: dumped(Call(np.memmap, MARK, "uint8", "w+", 0, (1,))), "numpy.memmap"),
    "paths": (lambda: dumped(Path(MARK)), "pathlib"),
    "downloads": (lambda: dumped(datasets.Bikes()), "river.datasets"),
    "downloads by a longer name": (lambda: named("river", "datasets.Bikes"), "datasets.Bikes"),
    "files of river": (lambda: dumped(Call(stream.iter_csv, "/etc/passwd")), "river.stream"),
    "files of river by a longer name": (lambda: named("river.api", "stream.Cache"), "stream.Cache"),
    "a module": (lambda: named("river", "stats"), "river.stats"),
    "through a module of ours": (lambda: named("dataflows.runtime", "subprocess.Popen"), "subprocess.Popen"),
    "through another of ours": (lambda: named("features.state", "pickle.loads"), "pickle.loads"),
    "through a class of ours": (lambda: named("features.state", "EntityFeatures.__init__.__globals__"), "__globals__"),
    "what ours imports": (lambda: named("dataflows.evaluate", "pickle.loads"), "pickle.loads"),
    "what the library imports": (lambda: named("collections", "_sys.modules"), "_sys.modules"),
    "what river imports": (lambda: named("river.stats.base", "abc.ABC"), "abc.ABC"),
    "code of ours that starts processes": (lambda: dumped(Launcher), "dataflows.runtime.Launcher"),
    "code of ours that writes files": (lambda: dumped(Call(OrderLog, MARK)), "dataflows.orderlog.OrderLog"),
    "functions of ours": (lambda: dumped(safe_loads), "dataflows.pickles.safe_loads"),
    "a class of somebody": (lambda: dumped(Call(Marking)), "test_pickles.Marking"),
    "a function of somebody": (lambda: dumped(marking), "test_pickles.marking"),
    "persistent ids": (lambda: b"Pwhat\n.", "persistent"),
}


class Marking:
    def __init__(self) -> None:
        Path(MARK).touch()


def marking() -> None:
    """Not ours to call."""
    Path(MARK).touch()


@pytest.mark.parametrize("name", ATTACKS)
def test_what_is_foreign_is_refused_with_its_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands, code, files, processes, downloads, by whatever road: refused before anything of it runs."""
    attack, words = ATTACKS[name]
    content = attack()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(pickle.UnpicklingError, match=words.replace("(", "\\(")) as caught:
        safe_loads(content)
    if name != "persistent ids":
        assert isinstance(caught.value, ForeignClass)
    assert list(tmp_path.iterdir()) == []


def test_nothing_after_the_foreign_name_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a long list of what is ours, one foreign name ends it."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ForeignClass, match=r"posix\.system"):
        safe_loads(dumped([linear_model.LinearRegression(), {"a": [Call(os.system, f"touch {MARK}")]}, Mean("x")]))
    assert list(tmp_path.iterdir()) == []


def attribute(of: Any, name: str) -> Any:
    """Pickles as bound methods do."""
    return Call(getattr, of, name)


GETATTR: dict[str, tuple[Callable[[], Any], str]] = {
    "the class of an object": (lambda: attribute((), "__class__"), "__class__"),
    "subclasses": (lambda: attribute(object, "__subclasses__"), "__subclasses__"),
    "globals": (lambda: attribute(Mean, "__init__"), "__init__"),
    "what reduces": (lambda: attribute(stats.Mean(), "__reduce_ex__"), "__reduce_ex__"),
    "an attribute that is no method": (lambda: attribute(linear_model.LinearRegression(), "weights"), "weights"),
    "a method of a file format": (lambda: attribute(np.ones(1), "tofile"), "tofile"),
    "a method of plain objects": (lambda: attribute({}, "get"), "get"),
    "text that formats": (lambda: attribute(attribute("{0.__class__}", "format"), "__self__"), "__self__"),
    "frames": (lambda: attribute(Call(evaluate.iter_progressive_val_score, [], None, None), "gi_frame"), "gi_frame"),
    "frames of ours": (
        lambda: attribute(Call(attribute(EntityFeatures(Entity("k", [Count()])), "changes")), "gi_frame"),
        "gi_frame",
    ),
    "an attribute of a function": (lambda: attribute(functools.partial(int), "func"), "func"),
}


@pytest.mark.parametrize("name", GETATTR)
def test_attributes_that_lead_to_the_interpreter_are_refused(name: str) -> None:
    """`getattr` is how methods are pickled; here it gives methods of our objects and nothing else."""
    attack, words = GETATTR[name]
    with pytest.raises(ForeignClass, match=words):
        safe_loads(dumped(attack()))


def test_what_a_job_is_made_of_opens_no_other_door() -> None:
    """That a model holds methods and arrays allows neither `getattr` nor the rest of numpy."""
    allowed = names_in([linear_model.PARegressor(), preprocessing.GaussianRandomProjector(), Own()])
    for attack in (dumped(attribute((), "__class__")), b"\x80\x02c__builtin__\ngetattr\n.", dumped(np.save)):
        with pytest.raises(ForeignClass):
            safe_loads(attack, allowed)
    with pytest.raises(ForeignClass, match="memmap"):
        safe_loads(dumped(Call(np.memmap, MARK, "uint8", "w+", 0, (1,))), allowed)


# -- what comes back


class Color(Enum):
    RED = "red"


class Node:
    """What `Own` makes when it has learned something."""

    def __init__(self, y: Any) -> None:
        self.y = y


class Own(base.Regressor):
    """A user's model that begins with nothing and holds a class of its own later, and a method."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.way = self.constant

    def constant(self) -> float:
        return float(len(self.nodes))

    def predict_one(self, x: dict[Any, Any]) -> float:
        return self.way()

    def learn_one(self, x: dict[Any, Any], y: Any) -> None:
        self.nodes.append(Node(y))


class OwnStatistic(stats.base.Univariate):
    """A user's statistic."""

    def __init__(self) -> None:
        self.last: Any = 0

    def update(self, x: Any) -> None:
        self.last = x

    def get(self) -> Any:
        return self.last


class OwnMetric(metrics.MAE):
    """A user's metric."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]


class Told(Event, id="id", time="t", unit="s"):
    id: uuid.UUID
    t: int
    color: Color
    x: float = 0.0
    y: float = 0.0


def job() -> Job:
    """A job full of a user's own classes."""
    return Job(
        name="own",
        events=Memory(event=Told, items=[]),
        features=[Fields("x"), Entity("color", [River(OwnStatistic(), "x")])],
        model=Own(),
        label=Label(field="y", delay=0),
        metrics=[OwnMetric()],
    )


def test_what_state_is_made_of_comes_back() -> None:
    """Plain values, keys, times, and the singletons that are compared by identity."""
    values = [
        None, True, 0, -(10**30), 0.1, float("inf"), 1j, "é", b"\0", (1, (2,)), [1], {"a": {1, 2}}, frozenset("a"),
        bytearray(b"a"), range(3), slice(1, 2), object, int, collections.deque([1], 5),
        collections.Counter("aab"), collections.OrderedDict(a=1), collections.defaultdict(list, {"a": [1]}),
        dt.datetime(2024, 1, 1, tzinfo=dt.UTC), dt.datetime(2024, 7, 1, tzinfo=ZoneInfo("Europe/Paris")),
        dt.timedelta(1), dt.date(2024, 1, 1), dt.time(12), Decimal("0.1"), Fraction(1, 3), uuid.UUID(int=5),
        functools.partial(stats.Mean), str.lower, Position(1, 2, 3, 4), np.float32(0.5), np.int8(3), np.dtype("f4"),
    ]  # fmt: skip
    found = safe_loads(dumped(values))
    for one, other in zip(found, values, strict=True):
        assert type(one) is type(other)
        assert repr(one) == repr(other)
    assert safe_loads(dumped(NO_LABEL)) is NO_LABEL
    assert safe_loads(dumped(MISSING)) is MISSING
    array = np.arange(6.0).reshape(2, 3)
    assert safe_loads(dumped(array)).tobytes() == array.tobytes()
    refused = reject("too_late", "why", "a:1", b"\xff")
    assert safe_loads(dumped(refused)) == refused


def test_the_own_classes_of_a_job_come_back() -> None:
    """Its model, with what it made of its own since, its metrics, statistics, enums, ids and events."""
    declared = job()
    model = Own()
    for y in (1.0, 2.0):
        model.learn_one({}, y)
    event = Told(id=uuid.UUID(int=1), t=1, color=Color.RED)
    metric = OwnMetric()
    metric.update(1.0, 2.0)
    kept = {"model": model, "metric": metric, "color": Color.RED, "stat": OwnStatistic(), "event": event}
    allowed = names_of(declared)
    found = safe_loads(dumped(kept), allowed)
    assert found["model"].predict_one({}) == 2.0
    assert [node.y for node in found["model"].nodes] == [1.0, 2.0]
    assert repr(found["metric"]) == repr(metric)
    assert (found["color"], found["event"]) == (Color.RED, event)
    with pytest.raises(ForeignClass, match="test_pickles"):
        safe_loads(dumped(kept))
    with pytest.raises(ForeignClass, match="marking"):
        safe_loads(dumped(marking), allowed)


def test_declarations_with_own_statistics_come_back() -> None:
    """The layout of a state holds the declarations that its parts were made for."""
    declared_now = job()
    (part,) = first_layout(declared_now).features["features_color"]
    (aggregate,) = declared(part, declared_now).aggregates
    assert type(aggregate.stat) is OwnStatistic  # type: ignore[attr-defined]


def test_metrics_that_are_kept_in_bulk_come_back() -> None:
    """Our own ROCAUC holds river's."""
    tally = RocTally(metrics.ROCAUC())
    for label, score in ((True, 0.9), (False, 0.3), (True, 0.2)):
        tally.update(label, score)
    assert safe_loads(dumped(tally)).get() == tally.get()


# -- all of river

SKIPPED = {
    "river.datasets": "downloads and opens files, and holds nothing that learns",
    "river.stream": "downloads and opens files, and holds nothing that learns",
    "river.bandit": "environments of games and tracks of experiments, not models of a job",
    "river.checks": "checks estimators, is none",
    "river.evaluate": "tracks of experiments",
}
"""Modules whose objects are not state of a job."""

MADE: dict[str, Callable[[], Any]] = {
    "Agg": lambda: feature_extraction.Agg(on="a", by="b", how=stats.Mean()),
    "TargetAgg": lambda: feature_extraction.TargetAgg(by="b", how=stats.Mean()),
    "FuncTransformer": lambda: compose.FuncTransformer(twice),
    "Grouper": lambda: compose.Grouper(preprocessing.StandardScaler(), by="b"),
    "Prefixer": lambda: compose.Prefixer("p_"),
    "Suffixer": lambda: compose.Suffixer("_s"),
    "Renamer": lambda: compose.Renamer({"a": "c"}),
    "TargetTransformRegressor": lambda: compose.TargetTransformRegressor(
        linear_model.LinearRegression(), func=math.log1p, inverse_func=math.expm1
    ),
    "TargetStandardScaler": lambda: preprocessing.TargetStandardScaler(linear_model.LinearRegression()),
    "TargetMinMaxScaler": lambda: preprocessing.TargetMinMaxScaler(linear_model.LinearRegression()),
    "PoissonInclusion": lambda: feature_selection.PoissonInclusion(p=0.5, seed=1),
    "RandomOverSampler": lambda: imblearn.RandomOverSampler(
        linear_model.LogisticRegression(), {True: 0.5, False: 0.5}, seed=1
    ),
    "RandomUnderSampler": lambda: imblearn.RandomUnderSampler(
        linear_model.LogisticRegression(), {True: 0.5, False: 0.5}, seed=1
    ),
    "RandomSampler": lambda: imblearn.RandomSampler(linear_model.LogisticRegression(), {True: 0.5, False: 0.5}, seed=1),
    "SuccessiveHalvingClassifier": lambda: model_selection.SuccessiveHalvingClassifier(
        [linear_model.LogisticRegression(l2=l2) for l2 in (0.0, 0.1)], metrics.Accuracy(), budget=40
    ),
    "Rolling": lambda: utils.Rolling(stats.Var, window_size=3),
    "TimeRolling": lambda: utils.TimeRolling(stats.Mean, period=dt.timedelta(seconds=3)),
    "SortedWindow": lambda: utils.SortedWindow(3),
    "FBeta": lambda: metrics.FBeta(beta=2),
    "MacroFBeta": lambda: metrics.MacroFBeta(beta=2),
    "MicroFBeta": lambda: metrics.MicroFBeta(beta=2),
    "WeightedFBeta": lambda: metrics.WeightedFBeta(beta=2),
    "MultiFBeta": lambda: metrics.MultiFBeta(betas={True: 0.25, False: 1}, weights=None),
    "AutoCorr": lambda: stats.AutoCorr(1),
    "BayesianMean": lambda: stats.BayesianMean(1, 1),
    "Link": lambda: stats.Shift(1) | stats.Mean(),
    "RollingAbsMax": lambda: stats.RollingAbsMax(3),
    "RollingIQR": lambda: stats.RollingIQR(3),
    "RollingMax": lambda: stats.RollingMax(3),
    "RollingMin": lambda: stats.RollingMin(3),
    "RollingMode": lambda: stats.RollingMode(3),
    "RollingPeakToPeak": lambda: stats.RollingPeakToPeak(3),
    "RollingQuantile": lambda: stats.RollingQuantile(0.5, 3),
    "SDFT": lambda: misc.SDFT(3),
    "Skyline": lambda: misc.Skyline(minimize=["a"], maximize=["b"]),
    "HoeffdingAdaptiveTreeClassifier, quick": lambda: tree.HoeffdingAdaptiveTreeClassifier(grace_period=5, seed=1),
}
"""Classes that need arguments and do not say which they are tested with."""


NOT_TAUGHT = {"Base-0": "has nothing to learn with", "Estimator-0": "has nothing to learn with"}
NOT_MADE = {
    "Ensemble": "abstract in all but name",
    "WrapperEnsemble": "abstract in all but name",
    "Optimizer": "abstract in all but name",
    "Interval": "an answer, no state",
    "ZstdClassifier": "wants a newer Python than ours",
    "HorizonMetric": "for forecasts over horizons, which jobs do not make",
    "HorizonAggMetric": "for forecasts over horizons, which jobs do not make",
}


def twice(x: dict[Any, Any]) -> dict[Any, Any]:
    """A user's function in a pipeline."""
    return {name: 2 * value for name, value in x.items()}


def classes() -> Iterator[type]:
    """Every public class of river."""
    seen = set()
    for module_name, module in inspect.getmembers(river.api, inspect.ismodule):
        for _, found in inspect.getmembers(module, inspect.isclass):
            of_river = found.__module__.startswith("river.") and f"river.{module_name}" not in SKIPPED
            if of_river and found not in seen and not inspect.isabstract(found):
                seen.add(found)
                yield found


def instances() -> dict[str, Callable[[], Any]]:
    """Builders of an object of each class, with the parameters that river itself tests it with."""
    found: dict[str, Callable[[], Any]] = {}
    for each in classes():
        try:
            parameters = list(each._unit_test_params()) if hasattr(each, "_unit_test_params") else [{}]
            for number, some in enumerate(parameters):
                each(**some)
                found[f"{each.__name__}-{number}"] = functools.partial(each, **some)
        except Exception:  # noqa: BLE001 - it needs arguments; those that matter are in MADE
            continue
    return found | MADE


BUILDERS = instances()


def rows() -> Iterator[tuple[dict[str, float], float]]:
    """A little data."""
    for i in range(60):
        a, b = (i * 37 % 101) / 50, (i * 53 % 97) / 50
        yield {"a": a, "b": b, "c": a * b}, a + b


def examples(x: dict[str, float], y: float) -> dict[str, list[tuple[Any, ...]]]:
    """What a method that takes examples may want: labels, numbers, none, several, text, a user and an item."""
    word, later = f"w{int(10 * y)}", dt.datetime(2024, 1, 1) + dt.timedelta(seconds=y)  # noqa: DTZ001 - river's clock has no zone
    targets = [(x, y > 2), (x, y), (x, {0: y > 2, 1: y > 1}), (x, {0: y, 1: -y}), (x,), (y, x)]
    return {
        "learn_one": [*targets, ("user", word, y), (word,), (f"{word} a b",), (y,)],
        "update": [
            (y > 2, y > 1), (y, x["a"]), (y,), (y > 2, {True: 0.7, False: 0.3}), (x,), (word,), (y, later),
            (x, 0, {0: x, 1: {"a": 0.0, "b": 0.0, "c": 0.0}}),
        ],
        "step": [({"a": 1.0, "b": 2.0}, {"a": y, "b": -y})],
        "append": [(x,)],
    }  # fmt: skip


def teach(each: Any) -> bool:
    """Have it learn what it can, whatever it is; whether any of it was to its liking."""
    liked = False
    for x, y in rows():
        for name, wanted in examples(x, y).items():
            liked |= any(try_call(each, name, *arguments) for arguments in wanted)
        liked |= try_call(each, "update", y, t=dt.datetime(2024, 1, 1) + dt.timedelta(seconds=y))  # noqa: DTZ001 - as above
        for name in ASKED:
            try_call(each, name, x)
    return liked


ASKED = ("predict_proba_one", "predict_one", "score_one", "transform_one")
"""What models say by."""


def try_call(each: Any, name: str, *arguments: Any, **named: Any) -> bool:
    """Whether a method was there and took the arguments."""
    try:
        getattr(each, name)(*arguments, **named)
    except Exception:  # noqa: BLE001 - the object's way to say that this is not for it
        return False
    return True


def answers(each: Any) -> list[str]:
    """What it says: predictions, scores, values."""
    found = []
    for x, _ in list(rows())[:5]:
        for name in ASKED:
            try:
                found.append(f"{name} {getattr(each, name)(x)!r}")
            except Exception as error:  # noqa: BLE001 - then the copy must say the same
                found.append(f"{name} {type(error).__name__}")
    try:
        found.append(f"get {each.get()!r}")
    except Exception as error:  # noqa: BLE001 - as above
        found.append(f"get {type(error).__name__}")
    return found


@pytest.mark.parametrize("name", BUILDERS)
def test_all_of_river_comes_back(name: str) -> None:
    """Every model, statistic and metric, new and after learning a little, and says what the original says."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # river's own about what it is fed here
        each = BUILDERS[name]()
        # Only functions of the user need to be known before.
        of_user = name in ("FuncTransformer", "TargetTransformRegressor")
        allowed = names_in([each]) if of_user else frozenset[Name]()
        safe_loads(dumped(each), allowed)
        liked = teach(each)
        content = dumped(each)
        again = safe_loads(content, allowed)
        plain = pickle.loads(content)
        assert answers(again) == answers(plain)
    assert liked or name in NOT_TAUGHT


def test_what_is_left_out_is_known() -> None:
    """No class of river slips through because it cannot be made here."""
    made = {name.split("-")[0] for name in BUILDERS}
    assert {each.__name__ for each in classes()} - made == NOT_MADE.keys()
