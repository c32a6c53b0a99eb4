"""Copies of versions outside the store, to be worked on."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from adapters_store.layout.contents import unpack
from adapters_store.layout.files import explained, unique_name
from reft_plugins.errors import StoreError

if TYPE_CHECKING:
    from adapters_store.verbs.reading import Reading


def copy_out(store: Reading, reference: str, target: Path, unchecked: bool = False) -> Path:
    """Copy a version's two files to a new folder, or one that is empty; verified, and there as a whole or not at all.

    Args:
        unchecked: copy what the trust policy does not admit, too; for looking at it, not for running it.

    Returns:
        The folder.

    Raises:
        UnknownReferenceError: listing what exists.
        UntrustedError: when the trust policy does not admit it.
        StoreError: when there is something already, or a blob is missing or damaged.
    """
    record = store.find(reference)
    exact = f"{record.name}@{record.digest}"
    place = Path(os.path.abspath(target))
    building = place.with_name(f".{place.name[:100]}-{unique_name()}.partial")
    with store.hold(exact, unchecked):
        files = unpack(store.blobs, store.descriptor(exact)).files
        with explained("write", target):
            try:
                building.mkdir(parents=True)
                for name, descriptor in files.items():
                    with (building / name).open("xb") as file:
                        store.blobs.copy(descriptor, file)
                if os.path.lexists(target) and (target.is_symlink() or not target.is_dir() or any(target.iterdir())):
                    raise StoreError(f"{target}: is there already, and nothing is overwritten. Choose another folder")
                building.rename(place)
            finally:
                shutil.rmtree(building, ignore_errors=True)
    return target
