"""Checks of the deployment's files that need no tool."""

import fnmatch
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest

from service.config.settings import OPTIONS
from tests.support.readme import rows
from workers.runner import STOP_SECONDS


def _dockerfile(root: Path) -> str:
    return (root / "deploy" / "Dockerfile").read_text(encoding="utf-8")


def _lines(path: Path) -> list[str]:
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def test_the_example_environment_asks_for_two_secrets_and_deletes_nothing(root: Path) -> None:
    lines = _lines(root / "deploy" / ".env.example")

    assert lines == ["SYNC_API_KEY=", "SYNC_WEBHOOK_SECRET=", "MAYFLY_DRY_RUN=true"]


@pytest.mark.parametrize(("file", "service"), [("compose.yaml", "worker"), ("compose.single.yaml", "mayfly")])
def test_compose_hands_the_dry_run_to_what_deletes(root: Path, file: str, service: str) -> None:
    found = _services(root, file)[service]

    assert found["env_file"] == [".env"]
    assert "MAYFLY_DRY_RUN" not in found["environment"]


def _image_names(text: str) -> set[str]:
    """Return what stands where a manifest, a compose file, a Dockerfile or a command names an image."""
    marks = (
        r"^\s*(?:- )?image: *[\"']?(\S+?)[\"']?$",
        r"newName: *([^\s,}]+)",
        r"^(?:FROM|ARG \w+_IMAGE=) *(\S+)",
        r"(?:--tag|-t) +([a-z][\w./:-]+)",
        r"(?:podman|docker) (?:pull|push) +(\S+)",
    )
    return {name for mark in marks for name in re.findall(mark, text, re.MULTILINE)}


def test_no_file_names_an_image_that_nobody_can_have(root: Path) -> None:
    folders = [root / "deploy", root / ".github"]
    kinds = {".yaml", ".yml", ".md", ""}
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file() and path.suffix in kinds]
    named = {name for path in [root / "README.md", *files] for name in _image_names(path.read_text(encoding="utf-8"))}
    # What is built here has no registry before its name; a registry of one's own is an example that cannot exist.
    ours = re.compile(
        r"(registry\.example\.com/)?mayfly(:[\w.-]+)?|\$\{\{.*|\$\{IMAGE:-mayfly:local\}|\$\{PYTHON_IMAGE\}"
    )
    official = re.compile(r"(python|postgres|redis):[\w.-]+")

    strangers = {name for name in named if not ours.fullmatch(name) and not official.fullmatch(name)}

    assert {"mayfly", "postgres:16", "redis:7-alpine", "registry.example.com/mayfly"} <= named
    assert strangers == set()


def test_the_image_has_the_lowest_python_that_the_package_supports(root: Path) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    base = re.search(r"^ARG PYTHON_IMAGE=python:([\d.]+)-", _dockerfile(root), re.MULTILINE)

    assert base is not None
    assert project["requires-python"] == f">={base[1]}"


def test_the_dockerfile_builds_with_old_builders(root: Path) -> None:
    text = _dockerfile(root)

    assert "<<" not in text, "heredocs need a builder newer than Debian 12's"
    assert not re.search(r"^#\s*syntax=", text, re.MULTILINE), "a syntax line fetches another image"


def test_the_image_sets_only_known_variables(root: Path) -> None:
    text = _dockerfile(root)

    named = set(re.findall(r"\b(?:MAYFLY|SYNC)_[A-Z_]+\b", text))

    assert named <= {option.name for option in OPTIONS.values()}


def test_the_build_context_holds_what_is_copied_and_nothing_that_is_secret(root: Path) -> None:
    patterns = _lines(root / ".dockerignore")
    allowed = {pattern[1:] for pattern in patterns if pattern.startswith("!")}
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", _dockerfile(root), re.MULTILINE)

    assert patterns[0] == "*"
    assert {name for line in copied for name in line.split()} == allowed
    for secret in (".env", "deploy/.env", ".git"):
        assert not any(fnmatch.fnmatch(secret, pattern) for pattern in allowed)


