"""A plain matrix product in Triton, of the shapes of Triton's public tutorial.

Compiled and costed by the tests, never run: the figures published for that tutorial's kernel are
what the cost model is held against.
"""

import torch
import triton
import triton.language as tl

from flashdip.kernels.fused.launch import Launch, size

SWIZZLE = 8  # rows of tiles that are taken together, for the sake of the L2 cache


@triton.jit
def _matmul_kernel(
    a_ptr, b_ptr, c_ptr, M, N, K, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    SWIZZLE: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    wide = tl.cdiv(N, COLUMNS)
    first = pid // (SWIZZLE * wide) * SWIZZLE
    high = tl.minimum(tl.cdiv(M, ROWS) - first, SWIZZLE)
    m = (first + pid % (SWIZZLE * wide) % high) * ROWS + tl.arange(0, ROWS)
    n = pid % (SWIZZLE * wide) // high * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, DEPTH)
    a_ptrs = a_ptr + (m % M)[:, None] * K + k[None, :]
    b_ptrs = b_ptr + k[:, None] * N + (n % N)[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for done in range(0, K, DEPTH):
        a = tl.load(a_ptrs, k[None, :] < K - done, other=0.0)
        b = tl.load(b_ptrs, k[:, None] < K - done, other=0.0)
        total = tl.dot(a, b, total)
        a_ptrs += DEPTH
        b_ptrs += DEPTH * N
    mask = (m < M)[:, None] & (n < N)[None, :]
    tl.store(c_ptr + m[:, None] * N + n[None, :], total.to(tl.float16), mask)


def matmul(
    side: int,
    rows: int,
    columns: int,
    depth: int,
    warps: int,
    stages: int,
    inner: int | None = None,
) -> Launch:
    """Return the product [side, inner] [inner, side], float16; `inner` is `side` if not given."""
    inner = inner or side
    a = torch.empty(side, inner, dtype=torch.float16, device="meta")
    b = torch.empty(inner, side, dtype=torch.float16, device="meta")
    c = torch.empty(side, side, dtype=torch.float16, device="meta")
    return Launch(
        f"matmul {rows}x{columns}x{depth}",
        _matmul_kernel,
        (triton.cdiv(side, rows) * triton.cdiv(side, columns), 1, 1),
        {"a_ptr": a, "b_ptr": b, "c_ptr": c, "M": side, "N": side, "K": inner},
        {"ROWS": rows, "COLUMNS": columns, "DEPTH": depth, "SWIZZLE": SWIZZLE},
        warps=warps,
        stages=stages,
        flops=2 * side * side * inner,
        bytes=size(a, b, c),
        gemm=True,
    )
