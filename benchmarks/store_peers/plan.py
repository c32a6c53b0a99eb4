"""What every peer's store is filled with: the same names, versions, tags and files. Needs no library."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MARK = "the-note-of-this-version"
"""Stands in `adapter.json` of the pool where every version has a note of its own."""
KINDS = ("tiny", "large")
LARGE_EVERY = 10
"""Of so many names, one has large adapters."""
TEAMS = 50


@dataclass(frozen=True, slots=True)
class Version:
    """One version of the plan: the `number`th of `name`, with `member` of the pool of its kind as its files."""

    name: str
    number: int
    kind: str
    member: int
    note: str

    @property
    def reference(self) -> str:
        return f"{self.name}@v{self.number}"


@dataclass(frozen=True, slots=True)
class Plan:
    """A store of `versions` versions of `names` names, added in turns.

    Every version has its own `adapter.json`; the tensors are those of one of `pool` adapters of each kind in `folder`.
    """

    folder: str
    versions: int
    names: int
    pool: int

    def name(self, number: int) -> str:
        return f"team-{number % TEAMS:02}/task-{number:05}"

    def kind(self, number: int) -> str:
        return KINDS[number % LARGE_EVERY == 0]

    def version(self, position: int) -> Version:
        earlier, number = divmod(position, self.names)
        member = (earlier + number) % self.pool
        return Version(self.name(number), earlier + 1, self.kind(number), member, f"version {position}")

    def all(self) -> Iterator[Version]:
        """In the order in which they are added."""
        return (self.version(position) for position in range(self.versions))

    def last(self, number: int) -> int:
        """The newest version of the `number`th name."""
        return (self.versions - 1 - number) // self.names + 1

    def tags(self) -> Iterator[tuple[str, str, int]]:
        """Name, tag and version: `newest` and `prod` of every name."""
        for number in range(self.names):
            last = self.last(number)
            yield self.name(number), "newest", last
            yield self.name(number), "prod", max(1, last - 3)

    def tensors(self, version: Version) -> Path:
        return Path(self.folder) / version.kind / str(version.member) / "adapter.safetensors"

    def manifest(self, version: Version, cache: dict[tuple[str, int], str]) -> bytes:
        """The version's `adapter.json`."""
        key = (version.kind, version.member)
        if key not in cache:
            cache[key] = self.tensors(version).with_name("adapter.json").read_text()
        return cache[key].replace(MARK, version.note).encode()

    def sample(self, kind: str, count: int, seed: int) -> list[Version]:
        """Random different versions of a kind, the same ones for every peer."""
        draw = random.Random(f"{kind} {seed}")
        positions = [each for each in range(self.versions) if self.kind(each % self.names) == kind]
        return [self.version(each) for each in draw.sample(positions, min(count, len(positions)))]


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
