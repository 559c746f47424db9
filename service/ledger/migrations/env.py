"""Alembic's entry point: runs the steps on the connection that service.ledger.migrating hands over."""

from alembic import context

from service.ledger.delivery_schema import deliveries

context.configure(
    connection=context.config.attributes["connection"],
    # All tables are in it, once both modules of the schema are imported.
    target_metadata=deliveries.metadata,
    transactional_ddl=True,
)
context.run_migrations()
