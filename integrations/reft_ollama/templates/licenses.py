"""The licenses of a base model and of an adapter, as far as their folders say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_NAMES = ("license", "licence", "copying", "notice")
_CARD = "README.md"


def find_licenses(*folders: Path | None, notes: Mapping[str, str] | None = None) -> list[str]:
    """Texts of licenses, each once, in order.

    A folder's license files count, and in their absence what the head of its model card names. Notices beside a
    license belong to it, as some licenses ask.

    Args:
        folders: the base model's first; None for one that is not there.
        notes: of an adapter's manifest; a `license` in it is taken if its folder has none.
    """
    found: list[str] = []
    for number, folder in enumerate(folders):
        texts = [] if folder is None else list(_of_folder(folder))
        if not texts and number == len(folders) - 1 and notes and notes.get("license"):
            texts = [f"License of the adapter: {notes['license']}"]
        found += [text for text in texts if text not in found]
    return found


def _of_folder(folder: Path) -> Iterator[str]:
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name.lower().startswith(_NAMES))
    texts = [path.read_text("utf-8", errors="replace").strip() for path in files]
    yield from filter(None, texts if any(texts) else [_named_in_card(folder / _CARD)])


def _named_in_card(card: Path) -> str:
    """What a model card's head says of the license, "" if nothing."""
    if not card.is_file():
        return ""
    from huggingface_hub import metadata_load

    try:
        head: dict[str, Any] = metadata_load(card) or {}
    except ValueError:
        return ""
    name = head.get("license_name") or head.get("license")
    if not isinstance(name, str):
        return ""
    link = head.get("license_link")
    return f"License: {name}" + (f" ({link})" if isinstance(link, str) else "")
