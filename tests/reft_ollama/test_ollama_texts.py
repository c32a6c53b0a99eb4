"""Where calibration and held-out text comes from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from raw_programs import as_adapter, where_is

from reft_plugins import plugins
from reft_plugins.adapter import Adapter
from reft_plugins.errors import DataError
from reft_plugins.fidelity.gathering import gather
from reft_plugins.fidelity.general_text import PASSAGES
from reft_plugins.fidelity.near_duplicates import near_duplicates
from reft_plugins.fidelity.text_files import read_texts
from reft_plugins.fidelity.texts import MAX_LENGTH, Texts
from reft_plugins.positions import Positions
from reft_plugins.program import Edit, Site, VirtualTokens


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


def test_long_lines_are_taken_in_pieces_and_cut(runtime: Any, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text(" ".join(f"word{n}" for n in range(2000)) + "\n\nshort one")
    *pieces, last = read_texts(tmp_path / "long.txt", runtime.tokenizer, "mine")
    assert len(pieces) > 8 and max(len(text.tokens) for text in pieces) == MAX_LENGTH
    starts = [runtime.tokenizer.decode(text.tokens[1:]).split()[0] for text in pieces]
    assert starts[0] == "word0" and len(set(starts)) == len(starts), "pieces follow one another"
    assert all(start.removeprefix("word").isdigit() for start in starts), "pieces begin with whole words"
    assert runtime.tokenizer.decode(last.tokens[1:]) == "short one"


def test_a_word_without_end_is_cut_too(runtime: Any, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("abcdefghij" * 1000)
    found = read_texts(tmp_path / "long.txt", runtime.tokenizer, "mine")
    assert found and all(len(text.tokens) <= MAX_LENGTH for text in found)


def test_a_large_file_is_read_as_far_as_needed(runtime: Any, tmp_path: Path) -> None:
    lines = "\n\n".join(f"Paragraph number {n} of many." for n in range(1000))
    (tmp_path / "large.txt").write_bytes(lines.encode() + b"\n\n" * 20_000 + b"\xff")
    found = read_texts(tmp_path / "large.txt", runtime.tokenizer, "mine", max_tokens=500)
    assert 500 <= sum(len(text.tokens) for text in found) < 700, "the end, which is not UTF-8, was not reached"
    with pytest.raises(DataError, match="large.txt.*not UTF-8"):
        read_texts(tmp_path / "large.txt", runtime.tokenizer, "mine")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.jsonl", '{"prompt": "a", "completion": "b"}\n{"prompt": "a"}', r"bad\.jsonl, line 2: field 'completion'"),
        ("bad.jsonl", "", r"bad\.jsonl: no examples"),
        ("chat.jsonl", '{"messages": []}', r"chat\.jsonl, line 1: field 'prompt' is missing.*'messages'"),
        ("bad.jsonl", b'{"prompt": "\xff"}', r"bad\.jsonl, line 1: not JSON"),
        ("bad.txt", " \n\n \n", r"bad\.txt: no text in it \(mine\)"),
        ("bad.txt", b"\xff\xfe\xfa", r"bad\.txt: cannot read the mine: it is not UTF-8"),
    ],
)
def test_unusable_files_are_named(name: str, content: str | bytes, message: str, runtime: Any, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        read_texts(tmp_path / name, runtime.tokenizer, "mine")


@pytest.mark.parametrize("name", ["missing.txt", "missing.jsonl", "folder.txt", "folder.jsonl"])
def test_files_that_are_none_are_named(name: str, runtime: Any, adapter: Adapter, tmp_path: Path) -> None:
    if name.startswith("folder"):
        (tmp_path / name).mkdir()
    for option in ("calibration", "held_out"):
        with pytest.raises(DataError, match=f"{name}: cannot read"):
            gather(runtime, adapter, calibration_tokens=0, **{option: tmp_path / name})


def own_texts(texts: Texts) -> list[tuple[int, ...]]:
    return [text.tokens for text in texts.calibration if text.source == "calibration file"]


def test_text_that_is_held_out_is_not_fitted_on_even_if_written_differently(
    runtime: Any, adapter: Adapter, tmp_path: Path
) -> None:
    paragraphs = [
        "The old sailor paints the harbour in the morning, before the market opens and the noise begins.",
        "Count: one, two, three, four. The brave doctor visits the castle and stays there until the evening.",
        "A small red fox follows the farmer across the field, and neither of them looks back even once.",
    ]
    held_out, own = tmp_path / "held_out.txt", tmp_path / "own.txt"
    held_out.write_text("\n\n".join(paragraphs[:2]))
    own.write_text("\n\n".join([paragraphs[0].upper().replace(",", " -"), paragraphs[1] + " Yes.", paragraphs[2]]))
    texts = gather(runtime, adapter, calibration_tokens=4000, calibration=own, held_out=held_out)
    assert [runtime.tokenizer.decode(tokens[1:]) for tokens in own_texts(texts)] == [paragraphs[2]]
    assert any("2 of 3 texts of the calibration file are nearly the same" in warning for warning in texts.warnings)
    apart = gather(runtime, adapter, calibration_tokens=4000, calibration=own)
    assert len(own_texts(apart)) == 2 and not any("nearly the same" in warning for warning in apart.warnings)


def test_other_words_make_another_text() -> None:
    text = "The old sailor paints the harbour in the morning, before the market opens."
    others = ["The young doctor paints the castle in the evening, after the school closes.", "Where?", ""]
    assert near_duplicates([text, text.upper(), "where", "No.", "", "\u4f60\u597d"], [text, *others]) == [
        *(True, True, True, False, True, False)
    ]
    assert near_duplicates([text], others) == [False]


def test_too_little_text_is_told(runtime: Any, adapter: Adapter, tmp_path: Path) -> None:
    few = gather(runtime, adapter, calibration_tokens=8000, calibration=write_rows(tmp_path / "few.jsonl", 20))
    assert any("the calibration file has only" in warning and "of 8000 tokens" in warning for warning in few.warnings)
    assert any("of your own text are measured on" in warning for warning in few.warnings)
    none = gather(runtime, adapter, calibration_tokens=2000)
    assert any("no calibration file" in warning for warning in none.warnings)
    (tmp_path / "one.txt").write_text("Only this one text.")
    one = gather(runtime, adapter, calibration_tokens=2000, calibration=tmp_path / "one.txt")
    assert any("has only one text" in warning for warning in one.warnings) and len(own_texts(one)) == 1
    enough = gather(runtime, adapter, calibration_tokens=4000, calibration=write_rows(tmp_path / "many.jsonl", 300))
    assert enough.warnings == []


def test_passages_are_many_distinct_and_of_many_kinds() -> None:
    assert len(set(PASSAGES)) == len(PASSAGES) >= 70
    assert all(80 < len(passage) < 600 for passage in PASSAGES)
    for part in (PASSAGES, PASSAGES[::4]):
        text = " ".join(part)
        assert any(character.isalpha() and ord(character) > 0x370 for character in text), "other scripts than Latin"
        assert any(word in text for word in ("def ", "#include", "fetch(")), "code"
        assert any(character in "äöüéèñçąłß" for character in text), "other languages in Latin script"
        assert sum(character.isdigit() for character in text) > 0.01 * len(text), "numbers"
    assert not any(near_duplicates(PASSAGES[::2], PASSAGES[1::2]))


def test_texts_fit_into_a_short_context(tmp_path: Path) -> None:
    from tiny_bases import make_base

    base = make_base("llama", tmp_path, max_position_embeddings=48)
    runtime = plugins.runtimes.get("transformers")(base, dtype="float32")
    hidden = runtime.model.config.hidden_size
    adapter = as_adapter(base, VirtualTokens(torch.ones(8, hidden)))
    texts = gather(runtime, adapter, calibration_tokens=500)
    lengths = [len(text.tokens) for text in (*texts.calibration, *texts.held_out)]
    assert max(lengths) == 40 and all(text.prompt_length <= len(text.tokens) for text in texts.calibration)
    too_many = as_adapter(base, VirtualTokens(torch.ones(48, hidden)))
    with pytest.raises(DataError, match="no room for text in a context of 48 tokens"):
        gather(runtime, too_many, calibration_tokens=500)
