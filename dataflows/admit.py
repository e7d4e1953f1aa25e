"""Admit: each event once; later its answer, or its expiry. The moment a label is revealed is decided here.

Admit stands in front of the features, so that label-derived features (a target mean, a terminal's fraud rate) see an
answer with all its keys at the moment it is revealed and never before. It walks the total order, item by item:

1. The clock is the newest event time so far. Answers and expiries due at or before it come first, in the order
   (due, order of question): a label due at t is known before the question at t.
2. A label is matched with its open question and answers it; one whose question has not come yet waits for it; all
   others (duplicates, revisions, orphans, after the expiry) are rejects with a reason.
3. An event that was not seen before is a question: its features are asked for, its label is awaited.

A question expires when the clock passes its horizon: a label at exactly the horizon is still in time.
What each step has to do for a batch is collected in a `Work`.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Hashable, Iterator
from math import inf
from typing import Any

from dataflows.chunks import Chunks
from dataflows.events import Event, EventId, Reject, reject
from dataflows.job import DISCARD, Job, delay_function
from dataflows.order import LABEL, Batch, Item
from dataflows.remembered import EarlyLabels, Remembered
from dataflows.rows import NO_LABEL, EntityRows, entity_step_names, key_getter, key_group, matchers, static_values
from features.rows import Change, Rows, put
from features.spec import Derived

QUESTION = 0
ANSWER = 1
DISCARDED = 2
"""What a learner is told, as tuples with these fields; the position orders the operations of a batch over all learners:
(QUESTION, position, question's number, place in the batch, id, time, late, model key, values of the event alone, record
key), (ANSWER, position, question's number, label, moment, assumed), (DISCARDED, position, question's number)."""

GLOBAL_GROUP = 1
"""The key group of a global model: not the one of the reader, so that two workers share the work."""

FAR = 1000 * 366 * 86_400_000_000
"""A label delay of a thousand years (µs) is a mistake, and would lead beyond what a date can be."""

Row = tuple[int, Any, int, tuple[Any, ...] | None]
"""(place of the question in the batch, or -1 to observe only; entity; time; values, or None to read only)."""


class Work:
    """What one batch asks of the steps behind admit.

    `features` holds rows by (entity declaration, key group), `learners` operations by learner key group;
    `reads` says, by learner key group, which features answer its questions, and `owners` by place, whose they are.
    """

    __slots__ = (
        "number", "questions", "operations", "features", "learners", "reads", "owners", "rejects", "watermark",
        "clock", "end", "status",
    )  # fmt: skip

    def __init__(self, batch: Batch) -> None:
        self.number = batch.number
        self.questions = 0
        self.operations = 0
        self.features: dict[tuple[int, int], list[Row]] = {}
        self.learners: dict[int, list[tuple[Any, ...]]] = {}
        self.reads: dict[int, set[tuple[int, int]]] = {}
        self.owners: list[int] = []
        self.rejects: list[Reject] = list(batch.rejects)
        self.watermark = batch.watermark
        self.clock: int | None = None
        self.end = batch.end
        self.status: dict[str, Any] = {}


Open = tuple[int, tuple[Any, ...], Hashable, Any, int | None, tuple[Any, ...]]
"""A question that waits: learner group, rows for label-derived features, what it is found by (what a label names, or
the entity whose later event answers), label or NO_LABEL, when the label of a field is due or else the event time, names
and values of its entities' keys (where state is kept, for people to ask).

