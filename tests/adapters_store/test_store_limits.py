"""Limits are defined in one place, and whatever exceeds one is refused before it is read."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import adapters_store
from adapters_store import Store, limits
from adapters_store.layout.oci import MANIFEST_TYPE, Descriptor
from adapters_store.references import Reference
from reft_plugins.errors import StoreError

SHOWN = {"web", "commands"}
"""Rooms whose other constants say how much is shown, not how much is read."""


def _numbers(path: Path) -> list[str]:
    """Module constants called `MAX_…` that are numbers written down on the spot."""
    found = []
    for node in ast.parse(path.read_text()).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names = [each.id for each in targets if isinstance(each, ast.Name) and each.id.lstrip("_").startswith("MAX_")]
        value = getattr(node, "value", None)
        if names and value is not None and not any(isinstance(each, ast.Attribute) for each in ast.walk(value)):
            found += [f"{path.name}: {name}" for name in names]
    return found


def test_every_limit_is_in_one_place() -> None:
    root = Path(adapters_store.__file__).parent
    modules = [path for path in root.rglob("*.py") if path != root / "limits.py" and path.parent.name not in SHOWN]
    assert len(modules) > 30
    assert len(_numbers(root / "limits.py")) > 20, "the search finds what it looks for"
    assert [each for path in modules for each in _numbers(path)] == []


def test_every_limit_is_explained() -> None:
    body = ast.parse(Path(limits.__file__).read_text()).body
    names = [
        (node.targets[0].id, isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant))
        for node, following in zip(body, [*body[1:], None], strict=True)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    ]
    assert len(names) > 20
    assert [name for name, explained in names if not explained] == []


def _grow(name: str, limit: int) -> Callable[[Store], object]:
    def grow(store: Store) -> None:
        os.truncate(store.root / name, limit + 1)

    return grow


def _long_line(store: Store) -> None:
    with (store.root / "history.jsonl").open("ab") as file:
        file.write(b" " * (limits.MAX_LINE_BYTES + 1) + b"\n")


def _read(store: Store) -> object:
    return Store.open(store.root).list()


def _put(store: Store, data: bytes) -> Descriptor:
    return Descriptor(mediaType=MANIFEST_TYPE, digest=store.blobs.put(data), size=len(data))


LIMITS: dict[str, tuple[Callable[[Store], object], Callable[[Store], object]]] = {
    "index": (_grow("index.json", limits.MAX_INDEX_BYTES), _read),
    "marker": (_grow("oci-layout", limits.MAX_MARKER_BYTES), _read),
    "history": (_long_line, _read),
    "manifest": (
        lambda store: None,
        lambda store: store.adopt("x", _put(store, b" " * (limits.MAX_MANIFEST_BYTES + 1))),
    ),
    "attached manifest": (
        lambda store: None,
        lambda store: store.adopt_attachment(_put(store, b" " * (limits.MAX_MANIFEST_BYTES + 1))),
    ),
    "attached file": (
        lambda store: None,
        lambda store: store.attach(
            "sentiment:latest",
            "application/vnd.reft.certificate.v1",
            {"certificate.json": ("application/json", b" " * (limits.MAX_ATTACHED_BYTES + 1))},
        ),
    ),
}


@pytest.mark.parametrize("case", LIMITS)
def test_larger_ones_are_refused(store: Store, adapters: list[Path], case: str) -> None:
    grow, use = LIMITS[case]
    store.add(adapters[0], "sentiment:latest")
    assert _read(store)
    grow(store)
    with pytest.raises(StoreError, match="limit|exceed|longer than any"):
        use(store)


def test_names() -> None:
    name, tag = "n" * limits.MAX_NAME_LENGTH, "t" * limits.MAX_TAG_LENGTH
    assert str(Reference.parse(f"{name}:{tag}")) == f"{name}:{tag}"
    for text in (f"{name}n", f"{name}n:t", f"{name}:{tag}t", f"a:{tag}t", "a" * 10_000_000):
        with pytest.raises(StoreError, match="is not a reference"):
            Reference.parse(text)


def test_a_huge_file_is_refused_without_memory(store: Store, adapters: list[Path]) -> None:
    """64 GiB of nothing, in every file of a store that is read as a whole."""
    store.add(adapters[0], "sentiment:latest")
    for name in ("index.json", "oci-layout"):
        path = store.root / name
        before = path.read_bytes()
        os.truncate(path, 1 << 36)
        program = f"""
import resource
from adapters_store import Store
from reft_plugins.errors import StoreError
resource.setrlimit(resource.RLIMIT_AS, ({2 << 30}, {2 << 30}))
try:
    Store.open({str(store.root)!r}).list()
except StoreError as error:
    assert "limit" in str(error), error
else:
    raise AssertionError("it was read")
"""
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        path.write_bytes(before)
    assert json.loads((store.root / "oci-layout").read_text())
    assert store.verify().ok
