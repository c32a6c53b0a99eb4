"""Virtual tokens as tokens of an exported file: in a real llama.cpp, in templates, and in what is measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from raw_programs import as_adapter
from tiny_bases import make_base
from tiny_models import sentences
from tokenizer_families import FAMILIES, convert, in_llama_cpp, llama_2, tokens_of
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from reft_ollama.architectures.table import architecture_of
from reft_ollama.export import ExportResult, export_ollama
from reft_ollama.llama_cpp import LlamaCppModel, compare_llama_cpp
from reft_ollama.plan.planning import make_plan
from reft_ollama.templates import go_template
from reft_ollama.tokenizers.conversion import convert_tokenizer
from reft_ollama.tokenizers.virtual_tokens import names, with_virtual_tokens
from reft_ollama.weights.assembly import assemble
from reft_ollama.weights.checkpoint import Checkpoint
from reft_ollama.weights.final_states import FinalStates
from reft_ollama.weights.installation import install
from reft_ollama.weights.stack import BaseWeights
from reft_ollama.weights.virtual_tokens import DEPTH
from reft_ollama.weights.virtual_tokens import with_virtual_tokens as add_virtual_tokens
from reft_plugins import plugins
from reft_plugins.adapter import Adapter
from reft_plugins.errors import ExportError, UnsupportedProgramError
from reft_plugins.fidelity.reference import Measurement, Reference
from reft_plugins.fidelity.texts import Text
from reft_plugins.program import ALL, Edit, Node, Site, VirtualTokens, WeightDelta

EXACT = 1e-4
COUNTS = (5, 3)
VIRTUAL = sum(COUNTS)

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + (system if loop.first else '') + message['content'] "
    "+ ' [/INST]' }}{% else %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)

User, Assistant, System = (
    lambda content, role=role: {"role": role, "content": content} for role in ("user", "assistant", "system")
)
CONVERSATIONS = [
    [User("How many legs has a spider?")],
    [System("Answer in one line."), User("the old fox")],
    [System("Answer."), User("Who?"), Assistant("the red dog."), User("Where?"), Assistant("At home."), User("Why?")],
]


class Case:
    """A base model and strong virtual tokens for it, in two nodes."""

    def __init__(self, directory: Path, *more: Node) -> None:
        self.directory = directory
        self.runtime: Any = plugins.runtimes.get("transformers")(directory, dtype="float32")
        self.vocabulary = len(self.runtime.model.get_input_embeddings().weight)
        self.ids = range(self.vocabulary, self.vocabulary + VIRTUAL)
        embedded = self.runtime.model.get_input_embeddings()(torch.arange(10, 60)).detach()
        generator = torch.Generator().manual_seed(0)
        self.learned = [
            VirtualTokens(size * embedded.std() * torch.randn(count, embedded.shape[1], generator=generator))
            for count, size in zip(COUNTS, (3.0, 1.0), strict=True)
        ]
        self.adapter: Adapter = as_adapter(directory, self.learned[0], *more, self.learned[1])
        self.texts = [self.runtime.tokenizer(" ".join(sentences(8, seed))).input_ids for seed in (101, 102)]

    def logits(self, ids: list[int]) -> Any:
        return self.runtime.logits(ids, self.adapter)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Case]:
    made: dict[str, Case] = {}

    def get(kind: str, **config: Any) -> Case:
        key = f"{kind} {config}"
        if key not in made:
            made[key] = Case(make_base(kind, tmp_path_factory.mktemp("base"), **config))
        return made[key]

    return get


def probability(result: ExportResult) -> float:
    """Of a virtual token, as the export's certificate has it."""
    (file,) = [file for file in json.loads((result.directory / "fidelity.json").read_text())["files"] if file["dtype"]]
    return float(file["evaluation"]["virtual_probability"])


def best(logits: Any, vocabulary: int) -> tuple[Any, Any]:
    """The largest logit of a real and of a virtual token, `[tokens]` each."""
    return logits[:, :vocabulary].max(1), logits[:, vocabulary:].max(1)


BASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True}),
    ("mistral", {}),
    ("qwen2", {}),
    ("qwen3", {"tie_word_embeddings": True}),
    ("gemma2", {}),
    ("gemma3_text", {}),
    ("phi3", {}),
]


@pytest.mark.parametrize(("kind", "config"), BASES, ids=[f"{kind}{' tied' * bool(c)}" for kind, c in BASES])
def test_virtual_tokens_are_exact_in_llama_cpp(
    kind: str, config: dict[str, Any], cases: Callable[..., Case], tmp_path: Path
) -> None:
    case = cases(kind, **config)
    result = export_ollama(case.adapter, case.directory, tmp_path, dtype="f32")
    assert (result.kind, result.strategy) == ("exact", "merged")
    found = compare_llama_cpp(result.gguf, case.texts, case.logits, case.runtime.logits, in_front=case.ids)
    assert found.max_logit_difference < EXACT
    assert found.base_mean_kl is not None and found.base_mean_kl > 0.3, "the tokens are too weak to show anything"
    without = compare_llama_cpp(result.gguf, case.texts, case.logits)
    assert without.mean_kl > 0.3, "it must be the virtual tokens that do it"
    model = LlamaCppModel(result.gguf)
    try:
        real, virtual = best(model.logits([*case.ids, *case.texts[0]])[VIRTUAL:], case.vocabulary)
    finally:
        model.close()
    assert (real - virtual).min() > 15, "a virtual token must never win"
    assert 0 < probability(result) < 1e-7


def test_a_trained_model_does_not_grow(tiny_llama: Path, tmp_path: Path) -> None:
    """Its final states have a common direction, so that an output row can be far below all others."""
    case = Case(tiny_llama)
    result = export_ollama(case.adapter, case.directory, tmp_path, dtype="f16")
    assert not result.warnings
    reader = GGUFReader(result.gguf)
    shapes = {tensor.name: tuple(tensor.shape) for tensor in reader.tensors}
    assert shapes["token_embd.weight"] == shapes["output.weight"] == (128, 512 + VIRTUAL)
    assert shapes["blk.0.attn_norm.weight"] == (128,)
    assert 0 < probability(result) < 1e-7
    model = LlamaCppModel(result.gguf)
    try:
        real, virtual = best(model.logits([*case.ids, *case.texts[0]])[VIRTUAL:], case.vocabulary)
    finally:
        model.close()
    assert (real - virtual).min() > 15


@pytest.mark.parametrize("dtype", ["f16", "q8_0"])
def test_signs_survive_rounding(dtype: str, tmp_path: Path) -> None:
    """Gemma 2's output layer is its embedding: what keeps virtual tokens from winning is rounded like any matrix."""
    case = Case(make_base("gemma2", tmp_path / "base", gemma_mlp_gain=1.0))
    result = export_ollama(case.adapter, case.directory, tmp_path / "out", dtype=dtype)
    assert result.fidelity.top1_agreement > 0.95
    assert 0 < probability(result) < 1e-7
    model = LlamaCppModel(result.gguf)
    try:
        logits = model.logits([*case.ids, *case.texts[0]])[VIRTUAL:]
    finally:
        model.close()
    real, virtual = best(logits, case.vocabulary)
    assert np.isfinite(logits).all() and (real - virtual).min() > 15
    agreement = logits[:, : case.vocabulary].argmax(1) == case.logits(case.texts[0]).argmax(1)
    assert agreement.mean() > 0.9


