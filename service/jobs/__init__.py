"""Redis and arq: the connection, enqueueing, the embedded server."""
