"""How each transformers architecture is written as GGUF."""
