"""The adapter itself, run by the transformers runtime: what an export is held to."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from reft_plugins.fidelity.comparison import Accumulator, Fidelity, Logits
from reft_plugins.fidelity.front import Front
from reft_plugins.fidelity.texts import Text
from reft_plugins.program import Program, VirtualTokens

Student = Callable[[list[int]], Logits]
"""Logits `[len(token_ids), vocabulary]` of a text under some other model, for example a file in llama.cpp."""

MAX_LOGITS = 32_000_000
"""Logits computed in one forward pass; 128 MB in float32."""

MAX_TOKENS = 4096
"""Tokens in one forward pass whose logits are not needed."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Right-padded token ids and mask, int64 `[rows, tokens]`, with the prompt length of each row."""

    tokens: Tensor
    mask: Tensor
    prompt_lengths: Tensor


class Reference:
    """The base model with the adapter's program, loaded once.

    Args:
        runtime: the transformers runtime in float32.
        program: what the adapter does, at the positions it was trained for.
        beginning: ids that every text begins with, where an exported model knows them as tokens of its own.

    Attributes:
        vocabulary: size of the base model's.
    """

    def __init__(self, runtime: Any, program: Program, beginning: Sequence[int] = ()) -> None:
        self.model: Any = runtime.model
        self.device = torch.device(runtime.device)
        self.program = move(program, self.device)
        self._make_executor: Callable[[nn.Module], Any] = runtime.executor
        self.vocabulary = len(self.model.get_input_embeddings().weight)
        self._virtual = [node for node in self.program if isinstance(node, VirtualTokens)]
        self._beginning = tuple(beginning)
        self._room = 0

    @property
    def front(self) -> Front:
        """What the model as it is now reads at the beginning of every text: ids its vocabulary was extended by.

        An exported model knows the program's virtual tokens, or the constant beginning of prompts, as tokens of its
        own, appended to the vocabulary.
        """
        added = tuple(range(self.vocabulary, len(self.model.get_input_embeddings().weight)))
        return Front(added, len(self._beginning) if added else 0) if self._virtual or self._beginning else Front()

    @property
    def in_front(self) -> tuple[int, ...]:
        """Token ids that stand in front of every text now."""
        return self.front.ids if self._virtual else ()

    def batches(self, texts: Sequence[Text], logits: bool = True) -> Iterator[tuple[list[Text], Batch]]:
        """Texts of similar length together, at most `MAX_LOGITS` logits or `MAX_TOKENS` tokens in one batch."""
        rows: list[Text] = []
        room = min(MAX_TOKENS, MAX_LOGITS // self.vocabulary) if logits else MAX_TOKENS
        for text in sorted(texts, key=lambda text: len(text.tokens)):
            if rows and (len(rows) + 1) * (len(text.tokens) + self.program.virtual_tokens) > room:
                yield rows, self._batch(rows)
                rows = []
            rows.append(text)
        if rows:
            yield rows, self._batch(rows)

    @property
    def executor(self) -> Any:
        """The runtime's executor on the model as it is now."""
        return self._make_executor(self.model)

    @contextmanager
    def running(self, batch: Batch, program: Program, gradients: bool = False) -> Iterator[None]:
        """Inside, the model executes `program` on every row of `batch`, without `gradients` in inference mode.

        Where virtual tokens stand in front of every text anyway, they do so here too, and edits leave them alone.
        """
        executor = self._make_executor(self.model)
        if self.in_front and not program.virtual_tokens:
            program = Program((*self._virtual, *program))
        self._room = program.virtual_tokens
        try:
            with torch.inference_mode(not gradients), executor.run([program] * len(batch.tokens), batch.prompt_lengths):
                yield
        finally:
            self._room = 0

    def forward(self, batch: Batch, logits: bool = True) -> Tensor:
        """Logits float32 `[rows, tokens, vocabulary]`; without `logits` only those of the last token.

        Tokens and vocabulary are those of the base model. What the model sees has any virtual tokens in front: hooks
        find the texts' own tokens in the last columns.
        """
        return self.extended(batch, logits)[..., : self.vocabulary]

    def extended(self, batch: Batch, logits: bool = True) -> Tensor:
        """The same over the vocabulary that the model has now."""
        front = (0,) * self._room or self.in_front
        column = torch.tensor(front, dtype=torch.int64, device=self.device).expand(len(batch.tokens), -1)
        output: Tensor = self.model(
            input_ids=torch.cat([column, self._tokens(batch)], dim=1),
            attention_mask=torch.cat([torch.ones_like(column), batch.mask], dim=1),
            use_cache=False,
            logits_to_keep=0 if logits else 1,
        ).logits
        return output[:, len(front) :].float() if logits else output.float()

    def _tokens(self, batch: Batch) -> Tensor:
        front = self.front
        if not front.replaced or self._room:
            return batch.tokens
        return torch.tensor([front(row) for row in batch.tokens.tolist()], device=self.device)

    def norms(self, texts: Sequence[Text], modules: Mapping[int, str]) -> dict[int, tuple[float, float]]:
        """Smallest and largest root mean square of the input of RMSNorm modules while the adapter runs, by layer."""
        found: dict[int, tuple[float, float]] = {}

        def watch(layer: int, epsilon: float, batch: Batch) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                hidden = args[0][:, -batch.mask.shape[1] :]
                rms = (hidden.double().pow(2).mean(-1) + epsilon).sqrt()[batch.mask.bool()]
                low, high = found.get(layer, (float("inf"), 0.0))
                found[layer] = min(low, float(rms.min())), max(high, float(rms.max()))

            return hook

        for _, batch in self.batches(texts, logits=False):
            handles = [
                module.register_forward_pre_hook(watch(layer, module.variance_epsilon, batch))
                for layer, module in ((layer, self.model.get_submodule(name)) for layer, name in modules.items())
            ]
            try:
                with self.running(batch, self.program):
                    self.forward(batch, logits=False)
            finally:
                for handle in handles:
                    handle.remove()
        return found

    def _batch(self, rows: Sequence[Text]) -> Batch:
        width = max(len(text.tokens) for text in rows)
        tokens = [[*text.tokens, *[0] * (width - len(text.tokens))] for text in rows]
        mask = [[1] * len(text.tokens) + [0] * (width - len(text.tokens)) for text in rows]
        lengths = torch.tensor([text.prompt_length for text in rows])
        return Batch(torch.tensor(tokens, device=self.device), torch.tensor(mask, device=self.device), lengths)


class Measurement:
    """The reference's predictions on held-out text, kept on disk, so that the model can then be changed in place.

    Where a program works at some positions only, the predictions after the prompt are compared: those it is for.

    Attributes:
        virtual_probability: the largest that a model had for a token outside the base's vocabulary when it was compared
            last; None if it knew none.
    """

    def __init__(self, reference: Reference, texts: Sequence[Text]) -> None:
        self._reference = reference
        self.virtual_probability: float | None = None
        self._batches = list(reference.batches(texts))
        self._answers_only = answers_only(reference.program)
        self._base: dict[str, Accumulator] = {}
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as this object
        self._places: list[tuple[int, tuple[int, ...]]] = []
        for rows, batch in self._batches:
            with reference.running(batch, reference.program):
                wanted = reference.forward(batch)
            with torch.inference_mode():
                plain = reference.forward(batch)
            self._keep(wanted)
            for row, text in enumerate(rows):
                accumulator = self._base.setdefault(text.source, Accumulator())
                accumulator.add(
                    self._measured(text, row, wanted), None, self._measured(text, row, plain), self._first(text)
                )

    def compare(self, student: Student | None = None) -> dict[str, Fidelity]:
        """Fidelity of the model as it is now, by source of text, and of all under `overall`.

        Args:
            student: another model to measure instead, as its logits `[len(token_ids), vocabulary]` of a text.
        """
        by_source = copy.deepcopy(self._base)
        self.virtual_probability = None
        for index, (rows, batch) in enumerate(self._batches):
            wanted = self._load(index)
            got = self._logits(batch) if student is None else self._of_student(student, rows, wanted)
            for row, text in enumerate(rows):
                exported = self._measured(text, row, got)
                by_source[text.source].add(self._measured(text, row, wanted), exported, first=self._first(text))
        overall = Accumulator()
        for accumulator in by_source.values():
            overall.merge(accumulator)
        return {"overall": overall.result(), **{source: a.result() for source, a in by_source.items()}}

    def close(self) -> None:
        """Free the disk space."""
        self._file.close()

    def _logits(self, batch: Batch) -> Tensor:
        with torch.inference_mode():
            logits = self._reference.extended(batch)
        for row, mask in zip(logits, batch.mask.bool(), strict=True):
            self._watch(row[mask])
        return logits[..., : self._reference.vocabulary].cpu()

    def _of_student(self, student: Student, rows: Sequence[Text], like: Tensor) -> Tensor:
        padded = torch.zeros_like(like)
        for row, text in zip(padded, rows, strict=True):
            logits = torch.as_tensor(student(list(text.tokens)))
            self._watch(logits)
            row[: len(logits)] = logits[:, : like.shape[-1]]
        return padded

    def _watch(self, logits: Tensor) -> None:
        """Note the probability of tokens that the base does not have, of logits `[tokens, vocabulary or more]`."""
        if logits.shape[-1] > self._reference.vocabulary:
            logits = logits.double()
            outside = logits[:, self._reference.vocabulary :].amax(-1)
            found = float((outside - logits.logsumexp(-1)).exp().max())
            self.virtual_probability = max(self.virtual_probability or 0.0, found)

    def _measured(self, text: Text, row: int, logits: Tensor) -> Tensor:
        return logits[row, self._first(text) : len(text.tokens)]

    def _first(self, text: Text) -> int:
        return text.prompt_length - 1 if self._answers_only else 0

    def _keep(self, logits: Tensor) -> None:
        self._places.append((self._file.tell(), tuple(logits.shape)))
        self._file.write(logits.cpu().numpy().tobytes())

    def _load(self, index: int) -> Tensor:
        offset, shape = self._places[index]
        self._file.seek(offset)
        data = self._file.read(4 * int(np.prod(shape)))
        return torch.frombuffer(bytearray(data), dtype=torch.float32).reshape(shape)


def move(program: Program, device: torch.device) -> Program:
    """The program with its tensors on a device."""

    def moved(node: Any) -> Any:
        values = {f.name: getattr(node, f.name) for f in fields(node)}
        return replace(node, **{name: v.to(device) for name, v in values.items() if isinstance(v, Tensor)})

    return Program(tuple(moved(node) for node in program))


def answers_only(program: Program) -> bool:
    """Whether a program works at some positions only, so that the predictions after the prompt are those it is for."""
    return any(not node.positions.everywhere for node in program if hasattr(node, "positions"))
