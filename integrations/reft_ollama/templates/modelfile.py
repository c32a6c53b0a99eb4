"""Ollama's Modelfile: which file, how a chat becomes a prompt, and how answers are drawn and stopped."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reft_ollama.templates.chat_template import ChatTemplate
from reft_plugins.errors import ExportError

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

LICENSE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md")


@dataclass(slots=True)
class Modelfile:
    """Contents of a Modelfile.

    Attributes:
        source: name of the GGUF file beside it; template: Go template; parameters: Ollama's, `stop` being a list.
        license: text, None if the base model has none; comments: lines at the top.
    """

    source: str
    template: str
    parameters: dict[str, Any] = field(default_factory=dict)
    license: str | None = None
    comments: list[str] = field(default_factory=list)

    def text(self) -> str:
        """The file.

        Raises:
            ExportError: a text that a Modelfile cannot quote.
        """
        lines = [*(f"# {line}".rstrip() for line in self.comments), f"FROM ./{self.source}"]
        lines.append(f"TEMPLATE {_quoted(self.template)}")
        for name, value in self.parameters.items():
            for item in value if isinstance(value, list) else [value]:
                lines.append(f'PARAMETER {name} "{item}"' if isinstance(item, str) else f"PARAMETER {name} {item}")
        if self.license is not None:
            lines.append(f"LICENSE {_quoted(self.license)}")
        return "\n".join(lines) + "\n"


def make_parameters(
    tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig, template: ChatTemplate
) -> dict[str, Any]:
    """Sampling as transformers would do it by default, and the texts that end an answer.

    Without `do_sample` transformers is greedy, so temperature is 0. Ollama's own defaults (0.8, a repeat penalty) apply
    to nothing that is set here.
    """
    sampled = bool(generation.do_sample)
    parameters: dict[str, Any] = {"temperature": _number(generation.temperature, 1.0) if sampled else 0}
    if sampled:
        parameters["top_k"] = int(_number(generation.top_k, 0))
        parameters["top_p"] = _number(generation.top_p, 1.0)
    parameters["repeat_penalty"] = _number(generation.repetition_penalty, 1.0)
    parameters["stop"] = _stops(tokenizer, generation, template)
    return {name: value for name, value in parameters.items() if value != []}


def find_license(directory: Path) -> str | None:
    """The base model's license text, if its folder has one."""
    for name in LICENSE_FILES:
        if (directory / name).is_file():
            return (directory / name).read_text("utf-8", errors="replace").strip()
    return None


def _stops(tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig, template: ChatTemplate) -> list[str]:
    ends = generation.eos_token_id
    ids: Sequence[int | None] = [*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id]
    stops = [tokenizer.convert_ids_to_tokens(token) for token in ids if token is not None]
    after = template.end_of_answer.lstrip()
    stops += [token for token in tokenizer.all_special_tokens if after.startswith(token)]
    unquotable = re.compile(r'["\n\\]')
    return [stop for stop in dict.fromkeys(stops) if isinstance(stop, str) and not unquotable.search(stop)]


def _number(value: float | None, default: float) -> float:
    return default if value is None else value


def _quoted(text: str) -> str:
    if '"""' in text:
        raise ExportError('a Modelfile cannot hold text with """ in it (chat template or license of the base model)')
    return f'"""{text}"""'
