"""Export of an adapter to Ollama's files, and the same questions answered by llama.cpp from them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.demo.compare import accuracy
from examples.demo.questions import NEW_TOKENS, Question, ask
from reft_plugins import Runtime, plugins

EXACT = 1e-4
"""Largest difference of a logit that an exact export in float32 may have."""


@dataclass(frozen=True, slots=True)
class Exported:
    """An export and how llama.cpp does with it.

    Attributes:
        result: what the exporter returned.
        on_target: whether the fidelity is as good as its kind should be, on every source of held-out text.
        accuracy: of llama.cpp on the held-out questions; same: share of its answers that equal those of transformers.
    """

    result: Any
    on_target: bool
    accuracy: float
    same: float


def export(
    reference: str, base: str | Path, out: Path, dtype: str, data: Path, asked: Sequence[Question], runtime: Runtime
) -> Exported:
    """Export the adapter, calibrated on the data it was trained on, and let llama.cpp answer `asked`."""
    result = plugins.exporters.get("ollama")(reference, base, out, dtype=dtype, calibration=data)
    answers = _llama_cpp(result.gguf, [question.prompt for question in asked])
    wanted = [answer.text for answer in ask(runtime, asked)]
    return Exported(
        result,
        on_target(result, dtype),
        accuracy(answers, [question.country.answer(question.task or "") for question in asked]),
        accuracy(answers, [text.strip() for text in wanted]),
    )


def on_target(result: Any, dtype: str) -> bool:
    """Whether an export is as good as its kind should be: exact in float32, else on the exporter's own targets."""
    measured = [result.fidelity, *result.sources.values()]
    if result.kind == "exact" and dtype == "f32":
        return all(fidelity.max_logit_difference <= EXACT for fidelity in measured)
    return all(fidelity.on_target for fidelity in measured)


def _llama_cpp(gguf: Path, prompts: Sequence[str]) -> list[str]:
    """Greedy answers of llama.cpp, which tokenizes the prompts with what is in the file."""
    from llama_cpp import Llama

    model = Llama(str(gguf), n_ctx=256, n_threads=min(2, os.cpu_count() or 1), verbose=False)
    try:
        greedy: dict[str, Any] = {"max_tokens": NEW_TOKENS, "temperature": 0.0, "repeat_penalty": 1.0}
        answers: list[Any] = [model.create_completion(prompt, **greedy) for prompt in prompts]
        return [answer["choices"][0]["text"] for answer in answers]
    finally:
        model.close()
