"""Which CUDA graph a step is run in, decided by vLLM's own classes; no graph is captured, so that no GPU is needed.

The stock decision, that of the unpatched functions, is the negative control: it runs every step in which a request has
an adapter in the graph with LoRA kernels.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import vllm_environment  # noqa: F401

from reft_plugins.errors import UnsupportedProgramError
from reft_plugins.positions import Positions
from reft_plugins.program import Edit, KeyValuePrefix, Program, Site, VirtualTokens, WeightDelta
from reft_vllm.execution.state import EngineState
from reft_vllm.patches import rest, runner_v1, runner_v2, runners
from reft_vllm.settings import Settings

MAX_LORAS, SIZES = 3, [1, 2, 4, 8]
PROMPT_ONLY, LORA, EVERYWHERE, GENERATED, UNLOADED = 11, 12, 13, 14, 15


def edit(positions: str) -> Edit:
    return Edit(Site(0), Positions.parse(positions), shift=torch.ones(4))


def delta(positions: str) -> WeightDelta:
    return WeightDelta(
        "model.layers.0.mlp.up_proj", torch.ones(1, 4), torch.ones(4, 1), positions=Positions.parse(positions)
    )


def prefix(gate: torch.Tensor | None) -> KeyValuePrefix:
    return KeyValuePrefix(0, torch.ones(2, 1, 4), torch.ones(2, 1, 4), gate)


@pytest.fixture(scope="module", autouse=True)
def patched():
    """The worker module comes first, as in an engine: on CPU the V2 runner needs its stand-ins for CUDA."""
    import vllm.v1.worker.cpu_worker  # noqa: F401

    from reft_vllm.install import install

    install()
    for point in (*runner_v1.RUNNER_POINTS, *runner_v2.RUNNER_POINTS):
        point.apply()


@pytest.fixture
def manager() -> SimpleNamespace:
    """What the patches use of vLLM's LoRA manager: adapters 11 to 13 are in slots, 14 is registered only."""
    state = EngineState(MAX_LORAS, 64, "cpu", torch.float32, Settings())
    state.load(0, {"0.block_output": [edit("f2+l2")]})
    state.load(1, {}, weighted=True)
    state.load(2, {"0.block_output": [edit("all")]})
    programs = {
        PROMPT_ONLY: [edit("f2+l2")],
        LORA: [delta("all")],
        EVERYWHERE: [edit("all")],
        GENERATED: [edit("generated")],
    }
    registered = {number: SimpleNamespace(program=Program(tuple(nodes))) for number, nodes in programs.items()}
    return SimpleNamespace(
        reft=state, lora_index_to_id=[PROMPT_ONLY, LORA, EVERYWHERE], _registered_adapters=registered
    )


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ([edit("f7+l7"), edit("[0,-1]"), edit("prompt")], False),
        ([edit("f7"), edit("generated")], True),
        ([edit("all")], True),
        ([delta("prompt")], False),
        ([delta("all")], True),
        ([VirtualTokens(torch.ones(2, 4)), prefix(None)], False),
        ([prefix(torch.ones(1))], True),
    ],
)
def test_what_changes_tokens_after_the_prompt(nodes, expected) -> None:
    assert rest.lasting(Program(tuple(nodes))) is expected


def test_loras_of_others_do() -> None:
    assert rest.lasting(None)


