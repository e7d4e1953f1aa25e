"""Brokers that want to know who we are, and to be known: with each way a job runs, and no secret is ever shown."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
import trustme
from cryptography.hazmat.primitives import serialization
from kafka import KafkaAdminClient
from kafka.admin import UserScramCredentialUpsertion

from tests.integration import jobs
from tests.integration.broker import Broker, NoBroker, running
from tests.integration.topics import Topics
from tests.scenarios.running import ROOT, environment

JOB = "tests.integration.jobs:on_kafka"
SECRET = f"recognisable-{uuid4().hex}"
WRONG = f"mistaken-{uuid4().hex}"
LISTENERS = {"PLAIN": "SASL_PLAINTEXT", "SCRAM": "SASL_PLAINTEXT", "SECURE": "SASL_SSL", "MUTUAL": "SSL"}
BOUND_S = 45.0
"""Within this many seconds what is wrong is said; the patience of these jobs is far less."""


class Secured:
    """A broker with listeners of each kind, and what a client needs for them."""

    def __init__(self, broker: Broker, directory: Path) -> None:
        self.broker = broker
        self.topics = Topics(broker.address, broker)
        self.directory = directory

    def named(self, listener: str, host: str = "127.0.0.1", **variables: str) -> dict[str, str]:
        """The environment of a client of a listener."""
        named = {"BROKERS": f"{host}:{self.broker.ports[listener]}", "PROTOCOL": LISTENERS[listener]} | variables
        return {f"MILLRACE_KAFKA_{name}": value for name, value in named.items()}

    def file(self, name: str) -> str:
        """The path of a certificate or key."""
        return str(self.directory / name)


def key_bytes(key: trustme.Blob, password: str | None = None) -> bytes:
    """A key as Kafka and OpenSSL both read it."""
    loaded = serialization.load_pem_private_key(key.bytes(), None)
    hidden: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if password is not None:
        hidden = serialization.BestAvailableEncryption(password.encode())
    return loaded.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, hidden)


def write_certificates(directory: Path) -> None:
    """A CA with a certificate for the broker and one for the client, and a CA that signs nothing."""
    ca, other = trustme.CA(), trustme.CA()
    ca.cert_pem.write_to_path(directory / "ca.pem")
    other.cert_pem.write_to_path(directory / "other.pem")
    server, client, foreign = ca.issue_cert("127.0.0.1"), ca.issue_cert("millrace"), other.issue_cert("millrace")
    chain = b"".join(blob.bytes() for blob in server.cert_chain_pems)
    (directory / "server.pem").write_bytes(key_bytes(server.private_key_pem) + chain)
    for name, issued in (("client", client), ("foreign", foreign)):
        (directory / f"{name}.pem").write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        (directory / f"{name}.key").write_bytes(key_bytes(issued.private_key_pem, SECRET))


def properties(directory: Path) -> tuple[str, ...]:
    """What the broker is to ask for on each listener."""
    plain = "org.apache.kafka.common.security.plain.PlainLoginModule required"
    scram = "org.apache.kafka.common.security.scram.ScramLoginModule required;"
    return (
        "listener.name.plain.sasl.enabled.mechanisms=PLAIN",
        f'listener.name.plain.plain.sasl.jaas.config={plain} user_millrace="{SECRET}";',
        "listener.name.scram.sasl.enabled.mechanisms=SCRAM-SHA-256,SCRAM-SHA-512",
        f"listener.name.scram.scram-sha-256.sasl.jaas.config={scram}",
        f"listener.name.scram.scram-sha-512.sasl.jaas.config={scram}",
        "listener.name.secure.sasl.enabled.mechanisms=SCRAM-SHA-512",
        f"listener.name.secure.scram-sha-512.sasl.jaas.config={scram}",
        "listener.name.mutual.ssl.client.auth=required",
        "ssl.keystore.type=PEM",
        f"ssl.keystore.location={directory / 'server.pem'}",
        "ssl.truststore.type=PEM",
        f"ssl.truststore.location={directory / 'ca.pem'}",
    )


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    """The broker, and the user `millrace`."""
    directory = tmp_path_factory.mktemp("certificates")
    write_certificates(directory)
    try:
        broker = running(tmp_path_factory.mktemp("kafka"), listeners=LISTENERS, properties=properties(directory))
        with broker as started:
            admin = KafkaAdminClient(bootstrap_servers=started.address)
            for mechanism in ("SCRAM-SHA-256", "SCRAM-SHA-512"):
                admin.alter_user_scram_credentials([UserScramCredentialUpsertion("millrace", mechanism, SECRET)])
            admin.close()
            yield Secured(started, directory)
    except NoBroker as error:
        if os.environ.get("KAFKA_REQUIRED") == "1":
            pytest.fail(f"KAFKA_REQUIRED=1, but {error}")
        pytest.skip(str(error))


class Stage:
    """Topics of one test, filled over the open listener, and the job between them."""

    def __init__(self, secured: Secured, directory: Path) -> None:
        self.secured = secured
        self.out = directory / "run"
        self.job = JOB
        topics = secured.topics
        self.payments, self.chargebacks, self.scores, self.outcomes, self.rejects = (
            topics.make(of) for of in ("payments", "chargebacks", "scores", "outcomes", "rejects")
        )
        self.rows = jobs.payments(50)
        topics.fill(self.payments, self.rows, key="card")
        topics.fill(self.payments, [b"rubbish"])
        topics.fill(self.chargebacks, jobs.chargebacks(self.rows), key="id")
        self.said: list[str] = []

    def millrace(self, *words: str, **variables: str) -> int:
        """A command of `millrace` in a process of its own, without a terminal; its exit code."""
        topics = (self.payments, self.chargebacks, self.scores, self.outcomes, self.rejects)
        named = {"TOPICS": ",".join(topics), "PATIENCE": "8"} | variables
        command = [sys.executable, "-m", "dataflows", words[0], self.job, "--directory", str(self.out), *words[1:]]
        done = subprocess.run(
            command, env=environment(**named), text=True, capture_output=True, cwd=ROOT, timeout=120, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        self.said += [done.stdout, done.stderr]
        return done.returncode

    def assert_works(self, mode: str = "immediate", **variables: str) -> None:
        """Reads and writes through a listener, looks, and tells nobody the password."""
        assert self.millrace("run", "--until", "end", "--checkpoint", "0.2", MODE=mode, **variables) == 0, self.said
        scored = self.secured.topics.values(self.scores)
        assert [row["id"] for row in scored] == [row["id"] for row in self.rows]
        assert self.millrace("check", **variables) == 0, self.said
        assert self.millrace("rejects", **variables) == 0, self.said
        assert "rubbish" in self.said[-2]
        # What is looked through below does hold what the runs knew.
        assert any(self.payments.encode() in path.read_bytes() for path in self.out.rglob("*") if path.is_file())
        self.assert_silent(variables)

    def assert_silent(self, variables: dict[str, str]) -> None:
        """No password of these variables is in what was printed, nor in any file that the runs left."""
        secrets = [variables[name] for name in variables if name.endswith("PASSWORD") and variables[name]]
        assert secrets
        files = [path for path in self.out.rglob("*") if path.is_file()]
        for secret in secrets:
            assert not [text for text in self.said if secret in text]
            assert not [path for path in files if secret.encode() in path.read_bytes()]

    def assert_refused(self, *words: str, **variables: str) -> None:
        """Ends with exit code 1 within a bounded time, with an error that holds these words and no password."""
        began = time.monotonic()
        assert self.millrace("run", "--until", "end", **variables) == 1, self.said
        assert time.monotonic() - began < BOUND_S
        assert "Traceback" not in self.said[-1]
        for word in words:
            assert word in self.said[-1]
        self.assert_silent({"PASSWORD": SECRET} | variables)


@pytest.fixture
def stage(secured: Secured, tmp_path: Path) -> Stage:
    """Fifty payments, and one that is none."""
    return Stage(secured, tmp_path)


@pytest.mark.parametrize(
    ("listener", "mechanism"),
    [("PLAIN", "PLAIN"), ("SCRAM", "SCRAM-SHA-256"), ("SCRAM", "SCRAM-SHA-512")],
)
def test_a_job_runs_with_a_password(stage: Stage, listener: str, mechanism: str) -> None:
    """With each mechanism it reads and writes, and the password is nowhere to be found."""
    named = stage.secured.named(listener, MECHANISM=mechanism, USERNAME="millrace", PASSWORD=SECRET)
    stage.assert_works(**named)


def test_a_job_runs_with_a_password_and_tls(stage: Stage) -> None:
    """SASL_SSL with a CA of one's own, in transactions."""
    named = stage.secured.named(
        "SECURE", MECHANISM="SCRAM-SHA-512", USERNAME="millrace", PASSWORD=SECRET, CA=stage.secured.file("ca.pem")
    )
    stage.assert_works("transactional", **named)


