"""A text that logs, errors and reprs do not show."""

from hashlib import sha256


class Secret:
    """A text that only reveal() shows."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        """Return the text, for the wire and nothing else."""
        return self._text

    def identify(self) -> str:
        """Return a short hash that tells one secret from another and does not show it."""
        return sha256(self._text.encode()).hexdigest()[:16]

    def __repr__(self) -> str:
        return "Secret(…)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._text == self._text

    def __hash__(self) -> int:
        return hash(self._text)
