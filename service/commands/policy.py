"""`mayfly policy`: the rules of MAYFLY_CONFIG, checked, shown in plain words, and applied to what exists."""

from datetime import UTC, datetime

import click
import msgspec
from rich.table import Table

from service.commands import policy_changes
from service.commands.policy_changes import settings_of_file
from service.commands.running import as_json, print_json
from service.commands.suggesting import SuggestingGroup
from service.config.rules_advice import find_warnings
from service.config.rules_shape import make_schema
from service.config.settings import Settings
from service.core.retention import DEFAULT_RULE
from service.core.rule_words import describe_effect, describe_subject, describe_ttl, describe_webhooks
from service.runtime.terminal import cell, console, plain


class RuleShown(msgspec.Struct, frozen=True):
    """A rule in plain words: the generations that it is *about*, and what it *does* to them."""

    id: str
    about: str
    does: str


class TargetShown(msgspec.Struct, frozen=True):
    """A target and which webhooks it *gets*; if it *is_required*, nothing is deleted before it has taken them."""

    id: str
    gets: str
    is_required: bool


class PolicyShown(msgspec.Struct, frozen=True):
    """The rules of a *file* in their order, the last one for all that no rule matches, and what is odd about them."""

    file: str
    accounts: list[str]
    targets: list[TargetShown]
    rules: list[RuleShown]
    warnings: list[str]


@click.group(cls=SuggestingGroup)
def policy() -> None:
    """Check the rules that say how long generations are kept, and see what they would do."""


policy.add_command(policy_changes.diff)
policy.add_command(policy_changes.apply)


@policy.command()
@click.argument("file", required=False, type=click.Path())
@as_json
def check(*, file: str | None, is_json: bool) -> None:
    """Check FILE, by default the one that MAYFLY_CONFIG names, and show its rules in plain words.

    It reads the file as the service would, together with the environment. The exit code is 0 for a valid file, also
    with warnings, and 2 if the service would not start with it. Nothing is changed.
    """
    settings = settings_of_file(file)
    shown = show_policy(settings, now=datetime.now(UTC))
    if is_json:
        print_json(shown)
    else:
        _print_policy(shown)


@policy.command()
def schema() -> None:
    """Print the JSON schema of the file, for editors that complete and check TOML."""
    click.echo(msgspec.json.format(msgspec.json.encode(make_schema()), indent=2).decode())


def show_policy(settings: Settings, *, now: datetime) -> PolicyShown:
    """Return the policy of *settings* in plain words."""
    file = settings.rules_file
    rules = [RuleShown(rule.id, describe_subject(rule), describe_effect(rule)) for rule in file.rules.rules]
    rest = RuleShown(DEFAULT_RULE, "every other generation", describe_ttl(settings.ttl))
    warnings = find_warnings(file, min_ttl=settings.min_ttl, now=now)
    targets = [TargetShown(one.id, describe_webhooks(one), one.is_required) for one in settings.targets]
    return PolicyShown(str(file.path), [account.id for account in file.accounts], targets, [*rules, rest], warnings)


def _print_policy(shown: PolicyShown) -> None:
    number = len(shown.rules) - 1
    click.echo(f"{plain(shown.file)} is valid: {number} rule{'' if number == 1 else 's'}.")
    click.echo("A hold and an override in the webhookUrl come first. Then the first rule that matches counts:\n")
    table = Table(box=None, pad_edge=False)
    table.add_column("", justify="right", style="dim")
    for heading in ("rule", "about", "what happens"):
        table.add_column(heading, overflow="fold")
    for place, rule in enumerate(shown.rules, 1):
        is_rest = place == len(shown.rules)
        table.add_row("" if is_rest else str(place), cell(rule.id), cell(rule.about), cell(rule.does))
    console().print(table)
    if shown.accounts:
        click.echo(f"\nAccounts: {', '.join(shown.accounts)}.")
    for target in shown.targets:
        end = "; nothing is deleted before it has taken it" if target.is_required else ""
        click.echo(f"\nTarget {plain(target.id)} gets {plain(target.gets)}{end}.")
    for warning in shown.warnings:
        click.echo(f"mayfly: warning: {plain(warning)}", err=True)
