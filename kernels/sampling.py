"""Draw the next token: temperature, min-p, top-p, a random choice and its log-prob.

**The draw is a race.** Token i arrives at the time E_i / p_i, and the first to arrive is drawn. E_i
is a random number of the exponential distribution, a new one for each token: E = -log(1 - w) with w
uniform in (0, 1). A token with twice the probability runs twice as fast, and it follows from the
exponential distribution that token i wins with probability p_i. With three tokens:

    p        0.5     0.3     0.2
    w        0.63    0.20    0.70       one random number for each token
    E        0.99    0.22    1.20       -log(1 - w)
    E / p    1.99    0.74    6.02       token 1 arrives first: it is drawn

In PyTorch, for one row:

    def race(logits, temperature, w):
        p = (logits / temperature).softmax(0)
        arrival = -torch.log(1 - w) / p
        token = arrival.argmin()
        return token, p[token].log()

(Others know it as the Gumbel-max trick: -log E is "Gumbel noise", and the winner is the argmax of
logits / T - log E.) The usual way, a cumulative sum of p and one random number, needs the whole row
before it can choose. A race can be streamed like softmax.py, in one read of the logits, because a
common factor in all p changes no winner: each lane keeps the maximum m, the sum s and the leader of
its race, and when m rises, s and the leader's p shrink by the same factor.

**The noise is a function, not a stream.** w is hashed from (seed of the sequence, position in it,
token i), so a draw depends on nothing else: not on the batch a sequence was put in, its neighbours,
earlier draws, or the device. Seed and position make a 64-bit key (SplitMix64, once per row). Its
halves enter a 32-bit hash of the token's index, which PyTorch and Triton run from the same source
lines. Logarithms may differ in their last digit between devices, so two tokens within 1e-6 of a tie
may change places: one draw in a million.

**Cuts**, all on the distribution at the temperature. min-p keeps p_i >= min_p * max p. Top-p keeps
the smallest set of most probable tokens whose mass reaches top_p; among equals the lower index goes
first. A token must pass both, and the log-prob returned is renormalised over those that do. min-p
needs the maximum first: a second read of the row, which by then is in the L2 cache. Top-p needs an
order: on a GPU a sort beforehand, a step of its own. T1's training never takes it: it samples at
top_p 1, so that the policy trained on is the policy sampled from.

No step waits for the CPU, and no shape depends on data: a CUDA graph can hold them all.
"""

from functools import lru_cache

import numpy as np
import torch

from .jit import (
    CPU_TILE,
    LN_2,
    LOG2_E,
    constexpr,
    exp2,
    jit,
    log2,
    tl,
    triton,
    use_triton,
    wide,
)

WEYL = -1640531535  # 2^32 / golden ratio (as int32): neighbouring tokens start the hash far apart
# scramble()'s result times this is -w: inside (-1, 0) even after rounding.
SMALL = 2.0**-31 * (1 - 2.0**-23)


