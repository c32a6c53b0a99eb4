"""The part of Go's text/template language that exported TEMPLATEs use, rendered as Ollama renders them.

Actions: `{{ .Field }}`, `{{ "literal" }}`, `{{ range .Field }}`, `{{ if .Field }}`, `{{ if eq .Field "literal" }}`,
`{{ else if … }}`, `{{ else }}`, `{{ end }}`. No variables, functions or trim markers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

_ACTION = re.compile(r"\{\{\s*(.*?)\s*\}\}", re.DOTALL)
_CONDITION = re.compile(r'eq \.(\w+) ("(?:[^"\\]|\\.)*")|\.(\w+)')


def render(template: str, values: Mapping[str, Any]) -> str:
    """Render a template; a missing field is empty.

    Raises:
        ValueError: on anything outside the subset.
    """
    parts = _ACTION.split(template)
    output, rest = _block(parts, 0, values)
    if rest != len(parts):
        raise ValueError(f"unexpected {{{{ {parts[rest]} }}}}")
    return output


def literal(text: str) -> str:
    """Text as it stands in a template; braces that would open an action are quoted."""
    return text.replace("{{", '{{ "{{" }}')


def chat(template: str, messages: Sequence[Mapping[str, str]]) -> str:
    """What Ollama sends to the model for a conversation of `{"role", "content"}` messages (alternating roles)."""
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    turns = [{"Role": message["role"], "Content": message["content"]} for message in messages]
    return render(template, {"System": system, "Messages": turns})


def _block(parts: Sequence[str], position: int, values: Mapping[str, Any], active: bool = True) -> tuple[str, int]:
    """Render from a piece of text up to the `else` or `end` that closes the block; returns its position."""
    output = parts[position] if active else ""
    position += 1
    while position < len(parts):
        action = parts[position]
        if action == "end" or action.startswith("else"):
            return output, position
        if action.startswith("if "):
            text, position = _branches(parts, position, values, active)
        elif action.startswith("range ."):
            text, position = _range(parts, position, values, active)
        elif action.startswith('"'):
            text = json.loads(action)
        elif re.fullmatch(r"\.\w+", action):
            text = str(values.get(action[1:], ""))
        else:
            raise ValueError(f"action {{{{ {action} }}}} is outside the subset")
        output += (text if active else "") + (parts[position + 1] if active else "")
        position += 2
    return output, position


def _branches(parts: Sequence[str], position: int, values: Mapping[str, Any], active: bool) -> tuple[str, int]:
    chosen, output = False, ""
    while parts[position] != "end":
        condition = parts[position].removeprefix("else").strip().removeprefix("if").strip()
        take = active and not chosen and (not condition or _holds(condition, values))
        text, position = _block(parts, position + 1, values, take)
        chosen, output = chosen or take, output + text
        if position >= len(parts):
            raise ValueError("an if has no end")
    return output, position


def _range(parts: Sequence[str], position: int, values: Mapping[str, Any], active: bool) -> tuple[str, int]:
    items = values.get(parts[position].removeprefix("range .").strip(), []) if active else []
    output, end = "", _block(parts, position + 1, {}, False)[1]
    for item in items:
        output += _block(parts, position + 1, item)[0]
    if end >= len(parts) or parts[end] != "end":
        raise ValueError("a range has no end")
    return output, end


def _holds(condition: str, values: Mapping[str, Any]) -> bool:
    match = _CONDITION.fullmatch(condition)
    if match is None:
        raise ValueError(f"condition {condition!r} is outside the subset")
    if match[3]:
        return bool(values.get(match[3]))
    return bool(values.get(match[1], "") == json.loads(match[2]))
