"""Virtual tokens against PEFT's prompt tuning, in the runtime, and in training through the default `Method.attach`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny_architectures import DECODERS, tiny
from torch import Tensor, nn

import reft_plugins as reft
from reft_plugins.base_model import identify
from reft_plugins.errors import AdapterError
from reft_plugins.methods import Method, MethodConfig
from reft_plugins.methods.program import adapter_of
from reft_plugins.positions import Positions
from reft_plugins.program import Edit, KeyValuePrefix, Program, Site, VirtualTokens
from reft_plugins.training.attach import ProgramTrainable
from reft_transformers.executor import Executor
from reft_transformers.virtual import widen

PROMPT = torch.tensor([[5, 9, 33, 7, 80, 12, 41, 3, 22, 18]])
LENGTHS = torch.tensor([10])


def learned(count: int, width: int = 64, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) * 2


def logits(model: Any, ids: Tensor, **batch: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=ids, **batch).logits
    return result


@pytest.mark.parametrize("name", DECODERS)
def test_prompt_tuning_is_that_of_peft(name: str) -> None:
    model = tiny(name)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, token_dim=64, num_layers=2)
    config.num_attention_heads, config.num_transformer_submodules = 4, 1
    wrapped: Any = peft.get_peft_model(copy.deepcopy(model), config).eval()
    wrapped.prompt_encoder["default"].embedding.weight.data = learned(5)
    executor, program = Executor(model), Program((VirtualTokens(learned(5)[:2]), VirtualTokens(learned(5)[2:])))
    rows = executor.widen([program], PROMPT)
    assert rows.extra == program.virtual_tokens == 5
    with executor.run([program], LENGTHS):
        got = logits(model, rows.input_ids)
    expected = logits(wrapped, PROMPT)
    torch.testing.assert_close(got, expected, atol=5e-4, rtol=1e-4)
    assert (expected[:, 5:] - logits(model, PROMPT)).abs().max() > 0.1


def test_edits_count_prompt_tokens_only() -> None:
    """The first token of `f1` is that of the prompt, and `all` leaves virtual tokens alone."""
    model = tiny("llama")
    executor, shift = Executor(model), learned(1, seed=1)[0]
    for spec, edited in (("f1", [4]), ("l2", [12, 13]), ("all", list(range(4, 14))), ("[1,-1]", [5, 13])):
        program = Program((VirtualTokens(learned(4)), Edit(Site(0), Positions.parse(spec), shift=shift)))
        rows = executor.widen([program], PROMPT)
        with executor.run([program], LENGTHS), executor.capture([Site(0)]) as after:
            logits(model, rows.input_ids)
        plain = Program((VirtualTokens(learned(4)),))
        with executor.run([plain], LENGTHS), executor.capture([Site(0)]) as before:
            logits(model, rows.input_ids)
        change = (after[Site(0)] - before[Site(0)])[0]
        torch.testing.assert_close(change[edited], shift.expand(len(edited), -1), atol=1e-4, rtol=1e-4)
        assert change.abs().sum(-1).nonzero()[:, 0].tolist() == edited


def test_room_is_made_behind_left_padding() -> None:
    two, three = (Program((VirtualTokens(learned(n)),)) for n in (2, 3))
    ids = torch.tensor([[0, 0, 7, 8], [4, 5, 6, 9], [3, 2, 0, 0]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]])
    model = tiny("llama")
    rows = widen(model, [three, two, None], ids, mask)
    assert rows.extra == 3 and rows.attention_mask is not None and rows.position_ids is not None
    assert rows.input_ids.tolist() == [[0, 0, 0, 0, 0, 7, 8], [0, 0, 0, 4, 5, 6, 9], [0, 0, 0, 3, 2, 0, 0]]
    assert rows.attention_mask.tolist() == [[0, 0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 0, 0]]
    assert rows.position_ids.tolist() == [[0, 0, 0, 1, 2, 3, 4], [0, 0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 1, 1, 1]]
    assert widen(model, [None, None, None], ids, mask).input_ids is ids
    with pytest.raises(AdapterError, match=r"rows that Executor\.widen made"), Executor(model).run([two], LENGTHS):
        logits(model, PROMPT)


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_virtual_tokens_of_an_encoder(name: str) -> None:
    model = tiny(name)
    executor, program = Executor(model), Program((VirtualTokens(learned(3)),))
    ids, mask = torch.tensor([[5, 9, 33, 7], [17, 4, 1, 1]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    rows = executor.widen([program] * 2, ids, mask)
    with executor.run([program] * 2, torch.tensor([4, 2])):
        batch = {"attention_mask": rows.attention_mask, "position_ids": rows.position_ids}
        got = logits(model, rows.input_ids, **batch)[:, 3:]
    for row, length in ((0, 4), (1, 2)):
        words = getattr(model, name).embeddings.word_embeddings(ids[row, :length])
        with torch.no_grad():
            alone = model(inputs_embeds=torch.cat([learned(3), words])[None]).logits[0, 3:]
        torch.testing.assert_close(got[row, :length], alone, atol=1e-4, rtol=1e-4)
        assert (alone - logits(model, ids[row : row + 1, :length])[0]).abs().max() > 0.1


def test_runtime_strips_virtual_tokens(tiny_llama: Path) -> None:
    """Rows of logits are those of real tokens; answers in a mixed batch are those of each row alone."""
    identity = identify(tiny_llama)
    draw = torch.Generator().manual_seed(2)
    pairs = torch.randn(6, 2, 2, 32, generator=draw)
    programs = [
        Program((VirtualTokens(torch.randn(4, 128, generator=draw)),)),
        Program((VirtualTokens(torch.randn(7, 128, generator=draw)), KeyValuePrefix(1, pairs[:, 0], pairs[:, 1]))),
        Program((KeyValuePrefix(2, pairs[:, 0], pairs[:, 1]),)),
    ]
    adapters = [*(adapter_of(program, identity) for program in programs), None]
    runtime = reft.runtime("transformers", tiny_llama)
    prompt = [1, 40, 50, 60, 70]
    base = runtime.logits(prompt)
    for adapter, program in zip(adapters, programs, strict=False):
        got = runtime.logits(prompt, adapter)
        assert got.shape == base.shape and abs(got - base).max() > 0.5
        rows = runtime._executor.widen([program], torch.tensor([prompt]))
        with runtime._executor.run([program], torch.tensor([5])):
            by_hand = logits(runtime.model, rows.input_ids)[0, program.virtual_tokens :]
        torch.testing.assert_close(torch.from_numpy(got), by_hand, atol=1e-5, rtol=1e-5)
    prompts = [[1, 40, 50], prompt, [1, 90, 91, 92, 93, 94, 95], [1, 7]]
    together = runtime.generate(prompts, adapters, max_new_tokens=8, ignore_eos=True)
    alone = [
        runtime.generate([p], [a], max_new_tokens=8, ignore_eos=True)[0] for p, a in zip(prompts, adapters, strict=True)
    ]
    assert [g.token_ids for g in together] == [g.token_ids for g in alone]
    runtime.close()


class SoftPromptConfig(MethodConfig):
    """Settings of the test's method."""


