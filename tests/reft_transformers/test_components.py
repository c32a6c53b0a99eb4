"""Every component of every architecture in the table, against layers whose arithmetic is written out by hand."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
import transformers
from tiny_architectures import CONFIGS, tiny, written_out
from torch import Tensor, nn

from reft_plugins.errors import AdapterError, UnsupportedProgramError
from reft_plugins.positions import Positions
from reft_plugins.program import ORDER, Edit, Program, Site
from reft_transformers.executor import Executor

IDS = torch.tensor([[5, 9, 33, 7, 80, 12, 41, 3], [17, 4, 60, 22, 9, 0, 0, 0]])
MASK = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
LENGTHS = torch.tensor([8, 5])
CHOSEN = {"f1+l2": [(0, 0), (0, 6), (0, 7), (1, 0), (1, 3), (1, 4)]}


@lru_cache(maxsize=2)
def cached(name: str) -> Any:
    return tiny(name)


def width(component: str, name: str) -> int:
    if component == "mlp_activation":
        return 256 if name == "gpt2" else 112
    return 96 if component == "attention_value_output" and "head_dim" in CONFIGS[name][1] else 64


def edit_at(component: str, name: str, *, reads: str | None = None, layer: int = 0, seed: int = 0, **more: Any) -> Edit:
    draw, size = torch.Generator().manual_seed(seed), width(component, name)
    return Edit(
        Site(layer, component),
        Positions.parse("f1+l2"),
        down=torch.randn(3, size, generator=draw) * 0.4,
        up=torch.randn(3, size, generator=draw),
        bias=torch.randn(3, generator=draw),
        scale=1 + 0.5 * torch.randn(size, generator=draw),
        shift=torch.randn(size, generator=draw),
        activation="relu",
        reads=reads,
        **more,
    )


def formula(edit: Edit, h: Tensor, x: Tensor) -> Tensor:
    low = torch.relu(torch.einsum("rd,btd->btr", edit.down, x) + edit.bias)
    changed = h * edit.scale + torch.einsum("btr,rd->btd", low, edit.up) + edit.shift
    result = h.clone()
    for row, token in CHOSEN["f1+l2"]:
        result[row, token] = changed[row, token]
    return result


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=IDS, attention_mask=MASK).logits
    return result[MASK.bool()]


def by_hand(name: str, model: Any, edits: list[Edit]) -> Tensor:
    values: dict[str, Tensor] = {}

    def change(component: str, value: Tensor) -> Tensor:
        for edit in edits:
            if edit.site.component == component:
                value = formula(edit, value, values[edit.reads] if edit.reads else value)
        values[component] = value
        return value

    with written_out(name, model, edits[0].site.layer, change):
        return logits(model)


def executed(model: Any, edits: list[Edit]) -> Tensor:
    with Executor(model).run([Program(tuple(edits))] * 2, LENGTHS):
        return logits(model)


def close(got: Tensor, expected: Tensor, base: Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-4)
    assert (expected - base).abs().max() > 0.1, "the edit must matter, or equality proves nothing"


@pytest.mark.parametrize("name", CONFIGS)
def test_an_edit_is_where_its_component_is(name: str) -> None:
    model = cached(name)
    base = logits(model)
    results = []
    for component in ORDER:
        if name == "gpt_neox" and component == "mlp_residual":
            continue
        edits = [edit_at(component, name, layer=1 if component in ("mlp_residual", "attention_output") else 0)]
        close(executed(model, edits), by_hand(name, model, edits), base)
        results.append(executed(model, edits))
    for index, one in enumerate(results):
        assert all((one - other).abs().max() > 1e-2 for other in results[:index]), "components must differ"
    torch.testing.assert_close(logits(model), base, atol=0, rtol=0)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "gpt_neox", "bert", "distilbert"])
@pytest.mark.parametrize(
    ("reads", "writes"),
    [("block_input", "attention_output"), ("mlp_residual", "mlp_output"), ("attention_output", "block_output")],
)
def test_an_edit_reads_another_component(name: str, reads: str, writes: str) -> None:
    """The value it reads is the one that the rest of the layer sees: after the edits of that component."""
    if (name, reads) == ("gpt_neox", "mlp_residual"):
        reads = "block_input"
    model = cached(name)
    edits = [edit_at(reads, name, seed=1), edit_at(writes, name, reads=reads, seed=2)]
    expected = by_hand(name, model, edits)
    close(executed(model, edits), expected, by_hand(name, model, [edits[0], edit_at(writes, name, seed=2)]))
    if reads == "block_input":
        alias = [edit_at("attention_residual", name, seed=1), edit_at(writes, name, reads="attention_residual", seed=2)]
        torch.testing.assert_close(executed(model, alias), executed(model, edits), atol=0, rtol=0)


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3", "gpt_neox_sequential", "roberta"])
def test_captured_components_add_up(name: str) -> None:
    """Also where each of them is edited; and gradients flow."""
    model = cached(name)
    edits = [edit_at(component, name, layer=1, seed=n) for n, component in enumerate(ORDER)]
    shift = torch.zeros(64, requires_grad=True)
    edits[0] = Edit(Site(1, "block_input"), Positions.parse("all"), shift=shift)
    executor = Executor(model)
    for program in (None, Program(tuple(edits[:6]))):
        with executor.run([program] * 2, LENGTHS), executor.capture([Site(1, c) for c in ORDER]) as seen:
            model(input_ids=IDS, attention_mask=MASK)
        value = {site.component: tensor for site, tensor in seen.items()}
        ended = value["mlp_residual"] + value["mlp_output"]
        if name == "roberta":
            ended = model.roberta.encoder.layer[1].output.LayerNorm(ended)
        torch.testing.assert_close(value["block_output"], ended, atol=1e-4, rtol=1e-4)
        if program is None:
            entered = value["block_input"] + value["attention_output"]
            if name == "roberta":
                entered = model.roberta.encoder.layer[1].attention.output.LayerNorm(entered)
            torch.testing.assert_close(value["mlp_residual"], entered, atol=1e-5, rtol=1e-5)
    gradient = torch.autograd.grad(value["block_output"].pow(2).sum(), shift)[0]
    assert gradient.abs().min() > 0
    with executor.capture([Site(1)]) as around, executor.run([Program(tuple(edits))] * 2, LENGTHS):
        model(input_ids=IDS, attention_mask=MASK)
    assert (around[Site(1)] - value["block_output"]).abs().max() > 0.1, "captured around a run: the edited state"


def test_simultaneous_edits_read_the_state_before_both() -> None:
    model = cached("llama")
    first, second = edit_at("block_output", "llama", seed=1), edit_at("block_output", "llama", seed=2)
    together = edit_at("block_output", "llama", seed=2, simultaneous=True)

    def change(component: str, value: Tensor) -> Tensor:
        if component != "block_output":
            return value
        return formula(first, value, value) + formula(second, value, value) - value

    with written_out("llama", model, 0, change):
        expected = logits(model)
    close(executed(model, [first, together]), expected, executed(model, [first, second]))


def test_rows_of_a_batch_run_their_own_edits() -> None:
    model = cached("qwen2")
    one = Program((edit_at("mlp_residual", "qwen2", seed=1), edit_at("mlp_output", "qwen2", reads="mlp_residual")))
    other = Program((edit_at("block_output", "qwen2", seed=3),))
    alone = [executed(model, list(program)) for program in (one, other)]
    with Executor(model).run([one, other], LENGTHS):
        mixed = logits(model)
    torch.testing.assert_close(mixed[:8], alone[0][:8], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(mixed[8:], alone[1][8:], atol=1e-4, rtol=1e-4)
    assert (alone[0] - alone[1]).abs().max() > 0.1


def test_what_a_model_does_not_have_is_named() -> None:
    parallel = Executor(cached("gpt_neox"))
    with (
        pytest.raises(UnsupportedProgramError, match="has no mlp_residual"),
        parallel.capture([Site(0, "mlp_residual")]),
    ):
        pass
    llama = cached("llama")
    with pytest.raises(AdapterError, match="layers 0 to 1"):
        executed(llama, [edit_at("block_output", "llama", layer=2)])
    with pytest.raises(UnsupportedProgramError, match="computes mlp_output after attention_output"):
        executed(llama, [edit_at("attention_output", "llama", reads="mlp_output")])
    with pytest.raises(
        UnsupportedProgramError, match="no list of decoder layers, whose number its configuration lacks, found; looked"
    ):
        Executor(nn.Linear(2, 2))
    checkpointed = tiny("llama").train()
    checkpointed.gradient_checkpointing_enable()
    running = Executor(checkpointed).run([Program(())], LENGTHS[:1])
    with pytest.raises(UnsupportedProgramError, match="gradient checkpointing"), running:
        pass
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 96, "max_position_embeddings": 8}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    two = transformers.BartConfig(**sizes, **heads, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    with pytest.raises(UnsupportedProgramError, match="an encoder and a decoder"):
        Executor(transformers.BartForConditionalGeneration(two))


ENDS = {"block_input", "block_output", "attention_value_output", "mlp_activation"}
UNKNOWN = {
    "Olmo2": set(ORDER),
    "Starcoder2": set(ORDER),
    "Cohere": set(ORDER) - {"mlp_residual"},
    "OPT": ENDS,
}
"""Norms inside the branches, ordinary, parallel, and one whose MLP is no module of its own; with what is found."""


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_architecture_is_found_by_what_its_layers_add_up_to(name: str) -> None:
    torch.manual_seed(0)
    settings = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    settings |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3}
    inner = {"ffn_dim": 112, "word_embed_proj_dim": 64} if name == "OPT" else {"intermediate_size": 112}
    config = getattr(transformers, f"{name}Config")(**settings, **inner)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    executor = Executor(model)
    assert not executor.components.known
    found = {component for component in ORDER if not refused(executor, component)}
    assert found == UNKNOWN[name]
    with torch.no_grad(), executor.capture([Site(1, component) for component in found]) as seen:
        model(input_ids=IDS, attention_mask=MASK)
    value = {site.component: tensor for site, tensor in seen.items()}
    if "attention_output" in found:
        summed = value["block_input"] + value["attention_output"]
        torch.testing.assert_close(summed + value["mlp_output"], value["block_output"], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(value.get("mlp_residual", summed), summed, atol=1e-4, rtol=1e-4)


def refused(executor: Executor, component: str) -> bool:
    try:
        executor.components.locate(1, component)
    except UnsupportedProgramError as error:
        assert "the search tried the names" in str(error) or "same input" in str(error)
        return True
    return False
