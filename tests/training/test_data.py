from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reft_plugins.errors import DataError
from reft_plugins.training.batches import IGNORED, Collator, completion_loss, completion_statistics
from reft_plugins.training.data import Example, read_examples


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_llama)


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


GOOD = json.dumps({"prompt": "the dog", "completion": " sees the cat", "note": "ignored"})


def test_prompt_as_at_inference_completion_bare_and_ended(tokenizer: Any, tmp_path: Path) -> None:
    examples = read_examples(write(tmp_path / "d.jsonl", GOOD, "", GOOD), tokenizer, 100)
    assert len(examples) == 2 and examples[0] == examples[1]
    assert list(examples[0].prompt) == tokenizer("the dog").input_ids
    assert examples[0].prompt[0] == tokenizer.bos_token_id
    assert examples[0].completion[-1] == tokenizer.eos_token_id
    assert tokenizer.bos_token_id not in examples[0].completion
    assert tokenizer.decode(examples[0].completion[:-1]) == " sees the cat"
    assert examples.tokens == 2 * len(examples[0])


def test_the_digest_is_of_the_bytes(tokenizer: Any, tmp_path: Path) -> None:
    one = read_examples(write(tmp_path / "a.jsonl", GOOD), tokenizer, 100)
    two = read_examples(write(tmp_path / "b.jsonl", GOOD), tokenizer, 100)
    three = read_examples(write(tmp_path / "c.jsonl", GOOD, GOOD), tokenizer, 100)
    assert one.digest == two.digest != three.digest and one.digest.startswith("sha256:")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ('"text"', "line 2: expected an object"),
        ("[1]", "line 2: expected an object"),
        ('{"prompt": "a"}', "line 2: field 'completion' is missing; the line has 'prompt'"),
        ('{"text": "a"}', "line 2: field 'prompt' is missing"),
        ('{"prompt": 3, "completion": "b"}', "line 2: field 'prompt' must be text, not int"),
        ('{"prompt": "", "completion": "b"}', "line 2: field 'prompt' is empty"),
        ('{"prompt": "a", "completion": "  "}', "line 2: field 'completion' is empty"),
        (json.dumps({"prompt": "the dog " * 60, "completion": "b"}), "line 2: .* tokens .*the limit is 50"),
    ],
)
def test_bad_lines_are_named(tokenizer: Any, tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path / "data.jsonl", GOOD, line, GOOD)
    with pytest.raises(DataError, match=message) as caught:
        read_examples(path, tokenizer, 50)
    assert "data.jsonl" in str(caught.value)


def test_bad_files_are_named(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"empty\.jsonl: no examples"):
        read_examples(write(tmp_path / "empty.jsonl"), tokenizer, 50)
    with pytest.raises(DataError, match=r"missing\.jsonl: cannot read the data"):
        read_examples(tmp_path / "missing.jsonl", tokenizer, 50)
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "é", "completion": "b"}'.encode("latin-1"))
    with pytest.raises(DataError, match="line 1: not JSON"):
        read_examples(tmp_path / "latin.jsonl", tokenizer, 50)


TOKENS = st.lists(st.integers(3, 99), min_size=1, max_size=7).map(tuple)


@given(st.lists(st.builds(Example, TOKENS, TOKENS), min_size=1, max_size=5), st.booleans())
def test_batches_keep_every_row_and_its_positions(rows: list[Example], left: bool) -> None:
    batch = Collator(fill=0, left=left)(rows)
    assert batch["prompt_lengths"].tolist() == [len(row.prompt) for row in rows]
    for index, row in enumerate(rows):
        real = batch["attention_mask"][index].bool()
        assert batch["input_ids"][index][real].tolist() == [*row.prompt, *row.completion]
        assert batch["position_ids"][index][real].tolist() == list(range(len(row)))
        labels = batch["labels"][index]
        assert labels[real].tolist() == [IGNORED] * len(row.prompt) + list(row.completion)
        assert (labels[~real] == IGNORED).all() and (batch["input_ids"][index][~real] == 0).all()


class Outputs:
    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits


def test_loss_counts_completion_tokens_and_nothing_else() -> None:
    draw = torch.Generator().manual_seed(0)
    rows = [Example((5, 6, 7), (8, 9)), Example((5,), (6, 7, 8))]
    batch = Collator(fill=0, left=False)(rows)
    logits = torch.randn(2, 5, 20, generator=draw)
    by_hand = []
    for index, row in enumerate(rows):
        for offset, target in enumerate(row.completion):
            place = len(row.prompt) + offset - 1
            by_hand.append(-logits[index, place].log_softmax(-1)[target])
    loss = completion_loss(Outputs(logits), batch["labels"])
    torch.testing.assert_close(loss, torch.stack(by_hand).mean())
    torch.testing.assert_close(completion_loss(Outputs(logits), batch["labels"], 10), torch.stack(by_hand).sum() / 10)
    disturbed = logits.clone()
    disturbed[0, :2] += 5 * torch.randn(2, 20, generator=draw)
    disturbed[:, 4] += 5 * torch.randn(2, 20, generator=draw)
    torch.testing.assert_close(completion_loss(Outputs(disturbed), batch["labels"]), loss)
    statistics = completion_statistics(logits, batch["labels"])
    torch.testing.assert_close(statistics[:, 0].sum() / statistics[:, 1].sum(), loss)
    assert statistics[:, 1].tolist() == [2.0, 3.0]
    certain = torch.zeros(2, 5, 20)
    for index, row in enumerate(rows):
        for offset, target in enumerate(row.completion):
            certain[index, len(row.prompt) + offset - 1, target] = 50.0
    assert completion_statistics(certain, batch["labels"])[:, 2].tolist() == [2.0, 3.0]
