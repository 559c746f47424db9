"""Each variable is read, each invalid one is reported, and no value is repeated."""

from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import URL

from service.config.settings import (
    OPTIONS,
    WORKER_DEFAULTS,
    SettingsError,
    read_settings,
    require_api_key,
    require_webhook_secret,
)
from service.config.unknown_variables import NOT_SUPPORTED
from service.core.rate import Rate
from service.core.retention import Bounds, Policy
from service.core.secret import Secret

SECRET = "whsec_test_0123456789abcdef"
TOKEN = "0123456789abcdef"


def problems_of(**environment):
    with pytest.raises(SettingsError) as refusal:
        read_settings(environment)
    return refusal.value.problems


def test_an_empty_environment_gives_the_documented_defaults():
    settings = read_settings({})

    assert (settings.api_key, settings.redis_url, settings.database_url, settings.api_token) == (None,) * 4
    assert settings.webhook_secrets == ()
    assert settings.base_url == "https://api.sync.so"
    assert settings.policy == Policy(timedelta(hours=24), timedelta(minutes=1))
    assert settings.webhook_tolerance == timedelta(minutes=5)
    assert settings.ledger_url == URL.create("sqlite", database=".mayfly/ledger.db")
    assert (settings.host, settings.port) == ("127.0.0.1", 8080)
    assert not settings.is_dry_run
    assert settings.api_rate == Rate(300, 60)
    assert settings.max_deletes_per_day is None
    assert settings.give_up_after == timedelta(days=7)
    assert settings.queue_horizon == timedelta(hours=48)
    assert settings.log_format is None


