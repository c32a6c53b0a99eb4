"""The adapter store: versioned, content-addressed, verified on every read; an OCI image layout on disk.

    from adapters_store import Store

    store = Store.init("adapters")
    record = store.add("my-adapter", "sentiment:latest")
    directory = store.checkout("sentiment@v1")

The public names are loaded on first use, so that `reft --help` stays fast. Nothing here imports torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adapters_store.layout.attachments import Attachment
    from adapters_store.records import Collected, Details, Event, Problem, Record, Report
    from adapters_store.references import Reference
    from adapters_store.store import Store

_WHERE = {
    "Attachment": "layout.attachments",
    "Collected": "records",
    "Details": "records",
    "Event": "records",
    "Problem": "records",
    "Record": "records",
    "Reference": "references",
    "Report": "records",
    "Store": "store",
}

__all__ = ["Attachment", "Collected", "Details", "Event", "Problem", "Record", "Reference", "Report", "Store"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'adapters_store' has no attribute {name!r}")
    return getattr(import_module(f"adapters_store.{_WHERE[name]}"), name)
