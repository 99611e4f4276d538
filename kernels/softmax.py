"""Softmax in one pass: the trick that the other kernels of this folder are made of.

    softmax(z)_i = exp(z_i - m) / s        m = max_j z_j        s = sum_j exp(z_j - m)

Subtracting the maximum keeps exp() from overflowing, but seems to need the row twice before the division: once for m,
once for s. *Online* softmax (Milakov & Gimelshein, 2018) needs it once. Keep (m, s) of the part of the row seen so far;
when a larger maximum turns up, everything summed so far was scaled by the wrong one, and one factor repairs it:

    m' = max(m, z_i)        s' = s * exp(m - m') + exp(z_i - m')

One of the two exponents is always 0, so a single exp(-|z_i - m|) serves both cases. The rule merges two *parts* of a
row just as well as a part and an element, so a GPU program can give each of its lanes a strided share of the row, and
merge the lanes' (m, s) at the end. That makes a softmax of two reads and one write, for a row of any length.
"""

import torch

from .jit import jit, tl, triton, use_triton, wide


def softmax(logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """softmax(logits[..., V] / temperature) over the last dimension, computed in fp32, in the dtype of the logits."""
    return _normalise(logits, temperature, log=False)


def log_softmax(logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """log_softmax(logits[..., V] / temperature) over the last dimension, computed in fp32, in the logits' dtype."""
    return _normalise(logits, temperature, log=True)


def _normalise(logits, temperature, log):
    function = torch.log_softmax if log else torch.softmax
    return function(logits.to(wide(logits.dtype)) / temperature, dim=-1).to(logits.dtype)
