"""A small DistilBERT, pretrained on the spot by filling in masked words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from examples.three_ways.reviews import corpus, telling, words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@dataclass(frozen=True, slots=True)
class Recipe:
    """Sizes of the model, and how it is pretrained."""

    hidden_size: int = 64
    layers: int = 3
    heads: int = 4
    inner_size: int = 192
    steps: int = 700
    batch_size: int = 48
    learning_rate: float = 3e-3
    masked: float = 0.35
    seed: int = 0


def make(directory: Path, recipe: Recipe, progress: bool = True) -> float:
    """Pretrain and save the model with its tokenizer; returns the last losses' mean, in nats per masked word."""
    import torch
    from rich.console import Console
    from rich.progress import track
    from torch.nn.functional import cross_entropy
    from transformers import DistilBertConfig, DistilBertForMaskedLM

    tokenizer = _tokenizer()
    rows = tokenizer([*corpus(recipe.steps * recipe.batch_size, recipe.seed)]).input_ids
    torch.manual_seed(recipe.seed)
    model = DistilBertForMaskedLM(
        DistilBertConfig(
            vocab_size=len(tokenizer),
            dim=recipe.hidden_size,
            n_layers=recipe.layers,
            n_heads=recipe.heads,
            hidden_dim=recipe.inner_size,
            max_position_embeddings=64,
            pad_token_id=0,
            initializer_range=0.05,
            dropout=0.0,
            attention_dropout=0.0,
            seq_classif_dropout=0.0,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, recipe.steps, pct_start=0.1)
    maskable = torch.tensor(tokenizer.convert_tokens_to_ids(telling()))
    losses = []
    for step in track(range(recipe.steps), "pretraining", console=Console(stderr=True), disable=not progress):
        tokens, mask = _padded(rows[step * recipe.batch_size : (step + 1) * recipe.batch_size])
        hidden = (torch.rand(tokens.shape) < recipe.masked) & torch.isin(tokens, maskable)
        logits = model(tokens.masked_fill(hidden, SPECIAL.index("[MASK]")), attention_mask=mask).logits
        loss = cross_entropy(logits[hidden], tokens[hidden])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    last = losses[-50:]
    return sum(last) / len(last)


def _padded(rows: Sequence[Sequence[int]]) -> tuple[Any, Any]:
    import torch

    width = max(map(len, rows))
    tokens = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    return tokens, (tokens != 0).long()


def _tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, `[CLS]` in front and `[SEP]` behind."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate((*SPECIAL, *words()))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = ("pad", "unk", "cls", "sep", "mask")
    special: dict[str, Any] = {f"{name}_token": token for name, token in zip(names, SPECIAL, strict=True)}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
