"""The parts of the page by themselves: rows, pages, drawings, texts, colours."""

from __future__ import annotations

import random
import re
from itertools import pairwise
from pathlib import Path

import pytest

from adapters_store.web import facts, graph, metrics, rendering
from adapters_store.web.guard import LOOPBACK
from adapters_store.web.howto import uses
from adapters_store.web.search import Page
from adapters_store.web.serving import is_loopback
from reft_plugins.manifest import EditFact, Manifest, ProgramFacts, TensorsFact, WeightDeltaFact

STYLE = Path(rendering.__file__).with_name("static") / "style.css"


def manifest(**program: object) -> Manifest:
    tensors = TensorsFact(sha256="sha256:" + "0" * 64, size=0)
    return Manifest(method="loreft", base=None, program=ProgramFacts.model_validate(program), tensors=tensors)


def test_nodes_that_differ_in_their_layer_only_are_one_row() -> None:
    edits = [
        EditFact(layer=layer, component=component, positions=positions, rank=rank)
        for layer in (0, 1, 2, 5)
        for component, positions, rank in (("block_output", "f7+l7", 4), ("mlp_output", "all", 1))
    ]
    edits.append(EditFact(layer=9, component="block_output", positions="f7+l7", rank=8, simultaneous=True))
    assert facts.edits(manifest(edits=edits)).rows == (
        ("block_output", "0-2, 5", "f7+l7", "4", "in sequence"),
        ("mlp_output", "0-2, 5", "all", "1", "in sequence"),
        ("block_output", "9", "f7+l7", "8", "simultaneous"),
    )
    deltas = [
        WeightDeltaFact(module=f"model.layers.{layer}.self_attn.{name}_proj", rank=8)
        for layer in range(32)
        for name in "qv"
    ]
    deltas.append(WeightDeltaFact(module="lm_head", rank=2, replaces=True))
    assert facts.weight_deltas(manifest(weight_deltas=deltas)).rows == (
        ("model.layers.*.self_attn.q_proj", "0-31", "all", "8", "added"),
        ("model.layers.*.self_attn.v_proj", "0-31", "all", "8", "added"),
        ("lm_head", "", "all", "2", "replaced"),
    )


def test_tables_say_how_much_they_leave_out() -> None:
    table = facts.settings({f"key{number:04d}": number for number in range(facts.MAX_ROWS + 7)})
    assert (len(table.rows), table.more) == (facts.MAX_ROWS, 7)
    assert facts.settings({"a": "text", "b": [1, None]}).rows == (("a", "text"), ("b", "[1, null]"))


@pytest.mark.parametrize(
    ("items", "number", "expected"),
    [(0, 1, (0, 1, 1)), (50, 2, (50, 1, 1)), (51, 2, (1, 2, 2)), (51, 99, (1, 2, 2)), (120, 2, (50, 2, 3))],
)
def test_pages(items: int, number: int, expected: tuple[int, int, int]) -> None:
    page = Page.of(range(items), number)
    assert (len(page.items), page.number, page.pages) == expected
    assert page.total == items


@pytest.mark.parametrize("seed", range(40))
def test_drawings_of_any_graph(seed: int) -> None:
    chance = random.Random(seed)
    keys = [str(number) for number in range(chance.randint(1, 90))]
    edges = [graph.Edge(chance.choice(keys), chance.choice(keys)) for _ in range(chance.randint(0, 150))]
    drawing = graph.draw([graph.Node(key, key) for key in keys], edges, keys[0])
    assert len(drawing.boxes) + drawing.left_out == len(keys)
    assert len(drawing.boxes) <= graph.MAX_NODES
    for a, b in pairwise(sorted(drawing.boxes, key=lambda box: (box.x, box.y))):
        assert b.x >= a.x + graph.WIDTH or b.y >= a.y + graph.HEIGHT
    for box in drawing.boxes:
        assert 0 <= box.x <= drawing.width - graph.WIDTH
        assert 0 <= box.y <= drawing.height - graph.HEIGHT


