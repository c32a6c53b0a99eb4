"""Llamas with random weights in bfloat16 shards and a SentencePiece-like tokenizer, and a LoRA for each."""

from __future__ import annotations

import itertools
import string
from dataclasses import dataclass
from pathlib import Path

import torch

LETTERS = "▁" + string.ascii_letters
RANK = 8


@dataclass(frozen=True, slots=True)
class Size:
    """Of a model: heads have 64 dimensions, two queries share a key, MLPs are 11/4 as wide as the residual stream."""

    name: str
    hidden_size: int
    layers: int
    vocabulary: int


SIZES = {
    size.name: size
    for size in (
        Size("tiny", 128, 2, 512),
        Size("50M", 512, 8, 32_000),
        Size("200M", 1024, 12, 32_000),
        Size("600M", 1536, 16, 64_000),
        Size("1.2B", 2048, 20, 128_000),
    )
}


def make_model(folder: Path, size: Size, shard: str = "500MB", **settings: object) -> Path:
    """Save a model with untied embeddings; `settings` of its configuration go before those of the size."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    usual = {
        "vocab_size": size.vocabulary,
        "hidden_size": size.hidden_size,
        "intermediate_size": size.hidden_size * 11 // 4,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.hidden_size // 64,
        "num_key_value_heads": max(1, size.hidden_size // 128),
        "head_dim": 64,
        "max_position_embeddings": 2048,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = LlamaConfig(**{**usual, **settings})
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2)
    model.save_pretrained(folder, max_shard_size=shard)
    make_tokenizer(size.vocabulary).save_pretrained(folder)
    return folder


def make_tokenizer(vocabulary: int):
    """Pieces of up to three letters, each joined in every possible way, as a converted SentencePiece model has them."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *LETTERS]
    merges: list[tuple[str, str]] = []
    for letters in itertools.chain(itertools.product(LETTERS, repeat=2), itertools.product(LETTERS, repeat=3)):
        if len(pieces) == vocabulary:
            break
        pieces.append("".join(letters))
        merges += [("".join(letters[:cut]), "".join(letters[cut:])) for cut in range(1, len(letters))]
    model = models.BPE(
        {piece: index for index, piece in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in pieces[:3]])
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=2048
    )


def make_lora(base: Path, folder: Path) -> Path:
    """A random LoRA on queries and values of every layer, as an artifact of ours."""
    from reft_plugins.adapter import Adapter
    from reft_plugins.base_model import identify, read_config

    config = read_config(base)
    hidden, head = config["hidden_size"], config["head_dim"]
    rows = {"q_proj": config["num_attention_heads"] * head, "v_proj": config["num_key_value_heads"] * head}
    draw = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for module, size in rows.items():
            name = f"model.layers.{layer}.self_attn.{module}"
            tensors[f"{name}.lora_A"] = torch.randn(RANK, hidden, generator=draw) * 0.1
            tensors[f"{name}.lora_B"] = torch.randn(size, RANK, generator=draw) * 0.1
    settings = {"rank": RANK, "alpha": 16.0, "target_modules": list(rows)}
    return Adapter.create("lora", settings, tensors, identify(base)).save(folder)
