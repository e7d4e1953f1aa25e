"""Unpickling what comes from disk: only classes on a list, so that a file from elsewhere cannot run code.

A pickle may name any callable of any module and have it called. Here only these are found: classes of the packages
whose objects we keep, where they are defined and not where they are imported; functions of river and of `features`,
which compute and no more; a few reconstructors; and what the job itself pickles to, with the classes beside it.
"""

from __future__ import annotations

import io
import pickle
import sys
from collections.abc import Iterable, Iterator
from functools import lru_cache
from types import BuiltinMethodType, FunctionType, MethodDescriptorType, MethodType
from typing import Any, get_args

from dataflows.job import Job

_CLASSES_OF = ("river", "features", "collections", "datetime", "decimal", "fractions", "uuid", "zoneinfo")
"""Packages of which any class may be found."""

_FUNCTIONS_OF = ("river", "features")
"""Packages of which functions may be found too."""

_CLOSED = ("river.datasets", "river.bandit.datasets", "river.stream", "features.lookup")
"""These download and open files."""

_OPEN = ("dataflows.events", "dataflows.evaluate")
"""Our own modules of which any class may be found. Of the others nothing is kept but what `_NAMES` lists: some of their
classes write files and start processes."""

_LIBRARIES = frozenset({"dataflows", "numpy", "scipy", *sys.stdlib_module_names})
"""A job that uses a class of these does not open its module: what of them is allowed is allowed by name."""

_NAMES = frozenset(
    {
        *(("builtins", name) for name in (
            "bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "object", "range",
            "set", "slice", "str", "tuple", "NoneType", "NotImplementedType", "ellipsis",
        )),
        ("dataflows.rows", "NO_LABEL"), ("dataflows.connectors.files", "Position"), ("dataflows.pickles", "Gone"),
        ("_operator", "le"), ("_operator", "ge"),
        ("copyreg", "_reconstructor"), ("copyreg", "__newobj__"), ("copyreg", "__newobj_ex__"),
        ("array", "array"), ("array", "_array_reconstructor"), ("random", "Random"), ("functools", "partial"),
        ("itertools", "count"), ("itertools", "cycle"), ("itertools", "chain"),
        ("numpy", "dtype"), ("numpy", "ndarray"), ("numpy", "float64"), ("numpy", "int64"), ("numpy", "bool_"),
        ("numpy.core.multiarray", "_reconstruct"), ("numpy.core.multiarray", "scalar"),
        ("numpy._core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "scalar"),
        ("numpy.core.numeric", "_frombuffer"), ("numpy._core.numeric", "_frombuffer"),
        ("numpy.random._pickle", "__randomstate_ctor"), ("numpy.random._pickle", "__generator_ctor"),
        ("numpy.random._pickle", "__bit_generator_ctor"), ("numpy.random._mt19937", "MT19937"),
        ("numpy.random._pcg64", "PCG64"), ("numpy.random.mtrand", "RandomState"),
        ("numpy.random._generator", "Generator"), ("numpy.random.bit_generator", "SeedSequence"),
        ("scipy.stats._distn_infrastructure", "rv_continuous_frozen"),
        ("numpy.random.bit_generator", "__pyx_unpickle_SeedSequence"),
        ("numpy", "ones"), ("numpy", "array"),
        ("builtins", "iter"), ("copy", "deepcopy"), ("statistics", "NormalDist"), ("msgspec._core", "UNSET"),
    }
)  # fmt: skip

Name = tuple[str, str]

_GETATTR: Name = ("builtins", "getattr")
"""How bound methods are pickled; stands for `_Unpickler._method`."""

_METHODS = (MethodType, FunctionType, BuiltinMethodType, MethodDescriptorType)

_METHODS_OF = frozenset({("builtins", "str"), ("random", "Random")})
"""Classes of others of which methods are kept: river's models hold `str.lower`, and methods of their generators."""


class ForeignClass(pickle.UnpicklingError):
    """A pickle names something that is not on the list."""


class Gone:
    """What is left of an object whose class the job does not have any more: it takes everything and says nothing."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self._take()

    def _take(self, *arguments: Any) -> None:
        return

    __setstate__ = __setitem__ = append = extend = add = update = _take  # as pickles and river's statistics are fed

    def get(self) -> None:
        """As river's statistics."""
        return


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, allowed: frozenset[Name], gone: frozenset[Name] = frozenset()) -> None:
        # fix_imports would turn names of Python 2 into ours behind our back.
        super().__init__(io.BytesIO(data), fix_imports=False)
        self._allowed = allowed
        self._beside = users_modules(allowed)
        self._gone = gone

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._gone:
            return Gone
        if (module, name) == _GETATTR:
            return self._method
        if (module, name) in _NAMES or (module, name) in self._allowed:
            return super().find_class(module, name)
        # A name may lead through modules: so what was found is looked at, not what it was called.
        if "__" not in name and self._may_search(module):
            found = super().find_class(module, name)
            if self._may_find(found):
                return found
        raise ForeignClass(f"it names {module}.{name}, which no state of ours holds")

    def _may_search(self, module: str) -> bool:
        """Whether to look there at all, which may import it."""
        known = module in _OPEN or module.split(".")[0] in _CLASSES_OF
        return (known and not module.startswith(_CLOSED)) or module in self._beside

    def _may_find(self, found: Any) -> bool:
        module = str(getattr(found, "__module__", ""))
        package = module.split(".")[0]
        if module.startswith(_CLOSED):
            return False
        if isinstance(found, type):
            return module in _OPEN or package in _CLASSES_OF or module in self._beside
        return package in _FUNCTIONS_OF and callable(found)

    def _method(self, of: Any, name: str) -> Any:
        """`getattr` for methods of such objects alone: through other attributes one gets at the interpreter."""
        owner = of if isinstance(of, type) else type(of)
        known = (owner.__module__, owner.__qualname__) in _METHODS_OF or self._may_find(owner)
        if known and not name.startswith("__"):
            method = getattr(of, name)
            if isinstance(method, _METHODS):
                return method
        raise ForeignClass(f"it asks for the attribute {name} of a {owner.__name__}")


