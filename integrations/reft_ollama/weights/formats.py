"""Number formats of a GGUF file: what `--dtype` names, and how numbers are written and read back in them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import gguf
import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType, LlamaFileType
from torch import Tensor

from reft_plugins.errors import ExportError


@dataclass(frozen=True, slots=True)
class Format:
    """A number format of a file.

    Attributes:
        name: as in `--dtype`; file_type: what the file says of itself.
        matrices: type of the matrices, None where llama.cpp's quantiser chooses one for each.
    """

    name: str
    file_type: LlamaFileType
    matrices: GGMLQuantizationType | None = None

    @property
    def direct(self) -> bool:
        """Whether it is written here; the others are made by llama.cpp's quantiser from a file that is."""
        return self.matrices is not None

    @property
    def share_of_f16(self) -> float:
        """Roughly how large a file is, against float16; for a quantised one, rather too much."""
        if self.matrices is not None:
            block, size = gguf.GGML_QUANT_SIZES[self.matrices]
            return size / block / 2
        bits = int("".join(filter(str.isdigit, self.name))[0])
        return (bits + 1.5) / 16

    def tensor_type(self, shape: tuple[int, ...]) -> GGMLQuantizationType:
        """Type of a tensor in a directly written file.

        Vectors are float32, as llama.cpp wants them. Rows that do not divide into blocks are float16, as in llama.cpp's
        own converter.
        """
        if len(shape) < 2:
            return GGMLQuantizationType.F32
        assert self.matrices is not None
        return self.matrices if shape[-1] % gguf.GGML_QUANT_SIZES[self.matrices][0] == 0 else GGMLQuantizationType.F16

    def round_trip(self, name: str, tensor: Tensor) -> Tensor:
        """A float32 parameter as the file gives it back.

        Raises:
            ExportError: see `encode`.
        """
        kind = self.tensor_type(tuple(tensor.shape))
        if kind == GGMLQuantizationType.F32:
            return tensor
        stored = encode(name, tensor.cpu(), kind)
        if kind == GGMLQuantizationType.BF16:
            back = torch.from_numpy(stored).view(torch.bfloat16).float()
        else:
            back = torch.from_numpy(gguf.dequantize(stored, kind).astype(np.float32, copy=False))
        return back.to(tensor.device)


_BY_LLAMA_CPP = (
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L"),
    *("Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K", "IQ4_NL", "IQ4_XS"),
)

FORMATS: dict[str, Format] = {
    entry.name: entry
    for entry in (
        Format("f32", LlamaFileType.ALL_F32, GGMLQuantizationType.F32),
        Format("f16", LlamaFileType.MOSTLY_F16, GGMLQuantizationType.F16),
        Format("bf16", LlamaFileType.MOSTLY_BF16, GGMLQuantizationType.BF16),
        Format("q8_0", LlamaFileType.MOSTLY_Q8_0, GGMLQuantizationType.Q8_0),
        *(Format(name.lower(), LlamaFileType[f"MOSTLY_{name}"]) for name in _BY_LLAMA_CPP),
    )
}
"""Every number format by its name."""

_TORCH = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}


def size_of(shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    """Bytes of a tensor."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return math.prod(shape) // block * size


def encode(name: str, tensor: Tensor, kind: GGMLQuantizationType) -> npt.NDArray[np.generic]:
    """A tensor of any float type as the file stores it; bfloat16 as 16-bit integers, which NumPy has instead.

    Raises:
        ExportError: a value is not finite, or does not fit.
    """
    _check(name, tensor, kind)
    tensor = tensor.contiguous()
    if kind not in _TORCH:
        encoded: npt.NDArray[np.generic] = gguf.quantize(tensor.float().numpy(), kind)
        return encoded
    wanted = _TORCH[kind]
    if tensor.dtype != wanted:
        # By way of float32, because torch converts one 16-bit format into the other three times slower than into that.
        tensor = tensor.float().to(wanted)
    return (tensor.view(torch.int16) if wanted == torch.bfloat16 else tensor).numpy()


def _check(name: str, tensor: Tensor, kind: GGMLQuantizationType) -> None:
    """Only the extremes are looked at; they are NaN where any value is."""
    if tensor.numel() == 0:
        return
    extremes = torch.stack(torch.aminmax(tensor)).double()
    # Eight-bit blocks have a float16 scale, the largest value over 127.
    stored = (extremes / 127).half() if kind not in _TORCH else extremes.to(_TORCH[kind])
    if bool(torch.isfinite(stored).all()):
        return
    sound = bool(torch.isfinite(extremes).all())
    where = f"does not fit {kind.name.lower()}" if sound else "has values that are not finite"
    raise ExportError(f"tensor {name!r} {where}. Use --dtype bf16 or f32 if the base model itself is sound")