def test_a_worker_by_itself_has_a_default_port_of_its_own():
    assert read_settings({}, defaults=WORKER_DEFAULTS).port == 8081
    assert read_settings({"MAYFLY_PORT": ""}, defaults=WORKER_DEFAULTS).port == 8081
    assert read_settings({"MAYFLY_PORT": "0"}, defaults=WORKER_DEFAULTS).port == 0


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("api_key", "sk-1", Secret("sk-1")),
        ("webhook_secrets", SECRET, (Secret(SECRET),)),
        ("webhook_secrets", f"{SECRET}, {SECRET}9", (Secret(SECRET), Secret(SECRET + "9"))),
        ("base_url", "https://proxy.example.com/sync/", "https://proxy.example.com/sync"),
        ("base_url", "http://127.0.0.1:8090", "http://127.0.0.1:8090"),
        ("base_url", "http://simulator:8090", "http://simulator:8090"),
        ("base_url", "http://10.0.0.5:8090", "http://10.0.0.5:8090"),
        ("base_url", "http://[::1]:8090", "http://[::1]:8090"),
        ("ttl", "7d", timedelta(days=7)),
        ("ttl", "forever", None),
        ("min_ttl", "1s", timedelta(seconds=1)),
        ("webhook_tolerance", "10m", timedelta(minutes=10)),
        ("database_url", "sqlite:////var/lib/mayfly/l.db", URL.create("sqlite", database="/var/lib/mayfly/l.db")),
        ("redis_url", "rediss://u:p@r:6380/1", Secret("rediss://u:p@r:6380/1")),
        ("redis_url", "unix:///run/redis.sock", Secret("unix:///run/redis.sock")),
        ("redis_url", "sentinel://a:1,b:2/mymaster/0", Secret("sentinel://a:1,b:2/mymaster/0")),
        ("data_dir", "/var/lib/mayfly", Path("/var/lib/mayfly")),
        ("host", "::", "::"),
        ("port", "0", 0),
        ("port", "65535", 65535),
        ("api_token", TOKEN, Secret(TOKEN)),
        ("is_dry_run", "TRUE", True),
        ("is_dry_run", "1", True),
        ("is_dry_run", "off", False),
        ("api_rate", "10/second", Rate(10, 1)),
        ("api_rate", "3600/hour", Rate(3600, 3600)),
        ("max_deletes_per_day", "0", 0),
        ("max_deletes_per_day", "5000", 5000),
        ("give_up_after", "1m", timedelta(minutes=1)),
        ("concurrency", "1", 1),
        ("queue_horizon", "1h", timedelta(hours=1)),
        ("log_format", "json", "json"),
        ("log_format", "console", "console"),
    ],
)
def test_a_value_of_a_variable_is_read(field, text, value):
    assert getattr(read_settings({OPTIONS[field].name: f" {text} "}), field) == value


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+asyncpg"])
def test_each_form_of_a_postgresql_url_is_accepted(scheme):
    url = read_settings({"MAYFLY_DATABASE_URL": f"{scheme}://u:p@db:5433/mayfly?application_name=m"}).database_url

    assert url is not None
    assert (url.drivername, url.host, url.port, url.password) == ("postgresql", "db", 5433, "p")
    assert url.query == {"application_name": "m"}


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("webhook_secrets", "notprefixed0123456789"),
        ("webhook_secrets", "whsec_short"),
        ("webhook_secrets", f"{SECRET},"),
        ("webhook_secrets", f"{SECRET},0123456789abcdef-unprefixed"),
        ("base_url", "api.sync.so"),
        ("base_url", "ftp://api.sync.so"),
        ("base_url", "http://api.sync.so"),
        ("base_url", "https://user:pass@api.sync.so"),
        ("base_url", "https://api.sync.so?x=1"),
        ("base_url", "https://api.sync.so/#"),
        ("base_url", "https://api.sync.so/v2"),
        ("base_url", "https://api.sync.so/v2/"),
        ("base_url", "https://api.sync.so:port"),
        ("base_url", "https://api.sync.so:99999"),
        ("base_url", "http://[2001:4860::1]:8080"),
        ("api_key", "sk-…1234"),
        ("api_key", "sk-1 234"),
        ("ttl", "24"),
        ("ttl", "0"),
        ("ttl", "0s"),
        ("ttl", "24hours"),
        ("min_ttl", "0s"),
        ("min_ttl", "forever"),
        ("webhook_tolerance", "0s"),
        ("database_url", "mysql://db/verysecret"),
        ("database_url", "sqlite://"),
        ("database_url", "sqlite:///:memory:"),
        ("database_url", "not a verysecret url"),
        ("redis_url", "localhost:6379"),
        ("redis_url", "http://redis:6379"),
        ("redis_url", "redis://:verysecret/abc@127.0.0.1:6379/0"),
        ("redis_url", "redis://localhost:abc"),
        ("redis_url", "redis://[::1"),
        ("redis_url", "redis://redis/one"),
        ("redis_url", "sentinel://a:abc/mymaster/0"),
        ("redis_url", "sentinel://u:verysecret/abc@a/mymaster/0"),
        ("redis_url", "sentinel://a:26379/mymaster/one"),
        ("port", "65536"),
        ("port", "-1"),
        ("port", "٨٠"),
        ("port", "http"),
        ("api_token", "tooshort"),
        ("api_token", "with blanks 0123456789"),
        ("api_token", "mit-ümlaut-0123456789"),
        ("is_dry_run", "maybe"),
        ("is_dry_run", "tru"),
        ("api_rate", "300"),
        ("api_rate", "0/minute"),
        ("api_rate", "300/day"),
        ("api_rate", "-1/minute"),
        ("max_deletes_per_day", "many"),
        ("max_deletes_per_day", "-1"),
        ("give_up_after", "59s"),
        ("concurrency", "0"),
        ("concurrency", "1001"),
        ("queue_horizon", "1s"),
        ("log_format", "yaml"),
    ],
)
def test_an_invalid_value_is_reported_with_what_is_accepted_and_not_repeated(field, text):
    option = OPTIONS[field]
    problems = problems_of(**{option.name: text})

    assert problems == [f"{option.name} is invalid: it accepts {option.accepts}"]


