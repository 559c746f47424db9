"""${message}."""

import sqlalchemy as sa
from alembic import op

revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}


def upgrade() -> None:
    """Bring the tables from ${down_revision} to ${up_revision}; the code of both must be able to run on the result."""
    ${upgrades if upgrades else "pass"}
