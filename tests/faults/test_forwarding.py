"""Webhooks that are forwarded: real processes, an app on a real socket, and parts killed."""

from pathlib import Path

from tests.faults.system import System, on_both
from tests.support.app import App

SIGNING = "whsec_" + "A" * 43 + "="


def forwarding(folder: Path, app: App, *more: str, **keys: str) -> dict[str, str]:
    """Return the environment in which webhooks are forwarded to *app*; *keys* are further lines of the table."""
    more = (*more, *(f"{key} = {value}" for key, value in keys.items()))
    lines = [f'url = "{app.url}/hooks"', 'secret_env = "CRM_SECRET"']
    path = folder / "forward.toml"
    path.write_text("\n".join(['[[forward]]\nid = "crm"', *lines, *more]))
    return {"MAYFLY_CONFIG": str(path), "CRM_SECRET": SIGNING}


@on_both
async def test_a_webhook_is_forwarded_byte_for_byte(system: System):
    async with App() as app:
        variables = forwarding(system.folder, app)
        await system.api(**variables)
        await system.worker(**variables)
        generation = await system.accepted(system.generation())
        body, _ = system.simulator.webhook(generation.id)
        (received,) = await app.wait_for(1, generation=generation.id)

        assert received.body == body
        assert received.header("content-type") == "application/json"
        await system.until(generation, "deleted")
