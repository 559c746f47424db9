"""The results of public check tools for the Dockerfile, the workflows, the alerts and the SBOM."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

import service
from service.runtime.metrics import Metrics
from tests.deploy.engine import Engine, Image
from tests.deploy.kubernetes import documents

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(400)]


def test_hadolint_finds_nothing_in_the_dockerfile(tool) -> None:
    result = tool("hadolint", "deploy/Dockerfile")

    assert (result.returncode, result.stdout) == (0, "")


def test_yamllint_finds_nothing(tool, root: Path) -> None:
    places = [(root / "deploy", "*.yaml"), (root / "tests" / "deploy", "*.yaml"), (root / ".github", "*.yml")]
    files = sorted(file for folder, pattern in places for file in folder.rglob(pattern))

    result = tool("yamllint", "--strict", "--config-file", root / "tests" / "deploy" / "yamllint.yaml", *files)

    assert len(files) > 15
    assert (result.returncode, result.stdout) == (0, "")


def test_the_workflows_and_the_update_config_meet_their_schemas(tool, root: Path) -> None:
    workflows = sorted((root / ".github" / "workflows").glob("*.yml"))

    checked = tool("check-jsonschema", "--builtin-schema", "vendor.github-workflows", *workflows)
    updates = tool("check-jsonschema", "--builtin-schema", "vendor.dependabot", ".github/dependabot.yml")

    assert checked.returncode == 0, checked.stdout
    assert updates.returncode == 0, updates.stdout


def test_zizmor_finds_no_weakness_in_the_workflows(tool) -> None:
    result = tool("zizmor", "--offline", "--no-progress", ".github")

    assert result.returncode == 0, result.stdout


def test_every_script_of_the_workflows_is_one_that_bash_can_read(root: Path) -> None:
    files = sorted((root / ".github" / "workflows").glob("*.yml"))
    jobs = [job for file in files for job in msgspec.yaml.decode(file.read_bytes())["jobs"].values()]
    scripts = [step["run"] for job in jobs for step in job.get("steps", ()) if "run" in step]

    assert len(scripts) > 15
    for script in scripts:
        read = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
        assert (read.returncode, read.stderr) == (0, ""), script


def test_a_tool_that_is_not_there_is_a_failure_in_ci(root: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-m", "deploy", "tests/deploy/test_manifests.py", "-k", "mistake"]
    without_tools = os.environ | {"PATH": "/nowhere"}

    codes = [
        subprocess.run(command, cwd=root, env=without_tools | {"CI": ci}, capture_output=True, check=False).returncode
        for ci in ("", "true")
    ]

    assert codes == [0, 1]


def test_ci_runs_on_every_python_that_is_supported(root: Path) -> None:
    workflow = msgspec.yaml.decode((root / ".github" / "workflows" / "ci.yml").read_bytes())

    assert workflow["jobs"]["test"]["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13", "3.14"]


def test_the_compose_files_meet_their_schema(tool, root: Path) -> None:
    result = tool(
        "check-jsonschema", "--builtin-schema", "vendor.compose-spec", *(root / "deploy").glob("compose*.yaml")
    )

    assert result.returncode == 0, result.stdout


def test_the_list_of_parts_names_what_is_in_the_image_and_nothing_else(
    engine: Engine, image: Image, root: Path
) -> None:
    inside = "from importlib.metadata import distributions as d; print(*(f'{x.name}=={x.version}' for x in d()))"
    told = engine.output("run", "--rm", "--pull=never", "--entrypoint", "python", image.tag, "-c", inside)

    made = subprocess.run(
        ["make", "sbom", f"IMAGE={image.tag}"], cwd=root, capture_output=True, text=True, check=False, timeout=300
    )

    assert made.returncode == 0, made.stderr
    parts = json.loads((root / "build" / "mayfly.cdx.json").read_bytes())
    assert parts["metadata"]["component"]["name"] == "mayfly"
    named = {f"{part['name']}=={part['version']}" for part in parts["components"]}
    assert named | {f"mayfly=={service.__version__}"} == set(told.split())


def test_the_lock_is_what_pyproject_asks_for_and_nothing_more(root: Path) -> None:
    options = "--quiet --universal --python-version 3.11 --constraint requirements.lock --no-header --no-annotate"

    resolved = _uv(root, "pip", "compile", "pyproject.toml", *options.split())

    locked = re.findall(r"^[a-z0-9].*?(?= \\$)", (root / "requirements.lock").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(resolved.stdout.splitlines()) == sorted(locked), resolved.stderr


@pytest.mark.parametrize("processor", ["x86_64", "aarch64"])
def test_every_package_of_the_lock_has_a_wheel_for_each_processor(root: Path, tmp_path: Path, processor: str) -> None:
    lock = ["--require-hashes", "--requirement", "requirements.lock"]
    platform = ["--python-version", "3.11", "--python-platform", f"{processor}-manylinux_2_36"]

    result = _uv(root, "pip", "install", "--dry-run", "--no-build", "--target", tmp_path, *lock, *platform)

    assert result.returncode == 0, result.stderr


def _uv(root: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [Path(sys.executable).with_name("uv"), *arguments],
        cwd=root,
        env=os.environ | {"UV_SYSTEM_CERTS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def rules(root: Path) -> dict[str, object]:
    """Return the alarms as Prometheus reads them."""
    path = root / "deploy" / "kubernetes" / "components" / "monitoring" / "prometheus-rule.yaml"
    spec: dict[str, object] = documents(path.read_text(encoding="utf-8"))[0]["spec"]
    return spec


def test_the_alerts_fire_when_they_should_and_not_before(tool, root: Path, rules, tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_bytes(msgspec.yaml.encode(rules))
    shutil.copy(root / "tests" / "deploy" / "rules.test.yaml", tmp_path)

    result = tool("promtool", "test", "rules", tmp_path / "rules.test.yaml")

    assert result.returncode == 0, result.stdout + result.stderr


def test_the_alerts_use_metrics_that_exist(rules) -> None:
    metrics = {metric.name for metric in Metrics().registry.collect()}
    watched = set(re.findall(r"\bmayfly_[a-z_]+", msgspec.json.encode(rules).decode()))

    assert {name.removesuffix("_total") for name in watched} <= metrics
    assert "mayfly_oldest_overdue_seconds" in watched
