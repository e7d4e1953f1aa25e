"""A real Apache Kafka for tests: one process in KRaft mode on the loopback interface, no container.

Its jars are fetched by Maven, once, into a cache (`MILLRACE_KAFKA_LIBS`, else `~/.cache/millrace`).
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

POM = Path(__file__).with_name("pom.xml")
GOAL = "org.apache.maven.plugins:maven-dependency-plugin:3.8.1:copy-dependencies"
START_S = 60.0
CLUSTER_ID = "bWlsbHJhY2UtdGVzdHMtMQ"
JAVA = ("-Xms256m", "-Xmx512m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1")

PROPERTIES = """\
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:{controller}
listeners={listeners},CONTROLLER://127.0.0.1:{controller}
advertised.listeners={listeners}
controller.listener.names=CONTROLLER
inter.broker.listener.name=PLAINTEXT
listener.security.protocol.map={protocols}
log.dirs={logs}
num.partitions=1
offsets.topic.num.partitions=1
offsets.topic.replication.factor=1
transaction.state.log.num.partitions=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
group.initial.rebalance.delay.ms=0
log.retention.check.interval.ms=500
log.initial.task.delay.ms=500
{more}
"""


class NoBroker(RuntimeError):
    """This machine cannot run a broker: why."""


def libraries() -> Path:
    """The directory of the broker's jars, fetched if need be. Raises `NoBroker`."""
    if shutil.which("java") is None:
        raise NoBroker("there is no java. Hint: Java 17 and Maven, or KAFKA_BOOTSTRAP=host:port of a broker")
    named = os.environ.get("MILLRACE_KAFKA_LIBS")
    if named is not None:
        return Path(named)
    # Another pom, another directory: nothing stale is ever used.
    version = hashlib.sha256(POM.read_bytes()).hexdigest()[:12]
    cache = Path.home() / ".cache" / "millrace" / f"kafka-{version}"
    cache.parent.mkdir(parents=True, exist_ok=True)
    with (cache.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not cache.exists():
            _fetch(cache)
    return cache


def _fetch(cache: Path) -> None:
    if shutil.which("mvn") is None:
        raise NoBroker(
            "there is no Maven to fetch a broker with. Hint: Maven, or KAFKA_BOOTSTRAP=host:port of a broker"
        )
    partial = cache.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    done = subprocess.run(
        ["mvn", "-q", "-B", "-f", str(POM), GOAL, f"-DoutputDirectory={partial}"],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    if done.returncode:
        raise NoBroker(f"Maven could not fetch a broker: {done.stdout[-500:]}{done.stderr[-500:]}")
    partial.rename(cache)


def free_port() -> int:
    """A port of the loopback interface that nothing listens on now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


class Broker:
    """A broker in a directory of its own. It keeps its ports and data over `kill` and `start`.

    `listeners` adds some by name, as `{"SECURE": "SASL_SSL"}`, each on a port of its own; `properties` are lines for
    its configuration.
    """

    def __init__(
        self, directory: Path, listeners: dict[str, str] | None = None, properties: tuple[str, ...] = ()
    ) -> None:
        self._directory = directory
        self._libraries = libraries()
        self.ports = {name: free_port() for name in ("PLAINTEXT", *(listeners or {}))}
        self.address = f"127.0.0.1:{self.ports['PLAINTEXT']}"
        self._process: subprocess.Popen[bytes] | None = None
        directory.mkdir(parents=True, exist_ok=True)
        protocols = {"CONTROLLER": "PLAINTEXT", "PLAINTEXT": "PLAINTEXT"} | (listeners or {})
        self._file = directory / "server.properties"
        self._file.write_text(
            PROPERTIES.format(
                controller=free_port(),
                listeners=",".join(f"{name}://127.0.0.1:{port}" for name, port in self.ports.items()),
                protocols=",".join(f"{name}:{protocol}" for name, protocol in protocols.items()),
                logs=directory / "logs",
                more="\n".join(properties),
            )
        )
        (directory / "log4j2.properties").write_text(
            "rootLogger.level=warn\nappender.c.type=Console\nappender.c.name=c\nappender.c.target=SYSTEM_ERR\nrootLogger.appenderRef.c.ref=c\n"
        )
        self._format()

    def java(self, main: str, *arguments: str) -> list[str]:
        """The command of a Java program of Kafka's."""
        log = f"-Dlog4j2.configurationFile={self._directory / 'log4j2.properties'}"
        return ["java", *JAVA, log, "-cp", f"{self._libraries}/*", main, *arguments]

    def _format(self) -> None:
        command = self.java("kafka.tools.StorageTool", "format", "-t", CLUSTER_ID, "-c", str(self._file))
        subprocess.run([*command, "--ignore-formatted"], check=True, capture_output=True, timeout=60)

    def start(self) -> Broker:
        """Start, and wait until it answers."""
        with (self._directory / "broker.log").open("ab") as log:
            self._process = subprocess.Popen(self.java("kafka.Kafka", str(self._file)), stdout=log, stderr=log)
        deadline = time.monotonic() + START_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                said = (self._directory / "broker.log").read_text(errors="replace")
                raise NoBroker(f"the broker did not start: {said[-1500:]}")
            time.sleep(0.1)
        return self

    def _answers(self) -> bool:
        """Ready for clients, not only listening."""
        from kafka import KafkaAdminClient
        from kafka.errors import KafkaError

        try:
            with socket.create_connection(("127.0.0.1", self.ports["PLAINTEXT"]), timeout=0.5):
                pass
            admin = KafkaAdminClient(bootstrap_servers=self.address, bootstrap_timeout_ms=2000)
        except (OSError, KafkaError):
            return False
        try:
            return bool(admin.describe_cluster())
        except KafkaError:
            return False
        finally:
            admin.close()

    def kill(self) -> None:
        """kill -9."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """End in order."""
        self._end(signal.SIGTERM)

    def _end(self, number: int) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            try:
                self._process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None


@contextmanager
def running(directory: Path, **options: object) -> Iterator[Broker]:
    """A broker that is stopped at the end."""
    broker = Broker(directory, **options)  # type: ignore[arg-type]
    try:
        yield broker.start()
    finally:
        broker.kill()
