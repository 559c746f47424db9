"""The worker, which deletes: arq jobs and a safety net over the ledger."""
