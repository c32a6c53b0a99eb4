"""A base model with virtual tokens, made once per kind of model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from raw_programs import as_adapter
from tiny_bases import make_base
from tiny_models import sentences

from reft_plugins import plugins
from reft_plugins.adapter import Adapter
from reft_plugins.program import Node, VirtualTokens

EXACT = 1e-4
COUNTS = (5, 3)
VIRTUAL = sum(COUNTS)


class Case:
    """A base model and strong virtual tokens for it, in two nodes."""

    def __init__(self, directory: Path, *more: Node) -> None:
        self.directory = directory
        self.runtime: Any = plugins.runtimes.get("transformers")(directory, dtype="float32")
        self.vocabulary = len(self.runtime.model.get_input_embeddings().weight)
        self.ids = range(self.vocabulary, self.vocabulary + VIRTUAL)
        embedded = self.runtime.model.get_input_embeddings()(torch.arange(10, 60)).detach()
        generator = torch.Generator().manual_seed(0)
        self.learned = [
            VirtualTokens(size * embedded.std() * torch.randn(count, embedded.shape[1], generator=generator))
            for count, size in zip(COUNTS, (3.0, 1.0), strict=True)
        ]
        self.adapter: Adapter = as_adapter(directory, self.learned[0], *more, self.learned[1])
        self.texts = [self.runtime.tokenizer(" ".join(sentences(8, seed))).input_ids for seed in (101, 102)]

    def logits(self, ids: list[int]) -> Any:
        return self.runtime.logits(ids, self.adapter)


class Cases:
    """Cases by kind of base model, each made when it is first asked for."""

    def __init__(self, make_directory: Callable[[], Path]) -> None:
        self._make_directory = make_directory
        self._made: dict[str, Case] = {}

    def __call__(self, kind: str, **config: Any) -> Case:
        key = f"{kind} {config}"
        if key not in self._made:
            self._made[key] = Case(make_base(kind, self._make_directory(), **config))
        return self._made[key]
