"""The trust policy: which adapters of the store may be used, by their names and by who signed them.

    default = "refuse"                       # what no rule names: "refuse" (also when left out) or "allow"

    [[rules]]
    names = ["prod/*", "sentiment"]          # the first rule that matches a name decides; * matches any characters
    keys = ["keys/release.pub", "keys/audit.pub"]
    at_least = 2                             # different keys of the list; one is enough when left out

    [[rules]]
    names = ["scratch/*"]
    allow_unsigned = true

Keys are public keys in PEM: paths, relative ones from the policy's folder, or the text itself. Whatever is wrong with
the policy or with a key that it names, nothing is admitted.

What a policy does not do: It holds for references of a store, not for folders that are named by their path. A signature
vouches for content, so the same content is admitted under every name whose rule lists the key: names that must not
stand in for each other need different keys. Every signed version stays admitted, older ones too, and a tag may move
back to one: where that matters, name a version by number or digest, or sign with another key from then on. It is asked
whenever a version is handed out: what a server has loaded already stays loaded when a key leaves the policy.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from adapters_store.configuration import configuration
from adapters_store.limits import MAX_KEY_BYTES, MAX_POLICY_BYTES
from adapters_store.mistakes import mistakes
from adapters_store.trust.keys import PublicKey, distinct, parse_public_key, read_settings
from adapters_store.wording import counted
from reft_plugins.errors import StoreError, UntrustedError
from reft_plugins.manifest import sha256

VARIABLE = "REFT_POLICY"


def _pattern(text: str) -> str:
    if re.fullmatch(r"[a-z0-9._/*?\[\]!-]+", text) is None:
        raise ValueError(f"{text!r} matches no name: those have lower-case letters, digits, '.', '_', '-' and '/' only")
    return text


_Pattern = Annotated[str, AfterValidator(_pattern)]
"""What some name may match; a rule for names that cannot exist is a mistake, and may leave others without one."""


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RuleTable(_Table):
    """One of `[[rules]]`."""

    names: tuple[_Pattern, ...] = Field(min_length=1)
    keys: tuple[Annotated[str, StringConstraints(min_length=1)], ...] = ()
    at_least: int = Field(default=1, ge=1, strict=True)
    allow_unsigned: bool = Field(default=False, strict=True)

    @model_validator(mode="after")
    def _demands_one_thing(self) -> Self:
        if self.allow_unsigned == bool(self.keys):
            raise ValueError("needs either keys or allow_unsigned = true, and not both")
        if self.allow_unsigned and "at_least" in self.model_fields_set:
            raise ValueError("at_least has no meaning beside allow_unsigned = true")
        return self


class PolicyTable(_Table):
    """The whole file."""

    default: Literal["refuse", "allow"] = "refuse"
    rules: tuple[RuleTable, ...] = ()


_KNOWN = {"": tuple(PolicyTable.model_fields), "rules": tuple(RuleTable.model_fields)}


@dataclass(frozen=True, slots=True)
class Rule:
    """What names that match a pattern need: signatures by `at_least` different keys of `keys`, or none at all.

    Attributes:
        number: place among the policy's rules, from 1; 0 for the default.
    """

    number: int
    names: tuple[str, ...]
    keys: tuple[PublicKey, ...]
    at_least: int
    verdict: Literal["signed", "allow", "refuse"]

    def __str__(self) -> str:
        where = f"rule {self.number} for {', '.join(map(repr, self.names))}" if self.number else "its default"
        if self.verdict != "signed":
            return f"{where} ({self.verdict}s it)" if self.verdict == "refuse" else f"{where} (allows it unsigned)"
        wanted = f"{self.at_least} of the keys" if len(self.keys) > 1 else "the key"
        return f"{where} (which has to be signed by {wanted} {', '.join(map(str, self.keys))})"


@dataclass(frozen=True, slots=True)
class Policy:
    """A policy with the keys it names, as they were when it was read.

    Attributes:
        path: its file.
        digest: SHA-256 of its text and of all its keys.
        rules: in order.
        default: for names that no rule matches.
    """

    path: Path
    digest: str
    rules: tuple[Rule, ...]
    default: Rule

    def rule_for(self, name: str) -> Rule:
        """The first rule that matches a name, else the default."""
        matching = (rule for rule in self.rules if any(fnmatchcase(name, pattern) for pattern in rule.names))
        return next(matching, self.default)


def active() -> Policy | None:
    """The policy that holds: `REFT_POLICY`'s, else the configuration file's, else none. Read at every call.

    Raises:
        UntrustedError: when there is one, but it or one of its keys cannot be read or is malformed.
    """
    try:
        chosen = os.environ.get(VARIABLE)
        path = Path(chosen).expanduser() if chosen else configuration().policy
    except (StoreError, RuntimeError) as error:
        raise UntrustedError(f"cannot tell which policy holds, so nothing is admitted: {error}") from None
    return None if path is None else load(path)


def load(path: Path) -> Policy:
    """Read a policy and the keys it names.

    Raises:
        UntrustedError: saying what is wrong with which file.
    """
    try:
        text = read_settings(path, MAX_POLICY_BYTES)
        table = _parse(text)
        rules = tuple(_rule(number, rule, path.parent) for number, rule in enumerate(table.rules, 1))
    except StoreError as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise UntrustedError(
            f"policy {path}: {reason}. Nothing is admitted until this is repaired (`reft store policy check`)"
        ) from None
    keys = [[key.id for key in rule.keys] for rule in rules]
    return Policy(path, sha256(text + json.dumps(keys).encode()), rules, Rule(0, (), (), 0, table.default))


@lru_cache(maxsize=8)
def _parse(text: bytes) -> PolicyTable:
    try:
        return PolicyTable.model_validate(tomllib.loads(text.decode()))
    except ValidationError as error:
        raise StoreError(mistakes(error, _KNOWN)) from None
    except (ValueError, RecursionError) as error:
        raise StoreError(f"not readable TOML: {error}") from None


def _rule(number: int, table: RuleTable, folder: Path) -> Rule:
    if table.allow_unsigned:
        return Rule(number, table.names, (), 0, "allow")
    found = [_key(each, f"key {place} of rule {number}", folder) for place, each in enumerate(table.keys, 1)]
    keys = distinct(found)
    if table.at_least > len(keys):
        raise StoreError(
            f"rule {number}: at_least = {table.at_least}, but it lists {counted(len(keys), 'different key')}"
        )
    return Rule(number, table.names, keys, table.at_least, "signed")


def _key(text: str, label: str, folder: Path) -> PublicKey:
    if text.lstrip().startswith("-----BEGIN"):
        return _parse_key(text.encode(), label)
    try:
        path = folder / Path(text).expanduser()
        return _parse_key(read_settings(path, MAX_KEY_BYTES), str(path))
    except (ValueError, RuntimeError) as error:
        raise StoreError(f"{label}: {text[:80]!r} is no path: {error}") from None


_parse_key = lru_cache(maxsize=256)(parse_public_key)
