"""Log-prob and entropy straight from hidden states, without ever storing the logits.

    linear_logprob_entropy(hidden, weight, targets) = logprob_entropy(hidden @ weight.T, targets)

The head turns N hidden vectors of D numbers into N * V logits. With V = 151,936 they are by far the
largest tensor of RL (8,192 tokens: 5 GB in fp32, and their gradient again). But each is needed only
for a moment: logprob.py's state of four numbers per row is all that the forward pass keeps. So we
make the logits tile by tile, merge each tile into the state, and let the next tile overwrite it.
The backward pass makes each tile once more, turns it into its own gradient dZ, and multiplies:

    Z = hidden @ W.T        dhidden += dZ @ W        dW = dZ.T @ hidden

W and dW are the tile's rows of weight and of its gradient.

**Why tiles of a plain matrix product, and not one big kernel?** Counted per logit, for an H200
(matrix products at 0.7 PFLOP/s, memory at 4.8 TB/s) and D = 3,584: a product is 2 D operations,
10 ps. Passing a tile through memory instead of registers costs some 8 bytes, 1.7 ps. A hand-written
product loses more than that to cuBLAS, and this way the kernels are those of logprob.py.

**How large a tile?** A tile of 2^23 logits is 32 MB and would stay in the L2 cache. But each tile
is a dozen kernels to start, and reads and writes all of dhidden. On an H100, forward and backward
of 8,192 rows took 61 ms with such tiles and D = 896, 22 ms with tiles of 2^25 (D = 3,584: 77 and
65), and 2^26 gained little more (a sweep, before dW's first product was written without zeros).

**Why recompute, when Liger does not?** The entropy's gradient depends on the entropy, and PPO's on
the log-prob. Both are known only after the whole vocabulary. So the work is 8 N V D operations: 2
forward, 2 to make the logits again, 4 for the gradients. Cut-cross-entropy skips gradient tiles
below 2^-12. We do not: with an entropy bonus the tail *is* the signal, and when the entropy is
high, tokens with p < 2^-12 hold most of the mass.

**Why the vocabulary in the outer loop?** With chunks of rows (Liger), each chunk adds to all of dW:
V * D numbers are read and written every time, and in bf16 each addition rounds. With chunks of the
vocabulary, each row of dW is one product over all N tokens, summed in fp32 in registers and written
once. dhidden takes the sum instead, in fp32; it is smaller by V / N. Rows are cut too, at 16,384,
so that a tile does not grow with N.

The logits of bf16 inputs are kept in fp32. Rounded to bf16, a logit of 20 is off by up to 0.06, and
with it the log-prob on which PPO's ratio stands. Their gradient is rounded to bf16, because the
matrix units take no fp32.

On a CPU the tiles are sized for its cache, and everything is computed in fp32. Logits that all fit
in 32 MB (the demo's) are kept for the backward pass: recomputing them would save no memory.
"""

import torch

from .jit import CPU_TILE, wide
from .logprob import (
    RowValues,
    accumulate,
    check_targets,
    finish,
    logits_gradient,
    logprob_entropy,
    new_state,
)

TILE = 1 << 25  # about so many logits in a tile: 128 MiB of fp32
TILE_ROWS = 16384  # of a tile, at most
KEPT = 1 << 23  # so many logits, 32 MiB of fp32, are kept for the backward pass
CPU_TILE_ROWS = 512
# A BLAS may add up a row of dZ @ W term by term: longer rows lose digits.
CPU_TILE_COLUMNS = 8192


