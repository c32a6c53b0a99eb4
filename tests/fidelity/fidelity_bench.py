"""A small model under a strong adapter, and held-out text: what evaluations are tried on."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from tiny_models import sentences

from reft_plugins.adapter import Adapter
from reft_plugins.fidelity.evaluation import Evaluator
from reft_plugins.fidelity.texts import Text


@dataclass(slots=True)
class Bench:
    """An adapter that adds `shift` to the output of layer 1, and an evaluator that has seen it run."""

    runtime: Any
    adapter: Adapter
    shift: torch.Tensor
    texts: list[Text]
    evaluator: Evaluator

    def install(self) -> None:
        """Make the runtime's model do what the adapter does, exactly."""
        self.runtime.model.model.layers[1].mlp.down_proj.bias = torch.nn.Parameter(self.shift, requires_grad=False)

    def logits(self, token_ids: list[int]) -> torch.Tensor:
        """Of the runtime's model as it is."""
        return torch.as_tensor(self.runtime.logits(token_ids))

    def generate(self, prompt: list[int], max_new_tokens: int, stops: Collection[int]) -> list[int]:
        """Of the runtime's model as it is."""
        answer = list(self.runtime.generate([prompt], max_new_tokens=max_new_tokens, ignore_eos=True)[0].token_ids)
        end = next((index + 1 for index, token in enumerate(answer) if token in stops), len(answer))
        return answer[:end]


def held_out(tokenizer: Any) -> list[Text]:
    """Texts of two sources, of very different lengths."""
    long = [tokenizer(" ".join(sentences(8, seed))).input_ids[:120] for seed in range(6)]
    short = [tokenizer(text).input_ids for text in sentences(12, 77)]
    return [
        Text(tuple(tokens), max(1, len(tokens) // 2), source)
        for source, several in (("long", long), ("short", short))
        for tokens in several
    ]
