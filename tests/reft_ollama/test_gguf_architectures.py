"""Every architecture in a real llama.cpp against transformers: the base, changed weights, and settings that matter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_files import write
from strong_programs import Strong
from tiny_bases import BASES, WINDOW, make_base
from tiny_models import sentences
from transformers import CONFIG_MAPPING, AutoConfig

from reft_ollama.architectures.table import ARCHITECTURES, architecture_of
from reft_ollama.job import Job
from reft_ollama.llama_cpp import LlamaCppModel, Logits, compare_llama_cpp
from reft_plugins import plugins
from reft_plugins.errors import ExportError
from reft_plugins.program import Program

EXACT = 1e-4
LENGTH = 100
NOTHING = Program(())
MakeBase = Callable[..., Path]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> MakeBase:
    """Makes a base of a model type and settings, each once."""
    made: dict[str, Path] = {}

    def make(model_type: str, **config: Any) -> Path:
        key = f"{model_type} {config}"
        if key not in made:
            made[key] = make_base(model_type, tmp_path_factory.mktemp("bases") / "base", **config)
        return made[key]

    return make


def runtime(base: Path) -> Any:
    return plugins.runtimes.get("transformers")(base, dtype="float32")


def text(runtime: Any, length: int = LENGTH) -> list[int]:
    """Far more tokens than a window."""
    ids: list[int] = runtime.tokenizer(" ".join(sentences(40, seed=101))).input_ids[:length]
    assert len(ids) == length > 4 * WINDOW
    return ids


def both(base: Path, target: Path, length: int = LENGTH, context: int = LENGTH) -> tuple[Logits, Logits]:
    """Logits of a bare base in transformers and in llama.cpp."""
    reference = runtime(base)
    ids = text(reference, length)
    model = LlamaCppModel(write(base, NOTHING, target), context=context)
    try:
        return reference.logits(ids), model.logits(ids)
    finally:
        model.close()


def difference(one: Logits, other: Logits) -> float:
    return float(np.abs(one - other).max())


def test_every_architecture_is_tested() -> None:
    assert set(BASES) == set(ARCHITECTURES)


@pytest.mark.parametrize("model_type", BASES)
def test_bare_base_and_changes_of_all_linear_modules(model_type: str, base: MakeBase, tmp_path: Path) -> None:
    folder = base(model_type)
    wanted, got = both(folder, tmp_path / "base.gguf")
    assert difference(wanted, got) < EXACT
    strong, config = Strong(folder, seed=1), AutoConfig.from_pretrained(folder)
    assert set(strong.sizes) == architecture_of(config).linear_modules(config) - {"lm_head"}
    adapter = strong.adapter([strong.lora(module, strength=0.5) for module in strong.sizes])
    reference = runtime(folder)
    found = compare_llama_cpp(
        write(folder, adapter.lower(), tmp_path / "model.gguf"),
        [text(reference)],
        lambda ids: reference.logits(ids, adapter),
        reference.logits,
    )
    assert found.max_logit_difference < EXACT
    assert found.base_top1_agreement is not None and found.base_top1_agreement < 0.7


def rope(rope_type: str, theta: float = 10000.0, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": theta, **settings}}


YARN = {"factor": 4.0, "original_max_position_embeddings": 64}
UNUSUAL_YARN = {**YARN, "attention_factor": 1.5, "beta_fast": 8, "beta_slow": 2, "truncate": False}
LLAMA3 = {**YARN, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LOCAL = {"rope_type": "default", "rope_theta": 500.0}
GLOBAL = {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}

SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "biases everywhere": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "Llama-3 scaling": ("llama", rope("llama3", **LLAMA3)),
    "linear scaling": ("mistral", rope("linear", factor=4.0)),
    "YaRN in a table": ("qwen2", rope("yarn", **YARN)),
    "YaRN of its own kind in a table": ("llama", rope("yarn", **UNUSUAL_YARN)),
    "YaRN by llama.cpp": ("qwen3", rope("yarn", **YARN)),
    "YaRN by llama.cpp, another attention factor": ("qwen3", rope("yarn", **YARN, attention_factor=1.5)),
    "linear scaling by llama.cpp": ("qwen3", rope("linear", factor=4.0)),
    "biases beside normalised queries": ("qwen3", {"attention_bias": True}),
    "tied output layer": ("qwen2", {"tie_word_embeddings": True}),
    "half of each head rotated": ("phi3", {"partial_rotary_factor": 0.5}),
    "scale of Gemma 2's largest model": ("gemma2", {"num_hidden_layers": 46}),
    "scale of Gemma 3's largest model": ("gemma3_text", {"num_hidden_layers": 62}),
    "another window": ("gemma2", {"sliding_window": 24}),
    "windows in other layers": (
        "gemma2",
        {"layer_types": [f"{kind}_attention" for kind in ("full", "sliding", "sliding", "full")]},
    ),
    "layers as llama.cpp expects them": ("gemma3_text", {"num_hidden_layers": 7, "sliding_window_pattern": 6}),
    "no window": ("gemma3_text", {"layer_types": ["full_attention"] * 4}),
    "two rotary scalings": (
        "gemma3_text",
        {"rope_parameters": {"sliding_attention": LOCAL, "full_attention": GLOBAL}},
    ),
    "capped logits": ("gemma3_text", {"final_logit_softcapping": 3.0}),
    "untied output layer": ("gemma3_text", {"tie_word_embeddings": False}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(name: str, base: MakeBase, tmp_path: Path) -> None:
    model_type, settings = SETTINGS[name]
    folder, plain = base(model_type, **settings), base(model_type)
    wanted, got = both(folder, tmp_path / "model.gguf", length=70)
    rounding = settings.get("num_hidden_layers", 4) / 16  # adds up over layers
    assert difference(wanted, got) < EXACT * max(1, rounding)
    without = runtime(plain)
    assert difference(wanted, without.logits(text(without, 70))) > 0.1, "the setting hardly matters"


@pytest.mark.parametrize("rotated", [1.0, 0.75])
def test_longrope_by_the_size_of_the_context(rotated: float, base: MakeBase, tmp_path: Path) -> None:
    """Frequencies for short and long texts, as both runtimes choose them where the warning says that they agree."""
    pairs = int(16 * rotated)
    scaled = rope(
        "longrope",
        original_max_position_embeddings=256,
        short_factor=[1 + 0.1 * pair for pair in range(pairs)],
        long_factor=[1 + 0.5 * pair for pair in range(pairs)],
        partial_rotary_factor=rotated,
    )
    folder = base("phi3", **scaled, original_max_position_embeddings=256)
    (warning,) = architecture_of(AutoConfig.from_pretrained(folder)).warnings(AutoConfig.from_pretrained(folder))
    assert "256 tokens" in warning
    short, got = both(folder, tmp_path / "model.gguf", length=200, context=256)
    assert difference(short, got) < EXACT
    long, got = both(folder, tmp_path / "model.gguf", length=260, context=512)
    assert difference(long, got) < 2 * EXACT
    assert difference(long[:200], short) > 0.1, "both tables are the same"


CAPPED: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": WINDOW},
    "phi3": {"sliding_window": WINDOW},
    "qwen2": {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 2},
    "qwen3": {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 3},
}


@pytest.mark.parametrize("model_type", CAPPED)
def test_a_window_the_loader_ignores_caps_the_context(model_type: str, base: MakeBase, tmp_path: Path) -> None:
    folder = base(model_type, **CAPPED[model_type])
    config = AutoConfig.from_pretrained(folder)
    (warning,) = architecture_of(config).warnings(config)
    assert f"{WINDOW} tokens, not 512" in warning
    wanted, got = both(folder, tmp_path / "model.gguf")
    assert difference(wanted[:WINDOW], got[:WINDOW]) < EXACT
    assert difference(wanted, got) > 0.1, "the warning is wrong"
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    (length,) = (field for key, field in reader.fields.items() if key.endswith(".context_length"))
    assert length.contents() == WINDOW
    adapter = Strong(folder).adapter(Strong(folder).lora("model.layers.0.self_attn.o_proj"))
    assert warning in Job.prepare(adapter, folder, False, lambda *_: None).warnings
    config.sliding_window = 512
    assert architecture_of(config).warnings(config) == []


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text"])
def test_gates_that_gelu_bends(model_type: str, base: MakeBase, tmp_path: Path) -> None:
    """As close as llama.cpp's table of GELU in half precision lets it be: compiled without it, it differs by 3e-5."""
    wanted, got = both(base(model_type, gemma_mlp_gain=1.0), tmp_path / "model.gguf")
    assert difference(wanted, got) < 0.03


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize("model_type", ["qwen2", "gemma3_text", "phi3"])
def test_smaller_number_formats(model_type: str, dtype: str, base: MakeBase, tmp_path: Path) -> None:
    folder = base(model_type, gemma_mlp_gain=1.0)
    reference = runtime(folder)
    found = compare_llama_cpp(
        write(folder, NOTHING, tmp_path / "model.gguf", dtype), [text(reference)], reference.logits
    )
    assert found.top1_agreement > 0.9 and found.mean_kl < 0.01


REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "hidden_act 'gelu'": ("llama", {"hidden_act": "gelu"}),
    "hidden_act 'gelu_new'": ("qwen2", {"hidden_act": "gelu_new"}),
    "hidden_activation 'silu'": ("gemma2", {"hidden_activation": "silu"}),
    "rope_type 'dynamic'": ("llama", rope("dynamic", factor=2.0)),
    "rope_type 'llama3'": ("qwen3", rope("llama3", **LLAMA3)),
    "rope_type 'yarn'": ("gemma2", rope("yarn", **YARN)),
    "YaRN's beta_fast, beta_slow, truncate": ("qwen3", rope("yarn", **UNUSUAL_YARN)),
    "rope_type 'linear' of layers with a sliding window": (
        "gemma3_text",
        {"rope_parameters": {"sliding_attention": GLOBAL, "full_attention": GLOBAL}},
    ),
    "partial_rotary_factor": ("qwen3", rope("default", partial_rotary_factor=0.5)),
    "attention_bias": ("gemma3_text", {"attention_bias": True}),
    "tie_word_embeddings false": ("gemma2", {"tie_word_embeddings": False}),
    "attn_logit_softcapping None": ("gemma2", {"attn_logit_softcapping": None}),
    "attn_logit_softcapping 20.0": ("gemma3_text", {"attn_logit_softcapping": 20.0}),
    "final_logit_softcapping None": ("gemma2", {"final_logit_softcapping": None}),
    "use_bidirectional_attention": ("gemma3_text", {"use_bidirectional_attention": True}),
    "sliding_window None": ("gemma2", {"sliding_window": None}),
    "layer_types without sliding_attention": ("gemma2", {"layer_types": ["full_attention"] * 26}),
    "layer_types ['chunked_attention', 'full_attention']": (
        "qwen3",
        {"layer_types": ["chunked_attention", "full_attention"] * 16},
    ),
    "quantization_config": ("llama", {"quantization_config": {"quant_method": "fp8"}}),
}


