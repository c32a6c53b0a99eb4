"""Running an exported file in llama.cpp through llama-cpp-python, to check it against the transformers runtime."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from reft_plugins.errors import ReftError
from reft_plugins.fidelity.comparison import Accumulator, Fidelity

Logits = npt.NDArray[np.float32]


class LlamaCppModel:
    """A GGUF file loaded by llama.cpp on the CPU.

    Args:
        gguf: path of the file; context: tokens that fit.
        exact_cache: keep keys and values in float32, so that only rounding in the file remains; Ollama uses float16.

    Raises:
        ReftError: llama-cpp-python is missing, or llama.cpp refuses the file.
    """

    def __init__(self, gguf: Path | str, context: int = 512, exact_cache: bool = True) -> None:
        try:
            from llama_cpp import Llama
        except ImportError:
            raise ReftError("checking a GGUF file needs llama.cpp: pip install llama-cpp-python") from None
        cache: dict[str, Any] = {"type_k": 0, "type_v": 0} if exact_cache else {}
        try:
            self._model: Any = Llama(
                str(gguf), n_ctx=context, n_batch=context, logits_all=True, flash_attn=False, verbose=False, **cache
            )
        except ValueError as error:
            raise ReftError(f"{gguf}: llama.cpp refuses the file: {error}") from None

    def logits(self, token_ids: Sequence[int]) -> Logits:
        """Next-token logits, float32 `[len(token_ids), vocabulary]`."""
        self._model.reset()
        self._model.eval(list(token_ids))
        result: Logits = self._model.scores[: len(token_ids)].copy()
        return result

    def tokenize(self, text: str) -> list[int]:
        """Token ids with what the file adds around a text; special tokens in it are recognised, as Ollama does."""
        tokens: list[int] = self._model.tokenize(text.encode("utf-8"), add_bos=True, special=True)
        return tokens

    def generate(self, prompt: str | Sequence[int], max_new_tokens: int = 16) -> tuple[list[int], str]:
        """Greedy answer: the new tokens without the final end-of-text token, and their text."""
        tokens = self.tokenize(prompt) if isinstance(prompt, str) else list(prompt)
        self._model.reset()
        answer: list[int] = []
        for token in self._model.generate(tokens, temp=0.0, repeat_penalty=1.0):
            if token == self._model.token_eos() or len(answer) == max_new_tokens:
                break
            answer.append(int(token))
        return answer, self._model.detokenize(answer, prev_tokens=tokens).decode("utf-8", errors="replace")

    def close(self) -> None:
        """Free the model."""
        self._model.close()


def compare_llama_cpp(
    gguf: Path | str,
    token_ids: Sequence[Sequence[int]],
    reference: Callable[[list[int]], Logits],
    base: Callable[[list[int]], Logits] | None = None,
    exact_cache: bool = True,
) -> Fidelity:
    """Compare an exported file, as llama.cpp runs it, with a reference.

    Args:
        token_ids: texts; reference: their logits `[tokens, vocabulary]`, for example
            `lambda ids: runtime.logits(ids, adapter)`.
        base: logits without the adapter, to tell how much of its effect the file has.

    Raises:
        ReftError: see `LlamaCppModel`.
    """
    model = LlamaCppModel(gguf, context=max(map(len, token_ids)) + 1, exact_cache=exact_cache)
    accumulator = Accumulator()
    try:
        for tokens in map(list, token_ids):
            wanted = reference(tokens)
            accumulator.add(wanted, model.logits(tokens)[:, : wanted.shape[1]], None if base is None else base(tokens))
    finally:
        model.close()
    return accumulator.result()
