"""The parts of the demo: simulator, app and both sides of Mayfly in this process, connected by real sockets."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import httpx

from service.config.settings import Settings, read_settings
from service.demo.app import PATH, App
from service.demo.scenes import SCENES, Scene
from service.ledger import reading
from service.ledger.database import Database
from service.ledger.views import Record, present_record
from service.resources import open_queue, open_resources
from service.runtime.metrics import Metrics
from service.simulator import Generation, Simulator
from service.web.app import make_app
from service.web.server import serving
from workers.main import run_worker

TTL_SECONDS: Final = 3
_KEY: Final = "sk-demo"
_SECRET: Final = "whsec_demo_0123456789abcdef"  # noqa: S105 - of the demo, protects nothing
_FORGED_SECRET: Final = "whsec_forged_0123456789abcdef"  # noqa: S105 - as above
_SIGNING_SECRET: Final = "whsec_" + "demo" * 8
_TARGET: Final = """
[[forward]]
id = "app"
url = "http://127.0.0.1:{port}{path}"
secret_env = "APP_SECRET"
required = true
"""
_FIRST_SECONDS, _APART_SECONDS = 1.0, 0.35


@dataclass(frozen=True, slots=True)
class Stage:
    """The running parts of the demo."""

    simulator: Simulator
    app: App
    database: Database
    webhook_url: str

    def add_generations(self) -> list[tuple[Scene, Generation]]:
        """Add each scene's generation; they end, and send their webhooks, one after another."""
        added = [
            (
                scene,
                self.simulator.add(
                    status=scene.status,
                    text_input=scene.is_spoken,
                    webhook_url=self.webhook_url + scene.override,
                    output_file_name=f"take {number + 1}",
                    processing_seconds=_FIRST_SECONDS + number * _APART_SECONDS,
                    faults=scene.faults,
                ),
            )
            for number, scene in enumerate(SCENES)
        ]
        self.app.refusals |= {generation.id: scene.refusals for scene, generation in added}
        return added

    async def send_forged_webhook(self) -> tuple[Generation, int]:
        """Send a webhook that another secret signs; return its generation and the status of the answer."""
        generation = self.simulator.add(webhook_url=self.webhook_url)
        forger = Simulator(webhook_secret=_FORGED_SECRET)
        forger.generations[generation.id] = generation
        body, headers = forger.webhook(generation.id)
        async with httpx.AsyncClient(trust_env=False) as client:
            answer = await client.post(self.webhook_url, content=body, headers=headers)
        return generation, answer.status_code

    async def read_records(self) -> dict[str, Record]:
        """Read all records, by generation id, without their history."""
        page = await self.database.read(partial(reading.read_page, wanted=reading.Filter(), limit=100, cursor=None))
        return {row.id: present_record(row) for row in page.rows}


@asynccontextmanager
async def open_stage(folder: Path) -> AsyncIterator[Stage]:
    """Start all parts, with their data in *folder*, and stop them at the end."""
    simulator = Simulator(api_key=_KEY, webhook_secret=_SECRET)
    app = App(sync_secret=_SECRET, signing_secret=_SIGNING_SECRET)
    metrics, stop = Metrics(), asyncio.Event()
    async with simulator.serve() as api_url, serving(app.make_asgi(), "127.0.0.1", 0) as app_port:
        settings = _settings(folder, api_url, app_port)
        async with (
            open_resources(settings, is_migrating=True) as resources,
            open_queue(resources.redis_url, retries=0) as pool,
            serving(make_app(settings, resources.database, pool, metrics), settings.host, settings.port) as port,
            asyncio.TaskGroup() as group,
        ):
            group.create_task(run_worker(settings, resources, metrics, stop))
            try:
                yield Stage(simulator, app, resources.database, f"http://{settings.host}:{port}/webhooks/sync")
            finally:
                stop.set()


def _settings(folder: Path, api_url: str, app_port: int) -> Settings:
    """Return settings that do not depend on the caller's environment."""
    config = folder / "mayfly.toml"
    config.write_text(_TARGET.format(port=app_port, path=PATH))
    return read_settings(
        {
            "SYNC_API_KEY": _KEY,
            "SYNC_WEBHOOK_SECRET": _SECRET,
            "SYNC_BASE_URL": api_url,
            "MAYFLY_TTL": f"{TTL_SECONDS}s",
            "MAYFLY_MIN_TTL": "1s",
            "MAYFLY_DATA_DIR": str(folder),
            "MAYFLY_PORT": "0",
            "MAYFLY_CONFIG": str(config),
            "APP_SECRET": _SIGNING_SECRET,
        }
    )
