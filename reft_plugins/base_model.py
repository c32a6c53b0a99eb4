"""Finding a base model's files and telling base models apart without reading them whole."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reft_plugins.errors import BaseMismatchError, BaseModelError
from reft_plugins.manifest import BaseModelIdentity

if TYPE_CHECKING:
    from torch import Tensor

    from reft_plugins.manifest import Manifest

SAMPLED_TENSORS = 32
"""How many tensors contribute a row to the fingerprint, evenly spread over the sorted names."""

# Head counts and inner sizes show in the shapes of tensors; newer transformers write them where older did not.
_CONFIG_KEYS = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "hidden_act",
)
_ALIASES = {
    "hidden_size": ("n_embd", "d_model", "dim"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads"),
    "intermediate_size": ("n_inner", "ffn_dim", "hidden_dim"),
}


def locate(base: str | Path) -> Path:
    """The local folder of a base model.

    Args:
        base: a folder, or a Hugging Face id such as `meta-llama/Llama-3.2-1B`, which is downloaded if it is not cached.

    Raises:
        BaseModelError: when neither exists.
    """
    path = Path(base)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise BaseModelError(f"{path}: no config.json, so this is not a model folder of transformers")
        return path
    if path.is_absolute() or str(base).startswith((".", "~")) or str(base).count("/") != 1:
        raise BaseModelError(f"base model {str(base)!r}: no such folder, and not a Hugging Face id (owner/name)")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(str(base), allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"])
        )
    except Exception as error:
        raise BaseModelError(f"base model {str(base)!r}: not a folder, and the hub says: {error}") from error


def read_config(directory: Path) -> dict[str, Any]:
    """The decoder's part of `config.json`, with the usual names for sizes (GPT-2's `n_embd` becomes `hidden_size`)."""
    try:
        document = json.loads((directory / "config.json").read_text("utf-8"))
        config: dict[str, Any] = {**document, **(document.get("text_config") or {})}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise BaseModelError(f"{directory / 'config.json'}: not a model's configuration: {error}") from None
    for name, aliases in _ALIASES.items():
        config.setdefault(name, next((config[alias] for alias in aliases if alias in config), None))
    return config


def attention_implementation(directory: Path) -> str | None:
    """The attention of transformers that computes what the model was trained with; None where its own choice does.

    Soft-capped attention scores (Gemma 2, arXiv:2408.00118 section 2) are left out by all but `eager`.
    """
    return "eager" if read_config(directory).get("attn_logit_softcapping") else None


def identify(base: str | Path, name: str | None = None) -> BaseModelIdentity:
    """Identity of a base model, with its fingerprint.

    The fingerprint is the SHA-256 of: the sizes in `config.json`; names and shapes of all tensors; and of
    `SAMPLED_TENSORS` tensors the first row (at most 4,096 elements), rounded to bfloat16, so that float32 and bfloat16
    copies of the same weights agree. A 70B model costs a few hundred kilobytes of reading.

    Raises:
        BaseModelError: when files are missing or the weights are not in safetensors.
    """
    directory = locate(base)
    return _identify(directory.resolve(), _stamp(directory), name or _display_name(base, directory))


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A base model's files, for readers of checkpoints that are meaningless without the weights they were trained on.

    Attributes:
        directory: holds `config.json` and safetensors; identity: what manifests keep of it.
    """

    directory: Path
    identity: BaseModelIdentity

    @classmethod
    def open(cls, base: str | Path) -> BaseModel:
        """Find a base model by folder or hub id; raises as `identify`."""
        return cls(locate(base), identify(base))

    @property
    def config(self) -> dict[str, Any]:
        """See `read_config`."""
        return read_config(self.directory)

    def has(self, name: str) -> bool:
        """Whether there is a tensor of this name."""
        return self._stored_name(name) is not None

    def tensor(self, name: str) -> Tensor:
        """One tensor of the base, read alone, in its stored dtype.

        Args:
            name: in the state of the model, such as `model.layers.0.mlp.up_proj.weight`. Files written from the model
                without its head lack the first part of the names, which is allowed for.

        Raises:
            BaseModelError: when there is none.
        """
        from safetensors import safe_open

        stored = self._stored_name(name)
        if stored is None:
            raise BaseModelError(f"{self.directory}: the base model has no tensor {name!r}")
        file = self._index()[stored][0][0]
        with safe_open(file, framework="pt") as tensors:
            found: Tensor = tensors.get_tensor(stored)
        return found

    def _index(self) -> dict[str, tuple[tuple[Path, int], dict[str, Any]]]:
        return _index_once(self.directory, _stamp(self.directory))

    def _stored_name(self, name: str) -> str | None:
        stored = self._index()
        short = name.partition(".")[2]
        longer = [other for other in stored if other.partition(".")[2] == name]
        candidates = [name, short, *(longer if len(longer) == 1 else [])]
        return next((candidate for candidate in candidates if candidate in stored), None)


