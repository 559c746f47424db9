"""The targets that webhooks are forwarded to: from the rules file, with their secrets from the environment."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from service.config.rules_file import Forward
from service.core.adopting import is_our_webhook
from service.core.forwarding import Target
from service.core.key import DEFAULT_ACCOUNT
from service.core.overrides import WEBHOOK_PATH
from service.core.secret import Secret
from service.core.standard_webhooks import read_signing_key

_ACCEPTS = "whsec_ and the base64 of 24 to 64 random bytes, two of them separated by a comma while rotating"
_PORTS: Final = {"http": 80, "https": 443}
_LOOPBACK: Final = frozenset({"127.0.0.1", "::1", "localhost"})
_EVERY_ADDRESS: Final = frozenset({"", "0.0.0.0", "::"})


def read_targets(
    forwards: Sequence[Forward], environment: Mapping[str, str], problems: list[str]
) -> tuple[Target, ...]:
    """Return the targets of *forwards* with their secrets; add to *problems* what cannot be read.

    A secret that is named and missing is a problem: its target would refuse each delivery, and that for good.
    """
    targets = []
    for forward in forwards:
        try:
            secrets = () if forward.secret_env is None else _read_secrets(environment, forward.secret_env)
        except ValueError as error:
            problems.append(f"forward {forward.target.id}: {error}")
        else:
            targets.append(replace(forward.target, secrets=secrets))
    return tuple(targets)


def _read_secrets(environment: Mapping[str, str], name: str) -> tuple[Secret, ...]:
    """Return what *name*, or the file that NAME_FILE names, has.

    Raises: ValueError, with the name and not the value.
    """
    text, path = environment.get(name, "").strip(), environment.get(f"{name}_FILE", "").strip()
    try:
        if not text and path:
            text = Path(path).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ValueError(f"{name}_FILE cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{name}_FILE cannot be read: it is not UTF-8") from None
    if not text:
        raise ValueError(f"{name}, which secret_env names, is not set: it accepts {_ACCEPTS}")
    secrets = tuple(Secret(part.strip()) for part in text.split(","))
    try:
        for secret in secrets:
            read_signing_key(secret)
    except ValueError:
        raise ValueError(f"{name} is invalid: it accepts {_ACCEPTS}") from None
    return secrets


def find_loops(
    targets: Sequence[Target], accounts: Iterable[str], public_url: str | None, host: str | None, port: int | None
) -> Iterator[str]:
    """Yield a sentence for each of *targets* that is Mayfly itself, at *public_url* or where it listens.

    It would take each webhook a second time and answer 202, as if an app had it.
    """
    routes = {DEFAULT_ACCOUNT, *accounts}
    for target in targets:
        url = target.url.reveal()
        if any(is_our_webhook(url, public_url, account) for account in routes):
            where = f"MAYFLY_PUBLIC_URL and {WEBHOOK_PATH}"
        elif host is not None and port and _place(url) in [(name, port) for name in _names_of(host)]:
            where = "MAYFLY_HOST and MAYFLY_PORT"
        else:
            continue
        yield f"forward {target.id}: its url is that of Mayfly itself, {where}: set it to the URL of your app"


def _place(url: str) -> tuple[str | None, int]:
    parts = urlsplit(url)
    return parts.hostname, parts.port or _PORTS[parts.scheme]


def _names_of(host: str) -> frozenset[str]:
    """Return the names by which what listens at *host* is reached on its own machine."""
    if host in _EVERY_ADDRESS:
        return _LOOPBACK
    return frozenset({host, "localhost"}) if host in _LOOPBACK else frozenset({host.lower()})
