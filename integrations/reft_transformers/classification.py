"""Classifying texts: a transformers model with a classification head, one adapter per row of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from reft_plugins.adapter import Adapter
from reft_plugins.base_model import attention_implementation, identify, locate
from reft_plugins.classification.models import open_classifier, output_module, stored_labels
from reft_plugins.errors import AdapterError
from reft_plugins.program import Program, WeightDelta
from reft_plugins.runtimes import Classification, Prompt, admit, one_per_prompt
from reft_transformers.executor import Executor
from reft_transformers.nodes import on_device


class TransformersClassifier:
    """A base model that classifies texts, each under its own adapter and into that adapter's labels.

    A text's tokens, special ones included, are what positions of edits count as the prompt: `all`, `f1` (the first
    token, of BERT-like models `[CLS]`), `l1`, `[0,-1]`; nothing is generated.

    Args:
        base: folder or hub id; without an adapter it classifies only if it is a classifier already.
        dtype: `float32`, `bfloat16` or `float16`; device: as torch names it, by default a GPU if there is one.
        attention: transformers' attention implementation, by default one that computes what the base was trained with.
        allow_base_mismatch: run adapters made for another base model.
    """

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
        ends = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        self._fill: int = next(token for token in ends if token is not None)
        self._labels = stored_labels(directory)
        self.model: Any = open_classifier(
            directory,
            self._labels or ("0", "1"),
            self._fill,
            dtype=getattr(torch, dtype),
            attn_implementation=attention or attention_implementation(directory),
        )
        self.model.to(self.device).eval()
        self._output = output_module(self.model)
        self._allow_base_mismatch = allow_base_mismatch
        self._executor = Executor(self.model)

    def classify(
        self,
        texts: Sequence[Prompt],
        adapters: Sequence[Adapter | str | Path | None] | None = None,
    ) -> list[Classification]:
        """Label texts (or lists of token ids) in one batch.

        Args:
            adapters: one per text, None for the base model's own labels.

        Raises:
            AdapterError: an adapter without labels, or none where the base model is no classifier.
            BaseMismatchError: an adapter made for another base model; ValueError: a text without tokens.
        """
        each = one_per_prompt(texts, adapters)
        found = []
        for labels, logits in self._run(texts, each):
            chances = torch.from_numpy(logits).softmax(-1).tolist()
            best = max(range(len(labels)), key=chances.__getitem__)
            found.append(Classification(labels[best], dict(zip(labels, chances, strict=True))))
        return found

    def logits(self, token_ids: list[int], adapter: Adapter | str | Path | None = None) -> npt.NDArray[np.float32]:
        """Logits of one text, float32 `[labels]`; raises as `classify`."""
        return self._run([token_ids], [adapter])[0][1]

    def close(self) -> None:
        """Drop the model."""
        self.model = self._executor = None  # type: ignore[assignment]

    def _run(
        self, texts: Sequence[Prompt], adapters: Sequence[Adapter | str | Path | None]
    ) -> list[tuple[tuple[str, ...], npt.NDArray[np.float32]]]:
        """The labels of each row, and its logits for them."""
        if not texts:
            return []
        rows = [self.tokenizer(text).input_ids if isinstance(text, str) else list(text) for text in texts]
        for index, row in enumerate(rows):
            if not row:
                raise ValueError(f"text {index} has no tokens")
        labels, programs = self._programs(adapters)
        width = max(map(len, rows))
        tokens = torch.tensor([[*row, *[self._fill] * (width - len(row))] for row in rows], device=self.device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=self.device)
        lengths = torch.tensor([len(row) for row in rows])
        with torch.inference_mode(), self._executor.run(programs, lengths):
            logits = self.model(input_ids=tokens, attention_mask=mask).logits.float().cpu().numpy()
        return [(names, row[: len(names)]) for names, row in zip(labels, logits, strict=True)]

    def _programs(
        self, adapters: Sequence[Adapter | str | Path | None]
    ) -> tuple[list[tuple[str, ...]], list[Program | None]]:
        """Labels and program of each row; rows with the same adapter get the same object and run together."""
        loaded: dict[object, Adapter | None] = {}
        keys = [adapter.digest if isinstance(adapter, Adapter) else adapter for adapter in adapters]
        for key, adapter in zip(keys, adapters, strict=True):
            if key not in loaded:
                loaded[key] = admit(adapter, self.identity, self._allow_base_mismatch, classifies=True)
        labels = {key: self._labels_of(adapter) for key, adapter in loaded.items()}
        self._widen(max(map(len, labels.values())))
        programs = {key: self._widened(a.lower()) for key, a in loaded.items() if a is not None}
        return [labels[key] for key in keys], [programs.get(key) for key in keys]

    def _labels_of(self, adapter: Adapter | None) -> tuple[str, ...]:
        if adapter is None:
            if not self._labels:
                raise AdapterError(f"base model {self.identity.name!r} is no classifier; give every text an adapter")
            return self._labels
        assert adapter.manifest.task is not None
        return adapter.manifest.task.labels

    def _widen(self, outputs: int) -> None:
        """Give the output module at least so many rows, the new ones zero, so that all adapters of a batch fit."""
        module = self.model.get_submodule(self._output)
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(_padded(parameter.data, outputs), requires_grad=False))
        module.out_features = module.weight.shape[0]

    def _widened(self, program: Program) -> Program:
        outputs = int(self.model.get_submodule(self._output).weight.shape[0])

        def fitted(delta: WeightDelta) -> WeightDelta:
            fields = ("b", "magnitude", "bias", "output_scale", "new_weight", "new_bias")
            present = {field: getattr(delta, field) for field in fields}
            return replace(delta, **{k: _padded(v, outputs) for k, v in present.items() if v is not None})

        nodes = (
            fitted(node) if isinstance(node, WeightDelta) and node.module == self._output else node for node in program
        )
        return on_device(Program(tuple(nodes)), self.device)


def _padded(tensor: Tensor, rows: int) -> Tensor:
    missing = max(rows - tensor.shape[0], 0)
    return torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])])
