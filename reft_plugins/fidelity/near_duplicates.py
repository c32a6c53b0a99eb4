"""Texts that say nearly the same, so that nothing is measured on what it was fitted to."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

LENGTH = 8
"""Characters of a shingle; letters and digits only, lower case."""

SIMILAR = 0.8
"""Share of common shingles (Jaccard index) from which two texts count as the same; Broder 1997, Compression and
Complexity of Sequences, "On the resemblance and containment of documents"."""


def near_duplicates(texts: Sequence[str], others: Sequence[str]) -> list[bool]:
    """Which of `texts` are nearly the same as one of `others`.

    Case, spaces and punctuation do not count; another word makes another text of a short one, but not of a long one.
    """
    known = [_shingles(text) for text in others]
    places: dict[str, list[int]] = defaultdict(list)
    for index, shingles in enumerate(known):
        for shingle in shingles:
            places[shingle].append(index)

    def same(text: str) -> bool:
        own = _shingles(text)
        common = Counter(index for shingle in own for index in places.get(shingle, ()))
        return any(count >= SIMILAR * (len(own) + len(known[i]) - count) for i, count in common.items())

    return [same(text) for text in texts]


def _shingles(text: str) -> set[str]:
    plain = "".join(character for character in text.casefold() if character.isalnum()) or text
    return {plain[start : start + LENGTH] for start in range(max(1, len(plain) - LENGTH + 1))}
