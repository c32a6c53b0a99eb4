"""P-tuning as a method: PEFT trains it, the lowering is ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from reft_plugins.manifest import BaseModelIdentity
from reft_plugins.methods import Method, MethodConfig, Trainable
from reft_plugins.program import Program, VirtualTokens


class PTuningConfig(MethodConfig):
    """`num_virtual_tokens` embeddings, computed from trained inputs by an `mlp` of three layers or an `lstm`.

    The LSTM is bidirectional with `encoder_layers` layers and `encoder_dropout` between them, followed by an MLP of two
    layers. `encoder_hidden_size` is the encoder's own width, by default that of the base model.
    """

    num_virtual_tokens: int = Field(default=20, ge=1)
    encoder: Literal["mlp", "lstm"] = "mlp"
    encoder_hidden_size: int | None = Field(default=None, ge=1)
    encoder_layers: int = Field(default=2, ge=1)
    encoder_dropout: float = Field(default=0.0, ge=0.0, lt=1.0)

    @model_validator(mode="after")
    def _only_for_the_lstm(self) -> PTuningConfig:
        if self.encoder == "mlp" and (self.encoder_layers != 2 or self.encoder_dropout):
            raise ValueError("encoder_layers and encoder_dropout are settings of encoder='lstm'")
        return self


class PTuning(Method[PTuningConfig]):
    """`[f(P); E(x)]`: rows in front of the embedded prompt, computed by an encoder (arXiv:2103.10385 section 3.2).

    The encoder is needed for training only. Tensors: `embeddings` `[num_virtual_tokens, hidden]`, which it computes.
    """

    name = "p_tuning"
    config = PTuningConfig
    learning_rate = 1e-3

    def attach(self, model: nn.Module, config: PTuningConfig, base: BaseModelIdentity) -> Trainable:
        """Wrap the base model by PEFT."""
        from reft_plugins.methods._peft import require_peft
        from reft_plugins.methods._prompt_learning import PeftPrompt, virtual_tokens

        peft = require_peft("P-tuning")
        settings = peft.PromptEncoderConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=config.num_virtual_tokens,
            encoder_reparameterization_type=config.encoder.upper(),
            encoder_hidden_size=config.encoder_hidden_size or base.hidden_size,
            encoder_num_layers=config.encoder_layers,
            encoder_dropout=config.encoder_dropout,
        )
        return PeftPrompt("P-tuning", model, settings, virtual_tokens)

    def lower(self, config: PTuningConfig, tensors: Mapping[str, Tensor]) -> Program:
        """One `VirtualTokens`."""
        return Program((VirtualTokens(tensors["embeddings"]),))