A tuple of plain values, because there may be a million of them: the garbage collector leaves such tuples alone.
"""


class _DueQueue:
    """Questions by when they fall due, and by number where that is equal.

    What comes in order waits in line; only the rest is kept sorted. With one delay for all, as is common, nothing is
    ever sorted, where a heap of all open questions would cost more than the rest of admit. After one far-off due time
    all others are sorted until it has passed.

    >>> queue = _DueQueue()
    >>> for due, seq in [(5, 1), (7, 2), (6, 3)]:
    ...     queue.push(due, seq)
    >>> queue.earliest, [queue.pop() for _ in range(3)], queue.earliest
    (5, [(5, 1), (6, 3), (7, 2)], inf)
    """

    __slots__ = ("earliest", "_line", "_heap")

    def __init__(self) -> None:
        self.earliest: float = inf
        self._line: deque[tuple[int, int]] = deque()
        self._heap: list[tuple[int, int]] = []

    def push(self, due: int, seq: int) -> None:
        """Add a question; numbers must grow."""
        if not self._line or due >= self._line[-1][0]:
            self._line.append((due, seq))
        else:
            heapq.heappush(self._heap, (due, seq))
        if due < self.earliest:
            self.earliest = due

    def pop(self) -> tuple[int, int]:
        """Take the one that falls due first, as (due, number)."""
        line, heap = self._line, self._heap
        first = line.popleft() if line and (not heap or line[0] < heap[0]) else heapq.heappop(heap)
        self.earliest = min(line[0][0] if line else inf, heap[0][0] if heap else inf)
        return first


class Admit:
    """Turns ordered batches into work for the features and the learner; holds ids, open questions, early labels.

    Parameters
    ----------
    job
        The declaration.
    groups
        Number of key groups that entities (and with `per`, models) are spread over.
    rows
        Where all that is held is kept; `changes` says what to keep.
    """

    def __init__(self, job: Job, groups: int = 1, rows: Rows | None = None) -> None:
        self._label = job.label
        self._kind = job.label.kind
        self._groups = groups
        self._derived = [f for f in job.features if isinstance(f, Derived)]
        self._entities = [EntityRows(i, e, job, groups) for i, e in enumerate(job.entities)]
        self._key_names = tuple(entity.key for entity in job.entities)
        self._declared = tuple(
            (name, entity.key, entity.columns)
            for name, entity in zip(entity_step_names(job), job.entities, strict=True)
        )
        self._kept_declared: tuple[Any, ...] | None = None
        self._per_names = job.per or ()
        self._kept_per: tuple[str, ...] = ()
        # Features over columns of which the types alone do not say that every value will do.
        doubtful = [not set(e.columns) <= job.trusted_columns for e in job.entities]
        self._slack: int = job.time.lateness if job.time.order == "arrival" else 0
        self._wary = [entity for entity, doubt in zip(self._entities, doubtful, strict=True) if doubt]
        self._static = static_values(job)
        self._per = key_getter(job.per, job) if job.per else None
        self._record_key = key_getter(job.record_key, job) if job.record_key else None
        self._global_group = GLOBAL_GROUP % groups
        self._delay = delay_function(job.label)
        self._has_ids = job.events.event.id_field is not None
        self._match_event, self._match_label = matchers(job)
        self._target_key = key_getter(job.label.by, job) if job.label.by else None
        self._max_models = job.max_models
        self.counts: Counter[str] = Counter()
        self._clock = -(2**63)
        self._newest_moment = -(2**63)  # at the end of input labels are revealed ahead of the clock
        self._seq = 0
        self._oldest = 1
        self._ids = Remembered("ids", job.max_ids, rows)
        self._closed = Remembered("closed", job.max_ids, rows)
        self._models = Remembered("models", job.max_models, rows)
        self._early = EarlyLabels(rows)
        self._open: dict[int, Open] = {}
        self._waiting: dict[Hashable, tuple[int, ...]] = {}
        self._due = _DueQueue()
        self._targets: dict[Any, list[tuple[int, int]]] = {}
        self._chunks = Chunks("open")
        self._tracks = rows is not None
        self._kept_seq = 0
        self._gone: list[int] = []
        self._revised: set[int] = set()
        if rows is not None:
            self._restore(rows)

    def __len__(self) -> int:
        """Open questions."""
        return len(self._open)

    @property
    def clock(self) -> int | None:
        """The newest event time so far; None before the first event."""
        return self._clock if self._clock > -(2**63) else None

    def begin_at(self, clock: int | None) -> None:
        """Go on where another run had got to: what comes from before is late."""
        if clock is not None:
            self._clock = clock

    @property
    def newest(self) -> int | None:
        """No event or label that any feature has seen is later than this; None before the first event."""
        return None if self.clock is None else max(self._clock, self._newest_moment)

    @property
    def questions(self) -> int:
        """Events that were asked about."""
        return self._seq

    @property
    def unsaved(self) -> int:
        """Questions that came or went since `changes` was asked."""
        return self._seq - self._kept_seq + len(self._gone)

    def changes(self) -> Iterator[Change]:
        """What the rows need to follow since the last call."""
        yield put("admit", (self.counts, self._clock, self._newest_moment, self._seq, self._oldest, self._declared))
        if self._kept_per != self._per_names:
            self._kept_per = self._per_names
            yield put("per", self._per_names)
        for remembered in (self._ids, self._closed, self._models):
            yield from remembered.changes()
        yield from self._early.changes()
        if self._kept_declared != self._declared:
            yield from self._chunks.clear()
            self._kept_seq, self._kept_declared = 0, self._declared
        first, gone, revised = self._kept_seq + 1, self._gone, self._revised
        self._kept_seq, self._gone, self._revised = self._seq, [], set()
        open_ = self._open
        numbers = range(first, self._seq + 1) if first > 1 else sorted(open_)
        added = ((seq, open_[seq]) for seq in numbers if seq in open_)
        amended = ((seq, open_[seq]) for seq in revised if seq < first and seq in open_)
        yield from self._chunks.changes(added, gone, amended)

    def _restore(self, rows: Rows) -> None:
        """What is not in the rows follows from the open questions: when they fall due, what waits for which label."""
        kept = rows.get("admit")
        if kept:
            self.counts, self._clock, self._newest_moment, self._seq, self._oldest, self._kept_declared = kept[0]
            self._kept_seq = self._seq
        per = rows.get("per")
        self._kept_per = per[0] if per else ()
        if self._kept_per != self._per_names:  # the models begin anew, for other keys
            self._models.clear()
        self._open = dict(self._chunks.restore(rows))
        if self._kept_declared is not None and self._kept_declared != self._declared:
            self._translate(self._kept_declared)
        for seq, (_, _, match, _, moment, _) in self._open.items():
            self._wait(seq, match, moment)

    def _translate(self, before: tuple[Any, ...]) -> None:
        """The job was changed since: what open questions keep for features of labels, by the declarations of now."""
        now = {name: (index, key, columns) for index, (name, key, columns) in enumerate(self._declared)}
        for seq, (group, rows, *rest) in self._open.items():
            kept = []
            for (index, its_group), entity_key, values in rows:
                name, key, columns = before[index]
                place, key_now, columns_now = now.get(name, (-1, None, ()))
                if key_now == key:
                    there = dict(zip(columns, values, strict=True))
                    taken = tuple([there.get(column) for column in columns_now])
                    kept.append((self._entities[place].places[its_group], entity_key, taken))
            self._open[seq] = (group, tuple(kept), *rest)

    def open_questions(self) -> Iterator[tuple[int, tuple[Any, ...]]]:
        """The open questions by number, each with the names and then the values of its entities' keys."""
        return ((seq, question[5]) for seq, question in self._open.items())

    def admit(self, batch: Batch) -> Work:
        """Walk a batch; see the module's text."""
        work = Work(batch)
        due = self._due
        for item in batch.items:
            time = item[0]
            late = time < self._clock
            if not late:
                self._clock = time
            if due.earliest <= self._clock:
                self._reveal(self._clock, work)
            if self._early.entries:
                self._forget_early(self._clock - self._label.early, work)
            if item[1] == LABEL:
                self._take_label(item, work)
            else:
                self._take_event(item, late, work)
        if batch.end:
            self._finish(work)
        work.clock = self._clock if self._seq or batch.items else None
        return work

    # -- events

    def _take_event(self, item: Item, late: bool, work: Work) -> None:
        time, _, id, name, offset, event, _ = item
        if id is None:
            id = f"{name}:{offset}"
        elif id in self._ids.numbers:
            self._reject("duplicate_event", f"event {id!r} was processed before", item, work)
            return
        try:
            row = vars(event)
            if self._derived:
                row = self._with_derived(event, row)
            static = self._static(row)
            entities = self._entity_rows(event, row)
            if self._wary:
                self._check_entities(row, entities)
            key = self._per(row) if self._per is not None else None
            about = self._record_key(row) if self._record_key is not None else None
            delay = self._delay(event) if self._kind == "field" else 0
            if delay > FAR:
                raise ValueError(f"a label delay of {delay} µs")
        except Exception as error:  # noqa: BLE001 - whatever a user's function raises spoils its event, not the job
            self._reject("function_error", f"{type(error).__name__}: {error}", item, work)
            return
        if self._per is not None and key not in self._models.numbers:
            if len(self._models.numbers) >= self._max_models:
                self._reject("too_many_models", f"there are {self._max_models}, none for {key!r}", item, work)
                return
            self._models.add(key)
        if self._has_ids:
            forgotten = self._ids.add(id)
            if forgotten:
                self.counts["ids_forgotten"] += forgotten
        if self._target_key is not None:
            self._answer_targets(row, time, work)
        group = self._global_group if self._per is None else key_group(key, self._groups)
        rows = self._ask(work, group, id, time, late, key, static, about, entities)
        keys = self._keys_of(entities) if self._tracks else ()
        self._await_label(row, id, time, delay, group, rows, keys, work)
        if len(self._open) > self._label.max_open:
            self._push_out_oldest(work)

    def _keys_of(self, entities: list[tuple[EntityRows, Any, tuple[Any, ...] | None]]) -> tuple[Any, ...]:
        """The names of the keys of all declarations (one object for all questions), and what they are here."""
        if len(entities) == len(self._entities):
            return (self._key_names, *[key for _, key, _ in entities])
        there = {entity.index: key for entity, key, _ in entities}
        return (self._key_names, *[there.get(i) for i in range(len(self._entities))])

    def _check_entities(self, row: dict[str, Any], entities: list[Any]) -> None:
        """Refuse what one feature would refuse before another has seen the event."""
        label = NO_LABEL if self._kind == "stream" else row[self._label.field]
        for entity, _, values in entities:
            if entity in self._wary:
                entity.check(values, label if entity.of_labels else NO_LABEL)

    def _with_derived(self, event: Event, row: dict[str, Any]) -> dict[str, Any]:
        row = row.copy()
        for derived in self._derived:
            value = row[derived.name] = derived.fn(event)
            if type(value) is float and value - value != 0.0:  # NaN and infinities would poison sums and models
                raise ValueError(f"{derived.name} gave {value}")
        return row

    def _entity_rows(self, event: Event, row: dict[str, Any]) -> list[tuple[EntityRows, Any, tuple[Any, ...] | None]]:
        """By entity declaration the key and values of the event; values are None where `where` is not met."""
        rows = []
        for entity in self._entities:
            key = entity.key(row)
            if key is not None:
                rows.append((entity, key, entity.values(row) if entity.where is None or entity.where(event) else None))
        return rows

    def _ask(
        self, work: Work, group: int, id: EventId, time: int, late: bool, key: Any, static: tuple[Any, ...], about: Any,
        entities: list[tuple[EntityRows, Any, tuple[Any, ...] | None]],
    ) -> tuple[Any, ...]:  # fmt: skip
        """Tell features and learner of the question; the rows that label-derived features will need of it."""
        place = work.questions
        work.questions += 1
        self._seq += 1
        if late:
            self.counts["late_events"] += 1
        work.owners.append(group)
        reads = work.reads.get(group)
        if reads is None:
            reads = work.reads[group] = set()
        features, groups = work.features, self._groups
        later: tuple[Any, ...] = ()
        for entity, entity_key, values in entities:
            where = entity.places[key_group(entity_key, groups) if groups > 1 else 0]
            if entity.of_labels:
                if values is not None:
                    later += ((where, entity_key, values),)
                values = None
            reads.add(where)
            if where in features:
                features[where].append((place, entity_key, time, values))
            else:
                features[where] = [(place, entity_key, time, values)]
        self._tell(work, group, (QUESTION, work.operations, self._seq, place, id, time, late, key, static, about))
        return later

    def _tell(self, work: Work, group: int, operation: tuple[Any, ...]) -> None:
        work.operations += 1
        operations = work.learners.get(group)
        if operations is None:
            operations = work.learners[group] = []
        operations.append(operation)

    # -- labels to come

    def _await_label(
        self, row: dict[str, Any], id: EventId, time: int, delay: int, group: int, rows: tuple[Any, ...],
        keys: tuple[Any, ...], work: Work,
    ) -> None:  # fmt: skip
        seq = self._seq
        if self._kind == "field":
            self._await_field(row[self._label.field], time, delay, (group, rows, keys), work)
            return
        match = self._match_event(row, id, time) if self._target_key is None else self._target_key(row)
        self._open[seq] = (group, rows, match, NO_LABEL, time, keys)
        self._wait(seq, match, time)
        if self._target_key is None:
            if match in self._early.entries:
                self._answer_early(match, seq, time, work)
        elif match is None and self._label.horizon is None:
            self.counts["unlabelled"] += 1
            self._discard(seq, work)

    def _await_field(
        self, value: Any, time: int, delay: int, question: tuple[int, tuple[Any, ...], tuple[Any, ...]], work: Work
    ) -> None:
        """The label is known already; it waits for its time, or for the horizon if that comes first."""
        group, rows, keys = question
        seq, horizon = self._seq, self._label.horizon
        moment: int | None = time + delay if delay > 0 else time
        if value is None or (horizon is not None and time + delay > time + horizon):
            value = NO_LABEL
            moment = None if horizon is None else time + horizon + 1
        self._open[seq] = (group, rows, None, value, moment, keys)
        if moment is not None:
            self._due.push(moment, seq)
            return
        self.counts["unlabelled"] += 1
        self._discard(seq, work)

    def _wait(self, seq: int, match: Hashable, moment: int | None) -> None:
        """Note what an open question waits for: its moment, or by its event time an expiry, a label, a later event."""
        if self._kind == "field":
            if moment is not None:
                self._due.push(moment, seq)
            return
        assert moment is not None
        if self._label.horizon is not None:
            self._due.push(moment + self._label.horizon + 1, seq)
        if self._target_key is None:
            self._waiting[match] = (*self._waiting.get(match, ()), seq)
        elif match is not None:
            heapq.heappush(self._targets.setdefault(match, []), (moment + self._label.after, seq))

    def _answer_targets(self, row: dict[str, Any], time: int, work: Work) -> None:
        """This event is the later event that earlier questions of its entity waited for."""
        assert self._target_key is not None
        key = self._target_key(row)
        value = row[self._label.field]
        waiting = self._targets.get(key)
        if waiting is None or value is None:
            return
        while waiting and waiting[0][0] <= time:
            _, seq = heapq.heappop(waiting)
            if seq in self._open:
                self._answer(seq, value, time, False, work)
        self._drop_targets(key)

    def _drop_targets(self, key: Any) -> None:
        """Forget what an entity's later events need not answer any more."""
        waiting = self._targets.get(key, [])
        while waiting and waiting[0][1] not in self._open:
            heapq.heappop(waiting)
        if not waiting:
            self._targets.pop(key, None)

    def _answer_early(self, match: Hashable, seq: int, time: int, work: Work) -> None:
        value, label_time, *_ = self._early.pop(match)
        self.counts["early_labels"] += 1
        if self._label.revisions == "last":
            self._revise(seq, value)
        else:
            self._answer(seq, value, self._revealed_at(max(label_time, time)), False, work)

    def _revise(self, seq: int, value: Any) -> None:
        """The newest label so far, learned when the horizon ends."""
        group, rows, match, before, moment, keys = self._open[seq]
        if before is not NO_LABEL:
            self.counts["revised_labels"] += 1
        self._open[seq] = (group, rows, match, value, moment, keys)
        if self._tracks:
            self._revised.add(seq)

    def _push_out_oldest(self, work: Work) -> None:
        while self._oldest not in self._open:
            self._oldest += 1
        self.counts["open_over_bound"] += 1
        if self._kind == "field":  # its label is known already, but not yet to be told
            self._expire(self._oldest, self._clock, work)
        else:
            self._fall_due(self._oldest, self._clock, work)

    # -- labels that come

    def _take_label(self, item: Item, work: Work) -> None:
        time, _, _, _, _, event, _ = item
        self.counts["labels"] += 1
        value = getattr(event, self._label.field)
        if value is None:
            self._reject("label_missing", f"{self._label.field} is null", item, work)
            return
        try:
            for entity in self._wary:
                if entity.label_at >= 0:
                    entity.check((None,) * entity.width, value)
        except (TypeError, ValueError) as error:
            self._reject("feature_error", str(error), item, work)
            return
        match = self._match_label(event, item[2])
        seqs = self._waiting.get(match)
        if seqs is None:
            self._unmatched(match, value, item, work)
        elif self._label.revisions == "last":
            for seq in seqs:
                self._revise(seq, value)
        else:
            for seq in seqs:
                self._answer(seq, value, self._revealed_at(time), False, work)

    def _revealed_at(self, time: int) -> int:
        """When a label became known: its own time, or as late as features may hear of it."""
        return max(time, self._clock - self._slack)

    def _unmatched(self, match: Hashable, value: Any, item: Item, work: Work) -> None:
        closed = self._closed.get(match, NO_LABEL)
        if closed is None:
            self._reject("late_label", "its question expired before", item, work)
        elif closed is not NO_LABEL:
            same = closed[0] == value
            reason = "duplicate_label" if same else "label_revision"
            self._reject(reason, f"label {value!r} came after {closed[0]!r} was learned", item, work)
        elif match in self._early.entries and self._label.revisions == "first":
            self._reject("duplicate_label", f"label {value!r} came twice before its question", item, work)
        else:
            self._keep_early(match, value, item, work)

    def _keep_early(self, match: Hashable, value: Any, item: Item, work: Work) -> None:
        self._early.keep(match, value, item[0], f"{item[3]}:{item[4]}", item[6])
        while len(self._early.entries) > self._label.max_early:
            self._orphan(work)

    def _forget_early(self, before: int, work: Work) -> None:
        while self._early.first_came() < before:
            self._orphan(work)

    def _orphan(self, work: Work) -> None:
        """The label that has waited longest gets no question."""
        match, (value, _, place, raw, *_) = self._early.pop_first()
        self.counts["rejected_by_admit"] += 1
        work.rejects.append(reject("orphan_label", f"no question for label {value!r} of {match!r}", place, raw))

    # -- answers and expiries

    def _reveal(self, clock: int, work: Work) -> None:
        """Everything due at or before the clock, in the order (due, order of question)."""
        due = self._due
        while due.earliest <= clock:
            moment, seq = due.pop()
            if seq in self._open:
                self._fall_due(seq, moment, work)

    def _fall_due(self, seq: int, moment: int, work: Work) -> None:
        label = self._open[seq][3]
        if label is NO_LABEL:
            self._expire(seq, moment, work)
        else:
            self._answer(seq, label, moment, False, work)

    def _expire(self, seq: int, moment: int, work: Work) -> None:
        self.counts["expired"] += 1
        if self._label.otherwise is DISCARD:
            self._discard(seq, work)
        else:
            self._answer(seq, self._label.otherwise, moment, True, work)

    def _answer(self, seq: int, label: Any, moment: int, assumed: bool, work: Work) -> None:
        group, rows, match, *_ = self._open.pop(seq)
        if self._tracks:
            self._gone.append(seq)
        for where, key, values in rows:
            row = (-1, key, moment, self._entities[where[0]].answered(values, label))
            if where in work.features:
                work.features[where].append(row)
            else:
                work.features[where] = [row]
        self._tell(work, group, (ANSWER, work.operations, seq, label, moment, assumed))
        if match is not None:
            self._close(match, seq, None if assumed else (label,))

    def _discard(self, seq: int, work: Work) -> None:
        group, _, match, *_ = self._open.pop(seq)
        if self._tracks:
            self._gone.append(seq)
        self._tell(work, group, (DISCARDED, work.operations, seq))
        if match is not None:
            self._close(match, seq, None)

    def _close(self, match: Hashable, seq: int, label: tuple[Any] | None) -> None:
        """The question waits no longer; others that a label names the same way still may."""
        if self._target_key is not None:
            self._drop_targets(match)
            return
        left = tuple(other for other in self._waiting.get(match, ()) if other != seq)
        if left:
            self._waiting[match] = left
        else:
            self._waiting.pop(match, None)
            self.counts["closed_forgotten"] += self._closed.add(match, label)

    def _finish(self, work: Work) -> None:
        """The end of input: what is open is revealed or expires; labels without a question are orphans."""
        while self._due.earliest < inf:
            moment, seq = self._due.pop()
            if seq in self._open:
                self._fall_due(seq, moment, work)
                self._newest_moment = max(self._newest_moment, moment)
        for seq in list(self._open):
            self._expire(seq, self._clock, work)
        self._targets.clear()
        while self._early.entries:
            self._orphan(work)

    def _reject(self, reason: str, detail: str, item: Item, work: Work) -> None:
        self.counts["rejected_by_admit"] += 1
        work.rejects.append(reject(reason, detail, f"{item[3]}:{item[4]}", item[6]))
