"""Runs programs inside a transformers model: the reference for what a program means.

Rows of one batch may run different programs. Forward hooks sit only on the modules that a bound program touches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from reft_plugins.errors import UnsupportedProgramError
from reft_plugins.program import Program, Site
from reft_transformers.components import Components
from reft_transformers.deltas import delta_hooks
from reft_transformers.edits import edit_hooks, watching
from reft_transformers.hooks import installed
from reft_transformers.prefixes import attending
from reft_transformers.tokens import Tokens
from reft_transformers.virtual import Widened, embedding_hooks, position_hooks, widen


class Executor:
    """Binds programs to a model for the forward passes inside a `with executor.run(...)` block.

    Args:
        model: of transformers, a decoder or an encoder, with any head or none.

    Raises:
        UnsupportedProgramError: the model's layers were not found; says what was looked for.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.components = Components(model)

    @contextmanager
    def run(self, programs: Sequence[Program | None], prompt_lengths: Tensor) -> Iterator[None]:
        """Execute `programs[i]` on row `i` of every forward pass inside the block.

        Where a program has virtual tokens, the rows come from `widen`.

        Args:
            programs: one per row, None for the bare base.
            prompt_lengths: int64 `[rows]`, tokens of each prompt without padding and virtual tokens.

        Raises:
            AdapterError: a node does not fit the model.
            UnsupportedProgramError: naming a node that this architecture has no place for.
        """
        tokens = Tokens(programs, prompt_lengths)
        if not tokens.groups:
            yield
            return
        if torch.is_grad_enabled() and self.model.training and getattr(self.model, "is_gradient_checkpointing", False):
            raise UnsupportedProgramError(
                "gradient checkpointing repeats forward passes after the programs were unbound; train without it"
            )
        with attending(self.components, tokens) as projections:
            hooks = [
                (self.model, "input", tokens.observe),
                *position_hooks(self.model, tokens),
                *delta_hooks(self.components, tokens),
                *embedding_hooks(self.model, tokens),
                *projections,
                *edit_hooks(self.model, self.components, tokens),
            ]
            with installed(hooks, first=True):
                yield

    @contextmanager
    def capture(self, sites: Sequence[Site]) -> Iterator[dict[Site, Tensor]]:
        """Keep what the forward passes inside the block have at some sites.

        Inside a `run` block, or around one, that is the edited state. Gradients flow through it.

        Yields:
            filled by each forward pass: `[rows, tokens, width]` by site, virtual tokens and padding included.

        Raises:
            AdapterError: a layer is outside the model.
            UnsupportedProgramError: the architecture has no such component.
        """
        captured: dict[Site, Tensor] = {}

        def keep(site: Site) -> Callable[[Tensor], None]:
            return lambda hidden: captured.__setitem__(site, hidden)

        with installed([watching(self.components.locate(site.layer, site.component), keep(site)) for site in sites]):
            yield captured

    def widen(
        self,
        programs: Sequence[Program | None],
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Widened:
        """Make room for the virtual tokens of each row's program in front of it; see `virtual.widen`."""
        return widen(self.model, programs, input_ids, attention_mask, position_ids)
