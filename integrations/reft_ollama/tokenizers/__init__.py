"""Tokenizers in the form llama.cpp reads them."""
