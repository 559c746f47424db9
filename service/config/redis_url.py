"""Parsing and checking Redis URLs, without connecting."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import unquote, urlsplit

from service.config.url_options import (
    UrlOptionError,
    parse_options,
    refuse_unknown,
    require_choice,
    require_number,
)

_SENTINEL_PORT: Final = 26379
# The options of redis-py's connections that are useful here.
_ANY: Final = frozenset({"db", "username", "password", "client_name", "protocol"})
_TCP: Final = _ANY | {"socket_keepalive"}
_TLS: Final = _TCP | {
    *(
        "ssl_ca_certs",
        "ssl_ca_data",
        "ssl_certfile",
        "ssl_keyfile",
        "ssl_cert_reqs",
        "ssl_check_hostname",
        "ssl_ciphers",
    )
}
_OPTIONS: Final = {"redis": _TCP, "rediss": _TLS, "unix": _ANY}
_SENTINEL: Final = frozenset({"sentinel_username", "sentinel_password", "ssl", "ssl_ca_certs", "ssl_check_hostname"})
_NEEDS_TLS: Final = dict.fromkeys(sorted(_TLS - _TCP), "it needs rediss://, which is TLS")
_OWN_LIMITS: Final = "Mayfly has its own limits"
_REFUSED: Final = {
    "ssl": "say rediss:// for TLS",
    "ssl_ca_path": "say ssl_ca_certs=/path of a file",
    "ssl_password": "the key of the certificate must have no password",
    "ssl_min_version": "TLS 1.2 is the oldest already",
    "ssl_validate_ocsp": "the driver cannot check it here",
    "decode_responses": "Mayfly stores bytes",
    "family": "the name of the host decides",
    "socket_keepalive": "it needs a TCP connection",
    **dict.fromkeys(
        (
            *("timeout", "socket_timeout", "socket_connect_timeout", "socket_read_size", "health_check_interval"),
            *("retry_on_timeout", "max_connections"),
        ),
        _OWN_LIMITS,
    ),
}
_FLAGS: Final = ("true", "false")


@dataclass(frozen=True, slots=True)
class SentinelUrl:
    """``sentinel://user:password@host:port,host:port/service/db``; the login is the master's."""

    hosts: tuple[tuple[str, int], ...]
    service: str
    database: int
    username: str | None
    password: str | None = field(repr=False)
    sentinel_username: str | None
    sentinel_password: str | None = field(repr=False)
    is_tls: bool
    ca_file: str | None
    is_host_checked: bool


def check_url(text: str) -> None:
    """Return if *text* is a URL of a Redis: ``redis://``, ``rediss://``, ``unix://`` or ``sentinel://``.

    The first three have redis-py's form; for the last see read_sentinel_url().

    Raises: ValueError, which repeats nothing of *text*.
    """
    parts = urlsplit(text)
    if parts.scheme == "sentinel":
        read_sentinel_url(text)
        return
    database = parts.path.strip("/")
    if parts.scheme in ("redis", "rediss"):
        if database and not database.isdecimal():
            raise ValueError("the path of a Redis URL is the number of its database")
        if parts.port == 0:
            raise ValueError("0 is not a port of a Redis")
    elif parts.scheme != "unix" or not database:
        raise ValueError("not a URL of a Redis")
    _check_options(parts.scheme, parse_options(parts.query))


def _check_options(scheme: str, options: Mapping[str, str]) -> None:
    refused = _REFUSED if scheme == "rediss" else _NEEDS_TLS | _REFUSED
    refuse_unknown(options, _OPTIONS[scheme], refused)
    require_choice(options, "ssl_cert_reqs", ("none", "optional", "required"))
    require_choice(options, "ssl_check_hostname", _FLAGS)
    require_choice(options, "socket_keepalive", _FLAGS)
    require_choice(options, "protocol", ("2", "3"))
    require_number(options, "db")
    if options.get("ssl_cert_reqs") == "none" and options.get("ssl_check_hostname") == "true":
        raise UrlOptionError("the option ssl_check_hostname of the URL accepts false beside ssl_cert_reqs=none")
    if ("ssl_certfile" in options) is not ("ssl_keyfile" in options):
        raise UrlOptionError("the options ssl_certfile and ssl_keyfile of the URL are accepted together")


def checks_host(text: str) -> bool:
    """Whether the certificate of the Redis at *text* must be valid for its host; redis-py's own default is no.

    Without a check of the certificate there is none of the host in it.
    """
    options = parse_options(urlsplit(text).query)
    return options.get("ssl_cert_reqs") != "none" and options.get("ssl_check_hostname") != "false"


def read_sentinel_url(text: str) -> SentinelUrl:
    """Read ``sentinel://user:password@host:port,host:port/service/db``.

    Options: ``sentinel_username`` and ``sentinel_password`` for the Sentinels' own login; ``ssl=true``,
    ``ssl_ca_certs=/path`` and ``ssl_check_hostname=false`` for TLS to Sentinels and master.

    Raises: ValueError, which repeats nothing of *text*.
    """
    parts = urlsplit(text)
    login, _, places = parts.netloc.rpartition("@")
    username, _, password = login.partition(":")
    service, _, database = parts.path.strip("/").partition("/")
    query = parse_options(parts.query)
    refuse_unknown(query, _SENTINEL, _REFUSED | {"ssl_cert_reqs": "say ssl_check_hostname=false, or nothing"})
    for name in ("ssl", "ssl_check_hostname"):
        require_choice(query, name, _FLAGS)
    url = SentinelUrl(
        hosts=tuple(_parse_host(place) for place in places.split(",")),
        service=service or "mymaster",
        database=_parse_number(database or "0"),
        username=unquote(username) or None,
        password=unquote(password) or None,
        sentinel_username=query.get("sentinel_username"),
        sentinel_password=query.get("sentinel_password"),
        is_tls=query.get("ssl") == "true",
        ca_file=query.get("ssl_ca_certs"),
        is_host_checked=query.get("ssl_check_hostname") != "false",
    )
    if (url.ca_file or not url.is_host_checked) and not url.is_tls:
        raise UrlOptionError("the options ssl_ca_certs and ssl_check_hostname of the URL need ssl=true beside them")
    return url


def _parse_host(place: str) -> tuple[str, int]:
    host, _, port = place.rpartition(":")
    found = (host, _parse_number(port)) if host else (port, _SENTINEL_PORT)
    if not found[0]:
        raise ValueError("a Sentinel has no host")
    return found


def _parse_number(text: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise ValueError("a port and a database are numbers")
    return int(text)
