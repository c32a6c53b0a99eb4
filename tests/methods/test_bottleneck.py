"""Bottleneck adapters: the contract, and each placement against plain PyTorch hooks on a plain model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contract import (
    TOKENS,
    MethodCase,
    attached,
    gradients_reach_exactly_own,
    learns,
    lowering_error,
    reloads_exactly,
)
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import reft_plugins as reft
from reft_plugins.adapter import Adapter
from reft_plugins.base_model import identify
from reft_plugins.errors import AdapterError

Tasks = dict[bool, tuple[Path, Path]]
Tensors = Mapping[str, torch.Tensor]

LEARNING = [
    MethodCase(
        "bottleneck",
        {"placement": "pfeiffer", "bottleneck_size": 16, "activation": "silu"},
        training={"learning_rate": 5e-3, "epochs": 30},
        label="pfeiffer",
    ),
    MethodCase(
        "bottleneck",
        {"placement": "houlsby", "bottleneck_size": 16, "scaling": "channel"},
        training={"learning_rate": 5e-3, "epochs": 20},
        label="houlsby",
    ),
    MethodCase(
        "bottleneck",
        {"placement": "parallel", "bottleneck_size": 16, "scaling": 4.0},
        training={"learning_rate": 5e-3, "epochs": 16},
        label="parallel",
    ),
]
OTHERS = [
    MethodCase(
        "bottleneck",
        {"placement": "houlsby", "scaling": "learned", "activation": "gelu", "layers": [1, 2]},
        label="houlsby-learned",
    ),
    MethodCase("bottleneck", {"placement": "pfeiffer", "positions": "f2+l3", "scaling": 0.5}, label="pfeiffer-at"),
    MethodCase("bottleneck", {"placement": {"mlp_residual": "mlp_residual"}, "scaling": 2.0}, label="between"),
]
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"relu": F.relu, "silu": F.silu, "gelu": F.gelu}


@pytest.fixture(scope="module")
def trained(tiny_llama: Path, tasks: Tasks, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("trained")
    for case in LEARNING:
        learns(case, tiny_llama, *tasks[case.constant], folder / str(case))
    return [folder / str(case) for case in LEARNING]


def test_what_was_learned_comes_back_in_a_new_process(trained: list[Path], tiny_llama: Path, tmp_path: Path) -> None:
    reloads_exactly(trained, tiny_llama, tmp_path)


@pytest.mark.parametrize("case", LEARNING, ids=str)
def test_the_lowered_program_is_the_training_module(case: MethodCase, tiny_llama: Path) -> None:
    error, effect = lowering_error(case, tiny_llama)
    assert error <= 1e-5 < 0.05 < effect


@pytest.mark.parametrize("case", LEARNING, ids=str)
def test_gradients_reach_exactly_the_own_parameters(case: MethodCase, tiny_llama: Path, tasks: Tasks) -> None:
    gradients_reach_exactly_own(case, tiny_llama, tasks[case.constant][0])


def network(case: MethodCase, tensors: Tensors, unit: str, x: torch.Tensor) -> torch.Tensor:
    """`s (U act(D x + d) + u)`, from stored tensors."""
    activation = ACTIVATIONS[case.settings.get("activation", "relu")]
    inside = activation(x @ tensors[f"{unit}.down"].T + tensors[f"{unit}.down_bias"])
    scaling = case.settings.get("scaling", 1.0)
    factor = tensors[f"{unit}.scaling"] if isinstance(scaling, str) else scaling
    return factor * (inside @ tensors[f"{unit}.up"] + tensors[f"{unit}.up_bias"])


def by_hooks(case: MethodCase, tensors: Tensors, base: Path) -> np.ndarray:
    """Logits of the base with adapters put into it by hand, where the papers put them."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)

    def sub_layer(unit: str) -> Callable[..., Any]:
        def hook(module: Any, args: Any, output: Any) -> Any:
            y = output[0] if isinstance(output, tuple) else output
            y = y + network(case, tensors, unit, y)
            return (y, *output[1:]) if isinstance(output, tuple) else y

        return hook

    def layer_at_positions(unit: str) -> Callable[..., Any]:
        def hook(module: Any, args: Any, output: Any) -> Any:
            h = output[0] if isinstance(output, tuple) else output
            change = network(case, tensors, unit, h)
            if "positions" in case.settings:
                change[:, 2:-3] = 0.0
            h = h + change
            return (h, *output[1:]) if isinstance(output, tuple) else h

        return hook

    def parallel(layer: Any, unit: str) -> None:
        seen: list[torch.Tensor] = []
        layer.post_attention_layernorm.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        layer.mlp.register_forward_hook(lambda m, args, y: y + network(case, tensors, unit, seen.pop()))

    def between(layer: Any, unit: str) -> None:
        """The sum of residual and attention is changed both where the MLP reads it and where its output is added."""
        change: list[torch.Tensor] = []

        def before(module: Any, args: Any) -> Any:
            change.append(network(case, tensors, unit, args[0]))
            return (args[0] + change[0],)

        layer.post_attention_layernorm.register_forward_pre_hook(before)
        layer.mlp.register_forward_hook(lambda m, args, y: y + change.pop())

    for number, layer in enumerate(model.model.layers):
        if number not in case.settings.get("layers", range(4)):
            continue
        placement = case.settings["placement"]
        if placement == "houlsby":
            layer.self_attn.register_forward_hook(sub_layer(f"layers.{number}.attention_output"))
            layer.mlp.register_forward_hook(sub_layer(f"layers.{number}.mlp_output"))
        elif placement == "pfeiffer":
            layer.register_forward_hook(layer_at_positions(f"layers.{number}.block_output"))
        elif placement == "parallel":
            parallel(layer, f"layers.{number}.mlp_output")
        else:
            between(layer, f"layers.{number}.mlp_residual")
    with torch.inference_mode():
        logits: np.ndarray = model(torch.tensor([TOKENS])).logits[0].numpy()
    return logits