def test_all_problems_are_reported_at_once():
    problems = problems_of(MAYFLY_PORT="x", MAYFLY_TTL="24", MAYFLY_DRYRUN="1")

    assert [problem.split()[0] for problem in problems] == ["MAYFLY_DRYRUN", "MAYFLY_TTL", "MAYFLY_PORT"]


@pytest.mark.parametrize("name", [option.name for option in OPTIONS.values()])
def test_an_empty_value_counts_as_not_set(name):
    assert read_settings({name: " "}) == read_settings({})


@pytest.mark.parametrize("option", [option for option in OPTIONS.values() if option.is_secret])
def test_a_secret_can_be_read_from_a_file(option, tmp_path):
    texts = {
        "SYNC_WEBHOOK_SECRET": SECRET,
        "MAYFLY_DATABASE_URL": "postgresql://u:p@db/mayfly",
        "MAYFLY_REDIS_URL": "redis://:p@redis",
        "MAYFLY_API_TOKEN": TOKEN,
        "MAYFLY_INTAKE_TOKEN": TOKEN,
        "SYNC_API_KEY": "sk-1",
    }
    path = tmp_path / "secret"
    path.write_text(texts[option.name] + "\n")

    assert read_settings({f"{option.name}_FILE": str(path)}) == read_settings({option.name: texts[option.name]})


def test_two_tokens_that_are_equal_are_refused_and_neither_is_shown():
    (problem,) = problems_of(MAYFLY_API_TOKEN=TOKEN, MAYFLY_INTAKE_TOKEN=TOKEN)

    assert problem.startswith("MAYFLY_INTAKE_TOKEN is the same as MAYFLY_API_TOKEN: ")
    assert "choose another one" in problem
    assert TOKEN not in problem
    assert read_settings({"MAYFLY_API_TOKEN": TOKEN, "MAYFLY_INTAKE_TOKEN": f"{TOKEN}x"}).intake_token


def test_a_variable_wins_over_its_file(tmp_path):
    path = tmp_path / "secret"
    path.write_text("sk-file")

    assert read_settings({"SYNC_API_KEY": "sk-1", "SYNC_API_KEY_FILE": str(path)}).api_key == Secret("sk-1")


def test_a_secrets_file_that_cannot_be_read_is_named_with_the_reason(tmp_path):
    (problem,) = problems_of(SYNC_API_KEY_FILE=str(tmp_path / "gone"))

    assert problem == "SYNC_API_KEY_FILE cannot be read: No such file or directory"


def test_a_secrets_file_that_is_not_text_is_reported(tmp_path):
    path = tmp_path / "secret"
    path.write_bytes(b"\xff\xfe")

    assert problems_of(SYNC_API_KEY_FILE=str(path))[0].startswith("SYNC_API_KEY")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("MAYFLY_DRYRUN", "MAYFLY_DRY_RUN"),
        ("MAYFLY_MINTTL", "MAYFLY_MIN_TTL"),
        ("SYNC_APIKEY", "SYNC_API_KEY"),
        ("SYNC_WEBHOOK_SECRETS", "SYNC_WEBHOOK_SECRET"),
        ("MAYFLY_MAX_DELETE_PER_DAY", "MAYFLY_MAX_DELETES_PER_DAY"),
    ],
)
def test_a_typo_in_a_variable_is_reported(name, meant):
    assert problems_of(**{name: "true"}) == [f"{name} is not an option: did you mean {meant}?"]


@pytest.mark.parametrize(
    "name",
    [
        *("MAYFLY_DRY", "MAYFLY_MAX_DELETES", "MAYFLY_DEFAULT_TTL", "MAYFLY_TTL_FILE", "MAYFLY_WEBHOOK_SECRET"),
        *("MAYFLY_TOLERANCE", "MAYFLY_HOOK_URL_OF_MY_OWN", "MAYFLY_X"),
    ],
)
def test_no_variable_that_starts_with_mayfly_is_ignored(name):
    (problem,) = problems_of(**{name: "true"})

    assert problem.startswith(f"{name} is not an option")


