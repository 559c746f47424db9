"""SQLite: key_buffer and key_index instead of the unique index on account and id (see service/ledger/keys.py).

The code before this step cannot insert behind it: the trigger refuses its records, so that no key gets a second one.
"""

import sqlalchemy as sa
from alembic import op

from service.generation import Key
from service.ledger.keys import hash_of

revision = "0002"
down_revision = "0001"

_AT_ONCE = 10_000
_TRIGGER = """
CREATE TRIGGER records_need_a_key BEFORE INSERT ON records
WHEN NOT EXISTS (SELECT 1 FROM key_buffer WHERE seq = NEW.seq)
BEGIN SELECT RAISE(ABORT, 'a record whose key is not noted, by an older release perhaps'); END
"""


def upgrade() -> None:
    """Make the tables, and note the keys of all records."""
    connection = op.get_bind()
    if connection.dialect.name != "sqlite":
        return
    op.create_table(
        "key_buffer",
        sa.Column("seq", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("hash", sa.Integer, nullable=False),
    )
    index = op.create_table(
        "key_index",
        sa.Column("hash", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("seq", sa.Integer, primary_key=True, autoincrement=False),
        sqlite_with_rowid=False,
    )
    records = connection.execute(sa.text("SELECT seq, account, id FROM records"))
    for some in records.partitions(_AT_ONCE):
        rows = [{"hash": hash_of(Key(row.account, row.id)), "seq": row.seq} for row in some]
        connection.execute(sa.insert(index), rows)
    op.drop_index("records_account_id", "records")
    op.execute(_TRIGGER)
