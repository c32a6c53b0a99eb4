"""Small tokenizers with the exact pipeline of every family, made by the classes of transformers where it has one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import gguf
from llama_cpp import Llama
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import GemmaTokenizer, GPT2Tokenizer, LlamaTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer
from transformers.tokenization_utils_base import generate_merges

from reft_ollama.tokenizers import pretokenizers
from reft_ollama.tokenizers.conversion import GgufTokenizer, convert_tokenizer
from reft_plugins.fidelity.general_text import PASSAGES

SCRIPTS = (
    "don't they'LL we've HE'D 's I'm 12 345 6789 3.14 0x1F ²½ ١٢٣ Ⅷ",
    "Ünïcödé naïve Straße ŒUVRE Ελληνικά Кириллица עברית العربية हिन्दी में ภาษาไทย 日本語 中文 字符 한국어",
    "😀👩‍👩‍👧🏽 🇩🇪 €£ ← ∑ … — “quotes” «angle» == === ==== ---- .... aaaa a/b\\c {x: [1, 2]} #!/bin/sh && || != <=",
    "tabs\tand   many    spaces        \n\n\nnew lines\r\n  indented\n\ttab  ",
)
TEXTS = (*PASSAGES, *SCRIPTS)
RUNS = [2, 3, 4, 5, 6, 7, 8, 12, 16]


def byte_level_vocabulary(splitter: Any, size: int = 1500) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges trained on text of many scripts."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = splitter
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([*TEXTS * 3], trainer)
    model = json.loads(backend.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level])


def pieces(special: Iterable[str], scored_runs: bool = False) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A SentencePiece vocabulary: special tokens, bytes, then pieces, and the merges transformers makes of it.

    Args:
        scored_runs: runs of spaces have one score for all, the lowest, as in Llama 2; then their merges are mixed.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=1400, show_progress=False)
    backend.train_from_iterator([*TEXTS * 3], trainer)
    trained = sorted(backend.get_vocab().items(), key=lambda item: item[1])
    runs = ["▁" * length for length in RUNS]
    letters = [piece for piece, _ in trained if len(piece) == 1 and piece not in "\n\t\r"]
    words = [piece for piece, _ in trained if len(piece) > 1 and not set(piece) & set("\n\t\r") and piece not in runs]
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    vocabulary = {token: index for index, token in enumerate([*special, *bytes_, *runs, *words, *letters])}
    scores = {piece: -float(index) for piece, index in vocabulary.items() if piece not in special}
    scores |= dict.fromkeys(runs, -1e9) if scored_runs else {}
    return vocabulary, generate_merges(vocabulary, scores, skip_tokens=list(special))


def llama_3() -> PreTrainedTokenizerFast:
    vocabulary, merges = byte_level_vocabulary(split(pretokenizers.LLAMA3))
    return _fast(Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True)), split(pretokenizers.LLAMA3))


def smollm() -> PreTrainedTokenizerFast:
    digits = pre_tokenizers.Digits(individual_digits=True)
    splitter = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return _fast(Tokenizer(models.BPE(*byte_level_vocabulary(splitter))), splitter)


def _fast(backend: Tokenizer, splitter: Any) -> PreTrainedTokenizerFast:
    backend.pre_tokenizer, backend.decoder = splitter, decoders.ByteLevel()
    backend.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"])
    first = ("<|begin_of_text|>", backend.token_to_id("<|begin_of_text|>"))
    backend.post_processor = processors.TemplateProcessing(single=f"{first[0]} $A", special_tokens=[first])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=first[0], eos_token="<|end_of_text|>")


def gpt2() -> GPT2Tokenizer:
    vocabulary, merges = byte_level_vocabulary(pre_tokenizers.ByteLevel(add_prefix_space=False))
    return GPT2Tokenizer(vocab={**vocabulary, "<|endoftext|>": len(vocabulary)}, merges=merges)


def qwen() -> Qwen2Tokenizer:
    """As Qwen 2, 2.5 and 3: its vocabulary has a `</s>` that is no special token, and `<think>` is an added one."""
    vocabulary, merges = byte_level_vocabulary(split(pretokenizers.QWEN2))
    tokenizer = Qwen2Tokenizer(vocab={**vocabulary, "</s>": len(vocabulary)}, merges=merges)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ("<think>", "</think>")])
    return tokenizer


def llama_2(scored_runs: bool = True) -> PreTrainedTokenizerFast:
    """As `tokenizer.json` of Llama 2 says it: a space is put in front of every part of a text."""
    return _prefixed(*pieces(["<unk>", "<s>", "</s>"], scored_runs), [])


def phi_3() -> PreTrainedTokenizerFast:
    """Llama 2's with tokens that drop the white space behind them."""
    strict, loose = {"normalized": False}, {"normalized": False, "rstrip": True}
    vocabulary, merges = pieces(["<unk>", "<s>", "</s>"], scored_runs=True)
    more = [AddedToken("</s>", special=False, **loose), AddedToken("<|endoftext|>", special=True, **strict)]
    more += [AddedToken(token, special=True, **loose) for token in ("<|user|>", "<|assistant|>", "<|end|>")]
    return _prefixed(vocabulary, merges, more)


