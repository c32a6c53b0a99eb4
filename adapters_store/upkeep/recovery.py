"""Making the index of a damaged store anew."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from adapters_store.layout.files import explained, read_at_most, unique_name
from adapters_store.layout.history import HISTORY_FILE, Change, decode, read_lines
from adapters_store.layout.index import Index
from adapters_store.layout.ledger import replace_file
from adapters_store.layout.oci import MAX_INDEX_BYTES
from adapters_store.location import INDEX_FILE
from reft_plugins.errors import StoreError


def recover(root: Path) -> tuple[str, ...]:
    """See `Store.recover`. Under both locks."""
    problems: list[str] = []
    index = _what_is_left(root, problems)
    lines, changes = _whole_lines(root, problems)
    index = index.apply(changes)
    problems += [problem for problem in index.problems if problem not in problems]
    history = b"".join(lines)
    if problems:
        for name in (INDEX_FILE, HISTORY_FILE):
            _keep(root / name)
    replace_file(root / HISTORY_FILE, history)
    replace_file(root / INDEX_FILE, replace(index, problems=()).document(len(history)))
    return tuple(problems)


def _what_is_left(root: Path, problems: list[str]) -> Index:
    try:
        index = Index.parse(read_at_most(root / INDEX_FILE, MAX_INDEX_BYTES), INDEX_FILE)
    except StoreError as error:
        problems.append(str(error))
        return Index()
    problems += index.problems
    return index


def _whole_lines(root: Path, problems: list[str]) -> tuple[list[bytes], list[Change]]:
    whole: list[bytes] = []
    changes: list[Change] = []
    try:
        lines, _ = read_lines(root / HISTORY_FILE)
    except StoreError as error:
        problems.append(str(error))
        return [], []
    for number, line in enumerate(lines, 1):
        try:
            changes += decode(line, f"{HISTORY_FILE}: line {number}").changes
            whole.append(line)
        except StoreError as error:
            problems.append(str(error))
    return whole, changes


def _keep(path: Path) -> None:
    kept = path.with_name(f"{path.name}.damaged-{unique_name()}")
    with explained("keep a copy of", path):
        if path.is_file() and not path.is_symlink():
            kept.write_bytes(path.read_bytes())
