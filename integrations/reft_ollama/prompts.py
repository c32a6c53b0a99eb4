"""How text reaches the exported model: its tokenizer, its templates, and tokens that stand for learned states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from reft_ollama.architectures.base import Architecture
from reft_ollama.templates.beginning import begin_with, constant_beginning, jinja_begin_with
from reft_ollama.templates.chat_template import ChatTemplate, derive
from reft_ollama.templates.virtual_tokens import Opening
from reft_ollama.tokenizers.conversion import GgufTokenizer
from reft_ollama.tokenizers.virtual_tokens import names, with_virtual_tokens
from reft_plugins.program import Node, Program


@dataclass(slots=True)
class Prompts:
    """What the file and the Modelfile say about prompts.

    Attributes:
        num_keep: tokens at the beginning that a runtime must not drop from a long conversation; 0 for none.
        beginning: ids that every prompt begins with, if the file has tokens of their own for them.
        shortest: tokens of the shortest prompt, 0 if that is not asked.
        on_beginning, others: the nodes of the program that only touch those, and all others, in order.
    """

    tokenizer: GgufTokenizer
    chat: ChatTemplate
    num_keep: int = 0
    beginning: tuple[int, ...] = ()
    on_beginning: list[Node] = field(default_factory=list)
    others: Sequence[Node] = ()
    shortest: int = 0


def prepare_prompts(program: Program, architecture: Architecture, tokenizer: Any, converted: GgufTokenizer) -> Prompts:
    """Put virtual tokens in front of every prompt, or find out which edits touch only what every prompt begins with.

    Args:
        tokenizer: of transformers; converted: the same as the file has it.
    """
    count = program.virtual_tokens
    if count:
        opening = Opening(count, tokenizer.bos_token if converted.add_bos else "")
        chat = opening.template(derive(tokenizer, add_bos=False))
        return Prompts(with_virtual_tokens(converted, count), chat, opening.kept, others=program.nodes)
    plain = Prompts(converted, derive(tokenizer, converted.add_bos), others=program.nodes)
    limited = any(not node.positions.everywhere for node in program.edits)
    found = _marked(program, tokenizer, plain) if limited and not architecture.post_norm else None
    return found or plain


def _marked(program: Program, tokenizer: Any, plain: Prompts) -> Prompts | None:
    converted, chat = plain.tokenizer, plain.chat
    bound = constant_beginning(tokenizer, chat, converted.add_bos, thorough=False)
    if not any(bound.holds(edit.positions) for edit in program.edits):
        return None
    prefix = constant_beginning(tokenizer, chat, converted.add_bos)
    mine, others = prefix.split(program)
    if not mine:
        return None
    tokens = prefix.tokens[: prefix.reach(mine)]
    own = names(len(tokens))
    marked = begin_with(tokenizer, chat, converted.add_bos, tokens, own)
    if marked is None:
        return None
    new = with_virtual_tokens(converted, len(tokens))
    new.chat_template = jinja_begin_with(tokenizer, converted.chat_template, tokens, own)
    return Prompts(new, marked, len(tokens), tokens, mine, others, prefix.shortest)
