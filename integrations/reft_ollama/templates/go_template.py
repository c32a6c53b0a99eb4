"""The part of Go's text/template language that exported TEMPLATEs use, rendered as Ollama renders them.

Actions: an expression; `$name := …` and `$name = …`; `range $index, $item := …` and `range …`; `if`, `else if`, `else`,
`end`. Expressions: `.Field`, `$.Field`, `$name`, literals, parentheses, and the functions and, or, not, eq, ne, len and
slice. No pipelines and no trim markers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from reft_ollama.templates.go_interpreter import Rendering

_ACTION = re.compile(r"\{\{\s*(.*?)\s*\}\}", re.DOTALL)
_QUOTED = re.compile(r"(\{\{+|\{$|\"{3})")


def render(template: str, values: Mapping[str, Any]) -> str:
    """Render a template; a missing field is empty.

    Raises:
        ValueError: on anything outside the subset.
    """
    return Rendering(_parts(template), values).output()


@lru_cache(maxsize=64)
def _parts(template: str) -> tuple[str, ...]:
    return tuple(_ACTION.split(template))


def chat(template: str, messages: Sequence[Mapping[str, str]], think: bool | None = None) -> str:
    """What Ollama sends to the model for a conversation of `{"role", "content"}` messages.

    Neighbouring messages of one role become one; `.System` is all system messages, wherever they stand.

    Args:
        think: the request's field, None where it has none.
    """
    turns: list[dict[str, str]] = []
    for message in messages:
        if turns and turns[-1]["Role"] == message["role"]:
            turns[-1]["Content"] += "\n\n" + message["content"]
        else:
            turns.append({"Role": message["role"], "Content": message["content"]})
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    values = {"System": system, "Messages": turns, "Think": bool(think), "IsThinkSet": think is not None}
    return render(template, values)


def literal(text: str) -> str:
    """Text as it stands in a template: what would open an action is quoted, and what a Modelfile would not keep.

    Ollama's Modelfile drops characters that are not printable, joiners and spaces beyond ASCII among them.
    """
    pieces = _QUOTED.split(text)
    plain = ("".join(c if c.isprintable() or c in "\n\r\t" else quoted(c) for c in piece) for piece in pieces[::2])
    return "".join(one + other for one, other in zip(plain, [*map(quoted, pieces[1::2]), ""], strict=True))


def quoted(text: str) -> str:
    """An action that writes a text whatever it holds, in ASCII."""
    return '{{ "' + "".join(map(_escaped, text)) + '" }}'


def _escaped(letter: str) -> str:
    if letter in '"\\':
        return "\\" + letter
    if letter.isascii() and letter.isprintable():
        return letter
    return f"\\u{ord(letter):04x}" if ord(letter) < 0x10000 else f"\\U{ord(letter):08x}"
