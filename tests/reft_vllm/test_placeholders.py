"""The ops of placeholders and gated prefixes, and what requests look like with placeholders in front."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import vllm_environment  # noqa: F401
from edit_batches import FORMS, interpreted_kernels
from torch import Tensor

from reft_plugins.errors import UnsupportedProgramError
from reft_plugins.positions import Positions
from reft_plugins.program import Edit, KeyValuePrefix, Node, Program, Site, VirtualTokens
from reft_transformers.prefixes import gated_attention
from reft_transformers.tokens import Group
from reft_vllm.admission import Admitted
from reft_vllm.cache_keys import block_key
from reft_vllm.execution.gated import BEHIND, Attention, add_behind
from reft_vllm.execution.overwrite import TARGETS, overwrite
from reft_vllm.execution.site import Shard
from reft_vllm.execution.state import EngineState
from reft_vllm.placeholders import PromptTooLongError, check_engine, check_worker, with_placeholders
from reft_vllm.settings import Settings, named_sites

WIDTH, HEADS, KV_HEADS, SIZE = 24, 4, 2, 6
SLOTS, TOKENS = 3, 128
RANDOM = np.random.default_rng(0)


@pytest.fixture(params=FORMS, autouse=True)
def form(request):
    """How the ops run: vectorised for CPU, the Triton kernels in the interpreter, on a GPU where there is one."""
    if request.param != "batched":
        interpreted_kernels()
    RANDOM.bit_generator.state = np.random.default_rng(0).bit_generator.state
    torch.set_default_device("cuda" if request.param == "cuda" else "cpu")
    yield request.param
    torch.set_default_device("cpu")


def normal(*shape: int) -> Tensor:
    return torch.tensor(RANDOM.standard_normal(shape).astype(np.float32))


def engine_state(form: str, shard: Shard | None = None, slots: int = SLOTS) -> EngineState:
    device = "cuda" if form == "cuda" else "cpu"
    settings = Settings(sites=named_sites("all"), pool_mib=1)
    state = EngineState(slots, TOKENS, device, torch.float32, settings, movable=form == "batched")
    state.layers = frozenset({0, 1})
    TARGETS["test"] = state, state.placeholders.add("embeddings", WIDTH)
    for layer in (0, 1):
        for name in ("keys", "values"):
            width = KV_HEADS * SIZE if shard is None else sum(stop - start for start, stop in shard.ranges)
            state.placeholders.add(f"{layer}.{name}", width, shard)
    return state


def begin(state: EngineState, *requests: tuple[int, int, int]) -> None:
    """(slot, scheduled, computed) of each request."""
    slot, scheduled, computed = (np.array(column, dtype=np.int32) for column in zip(*requests, strict=True))
    state.begin_step(slot, scheduled, computed, np.full(len(requests), 50, dtype=np.int32))


def prefixes(count: int) -> list[KeyValuePrefix]:
    return [KeyValuePrefix(layer, normal(count, KV_HEADS, SIZE), normal(count, KV_HEADS, SIZE)) for layer in (0, 1)]


def gated(count: int, layer: int = 0, gates: int = HEADS, projected: bool = True) -> KeyValuePrefix:
    shape = (count, KV_HEADS, SIZE)
    return KeyValuePrefix(layer, normal(*shape), normal(*shape), normal(gates), projected)


def test_rows_of_placeholders_are_replaced_in_every_chunk(form) -> None:
    """Pairs stand before virtual tokens; what a step has computed already, and everything behind, stays."""
    state = engine_state(form)
    learned, pairs = normal(4, WIDTH), prefixes(3)
    state.load(1, {}, program=Program((VirtualTokens(learned[:1]), *pairs, VirtualTokens(learned[1:]))))
    state.load(2, {}, program=Program((VirtualTokens(learned * 2),)))
    for start in range(8):
        for count in (1, 2, 5):
            begin(state, (-1, 3, 0), (1, count, start), (0, 2, 0), (2, 3, 2))
            hidden, keys = normal(8 + count, WIDTH), normal(8 + count, KV_HEADS, SIZE)
            want, want_keys = hidden.clone(), keys.clone()
            for token, position in enumerate(range(start, start + count), 3):
                if position < 3:
                    want_keys[token] = pairs[1].keys[position]
                elif position < 7:
                    want[token] = learned[position - 3]
            want[5 + count : 7 + count] = 2 * learned[2:]
            overwrite(hidden, "test")
            state.placeholders.replace(state.placeholders.targets["1.keys"], keys) if start < 7 else None
            torch.testing.assert_close(hidden, want)
            torch.testing.assert_close(keys, want_keys)


def test_edits_count_tokens_behind_the_placeholders(form) -> None:
    state = engine_state(form)
    edit = Edit(Site(0), Positions.parse("f1"), shift=normal(WIDTH))
    state.load(0, {}, program=Program((VirtualTokens(normal(4, WIDTH)), *prefixes(3), edit)))
    assert state.folded.in_front[0] == 7
    state.load(0, {}, program=Program((edit,)))
    assert state.folded.in_front[0] == 0


def test_keys_that_lie_between_others_and_factors_of_the_model(form) -> None:
    """Keys are a slice of one projection's output; a model that scales embeddings itself gets them divided."""
    state = engine_state(form)
    learned, pairs = normal(2, WIDTH), prefixes(2)
    state.placeholders.targets["embeddings"].factor = 4.0
    state.load(0, {}, program=Program((*pairs, VirtualTokens(learned))))
    begin(state, (0, 5, 0))
    hidden = normal(1, 5, WIDTH)
    overwrite(hidden, "test")
    torch.testing.assert_close(hidden[0, 2:4] * 4, learned)
    projected = normal(5, 3, KV_HEADS * SIZE)
    before, keys = projected.clone(), projected[:, 1].view(5, KV_HEADS, SIZE)
    state.placeholders.replace(state.placeholders.targets["0.keys"], keys)
    torch.testing.assert_close(keys[:2], pairs[0].keys)
    changed = (projected != before).any(-1)
    assert changed.tolist() == [[False, True, False]] * 2 + [[False] * 3] * 3


