"""The parameters of the exported model, one module at a time, and the file they are written to."""
