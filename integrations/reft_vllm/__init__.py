"""vLLM plugin: adapters of any method ride on vLLM's LoRA requests and edit one shared base model."""
