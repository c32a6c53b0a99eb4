"""JSON of others: what means one thing only is read, everything else is refused at once."""

from __future__ import annotations

import json
import time

import pytest

from reft_plugins import strict_json


def test_what_is_plain_is_read() -> None:
    document = {"a": [1, -2.5, 1e300, True, None, "\u00e9 \U0001f600"], "b": {"c": {}}}
    assert strict_json.loads(json.dumps(document).encode()) == document
    assert strict_json.loads(json.dumps(document, ensure_ascii=False).encode()) == document
    deep = b"[" * strict_json.MAX_DEPTH + b"]" * strict_json.MAX_DEPTH
    assert json.dumps(strict_json.loads(deep)).encode() == deep


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"a":1,"b":{"c":1,"c":1}}', "duplicate key 'c'"),
        (b"[NaN]", "not a finite number"),
        (b"[-Infinity]", "not a finite number"),
        (b"[1e999]", "not a finite number"),
        (b"[" + b"9" * 5000 + b"]", "digits"),
        (rb'["\ud83d"]', "surrogates"),
        (rb'{"\udc00":1}', "surrogates"),
        ('"\ud800"'.encode("utf-8", "surrogatepass"), "decode"),
        ('"a"'.encode("utf-16"), "decode"),
        (b"\xef\xbb\xbf[]", "BOM"),
        (b"[" * 65 + b"]" * 65, "nested more than 64"),
        (b'{"a":' * 900 + b"1" + b"}" * 900, "nested more than 64"),
        (b"[" * 100_000, "recursion"),
        (b"", "Expecting value"),
        (b"[1] [2]", "Extra data"),
    ],
)
def test_what_is_not_is_refused(text: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        strict_json.loads(text)


def test_a_key_that_is_there_twice_among_many_is_found_at_once() -> None:
    keys = [f'"{number}":0' for number in range(200_000)]
    started = time.process_time()
    with pytest.raises(ValueError, match="duplicate key '199999'"):
        strict_json.loads(("{" + ",".join([*keys, keys[-1]]) + "}").encode())
    assert time.process_time() - started < 20
