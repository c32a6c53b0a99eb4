"""What stands in a written file: every number format, from shards, in little memory, the same bytes every time."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_files import write
from safetensors.torch import load_file, save_file
from tiny_bases import make_base
from tiny_models import sentences
from transformers import AutoConfig, AutoTokenizer

from reft_ollama.architectures.table import architecture_of
from reft_ollama.llama_cpp import compare_llama_cpp
from reft_ollama.plan.planning import Plan, make_plan
from reft_ollama.tokenizers.conversion import convert_tokenizer
from reft_ollama.weights import quantization
from reft_ollama.weights.assembly import assemble
from reft_ollama.weights.checkpoint import Checkpoint
from reft_ollama.weights.formats import FORMATS, encode
from reft_ollama.weights.gguf_file import GgufFile
from reft_ollama.weights.quantization import quantise
from reft_ollama.weights.rounding import Rounded
from reft_plugins import plugins
from reft_plugins.errors import BaseModelError, ExportError
from reft_plugins.fitting.updates import LowRank
from reft_plugins.program import Program, WeightDelta

PEERS = Path(__file__).resolve().parents[2] / "benchmarks" / "export_peers"
ODD = {"intermediate_size": 200}
"""Rows of `down_proj` that do not divide into blocks of 32."""


NOTHING = Program(())


def tensors(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base("llama", tmp_path_factory.mktemp("odd") / "base", hidden_size=128, **ODD)


@pytest.fixture(scope="module")
def blocks_of_256(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every row divides into the quantiser's largest blocks."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8}
    return make_base("llama", tmp_path_factory.mktemp("wide") / "base", **sizes)


def in_shards(base: Path, target: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """The same model in another number format, two files with an index."""
    shutil.copytree(base, target)
    weights = load_file(target / "model.safetensors")
    (target / "model.safetensors").unlink()
    names = sorted(weights)
    placed = {name: f"model-{1 + index % 2:05}-of-00002.safetensors" for index, name in enumerate(names)}
    for file in set(placed.values()):
        save_file({name: weights[name].to(dtype) for name in names if placed[name] == file}, target / file)
    (target / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    return target


def test_types_of_tensors(odd: Path, tmp_path: Path) -> None:
    kinds = {
        dtype: {name: t.tensor_type.name for name, t in tensors(write(odd, NOTHING, tmp_path / dtype, dtype)).items()}
        for dtype in ("f32", "f16", "bf16", "q8_0")
    }
    for dtype, found in kinds.items():
        assert {kind for name, kind in found.items() if "norm" in name} == {"F32"}
        assert found["token_embd.weight"] == found["blk.1.attn_q.weight"] == dtype.upper()
    assert kinds["q8_0"]["blk.0.ffn_down.weight"] == "F16"
    assert set(kinds["f32"].values()) == {"F32"}


@pytest.mark.parametrize(("dtype", "error"), [("f32", 0.0), ("f16", 2**-11), ("bf16", 2**-8), ("q8_0", 0.57 / 127)])
def test_values_are_those_of_the_base(dtype: str, error: float, odd: Path, tmp_path: Path) -> None:
    written = tensors(write(odd, NOTHING, tmp_path / "file", dtype))
    base = load_file(odd / "model.safetensors")
    for name, own in (("token_embd", "model.embed_tokens"), ("blk.2.ffn_up", "model.layers.2.mlp.up_proj")):
        stored, wanted = written[f"{name}.weight"], base[f"{own}.weight"].numpy()
        values = gguf.dequantize(stored.data, stored.tensor_type)
        distance = np.abs(values - wanted)
        # Blocks of 32 share a scale; the others round each number by itself.
        size = (
            np.abs(wanted).reshape(-1, 32).max(1).repeat(32).reshape(wanted.shape)
            if dtype == "q8_0"
            else np.abs(wanted)
        )
        assert (distance <= error * size + 1e-7).all()
        assert (distance > error * size * 0.2).any() or dtype == "f32", "rounding must show"


def test_rounded_weights_are_what_the_file_gives_back(odd: Path, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(odd)
    weights = assemble(Plan(), Checkpoint(odd), architecture_of(config), config)
    for dtype in ("f16", "bf16", "q8_0"):
        written = tensors(write(odd, NOTHING, tmp_path / dtype, dtype))
        for name, own in (
            ("blk.0.ffn_down", "model.layers.0.mlp.down_proj"),
            ("blk.3.ffn_up", "model.layers.3.mlp.up_proj"),
        ):
            stored = written[f"{name}.weight"]
            given = Rounded(weights, dtype).module(own)["weight"].numpy()
            np.testing.assert_array_equal(given, gguf.dequantize(stored.data, stored.tensor_type))
            assert not np.array_equal(given, weights.module(own)["weight"].numpy())


def test_eight_bit_files_are_those_of_llama_cpp(odd: Path, tmp_path: Path) -> None:
    """Of llama.cpp's quantiser in C, from a float32 file: the same types and, but for ties, the same numbers."""
    source = write(odd, NOTHING, tmp_path / "f32.gguf", "f32")
    warnings = quantise(source, tmp_path / "theirs.gguf", "q8_0")
    assert warnings == ["4 matrices whose rows do not divide into blocks of q8_0 have a larger format"]
    theirs = tensors(tmp_path / "theirs.gguf")
    for name, tensor in tensors(write(odd, NOTHING, tmp_path / "ours.gguf", "q8_0")).items():
        assert tensor.tensor_type == theirs[name].tensor_type
        assert np.mean(tensor.data != theirs[name].data) < 1e-4


