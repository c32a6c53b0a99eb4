"""Ollama's TEMPLATE from a tokenizer's Jinja chat template.

The Jinja template is rendered on conversations with marked contents, which shows the text around every message; from
that the Go template is put together, and kept only if it renders further conversations exactly as Jinja does. This
covers every format that puts fixed text around alternating messages: ChatML, Llama-2 and Llama-3, Mistral, Gemma, Phi,
Zephyr and plain ones, with a default system prompt if they have one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import jinja2

from reft_ollama.templates import go_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_CHAT = "{{ .Prompt }}"
"""TEMPLATE of a model without a chat format: the prompt is sent as it is."""

_SYSTEM, _FIRST, _ANSWER, _SECOND = "⟦S⟧", "⟦U1⟧", "⟦A1⟧", "⟦U2⟧"
_DATE = "26 Jul 2024"


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
    jinja = _Jinja(tokenizer, add_bos)
    single = _around(jinja.render([_user(_FIRST)]), _FIRST)
    double = _around(jinja.render([_user(_FIRST), _assistant(_ANSWER), _user(_SECOND)]), _FIRST, _ANSWER, _SECOND)
    if single is None or double is None or (single[0], single[1]) != (double[0], double[3]):
        return _give_up("it does not put the same text around every message")
    opening, ending = single
    _, before_answer, after_answer, _ = double
    system = _around(jinja.render([_turn("system", _SYSTEM), _user(_FIRST)]), _SYSTEM, _FIRST)
    text = _compose(opening, before_answer, after_answer, ending, system)
    template = ChatTemplate(text, after_answer, jinja.warnings())
    if not all(_agrees(jinja, text, probe) for probe in _probes(system=False)):
        return _give_up("its output depends on more than the roles of the messages")
    if system is None:
        template.warnings.append("the chat template takes no system message; TEMPLATE ignores it")
    elif not all(_agrees(jinja, text, probe) for probe in _probes(system=True)):
        template.warnings.append("the chat template moves the system message about; TEMPLATE puts it first")
    return template


class _Jinja:
    def __init__(self, tokenizer: PreTrainedTokenizerBase, add_bos: bool) -> None:
        self._tokenizer = tokenizer
        self._bos = tokenizer.bos_token if add_bos and isinstance(tokenizer.bos_token, str) else ""

    def render(self, messages: Sequence[dict[str, str]]) -> str | None:
        """The prompt without a BOS that the runtime adds; None where the template refuses the conversation."""
        try:
            return self._render(messages).removeprefix(self._bos)
        except jinja2.TemplateError:
            return None

    def warnings(self) -> list[str]:
        """What stays different whatever the messages are."""
        found = []
        if self._bos and not self._render([_user("x")]).startswith(self._bos):
            found.append(f"Ollama puts {self._bos} in front of a chat, the chat template does not")
        if "strftime_now" in str(self._tokenizer.chat_template):
            found.append(f"the chat template writes today's date, TEMPLATE a fixed one ({_DATE} if it can be set)")
        return found

    def _render(self, messages: Sequence[dict[str, str]]) -> str:
        return str(
            self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True, date_string=_DATE
            )
        )


def _compose(opening: str, before_answer: str, after_answer: str, ending: str, system: Sequence[str] | None) -> str:
    quote = go_template.literal
    start = quote(opening)
    if system is not None:
        before, between = quote(system[0]), quote(system[1])
        start = f"{{{{ if .System }}}}{before}{{{{ .System }}}}{between}{{{{ else }}}}{start}{{{{ end }}}}"
    answer = f"{quote(before_answer)}{{{{ .Content }}}}{quote(after_answer)}"
    turns = f'{{{{ if eq .Role "user" }}}}{{{{ .Content }}}}{{{{ else if eq .Role "assistant" }}}}{answer}{{{{ end }}}}'
    return f"{start}{{{{ range .Messages }}}}{turns}{{{{ end }}}}{quote(ending)}"


def _around(text: str | None, *marks: str) -> list[str] | None:
    """The pieces of text before, between and after the marks; None unless each occurs once and in this order."""
    if text is None or any(text.count(mark) != 1 for mark in marks):
        return None
    pieces = []
    for mark in marks:
        piece, found, text = text.partition(mark)
        if not found:
            return None
        pieces.append(piece)
    return [*pieces, text]


def _agrees(jinja: _Jinja, text: str, messages: Sequence[dict[str, str]]) -> bool:
    wanted = jinja.render(messages)
    return wanted is None or go_template.chat(text, messages) == wanted


def _probes(system: bool) -> list[list[dict[str, str]]]:
    front = [_turn("system", "Answer in one line.")] if system else []
    turns = [
        _user("How many legs has a spider?"),
        _assistant("Eight."),
        _user('"An ant", {x}?'),
        _assistant("Six."),
    ]
    return [[*front, *turns[:1]], [*front, *turns[:3]], [*front, *turns, _user("Thanks,\nthat is all")]]


def _give_up(reason: str) -> ChatTemplate:
    return ChatTemplate(NO_CHAT, "", [f"no TEMPLATE for this chat template, as {reason}; prompts are sent as they are"])


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _user(content: str) -> dict[str, str]:
    return _turn("user", content)


def _assistant(content: str) -> dict[str, str]:
    return _turn("assistant", content)
