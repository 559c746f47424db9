"""``GET /v2/generations`` and ``GET /v2/generations/count``.

Source: sync.so API reference, "List generations" and "Count generations". The list is a plain array, without a total
or a link to the next page. It is paged, newest first, only with ``limit``; without, it is everything, in no order.
"""

from itertools import islice
from zlib import crc32

from service.simulator.answers import Answer, invalid, json_answer
from service.simulator.creating import GENERATION_SOURCES
from service.simulator.generation import STATUSES, Generation
from service.simulator.organisation import Organisation
from service.simulator.query import Query
from service.simulator.requests import Request


class ListRoutes:
    """The generations of the whole organisation, whoever created them and with whatever key."""

    def __init__(self, organisation: Organisation) -> None:
        self._organisation = organisation

    def list_generations(self, request: Request) -> Answer:
        query, switches = request.query, self._organisation.switches
        limit, cursor = query.integer("limit", low=1, high=100), query.one("cursor")
        if cursor is not None and limit is None:
            raise invalid("cursor", "cursor requires limit")
        if cursor is not None and switches.dead_cursor == "400" and cursor not in self._organisation.generations:
            raise invalid("cursor", "cursor is not the id of a generation")
        wanted = _Filter(query)
        matching = (
            item
            for item in self._organisation.newest(cursor)
            if wanted.matches(item) and (switches.lists_batches or item.batch_id is None)
        )
        if limit is None:
            # Another order with each call: a client that relies on one shall notice.
            salt = len(self._organisation.calls)
            page = sorted(matching, key=lambda item: crc32(f"{salt}{item.id}".encode()))
        else:
            page = list(islice(matching, limit))
        return Answer(200, b"[" + b",".join(item.encoded() for item in page) + b"]")

    def count(self, request: Request) -> Answer:
        query = request.query
        wanted = _Filter(query)
        sources = query.several("generationSource", known=GENERATION_SOURCES)
        types = query.several("type", known=("playground", "api"))
        query.flag("currentUserOnly")  # the simulator has one user
        found = sum(
            (sources is None or item.generation_source in sources)
            and (types is None or ("playground" if item.is_playground else "api") in types)
            and wanted.matches(item)
            for item in self._organisation.newest()
        )
        return json_answer(200, {"count": found})


class _Filter:
    """The filters that both routes share; a generation must pass all."""

    def __init__(self, query: Query) -> None:
        self._statuses = query.several("status", known=STATUSES)
        self._ids = query.several("ids")
        self._sources = query.several("source")
        self._project_id = query.uuid("projectId")

    def matches(self, generation: Generation) -> bool:
        return (
            (self._statuses is None or generation.status in self._statuses)
            and (self._ids is None or generation.id in self._ids)
            and (self._sources is None or generation.source in self._sources)
            and self._project_id in (None, generation.project_id)
        )
