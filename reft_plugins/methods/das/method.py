"""Distributed alignment search as a method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reft_plugins.errors import AdapterError
from reft_plugins.methods import Method
from reft_plugins.methods.das.config import DASConfig
from reft_plugins.methods.interventions.units import UnitTensors, units_in, units_of
from reft_plugins.program import Program

if TYPE_CHECKING:
    from torch import Tensor, nn

    from reft_plugins.manifest import BaseModelIdentity
    from reft_plugins.methods import Trainable
    from reft_plugins.training.data import Examples


class DAS(Method[DASConfig]):
    """Learns `R` of `h <- h + R^T (mask * (R s - R h))`, `s` from a source prompt.

    Geiger et al. 2024, arXiv:2303.02536 eq. 3; with learned boundaries Wu et al. 2023, arXiv:2305.08809. The data are
    lines of `{"base": …, "source": …, "completion": …}`: what the model should say to the base prompt after the
    exchange. Exact match on held-out pairs is the interchange accuracy.

    Tensors: `layers.<layer>.<component>.0.rotation` `[rank, hidden]`; with learned boundaries `.boundaries`
    `[subspaces + 1]`, in rows of the rotation, and `.temperature`. A rotation alone does nothing to a model: its
    program has no nodes. With a cached source it becomes an adapter of method `interchange`.
    """

    name = "das"
    config = DASConfig
    learning_rate = 1e-3

    def lower(self, config: DASConfig, tensors: Mapping[str, Tensor]) -> Program:
        """No nodes; the tensors are checked."""
        for unit in units_in(tensors):
            stored = UnitTensors(unit, tensors)
            rank = len(stored["rotation"])
            if config.rank not in (0, rank):
                raise AdapterError(f"{unit}: rotation has {rank} rows, the settings say {config.rank}")
            if config.boundary and (
                stored["boundaries"].shape != (len(config.names) + 1,) or stored["temperature"] <= 0
            ):
                raise AdapterError(f"{unit}: boundaries are not those of the subspaces {', '.join(config.names)}")
        return Program(())

    def parameters(self, config: DASConfig, base: BaseModelIdentity) -> nn.Module:
        """A random rotation for each site.

        Raises:
            AdapterError: when a layer, the rank or the subspaces are outside the base model.
        """
        from reft_plugins.methods.das.module import Rotation
        from reft_plugins.methods.interventions.module import InterventionParameters

        if sum(config.subspaces.values()) > base.hidden_size:
            raise AdapterError(f"subspaces of {sum(config.subspaces.values())} rows exceed {base.hidden_size}")
        return InterventionParameters((unit, Rotation(config, base.hidden_size)) for unit in units_of(config, base))

    def attach(self, model: nn.Module, config: DASConfig, base: BaseModelIdentity) -> Trainable:
        """Run pairs of prompts: the source without gradient, then the base prompt with its values."""
        from reft_plugins.methods.das.module import DASTrainable

        parameters: Any = self.parameters(config, base)
        trainable: Trainable = DASTrainable(model, config, parameters)
        return trainable

    def examples(self, config: DASConfig, path: str | Path, tokenizer: Any, max_length: int) -> Examples:
        """Pairs of prompts; see `methods.das.data.read_pairs`."""
        from reft_plugins.methods.das.data import read_pairs

        return read_pairs(config, path, tokenizer, max_length)

    def collator(self, config: DASConfig, fill: int, left: bool) -> Callable[[Any], dict[str, Any]]:
        """Pads base prompts and sources."""
        from reft_plugins.methods.das.data import PairCollator
        from reft_plugins.training.batches import Collator

        return PairCollator(Collator(fill=fill, left=left))
