"""Ollama's TEMPLATE from a tokenizer's Jinja chat template.

The Jinja template is rendered on conversations with marked contents, which shows the text around every message; from
that the Go template is put together, and kept only if it renders further conversations exactly as Jinja does. This
covers every format that puts fixed text around alternating messages: ChatML, Llama-2 and Llama-3, Mistral, Gemma, Phi,
Qwen, SmolLM, Zephyr and plain ones, with a default system prompt if they have one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from reft_ollama.templates import go_template
from reft_ollama.templates.jinja import Jinja, Message, assistant, system, user
from reft_ollama.templates.parts import InFirstTurn, InLastTurn, Parts, Refused, SystemPlace, find_parts, find_system

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_CHAT = "{{ .Prompt }}"
"""TEMPLATE of a model without a chat format: the prompt is sent as it is."""


@dataclass(slots=True)
class ChatTemplate:
    """A Go template; the text that ends an answer; and what it does differently from the Jinja template."""

    text: str
    end_of_answer: str = ""
    warnings: list[str] = field(default_factory=list)


def derive(tokenizer: PreTrainedTokenizerBase, add_bos: bool) -> ChatTemplate:
    """The TEMPLATE for a tokenizer.

    Args:
        add_bos: whether the runtime puts the BOS token in front, so that the template must not.
    """
    if not tokenizer.chat_template:
        return ChatTemplate(NO_CHAT)
    jinja = Jinja(tokenizer, add_bos)
    parts = find_parts(jinja)
    if parts is None:
        return _give_up("it does not put the same text around every message")
    place = find_system(jinja, parts)
    text = compose(parts, place)
    if not all(_agrees(jinja, text, probe) for probe in _probes()):
        return _give_up("its output depends on more than the roles of the messages")
    template = ChatTemplate(text, parts.after_answer, jinja.warnings())
    if not all(_agrees(jinja, text, probe, think=False) for probe in _probes()):
        template.warnings.append("the chat template can switch thinking off, TEMPLATE cannot")
    if isinstance(place, Refused):
        template.warnings.append(
            "the chat template takes no system message; TEMPLATE puts it in front of the first user message"
        )
    elif place is None:
        template.warnings.append("the chat template ignores system messages, and so does TEMPLATE")
    elif not all(_agrees(jinja, text, [system("Answer in one line."), *probe]) for probe in _probes()):
        template.warnings.append("the chat template moves the system message about; TEMPLATE puts it first")
    elif not _agrees(jinja, text, [system("Be brief. /no_think"), user("Why?")]):
        template.warnings.append("the chat template obeys /no_think in a system message, TEMPLATE repeats it as text")
    return template


def compose(parts: Parts, place: SystemPlace | None) -> str:
    """A TEMPLATE: everything in front of the first message, then the messages in turn.

    An answer that the client has begun is left open. Answers in front of the first user message are left out: Ollama
    drops the oldest messages of a conversation that is too long, and formats begin with the user's.
    """
    quote = go_template.literal
    start, in_turn = quote(parts.opening), ""
    if isinstance(place, InFirstTurn):
        with_system = f"{quote(place.before)}{{{{ .System }}}}{quote(place.between)}"
        start = f"{{{{ if .System }}}}{with_system}{{{{ else }}}}{start}{{{{ end }}}}"
    elif isinstance(place, Refused):
        start += "{{ if .System }}{{ .System }}\n\n{{ end }}"
    elif isinstance(place, InLastTurn):
        with_system = f"{quote(place.before)}{{{{ $.System }}}}{quote(place.between)}"
        in_turn = f"{{{{ if and $last $.System }}}}{with_system}{{{{ end }}}}"
    asked = f"{in_turn}{{{{ .Content }}}}{_behind_user(parts)}"
    answered = f"{{{{ .Content }}}}{{{{ if not $last }}}}{quote(parts.after_answer)}{{{{ end }}}}"
    return (
        f"{start}{{{{ $begun := false }}}}{{{{ range $index, $_ := .Messages }}}}"
        "{{ $last := eq (len (slice $.Messages $index)) 1 }}"
        f'{{{{ if eq .Role "user" }}}}{{{{ $begun = true }}}}{asked}'
        f'{{{{ else if and $begun (eq .Role "assistant") }}}}{answered}{{{{ end }}}}{{{{ end }}}}'
    )


def _behind_user(parts: Parts) -> str:
    ending, before = go_template.literal(parts.ending), go_template.literal(parts.before_answer)
    if parts.no_thinking:
        quiet = go_template.literal(parts.no_thinking)
        ending += f"{{{{ if and $.IsThinkSet (not $.Think) }}}}{quiet}{{{{ end }}}}"
    return before if ending == before else f"{{{{ if $last }}}}{ending}{{{{ else }}}}{before}{{{{ end }}}}"


def _agrees(jinja: Jinja, text: str, messages: Sequence[Message], think: bool | None = None) -> bool:
    settings = {} if think is None else {"enable_thinking": think}
    wanted = jinja.render(messages, **settings)
    return wanted is None or go_template.chat(text, messages, think) == wanted


def _probes() -> list[list[Message]]:
    turns = [
        user("How many legs has a spider?"),
        assistant("Eight."),
        user('"An ant", {x}?'),
        assistant("Six."),
        user("Thanks,\nthat is all"),
    ]
    return [turns[:1], turns[:3], turns]


def _give_up(reason: str) -> ChatTemplate:
    return ChatTemplate(NO_CHAT, "", [f"no TEMPLATE for this chat template, as {reason}; prompts are sent as they are"])
