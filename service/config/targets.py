"""The targets that webhooks are forwarded to: from the rules file, with their secrets from the environment."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from service.config.rules_file import Forward
from service.core.forwarding import Target
from service.core.secret import Secret
from service.core.standard_webhooks import read_signing_key

_ACCEPTS = "whsec_ and the base64 of 24 to 64 random bytes, two of them separated by a comma while rotating"


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
