"""Added tokens, which are cut out of a text before it is split and merged: llama.cpp finds nearly all the same way."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import gguf

from reft_ollama.tokenizers.sentencepiece import SPACE

_PHI3 = re.compile("phi-?3", re.IGNORECASE)
_PHI3_NEEDS = ("<unk>", "<s>", "</s>", "<|endoftext|>")
_PHI3_KEEPS = ("<unk>", "<s>", "<|endoftext|>")
"""llama.cpp drops white space behind every added token but these, in files whose name says Phi-3 and in no others."""


@dataclass(frozen=True, slots=True)
class AddedTokens:
    """The added tokens of a `tokenizer.json` that have a row in the embedding.

    Attributes:
        entries: as in `tokenizer.json`; beyond: contents of those without a row.
        unknown: content of the unknown token; sentencepiece: whether `▁` stands for a space.
        pieces: what the model can merge.
    """

    entries: Sequence[dict[str, Any]]
    beyond: Sequence[str]
    unknown: str | None
    sentencepiece: bool
    pieces: Collection[str]

    @classmethod
    def of(cls, definition: dict[str, Any], rows: int, sentencepiece: bool) -> AddedTokens:
        """Read them; ids from `rows` on have no row."""
        added, model = definition["added_tokens"], definition["model"]
        return cls(
            entries=[token for token in added if token["id"] < rows],
            beyond=[token["content"] for token in added if token["id"] >= rows],
            unknown=model.get("unk_token"),
            sentencepiece=sentencepiece,
            pieces=model["vocab"],
        )

    @property
    def cut_out(self) -> set[str]:
        """Those that a file marks to be cut out."""
        return {token["content"] for token in self.entries if self.token_type(token) != gguf.TokenType.NORMAL}

    def token_type(self, token: dict[str, Any]) -> gguf.TokenType:
        """What a file says the token is."""
        if self.sentencepiece and token["content"] in (self.unknown, "<unk>"):
            return gguf.TokenType.UNKNOWN
        if token["special"]:
            return gguf.TokenType.CONTROL
        merged = self.sentencepiece and SPACE in token["content"] and token["content"] in self.pieces
        if merged and not token["normalized"]:  # merged of spaces; as an added token it would be written with this sign
            return gguf.TokenType.NORMAL
        return gguf.TokenType.USER_DEFINED

    def text(self, token: dict[str, Any]) -> str:
        """The text the token is found by, before spaces are replaced."""
        content: str = token["content"]
        found_in_normalized_text = self.sentencepiece and token["normalized"] and not token["special"]
        return content.replace(SPACE, " ") if found_in_normalized_text else content

    @property
    def strips_right(self) -> bool:
        """Whether white space behind a token is dropped exactly where llama.cpp does it for Phi-3."""
        cut_out = self.cut_out
        cut = {token["content"]: token for token in self.entries if token["content"] in cut_out}
        return (
            any(token["rstrip"] for token in cut.values())
            and all(token["rstrip"] == (content not in _PHI3_KEEPS) for content, token in cut.items())
            and all(content in self.pieces or content in cut for content in _PHI3_NEEDS)
        )

    def differences(self, normalize: Callable[[str], str]) -> list[str]:
        """What llama.cpp does differently, in sentences.

        Args:
            normalize: the tokenizer's normalizer.
        """
        found = []
        strips = {"lstrip", "rstrip"} - ({"rstrip"} if self.strips_right else set())
        if stripped := [t["content"] for t in self.entries if any(t.get(side) for side in strips)]:
            found.append(f"llama.cpp keeps the spaces around {_some(stripped)}, which the tokenizer drops")
        if self.strips_right:
            found.append("llama.cpp drops only ASCII white space behind special tokens, the tokenizer all of Unicode's")
        if words := [t["content"] for t in self.entries if t.get("single_word")]:
            found.append(f"llama.cpp finds {_some(words)} also inside words")
        moved = [t["content"] for t in self.entries if t["normalized"] and not t["special"]]
        moved = [content for content in moved if normalize(content) not in (content, content.replace(" ", SPACE))]
        if moved:
            found.append(
                f"llama.cpp finds {_some(moved)} as they are written, the tokenizer only as it normalizes them"
            )
        if any(self.token_type(token) == gguf.TokenType.NORMAL for token in self.entries):
            found.append(f"llama.cpp joins runs of the character {SPACE} with spaces beside them")
        if self.beyond:
            found.append(f"{_some(self.beyond)}: no row in the embedding, so left out of the file")
        return found


def file_name(name: str, strips_right: bool) -> str:
    """`general.name` for a model called `name`: from it llama.cpp takes whether white space behind tokens is dropped.

    A name that says Phi-3 for a tokenizer without that model's tokens would not even load.
    """
    if strips_right:
        return name if _PHI3.search(name) else f"{name} (Phi-3 tokenizer)"
    return _PHI3.sub("Phi 3", name)


def _some(contents: Sequence[str], most: int = 8) -> str:
    more = f" and {len(contents) - most} more" if len(contents) > most else ""
    return ", ".join(contents[:most]) + more
