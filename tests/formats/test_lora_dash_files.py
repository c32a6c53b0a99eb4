"""LoRA-Dash checkpoints in the layouts of its authors' code, against their forward pass written out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import reft_plugins as reft
from reft_plugins.errors import AdapterError

TOKENS = [1, 261, 350, 383, 316, 310, 261, 425]
RANK, ALPHA, DIRECTIONS = 3, 6, 4
MODULES = [f"model.layers.{layer}.{name}" for layer in (0, 2) for name in ("self_attn.q_proj", "mlp.down_proj")]


@pytest.fixture(scope="module")
def runtime(tiny_llama: Path) -> Any:
    return reft.runtime("transformers", tiny_llama)


def learned(base: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Random `A`, `B` and coefficients, and singular directions of the base's weights."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    draw = torch.Generator().manual_seed(0)
    parts = {}
    for module in MODULES:
        weight = model.get_submodule(module).weight.detach()
        left, _, right = torch.linalg.svd(weight, full_matrices=False)
        chosen = torch.randperm(len(right), generator=draw)[:DIRECTIONS]
        parts[module] = {
            "A": torch.randn(RANK, weight.shape[1], generator=draw) * 0.3,
            "B": torch.randn(weight.shape[0], RANK, generator=draw) * 0.3,
            "index": torch.randn(DIRECTIONS, generator=draw) * 3,
            "u": left[:, chosen].contiguous(),
            "vt": right[chosen].contiguous(),
        }
    return parts


def expected_logits(base: Path, parts: dict[str, dict[str, torch.Tensor]], directions: bool = True) -> Any:
    """`W + (alpha / r) B A + U diag(s) V^T`, merged."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    with torch.no_grad():
        for module, own in parts.items():
            weight = model.get_submodule(module).weight
            weight += ALPHA / RANK * own["B"] @ own["A"]
            if directions:
                weight += own["u"] @ torch.diag(own["index"]) @ own["vt"]
        return model(input_ids=torch.tensor([TOKENS])).logits[0].numpy()


def fork_of_peft(parts: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    names = {"A": "lora_A.weight", "B": "lora_B.weight", "u": "lora_w_u", "vt": "lora_w_vt"}
    tensors = {f"base_model.model.{m}.{names[k]}": own[k] for m, own in parts.items() for k in names}
    return tensors | {f"base_model.model.{m}.lora_index.weight": own["index"][None] for m, own in parts.items()}


def loralib(parts: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    names = {"A": "lora_A", "B": "lora_B", "index": "lora_index", "u": "weight_u_top", "vt": "weight_vt_top"}
    return {f"{m}.{names[k]}": own[k] for m, own in parts.items() for k in names}


def write_config(folder: Path, **changes: Any) -> None:
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": ["q_proj", "down_proj"], **changes}
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("layout", ["safetensors", "bin", "loralib", "loralib with its base"])
def test_logits_are_those_of_the_formula(runtime: Any, tiny_llama: Path, tmp_path: Path, layout: str) -> None:
    parts = learned(tiny_llama)
    options: dict[str, Any] = {}
    if layout.startswith("loralib"):
        state = loralib(parts)
        if layout.endswith("base"):
            state |= AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).state_dict()
        torch.save(state, tmp_path / "model.pt")
        with pytest.raises(AdapterError, match="does not say its alpha.*--option alpha"):
            reft.load(tmp_path, base=tiny_llama)
        options["alpha"] = ALPHA
    else:
        write_config(tmp_path)
        if layout == "bin":
            torch.save(fork_of_peft(parts), tmp_path / "adapter_model.bin")
        else:
            save_file(fork_of_peft(parts), tmp_path / "adapter_model.safetensors")
    adapter = reft.load(tmp_path, base=tiny_llama, **options)
    assert adapter.manifest.method == "lora_dash"
    expected = expected_logits(tiny_llama, parts)
    np.testing.assert_allclose(runtime.logits(TOKENS, adapter), expected, atol=1e-4)
    assert np.abs(expected - runtime.logits(TOKENS)).max() > 1
    assert np.abs(expected - expected_logits(tiny_llama, parts, directions=False)).max() > 0.1, "directions must matter"


def test_what_is_missing_or_foreign_is_named(tiny_llama: Path, tmp_path: Path) -> None:
    parts = learned(tiny_llama)
    path = tmp_path / "adapter_model.bin"
    write_config(tmp_path)
    complete = fork_of_peft(parts)
    first = f"base_model.model.{MODULES[0]}"
    for changed, message in (
        ({name: t for name, t in complete.items() if "lora_w_u" not in name}, "has no u; loralib's lora_state_dict"),
        ({**complete, f"{first}.lora_w_vt": torch.zeros(2, 128)}, "directions and their coefficients differ"),
        ({**complete, "base_model.model.lm_head.weight": torch.zeros(512, 128)}, "not the base's own"),
        ({**complete, f"base_model.model.nowhere.{'lora_A'}.weight": torch.zeros(3, 8)}, "no module 'nowhere'"),
    ):
        torch.save(changed, path)
        with pytest.raises(AdapterError, match=message):
            reft.load(tmp_path, base=tiny_llama)
    torch.save(complete, path)
    with pytest.raises(AdapterError, match="every token, not at 'f1'"):
        reft.load(tmp_path, base=tiny_llama, positions="f1")
    with pytest.raises(AdapterError, match="lora_alpha is 6, not 7"):
        reft.load(tmp_path, base=tiny_llama, alpha=7)
    write_config(tmp_path, lora_alpha=None)
    with pytest.raises(AdapterError, match="lora_alpha is None, expected a number"):
        reft.load(tmp_path, base=tiny_llama)


def test_a_pickle_with_code_is_refused_and_not_run(tiny_llama: Path, tmp_path: Path) -> None:
    proof = tmp_path / "proof"

    class CreatesFile:
        def __reduce__(self) -> tuple[Any, ...]:
            return open, (str(proof), "w")

    write_config(tmp_path)
    torch.save({**fork_of_peft(learned(tiny_llama)), "more": CreatesFile()}, tmp_path / "adapter_model.bin")
    with pytest.raises(AdapterError, match="refused.*run code"):
        reft.load(tmp_path, base=tiny_llama)
    assert not proof.exists()


def test_more_directions_than_the_matrix_has(runtime: Any, tiny_llama: Path, tmp_path: Path) -> None:
    parts = learned(tiny_llama)
    for own in parts.values():
        draw = torch.Generator().manual_seed(1)
        own["A"] = torch.randn(126, own["vt"].shape[1], generator=draw) * 0.02
        own["B"] = torch.randn(len(own["u"]), 126, generator=draw) * 0.02
    write_config(tmp_path, lora_alpha=ALPHA * 42)
    save_file(fork_of_peft(parts), tmp_path / "adapter_model.safetensors")
    adapter = reft.load(tmp_path, base=tiny_llama)
    np.testing.assert_allclose(runtime.logits(TOKENS, adapter), expected_logits(tiny_llama, parts), atol=1e-4)
