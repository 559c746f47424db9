"""Podman for the deployment tests: build, run, inspect, kill; every wait has a timeout."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TAG = "localhost/mayfly:test-deploy"
_BUILD_SECONDS = 600
_PULL_SECONDS = 180


class EngineMissingError(Exception):
    """There is no container engine here, or no base image; the sentence is the reason for skipping."""


@dataclass(frozen=True, slots=True)
class Image:
    """The built image beside the base that it stands on; sizes in bytes."""

    tag: str
    size: int
    base_size: int
    config: dict[str, Any]


class Engine:
    """Podman on this machine, used from the project's folder *root*."""

    def __init__(self, program: str, root: Path) -> None:
        self.program = program
        self.root = root

    @classmethod
    def find(cls, root: Path) -> "Engine":
        """Return the engine.

        Raises: EngineMissingError.
        """
        program = shutil.which("podman")
        if program is None:
            raise EngineMissingError("podman is not on this machine")
        engine = cls(program, root)
        if engine.run("info", check=False).returncode != 0:
            raise EngineMissingError("podman does not work on this machine: see podman info")
        return engine

    def run(
        self, *arguments: str, check: bool = True, timeout: float = 60, stdin: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run ``podman`` with *arguments* in the project's folder."""
        return subprocess.run(
            [self.program, *arguments],
            cwd=self.root,
            input=stdin,
            capture_output=True,
            text=True,
            check=check,
            timeout=timeout,
        )

    def output(self, *arguments: str, timeout: float = 60) -> str:
        """Return what ``podman`` prints, stripped."""
        return self.run(*arguments, timeout=timeout).stdout.strip()

    def inspect(self, name: str) -> dict[str, Any]:
        """Return what podman knows of a container or an image."""
        found: list[dict[str, Any]] = json.loads(self.output("inspect", name))
        return found[0]

    def have(self, *images: str) -> None:
        """Make sure that *images* are here, pulling those that are not.

        Raises: EngineMissingError.
        """
        for image in images:
            if self.run("image", "exists", image, check=False).returncode == 0:
                continue
            try:
                self.run("pull", "--quiet", image, timeout=_PULL_SECONDS)
            except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
                raise EngineMissingError(f"the image {image} is not here and cannot be pulled") from None

    def build(self) -> Image:
        """Build the Dockerfile as it stands, with no argument of ours.

        Raises: EngineMissingError if the base image cannot be had.
        """
        text = (self.root / "deploy" / "Dockerfile").read_text(encoding="utf-8")
        base = re.findall(r"^ARG PYTHON_IMAGE=(\S+)$", text, re.MULTILINE)[0]
        self.have(base)
        command = f"build --pull=never --format docker --tag {TAG} --file deploy/Dockerfile ."
        built = self.run(*command.split(), timeout=_BUILD_SECONDS, check=False)
        if built.returncode != 0:
            raise AssertionError(f"the image does not build:\n{built.stdout[-2000:]}\n{built.stderr[-3000:]}")
        found, base_found = self.inspect(TAG), self.inspect(base)
        config = {**found["Config"], "Healthcheck": found["Healthcheck"]}
        return Image(TAG, found["Size"], base_found["Size"], config)

    @contextmanager
    def container(self, image: str, *arguments: str, options: Sequence[str] = ()) -> Iterator[str]:
        """Run a container in the background, yield its id, and remove it with its volumes."""
        name = self.output("run", "--detach", "--pull=never", *options, image, *arguments).splitlines()[-1]
        try:
            yield name
        finally:
            self.run("rm", "--force", "--volumes", "--time", "1", name, check=False)

    def kill(self, name: str) -> None:
        """Kill the first process as a crash would; ``podman kill`` would also prevent the restart."""
        pid = int(self.inspect(name)["State"]["Pid"])
        if pid <= 1:
            raise AssertionError(f"{name} does not run:\n{self.logs(name)}")
        if os.geteuid() == 0:
            os.kill(pid, signal.SIGKILL)
        else:
            self.run("unshare", "kill", "-KILL", str(pid))

    def logs(self, name: str) -> str:
        """Return the last lines that a container wrote."""
        shown = self.run("logs", "--tail", "40", name, check=False)
        return shown.stdout + shown.stderr


def wait_until(is_done: Callable[[], bool], *, seconds: float, what: str, every: float = 0.1) -> float:
    """Wait until *is_done* and return how many seconds that took.

    Raises: AssertionError after *seconds*.
    """
    start = time.monotonic()
    while not is_done():
        if time.monotonic() - start > seconds:
            raise AssertionError(f"not within {seconds} s: {what}")
        time.sleep(every)
    return time.monotonic() - start
