"""The README tells all of what can be set, called, measured and run, and nothing else."""

import ast
import re
import shlex
import tomllib
from pathlib import Path

import click
import pytest

from service.cli import main
from service.config.settings import OPTIONS, read_settings
from service.core.secret import Secret
from service.jobs import connection
from service.ledger.opening import open_database
from service.runtime.metrics import Metrics
from service.web.app import make_app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")

# A value for each option that differs from its default.
SAMPLES = {
    "SYNC_API_KEY": "sk-sample",
    "SYNC_WEBHOOK_SECRET": "whsec_sample_0123456789",
    "SYNC_BASE_URL": "https://dev-api.sync.so",
    "MAYFLY_TTL": "7d",
    "MAYFLY_MIN_TTL": "90s",
    "MAYFLY_WEBHOOK_TOLERANCE": "10m",
    "MAYFLY_DATABASE_URL": "postgresql://mayfly@db/mayfly",
    "MAYFLY_REDIS_URL": "redis://queue",
    "MAYFLY_DATA_DIR": "/var/lib/mayfly",
    "MAYFLY_HOST": "0.0.0.0",
    "MAYFLY_PORT": "9090",
    "MAYFLY_API_TOKEN": "a-token-of-some-length",
    "MAYFLY_DRY_RUN": "true",
    "MAYFLY_API_RATE": "5/second",
    "MAYFLY_MAX_DELETES_PER_DAY": "1000",
    "MAYFLY_GIVE_UP_AFTER": "2d",
    "MAYFLY_CONCURRENCY": "8",
    "MAYFLY_QUEUE_HORIZON": "24h",
    "MAYFLY_LOG_FORMAT": "json",
}


def _rows(heading: str) -> dict[str, list[str]]:
    """Return the rows of the table under *heading*: the names in backticks of the first cell, with the other cells."""
    _, found, rest = README.partition(f"\n## {heading}\n")
    assert found, f"the README has no part {heading!r}"
    rows: dict[str, list[str]] = {}
    for line in rest.partition("\n## ")[0].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("| `"):
            rows |= dict.fromkeys(re.findall(r"`([^`]+)`", cells[0]), cells[1:])
    return rows


def _commands(group: click.Group, path: str = "mayfly") -> set[str]:
    names = set()
    with click.Context(group) as context:
        for name in group.list_commands(context):
            command = group.get_command(context, name)
            inner = f"{path} {name}"
            names |= _commands(command, inner) if isinstance(command, click.Group) else {inner}
    return names


def test_each_option_is_documented_with_its_default():
    rows = _rows("Settings")

    assert rows.keys() == {option.name for option in OPTIONS.values()}
    for option in OPTIONS.values():
        default = rows[option.name][0]
        assert default == f"`{option.default}`" if option.default is not None else "`" not in default, option.name


def test_secrets_that_may_stand_in_a_file_are_named():
    text = README.partition("\n## Settings\n")[2].partition("\n## ")[0]

    for option in OPTIONS.values():
        assert (f"`{option.name}_FILE`" in text) == option.is_secret, option.name


@pytest.mark.parametrize("field", OPTIONS)
def test_each_option_changes_what_is_read(field):
    option = OPTIONS[field]
    settings = read_settings({option.name: SAMPLES[option.name]})

    assert getattr(settings, field) != getattr(read_settings({}), field)


@pytest.mark.parametrize("field", OPTIONS)
def test_each_setting_is_used(field):
    through = {"ttl": "policy", "min_ttl": "policy", "database_url": "ledger_url"}
    name = through.get(field, field)
    sources = [path for package in ("service", "workers") for path in (ROOT / package).rglob("*.py")]
    users = [
        path.name
        for path in sources
        if path.name != "settings.py"
        and any(
            isinstance(node, ast.Attribute) and node.attr == name and ast.unparse(node.value).endswith("settings")
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        )
    ]

    assert users, f"{OPTIONS[field].name} is read, but nothing asks for it"


async def test_each_route_is_documented(tmp_path, settings):
    async with open_database(settings().ledger_url) as database:
        pool = connection.connect(Secret(f"unix://{tmp_path}/none.sock"), retries=0)
        app = make_app(settings(), database, pool, Metrics())
        routes = {
            f"{method.upper()} {path if path == '/' else path.rstrip('/')}"
            for path, item in (app.openapi_schema.paths or {}).items()
            for method in ("get", "post", "put", "patch", "delete")
            if getattr(item, method) is not None
        }
        await pool.aclose(close_connection_pool=True)

    assert {re.sub(r"\?.*", "", route) for route in _rows("Routes")} == routes | {"GET /schema"}


def test_each_metric_is_documented_with_its_labels():
    metrics = Metrics()
    documented = {name: set(re.findall(r"`([^`]+)`", cells[0])) for name, cells in _rows("Metrics").items()}
    collectors = [value for value in vars(metrics).values() if hasattr(value, "_labelnames")]

    assert documented == {
        next(iter(one.describe())).name + ("_total" if one._type == "counter" else ""): set(one._labelnames)
        for one in collectors
    }


def test_each_command_is_documented():
    assert {re.sub(r" [A-Z].*", "", row) for row in _rows("Commands")} == _commands(main)


def test_what_the_code_blocks_run_is_there():
    blocks = re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    made = {words[1] for words in lines if words[:1] == ["make"]}
    run = [words for words in lines if words[:1] == ["mayfly"]]

    assert {"demo", "test", "up", "check"} <= made <= targets
    assert run
    for words in run:
        context = main.make_context("mayfly", list(words[1:]), resilient_parsing=True)
        assert main.resolve_command(context, words[1:])[1] is not None


def test_the_first_commands_are_the_ones_that_set_themselves_up():
    first = re.search(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)

    assert first is not None
    assert re.findall(r"^make (\S+)", first[1], re.MULTILINE) == ["demo", "test", "up", "check"]


def test_the_files_that_the_readme_names_are_there():
    links = re.findall(r"\]\(([^)#:]+)\)", README)

    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_changelog_says_why_each_dependency_is_there():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = {re.split(r"[\[<>=; ]", line, maxsplit=1)[0] for line in project["dependencies"]}
    part = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").partition("### Dependencies")[2]

    explained = set(re.findall(r"\*\*([^*]+)\*\*", part.lower()))
    aliases = {"sqlalchemy": "sqlalchemy core", "redis": "redis-py"}
    assert {aliases.get(name, name) for name in names} <= explained