def test_a_variable_without_a_similar_option_is_reported_without_a_suggestion():
    assert problems_of(MAYFLY_QQQQQQQQQQQQ="1") == ["MAYFLY_QQQQQQQQQQQQ is not an option"]


@pytest.mark.parametrize(
    "name",
    [
        *("SYNC_GATEWAY", "PATH", "MAYFLY", "HOME"),
        *("MAYFLY_API_SERVICE_HOST", "MAYFLY_API_SERVICE_PORT", "MAYFLY_API_SERVICE_PORT_HTTP", "MAYFLY_API_PORT"),
        *("MAYFLY_API_PORT_80_TCP", "MAYFLY_API_PORT_80_TCP_ADDR", "MAYFLY_1_NAME", "MAYFLY_1_ENV_HOME"),
    ],
)
def test_variables_of_other_programs_are_ignored(name):
    assert read_settings({name: "x"}) == read_settings({})


def test_an_empty_secrets_file_is_reported(tmp_path):
    path = tmp_path / "secret"
    path.write_text("\n")

    assert problems_of(MAYFLY_DATABASE_URL_FILE=str(path)) == ["MAYFLY_DATABASE_URL_FILE cannot be read: it is empty"]


@pytest.mark.parametrize("name", sorted(NOT_SUPPORTED))
def test_an_option_of_a_later_release_is_refused_rather_than_ignored(name):
    assert problems_of(**{name: "x"}) == [f"{name} is set, but this release does not support it yet: unset it"]


def test_a_missing_required_option_is_reported_with_what_to_set():
    with pytest.raises(SettingsError, match=r"^SYNC_WEBHOOK_SECRET is not set: copy the whsec_"):
        require_webhook_secret(read_settings({}))
    with pytest.raises(SettingsError, match=r"^SYNC_API_KEY is not set: put an API key"):
        require_api_key(read_settings({}))

    require_webhook_secret(read_settings({"SYNC_WEBHOOK_SECRET": SECRET}))
    require_api_key(read_settings({"SYNC_API_KEY": "sk-1"}))


def test_no_representation_shows_a_secret():
    settings = read_settings(
        {
            "SYNC_API_KEY": "sk-verysecret",
            "SYNC_WEBHOOK_SECRET": "whsec_verysecret",
            "MAYFLY_API_TOKEN": "verysecret0123456789",
            "MAYFLY_INTAKE_TOKEN": "verysecret9876543210",
            "MAYFLY_REDIS_URL": "redis://:verysecret@r",
            "MAYFLY_DATABASE_URL": "postgresql://u:verysecret@db/mayfly",
        }
    )

    assert "verysecret" not in f"{settings} {settings!r} {settings.api_key} {settings.webhook_secrets}"


def test_secrets_are_equal_by_their_text_alone():
    assert len({Secret("a"), Secret("a"), Secret("b")}) == 2
    assert Secret("a") != "a"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mayfly.toml"
    path.write_text(
        """
        [[rule]]
        id = "film"
        ttl = "7d"
        [[account]]
        id = "studio"
        api_key_env = "SYNC_API_KEYS"
        webhook_secret_env = "MAYFLY_STUDIO_SECRET"
        min_ttl = "10s"
        max_ttl = "30d"
        [[account]]
        id = "other"
        min_ttl = "1h"
        """
    )
    return path


def test_the_file_with_rules_is_read_into_the_policy(file):
    settings = read_settings({"MAYFLY_CONFIG": str(file)})

    assert settings.config_path == file
    assert [rule.id for rule in settings.policy.rules.rules] == ["film"]


def test_no_account_can_keep_for_less_than_the_minimum_for_all(file):
    policy = read_settings({"MAYFLY_CONFIG": str(file), "MAYFLY_MIN_TTL": "5m"}).policy

    assert policy.bounds_of("studio") == Bounds(timedelta(minutes=5), timedelta(days=30))
    assert policy.bounds_of("other") == Bounds(timedelta(hours=1))
    assert policy.bounds_of("default") == Bounds(timedelta(minutes=5))


