"""What all architectures have in common: the names of their parts, and how those become a GGUF file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import gguf
from torch import Tensor

from reft_ollama.architectures.rotary import (
    YARN_DEFAULTS,
    attention_factor,
    head_size,
    original_context,
    rope_parameters,
    rotary_size,
    scaling_factor,
    yarn_magnitude,
)
from reft_plugins.errors import ExportError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

LINEAR_PARTS = ("query", "key", "value", "attention_output", "gate", "up", "mlp_output")
NORM_PARTS = ("attention_norm", "mlp_norm", "query_norm", "key_norm", "attention_post_norm", "mlp_post_norm")
TANH_GELU = ("gelu_pytorch_tanh", "gelu_new")
SILU = ("silu", "swish")


def unchanged(tensor: Tensor) -> Tensor:
    """The parameter itself."""
    return tensor


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor of the file: its name and shape, and how it is made of a parameter.

    `make` gets a vector in float32, and a matrix in any float type, often the one it is stored in: whoever calculates
    with matrices instead of moving their rows converts first. A parameter with only one part, `unchanged`, is never in
    memory as a whole. Of a linear module rows are only picked, moved and scaled, so that `make` serves for the rows of
    a factor of it too.
    """

    name: str
    shape: tuple[int, ...]
    make: Callable[[Tensor], Tensor] = unchanged


