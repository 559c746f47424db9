"""Targets of a system under test: their configuration, and their deliveries moved by SQL."""

import json

import httpx

from tests.faults.system import SIGNING, TOKEN, URL_SECRET, System


def target(name: str, port: int, *lines: str) -> str:
    """Return a ``[[forward]]`` to the app at *port*, with further *lines*."""
    url = f'url = "http://127.0.0.1:{port}/{name}?token={URL_SECRET}"'
    return "\n".join(["[[forward]]", f'id = "{name}"', url, 'secret_env = "CRM_SECRET"', *lines, ""])


def forward(system: System, *tables: str, ttl: str = "2s") -> None:
    """Let the processes of *system* forward to the targets of *tables*."""
    path = system.folder / "forward.toml"
    path.write_text("\n".join(tables))
    system.environment |= {"MAYFLY_CONFIG": str(path), "CRM_SECRET": SIGNING, "MAYFLY_TTL": ttl}


async def expire_leases(system: System) -> None:
    """End the leases of workers that were killed, as waiting a minute would."""
    await system.ledger.execute(
        "UPDATE deliveries SET wake_at = :now, leased_until = :now WHERE leased_until IS NOT NULL"
    )


async def hurry(system: System) -> None:
    """Bring the next attempts forward to now, as waiting would."""
    await system.ledger.execute("UPDATE deliveries SET wake_at = :now WHERE leased_until IS NULL AND wake_at > :now")


async def count(system: System, state: str) -> int:
    """Count the deliveries in *state*."""
    return await system.ledger.number(f"SELECT count(*) FROM deliveries WHERE state = '{state}'")  # noqa: S608


async def replay_failed(system: System, port: int) -> int:
    """Replay all deliveries that have failed, as an operator does: count, then replay that many. Return how many.

    Raises: httpx.HTTPError, also if their number has changed in between.
    """
    url, headers = f"http://127.0.0.1:{port}/api/forwards/replay", {"authorization": f"Bearer {TOKEN}"}
    wanted: dict[str, object] = {"filter": {"state": "failed"}}
    counted = await system.client.post(url, json=wanted | {"dryRun": True}, headers=headers)
    number = int(json.loads(counted.raise_for_status().content)["matched"]["failed"])
    if number:
        answer: httpx.Response = await system.client.post(url, json=wanted | {"expected": number}, headers=headers)
        answer.raise_for_status()
    return number


async def replay(system: System, port: int, delivery: str) -> None:
    """Replay one *delivery*, whatever has become of it. Raises: httpx.HTTPError, also while an attempt is made."""
    url = f"http://127.0.0.1:{port}/api/forwards/{delivery}/replay"
    answer = await system.client.post(url, headers={"authorization": f"Bearer {TOKEN}"})
    answer.raise_for_status()
