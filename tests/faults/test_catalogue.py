"""The table of faults in tests/README.md has every row, and every test that it names is there."""

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
ROW = re.compile(r"^\| (?P<number>[0-9]+) \| (?P<fault>[^|]+) \| (?P<tests>.+) \|$", re.MULTILINE)
FIELD_ROW = re.compile(r"^\| (?P<number>[A-K][0-9]+) \| (?P<fault>[^|]+) \| (?P<tests>.+) \|$", re.MULTILINE)
FIRE_ROW = re.compile(r"^\| (?P<number>U[0-9]+) \| (?P<fault>[^|]+) \| (?P<tests>.+) \|$", re.MULTILINE)
NAMED = re.compile(r"`(?P<file>[a-z_0-9/]+\.py)` (?P<test>test_\w+)")


def table() -> dict[int, list[tuple[str, str]]]:
    """Return the files and tests of each row."""
    rows = ROW.finditer((TESTS / "README.md").read_text(encoding="utf-8"))
    return {int(row["number"]): NAMED.findall(row["tests"]) for row in rows}


def field_table() -> dict[str, list[tuple[str, str]]]:
    """Return the files and tests of each row of the field tests."""
    rows = FIELD_ROW.finditer((TESTS / "README.md").read_text(encoding="utf-8"))
    return {row["number"]: NAMED.findall(row["tests"]) for row in rows}


def test_the_field_tests_of_this_release_have_at_least_one_test_each():
    rows = field_table()

    assert {"A1", "A2", "A3", "A5", "E1"} <= rows.keys()
    assert all(rows.values())


def test_each_row_under_fire_has_at_least_one_test():
    rows = list(FIRE_ROW.finditer((TESTS / "README.md").read_text(encoding="utf-8")))

    assert [row["number"] for row in rows] == [f"U{number}" for number in range(1, len(rows) + 1)]
    assert len(rows) >= 16
    assert all(NAMED.findall(row["tests"]) for row in rows)


def test_the_table_has_each_row_with_at_least_one_test():
    rows = table()

    assert list(rows) == list(range(1, len(rows) + 1))
    assert len(rows) >= 81
    assert all(rows.values())


def test_every_test_that_the_tables_name_is_there():
    for file, name in NAMED.findall((TESTS / "README.md").read_text(encoding="utf-8")):
        source = (TESTS / file).read_text(encoding="utf-8")

        assert re.search(rf"^(async )?def {name}\(", source, re.MULTILINE), f"{file} has no {name}"


def test_every_test_that_the_text_names_is_there():
    named = set(re.findall(r"`(test_\w+)`", (TESTS / "README.md").read_text(encoding="utf-8")))
    source = "\n".join(path.read_text(encoding="utf-8") for path in TESTS.rglob("test_*.py"))

    assert len(named) >= 4
    assert {name for name in named if f"def {name}(" not in source} == set()