def test_quantised_files_run_and_differ_by_their_size(blocks_of_256: Path, tmp_path: Path) -> None:
    runtime: Any = plugins.runtimes.get("transformers")(blocks_of_256, dtype="float32")
    texts = [runtime.tokenizer(" ".join(sentences(6, seed))).input_ids for seed in (1, 2)]
    source = write(blocks_of_256, NOTHING, tmp_path / "f16.gguf", "f16")
    found = {"f16": source, "q8_0": write(blocks_of_256, NOTHING, tmp_path / "q8_0.gguf", "q8_0")}
    for dtype in ("q6_k", "q5_k_m", "q4_k_m", "q4_0"):
        found[dtype] = tmp_path / f"{dtype}.gguf"
        assert quantise(source, found[dtype], dtype) == []
        assert gguf.GGUFReader(found[dtype]).get_field("general.file_type").contents() == FORMATS[dtype].file_type
    sizes = [path.stat().st_size for path in found.values()]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] < 0.5 * sizes[0]
    kl = [compare_llama_cpp(path, texts, runtime.logits).mean_kl for path in found.values()]
    assert kl[0] < 1e-4 and kl[1] < 0.05 and kl == sorted(kl), kl
    assert kl[1] > 10 * kl[0], "eight bits must show"


def test_a_missing_or_failing_quantiser_is_an_error(
    blocks_of_256: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ExportError, match=r"quantiser could not make q4_k_m \(status 1\): .{10}"):
        quantise(tmp_path / "broken", tmp_path / "out", "q4_k_m")
    with pytest.raises(OSError, match="could not go on writing") as failure:
        quantise(write(blocks_of_256, NOTHING, tmp_path / "f16.gguf", "f16"), Path("/dev/full"), "q4_k_m")
    assert failure.value.errno == errno.ENOSPC
    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r"pip install llama-cpp-python.*ollama create NAME -q q4_k_m"):
        quantise(tmp_path / "broken", tmp_path / "out", "q4_k_m")


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32", "q8_0"])
def test_shards_give_the_bytes_of_one_file(dtype: str, blocks_of_256: Path, tmp_path: Path) -> None:
    sharded = in_shards(blocks_of_256, tmp_path / "sharded")
    assert len(list(sharded.glob("*.safetensors"))) == 2
    rounded = in_shards(blocks_of_256, tmp_path / "rounded", torch.float32)
    for file in rounded.glob("*.safetensors"):
        save_file({name: t.bfloat16().float() for name, t in load_file(file).items()}, file)
    assert (
        write(sharded, NOTHING, tmp_path / "a", dtype).read_bytes()
        == write(rounded, NOTHING, tmp_path / "b", dtype).read_bytes()
    )


