"""Every family's tokenizer in a real llama.cpp, on generated texts: equal token ids, but for what a warning names."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llama_cpp import Llama
from tokenizer_families import FAMILIES, TEXTS, convert, in_llama_cpp, tokens_of

from reft_ollama.tokenizers.conversion import GgufTokenizer

ADDED = ("<s>", "</s>", "<|user|>", "<|end|>", "<|im_start|>", "<|im_end|>", "<think>", "<|eot_id|>", "<table>")
ADDED += ("<start_of_turn>", "<unused3>", "<|endoftext|>", "<|user|>\n", "<unk>", "[INST]", "[/INST] ")
CHARACTERS = "aZ19 \n\t\r'.,;!?-=_/\\{}[]()<>|\"#@éßŒΔжעعहिै्ภาษ日中한😀👩²½Ⅷǅʰ"
CHARACTERS += "\u017f\u0301\u0308\u200d\u00a0\u3000\u200b\ufeff\x00\x7f"
PARTS = st.one_of(
    st.text(st.sampled_from(CHARACTERS), max_size=8),
    st.text(st.characters(exclude_categories=("Cs",)), max_size=4),
    st.sampled_from([word for text in TEXTS for word in re.findall(r"\s*\S+", text)]),
    st.sampled_from(ADDED),
    st.builds(lambda letter, count: letter * count, st.sampled_from(" \n\t=-.aA1é"), st.integers(1, 40)),
)
WRITTEN = st.lists(PARTS, min_size=1, max_size=6).map("".join)


@dataclass
class Both:
    tokenizer: Any
    converted: GgufTokenizer
    model: Llama

    def agree(self, text: str) -> bool:
        return tokens_of(self.model, text) == self.tokenizer(text).input_ids


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Both]:
    @cache
    def make(family: str) -> Both:
        tokenizer = FAMILIES[family]()
        converted = convert(tokenizer)
        return Both(tokenizer, converted, in_llama_cpp(converted, tmp_path_factory.mktemp("vocabulary") / "v.gguf"))

    return make


def composed(text: str) -> bool:
    return unicodedata.is_normalized("NFC", text)


def no_space_in_front(text: str) -> bool:
    return not any(part.startswith((" ", "▁")) for part in re.split("<s>|</s>|<unk>", text))


def no_space_or_special_token(text: str) -> bool:
    return no_space_in_front(text) and not re.search("<s>|</s>|<unk>", text)


def nothing_behind_tokens_but_ascii(text: str) -> bool:
    """Other white space behind Phi-3's tokens."""
    return not re.search(r"(<\|\w+\|>|</s>)[ \n\t\r\f\v]*(?![ \n\t\r\f\v])\s", text)


def no_written_sign(text: str) -> bool:
    return "▁" not in text


NAMED: dict[str, tuple[str, Callable[[str], bool], str]] = {
    "qwen": ("does not compose Unicode", composed, "e\u0301"),
    "llama 2, class, legacy": ("puts a space in front", no_space_in_front, " a"),
    "llama 2, class": ("never behind a special token", no_space_or_special_token, "a<s>b"),
    "phi 3": ("only ASCII white space", nothing_behind_tokens_but_ascii, "<|user|>\u00a0a"),
    "gemma": ("runs of the character ▁", no_written_sign, "▁▁ a"),
}
"""What a family's warning says, the texts it leaves equal, and one that shows the difference."""


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=250, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(text=WRITTEN)
def test_equal_ids_on_generated_texts(family: str, both: Callable[[str], Both], text: str) -> None:
    equal = NAMED[family][1] if family in NAMED else lambda text: True
    if text and equal(text):
        assert both(family).agree(text)


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_ids_on_real_texts(family: str, both: Callable[[str], Both]) -> None:
    assert [text for text in TEXTS if not both(family).agree(text)] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_written_as_the_tokenizer_writes_them(family: str, both: Callable[[str], Both]) -> None:
    """Token by token, as runtimes do while an answer grows: runs of spaces, bytes, pieces behind a space."""
    for text in filter(composed, TEXTS):
        tokens = both(family).tokenizer(text, add_special_tokens=False).input_ids
        written = both(family).model.detokenize([*both(family).tokenizer("x:").input_ids, *tokens]).decode()
        front = both(family).model.detokenize(both(family).tokenizer("x:").input_ids).decode()
        assert written.removeprefix(front).removeprefix(" ") == text.removeprefix(" ")


@pytest.mark.parametrize("family", NAMED)
def test_what_differs_is_warned_about_and_does_differ(family: str, both: Callable[[str], Both]) -> None:
    words, _, text = NAMED[family]
    assert words in " ".join(both(family).converted.warnings)
    assert not both(family).agree(text)


@pytest.mark.parametrize("family", set(FAMILIES) - set(NAMED))
def test_families_without_a_difference_have_no_warning(family: str, both: Callable[[str], Both]) -> None:
    assert both(family).converted.warnings == []


def test_vocabularies_trained_here_use_their_merges(both: Callable[[str], Both]) -> None:
    """Negative control: texts are not all bytes, and another family's file gives other tokens."""
    text = TEXTS[0]
    assert len(both("llama 3").tokenizer(text).input_ids) < len(text) / 2
    assert tokens_of(both("gpt2").model, text) != both("llama 3").tokenizer(text).input_ids


def test_tokens_that_drop_white_space_need_a_name_that_says_phi_3(tmp_path: Path, both: Callable[[str], Both]) -> None:
    phi = both("phi 3")
    assert phi.converted.strips_right
    assert phi.converted.file_name("org/Phi-3-mini with loreft") == "org/Phi-3-mini with loreft"
    assert phi.converted.file_name("mine") == "mine (Phi-3 tokenizer)"
    text = "<|user|>\nHello <|end|>\n<|assistant|>\n"
    assert phi.agree(text)
    phi.converted.strips_right = False
    try:
        assert tokens_of(in_llama_cpp(phi.converted, tmp_path / "v.gguf"), text) != phi.tokenizer(text).input_ids
    finally:
        phi.converted.strips_right = True


def test_other_tokenizers_do_not_get_a_name_that_says_phi_3(tmp_path: Path, both: Callable[[str], Both]) -> None:
    """llama.cpp would look for tokens they do not have, and not load."""
    converted = both("llama 3").converted
    assert converted.file_name("Llama distilled from phi-3") == "Llama distilled from Phi 3"
    model = in_llama_cpp(converted, tmp_path / "v.gguf", "my phi3")
    assert tokens_of(model, "a b") == both("llama 3").tokenizer("a b").input_ids


def test_ordinary_text_that_looks_special_is_no_end_of_an_answer(both: Callable[[str], Both]) -> None:
    qwen = both("qwen")
    unused = qwen.tokenizer.convert_tokens_to_ids("</s>")
    assert qwen.converted.tokens[unused] == "[unused </s>]"
    assert len(tokens_of(qwen.model, "</s>")) > 1
