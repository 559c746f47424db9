"""The bodies that the control routes take and give."""

from datetime import datetime
from typing import Annotated, Any, Literal

import msgspec

from service.simulator.calls import Call
from service.simulator.creation import url_problem
from service.simulator.faults import Plan
from service.simulator.generation import STATUSES

Seconds = Annotated[float, msgspec.Meta(ge=0)]


def decode(body: bytes, kind: Any) -> Any:  # noqa: ANN401 - an instance of *kind*
    """Read a JSON body as *kind*. Raises: ValueError that names the place, such as ``$[0].count``."""
    return msgspec.json.decode(body or b"null", type=kind)


def convert_field(name: str, value: object, kind: Any) -> Any:  # noqa: ANN401 - an instance of *kind*
    """Read the value of key *name*, which errors of msgspec do not name. Raises: ValueError that begins with it."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as exc:
        raise ValueError(f"{name}: {str(exc).partition(' - at ')[0]}") from None


class AddRequest(msgspec.Struct, forbid_unknown_fields=True):
    """The arguments of ``Organisation.add``, *count* times."""

    count: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] = 1
    generation_id: str | None = None
    status: str = "COMPLETED"
    text_input: bool = False
    model: str = "lipsync-2-pro"
    project_id: str | None = None
    webhook_url: str | None = None
    output_file_name: str | None = None
    created_at: datetime | None = None
    processing_seconds: Seconds | None = None
    webhook_copies: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 1
    source: str | None = None
    generation_source: str | None = "api"
    faults: dict[str, list[str]] = {}
    overrides: dict[str, object] = {}

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"status must be one of {', '.join(sorted(STATUSES))}")
        if self.webhook_url is not None and (problem := url_problem(self.webhook_url)):
            raise ValueError(f"webhook_url {problem}")
        for operation, faults in self.faults.items():
            Plan(None).script(operation, faults)


class AssetRequest(msgspec.Struct, forbid_unknown_fields=True):
    """The arguments of ``Organisation.add_asset``."""

    kind: Literal["AUDIO", "VIDEO", "IMAGE"] = "VIDEO"
    name: str = "take-07.mp4"
    size: Annotated[int, msgspec.Meta(ge=0)] = 0
    is_own: bool = True


class Script(msgspec.Struct, forbid_unknown_fields=True):
    """Faults for the next calls about one generation or, without an id, about any."""

    operation: str
    faults: list[str]
    generation_id: str | None = None

    def __post_init__(self) -> None:
        Plan(None).script(self.operation, self.faults)


class DeliverRequest(msgspec.Struct, forbid_unknown_fields=True):
    ids: list[str]
    copies: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 1


class CallPage(msgspec.Struct):
    next: int
    calls: list[Call]


class StateView(msgspec.Struct):
    """A generation as the API shows it, and what the API does not show."""

    generation: dict[str, object]
    source: str | None
    batch_id: str | None
    first_delete_at: datetime | None
    deleted_at: datetime | None
    held: int


class WebhookView(msgspec.Struct):
    body: str
    headers: dict[str, str]


class Summary(msgspec.Struct):
    existing: int
    deleted: int
    calls: dict[str, int]  # by "operation status"
    faults: dict[str, int]
    deliveries: dict[str, int]  # by status or error
    held: dict[str, int]  # by generation id
