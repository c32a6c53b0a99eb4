"""Virtual tokens in front of every prompt: in Ollama's TEMPLATE and in its parameters."""

from __future__ import annotations

from dataclasses import dataclass, replace

from reft_ollama.templates.chat_template import NO_CHAT, ChatTemplate
from reft_ollama.templates.go_template import literal
from reft_ollama.tokenizers.virtual_tokens import names


@dataclass(frozen=True, slots=True)
class Opening:
    """What every prompt begins with.

    Attributes:
        count: number of virtual tokens; bos: text of the token that stands in front of plain prompts, "" for none.
    """

    count: int
    bos: str

    def template(self, chat: ChatTemplate) -> ChatTemplate:
        """The TEMPLATE with virtual tokens at its very beginning.

        Whatever a conversation has, a system message, several turns or a plain prompt, is rendered behind them. Ollama
        drops the old messages of a long conversation before it renders, so they stay.

        Args:
            chat: derived for a runtime that adds no BOS, so that BOS is in it where the chat template has one.
        """
        bos = self.bos if chat.text == NO_CHAT else ""
        text = literal("".join(names(self.count)) + bos) + chat.text
        return replace(chat, text=text, warnings=[*chat.warnings, self._warning()])

    def _warning(self) -> str:
        own = names(self.count)
        tokens = own[0] if self.count == 1 else f"{own[0]} to {own[-1]}"
        behind = f" and then {self.bos}" if self.bos else ""
        return (
            f"every prompt begins with {tokens}{behind}, which TEMPLATE and the file's chat template write; what is "
            "sent past them (raw prompts, a completion endpoint of llama.cpp) has to begin so itself"
        )

    @property
    def kept(self) -> int:
        """Tokens that have to stay when the context is full and its older half goes."""
        return self.count + bool(self.bos)
