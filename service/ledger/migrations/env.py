"""Alembic's entry point: runs the steps on the connection that service.ledger.migrating hands over."""

from alembic import context

from service.ledger.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    transactional_ddl=True,
)
context.run_migrations()
