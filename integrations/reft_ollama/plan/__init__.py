"""From a program to what a GGUF model can hold."""
