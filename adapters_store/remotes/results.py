"""What a transfer did."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from adapters_store.remotes.remote import Progress
from reft_plugins.errors import StoreError

Watch = Callable[[int, int], None]
"""Called with the bytes that have moved and the bytes that have to, as far as that is known yet."""


@dataclass(frozen=True, slots=True)
class Moved:
    """One version, as it is at the target now.

    Attributes:
        name, version: at the target; a registry may have content without a number.
        digest: of its image manifest.
        new: False where the target had it already.
        tags: that point to it because of this transfer.
        replaced: those of them that pointed to something else, with its digest.
        attachments: digests of the signatures and certificates that came along and were not there.
        bytes: of blobs and attachments that had to be sent.
    """

    name: str
    version: int | None
    digest: str
    new: bool
    tags: tuple[str, ...]
    replaced: Mapping[str, str]
    attachments: tuple[str, ...]
    bytes: int

    @property
    def reference(self) -> str:
        """`name@vN`, or by digest."""
        return f"{self.name}@{f'v{self.version}' if self.version is not None else self.digest}"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"reference": self.reference, **asdict(self)}


@dataclass(frozen=True, slots=True)
class Transfer:
    """Everything that one call moved.

    Attributes:
        source, target: where from and where to, as people write it.
        versions: by name and number.
        skipped: sentences about what was left alone on purpose, for example tags that a store cannot have.
    """

    source: str
    target: str
    versions: tuple[Moved, ...]
    skipped: tuple[str, ...] = field(default=())

    @property
    def bytes(self) -> int:
        """Of blobs and attachments that had to be sent."""
        return sum(each.bytes for each in self.versions)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "source": self.source,
            "target": self.target,
            "bytes": self.bytes,
            "versions": [each.to_dict() for each in self.versions],
            "skipped": list(self.skipped),
        }


class IncompleteTransferError(StoreError):
    """Some of what was asked for was refused; everything else has moved.

    Attributes:
        transfer: what has moved.
        errors: one per refusal.
    """

    def __init__(self, transfer: Transfer, errors: tuple[StoreError, ...]) -> None:
        moved = len(transfer.versions)
        reasons = "; ".join(map(str, errors))
        super().__init__(f"{transfer.target}: {len(errors)} refused, {moved} complete: {reasons}")
        self.transfer = transfer
        self.errors = errors


class Meter:
    """Adds up the bytes of a transfer."""

    def __init__(self, watch: Watch | None) -> None:
        self._watch = watch or (lambda done, total: None)
        self._done = 0
        self._total = 0
        self.moved = 0

    @contextmanager
    def blob(self, size: int) -> Iterator[Progress]:
        """For one blob; what was there from an earlier attempt counts as done, but not as moved."""
        start = self._done
        self._total += size
        self._watch(start, self._total)

        def report(count: int) -> None:
            self.moved += count
            self._done = min(self._done + count, start + size)
            self._watch(self._done, self._total)

        yield report
        self._done = start + size
        self._watch(self._done, self._total)
