from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from strong_adapters import strong_lora, strong_loreft

from reft_plugins.compose import Overlap, learned_program, overlap
from reft_plugins.compose.plot import plot_angles
from reft_plugins.errors import ReftError
from reft_plugins.positions import Positions
from reft_plugins.program import Edit, Program, Site, WeightDelta


def edit(up: torch.Tensor, positions: str = "l1", layer: int = 0, shift: torch.Tensor | None = None) -> Edit:
    return Edit(Site(layer), Positions.parse(positions), down=up.flip(-1), up=up, shift=shift)


def by_space(found: list[Overlap]) -> dict[str, Overlap]:
    assert len({entry.space for entry in found}) == len(found)
    return {entry.space: entry for entry in found}


def test_angles_between_known_planes() -> None:
    turned = math.radians(30)
    one = torch.eye(6)[:2] * torch.tensor([[3.0], [0.1]])
    other = torch.zeros(2, 6)
    other[0, 0], other[0, 2], other[1, 3] = math.cos(turned), math.sin(turned), 5.0
    found = by_space(overlap({"a": Program((edit(one),)), "b": Program((edit(other),))}))
    writes = found["writes"]
    assert writes.place == "layer 0 block_output" and (writes.first, writes.second) == ("a", "b")
    assert writes.angles == pytest.approx((30, 90), abs=1e-4) and writes.ranks == (2, 2) and writes.width == 6
    assert writes.shared == pytest.approx(0.75 / 2) and writes.by_chance == pytest.approx(1 / 3)
    assert found["reads"].angles == pytest.approx((30, 90), abs=1e-4)
    assert writes.to_json()["shared"] == writes.shared


def test_orthogonal_equal_and_contained_subspaces() -> None:
    basis = torch.linalg.qr(torch.randn(32, 8, generator=torch.Generator().manual_seed(0)))[0].T
    mixed = torch.randn(3, 3, generator=torch.Generator().manual_seed(1)) @ basis[:3]
    programs = {
        "first": Program((edit(basis[:3]),)),
        "same": Program((edit(mixed),)),
        "apart": Program((edit(basis[3:6], "f1;trim=1"),)),
        "inside": Program((edit(basis[2:3]), edit(basis[2:3] * 2))),
        "elsewhere": Program((edit(basis[:3], layer=1),)),
    }
    found = {(e.first, e.second): e for e in overlap(programs) if e.space == "writes"}
    assert len(found) == 6 and not any("elsewhere" in pair for pair in found)
    assert found["first", "same"].shared == pytest.approx(1) and max(found["first", "same"].angles) < 0.1
    assert found["first", "apart"].shared < 1e-9 and found["first", "apart"].angles == pytest.approx((90,) * 3)
    assert not found["first", "apart"].same_tokens and found["first", "same"].same_tokens
    assert found["first", "inside"].ranks == (3, 1) and found["first", "inside"].shared == pytest.approx(1)


def test_a_shift_is_a_direction_that_is_written(tiny_llama: Path) -> None:
    shift = torch.zeros(8)
    shift[0] = 2.0
    steering = Program((Edit(Site(0), Positions.parse("all"), shift=shift),))
    (found,) = overlap({"a": steering, "b": Program((edit(torch.eye(8)[:2]),))})
    assert found.space == "writes" and found.ranks == (1, 2) and found.angles == pytest.approx((0,), abs=1e-4)


def test_random_adapters_share_about_what_chance_says(tiny_llama: Path) -> None:
    programs = {str(seed): learned_program(strong_lora(tiny_llama, seed=seed)) for seed in (1, 2)}
    found = overlap(programs)
    assert len(found) == 2 * len(programs["1"].weight_deltas)
    ratio = sum(entry.shared for entry in found) / sum(entry.by_chance for entry in found)
    assert 0.8 < ratio < 1.2


def test_other_widths_are_no_common_place() -> None:
    deltas = [WeightDelta("m", a=torch.randn(2, n), b=torch.randn(4, 2)) for n in (6, 8)]
    found = overlap({name: Program((delta,)) for name, delta in zip("ab", deltas, strict=True)})
    assert [entry.space for entry in found] == ["writes"]


def test_the_plot_is_a_picture(tiny_llama: Path, tmp_path: Path) -> None:
    found = overlap({str(seed): learned_program(strong_loreft(tiny_llama, "l1", seed=seed)) for seed in (1, 2, 3)})
    picture = plot_angles(found, tmp_path / "angles.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 5000
    assert plot_angles([], tmp_path / "none.svg").read_text().lstrip().startswith("<?xml")
    with pytest.raises(ReftError, match="format"):
        plot_angles(found, tmp_path / "angles.unknown")


def test_tiny_angles_are_measured() -> None:
    turned = math.radians(1e-6)
    one, other = torch.eye(6, dtype=torch.float64)[:2], torch.zeros(2, 6, dtype=torch.float64)
    other[0, 0], other[0, 2], other[1, 1] = math.cos(turned), math.sin(turned), 1.0
    found = by_space(overlap({"a": Program((edit(one),)), "b": Program((edit(other),))}))["writes"]
    assert found.angles == pytest.approx((0, 1e-6), rel=1e-6, abs=1e-12)
    assert math.degrees(math.acos(math.cos(turned))) != pytest.approx(1e-6, rel=1e-6), "which a cosine cannot tell"
