"""Prompt learning by PEFT: prompt tuning, P-tuning and prefix tuning differ only in settings and in what is stored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from reft_plugins.methods._peft import ADAPTER, wrap


class PeftPrompt:
    """A base model that PEFT puts learned rows or keys and values in front of; see `reft_plugins.methods.Trainable`.

    Args:
        method: named in errors; model: base model; settings: PEFT's configuration of prompt learning.
        stored: what an adapter stores, from the wrapped model.

    Raises:
        TrainingError: PEFT is not installed.
        AdapterError: PEFT refuses the settings or the base model.
    """

    def __init__(
        self, method: str, model: nn.Module, settings: Any, stored: Callable[[Any], dict[str, Tensor]]
    ) -> None:
        self._wrapped: Any = wrap(method, model, settings)
        self._stored = stored
        self.parameters: nn.Module = self._wrapped.prompt_encoder[ADAPTER]
        self.model = _RealTokens(self._wrapped)

    def begin_batch(self, prompt_lengths: Tensor) -> None:
        """What is learned stands in front of every row, so the prompt's length is not needed."""

    def tensors(self) -> dict[str, Tensor]:
        """The tensors to store, computed without dropout."""
        training = self.parameters.training
        self.parameters.eval()
        try:
            return self._stored(self._wrapped)
        finally:
            self.parameters.train(training)


class _RealTokens(nn.Module):
    """Hands batches to PEFT padded behind, and gives logits of the real tokens back in the order they came.

    PEFT puts what is learned in front of the padding and, for virtual tokens, forgets positions: in a batch padded in
    front, a row's padding would stand between its prompt and the real tokens.
    """

    def __init__(self, wrapped: nn.Module) -> None:
        super().__init__()
        self.wrapped = wrapped

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor | None = None,
        logits_to_keep: int | None = None,
        **options: Any,
    ) -> Any:
        """Outputs with `logits` `[batch, tokens, vocabulary]`, or of the last `logits_to_keep` tokens.

        Positions follow from the mask, so `position_ids` are not needed.
        """
        width = input_ids.shape[1]
        kept = computed = width if logits_to_keep is None else logits_to_keep
        padding = width - attention_mask.sum(dim=1, keepdim=True)
        in_front = bool((attention_mask[:, 0] == 0).any())
        if in_front:
            order = attention_mask.argsort(dim=1, descending=True, stable=True)
            input_ids, attention_mask = input_ids.gather(1, order), attention_mask.gather(1, order)
            computed = min(width, kept + int(padding.max()))
        if logits_to_keep is not None:
            options["logits_to_keep"] = computed
        outputs = self.wrapped(input_ids=input_ids, attention_mask=attention_mask, **options)
        logits = outputs.logits[:, -computed:]
        if in_front:
            columns = torch.arange(computed - kept, computed, device=logits.device) - padding
            logits = logits.take_along_dim(columns.clamp(min=0)[..., None], dim=1)
        outputs.logits = logits
        return outputs


def virtual_tokens(wrapped: Any) -> dict[str, Tensor]:
    """`embeddings` `[n, hidden]`, float32: what stands in front of the embedded prompt."""
    encoder, tokens = wrapped.prompt_encoder[ADAPTER], wrapped.prompt_tokens[ADAPTER]
    embeddings: Tensor = encoder(tokens.to(encoder.embedding.weight.device)[None])[0]
    return {"embeddings": embeddings}


def keys_and_values(wrapped: Any) -> dict[str, Tensor]:
    """`layers.<layer>.keys` and `.values` `[n, kv_heads, head_dim]`, float32, as PEFT hands them to the base model."""
    cache = wrapped.get_prompt(batch_size=1)
    tensors: dict[str, Tensor] = {}
    for number, layer in enumerate(cache.layers):
        for name in ("keys", "values"):
            found: Tensor | None = getattr(layer, name)
            if found is not None:
                tensors[f"layers.{number}.{name}"] = found[0].transpose(0, 1).to(torch.float32)
    return tensors
