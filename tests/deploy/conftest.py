"""The fixtures of the deployment tests: the check tools, kubectl, a container engine.

``make test-deploy`` runs them. A missing tool skips its tests with one sentence; where ``CI`` is set that is a failure,
because CI has all tools.
"""

import os
import shutil
import subprocess
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

from tests.deploy.engine import Engine, EngineMissingError, Image

ROOT = Path(__file__).parents[2]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests marked ``deploy`` unless ``-m`` names the mark: they take minutes."""
    if "deploy" in config.getoption("markexpr"):
        return
    left_out = [item for item in items if item.get_closest_marker("deploy")]
    items[:] = [item for item in items if not item.get_closest_marker("deploy")]
    config.hook.pytest_deselected(items=left_out)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Let a skipped test fail in CI: a runner without its container engine must not look successful."""
    report = yield
    if report.skipped and os.environ.get("CI") and "deploy" in item.config.getoption("markexpr"):
        report.outcome = "failed"
        report.longrepr = f"skipped, where CI is to have everything: {report.longrepr}"
    return report


@pytest.fixture(scope="session")
def root() -> Path:
    """Return the project's top folder."""
    return ROOT


@pytest.fixture(scope="session")
def tool() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs a check tool of .venv-deploy, or one of the machine, in the top folder."""

    def run(name: str, *arguments: str | Path, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        installed = ROOT / ".venv-deploy" / "bin" / name
        program = str(installed) if installed.exists() else shutil.which(name)
        if program is None:
            pytest.skip(f"{name} is not on this machine")
        return subprocess.run(
            [program, *map(str, arguments)],
            input=stdin,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=110,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def engine() -> Engine:
    """Return podman, if this machine has one that works."""
    try:
        return Engine.find(ROOT)
    except EngineMissingError as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="session")
def image(engine: Engine) -> Image:
    """Build the image from the Dockerfile as it is."""
    try:
        return engine.build()
    except EngineMissingError as missing:
        pytest.skip(str(missing))
