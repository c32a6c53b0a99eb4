"""Learned embeddings as tokens: names for them in the vocabulary."""

from __future__ import annotations

from dataclasses import replace

import gguf

from reft_ollama.tokenizers.conversion import GgufTokenizer
from reft_plugins.errors import ExportError

NAME = "<|reft_virtual_{}|>"
"""A token's text; runtimes recognise control tokens by it in what TEMPLATE renders, like any other."""


def names(count: int) -> list[str]:
    """The texts of so many virtual tokens, in order; none is part of another."""
    return [NAME.format(index) for index in range(count)]


def with_virtual_tokens(tokenizer: GgufTokenizer, count: int) -> GgufTokenizer:
    """The tokenizer with control tokens behind all others, and with BOS left to the templates.

    Virtual tokens stand before BOS, so a runtime must not put one in front of them: `add_bos` is off, and every prompt
    begins with the virtual tokens' names and, where it has one, the text of BOS. So does the file's chat template.

    Raises:
        ExportError: the vocabulary has a token of such a name.
    """
    added = names(count)
    clash = sorted(set(added) & set(tokenizer.tokens))
    if clash:
        raise ExportError(
            f"tokenizer: it already has a token {clash[0]!r}, the name of a virtual token. The base model seems to be "
            "an export with virtual tokens itself; export on the model it was made of"
        )
    return replace(
        tokenizer,
        tokens=[*tokenizer.tokens, *added],
        types=[*tokenizer.types, *[int(gguf.TokenType.CONTROL)] * count],
        scores=None if tokenizer.scores is None else [*tokenizer.scores, *[0.0] * count],
        add_bos=False,
        chat_template=None if tokenizer.chat_template is None else "".join(added) + tokenizer.chat_template,
    )
