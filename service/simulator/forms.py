"""Multipart forms, as the SDKs and browsers send them."""

import io
from dataclasses import dataclass

import multipart

from service.simulator.answers import RefusedError, error
from service.simulator.requests import Request


@dataclass(frozen=True, slots=True)
class Upload:
    name: str
    content: bytes


@dataclass(frozen=True, slots=True)
class Form:
    """The fields' texts and the files, by field name; each list is in the order of the parts."""

    texts: dict[str, list[str]]
    files: dict[str, list[Upload]]

    def text(self, name: str) -> str | None:
        """Return the last text of a field; None if it is not there or empty."""
        return (self.texts.get(name) or [""])[-1] or None


def is_form(request: Request) -> bool:
    return (request.header(b"content-type") or "").lower().startswith("multipart/form-data")


def read_form(request: Request) -> Form:
    """Read the multipart body of *request*. Raises: RefusedError if it is none."""
    _, options = multipart.parse_options_header(request.header(b"content-type") or "")
    form = Form({}, {})
    try:
        for part in multipart.MultipartParser(io.BytesIO(request.body), options.get("boundary", "")):
            if part.filename or part.name in ("video", "audio"):
                form.files.setdefault(part.name, []).append(Upload(part.filename or part.name, part.raw))
            else:
                form.texts.setdefault(part.name, []).append(part.value)
            part.close()
    except (multipart.MultipartError, UnicodeDecodeError, ValueError) as exc:
        raise RefusedError(error(400, f"the body is not a multipart form: {exc}", error="Bad Request")) from exc
    return form
