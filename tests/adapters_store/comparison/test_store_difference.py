"""Whole comparisons: manifests, references, the plot and the command."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from adapter_variants import make_adapter, vary
from click.testing import CliRunner
from torch import Tensor

from adapters_store import Store
from adapters_store.commands import store as group
from adapters_store.comparison import compare, diff, picture, plot
from reft_plugins.adapter import Adapter
from reft_plugins.errors import ReftError, StoreError, UnknownReferenceError
from reft_plugins.manifest import BaseModelIdentity, TrainingRecord
from reft_plugins.positions import Positions
from reft_plugins.program import Edit, Site, WeightDelta

WIDTH = 24
Draw = Callable[..., Tensor]
Make = Callable[..., Adapter]


@pytest.fixture
def filled(store: Store, adapters: list[Path]) -> Store:
    """`sentiment@v1` (`old`), `sentiment@v2` (`new`)."""
    store.add(adapters[0], "sentiment:old")
    store.add(adapters[1], "sentiment:new")
    return store


def test_an_adapter_does_not_differ_from_itself(filled: Store, adapters: list[Path]) -> None:
    difference = diff(filled, "sentiment:old", adapters[0])
    assert difference.empty and (difference.a, difference.b) == ("sentiment@v1", "0")
    assert difference.changes == () and difference.notes == () and difference.distance == 0
    assert {each.relative for each in difference.tensors} == {0} and len(difference.tensors) == 6
    assert not any(each.differ for each in difference.positions) and len(difference.positions) == 2
    assert all(max(each.degrees) < 1e-12 for place in difference.places for each in place.angles)
    other = diff(filled, "sentiment:old", "sentiment:new")
    assert not other.empty and other.distance is not None and other.distance > 0.5
    assert min(each.relative for each in other.tensors) > 0.3
    assert min(degrees for place in other.places for each in place.angles for degrees in each.degrees) > 1


def test_fields_of_manifests(loreft: Make, draw: Draw, base: BaseModelIdentity) -> None:
    parts = draw(2, WIDTH), draw(2, WIDTH), draw(2)
    one = loreft({0: parts, 2: parts}, "f1+l1")
    trained = TrainingRecord(
        data_sha256="sha256:" + "1" * 64, examples=9, seed=3, steps=2, epochs=1.0, metrics={"accuracy": 0.5}
    )
    wider = tuple(torch.cat([each, each.flip(-1)]) for each in parts)
    two = loreft({0: wider}, "l1")
    two = Adapter.create(
        "loreft", two.manifest.config, two.tensors, base, training=trained, notes={"why": "a second try"}
    )
    found = {each.path: (each.kind, each.before, each.after) for each in compare(one, two).changes}
    assert found["config.rank"] == ("changed", 2, 4)
    assert found["config.layers"] == ("changed", [0, 2], [0])
    assert found["program.layer 0 block_output.rank"] == ("changed", 2, 4)
    assert found["program.layer 0 block_output.positions"] == ("changed", "f1+l1", "l1")
    assert found["program.layer 2 block_output.rank"] == ("removed", 2, None)
    assert found["training.metrics.accuracy"] == ("added", None, 0.5)
    assert found["training.data_sha256"] == ("added", None, trained.data_sha256)
    assert found["notes.why"] == ("added", None, "a second try")
    assert not any(path.startswith(("base", "method", "schema")) for path in found)
    assert {each.site: (each.a, each.b) for each in compare(one, two).positions} == {
        "layer 0 block_output": (("f1+l1",), ("l1",)),
        "layer 2 block_output": (("f1+l1",), ()),
    }


def test_other_methods_and_ranks(loreft: Make, program: Make, draw: Draw) -> None:
    """What is not in both is named: nothing is dropped."""
    edits = loreft({0: (draw(2, WIDTH), draw(2, WIDTH), draw(2)), 1: (draw(2, WIDTH), draw(2, WIDTH), draw(2))})
    edit = Edit(Site(0), Positions.parse("f1+l1"), down=draw(5, WIDTH), up=draw(5, WIDTH))
    lora = WeightDelta("model.layers.1.mlp.up_proj", a=draw(2, WIDTH), b=draw(40, 2))
    difference = compare(edits, program(edit, lora))
    assert {each.place: each.only for each in difference.places} == {
        "layer 0 block_output": None,
        "layer 1 block_output": "a",
        "model.layers.1.mlp.up_proj": "b",
    }
    both, left, right = difference.places
    assert both.distance is not None and both.distance > 0.5
    assert {(each.space, each.ranks) for each in both.angles} == {("writes", (2, 5)), ("reads", (2, 5))}
    assert left.distance == right.distance == 1
    assert difference.tensors == () and len(difference.unmatched) == len(edits.tensors) + 4
    assert difference.notes == (
        f"{len(edits.tensors) + 4} stored tensors have no counterpart of the same name and shape",
    )
    assert {each.path for each in difference.changes} >= {"method", "program.model.layers.1.mlp.up_proj.rank"}


def test_other_bases_are_said(loreft: Make, draw: Draw, base: BaseModelIdentity) -> None:
    one = loreft({0: (draw(2, WIDTH), draw(2, WIDTH), draw(2))})
    other = one.with_base(base.model_copy(update={"fingerprint": "sha256:" + "6" * 64}))
    difference = compare(one, other)
    assert [each.path for each in difference.changes] == ["base.fingerprint"]
    assert "different base models" in difference.notes[0] and not difference.empty
    assert not any("different base" in note for note in compare(one, one).notes)


def test_what_cannot_be_opened(filled: Store, adapters: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UnknownReferenceError, match="sentiment"):
        diff(filled, "sentiment:old", "sentiment:never")
    with pytest.raises(StoreError, match="without a store"):
        diff(None, adapters[0], "sentiment:old")
    with pytest.raises(ReftError, match=r"adapter\.json"):
        diff(filled, "sentiment:old", tmp_path)


def test_the_picture(filled: Store, tmp_path: Path) -> None:
    difference = diff(filled, "sentiment:old", "sentiment:new")
    first = picture(difference)
    assert picture(diff(filled, "sentiment:old", "sentiment:new")) == first
    assert picture(diff(filled, "sentiment:old", "sentiment:old")) != first
    root = ET.fromstring(first)
    texts = {text for each in root.iter() if (text := (each.text or "").strip())}
    assert {"layer", "relative distance", "principal angle, degrees", "sentiment@v1 and sentiment@v2"} <= texts
    assert {"whole layer", "smallest, what they write", "largest, what they read"} <= texts
    for each in root.iter("{http://www.w3.org/2000/svg}path"):
        style = each.get("style", "")
        assert "#ffffff" not in style and "#000000" not in style, "neither shows on a page of its own colour"
    assert plot(difference, tmp_path / "x.svg").read_bytes() == first
    assert plot(difference, tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    for name in ("x", "x.unknown"):
        with pytest.raises(StoreError):
            plot(difference, tmp_path / name)


def test_a_picture_of_nothing_comparable(program: Make, draw: Draw) -> None:
    one = program(WeightDelta("lm_head", a=draw(1, WIDTH), b=draw(40, 1)))
    assert ET.fromstring(picture(compare(one, one))).tag.endswith("svg")


def test_the_command(filled: Store, adapters: list[Path], tmp_path: Path) -> None:
    def run(*arguments: object) -> tuple[int, str]:
        result = CliRunner().invoke(group, ["diff", *map(str, arguments)])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result.exit_code, result.output

    code, text = run("sentiment:old", "sentiment:new", "--plot", tmp_path / "d.svg")
    assert code == 0 and (tmp_path / "d.svg").stat().st_size > 5000
    assert "a = sentiment@v1" in text and "notes.seed" in text and "layer 1 block_output" in text
    code, text = run("sentiment:old", "sentiment:new", "--json", "--exit-code")
    found = json.loads(text)
    assert code == 1 and found["empty"] is False and found["places"][0]["angles"][0]["ranks"] == [2, 2]
    assert found["distance"] == pytest.approx(diff(filled, "sentiment:old", "sentiment:new").distance)
    code, text = run("sentiment:old", "sentiment@v1", "--exit-code")
    assert code == 0 and "the same adapter" in text
    assert json.loads(run(adapters[0], adapters[0], "--json", "--store", tmp_path / "none")[1])["empty"] is True
    assert run("sentiment:old", "NO:x")[0] == 2
    other = vary(adapters[0], tmp_path / "varied", "another note")
    assert run("sentiment:old", other, "--exit-code")[0] == 1


def test_control_sequences_stay_out(store: Store, adapters: list[Path], tmp_path: Path) -> None:
    hostile = vary(adapters[0], tmp_path / "hostile", "\x1b]0;owned\x07[red]x[/red] $\\frac$")
    result = CliRunner().invoke(group, ["diff", str(adapters[0]), str(hostile)])
    assert result.exit_code == 0 and "owned" in result.output and "[red]x[/red]" in result.output
    assert "\x1b" not in result.output and "\x07" not in result.output
    odd = make_adapter(tmp_path / "$a_{", 0)
    assert b"$a_{" in picture(diff(None, odd, adapters[0]))


def test_a_method_that_is_not_installed(filled: Store, adapters: list[Path], tmp_path: Path) -> None:
    unknown = vary(adapters[0], tmp_path / "unknown", "of a plugin")
    document = json.loads((unknown / "adapter.json").read_text())
    (unknown / "adapter.json").write_text(json.dumps({**document, "method": "elsewhere"}))
    difference = diff(filled, "sentiment:new", unknown)
    assert "elsewhere" in difference.notes[0] and difference.places == () and difference.distance is None
    assert {each.relative > 0 for each in difference.tensors} == {True}
    assert "method" in {each.path for each in difference.changes}
