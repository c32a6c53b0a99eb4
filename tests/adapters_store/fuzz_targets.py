"""What there is to spoil in a store, and a store that has some of everything."""

from __future__ import annotations

import json
import os
import random
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from adapter_variants import vary
from mutations import spoil_bytes, spoil_json

from adapters_store import Store
from adapters_store.layout.oci import CERTIFICATE_TYPE, HISTORY_OFFSET
from reft_plugins.manifest import sha256


def fill(store: Store, adapters: list[Path], scratch: Path) -> None:
    """Versions, tags, attachments, a removed version, another program's entry and a checked-out folder."""
    store.add(adapters[0], "alpha:latest")
    path = vary(adapters[1], scratch / "measured", "measured") / "adapter.json"
    manifest = json.loads(path.read_text())
    manifest["training"] = {
        "data_sha256": sha256(b""),
        "examples": 3,
        "seed": 1,
        "steps": 2,
        "epochs": 1.0,
        "metrics": {"accuracy": 0.5},
    }
    path.write_text(json.dumps(manifest))
    store.add(path.parent, "alpha:prod")
    store.add(adapters[2], "team/beta")
    store.attach("alpha@v1", CERTIFICATE_TYPE, {"certificate.json": ("application/json", b"{}")})
    store.remove("team/beta@v1")
    index = json.loads((store.root / "index.json").read_bytes())
    other = {"mediaType": "application/vnd.oci.image.index.v1+json", "digest": store.blobs.put(b'{"manifests":[]}')}
    index["manifests"].append({**other, "size": 16, "annotations": {"owner": "another program"}})
    (store.root / "index.json").write_text(json.dumps(index))
    store.checkout("alpha:latest")


def seal(body: bytes) -> bytes:
    """A line of the history with the checksum that belongs to it."""
    body = body.rstrip()[:-1]
    return body + b',"crc32":"%08x"}\n' % zlib.crc32(body)


def spoil(data: bytes, rng: random.Random) -> bytes:
    """A document's structure, or its bytes."""
    return spoil_json(json.loads(data), rng) if rng.random() < 0.75 else spoil_bytes(data, rng)


def index(root: Path, rng: random.Random) -> None:
    """`index.json`; now and then all of the history counts as newer than it."""
    path = root / "index.json"
    document = json.loads(path.read_bytes())
    if rng.random() < 0.3:
        document["annotations"][HISTORY_OFFSET] = rng.choice(("0", "-1", "1", "9" * 18, "9" * 30, "x"))
    path.write_bytes(spoil(json.dumps(document).encode(), rng))


def history(root: Path, rng: random.Random) -> None:
    """A line of `history.jsonl`, mostly with a checksum that fits; what the index does not include, all or nothing."""
    path = root / "history.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    number = rng.randrange(len(lines))
    document = json.loads(lines[number])
    del document["crc32"]
    if rng.random() < 0.6:
        lines[number] = seal(spoil(json.dumps(document).encode(), rng).replace(b"\n", b" "))
    elif rng.random() < 0.7:
        lines[number] = spoil_bytes(lines[number], rng)
    else:
        lines = rng.sample(lines, len(lines))
    path.write_bytes(b"".join(lines))
    if rng.random() < 0.7:
        document = json.loads((root / "index.json").read_bytes())
        document["annotations"].pop(HISTORY_OFFSET)
        if rng.random() < 0.5:
            document["manifests"] = []
        (root / "index.json").write_text(json.dumps(document))


def marker(root: Path, rng: random.Random) -> None:
    """`oci-layout`."""
    path = root / "oci-layout"
    path.write_bytes(spoil(path.read_bytes(), rng))


def _blob(root: Path, digest: str) -> Path:
    return root / "blobs" / "sha256" / digest.removeprefix("sha256:")


def _put(root: Path, data: bytes) -> dict[str, Any]:
    digest = sha256(data)
    _blob(root, digest).write_bytes(data)
    return {"digest": digest, "size": len(data)}


