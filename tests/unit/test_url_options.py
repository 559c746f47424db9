"""Each option of a URL of PostgreSQL or Redis is taken with its meaning, or refused by its name."""

import ssl

import pytest
from sqlalchemy import URL

from service.config.database_url import parse_database_url
from service.config.settings import SettingsError, read_settings
from service.core.secret import Secret
from service.jobs import connection
from service.ledger.postgres import _connect_args

BASE = "postgresql://u:verysecret@db/mayfly"
FULL = "sslmode=verify-full&sslrootcert=/ca.pem"


def problem_of(**environment):
    with pytest.raises(SettingsError) as refusal:
        read_settings(environment)
    (problem,) = refusal.value.problems
    assert "verysecret" not in problem
    return problem


# PostgreSQL


@pytest.mark.parametrize(
    "query",
    [
        *("sslmode=disable", "sslmode=prefer", "sslmode=require", FULL, f"{FULL}&sslcert=/c&sslkey=/k&sslcrl=/l"),
        *("application_name=mayfly", "options=-c%20search_path%3Dm", "target_session_attrs=primary"),
        *("pgbouncer=true", "passfile=/p", "sslnegotiation=direct", "host=/run/postgresql&port=5433"),
    ],
)
def test_an_option_for_the_driver_is_handed_on(query):
    url = parse_database_url(f"{BASE}?{query}")

    assert {f"{name}={value}" for name, value in url.query.items()} == {
        part.replace("%20", " ").replace("%3D", "=") for part in query.split("&")
    }


@pytest.mark.parametrize(
    "query",
    [
        "keepalives=1&keepalives_idle=30&keepalives_interval=10&keepalives_count=5&tcp_user_timeout=30000",
        *("gssencmode=disable", "gssencmode=prefer", "sslsni=1", "sslcompression=0", "client_encoding=utf8"),
        *("channel_binding=prefer", "channel_binding=disable", "load_balance_hosts=disable"),
    ],
)
def test_an_option_that_asks_for_what_is_done_anyway_is_taken(query):
    assert parse_database_url(f"{BASE}?{query}") == parse_database_url(BASE)


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("gssencmode=require", "gssencmode of the URL accepts disable or prefer"),
        ("sslsni=0", "sslsni of the URL accepts 1"),
        ("sslcompression=1", "sslcompression of the URL accepts 0"),
        ("sslmode=verysecret", "sslmode of the URL accepts disable or allow or prefer or require or verify-ca"),
        ("ssl=true", "ssl of the URL is not accepted: say sslmode=require"),
        ("sslmode=require&sslmode=disable", "given twice"),
        (
            "sslmode=require&channel_binding=require",
            "channel_binding=require of the URL is accepted with sslmode=",
        ),
        ("channel_binding=require", "channel_binding=require of the URL is accepted with sslmode="),
        ("sslmode=require&sslrootcert=system", "sslrootcert=system of the URL accepts sslmode=verify-full alone"),
        ("sslrootcert=system", "sslrootcert=system of the URL accepts sslmode=verify-full alone"),
        ("sslmode=verify-full&sslrootcert=system&sslcrl=/l", "sslcrl of the URL is not accepted beside"),
        ("target_session_attrs=standby", "target_session_attrs of the URL accepts any or read-write or primary"),
        ("target_session_attrs=prefer-standby", "Mayfly writes, which a standby refuses"),
        ("pgbouncer=yes", "pgbouncer of the URL accepts true or false"),
        ("connect_timeout=verysecret", "connect_timeout of the URL accepts a whole number"),
        ("keepalives_idle=-1", "keepalives_idle of the URL accepts a whole number"),
        ("require_auth=scram-sha-256", "require_auth of the URL is not accepted"),
        ("load_balance_hosts=random", "load_balance_hosts of the URL accepts disable"),
        ("client_encoding=latin1", "client_encoding of the URL accepts utf8"),
        ("schema=mayfly", "schema of the URL is not accepted: say options="),
        ("connection_limit=1", "connection_limit of the URL is not accepted"),
        ("SSLMODE=verify-full", "an option of the URL is not known: it accepts application_name, "),
        ("verysecret=1", "an option of the URL is not known"),
        ("verysecret", "malformed"),
    ],
)
def test_an_option_of_postgresql_that_cannot_be_kept_is_refused(query, said):
    problem = problem_of(MAYFLY_DATABASE_URL=f"{BASE}?{query}")

    assert problem.startswith("MAYFLY_DATABASE_URL is invalid: ")
    assert said in problem


def test_channel_binding_is_replaced_by_a_checked_certificate():
    url = parse_database_url(f"{BASE}?{FULL}&channel_binding=require")

    assert url.query == {"sslmode": "verify-full", "sslrootcert": "/ca.pem"}


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("postgresql://u:p@a:5432,b:5433/mayfly", "a:5432,b:5433"),
        ("postgresql://u:p@a,b,c/mayfly?connect_timeout=3", "a,b,c"),
        ("postgres://a:5432,b:5433/mayfly", "a:5432,b:5433"),
        ("postgresql://u:p@/mayfly?host=a:5432&host=b:5433", "a:5432,b:5433"),
        ("postgresql://u:p@/mayfly?host=a,b", "a,b"),
    ],
)
def test_of_several_hosts_the_one_that_can_write_is_used(text, hosts):
    url = parse_database_url(text)

    assert (url.host, url.database) == (None, "mayfly")
    assert (url.query["host"], url.query["target_session_attrs"]) == (hosts, "read-write")


def test_hosts_in_two_places_are_refused():
    assert "accepts one of them" in problem_of(MAYFLY_DATABASE_URL="postgresql://u:verysecret@a,b/m?host=c")


