"""Reading a Modelfile as Ollama does: a state per kind of place, one character at a time.

Instructions stand at the beginning of a line, in any case; `#` begins a comment; a value ends with its line, or, where
it begins with one or three quotes, with the first line that ends with them. White space around a value is dropped, and
so are characters that are not printable. There are no escapes.
"""

from __future__ import annotations

from enum import Enum, auto

INSTRUCTIONS = {"from", "license", "template", "system", "adapter", "parameter", "message"}


class State(Enum):
    """Where in the file a character stands."""

    LINE = auto()
    COMMENT = auto()
    NAME = auto()
    PARAMETER = auto()
    VALUE = auto()


def read(text: str) -> list[tuple[str, str]]:
    """Instructions and values, `(parameter name, value)` for parameters.

    Raises:
        ValueError: where Ollama refuses the file.
    """
    found: list[tuple[str, str]] = []
    state, name, buffer = State.LINE, "", ""
    for letter in text:
        ends, blank = letter in "\r\n", letter in " \t"
        if state is State.LINE:
            if letter == "#":
                state = State.COMMENT
            elif not (ends or blank):
                state, buffer = State.NAME, letter
        elif state is State.COMMENT:
            state = State.LINE if ends else state
        elif state is State.NAME and blank:
            if (name := buffer.lower()) not in INSTRUCTIONS:
                raise ValueError(f"unknown instruction {name}")
            state, buffer = (State.PARAMETER if name == "parameter" else State.VALUE), ""
        elif state is State.PARAMETER and blank:
            state, name, buffer = State.VALUE, buffer, ""
        elif state is State.VALUE and ends and (value := unquote(buffer.strip())) is not None:
            found.append((name, value))
            state, buffer = State.LINE, ""
        elif (state is State.VALUE and (ends or blank)) or letter.isprintable():
            buffer += letter
    if state is State.VALUE:
        value = unquote(buffer.strip())
        if value is None:
            raise ValueError("unexpected end of the file")
        found.append((name, value))
    elif state in (State.NAME, State.PARAMETER):
        raise ValueError("unexpected end of the file")
    if "from" not in dict(found):
        raise ValueError("no FROM line")
    return found


def unquote(text: str) -> str | None:
    """A value without its quotes; None where they are not closed."""
    if text[:3] == '"""':
        return text[3:-3] if len(text) >= 6 and text[-3:] == '"""' else None
    if text[:1] == '"':
        return text[1:-1] if len(text) >= 2 and text[-1] == '"' else None
    return text
