"""Log-prob and entropy straight from hidden states: `logprob_entropy(hidden @ weight.T)` without the logits.

(docstring follows)
"""

import torch

from .jit import wide
from .logprob import accumulate, finish, logits_gradient, new_state

CPU_TILE = 1 << 19  # elements of one tile of logits: 2 MiB of fp32 stay in the cache
CPU_ROWS = 1024


def linear_logprob_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob of each target, and entropy, under softmax(hidden @ weight.T / temperature), without [N, V] in memory.

    hidden [N, D], weight [V, D], targets [N] int64 -> logprob [N], entropy [N] in fp32 (nats), both differentiable with
    respect to hidden and weight. A target below 0 marks a row to ignore: 0, 0, no gradient.
    """
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    kind = hidden.device.type
    if kind == "cpu":
        dtype = wide(dtype)
    elif torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    with torch.autocast(kind, enabled=False):
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
    row_step, tile = (16384, 1 << 23) if hidden.is_cuda else (CPU_ROWS, CPU_TILE)
    row_step = max(1, min(n, row_step))
    column_step = max(256, tile // row_step)
    rows = [slice(row, min(row + row_step, n)) for row in range(0, n, row_step)]
    return [(slice(column, min(column + column_step, v)), rows) for column in range(0, v, column_step)]


def product(a, b):
    """a @ b with an fp32 result: rounding logits to bf16 would cost the log-prob its second digit."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32)


def add_product(total, a, b):
    """total += a @ b, with total in fp32."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += torch.mm(a, b, out_dtype=total.dtype)
