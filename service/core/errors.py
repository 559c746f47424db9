"""Errors that are told to people as they are."""


class ExplainedError(Exception):
    """An error whose text is a sentence for the operator: what is wrong, and what to do about it."""