class SoftPrompt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(learned(3, seed=5))

    def tensors(self) -> dict[str, Tensor]:
        return {"rows": self.rows}


class SoftPromptMethod(Method[SoftPromptConfig]):
    """Prompt tuning by the defaults alone: parameters and lower."""

    name = "soft_prompt_of_a_test"
    config = SoftPromptConfig

    def parameters(self, config: Any, base: Any) -> nn.Module:
        return SoftPrompt()

    def lower(self, config: Any, tensors: Any) -> Program:
        return Program((VirtualTokens(tensors["rows"]),))


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("kept", [None, 4])
def test_default_attach_trains_virtual_tokens(left: bool, kept: int | None) -> None:
    """Logits align with the labels of the rows as they were, and gradients reach the embeddings."""
    model = tiny("gpt2")
    trainable = ProgramTrainable(SoftPromptMethod(), model, SoftPromptConfig(), None)  # type: ignore[arg-type]
    rows = [[5, 9, 33, 7, 80], [17, 4, 60]]
    pads = [[], [0, 0]]
    ids = torch.tensor([[*p, *r] if left else [*r, *p] for r, p in zip(rows, pads, strict=True)])
    mask = torch.tensor([[1] * 5, [0, 0, 1, 1, 1] if left else [1, 1, 1, 0, 0]])
    trainable.begin_batch(torch.tensor([5, 3]))
    batch: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(0)}
    if kept is not None:
        batch["logits_to_keep"] = kept
    got = trainable.model(**batch).logits
    expected = []
    for row in rows:
        embedded = torch.cat([learned(3, seed=5), model.transformer.wte(torch.tensor(row))])[None]
        expected.append(model(inputs_embeds=embedded).logits[0, 3:])
    offset = 0 if kept is None else 1
    for index, row in enumerate(rows):
        start = 5 - len(row) if left else 0
        here = got[index][max(start - offset, 0) : start - offset + len(row)]
        wanted = expected[index][max(offset - start, 0) :]
        torch.testing.assert_close(here, wanted, atol=1e-4, rtol=1e-4)
        assert (wanted - model(input_ids=torch.tensor([row])).logits[0][-len(wanted) :]).abs().max() > 0.1
    got.pow(2).mean().backward()
    assert trainable.parameters.rows.grad.abs().min() > 0
