"""Sending exported models to a running Ollama."""
