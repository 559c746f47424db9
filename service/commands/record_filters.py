"""The options that say which records `mayfly records list` and `export` are about."""

from collections.abc import Callable
from datetime import UTC, datetime
from functools import wraps
from typing import Any, Final

import click

from service.core.instants import INSTANT_FORMS, parse_instant
from service.core.labels import parse_label
from service.core.lifecycle import State
from service.ledger.reading import Filter, Span


class _InstantType(click.ParamType[datetime]):
    """An instant, or a time from now on; *is_past* refuses a time to come, with which nothing would be found."""

    name = "time"

    def __init__(self, *, is_past: bool) -> None:
        self._is_past = is_past

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime:  # noqa: ANN401 - click's signature
        """Parse *value*, or fail with what is accepted."""
        if isinstance(value, datetime):
            return value
        now = datetime.now(UTC)
        try:
            found = parse_instant(value, now=now)
        except ValueError:
            self.fail(f"it accepts {INSTANT_FORMS}", param, ctx)
        if self._is_past and found > now:
            self.fail("it is a time to come, and this is about what has been: -1h is an hour ago", param, ctx)
        return found


class _LabelType(click.ParamType[tuple[str, str]]):
    """A label, NAME=VALUE."""

    name = "label"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:  # noqa: ANN401 - click's signature
        """Parse *value*, or fail with what is accepted."""
        try:
            return value if isinstance(value, tuple) else parse_label(value)
        except ValueError as error:
            self.fail(f"it accepts {error}", param, ctx)


PAST: Final = _InstantType(is_past=True)
ANY: Final = _InstantType(is_past=False)
LABEL: Final = _LabelType()
_OPTIONS: Final = (
    click.option("--state", type=click.Choice(list(State), case_sensitive=False), help="Only records in this state."),
    click.option("--account", metavar="NAME", help="Only records of this account."),
    click.option("--status", help="Only generations with this sync.so status, such as FAILED, in any case."),
    click.option("--project", help="Only generations of this project id, once the webhook or the copy names it."),
    click.option("--find", "text", help="Only those with this text in id, file name, model or error."),
    click.option("--label", "labels", type=LABEL, multiple=True, help="Only those with this label, NAME=VALUE."),
    click.option("--from", "received_from", type=PAST, help="Only what was received then or later, such as -1d."),
    click.option("--to", "received_to", type=ANY, help="Only what was received before."),
    click.option("--due-from", type=ANY, help="Only what is due then or later, such as 2026-12-31 or -1h."),
    click.option("--due-to", type=ANY, help="Only what is due before; 1h is in an hour."),
    click.option("--deleted-from", type=PAST, help="Only what was deleted then or later."),
    click.option("--deleted-to", type=ANY, help="Only what was deleted before."),
)


def filtered(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of a filter to *command*, which takes it as *wanted*."""

    @wraps(command)
    def call(
        *,
        state: State | None,
        account: str | None,
        status: str | None,
        project: str | None,
        text: str | None,
        labels: tuple[tuple[str, str], ...],
        received_from: datetime | None,
        received_to: datetime | None,
        due_from: datetime | None,
        due_to: datetime | None,
        deleted_from: datetime | None,
        deleted_to: datetime | None,
        **others: object,
    ) -> None:
        received, due = Span(received_from, received_to), Span(due_from, due_to)
        deleted = Span(deleted_from, deleted_to)
        wanted = Filter(state, status, project, received, due, deleted, text, dict(labels), account)
        command(wanted=wanted, **others)

    for option in reversed(_OPTIONS):
        call = option(call)
    return call
