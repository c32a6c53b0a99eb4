"""The short way to read an index says what the long one says, of any text, or leaves the text to it."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace

import pytest

from adapters_store.layout.entries import IndexEntry
from adapters_store.layout.history import Attached, Change, Tagged, Versioned
from adapters_store.layout.index import Index, _Reading
from adapters_store.layout.oci import ARTIFACT_TYPE, BASE, CREATED, METHOD, METRICS, REF_NAME, SIZE, SUBJECT, load_json
from adapters_store.layout.plain import Plain, read_plain
from reft_plugins.errors import StoreError

TEXTS = ["llama", "", 'a "quoted" \\ name', "größe", "\u2028\x7f", "line\nfeed\x00", "\U0001f600", '{"annotations":{"']
PIECES = [
    b'"',
    b"\\",
    b",",
    b" ",
    b"{",
    b"}",
    b"0",
    b"01",
    b"-1",
    b"1e3",
    b"@v1",
    b":",
    b"..",
    b"\xff",
    b"A",
    b'"size":1,',
    b'"digest":"sha256:' + b"0" * 64 + b'",',
    b'"extra":null,',
    b'"manifests":[],',
    b"\\u0061",
    b"\\ud800",
    b"\\x",
    b"\n",
]


def make_index(draw: random.Random, versions: int) -> Index:
    """Versions and tags of a few names, an attachment, and another program's descriptor."""
    changes: list[Change] = []
    for number in range(versions):
        name, digest = f"team/task-{number % 3}", f"sha256:{draw.getrandbits(256):064x}"
        facts = {METHOD: draw.choice(TEXTS), SIZE: str(draw.randrange(10**6)), CREATED: "2026-01-01T00:00:00+00:00"}
        if draw.random() < 0.8:
            facts[BASE] = draw.choice(TEXTS)
        if draw.random() < 0.8:
            facts[METRICS] = json.dumps({draw.choice(TEXTS): draw.random()} if draw.random() < 0.5 else {})
        entry = IndexEntry(digest, draw.randrange(1000), ARTIFACT_TYPE, facts).to_data()
        changes += [Versioned(name, number // 3 + 1, entry)]
        if draw.random() < 0.3:
            changes += [Tagged(name, draw.choice(["prod", "v1", "A.b-c"]), number // 3 + 1, digest)]
        if draw.random() < 0.1:
            changes += [
                Attached(
                    digest, IndexEntry(f"sha256:{draw.getrandbits(256):064x}", 7, "a/b", {SUBJECT: digest}).to_data()
                )
            ]
    return Index().apply(changes)


def long_way(text: bytes) -> Index:
    return _Reading(load_json(text, "here"), "here", Plain(text)).index()


def outcome(read, text: bytes) -> tuple[object, ...]:
    """Everything that was read, as JSON data; or that it was refused."""
    try:
        index = read(text)
    except StoreError:
        return ("refused",)
    names = {
        name: (
            {number: entry.to_data() for number, entry in named.versions.items()},
            {tag: entry.to_data() for tag, entry in named.tags.items()},
            named.highest,
            named.numbers,
        )
        for name, named in index.names.items()
    }
    attached = {subject: [each.to_data() for each in entries] for subject, entries in index.attached.items()}
    return names, attached, index.foreign, index.fields, index.offset, sorted(index.problems)


def short_way(text: bytes) -> Index:
    return Index.parse(text, "here")


def test_what_the_store_writes_is_read_the_short_way() -> None:
    draw = random.Random(0)
    index = make_index(draw, 300)
    text = index.document(17)
    plain = read_plain(text)
    assert sum(map(len, plain.versions.values())) == 300
    assert plain.count == 300 + sum(len(named.tags) for named in index.names.values())
    rest = json.loads(plain.rest)
    assert len(rest["manifests"]) == sum(map(len, index.attached.values())) > 0
    assert all(REF_NAME not in each.get("annotations", {}) for each in rest["manifests"])
    assert outcome(short_way, text) == outcome(long_way, text)
    assert outcome(short_way, text)[0]["team/task-0"][0] == {
        number: entry.to_data() for number, entry in index.names["team/task-0"].versions.items()
    }


def test_it_is_written_as_json_writes_it() -> None:
    draw = random.Random(2)
    index = make_index(draw, 300)
    foreign = {"mediaType": "a", "digest": "b:c", "size": 1, "annotations": {"manifests": "[]"}}
    strange = IndexEntry("sha256:" + "0" * 64, 3, ARTIFACT_TYPE, {SIZE: "ä", "z": "z"}, {"others": [1]})
    index = index.apply([Versioned("team/task-9", 1, strange.to_data())])
    index = replace(index, foreign=(foreign,), fields={"x": {"manifests": []}, "annotations": {"ö": "ü"}, "zz": 1})
    text = index.document(17)
    document = json.loads(text)
    assert text == json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
    assert len(document["manifests"]) > 300 and document["manifests"][-1] == foreign
    assert outcome(long_way, text) == outcome(short_way, text)
    assert outcome(long_way, text)[:3] == outcome(lambda _: index, b"")[:3]


@pytest.mark.parametrize("seed", range(4))
def test_changed_texts_are_read_alike(seed: int) -> None:
    draw = random.Random(seed)
    outcomes = {"refused": 0, "read": 0, "read the short way in part": 0}
    for _ in range(1000):
        text = bytearray(make_index(draw, 6).document(draw.choice([None, 5])))
        for _ in range(draw.choice([1, 1, 2])):
            mutate(draw, text)
        found = outcome(short_way, bytes(text))
        assert found == outcome(long_way, bytes(text)), bytes(text)
        outcomes["refused" if found == ("refused",) else "read"] += 1
        count = read_plain(bytes(text)).count
        outcomes["read the short way in part"] += found != ("refused",) and 0 < count < 6
    assert min(outcomes.values()) > 20, outcomes


def mutate(draw: random.Random, text: bytearray) -> None:
    """Change some bytes, or repeat, remove or move whole parts."""
    place, end = sorted((draw.randrange(len(text)), draw.randrange(len(text))))
    kind = draw.randrange(5)
    marks = [match.start() for match in re.finditer(rb'[{}",:]', text)]
    if kind == 0:
        text[place] = draw.randrange(256)
    elif kind == 1:
        mark = draw.choice(marks)
        text[mark:mark] = draw.choice(PIECES)
    elif kind == 2:
        del text[place : min(end, place + draw.choice([1, 3, 200]))]
    elif kind == 3:
        objects = [match.span() for match in re.finditer(rb'\{"annotations":\{[^{}]*\}[^{}]*\},?', text)]
        if objects:
            start, stop = draw.choice(objects)
            target = draw.choice(objects)[0]
            text[target:target] = text[start:stop]
    else:
        mark = draw.choice(marks)
        text[mark + 1 : mark + 1] = draw.choice([b" ", b"\n", b"\t"])


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b'"manifests":', b'"others":[],"others":'),
        (b'{"annotations":{', b'{"annotations":{"a":"b"c":"d",'),
        (b'"manifests":[', b'"x":"manifests":['),
    ],
)
def test_heads_that_are_not_the_stores(before: bytes, after: bytes) -> None:
    sound = make_index(random.Random(1), 3).document(0)
    text = sound.replace(before, after, 1)
    assert outcome(long_way, sound) != ("refused",) and text != sound
    assert outcome(short_way, text) == outcome(long_way, text) == ("refused",)


def test_a_name_with_only_a_wrong_tag_is_no_name() -> None:
    text = make_index(random.Random(1), 1).document(0)
    wrong = text.replace(b"team/task-0@v1", b"team/task-0:x..y")
    assert wrong != text
    assert read_plain(wrong).count == 0
    assert short_way(wrong).names == {}
    assert len(short_way(wrong).foreign) == 1
