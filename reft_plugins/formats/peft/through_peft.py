"""Every other method of PEFT that changes weights: PEFT merges it into the base, and the difference is the adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from reft_plugins.adapter import Adapter
from reft_plugins.base_model import BaseModel, attention_implementation
from reft_plugins.errors import AdapterError
from reft_plugins.formats.peft.base_modules import BaseModules
from reft_plugins.formats.peft.checkpoint import Checkpoint
from reft_plugins.formats.peft.low_rank import factors
from reft_plugins.program import Program, WeightDelta

if TYPE_CHECKING:
    import torch
    from torch import Tensor

REFUSED = {
    "POLY": "it routes by task, so it is no single change of weights",
    "XLORA": "it mixes several adapters by what the input is, so it is no single change of weights",
}
_TOKENS = 48
_TOLERANCES = {True: 1e-5, False: 1e-3}
"""Logits of the merged model and of PEFT's forward pass, relative to the largest: in float64 or else in float32."""
_EXACT_PARAMETERS = 4_000_000_000
"""Bases up to this size are merged in float64, where a method that only changes weights leaves no difference."""


def read(checkpoint: Checkpoint, base: BaseModel | None) -> Adapter:
    """Load base and adapter by PEFT on the CPU, merge, and keep what changed.

    The merged model's logits on random tokens must be those of PEFT's own forward pass; what does not only change
    weights fails that and is refused. A change of low rank is kept as two factors, another as the new weight.

    Raises:
        AdapterError: PEFT is missing or cannot load or merge the adapter, or merging is not exact.
    """
    kind, where = checkpoint.kind, checkpoint.directory
    if kind in REFUSED:
        raise AdapterError(f"{where}: adapters of type {kind} are not read: {REFUSED[kind]}")
    try:
        import peft
    except ImportError as error:
        raise AdapterError(
            f"{where}: adapters of type {kind} are converted by peft, which cannot be imported ({error}). "
            "pip install 'reft-plugins[train]'"
        ) from None
    if kind not in peft.PeftType.__members__:
        raise AdapterError(f"{where}: peft {peft.__version__} knows no adapters of type {kind}; install a newer one")
    if base is None:
        raise AdapterError(
            f"{where}: adapters of type {kind} are merged into their base by PEFT: give the base (--base)"
        )
    _check_settings(checkpoint, peft)
    return _convert(checkpoint, base, peft)


def _check_settings(checkpoint: Checkpoint, peft: Any) -> None:
    """Refuse settings that the installed PEFT would leave out with no more than a warning."""
    from dataclasses import fields

    known = {field.name for field in fields(peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[checkpoint.kind])}
    unknown = [name for name in sorted(set(checkpoint.config) - known) if checkpoint.config[name]]
    if unknown:
        raise AdapterError(
            f"{checkpoint.config_file}: peft {peft.__version__} does not know the setting {unknown[0]!r}; install the "
            f"version that wrote the adapter ({checkpoint.config.get('peft_version') or 'not named in it'})"
        )


def _convert(checkpoint: Checkpoint, base: BaseModel, peft: Any) -> Adapter:
    import torch

    where, kind = checkpoint.directory, checkpoint.kind
    try:
        merged = _merge(base, checkpoint, peft, torch.float64)
    except Exception:  # some methods compute in float32 only
        try:
            merged = _merge(base, checkpoint, peft, torch.float32)
        except Exception as error:
            raise AdapterError(f"{where}: PEFT cannot load and merge this adapter of type {kind}: {error}") from error
    if merged.apart > merged.tolerance:
        raise AdapterError(
            f"{where}: adapters of type {kind} do more than change weights: with its weights merged the model's logits "
            f"differ by {merged.apart:.2g} from what PEFT computes"
        )
    nodes = _nodes(merged.before, merged.after, BaseModules.of(base))
    if not nodes:
        raise AdapterError(f"{where}: the adapter changes nothing: every weight is the base's own")
    low = sum(node.a is not None for node in nodes)
    checkpoint.assumed.append(
        f"merged by peft {peft.__version__}; logits on random tokens within {merged.apart:.1g} of PEFT's "
        f"(effect {merged.effect:.2g})"
    )
    found = f"{kind} on {len(nodes)} modules: {low} changes of low rank, {len(nodes) - low} replaced weights"
    return checkpoint.program(Program(tuple(nodes)), base, found)


@dataclass(frozen=True, slots=True)
class _Merged:
    """The base's state before and after, and how logits of the merged model compare with PEFT's forward pass."""

    before: dict[str, Tensor]
    after: dict[str, Tensor]
    apart: float
    effect: float
    tolerance: float


def _merge(base: BaseModel, checkpoint: Checkpoint, peft: Any, dtype: torch.dtype) -> _Merged:
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        base.directory, dtype=torch.float32, attn_implementation=attention_implementation(base.directory)
    )
    model.eval()
    if sum(parameter.numel() for parameter in model.parameters()) > _EXACT_PARAMETERS:
        dtype = torch.float32
    before = {name: tensor.to(dtype, copy=True) for name, tensor in model.state_dict().items()}
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.config.get_text_config().vocab_size, (2, _TOKENS), generator=draw)
    with torch.no_grad():
        plain = model(input_ids=tokens).logits
        wrapped = peft.PeftModel.from_pretrained(model, str(checkpoint.directory)).eval().to(dtype)
        expected = wrapped(input_ids=tokens).logits
        merged = wrapped.merge_and_unload().eval()
        got = merged(input_ids=tokens).logits
    return _Merged(
        before,
        merged.state_dict(),
        apart=float((got - expected).abs().max()),
        effect=float((expected - plain).abs().max()),
        tolerance=_TOLERANCES[dtype is torch.float64] * max(1.0, float(expected.abs().max())),
    )


def _nodes(before: dict[str, Tensor], after: dict[str, Tensor], modules: BaseModules) -> list[WeightDelta]:
    import torch

    nodes: dict[str, dict[str, Any]] = {}
    for name, own in before.items():
        new = after.get(name)
        if new is None or new.shape != own.shape:
            raise AdapterError(f"merging removed or reshaped {name} of the base model, which no program says")
        if torch.equal(new, own):
            continue
        module, _, parameter = name.rpartition(".")
        if parameter not in ("weight", "bias"):
            raise AdapterError(f"merging changed {name} of the base model, which is neither a weight nor a bias")
        node = nodes.setdefault(module, {})
        if parameter == "weight" and own.ndim == 2:
            node |= _weight(module, own, new, modules)
        else:
            node[f"new_{parameter}"] = new.float()
    return [WeightDelta(module=module, **node) for module, node in nodes.items()]


def _weight(module: str, own: Tensor, new: Tensor, modules: BaseModules) -> dict[str, Any]:
    """The change of a matrix by two factors where its rank is low, else the new matrix."""
    change = new - own
    if modules.is_transposed(module) or modules.is_embedding(module):
        change = change.T
    found = factors(change)
    return {"new_weight": new.float()} if found is None else {"a": found[0].float(), "b": found[1].float()}
