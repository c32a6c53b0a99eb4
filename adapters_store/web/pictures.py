"""Pictures as SVG, made on the server and kept by what they show."""

from __future__ import annotations

from fastapi import APIRouter, HTTPException
from starlette.responses import Response

from adapters_store.store import Store
from adapters_store.web import differences, fidelity, metrics
from adapters_store.web.answers import svg
from adapters_store.web.selection import find, parse, versions


def router(store: Store) -> APIRouter:
    """Everything under `/pictures`."""
    routes = APIRouter(prefix="/pictures", include_in_schema=False)

    @routes.get("/metrics/{name:path}")
    def metric(name: str, metric: str) -> Response:
        for line in metrics.series(versions(store, parse(name).name)):
            if line.name == metric and line.drawable:
                return svg(metrics.draw(line))
        raise HTTPException(404, f"{name}: no version has a metric of that name that can be drawn")

    @routes.get("/fidelity/{reference:path}")
    def certificate(reference: str, certificate: str, section: int) -> Response:
        return svg(fidelity.picture(store, find(store, reference).reference, certificate, section))

    @routes.get("/diff")
    def difference(a: str, b: str) -> Response:
        return svg(differences.picture(store, find(store, a), find(store, b)))

    return routes
