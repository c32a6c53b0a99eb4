"""From a store to an archive. Equal versions, tags and attachments give equal bytes."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from adapters_store.layout.attachments import attachment_blobs
from adapters_store.layout.contents import unpack
from adapters_store.layout.files import explained, sync_directory, unique_name
from adapters_store.layout.oci import CREATED, INDEX_TYPE, LAYOUT, REF_NAME, SUBJECT, Descriptor
from adapters_store.location import INDEX_FILE, LAYOUT_FILE
from adapters_store.records import Record
from adapters_store.references import Reference
from reft_plugins.errors import StoreError

if TYPE_CHECKING:
    from adapters_store.store import Store

Progress = Callable[[int, int], None]
"""Called with the bytes that are done and their total."""

_BLOCK: Final = tarfile.BLOCKSIZE
_END: Final = bytes(2 * _BLOCK)


@dataclass(frozen=True, slots=True)
class Exported:
    """What an export wrote.

    Attributes:
        path: the archive.
        size: its bytes.
        records: the versions in it, with the tags in it.
        attachments: how many signatures and certificates are in it.
    """

    path: Path
    size: int
    records: tuple[Record, ...]
    attachments: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        versions = [{"reference": each.reference, "tags": list(each.tags)} for each in self.records]
        return {"path": str(self.path), "size": self.size, "versions": versions, "attachments": self.attachments}


def export(
    store: Store, path: Path, references: Sequence[str] = (), *, force: bool = False, progress: Progress | None = None
) -> Exported:
    """See `Store.export`."""
    if not force and os.path.lexists(path):
        raise StoreError(f"{path}: is there already. Choose another name, or say --force (force=True) to replace it")
    records = _selected(store, references)
    entries: list[dict[str, Any]] = []
    blobs: dict[str, Descriptor] = {}
    attached: dict[str, Descriptor] = {}

    def include(*descriptors: Descriptor) -> None:
        blobs.update((each.digest, each) for each in descriptors)

    for record in records:
        descriptor = store.descriptor(record.reference)
        include(descriptor, *unpack(store.blobs, descriptor).files.values())
        created = {CREATED: record.created} if record.created else {}
        entries.append(_entry(descriptor, {REF_NAME: record.reference} | created))
        entries += [_entry(descriptor, {REF_NAME: f"{record.name}:{tag}"}) for tag in record.tags]
        for attachment in store.attachments(record.reference):
            include(attachment.descriptor, *attachment_blobs(store.blobs, attachment.descriptor))
            if attachment.descriptor.digest not in attached:
                entries.append(_entry(attachment.descriptor, {SUBJECT: descriptor.digest}))
            attached[attachment.descriptor.digest] = attachment.descriptor
    index = {"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": entries}
    with _new_file(path) as file:
        _add_bytes(file, LAYOUT_FILE, json.dumps(LAYOUT).encode())
        _add_bytes(file, INDEX_FILE, json.dumps(index, sort_keys=True, separators=(",", ":")).encode())
        done, total = 0, sum(each.size for each in blobs.values())
        for digest, descriptor in sorted(blobs.items()):
            with _member(file, f"blobs/{digest.replace(':', '/')}", descriptor.size):
                store.blobs.copy(descriptor, file)
            done += descriptor.size
            if progress is not None:
                progress(done, total)
        file.write(_END)
        size = file.tell()
    return Exported(path, size, records, len(attached))


def _selected(store: Store, references: Iterable[str]) -> tuple[Record, ...]:
    chosen: dict[tuple[str, int], Record] = {}
    for record, tags in _found(store, references):
        key = (record.name, record.version)
        known = chosen[key].tags if key in chosen else ()
        chosen[key] = replace(record, tags=tuple(sorted({*known, *tags})))
    if not chosen:
        raise StoreError(f"{store.root}: has no version to export. Name one, or add an adapter with `reft store add`")
    return tuple(record for _, record in sorted(chosen.items()))


def _found(store: Store, references: Iterable[str]) -> Iterator[tuple[Record, tuple[str, ...]]]:
    texts = tuple(references)
    if not texts:
        yield from ((record, record.tags) for record in store.list())
    for text in texts:
        reference = Reference.parse(text)
        if reference.exact:
            record = store.find(text)
            yield record, tuple(tag for tag in record.tags if tag == reference.tag)
            continue
        records = store.list(reference.name)
        if not records:
            store.find(text)
        yield from ((record, record.tags) for record in records)


def _entry(descriptor: Descriptor, annotations: dict[str, str]) -> dict[str, Any]:
    return {**descriptor.to_data(), "annotations": annotations}


@contextmanager
def _new_file(path: Path) -> Iterator[BinaryIO]:
    """A file that gets its name when all of it is on disk; nothing is left of it when that fails."""
    partial = path.with_name(f".{path.name[:100]}-{unique_name()}.partial")
    with explained("write", path):
        try:
            with partial.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
            sync_directory(path.absolute().parent)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def _member(file: BinaryIO, name: str, size: int) -> Iterator[None]:
    header = tarfile.TarInfo(name)
    header.size, header.mode = size, 0o644
    file.write(header.tobuf(tarfile.GNU_FORMAT, "ascii", "strict"))
    yield
    file.write(bytes(-size % _BLOCK))


def _add_bytes(file: BinaryIO, name: str, data: bytes) -> None:
    with _member(file, name, len(data)):
        file.write(data)
