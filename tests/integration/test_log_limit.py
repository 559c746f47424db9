"""Log lines that anyone can cause: the first of a kind at once, then one a window with the number of the others."""

import asyncio
import json
import time

import pytest

from service.runtime.log_limit import LogLimit
from service.runtime.logging import configure_logging
from service.web.refusals import Refusals


@pytest.fixture
def lines():
    """What was written: reason, number, seconds."""
    return []


@pytest.fixture
def limit():
    """A limit with windows of a tenth of a second."""
    limit = LogLimit(seconds=0.1)
    yield limit
    limit.close()


async def test_the_first_of_a_kind_is_written_at_once_and_the_others_counted(limit, lines):
    for number in range(1000):
        limit.note("a", f"no {number}", lambda *line: lines.append(line))
    at_once = list(lines)
    await asyncio.sleep(0.15)

    assert at_once == [("no 0", 1, 0)]
    assert lines[1:] == [("no 999", 999, 0.1)]


async def test_each_kind_has_its_own_line(limit, lines):
    for kind in "abab":
        limit.note(kind, kind, lambda *line: lines.append(line))

    assert lines == [("a", 1, 0), ("b", 1, 0)]


async def test_after_a_window_without_any_the_next_one_is_written_at_once(limit, lines):
    limit.note("a", "before", lambda *line: lines.append(line))
    await asyncio.sleep(0.15)
    limit.note("a", "after", lambda *line: lines.append(line))

    assert lines == [("before", 1, 0), ("after", 1, 0)]


async def test_a_flood_of_several_windows_is_one_line_in_each(limit, lines):
    begun = time.monotonic()
    for _ in range(35):
        limit.note("a", "flood", lambda *line: lines.append(line))
        await asyncio.sleep(0.01)
    windows = (time.monotonic() - begun) / 0.1
    limit.close()

    assert 3 <= len(lines) <= windows + 2
    assert sum(number for _, number, _ in lines) == 35


async def test_the_end_writes_what_is_counted_and_leaves_no_timer(lines):
    limit = LogLimit(seconds=0.05)
    for _ in range(3):
        limit.note("a", "x", lambda *line: lines.append(line))
    limit.close()
    await asyncio.sleep(0.1)

    assert lines == [("x", 1, 0), ("x", 2, 0.05)]


async def test_of_many_faults_one_traceback_is_logged_and_the_others_are_counted(metrics, capsys):
    configure_logging("json")
    refusals = Refusals(metrics, seconds=0.1)
    for number in range(100):
        try:
            _ = dict[int, int]()[number]
        except KeyError as error:
            await refusals.note_exception(error, {"method": "GET", "path_template": "/api/records"})
    await asyncio.sleep(0.15)
    refusals.close()

    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(line["event"], line["route"], line["number"]) for line in lines] == [
        ("request.crashed", "GET /api/records", 1),
        ("request.crashed", "GET /api/records", 99),
    ]
    assert ["Traceback" in line.get("exception", "") for line in lines] == [True, False]
