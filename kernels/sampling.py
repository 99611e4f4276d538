"""Draw the next token: temperature, min-p, top-p, a random choice and its log-prob, in one read of the logits.

**The draw is a race** (the Gumbel-max trick). Let token i arrive at time E_i / p_i, with independent E_i ~ Exp(1). The
minimum of exponentials is exponential, and token i is first with probability p_i / sum_j p_j: just the draw we want,
for *unnormalised* p, without a cumulative sum, by a plain argmax of p_i / E_i over the vocabulary. (Its logarithm,
z_i - log E_i, is the familiar "logits plus Gumbel noise".) Rows can be streamed as in softmax.py: the maximum m, the
sum s and the leader of the race are kept per lane, and when m rises, both s and the leader's p shrink by one factor.

**The noise is a function, not a stream.** E_i is hashed from (seed of the sequence, position in it, token i). A draw
then depends on nothing else: not on the batch a sequence was put in, its neighbours, earlier draws, or the device.
seed and position make a 64-bit key (the finaliser of SplitMix64, once per row); its halves enter a 32-bit
xor-shift-multiply hash of the token's index, which PyTorch and Triton run from the same source lines. The hash makes
w in (0, 1), and E = -log(1 - w): small E decide the race, and small w have the finest floats. Logarithms may differ in
their last digit between devices, so two tokens within 1e-6 of a tie may change places: one draw in a million.

**Cuts**, all on the distribution at the temperature: min-p keeps p_i >= min_p * max p. Top-p keeps the smallest set of
most probable tokens whose mass reaches top_p; among equals the lower index goes first. A token must pass both, and the
log-prob returned is renormalised over those that do. min-p needs the maximum first, a second read (of a row that is by
then in the L2 cache). Top-p needs an order: on a GPU a sort beforehand, as a step of its own, which T1's training
never takes (it samples at top_p 1, so that the policy trained on is the policy sampled from). No step waits for
the host, and no shape depends on data: a CUDA graph can hold them all.
"""

from functools import lru_cache

import numpy as np
import torch

from .jit import CPU_TILE, LOG2_E, constexpr, exp2, jit, launch_shape, log2, tl, use_triton, wide

WEYL = -1640531535  # 2^32 / golden ratio (as int32): neighbouring tokens start the hash far apart
SMALL = 2.0**-31 * (1 - 2.0**-23)  # scramble()'s result times this is -w, inside (-1, 0) even after rounding


