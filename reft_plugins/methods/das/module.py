"""What distributed alignment search learns, and the base model run with exchanges."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from reft_plugins import plugins
from reft_plugins.methods.das.config import DASConfig
from reft_plugins.methods.das.masks import masks_of
from reft_plugins.methods.interchange.edits import interchange_edit, single_positions, tokens_at
from reft_plugins.methods.interventions.module import InterventionParameters, UnitParameters
from reft_plugins.methods.interventions.orthonormal import orthonormal_rows
from reft_plugins.methods.interventions.units import UnitTensors
from reft_plugins.program import Edit, Program, Site

_NARROWEST = 1e-3
"""Least width of a subspace with learned ends, as a share of the basis."""


class Rotation(UnitParameters):
    """`R` with orthonormal rows and, where they are learned, the widths of its subspaces as shares of the basis."""

    temperature: Tensor

    def __init__(self, config: DASConfig, width: int) -> None:
        super().__init__()
        self.rank = config.rank or width
        self.rotation = orthonormal_rows(width, self.rank)
        self.widths: nn.Parameter | None = None
        if config.boundary:
            sizes = config.subspaces.values() or [self.rank / 2]
            self.widths = nn.Parameter(torch.tensor([size / self.rank for size in sizes]))
            self.register_buffer("temperature", torch.tensor(config.temperature[0]))

    def shares(self) -> Tensor:
        """Widths of the subspaces, together at most the whole basis."""
        assert self.widths is not None
        return self.widths.clamp(_NARROWEST, 1.0)

    def tensors(self) -> dict[str, Tensor]:
        """`rotation` `[rank, width]`; with learned ends `boundaries` `[subspaces + 1]` in rows, and `temperature`."""
        found: dict[str, Tensor] = {"rotation": self.rotation.weight}
        if self.widths is not None:
            ends = torch.cat([self.widths.new_zeros(1), self.shares().cumsum(0)])
            found["boundaries"] = ends.clamp(max=1.0) * self.rank
            found["temperature"] = self.temperature
        return found


class StoredRotation(UnitParameters):
    """A rotation that is not learned any more."""

    def __init__(self, stored: UnitTensors) -> None:
        super().__init__()
        for name in ("rotation", "boundaries", "temperature"):
            self.register_buffer(name, stored.get(name))

    def tensors(self) -> dict[str, Tensor]:
        """As `Rotation`."""
        return dict(self.named_buffers())


class DASTrainable:
    """A base model that exchanges values between pairs of prompts; see `methods.Trainable` and `methods.Staged`."""

    def __init__(self, model: nn.Module, config: DASConfig, parameters: InterventionParameters) -> None:
        self.parameters = parameters
        self.model = _InterchangeModel(model, config, parameters)
        self._config = config
        self._steps = 1

    def begin_batch(self, prompt_lengths: Tensor) -> None:
        """Set the lengths of the base prompts, int64 `[batch]`, of the next forward pass."""
        self.model.prompt_lengths = prompt_lengths

    def tensors(self) -> dict[str, Tensor]:
        """The tensors to store."""
        return self.parameters.tensors()

    def begin_training(self, steps: int) -> None:
        """Learn how many steps the temperature has to fall."""
        self._steps = max(steps, 1)

    def end_step(self, step: int) -> None:
        """Lower the temperature of learned boundaries."""
        start, end = self._config.temperature
        for part in self.parameters.parts:
            if isinstance(part, Rotation) and part.widths is not None:
                part.temperature.fill_(start + (end - start) * min(step / self._steps, 1.0))


class _InterchangeModel(nn.Module):
    def __init__(self, base: nn.Module, config: DASConfig, learned: InterventionParameters) -> None:
        super().__init__()
        self.base, self.learned = base, learned
        self.prompt_lengths: Tensor | None = None
        self._config = config
        self._positions = single_positions(config.positions)
        self._read = single_positions(config.read_positions)
        self._executor: Any = plugins.runtimes.get("transformers").executor(base)  # type: ignore[attr-defined]

    def forward(self, source_ids: Tensor, source_mask: Tensor, exchange: Tensor, **batch: Any) -> Any:
        """Outputs for the base prompts, each with the values of its source in the subspaces `exchange` says."""
        assert self.prompt_lengths is not None, "begin_batch() comes before every forward pass"
        values = self.source_values(source_ids, source_mask)
        programs = self._programs(values, exchange)
        with self._executor.run(programs, self.prompt_lengths):
            outputs = self.base(**batch)
        shares = [p.shares().sum() for p in self.learned.parts if isinstance(p, Rotation) and p.widths is not None]
        if shares:
            outputs.penalty = self._config.boundary_penalty * torch.stack(shares).sum()
        return outputs

    @torch.no_grad()
    def source_values(self, source_ids: Tensor, source_mask: Tensor) -> dict[Site, Tensor]:
        """What the bare base has at each site, `[rows, tokens, width]`, at the tokens of `read_positions`."""
        with self._executor.capture([unit.site for unit in self.learned.units]) as captured:
            self.base(input_ids=source_ids, attention_mask=source_mask, use_cache=False)
        starts = source_mask.argmax(1)
        lengths = source_mask.sum(1)
        tokens = torch.tensor(
            [
                [int(start) + token for token in tokens_at(self._read, int(length))]
                for start, length in zip(starts, lengths, strict=True)
            ],
            device=source_ids.device,
        )
        rows = torch.arange(len(tokens), device=tokens.device)[:, None]
        return {site: hidden[rows, tokens].float() for site, hidden in captured.items()}

    def _programs(self, values: dict[Site, Tensor], exchange: Tensor) -> list[Program]:
        edits: list[list[Edit]] = [[] for _ in exchange]
        for unit, part in zip(self.learned.units, self.learned.parts, strict=True):
            tensors = part.tensors()  # type: ignore[operator]
            rotation = tensors["rotation"]
            masks = exchange.to(rotation) @ masks_of(self._config, tensors)
            rotated = values[unit.site].to(rotation) @ rotation.T
            for row, edits_of_row in enumerate(edits):
                edits_of_row += [
                    interchange_edit(unit.site, position, rotation, masks[row], token, self._config.dropout)
                    for position, token in zip(self._positions, rotated[row], strict=True)
                ]
        return [Program(tuple(of_row)) for of_row in edits]
