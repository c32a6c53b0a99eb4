"""The adapter directory: what is written is what is read, and nothing damaged is believed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reft_plugins.adapter import Adapter
from reft_plugins.errors import AdapterError, BaseMismatchError, UnknownPluginError
from reft_plugins.manifest import (
    MANIFEST_FILE,
    MAX_MANIFEST_BYTES,
    TENSORS_FILE,
    BaseModelIdentity,
    TrainingRecord,
    parse_manifest,
    read_manifest,
)

BASE = BaseModelIdentity(
    name="m", architecture="A", hidden_size=8, num_hidden_layers=2, fingerprint="sha256:" + "0" * 64
)


def make(positions: str = "f1+l1", layer: int = 1, **config: object) -> Adapter:
    draw = torch.Generator().manual_seed(0)
    unit = f"layers.{layer}.block_output.0"
    tensors = {f"{unit}.{name}": torch.randn(2, 8, generator=draw) for name in ("rotate", "weight")}
    tensors[f"{unit}.bias"] = torch.randn(2, generator=draw)
    return Adapter.create("loreft", {"rank": 2, "layers": [layer], "positions": positions, **config}, tensors, BASE)


def edit_manifest(directory: Path, **changes: object) -> None:
    document = json.loads((directory / MANIFEST_FILE).read_text())
    (directory / MANIFEST_FILE).write_text(json.dumps({**document, **changes}))


def test_tensors_may_share_memory(tmp_path: Path) -> None:
    whole = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    unit = "layers.0.block_output.0"
    tensors = {f"{unit}.rotate": whole[:2], f"{unit}.weight": whole[:2], f"{unit}.bias": whole[:2, 0]}
    loaded = Adapter.load(Adapter.create("loreft", {"rank": 2, "layers": [0]}, tensors, BASE).save(tmp_path / "a"))
    assert torch.equal(loaded.tensors[f"{unit}.rotate"], whole[:2])


def test_saved_and_loaded_is_the_same_adapter(tmp_path: Path) -> None:
    record = TrainingRecord(
        data_sha256="sha256:" + "a" * 64, examples=3, seed=1, steps=2, epochs=1.0, metrics={"x": 0.5}
    )
    made = make()
    adapter = Adapter(made.manifest.model_copy(update={"training": record}), made.tensors)
    loaded = Adapter.load(adapter.save(tmp_path / "a"))
    assert loaded.manifest == adapter.manifest and loaded.digest == adapter.digest
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == sorted([MANIFEST_FILE, TENSORS_FILE])
    for name, tensor in adapter.tensors.items():
        assert torch.equal(tensor, loaded.tensors[name])
    (edit,) = loaded.lower().edits
    assert str(edit.positions) == "f1+l1" and (edit.site.layer, edit.rank) == (1, 2)
    assert loaded.manifest.program.edits[0].layer == 1


def test_the_digest_tells_adapters_apart() -> None:
    assert make().digest == make().digest
    assert len({make().digest, make("f1+l2").digest, make(layer=0).digest}) == 3


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_flipped_bit_in_the_tensors_is_noticed(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    directory = make().save(tmp_path_factory.mktemp("flipped"))
    blob = bytearray((directory / TENSORS_FILE).read_bytes())
    blob[data.draw(st.integers(0, len(blob) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (directory / TENSORS_FILE).write_bytes(blob)
    with pytest.raises(AdapterError, match="a bit changed"):
        Adapter.load(directory)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_truncation_is_noticed(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    directory = make().save(tmp_path_factory.mktemp("short"))
    name = data.draw(st.sampled_from([TENSORS_FILE, MANIFEST_FILE]))
    blob = (directory / name).read_bytes().rstrip()
    (directory / name).write_bytes(blob[: data.draw(st.integers(0, len(blob) - 1))])
    with pytest.raises(AdapterError, match=name):
        Adapter.load(directory)


def test_a_longer_tensor_file_is_refused(tmp_path: Path) -> None:
    directory = make().save(tmp_path)
    with (directory / TENSORS_FILE).open("ab") as file:
        file.write(b"x" * 100)
    with pytest.raises(AdapterError, match="belongs to another manifest"):
        Adapter.load(directory)


@pytest.mark.parametrize("missing", [MANIFEST_FILE, TENSORS_FILE])
def test_a_missing_file_is_named(tmp_path: Path, missing: str) -> None:
    directory = make().save(tmp_path)
    (directory / missing).unlink()
    with pytest.raises(AdapterError, match=missing):
        Adapter.load(directory)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": "reft-adapter/2"}, "unknown schema 'reft-adapter/2'.*Upgrade"),
        ({"schema": None}, "unknown schema None"),
        ({"surprise": 1}, "surprise"),
        ({"method": 3}, "method"),
        ({"tensors": {"sha256": "md5:0", "size": 1}}, "tensors.sha256"),
        ({"tensors": {"sha256": "sha256:" + "0" * 64, "size": -1}}, "tensors.size"),
        ({"base": {"name": "x"}}, "base.architecture"),
        ({"program": {"edits": [{"layer": 0, "component": "block_output", "positions": "x9", "rank": 1}]}}, "x9"),
    ],
)
def test_a_manifest_that_is_not_understood_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    directory = make().save(tmp_path)
    edit_manifest(directory, **changes)
    with pytest.raises(AdapterError, match=message):
        read_manifest(directory)


@pytest.mark.parametrize("text", [b"", b"[]", b"null", b"7", b"\xff\xfe", b'{"a":1,"a":2}', b"[" * 100_000, b"{"])
def test_malformed_manifests_are_refused(text: bytes) -> None:
    with pytest.raises(AdapterError, match="somewhere"):
        parse_manifest(text, "somewhere")


def test_a_huge_manifest_is_refused_without_reading_it_all(tmp_path: Path) -> None:
    with (tmp_path / MANIFEST_FILE).open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(AdapterError, match=str(MAX_MANIFEST_BYTES)):
        read_manifest(tmp_path)


def test_layers_and_ranks_outside_the_base_are_refused() -> None:
    with pytest.raises(AdapterError, match="layers 0 to 1"):
        make(layer=2)
    tensors = {f"layers.0.block_output.0.{name}": torch.zeros(9, 8) for name in ("rotate", "weight")}
    with pytest.raises(AdapterError, match="rank 9"):
        Adapter.create("loreft", {"rank": 9, "layers": [0], "positions": "all"}, tensors, BASE)


def test_a_manifest_naming_another_base_size_does_not_lower(tmp_path: Path) -> None:
    directory = make().save(tmp_path)
    edit_manifest(directory, base={**BASE.model_dump(), "num_hidden_layers": 1})
    with pytest.raises(AdapterError, match="layers 0 to 0"):
        Adapter.load(directory).lower()


def test_facts_that_differ_from_the_tensors_are_refused(tmp_path: Path) -> None:
    directory = make("all").save(tmp_path)
    fact = {"layer": 1, "component": "block_output", "positions": "f1", "rank": 2}
    edit_manifest(directory, program={"edits": [fact]})
    with pytest.raises(AdapterError, match="not the one its tensors make"):
        Adapter.load(directory).lower()


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "1e999"])
def test_numbers_that_json_does_not_have_are_refused(tmp_path: Path, constant: str) -> None:
    directory = make().save(tmp_path)
    path = directory / MANIFEST_FILE
    path.write_text(path.read_text().replace('"dropout": 0.0', f'"dropout": {constant}'))
    with pytest.raises(AdapterError):
        read_manifest(directory)


@pytest.mark.parametrize("shape", [(3, 8), (1, 8), (2,), (), (2, 8, 1), (0, 8)])
def test_tensors_of_any_shape_give_an_adapter_error(shape: tuple[int, ...]) -> None:
    tensors = {f"layers.0.block_output.0.{name}": torch.zeros(2, 8) for name in ("rotate", "weight")}
    for name in tensors:
        with pytest.raises(AdapterError):
            Adapter.create("loreft", {"positions": "all"}, {**tensors, name: torch.zeros(shape)}, BASE)
    for name in ("lora_A", "lora_B"):
        low = {"q.lora_A": torch.zeros(2, 8), "q.lora_B": torch.zeros(4, 2)}
        bad = torch.zeros(shape) if shape != (2, 8) else torch.zeros(3, 8)
        with pytest.raises(AdapterError):
            Adapter.create("lora", {}, {**low, f"q.{name}": bad.new_zeros((3, 3, 3)) if shape == (1, 8) else bad}, BASE)


def test_wrong_settings_and_missing_tensors_are_named() -> None:
    with pytest.raises(AdapterError, match="'sharing'"):
        make(sharing=True)
    with pytest.raises(AdapterError, match="'positions'.*x9"):
        make("x9")
    with pytest.raises(AdapterError, match="rotate.*missing"):
        Adapter.create("loreft", {}, {"layers.0.block_output.0.weight": torch.zeros(2, 8)}, BASE)
    with pytest.raises(AdapterError, match=r"layers\.<layer>"):
        Adapter.create("loreft", {}, {"wrong": torch.zeros(2, 8)}, BASE)


def test_an_unknown_method_is_named(tmp_path: Path) -> None:
    directory = make().save(tmp_path)
    edit_manifest(directory, method="telepathy")
    with pytest.raises(UnknownPluginError, match="unknown method 'telepathy'.*loreft"):
        Adapter.load(directory).lower()


def test_an_adapter_without_a_base_runs_nowhere() -> None:
    from reft_plugins.base_model import check_base

    adapter = make()
    check_base(adapter.manifest, BASE)
    with pytest.raises(BaseMismatchError, match="made for base model 'm'.*'other'"):
        check_base(adapter.manifest, BASE.model_copy(update={"name": "other", "fingerprint": "sha256:" + "1" * 64}))
    nameless = adapter.manifest.model_copy(update={"base": None})
    with pytest.raises(BaseMismatchError, match="does not say"):
        check_base(nameless, BASE)
    check_base(nameless, BASE, allow_mismatch=True)


def test_facts_that_say_nothing_are_not_written() -> None:
    """Manifests from before these facts existed keep their bytes, and with them their digests."""
    plain = Adapter.create("lora", {"rank": 1}, {"m.lora_A": torch.ones(1, 4), "m.lora_B": torch.ones(4, 1)}, None)
    assert "task" not in plain.manifest.to_json() and "replaces" not in plain.manifest.to_json()
    whole = Adapter.create(
        "lora",
        {"rank": 1, "modules_to_save": ["n"]},
        {"m.lora_A": torch.ones(1, 4), "m.lora_B": torch.ones(4, 1), "n.new_weight": torch.ones(4)},
        None,
    )
    assert [fact.get("replaces") for fact in whole.manifest.document()["program"]["weight_deltas"]] == [None, True]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_that_are_not_finite_are_refused(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype, copy=True) for name, tensor in make().tensors.items()}
    large = {name: torch.full_like(tensor, 6e4) for name, tensor in tensors.items()}
    adapter = make()
    Adapter.create("loreft", adapter.manifest.config, large, BASE).save(tmp_path)
    Adapter.load(tmp_path)
    name = "layers.1.block_output.0.weight"
    tensors[name][1, 3] = value
    Adapter.create("loreft", adapter.manifest.config, tensors, BASE).save(tmp_path)
    with pytest.raises(AdapterError, match=f"{name} holds numbers that are not finite"):
        Adapter.load(tmp_path)
