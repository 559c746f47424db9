"""Plain words: no private metaphors in code, tests and pages, and test names of fewer than 80 characters."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAX_NAME = 79

# Words that a newcomer would have to learn, each with the plain ones.
INSTEAD = {
    r"\b(bells?|ringers?|rings?|rang|ringing|silence|hears?|heard)\b": "job, enqueue, remove, consume, enqueuer",
    r"short way": "fast path",
    r"\bbehind \w+( \w+)?'s? backs?\b": "in the background, after the response",
    r"\b(un)?proven\b|\bproofs? of (a|the|its) webhook|webhook's proof|signature proves": "verified; signature",
    r"\bwish(es|ed)?\b|_wish(es)?\b": "override in the webhookUrl",
    r"slip of the pen": "typo",
    r"\ba person (decides|looks|must|has to)|(waits? for|needs) a person": "needs an operator",
    r"\bsee to [A-Z`]|\bsees? to (it|what|this)\b": "check …",
    r"\bthat is \S+ cannot (keep|hold|release|retry)": "cannot keep: …",
    r"\b(is|are|was|goes|went) away\b": "does not answer, is unreachable",
    r"\bwas not tried when\b|\btime of failing\b": "time paused does not count toward MAYFLY_GIVE_UP_AFTER",
    r"\bhow late the (latest|deletions?) (is|are)\b": "age of the most overdue deletion",
    r"\bdef (_stated|_written|_committed|_ended|_told|_look|_watch|_give|_take|_held)\(": "a verb with its object",
}
FORBIDDEN = {re.compile(pattern, re.IGNORECASE): plain for pattern, plain in INSTEAD.items()}
# Pages with such a word in another sense.
LEFT_OUT: frozenset[str] = frozenset()


def _texts() -> list[Path]:
    found = [path for folder in ("service", "workers", "tests") for path in (ROOT / folder).rglob("*.py")]
    pages = [
        *ROOT.glob("*.md"),
        *(page for folder in ("tests", "deploy", ".github") for page in (ROOT / folder).rglob("*.md")),
    ]
    return sorted({*found, *pages} - {Path(__file__)} - {ROOT / name for name in LEFT_OUT})


@pytest.mark.parametrize("path", _texts(), ids=lambda path: str(path.relative_to(ROOT)))
def test_only_plain_words_are_used(path):
    lines = enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
    found = [
        f"{number}: {match[0]!r} → {plain}"
        for number, line in lines
        for pattern, plain in FORBIDDEN.items()
        if (match := pattern.search(line))
    ]

    assert found == []


def test_names_of_tests_have_fewer_than_80_characters():
    names = [
        node.name
        for path in (ROOT / "tests").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
    ]

    assert [name for name in names if len(name) > MAX_NAME] == []
