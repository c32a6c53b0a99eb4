"""Chat templates for Ollama, and the Modelfile they go into."""
