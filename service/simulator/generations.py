"""The routes of one generation: get, with or without a wait, delete, and the URL of the download.

Source: sync.so API reference, "Get generation", "Delete generation" and "Get download URL".
"""

from dataclasses import replace

from service.simulator.answers import NOT_FOUND, STILL_PROCESSING, Answer, RefusedError, error, invalid
from service.simulator.generation import UNFINISHED
from service.simulator.media import storage_url
from service.simulator.organisation import Organisation
from service.simulator.requests import Request

NO_OUTPUT = error(400, "The generation has no output", error="Bad Request")
_RETRY_AFTER_SECONDS = 2


class GenerationRoutes:
    """``/v2/generate/{id}`` and ``/v2/generations/{id}``; only the first one waits."""

    def __init__(self, organisation: Organisation) -> None:
        self._organisation = organisation

    def get(self, request: Request) -> Answer:
        generation = self._organisation.generations.get(request.id)
        return NOT_FOUND if generation is None else Answer(200, generation.encoded())

    @staticmethod
    def is_long_poll(request: Request) -> bool:
        return "wait=" in request.call.query and request.call.raw_path.startswith("/v2/generate/")

    async def long_poll(self, request: Request) -> Answer:
        """Answer at the final status, or with the present one after the timeout."""
        try:
            seconds = _wait_seconds(request)
        except RefusedError as refused:
            return refused.answer
        generation = self._organisation.generations.get(request.id)
        if seconds is None or generation is None:
            return self.get(request)
        await generation.wait_until_ended(seconds)
        headers = (
            (b"retry-after", b"%d" % _RETRY_AFTER_SECONDS),
            (b"x-sync-wait-mode", b"long_poll"),
            (b"x-sync-wait-timeout-seconds", b"%d" % seconds),
        )
        return replace(self.get(request), headers=headers)

    def delete(self, request: Request) -> Answer:
        generation = self._organisation.generations.get(request.id)
        if generation is None:
            return NOT_FOUND
        if generation.status in UNFINISHED:
            return STILL_PROCESSING
        self._organisation.remove(generation.id)
        return Answer(200, generation.encoded())

    def download(self, request: Request) -> Answer:
        """Answer with the URL alone, as text: neither JSON nor a redirect."""
        generation = self._organisation.generations.get(request.id)
        if generation is None:
            return NOT_FOUND
        if generation.status != "COMPLETED":
            return NO_OUTPUT
        return Answer(200, storage_url(generation, "result").encode(), b"text/plain; charset=utf-8")


def _wait_seconds(request: Request) -> int | None:
    """Return the timeout of a long poll; None if the query does not ask for one."""
    query = request.query
    if not query.flag("wait"):
        return None
    if "progress" in (query.several("include") or ()):
        raise invalid("include", "include=progress cannot be combined with wait=true")
    return query.integer("timeout", low=1, high=10) or 5
