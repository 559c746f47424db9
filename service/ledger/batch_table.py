"""The table of finished batches: their webhooks name no generation, so that a worker has to find those; see batches."""

from sqlalchemy import BigInteger, Column, Index, Integer, String, Table, Text

from service.ledger.schema import Instant, metadata

batches = Table(
    "batches",
    metadata,
    Column("account", String(64), primary_key=True),
    Column("id", String(255), primary_key=True),
    Column("state", String(16), nullable=False),
    Column("status", String(64), nullable=False),
    Column("created_at", Instant),
    Column("received_at", Instant, nullable=False),
    # The signed send time of its webhook, where the ttl of its generations begins.
    Column("sent_at", Instant, nullable=False),
    Column("webhook_url", Text),
    Column("output_url", Text),
    # When a worker must look at it next, or the end of the lease of the one that does; NULL once that is over.
    Column("look_at", Instant),
    Column("tries", Integer, nullable=False, server_default="0"),
    # How long it has waited between failed looks, in all.
    Column("waited_seconds", BigInteger, nullable=False, server_default="0"),
    Column("resolved_at", Instant),
    # How many generations: it says that it has; got their record from it; had one already; were never made.
    Column("expected", Integer),
    Column("scheduled", Integer, nullable=False, server_default="0"),
    Column("known", Integer, nullable=False, server_default="0"),
    Column("errors", Integer, nullable=False, server_default="0"),
    Column("unresolved", Integer),
    Column("source", String(16)),
    Column("last_error", Text),
    Column("notification", Text, nullable=False),
    Index("batches_received_at", "received_at"),
)
Index(
    "batches_account_look_at",
    batches.c.account,
    batches.c.look_at,
    sqlite_where=batches.c.look_at.is_not(None),
    postgresql_where=batches.c.look_at.is_not(None),
)
