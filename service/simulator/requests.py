"""One request to the API: its place in the log of calls, its headers and its body."""

from collections.abc import Sequence
from dataclasses import dataclass

from service.simulator.calls import Call
from service.simulator.query import Query


@dataclass(frozen=True, slots=True)
class Request:
    call: Call
    headers: Sequence[tuple[bytes, bytes]]
    body: bytes = b""

    @property
    def id(self) -> str:
        """The id in the path, of a generation, a batch or an asset."""
        return self.call.generation_id

    @property
    def query(self) -> Query:
        return Query(self.call.query)

    def header(self, name: bytes) -> str | None:
        """Return the header with the lower-case *name*; of several the last."""
        values = self.header_values(name)
        return values[-1] if values else None

    def header_values(self, name: bytes) -> list[str]:
        return [value.decode("latin-1") for key, value in self.headers if key == name]
