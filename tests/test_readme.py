"""The README and the reference name all of what can be set, called, measured and run, and nothing else."""

import ast
import re
import shlex
import tomllib

import click
import pytest

from service.cli import main
from service.config.rules_keys import ACCOUNT_KEYS, FORWARD_KEYS
from service.config.settings import OPTIONS, read_settings
from service.core.secret import Secret
from service.jobs import connection
from service.ledger.opening import open_database
from service.runtime.metrics import Metrics
from service.web.app import make_app
from tests.support.readme import PAGES, README, REFERENCE, ROOT, TOUR, anchors, code, part, rows

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
    "MAYFLY_INTAKE_TOKEN": "another-token-of-some-length",
    "MAYFLY_DRY_RUN": "true",
    "MAYFLY_API_RATE": "5/second",
    "MAYFLY_MAX_DELETES_PER_DAY": "1000",
    "MAYFLY_GIVE_UP_AFTER": "2d",
    "MAYFLY_CONCURRENCY": "8",
    "MAYFLY_QUEUE_HORIZON": "24h",
    "MAYFLY_RECORD_TTL": "90d",
    "MAYFLY_LOG_FORMAT": "json",
    "MAYFLY_CONFIG": str(ROOT / "deploy" / "policy.example.toml"),
    "MAYFLY_PUBLIC_URL": "https://mayfly.example.com",
}


def _commands(group: click.Group, path: str = "mayfly") -> set[str]:
    names = set()
    with click.Context(group) as context:
        for name in group.list_commands(context):
            command = group.get_command(context, name)
            inner = f"{path} {name}"
            names |= _commands(command, inner) if isinstance(command, click.Group) else {inner}
    return names


def test_each_option_is_documented_with_its_default():
    documented = rows(README, "Settings")

    assert documented.keys() == {option.name for option in OPTIONS.values()}
    for option in OPTIONS.values():
        default = documented[option.name][0]
        assert default == f"`{option.default}`" if option.default is not None else "`" not in default, option.name


@pytest.mark.parametrize(("heading", "keys"), [("Accounts", ACCOUNT_KEYS), ("Targets", FORWARD_KEYS)])
def test_each_key_of_accounts_and_targets_is_documented(heading, keys):
    assert keys.keys() <= rows(ROOT / "deploy" / "docs" / "policy.md", heading).keys()


# A value for each key of a target that differs from what it is without.
TARGET = {
    "id": '"other"',
    "url": '"https://other.example.com/"',
    "statuses": '"FAILED"',
    "accounts": '"default"',
    "labels": '{ customer = "acme" }',
    "timeout": '"20s"',
    "concurrency": "2",
    "secret_env": '"APP_SECRET"',
    "required": "true",
}


@pytest.mark.parametrize("key", FORWARD_KEYS)
def test_each_key_of_a_target_changes_what_is_read(key, tmp_path):
    def read(changes):
        lines = {"id": '"app"', "url": '"https://app.example.com/"'} | changes
        path = tmp_path / "mayfly.toml"
        path.write_text("[[forward]]\n" + "\n".join(f"{name} = {value}" for name, value in lines.items()))
        secret = "whsec_" + "A" * 43 + "="
        return read_settings({"MAYFLY_CONFIG": str(path), "APP_SECRET": secret}).targets

    assert read({key: TARGET[key]}) != read({})


def test_the_secrets_that_can_be_read_from_files_are_named():
    text = part(README, "Settings")

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
    through |= dict.fromkeys(("api_key", "webhook_secrets", "api_rate"), "accounts")
    through["record_ttl"] = "record_ttls"
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

    assert {re.sub(r"\?.*", "", route) for route in rows(REFERENCE, "Routes")} == routes | {"GET /schema"}


def test_each_metric_is_documented_with_its_labels():
    metrics = Metrics()
    documented = {name: set(re.findall(r"`([^`]+)`", cells[0])) for name, cells in rows(REFERENCE, "Metrics").items()}
    collectors = [value for value in vars(metrics).values() if hasattr(value, "_labelnames")]

    assert documented == {
        next(iter(one.describe())).name + ("_total" if one._type == "counter" else ""): set(one._labelnames)
        for one in collectors
    }


def test_each_command_is_documented():
    assert {re.sub(r" [A-Z].*", "", row) for row in rows(REFERENCE, "Commands")} == _commands(main)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_command_that_a_page_names_is_there(page):
    text = page.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    made = set(re.findall(r"`make ([a-z-]+)", text))
    run = [shlex.split(words) for words in re.findall(r"`(mayfly [a-z][^`…]*)`", text)]
    for line in "".join(code(page, "sh")).splitlines():
        words = shlex.split(line, comments=True)
        made |= set(words[1:2]) if words[:1] == ["make"] else set()
        run += [words] if words[:1] == ["mayfly"] else []

    assert made <= targets
    for words in run:
        group: click.Command | None = main
        rest = words[1:]
        while isinstance(group, click.Group) and rest:
            context = group.make_context("mayfly", list(rest), resilient_parsing=True)
            _, group, rest = group.resolve_command(context, rest)
        assert group is not None, words


def test_the_readme_names_the_commands_that_a_fresh_machine_can_begin_with():
    made = set(re.findall(r"^make (\S+)", "".join(code(README, "sh")), re.MULTILINE))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    needs = dict(re.findall(r"^([a-z-]+): ([a-z- ]+?)(?: ##.*)?$", makefile, re.MULTILINE))

    assert made == {"demo", "up", "test", "check"}
    for target in made:
        needed = needs[target].split()
        while needed != ["setup"]:
            assert needed, f"make {target} does not set itself up"
            needed = needs.get(needed[0], "").split()


def test_the_demo_comes_first():
    assert code(README, "sh")[0] == "make demo\n"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_files_and_headings_that_a_page_links_to_are_there(page):
    links = re.findall(r"\]\(([^):]+)\)", page.read_text(encoding="utf-8"))

    for link in links:
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_tests_that_a_page_names_are_there(page):
    named = re.findall(r"(?<![\w/.])tests/[\w./-]*\w", page.read_text(encoding="utf-8"))

    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize(
    "folder",
    [
        *(f"service/{name}" for name in ("core", "config", "ledger", "sync", "forwarding", "jobs", "web", "runtime")),
        "workers",
    ],
)
def test_the_tour_names_each_module_of_a_folder_and_no_other(folder):
    (cells,) = [cells for name, cells in rows(TOUR, "The folders").items() if name == f"{folder}/"]
    modules = {
        f"{path.name}/" if path.is_dir() else path.stem
        for path in (ROOT / folder).iterdir()
        if not path.name.startswith("__")
    }

    assert set(re.findall(r"`([^`]+)`", cells[0])) == modules


def test_the_files_that_the_tour_names_are_there():
    text = TOUR.read_text(encoding="utf-8")
    named = re.findall(r"`((?:service|workers|tests)/[\w./]+)`", text)

    assert [path for path in named if not (ROOT / path).exists() and "0002" not in path] == []


def test_the_readme_is_short_enough_to_be_read():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 200


def test_the_changelog_says_why_each_dependency_is_there():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = {re.split(r"[\[<>=; ]", line, maxsplit=1)[0] for line in project["dependencies"]}
    part = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").partition("### Dependencies")[2]

    explained = set(re.findall(r"\*\*([^*]+)\*\*", part.lower()))
    aliases = {"sqlalchemy": "sqlalchemy core", "redis": "redis-py"}
    assert {aliases.get(name, name) for name in names} <= explained