def test_with_weight_deltas_of_matrices_embeddings_and_head(cases: Callable[..., Case], tmp_path: Path) -> None:
    directory = cases("qwen2").directory
    random = torch.Generator().manual_seed(4)

    def delta(module: str, out: int, inside: int) -> WeightDelta:
        a, b = torch.randn(2, inside, generator=random), torch.randn(out, 2, generator=random)
        return WeightDelta(module, a=0.2 * a, b=0.2 * b)

    layer = "model.layers.1.self_attn"
    deltas = [delta(f"{layer}.k_proj", 64, 128), delta("lm_head", 384, 128), delta("model.embed_tokens", 128, 384)]
    case, alone = Case(directory, *deltas), as_adapter(directory, *cases("qwen2").learned)
    result = export_ollama(case.adapter, directory, tmp_path, dtype="f32")
    found = compare_llama_cpp(
        result.gguf, case.texts, case.logits, lambda ids: case.runtime.logits(ids, alone), in_front=case.ids
    )
    assert found.max_logit_difference < EXACT
    assert found.base_mean_kl is not None and found.base_mean_kl > 0.3, "the deltas are too weak to show anything"


def test_edits_spare_virtual_tokens_which_weights_cannot(cases: Callable[..., Case], tmp_path: Path) -> None:
    directory = cases("llama").directory
    case = Case(directory, Edit(Site(1), ALL, shift=0.5 * torch.ones(96)))
    with pytest.raises(UnsupportedProgramError, match="layer 1 block_output.*no virtual token.*--approximate"):
        export_ollama(case.adapter, directory, tmp_path, dtype="f32")
    result = export_ollama(case.adapter, directory, tmp_path, dtype="f32", approximate=True, force=True)
    assert result.kind == "approximated"
    found = compare_llama_cpp(result.gguf, case.texts, case.logits, case.runtime.logits, in_front=case.ids)
    assert found.max_logit_difference > EXACT, "the shift reaches virtual tokens"
    assert found.base_mean_kl is not None and found.mean_kl < found.base_mean_kl / 2
    assert result.fidelity.mean_kl == pytest.approx(found.mean_kl, rel=1.0), "and that is measured"


def chat_base(directory: Path, family: str) -> Path:
    """A random Llama with a tokenizer of a family and its chat format."""
    if family == "sentencepiece":
        tokenizer: Any = llama_2()
        tokenizer.chat_template = LLAMA2
        model = AutoModelForCausalLM.from_pretrained(make_base("llama", directory))
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        random = torch.Generator().manual_seed(0)
        for matrix in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
            matrix.data.normal_(0, 0.6, generator=random)
        model.save_pretrained(directory)
    else:
        make_base("llama", directory)
        tokenizer = AutoTokenizer.from_pretrained(directory)
        tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("family", ["sentencepiece", "byte-level"])
def test_chats_rendered_from_the_exported_template(family: str, tmp_path: Path) -> None:
    case = Case(chat_base(tmp_path / "base", family))
    result = export_ollama(case.adapter, case.directory, tmp_path / "out", dtype="f32")
    template = result.modelfile.read_text().split('TEMPLATE """')[1].split('"""')[0]
    tokenizer = case.runtime.tokenizer
    chats = [tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=False) for c in CONVERSATIONS]
    wanted = case.runtime.generate(chats, [case.adapter] * len(chats), max_new_tokens=12)
    bare = case.runtime.generate(chats, max_new_tokens=12)
    model = LlamaCppModel(result.gguf)
    stored = model._model.metadata["tokenizer.chat_template"]
    try:
        for conversation, ids, answer, other in zip(CONVERSATIONS, chats, wanted, bare, strict=True):
            text = go_template.chat(template, conversation)
            assert model.tokenize(text) == [*case.ids, *ids]
            render = {"chat_template": stored, "tokenize": False, "add_generation_prompt": True}
            assert tokenizer.apply_chat_template(conversation, **render) == text
            expected = [token for token in answer.token_ids if token != tokenizer.eos_token_id]
            assert model.generate(text, max_new_tokens=12)[0] == expected
            assert expected != list(other.token_ids)
            plain = text.removeprefix("".join(names(VIRTUAL)))
            assert plain != text and model.generate(plain, max_new_tokens=12)[0] != expected
    finally:
        model.close()


