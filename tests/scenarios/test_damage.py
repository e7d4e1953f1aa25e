"""Ten thousand lines with every kind of damage: none stops the job, none is lost, none changes an answer."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import msgspec
from pydantic import Field
from river import linear_model, preprocessing

from dataflows import Csv, Event, Job, Jsonl, Label, Prediction, Reject, Time
from features import Count, Entity, Fields, Mean


class Payment(Event, id="id", time="at"):
    id: int
    at: datetime
    card: str
    amount: float = Field(ge=0, lt=1e9)
    fraud: bool


def job(source: Csv | Jsonl) -> Job:
    """A job with windowed features over a file."""
    return Job(
        name="damage",
        events=source,
        features=[Fields("amount"), Entity("card", [Count(), Mean("amount")], over="1h")],
        model=preprocessing.StandardScaler() | linear_model.LogisticRegression(),
        label=Label(field="fraud", delay="10m"),
        time=Time(max_jump="1d"),
    )


def good_line(number: int, rng: random.Random) -> bytes:
    """A payment as it should be."""
    at = f"2024-01-01T{number // 3600 % 24:02d}:{number // 60 % 60:02d}:{number % 60:02d}Z"
    amount = round(rng.lognormvariate(3, 1), 2)
    card, fraud = f"c{rng.randrange(50)}", "true" if rng.random() < 0.1 else "false"
    return f'{{"id":{number},"at":"{at}","card":"{card}","amount":{amount},"fraud":{fraud}}}'.encode()


def damages(good: bytes, number: int) -> list[tuple[bytes, str]]:
    """Every kind of damage to a good line, each with its verdict."""
    text = good.decode()
    fields: dict[str, object] = msgspec.json.decode(good)

    def with_(**changed: object) -> bytes:
        return msgspec.json.encode(fields | changed)

    def without(name: str) -> bytes:
        return msgspec.json.encode({k: v for k, v in fields.items() if k != name})

    return [
        (good[: len(good) // 2], "not_json"),
        (good[:-1], "not_json"),
        (b"", "empty"),
        (b"   ", "empty"),
        (b"hello", "not_json"),
        (b"<xml/>", "not_json"),
        (b"[1,2]", "invalid"),
        (b"null", "invalid"),
        (b"17", "invalid"),
        (with_(amount="many"), "invalid"),
        (with_(amount=[1]), "invalid"),
        (with_(amount=None), "invalid"),
        (with_(amount=-5), "invalid"),
        (with_(id="x7"), "invalid"),
        (with_(id=1.5), "invalid"),
        (with_(card=7), "invalid"),
        (with_(fraud="maybe"), "invalid"),
        (without("id"), "invalid"),
        (without("at"), "invalid"),
        (without("card"), "invalid"),
        (without("amount"), "invalid"),
        (without("fraud"), "invalid"),
        (text.replace('"amount":', '"amount":NaN,"was":').encode(), "invalid"),
        (text.replace('"amount":', '"amount":-Infinity,"was":').encode(), "invalid"),
        (text.replace('"amount":', '"amount":1e999,"was":').encode(), "invalid"),
        (text.replace('"amount":', f'"amount":{"9" * 400},"was":').encode(), "invalid"),
        (text.replace('"amount":', f'"amount":{"9" * 5000},"was":').encode(), "not_json"),
        (with_(amount=1e300), "invalid"),
        (text.replace('"id":', f'"id":{10**30},"was":').encode(), "invalid"),
        (with_(at="yesterday"), "invalid"),
        (with_(at="2024-13-01T00:00:00Z"), "invalid"),
        (with_(at="9999-12-31T23:59:59Z"), "time_out_of_range"),
        (with_(at="0001-01-01T00:00:00Z"), "time_out_of_range"),
        (with_(at="2031-01-01T00:00:00Z", id=-number - 1), "time_jump"),
        (with_(at="2023-01-01T00:00:00Z", id=-number - 1), "too_late"),
        (with_(at=1e30), "invalid"),
        (text.encode("utf-16"), "encoding"),
        (good.replace(b'"card":"', b'"card":"\xff\xfe'), "encoding"),
        (b"\xc3\x28", "encoding"),
        (good.replace(b"}", b"}}"), "not_json"),
        (b"{" * 3000, "not_json"),
        (b"\x00" + good, "not_json"),
        (b"x" * ((1 << 20) + 500), "too_long"),
        (good, "duplicate_event"),
    ]


def damaged_stream(lines: int, seed: int) -> Iterator[tuple[bytes, str]]:
    """Good and damaged lines in turn, each with its verdict ("" for good)."""
    rng = random.Random(seed)
    written, number, last_long = 0, 0, 0
    while written < lines:
        good = good_line(number, rng)
        yield good, ""
        written += 1
        options = [d for d in damages(good, number) if b"\n" not in d[0]]
        line, verdict = options[number % len(options)]
        if verdict == "too_long":  # one in a few is enough to show it
            last_long += 1
            if last_long > 3:
                line, verdict = b"", "empty"
        if number > 0 or verdict != "too_late":
            yield line, verdict
            written += 1
        number += 1


def test_damaged_lines_are_rejected_with_their_reason_and_change_no_answer(tmp_path: Path) -> None:
    """Of 10,000 lines every damaged one becomes a reject with its reason, bytes and place; the rest answer alike."""
    stream = list(damaged_stream(10_000, seed=1))
    bad_file, good_file = tmp_path / "bad.jsonl", tmp_path / "good.jsonl"
    bad_file.write_bytes(b"".join(line + b"\n" for line, _ in stream))
    good_file.write_bytes(b"".join(line + b"\n" for line, verdict in stream if not verdict))

    records = list(job(Jsonl(bad_file, Payment)).play())
    rejects = [r for r in records if isinstance(r, Reject)]
    answers = [r for r in records if isinstance(r, Prediction)]

    assert len(stream) >= 10_000
    assert len(rejects) + len(answers) == len(stream), "read = accepted + rejected"
    verdicts = {f"bad.jsonl:{row}": (verdict, line) for row, (line, verdict) in enumerate(stream, 1) if verdict}
    assert {r.place for r in rejects} == set(verdicts)
    for reject in rejects:
        verdict, line = verdicts[reject.place]
        assert reject.reason == verdict, (line[:80], reject.detail)
        assert reject.original_bytes() == line[: len(reject.original_bytes())]
        assert len(reject.original_bytes()) >= min(len(line), 1 << 20)
    assert len(Counter(r.reason for r in rejects)) >= 9
    assert answers == [r for r in job(Jsonl(good_file, Payment)).play() if isinstance(r, Prediction)]


def test_damaged_csv_rows_are_rejected_with_their_reason(tmp_path: Path) -> None:
    """A CSV file's short, long, misquoted, empty and wrongly typed rows are rejects; the others are answered."""
    rows = [
        (b"1,2024-01-01T00:00:00Z,c1,5.0,false", ""),
        (b"2,2024-01-01T00:00:01Z,c1,5.0", "not_csv"),
        (b"3,2024-01-01T00:00:02Z,c1,5.0,false,more", "not_csv"),
        (b'4,2024-01-01T00:00:03Z,"c1,5.0,false', "not_csv"),
        (b"", "empty"),
        (b"5,2024-01-01T00:00:04Z,c1,,false", "invalid"),
        (b"6,2024-01-01T00:00:05Z,c1,nan,false", "invalid"),
        (b"7,2024-01-01T00:00:06Z,c\xff,5.0,false", "encoding"),
        (b'8,2024-01-01T00:00:07Z,"a ""quoted"" card, with comma",5.0,true', ""),
        (b"9,2024-01-01T00:00:08Z,,5.0,true", ""),
    ]
    file = tmp_path / "rows.csv"
    file.write_bytes(b"id,at,card,amount,fraud\r\n" + b"".join(line + b"\r\n" for line, _ in rows))
    records = list(job(Csv(file, Payment)).play())
    assert [r.id for r in records if isinstance(r, Prediction)] == [1, 8, 9]
    assert {r.place: r.reason for r in records if isinstance(r, Reject)} == {
        f"rows.csv:{row}": verdict for row, (_, verdict) in enumerate(rows, 2) if verdict
    }
