"""The ledger, the truth about every record: SQLAlchemy Core on SQLite or PostgreSQL.

All statements are functions of a Connection, in modules by what they serve (receiving, cleaning, reading, history);
``Database.write`` and ``Database.read`` run them in a transaction.
"""
