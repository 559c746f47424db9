"""The labels of records: read with them, and filtered by."""

from collections.abc import Mapping, Sequence

from sqlalchemy import ColumnElement, Connection, bindparam, select

from service.ledger.schema import labels, records

_select_labels = (
    select(labels)
    .where(labels.c.record.in_(bindparam("seqs", expanding=True)))
    .order_by(labels.c.record, labels.c.name)
)


def read_labels(connection: Connection, seqs: Sequence[int]) -> dict[int, dict[str, str]]:
    """Return the labels of the records *seqs*; one without labels is left out."""
    found: dict[int, dict[str, str]] = {}
    if seqs:
        for record, name, value in connection.execute(_select_labels, {"seqs": list(seqs)}):
            found.setdefault(record, {})[name] = value
    return found


def has_labels(wanted: Mapping[str, str]) -> list[ColumnElement[bool]]:
    """Return what a record fulfils that has all *wanted* labels."""
    return [
        records.c.seq.in_(select(labels.c.record).where(labels.c.name == name, labels.c.value == value))
        for name, value in wanted.items()
    ]
