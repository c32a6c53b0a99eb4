"""The fixed text around messages, seen from what a chat template makes of marked ones."""

from __future__ import annotations

from dataclasses import dataclass

from reft_ollama.templates.jinja import Jinja, assistant, system, user

_SYSTEM, _FIRST, _ANSWER, _SECOND = "⟦S⟧", "⟦U1⟧", "⟦A1⟧", "⟦U2⟧"


@dataclass(frozen=True, slots=True)
class Parts:
    """Text in front of the first message, between a message and its answer, behind an answer, and at the end.

    Attributes:
        no_thinking: what follows at the end where thinking is switched off, "" if nothing.
    """

    opening: str
    before_answer: str
    after_answer: str
    ending: str
    no_thinking: str = ""


@dataclass(frozen=True, slots=True)
class InFirstTurn:
    """A system message stands at the beginning: between `before` and `between`, in place of the opening."""

    before: str
    between: str


@dataclass(frozen=True, slots=True)
class InLastTurn:
    """A system message stands in front of the last user message, with `before` and `between` around it."""

    before: str
    between: str


@dataclass(frozen=True, slots=True)
class Refused:
    """The format has no system messages."""


SystemPlace = InFirstTurn | InLastTurn | Refused


def find_parts(jinja: Jinja) -> Parts | None:
    """The parts of a format; None if it does not have these."""
    single = _around(jinja.render([user(_FIRST)]), _FIRST)
    double = _around(jinja.render([user(_FIRST), assistant(_ANSWER), user(_SECOND)]), _FIRST, _ANSWER, _SECOND)
    if single is None or double is None or (single[0], single[1]) != (double[0], double[3]):
        return None
    quiet = _around(jinja.render([user(_FIRST)], enable_thinking=False), _FIRST)
    no_thinking = ""
    if quiet is not None and quiet[0] == single[0] and quiet[1].startswith(single[1]):
        no_thinking = quiet[1].removeprefix(single[1])
    opening, before_answer, after_answer, ending = double
    return Parts(opening, before_answer, after_answer, ending, no_thinking)


def find_system(jinja: Jinja, parts: Parts) -> SystemPlace | None:
    """Where a system message goes; None if the format drops it or does something else with it."""
    marked = system(_SYSTEM)
    rendered = jinja.render([marked, user(_FIRST)])
    if rendered is None:
        return Refused()
    single = _around(rendered, _SYSTEM, _FIRST)
    turns = [marked, user(_FIRST), assistant(_ANSWER), user(_SECOND)]
    late = _around(jinja.render(turns), _FIRST, _ANSWER, _SYSTEM, _SECOND)
    if single is None:
        return None
    if late is not None and single[0].startswith(parts.opening):
        before = single[0].removeprefix(parts.opening)
        if late[:3] == [parts.opening, parts.before_answer, parts.after_answer + before] and late[3] == single[1]:
            return InLastTurn(before, single[1])
    return InFirstTurn(single[0], single[1])


def _around(text: str | None, *marks: str) -> list[str] | None:
    """The pieces of text before, between and after the marks; None unless each occurs once and in this order."""
    if text is None or any(text.count(mark) != 1 for mark in marks):
        return None
    pieces = []
    for mark in marks:
        piece, found, text = text.partition(mark)
        if not found:
            return None
        pieces.append(piece)
    return [*pieces, text]
