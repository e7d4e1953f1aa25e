"""The learner: predict, join, score, learn. Score before learning; learn with the features as they were asked.

A question is answered with what the model says now and kept, features and output as they were. Its label comes with the
question's number: the outcome is scored with the prediction made then, and a model that needs labels learns from the
features kept then. A model that needs no labels (an anomaly detector) learns from the question right after its score.
The version of a model is the number of examples it has learned.

When a job's `per` changes, its models begin anew: questions asked under another `per` are still scored when their
answers come, but nobody learns from them.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from operator import itemgetter
from types import MappingProxyType
from typing import Any

from river import base

from dataflows.admit import ANSWER, QUESTION
from dataflows.chunks import Chunks
from dataflows.evaluate import Said
from dataflows.events import Outcome, Prediction, encode, reject, to_datetime, to_time_us
from dataflows.job import Job, final_step
from dataflows.learnlog import FAILED, LEARNING_FAILED, NOT_LEARNED, WENT_WELL, LearnLog
from features.rows import Change, Rows, key_text, put
from features.spec import Entity

Columns = list[list[Any]]
"""By entity declaration, by place of the question in the batch: the tuple of its values, or text on what is wrong."""


MODELS = "model"
"""What the keys of models' rows begin with."""


class _Model:
    """A river model with its name, its version, and its two methods that matter here."""

    __slots__ = ("model", "name", "version", "answer", "learn")

    def __init__(self, model: Any, name: str, version: int, method: str) -> None:
        self.model = model
        self.name = name
        self.version = version
        self.answer: Callable[[dict[str, Any]], Any] = getattr(model, method)
        self.learn: Callable[..., None] = model.learn_one


