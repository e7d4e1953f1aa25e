"""What to say when brokers cannot be reached: the cause, which kafka-python only logs, and what to do about it."""

from __future__ import annotations

import logging
import time as wall

RECENT_S = 60.0
"""A connection that was lost so many seconds ago may still be why something fails now."""


def said(error: BaseException) -> str:
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
"""What to do, by a part of what an error says; the first that fits."""


def _known(text: str) -> str | None:
    return next((advice for sign, advice in _HINTS.items() if sign in text), None)


def hint(text: str) -> str:
    """What to do about an error that says this."""
    return _known(text) or "are the brokers up, the address and MILLRACE_KAFKA_PROTOCOL right?"


class ConnectionErrors(logging.Handler):
    """The newest reason why a connection to a broker was lost, taken from kafka-python's log.

    kafka-python reconnects for ever, whatever the cause, and raises only that the brokers cannot be reached: the cause
    is in its log alone. A cause with a hint in `_HINTS` is kept when others without one follow.

    There is one for the process: with two clusters, the cause may be that of the other.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._reason: tuple[float, str] | None = None

    def listen(self) -> None:
        """Begin to listen; further calls change nothing."""
        for name in ("connection", "manager"):  # by which of them a cause is told depends on the moment
            logging.getLogger(f"kafka.net.{name}").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        args = record.args if isinstance(record.args, tuple) else ()
        error = next((each for each in args if isinstance(each, Exception)), None)
        if error is None or "socket disconnected" in str(error):
            return
        reason, before = said(error), self.recent()
        if before is None or _known(before) is None or _known(reason) is not None:
            self._reason = (wall.monotonic(), reason)

    def recent(self) -> str | None:
        """The reason, if it is at most `RECENT_S` old."""
        if self._reason is None or wall.monotonic() - self._reason[0] > RECENT_S:
            return None
        return self._reason[1]


CONNECTION_ERRORS = ConnectionErrors()
