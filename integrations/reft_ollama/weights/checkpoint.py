"""A base model's parameters, read from safetensors on demand, a block of rows at a time."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from reft_plugins.errors import BaseModelError

BLOCK_BYTES = 4 << 20
"""Size of the blocks that large parameters are read in."""

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class _Stored:
    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: str


class Checkpoint:
    """A base model's parameters by their transformers names, in one or several safetensors files.

    Files are read, not mapped into memory, whose pages would count as this process's own.

    Raises:
        BaseModelError: there are no weights, a file is missing or cut off, or its index speaks of others.
    """

    def __init__(self, directory: Path) -> None:
        index = directory / "model.safetensors.index.json"
        names: dict[str, str] | None = None
        if index.is_file():
            names = json.loads(index.read_text("utf-8"))["weight_map"]
            files = sorted(set(names.values()))
        else:
            files = sorted(path.name for path in directory.glob("*.safetensors"))
        self._stored: dict[str, _Stored] = {}
        for file in files:
            self._stored |= _read_header(directory / file)
        if not self._stored:
            raise BaseModelError(f"{directory}: no safetensors weights")
        missing = [name for name in names or {} if name not in self._stored]
        if missing:
            raise BaseModelError(f"{index}: names {missing[0]!r}, which no file of the model holds. Download it again")

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def names(self) -> list[str]:
        """All parameters, layers in numerical order."""
        return natural_order(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape without reading the data."""
        return self._stored[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Number format it is stored in.

        Raises:
            BaseModelError: not a plain floating-point one, as in a quantised model.
        """
        stored = self._stored[name]
        if stored.dtype not in DTYPES:
            raise BaseModelError(
                f"{stored.file}: {name!r} is stored as {stored.dtype}; the export reads {', '.join(DTYPES)}. "
                "Give the model it was quantised from as base"
            )
        return DTYPES[stored.dtype]

    def load(self, name: str) -> Tensor:
        """The parameter in float32."""
        return torch.cat([block.float() for block in self.blocks(name)]).reshape(self.shape(name))

    def blocks(self, name: str) -> Iterator[Tensor]:
        """The parameter as consecutive blocks of rows: a vector in float32, others as they are stored.

        Raises:
            BaseModelError: see `dtype`; or the file ends early.
        """
        stored, dtype = self._stored[name], self.dtype(name)
        rows, *rest = stored.shape or (1,)
        row_bytes = math.prod(rest) * dtype.itemsize
        step = max(1, BLOCK_BYTES // max(1, row_bytes))
        with stored.file.open("rb", buffering=0) as file:
            file.seek(stored.offset)
            for start in range(0, rows, step):
                count = min(step, rows - start)
                data = bytearray(count * row_bytes)
                if _fill(file, data) != len(data):
                    raise BaseModelError(f"{stored.file}: ends within {name!r}. Download it again")
                block = torch.frombuffer(data, dtype=dtype).reshape(count, *rest)
                yield block if rest else block.float()


def natural_order(names: Iterable[str]) -> list[str]:
    """Names sorted with their numbers as numbers."""
    return sorted(names, key=lambda name: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", name)])


def _fill(file: FileIO, data: bytearray) -> int:
    done = 0
    while done < len(data):
        count = file.readinto(memoryview(data)[done:])
        if not count:
            break
        done += count
    return done


def _read_header(path: Path) -> dict[str, _Stored]:
    """Where each parameter lies; safetensors itself has checked the header, which it does not give out."""
    try:
        with safe_open(path, framework="pt"):
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (OSError, SafetensorError) as error:
        raise BaseModelError(f"{path}: not a complete safetensors file ({error}). Download it again") from None
    header.pop("__metadata__", None)
    return {
        name: _Stored(path, 8 + length + entry["data_offsets"][0], tuple(entry["shape"]), entry["dtype"])
        for name, entry in header.items()
    }
