"""Made-up film reviews that take negation and concession to read: counting good and bad words is not enough.

A reviewer likes a film or not. Remarks agree with that, plainly or by denying the opposite ("was not dull"), except for
what is conceded ("although the cast was superb , …"). Texts for pretraining are plainer than the reviews to classify,
as text at large is beside a task's own, and only they end with the verdict itself.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

LABELS = ("negative", "positive")

ASPECTS = ("plot", "cast", "music", "ending", "script", "pace", "camera", "story", "humour", "finale")
ADJECTIVES = (
    ("dull", "weak", "clumsy", "shallow", "bland", "messy", "awful", "sloppy"),
    ("superb", "gripping", "clever", "charming", "tender", "funny", "fresh", "splendid"),
)
VERBS = (("hated", "regretted", "resented"), ("loved", "admired", "treasured"))
NOUNS = ("film", "movie", "picture")
VERDICTS = (
    ("a waste of time", "save your money", "one star"),
    ("a real treat", "worth every penny", "five stars"),
)
DEGREES = ("", "", "very ", "quite ", "rather ")
REPEATED = 0.3
"""Share of reviews of two sentences."""


@dataclass(frozen=True, slots=True)
class Style:
    """Shares of remarks that deny the opposite, and of those beside one to the contrary."""

    denied: float
    conceded: float


PLAIN, ARTFUL = Style(0.1, 0.1), Style(0.3, 0.4)
"""Of the texts to pretrain on, and of the reviews to classify."""


def review(liked: bool, draw: random.Random, style: Style) -> str:
    """One review, without the verdict."""
    return " ".join(_remarks(liked, draw, style) for _ in range(1 + (draw.random() < REPEATED)))


def reviews(count: int, seed: int) -> list[dict[str, str]]:
    """Labelled reviews, half of them of each label; the same seed gives the same ones."""
    draw = random.Random(seed)
    rows = [{"text": review(bool(row % 2), draw, ARTFUL), "label": LABELS[row % 2]} for row in range(count)]
    draw.shuffle(rows)
    return rows


def corpus(count: int, seed: int) -> Iterator[str]:
    """Texts without labels to pretrain on; most end with a verdict, in words that no labelled review has."""
    draw = random.Random(seed)
    for _ in range(count):
        liked = draw.random() < 0.5
        text = review(liked, draw, PLAIN)
        yield f"{text} {draw.choice(VERDICTS[liked])} ." if draw.random() < 0.9 else text


def words() -> list[str]:
    """Every word there is."""
    lists = (
        *ADJECTIVES,
        *VERBS,
        ASPECTS,
        NOUNS,
        telling(),
        ("the", "was", "i", "this", "even", "though", "and", ",", ".", "very", "quite", "rather"),
    )
    return sorted({word for words in lists for word in words})


def telling() -> list[str]:
    """The words that bear on the verdict: what is worth masking in pretraining."""
    verdicts = [word for side in VERDICTS for text in side for word in text.split()]
    turns = ("not", "never", "far", "from", "although", "but")
    return [*(word for side in (*ADJECTIVES, *VERBS) for word in side), *verdicts, *turns]


def _remarks(liked: bool, draw: random.Random, style: Style) -> str:
    main = _remark(liked, draw, style)
    if draw.random() < style.conceded:
        other = _remark(not liked, draw, style)
        forms = (f"although {other} , {main} .", f"{main} , even though {other} .", f"{other} but {main} .")
        return draw.choice(forms)
    return f"{main} and {_remark(liked, draw, style)} ." if draw.random() < 0.5 else f"{main} ."


def _remark(good: bool, draw: random.Random, style: Style) -> str:
    denied = draw.random() < style.denied
    if draw.random() < 0.3:
        return f"i {'never ' if denied else ''}{draw.choice(VERBS[good != denied])} this {draw.choice(NOUNS)}"
    denial = draw.choice(("not ", "never ", "far from ")) if denied else ""
    return f"the {draw.choice(ASPECTS)} was {denial}{draw.choice(DEGREES)}{draw.choice(ADJECTIVES[good != denied])}"
