"""The options in the query of a URL: what is wrong with one is said by its name, and never by its value."""

from collections.abc import Collection, Iterable, Mapping
from urllib.parse import parse_qsl


class UrlOptionError(ValueError):
    """An option of a URL is not accepted; the text names it and what is accepted, and repeats no value."""


def parse_options(query: str) -> dict[str, str]:
    """Return the options of *query*, each once.

    Raises: ValueError.
    """
    try:
        pairs = parse_qsl(query, strict_parsing=bool(query), keep_blank_values=True)
    except ValueError:
        raise UrlOptionError("the query of the URL is malformed: it accepts name=value, joined by &") from None
    options = dict(pairs)
    if len(options) < len(pairs):
        raise UrlOptionError("an option of the URL is given twice")
    return options


def refuse_unknown(names: Iterable[str], known: Collection[str], refused: Mapping[str, str]) -> None:
    """Return if all *names* are *known*. Those *refused* are named, with what to do; another may be part of a password.

    Raises: UrlOptionError.
    """
    for name in sorted(set(names).difference(known)):
        if name in refused:
            raise UrlOptionError(f"the option {name} of the URL is not accepted: {refused[name]}")
        raise UrlOptionError(f"an option of the URL is not known: it accepts {', '.join(sorted(known))}")


def require_choice(options: Mapping[str, str], name: str, accepted: tuple[str, ...], reason: str = "") -> None:
    """Return if the option *name* is not given or one of *accepted*.

    Raises: UrlOptionError.
    """
    if name in options and options[name] not in accepted:
        raise UrlOptionError(f"the option {name} of the URL accepts {' or '.join(accepted)}{reason}")


def require_number(options: Mapping[str, str], name: str) -> None:
    """Return if the option *name* is not given or a whole number of up to six digits.

    Raises: UrlOptionError.
    """
    text = options.get(name, "0")
    if not (text.isascii() and text.isdecimal() and len(text) <= 6):
        raise UrlOptionError(f"the option {name} of the URL accepts a whole number")
