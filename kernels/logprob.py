"""Log-prob of a token and entropy of its whole distribution, from logits: one read each way.

T1's loss needs two numbers per position: the log-prob of the token that was sampled, and the
entropy of everything that could have been (its exploration bonus). With z = logits / T, maximum m,
s = sum_i exp(z_i - m) and p_i = exp(z_i - m) / s:

    log p_y = (z_y - m) - log s
    H       = -sum_i p_i log p_i = log s - t / s         where t = sum_i exp(z_i - m) * (z_i - m)

(m, s, t) is all that the row leaves behind, and it merges like softmax.py's (m, s). Raising the
maximum by d turns every exp(z - m) * (z - m) into exp(z - m - d) * (z - m - d), hence

    m' = m + d        s' = s * exp(-d)        t' = (t - d * s) * exp(-d)

Backward: d log p_y / dz_i = [i = y] - p_i, and d H / dz_i = -p_i (log p_i + H). So a token likelier
than the average surprise pushes the entropy down, a rarer one up. With the upstream gradients g (of
log p_y) and h (of H):

    dL / dlogits_i = (g * ([i = y] - p_i) - h * p_i * (log p_i + H)) / T
                   = ([i = y] * g - p_i * (g + h * (log p_i + H))) / T

Each logit's gradient needs only that logit and numbers of its row, so it can be written over it.

Two traps. We keep m and log s apart, not their sum: beside logits of 10^4, fp32 would round log s
away. And an impossible token (logit -inf) has p log p = 0, which must not become 0 * inf: z - m and
log p are clamped.

`accumulate` and `logits_gradient` work on a *tile*: some rows, and the columns from `start` on.
Here a tile is as wide as the vocabulary; linear_logprob.py calls them for narrower ones.
"""

from typing import NamedTuple

import torch

from .jit import (
    BINARY,
    CPU_TILE,
    LN_2,
    LOG2_E,
    constexpr,
    exp2,
    jit,
    launch_shape,
    tl,
    triton,
    use_triton,
    wide,
)


