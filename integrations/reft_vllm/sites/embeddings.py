"""The place behind the embedding module, where virtual tokens stand in for those of placeholders."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

from reft_vllm.execution.overwrite import EMBEDDINGS, TARGETS
from reft_vllm.execution.state import EngineState
from reft_vllm.sites.wrapping import _subclass


def install_embeddings(model: nn.Module, state: EngineState) -> None:
    """Let the embedding module's rows of placeholders be replaced; other pipeline ranks and models have none.

    A model with several vocabulary embeddings gets no such place, since a virtual token has one row.
    """
    from vllm.lora.layers import VocabParallelEmbeddingWithLoRA
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead)
    ]
    if len(found) != 1:
        return
    name, embedding = found[0]
    whole: nn.Module = embedding
    if name.endswith(".base_layer"):
        name = name.removesuffix(".base_layer")
        whole = model.get_submodule(name)
        assert isinstance(whole, VocabParallelEmbeddingWithLoRA)
    owner = model.get_submodule(name.rpartition(".")[0])
    target = state.placeholders.add(EMBEDDINGS, embedding.embedding_dim, factor=_factor(owner))
    TARGETS[name] = state, target
    setattr(whole, "reft_rows", name)  # noqa: B010
    whole.__class__ = _overwriting(type(whole))


def _factor(owner: Any) -> float:
    """What vLLM multiplies embeddings by behind the module, where transformers does it inside (Gemma, MiniCPM)."""
    normalizer = getattr(owner, "normalizer", None)
    if normalizer is not None:
        return float(normalizer)
    return float(getattr(getattr(owner, "config", None), "scale_emb", 1.0))


@cache
def _overwriting(original: type[nn.Module]) -> type[nn.Module]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = original.forward(self, *args, **kwargs)
        torch.ops.reft.overwrite(output, self.reft_rows)
        return output

    return _subclass(original, forward)
