"""The tables of the ledger after the newest migration, the same on SQLite and PostgreSQL."""

from collections.abc import Iterable
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    ColumnElement,
    Date,
    Float,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    and_,
    bindparam,
    literal_column,
)

from service.core.key import Key
from service.ledger.instant import Instant

metadata = MetaData(
    naming_convention={
        "pk": "%(table_name)s_pk",
        "ix": "%(table_name)s_%(column_0_N_name)s",
        "uq": "%(table_name)s_%(column_0_N_name)s",
    }
)

records = Table(
    "records",
    metadata,
    # Never reused: a claim of a record that was removed must not match another record.
    Column("seq", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("account", String(64), nullable=False),
    Column("id", String(255), nullable=False),
    Column("state", String(16), nullable=False),
    Column("outcome", String(16)),
    # The generation as sync.so describes it: from the webhook, then from the copy. JSON parts are stored as received.
    Column("status", String(64), nullable=False),
    Column("model", Text),
    Column("created_at", Text),
    Column("output_url", Text),
    Column("output_media_url", Text),
    Column("segment_output_url", Text),
    Column("synthesized_audio_url", Text),
    Column("output_duration", Float),
    Column("output_file_name", Text),
    Column("project_id", Text),
    Column("source", Text),
    Column("webhook_url", Text),
    Column("error", Text),
    Column("error_code", Text),
    Column("receipt", Text),
    Column("received_at", Instant, nullable=False),
    # Where the ttl begins: the signed send time of the webhook, not after its receipt.
    Column("sent_at", Instant, nullable=False),
    Column("due_at", Instant),
    Column("copied_at", Instant),
    Column("deleted_at", Instant),
    # When a worker must act next: the next attempt of a scheduled record, the end of the lease of one in deleting,
    # NULL for all others.
    Column("wake_at", Instant),
    # When the early look at the API is due, NULL once it is over; and how often it failed.
    Column("look_at", Instant),
    Column("looks", Integer, nullable=False, server_default="0"),
    Column("attempts", Integer, nullable=False, server_default="0"),
    # The attempt that made the copy: after it the DELETE may be in progress, and it is too late to stop it.
    Column("copied_attempt", Integer),
    # The attempt that may have sent a DELETE whose answer is not known: it explains a later generation_not_found.
    Column("unanswered_attempt", Integer),
    # The UTC day on which it was counted against MAYFLY_MAX_DELETES_PER_DAY: once a day, however many attempts.
    Column("counted_on", Date),
    Column("failing_since", Instant),
    Column("failures", Integer, nullable=False, server_default="0"),
    Column("refusals", Integer, nullable=False, server_default="0"),
    Column("last_error", Text),
    Column("rule", Text, nullable=False),
    Column("ttl_seconds", BigInteger),
    Column("hold_by", Text),
    Column("hold_reason", Text),
    Column("hold_until", Instant),
    # When its personal data were removed; see forgetting.
    Column("forgotten_at", Instant),
    # The target that has not taken its webhook: the record is not deleted before, or it failed because of that.
    Column("waits_for", String(64)),
    # What may be large comes last: SQLite reads through it to whatever is behind.
    Column("input", Text),
    Column("options", Text),
    Column("segments", Text),
    # The bodies as received, so that fields unknown today are not lost. No webhook told of a record that was adopted,
    # and one that was forgotten has neither.
    Column("notification", Text),
    Column("copy", Text),
    # One record per account and generation, however many processes insert at once.
    Index("records_account_id", "account", "id", unique=True),
    # Pages are newest first, over all records or those in one state.
    Index("records_received_at", "received_at", "seq"),
    Index("records_state_received_at", "state", "received_at", "seq"),
    sqlite_autoincrement=True,
)


def _index(name: str, *columns: Column[Any], where: ColumnElement[bool]) -> None:
    """Add an index of the records *where* that is true."""
    Index(name, *columns, sqlite_where=where, postgresql_where=where)


_c = records.c
# One index entry shows the next due record of an account. Without the state in the index, SQLite sorts all scheduled
# rows; without the account, a worker would read through another account's backlog.
_index("records_account_state_wake_at", _c.account, _c.state, _c.wake_at, where=_c.wake_at.is_not(None))
_index("records_account_look_at", _c.account, _c.look_at, where=_c.look_at.is_not(None))
_index("records_hold_until", _c.hold_until, where=_c.hold_until.is_not(None))
# Nearly all records are COMPLETED, and a page of those needs no index.
_is_rarer = _c.status != literal_column("'COMPLETED'")
_index("records_status_received_at", _c.status, _c.received_at, _c.seq, where=_is_rarer)
_index("records_project_id_received_at", _c.project_id, _c.received_at, _c.seq, where=_c.project_id.is_not(None))
# The pages of what is due, or was deleted, within some time.
_index("records_due_at", _c.due_at, _c.received_at, _c.seq, where=_c.due_at.is_not(None))
_index("records_deleted_at", _c.deleted_at, _c.received_at, _c.seq, where=_c.deleted_at.is_not(None))
# What is to be forgotten, for each rule, as it may have a time of its own. A forgotten record leaves it.
_is_left = and_(_c.deleted_at.is_not(None), _c.forgotten_at.is_(None))
_index("records_rule_deleted_at", _c.rule, _c.deleted_at, where=_is_left)


# Some ids of one account. By account, because for pairs of account and id SQLite reads the whole index.
KEYS_OF_ACCOUNT = and_(records.c.account == bindparam("account"), records.c.id.in_(bindparam("ids", expanding=True)))


def group_by_account(keys: Iterable[Key]) -> list[dict[str, Any]]:
    """Return the values for ARE_ASKED_FOR, one set for each account of *keys*."""
    ids: dict[str, list[str]] = {}
    for key in keys:
        ids.setdefault(key.account, []).append(key.id)
    return [{"account": account, "ids": mine} for account, mine in sorted(ids.items())]


# The audit trail: one row per move; seq counts from 1 within the record. Rows are never changed, but a record that is
# forgotten loses the free text of their details.
events = Table(
    "events",
    metadata,
    Column("record", BigInteger, primary_key=True, autoincrement=False),
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("at", Instant, nullable=False),
    Column("move", String(16), nullable=False),
    Column("actor", Text, nullable=False),
    Column("detail", Text),
    sqlite_with_rowid=False,
)

# What the webhookUrl calls the generation by: ``label.customer=acme``.
labels = Table(
    "labels",
    metadata,
    Column("record", BigInteger, primary_key=True, autoincrement=False),
    Column("name", String(64), primary_key=True),
    Column("value", Text, nullable=False),
    Index("labels_name_value", "name", "value", "record"),
    sqlite_with_rowid=False,
)

# Finished batches: their webhooks name no generation, so that a worker has to find those; see batches.
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
    # The query of its webhook's request, which no signature covers.
    Column("request_query", Text),
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

# Holds of generations without a record; receive() and the claim read them.
holds = Table(
    "holds",
    metadata,
    Column("account", String(64), primary_key=True),
    Column("id", String(255), primary_key=True),
    Column("at", Instant, nullable=False),
    Column("actor", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("until", Instant),
)

# The pauses of an account's deletions; see pausing.Kind.
pauses = Table(
    "pauses",
    metadata,
    Column("account", String(64), primary_key=True),
    Column("kind", String(32), primary_key=True),
    Column("since", Instant, nullable=False),
    Column("actor", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("until", Instant),
)

# What the API keys in use have shown; key_id is the start of a hash of the key.
keys = Table(
    "keys",
    metadata,
    Column("account", String(64), primary_key=True),
    Column("key_id", String(16), primary_key=True),
    # The API showed it a generation, or an operator resumed.
    Column("is_trusted", Boolean, nullable=False),
    Column("unknown", Integer, nullable=False),
)

# The number of deletions on each UTC day, counted before the DELETE is sent.
tallies = Table(
    "tallies",
    metadata,
    Column("account", String(64), primary_key=True),
    Column("day", Date, primary_key=True),
    Column("deletes", Integer, nullable=False),
)

# When something was last seen; see heartbeats.
heartbeats = Table(
    "heartbeats",
    metadata,
    Column("name", String(80), primary_key=True),
    Column("at", Instant, nullable=False),
)
