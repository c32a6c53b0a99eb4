"""Prompts that begin with virtual tokens: templates, tokenizers, and answers in a real llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_bases import make_base
from tokenizer_families import FAMILIES, convert, in_llama_cpp, llama_2, tokens_of
from transformers import AutoModelForCausalLM, AutoTokenizer
from virtual_token_cases import EXACT, VIRTUAL, Case, Cases

from reft_ollama.export import export_ollama
from reft_ollama.llama_cpp import LlamaCppModel, compare_llama_cpp
from reft_ollama.templates import go_template
from reft_ollama.tokenizers.conversion import convert_tokenizer
from reft_ollama.tokenizers.virtual_tokens import names, with_virtual_tokens
from reft_plugins.errors import ExportError

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + (system if loop.first else '') + message['content'] "
    "+ ' [/INST]' }}{% else %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)

User, Assistant, System = (
    lambda content, role=role: {"role": role, "content": content} for role in ("user", "assistant", "system")
)
CONVERSATIONS = [
    [User("How many legs has a spider?")],
    [System("Answer in one line."), User("the old fox")],
    [System("Answer."), User("Who?"), Assistant("the red dog."), User("Where?"), Assistant("At home."), User("Why?")],
]


def chat_base(directory: Path, family: str) -> Path:
    """A random Llama with a tokenizer of a family and its chat format."""
    if family == "sentencepiece":
        tokenizer: Any = llama_2()
        tokenizer.chat_template = LLAMA2
        model = AutoModelForCausalLM.from_pretrained(make_base("llama", directory))
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        random = torch.Generator().manual_seed(0)
        for matrix in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
            matrix.data.normal_(0, 0.6, generator=random)
        model.save_pretrained(directory)
    else:
        make_base("llama", directory)
        tokenizer = AutoTokenizer.from_pretrained(directory)
        tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("family", ["sentencepiece", "byte-level"])
def test_chats_rendered_from_the_exported_template(family: str, tmp_path: Path) -> None:
    case = Case(chat_base(tmp_path / "base", family))
    result = export_ollama(case.adapter, case.directory, tmp_path / "out", dtype="f32")
    template = result.modelfile.read_text().split('TEMPLATE """')[1].split('"""')[0]
    tokenizer = case.runtime.tokenizer
    chats = [tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=False) for c in CONVERSATIONS]
    wanted = case.runtime.generate(chats, [case.adapter] * len(chats), max_new_tokens=12)
    bare = case.runtime.generate(chats, max_new_tokens=12)
    model = LlamaCppModel(result.gguf)
    stored = model._model.metadata["tokenizer.chat_template"]
    try:
        for conversation, ids, answer, other in zip(CONVERSATIONS, chats, wanted, bare, strict=True):
            text = go_template.chat(template, conversation)
            assert model.tokenize(text) == [*case.ids, *ids]
            render = {"chat_template": stored, "tokenize": False, "add_generation_prompt": True}
            assert tokenizer.apply_chat_template(conversation, **render) == text
            expected = [token for token in answer.token_ids if token != tokenizer.eos_token_id]
            assert model.generate(text, max_new_tokens=12)[0] == expected
            assert expected != list(other.token_ids)
            plain = text.removeprefix("".join(names(VIRTUAL)))
            assert plain != text and model.generate(plain, max_new_tokens=12)[0] != expected
    finally:
        model.close()


def test_plain_prompts_and_what_stays_in_a_full_context(virtual_cases: Cases, tmp_path: Path) -> None:
    case = virtual_cases("llama")
    result = export_ollama(case.adapter, case.directory, tmp_path, dtype="f32")
    written = result.modelfile.read_text()
    assert f'TEMPLATE """{"".join(names(VIRTUAL))}<s>{{{{ .Prompt }}}}"""' in written
    assert f"PARAMETER num_keep {VIRTUAL + 1}\n" in written
    (warning,) = [warning for warning in result.warnings if "every prompt begins with" in warning]
    assert "<|reft_virtual_0|> to <|reft_virtual_7|> and then <s>, which TEMPLATE" in warning and warning in written
    prompt = "Who helps the old fox?"
    text = go_template.render(written.split('"""')[1], {"Prompt": prompt})
    model = LlamaCppModel(result.gguf)
    try:
        assert model.tokenize(text) == [*case.ids, *case.runtime.tokenizer(prompt).input_ids]
        (wanted,) = case.runtime.generate([prompt], [case.adapter], max_new_tokens=12)
        assert model.generate(text, max_new_tokens=12)[0] == [t for t in wanted.token_ids if t != 2]
    finally:
        model.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_of_tokenizers_sees_virtual_tokens_bos_and_the_prompt(family: str, tmp_path: Path) -> None:
    tokenizer = FAMILIES[family]()
    before = convert(tokenizer)
    after = with_virtual_tokens(before, 12)
    first, plain = len(before.tokens), in_llama_cpp(before, tmp_path / "plain.gguf")
    extended = in_llama_cpp(after, tmp_path / "extended.gguf")
    front = "".join(names(12)) + (tokenizer.bos_token if before.add_bos else "")
    for prompt in ("Who helps the old fox?", " a space in front", "\n\nlines", "", "42 legs", "<|reft_virtual_|> 0|>"):
        wanted = [*range(first, first + 12), *tokens_of(plain, prompt)]
        assert tokens_of(extended, front + prompt) == wanted, prompt
    assert tokens_of(extended, "no names") == tokens_of(plain, "no names")[before.add_bos :]


def test_rows_beyond_the_tokenizer_and_names_that_are_taken(tmp_path: Path) -> None:
    directory = make_base("llama", tmp_path / "base", vocab_size=416)
    tokenizer = AutoTokenizer.from_pretrained(make_base("llama", tmp_path / "smaller", vocab_size=384))
    tokenizer.save_pretrained(directory)
    case = Case(directory)
    result = export_ollama(case.adapter, directory, tmp_path / "out", dtype="f32")
    assert case.ids[0] == 416
    found = compare_llama_cpp(result.gguf, case.texts, case.logits, case.runtime.logits, in_front=case.ids)
    assert found.max_logit_difference < EXACT
    tokenizer.add_tokens(["<|reft_virtual_7|>"], special_tokens=True)
    tokenizer.save_pretrained(directory)
    with pytest.raises(ExportError, match=r"already has a token '<\|reft_virtual_7\|>'"):
        export_ollama(case.adapter, directory, tmp_path / "clash")
    assert not (tmp_path / "clash").exists()
    converted = convert_tokenizer(tokenizer, 416)
    assert with_virtual_tokens(converted, 7).tokens[416:] == names(7), "only a name that is used clashes"
