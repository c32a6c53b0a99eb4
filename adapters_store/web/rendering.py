"""Templates, and how texts of adapters, which anybody may have written, become parts of a page."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import quote, urlencode

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from rich.filesize import decimal

from adapters_store.limits import MAX_SHOWN_CHARACTERS
from adapters_store.wording import figure

_PLAIN = frozenset("\n\t\u200c\u200d")
"""Shown as they are although not printable: line breaks, and the joiners that some scripts need."""


def clean(text: str) -> str:
    """A text without control characters, bidirectional overrides and lone surrogates: their escapes stand instead."""
    if text.isprintable():
        return text
    return "".join(
        each
        if each.isprintable() or each in _PLAIN or unicodedata.category(each) == "Zs"
        else each.encode("unicode_escape").decode("ascii")
        for each in text
    )


def shortened(text: str, limit: int = MAX_SHOWN_CHARACTERS) -> str:
    """A text of at most `limit` characters, which says where it was cut."""
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text):,} characters)"


def address(*path: str, **query: object) -> str:
    """A URL on this server; every part is quoted, so that no text of an adapter can leave its place."""
    quoted = "/".join(quote(part.encode("utf-8", "replace"), safe="/@:") for part in path)
    given = {name: str(value) for name, value in query.items() if value not in (None, "", ())}
    return f"/{quoted}" + (f"?{urlencode(given, errors='replace')}" if given else "")


def number(value: float) -> str:
    """A number for people: whole ones with all their digits, others with four."""
    return f"{value:,}" if isinstance(value, int) else figure(value)


def render(template: str, values: Mapping[str, Any]) -> str:
    """A page as HTML, escaped and cleaned wherever a value is put in."""
    return _environment().get_template(template).render(values)


@lru_cache(maxsize=1)
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("adapters_store.web"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    environment.globals.update(address=address)
    environment.filters.update(size=decimal, number=number, day=_day, shortened=shortened, brief=_brief_digest)
    return environment


def _finalize(value: Any) -> Any:
    return clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _day(moment: str | None) -> str:
    """`2026-01-31 12:00` of an RFC 3339 moment in UTC."""
    return "unknown" if moment is None else moment[:16].replace("T", " ")


def _brief_digest(digest: str) -> str:
    return digest[:19]
