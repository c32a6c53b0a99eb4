"""The commands `reft export ollama` and `reft export gguf`."""
