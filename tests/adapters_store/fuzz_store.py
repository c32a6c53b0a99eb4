"""Spoils a store in many ways, one after the other, and uses all that it offers; see `fuzz_running.py`."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from click.testing import CliRunner
from fuzz_running import Case, run
from fuzz_targets import TARGETS

from adapters_store import Store
from adapters_store.commands import store as group
from adapters_store.layout import files, index, ledger, locks
from adapters_store.layout.oci import CERTIFICATE_TYPE
from adapters_store.lineage.tracing import lineage
from adapters_store.upkeep.usage import usage

COMMANDS = (
    *(("ls",), ("ls", "--json"), ("show", "alpha@v1"), ("show", "alpha@v2", "--json"), ("log", "alpha:prod")),
    *(("history",), ("attachments", "alpha@v1"), ("verify",), ("verify", "--json"), ("du",), ("gc", "--dry-run")),
)
REFERENCES = ("alpha@v1", "alpha:prod", "alpha", "team/beta@v1")


def uses(store: Store, adapter: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Everything that a store offers, what changes it last."""
    yield "list", lambda: json.dumps([record.to_dict() for record in store.list()], allow_nan=False)
    yield "filter", lambda: store.list("al*", base="tiny*", tag="latest", metrics=["accuracy>=0.1", "accuracy"])
    yield "names", store.names
    yield "history", lambda: json.dumps([event.to_dict() for event in store.history()], allow_nan=False)
    yield "usage", lambda: usage(store)
    yield "dry gc", lambda: store.gc(dry_run=True, grace_seconds=0)
    for reference in REFERENCES:
        yield "find", lambda reference=reference: store.find(reference)
        yield "show", lambda reference=reference: json.dumps(store.show(reference).to_dict(), allow_nan=False)
        yield "read", lambda reference=reference: store.read(reference, "adapter.json")
        yield "resolve", lambda reference=reference: store.resolve(reference)
        yield "lineage", lambda reference=reference: lineage(store, reference, children=True)
        yield "attachments", lambda reference=reference: store.attachments(reference)
    yield "export", lambda: store.export(store.root / "out.tar", REFERENCES[:2], force=True)
    yield "attach", lambda: store.attach("alpha@v2", CERTIFICATE_TYPE, {"c.json": ("application/json", b"1")})
    yield "tag", lambda: store.tag("alpha@v2", "latest")
    yield "untag", lambda: store.untag("alpha:latest")
    yield "add", lambda: store.add(adapter, "alpha:new")
    yield "remove", lambda: store.remove("alpha@v1", force=True)
    yield "gc", lambda: store.gc(grace_seconds=0)
    yield "remove all", lambda: store.remove("alpha", force=True)


def prepare(case: Case) -> Path:
    """A store with something wrong."""
    root = case.work / "store"
    shutil.copytree(case.given / "template", root)
    sorted(TARGETS.items())[case.number % len(TARGETS)][1](root, case.rng)
    return root


def use(case: Case, root: Path) -> None:
    """As it is, or after it was recovered."""
    store = case.attempt("open", lambda: Store.open(root)) or Store(root)
    if case.rng.random() < 0.4:
        case.attempt("recover", store.recover)
    case.done["sound" if store.verify().ok else "damaged"] += 1
    command = case.rng.choice(COMMANDS)
    case.attempt(" ".join(command), lambda: _say(command, root))
    for name, call in uses(store, case.given / "adapter"):
        case.attempt(name, call)


def _say(words: tuple[str, ...], root: Path) -> str:
    """As the command line does, which says more than the interface, in colours."""
    result = CliRunner().invoke(group, [*words, "--store", str(root)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code in (0, 1), result.output
    return result.output


def be_careless(what: str) -> None:
    """Take a precaution of the store away."""
    if what == "links":  # they are followed
        for module, name in ((files, "_READ"), (files, "_CREATE"), (locks, "_OPEN"), (ledger, "_APPEND")):
            setattr(module, name, getattr(module, name) & ~os.O_NOFOLLOW)
    else:  # descriptors are believed to be some
        index.check_entry = lambda data, where: None  # type: ignore[attr-defined]


if __name__ == "__main__":
    if careless := os.environ.get("CARELESS"):
        be_careless(careless)
    sys.exit(run(prepare, use, gibibytes=3))