def _prefixed(
    vocabulary: dict[str, int], merges: list[tuple[str, str]], added: list[AddedToken]
) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    ends = [] if added else ["</s>"]
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", *ends)])
    backend.add_tokens(added)
    end = "<|endoftext|>" if added else "</s>"
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token=end)


def llama_class(legacy: bool) -> LlamaTokenizer:
    """What transformers makes of a Llama 2 or TinyLlama folder: a space in front only where there is none yet."""
    vocabulary, merges = pieces(["<unk>", "<s>", "</s>"])
    return LlamaTokenizer(vocab=vocabulary, merges=merges, legacy=legacy, add_bos_token=True)


def gemma() -> GemmaTokenizer:
    """As Gemma 2 and 3: no space in front, unused pieces, runs of white space as added tokens."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    unused = [f"<unused{index}>" for index in range(9)]
    lines = ["\n" * length for length in range(1, 32)]
    vocabulary, _ = pieces([*special, *unused, "<start_of_turn>", "<end_of_turn>", *lines, "<table>"])
    vocabulary["\t"] = vocabulary.pop("<0x09>")
    scores = {piece: -float(index) for piece, index in vocabulary.items() if index > len(special)}
    scores |= dict.fromkeys((piece for piece in vocabulary if len(set(piece)) == 1), 0.0)
    merges = generate_merges(vocabulary, scores, skip_tokens=[*special, *unused])
    tokenizer = GemmaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True)
    runs = [piece for piece in vocabulary if len(piece) > 1 and set(piece) <= {"▁"}]
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in (*unused, *lines, *runs, "<table>")])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"]})
    return tokenizer


FAMILIES: dict[str, Callable[[], Any]] = {
    "gpt2": gpt2,
    "smollm": smollm,
    "llama 3": llama_3,
    "qwen": qwen,
    "llama 2": llama_2,
    "llama 2, ordered runs": lambda: llama_2(scored_runs=False),
    "llama 2, class, legacy": lambda: llama_class(legacy=True),
    "llama 2, class": lambda: llama_class(legacy=False),
    "phi 3": phi_3,
    "gemma": gemma,
}


def in_llama_cpp(converted: GgufTokenizer, path: Path, name: str = "model") -> Llama:
    """The tokenizer as llama.cpp reads it from a file without weights."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(converted.file_name(name))
    writer.add_vocab_size(len(converted.tokens))
    converted.write(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Llama(str(path), vocab_only=True, verbose=False)


def convert(tokenizer: Any, spare_rows: int = 3) -> GgufTokenizer:
    return convert_tokenizer(tokenizer, len(tokenizer) + spare_rows)


def tokens_of(model: Llama, text: str) -> list[int]:
    return list(model.tokenize(text.encode(), add_bos=True, special=True))
