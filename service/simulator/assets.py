"""``/v2/assets…``.

Source: sync.so API reference, "Assets API", and the types of the Python SDK.
"""

from itertools import islice

from service.simulator.answers import Answer, error, json_answer
from service.simulator.asset import TYPES, Asset
from service.simulator.organisation import Organisation
from service.simulator.requests import Request

ASSET_NOT_FOUND = error(404, "Asset not found", "asset_not_found", error="Not Found")
ASSET_FORBIDDEN = error(403, "The asset belongs to another member", "asset_forbidden", error="Forbidden")
_ORDERS = ("name", "date", "duration", "size", "kind")


class AssetRoutes:
    """``/v2/assets…``."""

    def __init__(self, organisation: Organisation) -> None:
        self._organisation = organisation

    def list_assets(self, request: Request) -> Answer:
        query = request.query
        limit = query.integer("limit", low=1, high=100) or 100
        cursor, order = query.one("cursor"), query.one("sortBy") or "dateDesc"
        types = query.several("types", known=TYPES)
        project_id, text = query.uuid("projectId"), (query.one("searchQuery") or "").casefold()
        query.several("sortBy", known=[name + end for name in _ORDERS for end in ("Asc", "Desc")])
        found = [
            asset
            for asset in self._organisation.assets.values()
            if (types is None or asset.type in types)
            and project_id in (None, asset.project_id)
            and text in asset.name.casefold()
        ]
        found.sort(key=lambda asset: _sort_key(asset, order), reverse=order.endswith("Desc"))
        start = next((number + 1 for number, asset in enumerate(found) if asset.id == cursor), 0)
        page = list(islice(found, start, start + limit))
        has_more = start + limit < len(found)
        return json_answer(
            200,
            {
                "items": [asset.body() for asset in page],
                "nextCursor": page[-1].id if has_more else None,
                "totalCount": len(found),
            },
        )

    def get(self, request: Request) -> Answer:
        asset = self._organisation.assets.get(request.id)
        return ASSET_NOT_FOUND if asset is None else json_answer(200, asset.body())

    def delete(self, request: Request) -> Answer:
        asset = self._organisation.assets.get(request.id)
        if asset is None:
            return ASSET_NOT_FOUND
        if not asset.is_own:
            return ASSET_FORBIDDEN
        del self._organisation.assets[asset.id]
        return json_answer(200, {"id": asset.id})

    def download(self, request: Request) -> Answer:
        asset = self._organisation.assets.get(request.id)
        if asset is None:
            return ASSET_NOT_FOUND
        return Answer(200, asset.storage_url.encode(), b"text/plain; charset=utf-8")


def _sort_key(asset: Asset, order: str) -> tuple[object, ...]:
    name = order.removesuffix("Asc").removesuffix("Desc")
    return ({"name": asset.name, "size": asset.size, "kind": asset.type}.get(name, ""), asset.created_at, asset.id)
