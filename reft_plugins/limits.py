"""How much is read of files that others wrote. Whatever is larger is refused before it is read.

Nothing heavy is imported here, and nothing but constants is defined.
"""

from __future__ import annotations

MAX_MANIFEST_BYTES = 4 * 1024 * 1024
"""Of `adapter.json`."""
MAX_HEADER_BYTES = 32 * 1024 * 1024
"""Of the header of a safetensors file; enough for some 200,000 tensors."""
MAX_DIMENSIONS = 8
"""Of a tensor."""
MAX_EMPTY_DIMENSION = 2**24
"""Of a tensor without elements, whose other dimensions cost no byte of the file, but memory where they are used."""
DTYPES = frozenset({"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"})
"""Of the tensors of an adapter, as safetensors headers call them: those that PyTorch computes with everywhere."""