def test_a_job_runs_with_a_certificate(stage: Stage) -> None:
    """SSL in both directions, with a key that has a password."""
    stage.assert_works(**mutual(stage.secured))


DECLARED = """
import os
from dataflows import Kafka, Outputs, Security
from tests.integration import jobs

who = dict(username="millrace", password=os.environ["OWN_PASSWORD"])
how = dict(timeout=8, security=Security(protocol="SASL_PLAINTEXT", mechanism="PLAIN", **who))
payments, chargebacks, scores, outcomes, rejects = os.environ["TOPICS"].split(",")
job = jobs._job(
    Kafka(payments, jobs.Payment, **how),
    Kafka(chargebacks, jobs.Chargeback, **how),
    Outputs(predictions=Kafka(scores, **how), outcomes=Kafka(outcomes, **how), rejects=Kafka(rejects, **how)),
)
"""


def test_a_password_that_a_job_declares_is_not_kept(stage: Stage, tmp_path: Path) -> None:
    """Nothing of what a run keeps of its declaration holds it, and what is wrong with it is said without it."""
    (tmp_path / "declared.py").write_text(DECLARED)
    stage.job = str(tmp_path / "declared.py")
    brokers = stage.secured.named("PLAIN")["MILLRACE_KAFKA_BROKERS"]
    stage.assert_works(MILLRACE_KAFKA_BROKERS=brokers, OWN_PASSWORD=SECRET)
    (tmp_path / "declared.py").write_text(DECLARED.replace("SASL_PLAINTEXT", "SSL"))
    stage.assert_refused("knows no mechanism", MILLRACE_KAFKA_BROKERS=brokers, OWN_PASSWORD=SECRET)
    (tmp_path / "declared.py").write_text(DECLARED.replace("security=Security(", "security=dict("))
    stage.assert_refused("is no Security", MILLRACE_KAFKA_BROKERS=brokers, OWN_PASSWORD=SECRET)


