"""AdapterHub's bottleneck and Compacter adapters against the library's own rule on a small model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from adapterhub_files import (
    BOTTLENECK,
    HIDDEN,
    LAYERS,
    LORA,
    State,
    bottleneck_logits,
    bottleneck_state,
    write,
)

import reft_plugins as reft
from reft_plugins.errors import AdapterError

TOKENS = list(range(5, 17))


@pytest.fixture(scope="module")
def runtime(tiny_llama: Path) -> Any:
    return reft.runtime("transformers", tiny_llama)


def same(runtime: Any, adapter: reft.Adapter, expected: Any) -> None:
    np.testing.assert_allclose(runtime.logits(TOKENS, adapter), expected, atol=3e-4)
    assert np.abs(expected - runtime.logits(TOKENS)).max() > 1.0, "the adapter must matter"


VARIANTS: dict[str, tuple[dict[str, Any], Any, dict[str, str]]] = {
    "double_seq_bn": (
        {"mh_adapter": True, "non_linearity": "swish"},
        torch.nn.functional.silu,
        {"attention_output": "attention_output", "mlp_output": "mlp_output"},
    ),
    "seq_bn": ({"original_ln_before": True}, torch.relu, {"block_output": "block_output"}),
    "par_bn": ({"is_parallel": True, "scaling": 4.0}, torch.relu, {"mlp_output": "mlp_residual"}),
    "scaled_par_bn": ({"is_parallel": True, "scaling": "learned"}, torch.relu, {"mlp_output": "mlp_residual"}),
    "adapter_plus": (
        {
            "original_ln_before": True,
            "original_ln_after": False,
            "residual_before_ln": False,
            "scaling": "channel",
            "non_linearity": "gelu",
        },
        torch.nn.functional.gelu,
        {"block_output": "block_output"},
    ),
    "attention only, reads the sum": (
        {"mh_adapter": True, "output_adapter": False, "original_ln_before": True, "non_linearity": "LeakyReLU"},
        torch.nn.functional.leaky_relu,
        {"mlp_residual": "mlp_residual"},
    ),
    "both parallel": (
        {"mh_adapter": True, "is_parallel": True, "non_linearity": "tanh", "scaling": 0.5},
        torch.tanh,
        {"attention_output": "attention_residual", "mlp_output": "mlp_residual"},
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_bottleneck_variants(runtime: Any, tiny_llama: Path, tmp_path: Path, name: str) -> None:
    changed, act, sites = VARIANTS[name]
    config = {**BOTTLENECK, **changed}
    tensors = bottleneck_state(config, dict.fromkeys(range(LAYERS), 8))
    adapter = reft.load(write(tmp_path, config, tensors), base=tiny_llama)
    assert adapter.manifest.method == "bottleneck" and adapter.manifest.config["placement"] == sites
    same(runtime, adapter, bottleneck_logits(runtime, TOKENS, config, tensors, act))


def test_layers_left_out_and_sizes_of_their_own(runtime: Any, tiny_llama: Path, tmp_path: Path) -> None:
    config = {**BOTTLENECK, "original_ln_before": True, "leave_out": [0], "reduction_factor": {"1": 32, "default": 16}}
    tensors = bottleneck_state(config, {1: 4, 2: 8, 3: 8})
    adapter = reft.load(write(tmp_path, config, tensors), base=tiny_llama)
    assert adapter.manifest.config["layers"] == [1, 2, 3]
    same(runtime, adapter, bottleneck_logits(runtime, TOKENS, config, tensors, torch.relu))


def test_safetensors_and_old_names(runtime: Any, tiny_llama: Path, tmp_path: Path) -> None:
    config = {**BOTTLENECK, "mh_adapter": True}
    tensors = bottleneck_state(config, dict.fromkeys(range(LAYERS), 8))
    expected = bottleneck_logits(runtime, TOKENS, config, tensors, torch.relu)
    directory = write(tmp_path / "safe", config, tensors)
    (directory / "pytorch_adapter.bin").unlink()
    safetensors.torch.save_file(tensors, directory / "adapter.safetensors")
    same(runtime, reft.load(directory, base=tiny_llama), expected)
    old = {
        name.replace("attention_adapters.adapters", "attention.output.attention_text_task_adapters").replace(
            "output_adapters.adapters", "output.layer_text_task_adapters"
        ): tensor
        for name, tensor in tensors.items()
    }
    few = {key: config[key] for key in ("mh_adapter", "output_adapter", "non_linearity", "original_ln_before")}
    same(runtime, reft.load(write(tmp_path / "old", few, old, version="2.0.0"), base=tiny_llama), expected)


@pytest.mark.parametrize("shared", [True, False])
def test_compacter(runtime: Any, tiny_llama: Path, tmp_path: Path, shared: bool) -> None:
    config = {**BOTTLENECK, "phm_layer": True, "phm_dim": 4, "non_linearity": "gelu", "scaling": 1.0}
    draw = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw) * 0.5

    stored: State = {"model.shared_parameters.task.phm_rule": random(4, 4, 4)} if shared else {}
    dense: State = {}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}.output_adapters.adapters.task"
        for part, rows, columns in (("adapter_down.0", HIDDEN, 8), ("adapter_up", 8, HIDDEN)):
            left, right = random(4, rows // 4, 1), random(4, 1, columns // 4)
            bias = random(columns)
            stored |= {f"{prefix}.{part}.W_left": left, f"{prefix}.{part}.W_right": right, f"{prefix}.{part}.b": bias}
            if shared:
                rules = stored["model.shared_parameters.task.phm_rule"]
            else:
                factors = random(4, 4, 1), random(4, 1, 4)
                stored |= {
                    f"{prefix}.{part}.phm_rule_{side}": t for side, t in zip(("left", "right"), factors, strict=True)
                }
                rules = factors[0] @ factors[1]
            products = torch.einsum("iab,icd->acbd", rules, left @ right).reshape(rows, columns)
            dense |= {f"{prefix}.{part}.weight": products.T, f"{prefix}.{part}.bias": bias}
    adapter = reft.load(write(tmp_path, config, stored), base=tiny_llama)
    same(runtime, adapter, bottleneck_logits(runtime, TOKENS, config, dense, torch.nn.functional.gelu))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**BOTTLENECK, "ln_before": True}, "ln_before=True is a norm of its own"),
        ({**BOTTLENECK, "ln_after": True}, "ln_after=True is a norm of its own"),
        ({**BOTTLENECK, "use_gating": True}, "use_gating=True is a gate"),
        ({**BOTTLENECK, "cross_adapter": True}, "cross_adapter=True"),
        ({**BOTTLENECK, "non_linearity": "mish"}, "activation 'mish'"),
        ({**BOTTLENECK, "original_ln_after": False}, "takes away the residual"),
        ({**BOTTLENECK, "original_ln_before": True, "residual_before_ln": False}, "doubles the residual"),
        ({**BOTTLENECK, "residual_before_ln": "post_add"}, "the library itself fails"),
        ({**BOTTLENECK, "is_parallel": True, "original_ln_after": False}, "takes the residual connection away"),
        ({**BOTTLENECK, "scaling": "learned"}, "scaling is 'learned', but there is no such tensor"),
        ({**BOTTLENECK, "output_adapter": False}, "none of the bottleneck adapters"),
        ({**LORA, "use_dora": True}, "use_dora=True is a DoRA whose norms"),
        ({**LORA, "vera_d": 0.1}, "vera_d=0.1 is VeRA"),
        (LORA, "no tensors of LoRA"),
        ({"architecture": "prefix_tuning"}, "'prefix_tuning' are not read: its prefixes do not move"),
        ({"architecture": "prompt_tuning"}, "'prompt_tuning' are not read"),
        ({"architecture": "something"}, "'something' are not read. Read are bottleneck"),
        ({"architecture": "union", "configs": [BOTTLENECK, {"architecture": "prefix_tuning"}]}, "'prefix_tuning'"),
        ("houlsby", "only a name, 'houlsby'.*save it again"),
        ({**BOTTLENECK, "scaling": [1]}, "settings and tensors are not those.*TypeError"),
        ({"architecture": "union", "configs": [3]}, "settings and tensors are not those.*AttributeError"),
    ],
)
def test_what_cannot_be_executed_is_refused_by_name(
    tiny_llama: Path, tmp_path: Path, config: Any, message: str
) -> None:
    tensors = bottleneck_state(BOTTLENECK, {1: 8})
    with pytest.raises(AdapterError, match=message):
        reft.load(write(tmp_path, config, tensors), base=tiny_llama)


def test_models_and_options_are_checked(tiny_llama: Path, tmp_path: Path) -> None:
    tensors = bottleneck_state(BOTTLENECK, {1: 8})
    with pytest.raises(AdapterError, match="made for a model of type gpt2, the base is of type llama"):
        reft.load(write(tmp_path, BOTTLENECK, tensors, model_type="gpt2"), base=tiny_llama)
    with pytest.raises(AdapterError, match="a model of type t5 is not known here"):
        reft.load(write(tmp_path, BOTTLENECK, tensors, model_type="t5"))
    write(tmp_path, BOTTLENECK, tensors)
    with pytest.raises(AdapterError, match="stores positions"):
        reft.load(tmp_path, base=tiny_llama, positions="f1")
    with pytest.raises(AdapterError, match="no option rank"):
        reft.load(tmp_path, base=tiny_llama, rank=3)
    with pytest.raises(AdapterError, match="'variant' tells NoReFT from DiReFT"):
        reft.load(tmp_path, base=tiny_llama, variant="direft")
    (tmp_path / "pytorch_adapter.bin").unlink()
    with pytest.raises(AdapterError, match=r"neither pytorch_adapter\.bin nor adapter\.safetensors"):
        reft.load(tmp_path, base=tiny_llama)


def test_invertible_adapters_count_where_they_are(tiny_llama: Path, tmp_path: Path) -> None:
    config, tensors = {**BOTTLENECK, "inv_adapter": "nice"}, bottleneck_state(BOTTLENECK, {1: 8})
    assert reft.load(write(tmp_path, config, tensors), base=tiny_llama).manifest.method == "bottleneck"
    tensors["model.invertible_adapters.task.F.0.weight"] = torch.zeros(2, 2)
    with pytest.raises(AdapterError, match="invertible adapter behind the embeddings"):
        reft.load(write(tmp_path, config, tensors), base=tiny_llama)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, ("mlp_output", "mlp_output")),
        ({"is_parallel": True}, ("mlp_output", "mlp_residual")),
        (
            {"original_ln_before": True, "original_ln_after": False, "residual_before_ln": False},
            ("block_output", "block_output"),
        ),
        ({"original_ln_before": True}, "reads the norm's output and writes what the norm reads"),
        ({"original_ln_before": True, "residual_before_ln": "post_add"}, "doubles"),
    ],
)
def test_models_that_normalise_behind_the_residual(tmp_path: Path, changed: Any, expected: Any) -> None:
    config = {**BOTTLENECK, **changed}
    tensors = {
        name.replace("model.layers", "bert.encoder.layer").replace("output_adapters.", "output."): tensor
        for name, tensor in bottleneck_state(config, {1: 8}).items()
    }
    write(tmp_path, config, tensors, model_type="bert", model_class="BertModel")
    if isinstance(expected, str):
        with pytest.raises(AdapterError, match=expected):
            reft.load(tmp_path)
        return
    (edit,) = reft.load(tmp_path).lower().edits
    assert (edit.site.component, edit.reads or edit.site.component) == expected
