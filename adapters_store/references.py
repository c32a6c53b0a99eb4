"""How stored adapters are named: `name`, `name:tag`, `name@v3`, `name@sha256:…`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from adapters_store import limits
from reft_plugins.errors import StoreError

MAX_NAME_LENGTH = limits.MAX_NAME_LENGTH
MAX_TAG_LENGTH = limits.MAX_TAG_LENGTH

# Repository names and tags of the OCI distribution specification, narrowed to what its image specification also
# allows in the annotation that carries them, so that every program reads every reference.
_NAME = r"[a-z0-9]+(?:(?:[._-]|--)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:[._-]|--)[a-z0-9]+)*)*"
_TAG = r"[A-Za-z0-9]+(?:(?:[._-]|--)[A-Za-z0-9]+)*"
_REFERENCE = re.compile(
    rf"(?P<name>{_NAME})(?::(?P<tag>{_TAG})|@v(?P<version>[1-9][0-9]{{0,8}})|@(?P<digest>sha256:[0-9a-f]{{64}}))?"
)
_VERSION_TAG = re.compile("v([1-9][0-9]{0,8})")
_RULES = (
    "Write name:tag, name@v3 or name@sha256:<64 digits>. Names are lower-case letters and digits, tags any letters and "
    "digits, separated by single '.', '_', '-' (names also by '/'); at most "
    f"{MAX_NAME_LENGTH} characters for a name and {MAX_TAG_LENGTH} for a tag"
)


@dataclass(frozen=True, slots=True)
class Reference:
    """A parsed reference. At most one of `tag`, `version` and `digest` is set; `str(reference)` parses back."""

    name: str
    tag: str | None = None
    version: int | None = None
    digest: str | None = None

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Read a reference.

        Raises:
            StoreError: when it is not of the grammar; says what is.
        """
        match = _REFERENCE.fullmatch(text) if len(text) <= MAX_NAME_LENGTH + MAX_TAG_LENGTH + 1 else None
        if match is None or len(match["name"]) > MAX_NAME_LENGTH or len(match["tag"] or "") > MAX_TAG_LENGTH:
            raise StoreError(f"{text[:MAX_NAME_LENGTH]!r} is not a reference. {_RULES}")
        version = match["version"]
        return cls(match["name"], match["tag"], int(version) if version else None, match["digest"])

    @classmethod
    def try_parse(cls, text: str) -> Reference | None:
        """Read a reference, or None where the text is not one."""
        try:
            return cls.parse(text)
        except StoreError:
            return None

    def __str__(self) -> str:
        if self.tag is not None:
            return f"{self.name}:{self.tag}"
        if self.version is not None:
            return f"{self.name}@v{self.version}"
        return f"{self.name}@{self.digest}" if self.digest is not None else self.name

    @property
    def tag_as_version(self) -> int | None:
        """The version that a tag such as `v3` means where nothing is tagged so, as registries know versions."""
        match = _VERSION_TAG.fullmatch(self.tag or "")
        return int(match[1]) if match else None

    @property
    def exact(self) -> bool:
        """True when it selects one version: anything but a bare name."""
        return (self.tag, self.version, self.digest) != (None, None, None)


def parse_tag(text: str, name: str) -> str:
    """A tag for adapters called `name`, given as `tag` or as `name:tag`.

    Raises:
        StoreError: when it is not a tag, or belongs to another name.
    """
    reference = Reference.parse(text if ":" in text else f"{name}:{text}")
    if reference.tag is None or reference.name != name:
        raise StoreError(
            f"{text!r} is no tag for {name!r}: tags stay within one name. Write only the tag, as in 'prod'"
        )
    return reference.tag
