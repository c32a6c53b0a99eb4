"""Ollama's Modelfile: which file, how a chat becomes a prompt, and how answers are drawn and stopped."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from reft_ollama.templates.chat_template import ChatTemplate
from reft_plugins.errors import ExportError

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase


@dataclass(slots=True)
class Modelfile:
    """Contents of a Modelfile.

    Attributes:
        source: name of the GGUF file beside it; template: Go template; parameters: Ollama's, `stop` being a list.
        system: the system message of conversations without one, None for the template's own.
        licenses: texts, of the base model and of the adapter; comments: lines at the top.
    """

    source: str
    template: str
    parameters: dict[str, Any] = field(default_factory=dict)
    system: str | None = None
    licenses: list[str] = field(default_factory=list)
    comments: list[str] = field(default_factory=list)

    def text(self) -> str:
        """The file.

        Raises:
            ExportError: a text that a Modelfile cannot quote.
        """
        lines = [*(f"# {_one_line(line)}".rstrip() for line in self.comments), f"FROM ./{self.source}"]
        lines.append(f"TEMPLATE {quoted('TEMPLATE', self.template)}")
        if self.system is not None:
            lines.append(f"SYSTEM {quoted('SYSTEM', self.system)}")
        for name, value in self.parameters.items():
            for item in value if isinstance(value, list) else [value]:
                lines.append(f"PARAMETER {name} {quoted(name, item) if isinstance(item, str) else item}")
        lines += [f"LICENSE {quoted('LICENSE', text)}" for text in self.licenses]
        return "\n".join(lines) + "\n"

    def problems(self) -> list[str]:
        """What Ollama will not do with this file, in sentences.

        Raises:
            ExportError: see `text`.
        """
        self.text()
        found = (
            ["TEMPLATE has no place for the SYSTEM message"] if self.system and ".System" not in self.template else []
        )
        for name, text in (("SYSTEM", self.system or ""), ("stop", "".join(self.parameters.get("stop", [])))):
            letters = ", ".join(f"U+{ord(c):04X}" for c in sorted(set(text)) if not _kept(c))
            if letters:
                found.append(f"Ollama drops {letters} from {name} when it reads the Modelfile; --create keeps them")
        return found


def quoted(name: str, text: str) -> str:
    '''A text as it stands behind an instruction, in three quotes, in one, or in none.

    Ollama's Modelfile has no escapes: a value ends with the first line that ends in the quotes it began with.

    Raises:
        ExportError: naming the instruction, where the text has lines that end in """ and in no other way fits.
    '''
    read = "".join(filter(_kept, text))
    quotes = next((quotes for quotes in ('"""', '"', "") if _read(quotes + read + quotes) == read), None)
    if quotes is None:
        raise ExportError(
            f'{name}: a Modelfile cannot hold a text of several lines of which one ends in """. Change that line, for '
            "example by a full stop behind it"
        )
    return quotes + text + quotes


def make_parameters(
    tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig, template: ChatTemplate
) -> dict[str, Any]:
    """Sampling as transformers would do it by default, and the texts that end an answer.

    Without `do_sample` transformers is greedy, so temperature is 0. Ollama's own defaults (0.8, a repeat penalty) apply
    to nothing that is set here. `num_ctx` is left to Ollama, which knows the machine's memory and the model's limit.
    """
    sampled = bool(generation.do_sample)
    parameters: dict[str, Any] = {"temperature": _number(generation.temperature, 1.0) if sampled else 0}
    if sampled:
        parameters["top_k"] = int(_number(generation.top_k, _TOP_K))
        parameters["top_p"] = _number(generation.top_p, 1.0)
        parameters["min_p"] = _number(generation.min_p, 0.0)
    parameters["repeat_penalty"] = _number(generation.repetition_penalty, 1.0)
    parameters["stop"] = _stops(tokenizer, generation, template)
    return {name: value for name, value in parameters.items() if value != []}


_TOP_K = 50
"""What transformers takes where a model says nothing."""


def _stops(tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig, template: ChatTemplate) -> list[str]:
    ends = generation.eos_token_id
    ids: Sequence[int | None] = [*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id]
    stops = [tokenizer.convert_ids_to_tokens(token) for token in ids if token is not None]
    after = template.end_of_answer.lstrip()
    stops += [token for token in tokenizer.all_special_tokens if token and after.startswith(token)]
    return [stop for stop in dict.fromkeys(stops) if isinstance(stop, str) and stop.strip()]


def _number(value: float | None, default: float) -> float:
    return default if value is None else value


def _kept(letter: str) -> bool:
    return letter.isprintable() or letter in "\n\r\t"


def _one_line(text: str) -> str:
    return re.sub(r"[\r\n]+", " ", text)


def _read(form: str) -> str | None:
    """What Ollama reads from a quoted value at the end of a line; None if the value ends before."""
    for end, letter in enumerate(form + "\n"):
        value = _unquoted(form[:end].strip()) if letter in "\r\n" else None
        if value is not None:
            return value if end == len(form) else None
    return None


def _unquoted(text: str) -> str | None:
    for quotes in ('"""', '"'):
        if text.startswith(quotes):
            return text[len(quotes) : -len(quotes)] if len(text) >= 2 * len(quotes) and text.endswith(quotes) else None
    return text
