"""What the serving benchmarks are made of: models, adapters, ratios, targets and the checks that void a run."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        from bases import make_llama

        return make_llama(tmp_path_factory.mktemp("models") / "base", hidden_size=128, layers=2, vocabulary=512)


def rounds(*seconds, changed=1.0):
    return [
        {
            "round": number,
            "seconds": each,
            "processor_seconds": 2 * each,
            "prompt_tokens": 1000,
            "new_tokens": 100,
            "changed_answers": changed,
        }
        for number, each in enumerate(seconds)
    ]


def report_of(lora_seconds=30.0, everywhere_seconds=11.0):
    found = {("base", 0): (10.0, 20.0), ("idle", 0): (10.0, 20.0), ("f7+l7", 1): (10.1, 20.2)}
    found |= {("f7+l7", 256): (10.5, 21.0), ("all", 1): (everywhere_seconds,), ("lora", 1): (lora_seconds,)}
    return {
        "machine": {"processor": "p", "cores": 2, "threads": 2, "memory_gib": 8.0, "vllm": "1", "torch": "2"},
        "settings": {
            "device": "cpu",
            "parameters": 4e7,
            "requests": 256,
            "prompt": [64, 192],
            "new_tokens": 48,
            "rounds": 2,
            "all_rounds": 1,
        },
        "engines": {"base": {"compiled": True, "plugin": False}},
        "rows": [{"kind": kind, "count": count, "rounds": rounds(*s)} for (kind, count), s in found.items()],
    }


def test_ratios_are_taken_within_rounds() -> None:
    from serving_peers.report import ratio
    from serving_peers.rows import Row

    base, other = Row("base", 0, ""), Row("idle", 0, "")
    results = {base: rounds(10.0, 40.0), other: rounds(20.0, 50.0)}
    results[base].append({**results[base][0], "seconds": 12.0})  # measured twice in that round: the mean counts
    assert ratio(results, other, base) == pytest.approx((0.675, 0.55, 0.8))
    assert ratio(results, other, base, "processor_seconds")[1:] == pytest.approx((0.5, 0.8))


def test_table_says_what_is_met_missed_and_not_measured(capsys) -> None:
    from serving_peers.report import show

    show(report_of())
    said = capsys.readouterr().out
    assert "8.0 GiB" in said and "40.0 M parameters" in said
    lines = {tuple(part.strip() for part in line.split("│")[1:7]) for line in said.splitlines() if "│" in line}
    verdicts = {(row[0][:8], row[1], row[2][:6], row[5]) for row in lines if len(row) == 6}
    assert ("ReFT f7+", "256", "ReFT f", "met") in verdicts  # 10.1 / 10.5 >= 0.95
    assert ("ReFT f7+", "1", "vLLM's", "met") in verdicts
    assert ("ReFT all", "1", "base", "met") in verdicts
    assert ("ReFT f7+", "512", "vLLM's", "not measured") in verdicts
    assert "MISSED" not in said
    show(report_of(lora_seconds=20.0, everywhere_seconds=12.0))
    assert capsys.readouterr().out.count("MISSED") == 3  # 1.98 and 1.67 of LoRA, 0.83 of base


def test_plot_is_drawn(tmp_path) -> None:
    from serving_peers.report import draw

    draw(report_of(), tmp_path / "folder" / "plot.png")
    assert (tmp_path / "folder" / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("device", "most"), [("cpu", 256), ("cuda", 512)])
def test_rows_and_targets_of_a_device(device, most) -> None:
    from serving_peers.rows import rows as all_rows
    from serving_peers.rows import targets

    counts = [1, 8, 32, 64, 256, *([512] if device == "cuda" else [])]
    found = all_rows(device, counts, [1, most])
    held = {(t.row.kind, t.row.count, t.reference.kind, t.least) for t in targets(device, found)}
    assert ("idle", 0, "base", 0.99) in held
    assert ("f7+l7", 1, "base", 0.97) in held
    assert ("f7+l7", 256, "f7+l7", 0.95) in held
    assert ("all", 1, "base", 0.90) in held
    against_lora = {count for kind, count, reference, _ in held if kind == "f7+l7" and reference == "lora"}
    assert against_lora == ({512} if device == "cuda" else set(counts))


def test_adapters_that_change_nothing_void_the_run() -> None:
    import serving
    from serving_peers.rows import Row

    base, idle, one = Row("base", 0, "base"), Row("idle", 0, "reft"), Row("f7+l7", 2, "reft")
    facts = {"base": {"plugin": False}, "reft": {"plugin": True, "statistics": {"most_adapters": 2}}}

    def results(answers):
        return {base: [{"answers": [[1], [2]]}], idle: [{"answers": [[1], [2]]}], one: [{"answers": answers}]}

    serving.check(results([[3], [4]]), facts)
    with pytest.raises(SystemExit, match="changed only 0%"):
        serving.check(results([[1], [2]]), facts)
    with pytest.raises(SystemExit, match="plugin is there"):
        serving.check(results([[3], [4]]), {**facts, "base": {"plugin": True}})
    facts["reft"]["statistics"]["most_adapters"] = 1
    with pytest.raises(SystemExit, match="at most 1 adapters"):
        serving.check(results([[3], [4]]), facts)


def test_loras_are_what_peft_reads_and_change_the_model(base, tmp_path) -> None:
    from peft import PeftModel
    from serving_peers.adapters import save_loras
    from transformers import AutoModelForCausalLM

    first, second = save_loras(base, tmp_path, 2, torch.float32)
    ids = torch.tensor([[1, 5, 9]])
    plain = AutoModelForCausalLM.from_pretrained(base)
    outputs = [plain(ids).logits]
    for folder in (first, second):
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
        outputs.append(model(ids).logits)
    for one, other in itertools.combinations(outputs, 2):
        assert (one - other).abs().max() > 0.01


def test_large_files_of_loras_are_shared(base, tmp_path, monkeypatch) -> None:
    from serving_peers import adapters

    monkeypatch.setattr(adapters, "LORA_FILES_BYTES", 1)
    folders = adapters.save_loras(base, tmp_path, 3, torch.float32)
    weights = {(folder / "adapter_model.safetensors").resolve() for folder in folders}
    assert len(weights) == 1 and len(set(folders)) == 3


def test_outline_of_a_large_model_takes_adapters_and_no_room(tmp_path) -> None:
    from bases import count_parameters, outline_llama_8b
    from serving_peers.adapters import loreft

    base = outline_llama_8b(tmp_path / "base")
    assert count_parameters(base) == 8_030_261_248
    assert (base / "model.safetensors").stat().st_blocks * 512 < 1 << 20
    edits = loreft(base, "f7+l7", seed=0).lower().edits
    assert len(edits) == 32
    assert edits[0].down.shape == (4, 4096)


def test_settings_of_engines_hold_all_requests_and_adapters_at_once(tmp_path) -> None:
    from bases import outline_llama_8b
    from serving_peers.settings import engine_settings

    base = outline_llama_8b(tmp_path)
    lengths = [64, 192] * 256
    made = {
        name: engine_settings(name, base, "cuda", lengths, 48, adapters=512, slots=1024, eager=False)
        for name in ("base", "reft", "lora")
    }
    assert "enable_lora" not in made["base"]
    assert made["reft"]["max_loras"] == 1024 and made["lora"]["max_loras"] == 512
    for settings in made.values():
        assert settings["max_num_seqs"] == 512
        assert settings["kv_cache_memory_bytes"] >= (128 + 48) * 512 * 131_072
    pages = made["reft"]["additional_config"]["reft"]["pool_mib"] << 20
    assert pages >= 1024 * 32 * 2 * 4 * 4096 * 2  # every adapter's share: layers x (down + up) x rank x width x bytes
    assert made["base"]["gpu_memory_utilization"] + made["reft"]["gpu_memory_utilization"] < 0.9
