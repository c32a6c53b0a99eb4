"""Export of adapters to Ollama: GGUF files and Modelfiles with measured fidelity."""