def test_plain_prompts_and_what_stays_in_a_full_context(cases: Callable[..., Case], tmp_path: Path) -> None:
    case = cases("llama")
    result = export_ollama(case.adapter, case.directory, tmp_path, dtype="f32")
    written = result.modelfile.read_text()
    assert f'TEMPLATE """{"".join(names(VIRTUAL))}<s>{{{{ .Prompt }}}}"""' in written
    assert f"PARAMETER num_keep {VIRTUAL + 1}\n" in written
    prompt = "Who helps the old fox?"
    text = go_template.render(written.split('"""')[1], {"Prompt": prompt})
    model = LlamaCppModel(result.gguf)
    try:
        assert model.tokenize(text) == [*case.ids, *case.runtime.tokenizer(prompt).input_ids]
        (wanted,) = case.runtime.generate([prompt], [case.adapter], max_new_tokens=12)
        assert model.generate(text, max_new_tokens=12)[0] == [t for t in wanted.token_ids if t != 2]
    finally:
        model.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_of_tokenizers_sees_virtual_tokens_bos_and_the_prompt(family: str, tmp_path: Path) -> None:
    tokenizer = FAMILIES[family]()
    before = convert(tokenizer)
    after = with_virtual_tokens(before, 12)
    first, plain = len(before.tokens), in_llama_cpp(before, tmp_path / "plain.gguf")
    extended = in_llama_cpp(after, tmp_path / "extended.gguf")
    front = "".join(names(12)) + (tokenizer.bos_token if before.add_bos else "")
    for prompt in ("Who helps the old fox?", " a space in front", "\n\nlines", "", "42 legs", "<|reft_virtual_|> 0|>"):
        wanted = [*range(first, first + 12), *tokens_of(plain, prompt)]
        assert tokens_of(extended, front + prompt) == wanted, prompt
    assert tokens_of(extended, "no names") == tokens_of(plain, "no names")[before.add_bos :]


def test_rows_beyond_the_tokenizer_and_names_that_are_taken(tmp_path: Path) -> None:
    directory = make_base("llama", tmp_path / "base", vocab_size=416)
    tokenizer = AutoTokenizer.from_pretrained(make_base("llama", tmp_path / "smaller", vocab_size=384))
    tokenizer.save_pretrained(directory)
    case = Case(directory)
    result = export_ollama(case.adapter, directory, tmp_path / "out", dtype="f32")
    assert case.ids[0] == 416
    found = compare_llama_cpp(result.gguf, case.texts, case.logits, case.runtime.logits, in_front=case.ids)
    assert found.max_logit_difference < EXACT
    tokenizer.add_tokens(["<|reft_virtual_7|>"], special_tokens=True)
    tokenizer.save_pretrained(directory)
    with pytest.raises(ExportError, match=r"already has a token '<\|reft_virtual_7\|>'"):
        export_ollama(case.adapter, directory, tmp_path / "clash")
    assert not (tmp_path / "clash").exists()
    converted = convert_tokenizer(tokenizer, 416)
    assert with_virtual_tokens(converted, 7).tokens[416:] == names(7), "only a name that is used clashes"


