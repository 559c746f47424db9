"""The page "Your app keeps its webhooks" has the programs of deploy/examples word for word, and tells what is so."""

import re
import shutil
import subprocess

import pytest

from service.config.rules_file import read_rules_file
from service.core.forwarding import MAX_ATTEMPTS, WAITS
from service.core.secret import Secret
from service.core.standard_webhooks import read_signing_key
from tests.support.examples import EXAMPLES
from tests.support.readme import ROOT, code, code_with

PAGE = ROOT / "deploy" / "docs" / "your-app.md"
LANGUAGES = {".py": "python", ".ts": "typescript"}
PROGRAMS = sorted(path for path in EXAMPLES.iterdir() if path.suffix in LANGUAGES)
UNITS = {"s": 1, "min": 60, "h": 3600}


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)
def test_the_page_has_each_program_word_for_word_below_its_link(path):
    text, program = PAGE.read_text(encoding="utf-8"), path.read_text(encoding="utf-8")

    assert f"\n[{path.name}](../examples/{path.name}):\n\n```{LANGUAGES[path.suffix]}\n{program}```\n" in text


def test_the_page_has_no_program_that_is_not_an_example():
    shown = [block for language in LANGUAGES.values() for block in code(PAGE, language)]

    assert sorted(shown) == sorted(path.read_text(encoding="utf-8") for path in PROGRAMS)
    assert [path for path in EXAMPLES.iterdir() if path.is_file() and path not in PROGRAMS] == []


def test_the_command_of_the_page_makes_a_secret_that_mayfly_takes():
    if shutil.which("base64") is None:
        pytest.skip("base64 is not installed")
    command = code_with(PAGE, "sh", "FORWARD_SECRET=")
    made = [subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True).stdout for _ in range(2)]
    (first, second) = [line.strip().partition("=")[2] for line in made]

    assert len(read_signing_key(Secret(first))) == 32
    assert first != second


def test_the_target_of_the_page_is_one(tmp_path):
    path = tmp_path / "mayfly.toml"
    path.write_text(code_with(PAGE, "toml", "[[forward]]"))
    (forward,) = read_rules_file(path).forwards

    assert (forward.secret_env, forward.target.is_required) == ("FORWARD_SECRET", False)


def test_the_waits_of_the_page_are_those_of_the_code():
    (told,) = re.findall(r"the next ones after ([^;]+);", PAGE.read_text(encoding="utf-8"))
    waits = [int(number) * UNITS[unit] for number, unit in re.findall(r"(\d+)\s(s|min|h)\b", told)]

    assert waits == [wait.total_seconds() for wait in WAITS]
    assert MAX_ATTEMPTS == 11, "the page says eleven"
