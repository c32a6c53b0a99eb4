"""Interchange accuracy: how often exchanging values between prompts has the effect that was asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from reft_plugins import plugins
from reft_plugins.adapter import Adapter, parse_config
from reft_plugins.errors import AdapterError
from reft_plugins.loading import load
from reft_plugins.methods.das.module import DASTrainable, StoredRotation
from reft_plugins.methods.interventions.module import InterventionParameters
from reft_plugins.methods.interventions.units import UnitTensors, units_in
from reft_plugins.training.batches import completion_statistics
from reft_plugins.training.trainer import Step


def interchange_accuracy(
    base: str | Path, rotation: Adapter | str | Path, data: str | Path, *, batch_size: int = 16
) -> dict[str, float]:
    """Exchange values between the pairs of a file and see what the model says (arXiv:2303.02536 section 3).

    Args:
        base: folder or hub id; rotation: an adapter of method `das`, learned or not.
        data: JSONL of `{"base": …, "source": …, "completion": …}`.

    Returns:
        `exact_match`: share of completions right in every token; `token_accuracy`; `loss` per token in nats.

    Raises:
        AdapterError: the adapter is of another method; DataError: naming file and line.
    """
    adapter = load(rotation, base=base)
    method = plugins.methods.get("das")
    if adapter.manifest.method != method.name:
        raise AdapterError(f"a rotation is an adapter of method 'das', this one is of {adapter.manifest.method!r}")
    config = parse_config(method, adapter.manifest.config)
    runtime: Any = plugins.runtimes.get("transformers")(base)
    try:
        units = [(unit, StoredRotation(UnitTensors(unit, adapter.tensors))) for unit in units_in(adapter.tensors)]
        step = Step(DASTrainable(runtime.model, config, InterventionParameters(units))).eval()
        examples = method.examples(config, data, runtime.tokenizer, runtime.model.config.max_position_embeddings)
        collator: Any = method.collator(config, 0, False)
        found = []
        for start in range(0, len(examples), batch_size):
            batch = collator(examples[start : start + batch_size])
            labels = batch.pop("labels")
            with torch.inference_mode():
                moved = {n: v.to(runtime.device) if isinstance(v, torch.Tensor) else v for n, v in batch.items()}
                found.append(completion_statistics(step(**moved).logits.cpu(), labels))
    finally:
        runtime.close()
    loss, tokens, right = torch.cat(found).double().unbind(1)
    return {
        "exact_match": float((tokens == right).double().mean()),
        "token_accuracy": float(right.sum() / tokens.sum()),
        "loss": float(loss.sum() / tokens.sum()),
    }
