"""A running compose stack with a simulator of sync.so, used from outside."""

import contextlib
import hashlib
import hmac
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

import httpx

from tests.deploy.engine import TAG, Engine, EngineMissingError, wait_until
from tests.support.ports import free_port

API_KEY = "sk-of-the-deployment-test"
API_TOKEN = "token-of-the-deployment-test"
WEBHOOK_SECRET = "whsec_0123456789abcdef0123456789abcdef"
DRY_RUN = "MAYFLY_DRY_RUN=true\n"  # the line of .env.example that users remove
_UP_SECONDS = 300
# Runs `docker compose --file FILE …` as the tests' own project, with the simulator beside it.
_DOCKER = """#!/usr/bin/env bash
[ "$1 $2" = "compose --file" ] || { echo "not in these tests: docker $*" >&2; exit 2; }
exec "$PODMAN_COMPOSE" --project-name "$PROJECT" --file "$3" --file "$BESIDE" "${@:4}"
"""
_LEFT_OUT = shutil.ignore_patterns(".*", "tests", "build", "dist", "__pycache__")


class Run(Protocol):
    """Runs lines of shell as a user would in the project's folder; raises AssertionError if one fails."""

    def __call__(self, lines: str, *, seconds: float) -> str: ...


@dataclass(frozen=True, slots=True)
class Accepted:
    """A generation whose webhook was answered 202."""

    id: str
    due_at: datetime


class Stack:
    """The containers of one compose project, Mayfly at *url* and the simulator at *simulator_url*."""

    def __init__(self, engine: Engine, project: str, port: int, simulator_port: int, run: Run) -> None:
        self.engine = engine
        self.run = run
        self.project = project
        self.url = f"http://127.0.0.1:{port}"
        self._mayfly = httpx.Client(base_url=self.url, timeout=10, trust_env=False)
        self._simulator = httpx.Client(
            base_url=f"http://127.0.0.1:{simulator_port}",
            headers={"x-api-key": API_KEY},
            timeout=10,
            trust_env=False,
        )

    def close(self) -> None:
        """Close the connections."""
        self._mayfly.close()
        self._simulator.close()

    def containers(self, service: str | None = None) -> list[str]:
        """Return the names of the containers, of one service or of all."""
        filters = ["--filter", f"label=io.podman.compose.project={self.project}"]
        if service is not None:
            filters += ["--filter", f"label=com.docker.compose.service={service}"]
        return self.engine.output("ps", "--all", "--format", "{{.Names}}", *filters).splitlines()

    def container(self, service: str) -> str:
        """Return the name of the service's only container."""
        names = self.containers(service)
        if len(names) != 1:
            raise AssertionError(f"{service} has the containers {names}")
        return names[0]

    def execute(self, service: str, *command: str, stdin: str | None = None) -> str:
        """Run *command* in the service's container and return what it prints."""
        return self.engine.run("exec", "--interactive", self.container(service), *command, stdin=stdin).stdout

    def is_ready(self) -> bool:
        """Tell whether webhooks can be stored."""
        with contextlib.suppress(httpx.TransportError):
            return self._mayfly.get("/health/ready").status_code == 200
        return False

    def wait_until_ready(self, *, seconds: float = 60) -> float:
        """Wait until webhooks can be stored, and return how many seconds that took."""
        return wait_until(self.is_ready, seconds=seconds, what="/health/ready answers 200")

    def wait_until_healthy(self, container: str) -> None:
        """Wait until the container's own health check passes."""

        def is_healthy() -> bool:
            return self.engine.run("healthcheck", "run", container, check=False).returncode == 0

        wait_until(is_healthy, seconds=60, what=f"{container} is healthy")

    def simulate(self, method: str, path: str, **options: Any) -> Any:  # noqa: ANN401 - JSON of several routes
        """Call the simulator's control route and return its JSON."""
        answer = self._simulator.request(method, f"/simulator/{path}", **options)
        answer.raise_for_status()
        return answer.json() if answer.content else None

    def wait_until_simulated(self) -> None:
        """Wait until the simulator answers."""

        def answers() -> bool:
            with contextlib.suppress(httpx.TransportError):
                self.simulate("GET", "summary")
                return True
            return False

        wait_until(answers, seconds=60, what="the simulator answers")

    def generate(self, count: int = 1, query: str = "") -> list[str]:
        """Make finished generations at the simulator and return their ids; *query* is their webhookUrl's query."""
        wanted = {"count": count, "webhook_url": f"https://hooks.example.com/webhooks/sync?{query}"}
        ids: list[str] = self.simulate("POST", "generations", json=[wanted])
        return ids

    def announce(self, generation_id: str, *, secret: str = WEBHOOK_SECRET) -> httpx.Response:
        """Post the signed webhook of a generation, as sync.so would."""
        view = self.simulate("GET", "webhook", params={"id": generation_id})
        sent_at, body = int(time.time()), view["body"].encode()
        signature = hmac.new(secret.encode(), f"{sent_at}.".encode() + body, hashlib.sha256).hexdigest()
        headers = {"sync-signature": f"t={sent_at},v1={signature}", "content-type": "application/json"}
        return self._mayfly.post("/webhooks/sync", content=body, headers=headers)

    def accept(self, count: int, query: str = "") -> list[Accepted]:
        """Make *count* generations and have Mayfly accept their webhooks."""
        accepted = []
        with ThreadPoolExecutor(8) as senders:
            for answer in senders.map(self.announce, self.generate(count, query)):
                if answer.status_code != 202:
                    raise AssertionError(f"{answer.status_code}: {answer.text}")
                said = answer.json()
                accepted.append(Accepted(said["id"], datetime.fromisoformat(said["dueAt"])))
        return accepted

    def deleted(self) -> dict[str, float]:
        """Return the Unix times at which the first DELETE of each generation arrived."""
        return {id_: at for id_, at in self.simulate("GET", "deletes") if at is not None}

    def wait_until_deleted(self, accepted: Sequence[Accepted], *, seconds: float) -> dict[str, float]:
        """Wait until all of *accepted* were deleted at the simulator; return when each was."""
        ids = {item.id for item in accepted}
        wait_until(lambda: ids <= self.deleted().keys(), seconds=seconds, what=f"all of {len(ids)} are deleted")
        return {id_: at for id_, at in self.deleted().items() if id_ in ids}


