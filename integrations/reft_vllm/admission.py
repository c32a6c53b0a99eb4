"""Adapters this process has read: loaded once, checked against the served base, and kept by content, so that a file
that breaks or changes later cannot break a running engine, nor change what a request in flight runs under."""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from weakref import WeakValueDictionary

from reft_plugins.adapter import Adapter
from reft_plugins.base_model import check_base, identify
from reft_plugins.errors import AdapterError
from reft_plugins.manifest import MANIFEST_FILE, BaseModelIdentity, Manifest
from reft_plugins.positions import Positions
from reft_plugins.program import Program
from reft_plugins.runtimes import refuse_idle
from reft_vllm.strength import scaled
from reft_vllm.versions import Version

KEPT_BYTES = int(os.environ.get("REFT_ADAPTER_CACHE_BYTES", "2147483648"))
"""How many bytes of adapter tensors a process keeps; beyond it the least recently used are read again from disk."""

Stamp = tuple[int, int, int]


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Admitted:
    """An adapter that passed every check.

    `digest` names the version, with its strength, in prefix-cache keys; `positions` are the distinct positions at which
    it changes something; `everywhere` tells that it changes every token, so that every cached block depends on it.
    """

    manifest: Manifest
    program: Program
    digest: str
    positions: tuple[Positions, ...]
    everywhere: bool

    @classmethod
    def of(cls, adapter: Adapter) -> Admitted:
        """Lower an adapter and note what the scheduler needs."""
        return cls.of_program(adapter.manifest, adapter.lower(), adapter.digest)

    @classmethod
    def of_program(cls, manifest: Manifest, program: Program, digest: str) -> Admitted:
        """Note what the scheduler needs to know of a program."""
        limited = (*program.edits, *program.weight_deltas)
        positions = tuple(dict.fromkeys(node.positions for node in limited))
        gated = any(prefix.gate is not None for prefix in program.prefixes)
        everywhere = gated or any(where.everywhere for where in positions)
        return cls(manifest, program, digest, positions, everywhere)


class Kept:
    """The adapters a process keeps, by key of their version, the least recently used first.

    An adapter that somebody holds, a request in flight above all, is found even when it is no longer kept.

    Attributes:
        hits, misses: of `get`; reads: adapters read from disk; read_seconds: what that took, with all checks.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.hits = self.misses = self.reads = 0
        self.read_seconds = 0.0
        self._kept: OrderedDict[str, Admitted] = OrderedDict()
        self._held: WeakValueDictionary[str, Admitted] = WeakValueDictionary()
        self._bytes = 0
        self._seen: dict[str, tuple[Stamp | None, str]] = {}
        self._lock = threading.RLock()

    @property
    def bytes(self) -> int:
        """Bytes of the tensors of all kept adapters."""
        return self._bytes

    def __contains__(self, key: str) -> bool:
        """Whether `get` would find it; counts and changes nothing."""
        with self._lock:
            return key in self._held

    def get(self, key: str) -> Admitted | None:
        """A kept or held adapter, which is the most recently used one then."""
        with self._lock:
            found = self._held.get(key)
            if found is None:
                self.misses += 1
                return None
            self.hits += 1
            self._keep(key, found)
            return found

    def put(self, key: str, admitted: Admitted) -> None:
        """Keep an adapter, and no longer keep those that were not used for longest."""
        with self._lock:
            self._held[key] = admitted
            self._keep(key, admitted)

    def digest_in(self, directory: str) -> str | None:
        """The digest last read from a directory whose manifest is still the same, or is gone."""
        with self._lock:
            stamp, digest = self._seen.get(directory, (None, None))
            return digest if digest is not None and stamp_of(directory) in (stamp, None) else None

    def saw(self, directory: str, stamp: Stamp | None, digest: str) -> None:
        """Remember what a directory held."""
        with self._lock:
            self._seen[directory] = (stamp, digest)

    def clear(self) -> None:
        """Keep nothing."""
        with self._lock:
            self._kept.clear()
            self._held.clear()
            self._seen.clear()
            self._bytes = 0

    def _keep(self, key: str, admitted: Admitted) -> None:
        if key not in self._kept:
            self._kept[key] = admitted
            self._bytes += admitted.manifest.tensors.size
        self._kept.move_to_end(key)
        while len(self._kept) > 1 and self._bytes > self.limit:
            _, dropped = self._kept.popitem(last=False)
            self._bytes -= dropped.manifest.tensors.size


KEPT = Kept(KEPT_BYTES)
_served: dict[str, str] = {}


def serve_base(base: str) -> None:
    """Declare which model (folder or hub id) this process serves; adapters of other bases are refused."""
    _served["base"] = base


def served_base() -> str:
    """The model that this process serves."""
    return _served["base"]


def is_adapter(path: str) -> bool:
    """Whether a LoRA path is one of our artifacts (or was, when it was admitted)."""
    version = Version.parse(path)
    return version.digest is not None or (Path(path) / MANIFEST_FILE).is_file() or KEPT.digest_in(path) is not None


def exact(path: str) -> Version:
    """The version that a LoRA path means now: of a bare directory, what it holds. Raises as `admit`."""
    version = Version.parse(path)
    if version.digest is not None:
        return version
    return replace(version, digest=KEPT.digest_in(version.directory) or _read(version.directory).digest)


def admit(path: str) -> Admitted:
    """The adapter of a LoRA path, read and checked where this process does not have it.

    Args:
        path: adapter directory, or one version of it; see `reft_vllm.versions`.

    Raises:
        AdapterError: when the files are missing or cannot be trusted, are no longer of the version that the path names,
            or the adapter belongs to another base.
        StrengthError: the adapter cannot have the path's strength.
    """
    version = exact(path)
    found = KEPT.get(version.key)
    if found is not None:
        return found
    if version.strength != 1:
        admitted = scale(admit(str(version.at(1.0))), version)
        KEPT.put(version.key, admitted)
        return admitted
    admitted = _read(version.directory)
    if admitted.digest != version.digest:
        raise AdapterError(
            f"{version.directory}: holds version {admitted.digest[:19]} by now, and {str(version.digest)[:19]}, which "
            "was asked for, is neither in memory nor elsewhere. Load the adapter again with load_inplace"
        )
    return admitted


def scale(admitted: Admitted, version: Version) -> Admitted:
    """The same adapter acting with the strength of a version. Raises StrengthError."""
    return Admitted.of_program(admitted.manifest, scaled(admitted.program, version.strength), version.key)


def stamp_of(directory: str) -> Stamp | None:
    """Tells one writing of a directory's manifest from another; None where there is none."""
    try:
        status = os.stat(os.path.join(directory, MANIFEST_FILE))
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def _read(directory: str) -> Admitted:
    start = time.perf_counter()
    stamp = stamp_of(directory)
    adapter = Adapter.load(directory)
    check_base(adapter.manifest, _identity(_served["base"]))
    refuse_idle(adapter.manifest)
    admitted = Admitted.of(adapter)
    KEPT.put(admitted.digest, admitted)
    KEPT.saw(directory, stamp, admitted.digest)
    KEPT.reads += 1
    KEPT.read_seconds += time.perf_counter() - start
    return admitted


@lru_cache(maxsize=8)
def _identity(base: str) -> BaseModelIdentity:
    """A served base is in memory already, so that what happens to its files no longer matters."""
    return identify(base)
