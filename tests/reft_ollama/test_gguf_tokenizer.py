"""Exported tokenizers, read by llama.cpp, against the tokenizers themselves."""

from __future__ import annotations

import json
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizer_families import convert, in_llama_cpp, llama_2, llama_class, split, tokens_of
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from reft_ollama.tokenizers import pretokenizers
from reft_ollama.tokenizers.conversion import convert_tokenizer
from reft_ollama.tokenizers.loading import load_tokenizer
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


def has_marks(text: str) -> bool:
    return any(unicodedata.category(letter).startswith("M") for letter in text)


@pytest.mark.parametrize("name", SPLITTERS)
def test_llama_cpp_splits_text_as_the_tokenizer_does(name: str, tmp_path: Path) -> None:
    splitter, ignore_merges = SPLITTERS[name]
    tokenizer = train(splitter, ignore_merges)
    assert convert_tokenizer(tokenizer, len(tokenizer)).pre == name
    model = in_llama_cpp(convert(tokenizer), tmp_path / "vocabulary.gguf")
    differing = [text for text in TEXTS if tokens_of(model, text) != tokenizer(text).input_ids]
    marked = "combining marks" in " ".join(convert(tokenizer).warnings)
    assert marked == (name in ("tekken", "gpt-4o"))
    assert [text for text in differing if not (marked and has_marks(text))] == []


def test_a_wrong_splitter_name_would_be_noticed(tmp_path: Path) -> None:
    tokenizer = train(*SPLITTERS["gpt-2"])
    converted = convert_tokenizer(tokenizer, len(tokenizer))
    converted.pre = "llama-bpe"
    model = in_llama_cpp(converted, tmp_path / "wrong.gguf")
    assert any(tokens_of(model, text) != tokenizer(text).input_ids for text in TEXTS)


def test_added_tokens_are_found_in_text(tmp_path: Path) -> None:
    tokenizer = train(*SPLITTERS["gpt-2"])
    model = in_llama_cpp(convert(tokenizer), tmp_path / "vocabulary.gguf")
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
    model = in_llama_cpp(convert(tokenizer), tmp_path / "vocabulary.gguf")
    assert tokens_of(model, "The ferry left.") == tokenizer("The ferry left.").input_ids


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


def test_ordinary_tokens_without_a_row_are_an_error_and_added_ones_are_left_out(tmp_path: Path) -> None:
    tokenizer = train(*SPLITTERS["gpt-2"])
    with pytest.raises(ExportError, match="no row in the embedding"):
        convert_tokenizer(tokenizer, len(tokenizer) - 3)
    converted = convert_tokenizer(tokenizer, len(tokenizer) - 1)
    assert "[[note]]: no row in the embedding" in " ".join(converted.warnings)
    model = in_llama_cpp(converted, tmp_path / "v.gguf")
    assert tokens_of(model, "a<|turn|>b") == tokenizer("a<|turn|>b").input_ids
    assert max(tokens_of(model, "a[[note]]b")) < len(converted.tokens) == len(tokenizer) - 1


