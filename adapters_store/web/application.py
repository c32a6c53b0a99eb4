"""The web application: pages for people, the same as JSON for programs, and errors as either."""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from adapters_store.store import Store
from adapters_store.web import api, pages, pictures
from adapters_store.web.answers import html, json_answer
from adapters_store.web.guard import LOOPBACK, ReadOnly
from reft_plugins.errors import ReftError, UnknownReferenceError

_STATIC = Path(__file__).with_name("static")


def create_application(store: Store, hosts: Sequence[str] = LOOPBACK) -> ASGIApp:
    """The page of a store as an ASGI application.

    Args:
        store: read anew for every request; nothing of it is ever changed.
        hosts: names under which it may be asked for; `*` for any.
    """
    app = FastAPI(
        title="reft store", docs_url=None, redoc_url=None, openapi_url="/api/openapi.json", redirect_slashes=False
    )
    for room in (api, pictures, pages):
        app.include_router(room.router(store))
    app.mount("/static", StaticFiles(directory=_STATIC))
    app.add_exception_handler(ReftError, _expected)
    app.add_exception_handler(RequestValidationError, _malformed)
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(Exception, _unexpected)
    return ReadOnly(app, hosts)


def _expected(request: Request, error: Exception) -> Response:
    status = HTTPStatus.NOT_FOUND if isinstance(error, UnknownReferenceError) else HTTPStatus.INTERNAL_SERVER_ERROR
    return _explained(request, status, str(error))


def _malformed(request: Request, error: Exception) -> Response:
    fields = error.errors() if isinstance(error, RequestValidationError) else ()
    told = "; ".join(f"{each['loc'][-1]}: {each['msg']}" for each in fields)
    return _explained(request, HTTPStatus.BAD_REQUEST, told)


def _refused(request: Request, error: Exception) -> Response:
    status = HTTPStatus(error.status_code) if isinstance(error, HTTPException) else HTTPStatus.NOT_FOUND
    return _explained(request, status, error.detail if isinstance(error, HTTPException) else "")


def _unexpected(request: Request, error: Exception) -> Response:
    text = f"An error of this program ({type(error).__name__}); what it was is in the log of `reft store serve`."
    return _explained(request, HTTPStatus.INTERNAL_SERVER_ERROR, text)


def _explained(request: Request, status: HTTPStatus, text: str) -> Response:
    if request.url.path.startswith("/api/"):
        return json_answer({"error": text}, status)
    return html("error.html", {"status": int(status), "phrase": status.phrase, "text": text}, status)
