"""Finding the decoder layers of a model by structure, the same way in every runtime."""

from __future__ import annotations

from torch import nn

from reft_plugins.errors import UnsupportedProgramError

LAYER_LISTS = ("layers", "h", "blocks", "layer")
"""Names under which models keep their list of decoder layers."""


def decoder_layers(model: nn.Module, count: int | None) -> tuple[str, nn.ModuleList]:
    """The list of `count` decoder layers of a model, with its qualified name.

    Raises:
        UnsupportedProgramError: listing what was looked for.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] in LAYER_LISTS and len(module) == count:
            return name, module
    wanted = f"{count} decoder layers" if count is not None else "decoder layers, whose number its configuration lacks,"
    raise UnsupportedProgramError(
        f"{type(model).__name__}: no list of {wanted} found; looked for modules named {', '.join(LAYER_LISTS)}"
    )
