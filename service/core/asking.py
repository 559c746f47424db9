"""What an app asks for when it adds a generation by its id: the overrides and labels of a webhookUrl, by name."""

from collections.abc import Mapping

from service.core.labels import MAX_LABELS, check_label
from service.core.overrides import InvalidOverrideError, Overrides


def read_asked(
    *, ttl: str | None = None, expires: str | None = None, hold: str | None = None, labels: Mapping[str, str]
) -> Overrides:
    """Return what is asked for; nothing is decoded, and the values are read when the retention is decided.

    Raises: InvalidOverrideError for two of the three, and for a label that cannot be stored.
    """
    given = {"ttl": ttl, "expires": expires, "hold": hold}
    values = {name: value.strip() for name, value in given.items() if value is not None}
    if len(values) > 1:
        raise InvalidOverrideError(" and ".join(values), "", "at most one of ttl, expires and hold")
    for name, value in labels.items():
        if (advice := check_label(name, value)) is not None:
            raise InvalidOverrideError(f"label.{name}", value, advice)
    check_number(len(labels))
    return Overrides(values, dict(labels), is_ours=True)


def check_number(labels: int) -> None:
    """Refuse more labels than one generation can have.

    Raises: InvalidOverrideError.
    """
    if labels > MAX_LABELS:
        raise InvalidOverrideError("labels", "", f"there are more than {MAX_LABELS} labels")
