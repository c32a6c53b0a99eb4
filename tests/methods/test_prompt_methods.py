"""Prompt tuning, P-tuning, prefix tuning and LLaMA-Adapter: the contract, PEFT as a second opinion, wrong use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from contract import MethodCase, gradients_reach_exactly_own, learns, lowering_error, reloads_exactly
from small_models import FAMILIES, IDENTITY, build

import reft_plugins as reft
from reft_plugins import plugins
from reft_plugins.adapter import Adapter, parse_config
from reft_plugins.base_model import identify
from reft_plugins.errors import AdapterError, TrainingError
from reft_plugins.program import KeyValuePrefix, Program, VirtualTokens
from reft_plugins.training.trainer import Step

N, WIDE = {"num_virtual_tokens": 8}, {"num_virtual_tokens": 16}
CASES = [
    MethodCase("prompt_tuning", WIDE, constant=True, training={"learning_rate": 5e-2, "epochs": 10}, label="prompt"),
    MethodCase("p_tuning", N, constant=True, training={"learning_rate": 1e-2, "epochs": 18}, label="p-mlp"),
    MethodCase("prefix_tuning", WIDE, training={"learning_rate": 0.2, "epochs": 32}, label="prefix"),
    MethodCase(
        "prefix_tuning",
        {**WIDE, "projection": True},
        training={"learning_rate": 1e-2, "epochs": 32},
        label="prefix-mlp",
    ),
    MethodCase("llama_adapter", WIDE, training={"learning_rate": 0.1, "epochs": 48}, label="llama-adapter"),
]
OTHERS = [
    MethodCase("prompt_tuning", {**N, "init": "text", "init_text": "count: one"}, label="prompt-text"),
    MethodCase("prompt_tuning", {**N, "init": "random"}, label="prompt-random"),
    MethodCase("p_tuning", {**N, "encoder": "lstm", "encoder_dropout": 0.1}, label="p-lstm"),
    MethodCase("prefix_tuning", {**N, "projection": True, "encoder_hidden_size": 24}, label="prefix-narrow"),
    MethodCase("llama_adapter", {**N, "top_layers": 2, "gate_per_head": True}, label="llama-adapter-heads"),
    MethodCase("llama_adapter", {**N, "projected": False}, label="llama-adapter-unprojected"),
]
Tasks = dict[bool, tuple[Path, Path]]


@pytest.fixture(scope="module")
def trained(tiny_llama: Path, tasks: Tasks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("trained")
    for case in CASES:
        learns(case, tiny_llama, *tasks[case.constant], folder / str(case))
    return {str(case): folder / str(case) for case in CASES}


def test_what_was_learned_comes_back_in_a_new_process(
    trained: dict[str, Path], tiny_llama: Path, tmp_path: Path
) -> None:
    reloads_exactly(list(trained.values()), tiny_llama, tmp_path)


@pytest.mark.parametrize("case", [*CASES, *OTHERS], ids=str)
def test_the_lowered_program_is_the_training_module(case: MethodCase, tiny_llama: Path) -> None:
    error, effect = lowering_error(case, tiny_llama)
    assert error <= 1e-5 < 0.05 < effect


@pytest.mark.parametrize("case", [*CASES, *OTHERS], ids=str)
def test_gradients_reach_exactly_the_own_parameters(case: MethodCase, tiny_llama: Path, tasks: Tasks) -> None:
    gradients_reach_exactly_own(case, tiny_llama, tasks[case.constant][0])


def test_only_what_runs_is_stored(trained: dict[str, Path]) -> None:
    """Encoders and projections are for training; the names and shapes are those the docstrings promise."""
    stored = {name: Adapter.load(path).tensors for name, path in trained.items()}
    for name, rows in (("prompt", 16), ("p-mlp", 8)):
        assert {key: tuple(tensor.shape) for key, tensor in stored[name].items()} == {"embeddings": (rows, 128)}
    for name, rows in (("prefix", 16), ("prefix-mlp", 16)):
        shapes = {f"layers.{layer}.{kind}": (rows, 2, 32) for layer in range(4) for kind in ("keys", "values")}
        assert {key: tuple(tensor.shape) for key, tensor in stored[name].items()} == shapes
    own = {"prompt": (16, 128), "keys": (16, 2, 32), "values": (16, 2, 32), "gate": (1,)}
    shapes = {f"layers.{layer}.{kind}": shape for layer in range(4) for kind, shape in own.items()}
    assert {key: tuple(tensor.shape) for key, tensor in stored["llama-adapter"].items()} == shapes
    assert {tensor.dtype for tensors in stored.values() for tensor in tensors.values()} == {torch.float32}


def batch(left: bool) -> dict[str, torch.Tensor]:
    """Two rows of 9 and 4 tokens."""
    tokens = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[1, : 5 if left else None] = 0
    if not left:
        mask[1] = torch.tensor([1] * 4 + [0] * 5)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}


def run(model: Any, program: Program | None, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of the real tokens under a program, in the reference runtime."""
    executor = plugins.runtimes.get("transformers").executor(model)
    wide = executor.widen([program] * 2, **inputs)
    batch = {name: getattr(wide, name) for name in inputs}
    with torch.inference_mode(), executor.run([program] * 2, inputs["attention_mask"].sum(-1)):
        logits: torch.Tensor = model(**batch, use_cache=False).logits
    return logits[:, wide.extra :][inputs["attention_mask"].bool()]


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
def test_every_family_of_models_is_trained_as_it_is_run(method: str, family: str, left: bool) -> None:
    """PEFT's forward pass and the runtime's agree, also where key/value heads are fewer or wider than usual."""
    model = build(family)
    method_ = plugins.methods.get(method)
    config = parse_config(method_, {"num_virtual_tokens": 5})
    trainable = method_.attach(model, config, IDENTITY)
    trainable.parameters.embedding.weight.data.normal_(std=0.5, generator=torch.Generator().manual_seed(1))
    program = method_.lower(config, trainable.tensors())
    program.validate(IDENTITY)
    inputs = batch(left)
    with torch.inference_mode():
        logits = Step(trainable).eval()(prompt_lengths=inputs["attention_mask"].sum(-1), **inputs).logits
    logits = logits[inputs["attention_mask"].bool()]
    base = build(family)
    torch.testing.assert_close(run(base, program, inputs), logits, atol=1e-5, rtol=0)
    assert (run(base, None, inputs) - logits).abs().max() > 0.02


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_peft_computes_the_same_llama_adapter(family: str) -> None:
    """PEFT's class, for the models it knows, given the same prompts and gates."""
    projected = family != "gpt2"
    wrapped = peft.get_peft_model(
        build(family), peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=2, task_type="CAUSAL_LM")
    ).eval()
    theirs = [module for module in wrapped.modules() if hasattr(module, "adaption_prompt")]
    model = build(family)
    method = plugins.methods.get("llama_adapter")
    config = parse_config(method, {"num_virtual_tokens": 4, "top_layers": 2, "projected": projected})
    trainable = method.attach(model, config, IDENTITY)
    for module, prompt, gate in zip(theirs, trainable.parameters.prompts, trainable.parameters.gates, strict=True):
        module.adaption_gate.data.fill_(0.8)
        prompt.data, gate.data = module.adaption_prompt.data[0].clone(), module.adaption_gate.data.clone()
    program = method.lower(config, trainable.tensors())
    assert [node.layer for node in program.prefixes] == [1, 2]
    inputs = batch(left=False)
    with torch.inference_mode():
        expected = wrapped(**inputs).logits[inputs["attention_mask"].bool()]
    torch.testing.assert_close(run(model, program, inputs), expected, atol=1e-5, rtol=0)
    assert (run(model, None, inputs) - expected).abs().max() > 0.02


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_and_values_are_those_of_the_base(family: str) -> None:
    """What the base's own attention puts into its cache for the prompt's rows, rotated by nothing."""
    from transformers import DynamicCache

    model = build(family)
    method = plugins.methods.get("llama_adapter")
    config = parse_config(method, {"num_virtual_tokens": 4, "top_layers": 2})
    tensors = method.attach(model, config, IDENTITY).tensors()
    [attention] = {
        module
        for module in model.modules()
        if getattr(module, "layer_idx", None) == 2 and "Attention" in str(type(module))
    }
    size = tensors["layers.2.keys"].shape[-1]
    unrotated = (torch.ones(1, 4, size), torch.zeros(1, 4, size))
    cache = DynamicCache()
    name = "layer_past" if family == "gpt_neox" else "past_key_values"
    rotary = {} if family == "gpt2" else {"position_embeddings": unrotated}
    with torch.inference_mode():
        attention(tensors["layers.2.prompt"][None], attention_mask=None, **{name: cache}, **rotary)
    layer = cache.layers[2]
    torch.testing.assert_close(layer.keys[0].transpose(0, 1), tensors["layers.2.keys"], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(layer.values[0].transpose(0, 1), tensors["layers.2.values"], atol=1e-6, rtol=1e-5)


def test_a_closed_gate_is_the_base_and_opens_before_the_prompt_moves() -> None:
    """Zero-init: training begins at the base model, the first gradient is the gate's alone, the second is both's."""
    model = build("llama")
    method = plugins.methods.get("llama_adapter")
    config = parse_config(method, {"num_virtual_tokens": 4})
    trainable = method.attach(model, config, IDENTITY)
    inputs = batch(left=False)
    step, lengths = Step(trainable).eval(), inputs["attention_mask"].sum(-1)
    with torch.inference_mode():
        closed = step(prompt_lengths=lengths, **inputs).logits[inputs["attention_mask"].bool()]
    assert torch.equal(closed, run(model, None, inputs))
    optimizer = torch.optim.SGD(trainable.parameters.parameters(), lr=10.0)
    for number in range(2):
        optimizer.zero_grad()
        step(prompt_lengths=lengths, **inputs).logits.square().sum().backward()
        for prompt, gate in zip(trainable.parameters.prompts, trainable.parameters.gates, strict=True):
            assert gate.grad is not None and gate.grad.abs().max() > 0
            assert prompt.grad is not None and bool(prompt.grad.abs().max() > 0) == (number == 1)
        optimizer.step()


def test_text_and_vocabulary_are_where_a_prompt_begins(tiny_llama: Path, tasks: Tasks) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    table = AutoModelForCausalLM.from_pretrained(tiny_llama).get_input_embeddings().weight
    tokens = AutoTokenizer.from_pretrained(tiny_llama)("the red dog").input_ids
    still = {"epochs": 0.01, "learning_rate": 1e-12, "num_virtual_tokens": 11, "progress": False}
    text = reft.train(
        tiny_llama, "prompt_tuning", tasks[True][0], init="text", init_text="the red dog", **still
    ).tensors["embeddings"]
    repeated = torch.tensor((tokens * 11)[:11])
    torch.testing.assert_close(text, table[repeated].detach(), atol=1e-6, rtol=0)
    drawn = reft.train(tiny_llama, "prompt_tuning", tasks[True][0], **still).tensors["embeddings"]
    assert (
        torch.cdist(drawn, table.detach(), compute_mode="donot_use_mm_for_euclid_dist").min(dim=1).values.max() < 1e-5
    )
    random = reft.train(tiny_llama, "prompt_tuning", tasks[True][0], init="random", **still).tensors["embeddings"]
    assert torch.cdist(random, table.detach()).min() > 1


def test_programs_are_of_the_kinds_promised(trained: dict[str, Path]) -> None:
    programs = {name: Adapter.load(path).lower() for name, path in trained.items()}
    for name in ("prompt", "p-mlp"):
        assert [type(node) for node in programs[name]] == [VirtualTokens]
    for name in ("prefix", "prefix-mlp", "llama-adapter"):
        assert [type(node) for node in programs[name]] == [KeyValuePrefix] * 4
        assert {node.gate is None for node in programs[name].prefixes} == {name != "llama-adapter"}


@pytest.mark.parametrize("case", [CASES[0], OTHERS[2], CASES[3], CASES[4]], ids=str)
def test_what_is_learned_is_float32_on_a_bfloat16_base(case: MethodCase) -> None:
    model = build("llama").to(torch.bfloat16)
    method = plugins.methods.get(case.name)
    trainable = method.attach(model, parse_config(method, case.settings), IDENTITY)
    inputs = batch(left=True)
    step = Step(trainable)
    step(prompt_lengths=inputs["attention_mask"].sum(-1), **inputs).logits.float().square().sum().backward()
    assert {parameter.dtype for parameter in trainable.parameters.parameters()} == {torch.float32}
    assert {tensor.dtype for tensor in trainable.tensors().values()} == {torch.float32}
    assert any(parameter.grad.abs().max() > 0 for parameter in trainable.parameters.parameters())
    assert {parameter.dtype for parameter in model.parameters() if not parameter.requires_grad} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("prompt_tuning", {"num_virtual_tokens": 0}, "'num_virtual_tokens'"),
        ("prompt_tuning", {"init": "text"}, "belong together"),
        ("prompt_tuning", {"init_text": "hello"}, "belong together"),
        ("p_tuning", {"encoder": "gru"}, "'encoder'"),
        ("p_tuning", {"encoder_dropout": 0.1}, "settings of encoder='lstm'"),
        ("prefix_tuning", {"encoder_hidden_size": 8}, "setting of projection=True"),
        ("llama_adapter", {"top_layers": 5}, "top_layers 5: the base model has 4 layers"),
        ("llama_adapter", {"layers": [1]}, "'layers'"),
    ],
)
def test_wrong_settings_are_named(
    tiny_llama: Path, tasks: Tasks, method: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(AdapterError, match=message):
        reft.train(tiny_llama, method, tasks[True][0], progress=False, **settings)


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning", "prefix_tuning"])
def test_a_missing_peft_is_named(tiny_llama: Path, tasks: Tasks, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(TrainingError, match=r"trained by PEFT, which cannot be imported.*reft-plugins\[train\]"):
        reft.train(tiny_llama, method, tasks[True][0], progress=False)


def test_an_attention_that_is_not_understood_is_refused() -> None:
    model = build("gpt_neox")
    for layer in model.gpt_neox.layers:
        layer.attention.query_key_value = torch.nn.Linear(32, 48)
    method = plugins.methods.get("llama_adapter")
    with pytest.raises(AdapterError, match="not laid out in a known way"):
        method.attach(model, parse_config(method, {}), IDENTITY)
    for layer in model.gpt_neox.layers:
        del layer.attention.query_key_value
    with pytest.raises(AdapterError, match="looked for modules named k_proj, c_attn, qkv_proj, query_key_value"):
        method.attach(model, parse_config(method, {}), IDENTITY)


def test_tensors_of_other_names_are_refused(tiny_llama: Path) -> None:
    pairs = torch.zeros(2, 2, 32)
    for name in ("layers.0.kyes", "layer.0.keys", "layers.x.keys", "layers.0.1.keys"):
        with pytest.raises(AdapterError, match="is not of the form layers.<layer>"):
            Adapter.create("prefix_tuning", {}, {name: pairs}, identify(tiny_llama))
    with pytest.raises(AdapterError, match="'layers.0.values' is missing for method 'prefix_tuning'"):
        Adapter.create("prefix_tuning", {}, {"layers.0.keys": pairs}, identify(tiny_llama))
