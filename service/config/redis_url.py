"""Parsing and checking Redis URLs, without connecting."""

from dataclasses import dataclass, field
from typing import Final
from urllib.parse import parse_qsl, unquote, urlsplit

_SENTINEL_PORT: Final = 26379
# The connection options of redis-py that are useful here.
_OPTIONS: Final = frozenset(
    {
        *("db", "username", "password", "client_name", "protocol", "socket_keepalive"),
        *("ssl_ca_certs", "ssl_ca_path", "ssl_ca_data", "ssl_certfile", "ssl_keyfile", "ssl_password"),
        *("ssl_cert_reqs", "ssl_check_hostname", "ssl_min_version", "ssl_ciphers"),
    }
)
_CERTIFICATE_CHECKS: Final = frozenset({"none", "optional", "required"})


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
    query = _parse_query(parts.query)
    if query.keys() - _OPTIONS or query.get("ssl_cert_reqs", "required") not in _CERTIFICATE_CHECKS:
        raise ValueError("an option of the Redis URL is not known")


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
    query = _parse_query(parts.query)
    url = SentinelUrl(
        hosts=tuple(_parse_host(place) for place in places.split(",")),
        service=service or "mymaster",
        database=_parse_number(database or "0"),
        username=unquote(username) or None,
        password=unquote(password) or None,
        sentinel_username=query.pop("sentinel_username", None),
        sentinel_password=query.pop("sentinel_password", None),
        is_tls=query.pop("ssl", "false") == "true",
        ca_file=query.pop("ssl_ca_certs", None),
        is_host_checked=query.pop("ssl_check_hostname", "true") == "true",
    )
    if query or ((url.ca_file or not url.is_host_checked) and not url.is_tls):
        raise ValueError("an option of the Sentinel URL is not known")
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


def _parse_query(text: str) -> dict[str, str]:
    try:
        return dict(parse_qsl(text, strict_parsing=bool(text)))
    except ValueError:
        raise ValueError("the query of the Redis URL is malformed") from None