def test_variables_that_an_account_names_are_known(file):
    named = {"SYNC_API_KEYS": "sk-1", "MAYFLY_STUDIO_SECRET": SECRET}

    assert problems_of(**named) != []
    assert read_settings({"MAYFLY_CONFIG": str(file), **named}).rules_file.accounts[0].id == "studio"


def test_problems_of_the_file_stand_beside_those_of_the_variables(file):
    file.write_text('[[rule]]\nid = "film"\nttl = 5\n')

    assert [problem.partition(" ")[0] for problem in problems_of(MAYFLY_CONFIG=str(file), MAYFLY_TTL="5")] == [
        "MAYFLY_TTL",
        f"{file}:3:",
    ]


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    assert problems_of(MAYFLY_CONFIG=str(tmp_path / "none.toml")) == [
        f"MAYFLY_CONFIG names {tmp_path}/none.toml, which cannot be read: No such file or directory"
    ]


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("https://mayfly.example.com", "https://mayfly.example.com"),
        ("https://mayfly.example.com/", "https://mayfly.example.com"),
        ("https://example.com:8443/mayfly/webhooks/sync", "https://example.com:8443/mayfly"),
    ],
)
def test_the_public_url_is_read_without_its_route(text, url):
    assert read_settings({"MAYFLY_PUBLIC_URL": text}).public_url == url


@pytest.mark.parametrize(
    "text",
    ["http://mayfly.example.com", "mayfly.example.com", "https://", "https://u:p@h", "https://h?a=1", "https://h:0"],
)
def test_a_public_url_that_sync_so_could_not_call_is_refused(text):
    (problem,) = problems_of(MAYFLY_PUBLIC_URL=text)

    assert problem.startswith("MAYFLY_PUBLIC_URL is invalid: it accepts an https URL")


FORWARD = '[[forward]]\nid = "crm"\nurl = "https://crm.example.com/hooks?token=s3cr3t"\nsecret_env = "{name}"\n'
SIGNING = "whsec_" + "A" * 43 + "="


@pytest.fixture
def forwarding(tmp_path):
    """Return the environment that forwards to a target whose secret is in the variable *name*."""

    def write(name="CRM_SECRET", **environment):
        path = tmp_path / "mayfly.toml"
        path.write_text(FORWARD.format(name=name))
        return {"MAYFLY_CONFIG": str(path), **environment}

    return write


def test_a_target_has_the_secrets_that_its_variable_has(forwarding):
    other = SIGNING.replace("A", "B")
    (target,) = read_settings(forwarding(CRM_SECRET=f" {SIGNING}, {other} ")).targets

    assert target.secrets == (Secret(SIGNING), Secret(other))


@pytest.mark.parametrize("name", ["CRM_SECRET", "MAYFLY_CRM_SECRET"])
def test_the_secret_of_a_target_can_be_read_from_a_file(forwarding, tmp_path, name):
    (tmp_path / "secret").write_text(f"{SIGNING}\n")
    (target,) = read_settings(forwarding(name, **{f"{name}_FILE": str(tmp_path / "secret")})).targets

    assert target.secrets == (Secret(SIGNING),)


def test_without_targets_there_are_none():
    assert read_settings({}).targets == ()


@pytest.mark.parametrize(
    ("environment", "problem"),
    [
        ({}, "forward crm: CRM_SECRET, which secret_env names, is not set: it accepts whsec_"),
        ({"CRM_SECRET": "  "}, "forward crm: CRM_SECRET, which secret_env names, is not set: it accepts whsec_"),
        ({"CRM_SECRET": "s3cr3t"}, "forward crm: CRM_SECRET is invalid: it accepts whsec_"),
        ({"CRM_SECRET": "whsec_s3cr3t"}, "forward crm: CRM_SECRET is invalid: it accepts whsec_"),
        ({"CRM_SECRET": f"{SIGNING},whsec_s3cr3t"}, "forward crm: CRM_SECRET is invalid: it accepts whsec_"),
        ({"CRM_SECRET": f"{SIGNING},"}, "forward crm: CRM_SECRET is invalid: it accepts whsec_"),
        ({"CRM_SECRET_FILE": "/nowhere/s"}, "forward crm: CRM_SECRET_FILE cannot be read: No such file or directory"),
    ],
)
def test_a_secret_of_a_target_that_is_missing_or_invalid_is_named(forwarding, environment, problem):
    (found,) = problems_of(**forwarding(**environment))

    assert found.startswith(problem)
    assert "s3cr3t" not in found


