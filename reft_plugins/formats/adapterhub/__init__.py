"""AdapterHub checkpoints: what `save_adapter` of the library `adapters` (1.3, and adapter-transformers) writes.

`adapter_config.json` without PEFT's `peft_type`, `pytorch_adapter.bin` or `adapter.safetensors`, and a prediction head
in `pytorch_model_head.bin` or `model_head.safetensors`, often a copy of the base's own.
"""

from reft_plugins.formats.adapterhub.format import AdapterHubFormat

__all__ = ["AdapterHubFormat"]
