"""The OpenAI server's process: adapters by name, by store reference and at a strength; model cards; metrics."""
