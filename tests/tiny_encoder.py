"""A small DistilBERT with strong random weights, and texts to classify; nothing is downloaded."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import DistilBertConfig, DistilBertForMaskedLM, PreTrainedTokenizerFast

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SAYINGS = {"bad": ["awful", "dull", "weak"], "good": ["superb", "funny", "warm"]}
OTHER = ["the", "film", "plot", "cast", "was", "and", "quite", "so", "very"]


def make_tiny_encoder(directory: Path, hidden_size: int = 48, seed: int = 0) -> Path:
    """Save the model with a tokenizer of one token per word; weights are large, so that tokens see each other."""
    vocabulary = [*SPECIAL, *OTHER, *SAYINGS["bad"], *SAYINGS["good"]]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {f"{name}_token": SPECIAL[i] for i, name in enumerate(("pad", "unk", "cls", "sep", "mask"))}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = DistilBertConfig(
            vocab_size=len(vocabulary),
            dim=hidden_size,
            n_layers=2,
            n_heads=4,
            hidden_dim=2 * hidden_size,
            max_position_embeddings=24,
            pad_token_id=0,
            initializer_range=0.15,
            dropout=0.0,
            attention_dropout=0.0,
            seq_classif_dropout=0.0,
        )
        DistilBertForMaskedLM(config).save_pretrained(directory)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(directory)
    return directory


def write_sayings(path: Path, count: int, seed: int) -> Path:
    """Lines such as `the plot was so funny` -> `good`: the last word decides; the words before it are of no help."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        label = sorted(SAYINGS)[number % 2]
        words = [draw.choice(OTHER) for _ in range(draw.randrange(1, 6))]
        rows.append({"text": " ".join([*words, draw.choice(SAYINGS[label])]), "label": label})
    draw.shuffle(rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