def logprob_entropy(
    logits: torch.Tensor, targets: torch.Tensor, temperature: float = 1.0, inplace: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob of each row's target, and entropy of the row, under softmax(logits / temperature).

    logits [N, V] (fp32, bf16, fp16; -inf allowed), targets [N] int64 -> logprob [N], entropy [N] in
    fp32 (nats), both differentiable. A target below 0 marks a row to ignore: 0, 0, no gradient.

    inplace: the gradient overwrites the logits. Allowed when nobody reads them after the backward
    pass; a second backward pass is then not possible.

    A target of V or more is an IndexError on a CPU. On CUDA it is not looked for, because the CPU
    would have to wait for the GPU to find it: the result then has no meaning.
    """
    check_targets(targets, logits.shape[1])
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    return _LogprobEntropy.apply(logits, targets.contiguous(), temperature, inplace)


def check_targets(targets: torch.Tensor, vocabulary: int) -> None:
    if targets.device.type == "cpu" and (targets >= vocabulary).any():
        raise IndexError(f"target {int(targets.max())} is outside the vocabulary of {vocabulary}")


class RowValues(NamedTuple):
    """What the gradient needs to know of its rows, [R] each."""

    largest: torch.Tensor  # m
    log_sum: torch.Tensor  # log s
    entropy: torch.Tensor  # H
    grad_logprob: torch.Tensor  # g
    grad_entropy: torch.Tensor  # h

    def of(self, rows: slice) -> "RowValues":
        return RowValues(*[value[rows] for value in self])


class _LogprobEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, temperature, inplace):
        state = new_state(logits)
        for rows in row_tiles(logits):
            accumulate(logits[rows], targets[rows], 0, state[:, rows], temperature)
        logprob, entropy, largest, log_sum = finish(state, targets, temperature)
        ctx.save_for_backward(logits, targets, largest, log_sum, entropy)
        ctx.temperature = temperature
        ctx.inplace = inplace
        return logprob, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logprob, grad_entropy):
        logits, targets, *results = ctx.saved_tensors
        grad = logits if ctx.inplace else torch.empty_like(logits)
        # contiguous(): the gradient of .sum() is one number, expanded
        values = RowValues(*results, grad_logprob.contiguous(), grad_entropy.contiguous())
        for rows in row_tiles(logits):
            logits_gradient(
                logits[rows], targets[rows], 0, values.of(rows), ctx.temperature, out=grad[rows]
            )
        return grad, None, None, None


def new_state(rows: torch.Tensor) -> torch.Tensor:
    """[4, N], of the columns seen so far: m, s, t, and the target's logit once it has been seen.

    m and t are in units of logits, not yet divided by T.
    """
    state = torch.zeros(4, rows.shape[0], dtype=wide(rows.dtype), device=rows.device)
    state[0] = -1e30  # below every logit, yet finite: -inf - -inf would be NaN
    return state


def finish(state: torch.Tensor, targets: torch.Tensor, temperature: float):
    """state [4, N] of the whole vocabulary -> logprob, entropy, m, log s (each [N])."""
    largest, total, moment, picked = state
    ignored = targets < 0
    log_sum = total.log().masked_fill(ignored, float("inf"))  # so that p is 0: no gradient
    logprob = (picked - largest) / temperature - log_sum
    entropy = log_sum - moment / total / temperature
    return logprob.masked_fill(ignored, 0.0), entropy.masked_fill(ignored, 0.0), largest, log_sum


def row_tiles(logits: torch.Tensor) -> list[slice]:
    """The rows that one call takes: all of them on a GPU, a cacheful on a CPU."""
    rows, columns = logits.shape
    step = rows if use_triton(logits) else CPU_TILE // columns
    step = max(1, step)
    return [slice(row, min(row + step, rows)) for row in range(0, rows, step)]


def accumulate(tile, targets, start: int, state, temperature: float) -> None:
    """Merge a tile into the state [4, R] of its rows, in place.

    tile [R, C]: the columns start .. start + C - 1 of the logits of R rows.
    """
    rows, columns = tile.shape
    if use_triton(tile):
        lanes, deep, warps = launch_shape(columns)
        accumulate_kernel[(rows,)](
            tile, targets, state, tile.stride(0), state.stride(0), columns, start,
            LOG2_E / temperature, DEEP=deep, LANES=lanes, num_warps=warps,
        )  # fmt: skip
        return
    m, s, t, picked = state  # views: what is changed in place below changes the state
    new = torch.maximum(m, tile.amax(1).to(state.dtype))
    rise = m - new  # -d of the rule above
    shrink = (rise / temperature).exp()
    z = tile - new[:, None]
    z.clamp_(min=-1e30)  # -inf would give 0 * -inf below
    e = z.mul(1 / temperature).exp_()
    m.copy_(new)
    t += rise * s
    t *= shrink
    t += z.mul_(e).sum(1)
    s *= shrink
    s += e.sum(1)
    column, here = locate(targets, start, columns)
    seen = tile.gather(1, column)[:, 0].to(state.dtype)
    picked.copy_(torch.where(here, seen, picked))


def logits_gradient(tile, targets, start: int, values: RowValues, temperature: float, out) -> None:
    """The gradient of a tile [R, C], by the formula above, written to out [R, C].

    `out` may be the tile itself.
    """
    rows, columns = tile.shape
    if use_triton(tile):
        block = min(4096, max(128, triton.next_power_of_2(columns)))
        gradient_kernel[(rows, triton.cdiv(columns, block))](
            tile, targets, *values, out, tile.stride(0), out.stride(0), columns, start,
            LOG2_E / temperature, BLOCK=block, num_warps=max(1, block // 512),
        )  # fmt: skip
        return
    g = values.grad_logprob
    h = values.grad_entropy
    logp = tile - values.largest[:, None]
    logp /= temperature
    logp -= values.log_sum[:, None]
    logp.clamp_(min=-1e4)
    p = logp.exp()
    # From here on in the memory of logp and p: -p * (g + h * (log p + H))
    factor = logp
    factor += values.entropy[:, None]
    factor *= h[:, None]
    factor += g[:, None]
    grad = p
    grad *= factor
    grad.neg_()
    column, here = locate(targets, start, columns)
    grad.scatter_add_(1, column, (g * here)[:, None])
    if out.dtype == grad.dtype:
        torch.div(grad, temperature, out=out)
    else:
        out.copy_(grad.div_(temperature))


def locate(targets, start, columns):
    """Where the targets stand in a tile: column [R, 1] (0 if elsewhere), and whether in it [R]."""
    column = targets - start
    here = (column >= 0) & (column < columns)
    return (column * here)[:, None], here


@jit
def accumulate_kernel(
    logits, targets, state, stride, state_stride, columns, start, scale,
    DEEP: constexpr, LANES: constexpr,
):  # one program per row; a tile is DEEP x LANES logits, DEEP of them in each lane  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # int64: N * V passes 2^31
    target = tl.load(targets + row)
    if target < 0:
        return
    lane = tl.arange(0, LANES)
    # Lane 0 goes on from the state that the last tile left; the other lanes start empty.
    m = tl.where(lane == 0, tl.load(state + row), -1e30)
    s = tl.where(lane == 0, tl.load(state + state_stride + row), 0.0)
    t = tl.where(lane == 0, tl.load(state + 2 * state_stride + row), 0.0)
    tile = tl.arange(0, DEEP)[:, None] * LANES + lane[None, :]
    for offset in range(0, columns, DEEP * LANES):
        here = offset + tile < columns
        z = tl.load(logits + row * stride + offset + tile, here, -1e30).to(tl.float32)
        z = tl.maximum(z, -1e30)
        new = tl.maximum(m, tl.max(z, 0))
        shrink = exp2((m - new) * scale)
        z -= new[None, :]
        e = exp2(z * scale)
        t = (t + (m - new) * s) * shrink + tl.sum(e * z, 0)
        s = s * shrink + tl.sum(e, 0)
        m = new
    # Merge the lanes.
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
    # log p in base 2, as exp2 wants it; h * LN_2 brings it back to nats in the sum below.
    logp = (z - tl.load(largest + row)) * scale - tl.load(log_sum + row) * BINARY
    logp = tl.maximum(logp, -1e4)
    constant = g + h * tl.load(entropy + row)
    slope = h * LN_2
    grad = tl.where(column == target, g, 0.0) - exp2(logp) * (constant + slope * logp)
    grad *= scale * LN_2  # 1 / T
    tl.store(out + row * out_stride + column, grad.to(out.dtype.element_ty), here)
