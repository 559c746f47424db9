"""Mayfly deletes sync.so generations once their time is up, after keeping a durable record of each."""

__version__ = "0.1.0"
