"""The one training loop: any method, on JSONL of prompts and completions, through the Trainer of transformers."""

from reft_plugins.training.loop import train

__all__ = ["train"]
