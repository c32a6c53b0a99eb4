"""The reference runtime against plain transformers: hand-written hooks at explicit positions, and merged weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from strong_adapters import strong_lora, strong_loreft

import reft_plugins as reft
from reft_plugins import Adapter, Positions
from reft_plugins.errors import AdapterError, BaseMismatchError, UnknownReferenceError

PROMPTS = ["the small dog", "count: one, two,", "Who likes the red fox? The king does! one plus two is", "it"]
TOKENS = 8


@pytest.fixture(scope="module")
def runtime(tiny_llama: Path) -> Iterator[Any]:
    engine = reft.runtime("transformers", tiny_llama)
    yield engine
    engine.close()


def ids(runtime: Any, prompt: str) -> list[int]:
    return list(runtime.tokenizer(prompt).input_ids)


@contextmanager
def hooked(runtime: Any, adapter: Adapter, indices: list[int]) -> Iterator[None]:
    """LoReFT by its formula, `h + R^T (W h + b - R h)`, on the tokens `indices` of one unpadded row."""

    def hook(layer: int) -> Any:
        def change(module: Any, args: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            tensors = adapter.tensors
            rotate, weight, bias = (tensors[f"layers.{layer}.block_output.0.{n}"] for n in ("rotate", "weight", "bias"))
            edited = hidden.clone()
            for index in indices:
                h = hidden[0, index]
                edited[0, index] = h + rotate.T @ (weight @ h + bias - rotate @ h)
            return (edited, *output[1:]) if isinstance(output, tuple) else edited

        return change

    layers = sorted({int(name.split(".")[1]) for name in adapter.tensors})
    handles = [runtime.model.model.layers[layer].register_forward_hook(hook(layer)) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def plain_logits(model: Any, tokens: list[int]) -> np.ndarray[Any, Any]:
    with torch.inference_mode():
        return np.asarray(model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0])


@pytest.mark.parametrize("spec", ["f1", "l1", "f2+l2", "f9+l9;cap=half", "l2;trim=1", "prompt", "[1,-2]", "all"])
def test_loreft_logits_are_the_formula_at_the_positions(runtime: Any, tiny_llama: Path, spec: str) -> None:
    adapter = strong_loreft(tiny_llama, spec, seed=1)
    tokens = ids(runtime, PROMPTS[2])
    edited = [
        t for start, stop in Positions.parse(spec).resolve(len(tokens)) for t in range(start, min(stop, len(tokens)))
    ]
    base = plain_logits(runtime.model, tokens)
    with hooked(runtime, adapter, edited):
        expected = plain_logits(runtime.model, tokens)
    got = runtime.logits(tokens, adapter=adapter)
    np.testing.assert_allclose(got, expected, atol=2e-4)
    assert np.abs(expected - base).max() > 1.0, "the adapter must matter, or equality proves nothing"
    np.testing.assert_allclose(runtime.logits(tokens), base, atol=1e-5)


def test_generated_positions_are_edited_step_by_step(runtime: Any, tiny_llama: Path) -> None:
    """With a KV cache, against a forward pass over the whole sequence at every step."""
    for spec in ("generated", "all", "f2+l2", "prompt"):
        adapter = strong_loreft(tiny_llama, spec, seed=2, scale=9.0)
        prompt = ids(runtime, PROMPTS[0])
        sequence = list(prompt)
        for _ in range(TOKENS):
            intervals = Positions.parse(spec).resolve(len(prompt))
            edited = [t for a, b in intervals for t in range(a, min(b, len(sequence)))]
            with hooked(runtime, adapter, edited):
                sequence.append(int(plain_logits(runtime.model, sequence)[-1].argmax()))
        answer = runtime.generate([prompt], [adapter], max_new_tokens=TOKENS, ignore_eos=True)[0].token_ids
        assert answer == sequence[len(prompt) :], spec
        unedited = runtime.generate([prompt], max_new_tokens=TOKENS, ignore_eos=True)[0].token_ids
        assert answer != unedited, f"{spec}: the adapter must change the answer"


def test_activation_is_applied_before_rotating_back(runtime: Any, tiny_llama: Path) -> None:
    adapter = strong_loreft(tiny_llama, "l1", seed=3, layers=(2,), activation="relu")
    tokens = ids(runtime, PROMPTS[1])
    t = {name.rpartition(".")[2]: tensor for name, tensor in adapter.tensors.items()}

    def hook(module: Any, args: Any, output: Any) -> Any:
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        h = hidden[0, -1]
        hidden[0, -1] = h + t["rotate"].T @ (torch.relu(t["weight"] @ h + t["bias"]) - t["rotate"] @ h)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = runtime.model.model.layers[2].register_forward_hook(hook)
    expected = plain_logits(runtime.model, tokens)
    handle.remove()
    got = runtime.logits(tokens, adapter=adapter)
    np.testing.assert_allclose(got, expected, atol=2e-4)
    linear = strong_loreft(tiny_llama, "l1", seed=3, layers=(2,))
    assert np.abs(runtime.logits(tokens, adapter=linear) - got).max() > 0.05


def test_unshared_groups_use_their_own_parameters(runtime: Any, tiny_llama: Path) -> None:
    both = strong_loreft(tiny_llama, "f2+l2", seed=4, layers=(1,), shared=False)
    tokens = ids(runtime, PROMPTS[2])

    def hook(module: Any, args: Any, output: Any) -> Any:
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        for group, indices in ((0, (0, 1)), (1, (-2, -1))):
            rotate, weight, bias = (
                both.tensors[f"layers.1.block_output.{group}.{n}"] for n in ("rotate", "weight", "bias")
            )
            for index in indices:
                h = hidden[0, index]
                hidden[0, index] = h + rotate.T @ (weight @ h + bias - rotate @ h)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = runtime.model.model.layers[1].register_forward_hook(hook)
    expected = plain_logits(runtime.model, tokens)
    handle.remove()
    np.testing.assert_allclose(runtime.logits(tokens, adapter=both), expected, atol=2e-4)
    shared = Adapter.create(
        "loreft", {"positions": "f2+l2"}, {k: v for k, v in both.tensors.items() if ".0." in k}, None
    )
    alone = shared.with_base(both.manifest.base)  # type: ignore[arg-type]
    assert np.abs(runtime.logits(tokens, adapter=alone) - expected).max() > 0.5


def test_lora_logits_are_those_of_merged_weights(runtime: Any, tiny_llama: Path) -> None:
    adapter = strong_lora(tiny_llama, seed=5)
    merged = copy.deepcopy(runtime.model)
    for name in {name.rpartition(".")[0] for name in adapter.tensors}:
        weight = merged.get_submodule(name).weight
        weight.data += 16.0 / 8 * adapter.tensors[f"{name}.lora_B"] @ adapter.tensors[f"{name}.lora_A"]
    tokens = ids(runtime, PROMPTS[2])
    expected = plain_logits(merged, tokens)
    np.testing.assert_allclose(runtime.logits(tokens, adapter=adapter), expected, atol=5e-4)
    assert np.abs(expected - plain_logits(runtime.model, tokens)).max() > 1.0


def test_a_mixed_batch_answers_as_each_row_alone(runtime: Any, tiny_llama: Path) -> None:
    """Different adapters, methods and lengths in one left-padded batch with a KV cache."""
    specs = ("f2+l2", "l1", "all", "generated", "f1", "prompt")
    adapters: list[Any] = [strong_loreft(tiny_llama, spec, seed=10 + n, scale=9.0) for n, spec in enumerate(specs)]
    adapters += [strong_lora(tiny_llama, seed=20), strong_lora(tiny_llama, seed=21, scale=0.15), None]
    rows = [(prompt, adapter) for prompt in PROMPTS for adapter in adapters]
    prompts, each = [row[0] for row in rows], [row[1] for row in rows]
    together = runtime.generate(prompts, each, max_new_tokens=TOKENS, ignore_eos=True)
    alone = [runtime.generate([p], [a], max_new_tokens=TOKENS, ignore_eos=True)[0] for p, a in rows]
    assert [g.token_ids for g in together] == [g.token_ids for g in alone]
    assert [g.text for g in together] == [g.text for g in alone]
    rotated = runtime.generate(prompts, each[1:] + each[:1], max_new_tokens=TOKENS, ignore_eos=True)
    mistaken = sum(a.token_ids != b.token_ids for a, b in zip(together, rotated, strict=True))
    assert mistaken > len(rows) / 2, "rows under their neighbour's adapter must answer differently"


def test_batches_stop_at_the_end_token(runtime: Any) -> None:
    end = runtime.tokenizer.eos_token_id
    prompt = ids(runtime, "one plus two is three.")
    free = runtime.generate([prompt, PROMPTS[0]], max_new_tokens=40, ignore_eos=True)
    stopped = runtime.generate([prompt, PROMPTS[0]], max_new_tokens=40)
    cut = 0
    for long, short in zip(free, stopped, strict=True):
        if end in long.token_ids:
            assert short.token_ids == long.token_ids[: long.token_ids.index(end) + 1]
            assert "</s>" not in short.text
            cut += 1
        else:
            assert short.token_ids == long.token_ids
    assert all(len(g.token_ids) == 40 for g in free) and cut


def test_sampling_draws_from_the_whole_distribution(runtime: Any) -> None:
    torch.manual_seed(0)
    answers = {tuple(g.token_ids) for g in runtime.generate(["the"] * 20, max_new_tokens=4, temperature=1.5)}
    assert len(answers) > 10


def test_an_adapter_may_be_a_folder(runtime: Any, tiny_llama: Path, tmp_path: Path) -> None:
    adapter = strong_loreft(tiny_llama, "f1+l1", seed=6)
    adapter.save(tmp_path / "a")
    tokens = ids(runtime, PROMPTS[0])
    np.testing.assert_array_equal(runtime.logits(tokens, tmp_path / "a"), runtime.logits(tokens, adapter))
    np.testing.assert_array_equal(runtime.logits(tokens, str(tmp_path / "a")), runtime.logits(tokens, adapter))


def test_bfloat16_runs_close_to_float32(tiny_llama: Path, runtime: Any) -> None:
    adapter = strong_loreft(tiny_llama, "all", seed=7)
    tokens = ids(runtime, PROMPTS[2])
    exact = runtime.logits(tokens, adapter)
    narrow = reft.runtime("transformers", tiny_llama, dtype="bfloat16").logits(tokens, adapter)
    change = np.abs(exact - runtime.logits(tokens)).max()
    assert np.abs(exact - narrow).max() < 0.1 * change


def test_adapters_of_another_base_are_refused(runtime: Any, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = strong_loreft(tiny_llama, "f1", seed=8)
    other = adapter.manifest.base.model_copy(update={"fingerprint": "sha256:" + "0" * 64})  # type: ignore[union-attr]
    stranger = adapter.with_base(other)
    tokens = ids(runtime, PROMPTS[0])
    with pytest.raises(BaseMismatchError, match="made for base model"):
        runtime.logits(tokens, stranger)
    with pytest.raises(BaseMismatchError, match="made for base model"):
        runtime.generate([tokens], [stranger])
    monkeypatch.setenv("REFT_ALLOW_BASE_MISMATCH", "1")
    np.testing.assert_array_equal(runtime.logits(tokens, stranger), runtime.logits(tokens, adapter))


def test_failures_leave_the_base_untouched(runtime: Any, tiny_llama: Path) -> None:
    tokens = ids(runtime, PROMPTS[0])
    before = runtime.logits(tokens)
    lora = strong_lora(tiny_llama, seed=9)
    wrong = {name.replace("layers.3", "layers.9"): tensor for name, tensor in lora.tensors.items()}
    missing = Adapter.create("lora", {"rank": 8}, wrong, lora.manifest.base)
    with pytest.raises(AdapterError, match=r"no module 'model\.layers\.9"):
        runtime.logits(tokens, missing)
    resized = {name: tensor[:, :64] if name.endswith("lora_A") else tensor for name, tensor in lora.tensors.items()}
    with pytest.raises(AdapterError, match=r"made for .* x 64"):
        runtime.logits(tokens, Adapter.create("lora", {"rank": 8}, resized, lora.manifest.base))
    with pytest.raises(UnknownReferenceError, match="no adapter under 'nobody:latest'"):
        runtime.logits(tokens, "nobody:latest")
    with pytest.raises(ValueError, match="no tokens"):
        runtime.logits([])
    with pytest.raises(ValueError, match="2 prompts but 1 adapters"):
        runtime.generate(["a", "b"], [None])
    assert runtime.generate([]) == []
    np.testing.assert_array_equal(runtime.logits(tokens), before)
    assert not runtime.model._forward_pre_hooks


@pytest.mark.parametrize("component", ["block_input", "attention_output", "mlp_output"])
def test_other_components_are_edited_where_they_are(runtime: Any, tiny_llama: Path, component: str) -> None:
    identity = strong_lora(tiny_llama, seed=0).manifest.base
    draw = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(128, 4, generator=draw))[0].T.contiguous()
    tensors = {f"layers.2.{component}.0.rotate": basis, f"layers.2.{component}.0.weight": torch.zeros(4, 128)}
    adapter = Adapter.create("loreft", {"component": component, "positions": "all"}, tensors, identity)
    tokens = ids(runtime, PROMPTS[1])
    block = runtime.model.model.layers[2]
    remove = torch.eye(128) - basis.T @ basis

    def on_output(module: Any, args: Any, output: Any) -> Any:
        return (output[0] @ remove, *output[1:]) if isinstance(output, tuple) else output @ remove

    def on_input(module: Any, args: Any) -> Any:
        return (args[0] @ remove, *args[1:])

    if component == "block_input":
        handle = block.register_forward_pre_hook(on_input)
    else:
        handle = (block.self_attn if component == "attention_output" else block.mlp).register_forward_hook(on_output)
    expected = plain_logits(runtime.model, tokens)
    handle.remove()
    np.testing.assert_allclose(runtime.logits(tokens, adapter), expected, atol=1e-4)
    assert np.abs(expected - plain_logits(runtime.model, tokens)).max() > 0.01
