"""Rules beyond the import contracts: the core is pure, commands are light, nothing is pickled, instants are aware."""

import ast
import fnmatch
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("service", "workers")
MAX_LINES = 300
MAX_FUNCTION_LINES = 40

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
CORE = [name for name in MODULES if name.startswith("service.core")]


def _imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield str(node.module)


@pytest.mark.parametrize("module", CORE)
def test_the_core_imports_only_the_standard_library_msgspec_and_itself(module):
    imported = set(_imports(MODULES[module]))
    strangers = {name.partition(".")[0] for name in imported} - sys.stdlib_module_names

    assert strangers <= {"msgspec", "service"}


@pytest.mark.parametrize("module", CORE)
def test_the_core_reads_no_clock_environment_or_random_source(module):
    imported = set(_imports(MODULES[module]))
    called = {ast.unparse(node.func) for node in ast.walk(MODULES[module]) if isinstance(node, ast.Call)}

    assert not imported & {"os", "random", "secrets", "time", "asyncio", "socket"}
    assert not called & {"datetime.now", "date.today", "open"}


@pytest.mark.parametrize("module", MODULES)
def test_no_module_is_longer_than_300_lines_and_no_function_than_40(module):
    functions = [
        node for node in ast.walk(MODULES[module]) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    long = [node.name for node in functions if (node.end_lineno or 0) - node.lineno >= MAX_FUNCTION_LINES]

    assert max((node.end_lineno or 0 for node in MODULES[module].body), default=0) <= MAX_LINES
    assert long == []


@pytest.mark.parametrize("module", MODULES)
def test_nothing_is_pickled(module):
    assert not {name.partition(".")[0] for name in _imports(MODULES[module])} & {"pickle", "marshal", "shelve", "dill"}


@pytest.mark.parametrize("module", MODULES)
def test_no_instant_is_naive(module):
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
        "import sys; from service.web.app import make_app; from service.config.settings import read_settings; "
        "from service.runtime.metrics import Metrics; "
        "app = make_app(read_settings({}), None, None, Metrics()); app.openapi_schema.to_schema(); "
        "sys.exit(bool({'polyfactory', 'faker'} & sys.modules.keys()))"
    )

    assert subprocess.run([sys.executable, "-c", script], check=False, timeout=60).returncode == 0


@pytest.mark.parametrize("arguments", [["records", "list"], ["stats"]], ids=" ".join)
def test_a_command_that_reads_the_ledger_loads_no_web_framework_and_no_queue(tmp_path, arguments):
    script = (
        "import sys; from service.cli import main\n"
        f"try: main({arguments})\nexcept SystemExit: pass\n"
        "sys.exit(' '.join({'litestar', 'arq', 'redis', 'uvicorn', 'httpx'} & sys.modules.keys()) or 0)"
    )
    found = subprocess.run(
        [sys.executable, "-c", script], check=False, timeout=60, cwd=tmp_path, capture_output=True, text=True
    )

    assert "there is no ledger" in found.stderr
    assert found.returncode == 0, found.stderr


def test_make_clean_removes_no_data():
    printed = subprocess.run(["make", "--dry-run", "clean"], cwd=ROOT, capture_output=True, text=True, check=True)

    assert ".venv" in printed.stdout
    assert ".mayfly" not in printed.stdout
