"""Names, numbers and strengths of versions; what a process keeps of them."""

from __future__ import annotations

import gc
import shutil

import pytest
import vllm_environment  # noqa: F401
from strong_adapters import strong_lora, strong_loreft
from tiny_models import make_tiny_llama

from reft_plugins.errors import AdapterError, BaseMismatchError
from reft_plugins.methods.program import adapter_of
from reft_plugins.program import Program, VirtualTokens
from reft_vllm import versions
from reft_vllm.guard import Resident
from reft_vllm.versions import Numbers, StrengthError, Version, checked_strength, natural_number

DIGEST = "sha256:" + "0123456789abcdef" * 4


def test_paths_name_versions() -> None:
    for version in (
        Version("/a b/c"),
        Version("relative", DIGEST),
        Version("/odd#name;strength=2", DIGEST, -0.125),
        Version("/x", DIGEST, 3.0),
    ):
        assert Version.parse(str(version)) == version
    assert str(Version("/x", DIGEST, 0.5)) == f"/x#{DIGEST};strength=0.5"
    assert Version("/x", DIGEST).at(1.0).key == DIGEST
    keys = {Version("/x", DIGEST, strength).key for strength in (1.0, 0.5, 0.05, -0.5, 0.0, 5.0)}
    assert len(keys) == 6
    assert Version.parse(f"/x#{DIGEST[:-1]}").digest is None, "not a digest, so a directory of that name"


def test_numbers_follow_from_content_and_never_meet(monkeypatch) -> None:
    keys = [f"{DIGEST};strength={each}" for each in range(2000)]
    forwards, backwards = Numbers(), Numbers()
    assert [forwards.of(key) for key in keys] == [*reversed([backwards.of(key) for key in reversed(keys)])]
    assert all(1 << 30 <= forwards.of(key) < 1 << 31 for key in keys)
    monkeypatch.setattr(versions, "natural_number", lambda key: (1 << 31) - 2)
    crowded = Numbers()
    numbers = [crowded.of(key) for key in keys[:5]]
    assert len(set(numbers)) == 5 and numbers == [crowded.of(key) for key in keys[:5]]
    assert all(1 << 30 <= number < 1 << 31 for number in numbers)


def test_numbers_are_spread() -> None:
    assert len({natural_number(f"{DIGEST};strength={each}") for each in range(5000)}) > 4990


def test_strengths() -> None:
    assert [checked_strength(value) for value in (1, 0.5, -8, 0.12345, -0.0001)] == [1.0, 0.5, -8.0, 0.123, 0.0]
    assert Version("/x", DIGEST, checked_strength(-0.0001)).key == f"{DIGEST};strength=0"
    for value in (8.1, -9, float("nan"), float("inf"), "1", None, True, [1]):
        with pytest.raises(StrengthError, match="reft_strength"):
            checked_strength(value)


def test_residents_are_those_used_last() -> None:
    resident = Resident(3)
    resident.use([1])
    resident.use([2, 3])
    assert 1 in resident and 2 in resident and 3 in resident
    resident.use([1])
    resident.use([4])
    assert 1 in resident and 4 in resident
    assert 2 not in resident and 3 not in resident, "one of them went, and nobody knows which"
    resident.forget(4)
    assert 4 not in resident


@pytest.fixture
def admission(tiny_llama, monkeypatch):
    from reft_vllm import admission

    monkeypatch.setattr(admission, "KEPT", admission.Kept(1 << 20))
    admission.serve_base(str(tiny_llama))
    return admission


def test_a_directory_that_changes_is_another_version(admission, tiny_llama, tmp_path) -> None:
    one, two = (strong_loreft(tiny_llama, "f1", seed=seed) for seed in (1, 2))
    folder = one.save(tmp_path / "adapter")
    before = admission.exact(str(folder))
    assert admission.admit(str(folder)).digest == before.digest == one.digest
    two.save(folder)
    assert admission.admit(str(folder)).digest == two.digest
    assert admission.admit(str(before)).digest == one.digest, "kept, whatever the directory holds"
    shutil.rmtree(folder)
    assert admission.is_adapter(str(folder)) and admission.admit(str(folder)).digest == two.digest
    elsewhere = Version(str(tmp_path / "nowhere"), one.digest)
    assert admission.admit(str(elsewhere)).digest == one.digest, "content has one name, wherever it is"
    admission.KEPT.clear()
    gc.collect()
    with pytest.raises(AdapterError, match="cannot read the manifest"):
        admission.admit(str(before))
    two.save(folder)
    with pytest.raises(AdapterError, match="Load the adapter again with load_inplace"):
        admission.admit(str(before))


def test_what_is_held_is_found_and_the_rest_is_dropped(admission, tiny_llama, tmp_path) -> None:
    admission.KEPT.limit = 1
    paths = [str(strong_loreft(tiny_llama, "f1", seed=seed).save(tmp_path / str(seed))) for seed in range(3)]
    held = admission.admit(paths[0])
    admission.admit(paths[1])
    admission.admit(paths[2])
    gc.collect()
    reads = admission.KEPT.reads
    assert admission.admit(paths[0]) is held and admission.KEPT.reads == reads
    admission.admit(paths[1])
    assert admission.KEPT.reads == reads + 1
    assert admission.KEPT.bytes == admission.admit(paths[1]).manifest.tensors.size


def test_strengths_scale_what_can_be_scaled(admission, tiny_llama, tmp_path) -> None:
    import torch

    from reft_plugins.base_model import identify

    for number, adapter in enumerate((strong_loreft(tiny_llama, "f1", seed=1), strong_lora(tiny_llama, seed=2))):
        version = admission.exact(str(adapter.save(tmp_path / str(number))))
        whole, half = admission.admit(str(version)), admission.admit(str(version.at(0.5)))
        assert half.digest == f"{whole.digest};strength=0.5" and half.positions == whole.positions
        assert admission.admit(str(version.at(0.5))) is half
        if whole.program.edits:
            assert torch.equal(half.program.edits[0].up, whole.program.edits[0].up * 0.5)
        else:
            before = {delta.module: delta.scaling * delta.b for delta in whole.program.weight_deltas}
            for delta in half.program.weight_deltas:
                torch.testing.assert_close(delta.scaling * delta.b, before[delta.module] * 0.5)
    prompt = adapter_of(Program((VirtualTokens(torch.randn(3, 128)),)), identify(tiny_llama))
    version = admission.exact(str(prompt.save(tmp_path / "prompt")))
    with pytest.raises(StrengthError, match=r"VirtualTokens\(3\)"):
        admission.admit(str(version.at(0.5)))


def test_other_bases_are_refused(admission, tmp_path) -> None:
    other = make_tiny_llama(tmp_path / "other", steps=0, seed=5)
    with pytest.raises(BaseMismatchError):
        admission.admit(str(strong_loreft(other, "f1", seed=1).save(tmp_path / "foreign")))
