"""The options that say which deliveries `mayfly forwards list` and `replay` are about."""

from collections.abc import Callable
from datetime import datetime
from functools import wraps
from typing import Final

import click

from service.commands.record_filters import ANY, PAST
from service.core.forwarding import DeliveryState
from service.ledger.delivery_reading import DeliveryFilter
from service.ledger.reading import Span

_STATES: Final = click.Choice([state.value for state in DeliveryState], case_sensitive=False)
_OPTIONS: Final = (
    click.option("--target", metavar="ID", help="Only deliveries to this [[forward]]."),
    click.option("--state", type=_STATES, help="Only deliveries in this state."),
    click.option("--generation", metavar="ID", help="Only webhooks of this generation, or of this batch."),
    click.option("--account", metavar="NAME", help="Only webhooks of this account."),
    click.option("--status", help="Only webhooks with this sync.so status, such as FAILED, in any case."),
    click.option("--since", type=PAST, help="Only webhooks received then or later, such as -1d."),
    click.option("--until", type=ANY, help="Only webhooks received before."),
)


def delivery_filters(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of a filter to *command*, which takes it as *wanted*."""

    @wraps(command)
    def call(
        *,
        target: str | None,
        state: str | None,
        generation: str | None,
        account: str | None,
        status: str | None,
        since: datetime | None,
        until: datetime | None,
        **others: object,
    ) -> None:
        of_state = None if state is None else DeliveryState(state)
        command(wanted=DeliveryFilter(target, of_state, generation, account, status, Span(since, until)), **others)

    for option in reversed(_OPTIONS):
        call = option(call)
    return call
