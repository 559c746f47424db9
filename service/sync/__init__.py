"""The client of the sync.so API."""
