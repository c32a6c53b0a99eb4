"""What every method has to keep: it learns, what it saves is what it computes, and it touches nothing but its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import reft_plugins as reft
from reft_plugins import plugins
from reft_plugins.adapter import Adapter, parse_config
from reft_plugins.base_model import attention_implementation, identify
from reft_plugins.training.batches import completion_loss
from reft_plugins.training.trainer import Step

TOKENS = [1, 40, 77, 130, 52, 210, 99, 301, 17, 64]
"""A prompt in the vocabulary of the small models."""


@dataclass(frozen=True)
class MethodCase:
    """A method with settings under which it learns a small task.

    Attributes:
        name: of the method; settings: its own.
        constant: learn one answer to every prompt instead of an answer for each animal; for methods that cannot tell
            prompts apart.
        training: settings of `reft.train`.
        needed: the least share of held-out examples answered right after training.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    constant: bool = False
    training: Mapping[str, Any] = field(default_factory=dict)
    needed: float = 0.8
    label: str = ""

    def __str__(self) -> str:
        return self.label or self.name


def exact_match(base: Path, data: Path, adapter: Adapter | None) -> float:
    """Share of examples whose greedy answer is the completion."""
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    runtime = reft.runtime("transformers", base)
    answers = runtime.generate([row["prompt"] for row in rows], [adapter] * len(rows), max_new_tokens=6)
    return float(np.mean([a.text == row["completion"] for a, row in zip(answers, rows, strict=True)]))


def learns(case: MethodCase, base: Path, data: Path, held_out: Path, out: Path) -> Adapter:
    """(a) Train on `data`; the base fails on `held_out`, the adapter does not. The adapter is saved in `out`."""
    schedule = {"epochs": 12, "batch_size": 16, "warmup_ratio": 0.1, "progress": False, **case.training}
    adapter = reft.train(base, case.name, data, out=out, **schedule, **case.settings)
    assert exact_match(base, held_out, None) < 0.2
    reached = exact_match(base, held_out, adapter)
    assert reached >= case.needed, f"{case}: {reached:.2f} of the held-out examples are right"
    return adapter


def reloads_exactly(adapters: Sequence[Path], base: Path, scratch: Path) -> None:
    """(b) Logits of saved adapters in this process and in a new one are equal bit for bit, and not the base's."""
    runtime = reft.runtime("transformers", base)
    script = (
        "import sys, numpy, torch, reft_plugins as reft\n"
        "torch.set_num_threads(1)\n"
        "base, out, tokens, *adapters = sys.argv[1:]\n"
        "runtime = reft.runtime('transformers', base)\n"
        "tokens = list(map(int, tokens.split(',')))\n"
        "numpy.savez(out, *(runtime.logits(tokens, adapter=adapter) for adapter in adapters))\n"
    )
    out = scratch / "logits.npz"
    arguments = [str(base), str(out), ",".join(map(str, TOKENS)), *map(str, adapters)]
    subprocess.run([sys.executable, "-c", script, *arguments], check=True, timeout=300)
    with np.load(out) as elsewhere:
        for number, path in enumerate(adapters):
            here = runtime.logits(TOKENS, adapter=str(path))
            np.testing.assert_array_equal(elsewhere[f"arr_{number}"], here, err_msg=str(path))
            assert np.abs(here - runtime.logits(TOKENS)).max() > 0.05, f"{path}: does nothing"


def attached(case: MethodCase, base: Path, noise: float = 0.05) -> tuple[Any, Any]:
    """A frozen base and the method on it, its parameters moved away from their initial values."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, attn_implementation=attention_implementation(base)
    ).requires_grad_(False)
    method = plugins.methods.get(case.name)
    trainable = method.attach(model, parse_config(method, case.settings), identify(base))
    for parameter in trainable.parameters.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data + noise * torch.randn_like(parameter)
    return model, trainable


def lowering_error(case: MethodCase, base: Path, noise: float = 0.05) -> tuple[float, float]:
    """(c) Largest difference of logits between the training module and the lowered adapter, and the adapter's effect.

    The whole list is the prompt, as in `Runtime.logits`.
    """
    _, trainable = attached(case, base, noise)
    step = Step(trainable).eval()
    tokens = torch.tensor([TOKENS])
    with torch.inference_mode():
        outputs = step(
            prompt_lengths=torch.tensor([len(TOKENS)]), input_ids=tokens, attention_mask=torch.ones_like(tokens)
        )
    trained = outputs.logits[0].float().numpy()
    adapter = Adapter.create(case.name, dict(case.settings), trainable.tensors(), identify(base))
    runtime = reft.runtime("transformers", base)
    lowered = runtime.logits(TOKENS, adapter=adapter)
    return float(np.abs(trained - lowered).max()), float(np.abs(lowered - runtime.logits(TOKENS)).max())


def gradients_reach_exactly_own(case: MethodCase, base: Path, data: Path, noise: float = 0.05) -> None:
    """(d) After a backward pass every own parameter has a gradient that is not zero, and no other has any."""
    _, trainable = attached(case, base, noise)
    step = Step(trainable)
    method = plugins.methods.get(case.name)
    config = parse_config(method, case.settings)
    examples = method.examples(config, data, AutoTokenizer.from_pretrained(base), 512)
    batch = method.collator(config, 0, False)(examples[0:8])
    labels = batch.pop("labels")
    loss = completion_loss(step(**batch), labels)
    assert loss.requires_grad, f"{case}: no gradient reaches it, since it touches no token"
    loss.backward()
    own = {id(parameter) for parameter in trainable.parameters.parameters() if parameter.requires_grad}
    assert own, f"{case}: learns nothing"
    for name, parameter in step.named_parameters():
        if id(parameter) in own:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, f"{name}: no gradient reaches it"
        else:
            assert parameter.grad is None, f"{name}: is not the method's own, but has a gradient"
