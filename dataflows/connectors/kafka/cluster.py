"""The brokers of a topic: how to reach them, how to prove who we are, and what to say when that fails.

kafka-python is imported when the first connection is made, so that jobs without Kafka do not pay for it.
"""

from __future__ import annotations

import logging
import os
import re
import time as wall
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, SecretStr, ValidationError, model_validator

from dataflows.events import describe_faults
from dataflows.job import JobError
from dataflows.order import InputError

if TYPE_CHECKING:
    from ssl import SSLContext

    from kafka import KafkaConsumer, KafkaProducer

BROKERS = "MILLRACE_KAFKA_BROKERS"
"""The environment variable that names the brokers of topics that name none: host:port, several with commas."""

CONNECT_S = 30.0
"""Seconds to wait for the first answer of a broker at the most."""

FETCH_WAIT_MS = 50
"""How long a broker may hold a request for records back. Short, because one that waits for an idle partition keeps
those of the others, which became free meanwhile, from being asked for."""

FETCH_BYTES = 1 << 19
"""Of one partition at a time; a larger record comes alone."""

FAULT_S = 60.0
"""A connection that was lost so many seconds ago may still be why something fails now."""

BATCH_BYTES = 1 << 18
LINGER_MS = 2


class Security(BaseModel):
    """How to prove who we are to the brokers, and they to us.

    Left out in a declaration, all of it is read from the environment: `MILLRACE_KAFKA_PROTOCOL`,
    `MILLRACE_KAFKA_MECHANISM`, `MILLRACE_KAFKA_USERNAME` and so on. Passwords belong there and not into a job file;
    they are never shown. A variable that is empty counts as not set.

    Parameters
    ----------
    protocol
        `PLAINTEXT` (the default), `SSL`, `SASL_PLAINTEXT` or `SASL_SSL`.
    mechanism
        For SASL: `PLAIN` (the password goes over the wire: use it with SASL_SSL), `SCRAM-SHA-256` or `SCRAM-SHA-512`.
    username, password
        For SASL.
    ca
        File of the certificates that sign those of the brokers (PEM). Default: those of the system.
    certificate, key, key_password
        Files of the client's certificate and key (PEM), where brokers ask for one.
    check_hostname
        Whether a broker's certificate must name the host. Leave it on outside of tests.

    >>> Security(protocol="SASL_SSL", mechanism="PLAIN", username="millrace", password="s3cret").password
    SecretStr('**********')
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] | None = None
    username: str | None = None
    password: SecretStr | None = None
    ca: str | None = None
    certificate: str | None = None
    key: str | None = None
    key_password: SecretStr | None = None
    check_hostname: bool = True

    def __init__(self, **named: Any) -> None:
        try:
            super().__init__(**named)
        except ValidationError as error:
            # What pydantic raises holds the values, whatever its text shows.
            raise JobError(f"Security: {describe_faults(error, values=False)}") from None

    @model_validator(mode="after")
    def _fits(self) -> Security:
        sasl, tls = self.protocol.startswith("SASL_"), self.protocol.endswith("SSL")
        if sasl and (self.mechanism is None or not self.username or self.password is None):
            raise ValueError(f"{self.protocol} needs a mechanism, a username and a password")
        if not sasl and (self.mechanism, self.username, self.password) != (None, None, None):
            raise ValueError(f"{self.protocol} knows no mechanism, username or password. Hint: SASL_SSL")
        if not tls and (self.ca, self.certificate, self.key, self.key_password) != (None, None, None, None):
            # Who names certificates believes that nothing goes in the clear.
            raise ValueError(f"{self.protocol} is not encrypted and uses no certificates. Hint: SSL or SASL_SSL")
        if (self.key is not None or self.key_password is not None) and self.certificate is None:
            raise ValueError("a key without a certificate")
        return self

    @classmethod
    def from_environment(cls) -> Security:
        """What the `MILLRACE_KAFKA_…` variables say. Raises `JobError`, never with a value in it."""
        named = {name: os.environ.get(f"MILLRACE_KAFKA_{name.upper()}") for name in cls.model_fields}
        try:
            return cls(**{name: value for name, value in named.items() if value})
        except JobError as error:
            raise JobError(str(error).replace("Security", "the variables MILLRACE_KAFKA_…", 1)) from None

    def options(self) -> dict[str, Any]:
        """As kafka-python takes them."""
        return {
            "security_protocol": self.protocol,
            "sasl_mechanism": self.mechanism,
            "sasl_plain_username": self.username,
            "sasl_plain_password": None if self.password is None else self.password.get_secret_value(),
            "ssl_context": self.context(),
        }

    def context(self) -> SSLContext | None:
        """What TLS needs, from its files. Raises `JobError` where these cannot be read.

        Left to kafka-python, a missing file would be tried again and again until the brokers count as away, and a key
        with a password that nobody gave would ask the terminal for it.
        """
        if not self.protocol.endswith("SSL"):
            return None
        import ssl

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.check_hostname = self.check_hostname
        if self.ca is None:
            context.load_default_certs()
        else:
            try:
                context.load_verify_locations(self.ca)
            except OSError as error:
                raise JobError(f"Kafka: the certificates in ca={self.ca} cannot be read: {_said(error)}") from None
        if self.certificate is not None:
            password = "" if self.key_password is None else self.key_password.get_secret_value()
            try:
                context.load_cert_chain(self.certificate, self.key, lambda: password)
            except OSError as error:
                raise JobError(
                    f"Kafka: certificate={self.certificate} with key={self.key or self.certificate} cannot be read: "
                    f"{_said(error)}. Hint: are they a pair, and is MILLRACE_KAFKA_KEY_PASSWORD right?"
                ) from None
        return context


class Cluster:
    """Connections to the brokers of one topic.

    Parameters
    ----------
    brokers
        As declared; None: what the environment says.
    security
        As declared; None: what the environment says.
    timeout
        Seconds for which a broker may be away.
    """

    def __init__(self, brokers: str | None, security: Security | None, timeout: float) -> None:
        named = brokers or os.environ.get(BROKERS)
        if not named:
            raise JobError(
                f"Kafka: no brokers are named. Hint: --kafka localhost:9092, the variable {BROKERS}, "
                "or brokers= in the job"
            )
        addresses = [each.strip() for each in named.split(",") if each.strip()]
        for address in addresses:
            if not _ADDRESS.fullmatch(address):
                raise JobError(f"Kafka: {address!r} is no address of a broker. Hint: host:port, several with commas")
        self.brokers = named
        _FAULTS.listen()
        self.timeout = timeout
        self._options = {
            "bootstrap_servers": addresses,
            "bootstrap_timeout_ms": round(min(timeout, CONNECT_S) * 1000),
            "metrics_enabled": False,
            "reconnect_backoff_max_ms": 1000,
            **(security or Security.from_environment()).options(),
        }

    def consumer(self, committed: bool = True, group: str | None = None, discover: float = 300.0) -> KafkaConsumer:
        """A consumer without any partition; `committed`: records of transactions only once these are."""
        from kafka import KafkaConsumer

        with self.asking("connect"):
            return KafkaConsumer(
                **self._options,
                group_id=group,
                enable_auto_commit=False,
                auto_offset_reset="none",
                isolation_level="read_committed" if committed else "read_uncommitted",
                allow_auto_create_topics=False,
                fetch_max_wait_ms=FETCH_WAIT_MS,
                max_partition_fetch_bytes=FETCH_BYTES,
                metadata_max_age_ms=round(discover * 1000),
            )

    def producer(self, compression: str | None, transactional: str | None = None) -> KafkaProducer:
        """An idempotent producer; `transactional` is its transactional id."""
        from kafka import KafkaProducer

        patience_ms = round(self.timeout * 1000)
        with self.asking("connect"):
            return KafkaProducer(
                **self._options,
                acks="all",
                enable_idempotence=True,
                compression_type=compression,
                batch_size=BATCH_BYTES,
                linger_ms=LINGER_MS,
                delivery_timeout_ms=patience_ms,
                request_timeout_ms=max(min(patience_ms // 2, 30_000), 1_000),
                max_block_ms=patience_ms,
                transactional_id=transactional,
                transaction_timeout_ms=min(patience_ms, 600_000),
            )

    @contextmanager
    def asking(self, what: str) -> Iterator[None]:
        """Turns what kafka-python raises into an `InputError` that names the brokers and no secret."""
        from kafka.errors import KafkaError

        try:
            yield
        except (KafkaError, OSError) as error:
            away = type(error).__name__ in ("KafkaTimeoutError", "NoBrokersAvailable")
            why = (_FAULTS.recent() if away else None) or _said(error)
            raise InputError(f"Kafka at {self.brokers}: could not {what}: {why}. Hint: {_hint(why)}") from None


_ADDRESS = re.compile(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+(%[A-Za-z0-9._-]+)?\]):[0-9]{1,5}")


def _said(error: BaseException) -> str:
    """An error with its name once; kafka-python often puts it into the text."""
    text, name = str(error), type(error).__name__
    return text if name in text else f"{name}: {text}" if text else name


_HINTS = {
    "SaslAuthenticationFailed": "are MILLRACE_KAFKA_USERNAME, _PASSWORD and _MECHANISM right?",
    "UnsupportedSaslMechanism": "is MILLRACE_KAFKA_MECHANISM one that the brokers have?",
    "Hostname mismatch": "use an address that the brokers' certificate names",
    "IP address mismatch": "use an address that the brokers' certificate names",
    "CERTIFICATE_VERIFY_FAILED": "MILLRACE_KAFKA_CA names the certificates that sign those of the brokers",
    "ALERT": "the brokers want a certificate of a CA they know: MILLRACE_KAFKA_CERTIFICATE and _KEY",
}
"""By what an error says: the first that fits."""


def _known(text: str) -> str | None:
    return next((hint for sign, hint in _HINTS.items() if sign in text), None)


def _hint(text: str) -> str:
    return _known(text) or "are the brokers up, the address and MILLRACE_KAFKA_PROTOCOL right?"


class _Faults(logging.Handler):
    """Why connections were lost lately.

    kafka-python tries again and again, whatever the cause, and raises nothing but that brokers cannot be reached; why
    is in its log alone. A cause that we know what to do about is not pushed out by others.
    """

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self._reason: tuple[float, str] | None = None

    def listen(self) -> None:
        """Begin, once in a process."""
        logging.getLogger("kafka.net.connection").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        args = record.args if isinstance(record.args, tuple) else ()
        error = next((each for each in args if isinstance(each, Exception)), None)
        if error is None or "socket disconnected" in str(error):
            return
        said, before = _said(error), self.recent()
        if before is None or _known(before) is None or _known(said) is not None:
            self._reason = (wall.monotonic(), said)

    def recent(self) -> str | None:
        """The reason, if it is not old."""
        if self._reason is None or wall.monotonic() - self._reason[0] > FAULT_S:
            return None
        return self._reason[1]


_FAULTS = _Faults()