@contextmanager
def running(
    engine: Engine, root: Path, work: Path, file: str, beside: Path, *, more: str = "", is_dry_run: bool = False
) -> Iterator[Stack]:
    """Bring up deploy/*file* with the compose file *beside* it, from a copy of the project in *work*.

    *more* stands in deploy/.env after the two values that are to be filled in; the dry run of the example only stays
    if *is_dry_run*.
    """
    project, port, simulator_port = f"mayfly-test-{os.getpid()}", free_port(), free_port()
    copy = work / "project"
    shutil.copytree(root, copy, ignore=_LEFT_OUT)
    shutil.copy(root / ".dockerignore", copy)
    example = (root / "deploy" / ".env.example").read_text(encoding="utf-8")
    filled = example.replace("SYNC_API_KEY=", f"SYNC_API_KEY={API_KEY}")
    filled = filled.replace("SYNC_WEBHOOK_SECRET=", f"SYNC_WEBHOOK_SECRET={WEBHOOK_SECRET}")
    if not is_dry_run:
        filled = filled.replace(DRY_RUN, "")
    (copy / "deploy" / ".env").write_text(filled + more, encoding="utf-8")
    programs = work / "bin"
    programs.mkdir()
    (programs / "docker").write_text(_DOCKER, encoding="utf-8")
    (programs / "docker").chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PODMAN_COMPOSE": _podman_compose(root),
        "PROJECT": project,
        "BESIDE": str(beside),
        "LISTEN_PORT": str(port),
        "SIMULATOR_PORT": str(simulator_port),
        "IMAGE": TAG,
    }

    def run(lines: str, *, seconds: float) -> str:
        command = ["bash", "-euo", "pipefail", "-c", lines]
        result = subprocess.run(
            command, cwd=copy, env=environment, timeout=seconds, check=False, capture_output=True, text=True
        )
        if result.returncode != 0:
            raise AssertionError(f"{lines}: {result.stdout[-2000:]}{result.stderr[-3000:]}")
        return result.stdout

    stack = Stack(engine, project, port, simulator_port, run)
    try:
        run(f"docker compose --file deploy/{file} up --build --detach", seconds=_UP_SECONDS)
        yield stack
    finally:
        stack.close()
        # What a test scaled up, the compose file does not know of.
        if names := stack.containers():
            engine.run("rm", "--force", "--depend", "--volumes", "--time", "5", *names, check=False)
        run(f"docker compose --file deploy/{file} down --volumes --timeout 5", seconds=120)


def _podman_compose(root: Path) -> str:
    installed = root / ".venv-deploy" / "bin" / "podman-compose"
    found = str(installed) if installed.exists() else shutil.which("podman-compose")
    if found is None:
        raise EngineMissingError("podman-compose is not on this machine")
    return found
