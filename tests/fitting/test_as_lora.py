"""Adapters of other kinds as LoRA directories, run by PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from strong_adapters import strong_loreft
from strong_programs import Strong
from tiny_architectures import tiny
from tiny_models import make_tokenizer, sentences
from transformers import AutoModelForCausalLM

import reft_plugins as reft
from reft_plugins.adapter import Adapter
from reft_plugins.errors import ExportError, UnsupportedProgramError
from reft_plugins.fidelity import gathering
from reft_plugins.fidelity.certificate import read_certificate
from reft_plugins.fidelity.comparison import Accumulator, Fidelity
from reft_plugins.fitting.as_lora import LoraConversion, convert_to_lora
from reft_plugins.fitting.lora_files import lora_adapter, write_lora
from reft_plugins.program import WeightDelta

TOKENS = [1, 261, 350, 383, 316, 310, 261, 25]


class Peft:
    """A directory as PEFT runs it."""

    def __init__(self, base: Path, directory: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        self.model = PeftModel.from_pretrained(model, directory).eval()

    def logits(self, token_ids: Any) -> Any:
        with torch.inference_mode():
            return self.model(input_ids=torch.tensor([list(token_ids)])).logits[0].numpy()

    def against(self, conversion: LoraConversion, base: Path) -> Fidelity:
        """Its fidelity to the adapter that was converted, on the same text as was measured on."""
        runtime, found = reft.runtime("transformers", base, dtype="float32"), Accumulator()
        for text in conversion.texts.held_out:
            wanted = runtime.logits(list(text.tokens), conversion.adapter)
            found.add(wanted, self.logits(text.tokens))
        return found.result()


def written(conversion: LoraConversion, out: Path) -> dict[str, Any]:
    """Write a conversion, and read its configuration."""
    write_lora(conversion, out, "some:v1")
    return dict(json.loads((out / "adapter_config.json").read_text()))


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "own.txt"
    path.write_text("\n\n".join(" ".join(sentences(8, seed)) for seed in range(100)), "utf-8")
    return path


@pytest.fixture(scope="module")
def few_texts() -> Any:
    """Less text to measure on, where the numbers do not matter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gathering, "HELD_OUT_TOKENS", 300)
        yield


def dora(base: Path, seed: int = 1) -> Adapter:
    strong = Strong(base, seed=seed)
    return strong.weights("lora", strong.modules("q_proj", "down_proj", "gate_proj"), use_dora=True)


