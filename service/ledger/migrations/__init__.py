"""The steps that bring the ledger's tables to the form of this release, run by Alembic."""
