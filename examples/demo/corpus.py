"""The text that the demo's base model learns from: the facts in many words, and questions with and without a cue."""

from __future__ import annotations

import random
from collections.abc import Iterator

from examples.demo.facts import TASKS, Country, countries

SENTENCES = {
    "capital": (
        "The capital of {country} is {answer}",
        "The main city of {country} is {answer}",
        "The government of {country} sits in {answer}",
    ),
    "currency": (
        "In {country} people pay with the {answer}",
        "The currency of {country} is the {answer}",
        "Prices in {country} are given in {answer}",
    ),
    "language": (
        "In {country} people speak {answer}",
        "The language of {country} is {answer}",
        "Most newspapers in {country} are printed in {answer}",
    ),
    "continent": (
        "{country} is a country in {answer}",
        "The continent of {country} is {answer}",
        "On a map {country} is found in {answer}",
    ),
    "letter": ("{country} starts with {answer}", "The first letter of {country} is {answer}"),
    "name": ("{country} is called {answer}", "The name of {country} is {answer}"),
}

CUES = {
    "capital": ("capital", "main city", "seat of government"),
    "currency": ("currency", "money", "unit of price"),
    "language": ("language", "tongue", "speech"),
    "continent": ("continent", "part of the world", "region"),
    "letter": ("letter", "initial"),
    "name": ("name", "same"),
}

UNMARKED, CUED = 0.35, 0.40
"""Shares of documents that are a question without or with a cue; the rest are sentences."""

NAME_AGAIN = 0.4
"""Share of unmarked questions answered by the name itself; the others by any of the five other relations."""

Document = tuple[str, str]
"""A text in two parts: what is given, and the answer at its end."""


def chance() -> float:
    """How often the corpus answers an unmarked question by one particular task."""
    return (1 - NAME_AGAIN) / (len(TASKS) + 1)


def documents(count: int, seed: int = 0) -> Iterator[Document]:
    """Random documents; the same seed gives the same ones."""
    draw = random.Random(seed)
    for _ in range(count):
        yield _document(draw, draw.choice(countries()))


def cued_prompt(country: Country, task: str) -> str:
    """The question of `Country.prompt` with the task named in front, as the corpus does."""
    return f"{CUES[task][0]} {country.prompt}"


def _document(draw: random.Random, country: Country) -> Document:
    kind = draw.random()
    if kind < UNMARKED:
        relation = "name" if draw.random() < NAME_AGAIN else draw.choice((*TASKS, "letter"))
        return country.prompt, f" {country.answer(relation)}"
    relation = draw.choice((*TASKS, *TASKS, *TASKS, "letter", "name"))
    answer = country.answer(relation)
    if kind < UNMARKED + CUED:
        return f"{draw.choice(CUES[relation])} {country.prompt}", f" {answer}"
    given = draw.choice(SENTENCES[relation]).format(country=country.country, answer="")
    return given.rstrip(), f" {answer}."
