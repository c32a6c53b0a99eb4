"""Key/value prefixes against PEFT's prefix tuning and adaption prompts, and in mixed batches."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import peft
import pytest
import torch
from tiny_architectures import DECODERS, ENCODERS, layers, tiny
from torch import Tensor

from reft_plugins.errors import AdapterError, UnsupportedProgramError
from reft_plugins.positions import Positions
from reft_plugins.program import Edit, KeyValuePrefix, Program, Site, VirtualTokens, WeightDelta
from reft_transformers.executor import Executor

PROMPT = torch.tensor([[5, 9, 33, 7, 80, 12, 41, 3, 22, 18, 64, 51]])
"""Longer than the windows of 7 tokens that the tiny Mistral and Gemmas look back."""
HEADS = dict.fromkeys(DECODERS, (2, 24)) | dict.fromkeys(("qwen2", "phi3"), (2, 16))
HEADS |= dict.fromkeys((*ENCODERS, "gpt2", "gpt_neox", "gpt_neox_sequential"), (4, 16))


def strong_prefix(name: str, length: int, seed: int = 0) -> Tensor:
    """Pairs as PEFT stores them: `[n, layers * 2, kv_heads, head_dim]`, key and value of each layer in turn."""
    return torch.randn(length, 4, *HEADS[name], generator=torch.Generator().manual_seed(seed)) * 1.5


def prefix_program(pairs: Tensor) -> Program:
    return Program(tuple(KeyValuePrefix(layer, pairs[:, 2 * layer], pairs[:, 2 * layer + 1]) for layer in range(2)))


def prefix_tuned(model: Any, name: str, pairs: Tensor, task: str = "CAUSAL_LM") -> Any:
    heads, size = HEADS[name]
    config = peft.PrefixTuningConfig(
        task_type=task,
        num_virtual_tokens=len(pairs),
        token_dim=heads * size,
        num_attention_heads=heads,
        num_layers=2,
    )
    wrapped: Any = peft.get_peft_model(copy.deepcopy(model), config).eval()
    wrapped.prompt_encoder["default"].embedding.weight.data = pairs.flatten(1).clone()
    return wrapped


def logits(model: Any, ids: Tensor = PROMPT, **batch: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=ids, **batch).logits
    return result


def executed(model: Any, program: Program | None, ids: Tensor = PROMPT, **batch: Any) -> Tensor:
    with Executor(model).run([program] * len(ids), torch.tensor([ids.shape[1]] * len(ids))):
        return logits(model, ids, **batch)


def close(got: Tensor, expected: Tensor, base: Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=5e-4, rtol=1e-4)
    assert (expected - base).abs().max() > 0.1, "the prefix must matter, or equality proves nothing"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", DECODERS)
def test_prefix_tuning_is_that_of_peft(name: str, attention: str) -> None:
    model = tiny(name, attention)
    for length in (3, 9):
        pairs = strong_prefix(name, length)
        expected = logits(prefix_tuned(model, name, pairs))
        close(executed(model, prefix_program(pairs)), expected, logits(model))
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_prefixes_of_an_encoder_are_its_own_attention_over_more_keys(name: str) -> None:
    model = tiny(name)
    pairs = strong_prefix(name, 3)[:, :2]
    program = Program((KeyValuePrefix(1, pairs[:, 0], pairs[:, 1]),))
    own: Any = getattr(model, name).encoder.layer[1].attention.self

    def forward(hidden: Tensor, **_: Any) -> tuple[Tensor, None]:
        query, key, value = (part(hidden)[0].view(-1, 4, 16) for part in (own.query, own.key, own.value))
        key, value = torch.cat([pairs[:, 0], key]), torch.cat([pairs[:, 1], value])
        weights = (torch.einsum("qhd,khd->hqk", query, key) / 4).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, value).flatten(1)[None], None

    offset = 2 if name == "roberta" else 0  # RoBERTa counts from padding_idx + 1
    moved = torch.arange(PROMPT.shape[1])[None] + 3 + offset
    own.forward = forward
    expected = logits(model, position_ids=moved)
    del own.forward
    close(executed(model, program), expected, logits(model))


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_adaption_prompt_is_that_of_peft(name: str) -> None:
    """A softmax of its own, gated: before the output projection, or for GPT-2 after it."""
    model = tiny(name) if name == "gpt2" else tiny(name, head_dim=16)  # PEFT takes heads to be hidden / heads wide
    torch.manual_seed(3)
    config = peft.AdaptionPromptConfig(adapter_len=5, adapter_layers=2, task_type="CAUSAL_LM")
    if name == "gpt2":
        config.target_modules = "attn"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped: Any = peft.get_peft_model(copy.deepcopy(model), config).eval()
    nodes = []
    for layer, block in enumerate(layers(wrapped)):
        adapted = block.attn if name == "gpt2" else block.self_attn
        adapted.adaption_gate.data.fill_(1.5 + layer)
        prompt, plain = adapted.adaption_prompt[0].detach() * 2, adapted.model
        adapted.adaption_prompt.data *= 2
        if name == "gpt2":
            _, keys, values = plain.c_attn(prompt).split(64, dim=-1)
        else:
            keys, values = plain.k_proj(prompt), plain.v_proj(prompt)
        shape = (5, 4 if name == "gpt2" else 2, 16)
        gate = adapted.adaption_gate.detach()
        nodes.append(
            KeyValuePrefix(
                layer, keys.detach().view(shape), values.detach().view(shape), gate, projected=name != "gpt2"
            )
        )
    close(executed(model, Program(tuple(nodes))), logits(wrapped), logits(model))
    other = Program((KeyValuePrefix(1, nodes[1].keys, nodes[1].values, nodes[1].gate, not nodes[1].projected),))
    right = executed(model, Program((nodes[1],)))
    assert (executed(model, other) - right).abs().max() > 0.01


def test_a_gate_per_head_and_the_gradients_of_all_of_a_prefix() -> None:
    model = tiny("llama")
    draw = torch.Generator().manual_seed(4)
    keys, values = (torch.randn(5, 2, 24, generator=draw).requires_grad_() for _ in range(2))
    gate = torch.tensor([0.0, 1.0, -2.0, 0.5], requires_grad=True)
    program = Program((KeyValuePrefix(0, keys, values, gate), KeyValuePrefix(1, keys, values)))
    with Executor(model).run([program], torch.tensor([12])):
        model(input_ids=PROMPT).logits.pow(2).mean().backward()
    assert all(tensor.grad is not None and tensor.grad.abs().min() > 0 for tensor in (keys, values, gate))


def test_a_gated_prefix_that_does_not_fit_behind_the_projection_is_refused() -> None:
    model = tiny("llama")
    keys = torch.randn(5, 2, 24)
    node = KeyValuePrefix(0, keys, keys, torch.ones(1), projected=False)
    with pytest.raises(UnsupportedProgramError, match="96 numbers to an attention output of 64.*projected=True"):
        executed(model, Program((node,)))


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gemma2", "gpt2", "gpt_neox"])
def test_mixed_batches_answer_as_each_row_alone(name: str) -> None:
    """Prefixes of several lengths, gated ones, virtual tokens, edits and the bare base; padded left, with a cache."""
    window = {"sliding_window": 16} if name in ("mistral", "gemma2", "gemma3") else {}
    model = tiny(name, tie_word_embeddings=False, **window)
    executor = Executor(model)
    draw = torch.Generator().manual_seed(5)
    pairs = torch.randn(4, 2, *HEADS[name], generator=draw)
    edit = Edit(Site(0), Positions.parse("f1+l1"), shift=torch.randn(64, generator=draw) * 6)
    programs = [
        prefix_program(strong_prefix(name, 3)),
        prefix_program(strong_prefix(name, 9, seed=1)),
        None,
        Program((KeyValuePrefix(1, pairs[:, 0], pairs[:, 1], torch.tensor([4.0])), edit)),
        Program((VirtualTokens(torch.randn(4, 64, generator=draw) * 2), edit)),
        Program((*prefix_program(strong_prefix(name, 2)), VirtualTokens(torch.randn(2, 64, generator=draw)), edit)),
    ]
    rows = [PROMPT[0, : 12 - 2 * n].tolist() for n in range(6)]

    def generated(chosen: list[Program | None], prompts: list[list[int]]) -> list[list[int]]:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        wide = executor.widen(chosen, ids, mask)
        with torch.inference_mode(), executor.run(chosen, torch.tensor([len(p) for p in prompts])):
            output = model.generate(
                input_ids=wide.input_ids, attention_mask=wide.attention_mask, max_new_tokens=10, eos_token_id=None
            )
        return output[:, wide.input_ids.shape[1] :].tolist()

    together = generated(programs, rows)
    assert together == [generated([program], [row])[0] for program, row in zip(programs, rows, strict=True)]
    for program, row, answer in zip(programs, rows, together, strict=True):  # with a cache as without
        whole = torch.tensor([row + answer])
        wide = executor.widen([program], whole)
        with executor.run([program], torch.tensor([len(row)])):
            scores = logits(model, wide.input_ids)[0, wide.extra + len(row) - 1 : -1]
        assert scores.argmax(-1).tolist() == answer
        plain = logits(model, whole)[0, len(row) - 1 : -1]
        assert program is None or (scores - plain).abs().max() > 0.05, "a program must matter"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_bfloat16_runs_close_to_float32(name: str, attention: str) -> None:
    model = tiny(name, attention)
    draw = torch.Generator().manual_seed(6)
    pairs = torch.randn(4, 2, *HEADS[name], generator=draw)
    a, b = torch.randn(2, 96, generator=draw), torch.randn(64, 2, generator=draw)
    embedding = {"gpt2": "transformer.wte"}.get(name, "model.embed_tokens")
    program = Program(
        (
            *prefix_program(strong_prefix(name, 3)),
            KeyValuePrefix(1, pairs[:, 0], pairs[:, 1], torch.tensor([2.0])),
            WeightDelta(embedding, a, b, 0.3),
            Edit(Site(0, "mlp_residual"), Positions.parse("f2+l2"), shift=torch.randn(64, generator=draw)),
            Edit(Site(1), Positions.parse("all"), down=a[:, :64], up=b.T.contiguous(), reads="mlp_residual"),
        )
    )
    exact, base = executed(model, program), logits(model)
    narrow = executed(model.to(torch.bfloat16), program)
    assert narrow.dtype == torch.bfloat16
    assert (narrow.float() - exact).norm() < 0.1 * (exact - base).norm()


def test_what_does_not_fit_is_named() -> None:
    model = tiny("llama")
    pairs = strong_prefix("gpt2", 2)
    with pytest.raises(AdapterError, match="made for 4 key/value heads of 16, the base model has 2 of 24"):
        executed(model, prefix_program(pairs))
    with pytest.raises(AdapterError, match="layers 0 to 1"):
        executed(model, Program((KeyValuePrefix(7, pairs[:, 0], pairs[:, 1]),)))
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(UnsupportedProgramError, match="prefixes are executed with sdpa or eager"):
        executed(model, prefix_program(strong_prefix("llama", 2)))
    assert model.config._attn_implementation == "flex_attention"
