"""Gemma 2 and the text models of Gemma 3.

Their norms multiply with one plus the weight, which the file stores as a sum; llama.cpp itself scales the embeddings.
Which layers have a sliding window is a fixed pattern unless the file has a list. llama.cpp derives the scale of the
attention from the size of a head, or, in models with the number of layers of the largest one, from the hidden size per
head; whatever a model does otherwise is in its queries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import gguf
from torch import Tensor

from reft_ollama.architectures.base import NORM_PARTS, TANH_GELU, Architecture
from reft_ollama.architectures.rotary import head_size, rope_parameters

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class GemmaArchitecture(Architecture):
    """A decoder that normalises before and after attention and MLP.

    Attributes:
        pattern: every so many layers one sees the whole text, if the file says nothing else.
        largest: number of layers of the largest model.
        attention_cap: whether attention scores are capped; if not, they must not be.
        always_window: whether the loader expects layers with a sliding window.
    """

    pattern: int = 2
    largest: int = 46
    attention_cap: bool = True
    always_window: bool = True

    def refusals(self, config: PretrainedConfig) -> dict[str, bool]:
        """See `Architecture`."""
        local = rope_parameters(config, "sliding_attention")["rope_type"]
        capped = config.attn_logit_softcapping is not None
        return {
            **super().refusals(config),
            f"attn_logit_softcapping {config.attn_logit_softcapping}": capped != self.attention_cap,
            "final_logit_softcapping None": self.attention_cap and config.final_logit_softcapping is None,
            "use_bidirectional_attention": bool(getattr(config, "use_bidirectional_attention", False)),
            "sliding_window None": any(self._sliding(config)) and config.sliding_window is None,
            "layer_types without sliding_attention": self.always_window and not any(self._sliding(config)),
            f"rope_type {local!r} of layers with a sliding window": self._two_bases(config) and local != "default",
        }

    def warnings(self, config: PretrainedConfig) -> list[str]:
        """See `Architecture`."""
        found = super().warnings(config)
        if any(self._sliding(config)) and self._sliding(config) != self._usual(config):
            found.append(
                "the layers with a sliding window are not those of the published models: old versions of Ollama and "
                "llama.cpp ignore that"
            )
        return found

    def write_hyper_parameters(self, writer: gguf.GGUFWriter, config: PretrainedConfig) -> None:
        """See `Architecture`."""
        super().write_hyper_parameters(writer, config)
        if config.attn_logit_softcapping is not None:
            writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        if config.final_logit_softcapping is not None:
            writer.add_final_logit_softcapping(config.final_logit_softcapping)
        window = self.window(config)
        if window is not None:
            writer.add_sliding_window(window)
            if self._sliding(config) != self._usual(config):
                writer.add_sliding_window_pattern(self._sliding(config))
        if self._two_bases(config):
            writer.add_rope_freq_base_swa(float(rope_parameters(config, "sliding_attention")["rope_theta"]))

    def query_scales(self, config: PretrainedConfig) -> Tensor | float | None:
        """See `Architecture`."""
        largest = config.num_hidden_layers == self.largest
        assumed = config.hidden_size // config.num_attention_heads if largest else head_size(config)
        factor: float = (assumed / config.query_pre_attn_scalar) ** 0.5
        return factor if factor != 1.0 else None

    def make(self, part: str, config: PretrainedConfig) -> Callable[[Tensor], Tensor]:
        """See `Architecture`."""
        scaled = super().make(part, config)
        return (lambda tensor: scaled(tensor + self.norm_offset)) if part in (*NORM_PARTS, "final_norm") else scaled

    def _sliding(self, config: PretrainedConfig) -> list[bool]:
        return [kind == "sliding_attention" for kind in config.layer_types]

    def _usual(self, config: PretrainedConfig) -> list[bool]:
        return [(layer + 1) % self.pattern != 0 for layer in range(config.num_hidden_layers)]

    def _two_bases(self, config: PretrainedConfig) -> bool:
        return "sliding_attention" in (getattr(config, "rope_parameters", None) or {})


GEMMA2 = GemmaArchitecture(
    model_type="gemma2",
    target=gguf.MODEL_ARCH.GEMMA2,
    activations=TANH_GELU,
    activation_setting="hidden_activation",
    biases=frozenset({"query", "key", "value"}),
    own_head=False,
    post_norm=True,
    norm_offset=1.0,
    scaled_embedding=True,
    runs_window=True,
    mlp_norm="pre_feedforward_layernorm",
    attention_post_norm="post_attention_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
)

GEMMA3 = GemmaArchitecture(
    model_type="gemma3_text",
    target=gguf.MODEL_ARCH.GEMMA3,
    activations=GEMMA2.activations,
    activation_setting=GEMMA2.activation_setting,
    biases=GEMMA2.biases,
    post_norm=True,
    norm_offset=GEMMA2.norm_offset,
    scaled_embedding=GEMMA2.scaled_embedding,
    runs_window=True,
    mlp_norm=GEMMA2.mlp_norm,
    attention_post_norm=GEMMA2.attention_post_norm,
    mlp_post_norm=GEMMA2.mlp_post_norm,
    query_norm="self_attn.q_norm",
    key_norm="self_attn.k_norm",
    pattern=6,
    largest=62,
    attention_cap=False,
    always_window=False,
)
