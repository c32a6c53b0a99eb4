"""Addresses of registries: the operator of a server may name them, its clients may not."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace

import pytest
from strong_adapters import strong_loreft

ADDRESSES = ("oci://far.example/team/sentiment:prod", "hf://owner/sentiment:prod", "oci://far.example:5000/x@v1")


@pytest.mark.parametrize("address", ADDRESSES)
def test_a_request_cannot_make_the_server_ask_an_address(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from reft_vllm.front_end import names
    from reft_vllm.front_end.resolver import is_reference

    asked: list[str] = []
    monkeypatch.setattr(names, "resolve", asked.append)
    models = SimpleNamespace(model_config=SimpleNamespace(model="base"))
    request = SimpleNamespace(lora_name="x", lora_path=address)
    answer = asyncio.run(names.load(models, None, request, None))  # type: ignore[arg-type]
    assert answer.error.code == 400 and address in answer.error.message
    assert not is_reference(address)
    assert asked == []
    assert is_reference("sentiment:prod") and is_reference("team/sentiment@v3")


def test_the_operator_may_name_one(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from reft_plugins import references
    from reft_vllm.serve import _admit

    folder = strong_loreft(tiny_llama, "f1", seed=1).save(tmp_path / "pulled")
    monkeypatch.setattr(references, "resolve", lambda reference: folder)
    modules, programs = _admit(str(tiny_llama), {"x": ADDRESSES[0], "y": "sentiment:prod"})
    assert modules == [f"x={folder}", "y=sentiment:prod"]
    assert len(programs) == 2
