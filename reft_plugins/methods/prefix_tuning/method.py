"""Prefix tuning as a method: PEFT trains it, the lowering is ours."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field, model_validator
from torch import Tensor, nn

from reft_plugins.manifest import BaseModelIdentity
from reft_plugins.methods import Method, MethodConfig, Trainable
from reft_plugins.methods._tensor_names import layers_of
from reft_plugins.program import KeyValuePrefix, Program


class PrefixTuningConfig(MethodConfig):
    """`num_virtual_tokens` keys and values for every layer.

    With `projection` they are computed by an MLP of two layers, `encoder_hidden_size` wide (by default as wide as all
    keys of a token together), as the paper of prefix tuning trains them; without they are the parameters (P-Tuning v2).
    """

    num_virtual_tokens: int = Field(default=20, ge=1)
    projection: bool = False
    encoder_hidden_size: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _only_for_the_projection(self) -> PrefixTuningConfig:
        if self.encoder_hidden_size is not None and not self.projection:
            raise ValueError("encoder_hidden_size is a setting of projection=True")
        return self


class PrefixTuning(Method[PrefixTuningConfig]):
    """`softmax(q [P_k; K]^T / sqrt(d)) [P_v; V]` in every layer (Li & Liang 2021, arXiv:2101.00190 section 4.2).

    Without projection it is P-Tuning v2 (Liu et al. 2021, arXiv:2110.07602). The MLP of the projection is needed for
    training only. Tensors: `layers.<layer>.keys` and `.values` `[num_virtual_tokens, kv_heads, head_dim]`.
    """

    name = "prefix_tuning"
    config = PrefixTuningConfig
    learning_rate = 1e-2
    """For keys and values that are parameters themselves; for the MLP of a projection far less suits (paper: 5e-5)."""

    def attach(self, model: nn.Module, config: PrefixTuningConfig, base: BaseModelIdentity) -> Trainable:
        """Wrap the base model by PEFT."""
        from reft_plugins.methods._peft import require_peft
        from reft_plugins.methods._prompt_learning import PeftPrompt, keys_and_values

        peft = require_peft("prefix tuning")
        settings = peft.PrefixTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=config.num_virtual_tokens,
            prefix_projection=config.projection,
            encoder_hidden_size=config.encoder_hidden_size,
        )
        return PeftPrompt("prefix tuning", model, settings, keys_and_values)

    def lower(self, config: PrefixTuningConfig, tensors: Mapping[str, Tensor]) -> Program:
        """One `KeyValuePrefix` per layer."""
        return Program(
            tuple(
                KeyValuePrefix(layer, tensors[f"layers.{layer}.keys"], tensors[f"layers.{layer}.values"])
                for layer in layers_of(tensors, "keys", "values")
            )
        )
