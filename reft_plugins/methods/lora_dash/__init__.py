"""LoRA-Dash: LoRA that finds the directions its task needs, then learns along them as well."""

from reft_plugins.methods.lora_dash.method import LoRADash

__all__ = ["LoRADash"]
