"""What a mistyped command or option means: the nearest command, the setting that an option would be."""

import difflib
from typing import Any

import click

from service.config.settings import OPTIONS


class SuggestingGroup(click.Group):
    """A group that suggests the nearest command, and the environment variable of a setting given as an option."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command, or fail with the nearest name."""
        near = difflib.get_close_matches(args[0], self.list_commands(ctx), n=1)
        if near and near[0] != args[0] and not ctx.resilient_parsing and self.get_command(ctx, args[0]) is None:
            ctx.fail(f"No such command '{args[0]}': did you mean {near[0]}?")
        return super().resolve_command(ctx, args)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the options before the command."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            raise _with_setting(error) from None

    def invoke(self, ctx: click.Context) -> Any:  # noqa: ANN401 - click's signature
        """Run the command, which parses its own options first."""
        try:
            return super().invoke(ctx)
        except click.NoSuchOption as error:
            raise _with_setting(error) from None


def _with_setting(error: click.NoSuchOption) -> click.NoSuchOption:
    """Return *error* with the variable that sets what its option would; the error itself if there is none."""
    name = error.option_name.lstrip("-").replace("-", "_").upper()
    variables = {option.name for option in OPTIONS.values()}
    for candidate in (f"MAYFLY_{name}", f"SYNC_{name}", f"MAYFLY_{name}_URL", name):
        if candidate in variables:
            message = f"No such option '{error.option_name}': set {candidate} in the environment."
            return click.NoSuchOption(error.option_name, message, ctx=error.ctx)
    return error
