"""The header of a safetensors file, checked before a library allocates anything by it.

The library itself checks that offsets neither overlap nor leave the file nor leave holes in it, and that they fit
shapes and dtypes. It takes longer headers than this, keys that are there twice, dtypes that hardly anything computes
with, any number of dimensions, and dimensions of any size where the tensor has no elements.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, BinaryIO

from reft_plugins import strict_json
from reft_plugins.errors import AdapterError
from reft_plugins.limits import DTYPES, MAX_DIMENSIONS, MAX_EMPTY_DIMENSION, MAX_HEADER_BYTES

_METADATA = "__metadata__"


def check_header(file: BinaryIO, where: str, dtypes: Collection[str] | None = DTYPES) -> None:
    """Check what a safetensors file says of its tensors, without reading them.

    Args:
        file: at its beginning; where: named in errors.
        dtypes: those that are accepted; None for all.

    Raises:
        AdapterError: when the header is too large, cut off, no JSON object of tensors, names one twice, or one has a
            dtype or a number of dimensions that is refused.
    """
    length = int.from_bytes(file.read(8), "little")
    if length > MAX_HEADER_BYTES:
        raise AdapterError(f"{where}: a header of {length} bytes exceeds the limit of {MAX_HEADER_BYTES}")
    text = file.read(length)
    if len(text) < length or not text:
        raise AdapterError(f"{where}: not a safetensors file: it ends within its header")
    try:
        header = strict_json.loads(text)
    except ValueError as error:
        raise AdapterError(f"{where}: not a safetensors file: its header: {error}") from None
    if not isinstance(header, dict):
        raise AdapterError(f"{where}: not a safetensors file: its header is no JSON object")
    for name, entry in header.items():
        if name != _METADATA:
            _check_entry(f"{where}: tensor {name[:200]!r}", entry, dtypes)


def _check_entry(where: str, entry: Any, dtypes: Collection[str] | None) -> None:
    if not isinstance(entry, dict) or not isinstance(entry.get("shape"), list):
        raise AdapterError(f"{where}: not a safetensors file: no dtype and shape")
    dtype, shape = str(entry.get("dtype")), entry["shape"]
    if dtypes is not None and dtype not in dtypes:
        raise AdapterError(f"{where}: dtype {dtype[:20]!r} is not read; adapters hold {', '.join(sorted(dtypes))}")
    if len(shape) > MAX_DIMENSIONS:
        raise AdapterError(f"{where}: {len(shape)} dimensions exceed the limit of {MAX_DIMENSIONS}")
    if 0 in shape and any(isinstance(size, int) and size > MAX_EMPTY_DIMENSION for size in shape):
        raise AdapterError(f"{where}: has no elements, yet a dimension of more than {MAX_EMPTY_DIMENSION}")
