"""Life of a server: versions that change under its feet, adapters from the store, strengths, metrics.

The server has two slots, keeps two adapters in its workers and next to none in memory, so that everything is evicted
and read again all the time.
"""

from __future__ import annotations

import base64
import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import vllm_environment  # noqa: F401
from openai_server import Server, serving
from scipy.special import log_softmax
from strong_adapters import strong_lora, strong_loreft
from tiny_models import make_tiny_llama

import reft_plugins as reft
from adapters_store import Store
from adapters_store.trust import keys
from adapters_store.trust.signing import sign
from reft_plugins.adapter import Adapter
from reft_plugins.base_model import identify
from reft_plugins.capturing import capture
from reft_plugins.compose import scale
from reft_plugins.methods.program import adapter_of
from reft_plugins.program import Program, Site, VirtualTokens

PROMPT = [1, *np.random.default_rng(5).integers(5, 500, 79).tolist()]
RESOLVE_SECONDS = 0.2


@pytest.fixture(scope="module")
def versions(tiny_llama) -> list[Adapter]:
    """Of one task; every one answers differently."""
    return [strong_loreft(tiny_llama, "f2+l2", seed=20 + seed) for seed in range(6)]


@pytest.fixture(scope="module")
def lora(tiny_llama) -> Adapter:
    return strong_lora(tiny_llama, seed=3)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("production")


@pytest.fixture(scope="module")
def store(root) -> Store:
    Store.init(root / "elsewhere")
    return Store.init(root / "store")


@pytest.fixture(scope="module")
def server(tiny_llama, versions, lora, root, store):
    store.add(versions[0].save(root / "task"), "task:prod")
    arguments = [str(tiny_llama), "--adapter", "task=task:prod", "--adapter", f"code={lora.save(root / 'code')}"]
    arguments += ["--allow-loading", "--resolve-from-store", "--max-loras", "2", "--max-cpu-loras", "2"]
    arguments += ["--max-model-len", "512"]
    keys.generate(root / "release.pem")
    (root / "policy.toml").write_text('default = "allow"\n[[rules]]\nnames = ["guarded"]\nkeys = ["release.pub"]\n')
    (root / "config.toml").write_text(
        f'[store]\nremotes = ["{root / "elsewhere"}"]\n[trust]\npolicy = "{root / "policy.toml"}"\n'
    )
    environment = {
        "REFT_STORE": str(root / "store"),
        "REFT_CONFIG": str(root / "config.toml"),
        "REFT_ADAPTER_CACHE_BYTES": "1",
        "REFT_RESOLVE_SECONDS": str(RESOLVE_SECONDS),
        "VLLM_LOG_STATS_INTERVAL": "1",
    }
    with serving(arguments, root / "server.log", **environment) as running:
        yield running


@pytest.fixture(scope="module")
def reference(tiny_llama):
    return reft.runtime("transformers", tiny_llama)


@pytest.fixture(scope="module")
def expected(reference):
    """Greedy answers of the transformers runtime, which differ between the adapters of a test."""
    known: dict[tuple[str | None, tuple[int, ...], int], list[int]] = {}

    def tokens(adapter: Adapter | None, prompt: list[int] = PROMPT, count: int = 8) -> list[int]:
        key = (adapter and adapter.digest, tuple(prompt), count)
        if key not in known:
            known[key] = reference.generate([prompt], [adapter], count, ignore_eos=True)[0].token_ids
        return known[key]

    return tokens


def tokens(server: Server, model: str, prompt: list[int] = PROMPT, count: int = 8, **more: object) -> list[int]:
    return server.complete(model, prompt, count, **more)["token_ids"]


def wait_until_running(server: Server, requests: int) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        text = server.call("/metrics/")[1]["text"]
        lines = [line for line in text.splitlines() if line.startswith("vllm:num_requests_running{")]
        if sum(float(line.split()[-1]) for line in lines) >= requests:
            return
        time.sleep(0.05)
    raise AssertionError("requests did not start")


