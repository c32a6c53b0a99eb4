"""The comparison of frozen features, the head alone and all layers: its texts, and a short run."""

from __future__ import annotations

import random
import re
from pathlib import Path

import numpy as np
from click.testing import CliRunner

from examples.three_ways.__main__ import main
from examples.three_ways.base import Recipe, make
from examples.three_ways.compare import Plan, compare
from examples.three_ways.reviews import (
    ADJECTIVES,
    ARTFUL,
    LABELS,
    PLAIN,
    VERBS,
    corpus,
    review,
    reviews,
    telling,
    words,
)


def counted(text: str) -> int:
    """Good words less bad ones."""
    found = [[*ADJECTIVES[side], *VERBS[side]] for side in (0, 1)]
    return sum((word in found[1]) - (word in found[0]) for word in text.split())


def read(text: str) -> str:
    """The label by the rules the reviews are written by: drop what is conceded, then turn around what is denied."""
    text = re.sub(r"although [^,]*, |, even though [^.]*|(?:^|(?<=\. ))[^.,]*? but ", "", text)
    score = 0
    for remark in re.split(r" \. ?| and ", text):
        denied = re.search(r"\b(not|never|far from)\b", remark) is not None
        score += -counted(remark) if denied else counted(remark)
    return LABELS[score > 0]


def test_reviews_can_be_read_but_not_by_counting_words() -> None:
    rows = reviews(2000, 7)
    assert np.mean([read(row["text"]) == row["label"] for row in rows]) == 1.0
    by_count = np.mean([LABELS[counted(row["text"]) > 0] == row["label"] for row in rows])
    assert 0.4 < by_count < 0.75
    assert {label: sum(row["label"] == label for row in rows) for label in LABELS} == dict.fromkeys(LABELS, 1000)
    known = set(words())
    assert all(set(row["text"].split()) <= known for row in rows) and set(telling()) <= known
    assert rows == reviews(2000, 7) != reviews(2000, 8)


def test_texts_to_pretrain_on_are_plainer_and_name_no_label() -> None:
    texts = [*corpus(500, 0)]
    assert not any(label in text for text in texts for label in LABELS)
    denied = [
        np.mean([" not " in review(True, random.Random(n), style) for n in range(400)]) for style in (PLAIN, ARTFUL)
    ]
    assert 2 * denied[0] < denied[1]
    assert 0.8 < np.mean([bool(re.search(r"(waste|money|star|treat|penny|stars) ", text)) for text in texts]) < 0.97


def test_every_way_is_run_with_every_seed(tmp_path: Path) -> None:
    loss = make(tmp_path / "encoder", Recipe(steps=60, hidden_size=32, inner_size=64, layers=2), progress=False)
    assert 0.5 < loss < 3.9, "guessing among all words costs 4.3"
    plan = Plan(texts=90, seeds=2)
    runs = compare(str(tmp_path / "encoder"), None, plan, tmp_path)
    assert [(run.way, run.seed) for run in runs] == [
        (way, seed) for seed in (0, 1) for way in ("frozen features, logistic regression", *plan.ways())
    ]
    learned = [run.parameters for run in runs[:4]]
    assert learned[0] < learned[1] < learned[2] < learned[3]
    assert all(0.3 < run.accuracy <= 1 for run in runs)
    texts = [(tmp_path / f"train-{seed}.jsonl").read_text() for seed in (0, 1)]
    assert len(texts[0].splitlines()) == 90 and texts[0] != texts[1]


def test_help_says_how_to_use_real_models_and_texts() -> None:
    shown = CliRunner().invoke(main, ["--help"])
    assert shown.exit_code == 0 and "--base" in shown.output and "--data" in shown.output
