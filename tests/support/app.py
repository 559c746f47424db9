"""The user's app: it receives the webhooks that Mayfly forwards, keeps each and answers by script.

In the process of the test::

    async with App() as app:
        app.script(Answer(503, headers=(("Retry-After", "7"),)), Answer(500), generation=webhook.id)
        ...  # let Mayfly forward to f"{app.url}/hooks"
        first, second = await app.wait_for(2, generation=webhook.id)
        assert first.delivery == second.delivery

Or as a process of its own, which has its own event loop and can be killed: ``async with AppProcess(tmp_path) as app:``.
Both have the same ``url``, ``requests``, ``received``, ``script``, ``wait_for``, ``refuse`` and ``accept``.
"""

import asyncio
import base64
import json
import socket
import struct
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import httptools

from tests.support.ports import free_port
from tests.support.waiting import eventually

ROOT = Path(__file__).parents[2]
_CHUNK = 2**16
_REASONS = {
    200: "OK",
    204: "No Content",
    302: "Found",
    410: "Gone",
    429: "Too Many Requests",
    503: "Service Unavailable",
}

# What happens once a request was read whole: it is answered; half of the answer is sent and the connection closed; the
# connection is closed, or reset, without an answer; nothing at all.
End = Literal["answer", "cut", "close", "reset", "never"]


@dataclass(frozen=True, slots=True)
class Answer:
    """How one request is answered; durations are in seconds."""

    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    body: str = ""
    filler: int = 0  # so many bytes "x" after the body, sent piece by piece, for answers of any size
    delay: float = 0.0  # before the first byte
    drip_head: float = 0.0  # before each byte of the status line and headers
    drip: float = 0.0  # before each byte of the body
    end: End = "answer"


@dataclass(slots=True)
class Received:
    """One request as it came, in the order in which they were read whole."""

    at: float  # seconds since 1970, when it was read whole
    method: str
    path: str  # with its query
    headers: tuple[tuple[str, str], ...]  # names in the case received
    body: bytes
    number: int = 0  # its place among all requests, from 0
    begun: int | None = None  # the status, just before the first byte of the answer is sent
    begun_at: float | None = None
    answered: int | None = None  # the status, once the answer was sent whole

    def header(self, name: str) -> str | None:
        """Return the value of the header *name* in any case; those of several joined by a comma, None without one."""
        values = [value for found, value in self.headers if found.lower() == name.lower()]
        return ", ".join(values) if values else None

    @property
    def delivery(self) -> str | None:
        """Mayfly-Delivery."""
        return self.header("Mayfly-Delivery")

    @property
    def attempt(self) -> int:
        """Mayfly-Attempt, 0 without one."""
        return int(self.header("Mayfly-Attempt") or 0)

    @property
    def generation(self) -> str | None:
        """The id in the body, of a generation or of a batch."""
        try:
            found = json.loads(self.body)
        except ValueError:
            return None
        return str(found["id"]) if isinstance(found, dict) and "id" in found else None

    def matches(self, *, path: str | None, generation: str | None, delivery: str | None) -> bool:
        """Return whether each of those that are given is this request's; *path* is compared without the query."""
        return (
            path in (None, self.path.partition("?")[0])
            and generation in (None, self.generation)
            and delivery in (None, self.delivery)
        )


@dataclass(slots=True)
class _Script:
    path: str | None
    generation: str | None
    delivery: str | None
    is_for_ever: bool
    answers: list[Answer] = field(default_factory=list)

    def next(self) -> Answer:
        return self.answers[0] if self.is_for_ever else self.answers.pop(0)


