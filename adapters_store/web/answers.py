"""Responses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from adapters_store.web.guard import PICTURE_POLICY
from adapters_store.web.rendering import render


def html(template: str, values: Mapping[str, Any], status: int = 200) -> Response:
    """A page."""
    return Response(render(template, values), status, media_type="text/html")


def json_answer(data: Any, status: int = 200) -> Response:
    """JSON in ASCII, so that no text of an adapter is impossible to encode."""
    return Response(json.dumps(data, indent=2) + "\n", status, media_type="application/json")


def svg(text: str) -> Response:
    """A picture."""
    return Response(text, media_type="image/svg+xml", headers={"Content-Security-Policy": PICTURE_POLICY})
