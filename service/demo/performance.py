"""The run of the demo: start everything, show the progress, check the result."""

import asyncio
import contextlib
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from service.demo.inspection import Finding, inspect
from service.demo.picture import Line, table_of, what_happens
from service.demo.scenes import Scene
from service.demo.stage import TTL_SECONDS, Stage, open_stage
from service.runtime.logging import configure_logging
from service.simulator import Generation

_LONGEST_SECONDS: Final = 50.0
_EVERY_SECONDS: Final = 0.125
_TITLE: Final = "Mayfly deletes sync.so generations once their time is up"
_PICTURE_WIDTH: Final = 110
_NUMBER: Final = re.compile(r"[0-9.]+")

Show = Callable[[list[Line]], None]


async def run_demo(picture: Path | None = None) -> bool:
    """Run the demo, print it, and return whether all checks passed; *picture* is the path of an SVG of the table.

    Its files are removed, except the log of a demo that failed.
    """
    folder = Path(tempfile.mkdtemp(prefix="mayfly-demo-"))
    try:
        is_right = await _run_in(folder, picture)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    if is_right:
        shutil.rmtree(folder, ignore_errors=True)
    return is_right


async def _run_in(folder: Path, picture: Path | None) -> bool:
    console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=200)
    console.print(
        "A simulator of the Sync API, an app, Mayfly's web side and worker, a Redis and a ledger start in this "
        f"process. Generations are kept for {TTL_SECONDS} seconds here instead of 24 hours. "
        "Mayfly forwards each webhook to the app, and deletes nothing whose webhook the app has not taken. "
        "The API answers some calls with errors.\n"
    )
    with _logs_to(folder / "mayfly.log"):
        async with open_stage(folder) as stage:
            lines, findings, richest = await _show_progress(stage, console)
    if picture is not None:
        _save_svg(richest, picture)
    _print_findings(console, lines, findings)
    is_right = not any(finding.violations for finding in findings)
    if not is_right:
        console.print(f"\nMayfly's log is in [bold]{escape(str(folder / 'mayfly.log'))}[/].")
    return is_right


async def _show_progress(stage: Stage, console: Console) -> tuple[list[Line], list[Finding], Table]:
    """Show the progress until all have ended; return the final lines, the findings, and the most varied table."""
    generations = stage.add_generations()
    forged, forged_status = await stage.send_forged_webhook()
    deadline = time.monotonic() + _LONGEST_SECONDS
    richest = (0, Table())
    with _live(console) if console.is_terminal else _plain(console) as show:
        while True:
            lines = await _read_lines(stage, generations)
            show(lines)
            now = datetime.now(UTC)
            if (variety := len({_NUMBER.sub("", what_happens(line, now)) for line in lines})) > richest[0]:
                richest = (variety, table_of(lines, now, _TITLE))
            if all(_has_ended(line) for line in lines) or time.monotonic() > deadline:
                break
            await asyncio.sleep(_EVERY_SECONDS)
    forwarded = stage.app.requests_about(forged.id)
    return lines, inspect(stage.simulator, lines, forged, forged_status, forwarded), richest[1]


async def _read_lines(stage: Stage, generations: list[tuple[Scene, Generation]]) -> list[Line]:
    records = await stage.read_records()
    return [
        Line(scene, generation, records.get(generation.id), tuple(stage.app.requests_about(generation.id)))
        for scene, generation in generations
    ]


def _has_ended(line: Line) -> bool:
    return line.record is not None and line.record.state is line.scene.ends and line.at_app == "✓"


@contextmanager
def _live(console: Console) -> Iterator[Show]:
    with Live(console=console, auto_refresh=False) as live:
        yield lambda lines: live.update(table_of(lines, datetime.now(UTC), _TITLE), refresh=True)


@contextmanager
def _plain(console: Console) -> Iterator[Show]:
    """Print a line for each change, for an output that is not a terminal."""
    began, printed = time.monotonic(), dict[str, tuple[object, ...]]()

    def show(lines: list[Line]) -> None:
        for line in lines:
            if printed.get(line.generation.id) != line.progress:
                printed[line.generation.id] = line.progress
                state = line.record.state if line.record else ""
                what = what_happens(line, datetime.now(UTC))
                names = f"{line.scene.title:24}  {line.at_sync:10}  {line.at_app:3}  {state:9}"
                text = f"{time.monotonic() - began:5.1f} s  {names}  {what}"
                console.print(text, markup=False, soft_wrap=True)

    yield show


def _print_findings(console: Console, lines: list[Line], findings: list[Finding]) -> None:
    console.print()
    for finding in findings:
        is_kept = not finding.violations
        console.print(f"[green]✓[/] {finding.promise}" if is_kept else f"[bold red]✗ {finding.promise}[/]")
        for violation in finding.violations:
            console.print(f"    {violation}", markup=False)
    names = ("outputUrl", "synthesizedAudioUrl", "outputFileName")
    records = [line.record for line in lines if line.record and line.record.deleted_at]
    urls = (sum(bool(r.output_url) for r in records), sum(bool(r.synthesized_audio_url) for r in records), len(records))
    copied = ", ".join(f"{number} {name}" for number, name in zip(urls, names, strict=True))
    console.print(f"\nCopied before they were deleted: {copied}, and the other fields of {len(records)} generations.")


def _save_svg(table: Table, path: Path) -> None:
    with Path("/dev/null").open("w") as nowhere:
        recorder = Console(record=True, width=_PICTURE_WIDTH, file=nowhere, highlight=False, force_terminal=True)
        recorder.print(table)
        recorder.save_svg(str(path), title="mayfly demo")


@contextmanager
def _logs_to(path: Path) -> Iterator[None]:
    """Write logs to *path*: on the terminal they would break the table."""
    with path.open("w") as file:
        with contextlib.redirect_stderr(file):
            configure_logging("json")
        try:
            yield
        finally:
            configure_logging(None)
