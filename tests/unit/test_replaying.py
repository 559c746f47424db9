"""What a replay does to a delivery: a table of cases."""

from datetime import UTC, datetime, timedelta

import pytest

from service.core.forwarding import DeliveryState
from service.core.replaying import NotReplayedError, Replay, judge_replay, require_replayed, require_target

NOW = datetime(2026, 11, 28, 12, tzinfo=UTC)
BEFORE, LATER = NOW - timedelta(seconds=1), NOW + timedelta(seconds=1)
CASES = {
    "failed": (DeliveryState.FAILED, None, None, Replay.REPLAYED),
    "delivered": (DeliveryState.DELIVERED, None, None, Replay.REPLAYED),
    "waits for its next attempt": (DeliveryState.WAITING, LATER, None, Replay.ADVANCED),
    "due": (DeliveryState.WAITING, NOW, None, Replay.ALREADY),
    "an attempt is made": (DeliveryState.WAITING, LATER, LATER, Replay.ATTEMPTED),
    "its worker died": (DeliveryState.WAITING, BEFORE, BEFORE, Replay.ALREADY),
}


@pytest.mark.parametrize("case", CASES)
def test_what_a_replay_does_depends_on_state_and_lease(case):
    state, wake_at, leased_until, expected = CASES[case]

    assert judge_replay(state, wake_at, leased_until, is_configured=True, now=NOW) is expected
    assert judge_replay(state, wake_at, leased_until, is_configured=False, now=NOW) is Replay.NO_TARGET


def test_what_is_not_sent_again_is_refused_with_a_sentence():
    for result in (Replay.REPLAYED, Replay.ADVANCED, Replay.ALREADY):
        require_replayed(result, "app")

    with pytest.raises(NotReplayedError, match="an attempt at this delivery is being made now"):
        require_replayed(Replay.ATTEMPTED, "app")
    with pytest.raises(NotReplayedError, match="target app is not in MAYFLY_CONFIG"):
        require_replayed(Replay.NO_TARGET, "app")


def test_a_target_has_to_be_configured_if_one_is_named():
    require_target(None, {"app"})
    require_target("app", {"app"})

    with pytest.raises(NotReplayedError, match="target crm is not in MAYFLY_CONFIG"):
        require_target("crm", {"app"})
