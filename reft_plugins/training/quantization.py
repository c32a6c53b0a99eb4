"""Training on a base model with linear modules in 4 or 8 bits (QLoRA, Dettmers et al. 2023, arXiv:2305.14314).

Only the copy in memory is quantised. The adapter belongs to the base model as its files are: its fingerprint is theirs,
and runtimes execute it on whatever precision they load.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, Literal

from reft_plugins.errors import TrainingError

Quantization = Literal["4bit", "8bit"]


def loading_arguments(quantization: Quantization | None, dtype: str, device: str | None) -> dict[str, Any]:
    """What `from_pretrained` needs to load a base model in a precision, with linear modules in fewer bits or not.

    `4bit` is NF4 with double quantisation (section 3 of the paper), `8bit` is LLM.int8 (arXiv:2208.07339). What stays
    unquantised then, such as norms and the output head, is float32, as PEFT prepares such models; `dtype` is what the
    4-bit modules compute in.

    Args:
        dtype: `float32`, `bfloat16` or `float16`; device: where a quantised model goes, by default a GPU if there is
            one.

    Raises:
        TrainingError: bitsandbytes is not installed or cannot be used.
    """
    import torch

    if quantization is None:
        return {"dtype": getattr(torch, dtype)}
    try:
        import_module("bitsandbytes")
    except Exception as error:
        raise TrainingError(
            f"training setting 'quantization': a base in {quantization.removesuffix('bit')} bits needs bitsandbytes, "
            f"which cannot be imported ({error}). pip install bitsandbytes, or train without quantization"
        ) from None
    from transformers import BitsAndBytesConfig

    settings: dict[str, Any] = {"load_in_8bit": True}
    if quantization == "4bit":
        settings = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": getattr(torch, dtype),
        }
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "dtype": torch.float32,
        "quantization_config": BitsAndBytesConfig(**settings),  # type: ignore[no-untyped-call]
        "device_map": {"": place},
    }
