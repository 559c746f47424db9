"""The commands in deploy/README.md, so that the tests run the same ones."""

import re
from pathlib import Path


def blocks(root: Path) -> list[str]:
    """Return the indented blocks of the page without their indent."""
    page = (root / "deploy" / "README.md").read_text(encoding="utf-8")
    found = re.findall(r"(?:^ {4}.*\n)+(?:\n+(?: {4}.*\n)+)*", page, re.MULTILINE)
    return [re.sub(r"^ {4}", "", block, flags=re.MULTILINE) for block in found]


def block_with(root: Path, *texts: str) -> str:
    """Return the one block that has all of *texts* in it.

    Raises: ValueError when there is none, or more than one.
    """
    (found,) = [block for block in blocks(root) if all(text in block for text in texts)]
    return found


def line_with(root: Path, *texts: str) -> str:
    """Return the one line of a block that has all of *texts* in it, wherever it is repeated.

    Raises: ValueError when there is none, or several that differ.
    """
    lines = {line for block in blocks(root) for line in block.splitlines()}
    (found,) = [line for line in lines if all(text in line for text in texts)]
    return found
