"""The small model that the recorded checkpoints were trained on; numpy draws its weights alike in every version."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def recorded_base() -> Any:
    """A Llama of 2 layers with random weights, in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SIZES, attn_implementation="eager")  # type: ignore[arg-type]
    model: Any = LlamaForCausalLM(config).float().eval()
    draw = np.random.RandomState(0)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            drawn = torch.from_numpy(draw.standard_normal(tuple(parameter.shape)).astype(np.float32))
            parameter.copy_(1 + drawn * 0.1 if "norm" in name else drawn * 0.4)
    return model
