"""The closed-form fit, the composition of edits and the recovered norm, against independent computations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from reft_ollama.architectures.table import architecture_of
from reft_ollama.weights.checkpoint import Checkpoint
from reft_ollama.weights.installation import install
from reft_ollama.weights.stack import BaseWeights, parameters
from reft_ollama.weights.widening import TOLERANCE, NormFit, Widened, Widening
from reft_plugins.fidelity.reference import Reference
from reft_plugins.fidelity.texts import Text
from reft_plugins.fitting.affine import compose, is_affine
from reft_plugins.fitting.layers import fit_layers
from reft_plugins.fitting.regression import Moments, reduced_rank_regression
from reft_plugins.positions import Positions
from reft_plugins.program import Edit, Program, Site

ALL = Positions.parse("all")


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments_of(x: torch.Tensor, t: torch.Tensor, chunks: int = 7) -> Moments:
    moments = Moments()
    for part_x, part_t in zip(x.chunk(chunks), t.chunk(chunks), strict=True):
        moments.add(part_x, part_t)
    return moments


def test_moments_of_streamed_chunks_are_those_of_all_data() -> None:
    x, t = random(1, 500, 6) + 3, random(2, 500, 4) - 2
    xx, xt, tt = moments_of(x, t).about(x.mean(0), t.mean(0))
    together = torch.cov(torch.cat([x, t], 1).T, correction=0)
    assert torch.allclose(torch.cat([torch.cat([xx, xt], 1), torch.cat([xt.T, tt], 1)], 0), together, atol=1e-12)


def test_a_planted_low_rank_map_is_recovered_and_a_smaller_rank_is_not_enough() -> None:
    x = random(1, 4000, 20) @ random(2, 20, 20) + 1
    planted, constant = random(3, 10, 3) @ random(4, 3, 20), random(5, 10)
    t = x @ planted.T + constant
    split = moments_of(x[:3000], t[:3000]), moments_of(x[3000:], t[3000:])
    fit = reduced_rank_regression(*split, rank=3)
    assert torch.allclose(fit.left @ fit.right, planted, atol=1e-4)
    assert torch.allclose(fit.constant, constant, atol=1e-3)
    assert fit.error < 1e-4 and fit.left.shape == (10, 3) and fit.right.shape == (3, 20)
    assert reduced_rank_regression(*split, rank=2).error > 0.1


def test_rank_is_cut_where_it_costs_least_on_the_data_not_in_the_matrix() -> None:
    """The second direction of the map is the larger one, but the data hardly ever use it."""
    x = random(1, 5000, 2) * torch.tensor([10.0, 0.01], dtype=torch.float64)
    full = torch.tensor([[1.0, 0.0], [0.0, 5.0]], dtype=torch.float64)
    fit = reduced_rank_regression(moments_of(x[:4000], x[:4000] @ full.T), moments_of(x[4000:], x[4000:] @ full.T), 1)
    assert abs(float((fit.left @ fit.right)[0, 0]) - 1) < 1e-3
    assert fit.error < 0.01


def test_noise_asks_for_a_ridge() -> None:
    x = random(1, 60, 50)
    truth = random(2, 1, 50)
    t = x @ truth.T + 20 * random(3, 60, 1)
    fit = reduced_rank_regression(
        moments_of(x[:55], t[:55]), moments_of(random(4, 4000, 50), random(4, 4000, 50) @ truth.T), 1
    )
    least_squares = torch.linalg.lstsq(x, t).solution.T
    assert (fit.left @ fit.right - truth).norm() < 0.9 * (least_squares - truth).norm()


def edits(*changes: dict[str, Any]) -> list[Edit]:
    return [Edit(Site(0), ALL, **change) for change in changes]


def run(sequence: list[Edit], state: torch.Tensor) -> torch.Tensor:
    """Edits one by one, straight from their definition."""
    before = after = state
    for edit in sequence:
        source = before if edit.simultaneous else after
        change = torch.zeros_like(source)
        if edit.scale is not None:
            change = change + source * (edit.scale - 1)
        if edit.down is not None and edit.up is not None:
            low = source @ edit.down.T + (0 if edit.bias is None else edit.bias)
            change = change + (torch.relu(low) if edit.activation == "relu" else low) @ edit.up
        before, after = source, after + change + (0 if edit.shift is None else edit.shift)
    return after


def test_composed_edits_do_what_the_edits_do_one_after_another() -> None:
    low = [{"down": random(i, 2, 9), "up": random(i + 50, 2, 9), "bias": random(i + 70, 2)} for i in range(3)]
    sequence = edits(
        low[0],
        {**low[1], "shift": random(8, 9)},
        {**low[2], "simultaneous": True},
        {"scale": random(9, 9), "simultaneous": True},
        {
            "down": torch.zeros(2, 9, dtype=torch.float64),
            "up": random(10, 2, 9),
            "bias": random(11, 2),
            "activation": "relu",
        },
        {"scale": random(12, 9), "shift": random(13, 9)},
    )
    state = random(20, 30, 9)
    composed = compose(sequence)
    assert torch.allclose(state + composed.change(state), run(sequence, state), atol=1e-10)
    assert not composed.constant
    assert not torch.allclose(run(sequence, state), run(sequence[::-1], state), atol=1e-3)


def test_constant_and_affine_edits_are_told_apart() -> None:
    constant = edits({"down": torch.zeros(1, 9), "up": random(1, 1, 9), "activation": "tanh"}, {"shift": random(2, 9)})
    assert all(map(is_affine, constant)) and compose(constant).constant
    assert compose(edits({"scale": torch.ones(9)})).constant
    assert not is_affine(edits({"down": random(1, 1, 9), "up": random(1, 1, 9), "activation": "relu"})[0])


@pytest.mark.parametrize(("low", "high"), [(0.1, 3.0), (0.015, 0.3), (0.02, 5.0), (0.5, 120.0)])
def test_the_norm_is_recovered_over_its_range(low: float, high: float) -> None:
    fit = NormFit.over(low, high)
    norms = torch.logspace(
        torch.tensor(low).log10().item(), torch.tensor(high).log10().item(), 999, dtype=torch.float64
    )
    recovered = torch.nn.functional.silu(fit.a / norms[:, None] + fit.b) @ fit.c
    assert float((recovered / norms - 1).abs().max()) <= 1.01 * fit.error <= 1.5 * TOLERANCE
    beyond = torch.tensor([low / 3, high * 3], dtype=torch.float64)
    recovered = torch.nn.functional.silu(fit.a / beyond[:, None] + fit.b) @ fit.c
    assert float((recovered / beyond - 1).abs().max()) < 0.02, "and degrades slowly outside"


def texts(runtime: Any) -> list[Text]:
    from tiny_models import sentences

    rows = [runtime.tokenizer(" ".join(sentences(5, seed))).input_ids for seed in range(60)]
    return [Text(tuple(row), len(row), "test") for row in rows]


@pytest.fixture
def fresh_runtime(tiny_llama: Path) -> Any:
    """A runtime whose model a test may change."""
    from reft_plugins import plugins

    return plugins.runtimes.get("transformers")(tiny_llama, dtype="float32")


def two_layers() -> Program:
    low = [{"down": random(i, 3, 128).float() * 0.08, "up": random(i + 9, 3, 128).float() * 0.08} for i in (1, 2)]
    return Program((Edit(Site(1), ALL, **low[0]), Edit(Site(2), ALL, **low[1], bias=torch.ones(3))))


def test_fitted_layers_see_the_layers_fitted_before_them(fresh_runtime: Any) -> None:
    """The fit of layer 2 alone, on the bare base, is a different one."""
    program = two_layers()
    rows = texts(fresh_runtime)
    reference = Reference(fresh_runtime, program)
    fits = fit_layers(reference, program.nodes, rows)
    assert set(fits.updates) == {"model.layers.1.mlp.down_proj", "model.layers.2.mlp.down_proj"}
    assert all(0 < error < 0.35 for error in fits.errors.values())
    name = "model.layers.2.mlp.down_proj"
    alone = fit_layers(reference, program.nodes[1:], rows).updates[name]
    together = fits.updates[name]
    assert not torch.allclose(alone.left @ alone.right, together.left @ together.right, rtol=0.05)


def test_widening_with_an_edit_of_nothing_changes_no_logit(fresh_runtime: Any, tiny_llama: Path) -> None:
    config = fresh_runtime.model.config
    architecture = architecture_of(config)
    checkpoint = Checkpoint(tiny_llama)
    gain = checkpoint.load("model.layers.1.post_attention_layernorm.weight")
    nothing = compose(edits({"down": random(1, 2, 128).float(), "up": torch.zeros(2, 128)}))
    tokens = list(range(3, 90))
    before = fresh_runtime.logits(tokens)
    widening = Widening(config, {1: nothing}, {1: (0.1, 3.0)}, {1: gain})
    weights = Widened(BaseWeights(checkpoint, architecture, config), architecture, widening)
    assert weights.config.hidden_size == 160 and weights.config.intermediate_size % 32 == 0
    assert weights.shapes == {name: tuple(torch.cat(tuple(rows)).shape) for name, rows in parameters(weights)}
    install(weights, architecture, fresh_runtime.model, torch.float32)
    after = fresh_runtime.logits(tokens)
    assert abs(before - after).max() < 2e-5
