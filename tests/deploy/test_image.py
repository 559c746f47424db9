"""The image, built from the Dockerfile: small, restricted, fast to start and to stop."""

import contextlib
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

import service
from tests.deploy.engine import Engine, Image, wait_until
from tests.support.ports import free_port
from tests.support.readme import README, code_with

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(700)]

RANDOM_UID = "54321"
LOCKED = [
    *("--read-only", "--user", RANDOM_UID, "--tmpfs", "/tmp", "--tmpfs", "/data:mode=1777"),  # noqa: S108 - inside it
    *("--cap-drop", "ALL", "--security-opt", "no-new-privileges"),
]
SECRETS = ["--env", "SYNC_API_KEY=sk-x", "--env", "SYNC_WEBHOOK_SECRET=whsec_0123456789abcdef"]


def _run(engine: Engine, image: Image, *arguments: str, options: list[str]) -> tuple[int, str, str]:
    result = engine.run("run", "--rm", "--pull=never", *options, image.tag, *arguments, check=False)
    return result.returncode, result.stdout, result.stderr


def _shell(engine: Engine, image: Image, script: str, *, user: str = RANDOM_UID) -> str:
    options = ("--rm", "--pull=never", "--network", "none", "--user", user, "--entrypoint", "sh")
    return engine.output("run", *options, image.tag, "-c", script)


def test_the_image_adds_less_than_90_mb_to_its_base(image: Image) -> None:
    assert image.size - image.base_size < 90_000_000


def test_the_image_says_what_it_is_and_runs_as_nobody(image: Image) -> None:
    config = image.config

    assert config["User"] == "10001:0"
    assert config["Entrypoint"] == ["tini", "--", "mayfly"]
    assert config["StopSignal"] == "SIGTERM"
    assert config["Labels"]["org.opencontainers.image.title"] == "mayfly"
    assert config["Labels"]["org.opencontainers.image.licenses"] == "MIT"
    assert not [line for line in config["Env"] if line.startswith("SYNC_")]


def test_the_version_inside_is_this_one(engine: Engine, image: Image) -> None:
    code, out, _ = _run(engine, image, "--version", options=[*LOCKED, "--network", "none"])

    assert (code, out.strip()) == (0, f"mayfly, version {service.__version__}")


def test_nothing_that_builds_or_installs_is_left_anywhere(engine: Engine, image: Image) -> None:
    programs = "for name in gcc cc make strip git uv hatchling pip pip3 wheel; do command -v $name; done; true"
    packages = ("pip", "setuptools", "wheel", "pkg_resources", "ensurepip", "hatchling", "pytest")
    names = " -o ".join(f"-name {name} -o -name '{name}-[0-9]*'" for name in packages)

    assert _shell(engine, image, programs) == ""
    assert _shell(engine, image, f"find / -xdev \\( -type d \\( {names} \\) -o -name '*.whl' \\)", user="0") == ""
    assert _shell(engine, image, "ls --directory /build 2>/dev/null; true") == ""


def test_the_embedded_redis_is_debians_with_its_security_updates(engine: Engine, image: Image) -> None:
    found = "from service.jobs.embedded_redis import find_server; print(find_server())"

    assert _shell(engine, image, f'python -c "{found}"') == "/usr/bin/redis-server"
    assert "redis-server" in _shell(engine, image, "dpkg --search /usr/bin/redis-server")


def test_what_a_role_loads_is_there_as_bytecode(engine: Engine, image: Image) -> None:
    script = (
        "import os, sys, service.web.app, service.commands.running, workers.main; "
        "specs = [module.__spec__ for module in sys.modules.values() if getattr(module, '__spec__', None)]; "
        "print([s.name for s in specs if s.cached and s.has_location and not os.path.exists(s.cached)])"
    )

    assert _shell(engine, image, f'python -c "{script}"') == "[]"


def test_the_demo_misses_nothing_of_what_was_left_out(engine: Engine, image: Image) -> None:
    code, out, error = _run(engine, image, "demo", options=[*LOCKED, "--network", "none"])

    assert code == 0, out + error
    assert "Every record ended as it should." in out


