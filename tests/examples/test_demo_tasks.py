"""The demo's facts, corpus and questions: the prompt must not tell the task, and the answers must be right."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from examples.demo import adapters, corpus
from examples.demo.facts import HELD_OUT, TASKS, countries, split
from examples.demo.questions import change, questions, score
from reft_plugins import Generation


def test_countries_are_complete_and_distinct() -> None:
    rows = countries()
    assert len({row.country for row in rows}) == len(rows) > 100
    assert len({row.capital for row in rows}) == len(rows)
    for row in rows:
        assert all(row.answer(task).strip() == row.answer(task) != "" for task in TASKS)
    france = next(row for row in rows if row.country == "France")
    assert [france.answer(task) for task in TASKS] == ["Paris", "euro", "French", "Europe"]


def test_no_answer_is_right_for_two_tasks_or_by_repeating_the_prompt() -> None:
    for row in countries():
        answers = [row.answer(relation) for relation in (*TASKS, "letter", "name")]
        assert len(set(answers)) == len(answers), row


def test_split_is_disjoint_and_fixed() -> None:
    training, held_out = split()
    assert len(held_out) == HELD_OUT
    assert set(training).isdisjoint(held_out)
    assert {*training, *held_out} == set(countries())
    assert split() == (training, held_out) != split(seed=1)


def test_documents_say_true_things() -> None:
    by_prompt = {row.prompt: row for row in countries()}
    count = Counter[str]()
    for given, answer in corpus.documents(3000):
        row = next((row for prompt, row in by_prompt.items() if given.endswith(prompt)), None)
        if row is None:
            assert answer.endswith(".")
            named = [row for row in countries() if row.country in given]
            assert any(answer[1:-1] in {row.answer(r) for r in corpus.SENTENCES} for row in named), (given, answer)
            count["sentence"] += 1
            continue
        cue = given.removesuffix(row.prompt).strip()
        meant = [relation for relation, cues in corpus.CUES.items() if cue in cues] or list(corpus.CUES)
        assert answer.strip() in {row.answer(relation) for relation in meant}
        count["cued" if cue else "unmarked"] += 1
    assert count["unmarked"] / 3000 == pytest.approx(corpus.UNMARKED, abs=0.03)
    assert count["cued"] / 3000 == pytest.approx(corpus.CUED, abs=0.03)


def test_unmarked_questions_do_not_prefer_a_task() -> None:
    by_prompt = {row.prompt: row for row in countries()}
    unmarked = [(by_prompt[given], answer.strip()) for given, answer in corpus.documents(20_000) if given in by_prompt]
    for task in TASKS:
        share = sum(row.answer(task) == answer for row, answer in unmarked) / len(unmarked)
        assert share == pytest.approx(corpus.chance(), abs=0.02)
    assert corpus.chance() < 0.2


def test_documents_depend_on_the_seed_alone() -> None:
    assert list(corpus.documents(50, seed=3)) == list(corpus.documents(50, seed=3))
    assert list(corpus.documents(50, seed=3)) != list(corpus.documents(50, seed=4))


def test_data_of_all_tasks_has_the_same_prompts(tmp_path) -> None:
    rows = {}
    for task in TASKS:
        lines = adapters.write_data(tmp_path, task).read_text("utf-8").splitlines()
        rows[task] = [json.loads(line) for line in lines]
    prompts = {task: [row["prompt"] for row in rows[task]] for task in TASKS}
    assert len({tuple(each) for each in prompts.values()}) == 1
    assert len({tuple(row["completion"] for row in rows[task]) for task in TASKS}) == len(TASKS)
    held_out = [json.loads(line)["prompt"] for line in (tmp_path / "capital.held-out.jsonl").read_text().splitlines()]
    assert len(held_out) == HELD_OUT
    assert set(held_out).isdisjoint(prompts["capital"])


def asked_and_right() -> tuple:
    asked = questions(split()[1][:10], {task: f"{task}:latest" for task in TASKS})
    text = [question.country.answer(question.task or "name") for question in asked]
    return asked, [Generation([index], f" {answer}") for index, answer in enumerate(text)]


def test_tasks_and_base_take_turns() -> None:
    asked, _ = asked_and_right()
    turn = len(TASKS) + 1
    assert len(asked) == 10 * turn
    for start in range(0, len(asked), turn):
        assert [question.task for question in asked[start : start + turn]] == [*TASKS, None]
        assert len({question.prompt for question in asked[start : start + turn]}) == 1


def test_scores_of_right_and_of_swapped_answers() -> None:
    asked, right = asked_and_right()
    scores = score(asked, right)
    assert scores.adapter == dict.fromkeys(TASKS, 1.0)
    assert scores.base == dict.fromkeys(TASKS, 0.0)
    shifted = score(asked, [*right[1:], right[0]])
    assert max(shifted.adapter.values()) < 0.5


def test_change_counts_answers_that_differ_from_the_base() -> None:
    asked, right = asked_and_right()
    assert change(asked, right) == dict.fromkeys(TASKS, 1.0)
    bare = Generation([999], "")
    same = [bare if question.task in (None, "capital") else said for question, said in zip(asked, right, strict=True)]
    assert change(asked, same) == {**dict.fromkeys(TASKS, 1.0), "capital": 0.0}
