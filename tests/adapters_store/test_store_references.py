from __future__ import annotations

import pytest

from adapters_store import Reference
from adapters_store.references import parse_tag
from reft_plugins.errors import StoreError

DIGEST = "sha256:" + "a" * 64


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sentiment", Reference("sentiment")),
        ("sentiment:latest", Reference("sentiment", tag="latest")),
        ("team/sub.task_1--x:V1.0-rc_2", Reference("team/sub.task_1--x", tag="V1.0-rc_2")),
        ("sentiment@v12", Reference("sentiment", version=12)),
        (f"sentiment@{DIGEST}", Reference("sentiment", digest=DIGEST)),
        ("n" * 200 + ":" + "t" * 128, Reference("n" * 200, tag="t" * 128)),
    ],
)
def test_parses_and_prints_back(text: str, expected: Reference) -> None:
    assert Reference.parse(text) == expected
    assert str(expected) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "..",
        "./sentiment",
        "/absolute/path",
        "../up:latest",
        "a/../b:latest",
        "a//b:latest",
        "a/b/:latest",
        "Sentiment:latest",
        "sentiment:",
        "sentiment:.hidden",
        "sentiment:-x",
        "sentiment:a/b",
        "sentiment:a:b",
        "sentiment@v0",
        "sentiment@v01",
        "sentiment@v1234567890",
        "sentiment@1",
        "sentiment@latest",
        "sentiment@sha256:abc",
        f"sentiment@{DIGEST.upper()}",
        f"sentiment:latest@{DIGEST}",
        "sentiment__x:latest",
        "sentiment:latest\n",
        "sentiment\0:latest",
        "sentímento:latest",
        "sentiment:٣",
        "https://host/x:y",
        "host:5000/name:tag",
        "~/x:y",
        "n" * 201,
        "n:" + "t" * 129,
        "a" * 100_000,
    ],
)
def test_refuses_everything_else(text: str) -> None:
    with pytest.raises(StoreError, match="not a reference"):
        Reference.parse(text)
    assert Reference.try_parse(text) is None


def test_a_new_tag_is_given_alone_or_with_its_name() -> None:
    assert parse_tag("prod", "sentiment") == "prod"
    assert parse_tag("sentiment:prod", "sentiment") == "prod"
    for wrong in ("other:prod", "a/b", "prod@v1", "sentiment@v1", "", "../x"):
        with pytest.raises(StoreError):
            parse_tag(wrong, "sentiment")
