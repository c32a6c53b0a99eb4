"""LoRA files and control vectors in a real llama.cpp beside a base model's file, against the transformers runtime."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from raw_programs import as_adapter
from safetensors import safe_open
from tiny_bases import make_base
from tiny_models import sentences
from transformers import AutoConfig, AutoTokenizer

from reft_ollama.architectures.base import Architecture
from reft_ollama.architectures.qwen3 import QWEN3
from reft_ollama.architectures.table import architecture_of
from reft_ollama.control_vector import make_control_vector, write_control_vector
from reft_ollama.llama_cpp import LlamaCppModel
from reft_ollama.lora_gguf import CONVERTED_AS, Lora, LoraTensor, make_lora, write_lora
from reft_ollama.tokenizers.conversion import convert_tokenizer
from reft_ollama.weights.checkpoint import Checkpoint
from reft_ollama.weights.gguf_file import write_gguf
from reft_ollama.weights.stack import BaseWeights
from reft_plugins import plugins
from reft_plugins.adapter import Adapter
from reft_plugins.base_model import identify
from reft_plugins.errors import AdapterError, ReftError, UnsupportedProgramError
from reft_plugins.fidelity.comparison import Accumulator, Fidelity
from reft_plugins.positions import Positions
from reft_plugins.program import Edit, KeyValuePrefix, Node, Program, Site, VirtualTokens, WeightDelta

EXACT = 1e-4
ALL = Positions.parse("all")
FAMILIES = list(CONVERTED_AS)


AS_CONVERTED = {
    "qwen2": replace(QWEN3, model_type="qwen2", target=gguf.MODEL_ARCH.QWEN2, query_norm=None, key_norm=None),
    "phi3": Architecture(
        model_type="phi3",
        target=gguf.MODEL_ARCH.PHI3,
        **dict.fromkeys(("query", "key", "value"), "self_attn.qkv_proj"),
        **dict.fromkeys(("gate", "up"), "mlp.gate_up_proj"),
    ),
}
"""Families that llama.cpp's own converter writes as another architecture than the export of merged models does."""


def as_converted(base: Path, target: Path) -> Path:
    """The base model's file as llama.cpp's own converter writes it: rows in the order of that architecture."""
    config = AutoConfig.from_pretrained(base)
    architecture = AS_CONVERTED.get(config.model_type) or architecture_of(config)
    assert architecture.target == CONVERTED_AS[config.model_type]
    assert architecture.query_scales(config) is None, "what the converter does not do"
    tokenizer = convert_tokenizer(AutoTokenizer.from_pretrained(base), config.vocab_size)
    write_gguf(target, BaseWeights(Checkpoint(base), architecture, config), architecture, tokenizer, dtype="f32")
    return target


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folder and f32 GGUF file of a base of every family, each made once."""
    made: dict[str, tuple[Path, Path]] = {}

    def get(family: str) -> tuple[Path, Path]:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            gemma = family.startswith("gemma")
            settings = {"query_pre_attn_scalar": 32} if gemma else {"tie_word_embeddings": False}
            base = make_base(family, folder / "base", **settings)
            made[family] = (base, as_converted(base, folder / "base.gguf"))
        return made[family]

    return get


def compare(base: Path, file: Path, adapter: Adapter, lora: Path | None = None, steer: Path | None = None) -> Fidelity:
    """llama.cpp with the base's file and one beside it, against transformers with the adapter."""
    runtime: Any = plugins.runtimes.get("transformers")(base, dtype="float32")
    model = LlamaCppModel(file, lora=lora)
    accumulator = Accumulator()
    try:
        if steer is not None:
            model.steer(steer)
        for seed in (101, 102):
            ids = runtime.tokenizer(" ".join(sentences(4, seed))).input_ids
            accumulator.add(runtime.logits(ids, adapter), model.logits(ids), runtime.logits(ids))
    finally:
        model.close()
        runtime.close()
    return accumulator.result()


