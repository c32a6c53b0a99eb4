"""Archives that are not to be trusted: a clear error each, and not a byte of them in the store."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapters_store import Store
from adapters_store.archive import members
from adapters_store.archive.reading import import_
from adapters_store.archive.writing import export
from reft_plugins.errors import ReftError, StoreError
from reft_plugins.manifest import sha256

Entries = list[tuple[tarfile.TarInfo, bytes]]


@pytest.fixture(scope="module")
def sound(adapters: list[Path], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """An archive that is as it should be."""
    folder = tmp_path_factory.mktemp("sound")
    store = Store.init(folder / "store")
    store.add(adapters[0], "a:x")
    return export(store, folder / "a.tar").path.read_bytes()


def _entries(archive: bytes) -> Entries:
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        return [(member, (tar.extractfile(member) or io.BytesIO()).read()) for member in tar]


def _tar(entries: Entries, kind: int = tarfile.GNU_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
        for member, data in entries:
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def _member(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, **facts: Any) -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, len(data)
    for fact, value in facts.items():
        setattr(member, fact, value)
    return member, data


def _index(archive: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    def changed(member: tarfile.TarInfo, data: bytes) -> tuple[tarfile.TarInfo, bytes]:
        if member.name != "index.json":
            return member, data
        document = json.loads(data)
        change(document)
        return _member("index.json", json.dumps(document).encode())

    return _tar([changed(member, data) for member, data in _entries(archive)])


def _with(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, **facts: Any) -> Callable[[bytes], bytes]:
    return lambda archive: _tar([*_entries(archive), _member(name, data, kind, **facts)])


def _without(name: str) -> Callable[[bytes], bytes]:
    return lambda archive: _tar([each for each in _entries(archive) if not each[0].name.startswith(name)])


def _replaced(name: str, data: bytes) -> Callable[[bytes], bytes]:
    return lambda archive: _tar(
        [_member(member.name, data) if member.name == name else (member, old) for member, old in _entries(archive)]
    )


def _flipped_blob(archive: bytes) -> bytes:
    return _tar(
        [
            (m, d[:-1] + bytes([d[-1] ^ 1])) if len(d) > 900 and "blobs" in m.name else (m, d)
            for m, d in _entries(archive)
        ]
    )


def _pax(archive: bytes) -> bytes:
    entries = _entries(archive)
    entries[0][0].pax_headers = {"size": "99999", "path": "elsewhere"}
    return _tar(entries, tarfile.PAX_FORMAT)


def _huge_size(archive: bytes) -> bytes:
    header = tarfile.TarInfo("blobs/sha256/" + "a" * 64)
    header.size = 2**62
    return archive[: -2 * 512] + header.tobuf(tarfile.GNU_FORMAT) + bytes(1024)


def _negative_size(archive: bytes) -> bytes:
    block = bytearray(tarfile.TarInfo("index.json").tobuf(tarfile.GNU_FORMAT))
    block[124:136] = (-1024 & (256**12 - 1)).to_bytes(12, "big")
    block[124] = 0xFF
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + archive


def _image(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    """An archive whose image manifest says something else, consistently."""

    def changed(archive: bytes) -> bytes:
        entries = {member.name: data for member, data in _entries(archive)}
        index = json.loads(entries["index.json"])
        name = "blobs/" + index["manifests"][0]["digest"].replace(":", "/")
        manifest = json.loads(entries.pop(name))
        change(manifest)
        data = json.dumps(manifest).encode()
        for each in index["manifests"]:
            each["digest"], each["size"] = sha256(data), len(data)
        entries |= {"index.json": json.dumps(index).encode(), "blobs/" + sha256(data).replace(":", "/"): data}
        return _tar([_member(*each) for each in entries.items()])

    return changed


CASES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda a: b"", "no tar file"),
    "text": (lambda a: b"hello" * 500, "no tar file"),
    "cut in a header": (lambda a: a[:700], "damaged or cut off|no tar"),
    "cut in a blob": (lambda a: a[: len(a) - 2000], "cut off"),
    "without its end": (lambda a: a[: len(a) - 1024], "damaged or cut off"),
    "gzip": (gzip.compress, "compressed with gzip"),
    "bzip2": (bz2.compress, "compressed with bzip2"),
    "xz": (lzma.compress, "compressed with xz"),
    "zstd": (lambda a: b"\x28\xb5\x2f\xfd" + a, "compressed with zstd"),
    "bad checksum": (lambda a: a[:3] + b"X" + a[4:], "no tar file"),
    "absolute path": (_with("/etc/passwd", b"x"), "which an image layout does not have"),
    "path upwards": (_with("blobs/sha256/../../../x", b"x"), "which an image layout does not have"),
    "path upwards in front": (_with("../index.json", b"x"), "which an image layout does not have"),
    "another file": (_with("history.jsonl", b"x"), "which an image layout does not have"),
    "upper case": (_with("blobs/sha256/" + "A" * 64, b"x"), "which an image layout does not have"),
    "another digest": (_with("blobs/sha512/" + "a" * 64, b"x"), "which an image layout does not have"),
    "name with control characters": (_with("a\x1b[31m", b"x"), "which an image layout does not have"),
    "name not of ASCII": (_with("blöbs", b"x"), "which an image layout does not have"),
    "long name": (_with("x" * 300, b"x"), "of type 'L'"),
    "another folder": (_with("checkouts", kind=tarfile.DIRTYPE), "which an image layout does not have"),
    "symbolic link": (_with("blobs/sha256/" + "a" * 64, kind=tarfile.SYMTYPE, linkname="/etc/passwd"), "of type '2'"),
    "hard link": (_with("blobs/sha256/" + "a" * 64, kind=tarfile.LNKTYPE, linkname="index.json"), "of type '1'"),
    "character device": (_with("blobs/sha256/" + "a" * 64, kind=tarfile.CHRTYPE), "of type '3'"),
    "block device": (_with("blobs/sha256/" + "a" * 64, kind=tarfile.BLKTYPE), "of type '4'"),
    "pipe": (_with("blobs/sha256/" + "a" * 64, kind=tarfile.FIFOTYPE), "of type '6'"),
    "sparse": (_with("blobs/sha256/" + "a" * 64, kind=tarfile.GNUTYPE_SPARSE), "of type 'S'"),
    "extended header": (_pax, "of type 'x'"),
    "global header": (lambda a: tarfile.TarInfo.create_pax_global_header({"size": "1"}) + a, "of type 'g'"),
    "index twice": (_with("index.json", b"{}"), "'index.json' twice"),
    "index twice in two spellings": (_with("./index.json", b"{}"), "'index.json' twice"),
    "size beyond the end": (_huge_size, "cut off"),
    "negative size": (_negative_size, "cut off|no tar file"),
    "no marker": (_without("oci-layout"), "no oci-layout in it"),
    "no index": (_without("index.json"), r"no index\.json in it"),
    "no blobs": (_without("blobs"), "there is no blobs/sha256/"),
    "other layout": (_replaced("oci-layout", b'{"imageLayoutVersion":"2.0.0"}'), "another kind of image layout"),
    "large marker": (_replaced("oci-layout", b" " * 5000), "exceed the limit of 4096"),
    "index no JSON": (_replaced("index.json", b"{"), "not readable JSON"),
    "index with a key twice": (_replaced("index.json", b'{"manifests":[],"manifests":[]}'), "duplicate key"),
    "index with deep JSON": (_replaced("index.json", b"[" * 100_000), "not readable JSON"),
    "index of nothing": (lambda a: _index(a, lambda d: d.update(manifests=[])), "no version of an adapter"),
    "version twice": (lambda a: _index(a, lambda d: d["manifests"].append(d["manifests"][0])), "is there twice"),
    "other size": (
        lambda a: _index(a, lambda d: [each.update(size=5) for each in d["manifests"]]),
        "bytes instead of 5",
    ),
    "huge manifest": (
        lambda a: _index(a, lambda d: [each.update(size=5_000_000) for each in d["manifests"]]),
        "more than 4194304",
    ),
    "digest of another kind": (
        lambda a: _index(a, lambda d: [each.update(digest="sha512:" + "a" * 128) for each in d["manifests"]]),
        "SHA-256",
    ),
    "flipped bit": (_flipped_blob, "is damaged"),
    "a Docker image": (_image(lambda m: m.update(artifactType="application/vnd.docker.x")), "artifactType"),
    "layer as a path": (_image(lambda m: m["layers"][0].update(digest="sha256:../../../etc/passwd")), "digest"),
    "layer that is the config": (_image(lambda m: m.update(layers=[m["config"]])), "layer"),
    "layer that is not there": (
        _image(lambda m: m["layers"][0].update(digest="sha256:" + "a" * 64)),
        "there is no blobs/sha256/aaaa",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_refused_and_nothing_happens(store: Store, sound: bytes, tmp_path: Path, case: str) -> None:
    spoil, message = CASES[case]
    before = sorted(path for path in tmp_path.rglob("*") if "store" not in path.parts[len(tmp_path.parts) :][:1])
    bad = spoil(sound)
    assert bad != sound
    (tmp_path / "bad.tar").write_bytes(bad)
    with pytest.raises(StoreError, match=message) as caught:
        import_(store, tmp_path / "bad.tar")
    assert "\x1b" not in str(caught.value)
    assert store.list() == ()
    assert store.verify().ok
    assert not (store.root / ".partial").exists() or list((store.root / ".partial").iterdir()) == []
    assert sum(path.stat().st_size for path in store.blobs.directory.iterdir()) <= len(bad)
    after = sorted(path for path in tmp_path.rglob("*") if "store" not in path.parts[len(tmp_path.parts) :][:1])
    assert after == sorted([*before, tmp_path / "bad.tar"])


def test_the_sound_one_is_taken(store: Store, sound: bytes, tmp_path: Path) -> None:
    """Without this, the refusals above could have any other reason."""
    for number, good in enumerate((sound, _tar(_entries(sound)), _image(lambda m: m)(sound), _index(sound, id))):
        (tmp_path / f"{number}.tar").write_bytes(good)
        assert import_(store, tmp_path / f"{number}.tar", name=f"a{number}").records


def test_something_that_is_no_file(store: Store, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, tmp_path / "missing", Path("/dev/zero")):
        with pytest.raises(StoreError):
            import_(store, path)


def test_members_without_end(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(members, "MAX_MEMBERS", 10)
    (tmp_path / "a.tar").write_bytes(_tar([_member(f"blobs/sha256/{number:064x}") for number in range(11)]))
    with pytest.raises(StoreError, match="more than 10 members"):
        import_(store, tmp_path / "a.tar")


def test_a_bad_attachment_is_refused(store: Store, adapters: list[Path], tmp_path: Path) -> None:
    other = Store.init(tmp_path / "other")
    other.add(adapters[0], "a:x")
    other.attach("a:x", "application/vnd.reft.certificate.v1", {"c.json": ("application/json", b'{"c":1}')})
    data = export(other, tmp_path / "a.tar").path.read_bytes()
    assert data.count(b'{"c":1}') == 1
    (tmp_path / "a.tar").write_bytes(data.replace(b'{"c":1}', b'{"c":2}'))
    with pytest.raises(StoreError, match="is damaged"):
        import_(store, tmp_path / "a.tar")
    assert store.attachments("a:x") == ()
    assert store.verify().ok


def test_random_mutations(store: Store, sound: bytes, tmp_path: Path) -> None:
    """Any byte anywhere: an error of ours or the sound content, never anything else and never outside the store."""
    import random

    generator = random.Random(5)
    wanted = {"sha256:" + member.name.rpartition("/")[2] for member, _ in _entries(sound)}
    refused = 0
    path = tmp_path / "m.tar"
    for _ in range(1000):
        data = bytearray(sound)
        for _ in range(generator.choice((1, 1, 2, 8))):
            kind, at = generator.randrange(3), generator.randrange(len(data))
            if kind == 0:
                data[at] = generator.randrange(256)
            elif kind == 1:
                del data[at : at + generator.choice((1, 512, 1000))]
            else:
                data[at:at] = data[generator.randrange(len(data)) :][: generator.choice((1, 512))]
        path.write_bytes(bytes(data))
        try:
            import_(store, path, name="m")
        except ReftError:
            refused += 1
    assert refused > 500
    assert {record.digest for record in store.list()} <= wanted
    assert store.verify().ok
    assert sorted(os.listdir(tmp_path)) == ["m.tar", "store"]
