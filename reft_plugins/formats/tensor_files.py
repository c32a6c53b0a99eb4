"""Reading tensor files of other libraries without running code that may be in them."""

from __future__ import annotations

import hashlib
import pickletools
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from reft_plugins.errors import AdapterError
from reft_plugins.tensor_header import check_header

if TYPE_CHECKING:
    from torch import Tensor

_MAX_PICKLE_BYTES = 64 * 1024 * 1024


def read_pickle(path: Path) -> dict[str, Tensor]:
    """A flat dictionary of tensors from a `.bin` file that `torch.save` wrote.

    Raises:
        AdapterError: when the file is unreadable, holds anything but tensors by name, or asks to run code on loading.
    """
    import torch

    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        code = re.search(r"Unsupported \w+: ?(GLOBAL )?([\w.]+)", str(error))
        reason = f"it names {code[2]}" if code else type(error).__name__
        raise AdapterError(
            f"{path}: refused: it is damaged, or it would run code when loaded ({reason}). "
            "Only files of plain tensors are read; get the adapter from a source you trust and save it again"
        ) from None
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in found.items()
    ):
        raise AdapterError(f"{path}: expected a dictionary of tensors by name, found {type(found).__name__}")
    return found


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        AdapterError: when the file is unreadable or damaged.
    """
    import safetensors.torch
    from safetensors import SafetensorError

    try:
        with path.open("rb") as file:
            check_header(file, str(path), dtypes=None)
        return safetensors.torch.load_file(path)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise AdapterError(f"{path}: not a readable safetensors file: {error}") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, as safetensors or else as a pickle of plain tensors.

    Raises:
        AdapterError: as `read_safetensors` and `read_pickle`.
    """
    return read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)


def tensor_names(path: Path) -> set[str]:
    """Names in a tensor file without reading its tensors or running anything in it; empty where it is not understood.

    Of a pickle they are the texts that it contains, which include the names.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, framework="numpy") as tensors:
                return set(tensors.keys())
        with zipfile.ZipFile(path) as archive:
            inner = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            if archive.getinfo(inner).file_size > _MAX_PICKLE_BYTES:
                return set()
            return {value for _, value, _ in pickletools.genops(archive.read(inner)) if isinstance(value, str)}
    except Exception:  # whatever is wrong with the file, reading it says so
        return set()


def digest_of(files: Iterable[Path]) -> str:
    """SHA-256 over the names and contents of some files, in the order of their names."""
    total = hashlib.sha256()
    for path in sorted(files):
        with path.open("rb") as file:
            total.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return "sha256:" + total.hexdigest()