def shapes_of(base: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(base / "model.safetensors", framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def random_deltas(base: Path, *names: str, size: float = 0.15, scaling: float = 2.0, rank: int = 4) -> list[Node]:
    """A delta of every matrix whose name ends so, strong enough to change most predictions."""
    draw = torch.Generator().manual_seed(1)
    found: list[Node] = []
    for name, shape in shapes_of(base).items():
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and len(shape) == 2 and module.endswith(names):
            out, inside = shape if "embed" not in module else shape[::-1]
            a, b = torch.randn(rank, inside, generator=draw) * size, torch.randn(out, rank, generator=draw) * size
            found.append(WeightDelta(module, a=a, b=b, scaling=scaling))
    return found


def lora_file(base: Path, adapter: Adapter, target: Path, dtype: str = "f32") -> tuple[Lora, Path]:
    config = AutoConfig.from_pretrained(base)
    lora = make_lora(adapter.lower(), architecture_of(config), config)
    write_lora(target, lora, dtype=dtype)
    return lora, target


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_on_every_linear_module(family: str, bases: Any, tmp_path: Path) -> None:
    base, file = bases(family)
    adapter = as_adapter(base, *random_deltas(base, "_proj", size=0.12))
    assert len(adapter.lower().nodes) == (16 if family == "phi3" else 28)
    _, path = lora_file(base, adapter, tmp_path / "lora.gguf")
    found = compare(base, file, adapter, lora=path)
    assert found.max_logit_difference < EXACT
    assert found.base_mean_kl is not None and found.base_mean_kl > 0.05, "the adapter is too weak to show anything"


def test_queries_and_keys_that_are_not_permuted_are_wrong(bases: Any, tmp_path: Path) -> None:
    base, file = bases("llama")
    adapter = as_adapter(base, *random_deltas(base, "q_proj", "k_proj", size=0.15))
    lora, path = lora_file(base, adapter, tmp_path / "lora.gguf")
    assert compare(base, file, adapter, lora=path).max_logit_difference < EXACT
    raw = {f"blk.{n.module.split('.')[2]}.attn_{n.module[-6]}.weight": n for n in adapter.lower().weight_deltas}
    wrong = [LoraTensor(t.name, t.a, raw[t.name].b) for t in lora.tensors]  # type: ignore[arg-type]
    write_lora(tmp_path / "wrong.gguf", replace(lora, tensors=tuple(wrong)))
    assert compare(base, file, adapter, lora=tmp_path / "wrong.gguf").max_logit_difference > 0.1


def test_embeddings_and_output_layer(bases: Any, tmp_path: Path) -> None:
    base, file = bases("llama")
    adapter = as_adapter(base, *random_deltas(base, "embed_tokens", "lm_head", size=0.2))
    lora, path = lora_file(base, adapter, tmp_path / "lora.gguf")
    assert {tensor.name for tensor in lora.tensors} == {"token_embd.weight", "output.weight"}
    found = compare(base, file, adapter, lora=path)
    assert found.max_logit_difference < EXACT
    assert found.base_mean_kl is not None and found.base_mean_kl > 0.05


def test_several_scalings_fold_into_one_alpha(bases: Any, tmp_path: Path) -> None:
    base, file = bases("llama")
    nodes = [
        *random_deltas(base, "q_proj", "down_proj", scaling=0.5, rank=4),
        *random_deltas(base, "v_proj", scaling=-3.0, rank=2),
        *random_deltas(base, "up_proj", scaling=1.5, rank=3),
        *random_deltas(base, "q_proj", scaling=0.7, rank=5),
    ]
    adapter = as_adapter(base, *nodes)
    lora, path = lora_file(base, adapter, tmp_path / "lora.gguf")
    assert {tensor.a.shape[0] for tensor in lora.tensors} == {9, 4, 2, 3}
    found = compare(base, file, adapter, lora=path)
    assert found.max_logit_difference < EXACT
    assert found.base_mean_kl is not None and found.base_mean_kl > 0.05


def test_peft_settings_rslora_and_patterns(bases: Any, tmp_path: Path) -> None:
    base, file = bases("llama")
    draw, tensors = torch.Generator().manual_seed(3), {}
    ranks = {"q_proj": 8, "down_proj": 4, "up_proj": 4}
    for name, shape in shapes_of(base).items():
        module = name.removesuffix(".weight")
        rank = ranks.get(module.split(".")[-1])
        if rank is not None:
            tensors[f"{module}.lora_A"] = torch.randn(rank, shape[1], generator=draw) * 0.2
            tensors[f"{module}.lora_B"] = torch.randn(shape[0], rank, generator=draw) * 0.1
    settings = {
        "rank": 4,
        "alpha": 8.0,
        "use_rslora": True,
        "target_modules": list(ranks),
        "rank_pattern": {"q_proj": 8},
        "alpha_pattern": {"up_proj": 3.0},
    }
    adapter = Adapter.create("lora", settings, tensors, identify(base))
    assert len({delta.scaling for delta in adapter.lower().weight_deltas}) == 3
    _, path = lora_file(base, adapter, tmp_path / "lora.gguf")
    found = compare(base, file, adapter, lora=path)
    assert found.max_logit_difference < EXACT
    assert found.base_mean_kl is not None and found.base_mean_kl > 0.05


def test_factors_with_one_alpha_are_stored_as_they_are(bases: Any, tmp_path: Path) -> None:
    base, _ = bases("llama")
    adapter = as_adapter(base, *random_deltas(base, "down_proj", scaling=4.0, rank=4))
    lora, path = lora_file(base, adapter, tmp_path / "lora.gguf")
    assert lora.alpha == 16.0
    fields = gguf.GGUFReader(path).fields
    assert fields["general.type"].contents() == "adapter" and fields["adapter.type"].contents() == "lora"
    assert fields["adapter.lora.alpha"].contents() == 16.0 and fields["general.architecture"].contents() == "llama"
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    for delta in adapter.lower().weight_deltas:
        layer = delta.module.split(".")[2]
        assert delta.a is not None and delta.b is not None
        assert torch.equal(torch.tensor(stored[f"blk.{layer}.ffn_down.weight.lora_a"]), delta.a)
        assert torch.equal(torch.tensor(stored[f"blk.{layer}.ffn_down.weight.lora_b"]), delta.b)


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_smaller_number_formats(dtype: str, bases: Any, tmp_path: Path) -> None:
    base, file = bases("llama")
    adapter = as_adapter(base, *random_deltas(base, "_proj", size=0.12))
    _, path = lora_file(base, adapter, tmp_path / "lora.gguf", dtype)
    _, full = lora_file(base, adapter, tmp_path / "full.gguf")
    assert path.stat().st_size < 0.6 * full.stat().st_size
    found = compare(base, file, adapter, lora=path)
    assert found.max_logit_difference > EXACT and found.mean_kl < 0.02 * found.base_mean_kl  # type: ignore[operator]


def test_equal_adapters_give_equal_files(bases: Any, tmp_path: Path) -> None:
    base, _ = bases("llama")
    for name in ("one", "two"):
        lora_file(base, as_adapter(base, *random_deltas(base, "_proj")), tmp_path / f"{name}.gguf")
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()


Q = "model.layers.0.self_attn.q_proj"
FACTORS = {"a": torch.ones(1, 96), "b": torch.ones(128, 1)}
REFUSED_BY_LORA: dict[str, Node] = {
    "place for magnitude": WeightDelta(Q, **FACTORS, magnitude=torch.ones(128)),
    "place for bias": WeightDelta(Q, **FACTORS, bias=torch.ones(128)),
    "place for input_scale": WeightDelta(Q, input_scale=torch.ones(96)),
    "place for new_weight": WeightDelta(Q, new_weight=torch.ones(128, 96)),
    "positions f1 only.*reft serve": WeightDelta(Q, **FACTORS, positions=Positions.parse("f1")),
    "Edit.*low-rank changes of weights only.*--control-vector": Edit(Site(1), ALL, shift=torch.ones(96)),
    "VirtualTokens": VirtualTokens(torch.ones(2, 96)),
    "KeyValuePrefix": KeyValuePrefix(0, torch.ones(2, 2, 32), torch.ones(2, 2, 32)),
}


@pytest.mark.parametrize("message", REFUSED_BY_LORA)
def test_what_a_lora_file_cannot_hold_is_refused_by_name(message: str, bases: Any) -> None:
    config = AutoConfig.from_pretrained(bases("llama")[0])
    with pytest.raises(UnsupportedProgramError, match=message):
        make_lora(Program((REFUSED_BY_LORA[message],)), architecture_of(config), config)


def test_modules_that_the_base_file_does_not_store_are_refused(bases: Any, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(bases("llama")[0])
    for module in ("model.layers.9.self_attn.q_proj", "model.norm", "score"):
        with pytest.raises(AdapterError, match=rf"{module}.*no module of this name"):
            make_lora(Program((WeightDelta(module, **FACTORS),)), architecture_of(config), config)
    config.tie_word_embeddings = True
    for module in ("lm_head", "model.embed_tokens"):
        with pytest.raises(UnsupportedProgramError, match=rf"{module}.*one tensor"):
            make_lora(Program((WeightDelta(module, **FACTORS),)), architecture_of(config), config)


def test_a_lora_file_of_another_base_is_refused_by_llama_cpp(bases: Any, tmp_path: Path) -> None:
    base, file = bases("llama")
    lora, _ = lora_file(base, as_adapter(base, *random_deltas(base, "q_proj")), tmp_path / "lora.gguf")
    write_lora(tmp_path / "qwen2.gguf", replace(lora, architecture="qwen2"))
    with pytest.raises(ReftError, match=r"qwen2\.gguf: llama\.cpp refuses"):
        LlamaCppModel(file, lora=tmp_path / "qwen2.gguf")


def steering(base: Path, adapter: Adapter, target: Path) -> Path:
    config = AutoConfig.from_pretrained(base)
    write_control_vector(target, make_control_vector(adapter.lower(), architecture_of(config), config))
    return target


def noise(seed: int, size: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", FAMILIES)
def test_constants_at_layers_as_a_control_vector(family: str, bases: Any, tmp_path: Path) -> None:
    base, file = bases(family)
    size = AutoConfig.from_pretrained(base).hidden_size
    low = {"down": torch.zeros(2, size), "up": torch.stack([noise(3, size), noise(4, size)]), "bias": torch.ones(2)}
    adapter = as_adapter(
        base,
        Edit(Site(1), ALL, shift=noise(1, size)),
        Edit(Site(2), ALL, **low, activation="gelu"),
        Edit(Site(2, "block_input"), ALL, shift=noise(5, size)),
        Edit(Site(3), ALL, shift=noise(6, size)),
    )
    path = steering(base, adapter, tmp_path / "vector.gguf")
    found = compare(base, file, adapter, steer=path)
    assert found.max_logit_difference < EXACT
    assert found.base_mean_kl is not None and found.base_mean_kl > 0.05, "the edit is too weak to show anything"
    stored = gguf.GGUFReader(path)
    assert stored.fields["general.architecture"].contents() == "controlvector"
    assert sorted(tensor.name for tensor in stored.tensors) == ["direction.1", "direction.2", "direction.3"]


def test_a_direction_belongs_to_the_output_of_its_layer(bases: Any, tmp_path: Path) -> None:
    """One layer off is another model, so that the numbering is what the other tests say."""
    base, file = bases("llama")
    adapter = as_adapter(base, Edit(Site(2), ALL, shift=noise(1, 96)))
    for layer in (1, 2, 3):
        path = steering(base, as_adapter(base, Edit(Site(layer), ALL, shift=noise(1, 96))), tmp_path / f"{layer}.gguf")
        found = compare(base, file, adapter, steer=path).max_logit_difference
        assert found < EXACT if layer == 2 else found > 0.1


def test_llama_cpp_steers_no_first_layer(bases: Any, tmp_path: Path) -> None:
    base, file = bases("llama")
    config = AutoConfig.from_pretrained(base)
    for site in (Site(0), Site(1, "block_input"), Site(0, "block_input")):
        with pytest.raises(UnsupportedProgramError, match=r"layers 1 to 3, not before.*without --control-vector"):
            make_control_vector(Program((Edit(site, ALL, shift=noise(1, 96)),)), architecture_of(config), config)
    from llama_cpp import llama_cpp

    model = LlamaCppModel(file)
    try:
        plain = model.logits(range(3, 20))
        buffer = (ctypes.c_float * (3 * 96))(*[5.0] * (3 * 96))
        for last, changed in ((0, False), (1, True)):
            assert llama_cpp.llama_set_adapter_cvec(model._model.ctx, buffer, len(buffer), 96, 0, last) == 0
            assert bool((model.logits(range(3, 20)) != plain).any()) is changed
    finally:
        model.close()


LOW = {"down": torch.ones(1, 96), "up": torch.ones(1, 96)}
REFUSED_AS_VECTOR: dict[str, Node] = {
    "rank 1.*no constant": Edit(Site(1), ALL, **LOW),
    "no constant": Edit(Site(1), ALL, scale=torch.full((96,), 2.0)),
    "attention_output.*no constant": Edit(Site(1, "attention_output"), ALL, shift=torch.ones(96)),
    "positions l1 only.*reft serve": Edit(Site(1), Positions.parse("l1"), shift=torch.ones(96)),
    "WeightDelta.*only adds constants": WeightDelta(Q, **FACTORS),
}


@pytest.mark.parametrize("message", REFUSED_AS_VECTOR)
def test_what_a_control_vector_cannot_hold_is_refused_by_name(message: str, bases: Any) -> None:
    config = AutoConfig.from_pretrained(bases("llama")[0])
    with pytest.raises(UnsupportedProgramError, match=message):
        make_control_vector(Program((REFUSED_AS_VECTOR[message],)), architecture_of(config), config)


def test_constants_of_the_mlp_add_up_with_those_of_the_layer(bases: Any, tmp_path: Path) -> None:
    base, file = bases("llama")
    adapter = as_adapter(
        base, Edit(Site(1, "mlp_output"), ALL, shift=noise(1, 96)), Edit(Site(1), ALL, shift=noise(2, 96))
    )
    found = compare(base, file, adapter, steer=steering(base, adapter, tmp_path / "vector.gguf"))
    assert found.max_logit_difference < EXACT
    assert found.base_mean_kl is not None and found.base_mean_kl > 0.05
