"""Exported files in a real llama.cpp against the transformers runtime that runs the adapter itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from exact_programs import PROGRAMS, Maker
from gguf_files import write
from raw_programs import as_adapter
from safetensors.torch import load_file, save_file
from tiny_models import make_tiny_llama, sentences
from transformers import AutoConfig

from reft_ollama.architectures.table import architecture_of
from reft_ollama.export import export_ollama
from reft_ollama.llama_cpp import compare_llama_cpp
from reft_ollama.plan.planning import make_plan
from reft_plugins import plugins
from reft_plugins.adapter import Adapter
from reft_plugins.errors import UnsupportedProgramError
from reft_plugins.fidelity.comparison import Fidelity
from reft_plugins.positions import Positions
from reft_plugins.program import Edit, Program, Site, WeightDelta

EXACT = 1e-4
ALL = Positions.parse("all")


def check(base: Path, adapter: Adapter, target: Path, dtype: str = "f32") -> Fidelity:
    """Compare llama.cpp and transformers on two texts, the base as the negative control."""
    runtime: Any = plugins.runtimes.get("transformers")(base, dtype="float32")
    texts = [runtime.tokenizer(" ".join(sentences(8, seed))).input_ids for seed in (101, 102)]
    path = write(base, adapter.lower(), target, dtype)
    return compare_llama_cpp(path, texts, lambda ids: runtime.logits(ids, adapter), runtime.logits)


def random_lora(base: Path, *modules: str, seed: int = 0, size: float = 0.15, **more: Any) -> list[WeightDelta]:
    """Random deltas that are strong enough to change most predictions."""
    generator = torch.Generator().manual_seed(seed)
    weights = load_file(base / "model.safetensors")
    deltas = []
    for module in modules:
        name = module if f"{module}.weight" in weights else "model.embed_tokens"
        out, inside = weights[f"{name}.weight"].shape
        a, b = torch.randn(4, inside, generator=generator) * size, torch.randn(out, 4, generator=generator) * size
        deltas.append(WeightDelta(module=module, a=a, b=b, scaling=2.0, **more))
    return deltas


ALL_LINEAR = [
    f"model.layers.{layer}.{part}"
    for layer in range(4)
    for part in (
        *(f"self_attn.{kind}_proj" for kind in "qkvo"),
        *(f"mlp.{kind}_proj" for kind in ("gate", "up", "down")),
    )
]


def test_bare_base_in_every_number_format(tiny_llama: Path, tmp_path: Path) -> None:
    nothing = as_adapter(tiny_llama, *random_lora(tiny_llama, ALL_LINEAR[0], size=0.0))
    differences = {
        dtype: check(tiny_llama, nothing, tmp_path / f"{dtype}.gguf", dtype).max_logit_difference
        for dtype in ("f32", "f16", "bf16")
    }
    assert differences["f32"] < EXACT
    assert EXACT < differences["f16"] < 0.02 < differences["bf16"] * 10 < 2.0


def test_lora_on_all_linear_modules(tiny_llama: Path, tmp_path: Path) -> None:
    adapter = as_adapter(tiny_llama, *random_lora(tiny_llama, *ALL_LINEAR, size=0.12))
    found = check(tiny_llama, adapter, tmp_path / "lora.gguf")
    assert found.max_logit_difference < EXACT
    assert found.base_mean_kl is not None and found.base_mean_kl > 0.5, "the adapter is too weak to show anything"
    assert found.base_top1_agreement is not None and found.base_top1_agreement < 0.6


def test_lora_method_with_its_own_scaling(tiny_llama: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for name, out, inside in (("self_attn.q_proj", 128, 128), ("mlp.down_proj", 128, 352)):
        tensors[f"model.layers.2.{name}.lora_A"] = torch.randn(8, inside, generator=generator) * 0.2
        tensors[f"model.layers.2.{name}.lora_B"] = torch.randn(out, 8, generator=generator) * 0.2
    from reft_plugins.base_model import identify

    settings = {"rank": 8, "alpha": 16.0, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]}
    adapter = Adapter.create("lora", settings, tensors, identify(tiny_llama))
    found = check(tiny_llama, adapter, tmp_path / "lora.gguf")
    assert found.max_logit_difference < EXACT
    assert found.base_top1_agreement is not None and found.base_top1_agreement < 0.7


def random(seed: int, *shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def low_rank(seed: int, rank: int = 3) -> dict[str, torch.Tensor]:
    down, up = random(seed, rank, 128, scale=0.3), random(seed + 1, rank, 128, scale=0.3)
    return {"down": down, "up": up, "bias": random(seed + 2, rank)}


STRONG = (
    "magnitudes (DoRA)",
    "vectors between layers",
    "affine edits of outputs",
    "affine edits of inputs",
    "all together",
)
"""Kinds that change what a trained model says, which is harder to move than a random one."""


@pytest.mark.parametrize("name", STRONG)
def test_exact_kinds_on_a_trained_model(name: str, tiny_llama: Path, tmp_path: Path) -> None:
    """Its states are not as even as those of the random models in `test_exact_kinds`."""
    nodes = PROGRAMS[name](Maker(load_file(tiny_llama / "model.safetensors")).seeded(name))
    found = check(tiny_llama, as_adapter(tiny_llama, *nodes), tmp_path / "model.gguf")
    assert found.max_logit_difference < EXACT
    assert found.base_mean_kl is not None and found.base_mean_kl > 0.05, "the program is too weak to show anything"


def test_the_first_edit_of_a_layer_input_reads_what_the_layer_before_left(tiny_llama: Path) -> None:
    """Also where it is marked simultaneous: that says something about edits of the same site only."""
    shift, scale, hidden = random(1, 128), random(2, 128), random(3, 5, 128)
    config = AutoConfig.from_pretrained(tiny_llama)
    nodes = (Edit(Site(1), ALL, shift=shift), Edit(Site(2, "block_input"), ALL, scale=scale, simultaneous=True))
    plan = make_plan(Program(nodes), architecture_of(config), config)
    torch.testing.assert_close(plan.residual[1].change(hidden).float(), (hidden + shift) * scale - hidden)


def test_a_bias_at_the_output_layer_is_refused(tiny_llama: Path) -> None:
    config = AutoConfig.from_pretrained(tiny_llama)
    for field in ("bias", "new_bias"):
        program = Program((WeightDelta("lm_head", **{field: random(1, 512)}),))
        with pytest.raises(UnsupportedProgramError, match="no bias at the output layer"):
            make_plan(program, architecture_of(config), config)


VARIANTS: dict[str, dict[str, Any]] = {
    "tied embeddings": {"tie_word_embeddings": True},
    "biases everywhere": {"attention_bias": True, "mlp_bias": True},
    "Llama-3 rotary scaling": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 50000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "linear rotary scaling": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "heads wider than the hidden size": {"num_attention_heads": 8, "num_key_value_heads": 2},
    "one key/value head for all": {"num_key_value_heads": 1},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_llama(name: str, tmp_path: Path) -> None:
    base = make_tiny_llama(tmp_path / "base", steps=0, initializer_range=0.1, **VARIANTS[name])
    if name == "biases everywhere":
        _randomise_biases(base / "model.safetensors")
    modules = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "lm_head")
    adapter = as_adapter(base, *random_lora(base, *modules, size=0.1))
    found = check(base, adapter, tmp_path / "model.gguf")
    assert found.max_logit_difference < EXACT
    assert found.base_mean_kl is not None and found.base_mean_kl > 0.05


@pytest.mark.parametrize("name", ["tied embeddings", "biases everywhere", "heads wider than the hidden size"])
def test_extra_neurons_in_variants_of_llama(name: str, tmp_path: Path) -> None:
    """A residual edit, and weight changes in the same model, as a wider model of the same kind."""
    base = make_tiny_llama(tmp_path / "base", steps=0, initializer_range=0.1, **VARIANTS[name])
    if name == "biases everywhere":
        _randomise_biases(base / "model.safetensors")
    deltas = random_lora(base, "model.layers.1.mlp.down_proj", "model.layers.2.self_attn.q_proj", "lm_head", size=0.1)
    first = {name: tensor / 3 for name, tensor in low_rank(1).items()}
    edits = [
        Edit(Site(1), ALL, **first),
        Edit(Site(1), ALL, shift=random(8, 128)),
        Edit(Site(3), ALL, **low_rank(4, 2)),
    ]
    adapter = as_adapter(base, *deltas, *edits)
    result = export_ollama(adapter, base, tmp_path / "out", dtype="f32", strategy="neurons", calibration_tokens=1500)
    runtime: Any = plugins.runtimes.get("transformers")(base, dtype="float32")
    texts = [runtime.tokenizer(" ".join(sentences(8, seed))).input_ids for seed in (101, 102)]
    found = compare_llama_cpp(result.gguf, texts, lambda ids: runtime.logits(ids, adapter), runtime.logits)
    assert found.max_logit_difference < 5e-3 and found.mean_kl < 1e-6
    assert found.base_mean_kl is not None and found.base_mean_kl > 0.5, "the program is too weak to show anything"


def test_weights_in_several_files(tiny_llama: Path, tmp_path: Path) -> None:
    base = tmp_path / "sharded"
    base.mkdir()
    for file in tiny_llama.iterdir():
        if file.suffix != ".safetensors":
            (base / file.name).write_bytes(file.read_bytes())
    weights = load_file(tiny_llama / "model.safetensors")
    names, index = sorted(weights), {}
    for part in range(3):
        own = names[part::3]
        save_file({name: weights[name] for name in own}, base / f"model-{part + 1:05}-of-00003.safetensors")
        index |= dict.fromkeys(own, f"model-{part + 1:05}-of-00003.safetensors")
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    nothing = Program(tuple(random_lora(tiny_llama, ALL_LINEAR[5])))
    one, several = write(tiny_llama, nothing, tmp_path / "one.gguf"), write(base, nothing, tmp_path / "several.gguf")
    assert one.read_bytes() == several.read_bytes()


def _randomise_biases(file: Path) -> None:
    weights = load_file(file)
    generator = torch.Generator().manual_seed(5)
    for name, tensor in weights.items():
        if name.endswith(".bias"):
            weights[name] = torch.randn(tensor.shape, generator=generator) * 0.2
    save_file(weights, file, metadata={"format": "pt"})
