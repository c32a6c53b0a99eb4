"""Exports as models of a server with Ollama's interface, whose answers are those of the adapter in transformers.

The server is a real Ollama where there is one (`pytest -m ollama` with OLLAMA_HOST), and one that runs the models in
llama.cpp everywhere.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from raw_programs import as_adapter
from standing_in import standing_in
from test_gguf_beside_base import random_deltas
from tiny_models import sentences
from transformers import AutoTokenizer

from reft_ollama.export import export_ollama
from reft_ollama.tokenizers.virtual_tokens import names
from reft_plugins import plugins
from reft_plugins.adapter import Adapter
from reft_plugins.positions import Positions
from reft_plugins.program import Edit, Site, VirtualTokens

NEW_TOKENS = 6
CLEAR = 0.04
"""Least difference between the two likeliest tokens where answers are compared: ten times what float16 in a server's
cache of keys and values changes."""

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
VIRTUAL = 6


@pytest.fixture(scope="module")
def base(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a chat template."""
    folder = tmp_path_factory.mktemp("chatting") / "tiny-llama"
    shutil.copytree(tiny_llama, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def chatting(base: Path) -> Iterator[Any]:
    """The transformers runtime on it."""
    runtime = plugins.runtimes.get("transformers")(base, dtype="float32")
    yield runtime
    runtime.close()


@pytest.fixture(params=["llama.cpp", pytest.param("ollama", marks=pytest.mark.ollama)])
def host(request: pytest.FixtureRequest) -> Iterator[str]:
    """Address of a server."""
    if request.param == "ollama":
        yield os.environ["OLLAMA_HOST"]
    else:
        with standing_in() as server:
            yield server.address


def constant(base: Path) -> Adapter:
    shift = torch.randn(128, generator=torch.Generator().manual_seed(4))
    return as_adapter(base, Edit(Site(1), Positions.parse("all"), shift=shift))


def prompt_tuning(base: Path) -> Adapter:
    return as_adapter(base, VirtualTokens(torch.randn(VIRTUAL, 128, generator=torch.Generator().manual_seed(5)) * 0.3))


def lora(base: Path) -> Adapter:
    return as_adapter(base, *random_deltas(base, "up_proj", "q_proj", "v_proj", size=0.1))


KINDS: dict[str, Callable[[Path], Adapter] | None] = {
    "lora": lora,
    "constant": constant,
    "prompt-tuning": prompt_tuning,
    "loreft": None,
}


class Clear:
    """Greedy answers of the adapter that rounding does not change, and that the base model does not give."""

    def __init__(self, runtime: Any, adapter: Adapter) -> None:
        self._runtime, self._adapter = runtime, adapter

    def answer(self, ids: list[int]) -> str | None:
        runtime, adapter = self._runtime, self._adapter
        answer = runtime.generate([ids], [adapter], max_new_tokens=NEW_TOKENS)[0]
        logits = runtime.logits([*ids, *answer.token_ids], adapter)[len(ids) - 1 :]
        first, second = np.sort(logits, axis=1)[:, :-3:-1].T
        if (first - second).min() <= CLEAR:
            return None
        changed = answer.text != runtime.generate([ids], max_new_tokens=NEW_TOKENS)[0].text
        return answer.text if changed else None


def starts() -> list[str]:
    """Beginnings of sentences."""
    return [" ".join(text.split()[:4]) for text in sentences(120, seed=77)]


@pytest.mark.parametrize("kind", KINDS)
def test_answers_of_a_created_model(
    kind: str, host: str, base: Path, chatting: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    import ollama

    make = KINDS[kind]
    adapter = request.getfixturevalue("trained_loreft") if make is None else make(base)
    name = f"reft-plugins-test/{kind}:v1"
    settings: dict[str, Any] = {} if make else {"strategy": "neurons", "calibration_tokens": 1500}
    result = export_ollama(adapter, base, tmp_path, dtype="f32", create=name, host=host, **settings)
    assert not [note for note in result.warnings if note.startswith("Ollama shows")]
    client, clear = ollama.Client(host=host), Clear(chatting, adapter)
    options = {"num_predict": NEW_TOKENS, "temperature": 0}
    opening = "".join(names(VIRTUAL)) + "<s>" if kind == "prompt-tuning" else ""
    compared = {"raw": 0, "chat": 0}
    try:
        for start in starts():
            expected = clear.answer(chatting.tokenizer(start).input_ids) if compared["raw"] < 2 else None
            if expected is not None:
                answer = client.generate(name, opening + start, raw=True, options=options)
                assert answer.response.strip() == expected.strip()
                compared["raw"] += 1
            messages = [{"role": "system", "content": "Tell a story."}, {"role": "user", "content": start}]
            ids = chatting.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            expected = clear.answer(ids) if compared["chat"] < 2 else None
            if expected is not None:
                reply = client.chat(name, messages, options=options).message.content
                assert reply is not None and reply.strip() == expected.strip()
                compared["chat"] += 1
            if min(compared.values()) == 2:
                break
        assert min(compared.values()) == 2, f"too few clear answers to compare: {compared}"
    finally:
        client.delete(name)
