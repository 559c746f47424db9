"""The ledger: records, their events and labels, batches, deliveries, holds, pauses, tallies and heartbeats."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_INSTANT = sa.BigInteger().with_variant(sa.DateTime(timezone=True), "postgresql")
_NUMBER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Make the tables."""
    _records()
    _beside_records()
    _batches()
    _deliveries()
    op.create_table(
        "pauses",
        sa.Column("account", sa.String(64), primary_key=True),
        sa.Column("kind", sa.String(32), primary_key=True),
        sa.Column("since", _INSTANT, nullable=False),
        sa.Column("actor", sa.Text, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("until", _INSTANT),
    )
    op.create_table(
        "keys",
        sa.Column("account", sa.String(64), primary_key=True),
        sa.Column("key_id", sa.String(16), primary_key=True),
        sa.Column("is_trusted", sa.Boolean, nullable=False),
        sa.Column("unknown", sa.Integer, nullable=False),
    )
    op.create_table(
        "tallies",
        sa.Column("account", sa.String(64), primary_key=True),
        sa.Column("day", sa.Date, primary_key=True),
        sa.Column("deletes", sa.Integer, nullable=False),
    )
    op.create_table(
        "heartbeats",
        sa.Column("name", sa.String(80), primary_key=True),
        sa.Column("at", _INSTANT, nullable=False),
    )


def _beside_records() -> None:
    op.create_table(
        "events",
        sa.Column("record", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("at", _INSTANT, nullable=False),
        sa.Column("move", sa.String(16), nullable=False),
        sa.Column("actor", sa.Text, nullable=False),
        sa.Column("detail", sa.Text),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "labels",
        sa.Column("record", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("value", sa.Text, nullable=False),
        sqlite_with_rowid=False,
    )
    op.create_index("labels_name_value", "labels", ["name", "value", "record"])
    op.create_table(
        "holds",
        sa.Column("account", sa.String(64), primary_key=True),
        sa.Column("id", sa.String(255), primary_key=True),
        sa.Column("at", _INSTANT, nullable=False),
        sa.Column("actor", sa.Text, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("until", _INSTANT),
    )


def _batches() -> None:
    op.create_table(
        "batches",
        sa.Column("account", sa.String(64), primary_key=True),
        sa.Column("id", sa.String(255), primary_key=True),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("status", sa.String(64), nullable=False),
        sa.Column("created_at", _INSTANT),
        sa.Column("received_at", _INSTANT, nullable=False),
        sa.Column("sent_at", _INSTANT, nullable=False),
        sa.Column("webhook_url", sa.Text),
        sa.Column("request_query", sa.Text),
        sa.Column("output_url", sa.Text),
        sa.Column("look_at", _INSTANT),
        sa.Column("tries", sa.Integer, nullable=False, server_default="0"),
        sa.Column("waited_seconds", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("resolved_at", _INSTANT),
        sa.Column("expected", sa.Integer),
        sa.Column("scheduled", sa.Integer, nullable=False, server_default="0"),
        sa.Column("known", sa.Integer, nullable=False, server_default="0"),
        sa.Column("errors", sa.Integer, nullable=False, server_default="0"),
        sa.Column("unresolved", sa.Integer),
        sa.Column("source", sa.String(16)),
        sa.Column("last_error", sa.Text),
        sa.Column("notification", sa.Text, nullable=False),
    )
    op.create_index("batches_received_at", "batches", ["received_at"])
    where = sa.text("look_at IS NOT NULL")
    op.create_index(
        "batches_account_look_at", "batches", ["account", "look_at"], sqlite_where=where, postgresql_where=where
    )


def _records() -> None:
    op.create_table(
        "records",
        sa.Column("seq", _NUMBER, primary_key=True, autoincrement=True),
        sa.Column("account", sa.String(64), nullable=False),
        sa.Column("id", sa.String(255), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("outcome", sa.String(16)),
        *_described(),
        sa.Column("receipt", sa.Text),
        sa.Column("received_at", _INSTANT, nullable=False),
        sa.Column("sent_at", _INSTANT, nullable=False),
        sa.Column("due_at", _INSTANT),
        sa.Column("copied_at", _INSTANT),
        sa.Column("deleted_at", _INSTANT),
        sa.Column("wake_at", _INSTANT),
        sa.Column("look_at", _INSTANT),
        sa.Column("looks", sa.Integer, nullable=False, server_default="0"),
        *_attempted(),
        sa.Column("rule", sa.Text, nullable=False),
        sa.Column("ttl_seconds", sa.BigInteger),
        sa.Column("hold_by", sa.Text),
        sa.Column("hold_reason", sa.Text),
        sa.Column("hold_until", _INSTANT),
        sa.Column("forgotten_at", _INSTANT),
        sa.Column("waits_for", sa.String(64)),
        sa.Column("input", sa.Text),
        sa.Column("options", sa.Text),
        sa.Column("segments", sa.Text),
        sa.Column("notification", sa.Text),
        sa.Column("copy", sa.Text),
        sqlite_autoincrement=True,
    )
    _indexes()


def _indexes() -> None:
    op.create_index("records_account_id", "records", ["account", "id"], unique=True)
    op.create_index("records_received_at", "records", ["received_at", "seq"])
    op.create_index("records_state_received_at", "records", ["state", "received_at", "seq"])
    for name, columns, condition in (
        ("records_account_state_wake_at", ["account", "state", "wake_at"], "wake_at IS NOT NULL"),
        ("records_account_look_at", ["account", "look_at"], "look_at IS NOT NULL"),
        ("records_hold_until", ["hold_until"], "hold_until IS NOT NULL"),
        ("records_status_received_at", ["status", "received_at", "seq"], "status != 'COMPLETED'"),
        ("records_project_id_received_at", ["project_id", "received_at", "seq"], "project_id IS NOT NULL"),
        ("records_due_at", ["due_at", "received_at", "seq"], "due_at IS NOT NULL"),
        ("records_deleted_at", ["deleted_at", "received_at", "seq"], "deleted_at IS NOT NULL"),
        ("records_rule_deleted_at", ["rule", "deleted_at"], "deleted_at IS NOT NULL AND forgotten_at IS NULL"),
    ):
        where = sa.text(condition)
        op.create_index(name, "records", columns, sqlite_where=where, postgresql_where=where)


def _attempted() -> list[sa.Column[Any]]:
    return [
        sa.Column("attempts", sa.Integer, nullable=False, server_default="0"),
        sa.Column("copied_attempt", sa.Integer),
        sa.Column("unanswered_attempt", sa.Integer),
        sa.Column("counted_on", sa.Date),
        sa.Column("failing_since", _INSTANT),
        sa.Column("failures", sa.Integer, nullable=False, server_default="0"),
        sa.Column("refusals", sa.Integer, nullable=False, server_default="0"),
        sa.Column("last_error", sa.Text),
    ]


def _described() -> list[sa.Column[Any]]:
    return [
        sa.Column("status", sa.String(64), nullable=False),
        sa.Column("model", sa.Text),
        sa.Column("created_at", sa.Text),
        sa.Column("output_url", sa.Text),
        sa.Column("output_media_url", sa.Text),
        sa.Column("segment_output_url", sa.Text),
        sa.Column("synthesized_audio_url", sa.Text),
        sa.Column("output_duration", sa.Float),
        sa.Column("output_file_name", sa.Text),
        sa.Column("project_id", sa.Text),
        sa.Column("source", sa.Text),
        sa.Column("webhook_url", sa.Text),
        sa.Column("error", sa.Text),
        sa.Column("error_code", sa.Text),
    ]


def _deliveries() -> None:
    op.create_table(
        "deliveries",
        sa.Column("seq", _NUMBER, primary_key=True, autoincrement=True),
        sa.Column("id", sa.String(36), nullable=False),
        sa.Column("target", sa.String(64), nullable=False),
        sa.Column("account", sa.String(64), nullable=False),
        sa.Column("generation", sa.String(255), nullable=False),
        sa.Column("status", sa.String(64), nullable=False),
        sa.Column("is_required", sa.Boolean, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False, server_default="0"),
        sa.Column("tries", sa.Integer, nullable=False, server_default="0"),
        sa.Column("received_at", _INSTANT, nullable=False),
        sa.Column("since", _INSTANT, nullable=False),
        sa.Column("wake_at", _INSTANT),
        sa.Column("leased_until", _INSTANT),
        sa.Column("finished_at", _INSTANT),
        sa.Column("last_status", sa.Integer),
        sa.Column("last_error", sa.Text),
        sa.Column("content_type", sa.Text, nullable=False),
        sa.Column("signature", sa.Text, nullable=False),
        sa.Column("digest", sa.LargeBinary(32), nullable=False),
        sa.Column("last_answer", sa.Text),
        sa.Column("body", sa.LargeBinary, nullable=False),
        sqlite_autoincrement=True,
    )
    _deliveries_indexes()
    _requirements()


def _deliveries_indexes() -> None:
    op.create_index("deliveries_id", "deliveries", ["id"], unique=True)
    of_webhook = ["target", "account", "generation", "digest"]
    op.create_index("deliveries_target_account_generation_digest", "deliveries", of_webhook, unique=True)
    op.create_index("deliveries_received_at", "deliveries", ["received_at", "seq"])
    of_page = ["target", "state", "received_at", "seq"]
    op.create_index("deliveries_target_state_received_at", "deliveries", of_page)
    op.create_index("deliveries_generation_account", "deliveries", ["generation", "account"])
    for columns in (["target", "wake_at"], ["target", "since"], ["target", "account", "generation", "seq"]):
        name, where = f"deliveries_waiting_{columns[1]}", sa.text("wake_at IS NOT NULL")
        op.create_index(name, "deliveries", columns, sqlite_where=where, postgresql_where=where)
    has_ended = sa.text("finished_at IS NOT NULL")
    op.create_index(
        "deliveries_finished_at", "deliveries", ["finished_at"], sqlite_where=has_ended, postgresql_where=has_ended
    )


def _requirements() -> None:
    op.create_table(
        "requirements",
        sa.Column("account", sa.String(64), primary_key=True),
        sa.Column("generation", sa.String(255), primary_key=True),
        sa.Column("delivery", sa.BigInteger, primary_key=True, autoincrement=False),
        sqlite_with_rowid=False,
    )
    op.create_index("requirements_delivery", "requirements", ["delivery"])
