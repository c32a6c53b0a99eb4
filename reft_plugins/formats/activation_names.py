"""What other libraries call the element-wise functions of `reft_plugins.program.ACTIVATIONS`."""

from __future__ import annotations

from reft_plugins.errors import AdapterError
from reft_plugins.program import ACTIVATIONS

_SYNONYMS = {
    "linear": "identity",
    "none": "identity",
    "swish": "silu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "leakyrelu": "leaky_relu",
}
"""By the names of transformers' `ACT2FN` and of AdapterHub; the `gelu` variants differ in rounding only."""


def activation_of(name: str | None, where: str) -> str:
    """Our name of an activation.

    Args:
        name: as pyreft, AdapterHub or transformers write it, upper or lower case; None for none.
        where: what to name in an error.

    Raises:
        AdapterError: when it is none of those a runtime computes.
    """
    lowered = str(name).lower()
    found = _SYNONYMS.get(lowered, lowered)
    if found not in ACTIVATIONS:
        known = ", ".join((*ACTIVATIONS, *_SYNONYMS))
        raise AdapterError(f"{where}: activation {name!r} is none of those that can be executed: {known}")
    return found