def test_models_say_what_is_behind_their_names(server, tiny_llama, versions, lora, root) -> None:
    cards = {card["id"]: card for card in server.call("/v1/models")[1]["data"]}
    task, code = cards["task"], cards["code"]
    assert task["parent"] == code["parent"] == str(tiny_llama)
    assert (task["reft"]["method"], code["reft"]["method"]) == ("loreft", "lora")
    assert (task["reft"]["positions"], code["reft"]["positions"]) == (["f2+l2"], ["all"])
    assert (task["reft"]["digest"], code["reft"]["digest"]) == (versions[0].digest, lora.digest)
    assert (task["reft"]["reference"], code["root"]) == ("task:prod", str(root / "code"))
    assert task["reft"]["base"]["fingerprint"] == identify(tiny_llama).fingerprint
    assert "reft" not in cards[str(tiny_llama)]


def test_upgrade_in_place_while_requests_run(server, versions, expected, root) -> None:
    """The request in flight finishes under the version it began with; no key or value of it is reused after."""
    old, new = versions[1], versions[2]
    assert expected(old, count=150) != expected(new, count=150) and expected(old)[0] != expected(new)[0]
    assert server.load("task2", old.save(root / "old"))[0] == 200
    with ThreadPoolExecutor() as pool:
        running = pool.submit(tokens, server, "task2", PROMPT, 150)
        wait_until_running(server, 1)
        status, answer = server.load("task2", new.save(root / "new"))
        assert status == 400 and "load_inplace" in json.dumps(answer)
        assert server.load("task2", root / "new", load_inplace=True)[0] == 200
        assert not running.done(), "too fast to test an upgrade under way"
        both = [pool.submit(tokens, server, "task2") for _ in range(3)]
        assert [each.result() for each in both] == [expected(new)] * 3
        assert running.result() == expected(old, count=150)
    status, answer = server.load("task2", root / "new", load_inplace=True)
    assert status == 200 and "already" in answer["text"]
    assert tokens(server, "task2") == expected(new)


def test_a_moved_tag_is_loaded_in_place(server, versions, store, expected, root) -> None:
    assert tokens(server, "task") == expected(versions[0])
    store.add(versions[3].save(root / "third"), "task:prod")
    assert tokens(server, "task") == expected(versions[0]), "a name that was loaded stays until it is loaded again"
    assert server.load("task", "task:prod", load_inplace=True)[0] == 200
    assert tokens(server, "task") == expected(versions[3])


def test_an_overwritten_directory_is_served_as_it_is_now(server, versions, expected, root) -> None:
    folder = versions[1].save(root / "overwritten")
    assert server.load("folder", folder)[0] == 200
    assert tokens(server, "folder") == expected(versions[1])
    for version in (versions[2], versions[4]):
        time.sleep(0.6)
        version.save(folder)
        assert tokens(server, "folder") == expected(version)
    card = next(card for card in server.call("/v1/models")[1]["data"] if card["id"] == "folder")
    assert card["reft"]["digest"] == versions[4].digest


def test_missing_bytes_fail_their_requests_and_nothing_else(server, versions, expected, root) -> None:
    folder = versions[5].save(root / "vanishing")
    assert server.load("vanishing", folder)[0] == 200
    assert tokens(server, "vanishing") == expected(versions[5])
    kept = shutil.copytree(folder, root / "kept")
    shutil.rmtree(folder)
    for model, version in (("task", versions[3]), ("folder", versions[4]), ("task", versions[3])):
        assert tokens(server, model) == expected(version)
    status, answer = server.ask("vanishing", PROMPT)
    assert status >= 400, answer
    shutil.copytree(kept, folder)
    assert tokens(server, "vanishing") == expected(versions[5])


def test_bytes_that_vanish_between_check_and_load(server, versions, expected, root) -> None:
    """Both slots are taken, so other adapters' requests wait, checked, while their files go.

    Workers read waiting adapters ahead, but have next to no memory here: most cannot be loaded when their turn comes.
    """
    racing = {f"racing{number}": versions[number] for number in (5, 2, 1, 0)}
    for name, version in racing.items():
        assert server.load(name, version.save(root / name))[0] == 200
    with ThreadPoolExecutor() as pool:
        others = {model: pool.submit(tokens, server, model, PROMPT, 400) for model in ("task", "folder")}
        wait_until_running(server, 2)
        waiting = {}
        for name in racing:
            waiting[name] = pool.submit(server.ask, name, PROMPT)
            time.sleep(0.03)
        time.sleep(0.1)
        assert not any(each.done() for each in (*others.values(), *waiting.values())), "too fast to test"
        for name in racing:
            shutil.rmtree(root / name)
        failed = [name for name, each in waiting.items() if each.result()[0] == 500]
        for name in set(racing) - set(failed):
            status, answer = waiting[name].result()
            assert status == 200 and answer["choices"][0]["token_ids"] == expected(racing[name])
        assert others["task"].result() == expected(versions[3], count=400)
        assert others["folder"].result() == expected(versions[4], count=400)
    assert failed and "cannot be loaded any more" in server.log.read_text()
    for name in failed:
        racing[name].save(root / name)
        assert tokens(server, name) == expected(racing[name]), "not what the failed request left in the prefix cache"


