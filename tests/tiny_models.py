"""Small language models made on the spot, so that no test needs a download."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAD, BOS, EOS = "<pad>", "<s>", "</s>"

_ADJECTIVES = ["small", "old", "red", "quiet", "clever", "hungry", "tall", "young", "brave", "lazy", "green", "happy"]
_ANIMALS = ["dog", "cat", "horse", "fox", "bird", "mouse", "farmer", "teacher", "sailor", "king", "child", "doctor"]
_ACTIONS = ["sees", "follows", "likes", "helps", "finds", "hears", "paints", "visits", "teaches", "carries"]
_PLACES = ["garden", "river", "house", "market", "forest", "school", "harbour", "kitchen", "castle", "field"]
_NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def sentences(count: int, seed: int = 0) -> list[str]:
    """Sentences of a small English-like grammar with a few regularities a tiny model can learn (counting, sums).

    Args:
        count: how many; seed: the same seed gives the same sentences.
    """
    draw = random.Random(seed)

    def noun() -> str:
        return f"the {draw.choice(_ADJECTIVES)} {draw.choice(_ANIMALS)}"

    def sentence() -> str:
        kind = draw.randrange(6)
        if kind == 0:
            return f"{noun()} {draw.choice(_ACTIONS)} {noun()} in the {draw.choice(_PLACES)}."
        if kind == 1:
            return f"{noun()} and {noun()} walk to the {draw.choice(_PLACES)}, but {noun()} stays at home."
        if kind == 2:
            start = draw.randrange(6)
            return "count: " + ", ".join(_NUMBERS[start : start + 4]) + "."
        if kind == 3:
            first, second = draw.randrange(5), draw.randrange(5)
            return f"{_NUMBERS[first]} plus {_NUMBERS[second]} is {_NUMBERS[first + second]}."
        if kind == 4:
            first, second = draw.randrange(10, 90), draw.randrange(10, 90)
            return f"{max(first, second)} is more than {min(first, second)}, I'd say."
        return f"Who {draw.choice(_ACTIONS)} {noun()}? {noun().capitalize()} does!"

    return [sentence() for _ in range(count)]


def make_tiny_llama(
    directory: Path,
    *,
    steps: int = 300,
    seed: int = 0,
    hidden_size: int = 128,
    num_hidden_layers: int = 4,
    num_attention_heads: int = 4,
    num_key_value_heads: int = 2,
    vocab_size: int = 512,
    tie_word_embeddings: bool = False,
    chat_template: str | None = None,
    **config: object,
) -> Path:
    """Train a Llama of about a million parameters on `sentences` and save it with its tokenizer.

    The model has heads of 32 (a size that vLLM's CPU attention takes), at least two key/value heads (so that it can be
    split over two ranks), a context of 512 tokens, and float32 weights in `model.safetensors`. The tokenizer is a fast
    byte-level BPE with GPT-2's splitting expression and the tokens `<pad>` 0, `<s>` 1 and `</s>` 2; it puts `<s>` in
    front of every text. The defaults take about 20 seconds on two cores.

    Args:
        directory: where to save; made if missing.
        steps: optimiser steps of 16 sequences of 64 tokens; 0 leaves the weights random.
        seed: of weights, text and batches.
        chat_template: Jinja template to store with the tokenizer.
        **config: more settings of `LlamaConfig`, for example `rope_parameters`.

    Returns:
        `directory`.
    """
    text = sentences(12_000, seed)
    tokenizer = make_tokenizer(text, vocab_size)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocab_size,
                hidden_size=hidden_size,
                intermediate_size=hidden_size * 11 // 4,
                num_hidden_layers=num_hidden_layers,
                num_attention_heads=num_attention_heads,
                num_key_value_heads=num_key_value_heads,
                head_dim=32,
                max_position_embeddings=512,
                rms_norm_eps=1e-5,
                tie_word_embeddings=tie_word_embeddings,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
                **config,
            )
        )
        _train(model, tokenizer, text, steps)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def make_tokenizer(text: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train the tokenizer that `make_tiny_llama` describes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((" ".join(text[i : i + 8]) for i in range(0, len(text), 8)), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 1)]
    )
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(f"the text is enough for {tokenizer.get_vocab_size()} tokens, not for {vocab_size}")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS)


def _train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: list[str], steps: int) -> None:
    documents = [" ".join(text[i : i + 4]) + EOS for i in range(0, len(text), 4)]
    stream = torch.tensor([token for document in tokenizer(documents).input_ids for token in document])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=max(steps, 1))
    for _ in range(steps):
        starts = torch.randint(0, stream.numel() - 64, (16,))
        batch = torch.stack([stream[start : start + 64] for start in starts.tolist()])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()
