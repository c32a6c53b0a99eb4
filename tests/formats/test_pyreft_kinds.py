"""Every kind of intervention of pyreft, told by its configuration, its tensors or the user; and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pyreft_files import HIDDEN, by_hand, change, computed, key, rotation, state, write

import reft_plugins as reft
from reft_plugins.errors import AdapterError
from reft_plugins.formats.orthogonal import orthogonal_weight

METHODS = {
    "loreft": "loreft",
    "noreft": "noreft",
    "direft": "direft_orthonormal",
    "nodireft": "direft",
    "consreft": "consreft",
    "lobireft": "lobireft",
}


@pytest.fixture(scope="module")
def runtime(tiny_llama: Path) -> Any:
    return reft.runtime("transformers", tiny_llama)


TOKENS = list(range(5, 17))


def effect(runtime: Any, adapter: reft.Adapter, changes: Any, positions: list[int]) -> None:
    expected = by_hand(runtime, TOKENS, {2: [(changes, positions)]})
    np.testing.assert_allclose(runtime.logits(TOKENS, adapter), expected, atol=3e-4)
    assert np.abs(expected - runtime.logits(TOKENS)).max() > 1.0, "the intervention must matter"


@pytest.mark.parametrize("kind", METHODS)
def test_each_kind(runtime: Any, tiny_llama: Path, tmp_path: Path, kind: str) -> None:
    write(tmp_path, {key(2): state(kind, 4)}, kind)
    adapter = reft.load(tmp_path, base=tiny_llama, positions="f2")
    assert adapter.manifest.method == METHODS[kind]
    effect(runtime, adapter, change(kind, 4), [0, 1])


@pytest.mark.parametrize("kind", ["loreft", "noreft", "direft", "nodireft"])
def test_each_kind_with_an_activation(runtime: Any, tiny_llama: Path, tmp_path: Path, kind: str) -> None:
    write(tmp_path, {key(2): state(kind, 4)}, kind)
    adapter = reft.load(tmp_path, base=tiny_llama, positions="f2", activation="relu")
    effect(runtime, adapter, change(kind, 4, torch.relu), [0, 1])


@pytest.mark.parametrize("kind", ["consreft", "lobireft"])
def test_constants_have_no_activation(tiny_llama: Path, tmp_path: Path, kind: str) -> None:
    write(tmp_path, {key(2): state(kind, 4)}, kind)
    with pytest.raises(AdapterError, match="activation"):
        reft.load(tmp_path, base=tiny_llama, positions="f2", activation="relu")


def test_the_rotation_of_an_old_loreft_is_rebuilt(runtime: Any, tiny_llama: Path, tmp_path: Path) -> None:
    write(tmp_path, {key(2): state("loreft", 9, old=True)})
    adapter = reft.load(tmp_path, base=tiny_llama, positions="f2")
    assert adapter.manifest.method == "loreft"
    effect(runtime, adapter, change("loreft", 9), [0, 1])


@pytest.mark.parametrize(("width", "rank"), [(128, 1), (128, 4), (16, 15), (8, 8)])
def test_orthogonal_weights_are_those_of_torch(width: int, rank: int) -> None:
    module = rotation(3, width, rank)
    pieces = module.state_dict()
    original, base = pieces["parametrizations.weight.original"], pieces["parametrizations.weight.0.base"]
    weight: Any = module.weight
    torch.testing.assert_close(orthogonal_weight(original, base, "here"), weight.detach(), atol=2e-6, rtol=0)
    assert (original - weight).abs().max() > 0.1, "what is stored must not be the weight already"
    if rank < width:
        rows = torch.nn.utils.parametrizations.orthogonal(torch.nn.Linear(width, rank, bias=False))
        torch.nn.init.normal_(rows.parametrizations.weight.original)  # type: ignore[union-attr,index,arg-type]
        pieces = rows.state_dict()
        original, base = pieces["parametrizations.weight.original"], pieces["parametrizations.weight.0.base"]
        torch.testing.assert_close(orthogonal_weight(original, base, "here"), rows.weight.detach(), atol=5e-6, rtol=0)
        with pytest.raises(AdapterError, match="do not belong together"):
            orthogonal_weight(original, base[:-1], "here")


@pytest.mark.parametrize(
    ("kind", "other", "answer"),
    [
        ("direft", "loreft", "direft_orthonormal"),
        ("consreft", "lobireft", "consreft"),
        ("lobireft", "consreft", "LobireftIntervention"),
        ("noreft", "direft", "NoReFT"),
        ("nodireft", "noreft", "direft"),
        ("nodireft", "noreft", "nodireft"),
        ("direft", "loreft", "direft"),
    ],
)
def test_without_a_configuration_the_user_is_asked(
    runtime: Any, tiny_llama: Path, tmp_path: Path, kind: str, other: str, answer: str
) -> None:
    write(tmp_path, {key(2): state(kind, 4)}, None)
    with pytest.raises(AdapterError, match=r"store the same tensors.*give kind='\w+' or kind='\w+'"):
        reft.load(tmp_path, base=tiny_llama, positions="f2")
    adapter = reft.load(tmp_path, base=tiny_llama, positions="f2", kind=answer)
    assert adapter.manifest.method == METHODS[kind] and f"kind {answer}" in adapter.manifest.notes["given"]
    effect(runtime, adapter, change(kind, 4), [0, 1])
    taken_for = reft.load(tmp_path, base=tiny_llama, positions="f2", kind=other)
    assert np.abs(runtime.logits(TOKENS, adapter) - runtime.logits(TOKENS, taken_for)).max() > 3e-3
    with pytest.raises(AdapterError, match="not those of a redeft|redeft are not read"):
        reft.load(tmp_path, base=tiny_llama, positions="f2", kind="redeft")


def test_several_kinds_in_one_checkpoint(runtime: Any, tiny_llama: Path, tmp_path: Path) -> None:
    write(tmp_path, {key(1): state("loreft", 1), key(2): state("lobireft", 2)}, ["loreft", "lobireft"])
    adapter = reft.load(tmp_path, base=tiny_llama, positions="f2")
    work: Any = {1: [(change("loreft", 1), [0, 1])], 2: [(change("lobireft", 2), [0, 1])]}
    np.testing.assert_allclose(runtime.logits(TOKENS, adapter), by_hand(runtime, TOKENS, work), atol=1e-3)


def test_rows_of_a_subspace(runtime: Any, tiny_llama: Path, tmp_path: Path) -> None:
    raw = state("loreft", 4)
    write(tmp_path, {key(2): raw}, "subloreft")
    with pytest.raises(AdapterError, match=r"SubloreftIntervention applies some rows.*0 to 2"):
        reft.load(tmp_path, base=tiny_llama, positions="f2")
    with pytest.raises(AdapterError, match=r"subspaces \[3\] are outside"):
        reft.load(tmp_path, base=tiny_llama, positions="f2", subspaces=[3])
    adapter = reft.load(tmp_path, base=tiny_llama, positions="f2", subspaces="0,2")
    rows = [0, 2]
    rotate: Any = rotation(4).weight
    kept = {"weight": raw["weight"][rows], "bias": raw["bias"][rows]}

    def some_rows(h: torch.Tensor) -> torch.Tensor:
        chosen = rotate.detach()[:, rows]
        return h + (kept["weight"] @ h + kept["bias"] - h @ chosen) @ chosen.T

    effect(runtime, adapter, some_rows, [0, 1])
    h = torch.randn(HIDDEN)
    assert (some_rows(h) - computed("loreft", 4, h, lambda x: x, raw)).abs().max() > 0.1, "the third row must matter"


@pytest.mark.parametrize(
    ("name", "tensors", "message"),
    [
        (key(1), {"learned_source.weight": torch.zeros(3, 8), "embed_dim": torch.tensor(8)}, "not those of an interv"),
        (key(1), {"weight": torch.zeros(3, 128)}, "not those of an intervention"),
        (key(1), {**state("loreft", 0), "weight": torch.zeros(4, 128)}, r"weight \[4, 128\] and rotate_layer \[128, 3"),
        (key(1), {**state("loreft", 0), "bias": torch.zeros(4)}, "bias has shape"),
        (key(1), [torch.zeros(3)], "expected a dictionary of tensors"),
        (key(1), {"weight": 3}, "expected a dictionary of tensors"),
        ("comp_lm_head_output_unit_pos_nunit_1#0", state("loreft", 0), "does not say a decoder layer"),
        ("comp_model_layers[1]_self_attn_q_proj_output_unit_pos_nunit_1#0", state("loreft", 0), "self_attn_q_proj"),
        ("comp_model_layers[1]_mlp_act_fn_output_unit_pos_nunit_1#0", state("loreft", 0), "multiplied by a gate"),
        (key(1, component="mlp_activation"), state("loreft", 0), "multiplied by a gate"),
        (key(1, component="mlp_input"), state("loreft", 0), "component that is known"),
        (key(1, component="head_query_output"), state("loreft", 0), "not single heads"),
        ("layer_1_comp_block_output_unit_h.pos_nunit_1#0", state("loreft", 0), "does not say a decoder layer"),
        ("layer_1_comp_block_output_unit_pos_nunit_2#0", state("loreft", 0), "does not say a decoder layer"),
        (key(1, count=1), state("loreft", 0), "#1.*mean 1"),
    ],
)
def test_files_that_are_not_understood_are_named(
    tiny_llama: Path, tmp_path: Path, name: str, tensors: Any, message: str
) -> None:
    write(tmp_path, {name: tensors}, kind=None)
    with pytest.raises(AdapterError, match=message):
        reft.load(tmp_path, base=tiny_llama, positions="f1")


def test_the_configuration_and_the_files_must_agree(tiny_llama: Path, tmp_path: Path) -> None:
    write(tmp_path, {key(1): state("loreft", 0)}, "consreft")
    with pytest.raises(AdapterError, match="tensors are those of loreft, not those of a ConsreftIntervention"):
        reft.load(tmp_path, base=tiny_llama, positions="f1")
    write(tmp_path, {key(1): state("consreft", 0)}, "consreft")
    with pytest.raises(AdapterError, match="kind='lobireft' contradicts config.json, which says ConsreftIntervention"):
        reft.load(tmp_path, base=tiny_llama, positions="f1", kind="lobireft")
    assert "assumed" not in reft.load(tmp_path, base=tiny_llama, positions="f1", kind="consreft").manifest.notes
    shutil.rmtree(tmp_path)
    write(tmp_path, {key(1): state("loreft", 0)}, "rotatedspace")
    with pytest.raises(AdapterError, match="type RotatedspaceIntervention are not read.*kind='loreft'"):
        reft.load(tmp_path, base=tiny_llama, positions="f1")
    write(tmp_path, {key(1): state("loreft", 0), key(2): state("loreft", 1)})
    (tmp_path / f"intkey_{key(2)}.bin").unlink()
    with pytest.raises(AdapterError, match=r"files are missing: intkey_layer_2"):
        reft.load(tmp_path, base=tiny_llama, positions="f1")


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"intervention_types": 3}', '{"intervention_types": ["x"], "sorted_keys": []}']
)
def test_a_damaged_configuration_is_refused(tiny_llama: Path, tmp_path: Path, text: str) -> None:
    write(tmp_path, {key(1): state("loreft", 0)})
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(AdapterError, match=r"config\.json"):
        reft.load(tmp_path, base=tiny_llama, positions="f1")


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """A Gemma 2 with random weights: a norm stands behind each sub-layer."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 3, "head_dim": 32}
    config = Gemma2Config(
        vocab_size=64,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.2,
        tie_word_embeddings=False,
        **sizes,
    )
    directory: Path = tmp_path_factory.mktemp("gemma")
    Gemma2ForCausalLM(config).save_pretrained(directory)
    for path in tiny_llama.glob("*token*"):
        shutil.copy(path, directory)
    return directory


