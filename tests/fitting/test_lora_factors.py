"""Low-rank factors of changes of weights, and constants as linear maps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from strong_programs import Strong
from tiny_models import sentences
from torch import Tensor

from reft_plugins import plugins
from reft_plugins.base_model import BaseModel
from reft_plugins.fidelity.reference import Reference
from reft_plugins.fidelity.texts import running_text
from reft_plugins.fitting.constants import fit_constants
from reft_plugins.fitting.lora_plan import hold
from reft_plugins.fitting.running import Student, applied
from reft_plugins.fitting.truncation import factorise, stack, truncate
from reft_plugins.fitting.updates import LowRank
from reft_plugins.formats.peft.base_modules import BaseModules
from reft_plugins.program import Program, WeightDelta


def decaying(out: int, inside: int) -> tuple[Tensor, Tensor]:
    """A matrix whose singular values halve, and these."""
    draw = torch.Generator().manual_seed(0)
    count = min(out, inside)
    values = 3 * 0.5 ** torch.arange(count, dtype=torch.float64)
    left, right = (torch.linalg.qr(torch.randn(n, count, generator=draw).double())[0] for n in (out, inside))
    return (left * values) @ right.T, values


@pytest.mark.parametrize(("out", "inside"), [(12, 30), (30, 12), (16, 16)])
@pytest.mark.parametrize("rank", [1, 3, 0.5, 0.99, 1.0])
def test_factors_are_the_closest_of_their_rank(out: int, inside: int, rank: float) -> None:
    matrix, values = decaying(out, inside)
    energy = values.square().cumsum(0) / values.square().sum()
    expected = rank if isinstance(rank, int) else int((energy < rank - 1e-13).sum()) + 1
    lefts, rights = torch.randn(out, 20).double(), torch.randn(20, inside).double()
    product = LowRank(lefts, rights)
    for (update, lost), whole in (
        (factorise(matrix, rank), matrix),
        (truncate(LowRank(matrix, torch.eye(inside).double()), rank), matrix),
        (truncate(product, rank), lefts @ rights),
    ):
        ideal = torch.linalg.svd(whole).S
        count = len(update.right)
        if whole is matrix:
            assert abs(count - expected) <= (rank == 1.0) * 3
        if not isinstance(rank, int):
            assert lost <= 1 - rank + 1e-12
        missing = (whole - update.left @ update.right).norm()
        assert torch.allclose(missing, ideal[count:].norm(), atol=1e-6)
        assert lost == pytest.approx(float(ideal[count:].square().sum() / ideal.square().sum()), abs=1e-12)


def test_factors_within_the_rank_stay_as_they_are() -> None:
    update = LowRank(torch.randn(8, 3), torch.randn(3, 9))
    same, lost = truncate(update, 3)
    assert same.left is update.left and same.right is update.right and lost == 0
    padded = LowRank(torch.cat([update.left, torch.zeros(8, 2)], 1), torch.randn(5, 9))
    assert len(truncate(padded, 5)[0].right) == 3
    wide, lost = truncate(stack([update, LowRank(torch.randn(8, 9), torch.randn(9, 9))]), 12)
    assert len(wide.right) == 8 and lost < 1e-12


@pytest.mark.parametrize("kind", ["dora", "ia3", "whole", "several"])
def test_a_change_of_any_kind_becomes_factors(tiny_llama: Path, kind: str) -> None:
    strong = Strong(tiny_llama, seed=1)
    module = "model.layers.1.self_attn.v_proj"
    modules = BaseModules.of(BaseModel.open(tiny_llama))
    weight = modules.matrix(module)
    out, inside = weight.shape
    deltas = {
        "dora": [strong.dora(module, bias=True)],
        "ia3": [WeightDelta(module, input_scale=strong.scales(inside), output_scale=strong.scales(out))],
        "whole": [WeightDelta(module, new_weight=strong.normal(out, inside), new_bias=strong.normal(out))],
        "several": [strong.lora(module), strong.dora(module), strong.lora(module)],
    }[kind]
    held = hold(deltas, module, modules, 64)
    runtime = plugins.runtimes.get("transformers")(tiny_llama, dtype="float32")
    x, linear = torch.randn(1, 5, inside), runtime.model.get_submodule(module)
    with torch.inference_mode():
        own = linear(x)
        with runtime.executor(runtime.model).run([Program(tuple(deltas))], torch.tensor([5])):
            wanted = linear(x)
        with applied(runtime.model, {module: held.update}):
            got = linear(x) + (0 if held.bias is None else held.bias.float())
    assert held.lost < 1e-12
    assert (held.bias is not None) == (kind in ("dora", "whole"))
    torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-5)
    assert (own - wanted).abs().max() > 0.1


def test_a_constant_is_nearly_added_by_a_linear_map(tiny_llama: Path) -> None:
    runtime = plugins.runtimes.get("transformers")(tiny_llama, dtype="float32")
    texts = [running_text(tuple(runtime.tokenizer(" ".join(sentences(8, n))).input_ids), "own") for n in range(40)]
    module = "model.layers.2.self_attn.v_proj"
    constant = Strong(tiny_llama).normal(64)
    student = Student.of(Reference(runtime, Program(())), [])
    update = fit_constants(student, {module: constant}, texts[:30])[module]
    assert update.left.shape == (64, 1) and update.constant is None
    errors = []
    for _, batch in student.reference.batches(texts[30:], logits=False):
        _, x, _ = student.layer(batch, 2, "block_output", of=module)
        added = x.double() @ (update.left @ update.right).T
        errors.append(((added - constant).norm(dim=1) / constant.norm()).mean())
    assert max(errors) < 0.2  # adding nothing is an error of 1
