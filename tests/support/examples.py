"""The programs of deploy/examples as processes."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

from tests.support.ports import free_port
from tests.support.readme import ROOT
from tests.support.waiting import eventually

LANGUAGES = ("python", "typescript")
EXAMPLES = ROOT / "deploy" / "examples"
# What compiles the TypeScript, what it is typed with, and what it imports.
PACKAGES = ("typescript@5.9.3", "@types/node@22", "standardwebhooks@1.1.1")
# As node itself runs TypeScript from 22.18 on, which strips types and checks none.
OPTIONS = (
    *("--strict", "--noUncheckedIndexedAccess", "--noImplicitReturns", "--skipLibCheck", "--types", "node"),
    *("--erasableSyntaxOnly", "--verbatimModuleSyntax", "--module", "nodenext", "--target", "es2022"),
)


def compile_examples(folder: Path) -> None:
    """Check and compile the examples in TypeScript, in a *folder* with PACKAGES.

    Raises: CalledProcessError with what the compiler says.
    """
    sources = [folder / path.name for path in sorted(EXAMPLES.glob("*.ts"))]
    for source in sources:
        source.write_bytes((EXAMPLES / source.name).read_bytes())
    subprocess.run(
        ["node", "node_modules/typescript/bin/tsc", *OPTIONS, *(source.name for source in sources)],
        cwd=folder,
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )


class Example:
    """One example in *folder*, where it keeps its files, with nothing of our own environment but *env*.

    *modules* is the folder of ``compile_examples``, for the one in TypeScript; without it, it is the one in Python.
    """

    def __init__(self, name: str, folder: Path, modules: Path | None, env: dict[str, str]) -> None:
        self.folder = folder
        self._command = (
            ["node", str(modules / f"{name}.js")] if modules else [sys.executable, str(EXAMPLES / f"{name}.py")]
        )
        self._port = free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        clean = {
            key: value for key, value in os.environ.items() if not key.startswith(("SYNC_", "MAYFLY_", "FORWARD_"))
        }
        self._env = clean | {"PORT": str(self._port), "PYTHONUNBUFFERED": "1"} | env
        self._process: subprocess.Popen[bytes] | None = None

    async def run(self, *arguments: str) -> tuple[int, str]:
        """Run it to its end; return its exit code and all that it printed."""
        process = await asyncio.create_subprocess_exec(
            *self._command,
            *arguments,
            cwd=self.folder,
            env=self._env,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        try:
            output, _ = await asyncio.wait_for(process.communicate(), 60)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        return process.returncode or 0, output.decode()

    async def start(self) -> None:
        """Start the server that it is, and return once it listens."""
        self._spawn()
        await eventually(self._listens, seconds=30)

    async def kill9(self) -> None:
        """Kill it with SIGKILL."""
        await asyncio.to_thread(self.stop)

    def stop(self) -> None:
        """End it, whatever state it is in."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def output(self) -> str:
        """Return all that the server printed, of all its runs."""
        return (self.folder / "output.log").read_text()

    def _spawn(self) -> None:
        with (self.folder / "output.log").open("ab") as log:
            self._process = subprocess.Popen(self._command, cwd=self.folder, env=self._env, stdout=log, stderr=log)

    async def _listens(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self.output()
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", self._port)
        except ConnectionError:
            return False
        writer.close()
        await writer.wait_closed()
        return True
