"""Prompt learning of PEFT: one tensor `prompt_embeddings`, of virtual tokens or of keys and values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from reft_plugins.adapter import Adapter
from reft_plugins.base_model import BaseModel
from reft_plugins.errors import AdapterError
from reft_plugins.formats.peft.base_modules import BaseModules
from reft_plugins.formats.peft.checkpoint import Checkpoint
from reft_plugins.formats.peft.saved import saved_deltas
from reft_plugins.program import KeyValuePrefix, Program, VirtualTokens

if TYPE_CHECKING:
    from torch import Tensor

_EMBEDDINGS = "prompt_embeddings"
_TASK = ("prefix_task_cols", "prefix_task_rows")
_METHODS = {"PROMPT_TUNING": "prompt_tuning", "P_TUNING": "p_tuning"}


def read_virtual_tokens(checkpoint: Checkpoint, base: BaseModel | None, task: int | None = None) -> Adapter:
    """Read prompt tuning, P-tuning, multi-task prompt tuning or CPT.

    Of P-tuning the file has the embeddings its encoder computed, and no encoder.

    Args:
        task: which task of multi-task prompt tuning.

    Raises:
        AdapterError: on malformed files.
    """
    embeddings = _embeddings(checkpoint)
    embeddings = _of_task(checkpoint, embeddings, task)
    node = VirtualTokens(embeddings)
    found = f"{len(embeddings)} virtual tokens ({checkpoint.kind})"
    method = _METHODS.get(checkpoint.kind)
    others = _others(checkpoint, base)
    if method is None or others:
        return checkpoint.program(Program((node, *others)), base, found)
    settings: dict[str, Any] = {"num_virtual_tokens": len(embeddings)}
    if method == "p_tuning":
        settings |= _encoder(checkpoint)
    else:
        settings["init"] = "random"
    return checkpoint.adapter(method, settings, {"embeddings": embeddings}, base, found)


def read_prefix(checkpoint: Checkpoint, base: BaseModel | None) -> Adapter:
    """Read prefix tuning (P-Tuning v2) or a cartridge: keys and values of every layer, used as they are.

    A row holds, for layer after layer, the key and then the value of all heads.

    Raises:
        AdapterError: on malformed files.
    """
    rows = _embeddings(checkpoint)
    layers, width, heads = (checkpoint.integer(name) for name in ("num_layers", "token_dim", "num_attention_heads"))
    if rows.shape[1] != layers * 2 * width or width % heads:
        raise AdapterError(
            f"{checkpoint.tensor_file}: {_EMBEDDINGS} has rows of {rows.shape[1]}, expected "
            f"2 x {layers} layers x {width} in {heads} heads"
        )
    if base is not None and layers != base.identity.num_hidden_layers:
        raise AdapterError(
            f"{checkpoint.config_file}: made for {layers} layers, the base model {base.identity.name} has "
            f"{base.identity.num_hidden_layers}"
        )
    pairs = rows.view(len(rows), layers, 2, heads, width // heads)
    tensors = {
        f"layers.{layer}.{name}": pairs[:, layer, index].contiguous()
        for layer in range(layers)
        for index, name in enumerate(("keys", "values"))
    }
    found = f"{len(rows)} keys and values for each of {layers} layers ({checkpoint.kind})"
    others = _others(checkpoint, base)
    if others:
        nodes = [
            KeyValuePrefix(layer, tensors[f"layers.{layer}.keys"], tensors[f"layers.{layer}.values"])
            for layer in range(layers)
        ]
        return checkpoint.program(Program((*nodes, *others)), base, found)
    settings = {"num_virtual_tokens": len(rows), "projection": bool(checkpoint.config.get("prefix_projection"))}
    return checkpoint.adapter("prefix_tuning", settings, tensors, base, found)


def _embeddings(checkpoint: Checkpoint) -> Tensor:
    submodules = checkpoint.config.get("num_transformer_submodules") or 1
    if submodules != 1:
        raise AdapterError(
            f"{checkpoint.config_file}: num_transformer_submodules={submodules}: adapters of encoder-decoder models "
            "are not read"
        )
    rows = checkpoint.tensors.get(_EMBEDDINGS)
    if rows is None or rows.ndim != 2:
        shape = "none" if rows is None else list(rows.shape)
        raise AdapterError(f"{checkpoint.tensor_file}: {_EMBEDDINGS} is {shape}, expected two dimensions")
    count = checkpoint.integer("num_virtual_tokens")
    if len(rows) != count:
        raise AdapterError(
            f"{checkpoint.tensor_file}: {len(rows)} virtual tokens, the configuration says num_virtual_tokens={count}"
        )
    return rows


def _of_task(checkpoint: Checkpoint, embeddings: Tensor, task: int | None) -> Tensor:
    """Multi-task prompt tuning multiplies the shared rows by a low-rank matrix per task (arXiv:2303.02861 eq. 2)."""
    columns, rows = (checkpoint.tensors.get(name) for name in _TASK)
    if columns is None or rows is None:
        if task is not None:
            raise AdapterError(f"{checkpoint.tensor_file}: this adapter has no tasks to choose from")
        return embeddings
    tasks = len(columns)
    if task is None and tasks > 1:
        raise AdapterError(
            f"{checkpoint.tensor_file}: it holds {tasks} tasks; say which by --option task=NUMBER, from 0"
        )
    if not 0 <= (task or 0) < tasks:
        raise AdapterError(f"{checkpoint.tensor_file}: it holds tasks 0 to {tasks - 1}, not {task}")
    return embeddings * (columns[task or 0] @ rows[task or 0])


def _encoder(checkpoint: Checkpoint) -> dict[str, Any]:
    config = checkpoint.config
    encoder = str(config.get("encoder_reparameterization_type") or "MLP").lower()
    settings: dict[str, Any] = {"encoder": encoder, "encoder_hidden_size": config.get("encoder_hidden_size")}
    if encoder == "lstm":
        settings["encoder_layers"] = config.get("encoder_num_layers") or 2
        settings["encoder_dropout"] = config.get("encoder_dropout") or 0.0
    return settings


def _others(checkpoint: Checkpoint, base: BaseModel | None) -> tuple[Any, ...]:
    rest = {name: tensor for name, tensor in checkpoint.tensors.items() if name not in (_EMBEDDINGS, *_TASK)}
    if not rest:
        return ()
    return tuple(saved_deltas(checkpoint, rest, None if base is None else BaseModules.of(base)).values())
