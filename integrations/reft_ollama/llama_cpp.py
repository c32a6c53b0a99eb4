"""Running an exported file in llama.cpp through llama-cpp-python, to check it against the transformers runtime."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
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
        gguf: path of the file; lora: path of a LoRA file to apply to it; context: tokens that fit.
        exact_cache: keep keys and values in float32, so that only rounding in the file remains; Ollama uses float16.

    Raises:
        ReftError: llama-cpp-python is missing, or llama.cpp refuses the file.
    """

    def __init__(
        self, gguf: Path | str, context: int = 512, exact_cache: bool = True, lora: Path | str | None = None
    ) -> None:
        try:
            from llama_cpp import Llama
        except ImportError:
            raise ReftError("checking a GGUF file needs llama.cpp: pip install llama-cpp-python") from None
        cache: dict[str, Any] = {"type_k": 0, "type_v": 0} if exact_cache else {}
        try:
            self._model: Any = Llama(
                str(gguf),
                n_ctx=context,
                n_batch=context,
                logits_all=True,
                flash_attn=False,
                verbose=False,
                lora_path=None if lora is None else str(lora),
                **cache,
            )
        except (ValueError, RuntimeError) as error:
            raise ReftError(f"{gguf}: llama.cpp refuses the file: {error}") from None
        # The Python package takes a LoRA file that could not be read for one that does nothing.
        if lora is not None and not self._model._lora_adapter:
            self._model.close()
            raise ReftError(f"{lora}: llama.cpp refuses the LoRA file; it fits another base model than {gguf}")

    def steer(self, control_vector: Path | str) -> None:
        """Add the vectors of a control vector file to the outputs of its layers from now on, as `llama-cli` does.

        Raises:
            ReftError: llama.cpp refuses it.
        """
        import ctypes

        from gguf import GGUFReader
        from llama_cpp import llama_cpp

        found = {int(t.name.removeprefix("direction.")): t.data for t in GGUFReader(control_vector).tensors}
        size, last = self._model.n_embd(), max(found)
        # The buffer begins with layer 1.
        buffer = np.zeros((last, size), np.float32)
        for layer, direction in found.items():
            buffer[layer - 1] = direction
        data = buffer.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        if llama_cpp.llama_set_adapter_cvec(self._model.ctx, data, buffer.size, size, 1, last) != 0:
            raise ReftError(f"{control_vector}: llama.cpp refuses the control vector")

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
        end = self._model.token_eos()
        answer = self.greedy(tokens, max_new_tokens, (end,))
        answer = answer[:-1] if answer[-1:] == [end] else answer
        return answer, self._model.detokenize(answer, prev_tokens=tokens).decode("utf-8", errors="replace")

    def greedy(self, token_ids: Sequence[int], max_new_tokens: int, stops: Collection[int]) -> list[int]:
        """Greedy answer up to the first of some stop tokens, which is its last token then."""
        self._model.reset()
        answer: list[int] = []
        for token in self._model.generate(list(token_ids), temp=0.0, repeat_penalty=1.0):
            answer.append(int(token))
            if token in stops or len(answer) == max_new_tokens:
                break
        return answer

    def close(self) -> None:
        """Free the model."""
        self._model.close()


def compare_llama_cpp(
    gguf: Path | str,
    token_ids: Sequence[Sequence[int]],
    reference: Callable[[list[int]], Logits],
    base: Callable[[list[int]], Logits] | None = None,
    exact_cache: bool = True,
    in_front: Sequence[int] = (),
) -> Fidelity:
    """Compare an exported file, as llama.cpp runs it, with a reference.

    Args:
        token_ids: texts; reference: their logits `[tokens, vocabulary]`, for example
            `lambda ids: runtime.logits(ids, adapter)`.
        base: logits without the adapter, to tell how much of its effect the file has.
        in_front: ids of the file's virtual tokens, put in front of every text.

    Raises:
        ReftError: see `LlamaCppModel`.
    """
    front = list(in_front)
    model = LlamaCppModel(gguf, context=len(front) + max(map(len, token_ids)) + 1, exact_cache=exact_cache)
    accumulator = Accumulator()
    try:
        for tokens in map(list, token_ids):
            wanted = reference(tokens)
            got = model.logits([*front, *tokens])[len(front) :, : wanted.shape[1]]
            accumulator.add(wanted, got, None if base is None else base(tokens))
    finally:
        model.close()
    return accumulator.result()
