"""The file that MAYFLY_CONFIG names: rules, accounts and targets, read once and checked as a whole.

All problems are found at once. Each names the file, the line and the table; no value is repeated, because it may be a
secret that was pasted by mistake.
"""

import difflib
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, time, timedelta
from pathlib import Path
from typing import Any, Final

import msgspec

from service.config.rules_keys import ACCOUNT_KEYS, FORWARD_KEYS, RULE_KEYS, Key
from service.config.rules_shape import AccountTable, ForwardTable, RuleTable
from service.config.toml_lines import TomlLines
from service.core.adopting import Adopt
from service.core.errors import ExplainedError
from service.core.forwarding import Target
from service.core.key import DEFAULT_ACCOUNT
from service.core.matchers import Texts
from service.core.rate import Rate
from service.core.rules import NO_RULES, Rule, RuleSet

_TABLES: Final = ("rule", "account", "forward")
_ENDS: Final = ("ttl", "expires", "forever", "hold")
_SYNTAX: Final = re.compile(r"(.*) \(at line ([0-9]+), column [0-9]+\)", re.DOTALL)


class RulesFileError(ExplainedError):
    """The file cannot be used; each of *problems* names its place."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


@dataclass(frozen=True, slots=True)
class Account:
    """An ``[[account]]``; what is None is as in the settings."""

    id: str
    api_key_env: str | None = None
    webhook_secret_env: str | None = None
    min_ttl: timedelta | None = None
    max_ttl: timedelta | None = None
    rate: Rate | None = None
    adopt: Adopt = "ours"


@dataclass(frozen=True, slots=True)
class Forward:
    """A ``[[forward]]``: the *target* without its secret, which the variable *secret_env* has, None without one."""

    target: Target
    secret_env: str | None = None


@dataclass(frozen=True, slots=True)
class RulesFile:
    """The rules, accounts and targets of the file at *path*; *lines* has the line of each rule by its id."""

    path: Path | None = None
    rules: RuleSet = NO_RULES
    accounts: tuple[Account, ...] = ()
    forwards: tuple[Forward, ...] = ()
    lines: Mapping[str, int] = field(default_factory=dict)

    @property
    def variables(self) -> frozenset[str]:
        """The environment variables that the accounts and targets name, and those of their files."""
        named = [name for one in self.accounts for name in (one.api_key_env, one.webhook_secret_env) if name]
        named += [one.secret_env for one in self.forwards if one.secret_env]
        return frozenset([*named, *(f"{name}_FILE" for name in named)])


def read_rules_file(path: Path) -> RulesFile:
    """Read and check the file at *path*.

    Raises: RulesFileError with all problems at once; OSError.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
        document = tomllib.loads(text)
    except UnicodeDecodeError:
        raise RulesFileError([f"{path}: it is not UTF-8"]) from None
    except tomllib.TOMLDecodeError as error:
        match = _SYNTAX.fullmatch(str(error))
        where, what = (f"{path}:{match[2]}", match[1]) if match else (str(path), str(error))
        raise RulesFileError([f"{where}: not TOML: {what}"]) from None
    return _Reader(path, TomlLines(text)).read(document)


@dataclass(frozen=True, slots=True)
class _Table:
    """A table that was read: *index* counts from 0 among those of its name; *values* has the keys that are valid."""

    name: str
    index: int
    values: Mapping[str, Any]
    is_valid: bool

    @property
    def title(self) -> str:
        known = self.values.get("id")
        return f'{self.name} "{known}"' if known else f"{self.name} number {self.index + 1}"


