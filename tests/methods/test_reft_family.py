"""The methods that edit hidden representations: the contract of every method, and each against its formula."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contract import TOKENS, MethodCase, attached, gradients_reach_exactly_own, learns, lowering_error, reloads_exactly
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.parametrizations import orthogonal

import reft_plugins as reft
from reft_plugins import plugins
from reft_plugins.adapter import Adapter, parse_config
from reft_plugins.base_model import identify
from reft_plugins.errors import AdapterError
from reft_plugins.methods.interventions.orthonormal import orthonormal_rows
from reft_plugins.training.trainer import Step

EVERYWHERE = {"positions": "all", "rank": 8}
CASES = [
    MethodCase("noreft", EVERYWHERE, training={"learning_rate": 1e-2, "epochs": 24}),
    MethodCase("direft", EVERYWHERE, training={"learning_rate": 5e-3, "epochs": 40}),
    MethodCase("direft_orthonormal", EVERYWHERE, training={"learning_rate": 1e-2, "epochs": 24}),
    MethodCase("consreft", EVERYWHERE, constant=True, training={"learning_rate": 5e-2, "epochs": 10}),
    MethodCase("lobireft", EVERYWHERE, constant=True, training={"learning_rate": 1e-1, "epochs": 10}),
    MethodCase(
        "red", {"component": ["mlp_output", "attention_output"]}, training={"learning_rate": 4e-2, "epochs": 40}
    ),
]
Tasks = dict[bool, tuple[Path, Path]]
HIDDEN, RANK = 128, 4


@pytest.fixture(scope="module")
def trained(tiny_llama: Path, tasks: Tasks, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("trained")
    for case in CASES:
        learns(case, tiny_llama, *tasks[case.constant], folder / str(case))
    return [folder / str(case) for case in CASES]


def test_what_was_learned_comes_back_in_a_new_process(trained: list[Path], tiny_llama: Path, tmp_path: Path) -> None:
    reloads_exactly(trained, tiny_llama, tmp_path)


UNSHARED: dict[str, Any] = {"positions": "f3+l3", "shared": False, "layers": [0, 2]}
"""Without the last layer, where what the prefix writes reaches no prediction."""
VARIANTS = [
    *CASES,
    *(
        MethodCase(name, {**UNSHARED, "activation": activation, "dropout": 0.1}, label=label)
        for name in ("loreft", "noreft", "direft", "direft_orthonormal")
        for activation in ("relu", "gelu")
        for label in (f"{name} {activation}",)
    ),
    MethodCase("loreft", {"component": ["mlp_output", "block_output"]}, label="loreft two components"),
    MethodCase("loreft", {"component": ["mlp_activation", "attention_value_output"]}, label="loreft inside sub-layers"),
    MethodCase("red", {**UNSHARED, "component": "block_output"}, label="red unshared"),
]


@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_the_lowered_program_is_the_training_module(case: MethodCase, tiny_llama: Path) -> None:
    error, effect = lowering_error(case, tiny_llama)
    assert error <= 1e-5 < 0.05 < effect


@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_gradients_reach_exactly_the_own_parameters(case: MethodCase, tiny_llama: Path, tasks: Tasks) -> None:
    gradients_reach_exactly_own(case, tiny_llama, tasks[False][0])


# --- against the formulas, written down once more -----------------------------------------------------------------

Parameters = Mapping[str, Tensor]
Act = Callable[[Tensor], Tensor]
FORMULAS: dict[str, Callable[[Tensor, Parameters, Act], Tensor]] = {
    "loreft": lambda h, p, act: h + (act(h @ p["weight"].T + p["bias"]) - h @ p["rotate"].T) @ p["rotate"],
    "noreft": lambda h, p, act: (
        h + (act(h @ p["weight"].T + p["bias"]) - (h @ p["projection"].T + p["projection_bias"])) @ p["projection"]
    ),
    "direft": lambda h, p, act: h + act(h @ p["weight"].T + p["bias"]) @ p["projection"],
    "direft_orthonormal": lambda h, p, act: h + act(h @ p["weight"].T + p["bias"]) @ p["rotate"],
    "consreft": lambda h, p, act: h + (p["source"] - h @ p["rotate"].T) @ p["rotate"],
    "lobireft": lambda h, p, act: h + p["source"] @ p["rotate"],
    "red": lambda h, p, act: h * p["scale"] + p["shift"],
}
MATRICES, VECTORS = ("weight", "projection", "rotate"), ("bias", "projection_bias", "source")
NAMES = {
    "loreft": ("rotate", "weight", "bias"),
    "noreft": ("projection", "weight", "bias", "projection_bias"),
    "direft": ("projection", "weight", "bias"),
    "direft_orthonormal": ("rotate", "weight", "bias"),
    "consreft": ("rotate", "source"),
    "lobireft": ("rotate", "source"),
    "red": ("scale", "shift"),
}
ACTIVATIONS: dict[str, Act] = {"identity": lambda x: x, "relu": torch.relu, "gelu": F.gelu}
LAYERS = (1, 2)


def strong(method: str, seed: int) -> dict[str, Tensor]:
    """Random parameters of one unit that change every answer of the small model."""
    draw = torch.Generator().manual_seed(seed)
    made = {}
    for name in NAMES[method]:
        shape = (RANK, HIDDEN) if name in MATRICES else (RANK,) if name in VECTORS else (HIDDEN,)
        tensor = torch.randn(*shape, generator=draw)
        if name == "rotate":
            tensor = torch.linalg.qr(tensor.T)[0].T.contiguous()
        made[name] = tensor * {"weight": 0.3, "projection": 0.3, "bias": 3.0, "source": 3.0}.get(name, 1.0)
    return made


@contextmanager
def by_hand(
    model: Any, units: Mapping[int, Sequence[tuple[list[int], Parameters]]], method: str, act: Act, component: str
) -> Iterator[None]:
    """Hooks that change the tokens `[start, stop)` of each group in turn, each reading what the one before wrote."""

    def hook_for(groups: Sequence[tuple[list[int], Parameters]]) -> Any:
        def hook(module: Any, args: Any, output: Any) -> Any:
            hidden = (output[0] if isinstance(output, tuple) else output).clone()
            for (start, stop), parameters in groups:
                hidden[:, start:stop] = FORMULAS[method](hidden[:, start:stop], parameters, act)
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return hook

    blocks = model.model.layers
    handles = [
        (blocks[layer].mlp if component == "mlp_output" else blocks[layer]).register_forward_hook(hook_for(groups))
        for layer, groups in units.items()
    ]
    yield
    for handle in handles:
        handle.remove()


@pytest.fixture(scope="module")
def runtime(tiny_llama: Path) -> Any:
    return reft.runtime("transformers", tiny_llama)


GROUPS = {
    ("f6+l7", False): [[(0, 6)], [(3, 10)]],
    ("f2+l3", True): [[(0, 2), (7, 10)]],
    ("l4", False): [[(6, 10)]],
}
LINEAR = ("loreft", "noreft", "direft", "direft_orthonormal")


@pytest.mark.parametrize(
    ("method", "activation"),
    [(m, a) for m in LINEAR for a in ACTIVATIONS] + [(m, "identity") for m in ("consreft", "lobireft", "red")],
)
@pytest.mark.parametrize(("positions", "shared"), GROUPS)
def test_the_program_computes_the_formula(
    method: str, activation: str, positions: str, shared: bool, runtime: Any
) -> None:
    component = "mlp_output" if method == "red" else "block_output"
    tensors: dict[str, Tensor] = {}
    units: dict[int, list[Any]] = {}
    for layer in LAYERS:
        for group, intervals in enumerate(GROUPS[positions, shared]):
            parameters = strong(method, seed=10 * layer + group)
            tensors |= {f"layers.{layer}.{component}.{group}.{name}": p for name, p in parameters.items()}
            units.setdefault(layer, []).extend((interval, parameters) for interval in intervals)
    config: dict[str, Any] = {"layers": LAYERS, "positions": positions, "shared": shared}
    if activation != "identity":
        config["activation"] = activation
    got = runtime.logits(TOKENS, Adapter.create(method, config, tensors, runtime.identity))
    tokens = torch.tensor([TOKENS])
    with torch.inference_mode(), by_hand(runtime.model, units, method, ACTIVATIONS[activation], component):
        want = runtime.model(input_ids=tokens).logits[0].numpy()
    np.testing.assert_allclose(got, want, atol=2e-4, rtol=1e-4)
    assert np.abs(want - runtime.logits(TOKENS)).max() > 1
    if len(GROUPS[positions, shared]) == 2 and method != "lobireft":  # a bias commutes with what was written before
        backwards = {layer: groups[::-1] for layer, groups in units.items()}
        with torch.inference_mode(), by_hand(runtime.model, backwards, method, ACTIVATIONS[activation], component):
            other = runtime.model(input_ids=tokens).logits[0].numpy()
        assert np.abs(got - other).max() > 0.05, "the order of overlapping groups must matter for this to test it"


def test_every_method_of_the_family_is_tested() -> None:
    from reft_plugins.methods.interventions import InterventionMethod

    family = {name for name, method in plugins.methods.all().items() if isinstance(method, InterventionMethod)}
    assert family == {*FORMULAS, "steering"}


@pytest.mark.parametrize("method", sorted(FORMULAS))
def test_dropout_is_on_the_edited_representation_while_training(method: str, tiny_llama: Path) -> None:
    settings: dict[str, Any] = {"layers": [1], "positions": "f6+l3", "dropout": 0.25}
    if method in LINEAR:
        settings["activation"] = "gelu"
    if method == "red":
        settings["component"] = "block_output"
    model, trainable = attached(MethodCase(method, settings), tiny_llama)
    seen: list[Tensor] = []
    model.model.layers[2].register_forward_pre_hook(lambda module, args: seen.append(args[0][0].detach()))
    step, tokens = Step(trainable), torch.tensor([TOKENS])
    batch = {"prompt_lengths": torch.tensor([10]), "input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    for training in (False, True):
        step.train(training)(**batch)
    edited = [0, 1, 2, 3, 4, 5, 7, 8, 9]
    whole, dropped = seen
    assert torch.equal(whole[6], dropped[6]), "a token that is not edited is not dropped"
    kept = dropped[edited] != 0
    torch.testing.assert_close(dropped[edited][kept], whole[edited][kept] / 0.75, atol=1e-4, rtol=1e-4)
    assert 0.7 < kept.float().mean() < 0.8


# --- rotations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "rank"), [(32, 4), (32, 1), (128, 64)])
@pytest.mark.parametrize("step", [0.1, 3.0])
def test_rotations_are_what_torchs_parametrisation_computes(size: int, rank: int, step: float) -> None:
    torch.manual_seed(size)
    ours = orthonormal_rows(size, rank)
    start = ours.weight.detach().clone()
    torch.testing.assert_close(start @ start.T, torch.eye(rank), atol=1e-5, rtol=0)
    theirs = torch.nn.Linear(size, rank, bias=False)
    theirs.weight.data = start
    theirs = orthogonal(theirs)
    move = step * torch.randn(rank, size)
    part: Any = ours.parametrizations.weight[0]
    turn = torch.eye(size) - part.start_vectors.T @ part.start_factor @ part.start_vectors
    theirs.parametrizations.weight[0].base = turn * -part.signs
    for layer in (ours, theirs):
        layer.parametrizations.weight.original.data += move
    theirs.parametrizations.weight.original.data.diagonal().fill_(-1)
    torch.testing.assert_close(ours.weight, theirs.weight, atol=1e-5, rtol=0)
    assert (ours.weight - start).abs().max() > 0.02
    weights = torch.randn(rank, size)
    gradients = []
    for layer in (ours, theirs):
        (layer.weight * weights).sum().backward()
        gradients.append(layer.parametrizations.weight.original.grad.triu(1))
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-3)
    assert gradients[0].abs().max() > 1e-3


@pytest.mark.parametrize(("size", "rank"), [(8, 8), (128, 127), (300, 2)])
def test_rows_stay_orthonormal_however_far_they_are_moved(size: int, rank: int) -> None:
    rotation = orthonormal_rows(size, rank)
    start = rotation.weight.detach().clone()
    for step in (0.0, 0.1, 30.0):
        rotation.parametrizations.weight.original.data += step * torch.randn(rank, size)  # type: ignore[union-attr]
        torch.testing.assert_close(rotation.weight @ rotation.weight.T, torch.eye(rank), atol=1e-5, rtol=0)
    assert (rotation.weight - start).abs().max() > 0.1


def test_a_rotation_keeps_nothing_larger_than_itself() -> None:
    assert max(tensor.numel() for tensor in orthonormal_rows(512, 4).state_dict().values()) == 4 * 512


# --- settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"component": "nose"}, "unknown 'nose'"),
        ({"component": []}, "one or more different"),
        ({"component": ["mlp_output", "mlp_output"]}, "one or more different"),
        ({"layers": [1, 1]}, "one or more different"),
        ({"activation": "square"}, "unknown 'square'"),
        ({"positions": "x9"}, "x9"),
        ({"dropout": 1.0}, "less than 1"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        parse_config(plugins.methods.get("loreft"), settings)


def test_a_constant_has_no_activation() -> None:
    for name in ("consreft", "lobireft"):
        parse_config(plugins.methods.get(name), {"activation": "identity"})
        with pytest.raises(ValidationError):
            plugins.methods.get(name).config(activation="relu")


def test_tensors_that_do_not_fit_are_named(tiny_llama: Path) -> None:
    identity, unit = identify(tiny_llama), "layers.0.block_output.0"
    good = {f"{unit}.{name}": tensor for name, tensor in strong("noreft", 0).items()}
    without = {name: tensor for name, tensor in good.items() if not name.endswith(".projection")}
    with pytest.raises(AdapterError, match=r"'layers\.0\.block_output\.0\.projection' is missing"):
        Adapter.create("noreft", {}, without, identity)
    with pytest.raises(AdapterError, match=r"projection \[3, 128\] and weight \[4, 128\] differ"):
        Adapter.create("noreft", {}, {**good, f"{unit}.projection": good[f"{unit}.projection"][:3]}, identity)
    with pytest.raises(AdapterError, match="not of the form"):
        Adapter.create("noreft", {}, {"layers.0.weight": good[f"{unit}.weight"]}, identity)
    with pytest.raises(AdapterError, match=r"positions 'f7\+l7' have only 1"):
        Adapter.create("noreft", {}, {name.replace("output.0", "output.1"): t for name, t in good.items()}, identity)
    bare = {name: tensor for name, tensor in good.items() if not name.endswith("bias")}
    assert Adapter.create("noreft", {"activation": "relu"}, bare, identity).lower().edits[1].bias is None
