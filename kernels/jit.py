"""Triton where there is one. Elsewhere (macOS, Windows) the kernels of this folder stay uncompiled
plain functions, and every public function takes its PyTorch path.

For the reader new to Triton: a kernel is written for one *program* (a GPU thread block).
`tl.program_id` says which one it is. Its variables are whole tiles of numbers (`tl.arange`), spread
over the block's threads. `tl.load` and `tl.store` move tiles between device memory and registers,
with a mask for the part of the tile that lies beyond the row's end. `TRITON_INTERPRET=1` runs the
same kernels on the CPU, as numpy: slow, but it needs no GPU and can be debugged.
"""

import math
import os

import torch

try:
    import triton
    import triton.language as tl
    from triton.language import constexpr
    from triton.language.extra import libdevice
except ImportError:
    triton = tl = constexpr = None

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LOG2_E = math.log2(math.e)  # exp(z / T) = exp2(z * LOG2_E / T): a GPU's powers are binary
CPU_TILE = 1 << 18  # elements at a time on a CPU: 1 MiB of fp32, which stays in the cache

# A kernel can read a global only if it is a constexpr.
FAST = triton and constexpr(not INTERPRETED)
LN_2 = triton and constexpr(math.log(2))  # natural logarithm = binary logarithm * LN_2
BINARY = triton and constexpr(LOG2_E)  # binary logarithm = natural logarithm * BINARY


def jit(function):
    """`triton.jit`, if there is a Triton."""
    return triton.jit(function) if triton else function


@jit
def exp2(x):
    """2^x. Triton's own spends three more instructions on results below 2^-126."""
    return libdevice.exp2(x) if FAST else tl.exp2(x)


@jit
def log2(x):
    """The binary logarithm, in one instruction."""
    return libdevice.fast_log2f(x) if FAST else tl.log2(x)


def use_triton(tensor: torch.Tensor) -> bool:
    """Is this tensor one for the Triton kernels (which compute in fp32), or for PyTorch?"""
    return triton is not None and (tensor.is_cuda or INTERPRETED) and tensor.dtype != torch.float64


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in: fp32 for bf16 and fp16; float64 stays (the tests' references)."""
    return torch.promote_types(dtype, torch.float32)


def launch_shape(columns: int) -> tuple[int, int, int]:
    """(lanes, logits per lane, warps) of a program that streams through a row of so many logits.

    8 neighbouring logits per thread make its 16-byte load (bf16). 4 such loads in flight hide the
    memory's latency.
    """
    lanes = min(2048, max(128, triton.next_power_of_2(columns)))
    deep = 4 if columns > lanes else 1
    warps = max(1, lanes // 256)
    return lanes, deep, warps
