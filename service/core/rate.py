"""A rate of calls."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rate:
    """*calls* in each period of *seconds*."""

    calls: int
    seconds: int