def test_ids_with_holes_and_texts_like_the_names_of_holes(tmp_path: Path) -> None:
    vocabulary = {letter: index * 2 for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE({**vocabulary, "ho": 550}, [("h", "o")]))
    backend.pre_tokenizer, backend.decoder = byte_level(True), decoders.ByteLevel()
    backend.add_special_tokens(["[PAD3]"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    converted = convert_tokenizer(tokenizer, 600)
    assert len(set(converted.tokens)) == 600
    model = in_llama_cpp(converted, tmp_path / "v.gguf")
    for text in ("holes", "a[PAD3]b", "[PAD1]"):
        assert list(model.tokenize(text.encode(), add_bos=False, special=True)) == tokenizer(text).input_ids


@pytest.mark.parametrize(
    ("settings", "warning"),
    [
        ({"lstrip": True}, "keeps the spaces around <x>"),
        ({"rstrip": True}, "keeps the spaces around <x>"),
        ({"single_word": True}, "finds <x> also inside words"),
        ({"normalized": True}, "only as it normalizes them"),
        ({"normalized": False}, ""),
    ],
)
def test_what_llama_cpp_cannot_say_of_added_tokens_is_warned_about(settings: dict[str, bool], warning: str) -> None:
    tokenizer = llama_2()
    tokenizer.add_tokens([AddedToken("<x>", **{"normalized": False, **settings})])
    found = " ".join(convert(tokenizer).warnings)
    assert warning in found and bool(found) == bool(warning)


@pytest.mark.parametrize(
    ("chat_template", "prefix"),
    [(None, True), ("<s>{{ messages[0]['content'] }}", False), ("Question: {{ messages[0]['content'] }}", True)],
)
def test_a_prefix_of_the_first_text_only_is_written_for_the_texts_a_model_gets(
    chat_template: str | None, prefix: bool, tmp_path: Path
) -> None:
    tokenizer = llama_class(legacy=False)
    tokenizer.chat_template = chat_template
    converted = convert(tokenizer)
    assert converted.add_space_prefix == prefix and len(converted.warnings) == 1
    converted.add_bos = False
    text = chat_template.replace("{{ messages[0]['content'] }}", "Why?") if chat_template else "Why?"
    wanted = tokenizer(text, add_special_tokens=False).input_ids
    assert tokens_of(in_llama_cpp(converted, tmp_path / "right.gguf"), text) == wanted
    converted.add_space_prefix = not prefix
    assert tokens_of(in_llama_cpp(converted, tmp_path / "wrong.gguf"), text) != wanted


@pytest.mark.parametrize("setting", [{"continuing_subword_prefix": "##"}, {"end_of_word_suffix": "</w>"}])
def test_settings_of_bpe_that_llama_cpp_lacks_are_named(setting: dict[str, Any]) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0}, [], **setting)))
    with pytest.raises(ExportError, match=next(iter(setting))):
        convert_tokenizer(tokenizer, 1)


def test_other_models_of_text_are_named() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(ExportError, match=r"a WordLevel model.*reft serve"):
        convert_tokenizer(tokenizer, 1)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma2", "unheard-of"])
def test_a_folder_without_a_tokenizer_or_with_a_broken_one_is_named(model_type: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(ExportError, match="no tokenizer there"):
        load_tokenizer(tmp_path)
    for broken in ("{", '{"version": "1.0", "model": {"type": "Unheard"}}'):
        (tmp_path / "tokenizer.json").write_text(broken)
        with pytest.raises(ExportError, match="cannot load its tokenizer"):
            load_tokenizer(tmp_path)


MISTRAL = {"v1": "tokenizer.model.v1", "v2": "mistral_instruct_tokenizer_240216.model.v2"}
MISTRAL |= {"v3": "mistral_instruct_tokenizer_240323.model.v3", "tekken": "tekken_240718.json"}


@pytest.mark.parametrize("version", MISTRAL)
def test_the_tokenizers_that_mistral_publishes(version: str, tmp_path: Path) -> None:
    """The real files, where Mistral's package (which comes with vLLM) is installed."""
    package = pytest.importorskip("mistral_common")
    pytest.importorskip("sentencepiece")
    file = "tekken.json" if version == "tekken" else "tokenizer.model"
    shutil.copy(Path(package.__file__).parent / "data" / MISTRAL[version], tmp_path / file)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mistral"}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer(TEXTS[0]).input_ids == AutoTokenizer.from_pretrained(tmp_path)(TEXTS[0]).input_ids
    converted = convert(tokenizer)
    model = in_llama_cpp(converted, tmp_path / "v.gguf")
    texts = [*TEXTS, "[INST] What is it? [/INST] A ferry.</s>", " ".join(TEXTS), "\n".join(TEXTS)]
    differing = [text for text in texts if text and tokens_of(model, text) != tokenizer(text).input_ids]
    assert len(tokenizer(texts[-1]).input_ids) < len(texts[-1]) / 2
    if version == "tekken":
        assert converted.pre == "tekken" and "combining marks" in " ".join(converted.warnings)
        assert all(has_marks(text) for text in differing)
    else:
        assert differing == [] and converted.warnings == []
