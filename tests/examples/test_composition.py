from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import reft_plugins as reft
from examples.composition import ANIMALS, Bilingual, completion, documents, experiment, prompt, split


def test_the_corpus_asks_on_in_english_unless_told_otherwise() -> None:
    learned, held_out = split()
    assert sorted(learned + held_out) == sorted(ANIMALS) and len(held_out) == 8
    plain = [answer for given, answer in documents(8000, seed=1) if not given.startswith("(")]
    kinds = Counter((answer.endswith("?"), answer.split()[0] in ("Where", "The")) for answer in plain)
    shares = {kind: count / len(plain) for kind, count in kinds.items()}
    assert 0.58 < shares[True, True] < 0.7 and 0.02 < shares[False, False] < 0.07
    cued = [answer for given, answer in documents(4000, seed=2) if "German" in given and "(answer)" in given]
    assert len(cued) > 100 and all(answer.endswith(".") and "Wo ist" not in answer for answer in cued)
    one, other = random.Random(0).sample(sorted(ANIMALS), 2)
    answers = {answer for given, answer in documents(20_000, 3) if given == prompt(one, "de", "answer")}
    assert answers == {completion(one, "de", "answer", other)}


def test_two_abilities_learned_apart_work_together(tmp_path: Path) -> None:
    """On a smaller base than the example's, which knows less."""
    recipe = Bilingual(steps=300, layers=2)
    results, angles = experiment(tmp_path, recipe)
    found = {name: abilities for name, (abilities, _) in results.items()}
    assert found["base"].german == found["base"].answers == 0
    assert found["german"].german >= 0.9 and found["german"].answers == 0
    assert found["answers"].answers >= 0.7 and found["answers"].german == 0
    both = found["both composed"]
    assert both.both >= 0.4 and both.german >= 0.4 and both.answers >= 0.4
    assert [(entry.space, len(entry.angles)) for entry in angles] == [("writes", 4), ("reads", 4)]
    assert all(0.05 < entry.shared < 0.95 for entry in angles)
    stored = reft.load(tmp_path / "both", base=tmp_path / "base")
    alone = [reft.load(tmp_path / name).digest for name in ("german", "answers")]
    assert [parent.digest for parent in stored.manifest.parents] == alone
    (edit,) = stored.lower().edits
    assert edit.rank == 8
