"""The adapter artifact: a directory with `adapter.json` and `adapter.safetensors`, checked before it is believed."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from reft_plugins import plugins
from reft_plugins.classification.heads import split_head, with_head
from reft_plugins.errors import AdapterError, ReftError
from reft_plugins.manifest import (
    MANIFEST_FILE,
    TENSORS_FILE,
    BaseModelIdentity,
    EditFact,
    Manifest,
    Parent,
    ProgramFacts,
    TaskFact,
    TensorsFact,
    TrainingRecord,
    WeightDeltaFact,
    read_manifest,
    sha256,
)
from reft_plugins.program import Edit, Program, WeightDelta
from reft_plugins.tensor_header import check_header

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """Learned parameters with everything needed to run them safely. Build with `create`, `load` or `reft.load`.

    Attributes:
        manifest: contents of `adapter.json`.
        tensors: the method's parameters by name, on the CPU.
    """

    manifest: Manifest
    tensors: Mapping[str, Tensor]

    @classmethod
    def create(
        cls,
        method: str,
        config: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        base: BaseModelIdentity | None,
        *,
        training: TrainingRecord | None = None,
        parents: tuple[Parent, ...] = (),
        notes: Mapping[str, str] | None = None,
        task: TaskFact | None = None,
    ) -> Adapter:
        """Make an adapter from parameters; its program is lowered once to check and summarise it.

        Tensors named `head/<module>.<weight|bias>` belong to no method: they are a head that was trained beside it.

        Raises:
            AdapterError: when the parameters do not make a valid program for `base`.
        """
        method_ = plugins.methods.get(method)
        checked = parse_config(method_, config)
        stored = {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
        }
        blob = safetensors.torch.save(stored)
        program = _lower(method_, checked, stored)
        program.validate(base)
        manifest = Manifest(
            method=method,
            config=checked.model_dump(mode="json"),
            base=base,
            program=summarise(program),
            tensors=TensorsFact(sha256=sha256(blob), size=len(blob)),
            training=training,
            parents=parents,
            notes=dict(notes or {}),
            task=task,
        )
        return cls(manifest, stored)

    @classmethod
    def load(cls, directory: Path | str) -> Adapter:
        """Read an adapter directory.

        Raises:
            AdapterError: when a file is missing, truncated or altered, the manifest is not understood, or a parameter
                is not a finite number.
        """
        manifest = read_manifest(directory)
        path = Path(directory) / TENSORS_FILE
        try:
            with path.open("rb") as file:
                blob = file.read(manifest.tensors.size + 1)
        except OSError as error:
            raise AdapterError(f"{path}: cannot read the tensors: {error.strerror}") from None
        except (MemoryError, OverflowError):
            raise AdapterError(f"{path}: its tensors do not fit into this machine's memory") from None
        if len(blob) != manifest.tensors.size:
            found = f"at least {len(blob)}" if len(blob) > manifest.tensors.size else str(len(blob))
            raise AdapterError(
                f"{path}: {found} bytes where the manifest promises {manifest.tensors.size}: the file is truncated "
                "or belongs to another manifest. Copy the adapter again"
            )
        if sha256(blob) != manifest.tensors.sha256:
            raise AdapterError(f"{path}: digest differs from the manifest, so a bit changed. Copy the adapter again")
        check_header(io.BytesIO(blob), str(path))
        try:
            tensors = safetensors.torch.load(blob)
        except (SafetensorError, ValueError, KeyError) as error:
            raise AdapterError(f"{path}: not a safetensors file: {error}") from None
        _check_finite(path, tensors)
        return cls(manifest, tensors)

    def save(self, directory: Path | str) -> Path:
        """Write `adapter.safetensors`, then `adapter.json`, each by rename, so that no reader sees half a file."""
        target = Path(directory)
        target.mkdir(parents=True, exist_ok=True)
        blob = safetensors.torch.save(dict(self.tensors))
        for name, data in ((TENSORS_FILE, blob), (MANIFEST_FILE, self.manifest.to_json().encode())):
            partial = target / f".{name}.{os.getpid()}.partial"
            partial.write_bytes(data)
            partial.replace(target / name)
        return target

    def lower(self) -> Program:
        """The program this adapter is: what its method makes of the parameters, after all `reft_lower` hooks.

        Raises:
            AdapterError: when layers, ranks or shapes do not fit the base model the manifest names.
        """
        method = plugins.methods.get(self.manifest.method)
        config = parse_config(method, self.manifest.config)
        program = _lower(method, config, self.tensors)
        program.validate(self.manifest.base)
        if summarise(program) != self.manifest.program:
            raise AdapterError(f"{MANIFEST_FILE}: its program is not the one its tensors make; it was altered")
        rewritten = plugins.rewrite(self, program)
        if rewritten is not program:
            rewritten.validate(self.manifest.base)
        return rewritten

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest, which carries the digest of the tensors: the identity of this version."""
        return sha256(self.manifest.to_json().encode())

    def with_base(self, base: BaseModelIdentity) -> Adapter:
        """The same parameters declared to belong to `base`; only for adapters whose files do not say."""
        return replace(self, manifest=self.manifest.model_copy(update={"base": base}))


def _check_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """One number that is none spreads to whatever shares a batch or a cache with it."""
    floating = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    sums = [tensor.sum(dtype=torch.float32) for tensor in floating.values()]
    if not sums or torch.stack(sums).isfinite().all():
        return
    for name, tensor in floating.items():
        if not tensor.float().isfinite().all():
            raise AdapterError(
                f"{path}: {name} holds numbers that are not finite, so its training diverged. Train it again with a "
                "smaller learning rate"
            )


def _lower(method: Any, config: Any, tensors: Mapping[str, Tensor]) -> Program:
    """`method.lower` on tensors that may be anything: whatever goes wrong is the adapter's fault and said so."""
    try:
        own, head = split_head(tensors)
        program: Program = with_head(method.lower(config, own), head)
    except ReftError:
        raise
    except KeyError as error:
        raise AdapterError(f"{TENSORS_FILE}: tensor {error} is missing for method {method.name!r}") from None
    except Exception as error:
        raise AdapterError(
            f"{TENSORS_FILE}: the tensors are not what method {method.name!r} stores: {type(error).__name__}: {error}"
        ) from error
    return program


def summarise(program: Program) -> ProgramFacts:
    """The facts of a program that schedulers and listings need without its tensors."""
    return ProgramFacts(
        edits=tuple(
            EditFact(
                layer=edit.site.layer,
                component=edit.site.component,
                positions=str(edit.positions),
                rank=edit.rank,
                simultaneous=edit.simultaneous,
            )
            for edit in program.edits
        ),
        weight_deltas=tuple(
            WeightDeltaFact(
                module=delta.module, rank=delta.rank, positions=str(delta.positions), replaces=delta.replaces
            )
            for delta in program.weight_deltas
        ),
        other_nodes=tuple(str(node) for node in program if not isinstance(node, Edit | WeightDelta)),
    )


def parse_config(method: Any, config: Mapping[str, Any]) -> Any:
    """Check settings against a method's own.

    Raises:
        AdapterError: naming the method and the setting.
    """
    from pydantic import ValidationError

    try:
        return method.config(**config)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise AdapterError(f"method {method.name!r}: setting {field!r}: {first['msg']}") from None