def test_blocks_of_rows_are_the_whole_matrix(blocks_of_256: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Untouched, with a low-rank update and with DoRA's, in blocks of very few rows."""
    config = AutoConfig.from_pretrained(blocks_of_256)
    draw = torch.Generator().manual_seed(0)
    a, b, size = (torch.randn(*shape, generator=draw) for shape in ((4, 256), (512, 4), (512,)))
    up, gate = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.gate_proj"
    delta = WeightDelta(gate, a, b, scaling=0.5, magnitude=size, output_scale=size.flip(0))
    architecture = architecture_of(config)
    plan = make_plan(Program((delta,)), architecture, config)
    fitted = {gate: [LowRank(b, a)]}
    weights: Any = assemble(plan, Checkpoint(blocks_of_256), architecture, config, fitted)
    monkeypatch.setattr("reft_ollama.weights.checkpoint.BLOCK_BYTES", 5000)
    for name, changed in ((up, False), (gate, True)):
        pieces = [piece.clone() for piece in weights.blocks(name)["weight"]]
        assert len(pieces) > 100
        torch.testing.assert_close(torch.cat(pieces), weights.module(name)["weight"])
        same = torch.equal(torch.cat(pieces), Checkpoint(blocks_of_256).load(f"{name}.weight"))
        assert same is not changed


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_a_value_that_is_not_finite_is_found_anywhere(value: float, stored: torch.dtype) -> None:
    draw = np.random.default_rng(0)
    for kind in (FORMATS[name].matrices for name in ("f32", "f16", "bf16", "q8_0")):
        assert kind is not None
        for _ in range(20):
            matrix = torch.zeros(5, 96, dtype=stored)
            encode("sound", matrix, kind)
            matrix.view(-1)[draw.integers(480)] = value
            with pytest.raises(ExportError, match=r"'mine' has values that are not finite"):
                encode("mine", matrix, kind)


def test_values_too_large_for_a_format() -> None:
    encode("fits", torch.full((2, 32), 65504.0), gguf.GGMLQuantizationType.F16)
    encode("fits", torch.full((2, 32), 65504.0 * 127), gguf.GGMLQuantizationType.Q8_0)
    for kind, value in ((gguf.GGMLQuantizationType.F16, 7e4), (gguf.GGMLQuantizationType.Q8_0, 9e6)):
        with pytest.raises(ExportError, match=f"does not fit {kind.name.lower()}.*--dtype bf16 or f32"):
            encode("large", torch.full((2, 32), -value), kind)


def test_broken_bases_are_refused_by_name(blocks_of_256: Path, tmp_path: Path) -> None:
    cut = in_shards(blocks_of_256, tmp_path / "cut")
    file = cut / "model-00002-of-00002.safetensors"
    os.truncate(file, file.stat().st_size - 10)
    with pytest.raises(BaseModelError, match=r"00002-of-00002.*not a complete safetensors file"):
        Checkpoint(cut)
    file.unlink()
    with pytest.raises(BaseModelError, match=r"00002-of-00002.*No such file"):
        Checkpoint(cut)
    odd = in_shards(blocks_of_256, tmp_path / "odd")
    index = odd / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("lm_head.weight", "lm_foot.weight"))
    with pytest.raises(BaseModelError, match=r"lm_foot.weight.*no file of the model holds"):
        Checkpoint(odd)
    eight = tmp_path / "eight"
    shutil.copytree(blocks_of_256, eight)
    weights = load_file(eight / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**weights, name: weights[name].to(torch.float8_e4m3fn)}, eight / "model.safetensors")
    with pytest.raises(BaseModelError, match=r"up_proj.weight' is stored as F8_E4M3.*quantised from"):
        write(eight, NOTHING, tmp_path / "file", "f16")
    save_file({**weights, "model.layers.0.mlp.router.weight": torch.ones(2, 2)}, eight / "model.safetensors")
    with pytest.raises(ExportError, match=r"no place for its tensor 'model.layers.0.mlp.router.weight'"):
        write(eight, NOTHING, tmp_path / "file", "f16")


def test_the_size_of_all_tensors_is_known_beforehand(odd: Path, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(odd)
    architecture = architecture_of(config)
    tokenizer = convert_tokenizer(AutoTokenizer.from_pretrained(odd), config.vocab_size)
    file = GgufFile(assemble(Plan(), Checkpoint(odd), architecture, config), architecture, tokenizer, dtype="q8_0")
    seen: list[tuple[int, int]] = []
    file.write(tmp_path / "file", lambda done, total: seen.append((done, total)))
    assert file.tensor_bytes == sum(tensor.n_bytes for tensor in tensors(tmp_path / "file").values())
    assert seen[-1] == (file.tensor_bytes, file.tensor_bytes)
    assert 0 < (tmp_path / "file").stat().st_size - file.tensor_bytes < 64_000