def test_references_are_resolved_on_first_use_and_followed(server, tiny_llama, versions, store, expected, root) -> None:
    store.add(versions[1].save(root / "wild1"), "wild:latest")
    assert tokens(server, "wild:latest") == expected(versions[1])
    store.add(versions[2].save(root / "wild2"), "wild:latest")
    time.sleep(RESOLVE_SECONDS + 0.1)
    assert tokens(server, "wild:latest") == expected(versions[2])
    assert tokens(server, "wild@v1") == expected(versions[1])
    digest = next(record.digest for record in store.list() if record.name == "wild" and record.version == 2)
    assert tokens(server, f"wild@{digest}") == expected(versions[2])
    listed = {card["id"]: card for card in server.call("/v1/models")[1]["data"]}
    assert listed["wild:latest"]["reft"]["digest"] == versions[2].digest
    other = make_tiny_llama(root / "other-base", steps=0, seed=11)
    store.add(strong_loreft(other, "f1", seed=1).save(root / "foreign"), "foreign:latest")
    status, answer = server.ask("foreign:latest", PROMPT)
    assert status == 400 and "made for base model" in json.dumps(answer)
    for name in ("wild:nowhere", "nobody:latest", "wild", "../production:x", str(root / "wild1"), "a/../b:c"):
        assert server.ask(name, PROMPT)[0] == 404, name


def test_what_only_a_remote_has_is_pulled_and_held_to_the_policy(server, versions, store, expected, root) -> None:
    elsewhere = Store.open(root / "elsewhere")
    elsewhere.add(versions[4].save(root / "distant"), "distant:prod")
    elsewhere.add(versions[5].save(root / "guarded"), "guarded:prod")
    assert tokens(server, "distant:prod") == expected(versions[4]) != expected(None)
    assert store.find("distant:prod").digest == elsewhere.find("distant:prod").digest
    status, answer = server.ask("guarded:prod", PROMPT)
    assert status == 400 and "not admitted by the policy" in json.dumps(answer), answer
    sign(elsewhere, "guarded:prod", root / "release.pem")
    assert tokens(server, "guarded:prod") == expected(versions[5])


def test_strengths_of_requests(server, reference, versions, lora, expected, root) -> None:
    for model, adapter in (("folder", versions[4]), ("code", lora)):
        answers = []
        for strength in (0.5, -1, 0, 1, 0.5):
            scaled = scale(adapter, strength) if strength else None
            choice = server.complete(model, PROMPT, vllm_xargs={"reft_strength": strength})
            assert choice["token_ids"] == expected(scaled), (model, strength)
            want = log_softmax(reference.logits(PROMPT, scaled)[-1])[choice["token_ids"][0]]
            np.testing.assert_allclose(choice["logprobs"]["token_logprobs"][0], want, atol=1e-3)
            answers.append((choice["token_ids"][0], round(choice["logprobs"]["token_logprobs"][0], 2)))
        assert len(set(answers)) == 4, "too weak to tell the strengths apart"
    assert server.load("half", scale(versions[4], 0.5).save(root / "half"))[0] == 200
    beams = {"use_beam_search": True, "n": 2, "logprobs": None}
    asked = tokens(server, "folder", vllm_xargs={"reft_strength": 0.5}, **beams)
    assert asked == tokens(server, "half", **beams) != tokens(server, "folder", **beams)


def test_impossible_strengths_get_400(server, tiny_llama, versions, expected, root) -> None:
    embeddings = torch.randn(4, 128, generator=torch.Generator().manual_seed(1))
    prompt = adapter_of(Program((VirtualTokens(embeddings),)), identify(tiny_llama))
    assert server.load("prompt", prompt.save(root / "prompt"))[0] == 200
    assert tokens(server, "prompt", vllm_xargs={"reft_strength": 1}) == expected(prompt)
    for model, strength, message in (
        ("prompt", 0.5, "VirtualTokens(4)"),
        ("folder", 9, "at most 8"),
        ("folder", "strong", "finite number"),
        ("folder", [1], "finite number"),
        (str(tiny_llama), 0.5, "this model is none"),
    ):
        status, answer = server.ask(model, PROMPT, vllm_xargs={"reft_strength": strength})
        assert status == 400 and message in json.dumps(answer), (model, strength, answer)
    assert tokens(server, "folder") == expected(versions[4])


