"""From a source prompt to an adapter: what the base model has there is cached, in the subspaces of a rotation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from reft_plugins.adapter import Adapter, parse_config
from reft_plugins.base_model import identify
from reft_plugins.capturing import capture, parse_site
from reft_plugins.errors import AdapterError
from reft_plugins.loading import load, source_name
from reft_plugins.manifest import Parent
from reft_plugins.methods.das import DAS
from reft_plugins.methods.das.config import DASConfig
from reft_plugins.methods.das.masks import masks_of
from reft_plugins.methods.interchange.edits import single_positions, tokens_at
from reft_plugins.methods.interventions.units import Unit, UnitTensors, units_in
from reft_plugins.program import Site

if TYPE_CHECKING:
    from torch import Tensor

IDENTITY = "identity"


def cache_source(
    base: str | Path,
    source_prompt: str,
    rotation: Adapter | str | Path = IDENTITY,
    *,
    sites: Sequence[Site | str] = (),
    positions: str | None = None,
    source_positions: str | None = None,
    exchange: Sequence[str] = (),
) -> Adapter:
    """An adapter that gives every prompt what `source_prompt` has at some sites and tokens.

    Args:
        base: folder or hub id; source_prompt: text, run through it once, without any adapter.
        rotation: an adapter of method `das`, whose subspaces are exchanged, or `identity` for whole representations.
        sites: for `identity`: `Site`s or texts such as `3:block_output`.
        positions: for `identity`: tokens that are changed, `l1` by default; source_positions: tokens that are read,
            by default the same ones. A `das` adapter knows its own.
        exchange: for `das`: names of the subspaces, by default those it was trained to exchange.

    Returns:
        an adapter of method `interchange`.

    Raises:
        AdapterError: wrong settings, a source prompt without tokens at these positions, or no adapter of method `das`.
        BaseMismatchError: the rotation belongs to another base model.
    """
    if rotation == IDENTITY:
        if not sites or exchange:
            raise AdapterError("the identity exchanges whole representations: name sites, and no subspaces")
        changed = positions or "l1"
        plain = [Unit(site.layer, site.component, 0) for site in map(_site, sites)]
        values = _read(base, source_prompt, plain, source_positions or changed)
        tensors = {f"{unit}.value": value for unit, value in values.items()}
        notes = {"source": source_prompt}
        return Adapter.create("interchange", {"positions": changed}, tensors, identify(base), notes=notes)
    if sites or positions or source_positions:
        raise AdapterError("a learned rotation knows its sites and positions; leave them out")
    adapter = load(rotation, base=base)
    if adapter.manifest.method != DAS.name:
        raise AdapterError(f"a rotation is an adapter of method 'das', this one is of {adapter.manifest.method!r}")
    config: DASConfig = parse_config(DAS, adapter.manifest.config)
    if unknown := [name for name in exchange if name not in config.names]:
        raise AdapterError(f"no subspace {', '.join(unknown)}; there are {', '.join(config.names)}")
    chosen = exchange or config.exchanged
    tensors = {}
    for unit, value in _read(base, source_prompt, units_in(adapter.tensors), config.read_positions).items():
        tensors |= _rotated(config, UnitTensors(unit, adapter.tensors), chosen, value)
    return Adapter.create(
        "interchange",
        {"positions": config.positions},
        tensors,
        identify(base),
        parents=(Parent(relation="rotation", source=source_name(rotation), digest=adapter.digest),),
        notes={"source": source_prompt, "exchange": ", ".join(chosen)},
    )


def _site(site: Site | str) -> Site:
    return site if isinstance(site, Site) else parse_site(site)


def _read(base: str | Path, prompt: str, units: Sequence[Unit], positions: str) -> dict[Unit, Tensor]:
    """What the base model has at each unit's site, `[tokens, width]`, at single positions of the prompt."""
    found = capture(base, [prompt], [unit.site for unit in units], "prompt")
    tokens = tokens_at(single_positions(positions), len(found.prompts))
    return {unit: found.activations[unit.site][tokens] for unit in units}


def _rotated(config: DASConfig, stored: UnitTensors, exchange: Sequence[str], value: Tensor) -> dict[str, Tensor]:
    """The rows of the rotation that are exchanged and the source's value in them."""
    own = {name: stored[name] for name in ("rotation", "boundaries", "temperature") if stored.get(name) is not None}
    mask = masks_of(config, own)[[name in exchange for name in config.names]].sum(0)
    rotation = own["rotation"][mask > 0]
    found = {"rotation": rotation, "value": value.to(rotation) @ rotation.T}
    if config.boundary:
        found["mask"] = mask[mask > 0]
    return {f"{stored.unit}.{name}": tensor for name, tensor in found.items()}