class App:
    """A receiver on a real socket of 127.0.0.1; give *port* to have one that others know beforehand."""

    def __init__(self, port: int = 0) -> None:
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._requests: list[Received] = []
        self.default = Answer()  # for requests that no script is for
        self.most_at_once = 0  # the most requests that were under way at the same time
        self.connections = 0  # made so far
        self._under_way = 0
        self._first = 0  # the number of the first request
        self._scripts: list[_Script] = []
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.Task[Any]] = set()

    @property
    def requests(self) -> list[Received]:
        """All requests so far, in the order in which they were read whole."""
        return self._requests

    def script(
        self,
        *answers: Answer,
        path: str | None = None,
        generation: str | None = None,
        delivery: str | None = None,
        is_for_ever: bool = False,
    ) -> None:
        """Answer the next requests with that path, generation and delivery by *answers* in order, each one once.

        Of several scripts for a request the first given goes first, until it is used up; after all of them comes
        ``default``. With *is_for_ever* the one answer is given again and again.
        """
        self._scripts.append(_Script(path, generation, delivery, is_for_ever, list(answers)))

    def forget_scripts(self) -> None:
        """Answer all requests from now on with ``default``."""
        self._scripts.clear()

    def received(
        self, *, path: str | None = None, generation: str | None = None, delivery: str | None = None
    ) -> list[Received]:
        """Return the requests with that path, generation and delivery, in order."""
        return [one for one in self.requests if one.matches(path=path, generation=generation, delivery=delivery)]

    async def wait_for(self, count: int, *, seconds: float = 10.0, **which: str | None) -> list[Received]:
        """Return the first *count* requests that match *which*, as of ``received``, once they are there.

        Raises: TimeoutError after *seconds*.
        """
        await eventually(lambda: len(self.received(**which)) >= count, seconds=seconds)
        return self.received(**which)[:count]

    async def refuse(self) -> None:
        """Listen no more and cut all connections: whoever connects is refused until ``accept``."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for task in self._open:
            task.cancel()
        if self._open:
            await asyncio.wait(self._open)

    async def accept(self) -> None:
        """Listen (again), on the same port."""
        if self._server is None:
            self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)

    async def __aenter__(self) -> Self:
        await self.accept()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.refuse()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        self.connections += 1
        try:
            while (request := await _read(reader)) is not None:
                request.number = self._first + len(self._requests)
                self._requests.append(request)
                self._note(request)
                self._under_way += 1
                self.most_at_once = max(self.most_at_once, self._under_way)
                try:
                    if not await self._answer(request, writer):
                        break
                finally:
                    self._under_way -= 1
        except (asyncio.CancelledError, ConnectionError, httptools.HttpParserError):
            pass  # the other side went, sent no HTTP, or refuse() cut it: that is what tests do
        finally:
            self._open.discard(task)
            writer.transport.abort()

    async def _answer(self, request: Received, writer: asyncio.StreamWriter) -> bool:
        """Answer it; return whether the connection may be used again."""
        answer = self._choose(request)
        await asyncio.sleep(answer.delay)
        if answer.end == "never":
            await asyncio.Event().wait()
        if answer.end == "reset":
            linger = struct.pack("ii", 1, 0)  # a close with unsent data thrown away: RST
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        if answer.end in ("reset", "close"):
            return False
        request.begun, request.begun_at = answer.status, time.time()
        self._note(request)
        await _write(writer, answer)
        if answer.end == "cut":
            return False
        request.answered = answer.status
        self._note(request)
        return True

    def _choose(self, request: Received) -> Answer:
        for script in self._scripts:
            if script.answers and request.matches(
                path=script.path, generation=script.generation, delivery=script.delivery
            ):
                return script.next()
        return self.default

    def _note(self, request: Received) -> None:
        """A request came, or its answer begins or has ended; for the process, which tells its parent."""


class AppProcess(App):
    """An ``App`` in a process of its own: it has its own event loop, and can be killed and started again.

    Its requests are written to a file in *folder*, so that they outlive the process; scripts do not. What ``default``,
    ``connections`` and ``most_at_once`` are, only an ``App`` in the test's own process can say.
    """

    def __init__(self, folder: Path, port: int = 0) -> None:
        super().__init__(port)
        self._file = folder / f"app-{self.port}.jsonl"
        self._file.touch()
        self._read_to = 0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The id of the present process."""
        assert self._process is not None
        return self._process.pid

    async def start(self) -> None:
        """Start it; return once it listens."""
        self._spawn()
        await self._obeyed()

    async def kill9(self) -> None:
        """Kill it with SIGKILL: its connections break and its port refuses."""
        assert self._process is not None
        self._process.kill()
        await asyncio.to_thread(self._process.communicate)

    def script(
        self,
        *answers: Answer,
        path: str | None = None,
        generation: str | None = None,
        delivery: str | None = None,
        is_for_ever: bool = False,
    ) -> None:
        """As ``App.script``; it holds for the present process."""
        which = {"path": path, "generation": generation, "delivery": delivery, "is_for_ever": is_for_ever}
        self._order("script", answers=[asdict(answer) for answer in answers], **which)

    def forget_scripts(self) -> None:
        """As ``App.forget_scripts``."""
        self._order("forget_scripts")

    @property
    def requests(self) -> list[Received]:
        """As ``App.requests``."""
        self._catch_up()
        return self._requests

    async def refuse(self) -> None:
        """As ``App.refuse``; the process goes on."""
        self._order("refuse")
        await self._obeyed()

    async def accept(self) -> None:
        """As ``App.accept``."""
        self._order("accept")
        await self._obeyed()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self._process is not None and self._process.poll() is None:
            await self.kill9()
        self._catch_up()

    def _spawn(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.app", str(self.port), str(self._file)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def _order(self, order: str, **arguments: object) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([order, arguments]).encode() + b"\n")
        self._process.stdin.flush()

    async def _obeyed(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        line = await asyncio.to_thread(self._process.stdout.readline)
        assert line == b"ok\n", "the app ended"

    def _catch_up(self) -> None:
        with self._file.open("rb") as file:
            file.seek(self._read_to)
            lines = [line for line in file.read().splitlines(keepends=True) if line.endswith(b"\n")]
        self._read_to += sum(map(len, lines))
        for line in lines:
            found = json.loads(line)
            if "method" in found:
                headers = tuple((name, value) for name, value in found.pop("headers"))
                self._requests.append(Received(headers=headers, body=base64.b64decode(found.pop("body")), **found))
            else:
                request = self._requests[found["number"]]
                request.begun, request.begun_at, request.answered = found["begun"]


class _Child(App):
    """What runs in the process."""

    def __init__(self, port: int, file: Path) -> None:
        super().__init__(port)
        self._lines = file.open("ab", buffering=0)
        before = file.read_bytes().splitlines()  # written by the processes before this one
        self._first = sum(b'"method"' in line for line in before)

    def _note(self, request: Received) -> None:
        begun = (request.begun, request.begun_at, request.answered)
        line: dict[str, object] = {"number": request.number, "begun": begun}
        if request.begun is None:
            line = asdict(request) | {"body": base64.b64encode(request.body).decode()}
        self._lines.write(json.dumps(line).encode() + b"\n")

    async def obey(self) -> None:
        """Follow the orders on standard input until it ends."""
        await self.accept()
        _say_ok()
        while line := await asyncio.to_thread(sys.stdin.buffer.readline):
            order, arguments = json.loads(line)
            if order == "script":
                answers = [
                    Answer(**answer | {"headers": tuple((name, value) for name, value in answer["headers"])})
                    for answer in arguments.pop("answers")
                ]
                self.script(*answers, **arguments)
            elif order == "forget_scripts":
                self.forget_scripts()
            else:
                await (self.refuse() if order == "refuse" else self.accept())
                _say_ok()
        await self.refuse()
        self._lines.close()


class _Request:
    """What httptools' parser calls."""

    def __init__(self) -> None:
        self.path = b""
        self.headers: list[tuple[str, str]] = []
        self.body: list[bytes] = []
        self.is_whole = False

    def on_url(self, url: bytes) -> None:
        self.path += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.decode("latin-1"), value.decode("latin-1")))

    def on_body(self, body: bytes) -> None:
        self.body.append(body)

    def on_message_complete(self) -> None:
        self.is_whole = True


