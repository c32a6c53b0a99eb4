"""What makes a program valid: shapes, names, and that it fits its base model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from reft_plugins.errors import AdapterError
from reft_plugins.program import ACTIVATIONS, COMPONENTS, Edit, KeyValuePrefix, Node, VirtualTokens, WeightDelta

if TYPE_CHECKING:
    from torch import Tensor

    from reft_plugins.manifest import BaseModelIdentity


def check_program(nodes: Sequence[Node], base: BaseModelIdentity | None) -> None:
    """Check every node, and that they go together; see `Program.validate`.

    Raises:
        AdapterError: naming the node and what does not fit.
    """
    for node in nodes:
        if isinstance(node, Edit):
            _check_edit(node, base)
        elif isinstance(node, WeightDelta):
            _check_weight_delta(node)
        elif isinstance(node, VirtualTokens):
            _check_virtual_tokens(node, base)
        else:
            _check_prefix(node, base)
    _check_prefix_lengths([node for node in nodes if isinstance(node, KeyValuePrefix)])


def _check_edit(edit: Edit, base: BaseModelIdentity | None) -> None:
    for component in (edit.site.component, edit.reads or edit.site.component):
        if component not in COMPONENTS:
            raise AdapterError(f"{edit.site}: unknown component {component!r}; known are {', '.join(COMPONENTS)}")
    if edit.activation not in ACTIVATIONS:
        raise AdapterError(f"{edit.site}: unknown activation {edit.activation!r}; known are {', '.join(ACTIVATIONS)}")
    if (edit.down is None) != (edit.up is None) or (edit.bias is not None and edit.down is None):
        raise AdapterError(f"{edit.site}: down, up and bias belong together")
    widths = {t.shape[-1] if t.ndim else 0 for t in (edit.down, edit.up, edit.scale, edit.shift) if t is not None}
    if len(widths) != 1 or 0 in widths:
        raise AdapterError(f"{edit.site}: one hidden size is needed, its tensors have {sorted(widths) or 'none'}")
    width, rank = int(widths.pop()), int(edit.down.shape[0]) if edit.down is not None else 0
    if edit.down is not None and not rank:
        raise AdapterError(f"{edit.site}: rank 0 edits nothing")
    for name, tensor, shape in (
        ("up", edit.up, [rank, width]),
        ("down", edit.down, [rank, width]),
        ("bias", edit.bias, [rank]),
        ("scale", edit.scale, [width]),
        ("shift", edit.shift, [width]),
    ):
        _check_tensor(str(edit.site), name, tensor, shape)
    if base is None:
        return
    if not 0 <= edit.site.layer < base.num_hidden_layers:
        raise AdapterError(
            f"{edit}: layer {edit.site.layer} is outside the base model {base.name}, "
            f"which has layers 0 to {base.num_hidden_layers - 1}"
        )
    if edit.site.component not in ("attention_value_output", "mlp_activation") and width != base.hidden_size:
        raise AdapterError(f"{edit}: made for hidden size {width}, the base model has {base.hidden_size}")
    if rank > base.hidden_size:
        raise AdapterError(f"{edit}: rank {rank} exceeds the base model's hidden size {base.hidden_size}")


def _check_weight_delta(delta: WeightDelta) -> None:
    where = f"module {delta.module}"
    if not math.isfinite(delta.scaling):
        raise AdapterError(f"{where}: scaling is {delta.scaling}")
    outputs = inputs = None
    if (delta.a is None) != (delta.b is None):
        raise AdapterError(f"{where}: a and b belong together")
    if delta.a is not None and delta.b is not None:
        if delta.a.ndim != 2 or delta.b.ndim != 2 or delta.a.shape[0] != delta.b.shape[1]:
            raise AdapterError(
                f"{where}: a {list(delta.a.shape)} and b {list(delta.b.shape)} do not multiply to [out, in]"
            )
        outputs, inputs = delta.b.shape[0], delta.a.shape[1]
        if not 0 < delta.rank <= min(outputs, inputs):
            raise AdapterError(
                f"{where}: rank {delta.rank} is outside 1 to {min(outputs, inputs)} of its {outputs} x {inputs}"
            )
        _check_tensor(where, "a", delta.a, [delta.rank, inputs])
        _check_tensor(where, "b", delta.b, [outputs, delta.rank])
    for name, tensor, size in (
        ("magnitude", delta.magnitude, outputs),
        ("bias", delta.bias, outputs),
        ("output_scale", delta.output_scale, outputs),
        ("input_scale", delta.input_scale, inputs),
    ):
        if tensor is not None:
            _check_tensor(where, name, tensor, [tensor.numel() if size is None else size])
    for name, tensor in (("new_weight", delta.new_weight), ("new_bias", delta.new_bias)):
        if tensor is not None:
            _check_tensor(where, name, tensor, list(tensor.shape))


def _check_virtual_tokens(node: VirtualTokens, base: BaseModelIdentity | None) -> None:
    shape = node.embeddings.shape
    if len(shape) != 2 or not shape[0] or (base is not None and shape[1] != base.hidden_size):
        hidden = "hidden" if base is None else str(base.hidden_size)
        raise AdapterError(f"{node}: embeddings have shape {list(shape)}, expected [n, {hidden}] with n at least 1")
    _check_tensor(str(node), "embeddings", node.embeddings, list(shape))


def _check_prefix(node: KeyValuePrefix, base: BaseModelIdentity | None) -> None:
    shape = list(node.keys.shape)
    if len(shape) != 3 or 0 in shape:
        raise AdapterError(f"{node}: keys have shape {shape}, expected [n, kv_heads, head_dim] with n at least 1")
    _check_tensor(str(node), "keys", node.keys, shape)
    _check_tensor(str(node), "values", node.values, shape)
    if node.gate is not None:
        _check_tensor(str(node), "gate", node.gate, [node.gate.numel()])
    if base is not None and not 0 <= node.layer < base.num_hidden_layers:
        raise AdapterError(
            f"{node}: layer {node.layer} is outside the base model {base.name}, "
            f"which has layers 0 to {base.num_hidden_layers - 1}"
        )


def _check_prefix_lengths(prefixes: Sequence[KeyValuePrefix]) -> None:
    """Real tokens begin behind the prefix, so each layer has one at most, all of one length; any number have a gate."""
    layers = [node.layer for node in prefixes if node.gate is None]
    if repeated := {layer for layer in layers if layers.count(layer) > 1}:
        raise AdapterError(
            f"layer {min(repeated)} has several prefixes without a gate; put their keys and values into one"
        )
    lengths = {len(node.keys) for node in prefixes if node.gate is None}
    if len(lengths) > 1:
        raise AdapterError(f"prefixes of {', '.join(map(str, sorted(lengths)))} pairs: one length is needed")


def _check_tensor(where: str, name: str, tensor: Tensor | None, shape: list[int]) -> None:
    if tensor is None:
        return
    if list(tensor.shape) != shape:
        raise AdapterError(f"{where}: {name} has shape {list(tensor.shape)}, expected {shape}")
    if not tensor.is_floating_point():
        raise AdapterError(f"{where}: {name} is {tensor.dtype}, expected floating point numbers")