@pytest.mark.parametrize("text", ["postgresql://u:verysecret@a,/m", "postgresql://u:verysecret@a:verysecret/m"])
def test_malformed_hosts_are_refused(text):
    assert "accepts postgresql://" in problem_of(MAYFLY_DATABASE_URL=text)


def test_a_connection_may_take_as_long_as_the_url_says():
    assert _connect_args(parse_database_url(f"{BASE}?connect_timeout=3"))["timeout"] == 3
    assert _connect_args(parse_database_url(BASE))["timeout"] == 5
    assert _connect_args(parse_database_url(f"{BASE}?connect_timeout=0"))["timeout"] == 5  # libpq's default


def test_options_for_mayfly_are_not_handed_on_to_the_server():
    arguments = _connect_args(parse_database_url(f"{BASE}?pgbouncer=true&connect_timeout=3&application_name=m"))

    assert arguments == {"timeout": 3.0, "dsn": "postgresql://u:verysecret@db/mayfly?application_name=m"}


def test_the_systems_authorities_check_certificate_and_host():
    arguments = _connect_args(parse_database_url(f"{BASE}?sslmode=verify-full&sslrootcert=system"))

    assert arguments["dsn"] == BASE
    assert (arguments["ssl"].verify_mode, arguments["ssl"].check_hostname) == (ssl.CERT_REQUIRED, True)


def test_a_url_of_sqlite_has_no_options():
    problem_of(MAYFLY_DATABASE_URL="sqlite:////var/lib/l.db?mode=ro")
    assert parse_database_url("sqlite:////l.db") == URL.create("sqlite", database="/l.db")


# Redis


def context_of(url):
    """Return the TLS context of the connections to *url*, made by redis-py from its options."""
    made = connection.connect(Secret(url), retries=0).connection_pool.make_connection()
    return made.ssl_context.get()


@pytest.mark.parametrize(
    ("query", "mode", "is_host_checked"),
    [
        ("", ssl.CERT_REQUIRED, True),
        ("?ssl_cert_reqs=required", ssl.CERT_REQUIRED, True),
        ("?ssl_cert_reqs=optional", ssl.CERT_OPTIONAL, True),
        ("?ssl_check_hostname=false", ssl.CERT_REQUIRED, False),
        ("?ssl_cert_reqs=none", ssl.CERT_NONE, False),
        ("?ssl_cert_reqs=none&ssl_check_hostname=false&ssl_ciphers=ECDHE%2BAESGCM", ssl.CERT_NONE, False),
    ],
)
def test_tls_to_redis_checks_what_the_url_says(query, mode, is_host_checked):
    text = f"rediss://u:p@redis:6380/1{query}"
    context = context_of(text)

    assert read_settings({"MAYFLY_REDIS_URL": text}).redis_url is not None
    assert (context.verify_mode, context.check_hostname) == (mode, is_host_checked)


@pytest.mark.parametrize(
    "text",
    [
        "redis://redis/0?socket_keepalive=true&client_name=m&protocol=3",
        "rediss://redis/0?ssl_ca_certs=/ca&ssl_certfile=/c&ssl_keyfile=/k&ssl_check_hostname=true",
        "unix:///run/redis.sock?db=1&username=u&password=p&client_name=m",
    ],
)
def test_each_option_of_redis_that_is_accepted_is_one_of_the_driver(text):
    assert read_settings({"MAYFLY_REDIS_URL": text}).redis_url is not None
    connection.connect(Secret(text), retries=0).connection_pool.make_connection()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("redis://r/0?ssl_cert_reqs=none", "ssl_cert_reqs of the URL is not accepted: it needs rediss://"),
        ("redis://r/0?ssl=true", "ssl of the URL is not accepted: say rediss://"),
        ("rediss://r/0?ssl_cert_reqs=verysecret", "ssl_cert_reqs of the URL accepts none or optional or required"),
        ("rediss://r/0?ssl_cert_reqs=none&ssl_check_hostname=true", "ssl_check_hostname of the URL accepts false"),
        ("rediss://r/0?ssl_check_hostname=0", "ssl_check_hostname of the URL accepts true or false"),
        ("rediss://r/0?ssl_certfile=/c", "ssl_certfile and ssl_keyfile of the URL are accepted together"),
        ("rediss://r/0?ssl_min_version=TLSv1_3", "ssl_min_version of the URL is not accepted: TLS 1.2"),
        ("rediss://r/0?ssl_ca_path=/c", "ssl_ca_path of the URL is not accepted: say ssl_ca_certs"),
        ("unix:///r.sock?socket_keepalive=true", "socket_keepalive of the URL is not accepted: it needs a TCP"),
        ("redis://r/0?socket_timeout=1", "socket_timeout of the URL is not accepted: Mayfly has its own limits"),
        ("redis://r/0?verysecret=1", "an option of the URL is not known: it accepts client_name, db, "),
        ("redis://r/0?db=verysecret", "db of the URL accepts a whole number"),
        ("sentinel://a/m/0?ssl_cert_reqs=none", "ssl_cert_reqs of the URL is not accepted: say ssl_check_hostname"),
        ("sentinel://a/m/0?ssl=yes", "ssl of the URL accepts true or false"),
        ("sentinel://a/m/0?ssl_ca_certs=/ca", "need ssl=true beside them"),
    ],
)
def test_an_option_of_redis_that_cannot_be_kept_is_refused(text, said):
    problem = problem_of(MAYFLY_REDIS_URL=text)

    assert problem.startswith("MAYFLY_REDIS_URL is invalid: ")
    assert said in problem
