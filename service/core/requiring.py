"""Required deliveries that are open: webhooks that a target has not taken, so that no generation is deleted before."""

from collections.abc import Sequence
from datetime import datetime

import msgspec

from service.core.forwarding import DeliveryState

# How many deliveries a reason names.
_NAMED = 3


class OpenDelivery(msgspec.Struct, frozen=True, gc=False):
    """A required delivery that has not succeeded; *id* is its Mayfly-Delivery, *seq* its number.

    *next_at* is its next attempt, None once it has failed; *error* says why the last one did not succeed.
    """

    seq: int
    id: str
    target: str
    state: DeliveryState
    received_at: datetime
    attempts: int
    next_at: datetime | None
    error: str | None

    @property
    def is_failed(self) -> bool:
        """Whether no further attempt follows by itself."""
        return self.state is DeliveryState.FAILED


def find_failed(found: Sequence[OpenDelivery]) -> list[OpenDelivery]:
    """Return those of *found* that need an operator."""
    return [one for one in found if one.is_failed]


def describe_failed(failed: Sequence[OpenDelivery]) -> str:
    """Say why a record is not deleted whose required deliveries *failed*, and what can be done; no full stop."""
    first = failed[0]
    ids = " ".join(one.id for one in failed[:_NAMED])
    others = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
    why = first.error or "no attempt succeeded"
    return (
        f"target {first.target} has not taken its webhook ({why}){others}; mayfly forwards replay {ids} sends it again"
    )
