"""Making the index of a damaged store anew."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path

from adapters_store.layout.files import (
    explained,
    open_regular,
    partial_file,
    read_at_most,
    settle,
    sync_directory,
    unique_name,
)
from adapters_store.layout.history import HISTORY_FILE, MAX_LINE_BYTES, Change, decode
from adapters_store.layout.index import Index
from adapters_store.layout.ledger import replace_file
from adapters_store.layout.oci import MAX_INDEX_BYTES
from adapters_store.location import INDEX_FILE
from reft_plugins.errors import StoreError

_Span = tuple[int, int]


def recover(root: Path) -> tuple[str, ...]:
    """See `Store.recover`. Under both locks.

    Where something is wrong, `index.json` first says everything without saying how much of the history that includes,
    so that whoever reads between two steps, or after a crash there, meets the damage or the result.
    """
    problems: list[str] = []
    left = _what_is_left(root / INDEX_FILE, problems)
    whole = list(_whole_lines(root / HISTORY_FILE, problems))
    start, size = left.offset or 0, whole[-1][1] if whole else 0
    if start > size:
        problems.append(f"{HISTORY_FILE}: ends at byte {size}, but {INDEX_FILE} knows it up to {start}")
    elif start not in {0, *(end for _, end in whole)}:
        problems.append(f"{HISTORY_FILE}: no line begins at {start}, up to where {INDEX_FILE} knows it")
        start = 0
    new = [span for span in whole if span[0] >= start]
    index = left.apply(_changes(root / HISTORY_FILE, new))
    problems += [problem for problem in index.problems if problem not in problems]
    index = replace(index, problems=())
    if problems and not index.names and any((root / "blobs" / "sha256").glob("*")):
        raise StoreError(
            f"{root}: neither {INDEX_FILE} nor {HISTORY_FILE} says which versions there were ({'; '.join(problems)}). "
            "Bring one of them back from a backup; nothing was changed, and the blobs are still there"
        )
    if problems:
        for name in (INDEX_FILE, HISTORY_FILE):
            _keep(root / name)
        replace_file(root / INDEX_FILE, index.document(None))
        _rewrite(root / HISTORY_FILE, whole)
    replace_file(root / INDEX_FILE, index.document(sum(end - begin for begin, end in whole)))
    return tuple(problems)


def _what_is_left(path: Path, problems: list[str]) -> Index:
    try:
        index = Index.parse(read_at_most(path, MAX_INDEX_BYTES), INDEX_FILE)
    except StoreError as error:
        problems.append(str(error))
        return Index()
    problems += index.problems
    return index


def _whole_lines(path: Path, problems: list[str]) -> Iterator[_Span]:
    """Where lines that can be read begin and end, in bytes. A last one without its end is no problem."""
    if not os.path.lexists(path):
        return
    try:
        with open_regular(path) as file, explained("read", path):
            end = 0
            for number in count(1):
                begin, line = end, file.readline(MAX_LINE_BYTES + 1)
                rest = line
                while rest and not rest.endswith(b"\n"):
                    rest = file.readline(MAX_LINE_BYTES + 1)
                end = file.tell()
                if not rest:
                    if len(line) > MAX_LINE_BYTES:
                        problems.append(f"{HISTORY_FILE}: what follows on byte {begin} is no line")
                    return
                try:
                    decode(line, f"{HISTORY_FILE}: line {number}")
                    yield begin, end
                except StoreError as error:
                    problems.append(str(error))
    except StoreError as error:
        problems.append(str(error))


def _lines(path: Path, spans: Iterable[_Span]) -> Iterator[bytes]:
    spans = list(spans)
    if spans:
        with open_regular(path) as file, explained("read", path):
            for begin, end in spans:
                file.seek(begin)
                yield file.read(end - begin)


def _changes(path: Path, spans: Iterable[_Span]) -> Iterator[Change]:
    for line in _lines(path, spans):
        yield from decode(line, HISTORY_FILE).changes


def _rewrite(path: Path, spans: Iterable[_Span]) -> None:
    with partial_file(path.parent, mode=0o644) as (partial, file), explained("write", path):
        file.writelines(_lines(path, spans))
        settle(partial, file, path)
        sync_directory(path.parent)


def _keep(path: Path) -> None:
    kept = path.with_name(f"{path.name}.damaged-{unique_name()}")
    with explained("keep a copy of", path):
        if path.is_file() and not path.is_symlink():
            shutil.copyfile(path, kept)
