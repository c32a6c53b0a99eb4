"""Writing the exported model as one GGUF file, a tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from reft_ollama.architectures.base import Architecture, rope_factors
from reft_ollama.tokenizers.conversion import GgufTokenizer
from reft_ollama.weights.stack import Weights, parameters
from reft_plugins.errors import ExportError

DTYPES: dict[str, tuple[torch.dtype, gguf.GGMLQuantizationType, gguf.LlamaFileType]] = {
    "f32": (torch.float32, gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (torch.float16, gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (torch.bfloat16, gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
}
"""Number formats of the matrices by the names of `--dtype`; vectors are always float32, as llama.cpp wants them."""


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
    """Write a file; equal input gives equal bytes.

    Args:
        name: `general.name`; notes: further text keys of the file.
        progress: called with written and total bytes.

    Raises:
        ExportError: a tensor the architecture has no name for, or a value that does not fit `dtype`.
    """
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture.target])
    try:
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(name)
        for key, text in (notes or {}).items():
            writer.add_string(key, text)
        writer.add_file_type(DTYPES[dtype][2])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        architecture.write_hyper_parameters(writer, weights.config)
        tokenizer.write(writer)
        _write_tensors(writer, weights, architecture, dtype, progress)
    finally:
        writer.close()


def _write_tensors(
    writer: gguf.GGUFWriter,
    weights: Weights,
    architecture: Architecture,
    dtype: str,
    progress: Callable[[int, int], None],
) -> None:
    factors = rope_factors(weights.config)
    total = 0
    if factors is not None:
        total += _declare(writer, "rope_freqs.weight", tuple(factors.shape), dtype)
    parts = {name: architecture.parts(name, shape, weights.config) for name, shape in weights.shapes.items()}
    for part in (part for several in parts.values() for part in several):
        total += _declare(writer, part.name, part.shape, dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    done = 0
    if factors is not None:
        writer.write_tensor_data(factors.numpy())
    for name, tensor in parameters(weights):
        for part in parts[name]:
            array = _encode(name, part.make(tensor), dtype)
            writer.write_tensor_data(array)
            done += array.nbytes
        progress(done, total)


def _declare(writer: gguf.GGUFWriter, name: str, shape: tuple[int, ...], dtype: str) -> int:
    kind = DTYPES[dtype if len(shape) > 1 else "f32"][1]
    size = 4 if kind == gguf.GGMLQuantizationType.F32 else 2
    elements = int(np.prod(shape))
    writer.add_tensor_info(name, shape, np.dtype(np.float32), size * elements, raw_dtype=kind)
    return size * elements


def _encode(name: str, tensor: Tensor, dtype: str) -> npt.NDArray[np.generic]:
    """The bytes of a tensor: float32, float16, or bfloat16 as 16-bit integers (NumPy has no bfloat16)."""
    rounded = tensor.contiguous().to(DTYPES[dtype if tensor.ndim > 1 else "f32"][0])
    if not bool(torch.isfinite(rounded).all()):
        where = "has values that are not finite" if not torch.isfinite(tensor).all() else f"does not fit {dtype}"
        raise ExportError(f"tensor {name!r} {where}. Use --dtype bf16 or f32 if the base model itself is sound")
    if rounded.dtype == torch.bfloat16:
        return rounded.view(torch.int16).numpy()
    return rounded.numpy()
