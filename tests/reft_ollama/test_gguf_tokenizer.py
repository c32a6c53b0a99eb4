"""Exported tokenizers, read by llama.cpp, against the tokenizers themselves."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
from llama_cpp import Llama
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from reft_ollama.tokenizers import pretokenizers
from reft_ollama.tokenizers.conversion import convert_tokenizer
from reft_plugins.errors import ExportError
from reft_plugins.fidelity.general_text import PASSAGES

TEXTS = (
    *PASSAGES,
    "I'll go, they'VE gone; it's HE'D who'd say 'tis so",
    "12345 6789 1 22 333 4444 3.14159 0x1F2e ²³ ½ ١٢٣",
    "tabs\tand   many    spaces \n\n\nnew lines\r\n  indented\n\ttab  ",
    "Ünïcödé naïve Straße ŒUVRE ǅ Ελληνικά Кириллица עברית العربية हिन्दी ไทย 日本語 中文 한국어",
    "emoji 😀👩‍👩‍👧 and symbols €£¥©®™ ← → ∑ ∞ … — “quotes” «angle»",
    "camelCaseWords HTTPServer snake_case kebab-case a/b\\c {x: [1, 2]} #!/bin/sh && || == != <= >=",
    " leading space",
    "trailing space ",
    "",
    "    ",
    "\n",
    "a",
)


def byte_level(use_regex: bool) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level(False)])


SPLITTERS = {
    "gpt-2": (byte_level(True), False),
    "smollm": (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level(True)]), False),
    "llama-bpe": (split(pretokenizers.LLAMA3), True),
    "dbrx": (split(pretokenizers.LLAMA3), False),
    "qwen2": (split(pretokenizers.QWEN2), False),
    "tekken": (split(pretokenizers.TEKKEN), True),
    "gpt-4o": (split(pretokenizers.GPT4O), False),
}


def train(splitter: pre_tokenizers.PreTokenizer, ignore_merges: bool = False) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    backend.pre_tokenizer, backend.decoder = splitter, decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([*TEXTS * 3], trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    tokenizer.add_tokens([AddedToken("[[note]]", special=False, normalized=False)])
    return tokenizer


def in_llama_cpp(tokenizer: PreTrainedTokenizerFast, path: Path, spare_rows: int = 3) -> Llama:
    writer = gguf.GGUFWriter(path, "llama")
    rows = len(tokenizer) + spare_rows
    converted = convert_tokenizer(tokenizer, rows)
    writer.add_vocab_size(rows)
    converted.write(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Llama(str(path), vocab_only=True, verbose=False)


def tokens_of(model: Llama, text: str) -> list[int]:
    return list(model.tokenize(text.encode(), add_bos=True, special=True))


@pytest.mark.parametrize("name", SPLITTERS)
def test_llama_cpp_splits_text_as_the_tokenizer_does(name: str, tmp_path: Path) -> None:
    splitter, ignore_merges = SPLITTERS[name]
    tokenizer = train(splitter, ignore_merges)
    assert convert_tokenizer(tokenizer, len(tokenizer)).pre == name
    model = in_llama_cpp(tokenizer, tmp_path / "vocabulary.gguf")
    differing = [text for text in TEXTS if tokens_of(model, text) != tokenizer(text).input_ids]
    assert differing == []


def test_a_wrong_splitter_name_would_be_noticed(tmp_path: Path) -> None:
    tokenizer = train(*SPLITTERS["gpt-2"])
    converted = convert_tokenizer(tokenizer, len(tokenizer))
    converted.pre = "llama-bpe"
    writer = gguf.GGUFWriter(tmp_path / "wrong.gguf", "llama")
    writer.add_vocab_size(len(tokenizer))
    converted.write(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = Llama(str(tmp_path / "wrong.gguf"), vocab_only=True, verbose=False)
    assert any(tokens_of(model, text) != tokenizer(text).input_ids for text in TEXTS)


def test_added_tokens_are_found_in_text(tmp_path: Path) -> None:
    tokenizer = train(*SPLITTERS["gpt-2"])
    model = in_llama_cpp(tokenizer, tmp_path / "vocabulary.gguf")
    text = "before <|turn|>after [[note]] and <s> again</s>"
    wanted = tokenizer(text).input_ids
    assert tokens_of(model, text) == wanted
    assert (
        tokenizer.convert_tokens_to_ids("<|turn|>") in wanted and tokenizer.convert_tokens_to_ids("[[note]]") in wanted
    )


def test_ids_without_a_token_are_unused_and_every_id_keeps_its_place() -> None:
    tokenizer = train(*SPLITTERS["gpt-2"])
    converted = convert_tokenizer(tokenizer, len(tokenizer) + 2)
    assert converted.tokens[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert converted.types[-2:] == [int(gguf.TokenType.UNUSED)] * 2
    assert converted.types[1] == int(gguf.TokenType.CONTROL)
    assert converted.types[tokenizer.convert_tokens_to_ids("[[note]]")] == int(gguf.TokenType.USER_DEFINED)
    assert converted.special == {"bos": 1, "eos": 2, "pad": 0}


@pytest.mark.parametrize(
    ("template", "added"),
    [("$A", (False, False)), ("<s> $A", (True, False)), ("$A </s>", (False, True)), ("<s> $A </s>", (True, True))],
)
def test_what_the_tokenizer_adds_is_what_llama_cpp_adds(
    template: str, added: tuple[bool, bool], tmp_path: Path
) -> None:
    tokenizer = train(*SPLITTERS["gpt-2"])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    converted = convert_tokenizer(tokenizer, len(tokenizer))
    assert (converted.add_bos, converted.add_eos) == added
    model = in_llama_cpp(tokenizer, tmp_path / "vocabulary.gguf")
    assert tokens_of(model, "The ferry left.") == tokenizer("The ferry left.").input_ids


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """A tokenizer in the form that transformers converts Llama-2's SentencePiece model to, on a small vocabulary."""
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    text = "\n".join(TEXTS[:24])
    letters = sorted({"▁" if letter == " " else letter for letter in text} - {"\n"})
    words = dict.fromkeys(word for passage in PASSAGES for word in passage.replace("\n", " ").split())
    pieces = dict.fromkeys(f"▁{word}"[:end] for word in words for end in range(2, min(len(word), 7) + 1))
    ordered = sorted(
        (piece for piece in pieces if piece.isascii() or "▁" in piece), key=lambda piece: (len(piece), piece)
    )
    vocabulary = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", *bytes_, *letters])}
    for piece in ordered:
        vocabulary.setdefault(piece, len(vocabulary))
    merges = [
        (piece[:cut], piece[cut:])
        for piece in ordered
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    reachable = {"".join(pair) for pair in merges}
    assert reachable.issuperset(ordered)
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def test_sentencepiece_tokenizers_agree(tmp_path: Path) -> None:
    tokenizer = sentencepiece_like()
    converted = convert_tokenizer(tokenizer, len(tokenizer))
    assert (converted.model, converted.add_space_prefix) == ("llama", True)
    model = in_llama_cpp(tokenizer, tmp_path / "vocabulary.gguf")
    differing = [text for text in TEXTS if text and tokens_of(model, text) != tokenizer(text).input_ids]
    assert differing == []


def test_merges_that_sentencepiece_would_not_do_are_refused() -> None:
    vocabulary = {piece: index for index, piece in enumerate(["<unk>", "▁", "a", "b", "ab", "▁a", "▁ab"])}
    merges = [("a", "b"), ("▁", "a"), ("▁a", "b")]
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    with pytest.raises(ExportError, match=r"\('▁', 'ab'\) is not among its merges"):
        convert_tokenizer(tokenizer, len(vocabulary))


def test_an_unknown_splitter_is_named_in_the_error() -> None:
    tokenizer = train(split(r"\p{L}{1,5}|."))
    with pytest.raises(ExportError, match=r"p\{L\}\{1,5\}.*reft serve"):
        convert_tokenizer(tokenizer, len(tokenizer))


def test_a_normalizer_is_refused_and_nfc_is_warned_about() -> None:
    tokenizer = train(*SPLITTERS["qwen2"])
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    assert "NFC" in " ".join(convert_tokenizer(tokenizer, len(tokenizer)).warnings)
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(ExportError, match="Lowercase"):
        convert_tokenizer(tokenizer, len(tokenizer))


def test_more_tokens_than_rows_is_an_error() -> None:
    tokenizer = train(*SPLITTERS["gpt-2"])
    with pytest.raises(ExportError, match="no row in the embedding"):
        convert_tokenizer(tokenizer, len(tokenizer) - 1)
