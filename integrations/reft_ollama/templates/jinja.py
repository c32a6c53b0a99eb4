"""Rendering a tokenizer's chat template, with a fixed date, so that equal models give equal exports."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jinja2

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]

_DAY = datetime.datetime(2024, 7, 26)
DATE = f"{_DAY:%d %b %Y}"
"""The date that chat templates write where they write today's; Llama 3.1's own default."""


class Jinja:
    """A tokenizer's chat template.

    Args:
        add_bos: whether the runtime puts BOS in front, which is then left out of what is rendered.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, add_bos: bool) -> None:
        self._tokenizer = tokenizer
        self._bos = tokenizer.bos_token if add_bos and isinstance(tokenizer.bos_token, str) else ""

    def render(self, messages: Sequence[Message], **settings: Any) -> str | None:
        """The prompt without a BOS that the runtime adds; None where the template refuses the conversation."""
        try:
            return self._render(messages, **settings).removeprefix(self._bos)
        except (jinja2.TemplateError, TypeError, ValueError):
            return None

    def warnings(self) -> list[str]:
        """What stays different whatever the messages are, and for which messages something does."""
        found, source = [], str(self._tokenizer.chat_template)
        if self._bos and not self._render([user("x")]).startswith(self._bos):
            found.append(f"Ollama puts {self._bos} in front of a chat, the chat template does not")
        if self.render([user("x")]) == self.render([user(" x\n")]):
            found.append("the chat template drops white space around messages, TEMPLATE keeps it")
        thought = self.render([user("x"), assistant("<think>\n⟦T⟧\n</think>\n\ny"), user("z")])
        if thought is not None and "⟦T⟧" not in thought:
            found.append("the chat template drops the thinking of earlier answers, TEMPLATE keeps it")
        if "strftime_now" in source:
            found.append(f"the chat template writes today's date, TEMPLATE a fixed one ({DATE})")
        if "tools" in source:
            found.append("the chat template describes tools, TEMPLATE does not")
        return found

    def _render(self, messages: Sequence[Message], **settings: Any) -> str:
        return str(
            self._tokenizer.apply_chat_template(
                list(messages),
                tokenize=False,
                add_generation_prompt=True,
                date_string=DATE,
                strftime_now=_DAY.strftime,
                **settings,
            )
        )


def system(content: str) -> Message:
    """A message of the system."""
    return {"role": "system", "content": content}


def user(content: str) -> Message:
    """A message of the user."""
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    """An answer."""
    return {"role": "assistant", "content": content}