def test_a_rank_replaces_its_own_heads(form) -> None:
    state = engine_state(form, Shard(((SIZE, 2 * SIZE),)))
    pairs = prefixes(2)
    state.load(0, {}, program=Program(tuple(pairs)))
    begin(state, (0, 2, 0))
    values = normal(2, 1, SIZE)
    state.placeholders.replace(state.placeholders.targets["1.values"], values)
    torch.testing.assert_close(values, pairs[1].values[:, 1:])


def test_more_virtual_tokens_than_any_prefix_has_pairs(form) -> None:
    state = engine_state(form)
    learned, pairs = normal(40, WIDTH), prefixes(2)
    state.load(0, {}, program=Program((VirtualTokens(learned),)))
    state.load(1, {}, program=Program(tuple(pairs)))
    begin(state, (0, 40, 0), (1, 5, 0))
    hidden, keys = normal(45, WIDTH), normal(45, KV_HEADS, SIZE)
    want = torch.cat([keys[:40], pairs[0].keys, keys[42:]])
    overwrite(hidden, "test")
    state.placeholders.replace(state.placeholders.targets["0.keys"], keys)
    torch.testing.assert_close(hidden[:40], learned)
    torch.testing.assert_close(keys, want)


def test_slots_give_their_pages_back_and_keep_nothing_of_what_was_there(form) -> None:
    state = engine_state(form)
    state.gated.add(0, Attention(HEADS, KV_HEADS, SIZE, 0.4))
    program = Program((VirtualTokens(normal(40, WIDTH)), *prefixes(9), gated(5)))
    for _ in range(5):
        state.load(0, {}, program=program)
        assert state.pool.resident == 40 + 4 * 9 + 2 * 5
        state.load(0, {}, program=Program((VirtualTokens(normal(1, WIDTH)),)))
        assert state.pool.resident == 1
        begin(state, (0, 4, 0))
        keys, before = normal(4, KV_HEADS, SIZE), normal(4, HEADS, SIZE)
        untouched, output = keys.clone(), before.clone()
        state.placeholders.replace(state.placeholders.targets["0.keys"], keys)
        assert torch.equal(keys, untouched) and not state.gated.busy and torch.equal(output, before)
    state.clear(0)
    assert state.pool.resident == 0
    begin(state, (0, 4, 0))
    assert not len(state.placeholders.tokens)


def test_nothing_happens_in_steps_without_placeholders(form) -> None:
    state = engine_state(form)
    state.load(0, {}, program=Program((VirtualTokens(normal(3, WIDTH)),)))
    hidden = normal(4, WIDTH)
    before = hidden.clone()
    for work in ([(0, 4, 3)], [(-1, 4, 0)], [(1, 2, 0), (0, 2, 9)]):
        begin(state, *work)
        overwrite(hidden, "test")
    begin(state, (0, 4, 0))
    state.launching = False
    overwrite(hidden, "test")
    state.launching = True
    if form == "batched":
        overwrite(hidden[:2], "test")  # the embedding module in a pass over fewer tokens, of a draft model
    state.end_steps()
    overwrite(hidden, "test")
    assert torch.equal(hidden, before)


