"""The query of a request, with the lists and single values that the API accepts.

Source: sync.so API reference, "List generations": lists are separated by commas. The Python SDK repeats the name
(``ids=a&ids=b``). The TypeScript SDK sends JSON (``ids=["a","b"]``); what the API does with it is unknown, and here it
is refused, because an empty list or a list without its filter would mislead whoever deletes what is listed.
"""

from collections.abc import Iterable
from datetime import UTC, datetime
from urllib.parse import parse_qsl
from uuid import UUID

from service.simulator.answers import invalid


class Query:
    """Values by name. Each method raises RefusedError, a 400 that names the field."""

    def __init__(self, text: str) -> None:
        self._values: dict[str, list[str]] = {}
        for name, value in parse_qsl(text, keep_blank_values=True):
            self._values.setdefault(name, []).append(value)

    def one(self, name: str) -> str | None:
        values = self._values.get(name)
        if values is None:
            return None
        if len(values) > 1 or not values[0]:
            raise invalid(name, f"{name} must be one value")
        return values[0]

    def several(self, name: str, *, known: Iterable[str] | None = None) -> frozenset[str] | None:
        """Return the values of repeated and comma-separated *name*, each one of *known*; None if it is not there."""
        if name not in self._values:
            return None
        found = [part.strip() for value in self._values[name] for part in value.split(",")]
        if found[0].startswith("["):
            raise invalid(name, f"{name} must be a list separated by commas, not JSON")
        if not all(found):
            raise invalid(name, f"{name} has an empty value")
        if known is not None and (unknown := set(found) - set(known)):
            raise invalid(
                name, f"each value in {name} must be one of {', '.join(sorted(known))}, not {min(unknown)[:40]}"
            )
        return frozenset(found)

    def integer(self, name: str, *, low: int, high: int) -> int | None:
        text = self.one(name)
        if text is None:
            return None
        if not (text.isascii() and text.isdecimal() and len(text) < 10 and low <= int(text) <= high):
            raise invalid(name, f"{name} must be a whole number from {low} to {high}")
        return int(text)

    def flag(self, name: str) -> bool:
        """Return a boolean; false if it is not there."""
        text = self.one(name)
        if text not in (None, "true", "false"):
            raise invalid(name, f"{name} must be true or false")
        return text == "true"

    def uuid(self, name: str) -> str | None:
        text = self.one(name)
        if text is not None and not is_uuid(text):
            raise invalid(name, f"{name} must be a UUID")
        return text

    def instant(self, name: str) -> datetime | None:
        text = self.one(name)
        if text is None:
            return None
        try:
            instant = datetime.fromisoformat(text)
        except ValueError:
            raise invalid(name, f"{name} must be an ISO 8601 date") from None
        return instant if instant.tzinfo else instant.replace(tzinfo=UTC)


def is_uuid(text: str) -> bool:
    try:
        return str(UUID(text)) == text.lower()
    except ValueError:
        return False
