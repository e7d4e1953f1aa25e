"""The files in docker/, as far as they can be checked without a container engine."""

from __future__ import annotations

import fnmatch
import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from packaging.requirements import Requirement
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

from dataflows import Kafka
from dataflows.cli import app
from dataflows.monitor import MEASURES, RunCollector
from dataflows.runtime import load_job
from dataflows.settings import RunDirectory
from examples.payments.produce import PARTITIONS
from tests.conftest import ROOT

DOCKER = ROOT / "docker"
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
DOCKERFILE = (DOCKER / "Dockerfile").read_text()
DASHBOARD = json.loads((DOCKER / "grafana/dashboards/millrace.json").read_text())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

EXACT_TAG = re.compile(r"v?\d+\.\d+\.\d+([.-][\w.-]+)?")


def instructions(name: str) -> list[str]:
    """The arguments of a Dockerfile's instructions of one kind, continued lines joined."""
    joined = DOCKERFILE.replace("\\\n", " ")
    return [line.removeprefix(name).strip() for line in joined.splitlines() if line.startswith(f"{name} ")]


def images() -> list[str]:
    """All images that are named, those that the Dockerfile begins with too."""
    return [*(service["image"] for service in SERVICES.values()), *(line.split()[0] for line in instructions("FROM"))]


def options(service: str) -> dict[str, str]:
    """The options of a service's command with their values."""
    pairs = (part.split("=", 1) for part in SERVICES[service]["command"] if part.startswith("--"))
    return dict(pairs)


# -- Compose and the image


def test_compose_keeps_to_its_schema() -> None:
    """compose.yaml is valid by the published schema of Compose."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    checked = subprocess.run([*command, str(DOCKER / "compose.yaml")], capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize("path", sorted(DOCKER.rglob("*.y*ml")), ids=lambda path: path.name)
def test_yaml_can_be_read(path: Path) -> None:
    """Every YAML file has a mapping at its top."""
    assert isinstance(yaml.safe_load(path.read_text()), dict)


def test_all_ports_are_on_the_loopback_interface() -> None:
    """No service publishes a port to the network, by a port or by the host's network."""
    published = [port for service in SERVICES.values() for port in service.get("ports", ())]
    assert len(published) == 4
    for port in published:
        assert re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port)
    assert not any("network_mode" in service for service in SERVICES.values())


@pytest.mark.parametrize("image", images())
def test_images_have_exact_tags(image: str) -> None:
    """An image is named with all three numbers of its version."""
    _, _, tag = image.partition(":")
    assert EXACT_TAG.fullmatch(tag)


def test_the_image_has_the_version_of_the_project() -> None:
    """The tag that is built, and the one that the Dockerfile tells, is the project's version."""
    built = {service["image"] for service in SERVICES.values() if "build" in service}
    assert built == {f"millrace:{PROJECT['version']}"}
    assert f"--tag millrace:{PROJECT['version']} " in DOCKERFILE


def test_nothing_runs_as_root() -> None:
    """The image ends as a user without rights, and no service takes them back."""
    final = DOCKERFILE.rsplit("\nFROM ", 1)[1]
    users = re.findall(r"^USER (\d+):(\d+)$", final, re.MULTILINE)
    assert len(users) == 1
    assert "0" not in users[0]
    for service in SERVICES.values():
        assert not service.keys() & {"user", "privileged", "cap_add", "pid", "devices"}


def test_the_image_starts_the_command() -> None:
    """What the image runs is an installed command of the project."""
    (entry,) = instructions("ENTRYPOINT")
    assert json.loads(entry) == ["millrace"]
    assert "millrace" in PROJECT["scripts"]


def test_files_that_are_mentioned_exist() -> None:
    """What compose.yaml builds from and mounts, and what the Dockerfile copies from the repository, is there."""
    for service in SERVICES.values():
        if "build" in service:
            context = (DOCKER / service["build"]["context"]).resolve()
            assert context == ROOT
            assert (context / service["build"]["dockerfile"]).is_file()
        for source, *_ in (volume.split(":") for volume in service.get("volumes", ())):
            assert (DOCKER / source).exists() if source.startswith(".") else source in COMPOSE["volumes"]
    for path in copied():
        assert (ROOT / path).exists(), path


def copied() -> list[str]:
    """What the Dockerfile copies from the repository."""
    lines = [line.split() for line in instructions("COPY") if not line.startswith("--from")]
    return [source for line in lines for source in line[:-1]]


