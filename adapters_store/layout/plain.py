"""Descriptors of versions and tags in exactly the form in which the store writes them, of which there may be 100,000.

One pattern checks and reads such a descriptor at once, in a third of the time that JSON, the checks of descriptors and
those of references take. Whatever has another form, or comes after one that has, is left to them. The form is that of
`json.dumps(…, sort_keys=True, separators=(",", ":"))`.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from dataclasses import dataclass, field
from json.encoder import encode_basestring_ascii
from sys import intern
from typing import Any, Final

from adapters_store.layout.entries import NO_FIELDS, IndexEntry
from adapters_store.layout.oci import ARTIFACT_TYPE, BASE, CREATED, MANIFEST_TYPE, METHOD, METRICS, REF_NAME, SIZE
from adapters_store.references import Reference

_PLAIN_TEXT = r'"([^"\\\x00-\x1f]*+)"'
_TEXT = r'"([^"\\\x00-\x1f]*+(?:\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})[^"\\\x00-\x1f]*+)*+)"'
_SHARED: Final = (BASE, METHOD, METRICS)
"""Many versions have the same."""
_KEYS: Final = (CREATED, *_SHARED, SIZE)
_KNOWN_KEYS: Final = frozenset(_KEYS)


def _optional(key: str, text: str) -> str:
    return f'(?:,"{re.escape(key)}":{text})?+'


_DESCRIPTOR = re.compile(
    rf'\{{"annotations":\{{(?:"{re.escape(CREATED)}":{_PLAIN_TEXT},)?+'
    rf'"{re.escape(REF_NAME)}":"([a-z0-9._/-]++)(?:@v([1-9][0-9]{{0,8}})|:([A-Za-z0-9._-]++))"'
    rf"{_optional(BASE, _TEXT)}{_optional(METHOD, _TEXT)}{_optional(METRICS, _TEXT)}{_optional(SIZE, _PLAIN_TEXT)}\}},"
    rf'"artifactType":"{re.escape(ARTIFACT_TYPE)}","digest":"(sha256:[0-9a-f]{{64}})",'
    rf'"mediaType":"{re.escape(MANIFEST_TYPE)}","size":(0|[1-9][0-9]{{0,17}})\}}(?:,(?=\{{)|(?=\]))'
)
_HEAD = re.compile(rf'\{{(?:"annotations":\{{(?:"[^"\\]*+":{_TEXT},?)*+\}},)?+"manifests":\[')


@dataclass(slots=True)
class Plain:
    """The first descriptors of a document, as far as they have the form.

    Attributes:
        rest: the document without them.
        count: of the descriptors.
        versions, tags: entries by name, and by number or tag.
    """

    rest: bytes
    count: int = 0
    versions: defaultdict[str, dict[int, IndexEntry]] = field(default_factory=lambda: defaultdict(dict))
    tags: defaultdict[str, dict[str, IndexEntry]] = field(default_factory=lambda: defaultdict(dict))


def read_plain(text: bytes) -> Plain:
    """Read what has the form and is beyond doubt; everything else, or all of it, is in `rest`."""
    found = Plain(text)
    try:
        document = text.decode()
    except UnicodeDecodeError:
        return found
    head = _HEAD.match(document)
    if head is None:
        return found
    end = head.end()
    known = _Known()
    for match in iter(_DESCRIPTOR.scanner(document, end).match, None):  # type: ignore[attr-defined]
        created, name, number, tag, base, method, metrics, files, digest, size = match.groups()
        if not known.names[name] or not known.tags[tag]:
            break
        place: dict[Any, IndexEntry] = found.versions[name] if number else found.tags[name]
        key = int(number) if number else tag
        if key in place:
            break
        try:
            said = created, known.texts[base], known.texts[method], known.texts[metrics], files
        except UnicodeEncodeError:
            break
        annotations = dict(zip(_KEYS, said, strict=True))
        if None in said:
            annotations = {key: each for key, each in annotations.items() if each is not None}
        place[key] = IndexEntry(digest, int(size), ARTIFACT_TYPE, annotations, NO_FIELDS)
        end = match.end()
        found.count += 1
    found.rest = f"{document[: head.end()]}{document[end:]}".encode()
    return found


def write_plain(reference: str, entry: IndexEntry, quoted: dict[str, str]) -> str | None:
    """A descriptor in the form, or None where it has facts for which the form has no place.

    Args:
        reference: `name@vN` or `name:tag`, which becomes an annotation.
        quoted: JSON of texts that were met before.
    """
    said = entry.annotations
    if entry.others or entry.artifact_type != ARTIFACT_TYPE or not _KNOWN_KEYS.issuperset(said):
        return None
    for key in _SHARED:
        if key in said and said[key] not in quoted:
            quoted[said[key]] = encode_basestring_ascii(said[key])
    created = f'"{CREATED}":{encode_basestring_ascii(said[CREATED])},' if CREATED in said else ""
    shared = "".join([f',"{key}":{quoted[said[key]]}' for key in _SHARED if key in said])
    size = f',"{SIZE}":{encode_basestring_ascii(said[SIZE])}' if SIZE in said else ""
    return (
        f'{{"annotations":{{{created}"{REF_NAME}":"{reference}"{shared}{size}}},"artifactType":"{ARTIFACT_TYPE}",'
        f'"digest":"{entry.digest}","mediaType":"{MANIFEST_TYPE}","size":{entry.size}}}'
    )


class _Texts(dict[str | None, str | None]):
    """What texts of JSON mean, each kept once."""

    def __missing__(self, text: str | None) -> str | None:
        """Raises UnicodeEncodeError at halves of surrogate pairs, which are not Unicode."""
        meant = json.loads(f'"{text}"') if text is not None else ""
        meant.encode()
        self[text] = intern(meant) if text is not None else None
        return self[text]


class _Names(dict[str, bool]):
    """Which texts are names of adapters."""

    def __missing__(self, text: str) -> bool:
        self[text] = Reference.try_parse(text) is not None
        return self[text]


class _Tags(dict[str | None, bool]):
    """Which texts are tags; None, for a version, is in order too."""

    def __missing__(self, text: str | None) -> bool:
        self[text] = text is None or Reference.try_parse(f"a:{text}") is not None
        return self[text]


class _Known:
    def __init__(self) -> None:
        self.texts = _Texts()
        self.names = _Names()
        self.tags = _Tags()
