"""Prompt tuning as a method: PEFT trains it, the lowering is ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from reft_plugins.manifest import BaseModelIdentity
from reft_plugins.methods import Method, MethodConfig, Trainable
from reft_plugins.program import Program, VirtualTokens


class PromptTuningConfig(MethodConfig):
    """`num_virtual_tokens` learned embeddings.

    They begin as embeddings of tokens drawn from the `vocabulary`, of `init_text` (`text`: cut or repeated to fit), or
    as standard normal numbers (`random`).
    """

    num_virtual_tokens: int = Field(default=20, ge=1)
    init: Literal["vocabulary", "text", "random"] = "vocabulary"
    init_text: str | None = None

    @model_validator(mode="after")
    def _text_where_needed(self) -> PromptTuningConfig:
        if (self.init == "text") != bool(self.init_text):
            raise ValueError("init='text' and init_text='…' belong together")
        return self


class PromptTuning(Method[PromptTuningConfig]):
    """`[P; E(x)]`: learned rows `P` in front of the embedded prompt (Lester et al. 2021, arXiv:2104.08691 section 2).

    Tensors: `embeddings` `[num_virtual_tokens, hidden]`.
    """

    name = "prompt_tuning"
    config = PromptTuningConfig
    learning_rate = 3e-2
    """Embeddings are small numbers and few; what suits weights hardly moves them."""

    def attach(self, model: nn.Module, config: PromptTuningConfig, base: BaseModelIdentity) -> Trainable:
        """Wrap the base model by PEFT."""
        from reft_plugins.methods._peft import require_peft
        from reft_plugins.methods._prompt_learning import PeftPrompt, virtual_tokens

        peft = require_peft("prompt tuning")
        kind = {"vocabulary": "SAMPLE_VOCAB", "text": "TEXT", "random": "RANDOM"}[config.init]
        settings = peft.PromptTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=config.num_virtual_tokens,
            prompt_tuning_init=kind,
            prompt_tuning_init_text=config.init_text,
            tokenizer_name_or_path=getattr(model, "name_or_path", None) if config.init == "text" else None,
        )
        return PeftPrompt("prompt tuning", model, settings, virtual_tokens)

    def lower(self, config: PromptTuningConfig, tensors: Mapping[str, Tensor]) -> Program:
        """One `VirtualTokens`."""
        return Program((VirtualTokens(tensors["embeddings"]),))