@pytest.mark.parametrize("case", [*LEARNING, *OTHERS], ids=str)
def test_the_program_does_what_hooks_on_the_model_do(case: MethodCase, tiny_llama: Path) -> None:
    _, trainable = attached(case, tiny_llama)
    tensors = {name: tensor.detach() for name, tensor in trainable.tensors().items()}
    runtime = reft.runtime("transformers", tiny_llama)
    adapter = Adapter.create("bottleneck", dict(case.settings), tensors, identify(tiny_llama))
    logits = runtime.logits(TOKENS, adapter=adapter)
    np.testing.assert_allclose(logits, by_hooks(case, tensors, tiny_llama), atol=2e-5)
    assert np.abs(logits - runtime.logits(TOKENS)).max() > 0.05


@pytest.mark.parametrize("case", [*LEARNING, *OTHERS], ids=str)
def test_training_starts_at_the_base(case: MethodCase, tiny_llama: Path) -> None:
    error, effect = lowering_error(case, tiny_llama, noise=0.0)
    assert error == effect == 0.0


def test_the_size_is_given_or_a_share_of_the_hidden_size(tiny_llama: Path) -> None:
    for settings, size in (({}, 8), ({"reduction_factor": 2}, 64), ({"bottleneck_size": 3}, 3)):
        _, trainable = attached(MethodCase("bottleneck", settings), tiny_llama)
        assert {len(t) for name, t in trainable.tensors().items() if name.endswith("down_bias")} == {size}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"placement": "nowhere"}, "placement"),
        ({"placement": {}}, "names no component"),
        ({"placement": {"mlp_activation": "mlp_activation"}}, "placement"),
        ({"activation": "sine"}, "unknown 'sine'"),
        ({"bottleneck_size": 200}, "bottleneck_size 200 exceeds the base model's hidden size 128"),
        ({"layers": [4]}, "layers \\[4\\] are outside the base model: 4 layers"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings: dict[str, Any], message: str, tiny_llama: Path) -> None:
    with pytest.raises(AdapterError, match=message):
        attached(MethodCase("bottleneck", settings), tiny_llama)


@pytest.mark.parametrize(
    ("settings", "names", "message"),
    [
        ({}, ["layers.0.mlp_output.down"], "placement 'pfeiffer' writes block_output only"),
        ({}, ["layers.0.down"], "is not of the form"),
        ({}, ["layers.0.block_output.down"], "layers.0.block_output.up' is missing"),
        ({}, [f"layers.0.block_output.{n}" for n in ("down", "up", "scaling")], "so none is expected"),
        ({"scaling": "channel"}, [f"layers.0.block_output.{n}" for n in ("down", "up")], "scaling' is missing"),
    ],
)
def test_tensors_that_do_not_fit_are_named(settings: dict[str, Any], names: list[str], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        Adapter.create("bottleneck", settings, {name: torch.ones(2, 4) for name in names}, None)