@pytest.mark.parametrize("kind", METHODS)
def test_edits_in_front_of_a_norm(gemma: Path, tmp_path: Path, kind: str) -> None:
    names = [key(1, count, "mlp_output") for count in (0, 1)] + [
        "comp_model_layers[2]_self_attn_output_unit_pos_nunit_1#0"
    ]
    names.append("comp_model_layers[2]_self_attn_output_unit_pos_nunit_1#1")
    write(tmp_path, {name: state(kind, seed) for seed, name in enumerate(names)}, kind)
    adapter = reft.load(tmp_path, base=gemma, positions="f2+l3;cap=half")
    runtime = reft.runtime("transformers", gemma)
    first, last = [0, 1], [9, 10, 11]
    work: Any = {
        lambda model: model.model.layers[1].mlp: [(change(kind, 0), first), (change(kind, 1), last)],
        lambda model: model.model.layers[2].self_attn: [(change(kind, 2), first), (change(kind, 3), last)],
    }
    expected = by_hand(runtime, TOKENS, work)
    np.testing.assert_allclose(runtime.logits(TOKENS, adapter), expected, atol=1e-3)
    assert np.abs(expected - runtime.logits(TOKENS)).max() > 1.0, "the interventions must matter"


def test_edits_in_front_of_a_norm_that_no_projection_makes(gemma: Path, tmp_path: Path) -> None:
    write(tmp_path, {key(1, component="mlp_output"): state("direft", 0)}, "direft")
    with pytest.raises(AdapterError, match="in front of its norm.*activation relu"):
        reft.load(tmp_path, base=gemma, positions="f1", activation="relu")
    write(tmp_path, {key(1, count, "mlp_output"): state("loreft", count) for count in (0, 1)})
    with pytest.raises(AdapterError, match="in front of its norm.*overlap"):
        reft.load(tmp_path, base=gemma, positions="f2+l2")


def test_edits_behind_a_norm(gemma: Path, tmp_path: Path) -> None:
    names = [
        f"comp_model_layers[1]_post_{name}_layernorm_output_unit_pos_nunit_1#0" for name in ("attention", "feedforward")
    ]
    write(tmp_path, {name: state("loreft", seed) for seed, name in enumerate(names)})
    edits = reft.load(tmp_path, base=gemma, positions="f1").lower().edits
    assert [edit.site.component for edit in edits] == ["attention_output", "mlp_output"]
