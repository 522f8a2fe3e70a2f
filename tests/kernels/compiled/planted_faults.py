"""Kernels that the gate must not pass. They test the gate and do not ship."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.kernels.compiled.planted_kernels import (
    autotuned_row_sum,
    masked_product,
    matmul,
    row_sum,
)
from tests.kernels.compiled.planted_sound import loaded_elements, matmul_elements
from tests.kernels.compiled.variants import Extra, Kernel, Source, Variant

A = torch.empty(512, 512, dtype=torch.bfloat16, device="meta")
SINGLE = A.float()
MATMUL = {"matmul_kernel": Kernel(matmul_elements, loop=True, tensor_cores=True)}
ROW_SUM = {"row_sum_kernel": Kernel(loaded_elements, loop=True)}

VARIANTS = [
    Variant("spills", lambda: matmul(A, A, "tf32", num_warps=4, maxnreg=96), MATMUL),
    Variant("no tensor cores", lambda: matmul(SINGLE, SINGLE, "ieee", block=32), MATMUL),
    Variant("too much shared memory", lambda: matmul(A, A, "tf32", num_stages=8), MATMUL),
    Variant(
        "over target",
        lambda: row_sum(A),
        {"row_sum_kernel": Kernel(loaded_elements, loop=True, at_most={90: 1.0})},
    ),
    Variant("over budget", lambda: row_sum(A), ROW_SUM),
    Variant("one launch fewer", lambda: row_sum(A), ROW_SUM),
    Variant("no budget", lambda: row_sum(A), ROW_SUM),
    Variant("kernel not listed", lambda: row_sum(A), {}),
    Variant("no launch", lambda: None, ROW_SUM),
    Variant("waits for the device", lambda: A.sum().item(), ROW_SUM),
    Variant("autotuned", lambda: autotuned_row_sum(A), ROW_SUM),
    Variant(
        "no loop",
        lambda: row_sum(A[:, :1]),
        {"row_sum_kernel": Kernel(loaded_elements, loop=True)},
    ),
]

SOURCES = [
    Source(Path(__file__).parent / "planted" / "spilling.cu", {"stir": Kernel(lambda region: 64)})
]

LAYOUTS = [
    Variant("depth 16", lambda: masked_product(16), {}),
    Variant("depth 32", lambda: masked_product(32), {}),
]

EXTRAS = [Extra("over budget", "no budget", "row_sum_kernel", {90: -1.0})]
