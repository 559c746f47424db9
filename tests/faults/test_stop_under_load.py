"""Row 19, on the web side: a SIGTERM under load interrupts no answer, and each 202 has its record."""

import asyncio
import re
import signal
import sqlite3
from contextlib import closing, suppress
from typing import Any

import pytest

from tests.faults.website import website
from tests.support.webhooks import webhook

CONNECTIONS = 32
_CODE = re.compile(rb"HTTP/1\.1 ([0-9]{3}) ")
_LENGTH = re.compile(rb"content-length: ([0-9]+)", re.IGNORECASE)


class Load:
    """Sends webhooks over one connection after the other and keeps what came of each."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.taken: list[str] = []
        self.refused: list[bytes] = []
        self.cut: list[bytes] = []

    async def send(self) -> None:
        """Send over one connection until the server closes it."""
        with suppress(OSError, asyncio.IncompleteReadError):
            reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
            with closing(writer):
                while True:
                    sent = webhook()
                    headers = "".join(f"{name}: {value}\r\n" for name, value in sent.headers.items())
                    head = (
                        f"POST /webhooks/sync HTTP/1.1\r\nHost: x\r\nContent-Length: {len(sent.body)}\r\n{headers}\r\n"
                    )
                    writer.write(head.encode() + sent.body)
                    await self._note(sent.id, reader)

    async def _note(self, generation_id: str, reader: asyncio.StreamReader) -> None:
        answer = b""
        try:
            answer = await reader.readuntil(b"\r\n\r\n")
            length = _LENGTH.search(answer)
            assert length is not None
            answer += await reader.readexactly(int(length[1]))
        except asyncio.IncompleteReadError as error:
            if answer + error.partial:
                self.cut.append(answer + error.partial)
            raise
        code = _CODE.match(answer)
        if code is not None and code[1] == b"202":
            self.taken.append(generation_id)
        else:
            self.refused.append(answer)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_stop_under_load_interrupts_no_answer_and_each_202_has_a_record(
    starter: Any,  # noqa: ANN401 - as the other faults have it
    tmp_path: Any,  # noqa: ANN401
    number: signal.Signals,
):
    with website(starter, tmp_path) as site:
        load = Load(site.port)
        clients = [asyncio.create_task(load.send()) for _ in range(CONNECTIONS)]
        await asyncio.sleep(1.5)
        site.process.send(number)
        await asyncio.wait_for(asyncio.gather(*clients), 30)
        code = await site.process.ended(30)
        with closing(sqlite3.connect(site.ledger)) as connection:
            stored = {generation_id for (generation_id,) in connection.execute("SELECT id FROM records")}

    assert code == 0
    assert len(load.taken) > CONNECTIONS
    assert set(load.taken) <= stored
    assert (load.cut, load.refused) == ([], [])
