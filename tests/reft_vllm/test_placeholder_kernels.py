"""The Triton kernels of placeholders against plain formulas, in the interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch
from edit_batches import interpreted_kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def kernels() -> None:
    interpreted_kernels()
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_replaced(dtype: torch.dtype) -> None:
    from reft_vllm.execution.placeholder_kernels import replace_rows

    width, tokens = 1100, 7
    pool = torch.randn(9, width, device=DEVICE).to(dtype)
    table = torch.tensor([[0, 0, 0], [3, 0, 8]], dtype=torch.int32, device=DEVICE)
    marks = torch.zeros(16, 2, dtype=torch.int32, device=DEVICE)
    marks[2], marks[3], marks[5], marks[6] = (torch.tensor(pair) for pair in ((2, 2), (2, 1), (2, 0), (1, 0)))
    wide = torch.randn(tokens, 3, width, device=DEVICE).to(dtype)
    want, before = wide.clone(), wide.clone()
    want[2, 1], want[5, 1] = pool[8], pool[3]
    replace_rows(wide[:, 1], marks, table, pool)
    assert torch.equal(wide, want) and not torch.equal(wide, before)


@pytest.mark.parametrize("add", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 2, 24), (3, 1, 16), (2, 2, 64)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_prefixes_are_added(dtype: torch.dtype, heads: int, kv_heads: int, size: int, add: bool) -> None:
    from reft_vllm.execution.placeholder_kernels import add_gated

    tokens, columns, scale = 6, 40, 0.3
    pool = torch.randn(90, kv_heads * size, device=DEVICE).to(dtype)
    counts = torch.tensor([0, 5, 37], dtype=torch.int32, device=DEVICE)
    keys, values = (torch.randint(1, 90, (3, columns), dtype=torch.int32, device=DEVICE) for _ in range(2))
    gates = torch.randn(3, heads, device=DEVICE)
    owners = torch.tensor([0, 1, 2, 3, 3, 2, 0, 0], dtype=torch.int32, device=DEVICE)
    packed = torch.randn(tokens, 2, heads, size, device=DEVICE).to(dtype)
    query, output = packed[:, 1], torch.randn(tokens, heads, size, device=DEVICE).to(dtype)
    want = output.float().clone()
    for token, owner in enumerate(owners[:tokens].tolist()):
        if owner == 0 or counts[owner - 1] == 0:
            continue
        number = int(counts[owner - 1])
        for head in range(heads):
            part = slice(head // (heads // kv_heads) * size, (head // (heads // kv_heads) + 1) * size)
            key, value = (pool[table[owner - 1, :number].long(), part].float() for table in (keys, values))
            weights = (key @ query[token, head].float() * scale).softmax(0)
            change = gates[owner - 1, head] * (weights @ value)
            want[token, head] = change + (want[token, head] if add else 0)
    before = output.float().clone()
    add_gated(output, query, owners, counts, keys, values, gates, pool, scale, add=add)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(output.float(), want, atol=tolerance, rtol=tolerance)
    assert (want - before).abs().max() > 0.1