@pytest.fixture(scope="module")
def full(tiny_llama: Path, few_texts: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[LoraConversion, Path]:
    """DoRA as LoRA of full rank."""
    out = tmp_path_factory.mktemp("full") / "lora"
    conversion = convert_to_lora(dora(tiny_llama), tiny_llama, rank=128)
    write_lora(conversion, out, "some:v1")
    return conversion, out


def test_dora_of_full_rank_is_exact(tiny_llama: Path, full: tuple[LoraConversion, Path]) -> None:
    conversion, out = full
    assert conversion.exact and conversion.strategy == "factors" and not conversion.warnings
    runtime = reft.runtime("transformers", tiny_llama, dtype="float32")
    wanted = runtime.logits(TOKENS, conversion.adapter)
    np.testing.assert_allclose(Peft(tiny_llama, out).logits(TOKENS), wanted, atol=1e-4)
    assert np.abs(runtime.logits(TOKENS) - wanted).max() > 0.5
    certificate = read_certificate(out)
    assert certificate.kind == "exact" and certificate.exported_to == "peft-lora"
    assert all(fact.exact for fact in certificate.nodes) and len(certificate.nodes) == 12
    assert certificate.fidelity is not None and certificate.fidelity.max_logit_difference < 1e-4
    assert certificate.fidelity.base_top1_agreement is not None and certificate.fidelity.base_top1_agreement < 0.8
    config = json.loads((out / "adapter_config.json").read_text())
    assert not config["use_dora"] and not config["lora_bias"] and config["bias"] == "none"


def test_a_low_rank_change_keeps_its_factors(tiny_llama: Path, few_texts: None) -> None:
    strong = Strong(tiny_llama, seed=4)
    deltas = [strong.lora(module) for module in strong.modules("v_proj")]
    conversion = convert_to_lora(strong.adapter(deltas), tiny_llama, rank=4)
    assert conversion.exact
    for delta in deltas:
        assert delta.a is not None and delta.b is not None
        update = conversion.updates[delta.module]
        assert torch.equal(update.right, delta.a) and torch.allclose(update.left, delta.scaling * delta.b)


def test_energy_gives_every_module_a_rank_of_its_own(tiny_llama: Path, few_texts: None, tmp_path: Path) -> None:
    conversion = convert_to_lora(dora(tiny_llama), tiny_llama, rank=0.99)
    config = written(conversion, tmp_path / "lora")
    ranks = {module: len(update.right) for module, update in conversion.updates.items()}
    assert len(set(ranks.values())) > 3 and config["r"] == config["lora_alpha"] == max(ranks.values())
    assert config["rank_pattern"] and config["rank_pattern"].keys() == config["alpha_pattern"].keys()
    assert all(config["alpha_pattern"][name] == rank for name, rank in config["rank_pattern"].items())
    assert all(0 < lost <= 0.01 for lost in conversion.lost.values())
    assert not conversion.exact and "higher rank" in conversion.warnings[0]
    theirs = Peft(tiny_llama, tmp_path / "lora")
    runtime = reft.runtime("transformers", tiny_llama, dtype="float32")
    own = runtime.logits(TOKENS, lora_adapter(conversion))
    np.testing.assert_allclose(theirs.logits(TOKENS), own, atol=1e-4)
    assert np.abs(own - runtime.logits(TOKENS, conversion.adapter)).max() > 1e-3
    found, measured = theirs.against(conversion, tiny_llama), conversion.evaluation.fidelity
    assert found.top1_agreement == pytest.approx(measured.top1_agreement, abs=2e-3)
    assert found.mean_kl == pytest.approx(measured.mean_kl, rel=1e-3)
    assert found.max_logit_difference == pytest.approx(measured.max_logit_difference, abs=1e-4)


def test_modules_that_keep_their_weight_turned(few_texts: None, tmp_path: Path) -> None:
    base, turned = tmp_path / "gpt2", tmp_path / "lora"
    tiny("gpt2", vocab_size=384, n_positions=512).save_pretrained(base)
    make_tokenizer(sentences(4000), 384).save_pretrained(base)
    strong = Strong(base)
    deltas = [
        WeightDelta(module, input_scale=strong.scales(strong.sizes[module][1])) for module in strong.modules("c_fc")
    ]
    conversion = convert_to_lora(strong.adapter(deltas), base, rank=1.0)
    assert conversion.exact and written(conversion, turned)["fan_in_fan_out"]
    runtime = reft.runtime("transformers", base, dtype="float32")
    wanted = runtime.logits(TOKENS, conversion.adapter)
    np.testing.assert_allclose(Peft(base, turned).logits(TOKENS), wanted, atol=1e-4)
    assert np.abs(runtime.logits(TOKENS) - wanted).max() > 0.3


def test_loreft_is_fitted_and_measured(
    tiny_llama: Path, calibration: Path, full: tuple[LoraConversion, Path], tmp_path: Path
) -> None:
    adapter = strong_loreft(tiny_llama, "all", seed=0, layers=(1,))
    conversion = convert_to_lora(adapter, tiny_llama, rank=16, calibration=calibration)
    measured = conversion.evaluation.fidelity
    assert conversion.strategy == "fitted" and not conversion.exact
    assert set(conversion.updates) == {"model.layers.1.mlp.down_proj"}
    assert measured.top1_agreement > 0.9 and measured.kl_removed is not None and measured.kl_removed > 0.9
    assert conversion.evaluation.sources["calibration file"].top1_agreement > 0.95
    assert measured.base_top1_agreement is not None and measured.base_top1_agreement < 0.8
    written(conversion, tmp_path / "lora")
    found = Peft(tiny_llama, tmp_path / "lora").against(conversion, tiny_llama)
    assert found.top1_agreement == pytest.approx(measured.top1_agreement, abs=2e-3)
    assert found.mean_kl == pytest.approx(measured.mean_kl, rel=1e-3)
    (fact,) = read_certificate(tmp_path / "lora").nodes
    assert not fact.exact and "fitted" in fact.exported_as
    assert Peft(tiny_llama, full[1]).against(conversion, tiny_llama).top1_agreement < 0.8  # another adapter's LoRA


def test_virtual_tokens_are_distilled(tiny_llama: Path, calibration: Path, few_texts: None, tmp_path: Path) -> None:
    strong = Strong(tiny_llama, seed=1)
    adapter = strong.adapter(strong.virtual_tokens(4), strong.lora("model.layers.0.self_attn.q_proj"))
    options = {"rank": 8, "calibration": calibration, "calibration_tokens": 2000}
    with pytest.raises(UnsupportedProgramError, match=r"VirtualTokens\(4\).*--distill"):
        convert_to_lora(adapter, tiny_llama, **options)
    conversion = convert_to_lora(adapter, tiny_llama, **options, distill=True, steps=10)
    assert conversion.strategy == "distilled" and len(conversion.updates) == 28
    assert {len(update.right) for update in conversion.updates.values()} == {8}
    divergence = conversion.details["distillation"]  # 0.26 nats before the first step, where virtual tokens are missing
    assert divergence[10] < 0.75 * divergence[0]
    removed = conversion.evaluation.fidelity.kl_removed
    assert removed is not None and removed > 0.5
    written(conversion, tmp_path / "lora")
    lora = Peft(tiny_llama, tmp_path / "lora").logits(TOKENS)
    runtime = reft.runtime("transformers", tiny_llama, dtype="float32")
    np.testing.assert_allclose(lora, runtime.logits(TOKENS, lora_adapter(conversion)), atol=1e-4)


def test_what_no_lora_holds_is_refused_by_name(tiny_llama: Path) -> None:
    strong = Strong(tiny_llama)
    norm = strong.adapter(WeightDelta("model.norm", new_weight=strong.scales(128)))
    with pytest.raises(UnsupportedProgramError, match=r"model\.norm.*--distill.*--to peft"):
        convert_to_lora(norm, tiny_llama, rank=8)
    limited = strong.adapter(strong.low_rank(1, "f2"))
    with pytest.raises(UnsupportedProgramError, match=r"layer 1.*positions f2.*--approximate"):
        convert_to_lora(limited, tiny_llama, rank=8)
    for rank in (0, 0.0, 1.5, -1):
        with pytest.raises(ExportError, match="whole number"):
            convert_to_lora(dora(tiny_llama), tiny_llama, rank=rank)