def reference(prefix: KeyValuePrefix, query: Tensor, scale: float) -> Tensor:
    """`[tokens, heads, head_dim]` of the transformers runtime."""
    rows = query.transpose(0, 1)[None]
    return gated_attention(prefix, rows, scale, Group(Program((prefix,)), np.array([0]), True))[0]


@pytest.mark.parametrize("counts", [(1, 1, 1), (5, 40, 3), (33, 0, 1), (70, 2, 40)])
def test_gated_prefixes_are_those_of_the_reference(form, counts: tuple[int, ...]) -> None:
    """Several slots with prefixes of different lengths, a layer where one has none, the bare base between them."""
    state = engine_state(form, slots=4)
    for layer in (0, 1):
        state.gated.add(layer, Attention(HEADS, KV_HEADS, SIZE, 0.3, fits=True))
    work = {0: [gated(3), gated(7, projected=False)], 1: [gated(20), gated(1, 1, gates=1)], 3: [gated(2)]}
    if state.movable:
        work[3].append(gated(4))
    for slot, nodes in work.items():
        state.load(slot, {}, program=Program(tuple(nodes)))
    owners = [(0, counts[0]), (-1, 2), (1, counts[1]), (2, 3), (3, counts[2]), (1, 1)]
    begin(state, *((slot, count, 10) for slot, count in owners))
    slot = np.repeat([slot for slot, _ in owners], [count for _, count in owners])
    for layer in (0, 1):
        query, output, hidden = (normal(len(slot), HEADS, SIZE) for _ in range(3))
        want, want_hidden = output.clone(), hidden.clone()
        for number, nodes in work.items():
            for node in nodes:
                if node.layer == layer:
                    target = want if node.projected else want_hidden
                    target[slot == number] += reference(node, query, 0.3)[slot == number]
        BEHIND["test"] = state, state.gated.layers[layer]
        before = output.clone()
        state.gated.attend(layer, query, output)
        add_behind(hidden.view(1, len(slot), -1), "test")
        torch.testing.assert_close(output, want, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(hidden, want_hidden, atol=1e-5, rtol=1e-5)
        assert (want - before).abs().max() > 0.01


def test_a_rank_adds_the_prefixes_of_its_own_heads(form) -> None:
    state = engine_state(form)
    keys, queries = Shard(((SIZE, 2 * SIZE),)), Shard(((2, 4),))
    state.gated.add(0, Attention(2, 1, SIZE, 0.3, keys, queries))
    node = gated(5)
    state.load(0, {}, program=Program((node,)))
    begin(state, (0, 3, 0))
    query, output = normal(3, HEADS, SIZE), torch.zeros(3, 2, SIZE)
    state.gated.attend(0, query[:, 2:], output)
    torch.testing.assert_close(output, reference(node, query, 0.3)[:, 2:], atol=1e-5, rtol=1e-5)


def request(**fields: object) -> SimpleNamespace:
    params = SimpleNamespace(prompt_logprob_token_ids=None, prompt_logprob_start=None)
    common = {"prompt_token_ids": [7, 8, 9], "prompt_embeds": None, "mm_features": None, "sampling_params": params}
    return SimpleNamespace(**{**common, **fields})


CONFIG = SimpleNamespace(
    max_model_len=12,
    is_multimodal_model=False,
    use_mla=False,
    architecture="TinyForCausalLM",
    hf_text_config=SimpleNamespace(num_hidden_layers=2),
)


def test_requests_get_placeholders_and_stay_as_they_are() -> None:
    both = Program((*prefixes(3), VirtualTokens(normal(2, WIDTH)), gated(9)))
    given = request()
    longer, front = with_placeholders(given, both, CONFIG)
    assert (longer.prompt_token_ids, front) == ([7] * 5 + [7, 8, 9], 5)
    assert given.prompt_token_ids == [7, 8, 9]
    for nothing in (None, Program((gated(9),))):
        assert with_placeholders(given, nothing, CONFIG) == (given, 0)
    scored = request(sampling_params=SimpleNamespace(prompt_logprob_token_ids=[[1]], prompt_logprob_start=1))
    assert with_placeholders(scored, both, CONFIG)[0].sampling_params.prompt_logprob_start == 6
    assert scored.sampling_params.prompt_logprob_start == 1


def test_requests_that_cannot_have_placeholders_are_refused() -> None:
    program = Program((VirtualTokens(normal(5, WIDTH)),))
    for fields, message in (
        ({"prompt_embeds": normal(3, WIDTH)}, "given as embeddings"),
        ({"mm_features": [object()]}, "multimodal prompts"),
        ({"sampling_params": None}, "generation only"),
        ({"resumable": True}, "arrive in parts"),
    ):
        with pytest.raises(UnsupportedProgramError, match=f"5 virtual tokens in front of the prompt.*{message}"):
            with_placeholders(request(**fields), program, CONFIG)
    assert with_placeholders(request(prompt_token_ids=[7] * 6), program, CONFIG)[1] == 5
    with pytest.raises(PromptTooLongError, match="7 tokens and the adapter puts 5.*to 6 tokens"):
        with_placeholders(request(prompt_token_ids=[7] * 7), program, CONFIG)


def test_models_that_cannot_have_placeholders_are_named() -> None:
    pairs, tokens = Program(tuple(prefixes(3))), Program((VirtualTokens(normal(5, WIDTH)),))
    for program in (pairs, tokens, Program((gated(3),))):
        check_engine(program, CONFIG)
    with pytest.raises(UnsupportedProgramError, match="layer 0 has no key/value pairs"):
        check_engine(Program(tuple(prefixes(3)[1:])), CONFIG)
    with pytest.raises(UnsupportedProgramError, match=r"VirtualTokens\(5\).*TinyForCausalLM, a multimodal model"):
        check_engine(tokens, SimpleNamespace(**{**vars(CONFIG), "is_multimodal_model": True}))
    with pytest.raises(UnsupportedProgramError, match=r"TinyForCausalLM caches no keys and values \(MLA\)"):
        check_engine(Program((gated(3),)), SimpleNamespace(**{**vars(CONFIG), "use_mla": True}))


def test_what_fixed_buffers_do_not_hold_is_refused(form) -> None:
    state = engine_state(form, slots=400)
    state.gated.add(0, Attention(HEADS, KV_HEADS, SIZE, 0.3))
    for nodes, message in (
        ([gated(2), gated(3)], "layer 0: a layer can have one gated prefix"),
        ([VirtualTokens(normal(300, WIDTH))], "300 virtual tokens.*up to 256"),
        ([*prefixes(30), gated(7)], "134 pages of 12 numbers"),
    ):
        program = Program(tuple(nodes))
        if state.movable:
            check_worker(program, state)
            state.load(0, {}, program=program)
        else:
            with pytest.raises(UnsupportedProgramError, match=message):
                check_worker(program, state)
                state.check_fits({}, program)


def test_places_that_are_missing_are_named(form) -> None:
    state = engine_state(form)
    check_worker(Program((*prefixes(2), VirtualTokens(normal(5, WIDTH)))), state)
    with pytest.raises(UnsupportedProgramError, match="layer 1, 2 pairs.*caches no keys and values of its own"):
        check_worker(Program((gated(2, 1),)), state)
    state.gated.add(1, Attention(HEADS, KV_HEADS, SIZE, 0.3))
    check_worker(Program((gated(2, 1), gated(2, 7))), state)  # layer 7 is on another pipeline rank
    with pytest.raises(UnsupportedProgramError, match="projected=True"):
        check_worker(Program((gated(2, 1, projected=False),)), state)
    del state.placeholders.targets["embeddings"]
    with pytest.raises(UnsupportedProgramError, match="not one embedding of tokens"):
        check_worker(Program((VirtualTokens(normal(5, WIDTH)),)), state)


def test_cached_blocks_depend_on_placeholders_and_moved_positions() -> None:
    """Blocks of 16 tokens, 20 placeholders; an adapter that acts everywhere tells its edited ends all the same."""
    edit = Edit(Site(0), Positions.parse("l1"), shift=normal(WIDTH))
    deltas = Edit(Site(1), Positions.parse("all"), shift=normal(WIDTH))

    def keys(length: int, *nodes: Node) -> list[tuple[str, str] | None]:
        admitted = Admitted.of_program(None, Program(nodes), "digest")
        return [block_key(admitted, 20 + length, start, start + 16) for start in range(0, 20 + length, 16)]

    tokens = VirtualTokens(normal(20, WIDTH))
    short, long = keys(12, tokens), keys(44, tokens)
    assert [key is not None for key in long] == [True, True, False, False]
    assert short == long[:2]
    short, long = keys(12, tokens, edit), keys(44, tokens, edit)
    assert [key is not None for key in long] == [True, True, False, True]
    assert short[0] == long[0] and short[1] != long[1], "the last token of the shorter prompt is edited"
    short, long = keys(12, tokens, edit, deltas), keys(44, tokens, edit, deltas)
    assert None not in long and short[1] != long[1]
    assert keys(44, gated(3), tokens)[2] is not None
