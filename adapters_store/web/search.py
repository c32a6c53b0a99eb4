"""The list of adapters: filters and pages, so that a store of any size fits on one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from adapters_store.filters import MetricCondition
from adapters_store.records import Record
from adapters_store.store import Store

Item = TypeVar("Item")
Other = TypeVar("Other")

PAGE_SIZE = 50


@dataclass(frozen=True, slots=True)
class Search:
    """What is looked for; empty texts do not filter.

    Attributes:
        name, base: part of a name, in any case.
        method, tag: as `Store.list` takes them.
        metric: conditions such as `accuracy>=0.9`, separated by commas.
        page: counted from 1.
    """

    name: str = ""
    method: str = ""
    base: str = ""
    tag: str = ""
    metric: str = ""
    page: int = 1

    @property
    def filters(self) -> dict[str, str]:
        """The filters that are set, as a query."""
        texts = {"name": self.name, "method": self.method, "base": self.base, "tag": self.tag, "metric": self.metric}
        return {key: text for key, text in texts.items() if text}

    @property
    def metrics(self) -> tuple[str, ...]:
        """The single conditions on metrics."""
        return tuple(part.strip() for part in self.metric.split(",") if part.strip())

    def check(self) -> None:
        """Raises StoreError when a condition on metrics is malformed."""
        for part in self.metrics:
            MetricCondition.parse(part)


@dataclass(frozen=True, slots=True)
class Row:
    """An adapter in the list: its newest version that was looked for, how many there are, and all their tags."""

    newest: Record
    versions: int
    tags: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        newest = self.newest.to_dict()
        return {"name": self.newest.name, "versions": self.versions, "tags": list(self.tags), "newest": newest}


@dataclass(frozen=True, slots=True)
class Page(Generic[Item]):
    """Some of many items; `number` and `pages` count from 1, also where there is nothing."""

    items: tuple[Item, ...]
    number: int
    pages: int
    total: int

    @classmethod
    def of(cls, items: Sequence[Item], number: int, size: int = PAGE_SIZE) -> Page[Item]:
        """The page of that number, or the nearest there is."""
        pages = max(1, -(-len(items) // size))
        number = min(max(1, number), pages)
        return cls(tuple(items[(number - 1) * size : number * size]), number, pages, len(items))

    def holding(self, items: tuple[Other, ...]) -> Page[Other]:
        """The same page with other items in the place of its own."""
        return Page(items, self.number, self.pages, self.total)


def search(store: Store, wanted: Search) -> Page[Row]:
    """The adapters that have a version as wanted, by name.

    Without a filter on versions only the names of the page are looked into.

    Raises:
        StoreError: a condition on metrics is malformed, or the store is damaged.
    """
    part = wanted.name.lower().strip()
    if not set(wanted.filters) - {"name"}:
        names = Page.of([name for name in store.names() if part in name], wanted.page)
        return names.holding(_rows(store.list(name) for name in names.items))
    found = store.list(method=wanted.method.strip() or None, tag=wanted.tag.strip() or None, metrics=wanted.metrics)
    base = wanted.base.lower().strip()
    by_name: dict[str, list[Record]] = defaultdict(list)
    for record in found:
        if part in record.name and base in (record.base or "").lower():
            by_name[record.name].append(record)
    rows = Page.of(sorted(by_name), wanted.page)
    return rows.holding(_rows(by_name[name] for name in rows.items))


def _rows(adapters: Iterable[Sequence[Record]]) -> tuple[Row, ...]:
    """A name without versions was removed a moment ago."""
    return tuple(_row(versions) for versions in adapters if versions)


def _row(versions: Sequence[Record]) -> Row:
    tags = sorted(tag for record in versions for tag in record.tags)
    return Row(max(versions, key=lambda record: record.version), len(versions), tuple(tags))