def test_metrics(server, tiny_llama, versions, expected) -> None:
    def settled() -> dict[str, float]:
        time.sleep(2.5)
        return server.metrics()

    before = settled()
    unseen = [1, *np.random.default_rng(6).integers(5, 500, 40).tolist()]
    assert tokens(server, "folder", unseen) == expected(versions[4], unseen)
    assert tokens(server, str(tiny_llama), unseen) == expected(None, unseen)
    after = settled()
    assert after["reft_edited_tokens_total"] - before["reft_edited_tokens_total"] == 4
    assert after["reft_step_adapters_total"] > before["reft_step_adapters_total"]
    assert after["reft_steps_total"] > before["reft_steps_total"]
    assert after["reft_adapter_loads_total"] == after["reft_adapter_load_seconds_count"] > 10
    assert after["reft_adapter_failed_loads_total"] >= 1
    assert 0 < after["reft_adapter_load_seconds_sum"] < 100
    assert 0 < after["reft_active_adapters"] <= after["reft_resident_adapters"] == 2
    assert after["reft_resident_pages"] > 0
    assert after['reft_cache_misses_total{cache="manager"}'] == after["reft_adapter_loads_total"]
    assert after['reft_cache_hits_total{cache="slots"}'] > 0


def test_unload(server, versions, expected) -> None:
    with ThreadPoolExecutor() as pool:
        running = pool.submit(tokens, server, "folder", PROMPT, 150)
        wait_until_running(server, 1)
        assert server.call("/v1/unload_lora_adapter", {"lora_name": "folder"})[0] == 200
        assert server.ask("folder", PROMPT)[0] == 404
        assert running.result() == expected(versions[4], count=150)
    assert "folder" not in {card["id"] for card in server.call("/v1/models")[1]["data"]}
    assert tokens(server, "task") == expected(versions[3])
    assert server.call("/v1/unload_lora_adapter", {"lora_name": "task"})[0] == 200
    time.sleep(2.5)
    assert server.metrics()["reft_resident_adapters"] < 2, "an adapter that nothing uses is freed at once"


def test_activations_come_with_the_answer(server, tiny_llama, versions, expected, root) -> None:
    """Also of tokens that the prefix cache has, and after the edits of the request's adapter."""
    assert server.load("seen", versions[4].save(root / "seen"))[0] == 200
    for model, adapter in (("seen", versions[4]), (str(tiny_llama), None), ("seen", versions[4])):
        status, answer = server.ask(model, PROMPT, vllm_xargs={"reft_capture": "2,3:block_output@f3+l1"})
        assert status == 200, answer
        assert answer["choices"][0]["token_ids"] == expected(adapter)
        want = capture(tiny_llama, [PROMPT], ["2", "3"], "f3+l1", adapter=adapter)
        for site, rows in want.activations.items():
            found = answer["kv_transfer_params"]["reft_capture"][f"{site.layer}:{site.component}"]
            values = np.frombuffer(base64.b64decode(found["data"]), "<f4").reshape(found["shape"])
            assert found["positions"] == want.tokens.tolist()
            np.testing.assert_allclose(values, rows, atol=1e-3)
    edited = capture(tiny_llama, [PROMPT], ["3"], "l1", adapter=versions[4]).activations[Site(3)]
    assert (edited - capture(tiny_llama, [PROMPT], ["3"], "l1").activations[Site(3)]).abs().max() > 0.1


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("nowhere@l1", "layer:component"),
        ("1:mlp_output", "without that site"),
        ("9", "layers 0 to 3"),
        ("1@soon", "soon"),
    ],
)
def test_activations_that_cannot_be_had_are_refused(server, tiny_llama, expected, text, reason) -> None:
    status, answer = server.ask(str(tiny_llama), PROMPT, vllm_xargs={"reft_capture": text})
    assert status == 400 and reason in json.dumps(answer)
    assert tokens(server, str(tiny_llama)) == expected(None)
