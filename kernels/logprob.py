"""Log-prob of a token, and entropy of the whole next-token distribution, from logits: one read forward, one backward.

T1's loss needs two numbers per position: the log-prob of the token that was sampled, and the entropy of everything that
could have been (its exploration bonus). With z = logits / T, maximum m, s = sum_i exp(z_i - m), p_i = exp(z_i - m) / s:

    log p_y = (z_y - m) - log s
    H       = -sum_i p_i log p_i = log s - t / s         where t = sum_i exp(z_i - m) * (z_i - m)

(m, s, t) is all that the row leaves behind, and it merges like softmax.py's (m, s): raising the maximum by d turns
every exp(z - m) * (z - m) into exp(z - m - d) * (z - m - d), hence

    m' = m + d        s' = s * exp(-d)        t' = (t - d * s) * exp(-d)

Backward. d log p_y / dz_i = [i = y] - p_i, and d H / dz_i = -p_i (log p_i + H): tokens likelier than the average
surprise push the entropy down, rarer ones up. With the upstream gradients g (of log p_y) and h (of H):

    dL / dlogits_i = (g * ([i = y] - p_i) - h * p_i * (log p_i + H)) / T

elementwise in the logits, so it can be written over them. We keep m and log s apart instead of their sum: at logits of
10^4, fp32 would round log s away. An impossible token (logit -inf) has p log p = 0; clamping z - m keeps 0 * inf away.

`accumulate` and `logits_gradient` work on a *tile*: some rows, and the columns from `start` on. For logprob_entropy the
tile is the whole vocabulary, linear_logprob.py calls them tile by tile.
"""

import torch

from .jit import jit, tl, triton, use_triton, wide

CPU_TILE = 1 << 18  # elements: 1 MiB of fp32, so that a tile's passes find it in the cache


def logprob_entropy(
    logits: torch.Tensor, targets: torch.Tensor, temperature: float = 1.0, inplace: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob of each row's target, and entropy of the row, under softmax(logits / temperature).

    logits [N, V] (fp32, bf16, fp16; -inf allowed), targets [N] int64 -> logprob [N], entropy [N] in fp32 (nats), both
    differentiable. A target below 0 marks a row to ignore: 0, 0, no gradient. `inplace`: the gradient overwrites the
    logits; allowed when nobody reads them after the backward pass.
    """
    return _LogprobEntropy.apply(logits, targets, temperature, inplace)


class _LogprobEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, temperature, inplace):
        state = new_state(logits)
        for rows in row_tiles(logits):
            accumulate(logits[rows], targets[rows], 0, state[:, rows], temperature)
        logprob, entropy, largest, log_sum = finish(state, targets)
        ctx.save_for_backward(logits, targets, largest, log_sum, entropy)
        ctx.temperature, ctx.inplace = temperature, inplace
        return logprob, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logprob, grad_entropy):
        logits, targets, *row_values = ctx.saved_tensors
        grad = logits if ctx.inplace else torch.empty_like(logits)
        row_values += mask_ignored(grad_logprob, grad_entropy, targets)
        for rows in row_tiles(logits):
            values = [value[rows] for value in row_values]
            logits_gradient(logits[rows], targets[rows], 0, *values, ctx.temperature, out=grad[rows])
        return grad, None, None, None


def new_state(rows: torch.Tensor) -> torch.Tensor:
    """[4, N]: m, s, t of the columns seen so far, and the target's z once its column has been seen."""
    state = torch.zeros(4, rows.shape[0], dtype=wide(rows.dtype), device=rows.device)
    state[0] = -1e30  # below every logit, yet finite: -inf - -inf would be NaN
    return state


def finish(state: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """state[4, N] of the whole vocabulary -> logprob, entropy, m, log s (each [N])."""
    largest, total, moment, picked = state
    log_sum = total.log()
    ignored = targets < 0
    logprob = ((picked - largest) - log_sum).masked_fill(ignored, 0.0)
    entropy = (log_sum - moment / total).masked_fill(ignored, 0.0)
    return logprob, entropy, largest, log_sum


def mask_ignored(grad_logprob, grad_entropy, targets):
    ignored = targets < 0
    return [grad_logprob.masked_fill(ignored, 0.0), grad_entropy.masked_fill(ignored, 0.0)]


def row_tiles(logits: torch.Tensor) -> list[slice]:
    """The rows that one call takes: all of them on a GPU, a cacheful on a CPU."""
    rows, columns = logits.shape
    step = rows if use_triton(logits) else max(1, CPU_TILE // columns)
    return [slice(row, min(row + step, rows)) for row in range(0, rows, max(1, step))]


def accumulate(tile, targets, start: int, state, temperature: float) -> None:
    """Merge tile[R, C], columns start .. start + C - 1 of the logits of R rows, into their state[4, R], in place."""
    if tile.shape[0] == 0:
        return
    largest, total, moment, picked = state
    scale = 1.0 / temperature
    new = torch.maximum(largest, tile.amax(1).to(state.dtype) * scale)
    fall = largest - new
    z = torch.add(-new[:, None], tile, alpha=scale).clamp_(min=-1e4)  # one pass: tile / T - m
    e = z.exp()
    shrink = fall.exp()
    moment.add_(fall * total).mul_(shrink)
    total.mul_(shrink).add_(e.sum(1))
    moment.add_(e.mul_(z).sum(1))
    largest.copy_(new)
    column = targets - start
    here = (column >= 0) & (column < tile.shape[1])
    value = tile.gather(1, (column * here)[:, None])[:, 0].to(state.dtype) * scale
    picked.copy_(torch.where(here, value, picked))


def logits_gradient(tile, targets, start, largest, log_sum, entropy, grad_logprob, grad_entropy, temperature, out):
    """The gradient of tile[R, C] (see the module's formula; row values are [R]), written to out[R, C]."""
    scale = 1.0 / temperature
    logp = torch.add(-largest[:, None], tile, alpha=scale).sub_(log_sum[:, None]).clamp_(min=-1e4)
    p = logp.exp()
    slope = -scale * grad_entropy
    logp.mul_(slope[:, None]).add_((slope * entropy - scale * grad_logprob)[:, None])
    p.mul_(logp)
    column = targets - start
    here = (column >= 0) & (column < tile.shape[1])
    p.scatter_add_(1, (column * here)[:, None], (scale * grad_logprob * here)[:, None])
    out.copy_(p)
