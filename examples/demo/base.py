"""The demo's own base model: a small Llama trained on `corpus`, kept until its recipe changes."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from examples.demo.corpus import Document, documents

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
RECIPE_FILE = "recipe.json"

Progress = Callable[[int, int, float], None]
"""Called with steps done, steps in total, and the loss."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """Sizes of the model, and how it is trained. `text_weight` is the weight of a token that is given, not answered."""

    vocabulary: int = 2048
    hidden_size: int = 192
    layers: int = 4
    heads: int = 6
    key_value_heads: int = 2
    head_size: int = 32
    context: int = 256
    steps: int = 1000
    batch_size: int = 64
    learning_rate: float = 2e-3
    text_weight: float = 0.1
    seed: int = 0

    def documents(self) -> list[Document]:
        """The corpus: every document is read once."""
        return list(documents(self.steps * self.batch_size, self.seed))

    def key(self) -> str:
        """Digest of everything that makes the model, its corpus included."""
        content = json.dumps([asdict(self), self.documents()])
        return hashlib.sha256(content.encode()).hexdigest()


def is_made(directory: Path, recipe: Recipe) -> bool:
    """Whether the folder holds a model of this recipe."""
    path = directory / RECIPE_FILE
    if not (path.is_file() and (directory / "model.safetensors").is_file()):
        return False
    return bool(json.loads(path.read_text("utf-8"))["key"] == recipe.key())


def make(directory: Path, recipe: Recipe, progress: Progress = lambda done, total, loss: None) -> None:
    """Train the model and save it with its tokenizer; the folder appears, or is replaced, when all of it is there."""
    corpus = recipe.documents()
    tokenizer = _make_tokenizer([given + answer for given, answer in corpus], recipe.vocabulary)
    model = _train(recipe, _tokenize(tokenizer, corpus), progress)
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        content = {"key": recipe.key(), **asdict(recipe)}
        (partial / RECIPE_FILE).write_text(json.dumps(content, indent=2) + "\n", "utf-8")
        shutil.rmtree(directory, ignore_errors=True)
        partial.rename(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _make_tokenizer(text: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE with GPT-2's splitting expression that puts `<s>` in front of every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS)


def _tokenize(tokenizer: PreTrainedTokenizerFast, corpus: Sequence[Document]) -> list[tuple[list[int], int]]:
    """Token ids of every document with the end token, and how many of them are given."""
    given = tokenizer([given for given, _ in corpus]).input_ids
    answers = tokenizer([answer for _, answer in corpus], add_special_tokens=False).input_ids
    end = tokenizer.eos_token_id
    return [([*front, *back, end], len(front)) for front, back in zip(given, answers, strict=True)]


def _train(recipe: Recipe, rows: Sequence[tuple[list[int], int]], progress: Progress) -> LlamaForCausalLM:
    """AdamW with a one-cycle learning rate, and the answers weighing more than the text they complete."""
    import torch
    from torch.nn.functional import cross_entropy
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(recipe.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=recipe.vocabulary,
            hidden_size=recipe.hidden_size,
            intermediate_size=recipe.hidden_size * 11 // 4,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.key_value_heads,
            head_dim=recipe.head_size,
            max_position_embeddings=recipe.context,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=recipe.learning_rate, total_steps=recipe.steps, pct_start=0.1
    )
    for step in range(recipe.steps):
        batch = rows[step * recipe.batch_size : (step + 1) * recipe.batch_size]
        width = max(len(tokens) for tokens, _ in batch)
        tokens = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids, _ in batch])
        place = torch.arange(width)
        real = place < torch.tensor([[len(ids)] for ids, _ in batch])
        answered = place >= torch.tensor([[given] for _, given in batch])
        weights = torch.where(answered, 1.0, recipe.text_weight) * real
        logits = model(input_ids=tokens, attention_mask=real.long()).logits
        losses = cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
        loss = (losses * weights[:, 1:]).sum() / weights[:, 1:].sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        progress(step + 1, recipe.steps, loss.item())
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    return model
