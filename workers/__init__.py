"""The side of Mayfly that deletes: an arq worker over the same ledger."""
