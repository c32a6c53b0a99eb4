"""Where calibration and held-out text comes from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from raw_programs import as_adapter, where_is

from reft_plugins.adapter import Adapter
from reft_plugins.errors import DataError
from reft_plugins.fidelity.general_text import PASSAGES
from reft_plugins.fidelity.texts import MAX_LENGTH, gather, read_texts
from reft_plugins.positions import Positions
from reft_plugins.program import Edit, Site


@pytest.fixture
def adapter(tiny_llama: Path) -> Adapter:
    shift = torch.randn(128, generator=torch.Generator().manual_seed(0))
    return as_adapter(tiny_llama, Edit(Site(1), Positions.parse("all"), shift=shift))


def write_rows(path: Path, count: int) -> Path:
    path.write_text("\n".join(json.dumps({"prompt": p, "completion": c}) for p, c in where_is(count, seed=9)))
    return path


def test_calibration_and_held_out_text_share_nothing(runtime: Any, adapter: Adapter, tmp_path: Path) -> None:
    texts = gather(runtime, adapter, calibration_tokens=8000, calibration=write_rows(tmp_path / "task.jsonl", 60))
    fitted, measured = ({text.tokens for text in part} for part in (texts.calibration, texts.held_out))
    assert fitted and measured and not fitted & measured
    assert sum(len(text.tokens) for text in texts.calibration) >= 7500
    sources = {"calibration file", "general passages", "base samples", "adapter samples"}
    assert {text.source for text in texts.calibration} == sources == {text.source for text in texts.held_out}


def test_a_held_out_file_leaves_the_calibration_file_whole(runtime: Any, adapter: Adapter, tmp_path: Path) -> None:
    own, held_out = write_rows(tmp_path / "task.jsonl", 40), tmp_path / "held_out.txt"
    held_out.write_text("The first paragraph\nhas two lines.\n\nThe second has one.\n\nThe second has one.")
    texts = gather(runtime, adapter, calibration_tokens=8000, calibration=own, held_out=held_out)
    assert sum(text.source == "calibration file" for text in texts.calibration) == 40
    found = [text for text in texts.held_out if text.source == "held-out file"]
    assert [runtime.tokenizer.decode(text.tokens[1:]) for text in found] == [
        "The first paragraph\nhas two lines.",
        "The second has one.",
    ]


def test_text_is_sampled_under_the_adapter_and_reproducibly(runtime: Any, adapter: Adapter) -> None:
    first, again = (gather(runtime, adapter, calibration_tokens=0, seed=3) for _ in range(2))
    assert first.held_out == again.held_out
    assert gather(runtime, adapter, calibration_tokens=0, seed=4).held_out != first.held_out
    assert first.calibration == []
    by_source = {
        source: {token for text in first.held_out if text.source == source for token in text.tokens}
        for source in ("base samples", "adapter samples")
    }
    own, other = by_source.values()
    assert len(own & other) < 0.8 * len(own | other), "the adapter says other things than the base"


def test_sampling_does_not_disturb_the_callers_random_numbers(runtime: Any, adapter: Adapter) -> None:
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    gather(runtime, adapter, calibration_tokens=0)
    assert torch.equal(torch.rand(3), wanted)


def test_prompts_and_completions_are_tokenized_as_in_training(runtime: Any, tmp_path: Path) -> None:
    rows = read_texts(write_rows(tmp_path / "task.jsonl", 5), runtime.tokenizer, "mine")
    prompt, answer = where_is(5, seed=9)[0]
    assert rows[0].tokens[: rows[0].prompt_length] == tuple(runtime.tokenizer(prompt).input_ids)
    rest = rows[0].tokens[rows[0].prompt_length :]
    assert rest == (*runtime.tokenizer(answer, add_special_tokens=False).input_ids, 2)


def test_long_text_is_cut(runtime: Any, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("word " * 2000)
    (text,) = read_texts(tmp_path / "long.txt", runtime.tokenizer, "mine")
    assert len(text.tokens) == MAX_LENGTH


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.jsonl", '{"prompt": "a", "completion": "b"}\n{"prompt": "a"}', r"bad\.jsonl, line 2: field 'completion'"),
        ("bad.txt", " \n\n \n", r"bad\.txt: no text"),
        ("bad.txt", b"\xff\xfe\xfa", r"bad\.txt: cannot read"),
    ],
)
def test_unusable_files_are_named(name: str, content: str | bytes, message: str, runtime: Any, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        read_texts(tmp_path / name, runtime.tokenizer, "mine")


def test_passages_are_many_and_distinct() -> None:
    assert len(set(PASSAGES)) == len(PASSAGES) >= 20
    assert all(80 < len(passage) < 600 for passage in PASSAGES)
