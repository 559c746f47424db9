"""Requests that are refused: counted each, and logged in a volume that no client can raise.

The first of a kind is logged at once, the others of a minute in one line. Kinds are reasons of signatures, statuses and
the server's own warnings. A verified webhook that is not stored is another matter: each is logged (``intake``).
"""

from typing import Any, Final, cast

import structlog
from litestar.exceptions import HTTPException

from service.core.overrides import WEBHOOK_PATH
from service.core.signature import SignatureError
from service.runtime.log_limit import WINDOW_SECONDS, LogLimit
from service.runtime.metrics import Metrics
from service.web.problems import plugin

log = structlog.get_logger()

_ANSWER_LABELS: Final = {404: "unknown_account", 413: "too_large", 415: "unsupported", 503: "unavailable"}


class Refusals:
    """Counts and logs what is refused; a window of time is a minute, unless *seconds* says otherwise."""

    def __init__(self, metrics: Metrics, *, seconds: float = WINDOW_SECONDS) -> None:
        self._metrics = metrics
        self._limit = LogLimit(seconds=seconds)

    def count_webhook(self, error: SignatureError | HTTPException) -> None:
        """Count a webhook that was refused before its signature was verified."""
        if isinstance(error, SignatureError):
            answer, kind, reason = "refused", str(error.reason), str(error)
        else:
            answer = _ANSWER_LABELS.get(error.status_code, "broken_off")
            kind, reason = str(error.status_code), error.detail
        self._metrics.webhooks.labels(answer).inc()

        def write(reason: str, number: int, seconds: float) -> None:
            log.warning("webhook.not_stored", reason=reason, number=number, seconds=seconds)

        self._limit.note(f"webhook {kind}", reason, write)

    def count_request(self, reason: str) -> None:
        """Count any other request that was refused; *reason* is of a closed set."""
        self._metrics.requests_refused.labels(reason).inc()

        def write(reason: str, number: int, seconds: float) -> None:
            log.warning("request.refused", reason=reason, number=number, seconds=seconds)

        self._limit.note(f"request {reason}", reason, write)

    async def note_exception(self, error: Exception, scope: Any) -> None:  # noqa: ANN401 - Litestar's hook
        """Count an error that is answered 4xx, and log what is answered with a 500; Litestar does not log its own."""
        status = cast("int", getattr(error, "status_code", 500))
        if status == 500 and type(error) not in plugin.config.exception_to_problem_detail_map:
            self.note_fault(error, f"{scope.get('method')} {scope.get('path_template')}")
        elif isinstance(error, HTTPException) and not _is_webhook(scope):
            self.count_request(str(status))

    def note_fault(self, error: BaseException, where: str = "after the answer began") -> None:
        """Log a fault of ours, the traceback of the first in a minute; *where* is of a closed set."""

        def write(reason: str, number: int, seconds: float) -> None:
            cause = error if number == 1 and not seconds else None  # the traceback once
            log.error("request.crashed", route=reason, number=number, seconds=seconds, exc_info=cause)

        self._limit.note(f"crash {type(error).__name__} {where}", where, write)

    def close(self) -> None:
        """Log the numbers of the last minute."""
        self._limit.close()


def _is_webhook(scope: dict[str, Any]) -> bool:
    """Whether the handler of webhooks was reached, which counts by itself."""
    path = scope.get("path_template") or ""
    return path.startswith(WEBHOOK_PATH) and scope.get("method") == "POST"
