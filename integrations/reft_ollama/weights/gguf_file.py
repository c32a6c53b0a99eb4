"""Writing the exported model as one GGUF file, a block of rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import gguf
import numpy as np
import torch
from torch import Tensor

from reft_ollama.architectures.base import Architecture, Part, unchanged
from reft_ollama.tokenizers.conversion import GgufTokenizer
from reft_ollama.weights.checkpoint import BLOCK_BYTES
from reft_ollama.weights.formats import FORMATS, encode, size_of
from reft_ollama.weights.stack import Weights, parameters


class GgufFile:
    """A file to be written: its tensors are known, so that its size can be asked for, but not yet read.

    Args:
        dtype: a directly written format of `FORMATS`.
        name: `general.name`; notes: further text keys.

    Raises:
        ExportError: a tensor the architecture has no name for.
    """

    def __init__(
        self,
        weights: Weights,
        architecture: Architecture,
        tokenizer: GgufTokenizer,
        *,
        dtype: str = "f16",
        name: str = "model",
        notes: Mapping[str, str] | None = None,
    ) -> None:
        self._weights, self._architecture, self._tokenizer = weights, architecture, tokenizer
        self._format = FORMATS[dtype]
        self._name, self._notes = name, dict(notes or {})
        self._extra = architecture.extra_tensors(weights.config)
        self._parts = {name: architecture.parts(name, shape, weights.config) for name, shape in weights.shapes.items()}

    @property
    def tensor_bytes(self) -> int:
        """Size of all tensors; what stands before them takes a few megabytes, most of it the vocabulary."""
        return sum(size_of(part.shape, self._format.tensor_type(part.shape)) for part in self._tensors())

    def write(self, path: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Write it; equal input gives equal bytes.

        Args:
            progress: called with written and total bytes.

        Raises:
            ExportError: a value that does not fit the number format.
            OSError: the disk does not take it.
        """
        self._write_header(path)
        total, done = self.tensor_bytes, 0
        with path.open("ab") as file:
            _align(file)
            for name, part, blocks in self._contents():
                for written in _write_tensor(file, name, blocks, self._format.tensor_type(part.shape)):
                    done += written
                    progress(done, total)

    def _tensors(self) -> Iterator[Part]:
        """Every tensor of the file, in its order."""
        for name, tensor in self._extra.items():
            yield Part(name, tuple(tensor.shape))
        for parts in self._parts.values():
            yield from parts

    def _contents(self) -> Iterator[tuple[str, Part, Iterable[Tensor]]]:
        """The same with the parameter it comes from, and its blocks of rows."""
        for name, tensor in self._extra.items():
            yield name, Part(name, tuple(tensor.shape)), [tensor]
        for name, blocks in parameters(self._weights):
            parts = self._parts[name]
            if [part.make for part in parts] == [unchanged]:
                yield name, parts[0], blocks
            else:
                whole = torch.cat(list(blocks))
                for part in parts:
                    yield name, part, [part.make(whole)]

    def _write_header(self, path: Path) -> None:
        writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[self._architecture.target])
        try:
            writer.add_type(gguf.GGUFType.MODEL)
            writer.add_name(self._tokenizer.file_name(self._name))
            for key, text in self._notes.items():
                writer.add_string(key, text)
            writer.add_file_type(self._format.file_type)
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            self._architecture.write_hyper_parameters(writer, self._weights.config)
            self._tokenizer.write(writer)
            for part in self._tensors():
                kind = self._format.tensor_type(part.shape)
                writer.add_tensor_info(part.name, part.shape, np.dtype(np.float32), size_of(part.shape, kind), kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
        finally:
            writer.close()


def write_gguf(
    path: Path,
    weights: Weights,
    architecture: Architecture,
    tokenizer: GgufTokenizer,
    *,
    dtype: str = "f16",
    name: str = "model",
    notes: Mapping[str, str] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write a file in one step; see `GgufFile` and `GgufFile.write`."""
    GgufFile(weights, architecture, tokenizer, dtype=dtype, name=name, notes=notes).write(path, progress)


def _write_tensor(
    file: BinaryIO, name: str, blocks: Iterable[Tensor], kind: gguf.GGMLQuantizationType
) -> Iterator[int]:
    """Write a tensor; yields bytes as they are written."""
    for block in blocks:
        rows = max(1, BLOCK_BYTES // max(1, block[:1].nbytes))
        for piece in block.split(rows):
            array = encode(name, piece, kind)
            file.write(array.data)
            yield array.nbytes
    _align(file)


def _align(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % gguf.GGUF_DEFAULT_ALIGNMENT))
