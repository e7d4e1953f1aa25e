"""How a job proves who it is to the brokers, and they to it: SASL and TLS."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, SecretStr, ValidationError, model_validator

from dataflows.connectors.kafka.errors import said
from dataflows.events import describe_faults
from dataflows.job import JobError

if TYPE_CHECKING:
    from ssl import SSLContext


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
                raise JobError(f"Kafka: the certificates in ca={self.ca} cannot be read: {said(error)}") from None
        if self.certificate is not None:
            password = "" if self.key_password is None else self.key_password.get_secret_value()
            try:
                context.load_cert_chain(self.certificate, self.key, lambda: password)
            except OSError as error:
                raise JobError(
                    f"Kafka: certificate={self.certificate} with key={self.key or self.certificate} cannot be read: "
                    f"{said(error)}. Hint: are they a pair, and is MILLRACE_KAFKA_KEY_PASSWORD right?"
                ) from None
        return context
