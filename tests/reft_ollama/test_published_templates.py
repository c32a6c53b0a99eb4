"""TEMPLATEs for the chat templates of published models, against Jinja, and against Go's own text/template."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
from template_cases import CONVERSATIONS, RENDERINGS, TURNS, published, render_with_go, rendered, tokenizer_with, values
from test_ollama_templates import JINJA

from reft_ollama.templates import go_template
from reft_ollama.templates.chat_template import NO_CHAT, derive
from reft_ollama.templates.jinja import assistant, system, user

PUBLISHED = published()
WARNINGS = {
    "qwen2.5": {"describes tools"},
    "qwen3": {"drops the thinking", "describes tools"},
    "phi-3.5": set(),
    "mistral-nemo": {"describes tools"},
    "smollm3": {"can switch thinking off", "obeys /no_think"},
}


def begins_with_bos(name: str) -> bool:
    return "bos_token" in PUBLISHED[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_ollama_sends_what_published_templates_render(name: str) -> None:
    tokenizer = tokenizer_with(PUBLISHED[name])
    derived = derive(tokenizer, add_bos=begins_with_bos(name))
    assert derived.text != NO_CHAT
    for messages in CONVERSATIONS:
        if messages[0]["role"] == "system" and "takes no system message" in " ".join(derived.warnings):
            continue
        assert go_template.chat(derived.text, messages) == rendered(tokenizer, messages)


@pytest.mark.parametrize("name", WARNINGS)
def test_what_a_template_cannot_do_is_warned_about_and_nothing_else(name: str) -> None:
    found = derive(tokenizer_with(PUBLISHED[name]), add_bos=begins_with_bos(name)).warnings
    assert len(found) == len(WARNINGS[name])
    assert all(any(words in warning for warning in found) for words in WARNINGS[name])


@pytest.mark.parametrize("name", ["qwen2.5", "phi-3.5", "mistral-nemo"])
def test_answers_that_the_client_has_begun_stay_open(name: str) -> None:
    tokenizer = tokenizer_with(PUBLISHED[name])
    messages = [*TURNS[:3], assistant("It is")]
    wanted = rendered(tokenizer, messages, add_generation_prompt=False, continue_final_message=True)
    derived = derive(tokenizer, add_bos=begins_with_bos(name))
    assert go_template.chat(derived.text, messages) == wanted
    assert wanted.endswith("It is")


@pytest.mark.parametrize("think", [None, True, False])
def test_thinking_is_switched_off_by_the_request(think: bool | None) -> None:
    tokenizer = tokenizer_with(PUBLISHED["qwen3"])
    text = derive(tokenizer, add_bos=False).text
    settings = {} if think is None else {"enable_thinking": think}
    for messages in CONVERSATIONS:
        wanted = rendered(tokenizer, messages, **settings)
        assert go_template.chat(text, messages, think) == wanted
        assert wanted.endswith("<think>\n\n</think>\n\n") == (think is False)


def test_a_default_system_prompt_is_replaced_by_the_users() -> None:
    text = derive(tokenizer_with(PUBLISHED["qwen2.5"]), add_bos=False).text
    assert "You are Qwen" in go_template.chat(text, [user("Hi")])
    assert "You are Qwen" not in go_template.chat(text, [system("Be brief."), user("Hi")])


def test_the_oldest_messages_that_ollama_drops_may_begin_with_an_answer() -> None:
    text = derive(tokenizer_with(PUBLISHED["qwen2.5"]), add_bos=False).text
    assert go_template.chat(text, TURNS[1:]) == go_template.chat(text, TURNS[2:])


def test_neighbouring_messages_of_one_role_are_one() -> None:
    text = derive(tokenizer_with(PUBLISHED["phi-3.5"]), add_bos=False).text
    split = [system("a"), user("one"), system("b"), user("two"), user("three")]
    assert go_template.chat(text, split).startswith("<|system|>\na\n\nb<|end|>\n<|user|>\none")
    assert "two\n\nthree<|end|>\n<|assistant|>\n" in go_template.chat(text, split)


def test_exports_of_one_model_are_equal_on_any_day(monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{{ strftime_now('%Y-%m-%d') }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<>"
    derived = derive(tokenizer_with(template), add_bos=False)
    assert derived.text.startswith("{{ if .System }}2024-07-26<system>")
    assert "today's date" in " ".join(derived.warnings)


LANGUAGE = [
    ("{{ if .System }}a{{ else if .Think }}b{{ else }}c{{ end }}", {}),
    ("{{ if .System }}a{{ else if .Think }}b{{ else }}c{{ end }}", {"Think": True}),
    ("{{ range .Messages }}{{ .Role }},{{ end }}|", values(TURNS)),
    ("{{ range $i, $m := .Messages }}{{ $i }}{{ if eq $i 1 }}!{{ end }}{{ end }}", values(TURNS)),
    ("{{ $x := false }}{{ range .Messages }}{{ if $x }}+{{ end }}{{ $x = true }}{{ end }}", values(TURNS)),
    ('{{ if and .System (or .Think (ne .System "x")) }}yes{{ end }}{{ not .System }}', {"System": "s"}),
    (go_template.literal('{{ { {{{ }} """ \u00a0\u200d😀\U000e0001 {') + "{{ .System }}", {"System": "{{ s }}"}),
]


def cases() -> list[dict[str, Any]]:
    """Every construct, and every derived TEMPLATE on every kind of conversation."""
    found = [{"template": template, "values": given} for template, given in LANGUAGE]
    for chat_template in [*JINJA.values(), *(PUBLISHED[name] for name in WARNINGS)]:
        text = derive(tokenizer_with(chat_template), add_bos=True).text
        found += [{"template": text, "values": values(messages)} for messages in (*CONVERSATIONS, TURNS[:2])]
        found.append({"template": text, "values": values(TURNS[:1], think=False)})
    return found


def test_templates_render_as_go_rendered_them() -> None:
    """Recorded with `render.go`, so that no Go is needed here."""
    recorded = json.loads((RENDERINGS / "recorded.json").read_text("utf-8"))
    assert len(recorded) > 100
    for case in recorded:
        assert go_template.render(case["template"], case["values"]) == case["text"]


def test_a_rendering_that_go_refuses_is_refused() -> None:
    for broken in ("{{ $x }}", "{{ len }}", "{{ slice .Messages }}", '{{ "a }}', "{{ eq (1 1 }}"):
        with pytest.raises(ValueError):
            go_template.render(broken, values(TURNS))


@pytest.mark.skipif(shutil.which("go") is None, reason="Go is not installed; see the recorded renderings")
def test_todays_templates_in_go_itself() -> None:
    found = cases()
    assert [go_template.render(case["template"], case["values"]) for case in found] == render_with_go(found)