@torch.no_grad()
def sample_token(
    logits: torch.Tensor, temperature: float, top_p: float, min_p: float, seeds: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One draw per row from softmax(logits / temperature), cut by top-p and min-p.

    logits [B, V], seeds [B] int64 (one per sequence), positions [B] int64 (of the token in its sequence) -> token [B]
    int64, logprob [B] fp32, under the very distribution that was drawn from (after all cuts). temperature 0: the most
    probable token, and its log-prob at temperature 1. The three numbers hold for the whole batch; ValueError if one is
    out of its range.
    """
    if not (temperature >= 0 and 0 <= top_p <= 1 and 0 <= min_p <= 1):
        raise ValueError(f"temperature {temperature} must be >= 0; top_p {top_p} and min_p {min_p} in 0..1")
    rows, vocabulary = logits.shape
    logits, seeds, positions = logits.contiguous(), seeds.contiguous(), positions.contiguous()
    if temperature == 0:
        token = logits.argmax(1)
        z = logits.to(wide(logits.dtype))
        return token, (z.gather(1, token[:, None])[:, 0] - z.logsumexp(1)).float()
    if not use_triton(logits):
        return _sample_reference(logits, temperature, top_p, min_p, seeds, positions)
    if top_p < 1:
        keep = nucleus((logits.float() / temperature).softmax(1), top_p)
        logits = logits.masked_fill(~keep, float("-inf"))
    token = torch.empty(rows, dtype=torch.int64, device=logits.device)
    logprob = torch.empty(rows, dtype=torch.float32, device=logits.device)
    lanes, _, warps = launch_shape(vocabulary)
    sample_kernel[(rows,)](
        logits, seeds, positions, token, logprob, logits.stride(0), vocabulary, LOG2_E / temperature, min_p,
        CUT=min_p > 0, LANES=lanes, num_warps=warps,
    )  # fmt: skip
    return token, logprob


def _sample_reference(logits, temperature, top_p, min_p, seeds, positions):
    rows, vocabulary = logits.shape
    key = row_key(seeds, positions)
    low, high = fold(key.to(torch.int32))[:, None], (key >> 32).to(torch.int32)[:, None]
    index = folded_index(vocabulary, logits.device)
    parts = []
    step = max(1, CPU_TILE // vocabulary)
    for row in range(0, max(1, rows), step):
        part = slice(row, row + step)
        p = (logits[part].to(wide(logits.dtype)) / temperature).softmax(1)
        if top_p < 1 or min_p > 0:
            kept = p >= min_p * p.amax(1, keepdim=True)
            p *= kept & nucleus(p, top_p) if top_p < 1 else kept
            p /= p.sum(1, keepdim=True)
        minus_e = scramble(index ^ low[part], high[part]).float().mul_(SMALL).log1p_()
        token = first_minimum(p / minus_e)  # where p / E is largest
        parts.append((token, p.gather(1, token[:, None])[:, 0].log()))
    return torch.cat([token for token, _ in parts]), torch.cat([logprob for _, logprob in parts]).float()


def row_key(seed, position):
    """A 64-bit key from two int64 numbers (PyTorch or Triton): SplitMix64's finaliser. The masks make >> logical."""
    x = seed * -7046029254386353131 + position * -4417276706812531889
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@lru_cache
def folded_index(vocabulary: int, device: torch.device) -> torch.Tensor:
    """fold() of the tokens' indices, int32 [V]. fold(a) ^ fold(b) is fold(a ^ b): two passes less for each row."""
    return fold(torch.arange(vocabulary, dtype=torch.int32, device=device) * WEYL)


def fold(x):
    """The hash's first stage, for int32 (PyTorch or Triton): bring the high bits down to the low ones."""
    return x ^ (x >> 16)


def scramble(x, high):
    """Hash a folded int32 (PyTorch: in place; Triton) to an odd int32 in [-2^31, 0): the noise -w in units of 2^-31.

    >> copies the sign bit here, for PyTorch knows no other; the one bit that this loses is of no consequence.
    """
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= high | 1
    x |= -2147483647
    return x


def nucleus(p: torch.Tensor, top_p: float) -> torch.Tensor:
    """Which of p[B, V] (unnormalised) form the smallest set of most probable tokens whose mass reaches top_p? Bool.

    From the other end: drop the least probable ones as long as the mass dropped is at most 1 - top_p.
    """
    # NumPy sorts floats with vector instructions, 30 times faster than PyTorch does on a CPU.
    ordered = torch.from_numpy(np.sort(p.numpy())) if p.device.type == "cpu" else p.sort(1).values
    mass = ordered.cumsum(1)
    dropped = (mass <= (1 - top_p) * mass[:, -1:]).sum(1, keepdim=True).clamp_(max=p.shape[1] - 1)
    cut = ordered.gather(1, dropped)
    above, tied = p > cut, p == cut
    room = p.shape[1] - dropped - above.sum(1, keepdim=True)
    return above | (tied & (tied.cumsum(1) <= room))


def first_minimum(x: torch.Tensor) -> torch.Tensor:
    """argmin over the columns; the lowest index among equals. (NumPy's is 20 times faster on a CPU.)"""
    return torch.from_numpy(x.numpy().argmin(1)) if x.device.type == "cpu" else x.argmin(1)


row_key_jit, fold_jit, scramble_jit = jit(row_key), jit(fold), jit(scramble)


@jit
def sample_kernel(
    logits, seeds, positions, token, logprob, stride, columns, scale, min_p, CUT: constexpr, LANES: constexpr
):  # one program per row
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    lane = tl.arange(0, LANES)
    key = row_key_jit(tl.load(seeds + row), tl.load(positions + row))
    low, high = key.to(tl.int32), (key >> 32).to(tl.int32)
    m = tl.full([LANES], -1e30, tl.float32)
    if CUT:  # min-p compares with the row's maximum: find it first
        for offset in range(0, columns, LANES):
            m = tl.maximum(m, tl.load(logits + offset + lane, offset + lane < columns, -1e30).to(tl.float32))
        m = tl.zeros([LANES], tl.float32) + tl.max(m, 0)
    s = tl.zeros([LANES], tl.float32)
    lead_p = tl.zeros([LANES], tl.float32)  # the lane's leader: its p (relative to m, like s), its E, and who it is
    lead_e = tl.full([LANES], 1.0, tl.float32)
    leader = tl.zeros([LANES], tl.int32)
    for offset in range(0, columns, LANES):
        column = offset + lane
        z = tl.load(logits + column, column < columns, float("-inf")).to(tl.float32)
        rise = (z - m) * scale
        power = exp2(-tl.abs(rise))  # one exponential serves both cases: a new maximum, or not
        p = tl.where(rise > 0, 1.0, power)
        shrink = tl.where(rise > 0, power, 1.0)
        m = tl.maximum(m, z)
        if CUT:
            p = tl.where(p < min_p, 0.0, p)
        w = scramble_jit(fold_jit(column * -1640531535 ^ low), high).to(tl.float32) * -4.6566123e-10
        series = w * (1 + w * (1 / 2 + w * (1 / 3 + w * (1 / 4 + w * (1 / 5)))))  # 1 - w would round a small w away
        e = tl.where(w < 0.0625, series, log2(1 - w) * -0.6931471805599453)
        s = s * shrink + p
        lead_p *= shrink
        ahead = p * lead_e > lead_p * e  # p / e > lead_p / lead_e
        lead_p = tl.where(ahead, p, lead_p)
        lead_e = tl.where(ahead, e, lead_e)
        leader = tl.where(ahead, column, leader)
    top = tl.max(m, 0)
    shrink = exp2((m - top) * scale)
    lead = lead_p * shrink / lead_e
    winner = tl.min(tl.where(lead == tl.max(lead, 0), leader, columns - 1), 0)
    z = tl.load(logits + winner).to(tl.float32)
    tl.store(token + row, winner.to(tl.int64))
    tl.store(logprob + row, ((z - top) * scale - tl.log2(tl.sum(s * shrink, 0))) * 0.6931471805599453)
