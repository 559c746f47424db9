"""What a second word about a known generation brings beside its retention: the webhook that came later, and labels.

A sweep, a batch or an app may have told of a generation before its own webhook does.
"""

from collections.abc import Sequence
from typing import Any, Final

from sqlalchemy import Connection, Row, Text, bindparam, case, func, update
from sqlalchemy.dialects import postgresql, sqlite

from service.core.generation import TERMINAL
from service.ledger.columns import GENERATION_COLUMNS, generation_values
from service.ledger.inserting import Arrival
from service.ledger.schema import labels, records

_HAS_ENDED: Final = records.c.status.in_(sorted(TERMINAL))
_complete = (
    update(records)
    .where(records.c.seq == bindparam("b_seq"))
    .values(
        notification=bindparam("b_notification", type_=Text),
        # What the API has shown of a generation that had ended stays.
        status=case((_HAS_ENDED, records.c.status), else_=bindparam("b_status")),
        **{
            name: case(
                (_HAS_ENDED, func.coalesce(records.c[name], bindparam(f"b_{name}", type_=records.c[name].type))),
                else_=func.coalesce(bindparam(f"b_{name}", type_=records.c[name].type), records.c[name]),
            )
            for name in GENERATION_COLUMNS
        },
    )
)
# It is known now, and has ended: what failed before says nothing any more, and the look brings the API's own.
_begin_again = (
    update(records)
    .where(records.c.seq == bindparam("b_seq"))
    .values(
        look_at=bindparam("b_at", type_=records.c.look_at.type),
        looks=0,
        failing_since=None,
        failures=0,
        refusals=0,
        last_error=None,
    )
)
_insert_label = {
    dialect.name: statement(labels).on_conflict_do_nothing(index_elements=["record", "name"])
    for dialect, statement in ((sqlite.dialect, sqlite.insert), (postgresql.dialect, postgresql.insert))
}


def is_first_webhook(arrival: Arrival, before: Row[Any]) -> bool:
    """Whether *arrival* is the first webhook of a record that something else has made.

    To one that was forgotten nothing is added.
    """
    return not arrival.is_adopted and before.notification is None and before.forgotten_at is None


def has_ended(before: Row[Any]) -> bool:
    """Whether a record is known to be of a generation that has ended; one that was added by its id may not be."""
    return before.status in TERMINAL


def complete_records(connection: Connection, pairs: Sequence[tuple[Arrival, Row[Any]]]) -> None:
    """Store what each arrival adds to the record that it finds, which is locked: its body, and labels.

    A label that is there keeps its value.
    """
    webhooks = [(arrival, before) for arrival, before in pairs if is_first_webhook(arrival, before)]
    if webhooks:
        connection.execute(_complete, [_values(arrival, before) for arrival, before in webhooks])
    if anew := [(arrival, before) for arrival, before in webhooks if not has_ended(before)]:
        connection.execute(_begin_again, [{"b_seq": row.seq, "b_at": one.received_at} for one, row in anew])
    rows = [
        {"record": before.seq, "name": name, "value": value}
        for arrival, before in pairs
        if before.forgotten_at is None and (arrival.is_added or is_first_webhook(arrival, before))
        for name, value in arrival.retention.labels.items()
    ]
    if rows:
        connection.execute(_insert_label[connection.dialect.name], rows)


def _values(arrival: Arrival, before: Row[Any]) -> dict[str, Any]:
    values = {f"b_{name}": value for name, value in generation_values(arrival.generation).items()}
    return values | {"b_seq": before.seq, "b_notification": arrival.body}
