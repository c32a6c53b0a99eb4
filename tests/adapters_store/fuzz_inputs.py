"""Spoils what a store takes in, archives, policies and signatures, and takes it in; see `fuzz_running.py`."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tarfile
from io import BytesIO
from pathlib import Path

from fuzz_running import Case, run
from mutations import TEXTS, spoil_bytes, spoil_json

from adapters_store import Store
from adapters_store.layout.oci import SIGNATURE_TYPE
from adapters_store.trust import policy, signing
from adapters_store.trust.bundles import BUNDLE_TYPE
from adapters_store.trust.keys import read_public_keys

KINDS = ("archive", "archive", "policy", "signature")


def prepare(case: Case) -> Path:
    """A sound store, and something spoiled beside it."""
    root = case.work / "store"
    shutil.copytree(case.given / "template", root)
    kind = KINDS[case.number % len(KINDS)]
    path = case.work / kind
    if kind == "archive":
        path.write_bytes(_archive((case.given / "archive.tar").read_bytes(), case))
    elif kind == "policy":
        path.write_bytes(_policy((case.given / "policy.toml").read_bytes(), case))
    else:
        text = (case.given / "bundle.json").read_bytes()
        path.write_bytes(_document(text, case))
    os.environ["REFT_POLICY"] = str(path) if kind == "policy" else ""
    return path


def use(case: Case, path: Path) -> None:
    """Take it in; the store is as sound as before."""
    store = Store.open(case.work / "store")
    keys = read_public_keys([case.given / "key.pub"])
    match path.name:
        case "archive":
            case.attempt("import", lambda: store.import_(path))
            case.attempt("import as", lambda: store.import_(path, name="imported", renumber=True))
        case "policy":
            case.attempt("load", lambda: policy.load(path))
            for record in store.list():
                case.attempt("resolve", lambda record=record: store.resolve(record.reference))
        case _:
            text = path.read_bytes()
            files = {"signature.json": (BUNDLE_TYPE, text)}
            case.attempt("attach", lambda: store.attach("alpha@v2", SIGNATURE_TYPE, files))
            verdict = case.attempt("verify", lambda: signing.verify(store, "alpha@v2", keys))
            case.done["signed"] += bool(verdict and verdict.ok)
    report = store.verify()
    assert report.ok, report.problems


def _document(text: bytes, case: Case) -> bytes:
    return spoil_json(json.loads(text), case.rng) if case.rng.random() < 0.75 else spoil_bytes(text, case.rng)


def _policy(text: bytes, case: Case) -> bytes:
    """Its bytes, or its lines."""
    rng = case.rng
    if rng.random() < 0.4:
        return spoil_bytes(text, rng)
    lines = text.splitlines(keepends=True)
    at = rng.randrange(len(lines))
    match rng.randrange(4):
        case 0:
            lines.insert(at, rng.choice(lines))
        case 1:
            lines.pop(at)
        case 2:
            lines[at] = lines[at].partition(b"=")[0] + b"= " + rng.choice(_TOML) + b"\n"
        case _:
            lines = rng.sample(lines, len(lines))
    return b"".join(lines)


_TOML = (
    *(b"nan", b"inf", b"9" * 5000, b"1e999", b"-1", b"true", b"[]", b"{}", b"[" * 5000, b'["*"]', b'"/etc/passwd"'),
    *(b'["../sentinel/file"]', b"2020-01-01", b"'''", b'"\\u0000"', b'["a\\u0000b"]', b"[[[1]]]", b"0x" + b"f" * 400),
)


def _archive(data: bytes, case: Case) -> bytes:
    """A tar file: its bytes, its documents, or the names and kinds of its members."""
    rng = case.rng
    if rng.random() < 0.3:
        return spoil_bytes(data, rng)
    out = BytesIO()
    with tarfile.open(fileobj=BytesIO(data)) as source, tarfile.open(fileobj=out, mode="w") as target:
        members = source.getmembers()
        chosen = rng.choice(members)
        for member in members:
            file = source.extractfile(member)
            content = file.read() if file is not None else b""
            if member is chosen:
                content = _spoil_member(member, content, case)
            target.addfile(member, BytesIO(content))
            if member is chosen and rng.random() < 0.1:
                target.addfile(member, BytesIO(content))
    return out.getvalue()


def _spoil_member(member: tarfile.TarInfo, content: bytes, case: Case) -> bytes:
    rng = case.rng
    match rng.randrange(5):
        case 0:
            names = [text for text in TEXTS if "\x00" not in text and "\ud800" not in text]
            member.name = rng.choice((*names, "blobs/sha256/../../../sentinel/file", "/" + member.name))
        case 1:
            member.type = rng.choice(
                (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE)
            )
            member.linkname = rng.choice(("../sentinel/file", "/etc/passwd", member.name))
            member.size, content = 0, b""
        case _:
            content = _document(content, case) if content[:1] == b"{" else spoil_bytes(content, rng)
            member.size = len(content)
    return content


if __name__ == "__main__":
    sys.exit(run(prepare, use, gibibytes=3))
