"""The tables of forwarded webhooks after the newest migration, the same on SQLite and PostgreSQL."""

from sqlalchemy import BigInteger, Boolean, Column, Index, Integer, LargeBinary, String, Table, Text

from service.ledger.instant import Instant
from service.ledger.schema import metadata

# Webhooks on their way to targets: one row per webhook and target, committed with the webhook. A late target loses
# nothing, and the order of one generation's webhooks is that of seq.
deliveries = Table(
    "deliveries",
    metadata,
    Column("seq", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    # Mayfly-Delivery, by which the target tells what it has had.
    Column("id", String(36), nullable=False),
    Column("target", String(64), nullable=False),
    Column("account", String(64), nullable=False),
    # The id in the webhook, of a generation or of a batch, and its status.
    Column("generation", String(255), nullable=False),
    Column("status", String(64), nullable=False),
    Column("is_required", Boolean, nullable=False),
    Column("state", String(16), nullable=False),
    # All attempts, as Mayfly-Attempt counts them, and those from since on, which the schedule counts: a replay begins a
    # new one.
    Column("attempts", Integer, nullable=False, server_default="0"),
    Column("tries", Integer, nullable=False, server_default="0"),
    Column("received_at", Instant, nullable=False),
    # Where the time to give up begins: the receipt, or the last replay.
    Column("since", Instant, nullable=False),
    # The next attempt, or the end of the lease of the one that is made; NULL once it has ended.
    Column("wake_at", Instant),
    # The end of the lease of the attempt that is made, NULL while none is.
    Column("leased_until", Instant),
    Column("finished_at", Instant),
    Column("last_status", Integer),
    Column("last_error", Text),
    Column("content_type", Text, nullable=False),
    # The Sync-Signature as it came.
    Column("signature", Text, nullable=False),
    # SHA-256 of the body: sync.so's resend of the same webhook makes no second delivery.
    Column("digest", LargeBinary(32), nullable=False),
    Column("last_answer", Text),
    Column("body", LargeBinary, nullable=False),
    Index("deliveries_id", "id", unique=True),
    Index("deliveries_target_account_generation_digest", "target", "account", "generation", "digest", unique=True),
    Index("deliveries_received_at", "received_at", "seq"),
    # A page of some targets and states is merged from one range of this index for each.
    Index("deliveries_target_state_received_at", "target", "state", "received_at", "seq"),
    Index("deliveries_generation_account", "generation", "account"),
    sqlite_autoincrement=True,
)
_is_waiting = deliveries.c.wake_at.is_not(None)
for _columns in (("target", "wake_at"), ("target", "since"), ("target", "account", "generation", "seq")):
    Index(
        f"deliveries_waiting_{_columns[1]}",
        *(deliveries.c[name] for name in _columns),
        sqlite_where=_is_waiting,
        postgresql_where=_is_waiting,
    )

# What is to be removed some time after it has ended.
Index(
    "deliveries_finished_at",
    deliveries.c.finished_at,
    sqlite_where=deliveries.c.finished_at.is_not(None),
    postgresql_where=deliveries.c.finished_at.is_not(None),
)

# Which deliveries must have succeeded before a generation is deleted. It says what was asked for when the webhook came,
# not what the configuration says now; the generations of a batch get those of its webhook.
requirements = Table(
    "requirements",
    metadata,
    Column("account", String(64), primary_key=True),
    Column("generation", String(255), primary_key=True),
    Column("delivery", BigInteger, primary_key=True, autoincrement=False),
    Index("requirements_delivery", "delivery"),
    sqlite_with_rowid=False,
)
