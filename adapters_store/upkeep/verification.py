"""Checking a store from end to end: everything that is wrong, not only the first thing."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

from adapters_store import limits
from adapters_store.layout import checkouts
from adapters_store.layout.attachments import attachment_blobs, read_attachment
from adapters_store.layout.blobs import Blobs, Sized
from adapters_store.layout.contents import Contents, check_header, disagreements, read_adapter_manifest, read_image
from adapters_store.layout.entries import IndexEntry
from adapters_store.layout.files import PARTIAL, check_directory, copy_hashed, open_regular, read_at_most
from adapters_store.layout.history import HISTORY_FILE, Change, Lines, decode
from adapters_store.layout.index import Index
from adapters_store.layout.oci import LAYOUT, MAX_INDEX_BYTES, REF_NAME, LayoutMarker
from adapters_store.location import INDEX_FILE, LAYOUT_FILE
from adapters_store.records import Problem, Report
from adapters_store.references import Reference
from reft_plugins.errors import ReftError, StoreError


def layout_problems(root: Path) -> Iterator[Problem]:
    """What is wrong with the marker file and the folders of a store."""
    try:
        marker = LayoutMarker.parse(read_at_most(root / LAYOUT_FILE, limits.MAX_MARKER_BYTES), LAYOUT_FILE)
        if marker.to_data() != LAYOUT:
            raise StoreError(f"another kind of image layout: {marker.to_data()}; this version reads {LAYOUT}")
    except StoreError as error:
        yield Problem(LAYOUT_FILE, str(error))
    for folder in ("blobs", "blobs/sha256", PARTIAL, checkouts.CHECKOUTS):
        if folder.startswith("blobs") or os.path.lexists(root / folder):
            try:
                check_directory(root / folder)
            except StoreError as error:
                yield Problem(folder, str(error))


def verify(root: Path, progress: Callable[[int, int], None] | None = None) -> Report:
    """See `Store.verify`. Takes no lock: versions that are added meanwhile are not looked at."""
    return _Verification(root).run(progress or (lambda done, total: None))


class _Verification:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.blobs = Blobs(root)
        self.problems: list[Problem] = []
        self.sound: dict[str, int] = {}
        self.damaged: dict[str, str] = {}
        self.users: dict[str, list[str]] = defaultdict(list)

    def run(self, progress: Callable[[int, int], None]) -> Report:
        self.problems += layout_problems(self.root)
        index = self._read_index()  # before the blobs are listed, so that whatever it names is there by then
        self._scan(progress)
        for position, data in enumerate(index.foreign):
            self._use(IndexEntry.from_checked(data), data.get("annotations", {}).get(REF_NAME, f"foreign {position}"))
        for name, named in index.names.items():
            for number, entry in named.versions.items():
                label = str(Reference(name, version=number))
                self._use(entry, label)
                self._examine(label, entry)
            for tag, entry in named.tags.items():
                self._use(entry, str(Reference(name, tag=tag)))
        self._check_tags(index)
        for subject, attached in index.attached.items():
            for entry in attached:
                self._examine_attached(subject, entry)
        for digest, users in self.users.items():
            what = self.damaged.pop(digest, None if digest in self.sound else "missing")
            if what is not None:
                self._add(f"blobs/{digest.replace(':', '/')}", f"{what}; used by {', '.join(dict.fromkeys(users))}")
        for digest, what in self.damaged.items():
            self._add(f"blobs/{digest.replace(':', '/')}", f"{what}; nothing uses it")
        return Report(
            versions=sum(len(named.versions) for named in index.names.values()),
            tags=sum(len(named.tags) for named in index.names.values()),
            attachments=sum(map(len, index.attached.values())),
            blobs=len(self.sound),
            bytes=sum(self.sound.values()),
            unreferenced=len(self.sound.keys() - self.users.keys()),
            problems=tuple(self.problems),
        )

    def _add(self, where: str, what: object) -> None:
        self.problems.append(Problem(where, str(what).removeprefix(f"{where}: ")))

    def _read_index(self) -> Index:
        try:
            index = Index.parse(read_at_most(self.root / INDEX_FILE, MAX_INDEX_BYTES), INDEX_FILE)
        except StoreError as error:
            self._add(INDEX_FILE, error)
            index = Index()
        index = index.apply(self._read_history(index.offset or 0))
        for problem in index.problems:
            self._add(INDEX_FILE, problem)
        return index

    def _read_history(self, start: int) -> list[Change]:
        """Checks all lines; returns the changes of those that the index does not include."""
        changes: list[Change] = []
        lines, offset = Lines(self.root / HISTORY_FILE), 0
        try:
            for number, line in enumerate(lines, 1):
                try:
                    found = decode(line, f"line {number}").changes
                except StoreError as error:
                    self._add(HISTORY_FILE, error)
                    found = ()
                if offset >= start:
                    changes += found
                offset = lines.position
        except StoreError as error:
            self._add(HISTORY_FILE, error)
        if start > offset:
            self._add(HISTORY_FILE, f"ends at byte {offset}, but {INDEX_FILE} knows it up to {start}")
        return changes

    def _scan(self, progress: Callable[[int, int], None]) -> None:
        folder = self.blobs.directory
        try:
            check_directory(folder.parent)
            check_directory(folder)
            sizes = {entry.name: entry.stat(follow_symlinks=False).st_size for entry in os.scandir(folder)}
        except (StoreError, OSError):
            return
        done, total = 0, sum(sizes.values())
        for name, size in sorted(sizes.items()):
            digest = f"sha256:{name}"
            try:
                path = self.blobs.path(digest)
                with open_regular(path) as file:
                    found, length = copy_hashed(file, None, size)
            except (StoreError, OSError) as error:
                if os.path.lexists(folder / name):  # else `gc` has removed it meanwhile
                    self.damaged[digest] = str(error)
                continue
            if found == digest:
                self.sound[digest] = length
            else:
                self.damaged[digest] = f"damaged: its {length} bytes have the digest {found}"
            done += size
            progress(done, total)

    def _use(self, descriptor: Sized, user: str) -> bool:
        self.users[descriptor.digest].append(user)
        size = self.sound.get(descriptor.digest)
        if size is not None and size != descriptor.size:
            self._add(user, f"says that {descriptor.digest} has {descriptor.size} bytes, but it has {size}")
        return size == descriptor.size

    def _examine(self, label: str, entry: IndexEntry) -> None:
        if self.sound.get(entry.digest) != entry.size:
            return
        try:
            image = read_image(self.blobs, entry)
        except ReftError as error:
            return self._add(label, error)
        config_is_sound = self._use(image.config, label)
        tensors_are_sound = self._use(image.layers[0], label)
        if tensors_are_sound:
            try:
                check_header(self.blobs.path(image.layers[0].digest), "its tensors")
            except ReftError as error:
                self._add(label, error)
        if config_is_sound:
            try:
                manifest = read_adapter_manifest(self.blobs, image)
            except ReftError as error:
                return self._add(label, error)
            for disagreement in disagreements(image, manifest):
                self._add(label, disagreement)
            self._check_facts(label, entry, Contents(image, manifest))
            self._check_checkout(entry.digest, Contents(image, manifest))

    def _examine_attached(self, subject: str, entry: IndexEntry) -> None:
        label = f"attachment {entry.digest}"
        if not self._use(entry, label):
            return
        try:
            found = read_attachment(self.blobs, entry.descriptor)
            for each in attachment_blobs(self.blobs, entry):
                self._use(each, label)
        except StoreError as error:
            return self._add(label, error)
        if found.subject != subject or found.artifact_type != entry.artifact_type:
            self._add(label, f"{INDEX_FILE} says that it is a {entry.artifact_type} of {subject}, but it is not")

    def _check_facts(self, label: str, entry: IndexEntry, contents: Contents) -> None:
        for key, wanted in contents.facts.items():
            found = entry.annotations.get(key, wanted)
            if found != wanted:
                self._add(label, f"{INDEX_FILE} says {key} is {found!r}, but it is {wanted!r}")

    def _check_checkout(self, digest: str, contents: Contents) -> None:
        folder = checkouts.directory_of(self.root, digest)
        if not os.path.lexists(folder):
            return
        where = f"{checkouts.CHECKOUTS}/{folder.name}"
        try:
            check_directory(folder)
            foreign = checkouts.foreign_files(folder, contents.files)
        except StoreError as error:
            return self._add(where, error)
        for name in foreign:
            self._add(f"{where}/{name}", "does not belong there; moved aside when the version is next used")
        for name, descriptor in contents.files.items():
            if not checkouts.is_intact(folder / name, descriptor):
                self._add(f"{where}/{name}", "missing or damaged; made again when the version is next used")

    def _check_tags(self, index: Index) -> None:
        for name, named in index.names.items():
            for tag, entry in named.tags.items():
                if entry.digest not in named.numbers:
                    self._add(f"{name}:{tag}", f"points to {entry.digest}, which is no version of {name!r}")