def int32s(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


@pytest.mark.parametrize(
    ("lora_ids", "computed", "resting", "edited"),
    [
        ((0, 0), (0, 9), True, 0),
        ((PROMPT_ONLY, 0), (8, 0), True, 0),
        ((PROMPT_ONLY, PROMPT_ONLY), (8, 7), False, 1),
        ((PROMPT_ONLY, PROMPT_ONLY), (8, 5), False, 0),
        ((PROMPT_ONLY, LORA), (8, 8), False, 0),
        ((EVERYWHERE, EVERYWHERE), (20, 0), False, 2),
        ((PROMPT_ONLY, GENERATED), (8, 20), False, 0),
        ((PROMPT_ONLY, UNLOADED), (8, 20), False, 0),
        ((PROMPT_ONLY, 0), (12, 0), True, 0),
    ],
)
def test_steps_at_rest(manager, lora_ids, computed, resting, edited) -> None:
    """One token each, prompts of 8; drafts that will be rejected count as computed in the last case."""
    assert rest.at_rest(manager, int32s(*lora_ids), int32s(*computed), int32s(8, 8)) is resting
    rest.begin_step(manager, ["a", "b"], int32s(*lora_ids), int32s(1, 1), int32s(*computed), int32s(8, 8))
    assert manager.reft.launching is not resting
    assert manager.reft.edited_tokens == edited


def vllm_config(specialize: bool = True):
    from vllm.config import VllmConfig
    from vllm.config.compilation import CUDAGraphMode
    from vllm.config.lora import LoRAConfig

    config = VllmConfig()
    config.lora_config = LoRAConfig(max_loras=MAX_LORAS, lora_dtype="bfloat16")
    compilation = config.compilation_config
    compilation.cudagraph_mode = CUDAGraphMode.FULL
    compilation.cudagraph_capture_sizes, compilation.max_cudagraph_capture_size = SIZES, SIZES[-1]
    compilation.cudagraph_specialize_lora = specialize
    compilation.compile_sizes = []
    return config


def v1_runner(manager, config, lora_ids):
    """A V1 runner with what its choice of a graph needs, and a batch of one-token requests after prompts of 8."""
    from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    runner = GPUModelRunner.__new__(GPUModelRunner)
    runner.vllm_config, runner.lora_config = config, config.lora_config
    runner.parallel_config, runner.compilation_config = config.parallel_config, config.compilation_config
    runner.model_config = SimpleNamespace(is_encoder_decoder=False)
    runner.uniform_decode_query_len = 1
    runner.cudagraph_dispatcher = CudagraphDispatcher(config)
    runner.cudagraph_dispatcher.initialize_cudagraph_keys(config.compilation_config.cudagraph_mode)
    runner.lora_manager = SimpleNamespace(_adapter_manager=manager, set_active_adapters=lambda *arguments: None)
    runner.input_batch = SimpleNamespace(
        req_ids=[str(number) for number in range(len(lora_ids))],
        request_lora_mapping=np.array(lora_ids),
        num_computed_tokens_cpu=int32s(*[8] * len(lora_ids)),
        num_prompt_tokens=int32s(*[8] * len(lora_ids)),
        lora_id_to_lora_request={number: object() for number in lora_ids if number},
        make_lora_inputs=lambda *arguments: ((), (), set()),
    )
    return runner


def choose(runner, method=None, **more):
    requests = len(runner.input_batch.req_ids)
    scheduled = int32s(*[1] * requests)
    runner.set_active_loras(runner.input_batch, scheduled, None)
    method = method or type(runner)._determine_batch_execution_and_padding
    mode, found, *_ = method(
        runner,
        num_tokens=requests,
        num_reqs=requests,
        num_scheduled_tokens_np=scheduled,
        max_num_scheduled_tokens=1,
        use_cascade_attn=False,
        **more,
    )
    return mode.name, found.has_lora, found.num_active_loras


def test_v1_runs_steps_at_rest_in_the_graph_without_lora(manager) -> None:
    config = vllm_config()
    resting = v1_runner(manager, config, [PROMPT_ONLY, 0, PROMPT_ONLY])
    stock = type(resting)._determine_batch_execution_and_padding.__wrapped__
    assert choose(resting) == ("FULL", False, 0)
    assert choose(resting, stock) == ("FULL", True, MAX_LORAS + 1)
    for lora_ids in ([PROMPT_ONLY, LORA], [EVERYWHERE], [GENERATED]):
        assert choose(v1_runner(manager, config, lora_ids)) == ("FULL", True, MAX_LORAS + 1)


def test_v1_leaves_warm_up_and_unspecialised_graphs_alone(manager) -> None:
    resting = v1_runner(manager, vllm_config(), [PROMPT_ONLY])
    captured = choose(resting, force_has_lora=True, force_num_active_loras=MAX_LORAS + 1)
    assert captured == ("FULL", True, MAX_LORAS + 1)
    only_with_lora = v1_runner(manager, vllm_config(specialize=False), [PROMPT_ONLY])
    assert choose(only_with_lora) == ("FULL", True, MAX_LORAS + 1), "there is no graph without LoRA to run it in"


def capture_of(request: str) -> SimpleNamespace:
    argument = {"key": "k", "sites": ["0.block_output"], "positions": "generated"}
    new = SimpleNamespace(req_id=request, sampling_params=SimpleNamespace(extra_args={"reft_capture": argument}))
    return SimpleNamespace(scheduled_new_reqs=[new], finished_req_ids=set())


def test_v1_runs_steps_with_captures_without_a_graph(manager) -> None:
    runner = v1_runner(manager, vllm_config(), [PROMPT_ONLY, 0])
    manager.reft.captures.follow(capture_of("1"))
    assert choose(runner)[0] == "NONE"


def v2_runner(manager, config):
    """A V2 runner with what its choice of a graph needs; all graphs count as captured."""
    from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager
    from vllm.v1.worker.gpu.lora_utils import LoraState, get_lora_capture_cases
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner
    from vllm.v1.worker.gpu.states import RequestState

    graphs = CudaGraphManager.__new__(CudaGraphManager)
    graphs.vllm_config, graphs.compilation_config = config, config.compilation_config
    graphs.cudagraph_mode, graphs.decode_query_len, graphs.max_num_reqs = config.compilation_config.cudagraph_mode, 1, 8
    graphs.varlen_decode, graphs.ubatch_runner = False, None
    graphs.lora_capture_cases = get_lora_capture_cases(config.lora_config, config.compilation_config)
    graphs._lora_dispatch_map, graphs._max_lora_case = graphs._build_lora_dispatch_map()
    graphs._candidates, graphs._capture_descs, graphs._graphs_captured = {}, {}, True
    graphs._init_candidates()
    runner = GPUModelRunner.__new__(GPUModelRunner)
    runner.lora_config, runner.cudagraph_manager = config.lora_config, graphs
    runner.req_states = RequestState(8, 64, 32, 0, 100, torch.device("cpu"))
    runner.lora_state = LoraState(8)
    runner.lora_manager = SimpleNamespace(_adapter_manager=manager, set_active_adapters=lambda *arguments: None)
    runner_v2.adopt(runner)
    return runner


def dispatched(runner, lora_ids, computed, prompt_len=8, generated=4):
    """What V2's `execute_model` does up to the choice of a graph, for requests that were preempted while generating."""
    from vllm.lora.request import LoRARequest
    from vllm.v1.worker.gpu import model_runner

    requests = [f"r{number}" for number in range(len(lora_ids))]
    for request, lora_id, done in zip(requests, lora_ids, computed, strict=True):
        runner.req_states.add_request(request, prompt_len, list(range(prompt_len + generated)), done, 9)
        lora = LoRARequest(str(lora_id), lora_id, "/nowhere") if lora_id else None
        runner.lora_state.add_request(request, runner.req_states.req_id_to_index[request], lora)
    try:
        count = model_runner.get_num_active_loras_for_dispatch(runner.lora_config, runner.lora_state, requests, False)
        found, _ = model_runner.dispatch_cg_and_sync_dp(
            runner.cudagraph_manager, len(requests), len(requests), 1, 1, 0, num_active_loras=count
        )
        return found.cg_mode.name, found.num_active_loras
    finally:
        for request in requests:
            runner.req_states.remove_request(request)
            runner.lora_state.remove_request(request)


def test_v2_runs_steps_at_rest_in_the_graph_without_lora(manager) -> None:
    from vllm.v1.worker.gpu import model_runner

    runner = v2_runner(manager, vllm_config())
    assert dispatched(runner, [PROMPT_ONLY, 0, PROMPT_ONLY], [8, 0, 9]) == ("FULL", 0)
    assert dispatched(runner, [PROMPT_ONLY, 0], [7, 0]) == ("FULL", MAX_LORAS + 1), "a prompt token is still to come"
    assert dispatched(runner, [PROMPT_ONLY, LORA], [8, 8]) == ("FULL", MAX_LORAS + 1)
    assert dispatched(runner, [EVERYWHERE], [8]) == ("FULL", MAX_LORAS + 1)
    stock = model_runner.get_num_active_loras_for_dispatch.__wrapped__
    states = SimpleNamespace(get_activate_loras=lambda requests: {PROMPT_ONLY})
    assert stock(runner.lora_config, states, ["r0"], False) == 1


def test_v2_dummy_runs_and_captures(manager) -> None:
    from vllm.v1.worker.gpu import model_runner

    runner = v2_runner(manager, vllm_config())
    dummy = model_runner.get_num_active_loras_for_dispatch(runner.lora_config, runner.lora_state, ["none"], True)
    assert dummy == MAX_LORAS + 1
    manager.reft.captures.follow(capture_of("r1"))
    assert dispatched(runner, [PROMPT_ONLY, 0], [8, 8])[0] == "NONE"
    assert dispatched(runner, [PROMPT_ONLY], [8])[0] == "FULL"


@pytest.mark.parametrize("count", [0, 1, MAX_LORAS + 1])
def test_graphs_captured_with_loras_hold_our_kernels(manager, count) -> None:
    """Through the hook by which V2 prepares a capture, and the mixin of both runners."""
    from vllm.v1.worker.gpu.lora_utils import create_lora_capture_hook

    runner = v2_runner(manager, vllm_config())
    rest.begin_step(manager, ["a"], int32s(EVERYWHERE), int32s(4), int32s(0), int32s(8))
    assert manager.reft.executor.active
    create_lora_capture_hook(runner.lora_config, runner)(count, 2, 4)
    assert manager.reft.launching is (count > 0)
    assert not manager.reft.executor.active, "dummy tokens are not edited"


def test_lora_kernels_skip_adapters_without_lora_weights(manager, monkeypatch) -> None:
    from vllm.lora.layers import LoRAMapping
    from vllm.lora.model_manager import LoRAModelManager

    given = []
    real = LoRAModelManager.__new__(LoRAModelManager)
    vars(real).update(vars(manager), _last_mapping=None, _last_slot_layout=None)
    monkeypatch.setattr(LoRAModelManager, "_set_adapter_mapping", lambda self, mapping: given.append(mapping))
    mapping = LoRAMapping((PROMPT_ONLY, PROMPT_ONLY, LORA, 0, EVERYWHERE), (PROMPT_ONLY, LORA, 0, EVERYWHERE))
    real.set_adapter_mapping(mapping)
    assert (given[-1].index_mapping, given[-1].prompt_mapping) == ((0, 0, LORA, 0, 0), (0, LORA, 0, 0))
    assert mapping.index_mapping[0] == PROMPT_ONLY, "the caller's own is left alone"
    manager.reft.load(0, {}, weighted=True)
    real.set_adapter_mapping(mapping)
    assert given[-1].index_mapping == (PROMPT_ONLY, PROMPT_ONLY, LORA, 0, 0), "another adapter in the slot counts"


def loaded(runner, ubatches: bool = False):
    """`load_lora_model` of a runner whose model is there already."""
    load = runners._load_lora_model(lambda self, model, vllm_config, device: model)
    config = SimpleNamespace(parallel_config=SimpleNamespace(use_ubatching=ubatches))
    return load(runner, "model", config, "cpu")


def test_runners_that_load_a_model_are_attached(manager) -> None:
    runner = v2_runner(manager, vllm_config())
    del runner.lora_state.reft_runner
    assert loaded(runner) == "model"
    assert runner.lora_state.reft_runner is runner and not manager.reft.refusal
    assert loaded(v1_runner(manager, vllm_config(), [0])) == "model" and not manager.reft.refusal


def test_an_unknown_runner_serves_no_adapters(manager) -> None:
    class OtherRunner:
        lora_manager = SimpleNamespace(_adapter_manager=manager)

    loaded(OtherRunner())
    assert "not by" in manager.reft.refusal and "OtherRunner" in manager.reft.refusal


def test_dual_batch_overlap_is_refused(manager) -> None:
    with pytest.raises(UnsupportedProgramError, match="--enable-dbo"):
        loaded(v1_runner(manager, vllm_config(), [0]), ubatches=True)
