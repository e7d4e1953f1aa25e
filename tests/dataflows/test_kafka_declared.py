"""Declaring topics and how to reach them, and what records of them are made of; without a broker."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataflows import Event, JobError, Jsonl, Kafka, Message, Metrics, Outcome, Prediction, Security
from dataflows.connectors.kafka.cluster import Cluster
from dataflows.connectors.kafka.errors import CONNECTION_ERRORS
from dataflows.connectors.kafka.topic import Encoded, decode_reject
from dataflows.events import ModelVersion, Record, Reject, encode, reject
from dataflows.job import Outputs
from dataflows.order import InputError

SECRET = "recognisable"
AT = datetime(2026, 3, 1, 12, tzinfo=UTC)


class Ping(Event, id="id", time="t", unit="s"):
    id: int
    t: int


@pytest.fixture(autouse=True)
def _nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of whoever runs the tests."""
    for name in os.environ:
        if name.startswith("MILLRACE_KAFKA_"):
            monkeypatch.delenv(name)


# -- topics


@pytest.mark.parametrize("topic", ["", "a b", "a/b", "ü", "a" * 250, "a\n", ".", ".."])
def test_a_name_that_kafka_refuses_is_refused(topic: str) -> None:
    """When it is declared, not when it is connected to."""
    with pytest.raises(JobError, match="Kafka: topic"):
        Kafka(topic, Ping)


@pytest.mark.parametrize("topic", ["a", "payments.eu-1_v2", "a" * 249, "..."])
def test_names_of_kafka_are_taken(topic: str) -> None:
    """Letters, digits, dots, dashes and underscores."""
    assert Kafka(topic, Ping).topic == topic


@pytest.mark.parametrize(
    ("start", "kept"),
    [
        ("earliest", "earliest"),
        ("latest", "latest"),
        ("2026-03-01T12:00:00Z", 1_772_366_400_000_000),
        ("2026-03-01T12:00:00", 1_772_366_400_000_000),
        (AT, 1_772_366_400_000_000),
        ({0: 0, 3: 1200}, {0: 0, 3: 1200}),
        ({}, {}),
    ],
)
def test_where_to_begin(start: Any, kept: Any) -> None:
    """A word, a time (without a zone it is UTC), or offsets; declared again from what was kept it is the same."""
    declared = Kafka("a", Ping, start=start)
    assert declared.start == kept
    assert Kafka("a", Ping, start=declared.start).start == kept


@pytest.mark.parametrize(
    "start", ["Earliest", "", "yesterday", None, True, 1.5, {0: -1}, {-1: 0}, {"0": 1}, {0: "1"}, {0: True}, [0]]
)
def test_where_not_to_begin(start: Any) -> None:
    """Anything else is refused with its value."""
    with pytest.raises(JobError, match="start"):
        Kafka("a", Ping, start=start)


@pytest.mark.parametrize(
    "wrong",
    [
        {"timeout": 1.9},
        {"timeout": float("inf")},
        {"timeout": float("nan")},
        {"mode": "exactly_once"},
        {"compression": "brotli"},
        {"ends": "never"},
        {"decoder": "json"},
        {"encoder": 5},
    ],
)
def test_other_faults_of_a_declaration(wrong: dict[str, Any]) -> None:
    """Are one message that names the parameter."""
    with pytest.raises(JobError, match=f"Kafka: {next(iter(wrong))}"):
        Kafka("a", Ping, **wrong)


def test_a_declaration_is_shown_without_secrets() -> None:
    """Neither repr nor str nor JSON of a topic or of outputs holds a password."""
    security = Security(protocol="SASL_SSL", mechanism="PLAIN", username="u", password=SECRET)
    keyed = Security(protocol="SSL", certificate="c", key="k", key_password=SECRET)
    for topic in (Kafka("a", Ping, security=security), Kafka("a", Ping, security=keyed)):
        outputs = Outputs(rejects=topic)
        shown = [repr(topic), str(topic), topic.describe(), topic.where(), repr(outputs), repr(topic.model_dump())]
        shown += [repr(topic.security), str(topic.security), topic.security.model_dump_json() if topic.security else ""]
        assert not [text for text in shown if SECRET in text]


def test_a_file_may_take_the_place_of_a_topic() -> None:
    """Of one whose values are JSON; with a decoder of its own it may not."""
    found = Kafka("a", Ping).at("a.jsonl")
    assert (type(found), found.path, found.event) == (Jsonl, Path("a.jsonl"), Ping)
    with pytest.raises(JobError, match="has a decoder of its own"):
        Kafka("a", Ping, decoder=lambda message: None).at("a.jsonl")


# -- brokers