def test_the_tools_are_hashed_and_their_list_names_no_host(root: Path) -> None:
    lock = (root / "deploy" / "requirements-tools.lock").read_text(encoding="utf-8")
    wanted = _lines(root / "deploy" / "requirements-tools.in")

    pinned = re.findall(r"^[a-z0-9.-]+==\S+.*?(?=^\S|\Z)", lock, re.MULTILINE | re.DOTALL)

    assert "://" not in lock
    assert all("--hash=sha256:" in block for block in pinned)
    assert all(re.search(rf"^{re.escape(line)} ", lock, re.MULTILINE) for line in wanted)


def _services(root: Path, file: str) -> dict[str, Any]:
    found: dict[str, Any] = msgspec.yaml.decode((root / "deploy" / file).read_bytes())["services"]
    return found


@pytest.mark.parametrize(("file", "service"), [("compose.yaml", "worker"), ("compose.single.yaml", "mayfly")])
def test_compose_gives_what_deletes_time_to_finish(root: Path, file: str, service: str) -> None:
    grace = _services(root, file)[service]["stop_grace_period"]

    assert int(grace.removesuffix("s")) >= STOP_SECONDS + 10


def test_compose_asks_api_and_worker_for_their_health_as_the_image_does(root: Path) -> None:
    services = _services(root, "compose.yaml")
    image = (root / "deploy" / "Dockerfile").read_text(encoding="utf-8")

    assert not {"api", "worker"} & {name for name, service in services.items() if "healthcheck" in service}
    assert "GET /health/live" in image.partition("HEALTHCHECK")[2]


def test_the_locks_hold_what_pyproject_asks_for() -> None:
    uv = Path(sys.executable).with_name("uv")
    result = subprocess.run(
        [uv, "pip", "check", "--python", sys.executable], capture_output=True, text=True, check=False
    )

    assert result.returncode == 0, result.stderr


def test_both_locks_name_the_same_versions(root: Path) -> None:
    shipped, development = (
        set(re.findall(r"^[a-z0-9.-]+==[^ \\\n]+", (root / name).read_text(encoding="utf-8"), re.MULTILINE))
        for name in ("requirements.lock", "requirements-dev.lock")
    )

    assert shipped
    assert shipped <= development


def test_the_changelog_begins_with_what_is_to_come_and_goes_back_in_time(root: Path) -> None:
    headings = re.findall(r"^## (.+)$", (root / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    releases = [re.fullmatch(r"\[(\d+)\.(\d+)\.(\d+)\] - \d{4}-\d\d-\d\d", heading) for heading in headings[1:]]
    versions = [tuple(map(int, release.groups())) for release in releases if release is not None]

    assert headings[0] == "[Unreleased]"
    assert len(versions) == len(releases), "a heading is no version with a date"
    assert versions == sorted(versions, reverse=True)


def test_the_systemd_unit_runs_up_with_known_settings_and_time_to_finish(root: Path) -> None:
    lines = _lines(root / "deploy" / "systemd" / "mayfly.service")
    unit = dict(line.split("=", 1) for line in lines if not line.startswith("["))
    settings = dict(item.split("=", 1) for item in unit["Environment"].split())

    assert unit["ExecStart"].endswith("/bin/mayfly up")
    assert int(unit["TimeoutStopSec"]) >= STOP_SECONDS + 10
    assert settings.keys() <= {option.name for option in OPTIONS.values()}
    assert settings["MAYFLY_DATA_DIR"] == f"/var/lib/{unit['StateDirectory']}"


def test_the_operations_page_says_what_to_do_about_each_alert(root: Path) -> None:
    rules = root / "deploy" / "kubernetes" / "components" / "monitoring" / "prometheus-rule.yaml"
    alerts = re.findall(r"- alert: (\w+)", rules.read_text(encoding="utf-8"))

    advice = rows(root / "deploy" / "docs" / "operations.md", "Alerts")

    assert alerts
    assert sorted(advice) == sorted(alerts)
