"""The reference runtime: a transformers model in eager PyTorch, one adapter per row of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from reft_plugins.adapter import Adapter
from reft_plugins.base_model import attention_implementation, identify, locate
from reft_plugins.program import Program
from reft_plugins.runtimes import Generation, Prompt, admit, one_per_prompt
from reft_transformers.executor import Executor
from reft_transformers.nodes import on_device


class TransformersRuntime:
    """See `reft_plugins.runtimes.Runtime`.

    Args:
        base: folder or hub id.
        dtype: `float32`, `bfloat16` or `float16`; device: as torch names it, by default a GPU if there is one.
        attention: transformers' attention implementation, by default one that computes what the base was trained with.
        allow_base_mismatch: run adapters made for another base model.
    """

    executor = Executor

    def __init__(
        self,
        base: str | Path,
        dtype: str = "float32",
        device: str | None = None,
        attention: str | None = None,
        allow_base_mismatch: bool = False,
    ) -> None:
        self.identity = identify(base)
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        directory = locate(base)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(directory)
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=getattr(torch, dtype),
            attn_implementation=attention or attention_implementation(directory),
        )
        self.model.to(self.device).eval()
        self.stop_tokens = self._stop_tokens()
        # Whatever a GenerationConfig leaves open, transformers fills in from the model's own: sampling, penalties, EOS.
        self.model.generation_config = GenerationConfig()
        self._allow_base_mismatch = allow_base_mismatch
        self._executor = Executor(self.model)

    def logits(
        self, token_ids: list[int], adapter: Adapter | str | Path | None = None, prompt_length: int | None = None
    ) -> npt.NDArray[np.float32]:
        """Next-token logits, float32 `[len(token_ids), vocabulary]`; the whole list is the prompt.

        With `prompt_length` only so many tokens are, and the others count as generated.
        """
        _refuse_empty([token_ids])
        tokens = torch.tensor([list(token_ids)], device=self.device)
        lengths = torch.tensor([tokens.shape[1] if prompt_length is None else prompt_length])
        programs = self._programs([adapter])
        rows = self._executor.widen(programs, tokens)
        with torch.inference_mode(), self._executor.run(programs, lengths):
            logits: torch.Tensor = self.model(input_ids=rows.input_ids, use_cache=False).logits
        result: npt.NDArray[np.float32] = logits[0, rows.extra :].float().cpu().numpy()
        return result

    def generate(
        self,
        prompts: Sequence[Prompt],
        adapters: Sequence[Adapter | str | Path | None] | None = None,
        max_new_tokens: int = 16,
        temperature: float = 0.0,
        ignore_eos: bool = False,
    ) -> list[Generation]:
        """Answer all prompts in one left-padded batch with a KV cache, each row under its own adapter."""
        if not prompts:
            return []
        rows = [self.tokenizer(p).input_ids if isinstance(p, str) else list(p) for p in prompts]
        _refuse_empty(rows)
        programs = self._programs(one_per_prompt(prompts, adapters))
        stops = self.stop_tokens
        fill = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else (stops[0] if stops else 0)
        width = max(map(len, rows))
        tokens = torch.tensor([[fill] * (width - len(row)) + row for row in rows], device=self.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=self.device)
        settings = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=temperature > 0,
            eos_token_id=None if ignore_eos else stops or None,
            pad_token_id=fill,
            **({"temperature": temperature, "top_k": 0} if temperature > 0 else {}),
        )
        lengths = torch.tensor([len(row) for row in rows])
        wide = self._executor.widen(programs, tokens, mask)
        with torch.inference_mode(), self._executor.run(programs, lengths):
            output = self.model.generate(
                input_ids=wide.input_ids, attention_mask=wide.attention_mask, generation_config=settings
            )
        start = width + wide.extra
        return [self._generation(row, [] if ignore_eos else stops) for row in output[:, start:].tolist()]

    def close(self) -> None:
        """Drop the model."""
        self.model = self._executor = None  # type: ignore[assignment]

    def _programs(self, adapters: Sequence[Adapter | str | Path | None]) -> list[Program | None]:
        """The program of each adapter; rows with the same adapter get the same object and run together."""
        loaded: dict[object, Program] = {}
        programs: list[Program | None] = []
        for adapter in adapters:
            key = adapter.digest if isinstance(adapter, Adapter) else adapter
            if key not in loaded and (admitted := admit(adapter, self.identity, self._allow_base_mismatch)) is not None:
                loaded[key] = on_device(admitted.lower(), self.device)
            programs.append(loaded.get(key))
        return programs

    def _stop_tokens(self) -> list[int]:
        configured = self.model.generation_config.eos_token_id
        if configured is None:
            configured = self.tokenizer.eos_token_id
        return [configured] if isinstance(configured, int) else list(configured or [])

    def _generation(self, tokens: list[int], stops: list[int]) -> Generation:
        """Cut a row after its first stop token; what follows is padding."""
        end = next((index + 1 for index, token in enumerate(tokens) if token in stops), len(tokens))
        return Generation(tokens[:end], self.tokenizer.decode(tokens[:end], skip_special_tokens=True))


def _refuse_empty(rows: Sequence[Sequence[int]]) -> None:
    for index, row in enumerate(rows):
        if not len(row):
            raise ValueError(f"prompt {index} has no tokens")