def test_without_measured_states_the_mean_row_never_wins(cases: Callable[..., Case]) -> None:
    case = cases("llama")
    config = AutoConfig.from_pretrained(case.directory)
    architecture = architecture_of(config)
    plan = make_plan(case.adapter.lower(), architecture, config)
    rows = assemble(plan, Checkpoint(case.directory), architecture, config).module("lm_head")["weight"].double()
    states = 100 * torch.randn(3000, 96, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    real, virtual = (part.amax(1) for part in (states @ rows[: case.vocabulary].T, states @ rows[case.vocabulary :].T))
    assert bool((virtual < real).all())
    inside = (states @ rows.T).softmax(1)[:, case.vocabulary :]
    assert float(inside.max()) <= 1 / case.vocabulary


def test_gemma_2_has_to_be_measured(cases: Callable[..., Case], tmp_path: Path) -> None:
    case = cases("gemma2")
    with pytest.raises(UnsupportedProgramError, match="has to be measured.*--no-measure"):
        export_ollama(case.adapter, case.directory, tmp_path, dtype="f32", measure=False)
    unmeasured = cases("llama")
    result = export_ollama(unmeasured.adapter, unmeasured.directory, tmp_path, dtype="f32", measure=False)
    found = compare_llama_cpp(result.gguf, unmeasured.texts, unmeasured.logits, in_front=unmeasured.ids)
    assert found.max_logit_difference < EXACT


def test_a_direction_that_all_states_lie_on() -> None:
    noise = torch.randn(2000, 64, generator=torch.Generator().manual_seed(1))
    direction = FinalStates(noise + 2 * torch.ones(64), torch.ones(2000)).direction
    assert direction is not None
    new = torch.randn(2000, 64, generator=torch.Generator().manual_seed(2)) + 2 * torch.ones(64)
    assert float((new.double() @ direction).min()) > 0.5
    assert FinalStates(noise, torch.ones(2000)).direction is None, "states around zero have none"
    lonely = torch.cat([noise[:1000] + 2, -2 - noise[:1000]]).reshape(2, 1000, 64).transpose(0, 1).reshape(2000, 64)
    assert FinalStates(lonely, torch.ones(2000)).direction is None, "the half that checks it lies on the other side"


def test_measured_states_push_virtual_tokens_down(cases: Callable[..., Case]) -> None:
    case = cases("llama")
    config = AutoConfig.from_pretrained(case.directory)
    architecture = architecture_of(config)
    base = BaseWeights(Checkpoint(case.directory), architecture, config)
    states = torch.randn(400, 96, generator=torch.Generator().manual_seed(3)) + 3
    weights = add_virtual_tokens(base, architecture, torch.ones(2, 96), FinalStates(states, torch.ones(400)))
    rows = weights.module("lm_head")["weight"]
    mean, virtual = (states @ rows[:-2].T).mean(1), states @ rows[-1]
    assert float((mean - virtual)[::2].min()) == pytest.approx(DEPTH, rel=1e-3)
    assert float((mean - virtual)[1::2].min()) > DEPTH / 2


def test_a_measured_model_has_virtual_tokens_in_front(cases: Callable[..., Case]) -> None:
    """Predictions of the model with appended tokens, edits beside them, and a model whose virtual tokens are wrong."""
    case = cases("llama")
    config = AutoConfig.from_pretrained(case.directory)
    architecture, checkpoint = architecture_of(config), Checkpoint(case.directory)
    runtime: Any = plugins.runtimes.get("transformers")(case.directory, dtype="float32")
    program = case.adapter.lower()
    reference = Reference(runtime, program)
    measurement = Measurement(reference, [Text(tuple(text), 10, "text") for text in case.texts])
    batches = [batch for _, batch in reference.batches([Text(tuple(case.texts[0]), 10, "text")])]
    edit = Edit(Site(1), ALL, shift=torch.ones(96))
    with reference.running(batches[0], type(program)((*program, edit))):
        wanted = reference.forward(batches[0])
    assert reference.in_front == ()
    plan = make_plan(program, architecture, config)
    install(assemble(plan, checkpoint, architecture, config), architecture, runtime.model, torch.float32)
    assert reference.in_front == tuple(case.ids)
    exact = measurement.compare()["overall"]
    assert exact.max_logit_difference < EXACT and exact.base_mean_kl is not None and exact.base_mean_kl > 0.3
    assert measurement.virtual_probability is not None and 0 < measurement.virtual_probability <= 1 / case.vocabulary
    with reference.running(batches[0], type(program)((edit,))):
        edited = reference.forward(batches[0])
    torch.testing.assert_close(edited, wanted, rtol=0, atol=EXACT)
    assert plan.virtual_tokens is not None
    plan.virtual_tokens = plan.virtual_tokens.flip(0)
    install(assemble(plan, checkpoint, architecture, config), architecture, runtime.model, torch.float32)
    assert measurement.compare()["overall"].mean_kl > 0.05
    measurement.close()
