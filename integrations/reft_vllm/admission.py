"""Adapters this process has read: loaded once, checked against the served base, and kept, so that a file that breaks
later cannot break a running engine."""

from __future__ import annotations

import os
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from reft_plugins.adapter import Adapter
from reft_plugins.base_model import check_base, identify
from reft_plugins.manifest import MANIFEST_FILE, Manifest
from reft_plugins.positions import Positions
from reft_plugins.program import Program
from reft_plugins.runtimes import refuse_idle

KEPT_BYTES = int(os.environ.get("REFT_ADAPTER_CACHE_BYTES", "2147483648"))
"""How many bytes of adapter tensors a process keeps; beyond it the least recently used are read again from disk."""


@dataclass(frozen=True, slots=True, eq=False)
class Admitted:
    """An adapter that passed every check.

    `digest` names the version in prefix-cache keys; `positions` are the distinct positions at which it changes
    something; `everywhere` tells that it changes every token, so that every block of the cache depends on it.
    """

    manifest: Manifest
    program: Program
    digest: str
    positions: tuple[Positions, ...]
    everywhere: bool

    @classmethod
    def of(cls, adapter: Adapter) -> Admitted:
        """Lower an adapter and note what the scheduler needs."""
        program = adapter.lower()
        limited = (*program.edits, *program.weight_deltas)
        positions = tuple(dict.fromkeys(node.positions for node in limited))
        everywhere = len(limited) != len(program.nodes) or any(where.everywhere for where in positions)
        return cls(adapter.manifest, program, adapter.digest, positions, everywhere)


_served: dict[str, str] = {}
_kept: OrderedDict[str, tuple[tuple[int, int, int] | None, Admitted]] = OrderedDict()


def serve_base(base: str) -> None:
    """Declare which model (folder or hub id) this process serves; adapters of other bases are refused."""
    _served["base"] = base


def served_base() -> str:
    """The model that this process serves."""
    return _served["base"]


def is_adapter(path: str) -> bool:
    """Whether a LoRA path is one of our artifacts (or was, when it was admitted)."""
    return path in _kept or (Path(path) / MANIFEST_FILE).is_file()


def admit(path: str, reload: bool = False) -> Admitted:
    """Read, check and keep the adapter in a directory; at once if it is kept and its manifest did not change.

    Args:
        path: adapter directory; reload: read again even if it is kept.

    Raises:
        AdapterError: when the files are missing or cannot be trusted, or the adapter belongs to another base.
    """
    stamp = _stamp(path)
    if path in _kept and not reload:
        seen, admitted = _kept[path]
        if stamp in (seen, None):
            _kept.move_to_end(path)
            return admitted
    adapter = Adapter.load(path)
    check_base(adapter.manifest, identify(_served["base"]))
    refuse_idle(adapter.manifest)
    admitted = Admitted.of(adapter)
    _kept[path] = (stamp, admitted)
    _kept.move_to_end(path)
    while len(_kept) > 1 and sum(kept.manifest.tensors.size for _, kept in _kept.values()) > KEPT_BYTES:
        _kept.popitem(last=False)
    return admitted


def _stamp(path: str) -> tuple[int, int, int] | None:
    try:
        status = (Path(path) / MANIFEST_FILE).stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size
