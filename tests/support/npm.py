"""Packages of npm, for tests that run TypeScript."""

import shutil
import subprocess
from pathlib import Path

import pytest

_INSTALL_SECONDS = 90


def install(folder: Path, *packages: str) -> Path:
    """Install *packages*, such as ``typescript@5.9.3``, into *folder*, where modules are ES modules, and return it.

    It skips the test where node or npm are not installed, or npm cannot get the packages.
    """
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are not installed")
    (folder / "package.json").write_text('{"private": true, "type": "module"}')
    quiet = ("--prefer-offline", "--no-audit", "--no-fund", "--ignore-scripts", "--no-save")
    try:
        subprocess.run(
            ["npm", "install", *quiet, *packages], cwd=folder, check=True, capture_output=True, timeout=_INSTALL_SECONDS
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"npm cannot install {packages[0]}: {type(error).__name__}")
    return folder