def test_the_readme_builds_the_image_and_plays_the_demo_in_it(image: Image, root: Path) -> None:
    assert image.tag  # so that the layers are there
    lines = code_with(README, "sh", "docker build").replace("docker ", "podman ")

    ran = subprocess.run(["bash", "-euc", lines], cwd=root, capture_output=True, text=True, check=False, timeout=600)

    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-3000:]
    assert "Every record ended as it should." in ran.stdout


def test_only_the_data_and_the_temporary_folders_can_be_written_to(engine: Engine, image: Image) -> None:
    found = _shell(engine, image, "find / -xdev -type d -writable -not -path '/proc/*' 2>/dev/null; true").split()

    places = ("/data", "/tmp", "/var/tmp", "/run", "/dev")  # noqa: S108 - a list of names
    assert "/data" in found
    assert not [path for path in found if not path.startswith(places)]


def test_a_missing_secret_is_named_in_one_line(engine: Engine, image: Image) -> None:
    code, _, error = _run(engine, image, "api", options=[*LOCKED, "--network", "none"])

    lines = [line for line in error.splitlines() if line.startswith("mayfly:")]
    assert code == 2
    assert len(lines) == 1
    assert "SYNC_WEBHOOK_SECRET" in lines[0]


def test_an_unreachable_database_ends_the_process_with_one_line(engine: Engine, image: Image) -> None:
    unreachable = ["--env", "MAYFLY_DATABASE_URL=postgresql://mayfly@127.0.0.1:1/mayfly"]

    for role in ("api", "worker", "migrate"):
        code, _, error = _run(engine, image, role, options=[*LOCKED, *SECRETS, *unreachable, "--network", "none"])

        lines = [line for line in error.splitlines() if line.startswith("mayfly:")]
        assert code == 1, error
        assert len(lines) == 1, error
        assert "MAYFLY_DATABASE_URL" in lines[0]


@dataclass(frozen=True, slots=True)
class Life:
    """What one container showed from its start to its end."""

    ready_seconds: float
    stop_seconds: float
    exit_code: int
    is_healthy: bool
    status: str
    logs: str


def _live(engine: Engine, image: Image) -> Life:
    port = free_port()
    options = [*LOCKED, *SECRETS, "--publish", f"127.0.0.1:{port}:8080"]

    def is_ready() -> bool:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"http://127.0.0.1:{port}/health/ready", trust_env=False).status_code == 200
        return False

    start = time.monotonic()
    with engine.container(image.tag, "up", options=options) as name:
        wait_until(is_ready, seconds=20, every=0.05, what="/health/ready answers 200")
        ready_seconds = time.monotonic() - start
        status = engine.output("exec", name, "cat", "/proc/1/status")
        is_healthy = engine.run("healthcheck", "run", name, check=False).returncode == 0
        start = time.monotonic()
        engine.run("stop", "--time", "30", name)
        stop_seconds = time.monotonic() - start
        exit_code = engine.inspect(name)["State"]["ExitCode"]
        return Life(ready_seconds, stop_seconds, exit_code, is_healthy, status, engine.logs(name))


def test_a_restricted_container_is_ready_in_3_seconds_and_stops_at_sigterm(engine: Engine, image: Image) -> None:
    # The best of three: what else the machine does is not the image's.
    lives = [_live(engine, image) for _ in range(3)]

    print("ready after", *(f"{life.ready_seconds:.2f}" for life in lives), "seconds")
    assert min(life.ready_seconds for life in lives) < 3
    for life in lives:
        assert f"Uid:\t{RANDOM_UID}\t" in life.status
        assert "CapEff:\t0000000000000000" in life.status
        assert "NoNewPrivs:\t1" in life.status
        assert life.is_healthy
        assert (life.exit_code, life.stop_seconds < 10) == (0, True), life.logs


def test_a_stop_right_after_the_start_is_obeyed(engine: Engine, image: Image) -> None:
    with engine.container(image.tag, "up", options=[*LOCKED, *SECRETS]) as name:
        start = time.monotonic()
        engine.run("stop", "--time", "20", name)
        stop_seconds = time.monotonic() - start

    assert stop_seconds < 10


def test_the_health_check_tells_when_nobody_answers(engine: Engine, image: Image) -> None:
    with engine.container(image.tag, "simulate", options=LOCKED) as name:
        checked = engine.run("healthcheck", "run", name, check=False)

    assert checked.returncode == 1