def test_a_secrets_file_of_a_target_that_is_not_text_is_named(forwarding, tmp_path):
    (tmp_path / "secret").write_bytes(b"whsec_\xff\xfe")

    assert problems_of(**forwarding(CRM_SECRET_FILE=str(tmp_path / "secret"))) == [
        "forward crm: CRM_SECRET_FILE cannot be read: it is not UTF-8"
    ]


def test_no_representation_of_the_settings_shows_what_targets_keep_secret(forwarding):
    settings = read_settings(forwarding(CRM_SECRET=SIGNING))

    assert "s3cr3t" not in f"{settings} {settings!r} {settings.targets!r}"
    assert SIGNING not in f"{settings} {settings!r} {settings.targets!r}"


@pytest.fixture
def forward_to(tmp_path):
    """Read settings with one target at a URL."""

    def read(url, **environment):
        path = tmp_path / "forward.toml"
        path.write_text(f'[[account]]\nid = "studio"\n[[forward]]\nid = "crm"\nurl = "{url}"\n')
        return read_settings({"MAYFLY_CONFIG": str(path)} | environment)

    return read


@pytest.mark.parametrize(
    ("url", "environment", "named"),
    [
        ("https://mayfly.example.com/webhooks/sync", {}, "MAYFLY_PUBLIC_URL"),
        ("https://MAYFLY.example.com:443/webhooks/sync/studio?token=x", {}, "MAYFLY_PUBLIC_URL"),
        ("http://127.0.0.1:8080/hooks", {}, "MAYFLY_HOST and MAYFLY_PORT"),
        ("http://localhost:8080/webhooks/sync", {}, "MAYFLY_HOST and MAYFLY_PORT"),
        ("http://[::1]:80/", {"MAYFLY_HOST": "::", "MAYFLY_PORT": "80"}, "MAYFLY_HOST and MAYFLY_PORT"),
        ("http://mayfly.local:9000/", {"MAYFLY_HOST": "Mayfly.local", "MAYFLY_PORT": "9000"}, "MAYFLY_HOST"),
    ],
)
def test_a_target_that_is_mayfly_itself_is_refused(forward_to, url, environment, named):
    with pytest.raises(SettingsError) as caught:
        forward_to(url, MAYFLY_PUBLIC_URL="https://mayfly.example.com", **environment)

    (problem,) = caught.value.problems
    assert problem.startswith("forward crm: its url is that of Mayfly itself")
    assert named in problem
    assert "token" not in problem


@pytest.mark.parametrize(
    ("url", "environment"),
    [
        ("https://mayfly.example.com/hooks", {}),  # an app behind the same proxy
        ("https://mayfly.example.com/webhooks/sync/other", {}),  # no account has this name
        ("https://app.example.com/webhooks/sync", {}),
        ("http://127.0.0.1:8081/webhooks/sync", {}),
        ("http://127.0.0.1:8080/", {"MAYFLY_HOST": "10.0.0.5"}),  # another program listens there
        ("http://127.0.0.1:8080/", {"MAYFLY_PORT": "0"}),
    ],
)
def test_a_target_beside_mayfly_is_accepted(forward_to, url, environment):
    settings = forward_to(url, MAYFLY_PUBLIC_URL="https://mayfly.example.com", **environment)

    assert [target.url.reveal() for target in settings.targets] == [url]
