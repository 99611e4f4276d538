"""Softmax in one pass: the trick that the other kernels of this folder are made of.

    softmax(z)_i = exp(z_i - m) / s        m = max_j z_j        s = sum_j exp(z_j - m)

Subtracting the maximum keeps exp() from overflowing, but seems to need the row twice: once for m,
once more for s. *Online* softmax (Milakov & Gimelshein, 2018) reads it once. Keep (m, s) of what
has been seen so far. When a larger maximum m' turns up, everything summed before was scaled by the
wrong maximum, and one factor repairs it:

    s' = s * exp(m - m') + sum of the new exp(z_i - m')

The same rule merges two *parts* of a row. So a GPU program gives each of its lanes every LANES-th
logit of the row and an (m, s) of its own, and merges the lanes at the end. While it streams through
the row, no lane waits for another. Softmax then costs two reads and a write for a row of any
length. (On an H100 the second read of a row of 150k bf16 logits comes from memory, too: each of its
132 multiprocessors works on a few such rows of 0.3 MB, and the L2 cache holds 50 MB.)
"""

import torch

from .jit import LN_2, LOG2_E, constexpr, exp2, jit, launch_shape, tl, use_triton, wide


def softmax(logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """softmax(logits[..., V] / temperature) over the last dimension, in the dtype of the logits.

    Computed in fp32.
    """
    return _Softmax.apply(logits, temperature, False)


def log_softmax(logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """log_softmax(logits[..., V] / temperature), likewise."""
    return _Softmax.apply(logits, temperature, True)


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, temperature, log):
        if use_triton(logits):
            logits = logits.contiguous()
            out = torch.empty_like(logits)
            columns = logits.shape[-1]
            lanes, deep, warps = launch_shape(columns)
            softmax_kernel[(logits.numel() // columns,)](
                logits, out, columns, LOG2_E / temperature,
                LOG=log, DEEP=deep, LANES=lanes, num_warps=warps,
            )  # fmt: skip
        else:
            z = logits.to(wide(logits.dtype)) / temperature
            out = z.log_softmax(-1) if log else z.softmax(-1)
            out = out.to(logits.dtype)
        ctx.save_for_backward(out)
        ctx.temperature = temperature
        ctx.log = log
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (out,) = ctx.saved_tensors
        y = out.to(wide(out.dtype))
        grad = grad.to(wide(out.dtype))
        if ctx.log:
            grad = grad - y.exp() * grad.sum(-1, keepdim=True)
        else:
            grad = y * (grad - (grad * y).sum(-1, keepdim=True))
        return (grad / ctx.temperature).to(out.dtype), None, None


@jit
def softmax_kernel(
    logits, out, columns, scale, LOG: constexpr, DEEP: constexpr, LANES: constexpr
):  # one program per row; a tile is DEEP x LANES logits, DEEP of them in each lane  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * columns  # int64: N * V passes 2^31
    tile = tl.arange(0, DEEP)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    # First read: m and s of each lane.
    m = tl.full([LANES], -1e30, tl.float32)  # below every logit, yet finite: -inf - -inf is NaN
    s = tl.zeros([LANES], tl.float32)
    for offset in range(0, columns, DEEP * LANES):
        here = offset + tile < columns
        z = tl.load(
            logits + start + offset + tile, here, float("-inf"), eviction_policy="evict_last"
        ).to(tl.float32)
        new = tl.maximum(m, tl.max(z, 0))
        s = s * exp2((m - new) * scale) + tl.sum(exp2((z - new[None, :]) * scale), 0)
        m = new
    # The lanes are merged as parts of a row are.
    top = tl.max(m, 0)
    total = tl.sum(s * exp2((m - top) * scale), 0)
    log_total = tl.log2(total)
    # Second read: the result.
    for offset in range(0, columns, DEEP * LANES):
        here = offset + tile < columns
        z = tl.load(logits + start + offset + tile, here, 0.0, eviction_policy="evict_first").to(
            tl.float32
        )
        y = (z - top) * scale - log_total
        y = y * LN_2 if LOG else exp2(y)
        tl.store(out + start + offset + tile, y.to(out.dtype.element_ty), here)
