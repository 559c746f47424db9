"""The table of faults in tests/README.md has every row, and every test that it names is there."""

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
ROW = re.compile(r"^\| (?P<number>[0-9]+) \| (?P<fault>[^|]+) \| (?P<tests>.+) \|$", re.MULTILINE)
NAMED = re.compile(r"`(?P<file>[a-z_0-9/]+\.py)` (?P<test>test_\w+)")


def table() -> dict[int, list[tuple[str, str]]]:
    """Return the files and tests of each row."""
    rows = ROW.finditer((TESTS / "README.md").read_text(encoding="utf-8"))
    return {int(row["number"]): NAMED.findall(row["tests"]) for row in rows}


def test_the_table_has_each_of_the_seventy_rows_with_at_least_one_test():
    rows = table()

    assert list(rows) == list(range(1, 71))
    assert all(rows.values())


def test_every_test_that_the_table_names_is_there():
    named = NAMED.findall((TESTS / "README.md").read_text(encoding="utf-8"))
    for file, name in named:
        source = (TESTS / file).read_text(encoding="utf-8")

        assert re.search(rf"^(async )?def {name}\(", source, re.MULTILINE), f"{file} has no {name}"


def test_every_test_that_the_text_names_is_there():
    named = set(re.findall(r"`(test_\w+)`", (TESTS / "README.md").read_text(encoding="utf-8")))
    source = "\n".join(path.read_text(encoding="utf-8") for path in TESTS.rglob("test_*.py"))

    assert len(named) >= 4
    assert {name for name in named if f"def {name}(" not in source} == set()
