"""Pages for people."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import APIRouter, Query
from starlette.responses import Response

from adapters_store.layout.oci import CERTIFICATE_TYPE, SIGNATURE_TYPE
from adapters_store.records import Record
from adapters_store.store import Store
from adapters_store.trust.admission import Decision, decisions
from adapters_store.trust.policy import active
from adapters_store.web import differences, facts, fidelity, graph, howto, metrics
from adapters_store.web.ancestry import address_of, branches, family, name_of, sketch
from adapters_store.web.answers import html
from adapters_store.web.rendering import address, number
from adapters_store.web.search import Page, Search, search
from adapters_store.web.selection import find, options, parse, versions
from reft_plugins.errors import ReftError, StoreError, UntrustedError

PageNumber = Annotated[int, Query(ge=1, le=10**9)]
Text = Annotated[str, Query(max_length=500)]

KINDS = {SIGNATURE_TYPE: "Signature", CERTIFICATE_TYPE: "Certificate of an export"}
"""What attachments are called by their artifact type."""

_TAG_EVENTS = {"tag", "untag"}


def router(store: Store) -> APIRouter:
    """Everything that is neither data, picture nor style."""
    routes = APIRouter(include_in_schema=False)

    @routes.get("/")
    def adapters(
        name: Text = "", method: Text = "", base: Text = "", tag: Text = "", metric: Text = "", page: PageNumber = 1
    ) -> Response:
        wanted = Search(name, method, base, tag, metric, page)
        problem = ""
        try:
            wanted.check()
        except StoreError as error:
            wanted, problem = replace(wanted, metric=""), str(error)
        found = search(store, wanted)
        turn = _turner(**wanted.filters)
        return html("adapters.html", {"wanted": wanted, "found": found, "problem": problem, "page_url": turn})

    @routes.get("/adapters/{reference:path}")
    def adapter(reference: str, page: PageNumber = 1) -> Response:
        parsed = parse(reference)
        return _version(store, store.find(reference)) if parsed.exact else _name(store, parsed.name, page)

    @routes.get("/metrics/{name:path}")
    def measured(name: str, page: PageNumber = 1) -> Response:
        found = versions(store, parse(name).name)
        lines = metrics.series(found)
        shown = Page.of([each for each in found if each.metrics], page)
        values = {"name": found[0].name, "lines": lines[: metrics.MAX_METRICS], "count": len(lines), "found": shown}
        return html("metrics.html", {**values, "page_url": _turner("metrics", found[0].name)})

    @routes.get("/lineage/{reference:path}")
    def ancestry(reference: str, children: bool | None = None) -> Response:
        record = find(store, reference)
        found = family(store, record.reference, children)
        values: dict[str, Any] = {
            "record": record,
            "found": found,
            "drawing": sketch(found),
            "ancestors": branches(found, upwards=True),
            "descendants": branches(found, upwards=False),
            "called": name_of,
            "address_of": address_of,
            "size": (graph.WIDTH, graph.HEIGHT),
        }
        return html("lineage.html", values)

    @routes.get("/fidelity/{reference:path}")
    def certificates(reference: str) -> Response:
        record = find(store, reference)
        return html("fidelity.html", {"record": record, "reports": fidelity.reports(store, record.reference)})

    @routes.get("/diff")
    def difference(a: Text, b: Text = "") -> Response:
        one = find(store, a)
        other = find(store, b) if b else _before(store, one)
        choices = {"a": one, "b": other, "of_a": options(store, one), "of_b": options(store, other)}
        try:
            view = differences.view(differences.compare(store, one, other))
        except ReftError as error:
            return html("diff.html", {**choices, "view": None, "problem": str(error)}, HTTPStatus.UNPROCESSABLE_ENTITY)
        return html("diff.html", {**choices, "view": view, "distance": differences.share(view.difference.distance)})

    return routes


def _name(store: Store, name: str, page: int) -> Response:
    found = versions(store, name)
    shown = Page.of(found, page)
    moves = [each for each in store.history(name) if each.action in _TAG_EVENTS]
    tags = sorted(((tag, record) for record in found for tag in record.tags), key=lambda pair: pair[0])
    values: dict[str, Any] = {
        "name": name,
        "found": shown,
        "measured": any(record.metrics for record in found),
        "tags": tags[: facts.MAX_ROWS],
        "more_tags": len(tags[facts.MAX_ROWS :]),
        "moves": moves[: -facts.MAX_ROWS - 1 : -1],
        "more_moves": len(moves[: -facts.MAX_ROWS]),
        "choices": options(store, found[0]),
        "page_url": _turner("adapters", name),
    }
    return html("name.html", values)


def _version(store: Store, record: Record) -> Response:
    details = store.show(record.reference)
    manifest, image = details.manifest, details.image_manifest
    attachments = store.attachments(record.reference)
    values: dict[str, Any] = {
        "record": record,
        "manifest": manifest,
        "files": [(each["annotations"]["org.opencontainers.image.title"], each) for each in _files(image)],
        "identity": facts.identity(manifest),
        "config": facts.settings(manifest.config),
        "edits": facts.edits(manifest),
        "weight_deltas": facts.weight_deltas(manifest),
        "other_nodes": facts.Table.of(("Node",), ((node,) for node in manifest.program.other_nodes)),
        "arguments": facts.settings(manifest.training.arguments if manifest.training else {}),
        "parents": manifest.parents[: facts.MAX_ROWS],
        "notes": facts.Table.of(("Note", "Text"), manifest.notes.items()),
        "attachments": attachments[: facts.MAX_ROWS],
        "certified": any(each.artifact_type == CERTIFICATE_TYPE for each in attachments),
        "uses": howto.uses(record.reference, record.name, manifest),
        "kinds": KINDS,
        "trust": _trust(store, record),
        "metric_rows": [(metric, number(value)) for metric, value in sorted(record.metrics.items())][: facts.MAX_ROWS],
    }
    return html("version.html", values)


def _trust(store: Store, record: Record) -> Decision:
    try:
        return next(decisions(store, active(), record.reference))
    except UntrustedError as error:
        return Decision(record.reference, "policy", str(error))


def _turner(*path: str, **query: str) -> Callable[[int], str]:
    """Addresses of the pages of a list."""
    return lambda page: address(*path, **query, page=page)


def _files(image: dict[str, Any]) -> list[dict[str, Any]]:
    return [image["config"], *image["layers"]]


def _before(store: Store, record: Record) -> Record:
    """The version before this one, or after the first, or the version itself where it is the only one."""
    others = [each for each in versions(store, record.name) if each.version != record.version]
    earlier = (each for each in others if each.version < record.version)
    return next(earlier, others[-1] if others else record)