def test_brokers_are_named_in_the_job_or_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the job says goes first; where nobody says anything the error tells how."""
    with pytest.raises(JobError, match=r"no brokers are named\. Hint: --kafka .* MILLRACE_KAFKA_BROKERS"):
        Kafka("a", Ping).cluster()
    monkeypatch.setenv("MILLRACE_KAFKA_BROKERS", "")
    with pytest.raises(JobError, match="no brokers are named"):
        Kafka("a", Ping).cluster()
    monkeypatch.setenv("MILLRACE_KAFKA_BROKERS", "there:1, there:2,")
    assert Kafka("a", Ping).cluster()._options["bootstrap_servers"] == ["there:1", "there:2"]
    assert Kafka("a", Ping, brokers="here:1").cluster()._options["bootstrap_servers"] == ["here:1"]


@pytest.mark.parametrize("address", ["there", "there:", ":9092", "there:port", "kafka://there:1", "a:1;b:2", "a:1 b:2"])
def test_what_is_no_address_is_said_at_once(address: str) -> None:
    """Instead of after a timeout."""
    with pytest.raises(JobError, match=r"is no address of a broker\. Hint: host:port"):
        Kafka("a", Ping, brokers=address).cluster()


@pytest.mark.parametrize("address", ["there:9092", "127.0.0.1:1", "[::1]:9092", "a_b.c-d:65535"])
def test_what_is_an_address(address: str) -> None:
    """A name, or an address of either protocol, with a port."""
    assert Kafka("a", Ping, brokers=address).cluster().brokers == address


def test_an_error_names_the_newest_reason_that_is_known() -> None:
    """kafka-python says that brokers cannot be reached; why is in its log, and is said with what to do about it."""
    import logging

    from kafka.errors import KafkaConnectionError, KafkaTimeoutError, SaslAuthenticationFailedError

    cluster = Cluster("there:1", Security(), 2.0)
    log = logging.getLogger("kafka.net.connection")
    try:
        for reason in (
            SaslAuthenticationFailedError("Invalid username"),
            KafkaConnectionError("socket disconnected"),
            KafkaTimeoutError("after 96 ms"),
        ):
            log.error("%s: Connection lost: %s", "there", reason)
        with (
            pytest.raises(InputError, match=r"could not look: .*Invalid username. Hint: .*USERNAME"),
            cluster.asking("look"),
        ):
            raise KafkaTimeoutError("Unable to bootstrap")
        with pytest.raises(InputError, match="could not look: PermissionError: no"), cluster.asking("look"):
            raise PermissionError("no")
    finally:
        CONNECTION_ERRORS._reason = None


# -- security


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ({"protocol": "SASL_SSL"}, "needs a mechanism, a username and a password"),
        ({"protocol": "SASL_PLAINTEXT", "mechanism": "PLAIN", "username": "u"}, "needs a mechanism"),
        ({"protocol": "SASL_SSL", "mechanism": "PLAIN", "username": "", "password": SECRET}, "needs a mechanism"),
        ({"protocol": "SSL", "username": "u", "password": SECRET}, "knows no mechanism"),
        ({"mechanism": "PLAIN"}, "knows no mechanism"),
        ({"username": "u"}, "knows no mechanism"),
        ({"password": SECRET}, "knows no mechanism"),
        ({"ca": "ca.pem"}, "is not encrypted"),
        ({"certificate": "c.pem", "key": "k.pem"}, "is not encrypted"),
        ({"protocol": "SSL", "key": "k.pem"}, "a key without a certificate"),
        ({"protocol": "SSL", "key_password": SECRET}, "a key without a certificate"),
        ({"protocol": SECRET}, "Input should be"),
        ({"protocol": "SASL_SSL", "mechanism": SECRET, "username": "u", "password": SECRET}, "Input should be"),
        ({"password": [SECRET]}, "Input should be a valid string"),
        ({"passwort": SECRET}, "Extra inputs"),
        ({"check_hostname": SECRET}, "valid boolean"),
    ],
)
def test_faults_of_security_show_no_values(named: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Declared or in the environment, whatever stands where: the fault is said, the value is not."""
    with pytest.raises(JobError, match=said) as declared:
        Security(**named)
    for name, value in named.items():
        monkeypatch.setenv(f"MILLRACE_KAFKA_{name.upper()}", str(value))
    texts = [str(declared.value), repr(declared.value)]
    try:
        Cluster("a:1", None, 2.0)
    except JobError as error:
        texts.append(str(error))
    assert not [text for text in texts if SECRET in text]


