"""Adapters that PEFT makes and saves itself, and what PEFT computes with them: the judge of our reader and writer."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from reft_plugins.base_model import attention_implementation

Logits = npt.NDArray[np.float32]

TOKENS = [1, 61, 150, 83, 16, 310, 261, 425, 33, 44, 55, 66, 77, 88, 99, 100, 12, 300, 200, 201]

_SMALL = {
    "vocab_size": 512,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GPT2 = {"n_embd": 48, "n_layer": 3, "n_head": 4, "vocab_size": 512, "n_positions": 128}
BASES: dict[str, Callable[[], Any]] = {
    "llama_bias": lambda: transformers.LlamaConfig(**_SMALL, attention_bias=True),
    "qwen2": lambda: transformers.Qwen2Config(**_SMALL, tie_word_embeddings=True),
    "gemma2": lambda: transformers.Gemma2Config(**_SMALL, sliding_window=8, query_pre_attn_scalar=12),
    "gpt2": lambda: transformers.GPT2Config(**_GPT2, bos_token_id=1, eos_token_id=2),
}
"""Untrained bases: biases everywhere, biases and a tied head, a sliding window and soft caps, transposed weights."""


def make_base(name: str, tokenizer: Path, directory: Path) -> Path:
    """Save an untrained base with large weights, so that little of what an adapter does drowns in a softmax."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(BASES[name]())
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.15
    model.save_pretrained(directory)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / file, directory)
    return directory


def load_base(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, attn_implementation=attention_implementation(base)
    ).eval()


def save_by_peft(base: Path, directory: Path, settings: Any, **save: Any) -> None:
    """Attach, fill with strong random parameters, save."""
    model = get_peft_model(load_base(base), settings)
    draw = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        noise = torch.randn(parameter.shape, generator=draw) * 0.3
        if "magnitude" in name:
            parameter.data *= 1 + noise
        elif "ia3" in name:
            parameter.data = 1 + noise
        elif any(part in name for part in ("modules_to_save", "bias", "norm", "ln_", "trainable_tokens")):
            parameter.data += noise
        elif "adaption" in name:
            parameter.data = 3 * noise + 1
        elif str(getattr(settings, "init_lora_weights", True)) in ("pissa", "olora"):
            parameter.data += 0.3 * noise
        else:
            parameter.data = noise
    model.save_pretrained(directory, **save)


def logits_by_peft(base: Path, directory: Path) -> Logits:
    """float32 `[tokens, vocabulary]`: PEFT's own loader and forward pass, rows of real tokens."""
    model = PeftModel.from_pretrained(load_base(base), directory).eval()
    with torch.inference_mode():
        logits: Logits = model(input_ids=torch.tensor([TOKENS])).logits[0, -len(TOKENS) :].numpy()
    return logits


def generated_by_peft(base: Path, directory: Path, count: int) -> list[int]:
    model = PeftModel.from_pretrained(load_base(base), directory).eval()
    tokens = torch.tensor([TOKENS[:6]])
    output = model.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return output[0, 6:].tolist()
