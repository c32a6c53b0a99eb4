"""What `index.json` says: which names, versions and tags exist.

Every version and every tag is one descriptor of an image manifest. Its annotation `org.opencontainers.image.ref.name`
holds `name@vN` or `name:tag`; nothing else records them, so the folder alone is the truth and other programs that read
image layouts find both. Descriptors with any other annotation are somebody else's and are kept as they are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path

from adapters_store.layout.files import read_at_most
from adapters_store.layout.oci import INDEX_TYPE, MANIFEST_TYPE, MAX_INDEX_BYTES, REF_NAME, Descriptor, ImageIndex
from adapters_store.references import Reference
from reft_plugins.errors import StoreError, UnknownReferenceError

_LISTED = 12


@dataclass(frozen=True, slots=True)
class Index:
    """A parsed index. Changing it gives a new one.

    Attributes:
        document: all descriptors in order.
        versions: descriptor by name and version.
        tags: digest by name and tag.
        problems: entries that contradict each other; an index with any is only looked at by `verify`.
    """

    document: ImageIndex
    versions: Mapping[str, Mapping[int, Descriptor]]
    tags: Mapping[str, Mapping[str, str]]
    problems: tuple[str, ...]

    @classmethod
    def empty(cls) -> Index:
        """The index of a new store."""
        return cls._of(ImageIndex(schemaVersion=2, mediaType=INDEX_TYPE, manifests=[]))

    @classmethod
    def parse(cls, text: bytes, where: str) -> Index:
        """Read an index.

        Raises:
            StoreError: when it is not an OCI image index.
        """
        return cls._of(ImageIndex.parse(text, where))

    @classmethod
    def _of(cls, document: ImageIndex) -> Index:
        versions: dict[str, dict[int, Descriptor]] = defaultdict(dict)
        tags: dict[str, dict[str, str]] = defaultdict(dict)
        seen: set[str] = set()
        problems = []
        for entry in document.manifests:
            text = entry.annotations.get(REF_NAME, "")
            reference = Reference.try_parse(text)
            if reference is None or (reference.tag is None and reference.version is None):
                continue
            if text in seen:
                problems.append(f"{text!r} is there twice")
            elif not entry.digest.startswith("sha256:") or entry.media_type != MANIFEST_TYPE:
                problems.append(f"{text!r} is no image manifest with a SHA-256 digest")
            elif reference.version is not None:
                versions[reference.name][reference.version] = entry
            elif reference.tag is not None:
                tags[reference.name][reference.tag] = entry.digest
            seen.add(text)
        return cls(document, dict(versions), dict(tags), tuple(problems))

    def with_version(self, name: str, entry: Descriptor) -> tuple[Index, int]:
        """The index in which `entry` is a version of `name`, and its number; the same index where it is one already.

        Raises:
            StoreError: when the numbers are used up.
        """
        known = self.version_of(name, entry.digest)
        if known is not None:
            return self, known
        version = max(self.versions.get(name, {}), default=0) + 1
        reference = Reference(name, version=version)
        if Reference.try_parse(str(reference)) != reference:
            raise StoreError(f"{name}: has no room for another version after {version - 1}")
        return self._with(reference, entry), version

    def with_tag(self, name: str, tag: str, version: int) -> Index:
        """The index in which `name:tag` points to an existing version; the same index where it does already."""
        entry = self.versions[name][version]
        if self.tags.get(name, {}).get(tag) == entry.digest:
            return self
        return self._with(Reference(name, tag=tag), entry.model_copy(update={"annotations": {}}))

    def _with(self, reference: Reference, entry: Descriptor) -> Index:
        text = str(reference)
        named = entry.model_copy(update={"annotations": {**entry.annotations, REF_NAME: text}})
        others = [each for each in self.document.manifests if each.annotations.get(REF_NAME) != text]
        return self._of(self.document.model_copy(update={"manifests": [*others, named]}))

    def version_of(self, name: str, digest: str) -> int | None:
        """The lowest version of `name` with this digest, None where there is none."""
        found = (number for number, entry in self.versions.get(name, {}).items() if entry.digest == digest)
        return min(found, default=None)

    def tags_by_digest(self, name: str) -> dict[str, tuple[str, ...]]:
        """The tags of every digest of `name`, sorted."""
        found: dict[str, list[str]] = defaultdict(list)
        for tag, digest in sorted(self.tags.get(name, {}).items()):
            found[digest].append(tag)
        return {digest: tuple(tags) for digest, tags in found.items()}

    def select(self, reference: Reference) -> tuple[int, Descriptor]:
        """The version a reference means, with its descriptor.

        Raises:
            UnknownReferenceError: listing what exists under that name, or similar names.
            StoreError: when a tag points to something that is no version.
        """
        versions = self.versions.get(reference.name, {})
        version = reference.version
        digest = reference.digest
        if reference.tag is not None:
            digest = self.tags.get(reference.name, {}).get(reference.tag)
        if digest is not None:
            version = self.version_of(reference.name, digest)
            if version is None and reference.tag is not None:
                raise StoreError(
                    f"{reference} points to {digest}, which is no version of {reference.name!r}. "
                    f"Point it to one with `reft store tag {reference.name}@vN {reference.tag}`"
                )
        if version is None or version not in versions:
            raise UnknownReferenceError(self._unknown(reference))
        return version, versions[version]

    def _unknown(self, reference: Reference) -> str:
        name = reference.name
        if name not in self.versions and name not in self.tags:
            similar = get_close_matches(name, self.versions) or sorted(self.versions)
            return f"{reference}: the store has no {name!r}. It has: {_some(similar)}"
        what = "names no tag or version" if not reference.exact else "the store has no such tag or version"
        versions = [f"v{number}" for number in sorted(self.versions.get(name, {}), reverse=True)]
        tags = sorted(self.tags.get(name, {}))
        return f"{reference}: {what}. Tags of {name!r}: {_some(tags)}; versions: {_some(versions)}"


def _some(words: Iterable[str]) -> str:
    listed = list(words)
    more = f" and {len(listed) - _LISTED} more" if len(listed) > _LISTED else ""
    return (", ".join(listed[:_LISTED]) or "none") + more


def read_index(path: Path) -> Index:
    """The index of a store; parsed again only when its file was replaced.

    Raises:
        StoreError: when it cannot be read or trusted.
    """
    try:
        status = path.lstat()
    except OSError:
        return _read(path)
    return _read_once(path, (status.st_ino, status.st_mtime_ns, status.st_size))


@lru_cache(maxsize=4)
def _read_once(path: Path, stamp: tuple[int, int, int]) -> Index:
    return _read(path)


def _read(path: Path) -> Index:
    index = Index.parse(read_at_most(path, MAX_INDEX_BYTES), str(path))
    for problem in index.problems:
        raise StoreError(f"{path}: {problem}. `reft store verify` lists everything that is wrong")
    return index
