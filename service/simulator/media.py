"""What the URLs in answers lead to: a few bytes of media, and the results of batches. They need no key.

Source: sync.so docs, "Get download URL", captured ``outputUrl`` values, and "Batch processing". A token in the URL is
the whole permission. Some report that ``outputUrl`` redirects to the storage; ``Switches.media_redirects`` does so.
"""

from service.simulator.answers import HTML, NOT_FOUND, TOKEN_WRONG, Answer, error
from service.simulator.generation import Generation
from service.simulator.organisation import Organisation
from service.simulator.requests import Request

_MP4 = b"\x00\x00\x00\x18ftypmp42\x00\x00\x00\x00mp42isom" + b"\x00\x00\x00\x0cmdat" + bytes(4)
_WAV = (
    b"RIFF\x2c\x00\x00\x00WAVEfmt \x10\x00\x00\x00\x01\x00\x01\x00\x40\x1f\x00\x00\x80\x3e\x00\x00\x02\x00\x10\x00"
    b"data\x08\x00\x00\x00" + bytes(8)
)
_PNG = b"\x89PNG\r\n\x1a\n"
_FILES = {"mp4": (_MP4, b"video/mp4"), "wav": (_WAV, b"audio/wav"), "png": (_PNG, b"image/png")}
_EXTENSIONS = {"result": "mp4", "segments": "mp4", "audio": "wav"}
JSONL = b"application/jsonl; charset=utf-8"
BATCH_NOT_FOUND = error(404, "Batch not found", "batch_not_found", error="Not Found")
NO_RESULTS = error(404, "The batch has no results yet", error="Not Found")


def storage_url(generation: Generation, part: str) -> str:
    """Return the signed URL of *part*, ``result``, ``audio`` or ``segments``."""
    name = f"{part}.{_EXTENSIONS[part]}"
    return f"{generation.url}/storage/generations/{generation.id}/{name}?signature={generation.token}"


class MediaRoutes:
    """``/v2/generations/{id}/result?token=…`` and the like, and ``/storage/…?signature=…``."""

    def __init__(self, organisation: Organisation) -> None:
        self._organisation = organisation

    def media(self, request: Request) -> Answer:
        _, root, collection, _, name = request.call.raw_path.split("/", 4)
        if root == "v2":
            return self._output(request, name)
        if collection == "generations":
            return self._stored_output(request, name)
        if collection == "assets":
            return self._stored_asset(request, name)
        batch = self._organisation.batches.get(request.id)
        if batch is None or batch.results is None:
            return NO_RESULTS
        return _refusal(request, "signature", batch.token) or Answer(200, batch.results, JSONL)

    def batch_result(self, request: Request) -> Answer:
        """Redirect from a batch's ``outputUrl`` to its results file."""
        batch = self._organisation.batches.get(request.id)
        if batch is None:
            return BATCH_NOT_FOUND
        if refusal := _refusal(request, "token", batch.token):
            return refusal
        return _redirect(batch.results_url) if batch.is_finished else NO_RESULTS

    def _output(self, request: Request, part: str) -> Answer:
        generation = self._find(request.id)
        if generation is None or generation.status != "COMPLETED":
            return NOT_FOUND
        if refusal := _refusal(request, "token", generation.token):
            return refusal
        if self._organisation.switches.media_redirects:
            return _redirect(storage_url(generation, part))
        return _file(f"{part}.{_EXTENSIONS[part]}")

    def _stored_output(self, request: Request, name: str) -> Answer:
        generation = self._find(request.id)
        if generation is None:
            return NOT_FOUND
        return _refusal(request, "signature", generation.token) or _file(name)

    def _stored_asset(self, request: Request, name: str) -> Answer:
        asset = self._organisation.assets.get(request.id)
        if asset is None:
            return NOT_FOUND
        return _refusal(request, "signature", asset.token) or _file(name)

    def _find(self, generation_id: str) -> Generation | None:
        """Return a generation; one that was deleted only if its media outlive it, which is undocumented."""
        gone = self._organisation.removed.get(generation_id) if self._organisation.switches.media_outlives else None
        return self._organisation.generations.get(generation_id) or gone


def _refusal(request: Request, name: str, token: str) -> Answer | None:
    return None if request.query.one(name) == token else TOKEN_WRONG


def _redirect(url: str) -> Answer:
    return Answer(302, b"", HTML, ((b"location", url.encode()),))


def _file(name: str) -> Answer:
    body, content_type = _FILES.get(name.rpartition(".")[2], (None, b""))
    return NOT_FOUND if body is None else Answer(200, body, content_type)
