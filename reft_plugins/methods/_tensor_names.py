"""Names of tensors that belong to a layer as a whole."""

from __future__ import annotations

from collections.abc import Iterable

from reft_plugins.errors import AdapterError


def layers_of(names: Iterable[str], *kinds: str) -> list[int]:
    """The layers in names `layers.<layer>.<kind>`, ascending.

    Raises:
        AdapterError: on a name of another form.
    """
    layers = set()
    for name in names:
        parts = name.split(".")
        if len(parts) != 3 or parts[0] != "layers" or not parts[1].isdecimal() or parts[2] not in kinds:
            raise AdapterError(f"tensor name {name!r} is not of the form layers.<layer>.<{'|'.join(kinds)}>")
        layers.add(int(parts[1]))
    return sorted(layers)