@lru_cache(maxsize=64)
def users_modules(allowed: frozenset[Name]) -> frozenset[str]:
    """The modules of the job's own classes: its model may in time hold others that are defined there."""
    return frozenset(module for module, _ in allowed if module.split(".")[0] not in _LIBRARIES)


class _Seeker(_Unpickler):
    """Notes what cannot be found, and has `Gone` stand for it."""

    def __init__(self, data: bytes, allowed: frozenset[Name]) -> None:
        super().__init__(data, allowed)
        self.lost: set[Name] = set()

    def find_class(self, module: str, name: str) -> Any:
        try:
            return super().find_class(module, name)
        except (ForeignClass, ImportError, AttributeError):
            self.lost.add((module, name))
            return Gone


def lost_names(data: bytes, allowed: frozenset[Name] = frozenset()) -> frozenset[Name]:
    """What a pickle names that `safe_loads` would refuse or not find; nothing of it is run.

    >>> lost_names(b"cos\\nsystem\\n(S'true'\\ntR.")
    frozenset({('os', 'system')})
    """
    seeker = _Seeker(data, allowed)
    seeker.load()
    return frozenset(seeker.lost)


def safe_loads(data: bytes, allowed: frozenset[Name] = frozenset(), gone: frozenset[Name] = frozenset()) -> Any:
    """Unpickle, with nothing found that is neither ours nor in `allowed`; `Gone` stands for what is in `gone`.

    Raises `ForeignClass`.

    >>> safe_loads(pickle.dumps({"a": (1, 2.5)}))
    {'a': (1, 2.5)}
    >>> safe_loads(b"cos\\nsystem\\n(S'true'\\ntR.")
    Traceback (most recent call last):
    dataflows.pickles.ForeignClass: it names os.system, which no state of ours holds
    """
    return _Unpickler(data, allowed, gone).load()


class _Recorder(pickle.Unpickler):
    """Notes what a pickle of our own making refers to."""

    def __init__(self, data: bytes, found: set[Name]) -> None:
        super().__init__(io.BytesIO(data))
        self._found = found

    def find_class(self, module: str, name: str) -> Any:
        self._found.add((module, name))
        return super().find_class(module, name)


def names_in(objects: Iterable[Any]) -> frozenset[Name]:
    """Every module and name that the pickles of these objects refer to: what a job may find in its own state.

    >>> from river import linear_model
    >>> ("river.linear_model.log_reg", "LogisticRegression") in names_in([linear_model.LogisticRegression()])
    True
    """
    found: set[Name] = set()
    for each in objects:
        _Recorder(pickle.dumps(each), found).load()
    return frozenset(found - {_GETATTR})  # the real one is never allowed


def names_of(job: Job) -> frozenset[Name]:
    """What the state of a job may name: what its model, metrics and aggregates are made of, and the types of its
    events' fields."""
    aggregates = [aggregate for entity in job.entities for aggregate in entity.aggregates]
    found = set(names_in([job.model, *job.metrics, *aggregates]))
    for event in (job.events.event, job.label_class):
        found.add((event.__module__, event.__qualname__))
        for field in event.model_fields.values():
            found |= {(kind.__module__, kind.__qualname__) for kind in _classes(field.annotation)}
    return frozenset(found)


def _classes(annotation: Any) -> Iterator[type]:
    if isinstance(annotation, type):
        yield annotation
    for argument in get_args(annotation):
        yield from _classes(argument)
