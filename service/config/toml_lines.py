"""In which line of a TOML file a table or a key is; the parser of the standard library does not say."""

import re
from typing import Final

# Texts and comments could look like tables and keys. Only for files that have been parsed: each text has its end.
_TEXT: Final = re.compile(
    r"""
    \"{3} (?:[^\\]|\\.)*? \"{3} | '{3} .*? '{3}
    | " (?:[^"\\\n]|\\.)* " | ' [^'\n]* '
    | \# [^\n]*
    """,
    re.DOTALL | re.VERBOSE,
)
_ARRAY_TABLE: Final = re.compile(r"\s*\[\[\s*([\w-]+)\s*\]\]")
_SUBTABLE: Final = re.compile(r"\s*\[\s*([\w-]+)\s*(?:\.\s*([\w-]+))?")
_KEY: Final = re.compile(r"\s*([\w-]+)\s*[.=]")


class TomlLines:
    """The lines of the tables of *text*, a whole valid file, and of their keys; lines count from 1."""

    def __init__(self, text: str) -> None:
        self._found: dict[tuple[str, int, str], int] = {}
        counts: dict[str, int] = {}
        table, index, is_within = "", 0, False
        for line, content in enumerate(_TEXT.sub(_keep_line_breaks, text).split("\n"), 1):
            if match := _ARRAY_TABLE.match(content):
                table, is_within = match[1], False
                index = counts[table] = counts.get(table, -1) + 1
                self._found[table, index, ""] = line
            elif match := _SUBTABLE.match(content):
                is_within = bool(match[2]) and match[1] == table
                if is_within:
                    self._found.setdefault((table, index, match[2]), line)
                else:
                    table, index = match[1], 0
                    self._found.setdefault((table, 0, ""), line)
            elif not is_within and (match := _KEY.match(content)):
                self._found.setdefault((table, index, match[1]), line)

    def find(self, table: str, index: int, key: str = "") -> int:
        """Return the line of *key* in the table *index* (from 0) of those named *table*, else the table's, else 1.

        A *table* of ``""`` is the file before its first table.
        """
        if table == "":
            return self._found.get(("", 0, key)) or self._found.get((key, 0, "")) or 1
        return self._found.get((table, index, key)) or self._found.get((table, index, "")) or self.find("", 0, table)


def _keep_line_breaks(match: re.Match[str]) -> str:
    return "\n" * match[0].count("\n")
