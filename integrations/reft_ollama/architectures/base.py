"""How each transformers architecture is written as GGUF: one entry of a table per architecture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gguf
import torch
from torch import Tensor

from reft_plugins.errors import ExportError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ROPE_TYPES = ("default", "linear", "llama3")
"""Rotary scalings that a table of frequency factors expresses; the others change with the length of the text."""


def unchanged(tensor: Tensor) -> Tensor:
    """The parameter itself."""
    return tensor


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor of the file: its name and shape, and how it is made of a parameter.

    `make` gets a vector in float32, and a matrix in any float type, often the one it is stored in: whoever calculates
    with matrices instead of moving their rows converts first. A parameter with only one part, `unchanged`, is never in
    memory as a whole.
    """

    name: str
    shape: tuple[int, ...]
    make: Callable[[Tensor], Tensor] = unchanged


@dataclass(frozen=True, slots=True)
class Architecture:
    """A pre-norm decoder with RMSNorm, rotary attention and a gated MLP, under the names transformers gives its parts.

    Attributes:
        model_type: `model_type` in `config.json`.
        target: the architecture the file declares; it must be one whose loader reads `ffn_down.bias`.
        permute_rotary: whether that architecture pairs neighbouring rotary dimensions (llama.cpp's `llama`), where
            transformers pairs the two halves of a head.
        activation: the MLP's activation that the loader assumes.
        output_bias: whether the loader takes a bias at the output of attention and of the MLP.
        post_norm: whether the output of attention and of the MLP is normalised before it is added (Gemma 2 and 3).
        norm_offset: what is added to the weight of a norm before it multiplies (1 in Gemma).
        scaled_embedding: whether token embeddings are multiplied by the root of the hidden size (Gemma).
        own_head: whether the loader takes an output layer besides the embedding (not in Gemma 2).
    """

    model_type: str
    target: gguf.MODEL_ARCH
    permute_rotary: bool
    activation: str = "silu"
    output_bias: bool = True
    post_norm: bool = False
    norm_offset: float = 0.0
    scaled_embedding: bool = False
    own_head: bool = True
    embedding: str = "model.embed_tokens"
    head: str = "lm_head"
    final_norm: str = "model.norm"
    layer: str = "model.layers.{}"
    attention_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    attention_output: str = "self_attn.o_proj"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    mlp_output: str = "mlp.down_proj"

    def module(self, layer: int, part: str) -> str:
        """Qualified name of a part (an attribute of this class) of a decoder layer."""
        return f"{self.layer.format(layer)}.{getattr(self, part)}"

    def linear_modules(self, config: PretrainedConfig) -> set[str]:
        """The linear modules whose weights a file stores and an adapter may change."""
        parts = ("query", "key", "value", "attention_output", "gate", "up", "mlp_output")
        layers = range(config.num_hidden_layers)
        return {self.module(layer, part) for layer in layers for part in parts} | {self.head}

    def check(self, config: PretrainedConfig) -> None:
        """Refuse settings that this architecture's loader would ignore.

        Raises:
            ExportError: naming the setting.
        """
        rope = rope_parameters(config)
        wrong = {
            f"hidden_act {config.hidden_act!r}": config.hidden_act != self.activation,
            f"rope_type {rope['rope_type']!r}": rope["rope_type"] not in ROPE_TYPES,
            "partial_rotary_factor": rope.get("partial_rotary_factor", 1.0) not in (None, 1.0),
        }
        found = [setting for setting, refused in wrong.items() if refused]
        if found:
            raise ExportError(
                f"base model: llama.cpp's {gguf.MODEL_ARCH_NAMES[self.target]} architecture does not run "
                f"{', '.join(found)}. Serve this adapter with vLLM instead (reft serve)"
            )

    def write_hyper_parameters(self, writer: gguf.GGUFWriter, config: PretrainedConfig) -> None:
        """Add the key/value pairs that describe the network."""
        writer.add_vocab_size(config.vocab_size)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(head_size(config))
        writer.add_value_length(head_size(config))
        writer.add_rope_dimension_count(head_size(config))
        writer.add_rope_freq_base(float(rope_parameters(config)["rope_theta"]))
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)

    def parts(self, name: str, shape: tuple[int, ...], config: PretrainedConfig) -> list[Part]:
        """The tensors of the file that a parameter becomes; most become one and stay as they are.

        Raises:
            ExportError: the file has no place for it.
        """
        names = gguf.get_tensor_name_map(self.target, config.num_hidden_layers)
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise ExportError(f"base model: GGUF has no place for its tensor {name!r}")
        module = name.rpartition(".")[0]
        if self.permute_rotary and module.endswith((self.query, self.key)):
            heads = config.num_attention_heads if module.endswith(self.query) else config.num_key_value_heads
            return [Part(target, shape, lambda t: interleave_rotary(t, heads))]
        return [Part(target, shape)]


ARCHITECTURES = {
    entry.model_type: entry
    for entry in (Architecture(model_type="llama", target=gguf.MODEL_ARCH.LLAMA, permute_rotary=True),)
}
"""Every architecture that can be exported, by `model_type`."""


def architecture_of(config: PretrainedConfig) -> Architecture:
    """The table entry of a base model, with its settings checked.

    Raises:
        ExportError: naming the model type and those that can be exported.
    """
    entry = ARCHITECTURES.get(config.model_type)
    if entry is None:
        raise ExportError(
            f"base model: the Ollama export does not write {config.model_type!r} models; it writes "
            f"{', '.join(sorted(ARCHITECTURES))}. Serve this adapter with vLLM instead (reft serve)"
        )
    entry.check(config)
    return entry


def head_size(config: PretrainedConfig) -> int:
    """Dimensions of one attention head."""
    size: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return size


def rope_parameters(config: PretrainedConfig) -> dict[str, Any]:
    """`rope_type`, `rope_theta` and the settings of that type, from either way transformers has stored them."""
    modern = getattr(config, "rope_parameters", None)
    legacy = getattr(config, "rope_scaling", None) or {}
    found = {"rope_theta": getattr(config, "rope_theta", 10000.0), **legacy, **(modern or {})}
    found["rope_type"] = found.get("rope_type") or found.get("type") or "default"
    return found


def rope_factors(config: PretrainedConfig) -> Tensor | None:
    """What llama.cpp divides each rotary frequency by: float32 `[head_size / 2]`, None where nothing is scaled.

    transformers computes the scaled frequencies; the factors are their ratio to the unscaled ones.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = rope_parameters(config)
    if rope["rope_type"] == "default":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))
    size = head_size(config)
    unscaled = 1.0 / float(rope["rope_theta"]) ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
    return (unscaled / scaled.double()).float()


def interleave_rotary(tensor: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection, `[heads * size, ...]`, from half-and-half order to neighbouring pairs."""
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)
