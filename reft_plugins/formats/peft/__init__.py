"""PEFT checkpoints (huggingface/peft): `adapter_config.json` with `adapter_model.safetensors` or `.bin`."""

from reft_plugins.formats.peft.format import PeftFormat

__all__ = ["PeftFormat"]
