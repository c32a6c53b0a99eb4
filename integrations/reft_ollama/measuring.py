"""Measuring every file of an export: those written directly by their parameters, quantised ones in llama.cpp."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from reft_ollama.llama_cpp import LlamaCppModel, Logits
from reft_plugins.fidelity.evaluation import Evaluation, Evaluator
from reft_plugins.fidelity.front import Front
from reft_plugins.fidelity.texts import MAX_LENGTH
from reft_plugins.fidelity.threshold import require_top1


class LlamaCppStudent:
    """A GGUF file as `Evaluator.student` wants it.

    Args:
        model: the file in llama.cpp; front: what it reads at the beginning of a text.
    """

    def __init__(self, model: LlamaCppModel, front: Front) -> None:
        self._model, self._front = model, front

    def logits(self, token_ids: list[int]) -> Logits:
        """Of the text's own tokens, float32 `[len(token_ids), vocabulary]`."""
        return self._model.logits(self._front(token_ids))[self._front.added :]

    def generate(self, prompt: list[int], max_new_tokens: int, stops: Collection[int]) -> list[int]:
        """Greedy answer, with the stop token it ends at."""
        return self._model.greedy(self._front(prompt), max_new_tokens, stops)


def measure_file(gguf: Path, evaluator: Evaluator, front: Front) -> Evaluation:
    """Run a file in llama.cpp, with its cache in float32, against what an evaluator keeps of the adapter.

    Raises:
        ReftError: llama.cpp refuses the file.
    """
    model = LlamaCppModel(gguf, context=2 * MAX_LENGTH + len(front.ids))
    try:
        student = LlamaCppStudent(model, front)
        return evaluator.student(student.logits, student.generate)
    finally:
        model.close()


def check_fidelity(evaluation: Evaluation, dtype: str, min_top1: float, exact: bool) -> None:
    """Refuse what is not faithful enough.

    Args:
        exact: whether only the number format stands between export and adapter.

    Raises:
        ExportError: with the numbers and the ways out.
    """
    ways = (
        "Choose a larger number format (--dtype)"
        if exact
        else "Serve the adapter with vLLM (reft serve), which runs it as it is; calibrate on text of its task "
        "(--calibration); polish the fit (--distill)"
    )
    require_top1(evaluation, f"{dtype}: the exported model", min_top1, ways)
