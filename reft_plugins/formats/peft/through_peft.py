"""Every other method of PEFT that changes weights: PEFT merges it into the base, and the difference is the adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from reft_plugins.adapter import Adapter
from reft_plugins.base_model import BaseModel
from reft_plugins.errors import AdapterError
from reft_plugins.formats.peft.base_modules import BaseModules
from reft_plugins.formats.peft.checkpoint import Checkpoint
from reft_plugins.formats.peft.low_rank import factors
from reft_plugins.program import Program, WeightDelta

if TYPE_CHECKING:
    from torch import Tensor

REFUSED = {
    "POLY": "it routes by task, so it is no single change of weights",
    "XLORA": "it mixes several adapters by what the input is, so it is no single change of weights",
}
_TOKENS = 48
_TOLERANCE = 1e-4
_EXACT_PARAMETERS = 4_000_000_000
"""Bases up to this size are merged in float64, where a method that only changes weights leaves no difference at all."""


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
    return _convert(checkpoint, base, peft)


def _convert(checkpoint: Checkpoint, base: BaseModel, peft: Any) -> Adapter:
    import torch
    from transformers import AutoModelForCausalLM

    from reft_plugins.base_model import attention_implementation

    kind, where = checkpoint.kind, checkpoint.directory
    model: Any = AutoModelForCausalLM.from_pretrained(
        base.directory, dtype=torch.float32, attn_implementation=attention_implementation(base.directory)
    )
    model.eval()
    wide = torch.float64 if sum(p.numel() for p in model.parameters()) <= _EXACT_PARAMETERS else torch.float32
    before = {name: tensor.to(wide, copy=True) for name, tensor in model.state_dict().items()}
    tokens = torch.randint(0, model.config.get_text_config().vocab_size, (2, _TOKENS), generator=_drawn())
    try:
        with torch.no_grad():
            plain = model(input_ids=tokens).logits
            wrapped = peft.PeftModel.from_pretrained(model, str(where)).eval().to(wide)
            expected = wrapped(input_ids=tokens).logits
            merged = wrapped.merge_and_unload().eval()
            got = merged(input_ids=tokens).logits
    except (Exception, SystemExit) as error:
        raise AdapterError(f"{where}: PEFT cannot load and merge this adapter of type {kind}: {error}") from error
    apart, effect = float((got - expected).abs().max()), float((expected - plain).abs().max())
    if apart > _TOLERANCE * max(1.0, float(expected.abs().max())):
        raise AdapterError(
            f"{where}: adapters of type {kind} do more than change weights: with its weights merged the model's logits "
            f"differ by {apart:.2g} from what PEFT computes"
        )
    modules = BaseModules.of(base)
    nodes = _nodes(before, merged.state_dict(), modules)
    if not nodes:
        raise AdapterError(f"{where}: the adapter changes nothing: every weight is the base's own")
    low = sum(node.a is not None for node in nodes)
    checkpoint.assumed.append(
        f"merged by peft {peft.__version__}; logits on random tokens within {apart:.1g} of PEFT's (effect {effect:.2g})"
    )
    found = f"{kind} on {len(nodes)} modules: {low} changes of low rank, {len(nodes) - low} replaced weights"
    return checkpoint.program(Program(tuple(nodes)), base, found)


def _drawn() -> Any:
    import torch

    return torch.Generator().manual_seed(0)


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
