"""The configuration file: where the store is, which remotes it fills itself from, and what is trusted.

    [store]
    path = "~/adapters"                         # used where REFT_STORE is not set
    remotes = ["oci://registry.example/team"]   # asked in this order for what the store does not have; none by default
    refresh = 300                               # seconds after which a tag is looked up there again

    [trust]
    policy = "policy.toml"

`refresh` may also be "never" (the default: a tag of the local store is never looked up again) or "always". Relative
paths belong to the file's folder. This module imports nothing heavy where there is no such file.
"""

from __future__ import annotations

import math
import os
import stat
import tomllib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from adapters_store import limits
from reft_plugins.errors import StoreError

VARIABLE = "REFT_CONFIG"
MAX_BYTES = limits.MAX_CONFIGURATION_BYTES


@dataclass(frozen=True, slots=True)
class Configuration:
    """What the configuration file says.

    Attributes:
        file: the file, None where there is none.
        store: the store's folder, None where the file does not say.
        remotes: addresses to fill the store from, in the order in which they are asked.
        refresh: seconds after which a tag is looked up in the remotes again; infinity for never.
        policy: the trust policy's file, None where the file does not say.
    """

    file: Path | None = None
    store: Path | None = None
    remotes: tuple[str, ...] = ()
    refresh: float = math.inf
    policy: Path | None = None


def location() -> Path:
    """Where the file is looked for: `REFT_CONFIG`, else `reft/config.toml` in `XDG_CONFIG_HOME` or `~/.config`."""
    if chosen := os.environ.get(VARIABLE):
        return Path(chosen).expanduser()
    folder = os.environ.get("XDG_CONFIG_HOME", "")
    return (Path(folder) if os.path.isabs(folder) else Path.home() / ".config") / "reft" / "config.toml"


def configuration() -> Configuration:
    """What the configuration file says now; read again only when it changed.

    Raises:
        StoreError: naming the file that cannot be read or has a wrong entry, or that `REFT_CONFIG` names in vain.
    """
    path = location()
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        if os.environ.get(VARIABLE):
            raise StoreError(f"{path}: {VARIABLE} names it, but there is no such file. Write it, or unset it") from None
        if path.is_symlink():
            raise StoreError(f"{path}: a link to a file that does not exist. Repair or remove it") from None
        return Configuration()
    except OSError as error:
        raise StoreError(f"{path}: cannot read the configuration: {error.strerror}") from None
    return _read(path, (status.st_ino, status.st_mtime_ns, status.st_size, status.st_mode))


@lru_cache(maxsize=4)
def _read(path: Path, stamp: tuple[int, ...]) -> Configuration:
    if not stat.S_ISREG(stamp[-1]) and str(path) != os.devnull:
        raise StoreError(f"{path}: cannot read the configuration: not a regular file")
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise StoreError(f"{path}: cannot read the configuration: {error.strerror}") from None
    if len(data) > MAX_BYTES:
        raise StoreError(f"{path}: a configuration larger than {MAX_BYTES} bytes is not read")
    try:
        document = tomllib.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path}: not readable TOML: {error}") from None
    return _checked(document, path)


def _checked(document: dict[str, Any], path: Path) -> Configuration:
    from pydantic import ValidationError

    from adapters_store.configuration_schema import KNOWN, Document
    from adapters_store.mistakes import mistakes

    try:
        found = Document.model_validate(document)
    except ValidationError as error:
        raise StoreError(f"{path}: {mistakes(error, KNOWN)}") from None

    def placed(text: str | None) -> Path | None:
        try:
            return None if text is None else path.parent.absolute() / Path(text).expanduser()
        except RuntimeError as error:
            raise StoreError(f"{path}: {text!r}: {error}") from None

    return Configuration(
        file=path,
        store=placed(found.store.path),
        remotes=tuple(found.store.remotes),
        refresh=found.store.refresh,
        policy=placed(found.trust.policy),
    )
