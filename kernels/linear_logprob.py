"""Log-prob and entropy straight from hidden states: logprob_entropy(hidden @ weight.T), without the logits.

The head turns N hidden vectors of D numbers into N * V logits. With V = 151,936 they are the largest tensor of RL by
far (8,192 tokens: 5 GB in fp32, and their gradient again). But each is needed only for a moment: logprob.py's state of
four numbers per row is all that the forward pass keeps. So we make the logits tile by tile, fold each tile into the
state, and let the next one overwrite it. The backward pass makes each tile once more, turns it into its own gradient
dZ in place, and multiplies:

    Z = hidden @ W.T        dhidden += dZ @ W        dW = dZ.T @ hidden        W, dW: the tile's rows of weight

**Why tiles of a plain matrix product, and not one big kernel?** Counted in N * V logits, for an H200 (matrix products
at 0.7 PFLOP/s, memory at 4.8 TB/s), D = 3,584: a product is 2 D operations, 10 ps. Passing a tile through memory
instead of registers costs some 8 bytes, 1.7 ps, or less: a tile of 2^23 logits is 32 MB and stays in the L2 cache.
That is less than a hand-written product loses to cuBLAS, and the kernels are those of logprob.py.

**Why recompute, when Liger does not?** The entropy's gradient depends on the entropy, and PPO's on the log-prob: both
are known only after the whole vocabulary. So the work is 8 N V D operations: 2 forward, 2 to make the logits again,
4 for the gradients. Cut-cross-entropy skips gradient tiles below 2^-12. We do not: with an entropy bonus the tail *is*
the signal, and p < 2^-12 sums to most of the mass when the entropy is high.

**Why the vocabulary in the outer loop?** Chunks of rows (Liger) make each chunk add to all of dW: V * D numbers read
and written every time, and in bf16 each addition rounds. Chunks of the vocabulary give each row of dW one product
over all N tokens, accumulated in fp32 in registers and written once. dhidden takes the sum instead, in fp32; it is
smaller by V / N. Rows are cut too, at 16,384, so that a tile does not grow with N.

The logits of bf16 inputs are kept in fp32: rounded to bf16, a logit of 20 is off by up to 0.06, and with it the
log-prob on which PPO's ratio stands. Their gradient is rounded to bf16, because the matrix units want it so.

On a CPU the tiles are sized for its cache, and everything is computed in fp32. Logits that all fit in
32 MB (the demo's) are kept for the backward pass: recomputing them would cost time and save nothing.
"""

import torch

from .jit import CPU_TILE, wide
from .logprob import accumulate, check_targets, finish, logits_gradient, logprob_entropy, new_state

TILE_ROWS, TILE = 16384, 1 << 23  # at most so many rows, and about so many logits, in a tile: 32 MiB of fp32
CPU_TILE_ROWS = 512
CPU_TILE_COLUMNS = 8192  # a BLAS may add a row of dZ @ W up term by term: longer rows lose digits


def linear_logprob_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob of each target, and entropy, under softmax(hidden @ weight.T / temperature), without [N, V] in memory.

    hidden [N, D], weight [V, D], targets [N] int64 -> logprob [N], entropy [N] in fp32 (nats), both differentiable with
    respect to hidden and weight. A target below 0 marks a row to ignore: 0, 0, no gradient. V or more: IndexError on
    a CPU; on CUDA the result has no meaning. One backward pass only: small problems keep their logits, and it
    overwrites them.
    """
    check_targets(targets, len(weight))
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    kind = hidden.device.type
    if kind == "cpu":
        dtype = wide(dtype)
    elif torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    with torch.autocast(kind, enabled=False):
        if len(hidden) * len(weight) <= TILE and dtype == wide(dtype):  # one tile, kept: it need not be made twice
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
                accumulate(product(h[rows], w.T), targets[rows], columns.start, state[:, rows], temperature)
        logprob, entropy, largest, log_sum = finish(state, targets, temperature)
        ctx.save_for_backward(hidden, weight, targets, largest, log_sum, entropy)
        ctx.temperature, ctx.dtype = temperature, dtype
        return logprob, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logprob, grad_entropy):
        hidden, weight, targets, *row_values = ctx.saved_tensors
        row_values += [grad_logprob.contiguous(), grad_entropy.contiguous()]
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        h = hidden.to(ctx.dtype)
        grad_hidden = torch.zeros_like(h, dtype=wide(h.dtype)) if need_hidden else None
        grad_weight = torch.empty_like(weight) if need_weight else None
        for columns, row_blocks in tiles(hidden, weight):
            w = weight[columns].to(ctx.dtype)
            grad_w = torch.zeros_like(w, dtype=wide(w.dtype)) if need_weight else None
            for rows in row_blocks:
                logits = product(h[rows], w.T)
                grad = logits if logits.dtype == ctx.dtype else torch.empty_like(logits, dtype=ctx.dtype)
                values = [value[rows] for value in row_values]
                logits_gradient(logits, targets[rows], columns.start, *values, ctx.temperature, out=grad)
                if need_weight:
                    add_product(grad_w, grad.T, h[rows])
                if need_hidden:
                    add_product(grad_hidden[rows], grad, w)
            if need_weight:
                grad_weight[columns] = grad_w
        return None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight, None, None, None


def tiles(hidden, weight):
    """Blocks of the vocabulary, each with the same blocks of rows: [(columns, [rows, ...]), ...] as slices."""
    n, v = hidden.shape[0], weight.shape[0]
    row_step, tile = (TILE_ROWS, TILE) if hidden.is_cuda else (CPU_TILE_ROWS, CPU_TILE)
    row_step = max(1, min(n, row_step))
    column_step = max(256, tile // row_step // 256 * 256)  # a multiple of the matrix units' tiles
    column_step = column_step if hidden.is_cuda else min(column_step, CPU_TILE_COLUMNS)
    rows = [slice(row, min(row + row_step, n)) for row in range(0, n, row_step)]
    return [(slice(column, min(column + column_step, v)), rows) for column in range(0, v, column_step)]


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b, in fp32 even if a and b are not (see above)."""
    return a @ b if a.dtype == wide(a.dtype) else torch.mm(a, b, out_dtype=torch.float32)


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a @ b, with total in fp32."""
    if not total.is_cuda and a.shape[1] > CPU_TILE_ROWS:  # addmm_ may add long sums to the total term by term
        total += product(a, b)
    elif a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
