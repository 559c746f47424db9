"""Redis and arq: the connection, enqueueing jobs, the embedded server."""
