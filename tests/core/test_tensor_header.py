"""Headers of safetensors files that nobody wrote in good faith, read from a plain folder."""

from __future__ import annotations

import io
import json
import math
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reft_plugins.adapter import Adapter
from reft_plugins.errors import AdapterError
from reft_plugins.formats.tensor_files import read_safetensors
from reft_plugins.limits import DTYPES, MAX_DIMENSIONS, MAX_EMPTY_DIMENSION, MAX_HEADER_BYTES
from reft_plugins.manifest import BaseModelIdentity, sha256
from reft_plugins.tensor_header import check_header

Header = dict[str, Any]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = BaseModelIdentity(
        name="x", architecture="X", hidden_size=8, num_hidden_layers=2, fingerprint="sha256:" + "5" * 64
    )
    shapes = {"rotate": (2, 8), "weight": (2, 8), "bias": (2,)}
    tensors = {f"layers.1.block_output.0.{name}": torch.randn(shape) for name, shape in shapes.items()}
    made = Adapter.create("loreft", {"rank": 2, "positions": "f2"}, tensors, base)
    return made.save(tmp_path_factory.mktemp("adapter"))


def _with(adapter: Path, folder: Path, header: bytes | None, data: bytes | None = None) -> Path:
    """The adapter with another header, and a manifest that promises the digest of what results."""
    blob = (adapter / "adapter.safetensors").read_bytes()
    length = int.from_bytes(blob[:8], "little")
    header = blob[8 : 8 + length] if header is None else header
    made = len(header).to_bytes(8, "little") + header + (blob[8 + length :] if data is None else data)
    shutil.copytree(adapter, folder)
    (folder / "adapter.safetensors").write_bytes(made)
    manifest = json.loads((folder / "adapter.json").read_text())
    manifest["tensors"] = {"sha256": sha256(made), "size": len(made)}
    (folder / "adapter.json").write_text(json.dumps(manifest))
    return folder


def _header(adapter: Path) -> Header:
    blob = (adapter / "adapter.safetensors").read_bytes()
    found: Header = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])
    return found


def _one(**changes: object) -> Callable[[Header], object]:
    return lambda header: next(iter(header.values())).update(changes)


CASES: dict[str, tuple[Callable[[Header], object], str]] = {
    "another dtype": (_one(dtype="F8_E4M3"), "'F8_E4M3' is not read"),
    "complex numbers": (_one(dtype="C64"), "'C64' is not read"),
    "a dtype nobody knows": (_one(dtype="F1024"), "'F1024' is not read"),
    "a dtype that is no text": (_one(dtype=["F32"]), "not read|not a safetensors"),
    "many dimensions": (_one(shape=[1] * (MAX_DIMENSIONS + 1)), "dimensions exceed the limit"),
    "no shape": (_one(shape=None), "no dtype and shape"),
    "negative": (_one(shape=[-2]), "not a safetensors file"),
    "a huge empty tensor": (
        lambda h: h.update(x={"dtype": "F32", "shape": [0, MAX_EMPTY_DIMENSION + 1], "data_offsets": [0, 0]}),
        "no elements, yet a dimension",
    ),
    "offsets outside": (_one(data_offsets=[0, 10**9]), "not a safetensors file"),
    "offsets that overlap": (lambda h: [e.update(data_offsets=[0, 64]) for e in h.values()], "not a safetensors file"),
    "an entry that is none": (lambda h: h.update(x=1), "no dtype and shape"),
}


@pytest.mark.parametrize("case", CASES)
def test_headers_that_lie(adapter: Path, tmp_path: Path, case: str) -> None:
    edit, message = CASES[case]
    header = _header(adapter)
    edit(header)
    with pytest.raises(AdapterError, match=message):
        Adapter.load(_with(adapter, tmp_path / "x", json.dumps(header).encode()))