class _Reader:
    """Reads the tables, and collects what is wrong."""

    def __init__(self, path: Path, lines: TomlLines) -> None:
        self._path = path
        self._lines = lines
        self._problems: list[tuple[int, str]] = []

    def read(self, document: Mapping[str, Any]) -> RulesFile:
        for name in document.keys() - set(_TABLES):
            self._add(self._lines.find("", 0, name), _describe_unknown(name, _TABLES))
        tables = self._read_tables(document, "account", AccountTable, ACCOUNT_KEYS)
        accounts = [self._make_account(table) for table in tables if table.is_valid]
        names = {DEFAULT_ACCOUNT, *(table.values.get("id", "") for table in tables)}
        rules = self._read_rules(document, names)
        forwards = self._read_forwards(document, names)
        if self._problems:
            raise RulesFileError([f"{self._path}:{line}: {text}" for line, text in sorted(self._problems)])
        lines = {rule.id: self._lines.find("rule", place) for place, rule in enumerate(rules)}
        return RulesFile(self._path, RuleSet(rules), tuple(accounts), tuple(forwards), lines)

    def _add(self, line: int, problem: str) -> None:
        self._problems.append((line, problem))

    def _add_to(self, table: _Table, key: str, problem: str) -> None:
        self._add(self._lines.find(table.name, table.index, key), f"{table.title}: {problem}")

    def _read_tables(
        self, document: Mapping[str, Any], name: str, shape: type[msgspec.Struct], keys: Mapping[str, Key]
    ) -> list[_Table]:
        raw = document.get(name, [])
        if not isinstance(raw, list) or not all(isinstance(one, dict) for one in raw):
            self._add(self._lines.find("", 0, name), f"{name} is written [[{name}]], with two brackets on each side")
            return []
        tables = [self._read_table(name, index, one, shape, keys) for index, one in enumerate(raw)]
        seen: dict[str, _Table] = {}
        for table in tables:
            first = seen.setdefault(table.values.get("id", f"\0{table.index}"), table)
            if first is not table:
                line = self._lines.find(name, first.index, "id")
                self._add_to(table, "id", f"duplicate id: the first is in line {line}")
        return tables

    def _read_table(
        self, name: str, index: int, raw: Mapping[str, Any], shape: type[msgspec.Struct], keys: Mapping[str, Key]
    ) -> _Table:
        types = {one.name: one.type for one in msgspec.structs.fields(shape)}
        values: dict[str, Any] = {}
        wrong: list[tuple[str, str]] = []
        for key, value in raw.items():
            if key not in keys:
                wrong.append((key, _describe_unknown(key, keys)))
                continue
            try:
                values[key] = keys[key].parse(msgspec.convert(_plain(value), types[key]))
            except msgspec.ValidationError:
                wrong.append((key, f"{key} is invalid: it accepts {keys[key].accepts}"))
            except ValueError as error:
                wrong.append((key, f"{key} is invalid: it accepts {str(error) or keys[key].accepts}"))
        if "id" not in raw:
            wrong.append(("", f"it needs an id: {keys['id'].accepts}"))
        table = _Table(name, index, values, not wrong)
        for key, problem in wrong:
            self._add_to(table, key, problem)
        return table

    def _make_account(self, table: _Table) -> Account:
        account = Account(**table.values)
        if account.min_ttl and account.max_ttl and account.min_ttl > account.max_ttl:
            self._add_to(table, "max_ttl", "max_ttl is less than min_ttl")
        return account

    def _read_rules(self, document: Mapping[str, Any], accounts: Iterable[str]) -> list[Rule]:
        tables = self._read_tables(document, "rule", RuleTable, RULE_KEYS)
        rules = []
        for table in tables:
            self._check_end(table, document["rule"][table.index])
            self._check_accounts(table, "account", accounts)
            if table.is_valid:
                rules.append((table, _make_rule(table.values)))
        self._check_order(rules)
        return [rule for _, rule in rules]

    def _check_end(self, table: _Table, raw: Mapping[str, Any]) -> None:
        """Check that the rule says exactly once what to do."""
        ends = [key for key in _ENDS if key in raw]
        if not ends:
            self._add_to(table, "", "it needs one of ttl, expires, forever and hold")
        elif len(ends) > 1:
            self._add_to(table, ends[1], f"only one of ttl, expires, forever and hold, not {' and '.join(ends)}")

    def _read_forwards(self, document: Mapping[str, Any], accounts: Iterable[str]) -> list[Forward]:
        tables = self._read_tables(document, "forward", ForwardTable, FORWARD_KEYS)
        for table in tables:
            self._check_accounts(table, "accounts", accounts)
            if "url" not in document["forward"][table.index]:
                self._add_to(table, "", f"it needs a url: {FORWARD_KEYS['url'].accepts}")
        return [_make_forward(table.values) for table in tables if table.is_valid and "url" in table.values]

    def _check_accounts(self, table: _Table, key: str, accounts: Iterable[str]) -> None:
        for pattern in table.values.get(key, ()):
            if not any(pattern.matches(name) for name in accounts):
                known = ", ".join(sorted(filter(None, accounts)))
                self._add_to(table, key, f"no account of that name is configured: there is {known}")

    def _check_order(self, rules: Sequence[tuple[_Table, Rule]]) -> None:
        """Find rules that never count, because one before them matches all that they match."""
        for place, (table, rule) in enumerate(rules):
            for earlier_table, earlier in rules[:place]:
                if earlier.covers(rule):
                    line = self._lines.find("rule", earlier_table.index)
                    problem = f"it is never reached: {earlier_table.title} in line {line} matches all that it matches"
                    self._add_to(table, "", problem)
                    break


def _make_rule(values: Mapping[str, Any]) -> Rule:
    texts = [Texts(key, value) for key, value in values.items() if key in _TEXT_KEYS]
    ttl = values.get("ttl")
    return Rule(
        id=values["id"],
        texts=(*texts, *values.get("labels", ())),
        duration=values.get("output_duration"),
        ttl=None if ttl == "forever" else ttl,
        expires=values.get("expires"),
        is_forever=ttl == "forever" or "forever" in values,
        hold=values.get("hold"),
        record_ttl=values.get("record_ttl"),
    )


def _make_forward(values: Mapping[str, Any]) -> Forward:
    texts = [
        Texts(name, values[key]) for key, name in (("statuses", "status"), ("accounts", "account")) if key in values
    ]
    bounds = {key: values[key] for key in ("timeout", "concurrency") if key in values}
    target = Target(
        values["id"],
        values["url"],
        (*texts, *values.get("labels", ())),
        is_required=values.get("required", False),
        **bounds,
    )
    return Forward(target, values.get("secret_env"))


_TEXT_KEYS: Final = frozenset(
    ("status", "model", "project", "source", "account", "error_code", "input_type", "output_file_name")
)


def _plain(value: object) -> object:
    """Return a date or a time of TOML as text, so that it is read as in an override."""
    return value.isoformat() if isinstance(value, datetime | date | time) else value


def _describe_unknown(key: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    shown = ascii(key[:50])[1:-1]
    return f"unknown key {shown}: " + (f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}")
