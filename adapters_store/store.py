"""The store: adapters by name, version, tag and digest in one folder."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from adapters_store.layout import checkouts, contents
from adapters_store.layout.blobs import Blobs
from adapters_store.layout.files import (
    ensure_directory,
    explained,
    partial_file,
    settle,
    sync_directory,
)
from adapters_store.layout.index import Index, read_index
from adapters_store.layout.oci import BASE, CREATED, LAYOUT, MAX_INDEX_BYTES, METHOD, SIZE, Descriptor
from adapters_store.location import INDEX_FILE, LAYOUT_FILE, default_path, is_store
from adapters_store.records import Details, Record, Report
from adapters_store.references import Reference, parse_tag
from adapters_store.upkeep import verification
from reft_plugins.errors import StoreError

LOCK_FILE = ".lock"
LOCK_TIMEOUT_SECONDS = 60.0
_LOCK_POLL_SECONDS = 0.005


class Store:
    """An OCI image layout that holds adapters. Get one with `Store.open` or `Store.init`.

    Any number of processes may use one store. Readers take no lock and always see a complete index; a version that
    `add` returned survives any crash. References are `name:tag`, `name@v3` or `name@sha256:…`.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._blobs = Blobs(root)

    @classmethod
    def init(cls, path: Path | str | None = None) -> Store:
        """Make an empty store, or open the one that is there.

        Args:
            path: its folder; by default `REFT_STORE`, else `reft/store` in the user's data folder.

        Raises:
            StoreError: when the folder holds something else, or cannot be written.
        """
        root = _locate(path)
        if not is_store(root):
            with explained("make the store", root):
                root.mkdir(parents=True, exist_ok=True)
                foreign = {each.name for each in root.iterdir()} - {"blobs", ".partial", INDEX_FILE, LOCK_FILE}
            if foreign:
                raise StoreError(
                    f"{root}: holds other files ({sorted(foreign)[0]!r}, …). A store needs an empty folder"
                )
        store = cls(root)
        with store._locked():
            ensure_directory(root / "blobs")
            ensure_directory(store._blobs.directory)
            if not os.path.lexists(root / INDEX_FILE):
                store._replace(INDEX_FILE, Index.empty().document.to_json())
            if not os.path.lexists(root / LAYOUT_FILE):
                store._replace(LAYOUT_FILE, json.dumps(LAYOUT).encode())
            with explained("make the store", root):
                sync_directory(root.parent)
        return cls.open(root)

    @classmethod
    def open(cls, path: Path | str | None = None, check: bool = True) -> Store:
        """Open a store.

        Args:
            path: its folder; by default `REFT_STORE`, else `reft/store` in the user's data folder.
            check: look at its marker file and folders first; without, only `verify` is of use on a damaged one.

        Raises:
            StoreError: when there is none, or it is of a kind that is not understood.
        """
        root = _locate(path)
        if not is_store(root):
            raise StoreError(
                f"{root}: no store there. Make one with `reft store init`, "
                "or name another folder with REFT_STORE or --store"
            )
        for problem in verification.layout_problems(root) if check else ():
            raise StoreError(str(problem))
        return cls(root)

    def add(self, directory: Path | str, reference: str) -> Record:
        """Publish an adapter directory as the next version of a name, and let a tag point to it.

        Identical content under the same name is one version: adding it again returns that version and moves the tag.
        When this returns, the version is on disk. Then `reft_adapter_published` is called for a new version; a plugin
        that fails there causes a warning, because the version exists.

        Args:
            directory: with `adapter.json` and `adapter.safetensors`.
            reference: `name:tag`, or `name` for a version without a tag.

        Raises:
            AdapterError: when the directory is not a sound adapter.
            StoreError: when the reference is malformed or the store cannot be written; nothing changed then.
        """
        target = Reference.parse(reference)
        if target.version is not None or target.digest is not None:
            raise StoreError(f"{reference}: versions and digests cannot be chosen. Write name or name:tag")
        descriptor, packed = contents.pack(Path(directory), self._blobs)
        facts = {SIZE: str(packed.size), CREATED: datetime.now(UTC).isoformat(timespec="seconds")}
        entry = descriptor.model_copy(update={"annotations": {**descriptor.annotations, **facts}})
        self._blobs.sync()
        with self._locked():
            index = self._index()
            changed, version = index.with_version(target.name, entry)
            added = changed is not index
            if target.tag is not None:
                changed = changed.with_tag(target.name, target.tag, version)
            self._save(index, changed)
        record = replace(self._record(changed, target.name, version), added=added)
        if added:
            _announce(record)
        return record

    def list(self) -> tuple[Record, ...]:
        """Every version, by name and number.

        Raises:
            StoreError: when the index cannot be trusted.
        """
        index = self._index()
        return tuple(
            self._record(index, name, number)
            for name in sorted(index.versions)
            for number in sorted(index.versions[name])
        )

    def show(self, reference: str) -> Details:
        """One version with its verified manifests.

        Raises:
            UnknownReferenceError: listing what exists. StoreError: when a blob is missing or damaged.
        """
        index = self._index()
        parsed = Reference.parse(reference)
        version, descriptor = index.select(parsed)
        found = contents.unpack(self._blobs, descriptor)
        return Details(self._record(index, parsed.name, version), found.manifest, found.image.to_data())

    def tag(self, reference: str, tag: str) -> Record:
        """Point a tag to an existing version, atomically, whether or not the tag existed.

        Args:
            reference: of the version.
            tag: `tag` or `name:tag` of the same name.

        Raises:
            UnknownReferenceError: listing what exists. StoreError: when the tag is malformed.
        """
        parsed = Reference.parse(reference)
        tag = parse_tag(tag, parsed.name)
        with self._locked():
            index = self._index()
            version, descriptor = index.select(parsed)
            contents.unpack(self._blobs, descriptor)
            changed = index.with_tag(parsed.name, tag, version)
            self._save(index, changed)
        return self._record(changed, parsed.name, version)

    def checkout(self, reference: str) -> Path:
        """A folder with the adapter's two files, verified now. Its path names the content and never changes.

        Raises:
            UnknownReferenceError: listing what exists. StoreError: naming a blob that is missing or damaged.
        """
        return self._check_out(self._index(), Reference.parse(reference))

    def resolve(self, reference: str) -> Path | None:
        """Like `checkout`, or None where the store has no adapter of that name."""
        index = self._index()
        parsed = Reference.parse(reference)
        known = parsed.name in index.versions or parsed.name in index.tags
        return self._check_out(index, parsed) if known else None

    def verify(self, progress: Callable[[int, int], None] | None = None) -> Report:
        """Check every blob, reference, manifest and checked-out file.

        Args:
            progress: called with the number of bytes checked so far and their total.

        Returns:
            All problems, not only the first.
        """
        return verification.verify(self.root, progress)

    def _check_out(self, index: Index, reference: Reference) -> Path:
        _, descriptor = index.select(reference)
        found = contents.unpack(self._blobs, descriptor)
        return checkouts.check_out(self._blobs, descriptor.digest, found.files)

    def _index(self) -> Index:
        return read_index(self.root / INDEX_FILE)

    def _save(self, index: Index, changed: Index) -> None:
        if changed is index:
            with explained("write", self.root):
                sync_directory(self.root)
            return
        data = changed.document.to_json()
        if len(data) > MAX_INDEX_BYTES:
            raise StoreError(f"{self.root / INDEX_FILE}: has no room for more: limit {MAX_INDEX_BYTES} bytes")
        self._replace(INDEX_FILE, data)

    def _replace(self, name: str, data: bytes) -> None:
        with partial_file(self.root, mode=0o644) as (path, file):
            file.write(data)
            settle(path, file, self.root / name)
            sync_directory(self.root)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        path = self.root / LOCK_FILE
        if path.is_symlink():
            raise StoreError(f"{path}: is a symbolic link, which a store never contains. Remove it")
        lock = FileLock(path, timeout=LOCK_TIMEOUT_SECONDS)
        try:
            with explained("lock the store", path):
                lock.acquire(poll_interval=_LOCK_POLL_SECONDS)
        except Timeout:
            raise StoreError(
                f"{self.root}: other processes kept it locked for {LOCK_TIMEOUT_SECONDS:.0f} s. Try again"
            ) from None
        try:
            yield
        finally:
            lock.release()

    def _record(self, index: Index, name: str, version: int) -> Record:
        descriptor = index.versions[name][version]
        facts = self._facts(descriptor)
        return Record(
            name=name,
            version=version,
            digest=descriptor.digest,
            tags=index.tags_by_digest(name).get(descriptor.digest, ()),
            method=facts[METHOD],
            base=facts.get(BASE),
            size=int(facts[SIZE]),
            created=descriptor.annotations.get(CREATED),
            store=self.root,
        )

    def _facts(self, descriptor: Descriptor) -> dict[str, str]:
        if METHOD in descriptor.annotations and re.fullmatch("[0-9]{1,18}", descriptor.annotations.get(SIZE, "")):
            return descriptor.annotations
        found = contents.unpack(self._blobs, descriptor)  # another program put it here, without our annotations
        return {**found.image.annotations, SIZE: str(found.size)}


def _locate(path: Path | str | None) -> Path:
    chosen = Path(path).expanduser() if path is not None else default_path()
    return Path(os.path.realpath(chosen))


def _announce(record: Record) -> None:
    from reft_plugins.plugins import manager

    try:
        manager().hook.reft_adapter_published(record=record)
    except Exception as error:
        warnings.warn(
            f"{record.reference} is stored, but a plugin failed when told so: {type(error).__name__}: {error}",
            RuntimeWarning,
            stacklevel=3,
        )
