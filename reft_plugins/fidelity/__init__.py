"""How close a model is to an adapter run as it is, measured on text."""