def test_what_was_there_first_stands_left_and_lines_do_not_cross_without_need() -> None:
    names = ("a1", "b1", "a2", "b2", "child")
    edges = [graph.Edge(*pair) for pair in (("a1", "a2"), ("b1", "b2"), ("a2", "child"), ("b2", "child"))]
    edges.append(graph.Edge("child", "child"))
    drawing = graph.draw([graph.Node(name, name) for name in names], edges, "child")
    boxes = {box.node.key: box for box in drawing.boxes}
    for edge in edges[:-1]:
        assert boxes[edge.source].x + graph.WIDTH < boxes[edge.target].x
    assert (boxes["a1"].y < boxes["b1"].y) == (boxes["a2"].y < boxes["b2"].y)
    assert len(drawing.lines) == 4


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain ümläut 漢字 \u00a0 a\u200db", "plain ümläut 漢字 \u00a0 a\u200db"),
        ("line\nand\ttab", "line\nand\ttab"),
        ("\x1b[0m\x00\x7f\x9b", r"\x1b[0m\x00\x7f\x9b"),
        ("abc\u202efdp\u2066", r"abc\u202efdp\u2066"),
        ("\ud800", r"\ud800"),
        ("\U000e0041", r"\U000e0041"),
    ],
)
def test_texts_without_what_does_not_show(text: str, expected: str) -> None:
    assert rendering.clean(text) == expected
    expected.encode()


def test_addresses_keep_texts_in_their_place() -> None:
    assert rendering.address("adapters", "team/a@v1") == "/adapters/team/a@v1"
    assert rendering.address("diff", a="x@v1", b="", c=None) == "/diff?a=x%40v1"
    hostile = rendering.address("pictures", "a?b#c\"'<", metric="&x=1#\ud800")
    assert not set(hostile) & set("#\"'<")
    assert hostile.count("?") == hostile.count("=") == 1


@pytest.mark.parametrize("name", ["--help", "a b", "x;rm -rf ~", "$(id)", "`id`", "a\nb", "'", "", "x" * 201, "-o"])
def test_commands_name_only_bases_that_are_one_plain_word(name: str) -> None:
    base = {
        "architecture": "Llama",
        "hidden_size": 1,
        "num_hidden_layers": 1,
        "fingerprint": "sha256:" + "0" * 64,
    }
    document = manifest().document()
    for each, expected in ((name, "BASE"), ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B")):
        found = uses("team/a@v1", "team/a", Manifest.model_validate({**document, "base": {**base, "name": each}}))
        assert f"reft generate {expected} --adapter team/a@v1" in found[0].command
        assert f"reft serve {expected} --adapter a=team/a@v1" in found[1].command


def test_numbers_that_no_picture_has_room_for() -> None:
    assert not metrics.Series("m", ((1, 1e308),)).drawable
    assert not metrics.Series("m", ((1, 0.0), (2, -1.7e308))).drawable
    largest = metrics.Series("m", ((1, -0.9e30), (2, 0.9e30), (3, 1e-300)))
    assert largest.drawable
    assert metrics.draw(largest).count("<svg") == 1


def test_loopback() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.0.2.1", "example.com", "")))
    assert "*" not in LOOPBACK


TEXTS = (
    ("ink", "page"),
    ("ink", "surface"),
    ("ink", "sunken"),
    ("muted", "page"),
    ("muted", "surface"),
    ("muted", "sunken"),
    ("accent", "page"),
    ("accent", "surface"),
    ("accent", "sunken"),
    ("on-accent", "accent"),
    ("on-tag", "tag"),
    ("on-warning", "warning"),
    ("on-danger", "danger"),
)
SHAPES = (("control", "surface"), ("control", "page"), ("accent", "page"), ("accent", "surface"), ("accent", "tag"))
"""Borders of fields, lines of graphs, outlines of what has the focus."""


@pytest.mark.parametrize("dark", [False, True])
def test_colours_contrast_as_wcag_demands(dark: bool) -> None:
    """Contrast ratio of WCAG 2.2, success criteria 1.4.3 (texts, 4.5) and 1.4.11 (shapes, 3)."""
    light, dark_block = re.findall(r":root\s*{([^}]*)}", STYLE.read_text())
    colours = dict(re.findall(r"--([\w-]+):\s*(#[0-9a-f]{6});", light))
    in_dark = dict(re.findall(r"--([\w-]+):\s*(#[0-9a-f]{6});", dark_block))
    assert in_dark.keys() == colours.keys()
    used = in_dark if dark else colours
    for limit, pairs in ((4.5, TEXTS), (3.0, SHAPES)):
        for front, back in pairs:
            assert contrast(used[front], used[back]) >= limit, (front, back)
    assert {name for pairs in (TEXTS, SHAPES) for pair in pairs for name in pair} | {"line"} == set(used)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.478, abs=0.001)


def contrast(one: str, other: str) -> float:
    lighter, darker = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def _luminance(colour: str) -> float:
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = ((c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4) for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