def ignored(path: str) -> bool:
    """Whether .dockerignore keeps a path out: the last line that fits it, or a directory above it, decides."""
    above = ["/".join(path.split("/")[: i + 1]) for i in range(path.count("/") + 1)]
    out = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!").removeprefix("**/")
        names = [part for one in above for part in (one, one.rsplit("/", 1)[-1])] if "**/" in line else above
        if line and not line.startswith("#") and any(fnmatch.fnmatch(name, pattern) for name in names):
            out = not line.startswith("!")
    return out


def test_the_engine_is_sent_what_it_copies_and_no_more() -> None:
    """.dockerignore lets through what the Dockerfile copies, and keeps runs, data and history out."""
    for path in [*copied(), "examples/payments/job.py", "dataflows/cli.py"]:
        assert not ignored(path), path
    kept_out = [
        "runs/payments/state/job.json",
        ".git/config",
        "examples/payments/a.jsonl",
        "features/__pycache__/x.pyc",
    ]
    for path in [*kept_out, ".venv/bin/python", "tests/conftest.py"]:
        assert ignored(path), path


# -- versions


def pins(name: str) -> dict[str, str]:
    """The exact versions in a file of docker/, by name."""
    pinned: dict[str, str] = {}
    for line in (DOCKER / name).read_text().splitlines():
        if not line.startswith("#"):
            package, pinned[package] = line.split("==")
    return pinned


def required(requirements: list[str], extras: frozenset[str]) -> list[Requirement]:
    """Those that hold in the image (Python 3.12 on Linux), with these extras asked for."""
    place = {"python_version": "3.12", "python_full_version": "3.12.13", "sys_platform": "linux"}
    parsed = [Requirement(text) for text in requirements]
    asked = sorted({"", *extras})
    return [r for r in parsed if r.marker is None or any(r.marker.evaluate(place | {"extra": e}) for e in asked)]


def test_the_image_pins_all_that_is_needed() -> None:
    """requirements.txt has an exact version, within bounds, of every package that is needed to run, and of no other."""
    pinned = pins("requirements.txt")
    waiting, needed = required(PROJECT["dependencies"], frozenset()), set()
    while waiting:
        requirement = waiting.pop()
        name = requirement.name.lower().replace("_", "-")
        assert requirement.specifier.contains(pinned[name], prereleases=True), requirement
        if name not in needed or requirement.extras:
            needed.add(name)
            waiting += required(distribution(name).requires or [], frozenset(requirement.extras))
    assert needed == set(pinned)


def test_what_builds_the_wheel_is_pinned() -> None:
    """build-constraints.txt has an exact version of the build backend."""
    assert "hatchling" in pins("build-constraints.txt")


# -- commands


def test_the_command_of_the_job_is_one_of_the_command_line() -> None:
    """`millrace run` takes the options of compose.yaml, with these values."""
    name, *arguments = SERVICES["job"]["command"]
    group = typer.main.get_command(app)
    command = group.commands[name]  # type: ignore[attr-defined]
    context = command.make_context(name, arguments)
    assert context.params["workers"] == 2
    assert context.params["metrics_host"] == "0.0.0.0"
    assert context.params["kafka"] == options("payments")["--kafka"]


def test_modules_that_are_started_belong_to_the_image() -> None:
    """The load and the job are of examples/, which the image has."""
    assert SERVICES["payments"]["entrypoint"][:2] == ["python", "-m"]
    assert SERVICES["payments"]["entrypoint"][2].startswith("examples.")
    assert SERVICES["job"]["command"][1].startswith("examples/")
    assert "examples" in copied()


def test_the_job_is_there() -> None:
    """The job that compose.yaml names can be loaded, and reads and writes topics that the load makes."""
    job = load_job(str(ROOT / SERVICES["job"]["command"][1]))
    topics = {job.events, job.label.source, job.outputs.predictions, job.outputs.outcomes, job.outputs.rejects}
    assert {topic.topic for topic in topics if isinstance(topic, Kafka)} == set(PARTITIONS)


def test_the_load_takes_its_options() -> None:
    """The options in compose.yaml are among those that the load lists."""
    command = [sys.executable, *SERVICES["payments"]["entrypoint"][1:], "--help"]
    listed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, cwd=ROOT).stdout
    assert set(options("payments")) <= set(re.findall(r"--[a-z-]+", listed))