def check_base(manifest: Manifest, base: BaseModelIdentity, allow_mismatch: bool = False) -> None:
    """Refuse an adapter whose base model is another one, or unknown.

    Raises:
        BaseMismatchError: unless `allow_mismatch`.
    """
    if allow_mismatch or mismatch_allowed():
        return
    override = "To run it anyway, pass allow_base_mismatch=True (or set REFT_ALLOW_BASE_MISMATCH=1)"
    if manifest.base is None:
        raise BaseMismatchError(
            f"the adapter ({manifest.method}) does not say which base model it was made for. "
            f"Load it with base=... or import it again with --base. {override}"
        )
    if manifest.base.fingerprint != base.fingerprint:
        raise BaseMismatchError(
            f"the adapter ({manifest.method}) was made for base model {_describe(manifest.base)}, "
            f"not for {_describe(base)}. {override}"
        )


def mismatch_allowed() -> bool:
    """Whether the environment overrides the check of the base model (`REFT_ALLOW_BASE_MISMATCH=1`)."""
    return os.environ.get("REFT_ALLOW_BASE_MISMATCH", "") not in ("", "0")


def _describe(base: BaseModelIdentity) -> str:
    sizes = f"{base.architecture}, {base.num_hidden_layers} layers of {base.hidden_size}"
    return f"{base.name!r} ({sizes}, {base.fingerprint[:19]})"


def _display_name(base: str | Path, directory: Path) -> str:
    return directory.resolve().name if Path(base).is_dir() else str(base)


def _weight_files(directory: Path) -> list[Path]:
    files = sorted(directory.glob("*.safetensors"))
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        try:
            named = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BaseModelError(f"{index}: not an index of weights: {error}") from None
        files = [file for file in files if file.name in named]
    elif directory / "model.safetensors" in files:
        files = [directory / "model.safetensors"]
    if not files:
        raise BaseModelError(
            f"{directory}: no safetensors weights. Convert the model with "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        )
    return files


def _stamp(directory: Path) -> tuple[object, ...]:
    files = [directory / "config.json", *_weight_files(directory)]
    return tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)


@lru_cache(maxsize=64)
def _identify(directory: Path, stamp: tuple[object, ...], name: str) -> BaseModelIdentity:
    config = read_config(directory)
    tensors = _tensor_index(directory)
    digest = hashlib.sha256()
    sizes = {key: config.get(key) for key in _CONFIG_KEYS}
    digest.update(json.dumps(sizes, sort_keys=True).encode())
    for tensor, (_, info) in sorted(tensors.items()):
        digest.update(f"{tensor}:{info['shape']}\n".encode())
    names = sorted(tensors)
    sampled = min(SAMPLED_TENSORS, len(names))
    for number in range(sampled):
        digest.update(_first_row(*tensors[names[number * len(names) // sampled]]))
    if not config.get("hidden_size") or not config.get("num_hidden_layers"):
        raise BaseModelError(f"{directory / 'config.json'}: names no hidden size or number of layers")
    return BaseModelIdentity(
        name=name,
        revision=config.get("_commit_hash"),
        architecture=(config.get("architectures") or [config.get("model_type", "unknown")])[0],
        hidden_size=config["hidden_size"],
        num_hidden_layers=config["num_hidden_layers"],
        fingerprint="sha256:" + digest.hexdigest(),
    )


@lru_cache(maxsize=4)
def _index_once(directory: Path, stamp: tuple[object, ...]) -> dict[str, tuple[tuple[Path, int], dict[str, Any]]]:
    return _tensor_index(directory)


def _tensor_index(directory: Path) -> dict[str, tuple[tuple[Path, int], dict[str, Any]]]:
    tensors: dict[str, tuple[tuple[Path, int], dict[str, Any]]] = {}
    for file in _weight_files(directory):
        with file.open("rb") as handle:
            prefix = handle.read(8)
            size = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 0 < size < 100_000_000:
                raise BaseModelError(f"{file}: not a safetensors file")
            try:
                header = json.loads(handle.read(size))
                header.pop("__metadata__", None)
                tensors.update({name: ((file, 8 + size), _checked(info)) for name, info in header.items()})
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise BaseModelError(f"{file}: not a safetensors file, or a damaged one") from None
    return tensors


def _checked(info: dict[str, Any]) -> dict[str, Any]:
    """A header entry that has what the fingerprint reads."""
    return {"dtype": str(info["dtype"]), "shape": [*map(int, info["shape"])], "start": int(info["data_offsets"][0])}


def _first_row(place: tuple[Path, int], info: dict[str, Any]) -> bytes:
    """First row of a tensor as bfloat16 bytes (round to nearest even); other dtypes than floats as they are."""
    import numpy as np

    file, data = place
    width = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}.get(info["dtype"])
    elements = min(info["shape"][-1] if info["shape"] else 1, 4096)
    with file.open("rb") as handle:
        handle.seek(data + info["start"])
        raw = handle.read(elements * (width or 1))
    if info["dtype"] == "BF16" or width is None:
        return raw
    kind = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}[info["dtype"]]
    bits = np.frombuffer(raw, dtype=kind).astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()
