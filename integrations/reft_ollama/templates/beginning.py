"""The beginning that a chat format gives every prompt, and templates that begin with other tokens instead."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from reft_ollama.plan.constant_prefix import ConstantPrefix
from reft_ollama.templates import go_template
from reft_ollama.templates.chat_template import NO_CHAT, ChatTemplate

CONTENTS = (" a", "\n", "\n\n", " 9", "``", "''", "é", "中", "🙂", "Go on")
"""Texts that, besides all texts of single tokens, might merge with what stands before them."""

_IF = re.compile(r"\{\{-?\s*if [^}]*\}\}")
_ELSE = re.compile(r"\{\{-?\s*else\s*-?\}\}")


def constant_beginning(tokenizer: Any, template: ChatTemplate, add_bos: bool, thorough: bool = True) -> ConstantPrefix:
    """The token ids that every prompt begins with: with and without a system message, of one turn or several.

    Args:
        tokenizer: of transformers; add_bos: whether the runtime puts BOS in front of what the template renders.
        thorough: try the texts of all tokens; without, what is found is an upper bound, and found at once.
    """
    contents = _contents(tokenizer) if thorough else CONTENTS
    return ConstantPrefix.of(_ids(tokenizer, _prompts(template.text, contents), add_bos))


def begin_with(
    tokenizer: Any, template: ChatTemplate, add_bos: bool, tokens: Sequence[int], names: Sequence[str]
) -> ChatTemplate | None:
    """A template that begins with control tokens in place of the first tokens of every prompt.

    Args:
        tokens: ids that every prompt begins with; names: texts of the control tokens that stand in for them.

    Returns:
        the template, for a runtime that adds no BOS; None where the rest would be tokenized in another way.
    """
    own = list(tokens[1:]) if add_bos else list(tokens)
    removed = tokenizer.decode(own, skip_special_tokens=False, clean_up_tokenization_spaces=False) if own else ""
    contents = _contents(tokenizer)
    prompts = _prompts(template.text, contents)
    rests = [text.removeprefix(removed) for text in prompts]
    wanted = [ids[len(tokens) :] for ids in _ids(tokenizer, prompts, add_bos)]
    if not all(text.startswith(removed) for text in prompts) or _ids(tokenizer, rests, add_bos=False) != wanted:
        return None
    front = "".join(names)
    text = go_template.literal(front) + _without(template.text, removed)
    same = _prompts(text, contents) == [front + rest for rest in rests]
    return ChatTemplate(text, template.end_of_answer, list(template.warnings)) if same else None


def jinja_begin_with(tokenizer: Any, template: str | None, tokens: Sequence[int], names: Sequence[str]) -> str | None:
    """A Jinja chat template whose output begins with control tokens in place of `tokens`, BOS being among them or not.

    Returns:
        None where there is no template, or its output does not begin so.
    """
    if template is None:
        return None
    message = [{"role": "user", "content": "x"}]
    before = str(tokenizer.apply_chat_template(message, chat_template=template, tokenize=False))
    for first in (0, 1):
        own = tokenizer.decode(list(tokens[first:]), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if before.startswith(own):
            kept = "{{- as_it_was[" + str(len(own)) + ":] -}}"
            return "{%- set as_it_was -%}" + template + "{%- endset -%}" + "".join(names) + kept
    return None


def _contents(tokenizer: Any) -> list[str]:
    single = tokenizer.batch_decode([[token] for token in range(len(tokenizer))], clean_up_tokenization_spaces=False)
    return [*CONTENTS, *dict.fromkeys(filter(None, single))]


def _prompts(template: str, contents: Sequence[str]) -> list[str]:
    if NO_CHAT in template:
        return [go_template.render(template, {"Prompt": content}) for content in contents]
    return [go_template.chat(template, messages) for messages in _conversations(contents)]


def _conversations(contents: Sequence[str]) -> Iterator[list[Mapping[str, str]]]:
    for content in contents:
        user, answer = {"role": "user", "content": content}, {"role": "assistant", "content": content}
        system = {"role": "system", "content": content}
        yield [user]
        yield [system, user]
        if content in CONTENTS:
            yield [user, answer, user]
            yield [system, user, answer, user]


def _ids(tokenizer: Any, texts: Sequence[str], add_bos: bool) -> list[list[int]]:
    front = [tokenizer.bos_token_id] if add_bos else []
    return [[*front, *ids] for ids in tokenizer(list(texts), add_special_tokens=False).input_ids]


def _without(template: str, removed: str) -> str:
    """The template without a text at the beginning of whatever it renders; checked by rendering it."""
    opening = _IF.match(template)
    if opening is None:
        return template.removeprefix(removed)
    head, body = template[: opening.end()], template[opening.end() :]
    parts = _ELSE.split(body, maxsplit=1)
    middle = _ELSE.search(body)
    return head + (middle[0] if middle else "").join(part.removeprefix(removed) for part in parts)
