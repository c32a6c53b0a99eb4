"""What a store holds of one name, and how changes make that anew."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from adapters_store.layout.entries import IndexEntry
from adapters_store.layout.history import Removed, Tagged, Untagged, Versioned


@dataclass(frozen=True, slots=True)
class Named:
    """What there is of one name; made anew by every change.

    Attributes:
        versions: descriptor by number.
        tags: descriptor by tag; its digest is that of a version.
        highest: the largest number that was ever given.
        numbers: the lowest version by digest.
    """

    versions: Mapping[int, IndexEntry] = field(default_factory=dict)
    tags: Mapping[str, IndexEntry] = field(default_factory=dict)
    highest: int = 0
    numbers: Mapping[str, int] = field(default_factory=dict)


class Draft:
    """What there is of one name while changes are made to it, however many: copied once, not at every change."""

    def __init__(self, named: Named) -> None:
        self._versions = dict(named.versions)
        self._tags = dict(named.tags)
        self._highest = named.highest
        self._numbers = dict(named.numbers)

    def named(self) -> Named:
        """What has become of it."""
        return Named(self._versions, self._tags, self._highest, self._numbers)

    def apply(self, change: Versioned | Tagged | Untagged | Removed) -> Iterator[str]:
        """Make a change; yields what contradicts it, in which case it is not made."""
        match change:
            case Versioned():
                entry = IndexEntry.from_data(change.entry, f"{change.name}@v{change.version} of the history")
                known = self._versions.get(change.version)
                if known is not None and known.digest != entry.digest:
                    yield f"'{change.name}@v{change.version}' is another version in the history"
                    return
                self._versions[change.version] = entry
                self._highest = max(self._highest, change.version)
                self._numbers[entry.digest] = min(change.version, self._numbers.get(entry.digest, change.version))
            case Tagged():
                before = self._tags.get(change.tag)
                if before is None or before.digest != change.digest:
                    target = self._versions.get(change.version)
                    size, kind = (target.size, target.artifact_type) if target is not None else (0, None)
                    self._tags[change.tag] = IndexEntry(change.digest, size, artifact_type=kind)
            case Untagged():
                self._tags.pop(change.tag, None)
            case Removed():
                self._highest = max(self._highest, change.version)
                gone = self._versions.pop(change.version, None)
                if gone is not None and len(self._numbers) > len(self._versions):
                    del self._numbers[gone.digest]
                elif gone is not None:  # others have the same content
                    self._numbers = numbers_of(self._versions)


def numbers_of(versions: Mapping[int, IndexEntry]) -> dict[str, int]:
    """The lowest version by digest."""
    return {entry.digest: number for number, entry in sorted(versions.items(), reverse=True)}
