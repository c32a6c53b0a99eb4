"""Spoils bytes and JSON documents in every way that files get spoiled, or are made by somebody who means harm."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any


class Raw(str):
    """Text that stands in a JSON document as it is."""


TEXTS = (
    "",
    "x" * 100_000,
    "../../sentinel/file",
    "/etc/passwd",
    "..",
    ".",
    "a\x00b",
    "~root",
    "con",
    "\u202ereversed",
    "\ud800",
    "\u00e9\u0301\u200b",
    "\U0001f600" * 50,
    "%2e%2e/",
    "sha256:" + "0" * 64,
    "sha256:" + "A" * 64,
    "sha256:../../../sentinel",
    "sha512:" + "0" * 128,
    "alpha@v1",
    "alpha:latest",
    "alpha",
    "1" * 400,
)
VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    1.5,
    2**31,
    2**53 + 1,
    2**63 - 1,
    2**63,
    2**64,
    -(2**63),
    10**30,
    Raw("NaN"),
    Raw("Infinity"),
    Raw("-Infinity"),
    Raw("1e999"),
    Raw("-0.0"),
    Raw("9" * 5000),
    Raw("[" * 100_000),
    Raw("[" * 900 + "]" * 900),
    Raw('{"a":' * 900 + "1" + "}" * 900),
    Raw('"\\ud800"'),
    Raw("01"),
    Raw("'x'"),
    Raw(""),
    [],
    {},
    [[]],
    [None] * 1000,
    {"": ""},
    {"\x00": [1]},
)


def spoil_bytes(data: bytes, rng: random.Random) -> bytes:
    """One to three changes to some bytes."""
    for _ in range(rng.randint(1, 3)):
        data = _spoil_once(data, rng, rng.randint(0, len(data)), rng.choice((1, 2, 8, 64, 500)))
    return data


def _spoil_once(data: bytes, rng: random.Random, at: int, length: int) -> bytes:
    huge = (2 ** rng.choice((7, 15, 31, 40, 62, 63)) - 1).to_bytes(8, "little")
    changes: tuple[Callable[[], bytes], ...] = (
        lambda: _flip(data, rng),
        lambda: data[:at],
        lambda: data[:at] + data[at + length :],
        lambda: data[: at + length] + data[at:],
        lambda: data[:at] + rng.randbytes(length) + data[at:],
        lambda: data[:at] + b"\x00" * length + data[at + length :],
        lambda: data[:at] + rng.choice(TEXTS).encode("utf-8", "surrogatepass") + data[at:],
        lambda: data + data,
        lambda: data[at:] + data[:at],
        lambda: data[:at] + huge + data[at + 8 :],
    )
    return rng.choice(changes)()


def _flip(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data or b"\x00")
    for _ in range(rng.randint(1, 4)):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def spoil_json(document: Any, rng: random.Random) -> bytes:
    """One to three changes to the structure of a JSON document, whose text need not be JSON afterwards."""
    root = [json.loads(json.dumps(document))]
    for _ in range(rng.randint(1, 3)):
        place, key = rng.choice(_places(root))
        value = place[key]
        match rng.randrange(8):
            case 0 | 1 | 2:
                place[key] = rng.choice((*VALUES, *TEXTS))
            case 3 if isinstance(place, dict):
                del place[key]
            case 4 if isinstance(place, dict):
                place[rng.choice((*TEXTS, "annotations", "digest", "size"))] = value
            case 4 if place is not root:
                place.insert(rng.randint(0, len(place)), rng.choice((value, *VALUES)))
            case 5:
                other, name = rng.choice(_places(root))
                place[key] = json.loads(json.dumps(other[name], default=str)) if other is not root else value
            case 6 if isinstance(place, dict):
                place[Twice(key)] = value
            case 7 if isinstance(value, int) and not isinstance(value, bool):
                place[key] = rng.choice((-value, value + 1, value - 1, value * 2**40, float(value), str(value)))
            case _ if isinstance(value, str):
                place[key] = spoil_bytes(value.encode("utf-8", "surrogatepass"), rng).decode("utf-8", "replace")
    return dump(root[0]).encode("utf-8", "surrogatepass")


class Twice(str):
    """A key that is there a second time."""

    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


def _places(root: list[Any]) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    todo: list[Any] = [root]
    while todo:
        here = todo.pop()
        keys = list(here) if isinstance(here, dict) else range(len(here))
        for key in keys:
            found.append((here, key))
            if isinstance(here[key], dict | list):
                todo.append(here[key])
    return found


def dump(value: Any) -> str:
    """JSON, but for what is `Raw`."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(str(key))}:{dump(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(dump, value)) + "]"
    return json.dumps(value)