class Learner:
    """The models of one key group, and their open questions.

    Parameters
    ----------
    job
        The declaration.
    rows
        Where models and questions are kept; `changes` says what to keep.
    begun
        How often the models were begun: those of an earlier time are not found any more.
    log
        Where to note what is asked and learned; None: nowhere.
    warm
        Models to begin with, by the text of their keys: pickled, and the examples they have learned. That of the key
        `null`, a global one, serves all others too.
    """

    def __init__(
        self,
        job: Job,
        rows: Rows | None = None,
        begun: int = 1,
        log: LearnLog | None = None,
        warm: Mapping[str, tuple[bytes, int]] = MappingProxyType({}),
    ) -> None:
        self._names = job.feature_names
        self._per = job.per
        self._arrange = _arrangement(job)
        self._model_name = job.model_name
        self._prototype = pickle.dumps(job.model, 5)
        self._supervised: bool = job.model._supervised
        self._method, _ = method_of(job.model)
        self._shows_probability = shows_probability(job)
        self._models: dict[Any, _Model] = {}
        self._open: dict[int, tuple[Any, ...]] = {}
        self._rows = rows
        self._prefix = MODELS if begun == 1 else f"{MODELS}{begun}"
        self._fresh = rows is None or rows.empty()  # no model is anywhere else than here
        self._chunks = Chunks("open")
        self._tracks = rows is not None
        self._asked: list[int] = []
        self._closed: list[int] = []
        self._touched: set[Any] = set()
        self._declared = (self._names, self._per, self._model_name)
        self._kept_declared: tuple[Any, Any, Any] | None = None
        self._log = log
        self._warm = warm
        if log is not None and log.begins:
            log.prototype(self._prototype, 0)
        if rows is not None and not self._fresh:
            self._restore(rows)
            if log is not None and log.begins:
                self._hold(log)

    def __len__(self) -> int:
        """Open questions."""
        return len(self._open)

    def _restore(self, rows: Rows) -> None:
        kept = rows.get("declared")
        self._kept_declared = kept[0] if kept else None  # none on this branch: only another one had questions here
        names, per, model = self._kept_declared or self._declared
        self._open = dict(self._chunks.restore(rows))
        if names != self._names:
            # Features came or went since these were asked; each is learned from with those it was asked with.
            for seq, (id, at, values, *rest) in self._open.items():
                if type(values) is tuple:
                    self._open[seq] = (id, at, dict(zip(names, values, strict=True)), *rest)
        if per != self._per:
            for seq, (*asked, key, version, about) in self._open.items():
                if type(key) is not list:
                    self._open[seq] = (*asked, [model_named(model, per, key)], version, about)

    def _hold(self, log: LearnLog) -> None:
        """Note the questions that are older than the log: models will learn from them."""
        for seq, (id, at, kept, _, key, version, _) in sorted(self._open.items()):
            if kept is not None and type(key) is not list:
                log.held(seq, key, id, to_time_us(at), kept, version)

    def changes(self, models: bool = True) -> Iterator[Change]:
        """What the rows need to follow since the last call: questions that came and went, models asked or taught.

        Without `models` these wait for a later call: they will have learned more by then.
        """
        if self._kept_declared != self._declared:
            yield from self._chunks.clear()
            self._asked, self._closed = list(self._open), []
            self._kept_declared = self._declared
            yield put("declared", self._declared)
        asked, closed = self._asked, self._closed
        self._asked, self._closed = [], []
        yield from self._chunks.changes(((seq, self._open[seq]) for seq in asked if seq in self._open), closed)
        if not models:
            return
        touched, self._touched = self._touched, set()
        for key in touched:
            model = self._models[key]
            yield put(f"{self._prefix}/{key_text(key)}", (model.model, model.name, model.version))

    @property
    def unsaved(self) -> int:
        """Questions that came or went since `changes` was asked."""
        return len(self._asked) + len(self._closed)

    def models(self) -> dict[Any, tuple[Any, int]]:
        """The models in memory by key (None: the global one), each with its version."""
        return {key: (m.model, m.version) for key, m in self._models.items()}

    def model(self, key: Any) -> tuple[Any, str, int] | None:
        """A model by key (None: the global one) with its name and version; None before it has answered."""
        found = self._models.get(key)
        if found is None and self._rows is not None:
            kept = self._rows.get(f"{self._prefix}/{key_text(key)}")
            return kept[0] if kept else None
        return None if found is None else (found.model, found.name, found.version)

    def open_questions(self) -> Iterator[tuple[int, tuple[Any, ...]]]:
        """The open questions by number: (id, time, features kept, output, model key, model version, record key).

        Of a question asked under another `per` the model is gone: a list with its name is in the place of the key.
        """
        yield from self._open.items()

    def process(self, operations: list[tuple[Any, ...]], columns: Columns) -> list[Said]:
        """Carry out a batch's operations in order; what there is to say of them."""
        said: list[Said] = []
        for operation in operations:
            kind = operation[0]
            if kind == QUESTION:
                self._ask(operation, columns, said)
            elif kind == ANSWER:
                self._learn(operation, said)
            elif self._open.pop(operation[2], None) is not None and self._tracks:
                self._closed.append(operation[2])
        return said

    def _ask(self, operation: tuple[Any, ...], columns: Columns, said: list[Said]) -> None:
        _, position, seq, place, id, time, late, key, values, about = operation
        for column in columns:
            answer = column[place]
            if type(answer) is not tuple:
                self._fail("feature_error", str(answer), id, to_datetime(time), values, position, said)
                return
            values += answer
        if self._arrange is not None:
            values = self._arrange(values)
        model = self._models.get(key)
        if model is None:
            model = self._fetch(key)
        x = features = dict(zip(self._names, values, strict=True))
        kept: Any = values  # what it learns from later; a tuple takes a quarter of the memory of a dict
        if None in values:
            x = kept = _present(features)
        # Asked is enough: factorization machines of river draw the weights of a feature when they see it first.
        self._touched.add(key)
        log = self._log
        try:
            output = model.answer(x)
        except Exception as error:  # noqa: BLE001 - what a model does not like spoils the question, not the job
            if log is not None:
                log.failed(seq, key, id, time, kept, model.version, late)
            self._fail("model_error", f"{type(error).__name__}: {error}", id, to_datetime(time), values, position, said)
            return
        # For bool labels records show the probability of True.
        shown = output.get(True, 0.0) if self._shows_probability else output
        at = to_datetime(time)
        version = model.version
        said.append((position, Prediction(id, at, features, shown, model.name, version, late), None, time, about))
        if self._tracks:
            self._asked.append(seq)
        if self._supervised:
            self._open[seq] = (id, at, kept, output, key, version, about)
            if log is not None:
                log.asked(seq, key, id, time, kept, version, late, output)
        else:
            self._open[seq] = (id, at, None, output, key, version, about)
            try:
                model.learn(x)
            except Exception as error:  # noqa: BLE001 - as above
                if log is not None:
                    log.asked(seq, key, id, time, kept, version, late, output, LEARNING_FAILED)
                self._fail("model_error", _while_learning(error), id, at, values, position, said)
                return
            model.version += 1
            if log is not None:
                log.asked(seq, key, id, time, kept, version, late, output)
                if model.version % log.every == 0:
                    log.keyframe(key, model.version, model.model)

    def _learn(self, operation: tuple[Any, ...], said: list[Said]) -> None:
        _, position, seq, label, moment, assumed = operation
        question = self._open.pop(seq, None)
        if question is None:
            return  # it was rejected when it was asked
        if self._tracks:
            self._closed.append(seq)
        id, at, kept, output, key, version, about = question
        shown = output.get(True, 0.0) if self._shows_probability else output
        log = self._log
        if type(key) is list:  # its model is gone
            if log is not None:
                log.learned(seq, key, label, moment, assumed, NOT_LEARNED)
            outcome = Outcome(id, at, shown, label, to_datetime(moment), key[0], version, version, assumed)
            said.append((position, outcome, output, moment, about))
            return
        model = self._models.get(key)
        if model is None:
            model = self._fetch(key)
        if kept is not None:
            x = dict(zip(self._names, kept, strict=True)) if type(kept) is tuple else kept
            self._touched.add(key)
            try:
                model.learn(x, label)
            except Exception as error:  # noqa: BLE001 - as above
                if log is not None:
                    log.learned(seq, key, label, moment, assumed, FAILED)
                self._fail("model_error", _while_learning(error), id, at, tuple(x.values()), position, said)
                return
            model.version += 1
        if log is not None:
            log.learned(seq, key, label, moment, assumed, NOT_LEARNED if kept is None else WENT_WELL)
            if kept is not None and model.version % log.every == 0:
                log.keyframe(key, model.version, model.model)
        outcome = Outcome(id, at, shown, label, to_datetime(moment), model.name, version, model.version, assumed)
        said.append((position, outcome, output, moment, about))

    def _fetch(self, key: Any) -> _Model:
        """A model that is not in memory: from its row, or new."""
        kept = [] if self._fresh or self._rows is None else self._rows.get(f"{self._prefix}/{key_text(key)}")
        if kept:
            fitted, name, version = kept[0]
            model = self._models[key] = _Model(fitted, name, version, self._method)
            if self._log is not None and self._log.begins:
                self._log.keyframe(key, version, fitted)  # older than the log
            return model
        # A pickle round trip first, so that a model behaves the same before and after a checkpoint.
        name = model_named(self._model_name, self._per, key)
        warm = self._warm.get(key_text(key), self._warm.get(key_text(None)))
        pickled, version = (self._prototype, 0) if warm is None else warm
        model = self._models[key] = _Model(pickle.loads(pickled), name, version, self._method)
        if warm is not None and self._log is not None:
            self._log.keyframe(key, version, model.model)
        return model

    def _fail(
        self, reason: str, detail: str, id: Any, at: datetime, values: tuple[Any, ...], position: int, said: list[Said]
    ) -> None:
        """A question that got no answer; its record shows what was asked, the bytes as read are gone by now."""
        asked = {"id": id, "time": at, "values": values}
        said.append((position, reject(reason, detail, f"event {id!r}", encode(asked)[:-1]), None, 0, None))


