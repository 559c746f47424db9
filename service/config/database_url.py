"""Parsing and checking URLs of the ledger's database, without connecting.

Every option of a PostgreSQL URL is taken with libpq's meaning, or refused by its name; none is dropped that protects.
"""

import re
from typing import Final

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from service.config.url_options import (
    UrlOptionError,
    parse_options,
    refuse_unknown,
    require_choice,
    require_number,
)

# As Prisma and others spell it: there is a pooler that gives each transaction another session.
POOLED_OPTION: Final = "pgbouncer"

# What asyncpg reads from a URL, as libpq does.
_TAKEN: Final = (
    *("host", "port", "dbname", "user", "password", "passfile", "service", "application_name", "options"),
    *("sslmode", "sslrootcert", "sslcert", "sslkey", "sslpassword", "sslcrl", "sslnegotiation"),
    *("ssl_min_protocol_version", "ssl_max_protocol_version", "target_session_attrs", "krbsrvname", "gsslib"),
    *("connect_timeout", POOLED_OPTION),
)
# A dead connection is noticed by Mayfly's own time limits, which are shorter: nothing is left for these to do.
_KEEPALIVES: Final = ("keepalives", "keepalives_idle", "keepalives_interval", "keepalives_count", "tcp_user_timeout")
# What asyncpg does anyway: any other value would be a promise that it does not keep.
_FIXED: Final = {
    "gssencmode": (("disable", "prefer"), ": connections are encrypted by TLS, see sslmode"),
    "sslsni": (("1",), ": the name of the host is always sent"),
    "sslcompression": (("0",), ": TLS is never compressed"),
    "client_encoding": (("utf8", "UTF8", "UTF-8", "utf-8"), ""),
    "load_balance_hosts": (("disable",), ": hosts are tried in their order"),
}
_SSL_MODES: Final = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
_NOT_WITH_SYSTEM: Final = {"sslcrl", "sslnegotiation", "ssl_min_protocol_version", "ssl_max_protocol_version"}
# Dropped after they have been checked.
_CHECKED: Final = (*_KEEPALIVES, *_FIXED, "channel_binding")
_MISUSED: Final = {
    "ssl": "say sslmode=require, or better sslmode=verify-full",
    "sslaccept": "say sslmode=require, or better sslmode=verify-full",
    "schema": "say options=-c%20search_path%3DNAME",
    "search_path": "say options=-c%20search_path%3DNAME",
    "statement_timeout": "Mayfly has its own time limits",
    "connection_limit": "Mayfly opens up to 15 connections per process",
    "pool_timeout": "Mayfly has its own time limits",
    "statement_cache_size": "say pgbouncer=true if there is a pooler",
    "prepared_statement_cache_size": "say pgbouncer=true if there is a pooler",
    "hostaddr": "say host",
    "requirepeer": "the driver cannot check it",
    "require_auth": "the driver cannot check it",
    "sslcertmode": "say sslcert and sslkey, or neither",
    "fallback_application_name": "say application_name",
    "replication": "Mayfly needs an ordinary session",
}
# ``user:password@host:5432,host:5433``, which SQLAlchemy does not parse.
_SEVERAL: Final = re.compile(
    r"(?P<scheme>[a-z+]+)://(?P<login>[^/?]*@)?(?P<hosts>[^/?@,]+(?:,[^/?@,]+)+)(?P<rest>[/?].*)?"
)


def parse_database_url(text: str) -> URL:
    """Return the URL of SQLite or PostgreSQL, with only those options that are for the driver or for Mayfly.

    Raises: ValueError, also as UrlOptionError; neither repeats anything of *text*.
    """
    place, has_query, query = text.partition("?")
    several = _SEVERAL.fullmatch(place)
    if several:
        place = f"{several['scheme']}://{several['login'] or ''}{several['rest'] or ''}"
    try:
        url = make_url(place)
    except (ArgumentError, ValueError):
        raise ValueError from None
    if url.get_backend_name() == "sqlite":
        if not url.database or url.database == ":memory:" or has_query:
            raise ValueError
        return URL.create("sqlite", database=url.database)
    if url.drivername not in ("postgres", "postgresql", "postgresql+asyncpg") or "," in (url.host or ""):
        raise ValueError
    options = _parse_hosts(query)
    if several:
        if "host" in options:
            raise UrlOptionError("the URL has hosts before its path and in the option host: it accepts one of them")
        options["host"] = several["hosts"]
    _check_options(options)
    if "," in options.get("host", ""):
        options.setdefault("target_session_attrs", "read-write")  # a standby is of no use
    kept = {name: value for name, value in options.items() if name not in _CHECKED}
    return url.set(drivername="postgresql", query=kept)


def _parse_hosts(query: str) -> dict[str, str]:
    """Return the options; of hosts there may be several, in SQLAlchemy's form too: ``host=a:5432&host=b:5432``."""
    parts = [part for part in query.split("&") if part]
    hosts = [part.partition("=")[2] for part in parts if part.startswith("host=")]
    others = [part for part in parts if not part.startswith("host=")]
    return parse_options("&".join([*others, *([f"host={','.join(hosts)}"] if hosts else [])]))


def _check_options(options: dict[str, str]) -> None:
    refuse_unknown(options, {*_TAKEN, *_CHECKED}, _MISUSED)
    require_choice(options, "sslmode", _SSL_MODES)
    require_choice(options, POOLED_OPTION, ("true", "false"))
    require_choice(
        options, "target_session_attrs", ("any", "read-write", "primary"), ": Mayfly writes, which a standby refuses"
    )
    for name, (accepted, reason) in _FIXED.items():
        require_choice(options, name, accepted, reason)
    for name in ("connect_timeout", *_KEEPALIVES):
        require_number(options, name)
    _check_trust(options)


def _check_trust(options: dict[str, str]) -> None:
    """Refuse what the driver would take for less protection than it says."""
    mode = options.get("sslmode")
    if options.get("sslrootcert") == "system" and mode != "verify-full":
        raise UrlOptionError("the option sslrootcert=system of the URL accepts sslmode=verify-full alone")
    if options.get("sslrootcert") == "system" and (beside := _NOT_WITH_SYSTEM & options.keys()):
        raise UrlOptionError(f"the option {min(beside)} of the URL is not accepted beside sslrootcert=system")
    require_choice(options, "channel_binding", ("disable", "prefer", "require"))
    # It proves that no one is between. The driver cannot, but a checked certificate proves the same.
    if options.get("channel_binding") == "require" and mode != "verify-full":
        advice = "with sslmode=verify-full, such as sslmode=verify-full&sslrootcert=system"
        raise UrlOptionError(f"the option channel_binding=require of the URL is accepted {advice}")