@pytest.mark.parametrize("wrong", [SECRET, [SECRET], {"password": SECRET, "x": SECRET}, (SECRET,)])
def test_what_is_no_security_at_all_is_not_shown(wrong: Any) -> None:
    """A password where the whole of it belongs."""
    with pytest.raises(JobError, match="security: is no Security") as error:
        Kafka("a", Ping, security=wrong)
    assert SECRET not in str(error.value)


def test_security_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each field from its variable, empty ones as if they were not there; a declared one is not mixed with them."""
    for name, value in {
        "PROTOCOL": "SASL_SSL", "MECHANISM": "SCRAM-SHA-512", "USERNAME": "u", "PASSWORD": SECRET,
        "CHECK_HOSTNAME": "false", "CERTIFICATE": "", "KEY": "",
    }.items():  # fmt: skip
        monkeypatch.setenv(f"MILLRACE_KAFKA_{name}", value)
    found = Security.from_environment()
    assert found.password is not None
    assert found.password.get_secret_value() == SECRET
    assert (found.protocol, found.mechanism, found.certificate) == ("SASL_SSL", "SCRAM-SHA-512", None)
    assert not found.check_hostname
    context = found.context()
    assert context is not None
    assert not context.check_hostname
    assert SECRET not in repr(found)
    declared = Cluster("a:1", Security(), 2.0)
    assert declared._options["security_protocol"] == "PLAINTEXT"
    assert declared._options["sasl_plain_password"] is None
    monkeypatch.setenv("MILLRACE_KAFKA_PROTOCOL", "PLAINTEXT")
    with pytest.raises(JobError, match=r"MILLRACE_KAFKA_…: record: .*PLAINTEXT knows no mechanism") as error:
        Cluster("a:1", None, 2.0)
    assert SECRET not in str(error.value)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    """At once, each with what it is for."""
    (tmp_path / "bad.pem").write_text(SECRET)
    bad = str(tmp_path / "bad.pem")
    for ca in (bad, str(tmp_path / "none.pem")):
        with pytest.raises(JobError, match=f"certificates in ca={ca} cannot be read") as error:
            Cluster("a:1", Security(protocol="SSL", ca=ca), 2.0)
        assert SECRET not in str(error.value)
    with pytest.raises(JobError, match=f"certificate={bad} with key={bad} cannot be read"):
        Cluster("a:1", Security(protocol="SSL", certificate=bad), 2.0)


# -- records


def encoded(record: Record, key: Any = None, **named: Any) -> Encoded:
    """One record as a topic gets it."""
    (found,) = Kafka("a", **named).encode([record], [key])
    return found


PREDICTION = Prediction("p\u00fc", AT, {"x": 1.0}, 0.5, "Model/k=1", 7)


@pytest.mark.parametrize(
    ("key", "name"),
    [(None, "pü"), ("c1", "c1"), (7, "7"), (0, "0"), ("", ""), (False, "False"), (("c1", 7), "c1|7"), (("c1",), "c1")],
)
def test_a_key_is_the_entity_or_the_id(key: Any, name: str) -> None:
    """Several fields are joined; what is false is a key all the same."""
    assert encoded(PREDICTION, key)[0] == name.encode()


def test_headers_tell_what_consumers_sort_by() -> None:
    """Of a prediction and an outcome: id, model, version and time; of metrics and models the time."""
    _, value, headers = encoded(PREDICTION)
    time = b"2026-03-01T12:00:00+00:00"
    assert headers == [("id", "pü".encode()), ("model", b"Model/k=1"), ("version", b"7"), ("time", time)]
    assert value == encode(PREDICTION).rstrip(b"\n")
    outcome = Outcome(3, AT, 0.5, True, AT, "Model", 7, 8)
    assert encoded(outcome)[2][0] == ("id", b"3")
    assert encoded(Metrics(AT, 5, {}))[::2] == (b"metrics", [("time", time)])
    assert encoded(ModelVersion(AT, "Model/k=1", 7))[::2] == (b"Model/k=1", [("time", time)])


def test_an_encoder_makes_the_value_alone() -> None:
    """Key and headers stay, and rejects are never touched: their value is the original."""
    own = {"encoder": lambda record: b"own"}
    assert encoded(PREDICTION, "k", **own) == (b"k", b"own", encoded(PREDICTION, "k")[2])
    assert encoded(reject("r", "d", "a/0:1", Message(b"v", b"k")), **own)[1] == b"v"


def test_text_that_utf8_does_not_know_stops_nothing() -> None:
    """Lone surrogates in a key, an id or a detail are written as what they are."""
    key, _, headers = encoded(Prediction("\ud800", AT, {}, 0.5, "M", 1), "\ud800")
    assert key == b"\\ud800"
    assert headers[0] == ("id", b"\\ud800")
    assert ("millrace.detail", b"\\ud800") in encoded(Reject("r", "\ud800", "a/0:1", "x"))[2]


def letter(record: Reject, job: str = "job", number: int = 1) -> Message:
    """A dead letter as consumers get it, with the number that the writer gives it."""
    key, value, headers = encoded(record)
    return Message(value, key, (*headers, ("millrace", f"{job}/tag/{number}".encode())))


texts = st.text(max_size=20)
headers = st.tuples(
    st.one_of(texts, st.sampled_from(["millrace", "millrace.reason", "millrace.place", "millrace.timestamp"])),
    st.binary(max_size=20),
)
messages = st.builds(
    Message,
    st.none() | st.binary(max_size=50),
    st.none() | st.binary(max_size=20),
    st.lists(headers, max_size=6).map(tuple),
    st.integers(-1, 2**63 - 1),
)


@given(message=messages)
def test_a_record_survives_being_rejected(message: Message) -> None:
    """Null or empty, UTF-8 or not: a reject gives the record back, also after it was a line of JSON."""
    import msgspec

    record = reject("invalid", "a detail", "payments/0:17", message)
    assert record.message() == message
    kept = msgspec.json.decode(encode(record), type=Reject)
    assert kept == record
    assert kept.message() == message


@given(message=st.builds(Message, headers=st.just((("trace", None), ("empty", b""))), value=st.binary(max_size=9)))
def test_a_null_in_a_header_survives(message: Message) -> None:
    """As a reject; a dead letter has it empty, since the client can send none."""
    record = reject("invalid", "a detail", "payments/0:17", message)
    assert record.message() == message
    read = decode_reject(letter(record), "job")
    assert read is not None
    assert read.message().headers == (("trace", b""), ("empty", b""))


@given(message=messages, reason=texts, detail=st.text(st.characters(), max_size=20), place=texts)
def test_a_reject_survives_as_a_dead_letter(message: Message, reason: str, detail: str, place: str) -> None:
    """Whatever its headers are, ours included: read back it is the same reject, with the same record."""
    record = reject(reason, detail, place, message)
    assert decode_reject(letter(record), "job") == record
    assert letter(record).key is not None or letter(record).value is not None


@given(message=messages)
def test_a_dead_letter_may_be_rejected_itself(message: Message) -> None:
    """A job that reads the rejects of another: the headers that stand behind are the newest."""
    first = letter(reject("invalid", "first", "payments/0:17", message), "first", 5)
    record = reject("not_json", "second", "rejects/0:5", first)
    assert decode_reject(letter(record, "second"), "second") == record


@given(original=st.binary(max_size=30))
def test_a_reject_of_a_file_survives_as_a_dead_letter(original: bytes) -> None:
    """Without key, headers and timestamp, as it had none."""
    record = reject("invalid", "a detail", "a.jsonl:17", original)
    assert decode_reject(letter(record), "job") == record


@pytest.mark.parametrize(
    "message",
    [
        Message(b"x" * 1_048_000, b"k", (("trace", b"9"),), 5),
        Message(None, b"k" * 1_048_000, (), 5),
        Message(b"x", b"k", (("trace", b"9" * 1_048_000),), 5),
        Message(b"x" * 500_000, b"k" * 500_000, (("trace", b"9" * 500_000),), 5),
    ],
)
def test_a_dead_letter_is_never_too_large_for_a_topic(message: Message) -> None:
    """Of a large record a part is kept, and that it is one; a topic that refused it would stop the job for good."""
    sent = letter(reject("invalid", "d" * 1_000_000, "payments/0:17", message))
    assert sum(len(text or b"") for text in (sent.value, sent.key, *(value for _, value in sent.headers))) < 950_000
    read = decode_reject(sent, "job")
    assert read is not None
    assert read.cut == sum(len(text or b"") for text in (message.value, message.key)) + sum(
        2 * len(name) + len(value or b"") for name, value in message.headers
    )
    assert read.place == "payments/0:17"
    assert (message.value or b"").startswith(read.original_bytes())


def test_other_records_are_no_dead_letters() -> None:
    """Those of other jobs, those without our headers, and those whose headers are in disorder."""
    mine = letter(reject("invalid", "a", "payments/0:1", Message(b"v")))
    assert decode_reject(mine, "job") is not None
    assert decode_reject(mine, "jo") is None
    assert decode_reject(mine, "tag") is None
    assert decode_reject(Message(b"v"), "job") is None
    assert decode_reject(mine._replace(headers=mine.headers[-1:]), "job") is None
    assert decode_reject(mine._replace(headers=mine.headers[:-1]), "job") is None
    assert decode_reject(mine._replace(headers=(*mine.headers, ("trace", b""))), "job") is None
