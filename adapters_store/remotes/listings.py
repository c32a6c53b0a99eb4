"""What registries list: repositories, tags, referrers. Page by page, and never without an end.

Source: OCI distribution specification 1.1, "Content Discovery"; `_catalog` is of Docker's registry.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar
from urllib.parse import urljoin, urlsplit

import requests

from adapters_store import limits
from adapters_store.layout.oci import INDEX_TYPE, Descriptor, load_json
from adapters_store.remotes.client import Client, refusal
from reft_plugins.errors import StoreError

MAX_TAGS = limits.MAX_TAGS
MAX_NAMES = limits.MAX_NAMES
MAX_REFERRERS = limits.MAX_REFERRERS
_MAX_PAGES = limits.MAX_PAGES
_PAGE = 1000

Item = TypeVar("Item")


def tags(client: Client, repository: str, where: str) -> list[str]:
    """All tags of a repository, none where it does not exist."""
    url = f"{client.root}{repository}/tags/list?n={_PAGE}"
    return _all(client, url, lambda page: _strings(page, "tags", where), MAX_TAGS, where)


def repositories(client: Client, where: str) -> list[str]:
    """All repositories of a registry.

    Raises:
        StoreError: where it does not list them, as most that are open to everybody.
    """
    url = f"{client.root}_catalog?n={_PAGE}"
    first = client.do_request(url)
    if first.status_code in (401, 403, 404, 405):
        raise StoreError(
            f"{where}: the registry does not list its repositories to you. Name the adapters that are meant"
        )
    return _all(client, url, lambda page: _strings(page, "repositories", where), MAX_NAMES, where, first)


def referrers(client: Client, repository: str, digest: str, where: str) -> list[Descriptor] | None:
    """The manifests that name this one as their subject, None where the registry cannot be asked that."""
    url = f"{client.root}{repository}/referrers/{digest}"
    first = client.do_request(url)
    if first.status_code in (404, 405) or (first.status_code == 200 and media_type(first) != INDEX_TYPE):
        return None
    return _all(client, url, lambda page: descriptors(page, where), MAX_REFERRERS, where, first)


def descriptors(document: Any, where: str) -> list[Descriptor]:
    """The manifests of an image index.

    Raises:
        StoreError: when it is none, or lists more than `MAX_REFERRERS`.
    """
    found = document.get("manifests") if isinstance(document, dict) else None
    if not isinstance(found, list) or document.get("schemaVersion") != 2:
        raise StoreError(f"{where}: not an image index")
    if len(found) > MAX_REFERRERS:
        raise StoreError(f"{where}: lists more than {MAX_REFERRERS} manifests, which is the limit")
    return [Descriptor.parse_data(each, where) for each in found]


def media_type(response: requests.Response) -> str:
    """The media type of an answer, without its parameters."""
    return response.headers.get("Content-Type", "").partition(";")[0].strip().lower()[:255]


def _all(
    client: Client,
    url: str,
    items: Callable[[Any], Sequence[Item]],
    limit: int,
    where: str,
    first: requests.Response | None = None,
) -> list[Item]:
    found: list[Item] = []
    for _ in range(_MAX_PAGES):
        response = first or client.do_request(url)
        first = None
        if response.status_code == 404:
            return found
        if response.status_code != 200:
            raise refusal(where, "list what it has", response)
        page = items(load_json(response.content, f"{where}: its listing"))
        found += page
        if len(found) > limit:
            raise StoreError(f"{where}: lists more than {limit} entries, which is the limit")
        link = response.links.get("next", {}).get("url")
        if not link or not page:
            return found
        url = _following(url, link, client, where)
    raise StoreError(f"{where}: its listing has no end after {_MAX_PAGES} pages. Tell the registry's owner")


def _strings(document: Any, key: str, where: str) -> list[str]:
    found = document.get(key, []) if isinstance(document, dict) else 0
    if found is None:
        return []
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        raise StoreError(f"{where}: its listing has no {key}, so it is no registry, or there is one behind it")
    return found


def _following(url: str, link: str, client: Client, where: str) -> str:
    try:
        following = urljoin(url, link)
        at_home = urlsplit(following)[:2] == urlsplit(client.root)[:2]
    except ValueError:
        at_home = False
    if not at_home:
        raise StoreError(f"{where}: its listing goes on at another host. Tell the registry's owner")
    return following
