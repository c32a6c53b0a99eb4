"""The same as the pages, as JSON."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Query
from starlette.responses import Response

from adapters_store.store import Store
from adapters_store.web import differences, fidelity, metrics
from adapters_store.web.ancestry import family
from adapters_store.web.answers import json_answer
from adapters_store.web.search import Page, Search, search
from adapters_store.web.selection import find, parse, versions
from reft_plugins.errors import StoreError

API_PAGE_SIZE = 500

PageNumber = Annotated[int, Query(ge=1, le=10**9)]


def router(store: Store) -> APIRouter:
    """Everything under `/api`."""
    routes = APIRouter(prefix="/api")

    @routes.get("/adapters")
    def adapters(
        name: str = "", method: str = "", base: str = "", tag: str = "", metric: str = "", page: PageNumber = 1
    ) -> Response:
        """Adapters with their newest version, filtered and in pages."""
        wanted = Search(name, method, base, tag, metric, page)
        try:
            wanted.check()
        except StoreError as error:
            raise HTTPException(400, str(error)) from None
        found = search(store, wanted)
        return json_answer(_page(found, "adapters", [row.to_dict() for row in found.items]))

    @routes.get("/adapters/{reference:path}")
    def adapter(reference: str, page: PageNumber = 1) -> Response:
        """One version with its manifests and attachments; of a bare name its versions, in pages."""
        parsed = parse(reference)
        if parsed.exact:
            attached = [each.to_dict() for each in store.attachments(reference)]
            return json_answer({**store.show(reference).to_dict(), "attachments": attached})
        found = Page.of(versions(store, parsed.name), page, API_PAGE_SIZE)
        return json_answer(_page(found, "versions", [record.to_dict() for record in found.items]))

    @routes.get("/history/{name:path}")
    def history(name: str, page: PageNumber = 1) -> Response:
        """What was done to an adapter, the latest first, in pages."""
        found = Page.of(store.history(parse(name).name)[::-1], page, API_PAGE_SIZE)
        return json_answer(_page(found, "events", [event.to_dict() for event in found.items]))

    @routes.get("/metrics/{name:path}")
    def measured(name: str) -> Response:
        """Values of every metric by version."""
        found = metrics.series(versions(store, parse(name).name))
        return json_answer({line.name: dict(line.points) for line in found})

    @routes.get("/lineage/{reference:path}")
    def lineage(reference: str, children: bool | None = None) -> Response:
        """Ancestors, and descendants if asked for; unasked in small stores only, where finding them takes no time."""
        return json_answer(family(store, find(store, reference).reference, children).to_dict())

    @routes.get("/fidelity/{reference:path}")
    def certificates(reference: str) -> Response:
        """Certificates of exports."""
        return json_answer(fidelity.documents(store, find(store, reference).reference))

    @routes.get("/diff")
    def difference(a: str, b: str) -> Response:
        """All that two versions differ in."""
        return json_answer(differences.compare(store, find(store, a), find(store, b)).to_dict())

    return routes


def _page(page: Page[Any], what: str, items: list[dict[str, Any]]) -> dict[str, Any]:
    return {"page": page.number, "pages": page.pages, "total": page.total, what: items}
