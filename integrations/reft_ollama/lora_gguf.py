"""LoRA files for llama.cpp: low-rank weight deltas beside a base model's own GGUF file.

llama.cpp computes `W x + alpha / rank * lora_b (lora_a x)` with one `alpha` for the whole file (`lora_a` `[rank, in]`,
`lora_b` `[out, rank]`), in the row order of the base file, which differs from transformers' for queries and keys of
its `llama` architecture. Other scalings (rsLoRA, patterns per module, several deltas of a module) are folded into
`lora_b`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import gguf
import torch
from torch import Tensor

from reft_ollama.architectures.base import Architecture
from reft_ollama.architectures.rotary import interleave_rotary
from reft_plugins.errors import AdapterError, ExportError, UnsupportedProgramError
from reft_plugins.program import Node, Program, WeightDelta

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Rows = Callable[[Tensor], Tensor]

CONVERTED_AS = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
    "phi3": gguf.MODEL_ARCH.PHI3,
}
"""The architecture of the files that llama.cpp's own converter makes, which are those people have, by `model_type`."""

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class LoraTensor:
    """The factors for one tensor of the base file: `a` `[rank, in]`, `b` `[out, rank]`, float32.

    For the embedding both are the other way round in memory: `a` `[vocabulary, rank]`.
    """

    name: str
    a: Tensor
    b: Tensor


@dataclass(frozen=True, slots=True)
class Lora:
    """A LoRA file's contents: `architecture` is llama.cpp's name for the base file's."""

    architecture: str
    alpha: float
    tensors: tuple[LoraTensor, ...]


def make_lora(program: Program, architecture: Architecture, config: PretrainedConfig) -> Lora:
    """The LoRA file of a program, for a base file made by llama.cpp's own converter.

    Raises:
        UnsupportedProgramError: naming the node a LoRA file cannot hold, and the way out.
        AdapterError: a module the base model's file does not store.
    """
    target = CONVERTED_AS.get(config.model_type)
    if target is None:
        raise ExportError(
            f"base model: LoRA files are not written for {config.model_type!r} models, only for "
            f"{', '.join(sorted(CONVERTED_AS))}. Export a merged file instead, without --lora"
        )
    modules: dict[str, list[WeightDelta]] = {}
    for node in program:
        delta = _plain(node)
        modules.setdefault(delta.module, []).append(delta)
    # Where all modules have one alpha, which is the common case, their factors go into the file as they are.
    alphas = Counter(round(delta.scaling * _rank(deltas), 9) for deltas in modules.values() for delta in deltas)
    alpha = next((value for value, _ in alphas.most_common() if value > 0), 1.0)
    tensors = []
    for module, deltas in modules.items():
        name, rows = _place(module, target, architecture, config)
        a, b = stack(deltas, alpha)
        tensors.append(LoraTensor(name, a.T if name == _EMBEDDING else a, rows(b)))
    return Lora(gguf.MODEL_ARCH_NAMES[target], alpha, tuple(tensors))


def stack(deltas: Sequence[WeightDelta], alpha: float) -> tuple[Tensor, Tensor]:
    """Plain deltas of one module as one pair of factors, to be scaled by `alpha / rank`."""
    rank = _rank(deltas)
    lows, highs = [], []
    for delta in deltas:
        assert delta.a is not None and delta.b is not None
        lows.append(delta.a.float())
        highs.append(delta.b.double() * (delta.scaling * rank / alpha))
    return torch.cat(lows), torch.cat(highs, dim=1).float()


def write_lora(
    path: Path, lora: Lora, *, dtype: str = "f32", name: str = "adapter", notes: Mapping[str, str] | None = None
) -> None:
    """Write the file; equal input gives equal bytes.

    Args:
        dtype: `f32`, `f16` or `bf16`; name: `general.name`; notes: further text keys.

    Raises:
        ExportError: a value that does not fit `dtype`.
    """
    writer = gguf.GGUFWriter(path, lora.architecture)
    try:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, lora.alpha)
        writer.add_name(name)
        for key, text in (notes or {}).items():
            writer.add_string(key, text)
        for tensor in lora.tensors:
            for kind, values in (("lora_a", tensor.a), ("lora_b", tensor.b)):
                _add(writer, f"{tensor.name}.{kind}", values, dtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


_EMBEDDING = "token_embd.weight"


def _rank(deltas: Sequence[WeightDelta]) -> int:
    return sum(delta.rank for delta in deltas)


def _plain(node: Node) -> WeightDelta:
    if not isinstance(node, WeightDelta):
        raise UnsupportedProgramError(
            f"{node}: a LoRA file holds low-rank changes of weights only. Export a merged file (without --lora), or a "
            "constant edit as a control vector (--control-vector)"
        )
    if not node.positions.everywhere:
        raise UnsupportedProgramError(
            f"{node}: at positions {node.positions} only, but llama.cpp applies a LoRA file to every token. "
            "Serve the adapter with vLLM (reft serve), which keeps its positions"
        )
    if not node.plain:
        extras = ("magnitude", "bias", "input_scale", "output_scale", "new_weight", "new_bias")
        named = ", ".join(extra for extra in extras if getattr(node, extra) is not None) or "no low-rank factors"
        raise UnsupportedProgramError(
            f"{node}: a LoRA file has no place for {named}. Export a merged file instead (without --lora)"
        )
    return node


def _place(
    module: str, target: gguf.MODEL_ARCH, architecture: Architecture, config: PretrainedConfig
) -> tuple[str, Rows]:
    """The tensor of the base file that is this module's weight, and how the file orders the weight's rows."""
    stored = {*architecture.linear_modules(config), architecture.embedding, architecture.head}
    names = gguf.get_tensor_name_map(target, config.num_hidden_layers)
    name = names.get_name(f"{module}.weight", try_suffixes=(".weight",)) if module in stored else None
    if name is None:
        raise AdapterError(
            f"WeightDelta({module}): the base model has no module of this name that a GGUF file stores as a matrix; "
            f"there are, for example, {', '.join(sorted(stored)[:3])}"
        )
    if config.tie_word_embeddings and module in (architecture.embedding, architecture.head):
        raise UnsupportedProgramError(
            f"WeightDelta({module}): the base model uses one tensor for its embeddings and its output layer, and "
            "llama.cpp would change both. Export a merged file instead (without --lora)"
        )
    heads = {architecture.query: config.num_attention_heads, architecture.key: config.num_key_value_heads}
    found = [count for part, count in heads.items() if module.endswith(part)]
    if target == gguf.MODEL_ARCH.LLAMA and found:
        return name, lambda rows: interleave_rotary(rows, found[0])
    return name, lambda rows: rows


def _add(writer: gguf.GGUFWriter, name: str, values: Tensor, dtype: str) -> None:
    rounded = values.contiguous().to(DTYPES[dtype])
    if not bool(torch.isfinite(rounded).all()):
        where = "has values that are not finite" if not torch.isfinite(values).all() else f"does not fit {dtype}"
        raise ExportError(f"tensor {name!r} {where}. Use --dtype f32 if the adapter itself is sound")
    if dtype == "bf16":
        data = rounded.view(torch.int16).numpy().view("uint8")
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType.BF16)
    else:
        writer.add_tensor(name, rounded.numpy())
