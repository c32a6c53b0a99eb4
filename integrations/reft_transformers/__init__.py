"""The reference runtime: what a program means, in transformers."""
