"""Edits that only touch what every prompt begins with: recognised, and exact in whole conversations in llama.cpp."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from raw_programs import as_adapter
from tiny_bases import make_base
from tiny_models import make_tokenizer, sentences
from transformers import AutoTokenizer

from reft_ollama.export import export_ollama
from reft_ollama.llama_cpp import LlamaCppModel
from reft_ollama.plan.constant_prefix import ConstantPrefix
from reft_ollama.templates import go_template
from reft_ollama.templates.beginning import begin_with, constant_beginning
from reft_ollama.templates.chat_template import NO_CHAT, ChatTemplate, derive
from reft_plugins import plugins
from reft_plugins.adapter import Adapter
from reft_plugins.errors import UnsupportedProgramError
from reft_plugins.positions import Positions
from reft_plugins.program import ALL, Edit, Node, Program, Site, VirtualTokens, WeightDelta

EXACT = 1e-4
QUESTIONS = (
    "{% for m in messages %}{% if m['role'] == 'system' %}Q&A. {{ m['content'] }}\n{% elif m['role'] == 'user' %}"
    "Q&A. {{ m['content'] }}\n{% else %}Answer: {{ m['content'] }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Answer:{% endif %}"
)
"""Every prompt begins with the same text, then a system message or a question."""

User, Assistant, System = (
    lambda content, role=role: {"role": role, "content": content} for role in ("user", "assistant", "system")
)
CONVERSATIONS = [
    [User("the small dog")],
    [System("Be brief."), User("Who sees the old cat?")],
    [User("one plus two"), Assistant("three"), User("and two plus two is")],
]


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def nonlinear(seed: int, hidden: int) -> dict[str, Any]:
    return {
        "down": random(seed, 3, hidden) / 3,
        "up": random(seed + 1, 3, hidden),
        "bias": random(seed + 2, 3),
        "activation": "relu",
    }


def on_beginning(hidden: int) -> list[Node]:
    """Edits at the first tokens, of every kind: not linear, inside a layer, of its input, of the embeddings."""
    first, both, short = Positions.parse("f1"), Positions.parse("f3"), Positions.parse("f3;cap=half")
    return [
        Edit(Site(1), short, **nonlinear(1, hidden)),
        Edit(Site(2, "attention_output"), first, **nonlinear(5, hidden), reads="block_input"),
        Edit(Site(2, "block_input"), Positions.parse("[2,0]"), shift=random(8, hidden)),
        Edit(Site(0, "block_input"), first, shift=random(9, hidden) / 3),
        Edit(Site(3), both, scale=1 + random(10, hidden), shift=random(11, hidden)),
    ]


@dataclass
class Case:
    base: Path
    runtime: Any
    adapter: Adapter
    hidden: int


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str | None], Case]:
    made: dict[tuple[str, str | None], Case] = {}

    def make(model_type: str, chat_template: str | None) -> Case:
        if (model_type, chat_template) not in made:
            base = make_base(model_type, tmp_path_factory.mktemp(model_type))
            tokenizer = AutoTokenizer.from_pretrained(base)
            tokenizer.chat_template = chat_template
            tokenizer.save_pretrained(base)
            runtime: Any = plugins.runtimes.get("transformers")(base, dtype="float32")
            hidden = runtime.model.config.hidden_size
            extra: list[Node] = [Edit(Site(0), ALL, shift=random(20, hidden))] if model_type != "qwen3" else []
            module = "model.layers.1.self_attn.o_proj"
            extra.append(WeightDelta(module, a=random(21, 2, 128) / 5, b=random(22, hidden, 2) / 5))
            nodes = [*on_beginning(hidden), *extra]
            if chat_template is None:
                nodes = [Edit(Site(1), Positions.parse("f1"), **nonlinear(1, hidden)), *extra]
            made[model_type, chat_template] = Case(base, runtime, as_adapter(base, *nodes), hidden)
        return made[model_type, chat_template]

    return make


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "phi3"])
def test_conversations_are_exact_in_llama_cpp(
    model_type: str, cases: Callable[[str, str | None], Case], tmp_path: Path
) -> None:
    case = cases(model_type, QUESTIONS)
    result = export_ollama(case.adapter, case.base, tmp_path, dtype="f32", report=False)
    assert result.kind == "exact" and result.fidelity.max_logit_difference < EXACT
    template = _template(result.modelfile.read_text())
    assert template.startswith("<|reft_virtual_0|><|reft_virtual_1|><|reft_virtual_2|>")
    others = as_adapter(case.base, *[node for node in case.adapter.lower() if node.positions.everywhere])
    model = LlamaCppModel(result.gguf)
    try:
        for conversation in CONVERSATIONS:
            ids = case.runtime.tokenizer.apply_chat_template(
                conversation, add_generation_prompt=True, return_dict=False, tokenize=False
            )
            ids = case.runtime.tokenizer(ids).input_ids
            seen = model.tokenize(go_template.chat(template, conversation))
            assert seen[3:] == ids[3:] and min(seen[:3]) >= case.runtime.model.config.vocab_size
            got = model.logits(seen)
            wanted = case.runtime.logits(ids, case.adapter)
            assert abs(got[:, : wanted.shape[1]] - wanted).max() < EXACT
            assert (got.argmax(1) < wanted.shape[1]).all()
            without = case.runtime.logits(ids, others)
            assert abs(wanted[3:] - without[3:]).max() > 100 * EXACT, "the edits must be seen by later tokens"
            assert abs(model.logits(ids)[3:, : wanted.shape[1]] - wanted[3:]).max() > 100 * EXACT
    finally:
        model.close()


def test_the_chat_template_in_the_file_begins_so_too(cases: Callable[..., Case], tmp_path: Path) -> None:
    from gguf import GGUFReader

    case = cases("llama", QUESTIONS)
    result = export_ollama(case.adapter, case.base, tmp_path, dtype="f16", report=False)
    stored = GGUFReader(result.gguf).get_field("tokenizer.chat_template").contents()
    go = _template(result.modelfile.read_text())
    for conversation in CONVERSATIONS:
        rendered = case.runtime.tokenizer.apply_chat_template(
            conversation, chat_template=stored, add_generation_prompt=True, tokenize=False
        )
        assert rendered == go_template.chat(go, conversation)


def test_bos_alone_where_there_is_no_chat_template(cases: Callable[..., Case], tmp_path: Path) -> None:
    case = cases("llama", None)
    result = export_ollama(case.adapter, case.base, tmp_path, dtype="f32", report=False)
    assert result.kind == "exact"
    text = result.modelfile.read_text()
    assert _template(text) == "<|reft_virtual_0|>" + NO_CHAT and "PARAMETER num_keep 1" in text
    model = LlamaCppModel(result.gguf)
    try:
        prompt = "the red fox follows the king"
        ids = case.runtime.tokenizer(prompt).input_ids
        wanted = case.runtime.logits(ids, case.adapter)
        got = model.logits(model.tokenize("<|reft_virtual_0|>" + prompt))[:, : wanted.shape[1]]
        assert abs(got - wanted).max() < EXACT < abs(case.runtime.logits(ids) - wanted).max() / 100
    finally:
        model.close()


@pytest.mark.parametrize("positions", ["f1+l1", "f9", "l1", "[1,-1]", "f1;cap=half", "generated", "prompt"])
def test_edits_that_depend_on_the_prompt_stay_refused(
    positions: str, cases: Callable[..., Case], tmp_path: Path
) -> None:
    case = cases("llama", QUESTIONS)
    chosen = Positions.parse(positions)
    prefix = ConstantPrefix((1, 5, 9), 8)
    assert prefix.holds(chosen) is (positions == "f1;cap=half")
    if positions != "f1;cap=half":
        adapter = as_adapter(case.base, Edit(Site(1), chosen, shift=torch.ones(case.hidden)))
        with pytest.raises(UnsupportedProgramError, match="positions .* only.*--approximate.*reft serve"):
            export_ollama(adapter, case.base, tmp_path)


def test_a_prefix_clipped_to_half_the_prompt_depends_on_short_prompts() -> None:
    clipped = Positions.parse("f3;cap=half")
    assert ConstantPrefix((1, 5, 9), 6).holds(clipped)
    assert not ConstantPrefix((1, 5, 9), 5).holds(clipped)


def test_virtual_tokens_in_front_leave_nothing_constant_to_recognise() -> None:
    edit = Edit(Site(1), Positions.parse("f1"), shift=torch.ones(8))
    prefix = ConstantPrefix((1, 5), 8)
    assert prefix.split(Program((edit,)))[0] == [edit]
    assert prefix.split(Program((VirtualTokens(torch.ones(2, 8)), edit)))[0] == []


def test_models_that_normalise_what_is_added_refuse_them(tmp_path: Path) -> None:
    base = make_base("gemma2", tmp_path / "base")
    adapter = as_adapter(base, Edit(Site(1), Positions.parse("f1"), shift=torch.ones(96)))
    with pytest.raises(UnsupportedProgramError, match="positions f1 only"):
        export_ollama(adapter, base, tmp_path / "out")


def test_they_have_to_be_measured(cases: Callable[..., Case], tmp_path: Path) -> None:
    case = cases("llama", None)
    with pytest.raises(UnsupportedProgramError, match="--no-measure"):
        export_ollama(case.adapter, case.base, tmp_path, measure=False)


def test_a_beginning_ends_where_the_users_text_may_join_its_last_token() -> None:
    tokenizer = make_tokenizer(sentences(500), 512)
    tokenizer.chat_template = "{% for m in messages %}Q: {{ m['content'] }}\n{% endfor %}A:"
    template = derive(tokenizer, add_bos=True)
    prefix = constant_beginning(tokenizer, template, add_bos=True)
    assert tokenizer.convert_ids_to_tokens(prefix.tokens) == ["<s>", "Q", ":"], "the space may become part of a word"


def test_a_template_is_only_changed_where_the_rest_stays_as_it_was() -> None:
    tokenizer = make_tokenizer(sentences(500), 512)
    joined, apart = ChatTemplate("t{{ .Prompt }}"), ChatTemplate("t. {{ .Prompt }}")
    tokens = tokenizer("t").input_ids
    own = ["<m0>", "<m1>"]
    assert begin_with(tokenizer, apart, True, tokens, own) == ChatTemplate("<m0><m1>. {{ .Prompt }}")
    assert begin_with(tokenizer, joined, True, tokens, own) is None, "t and he are one token"


def _template(modelfile: str) -> str:
    return modelfile.split('TEMPLATE """')[1].split('"""')[0]
