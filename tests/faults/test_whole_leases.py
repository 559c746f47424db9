"""Rows 14, 17 and 27 once more, with leases that end by themselves. The last of the fault tests: it takes a minute."""

import signal

from tests.faults.patience import Patience


def test_a_lease_whose_worker_is_gone_or_asleep_ends_by_itself_after_a_minute_and_no_sooner(whole_leases: Patience):
    found = whole_leases.found()

    # Whoever takes over looks every five seconds.
    assert {name: 0 <= late < 12 for name, late in found.pop("late").items()} == dict.fromkeys(
        ("looking", "deleting", "asleep"), True
    )
    assert found == {
        # The first DELETE of the one was done and never answered.
        "deletes": {"looking": [200], "deleting": [None], "asleep": [200]},
        "attempts": {"looking": 2, "deleting": 2, "asleep": 2},
        "outcomes": {"looking": "deleted", "deleting": "already_gone", "asleep": "deleted"},
        "is_overwritten": False,
        "exit_codes": [-signal.SIGKILL, None, None],
        "breaches": [],
    }
