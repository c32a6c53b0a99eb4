"""AdapterHub's LoRA and IA3 adapters, unions with bottleneck adapters, and saved heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapterhub_files import BOTTLENECK, HIDDEN, LAYERS, LORA, State, bottleneck_logits, bottleneck_state, write

import reft_plugins as reft

TOKENS = list(range(5, 17))


@pytest.fixture(scope="module")
def runtime(tiny_llama: Path) -> Any:
    return reft.runtime("transformers", tiny_llama)


def same(runtime: Any, adapter: reft.Adapter, expected: Any) -> None:
    np.testing.assert_allclose(runtime.logits(TOKENS, adapter), expected, atol=3e-4)
    assert np.abs(expected - runtime.logits(TOKENS)).max() > 1.0, "the adapter must matter"


def linear_changes(runtime: Any, changes: dict[str, Any]) -> Any:
    handles = [
        runtime.model.get_submodule(name).register_forward_hook(lambda m, args, y, f=change: f(args[0], y))
        for name, change in changes.items()
    ]
    try:
        with torch.inference_mode():
            return runtime.model(input_ids=torch.tensor([TOKENS])).logits[0].numpy()
    finally:
        for handle in handles:
            handle.remove()


def test_lora(runtime: Any, tiny_llama: Path, tmp_path: Path) -> None:
    names = [f"model.layers.{layer}.mlp.down_proj" for layer in range(LAYERS)]
    draw = torch.Generator().manual_seed(1)
    tensors: State = {}
    for name in names:
        width = runtime.model.get_submodule(name).in_features
        tensors[f"{name}.loras.task.lora_A"] = torch.randn(2, width, generator=draw) * 0.3
        tensors[f"{name}.loras.task.lora_B"] = torch.randn(HIDDEN, 2, generator=draw) * 0.3

    def added(name: str, scaling: float) -> Any:
        a, b = (tensors[f"{name}.loras.task.lora_{letter}"] for letter in "AB")
        return lambda x, y: y + scaling * x @ a.T @ b.T

    config = {**LORA, "intermediate_lora": True}
    adapter = reft.load(write(tmp_path / "lora", config, tensors), base=tiny_llama)
    same(runtime, adapter, linear_changes(runtime, {name: added(name, 6 / 2) for name in names}))
    unscaled = reft.load(write(tmp_path / "old", config, tensors, version="adapters.1.0.1"), base=tiny_llama)
    same(runtime, unscaled, linear_changes(runtime, {name: added(name, 1.0) for name in names}))


def test_ia3_and_its_union_with_a_bottleneck(runtime: Any, tiny_llama: Path, tmp_path: Path) -> None:
    names = [f"model.layers.{layer}.self_attn.v_proj" for layer in range(LAYERS)]
    ia3 = {**LORA, "r": 1, "alpha": 1, "composition_mode": "scale", "attn_matrices": ["v"]}
    scales = {name: torch.randn(runtime.model.get_submodule(name).out_features, 1) * 4 for name in names}
    tensors = {f"{name}.loras.task.lora_B": scale for name, scale in scales.items()}
    changes = {name: lambda x, y, s=scale: y * s.flatten() for name, scale in scales.items()}
    adapter = reft.load(write(tmp_path / "ia3", ia3, tensors), base=tiny_llama)
    same(runtime, adapter, linear_changes(runtime, changes))

    bottleneck = {**BOTTLENECK, "mh_adapter": True}
    more = bottleneck_state(bottleneck, dict.fromkeys(range(LAYERS), 8))
    union = {"architecture": "union", "configs": [ia3, bottleneck]}
    adapter = reft.load(write(tmp_path / "union", union, {**tensors, **more}), base=tiny_llama)
    handles = [
        runtime.model.get_submodule(n).register_forward_hook(lambda m, a, y, f=f: f(a, y)) for n, f in changes.items()
    ]
    expected = bottleneck_logits(runtime, TOKENS, bottleneck, more, torch.relu)
    for handle in handles:
        handle.remove()
    same(runtime, adapter, expected)


def test_rows_of_a_merged_projection(tmp_path: Path) -> None:
    """GPT-2's `c_attn`: rows for queries and values are learned, those for keys stay as they are."""
    a, b = torch.randn(4, 8), torch.randn(16, 2)
    name = "transformer.h.0.attn.c_attn"
    tensors = {f"{name}.loras.task.lora_A": a, f"{name}.loras.task.lora_B": b}
    document = {"model_type": "gpt2", "hidden_size": 8}
    (delta,) = reft.load(write(tmp_path / "lora", LORA, tensors, **document)).lower().weight_deltas
    assert delta.a is not None and delta.b is not None and delta.scaling == 3.0
    expected = torch.cat([b[:8] @ a[:2], torch.zeros(8, 8), b[8:] @ a[2:]])
    torch.testing.assert_close(delta.b @ delta.a, expected)
    scale = {f"{name}.loras.task.lora_B": torch.randn(16, 1)}
    ia3 = {**LORA, "r": 1, "alpha": 1, "composition_mode": "scale", "attn_matrices": ["k", "v"]}
    (delta,) = reft.load(write(tmp_path / "ia3", ia3, scale, **document)).lower().weight_deltas
    assert delta.output_scale is not None
    torch.testing.assert_close(delta.output_scale, torch.cat([torch.ones(8), next(iter(scale.values())).flatten()]))


def test_a_head_counts_where_it_differs(runtime: Any, tiny_llama: Path, tmp_path: Path) -> None:
    config = {**BOTTLENECK, "original_ln_before": True}
    tensors = bottleneck_state(config, {1: 8})
    own = runtime.model.lm_head.weight.detach().clone()
    copied = reft.load(write(tmp_path / "copy", config, tensors, {"lm_head.weight": own}), base=tiny_llama)
    assert copied.manifest.method == "bottleneck" and "copy of the base's own" in copied.manifest.notes["head"]
    other = own + torch.randn_like(own)
    trained = reft.load(write(tmp_path / "trained", config, tensors, {"lm_head.weight": other}), base=tiny_llama)
    (delta,) = trained.lower().weight_deltas
    assert delta.module == "lm_head" and delta.new_weight is not None and torch.equal(delta.new_weight, other)
    assert len(trained.lower().edits) == 1 and "lm_head" in trained.manifest.notes["head"]
    heads = {"heads.task.1.weight": torch.zeros(2, HIDDEN)}
    foreign = reft.load(
        write(tmp_path / "foreign", config, tensors, heads, model_class="LlamaAdapterModel"), base=tiny_llama
    )
    assert "heads.task.1.weight" in foreign.manifest.notes["head"] and not foreign.lower().weight_deltas
    assert "shows with a base only" in reft.load(tmp_path / "copy").manifest.notes["head"]