def linear_logprob_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob of each target, and entropy, under softmax(hidden @ weight.T / temperature).

    hidden [N, D], weight [V, D], targets [N] int64 -> logprob [N], entropy [N] in fp32 (nats), both
    differentiable with respect to hidden and weight. A target below 0 marks a row to ignore: 0, 0,
    no gradient. A target of V or more: IndexError on a CPU; on CUDA the result has no meaning.

    One backward pass only: small problems keep their logits, and it overwrites them.
    """
    check_targets(targets, len(weight))
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    kind = hidden.device.type
    if kind == "cpu":
        dtype = wide(dtype)
    elif torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    with torch.autocast(kind, enabled=False):
        if len(hidden) * len(weight) <= KEPT and dtype == wide(dtype):
            # One tile. It is kept: then it need not be made twice.
            logits = hidden.to(dtype) @ weight.to(dtype).T
            return logprob_entropy(logits, targets, temperature, inplace=True)
        return _LinearLogprobEntropy.apply(hidden, weight, targets.contiguous(), temperature, dtype)


class _LinearLogprobEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, dtype):
        h = hidden.to(dtype)
        state = new_state(h)
        for columns, row_blocks in tiles(hidden, weight):
            w = weight[columns].to(dtype)
            for rows in row_blocks:
                logits = product(h[rows], w.T)
                accumulate(logits, targets[rows], columns.start, state[:, rows], temperature)
        logprob, entropy, largest, log_sum = finish(state, targets, temperature)
        ctx.save_for_backward(hidden, weight, targets, largest, log_sum, entropy)
        ctx.temperature = temperature
        ctx.dtype = dtype
        return logprob, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logprob, grad_entropy):
        hidden, weight, targets, *results = ctx.saved_tensors
        values = RowValues(*results, grad_logprob.contiguous(), grad_entropy.contiguous())
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        h = hidden.to(ctx.dtype)
        grad_hidden = grad_weight = None
        if need_hidden:
            grad_hidden = torch.zeros_like(h, dtype=wide(h.dtype))
        if need_weight:
            grad_weight = torch.empty_like(weight)
        for columns, row_blocks in tiles(hidden, weight):
            w = weight[columns].to(ctx.dtype)
            grad_w = None
            for rows in row_blocks:
                logits = product(h[rows], w.T)
                grad = logits  # over the logits, unless their dtype is not the one to multiply in
                if logits.dtype != ctx.dtype:
                    grad = torch.empty_like(logits, dtype=ctx.dtype)
                logits_gradient(
                    logits, targets[rows], columns.start, values.of(rows), ctx.temperature, out=grad
                )
                if need_weight and grad_w is None:
                    grad_w = product(grad.T, h[rows])
                elif need_weight:
                    add_product(grad_w, grad.T, h[rows])
                if need_hidden:
                    add_product(grad_hidden[rows], grad, w)
            if need_weight:
                grad_weight[columns] = 0.0 if grad_w is None else grad_w  # None: there are no rows
        if need_hidden:
            grad_hidden = grad_hidden.to(hidden.dtype)
        return grad_hidden, grad_weight, None, None, None


def tiles(hidden, weight) -> list[tuple[slice, list[slice]]]:
    """Blocks of the vocabulary, each with the same blocks of rows: [(columns, [rows, ...])]."""
    n = hidden.shape[0]
    v = weight.shape[0]
    if hidden.is_cuda:
        row_step = max(1, min(n, TILE_ROWS))
        column_step = multiple_of_256(TILE // row_step)
    else:
        row_step = max(1, min(n, CPU_TILE_ROWS))
        column_step = min(multiple_of_256(CPU_TILE // row_step), CPU_TILE_COLUMNS)
    rows = [slice(row, min(row + row_step, n)) for row in range(0, n, row_step)]
    return [
        (slice(column, min(column + column_step, v)), rows) for column in range(0, v, column_step)
    ]


def multiple_of_256(number: int) -> int:
    """The nearest one below, but at least 256: a multiple of the matrix units' own tiles."""
    return max(256, number // 256 * 256)


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b, in fp32 even if a and b are not (see above)."""
    if a.dtype == wide(a.dtype):
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32)


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a @ b, with total in fp32."""
    if not total.is_cuda and a.shape[1] > CPU_TILE_ROWS:
        total += product(a, b)  # addmm_ may add long sums to the total term by term
    elif a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
