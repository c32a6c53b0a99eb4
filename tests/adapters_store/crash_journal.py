"""What writers of a store were told, and whether the store still knows it.

A writer notes what it is about to do and what was acknowledged, a JSON object per line, in a journal of its own. It
never touches what other writers tag or remove, so the end of its journal says how the store has to look.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from adapters_store import Store
from adapters_store.layout.index import Index
from reft_plugins.errors import ReftError

ABSENT = "absent"


class Journal:
    """Written without buffers: a line that was begun is there even when the writer is killed."""

    def __init__(self, scratch: Path, seed: int) -> None:
        self._file = os.open(scratch / f"journal-{seed}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def trying(self, action: str, **facts: Any) -> None:
        """Note what is about to be asked for."""
        self._note("trying", action, facts)

    def done(self, action: str, **facts: Any) -> None:
        """Note that it was acknowledged."""
        self._note("done", action, facts)

    def _note(self, state: str, action: str, facts: dict[str, Any]) -> None:
        os.write(self._file, json.dumps({"state": state, "action": action, **facts}).encode() + b"\n")


def acknowledged(scratch: Path) -> int:
    """How many changes were acknowledged so far."""
    return sum(path.read_bytes().count(b'"state": "done"') for path in scratch.glob("journal-*"))


def broken_promises(store: Store, scratch: Path) -> Iterator[str]:
    """Where the store is not as the journals say that it was told to be."""
    index = store._index()
    numbers: dict[tuple[str, int], str] = {}
    for path in sorted(scratch.glob("journal-*")):
        lines = path.read_bytes().splitlines(keepends=True)
        entries = [json.loads(line) for line in lines if line.endswith(b"\n")]
        for entry in entries:
            if (entry["state"], entry["action"]) == ("done", "add"):
                identity = entry["name"], entry["version"]
                if numbers.setdefault(identity, entry["digest"]) != entry["digest"]:
                    yield f"{identity} was given twice"
        for problem in (*_versions(index, entries), *_tags(index, entries), *_attachments(store, entries)):
            yield f"{path.name}: {problem}"


def _versions(index: Index, entries: list[dict[str, Any]]) -> Iterator[str]:
    allowed: dict[tuple[str, int], set[str]] = {}
    for entry in entries:
        match entry["action"], entry["state"]:
            case "add", "done":
                allowed[entry["name"], entry["version"]] = {entry["digest"]}
            case "remove", "trying":
                allowed[entry["name"], entry["version"]].add(ABSENT)
            case "remove", "done":
                allowed[entry["name"], entry["version"]] = {ABSENT}
    for (name, version), digests in allowed.items():
        found = index.names[name].versions.get(version) if name in index.names else None
        digest = found.digest if found is not None else ABSENT
        if digest not in digests:
            yield f"{name}@v{version} is {digest}, and should be {digests}"


def _tags(index: Index, entries: list[dict[str, Any]]) -> Iterator[str]:
    allowed: dict[tuple[str, str], set[str]] = {}
    for entry in entries:
        tags = [(entry["name"], tag) for tag in entry.get("tags", ())]
        for tag in tags:
            new = ABSENT if entry["action"] in ("untag", "remove") else entry.get("digest")
            if entry["state"] == "done":
                allowed[tag] = {new}
            elif new is None:  # of an `add`, whose digest nobody was told
                allowed.pop(tag, None)
            else:
                allowed.setdefault(tag, {ABSENT}).add(new)
    for (name, tag), digests in allowed.items():
        found = index.names[name].tags.get(tag) if name in index.names else None
        digest = found.digest if found is not None else ABSENT
        if digest not in digests:
            yield f"{name}:{tag} is {digest}, and should be {digests}"


def _attachments(store: Store, entries: list[dict[str, Any]]) -> Iterator[str]:
    attached = {entry["attached"]: entry for entry in entries if entry["action"] == "attach"}
    gone = {(entry["name"], entry["version"]) for entry in entries if entry["action"] == "remove"}
    for digest, entry in attached.items():
        if (entry["name"], entry["version"]) not in gone:
            try:
                found = {
                    each.descriptor.digest: each for each in store.attachments(f"{entry['name']}@{entry['digest']}")
                }
                for each in found[digest].files.values():
                    store.blobs.copy(each, None)
            except (ReftError, KeyError) as error:
                yield f"attachment {digest} of {entry['name']}@v{entry['version']}: {error}"
