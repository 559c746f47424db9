"""`mayfly explain`: why a generation is or is not deleted, in plain words."""

from datetime import UTC, datetime
from functools import partial

import click

from service.commands.running import as_json, of_account, open_ledger, print_json, run, settings_or_exit
from service.core.key import Key, choose_account
from service.ledger.account_reading import require_account
from service.ledger.explanations import Explanation, explain_key
from service.runtime.terminal import plain


@click.command()
@click.argument("generation_id", metavar="ID")
@of_account
@as_json
def explain(generation_id: str, *, account: str | None, is_json: bool) -> None:
    """Say what becomes of generation ID, which rule decided, what blocks its deletion now, and what you can do.

    It also answers for a generation that has no record, and says what to check.
    """
    settings = settings_or_exit()

    async def work() -> Explanation:
        async with open_ledger(settings) as database:
            now, key = datetime.now(UTC), Key(choose_account(settings.account_ids, account), generation_id)
            await database.read(partial(require_account, name=key.account, configured=settings.account_ids))
            return await database.read(partial(explain_key, key=key, now=now, is_dry_run=settings.is_dry_run))

    found = run(work())
    if is_json:
        print_json(found)
    else:
        click.echo(plain(found.explain))
