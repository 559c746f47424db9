"""What POST /v2/generate accepts, and what is wrong with the rest: every problem with the name of its field.

Source: sync.so API reference, "Create generation", and the types of the Python SDK. Whether the API checks more at once
or rejects the generation later is unknown.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import msgspec

from service.simulator.answers import RefusedError, invalid
from service.simulator.forms import Form
from service.simulator.generation import MODELS
from service.simulator.query import is_uuid

INPUT_TYPES = ("video", "image", "audio", "text")
_JSON_FIELDS = ("input", "options", "segments")
_TEXTS = ("model", "webhookUrl", "projectId", "outputFileName")
Problem = tuple[str, str]  # the field and the message


@dataclass(frozen=True, slots=True)
class NewGeneration:
    """A valid request to create a generation; parts that are unknown stay as they were sent."""

    model: str
    input: list[dict[str, object]]
    options: dict[str, object] = field(default_factory=dict)
    segments: list[object] | None = None
    webhook_url: str | None = None
    project_id: str | None = None
    output_file_name: str | None = None


def decode_json(text: bytes | str, name: str) -> Any:  # noqa: ANN401 - any JSON
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as exc:
        raise invalid(name, f"{name} is not JSON: {exc}") from exc


def form_values(form: Form) -> dict[str, object]:
    """Return the JSON body that the texts of a multipart form stand for; *input* may be repeated."""
    values: dict[str, object] = {name: text for name in _TEXTS if (text := form.text(name)) is not None}
    for name in _JSON_FIELDS:
        if texts := form.texts.get(name):
            parts = [decode_json(text, name) for text in texts]
            values[name] = parts[0] if len(parts) == 1 else parts
    if isinstance(values.get("input"), dict):
        values["input"] = [values["input"]]
    return values


def read_creation(value: object) -> NewGeneration:
    """Read a decoded body. Raises: RefusedError, a 400 with every problem, that names the first field."""
    if not isinstance(value, dict):
        raise invalid("body", "the body must be a JSON object")
    if problems := list(_problems(value)):
        raise invalid(problems[0][0], *(message for _, message in problems))
    return NewGeneration(
        model=value["model"],
        input=value["input"],
        options=value.get("options") or {},
        segments=value.get("segments"),
        webhook_url=value.get("webhookUrl"),
        project_id=value.get("projectId"),
        output_file_name=value.get("outputFileName"),
    )


def problems_of(value: object) -> list[str]:
    """Return what is wrong with a decoded body."""
    try:
        read_creation(value)
    except RefusedError as refused:
        messages: list[str] = msgspec.json.decode(refused.answer.body)["message"]
        return messages
    return []


def url_problem(value: object) -> str | None:
    """Return what is wrong with *value* as a URL that the API calls, or None."""
    try:
        parts = urlsplit(value) if isinstance(value, str) and " " not in value else None
        is_url = parts is not None and parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        is_url = False
    return None if is_url else "must be a URL with http or https"


def _problems(value: Mapping[str, Any]) -> Iterator[Problem]:
    model = value.get("model")
    if model not in MODELS:
        yield "model", f"model must be one of {', '.join(MODELS)}"
    if value.get("webhookUrl") is not None and (problem := url_problem(value["webhookUrl"])):
        yield "webhookUrl", f"webhookUrl {problem}"
    project_id = value.get("projectId")
    if project_id is not None and not (isinstance(project_id, str) and is_uuid(project_id)):
        yield "projectId", "projectId must be a UUID"
    if not isinstance(value.get("outputFileName"), str | None):
        yield "outputFileName", "outputFileName must be a string"
    if not isinstance(value.get("options"), dict | None):
        yield "options", "options must be an object"
    yield from _input_problems(value.get("input"), model)
    yield from _segment_problems(value.get("segments"))


def _input_problems(inputs: object, model: object) -> Iterator[Problem]:
    if not isinstance(inputs, list) or not inputs:
        yield "input", "input must be a list with at least one item"
        return
    for number, item in enumerate(inputs):
        name = f"input[{number}]"
        kind = item.get("type") if isinstance(item, dict) else None
        if kind not in INPUT_TYPES:
            yield f"{name}.type", f"{name}.type must be one of {', '.join(INPUT_TYPES)}"
        elif kind == "text":
            yield from _speech_problems(name, item.get("provider"))
        elif kind == "image" and model != "sync-3":
            yield f"{name}.type", f"{name}.type image needs the model sync-3"
        elif item.get("url") is None and not isinstance(item.get("assetId"), str):
            yield f"{name}.url", f"{name}.url or {name}.assetId must be there"
        elif item.get("url") is not None and (problem := url_problem(item["url"])):
            yield f"{name}.url", f"{name}.url {problem}"


def _speech_problems(name: str, provider: object) -> Iterator[Problem]:
    wanted = ("name", "voiceId", "script")
    if not isinstance(provider, dict) or not all(isinstance(provider.get(part), str) for part in wanted):
        yield f"{name}.provider", f"{name}.provider must have the strings {', '.join(wanted)}"


def _segment_problems(segments: object) -> Iterator[Problem]:
    if segments is None:
        return
    if not isinstance(segments, list):
        yield "segments", "segments must be a list"
        return
    for number, segment in enumerate(segments):
        name = f"segments[{number}]"
        times = [segment.get("startTime"), segment.get("endTime")] if isinstance(segment, dict) else []
        if not times or not all(isinstance(time, int | float) and not isinstance(time, bool) for time in times):
            yield name, f"{name} must have the numbers startTime and endTime"
        elif not isinstance(segment.get("audioInput"), dict) or not isinstance(segment["audioInput"].get("refId"), str):
            yield f"{name}.audioInput", f"{name}.audioInput must have the string refId"
