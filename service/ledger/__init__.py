"""The ledger, the truth about every record: SQLAlchemy Core on SQLite or PostgreSQL.

All statements are functions of a Connection, in modules by purpose (receiving, claiming, settling, reading, history).
``Database.write`` and ``Database.read`` run them in a transaction.
"""