def test_brokers_are_named_as_kafka_tells() -> None:
    """Containers use the listener that Kafka tells them of, and people the one that is published."""
    told = dict(part.split("://") for part in SERVICES["kafka"]["environment"]["KAFKA_ADVERTISED_LISTENERS"].split(","))
    bound = dict(part.split("://") for part in SERVICES["kafka"]["environment"]["KAFKA_LISTENERS"].split(","))
    assert options("job")["--kafka"] == options("payments")["--kafka"] == told["NETWORK"]
    assert SERVICES["kafka"]["ports"] == [f"{told['HOST']}{bound['HOST']}"]
    for name, address in told.items():
        assert address.endswith(bound[name])
    assert told["NETWORK"] in SERVICES["kafka"]["healthcheck"]["test"]


# -- Prometheus and Grafana


def test_prometheus_scrapes_the_port_of_the_job() -> None:
    """The target is the service and port of the job, and the job's name stays its label."""
    settings = yaml.safe_load((DOCKER / "prometheus/prometheus.yml").read_text())
    (scrape,) = settings["scrape_configs"]
    assert scrape["static_configs"] == [{"targets": [f"job:{options('job')['--metrics-port']}"]}]
    assert scrape["honor_labels"] is True
    (volume,) = mounted("prometheus")
    assert SERVICES["prometheus"]["command"][0] == f"--config.file={volume.split(':')[1]}"


def mounted(service: str) -> list[str]:
    """The files and directories of docker/ that a service sees."""
    return [volume for volume in SERVICES[service]["volumes"] if volume.startswith(".")]


def test_grafana_finds_its_dashboard_and_its_data() -> None:
    """Paths inside the container are mounted, and every panel asks the data source that is provided."""
    inside = {target: DOCKER / source for source, target, _ in (volume.split(":") for volume in mounted("grafana"))}
    (provider,) = yaml.safe_load((DOCKER / "grafana/provisioning/dashboards/millrace.yaml").read_text())["providers"]
    home = Path(SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert (inside[provider["options"]["path"]] / home.name).is_file()
    assert provider["options"]["path"] == str(home.parent)
    sources = yaml.safe_load((DOCKER / "grafana/provisioning/datasources/prometheus.yaml").read_text())
    (source,) = sources["datasources"]
    assert source["url"].split(":")[1] == "//prometheus"
    for panel in DASHBOARD["panels"]:
        assert {panel["datasource"]["uid"], *(t["datasource"]["uid"] for t in panel["targets"])} == {source["uid"]}


def exported(families: list[Metric]) -> set[str]:
    """The names of samples that families have."""
    names: set[str] = set()
    for family in families:
        if isinstance(family, HistogramMetricFamily):
            names |= {f"{family.name}_{part}" for part in ("bucket", "sum", "count")}
        else:
            names.add(f"{family.name}_total" if isinstance(family, CounterMetricFamily) else family.name)
    return names


def expressions() -> list[str]:
    """All that the dashboard asks Prometheus."""
    variables = [variable["query"]["query"] for variable in DASHBOARD["templating"]["list"]]
    return [*variables, *(target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"])]


def test_the_dashboard_asks_for_measures_that_there_are(tmp_path: Path) -> None:
    """Every metric in the dashboard's expressions is one that the collector exports; none is without one."""
    names = exported(list(RunCollector(RunDirectory(tmp_path), "any").describe()))
    for expression in expressions():
        asked = set(re.findall(r"\bmillrace_\w+", expression))
        assert asked, expression
        assert asked <= names, expression


def test_the_dashboard_uses_labels_that_there_are() -> None:
    """Labels that panels group by or show are labels of the measure they ask for."""
    labels = {measure.name: {"job", "le", *measure.labels} for measure in MEASURES}
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            (asked,) = re.findall(r"\bmillrace_\w+", target["expr"])
            measure = re.sub(r"_(total|bucket)$", "", asked)
            used = re.findall(r" by \((\w+)\)", target["expr"]) + re.findall(r"{{(\w+)}}", target["legendFormat"])
            assert set(used) <= labels[measure], target
            assert target["expr"].count("(") == target["expr"].count(")")


def test_panels_do_not_overlap() -> None:
    """Each panel has an id and a place of its own."""
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len({(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}) == len(panels)
