"""Foreign text on a terminal: nothing in it controls the terminal, and nothing of it is lost."""

import io
import json
import sys

import pytest
from rich.table import Table

from service.runtime.terminal import cell, console, plain, plain_json

ESCAPED = {
    "\x1b[31mred": "\\x1b[31mred",
    "\x1b]0;title\x07": "\\x1b]0;title\\x07",
    "\x9b2J": "\\x9b2J",
    "a\r\nb\tc\0": "a\\r\\nb\\tc\\x00",
    "exe\u202egnp.\u2066\u2069": "exe\\u202egnp.\\u2066\\u2069",
    "\u200b\ufeff\u2028": "\\u200b\\ufeff\\u2028",
    "\ud83d": "\\ud83d",
    "\U000e0041": "\\U000e0041",
}
UNCHANGED = ["take [7]", "Ärger 日本語 🪰", "👩\u200d🚀", "caf\u00e9\u00a0?", "[bold]x[/]", "\\x1b", ""]
CONTROLS = [chr(n) for n in (*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A))]


@pytest.mark.parametrize("text", ESCAPED)
def test_a_character_that_controls_a_terminal_is_escaped(text):
    assert plain(text) == ESCAPED[text]


@pytest.mark.parametrize("text", UNCHANGED)
def test_other_text_is_printed_as_it_is(text):
    assert plain(text) == text


@pytest.mark.parametrize("control", CONTROLS, ids=ascii)
def test_each_control_character_is_escaped(control):
    assert plain(f"a{control}b").isascii()
    assert plain(f"a{control}b").isprintable()


@pytest.mark.parametrize("text", ["\x9b\u202e", "\U000e0041", "plain\u200d", "\x7f\u2028"])
def test_json_with_control_characters_escaped_has_the_same_value(text):
    raw = json.dumps({"text": text}, ensure_ascii=False, indent=1)
    escaped = plain_json(raw)

    assert json.loads(escaped) == {"text": text}
    assert escaped.replace("\n", "").replace("\u200d", "").isprintable()


@pytest.mark.parametrize("value", ["\x1b[31m[bold]x[/]", cell("\x1b[31m[bold]x[/]")])
def test_no_text_controls_the_terminal_even_where_a_caller_forgot_to_escape_it(monkeypatch, value):
    output = io.StringIO()
    monkeypatch.setattr(sys, "stdout", output)
    table = Table("name")
    table.add_row(value)
    console().print(table, f"\x9b{value}")

    assert "\x1b" not in output.getvalue()
    assert "\x9b" not in output.getvalue()
    assert "\\x1b[31m" in output.getvalue()
