"""Errors whose text is shown to the operator."""


class ExplainedError(Exception):
    """An error whose text tells the operator what is wrong and what to do."""
