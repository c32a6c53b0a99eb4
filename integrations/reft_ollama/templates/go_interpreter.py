"""An interpreter for the part of Go's text/template language that exported TEMPLATEs use."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

_TOKEN = re.compile(r'\s*("(?:[^"\\]|\\.)*"|\$?\.\w+|\$\w*|\w+|[()])')
_ASSIGNMENT = re.compile(r"(\$\w+)\s*:?=\s*(.*)", re.DOTALL)
_ESCAPE = re.compile(r'\\(?:u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(["\\nrt]))')
_LETTERS = {"n": "\n", "r": "\r", "t": "\t"}

FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "and": lambda *values: next((value for value in values if not value), values[-1]),
    "or": lambda *values: next((value for value in values if value), values[-1]),
    "not": lambda value: not value,
    "eq": lambda one, *others: any(one == other for other in others),
    "ne": lambda one, other: one != other,
    "len": len,
    "slice": lambda values, start: values[start:],
}


@dataclass(slots=True)
class Rendering:
    """`parts` are pieces of text and actions in turn; `position` is that of the next piece of text."""

    parts: Sequence[str]
    root: Mapping[str, Any]
    position: int = 0
    variables: dict[str, Any] = field(default_factory=lambda: {"true": True, "false": False})

    def output(self) -> str:
        """The rendered text.

        Raises:
            ValueError: on anything outside the subset.
        """
        text = self._block(self.root, True)
        if self.position < len(self.parts):
            raise ValueError(f"unexpected {{{{ {self.parts[self.position]} }}}}")
        return text

    def _block(self, dot: Any, active: bool) -> str:
        """Render up to the `else` or `end` that closes the block, which becomes the position."""
        output = self.parts[self.position] if active else ""
        self.position += 1
        while self.position < len(self.parts):
            action = self.parts[self.position]
            word, _, rest = action.partition(" ")
            if word in ("else", "end"):
                break
            if word == "if":
                text = self._branches(dot, active)
            elif word == "range":
                text = self._repeat(rest, dot, active)
            else:
                text = self._write(action, dot, active)
                self.position += 1
            output += (text + self.parts[self.position]) if active else ""
            self.position += 1
        return output

    def _branches(self, dot: Any, active: bool) -> str:
        chosen, output = False, ""
        while (action := self._here("if")) != "end":
            condition = action.removeprefix("else").strip().removeprefix("if").strip()
            take = active and not chosen and (not condition or bool(self._value(condition, dot)))
            self.position += 1
            output += self._block(dot, take)
            chosen = chosen or take
        self.position += 1
        return output

    def _repeat(self, head: str, dot: Any, active: bool) -> str:
        names, _, source = head.rpartition(":=")
        start, output = self.position + 1, ""
        items = (self._value(source.strip(), dot) or []) if active else []
        for index, item in enumerate(items):
            given = [name.strip() for name in names.split(",")] if names else []
            values = [item] if len(given) == 1 else [index, item]
            self.variables.update(zip(given, values, strict=False))
            self.position = start
            output += self._block(item, True)
        if not items:
            self.position = start
            self._block(dot, False)
        if self._here("range") != "end":
            raise ValueError("a range has no end, or an else")
        self.position += 1
        return output

    def _write(self, action: str, dot: Any, active: bool) -> str:
        assigned = _ASSIGNMENT.fullmatch(action)
        expression = assigned[2] if assigned else action
        if not active:
            _tokens(expression)
            return ""
        value = self._value(expression, dot)
        if assigned:
            self.variables[assigned[1]] = value
            return ""
        return str(value).lower() if isinstance(value, bool) else str(value)

    def _value(self, expression: str, dot: Any) -> Any:
        tokens = list(_tokens(expression))
        value, rest = self._call(tokens, dot)
        if rest:
            raise ValueError(f"expression {expression!r} is outside the subset")
        return value

    def _call(self, tokens: list[str], dot: Any) -> tuple[Any, list[str]]:
        """An operand, or a function with its operands, up to a closing parenthesis."""
        function = FUNCTIONS.get(tokens[0]) if tokens else None
        if function is None:
            return self._operand(tokens, dot)
        operands, rest = [], tokens[1:]
        while rest and rest[0] != ")":
            operand, rest = self._operand(rest, dot)
            operands.append(operand)
        try:
            return function(*operands), rest
        except (TypeError, IndexError):
            raise ValueError(f"{tokens[0]} does not take {len(operands)} such operands") from None

    def _operand(self, tokens: list[str], dot: Any) -> tuple[Any, list[str]]:
        token, *rest = tokens or [""]
        if token == "(":
            value, rest = self._call(rest, dot)
            if rest[:1] != [")"]:
                raise ValueError("a parenthesis is not closed")
            return value, rest[1:]
        return self._single(token, dot), rest

    def _single(self, token: str, dot: Any) -> Any:
        if token.startswith(("$.", ".")):
            fields = self.root if token.startswith("$") else dot
            return fields.get(token.lstrip("$."), "")
        if token.startswith('"'):
            return _ESCAPE.sub(_unescaped, token[1:-1])
        if token in self.variables:
            return self.variables[token]
        if token.isdecimal():
            return int(token)
        raise ValueError(f"{token!r} is outside the subset")

    def _here(self, word: str) -> str:
        if self.position >= len(self.parts):
            raise ValueError(f"an {word} has no end")
        return self.parts[self.position]


@lru_cache(maxsize=1024)
def _tokens(expression: str) -> tuple[str, ...]:
    found, position = [], 0
    while position < len(expression):
        token = _TOKEN.match(expression, position)
        if token is None:
            raise ValueError(f"action {{{{ {expression} }}}} is outside the subset")
        found.append(token[1])
        position = token.end()
    return tuple(found)


def _unescaped(found: re.Match[str]) -> str:
    if found[3]:
        return _LETTERS.get(found[3], found[3])
    return chr(int(found[1] or found[2], 16))