def _relink(root: Path, old: str, new: dict[str, Any]) -> None:
    """Every mention of a manifest in the index means another one."""
    document = json.loads((root / "index.json").read_bytes())
    for entry in document["manifests"]:
        if entry["digest"] == old:
            entry.update(new)
        subject = entry.get("annotations", {}).get("vnd.reft.subject")
        if subject == old:
            entry["annotations"]["vnd.reft.subject"] = new["digest"]
    (root / "index.json").write_text(json.dumps(document))


def _versions(root: Path) -> list[tuple[str, dict[str, Any]]]:
    entries = json.loads((root / "index.json").read_bytes())["manifests"]
    digests = {each["digest"] for each in entries if "reft.adapter" in each.get("artifactType", "")}
    return [(digest, json.loads(_blob(root, digest).read_bytes())) for digest in sorted(digests)]


def image(root: Path, rng: random.Random) -> None:
    """An image manifest, under the digest that it has then."""
    digest, document = rng.choice(_versions(root))
    _relink(root, digest, _put(root, spoil(json.dumps(document).encode(), rng)))


def manifest(root: Path, rng: random.Random) -> None:
    """An `adapter.json`, with an image manifest that fits."""
    digest, document = rng.choice(_versions(root))
    text = _blob(root, document["config"]["digest"]).read_bytes()
    document["config"].update(_put(root, spoil(text, rng)))
    _relink(root, digest, _put(root, json.dumps(document).encode()))


def attachment(root: Path, rng: random.Random) -> None:
    """The manifest of an attachment."""
    entries = json.loads((root / "index.json").read_bytes())["manifests"]
    (digest,) = {each["digest"] for each in entries if "certificate" in each.get("artifactType", "")}
    _relink(root, digest, _put(root, spoil(_blob(root, digest).read_bytes(), rng)))


def spoil_tensors(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file: its header's structure, its length, or anything."""
    length = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + length], data[8 + length :]
    if rng.random() < 0.25:
        return spoil_bytes(data, rng)
    header = spoil(header, rng)
    declared = len(header) if rng.random() < 0.8 else rng.choice((0, 1, len(header) - 1, 2**31, 2**63, 2**64 - 1))
    return declared.to_bytes(8, "little") + header + rest


def tensors(root: Path, rng: random.Random) -> None:
    """An `adapter.safetensors`, with manifests that fit."""
    digest, document = rng.choice(_versions(root))
    data = spoil_tensors(_blob(root, document["layers"][0]["digest"]).read_bytes(), rng)
    document["layers"][0].update(_put(root, data))
    adapter = json.loads(_blob(root, document["config"]["digest"]).read_bytes())
    adapter["tensors"] = {"sha256": sha256(data), "size": len(data)}
    document["config"].update(_put(root, json.dumps(adapter).encode()))
    _relink(root, digest, _put(root, json.dumps(document).encode()))


def files(root: Path, rng: random.Random) -> None:
    """Something else in the place of a file or folder: a link that leads out, a pipe, a folder, nothing, a lot."""
    places = [Path(where) / name for where, folders, names in os.walk(root) for name in (*folders, *names)]
    places += [root / name for name in (".partial", "leases", ".lock", ".content-lock", ".content-gate")]
    for path in rng.sample(sorted(set(places)), rng.choice((1, 1, 2))):
        if path.parent.is_dir() and os.path.realpath(path.parent) == str(path.parent):
            _put_something_else(path, root.parent, rng)


def _put_something_else(path: Path, outside: Path, rng: random.Random) -> None:
    sentinel = outside / "sentinel"
    links = (sentinel, path) if path.is_dir() else (sentinel / "file", sentinel / "new", path)
    if os.path.lexists(path):
        path.rename(outside / "moved" / f"{rng.random()}")
    makers: tuple[Callable[[], object], ...] = (
        *(lambda link=link: path.symlink_to(link) for link in links),  # type: ignore[misc]
        lambda: os.mkfifo(path),
        path.mkdir,
        path.touch,
        lambda: None,
        lambda: (path.touch(), os.truncate(path, 2**27 + 1)),
    )
    rng.choice(makers)()


TARGETS: dict[str, Callable[[Path, random.Random], None]] = {
    each.__name__: each for each in (index, history, marker, image, manifest, attachment, tensors, files)
}
