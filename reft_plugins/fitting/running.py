"""A model that runs with nodes of a program and with low-rank updates of its linear modules; its weights stay."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from reft_plugins.fidelity.reference import Batch, Reference, move
from reft_plugins.fitting.updates import LowRank
from reft_plugins.program import Node, Program, Site


class _Seen(Exception):
    """Ends a forward pass after the layer of interest."""


@dataclass(frozen=True, slots=True)
class Student:
    """The base model with nodes that are executed as they are, and updates that stand in for the others.

    An update sees the input of its module before any node changes it, as it does once all of it is merged into weights.
    """

    reference: Reference
    nodes: tuple[Node, ...] = ()
    updates: Mapping[str, LowRank] | None = None

    @classmethod
    def of(cls, reference: Reference, nodes: Sequence[Node]) -> Student:
        """Without updates; the nodes' tensors are moved to the model's device."""
        return cls(reference, tuple(move(Program(tuple(nodes)), reference.device)))

    def plus(self, *nodes: Node, updates: Mapping[str, LowRank] | None = None) -> Student:
        """With more nodes and more updates."""
        more = move(Program(nodes), self.reference.device)
        return replace(self, nodes=(*self.nodes, *more), updates={**(self.updates or {}), **(updates or {})})

    @contextmanager
    def running(self, batch: Batch, gradients: bool = False) -> Iterator[None]:
        """Inside, forward passes of the reference over `batch` are the student's."""
        with self.reference.running(batch, Program(self.nodes), gradients), applied(self.reference.model, self.updates):
            yield

    def layer(self, batch: Batch, layer: int, component: str, of: str | None = None) -> list[Tensor]:
        """What a layer has at `component`, and the input and the output of the module `of`, `[tokens, width]` each.

        Padding is left out, and so are virtual tokens.
        """
        site, model, executor = Site(layer, component), self.reference.model, self.reference.executor
        own: list[Tensor] = []

        def stop(module: nn.Module, args: Any, output: Any) -> None:
            raise _Seen

        with self.running(batch), executor.capture([site]) as captured, ExitStack() as hooks:
            handles = [executor.components.layer(layer).register_forward_hook(stop)]
            if of is not None:
                module = model.get_submodule(of)
                handles.append(module.register_forward_pre_hook(lambda _, args: own.append(args[0]), prepend=True))
                handles.append(module.register_forward_hook(lambda _, args, output: own.append(output)))
            for handle in handles:
                hooks.callback(handle.remove)
            with suppress(_Seen):
                self.reference.forward(batch, logits=False)
            real = batch.mask.bool()
            return [value[:, -batch.mask.shape[1] :][real] for value in (captured[site], *own)]


@contextmanager
def applied(model: nn.Module, updates: Mapping[str, LowRank] | None) -> Iterator[None]:
    """Inside, modules compute `y + left right x + constant`; gradients flow to the factors."""
    with ExitStack() as hooks:
        for name, update in (updates or {}).items():
            inputs: list[Tensor] = []
            module = model.get_submodule(name)
            for handle in (
                module.register_forward_pre_hook(_keeping(inputs), prepend=True),
                module.register_forward_hook(_adding(update, inputs)),
            ):
                hooks.callback(handle.remove)
        yield


def _keeping(inputs: list[Tensor]) -> Callable[..., None]:
    return lambda module, args: inputs.append(args[0])


def _adding(update: LowRank, inputs: list[Tensor]) -> Callable[..., Tensor]:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        left, right = update.left.to(output), update.right.to(output)
        output = output + nn.functional.linear(nn.functional.linear(inputs.pop(), right), left)
        return output if update.constant is None else output + update.constant.to(output)

    return hook