async def _read(reader: asyncio.StreamReader) -> Received | None:
    """Return the next request of a connection, None once the other side has closed it."""
    request = _Request()
    parser = httptools.HttpRequestParser(request)
    while not request.is_whole:
        data = await reader.read(_CHUNK)
        if not data:
            return None
        parser.feed_data(data)
    method = parser.get_method().decode()
    return Received(time.time(), method, request.path.decode(), tuple(request.headers), b"".join(request.body))


async def _write(writer: asyncio.StreamWriter, answer: Answer) -> None:
    body = answer.body.encode()
    size = len(body) + answer.filler
    headers = [*answer.headers, *([] if answer.status == 204 else [("Content-Length", str(size))])]
    lines = [f"HTTP/1.1 {answer.status} {_REASONS.get(answer.status, 'Scripted')}", *(f"{n}: {v}" for n, v in headers)]
    await _send(writer, "".join(f"{line}\r\n" for line in [*lines, ""]).encode("latin-1"), pause=answer.drip_head)
    left = size // 2 if answer.end == "cut" else size
    await _send(writer, body[:left], pause=answer.drip)
    left -= len(body[:left])
    while left > 0:
        piece = b"x" * min(left, _CHUNK)
        await _send(writer, piece, pause=answer.drip)
        left -= len(piece)


async def _send(writer: asyncio.StreamWriter, data: bytes, *, pause: float) -> None:
    for piece in [data] if pause == 0 else [data[at : at + 1] for at in range(len(data))]:
        await asyncio.sleep(pause)
        writer.write(piece)
        await writer.drain()


def _say_ok() -> None:
    sys.stdout.write("ok\n")
    sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(_Child(int(sys.argv[1]), Path(sys.argv[2])).obey())
