"""Measuring every file of an export: those written directly by their parameters, quantised ones in llama.cpp."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from reft_ollama.llama_cpp import LlamaCppModel, Logits
from reft_plugins.errors import ExportError
from reft_plugins.fidelity.evaluation import Evaluation, Evaluator
from reft_plugins.fidelity.texts import MAX_LENGTH


class LlamaCppStudent:
    """A GGUF file as `Evaluator.student` wants it.

    Args:
        model: the file in llama.cpp; in_front: ids of its virtual tokens.
    """

    def __init__(self, model: LlamaCppModel, in_front: Sequence[int] = ()) -> None:
        self._model, self._in_front = model, list(in_front)

    def logits(self, token_ids: list[int]) -> Logits:
        """Of the text's own tokens, float32 `[len(token_ids), vocabulary]`."""
        return self._model.logits([*self._in_front, *token_ids])[len(self._in_front) :]

    def generate(self, prompt: list[int], max_new_tokens: int, stops: Collection[int]) -> list[int]:
        """Greedy answer, with the stop token it ends at."""
        return self._model.greedy([*self._in_front, *prompt], max_new_tokens, stops)


def measure_file(gguf: Path, evaluator: Evaluator, in_front: Sequence[int] = ()) -> Evaluation:
    """Run a file in llama.cpp, with its cache in float32, against what an evaluator keeps of the adapter.

    Raises:
        ReftError: llama.cpp refuses the file.
    """
    model = LlamaCppModel(gguf, context=2 * MAX_LENGTH + len(in_front))
    try:
        student = LlamaCppStudent(model, in_front)
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
    fidelity = evaluation.fidelity
    if fidelity.top1_agreement >= min_top1:
        return
    ways = (
        "Choose a larger number format (--dtype)"
        if exact
        else "Serve the adapter with vLLM (reft serve), which runs it as it is; calibrate on text of its task "
        "(--calibration); polish the fit (--distill)"
    )
    raise ExportError(
        f"{dtype}: the exported model would choose another token than the adapter in "
        f"{1 - fidelity.top1_agreement:.1%} of {fidelity.tokens} held-out predictions (top-1 agreement "
        f"{fidelity.top1_agreement:.3f}, at least {min_top1} is asked for; mean KL {fidelity.mean_kl:.4f} nats). "
        f"Nothing was written. {ways}; or write it nevertheless with --force"
    )
