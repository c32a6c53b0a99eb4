"""Where in its layers an exported model departs from the adapter."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from reft_plugins.fidelity.records import Number, Record
from reft_plugins.fidelity.reference import Batch, Reference, answers_only
from reft_plugins.fidelity.texts import Text
from reft_plugins.layers import decoder_layers

MAX_STATES = 64_000_000
"""Numbers kept on disk, of all layers together; 256 MB in float32."""

Handle = Callable[[int, Tensor], None]
"""Called with a layer and its output at the tokens of a batch, `[tokens, hidden]`."""


class LayerError(Record):
    """Relative error of the hidden state behind a decoder layer.

    Attributes:
        layer: counted from 0 in the base model.
        error: root mean square over tokens of `|export - adapter| / |adapter|`, so that tokens of very large states
            (the first one of most models) do not hide the others.
        base_error: the same for the base model without the adapter.
    """

    layer: int
    error: Number
    base_error: Number


class LayerStates:
    """Hidden states of the adapter behind every layer, kept on disk for some texts of every source.

    What the next layer reads counts as a layer's output, so that an edit between the two belongs to the first. The
    tokens are those whose predictions `Measurement` compares.

    Args:
        texts: of which as many are used as `MAX_STATES` allows, an equal share of every source.
    """

    def __init__(self, reference: Reference, texts: Sequence[Text]) -> None:
        self._reference = reference
        config = reference.model.config.get_text_config()
        self._count = int(config.num_hidden_layers)
        chosen = _choose(texts, MAX_STATES // (self._count * int(config.hidden_size)))
        self._batches = [batch for _, batch in reference.batches(chosen, logits=False)]
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as this object
        self._places: dict[tuple[int, int], tuple[int, tuple[int, ...]]] = {}
        for index, batch in enumerate(self._batches):
            with reference.running(batch, reference.program):
                self._forward(batch, partial(self._keep, index))
        self._base = self._errors()

    def compare(self) -> tuple[LayerError, ...]:
        """Errors of the model as it is now."""
        return tuple(
            LayerError(layer=layer, error=error, base_error=base)
            for layer, (error, base) in enumerate(zip(self._errors(), self._base, strict=True))
        )

    def close(self) -> None:
        """Free the disk space."""
        self._file.close()

    def _errors(self) -> list[float]:
        sums, tokens = torch.zeros(self._count, dtype=torch.float64), 0

        def add(index: int, layer: int, got: Tensor) -> None:
            wanted = self._load(index, layer)
            difference = got[:, : wanted.shape[1]].cpu().double() - wanted
            sums[layer] += (difference.norm(dim=1) / wanted.norm(dim=1).clamp_min(1e-30)).square().sum()

        for index, batch in enumerate(self._batches):
            tokens += int(self._measured(batch).sum())
            with torch.inference_mode():
                self._forward(batch, partial(add, index))
        errors: list[float] = (sums / max(tokens, 1)).sqrt().tolist()
        return errors

    def _forward(self, batch: Batch, handle: Handle) -> None:
        layers = list(decoder_layers(self._reference.model, self._count)[1])
        with _watching(layers, self._measured(batch), handle):
            self._reference.forward(batch, logits=False)

    def _measured(self, batch: Batch) -> Tensor:
        real = batch.mask.bool()
        if not answers_only(self._reference.program):
            return real
        places = torch.arange(real.shape[1], device=real.device)
        return real & (places >= batch.prompt_lengths[:, None].to(real.device) - 1)

    def _keep(self, index: int, layer: int, states: Tensor) -> None:
        self._places[index, layer] = self._file.tell(), tuple(states.shape)
        self._file.write(states.float().cpu().contiguous().numpy().tobytes())

    def _load(self, index: int, layer: int) -> Tensor:
        offset, (rows, width) = self._places[index, layer]
        self._file.seek(offset)
        data = bytearray(self._file.read(4 * rows * width))
        return torch.frombuffer(data, dtype=torch.float32).reshape(rows, width).double()


@contextmanager
def _watching(layers: Sequence[nn.Module], chosen: Tensor, handle: Handle) -> Iterator[None]:
    """Hand over the states behind `layers` at the chosen tokens while a forward pass computes them."""

    def report(layer: int, states: Any) -> None:
        hidden: Tensor = states[0] if isinstance(states, tuple) else states
        handle(layer, hidden[:, -chosen.shape[1] :][chosen])

    def before(layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        report(layer, args[0] if args else kwargs["hidden_states"])

    def after(layer: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        report(layer, output)

    with ExitStack() as stack:
        for layer, follower in enumerate(layers[1:]):
            hook = follower.register_forward_pre_hook(partial(before, layer), with_kwargs=True)
            stack.callback(hook.remove)
        last = layers[-1].register_forward_hook(partial(after, len(layers) - 1))
        stack.callback(last.remove)
        yield


def _choose(texts: Sequence[Text], tokens: int) -> list[Text]:
    """Texts of every source in turn, until there are so many tokens; at least one text."""
    by_source: dict[str, list[Text]] = {}
    for text in texts:
        by_source.setdefault(text.source, []).append(text)
    chosen: list[Text] = []
    for turn in range(max(map(len, by_source.values()), default=0)):
        for own in by_source.values():
            if turn < len(own) and (not chosen or sum(len(t.tokens) for t in chosen) + len(own[turn].tokens) <= tokens):
                chosen.append(own[turn])
    return chosen
