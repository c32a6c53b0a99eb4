"""What a store holds: names, versions, tags, and what is attached to versions.

In `index.json`, every version and every tag is one descriptor of an image manifest. Its annotation
`org.opencontainers.image.ref.name` holds `name@vN` or `name:tag`, so that other programs that read image layouts find
both. Descriptors that refer to a version (signatures, certificates) name it in `vnd.reft.subject`. All other
descriptors are somebody else's and are kept as they are.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any, Final

from adapters_store.layout.entries import IndexEntry, check_entry
from adapters_store.layout.history import Attached, Change, Detached
from adapters_store.layout.named import Draft, Named, numbers_of
from adapters_store.layout.oci import (
    HIGHEST,
    HISTORY_OFFSET,
    INDEX_TYPE,
    MANIFEST_TYPE,
    REF_NAME,
    SUBJECT,
    load_json,
    without_collecting,
)
from adapters_store.layout.plain import Plain, read_plain, write_plain
from adapters_store.references import Reference
from adapters_store.wording import some
from reft_plugins.errors import StoreError, UnknownReferenceError

_NUMBER = re.compile("[0-9]{1,18}")


_NOTHING: Final = Named()


@dataclass(frozen=True, slots=True)
class Index:
    """All that `index.json` and the history say. Changing it gives a new one.

    Attributes:
        names: what there is of each name.
        attached: descriptors of the manifests that refer to a version, by its digest.
        foreign: other programs' descriptors, as they are.
        fields: other fields of the document, and its annotations without our own.
        offset: how much of the history it includes, in bytes; None where the document does not say.
        problems: entries that contradict each other; an index with any is only looked at by `verify`.
    """

    names: Mapping[str, Named] = field(default_factory=dict)
    attached: Mapping[str, tuple[IndexEntry, ...]] = field(default_factory=dict)
    foreign: tuple[dict[str, Any], ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)
    offset: int | None = None
    problems: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: bytes, where: str) -> Index:
        """Read `index.json`.

        Raises:
            StoreError: when it is not an OCI image index.
        """
        with without_collecting():
            plain = read_plain(text)
            return _Reading(load_json(plain.rest, where), where, plain).index()

    def document(self, offset: int | None) -> bytes:
        """The text of `index.json` that says the same, for the state after `offset` bytes of history.

        Without an offset, whoever reads it goes through the whole history again.
        """
        highest = {
            name: named.highest
            for name, named in sorted(self.names.items())
            if named.highest > max(named.versions, default=0)
        }
        annotations = {**self.fields.get("annotations", {})}
        if offset is not None:
            annotations[HISTORY_OFFSET] = str(offset)
        if highest:
            annotations[HIGHEST] = _compact(highest)
        document = {**self.fields, "schemaVersion": 2, "mediaType": INDEX_TYPE, "annotations": annotations}
        parts = {key: _compact(value) for key, value in document.items()}
        parts["manifests"] = f"[{','.join(self._manifests())}]"
        return f"{{{','.join(f'{_compact(key)}:{parts[key]}' for key in sorted(parts))}}}".encode()

    def _manifests(self) -> Iterable[str]:
        quoted: dict[str, str] = {}
        for text, entry in self._references():
            yield write_plain(text, entry, quoted) or _compact(_with_name(entry, text))
        for _, entries in sorted(self.attached.items()):
            yield from (_compact(entry.to_data()) for entry in entries)
        yield from map(_compact, self.foreign)

    def _references(self) -> Iterable[tuple[str, IndexEntry]]:
        for name, named in sorted(self.names.items()):
            for number, entry in sorted(named.versions.items()):
                yield f"{name}@v{number}", entry
            for tag, entry in sorted(named.tags.items()):
                yield f"{name}:{tag}", entry

    def apply(self, changes: Iterable[Change]) -> Index:
        """The index after some changes; doing the same ones again changes nothing.

        Raises:
            StoreError: when a change carries something that is no descriptor.
        """
        drafts: dict[str, Draft] = {}
        attached = dict(self.attached)
        problems: list[str] = []
        for change in changes:
            match change:
                case Attached():
                    entry = IndexEntry.from_data(change.entry, "an attachment of the history")
                    others = (each for each in attached.get(change.subject, ()) if each.digest != entry.digest)
                    attached[change.subject] = (*others, entry)
                case Detached():
                    left = tuple(each for each in attached.get(change.subject, ()) if each.digest != change.digest)
                    attached.pop(change.subject, None)
                    if left:
                        attached[change.subject] = left
                case _:
                    draft = drafts.get(change.name)
                    if draft is None:
                        draft = drafts[change.name] = Draft(self.names.get(change.name, _NOTHING))
                    problems += draft.apply(change)
        names = {**self.names, **{name: draft.named() for name, draft in drafts.items()}}
        return replace(self, names=names, attached=attached, problems=(*self.problems, *problems))

    def next_version(self, name: str) -> int:
        """The number of the next version of a name.

        Raises:
            StoreError: when the numbers are used up.
        """
        version = self.names.get(name, _NOTHING).highest + 1
        reference = Reference(name, version=version)
        if Reference.try_parse(str(reference)) != reference:
            raise StoreError(f"{name}: has no room for another version after {version - 1}")
        return version

    def version_of(self, name: str, digest: str) -> int | None:
        """The lowest version of `name` with this digest, None where there is none."""
        return self.names.get(name, _NOTHING).numbers.get(digest)

    def tags_by_digest(self, name: str) -> dict[str, tuple[str, ...]]:
        """The tags of every digest of `name`, sorted."""
        found: dict[str, list[str]] = defaultdict(list)
        for tag, entry in sorted(self.names.get(name, _NOTHING).tags.items()):
            found[entry.digest].append(tag)
        return {digest: tuple(tags) for digest, tags in found.items()}

    def select(self, reference: Reference) -> tuple[int, IndexEntry]:
        """The version a reference means, with its descriptor. `name:v3` is version 3 where no tag is called so.

        Raises:
            UnknownReferenceError: listing what exists under that name, or similar names.
            StoreError: when a tag points to something that is no version.
        """
        named = self.names.get(reference.name, _NOTHING)
        version, digest = reference.version, reference.digest
        if reference.tag is not None:
            if reference.tag in named.tags:
                digest = named.tags[reference.tag].digest
            else:
                version = reference.tag_as_version
        if digest is not None:
            version = named.numbers.get(digest)
            if version is None and reference.tag is not None:
                raise StoreError(
                    f"{reference} points to {digest}, which is no version of {reference.name!r}. "
                    f"Point it to one with `reft store tag {reference.name}@vN {reference.tag}`"
                )
        if version is None or version not in named.versions:
            raise UnknownReferenceError(self._unknown(reference))
        return version, named.versions[version]

    def _unknown(self, reference: Reference) -> str:
        name = reference.name
        if name not in self.names or not (self.names[name].versions or self.names[name].tags):
            known = [each for each, named in self.names.items() if named.versions or named.tags]
            similar = get_close_matches(name, known) or sorted(known)
            return f"{reference}: the store has no {name!r}. It has: {some(similar)}"
        named = self.names[name]
        what = "names no tag or version" if not reference.exact else "the store has no such tag or version"
        versions = [f"v{number}" for number in sorted(named.versions, reverse=True)]
        return f"{reference}: {what}. Tags of {name!r}: {some(sorted(named.tags))}; versions: {some(versions)}"


class _Reading:
    """Sorts the descriptors of a document by whose they are and what they mean."""

    def __init__(self, document: Any, where: str, plain: Plain) -> None:
        if not isinstance(document, dict):
            raise StoreError(f"{where}: not an image index")
        self.where = where
        self.plain = plain
        self.document = document
        self.annotations = document.get("annotations", {})
        manifests = document.get("manifests")
        for name, found, wanted in (
            ("schemaVersion", document.get("schemaVersion"), (2,)),
            ("mediaType", document.get("mediaType"), (None, INDEX_TYPE)),
        ):
            if found not in wanted or isinstance(found, bool):
                raise StoreError(f"{where}: field {name!r}: {found!r} is not the one of an OCI image index")
        if not isinstance(manifests, list):
            raise StoreError(f"{where}: field 'manifests': not a list")
        if not isinstance(self.annotations, dict) or not all(isinstance(v, str) for v in self.annotations.values()):
            raise StoreError(f"{where}: field 'annotations': not texts by name")
        self.manifests = manifests

    def index(self) -> Index:
        versions, tags = self.plain.versions, self.plain.tags
        attached: dict[str, list[IndexEntry]] = defaultdict(list)
        foreign: list[dict[str, Any]] = []
        problems: list[str] = []
        for position, data in enumerate(self.manifests, self.plain.count):
            check_entry(data, f"{self.where}: manifests.{position}")
            annotations = data.get("annotations", {})
            text = annotations.get(REF_NAME, "")
            reference = Reference.try_parse(text) if text else None
            if reference is None or (reference.tag is None and reference.version is None):
                if SUBJECT in annotations and data["mediaType"] == MANIFEST_TYPE:
                    attached[annotations[SUBJECT]].append(IndexEntry.from_checked(data))
                else:
                    foreign.append(data)
                continue
            place = versions[reference.name] if reference.version is not None else tags[reference.name]
            key = reference.version if reference.version is not None else reference.tag
            if key in place:
                problems.append(f"{text!r} is there twice")
            elif not data["digest"].startswith("sha256:") or data["mediaType"] != MANIFEST_TYPE:
                problems.append(f"{text!r} is no image manifest with a SHA-256 digest")
                foreign.append(data)
            else:
                place[key] = IndexEntry.from_checked(data)  # type: ignore[index]
        highest = self._highest()
        names = {
            name: Named(
                versions.get(name, {}),
                tags.get(name, {}),
                max(highest.get(name, 0), max(versions.get(name, ()), default=0)),
                numbers_of(versions.get(name, {})),
            )
            for name in versions.keys() | tags.keys() | highest.keys()
        }
        fields = {key: value for key, value in self.document.items() if key != "manifests"}
        others = {key: value for key, value in self.annotations.items() if key not in (HISTORY_OFFSET, HIGHEST)}
        fields["annotations"] = others
        return Index(
            names,
            {subject: tuple(each) for subject, each in attached.items()},
            tuple(foreign),
            fields,
            self._offset(),
            tuple(problems),
        )

    def _offset(self) -> int | None:
        text = self.annotations.get(HISTORY_OFFSET, "")
        return int(text) if _NUMBER.fullmatch(text) else None

    def _highest(self) -> dict[str, int]:
        found = load_json(self.annotations.get(HIGHEST, "{}").encode(), f"{self.where}: annotation {HIGHEST!r}")
        if not isinstance(found, dict) or not all(
            type(number) is int and Reference.try_parse(f"{name}@v{number}") for name, number in found.items()
        ):
            raise StoreError(f"{self.where}: annotation {HIGHEST!r}: not numbers of versions by name")
        return found


def _with_name(entry: IndexEntry, text: str) -> dict[str, Any]:
    data = entry.to_data()
    data["annotations"] = {**entry.annotations, REF_NAME: text}
    return data


def _compact(document: Any) -> str:
    return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