def mutual(secured: Secured, who: str = "client", **variables: str) -> dict[str, str]:
    """The environment of a client with a certificate."""
    files = {"CA": secured.file("ca.pem"), "CERTIFICATE": secured.file(f"{who}.pem"), "KEY": secured.file(f"{who}.key")}
    return secured.named("MUTUAL", **files | {"KEY_PASSWORD": SECRET} | variables)


@pytest.mark.parametrize(
    ("listener", "mechanism"), [("PLAIN", "PLAIN"), ("SCRAM", "SCRAM-SHA-256"), ("SECURE", "SCRAM-SHA-512")]
)
def test_a_wrong_password_is_said(stage: Stage, listener: str, mechanism: str) -> None:
    """That it is the user or the password, which variables hold them, and not what they hold."""
    named = stage.secured.named(listener, MECHANISM=mechanism, USERNAME="millrace", PASSWORD=WRONG)
    if listener == "SECURE":
        named["MILLRACE_KAFKA_CA"] = stage.secured.file("ca.pem")
    stage.assert_refused("SaslAuthenticationFailedError", "MILLRACE_KAFKA_USERNAME, _PASSWORD", **named)
    if listener == "PLAIN":
        assert stage.millrace("check", **named) == 1
        assert "SaslAuthenticationFailedError" in stage.said[-1]
        stage.assert_silent(named)


def test_an_unknown_ca_is_said(stage: Stage) -> None:
    """A broker whose certificate nobody we trust has signed gets no password."""
    named = stage.secured.named(
        "SECURE", MECHANISM="SCRAM-SHA-512", USERNAME="millrace", PASSWORD=SECRET, CA=stage.secured.file("other.pem")
    )
    stage.assert_refused("certificate verify failed", "MILLRACE_KAFKA_CA", **named)


def test_a_certificate_for_another_host_is_said(stage: Stage) -> None:
    """The address must be one that the certificate names."""
    named = stage.secured.named(
        "SECURE", "localhost", MECHANISM="SCRAM-SHA-512", USERNAME="millrace", PASSWORD=SECRET,
        CA=stage.secured.file("ca.pem"),
    )  # fmt: skip
    stage.assert_refused("not valid for 'localhost'", "an address that the brokers' certificate names", **named)


def test_a_missing_certificate_is_said(stage: Stage) -> None:
    """Where brokers ask for one, and where it is of a CA that they do not know."""
    named = stage.secured.named("MUTUAL", CA=stage.secured.file("ca.pem"))
    stage.assert_refused("MILLRACE_KAFKA_CERTIFICATE and _KEY", **named)
    stage.assert_refused("MILLRACE_KAFKA_CERTIFICATE and _KEY", **mutual(stage.secured, "foreign"))


def test_a_key_that_cannot_be_opened_is_said_at_once(stage: Stage) -> None:
    """Nobody is asked for a password, nothing is tried again, and the one that was given is not shown."""
    stage.assert_refused("client.key cannot be read", "KEY_PASSWORD", **mutual(stage.secured, KEY_PASSWORD=WRONG))
    stage.assert_refused("client.key cannot be read", "KEY_PASSWORD", **mutual(stage.secured, KEY_PASSWORD=""))


def test_the_wrong_protocol_is_said(stage: Stage) -> None:
    """TLS to a listener that speaks none, and the other way round."""
    named = stage.secured.named("MUTUAL", PROTOCOL="PLAINTEXT")
    stage.assert_refused("MILLRACE_KAFKA_PROTOCOL", **named)
    named = stage.secured.named("PLAIN", PROTOCOL="SSL", CA=stage.secured.file("ca.pem"))
    stage.assert_refused("MILLRACE_KAFKA_PROTOCOL", **named)


def test_faults_of_the_variables_hold_no_values(stage: Stage) -> None:
    """A variable that cannot be is named, and a password that stands in the wrong one is not shown."""
    named = stage.secured.named("PLAIN", MECHANISM=SECRET, USERNAME="millrace", PASSWORD=WRONG)
    stage.assert_refused("mechanism", "MILLRACE_KAFKA_…", **named)
    named = stage.secured.named("PLAIN", MECHANISM="PLAIN", PASSWORD=SECRET)
    stage.assert_refused("needs a mechanism, a username and a password", **named)
