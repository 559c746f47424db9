"""One asset, an uploaded input, as the Sync API shows it. It outlives the generations that use it.

Source: sync.so API reference, "Assets API", and the types of the Python SDK.
"""

from dataclasses import dataclass
from datetime import datetime

from service.simulator.generation import wire_instant

TYPES = ("AUDIO", "VIDEO", "IMAGE")
_FORMATS = {"AUDIO": "wav", "VIDEO": "mp4", "IMAGE": "png"}


@dataclass(frozen=True, slots=True)
class Asset:
    """An uploaded file; a key may delete only what *is_own*, the assets of its owner."""

    id: str
    created_at: datetime
    token: str
    url: str
    type: str
    name: str
    size: int = 0
    project_id: str | None = None
    is_own: bool = True

    @property
    def storage_url(self) -> str:
        return f"{self.url}/storage/assets/{self.id}/{self.type.lower()}.{_FORMATS[self.type]}?signature={self.token}"

    def body(self) -> dict[str, object]:
        return {
            "id": self.id,
            "createdAt": wire_instant(self.created_at),
            "updatedAt": wire_instant(self.created_at),
            "name": self.name,
            "url": self.storage_url,
            "size": self.size,
            "format": _FORMATS[self.type],
            "type": self.type,
            "inputType": "UPLOAD",
            "durationSeconds": None if self.type == "IMAGE" else 9.98,
            "thumbnailUrl": None,
            "visibility": "USER" if self.is_own else "ORGANIZATION",
            "width": None if self.type == "AUDIO" else 1280,
            "height": None if self.type == "AUDIO" else 720,
        }
