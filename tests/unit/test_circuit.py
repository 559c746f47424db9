"""The circuit breaker of a target: when it opens, what it lets through, and when it closes."""

from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from service.core.circuit import FAILURES, PROBE_EVERY, Circuit

NOW = datetime(2026, 11, 28, 12, tzinfo=UTC)
SECOND = timedelta(seconds=1)


def opened(at=NOW):
    circuit = Circuit()
    for _ in range(FAILURES):
        circuit.note_failure(at)
    return circuit


def test_a_new_circuit_is_closed_and_allows_all():
    circuit = Circuit()

    assert not circuit.is_open
    assert all(circuit.begin(NOW) for _ in range(100))


def test_it_opens_with_the_tenth_failure_in_a_row_and_says_so_once():
    circuit = Circuit()
    opened_now = [circuit.note_failure(NOW) for _ in range(15)]

    assert opened_now == [False] * 9 + [True] + [False] * 5
    assert circuit.is_open
    assert not circuit.allows(NOW)


def test_a_success_in_between_begins_the_count_anew():
    circuit = Circuit()
    for _ in range(5):
        for _ in range(FAILURES - 1):
            circuit.note_failure(NOW)
        assert not circuit.note_success()

    assert not circuit.is_open


def test_while_it_is_open_one_attempt_begins_each_half_minute():
    circuit = opened()
    begun = [seconds for seconds in range(100) if circuit.begin(NOW + seconds * SECOND)]

    assert begun == [30, 60, 90]


def test_asking_whether_it_allows_an_attempt_uses_none_up():
    circuit = opened()
    later = NOW + PROBE_EVERY

    assert all(circuit.allows(later) for _ in range(5))
    assert circuit.begin(later)
    assert not circuit.allows(later)


def test_the_first_success_closes_it_and_says_so():
    circuit = opened()

    assert circuit.note_success()
    assert not circuit.is_open
    assert circuit.begin(NOW)
    assert not circuit.note_success()


def test_a_late_failure_of_an_attempt_from_before_moves_no_probe():
    circuit = opened()
    circuit.note_failure(NOW + 29 * SECOND)

    assert circuit.begin(NOW + PROBE_EVERY)


def test_after_it_was_closed_ten_failures_open_it_again():
    circuit = opened()
    circuit.note_success()

    assert [circuit.note_failure(NOW) for _ in range(FAILURES)].index(True) == FAILURES - 1


@given(st.lists(st.tuples(st.sampled_from(["begin", "success", "failure"]), st.integers(0, 20)), max_size=80))
def test_it_is_open_exactly_after_ten_failures_in_a_row(steps):
    circuit, now, failures = Circuit(), NOW, 0
    for step, seconds in steps:
        now += seconds * SECOND
        if step == "begin":
            circuit.begin(now)
        elif step == "success":
            circuit.note_success()
            failures = 0
        else:
            circuit.note_failure(now)
            failures += 1

        assert circuit.is_open == (failures >= FAILURES)
        assert circuit.is_open or circuit.allows(now)


def test_a_begin_that_led_to_no_attempt_can_be_taken_back():
    circuit = opened()
    later = NOW + PROBE_EVERY
    assert circuit.begin(later)
    circuit.cancel(later)

    assert circuit.begin(later)
    assert not circuit.begin(later)


def test_taking_back_an_attempt_opens_no_circuit():
    circuit = Circuit()
    circuit.cancel(NOW)

    assert not circuit.is_open


def test_it_knows_for_how_long_it_has_been_open():
    circuit = opened()
    assert not circuit.is_open_for(PROBE_EVERY, NOW + 29 * SECOND)
    circuit.begin(NOW + PROBE_EVERY)
    circuit.note_failure(NOW + PROBE_EVERY)
    assert circuit.is_open_for(PROBE_EVERY, NOW + PROBE_EVERY)
    circuit.note_success()

    assert not circuit.is_open_for(0 * SECOND, NOW + PROBE_EVERY)


def test_a_clock_that_is_put_back_keeps_no_probe_waiting():
    circuit = opened()
    hour_before = NOW - timedelta(hours=1)

    assert circuit.begin(hour_before)
    assert not circuit.begin(hour_before)
    assert circuit.begin(hour_before + PROBE_EVERY)