@pytest.mark.parametrize("setting", REFUSED)
def test_settings_the_loader_would_ignore_are_refused_by_name(setting: str) -> None:
    model_type, settings = REFUSED[setting]
    architecture_of(CONFIG_MAPPING[model_type]())
    with pytest.raises(ExportError) as caught:
        architecture_of(CONFIG_MAPPING[model_type](**settings))
    assert f"does not run {setting}. Serve" in str(caught.value)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("mixtral", "'mixtral' models, which are mixtures of experts; it writes gemma2, "),
        ("qwen3_moe", "'qwen3_moe' models, which are mixtures of experts"),
        ("gemma3", "'gemma3' models, which hold more than a text model (theirs is 'gemma3_text')"),
        ("gpt2", "'gpt2' models; it writes"),
    ],
)
def test_other_models_are_refused_by_name(model_type: str, reason: str) -> None:
    with pytest.raises(ExportError) as caught:
        architecture_of(CONFIG_MAPPING[model_type]())
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("qwen3", "model.layers.0.self_attn.o_proj.bias"),
        ("gemma2", "model.layers.0.mlp.gate_proj.bias"),
        ("gemma2", "lm_head.weight"),
        ("llama", "lm_head.bias"),
        ("llama", "model.layers.0.self_attn.q_norm.weight"),
        ("llama", "model.embed_positions.weight"),
    ],
)
def test_parameters_without_a_place_are_refused_by_name(model_type: str, name: str) -> None:
    config = CONFIG_MAPPING[model_type]()
    architecture = architecture_of(config)
    assert not name.endswith("proj.bias") or not architecture.takes_bias(name.removesuffix(".bias"))
    with pytest.raises(ExportError, match=f"no place for its tensor '{name}'"):
        architecture.parts(name, (8,), config)


def test_fused_projections_keep_their_biases_and_factors(base: MakeBase) -> None:
    """What becomes of a fused module's rows also serves for the rows of a low-rank factor, and for a bias."""
    config = AutoConfig.from_pretrained(base("phi3"))
    architecture = architecture_of(config)
    name = architecture.module(1, "query")
    weight = torch.randn(256, 128, generator=torch.Generator().manual_seed(0))
    up, down = torch.randn(256, 3), torch.randn(3, 128)
    for part in architecture.parts(f"{name}.weight", (256, 128), config):
        torch.testing.assert_close(part.make(weight + up @ down), part.make(weight) + part.make(up) @ down)
        assert tuple(part.make(weight).shape) == part.shape
    biases = architecture.parts(f"{name}.bias", (256,), config)
    assert [part.name for part in biases] == [f"blk.1.attn_{part}.bias" for part in "qkv"]
    assert [tuple(part.make(weight[:, 0]).shape) for part in biases] == [(128,), (64,), (64,)]
