"""`mayfly send --forward`: what each target would get, posted there directly, past the service and its ledger."""

import contextlib
import ssl
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Final
from uuid import uuid4

import click
import httpx
import msgspec

from service.commands.running import fail, print_json
from service.config.settings import Settings, SettingsError
from service.core.durations import format_duration
from service.core.forwarding import (
    DeliveryState,
    Outcome,
    Reply,
    Target,
    facts_for_targets,
    judge_reply,
)
from service.core.generation import Generation, MalformedError, read_generation
from service.core.matchers import Facts, Texts, values_of
from service.core.rule_words import describe_texts
from service.forwarding.posting import Outgoing, make_tls, open_poster
from service.runtime.terminal import plain

_KEYS: Final = {"status": "statuses", "account": "accounts"}
_INTRODUCTION: Final = "This goes to the targets directly, not through the service, and nothing is stored."


@dataclass(frozen=True, slots=True)
class Sample:
    """A webhook to try, of *account*, signed as sync.so does."""

    account: str
    body: bytes
    content_type: str
    signature: str


class Answer(msgspec.Struct, frozen=True, rename="camel"):
    """What a target answered after *seconds*: a *status*, or None, and how its body begins.

    *state* is what the delivery would be in then, *meaning* what the service would do.
    """

    seconds: float
    status: int | None
    body: str
    state: DeliveryState
    error: str | None
    meaning: str


class Trial(msgspec.Struct, frozen=True, rename="camel"):
    """One target: what it gets, and its answer; nothing is sent if *mismatches* says why it does not get this one.

    *url* is without its query, which may have a token.
    """

    target: str
    is_required: bool
    mismatches: list[str]
    url: str
    headers: dict[str, str]
    answer: Answer | None


class Trials(msgspec.Struct, frozen=True, rename="camel"):
    """The webhook of *generation*, or of a batch, and what became of it; *ok* if each target that gets it took it."""

    ok: bool
    account: str
    generation: str
    status: str
    body: str
    targets: list[Trial]


def require_targets(settings: Settings) -> None:
    """Raise SettingsError unless there is a target to try."""
    if not settings.targets:
        raise SettingsError(["there is no target to try: MAYFLY_CONFIG has no [[forward]]"])


async def try_targets(settings: Settings, sample: Sample, *, is_json: bool) -> bool:
    """Post *sample* to each target that gets it, print all, and return whether each of those took it."""
    try:
        generation = read_generation(sample.body)
    except MalformedError as error:
        fail(f"the service would refuse this body and forward nothing: {error}")
    if not is_json:
        _print_webhook(generation, sample)
    trials = []
    async for trial in _try_each(settings, sample, generation):
        trials.append(trial)
        if not is_json:
            _print_trial(trial, generation)
    took = [trial.answer.state is DeliveryState.DELIVERED for trial in trials if trial.answer is not None]
    if is_json:
        names = (sample.account, generation.id, generation.status)
        print_json(Trials(all(took), *names, sample.body.decode(), trials))
    elif not took:
        click.echo("\nNo target gets this webhook: nothing was sent.")
    return all(took)


async def _try_each(settings: Settings, sample: Sample, generation: Generation) -> AsyncIterator[Trial]:
    """Try one target after the other."""
    facts = facts_for_targets(sample.account, generation)
    tls = make_tls()
    for target in settings.targets:
        url, mark, _ = target.url.reveal().partition("?")
        make_trial = partial(Trial, target.id, target.is_required, url=f"{url}?…" if mark else url)
        if mismatches := target.find_mismatches(facts):
            found = [_describe_mismatch(matcher, facts) for matcher in mismatches]
            yield make_trial(mismatches=found, headers={}, answer=None)
        else:
            headers, answer = await _post(target, sample, tls)
            yield make_trial(mismatches=[], headers=headers, answer=answer)


async def _post(target: Target, sample: Sample, tls: ssl.SSLContext) -> tuple[dict[str, str], Answer]:
    """Post *sample* as a first attempt; return the headers that are sent, and the answer."""
    webhook = Outgoing(str(uuid4()), 1, sample.body, sample.content_type, sample.signature)
    now = datetime.now(UTC)
    # With one time for both, the headers that are shown are signed as those that are sent.
    async with open_poster(target, tls, now=lambda: now) as poster:
        sent: Sequence[tuple[bytes, bytes]] = ()
        with contextlib.suppress(httpx.InvalidURL):  # the reply says so
            sent = poster.build_request(webhook).headers.raw
        began = time.perf_counter()
        reply = await poster.post(webhook)
        seconds = time.perf_counter() - began
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in sent}
    outcome = judge_reply(reply, attempts=1, jitter=0)
    meaning = _describe_outcome(outcome, reply)
    return headers, Answer(round(seconds, 3), reply.status, reply.answer, outcome.state, outcome.error, meaning)


def _describe_mismatch(matcher: Texts, facts: Facts) -> str:
    """Name the key of the target that does not match, what it asks for, and what the webhook has."""
    found = ", ".join(values_of(facts, matcher.name)) or "none"
    return f"{_KEYS.get(matcher.name, 'labels')}: {describe_texts(matcher)}; this one: {found}"


def _describe_outcome(outcome: Outcome, reply: Reply) -> str:
    if outcome.state is DeliveryState.DELIVERED:
        return "it has taken the webhook"
    if outcome.wait is None:
        return "the service would not send it again, unless you say: mayfly forwards replay"
    asked = reply.retry_after is not None and reply.retry_after == outcome.wait
    why = ", as its Retry-After asks" if asked else ""
    return f"the service would send it again after {format_duration(int(outcome.wait.total_seconds()))}{why}"


def _print_webhook(generation: Generation, sample: Sample) -> None:
    click.echo(_INTRODUCTION)
    size = f"{len(sample.body)} bytes of {sample.content_type}"
    click.echo(f"\nThe webhook: {plain(generation.id)}, {plain(generation.status)}, {size}")
    _print_lines(sample.body.decode(), "  ")


def _print_trial(trial: Trial, generation: Generation) -> None:
    answer = trial.answer
    if answer is None:
        click.echo(f"\n{trial.target} does not get it, and nothing is sent")
        for mismatch in trial.mismatches:
            click.echo(f"  {plain(mismatch)}")
        return
    click.echo(f"\n{trial.target} gets it\n  POST {plain(trial.url)}")
    for name, value in trial.headers.items():
        click.echo(f"  {name}: {plain(value)}")
    said = answer.error or f"answered {answer.status}"
    click.echo(f"  → {plain(said)} ({answer.seconds:.3f} s): {answer.meaning}")
    if trial.is_required and generation.is_terminal and answer.state is not DeliveryState.DELIVERED:
        click.echo("    It is required: the generation would not be deleted before it has answered 2xx.")
    if answer.body:
        _print_lines(answer.body, "    | ")


def _print_lines(text: str, prefix: str) -> None:
    for line in text.rstrip("\n").split("\n"):
        click.echo(f"{prefix}{plain(line)}")
