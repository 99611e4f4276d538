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

from .jit import CPU_TILE, LOG2_E, constexpr, exp2, jit, launch_shape, tl, triton, use_triton, wide


def logprob_entropy(
    logits: torch.Tensor, targets: torch.Tensor, temperature: float = 1.0, inplace: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob of each row's target, and entropy of the row, under softmax(logits / temperature).

    logits [N, V] (fp32, bf16, fp16; -inf allowed), targets [N] int64 -> logprob [N], entropy [N] in fp32 (nats), both
    differentiable. A target below 0 marks a row to ignore: 0, 0, no gradient. `inplace`: the gradient overwrites the
    logits; allowed when nobody reads them after the backward pass. A second backward pass is then not possible.
    A target of V or more: IndexError on a CPU; on CUDA, where to look would be to wait, the result has no meaning.
    """
    check_targets(targets, logits.shape[1])
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    return _LogprobEntropy.apply(logits, targets.contiguous(), temperature, inplace)


def check_targets(targets: torch.Tensor, vocabulary: int) -> None:
    if targets.device.type == "cpu" and (targets >= vocabulary).any():
        raise IndexError(f"target {int(targets.max())} is outside the vocabulary of {vocabulary}")


class _LogprobEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, temperature, inplace):
        state = new_state(logits)
        for rows in row_tiles(logits):
            accumulate(logits[rows], targets[rows], 0, state[:, rows], temperature)
        logprob, entropy, largest, log_sum = finish(state, targets, temperature)
        ctx.save_for_backward(logits, targets, largest, log_sum, entropy)
        ctx.temperature, ctx.inplace = temperature, inplace
        return logprob, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logprob, grad_entropy):
        logits, targets, *row_values = ctx.saved_tensors
        grad = logits if ctx.inplace else torch.empty_like(logits)
        row_values += [grad_logprob.contiguous(), grad_entropy.contiguous()]  # .sum() sends expanded ones
        for rows in row_tiles(logits):
            values = [value[rows] for value in row_values]
            logits_gradient(logits[rows], targets[rows], 0, *values, ctx.temperature, out=grad[rows])
        return grad, None, None, None


def new_state(rows: torch.Tensor) -> torch.Tensor:
    """[4, N]: m, s, t of the columns seen so far, the target's logit once seen; m and t in logits, not yet 1 / T."""
    state = torch.zeros(4, rows.shape[0], dtype=wide(rows.dtype), device=rows.device)
    state[0] = -1e30  # below every logit, yet finite: -inf - -inf would be NaN
    return state


def finish(state: torch.Tensor, targets: torch.Tensor, temperature: float) -> tuple[torch.Tensor, ...]:
    """state[4, N] of the whole vocabulary -> logprob, entropy, m, log s (each [N])."""
    largest, total, moment, picked = state
    ignored = targets < 0
    log_sum = total.log().masked_fill(ignored, float("inf"))  # in the backward pass: p = 0, so no gradient
    logprob = ((picked - largest) / temperature - log_sum).masked_fill(ignored, 0.0)
    entropy = (log_sum - moment / total / temperature).masked_fill(ignored, 0.0)
    return logprob, entropy, largest, log_sum


def row_tiles(logits: torch.Tensor) -> list[slice]:
    """The rows that one call takes: all of them on a GPU, a cacheful on a CPU."""
    rows, columns = logits.shape
    step = max(1, rows if use_triton(logits) else CPU_TILE // columns)
    return [slice(row, min(row + step, rows)) for row in range(0, rows, step)]


def accumulate(tile, targets, start: int, state, temperature: float) -> None:
    """Merge tile[R, C], columns start .. start + C - 1 of the logits of R rows, into their state[4, R], in place."""
    rows, columns = tile.shape
    if use_triton(tile):
        lanes, deep, warps = launch_shape(columns)
        accumulate_kernel[(rows,)](
            tile, targets, state, tile.stride(0), state.stride(0), columns, start, LOG2_E / temperature,
            DEEP=deep, LANES=lanes, num_warps=warps,
        )  # fmt: skip
        return
    largest, total, moment, picked = state
    new = torch.maximum(largest, tile.amax(1).to(state.dtype))
    fall = largest - new
    shrink = (fall / temperature).exp()
    z = torch.sub(tile, new[:, None]).clamp_(min=-1e30)
    e = z.mul(1 / temperature).exp_()
    largest.copy_(new)
    moment.add_(fall * total).mul_(shrink).add_(z.mul_(e).sum(1))
    total.mul_(shrink).add_(e.sum(1))
    column, here = locate(targets, start, columns)
    picked.copy_(torch.where(here, tile.gather(1, column)[:, 0].to(state.dtype), picked))


def logits_gradient(tile, targets, start, largest, log_sum, entropy, grad_logprob, grad_entropy, temperature, out):
    """The gradient of tile[R, C] (the formula above; row values are [R]), written to out[R, C]; out may be the tile."""
    rows, columns = tile.shape
    if use_triton(tile):
        block = min(4096, max(128, triton.next_power_of_2(columns)))
        gradient_kernel[(rows, triton.cdiv(columns, block))](
            tile, targets, largest, log_sum, entropy, grad_logprob, grad_entropy, out,
            tile.stride(0), out.stride(0), columns, start, LOG2_E / temperature,
            BLOCK=block, num_warps=max(1, block // 512),
        )  # fmt: skip
        return
    logp = torch.sub(tile, largest[:, None]).div_(temperature).sub_(log_sum[:, None]).clamp_(min=-1e4)
    p = logp.exp()
    logp.add_(entropy[:, None]).mul_(grad_entropy[:, None]).add_(grad_logprob[:, None])
    p.mul_(logp).neg_()
    column, here = locate(targets, start, columns)
    p.scatter_add_(1, column, (grad_logprob * here)[:, None])
    torch.div(p, temperature, out=out) if out.dtype == p.dtype else out.copy_(p.div_(temperature))


def locate(targets, start, columns):
    """Where the targets stand in a tile: column [R, 1] (0 if elsewhere), and whether they are in it at all [R]."""
    column = targets - start
    here = (column >= 0) & (column < columns)
    return (column * here)[:, None], here


@jit
def accumulate_kernel(
    logits, targets, state, stride, state_stride, columns, start, scale, DEEP: constexpr, LANES: constexpr
):  # one program per row; a tile is DEEP x LANES logits, DEEP of them in each lane
    row = tl.program_id(0).to(tl.int64)  # int64: N * V passes 2^31
    target = tl.load(targets + row)
    if target < 0:
        return
    lane = tl.arange(0, LANES)
    m = tl.where(lane == 0, tl.load(state + row), -1e30)  # lane 0 goes on where the last tile stopped
    s = tl.where(lane == 0, tl.load(state + state_stride + row), 0.0)
    t = tl.where(lane == 0, tl.load(state + 2 * state_stride + row), 0.0)
    tile = tl.arange(0, DEEP)[:, None] * LANES + lane[None, :]
    for offset in range(0, columns, DEEP * LANES):
        z = tl.load(logits + row * stride + offset + tile, offset + tile < columns, -1e30).to(tl.float32)
        z = tl.maximum(z, -1e30)
        new = tl.maximum(m, tl.max(z, 0))
        shrink = exp2((m - new) * scale)
        z -= new[None, :]
        e = exp2(z * scale)
        t = (t + (m - new) * s) * shrink + tl.sum(e * z, 0)
        s = s * shrink + tl.sum(e, 0)
        m = new
    top = tl.max(m, 0)
    shrink = exp2((m - top) * scale)
    tl.store(state + row, top)
    tl.store(state + state_stride + row, tl.sum(s * shrink, 0))
    tl.store(state + 2 * state_stride + row, tl.sum((t + (m - top) * s) * shrink, 0))
    column = target - start
    here = (column >= 0) & (column < columns)
    picked = tl.load(logits + row * stride + column, here, 0.0).to(tl.float32)
    tl.store(state + 3 * state_stride + row, picked, here)


@jit
def gradient_kernel(
    logits, targets, largest, log_sum, entropy, grad_logprob, grad_entropy, out,
    stride, out_stride, columns, start, scale, BLOCK: constexpr,
):  # one program per row and BLOCK columns  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = column < columns
    target = tl.load(targets + row) - start
    g = tl.load(grad_logprob + row)
    h = tl.load(grad_entropy + row)
    z = tl.load(logits + row * stride + column, here, 0.0).to(tl.float32)
    logp = tl.maximum(
        (z - tl.load(largest + row)) * scale - tl.load(log_sum + row) * 1.4426950408889634, -1e4
    )  # base 2
    constant = g + h * tl.load(entropy + row)
    slope = h * 0.6931471805599453
    grad = tl.where(column == target, g, 0.0) - exp2(logp) * (constant + slope * logp)
    grad *= scale * 0.6931471805599453  # 1 / T
    tl.store(out + row * out_stride + column, grad.to(out.dtype.element_ty), here)