@torch.no_grad()
def sample_token(
    logits: torch.Tensor,
    temperature: float,
    top_p: float,
    min_p: float,
    seeds: torch.Tensor,
    positions: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One draw per row from softmax(logits / temperature), cut by top-p and min-p.

    logits [B, V], seeds [B] int64 (one per sequence), positions [B] int64 (of the token in its
    sequence) -> token [B] int64, logprob [B] fp32 under the very distribution that was drawn from,
    after all cuts. temperature 0: the most probable token, and its log-prob at temperature 1. The
    three numbers hold for the whole batch; ValueError if one is out of its range.
    """
    if not (temperature >= 0 and 0 <= top_p <= 1 and 0 <= min_p <= 1):
        raise ValueError(
            f"temperature {temperature} must be >= 0; top_p {top_p} and min_p {min_p} in 0..1"
        )
    logits = logits.contiguous()
    if temperature == 0:
        token = logits.argmax(1)
        z = logits.to(wide(logits.dtype))
        logprob = z.gather(1, token[:, None])[:, 0] - z.logsumexp(1)
        return token, logprob.float()
    seeds = seeds.contiguous()
    positions = positions.contiguous()
    if not use_triton(logits):
        return _sample_reference(logits, temperature, top_p, min_p, seeds, positions)
    if top_p < 1:
        keep = nucleus((logits.float() / temperature).softmax(1), top_p)
        logits = logits.masked_fill(~keep, float("-inf"))
    rows, vocabulary = logits.shape
    token = torch.empty(rows, dtype=torch.int64, device=logits.device)
    logprob = torch.empty(rows, dtype=torch.float32, device=logits.device)
    # A step draws for few rows: each gets as many threads as a program can have.
    lanes = min(4096, max(128, triton.next_power_of_2(vocabulary)))
    warps = max(1, lanes // 128)
    sample_kernel[(rows,)](
        logits, seeds, positions, token, logprob, logits.stride(0), vocabulary,
        LOG2_E / temperature, min_p, CUT=min_p > 0, LANES=lanes, num_warps=warps,
    )  # fmt: skip
    return token, logprob


def _sample_reference(logits, temperature, top_p, min_p, seeds, positions):
    """`sample_token` in PyTorch, some rows at a time."""
    rows, vocabulary = logits.shape
    key = splitmix64(counter(seeds, positions))
    low = fold(key.to(torch.int32))[:, None]
    high = (key >> 32).to(torch.int32)[:, None]
    index = folded_index(vocabulary, logits.device)
    tokens = []
    logprobs = []
    step = max(1, CPU_TILE // vocabulary)
    for row in range(0, max(1, rows), step):
        part = slice(row, row + step)
        p = (logits[part].to(wide(logits.dtype)) / temperature).softmax(1)
        if top_p < 1 or min_p > 0:
            kept = p >= min_p * p.amax(1, keepdim=True)
            if top_p < 1:
                kept = kept & nucleus(p, top_p)
            p *= kept
            p /= p.sum(1, keepdim=True)
        minus_w = scramble(index ^ low[part], high[part]).float().mul_(SMALL)
        minus_e = minus_w.log1p_()
        # The first to arrive has the smallest E / p: the largest p / E, the smallest p / -E.
        token = first_minimum(p / minus_e)
        tokens.append(token)
        logprobs.append(p.gather(1, token[:, None])[:, 0].log())
    return torch.cat(tokens), torch.cat(logprobs).float()


# --- the noise. These functions run on PyTorch's tensors and, compiled, in the Triton kernel. -----


def counter(seed, position):
    """One int64 number for a seed and a position, for splitmix64 to hash."""
    return seed * -7046029254386353131 + position * -4417276706812531889


def splitmix64(x):
    """The hash of SplitMix64, for int64 numbers, and for Python's integers (modulo 2^64).

    >> copies the sign bit; the masks take the copies away.
    """
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def fold(x):
    """The first stage of a token's hash, for int32: bring the high bits down to the low ones."""
    return x ^ (x >> 16)


@lru_cache
def folded_index(vocabulary: int, device: torch.device) -> torch.Tensor:
    """fold() of the tokens' indices, int32 [V].

    fold(a) ^ fold(b) is fold(a ^ b), so this part of the work is done once, not for each row.
    """
    return fold(torch.arange(vocabulary, dtype=torch.int32, device=device) * WEYL)


def scramble(x, high):
    """The second stage: from a folded int32 to an odd int32 in [-2^31, 0), -w in units of 2^-31.

    In place for PyTorch. >> copies the sign bit, because PyTorch has no other shift; it loses one
    bit of randomness, which does not matter. The hash becomes w, not 1 - w, because small E decide
    the race, and floats are finest near 0.
    """
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= high | 1
    x |= -2147483647
    return x


# --- the cuts -------------------------------------------------------------------------------------


def nucleus(p: torch.Tensor, top_p: float) -> torch.Tensor:
    """Bool [B, V]: the smallest set of most probable tokens whose mass reaches top_p.

    p [B, V], unnormalised. Seen from the other end: the least probable tokens are dropped, as many
    as have a mass of 1 - top_p at most.
    """
    if p.device.type == "cpu":
        # NumPy sorts floats with vector instructions, 30 times faster than PyTorch does on a CPU.
        ordered = torch.from_numpy(np.sort(p.numpy()))
    else:
        ordered = p.sort(1).values
    mass = ordered.cumsum(1)
    dropped = (mass <= (1 - top_p) * mass[:, -1:]).sum(1, keepdim=True)
    dropped = dropped.clamp_(max=p.shape[1] - 1)  # one token always stays
    cut = ordered.gather(1, dropped)
    above = p > cut
    tied = p == cut
    # Of the tokens that are equal to the last one kept, as many stay as there is room for.
    room = p.shape[1] - dropped - above.sum(1, keepdim=True)
    return above | (tied & (tied.cumsum(1) <= room))


def first_minimum(x: torch.Tensor) -> torch.Tensor:
    """argmin over the columns; the lowest index among equals."""
    if x.device.type == "cpu":
        return torch.from_numpy(x.numpy().argmin(1))  # 20 times faster than PyTorch's
    return x.argmin(1)


# --- the kernel -----------------------------------------------------------------------------------

counter_jit = jit(counter)
splitmix64_jit = jit(splitmix64)
fold_jit = jit(fold)
scramble_jit = jit(scramble)


@jit
def sample_kernel(
    logits, seeds, positions, token, logprob, stride, columns, scale, min_p,
    CUT: constexpr, LANES: constexpr,
):  # one program per row  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    lane = tl.arange(0, LANES)
    key = splitmix64_jit(counter_jit(tl.load(seeds + row), tl.load(positions + row)))
    low = key.to(tl.int32)
    high = (key >> 32).to(tl.int32)
    m = tl.full([LANES], -1e30, tl.float32)
    if CUT:  # min-p compares with the row's maximum: find it first
        for offset in range(0, columns, LANES):
            here = offset + lane < columns
            m = tl.maximum(m, tl.load(logits + offset + lane, here, -1e30).to(tl.float32))
        m = tl.zeros([LANES], tl.float32) + tl.max(m, 0)
    s = tl.zeros([LANES], tl.float32)
    # The leader of each lane: its p (relative to m, like s), its E, and which token it is.
    lead_p = tl.zeros([LANES], tl.float32)
    lead_e = tl.full([LANES], 1.0, tl.float32)
    leader = tl.zeros([LANES], tl.int32)
    for offset in range(0, columns, LANES):
        column = offset + lane
        z = tl.load(logits + column, column < columns, float("-inf")).to(tl.float32)
        # One exponential serves both cases. A new maximum: p = 1, and what was before shrinks by
        # `power`. No new maximum: p = `power`, and nothing shrinks.
        rise = (z - m) * scale
        power = exp2(-tl.abs(rise))
        p = tl.where(rise > 0, 1.0, power)
        shrink = tl.where(rise > 0, power, 1.0)
        m = tl.maximum(m, z)
        if CUT:
            p = tl.where(p < min_p, 0.0, p)
        # The noise: E = -log(1 - w), for small w by its series, because 1 - w would round w away.
        w = scramble_jit(fold_jit(column * -1640531535 ^ low), high).to(tl.float32) * -4.6566123e-10
        series = w * (1 + w * (1 / 2 + w * (1 / 3 + w * (1 / 4 + w * (1 / 5)))))
        e = tl.where(w < 0.0625, series, log2(1 - w) * -LN_2)
        # The race of this token with the leader of its lane.
        s = s * shrink + p
        lead_p *= shrink
        ahead = p * lead_e > lead_p * e  # p / e > lead_p / lead_e
        lead_p = tl.where(ahead, p, lead_p)
        lead_e = tl.where(ahead, e, lead_e)
        leader = tl.where(ahead, column, leader)
    # The race of the lanes' leaders.
    top = tl.max(m, 0)
    shrink = exp2((m - top) * scale)
    lead = lead_p * shrink / lead_e
    winner = tl.min(tl.where(lead == tl.max(lead, 0), leader, columns - 1), 0)
    z = tl.load(logits + winner).to(tl.float32)
    total = tl.sum(s * shrink, 0)
    tl.store(token + row, winner.to(tl.int64))
    tl.store(logprob + row, ((z - top) * scale - tl.log2(total)) * LN_2)
