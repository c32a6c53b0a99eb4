"""The verbs of `Store`, by what they do to it."""
