"""The store: adapters by name, version, tag and digest in one folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from adapters_store.layout.checkouts import CHECKOUTS
from adapters_store.layout.files import ensure_directory, explained, sync_directory
from adapters_store.layout.history import HISTORY_FILE
from adapters_store.layout.index import Index
from adapters_store.layout.ledger import replace_file
from adapters_store.layout.locks import locked, locked_alone
from adapters_store.layout.oci import LAYOUT
from adapters_store.location import INDEX_FILE, LAYOUT_FILE, default_path, is_store
from adapters_store.looked_up import FOLDER as LOOKUPS
from adapters_store.records import Collected, Report
from adapters_store.upkeep import collection, recovery, verification
from adapters_store.upkeep.marking import Marks
from adapters_store.verbs.writing import CONTENT_GATE, CONTENT_LOCK, WRITER_LOCK, Writing
from reft_plugins.errors import StoreError

if TYPE_CHECKING:
    from adapters_store.archive.reading import Imported
    from adapters_store.archive.writing import Exported
    from adapters_store.comparison import Difference
    from adapters_store.lineage import Lineage
    from adapters_store.upkeep.usage import Usage

_BEGUN = {"blobs", ".partial", INDEX_FILE, WRITER_LOCK, CONTENT_LOCK, CONTENT_GATE}
"""What an `init` that was interrupted may have left."""
_USED = {HISTORY_FILE, CHECKOUTS, collection.LEASES, LOOKUPS}
"""What a store may have besides, which only lost its marker."""
_DAMAGED = (f"{INDEX_FILE}.damaged-", f"{HISTORY_FILE}.damaged-")


class Store(Writing):
    """An OCI image layout that holds adapters. Get one with `Store.open` or `Store.init`.

    Any number of processes may use one store. Readers take no lock and always see a complete index; a version that
    `add` returned survives any crash. References are `name:tag`, `name@v3` or `name@sha256:…`.
    """

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
                foreign = {each.name for each in root.iterdir() if not each.name.startswith(_DAMAGED)} - _BEGUN
                if os.path.lexists(root / INDEX_FILE):
                    foreign -= _USED
            if foreign:
                raise StoreError(
                    f"{root}: holds other files ({sorted(foreign)[0]!r}, …). A store needs an empty folder"
                )
        store = cls(root)
        with store._changing():
            ensure_directory(root / "blobs")
            ensure_directory(store.blobs.directory)
            if not os.path.lexists(root / INDEX_FILE):
                replace_file(root / INDEX_FILE, Index().document(0))
            if not os.path.lexists(root / LAYOUT_FILE):
                replace_file(root / LAYOUT_FILE, json.dumps(LAYOUT).encode())
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

    def gc(self, grace_seconds: float = collection.GRACE_SECONDS, dry_run: bool = False) -> Collected:
        """Remove what nothing refers to: blobs, checked-out folders, files that were never finished.

        Nothing is removed that a reader holds (`hold`), that is being added, that is younger than the grace period, or
        whose version was removed within it.

        Args:
            grace_seconds: the grace period; files from the future are kept as well.
            dry_run: only tell.

        Raises:
            StoreError: when the store is damaged, so that it is not certain what is referred to, or the period is none;
                nothing was removed.
        """
        if not grace_seconds >= 0:  # nan is younger than nothing
            raise StoreError(f"a grace period cannot be {grace_seconds} seconds. Choose 0 or more")
        marks = Marks(self.blobs)
        marks.prepare(self._index())
        with self._alone():
            folded = dry_run or self._try_to_fold()
            collected = collection.collect(self.root, self._index(), marks, grace_seconds, dry_run)
            if not folded:  # there is room for it now
                with self._changing():
                    self._ledger.fold()
        return collected

    def _try_to_fold(self) -> bool:
        """Let `index.json` say everything; False where it cannot be written, as on a full disk."""
        with self._changing():
            try:
                if self._ledger.tail_bytes:
                    self._ledger.fold()
            except StoreError:
                return False
        return True

    def verify(self, progress: Callable[[int, int], None] | None = None) -> Report:
        """Check every blob, reference, manifest, line of the history and checked-out file.

        Args:
            progress: called with the number of bytes checked so far and their total.

        Returns:
            All problems, not only the first.
        """
        return verification.verify(self.root, progress)

    def diff(self, a: str, b: str) -> Difference:
        """What differs between two versions, or directories: settings, positions, and what their parameters compute.

        The only verb that imports torch.

        Raises:
            UnknownReferenceError: listing what exists. StoreError: when a blob is missing or damaged.
        """
        from adapters_store.comparison import diff

        return diff(self, a, b)

    def log(self, reference: str, *, children: bool = False, same_data: bool = True) -> Lineage:
        """Where a version comes from: parents, authors, training data, exports.

        Args:
            children: also what was made of it; same_data: also what was trained on the same data. Either reads every
                manifest of the store once.

        Raises:
            UnknownReferenceError: listing what exists. StoreError: when a blob is missing or damaged.
        """
        from adapters_store.lineage import lineage

        return lineage(self, reference, children=children, same_data=same_data)

    def usage(self) -> Usage:
        """What the store takes of the disk, for what, and by which name; every manifest is read, no tensors are.

        Raises:
            StoreError: when the index or a manifest is missing or damaged.
        """
        from adapters_store.upkeep.usage import usage

        return usage(self)

    def export(
        self,
        path: Path | str,
        references: Sequence[str] = (),
        *,
        force: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> Exported:
        """Write versions, with what is attached to them, to one file: a tar of an OCI image layout.

        Args:
            path: the file; it gets its name when all of it is on disk.
            references: `name` for all versions and tags of a name, `name:tag` for a version with that tag, others for
                a version; by default everything.
            force: replace the file if it is there already.
            progress: called with the number of bytes written so far and their total.

        Raises:
            UnknownReferenceError: listing what exists. StoreError: when a blob is missing or damaged, or the file
                cannot be written.
        """
        from adapters_store.archive.writing import export

        return export(self, Path(path), references, force=force, progress=progress)

    def import_(
        self,
        path: Path | str,
        references: Sequence[str] = (),
        *,
        name: str | None = None,
        renumber: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> Imported:
        """Read versions from a file that `export` wrote; versions keep their numbers, tags move.

        Args:
            path: the file; other programs' `oci-archive`, with our names in it, will do.
            references: as of `export`.
            name: for the versions, instead of their own.
            renumber: give them the next free numbers.
            progress: called with the number of bytes read so far and their total.

        Raises:
            VersionConflictError: when a number belongs to other content here; everything else was imported.
            UnknownReferenceError: listing what the file has. StoreError: when it is not to be trusted.
        """
        from adapters_store.archive.reading import import_

        return import_(self, Path(path), references, name=name, renumber=renumber, progress=progress)

    def recover(self) -> tuple[str, ...]:
        """Make the index anew from the history and from what is left of `index.json`; returns what was wrong.

        Damaged files stay beside the new ones, under other names.

        Raises:
            StoreError: when nothing can be written, or nothing is left that tells which versions there were.
        """
        with self._alone(), locked(self.root / WRITER_LOCK):
            return recovery.recover(self.root)

    def _alone(self) -> AbstractContextManager[None]:
        return locked_alone(self.root / CONTENT_LOCK, self.root / CONTENT_GATE)


def _locate(path: Path | str | None) -> Path:
    chosen = Path(path).expanduser() if path is not None else default_path()
    return Path(os.path.realpath(chosen))
