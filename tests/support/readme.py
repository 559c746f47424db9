"""The pages for users as data: their parts, tables and code blocks, so that tests hold them to the code or run them."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
REFERENCE = ROOT / "deploy" / "docs" / "reference.md"
TOUR = ROOT / "deploy" / "docs" / "contributing.md"
# Every page that users or contributors read.
PAGES = (
    README,
    ROOT / ".github" / "CONTRIBUTING.md",
    ROOT / "deploy" / "README.md",
    *sorted((ROOT / "deploy" / "docs").glob("*.md")),
)


def part(page: Path, heading: str) -> str:
    """Return the text under the second-level *heading* of *page*."""
    _, found, rest = page.read_text(encoding="utf-8").partition(f"\n## {heading}\n")
    assert found, f"{page.name} has no part {heading!r}"
    return rest.partition("\n## ")[0]


def rows(page: Path, heading: str) -> dict[str, list[str]]:
    """Return the rows of the tables under *heading*: the names in backticks of the first cell, with the other cells."""
    found: dict[str, list[str]] = {}
    for line in part(page, heading).splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("| `"):
            found |= dict.fromkeys(re.findall(r"`([^`]+)`", cells[0]), cells[1:])
    return found


def code(page: Path, language: str) -> list[str]:
    """Return the code blocks of *page* in *language*."""
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def code_with(page: Path, language: str, text: str) -> str:
    """Return the one code block of *page* that has *text* in it.

    Raises: ValueError when there is none, or more than one.
    """
    (found,) = [block for block in code(page, language) if text in block]
    return found


def anchors(page: Path) -> set[str]:
    """Return the anchors of the headings of *page*, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
