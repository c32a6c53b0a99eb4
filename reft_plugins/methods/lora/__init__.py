"""LoRA: low-rank adaptation of linear modules, trained by PEFT."""

from reft_plugins.methods.lora.method import LoRA

__all__ = ["LoRA"]
