"""The house as the design draws it: imports point down only, and nothing stands where it does not belong."""

import ast
import fnmatch
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("service", "workers")

# A package stands for all its modules. What is new must be put into its layer here.
LAYERS = {
    "core": ("service.lifecycle", "service.retention", "service.signature", "service.generation"),
    "edge": (
        "service",
        "service.settings",
        "service.values",
        "service.resources",
        "service.ledger",
        "service.queue",
        "service.enqueue",
        "service.sync_api",
        "service.sync_connections",
        "service.telemetry",
        "service.embedded",
        "service.enqueue",
        "service.grouping",
        "service.budget",
        "service.serving",
        "service.tasks",
        "workers.heartbeat",
    ),
    "flow": (
        "service.webhook",
        "service.webhook_route",
        "service.records_api",
        "service.operator_api",
        "service.health",
        "service.problems",
        "workers.attempt",
        "service.security_headers",
        "workers.cleanup",
        "workers.overdue",
    ),
    "root": ("service.app", "service.cli", "service.commands", "service.demo", "workers.main"),
    "stand-in": ("service.simulator",),
    "none": ("workers",),
}
MAY_IMPORT = {
    "core": {"core"},
    "edge": {"core", "edge"},
    "flow": {"core", "edge", "flow"},
    "root": {"core", "edge", "flow", "root", "stand-in"},
    "stand-in": {"stand-in"},
    "none": set(),
    "unplaced": set(),
}
# What the stand-in for the Sync API shares with Mayfly: only how webhooks are signed.
SIGNING = "service.signature"
STARTS_WORKERS = ("service.cli", "service.commands", "service.demo")

TOP_LEVEL = {
    *("pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "Makefile"),
    *("requirements.lock", "requirements-dev.lock"),
    *("service", "workers", "tests", "deploy"),
}


def _modules() -> dict[str, ast.Module]:
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


MODULES = _modules()


def _imports(tree: ast.Module) -> Iterator[str]:
    """Yield the module of each import; for ``from package import module`` the module itself where it is ours."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES else str(node.module)


def _is_within(module: str, package: str) -> bool:
    # The packages themselves hold next to nothing and are named alone.
    return module == package or (package not in PACKAGES and module.startswith(f"{package}."))


def _layer(module: str) -> str:
    layers = [layer for layer, members in LAYERS.items() if any(_is_within(module, member) for member in members)]
    return layers[0] if layers else "unplaced"


def _ours(tree: ast.Module) -> list[str]:
    return [name for name in _imports(tree) if name.partition(".")[0] in PACKAGES]


def test_each_module_has_its_layer():
    assert [module for module in MODULES if _layer(module) == "unplaced"] == [], "put it into LAYERS"


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down_only(module):
    layer = _layer(module)
    wrong = [name for name in _ours(MODULES[module]) if _layer(name) not in MAY_IMPORT[layer]]
    if layer == "stand-in":
        wrong = [name for name in wrong if name != SIGNING]

    assert wrong == [], f"{module} ({layer}) may import {sorted(MAY_IMPORT[layer])} only"


@pytest.mark.parametrize("module", [name for name in MODULES if _layer(name) == "core"])
def test_the_core_knows_the_standard_library_msgspec_and_itself(module):
    strangers = {name.partition(".")[0] for name in _imports(MODULES[module])} - sys.stdlib_module_names

    assert strangers <= {"msgspec", "service"}


@pytest.mark.parametrize("module", [name for name in MODULES if _layer(name) == "core"])
def test_the_core_reads_no_clock_no_environment_and_no_chance(module):
    imported = set(_imports(MODULES[module]))
    called = {ast.unparse(node.func) for node in ast.walk(MODULES[module]) if isinstance(node, ast.Call)}

    assert not imported & {"os", "random", "secrets", "time", "asyncio", "socket"}
    assert not called & {"datetime.now", "date.today", "open"}


def test_the_web_side_starts_no_worker():
    importers = {
        module
        for module, tree in MODULES.items()
        if module.startswith("service") and any(name.partition(".")[0] == "workers" for name in _ours(tree))
    }

    assert all(any(_is_within(module, starter) for starter in STARTS_WORKERS) for module in importers), importers


def test_the_stand_in_for_the_sync_api_is_met_by_the_commands_that_say_so_alone():
    importers = {module for module, tree in MODULES.items() if any("simulator" in name for name in _ours(tree))}
    importers = {module for module in importers if _layer(module) != "stand-in"}

    assert {module for module in importers if not _is_within(module, "service.demo")} == {"service.commands.trying"}


@pytest.mark.parametrize("module", MODULES)
def test_nothing_is_pickled(module):
    assert not {name.partition(".")[0] for name in _imports(MODULES[module])} & {"pickle", "marshal", "shelve", "dill"}


@pytest.mark.parametrize("module", MODULES)
def test_no_instant_is_without_its_zone(module):
    naive = [
        ast.unparse(node)
        for node in ast.walk(MODULES[module])
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and (
            node.func.attr in ("utcnow", "utcfromtimestamp", "today")
            or (node.func.attr == "now" and ast.unparse(node.func.value) == "datetime" and not node.args)
        )
    ]

    assert naive == []


def test_the_top_level_holds_what_the_design_says():
    ignored = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text(encoding="utf-8").split()]
    visible = {
        path.name
        for path in ROOT.iterdir()
        if not path.name.startswith(".") and not any(fnmatch.fnmatch(path.name, pattern) for pattern in ignored)
    }

    assert visible == TOP_LEVEL


def test_the_web_side_does_without_what_the_image_leaves_out():
    # The image uninstalls both: 20 MB that only make examples for OpenAPI, of which we ask for none.
    script = (
        "import sys; from service.app import make_app; from service.settings import read_settings; "
        "from service.telemetry import Metrics; "
        "app = make_app(read_settings({}), None, None, Metrics()); app.openapi_schema.to_schema(); "
        "sys.exit(bool({'polyfactory', 'faker'} & sys.modules.keys()))"
    )

    assert subprocess.run([sys.executable, "-c", script], check=False, timeout=60).returncode == 0
