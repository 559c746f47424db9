"""What the outside sees of a running Mayfly: logs without secrets, and metrics."""

import contextlib
import logging
import re
import sys
from collections.abc import MutableMapping
from typing import Any, Final, TextIO, cast

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from service.values import LogFormat

# What stands behind these marks is not for readers of logs. Nothing of ours logs such a text; libraries might.
_SECRETS: Final = re.compile(r"(token=|whsec_|x-api-key['\"]?:\s*['\"]?|://[^/\s:@]*:)[^\s&\"'<>@,]+", re.IGNORECASE)


def configure_logging(log_format: LogFormat | None) -> None:
    """Send all logs, ours and the libraries', to standard error: JSON lines, or text for a terminal."""
    is_json = (log_format or ("console" if sys.stderr.isatty() else "json")) == "json"
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,  # before the masking, which sees texts only
        redact,
    ]
    renderer: Any = (
        structlog.processors.JSONRenderer()
        if is_json
        else structlog.dev.ConsoleRenderer(
            pad_event_to=30,
            exception_formatter=structlog.dev.plain_traceback,  # the pretty one shows local variables, secrets and all
        )
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
    """A stream that loses what cannot be written: a disk full under the log must stop neither webhook nor deletion."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        """Write *text*, or lose it."""
        with contextlib.suppress(OSError, ValueError):  # full, or closed
            self._stream.write(text)

    def flush(self) -> None:
        """Flush, or lose what waits."""
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()


def redact(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Mask what looks like a secret in the texts of a log event."""
    for name, value in event.items():
        event[name] = _masked(value)
    return event


def _masked(value: Any) -> Any:  # noqa: ANN401 - whatever is logged
    match value:
        case str():
            return _SECRETS.sub(r"\1…", value)
        case dict():
            return {name: _masked(one) for name, one in value.items()}
        case list() | tuple():
            return [_masked(one) for one in value]
        case _:
            return value


class Metrics:
    """The counters of one process, in a registry of their own. No label comes from outside; sets are closed."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.webhooks = self._counter("webhooks", "Webhooks received, by how they were answered.", "answer")
        self.signatures_refused = self._counter("signatures_refused", "Webhooks refused with 401, by why.", "reason")
        self.statuses_unknown = self._counter(
            "statuses_unknown", "Webhooks with a status this release does not know; they are ignored."
        )
        self.conflicts = self._counter(
            "conflicts", "Webhooks for a known generation with another body; the first is kept."
        )
        self.enqueue_failures = self._counter(
            "enqueue_failures", "Jobs that Redis did not take; the safety net enqueues them again."
        )
        self.attempts = self._counter(
            "attempts", "Attempts to delete a generation, by what the API's answer means.", "verdict"
        )
        self.api_calls = self._counter(
            "api_calls", "Calls to the Sync API, by method and status class.", "method", "status"
        )
        self.loops_failed = self._counter("loops_failed", "Rounds of a background loop that failed.", "loop")
        self.receive_seconds = Histogram(
            "mayfly_receive_seconds",
            "From the last byte of the first webhook of each commit to that commit being durable.",
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1, 5),
            registry=self.registry,
        )
        self.oldest_overdue_seconds = self._gauge(
            "oldest_overdue_seconds", "How long the longest waiting record is overdue, read from the ledger."
        )
        self.due_records = self._gauge("due_records", "Records whose time has come, read from the ledger.")
        self.failed_records = self._gauge("failed_records", "Records given up, which wait for a person.")
        self.ledger_up = self._gauge(
            "ledger_up", "Whether the ledger answered when it was last asked for these gauges."
        )
        self.pauses = self._gauge("pauses", "Reasons for which deletions are paused, 1 while it holds.", "kind")

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"mayfly_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"mayfly_{name}", text, labels, registry=self.registry)
