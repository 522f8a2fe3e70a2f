"""Triton kernels that test the gate."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def matmul_kernel(A, B, C, n, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, n, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(A + row * n + k[None, :])
        b = tl.load(B + k[:, None] * n + column)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    tl.store(C + row * n + column, acc.to(C.dtype.element_ty))


def matmul(a: Tensor, b: Tensor, precision: str, block: int = 128, **options: int) -> Tensor:
    """a @ b of square matrices, whose size is a multiple of the block's."""
    c, n = torch.empty_like(a), a.shape[0]
    grid = (n // block, n // block)
    options = {"num_warps": 8, "num_stages": 3, **options}
    matmul_kernel[grid](a, b, c, n, BLOCK=block, BLOCK_K=64, PRECISION=precision, **options)
    return c


@triton.jit
def masked_product_kernel(A, Mask, B, C, DEPTH: tl.constexpr):
    """(32, DEPTH) times (DEPTH, 32); a byte decides two columns of the left one."""
    m, k, n = tl.arange(0, 32)[:, None], tl.arange(0, DEPTH), tl.arange(0, 32)[None, :]
    mask = tl.load(Mask + m * (DEPTH // 2) + tl.arange(0, DEPTH // 2)[None, :])
    mask = tl.join(mask, mask).reshape(32, DEPTH)
    a = tl.where(mask == 0, tl.load(A + m * DEPTH + k[None, :]), 0.0)
    b = tl.load(B + k[:, None] * 32 + n)
    tl.store(C + m * 32 + n, tl.dot(a, b))


def masked_product(depth: int) -> None:
    a, b = (torch.empty(32, depth, dtype=torch.bfloat16, device="meta") for _ in range(2))
    mask, c = a[:, ::2].to(torch.uint8), a.new_empty(32, 32, dtype=torch.float32)
    masked_product_kernel[(1,)](a, mask, b.t(), c, DEPTH=depth)


@triton.jit
def row_sum_kernel(X, Sum, n, BLOCK: tl.constexpr):
    acc = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(X + tl.program_id(0) * n + column, mask=column < n, other=0.0)
        acc += x.to(tl.float32)
    tl.store(Sum + tl.program_id(0), tl.sum(acc, 0))


def row_sum(x: Tensor) -> Tensor:
    out = x.new_empty(x.shape[0], dtype=torch.float32)
    row_sum_kernel[(x.shape[0],)](x, out, x.shape[1], BLOCK=1024)
    return out


def autotuned_row_sum(x: Tensor) -> Tensor:
    out = x.new_empty(x.shape[0], dtype=torch.float32)
    configs = [triton.Config({"BLOCK": block}) for block in (512, 1024)]
    tuned = triton.autotune(configs, key=["n"])(row_sum_kernel)
    tuned[(x.shape[0],)](x, out, x.shape[1])
    return out
