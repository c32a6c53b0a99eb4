"""TEMPLATEs derived from Jinja chat templates, and the Modelfile around them."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from reft_ollama.templates import go_template
from reft_ollama.templates.chat_template import NO_CHAT, ChatTemplate, derive
from reft_ollama.templates.modelfile import make_parameters

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
JINJA = {
    "chatml": CHATML,
    "chatml with a default system prompt": (
        "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
        + CHATML
    ),
    "llama-3": (
        "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + "
        "m['content'] | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "llama-3.1, which writes a date": (
        "{{ bos_token }}{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
        "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] | trim %}"
        "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
        "{{ '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date_string + '\n\n' + system }}"
        "{{ '<|eot_id|>' }}"
        "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + "
        "'<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "llama-2": (
        "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
        "{% set messages = messages[1:] %}{% else %}{% set system = false %}{% endif %}"
        "{% for m in messages %}{% if loop.index0 == 0 and system %}"
        "{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m['content'] %}"
        "{% else %}{% set content = m['content'] %}{% endif %}"
        "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "mistral, without system messages": (
        "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{% if m['role'] == 'user' %}"
        "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
        "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    "gemma 3, which puts the system message into the first turn": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set front = messages[0]['content'] + '\n\n' %}"
        "{% set messages = messages[1:] %}{% else %}{% set front = '' %}{% endif %}{% for m in messages %}"
        "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else 'user') + '\n' }}"
        "{{ (front if loop.first else '') + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    "smollm 2": (
        "{% if messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
        "{% endif %}" + CHATML
    ),
    "zephyr": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ),
    "plain, with braces in it": (
        "{% for m in messages %}{{ '{{' + m['role'] | capitalize + '}} ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '{{Assistant}}' }}{% endif %}"
    ),
}
WITHOUT_SYSTEM = {"mistral, without system messages", "gemma"}

TURNS = [
    {"role": "user", "content": "How far is the moon?"},
    {"role": "assistant", "content": "384,400 km.\nOn average."},
    {"role": "user", "content": "And {{ the sun }}?"},
    {"role": "assistant", "content": "150 million km"},
    {"role": "user", "content": "Merci!"},
]
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.fixture
def tokenizer(tiny_llama: Path) -> PreTrainedTokenizerFast:
    loaded: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(tiny_llama)
    return loaded


def conversations(name: str) -> list[list[dict[str, str]]]:
    plain = [TURNS[:1], TURNS[:3], TURNS]
    return plain if name in WITHOUT_SYSTEM else plain + [[SYSTEM, *turns] for turns in plain]


@pytest.mark.parametrize("name", JINJA)
def test_ollama_sends_what_the_chat_template_renders(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = JINJA[name]
    derived = derive(tokenizer, add_bos=True)
    for messages in conversations(name):
        wanted = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, date_string="26 Jul 2024"
        )
        assert go_template.chat(derived.text, messages) == str(wanted).removeprefix("<s>")
    warned = " ".join(derived.warnings)
    assert ("system message" in warned) == (name in WITHOUT_SYSTEM)
    assert ("date" in warned) == ("date" in name)


def test_bos_is_written_by_the_template_where_the_runtime_does_not_add_it(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = JINJA["llama-3"]
    assert go_template.chat(derive(tokenizer, add_bos=False).text, TURNS[:1]).startswith("<s><|start_header_id|>")
    tokenizer.chat_template = JINJA["chatml"]
    assert "puts <s> in front" in " ".join(derive(tokenizer, add_bos=True).warnings)


def test_no_chat_template_means_the_bare_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    assert derive(tokenizer, add_bos=True).text == NO_CHAT == "{{ .Prompt }}"


def test_templates_that_look_at_more_than_roles_are_given_up(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ loop.index }}: {{ m['content'] }}\n{% endfor %}>"
    derived = derive(tokenizer, add_bos=True)
    assert derived.text == NO_CHAT
    assert "no TEMPLATE" in derived.warnings[0]


MOVING = (
    "{{% if messages[0]['role'] == 'system' %}}{{% set system = messages[0]['content'] + '\n\n' %}}"
    "{{% set messages = messages[1:] %}}{{% else %}}{{% set system = '' %}}{{% endif %}}"
    "{{% for m in messages %}}{{% if m['role'] == 'user' %}}"
    "{{{{ '[INST]' + (system if {where} else '') + m['content'] + '[/INST]' }}}}"
    "{{% else %}}{{{{ m['content'] + eos_token }}}}{{% endif %}}{{% endfor %}}"
)


def test_a_system_message_in_the_last_turn_stays_there(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = MOVING.format(where="loop.last")
    derived = derive(tokenizer, add_bos=False)
    wanted = "[INST]How far is the moon?[/INST]384,400 km.\nOn average.</s>[INST]Be brief.\n\nAnd {{ the sun }}?[/INST]"
    assert go_template.chat(derived.text, [SYSTEM, *TURNS[:3]]) == wanted
    assert derived.warnings == []


def test_a_system_message_that_moves_otherwise_is_warned_about(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = MOVING.format(where="loop.index0 == 2 or loop.length == 1")
    derived = derive(tokenizer, add_bos=False)
    wanted = "[INST]How far is the moon?[/INST]384,400 km.\nOn average.</s>[INST]And {{ the sun }}?[/INST]"
    assert go_template.chat(derived.text, TURNS[:3]) == wanted
    assert "moves the system message" in " ".join(derived.warnings)


@pytest.mark.parametrize(
    "broken", ["{{ .A | json }}", "{{ if .A }}x", "{{ range .A }}x", "x{{ end }}", "{{ if gt .A 1 }}{{ end }}"]
)
def test_the_interpreter_refuses_what_it_does_not_know(broken: str) -> None:
    with pytest.raises(ValueError):
        go_template.render(broken, {"A": [{}]})


def test_stops_and_sampling_follow_the_generation_config(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.chat_template = CHATML
    template = derive(tokenizer, add_bos=True)
    greedy = make_parameters(tokenizer, GenerationConfig(eos_token_id=2), template)
    assert greedy == {"temperature": 0, "repeat_penalty": 1.0, "stop": ["</s>", "<|im_end|>"]}
    settings = GenerationConfig(
        do_sample=True, temperature=0.6, top_p=0.9, top_k=40, repetition_penalty=1.1, eos_token_id=[2, 0]
    )
    sampled = make_parameters(tokenizer, settings, ChatTemplate(NO_CHAT))
    assert sampled == {
        "temperature": 0.6,
        "top_k": 40,
        "top_p": 0.9,
        "min_p": 0.0,
        "repeat_penalty": 1.1,
        "stop": ["</s>", "<pad>"],
    }
    silent = make_parameters(tokenizer, GenerationConfig(do_sample=True, min_p=0.05), ChatTemplate(NO_CHAT))
    assert silent["top_k"] == 50 and silent["min_p"] == 0.05