@dataclass(frozen=True)
class Architecture:
    """A pre-norm decoder with RMSNorm, rotary attention and a gated MLP, under the names transformers gives its parts.

    Attributes:
        model_type: `model_type` in `config.json`.
        target: the architecture the file declares.
        activations: the MLP's activations that the loader computes, under the names transformers has for them.
        activation_setting: what the configuration calls it.
        rope_types: rotary scalings the file can express.
        frequency_table: whether the loader takes rotary frequencies of any kind; if not, it scales them by itself.
        partial_rotary: whether this model, if its settings say so, rotates only a part of each head.
        biases: the linear parts whose bias the loader takes; it refuses a file with any other.
        own_head: whether the loader takes an output layer that is not the embeddings.
        post_norm: whether the output of attention and of the MLP is normalised before it is added (Gemma 2 and 3).
        norm_offset: what is added to the weight of a norm before it multiplies (1 in Gemma).
        scaled_embedding: whether token embeddings are multiplied by the root of the hidden size (Gemma).
        runs_window: whether layers with a sliding window are run as such.
    """

    model_type: str
    target: gguf.MODEL_ARCH
    activations: tuple[str, ...] = SILU
    activation_setting: str = "hidden_act"
    rope_types: tuple[str, ...] = ("default", "linear")
    frequency_table: bool = False
    partial_rotary: bool = False
    biases: frozenset[str] = frozenset(LINEAR_PARTS)
    own_head: bool = True
    post_norm: bool = False
    norm_offset: float = 0.0
    scaled_embedding: bool = False
    runs_window: bool = False
    embedding: str = "model.embed_tokens"
    head: str = "lm_head"
    final_norm: str = "model.norm"
    layer: str = "model.layers.{}"
    attention_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    attention_post_norm: str | None = None
    mlp_post_norm: str | None = None
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    query_norm: str | None = None
    key_norm: str | None = None
    attention_output: str = "self_attn.o_proj"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    mlp_output: str = "mlp.down_proj"

    @property
    def output_bias(self) -> bool:
        """Whether the loader takes a bias at the output of attention and of the MLP."""
        return {"attention_output", "mlp_output"} <= self.biases

    def module(self, layer: int, part: str) -> str:
        """Qualified name of a part (an attribute of this class) of a decoder layer."""
        return f"{self.layer.format(layer)}.{getattr(self, part)}"

    def part_of(self, module: str) -> str | None:
        """The attribute that names a module, the first one where parts are fused; None for any other module."""
        for part in ("embedding", "head", "final_norm"):
            if module == getattr(self, part):
                return part
        parts = (part for part in (*LINEAR_PARTS, *NORM_PARTS) if getattr(self, part) is not None)
        return next((part for part in parts if module.endswith("." + getattr(self, part))), None)

    def linear_modules(self, config: PretrainedConfig) -> set[str]:
        """The linear modules whose weights a file stores and an adapter may change."""
        layers = range(config.num_hidden_layers)
        modules = {self.module(layer, part) for layer in layers for part in LINEAR_PARTS}
        return modules | ({self.head} if self.own_head else set())

    def takes_bias(self, module: str) -> bool:
        """Whether the loader takes a bias of this linear module."""
        return self.part_of(module) in self.biases

    def check(self, config: PretrainedConfig) -> None:
        """Refuse settings that this architecture's loader would ignore.

        Raises:
            ExportError: naming the settings.
        """
        found = [setting for setting, refused in self.refusals(config).items() if refused]
        if found:
            raise ExportError(
                f"base model: llama.cpp's {gguf.MODEL_ARCH_NAMES[self.target]} architecture does not run "
                f"{', '.join(found)}. Serve this adapter with vLLM instead (reft serve)"
            )

    def refusals(self, config: PretrainedConfig) -> dict[str, bool]:
        """Settings by how to name them, with whether this model has a value of them that the file cannot express."""
        rope = rope_parameters(config)
        activation = getattr(config, self.activation_setting)
        layer_types = set(getattr(config, "layer_types", None) or ())
        wrong_yarn = [name for name, usual in YARN_DEFAULTS.items() if rope.get(name) not in (None, usual)]
        return {
            f"{self.activation_setting} {activation!r}": activation not in self.activations,
            f"rope_type {rope['rope_type']!r}": rope["rope_type"] not in self.rope_types,
            f"YaRN's {', '.join(wrong_yarn)}": bool(wrong_yarn) and self._own_yarn(config),
            "partial_rotary_factor": rotary_size(config) != head_size(config) and not self.partial_rotary,
            "attention_bias": getattr(config, "attention_bias", False) and self.post_norm,
            "tie_word_embeddings false": not config.tie_word_embeddings and not self.own_head,
            f"layer_types {sorted(layer_types)}": not layer_types <= {"full_attention", "sliding_attention"},
            "quantization_config": getattr(config, "quantization_config", None) is not None,
        }

    def window(self, config: PretrainedConfig) -> int | None:
        """Tokens that layers with a sliding window see; None without such layers."""
        kinds = getattr(config, "layer_types", None)
        size: int | None = getattr(config, "sliding_window", None)
        return size if kinds is None or "sliding_attention" in kinds else None

    def context_length(self, config: PretrainedConfig) -> int:
        """Tokens the file promises: no more than a window that the loader ignores."""
        window = None if self.runs_window else self.window(config)
        longest: int = config.max_position_embeddings
        return longest if window is None else min(longest, window)

    def warnings(self, config: PretrainedConfig) -> list[str]:
        """What a user of the file has to know about its limits."""
        length, found = self.context_length(config), []
        if length < config.max_position_embeddings:
            found.append(
                f"llama.cpp runs no sliding window for this architecture: the file's context is {length} tokens, not "
                f"{config.max_position_embeddings}; answers to longer texts would differ"
            )
        if rope_parameters(config)["rope_type"] == "longrope":
            found.append(
                "LongRoPE: llama.cpp takes the long frequencies for all texts if its context (num_ctx) is larger than "
                f"{original_context(config)} tokens, transformers only for longer texts; with a larger context, "
                "answers to shorter texts differ"
            )
        return found

    def write_hyper_parameters(self, writer: gguf.GGUFWriter, config: PretrainedConfig) -> None:
        """Add the key/value pairs that describe the network."""
        writer.add_vocab_size(config.vocab_size)
        writer.add_context_length(self.context_length(config))
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(head_size(config))
        writer.add_value_length(head_size(config))
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_dimension_count(head_size(config))
        writer.add_rope_freq_base(float(rope_parameters(config)["rope_theta"]))
        self.write_rope_scaling(writer, config)

    def write_rope_scaling(self, writer: gguf.GGUFWriter, config: PretrainedConfig) -> None:
        """Add how the rotary frequencies are scaled."""
        kind = rope_parameters(config)["rope_type"]
        if kind != "default":
            writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
            writer.add_rope_scaling_factor(scaling_factor(config))
        if kind == "yarn":
            writer.add_rope_scaling_orig_ctx_len(original_context(config))

    def extra_tensors(self, config: PretrainedConfig) -> dict[str, Tensor]:
        """Float32 tensors of the file that are made of settings, by name."""
        del config
        return {}

    def query_scales(self, config: PretrainedConfig) -> Tensor | float | None:
        """What queries are multiplied with, because the loader scales attention otherwise than the model.

        Returns:
            One factor, or float32 `[head_size]`; None if there is nothing to do.
        """
        factor = (attention_factor(config) / yarn_magnitude(config)) ** 2 if self._own_yarn(config) else 1.0
        return factor if factor != 1.0 else None

    def parts(self, name: str, shape: tuple[int, ...], config: PretrainedConfig) -> list[Part]:
        """The tensors of the file that a parameter becomes; most become one and stay as they are.

        Raises:
            ExportError: the file has no place for it.
        """
        module, _, kind = name.rpartition(".")
        part = self.part_of(module)
        names = _tensor_names(self.target, config.num_hidden_layers)
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        misplaced = part not in self.biases if kind == "bias" else part == "head" and not self.own_head
        if target is None or part is None or misplaced:
            raise ExportError(
                f"base model: a GGUF file of llama.cpp's {gguf.MODEL_ARCH_NAMES[self.target]} architecture has no "
                f"place for its tensor {name!r}. Serve this adapter with vLLM instead (reft serve)"
            )
        return [Part(target, shape, self.make(part, config))]

    def make(self, part: str, config: PretrainedConfig) -> Callable[[Tensor], Tensor]:
        """How parameters of a part are changed on their way into the file."""
        if part != ("query" if self.query_norm is None else "query_norm"):
            return unchanged
        scales = self.query_scales(config)
        return unchanged if scales is None else lambda tensor: scale_rows(tensor, scales)

    def _own_yarn(self, config: PretrainedConfig) -> bool:
        """Whether llama.cpp itself computes this model's YaRN, which it does with fixed settings."""
        return not self.frequency_table and rope_parameters(config)["rope_type"] == "yarn"


def scale_rows(tensor: Tensor, scales: Tensor | float) -> Tensor:
    """Rows `[heads * size, ...]` times one factor, or times `[size]` within each head; in float32."""
    if isinstance(scales, float):
        return tensor.float() * scales
    every = scales.repeat(tensor.shape[0] // len(scales))
    return tensor.float() * every.reshape(-1, *[1] * (tensor.ndim - 1))


@cache
def _tensor_names(target: gguf.MODEL_ARCH, layers: int) -> gguf.TensorNameMap:
    """Kept, because making it takes longer than writing a small model's tensors."""
    return gguf.get_tensor_name_map(target, layers)
