"""Triton where there is one. Elsewhere (macOS, Windows) the kernels below stay uncompiled plain functions, and every
public function of this folder takes its PyTorch path."""

import os

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's own switch: kernels run as numpy, on the CPU


def jit(function):
    """`triton.jit`, if there is a Triton."""
    return triton.jit(function) if triton else function


def use_triton(tensor: torch.Tensor) -> bool:
    """Is this tensor one for the Triton kernels (which compute in fp32), or for PyTorch?"""
    return triton is not None and (tensor.is_cuda or INTERPRETED) and tensor.dtype != torch.float64


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in: fp32, whatever the inputs; fp64 only for fp64 inputs (the gradient checks)."""
    return torch.float64 if dtype == torch.float64 else torch.float32