def test_the_header_as_it_was(adapter: Path, tmp_path: Path) -> None:
    """Without this, the refusals could have any other reason."""
    same = _with(adapter, tmp_path / "same", json.dumps(_header(adapter)).encode())
    assert Adapter.load(same).lower().edits
    described = {"__metadata__": {"format": "pt"}, **_header(adapter)}
    assert Adapter.load(_with(adapter, tmp_path / "described", json.dumps(described).encode())).lower().edits


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"", "ends within its header"),
        (b"[]", "no JSON object"),
        (b"[" * 100_000, "its header"),
        (b'{"a":' + b"9" * 10_000 + b"}", "its header"),
        (b"\xff\xfe", "its header"),
        (b" " * (MAX_HEADER_BYTES + 1), "exceeds the limit"),
    ],
)
def test_what_is_no_header(adapter: Path, tmp_path: Path, header: bytes, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        Adapter.load(_with(adapter, tmp_path / "x", header))


def test_a_tensor_named_twice(adapter: Path, tmp_path: Path) -> None:
    text = json.dumps(_header(adapter))
    name, entry = next(iter(_header(adapter).items()))
    twice = f"{{{json.dumps(name)}: {json.dumps(entry)}, {text[1:]}"
    assert json.loads(twice) == json.loads(text)
    with pytest.raises(AdapterError, match="duplicate key"):
        Adapter.load(_with(adapter, tmp_path / "x", twice.encode()))
    with pytest.raises(AdapterError, match="duplicate key"):
        read_safetensors(tmp_path / "x" / "adapter.safetensors")


@pytest.mark.parametrize("length", [8, 100, 2**31, 2**63, 2**64 - 1])
def test_a_length_that_is_not_there(tmp_path: Path, length: int) -> None:
    data = length.to_bytes(8, "little") + b"{}"
    with pytest.raises(AdapterError, match="exceeds the limit|ends within"):
        check_header(io.BytesIO(data), "x")
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(AdapterError, match="exceeds the limit|ends within"):
        read_safetensors(tmp_path / "x.safetensors")


def test_every_dtype_that_is_read_can_be_read(tmp_path: Path) -> None:
    import safetensors.torch

    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64)
    kinds += (torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
    blob = safetensors.torch.save({str(kind): torch.ones(3, dtype=kind) for kind in kinds})
    check_header(io.BytesIO(blob), "x")
    header = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])
    assert {entry["dtype"] for entry in header.values()} == DTYPES


def test_a_file_larger_than_memory_is_an_error(adapter: Path, tmp_path: Path) -> None:
    """A sparse file costs its author nothing."""
    folder = Path(shutil.copytree(adapter, tmp_path / "sparse"))
    size = 1 << 36
    os.truncate(folder / "adapter.safetensors", size)
    manifest = json.loads((folder / "adapter.json").read_text())
    manifest["tensors"]["size"] = size
    (folder / "adapter.json").write_text(json.dumps(manifest))
    program = f"""
import resource
from reft_plugins.adapter import Adapter
from reft_plugins.errors import AdapterError
resource.setrlimit(resource.RLIMIT_AS, ({16 << 30}, {resource.RLIM_INFINITY}))
try:
    Adapter.load({str(folder)!r})
except AdapterError as error:
    assert "do not fit into this machine's memory" in str(error), error
else:
    raise AssertionError("it was read")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


@settings(max_examples=300, deadline=None)
@given(places=st.lists(st.integers(0, 100_000), min_size=1, max_size=4), new=st.binary(max_size=4))
def test_mutated_headers(
    adapter: Path, tmp_path_factory: pytest.TempPathFactory, places: list[int], new: bytes
) -> None:
    blob = (adapter / "adapter.safetensors").read_bytes()
    header = bytearray(blob[8 : 8 + int.from_bytes(blob[:8], "little")])
    for place in places:
        header[place % len(header) : place % len(header) + len(new)] = new
    folder = tmp_path_factory.mktemp("mutated") / "x"
    try:
        loaded = Adapter.load(_with(adapter, folder, bytes(header)))
        loaded.lower()
    except AdapterError:
        return
    finally:
        shutil.rmtree(folder)
    assert sum(math.prod(tensor.shape) for tensor in loaded.tensors.values()) == 34