def _while_learning(error: Exception) -> str:
    return f"learning: {type(error).__name__}: {error}"


def _present(features: dict[str, Any]) -> dict[str, Any]:
    """Without the missing values: river's models read an absent feature as unknown."""
    return {name: value for name, value in features.items() if value is not None}


def model_named(model: str, per: tuple[str, ...] | None, key: Any) -> str:
    """The name of a key's model."""
    if per is None:
        return model
    parts = key if len(per) > 1 else (key,)
    return f"{model}/{','.join(f'{name}={part}' for name, part in zip(per, parts, strict=True))}"


def method_of(model: Any) -> tuple[str, bool]:
    """The method of a model that answers, and whether it gives a distribution over labels."""
    step = final_step(model)
    if isinstance(step, base.Classifier):
        gives_probabilities = type(step).predict_proba_one is not base.Classifier.predict_proba_one
        return ("predict_proba_one", True) if gives_probabilities else ("predict_one", False)
    return ("predict_one", False) if isinstance(step, base.Regressor) else ("score_one", False)


def shows_probability(job: Job) -> bool:
    """Whether records show the probability of True in place of the distribution over both labels."""
    return method_of(job.model)[1] and job.binary


def _arrangement(job: Job) -> Callable[[tuple[Any, ...]], tuple[Any, ...]] | None:
    """Puts values that came as (event alone, entity by entity) into the declared order; None if they are in it."""
    came: list[str] = []
    for feature in job.features:
        if not isinstance(feature, Entity):
            came.extend(feature.feature_names)
    for entity in job.entities:
        came.extend(entity.feature_names)
    places = [came.index(name) for name in job.feature_names]
    if places == list(range(len(places))):
        return None
    return itemgetter(*places)
