"""AdaLoRA: LoRA that distributes its ranks over modules while it learns, trained by PEFT."""

from reft_plugins.methods.adalora.method import AdaLoRA

__all__ = ["AdaLoRA"]
