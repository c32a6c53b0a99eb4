"""The form of the configuration file; apart, so that pydantic is only imported where there is a file."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from adapters_store.remotes.address import Address
from reft_plugins.errors import StoreError

_REMOTES = ("oci://", "hf://", "/", "~")


def _seconds(value: Any) -> float:
    if value in ("never", "always"):
        return math.inf if value == "never" else 0.0
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf:
        return float(value)
    raise ValueError(f'{value!r} is neither "never" nor "always" nor a number of seconds')


def _remote(value: Any) -> Any:
    if isinstance(value, str) and not value.startswith(_REMOTES):
        raise ValueError(
            f"{value!r} is no address: write oci://host/prefix, hf://org/repo or the whole path of a store"
        )
    try:
        return str(Address.parse(value)) if isinstance(value, str) else value
    except StoreError as error:
        raise ValueError(str(error)) from None


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class StoreTable(_Table):
    """`[store]`."""

    path: str | None = Field(default=None, min_length=1)
    remotes: list[Annotated[str, BeforeValidator(_remote)]] = []
    refresh: Annotated[float, BeforeValidator(_seconds)] = math.inf


class TrustTable(_Table):
    """`[trust]`."""

    policy: str | None = Field(default=None, min_length=1)


class Document(_Table):
    """The whole file."""

    store: StoreTable = StoreTable()
    trust: TrustTable = TrustTable()


KNOWN = {
    "": tuple(Document.model_fields),
    "store": tuple(StoreTable.model_fields),
    "trust": tuple(TrustTable.model_fields),
}
"""The keys of every table."""
