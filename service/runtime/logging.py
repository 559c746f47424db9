"""Logs, ours and the libraries', without secrets."""

import contextlib
import logging
import re
import sys
from collections.abc import MutableMapping
from typing import Any, Final, Literal, TextIO, cast

import structlog

# What follows these marks is secret. Mayfly logs no such text, but a library might.
_SECRETS: Final = re.compile(r"(token=|whsec_|x-api-key['\"]?:\s*['\"]?|://[^/\s:@]*:)[^\s&\"'<>@,]+", re.IGNORECASE)

_OF_SEVERAL_LINES: Final = frozenset({"exception", "stack"})


def configure_logging(log_format: Literal["console", "json"] | None) -> None:
    """Send all logs, ours and the libraries', to standard error: JSON lines, or text for a terminal."""
    is_json = (log_format or ("console" if sys.stderr.isatty() else "json")) == "json"
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,  # before the masking, which sees texts only
        redact,
    ]
    if is_json:
        renderer: Any = structlog.processors.JSONRenderer()
    else:
        shared.append(escape_controls)
        renderer = structlog.dev.ConsoleRenderer(
            pad_event_to=30,
            exception_formatter=structlog.dev.plain_traceback,  # the rich one shows local variables, secrets included
        )
    structlog.configure(
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.WriteLoggerFactory(cast("TextIO", _Lossy(sys.stderr))),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(cast("TextIO", _Lossy(sys.stderr)))
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)


class _Lossy:
    """A stream that drops what cannot be written: a full disk under the log must not stop webhooks or deletions."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        """Write *text*, or drop it."""
        with contextlib.suppress(OSError, ValueError):  # full, or closed
            self._stream.write(text)

    def flush(self) -> None:
        """Flush, or drop what is buffered."""
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()


def redact(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Mask whatever looks like a secret in a log event."""
    for name, value in event.items():
        event[name] = _mask(value)
    return event


def escape_controls(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Escape the control characters of all texts: the renderer for a terminal prints them as they are."""
    # Imported on demand: it loads rich, which logs in JSON do not need.
    from service.runtime.terminal import plain  # noqa: PLC0415

    for name, value in event.items():
        if isinstance(value, str):
            lines = value.split("\n") if name in _OF_SEVERAL_LINES else [value]
            event[name] = "\n".join(plain(line) for line in lines)
    return event


def _mask(value: Any) -> Any:  # noqa: ANN401 - whatever is logged
    match value:
        case str():
            return _SECRETS.sub(r"\1…", value)
        case dict():
            return {name: _mask(one) for name, one in value.items()}
        case list() | tuple():
            return [_mask(one) for one in value]
        case _:
            return value
