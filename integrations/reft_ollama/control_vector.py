"""Control vectors for llama.cpp: constants that are added to the residual stream, beside a base model's GGUF file.

llama.cpp adds `direction.N` to the output of layer `N`, layers counted from 0, at every token. It keeps none for layer
0, so that the output of the first layer cannot be steered.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import gguf
from torch import Tensor

from reft_ollama.architectures.base import Architecture
from reft_ollama.lora_gguf import CONVERTED_AS
from reft_plugins.errors import ExportError, UnsupportedProgramError
from reft_plugins.fitting.affine import compose, is_affine
from reft_plugins.program import Edit, Node, Program, canonical

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FIRST_LAYER = 1
"""The first layer whose output llama.cpp steers."""

_MERGED = "Export a merged file instead (without --control-vector)"


@dataclass(frozen=True, slots=True)
class ControlVector:
    """Constants `[hidden]`, float32, by layer; `architecture` is llama.cpp's name for the base file's."""

    architecture: str
    directions: Mapping[int, Tensor]


def make_control_vector(program: Program, architecture: Architecture, config: PretrainedConfig) -> ControlVector:
    """The control vector of a program that only adds constants to the outputs of layers.

    Raises:
        UnsupportedProgramError: naming the node a control vector cannot hold, and the way out.
    """
    directions: dict[int, Tensor] = {}
    for node in program:
        layer, constant = _constant(node, architecture)
        if layer < FIRST_LAYER:
            raise UnsupportedProgramError(
                f"{node}: llama.cpp adds control vectors to the outputs of layers {FIRST_LAYER} to "
                f"{config.num_hidden_layers - 1}, not before. {_MERGED}"
            )
        directions[layer] = directions[layer] + constant if layer in directions else constant
    if not directions:
        raise ExportError("the adapter does nothing, so that there is no control vector to write")
    name = gguf.MODEL_ARCH_NAMES[CONVERTED_AS.get(config.model_type, architecture.target)]
    return ControlVector(name, {layer: directions[layer].float() for layer in sorted(directions)})


def write_control_vector(path: Path, vector: ControlVector, *, notes: Mapping[str, str] | None = None) -> None:
    """Write the file; equal input gives equal bytes.

    Args:
        notes: further text keys.
    """
    writer = gguf.GGUFWriter(path, "controlvector")
    try:
        writer.add_string("controlvector.model_hint", vector.architecture)
        writer.add_int32("controlvector.layer_count", len(vector.directions))
        for key, text in (notes or {}).items():
            writer.add_string(key, text)
        for layer, direction in vector.directions.items():
            writer.add_tensor(f"direction.{layer}", direction.contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _constant(node: Node, architecture: Architecture) -> tuple[int, Tensor]:
    """Layer whose output a node adds a constant to, and the constant, float64 `[hidden]`."""
    if not isinstance(node, Edit):
        raise UnsupportedProgramError(
            f"{node}: a control vector only adds constants to the outputs of layers. {_MERGED}"
        )
    if not node.positions.everywhere:
        raise UnsupportedProgramError(
            f"{node}: at positions {node.positions} only, but llama.cpp adds a control vector at every token. "
            "Serve the adapter with vLLM (reft serve), which keeps its positions"
        )
    layer, component = node.site.layer, canonical(node.site.component)
    if component == "block_input":
        layer, component = layer - 1, "block_output"
    # What the MLP adds to the residual stream is added to the layer's output, unless a norm stands in between.
    same = component == "block_output" or (component == "mlp_output" and not architecture.post_norm)
    edit = compose([node]) if is_affine(node) else None
    if not same or edit is None or not edit.constant:
        raise UnsupportedProgramError(
            f"{node}: it is no constant that is added to the output of a layer, which is all that a control vector "
            f"holds. {_MERGED}"
        )
    return layer, edit.constant_part().shift
