"""Draw the next token. (docstring follows)"""

import torch

from .jit import wide

CPU_TILE = 1 << 16


def sample_token(logits, temperature, top_p, min_p, seeds, positions):
    """One draw per row from softmax(logits / temperature), cut by top-p and min-p.

    logits [B, V], seeds [B] int64, positions [B] int64 -> token [B] int64, logprob [B] fp32: the log-prob under the
    very distribution that was sampled from (temperature, top-p and min-p applied). temperature 0: the most probable
    token, with its log-prob under temperature 1.
    """
    if not (temperature >= 0 and 0 <= top_p <= 1 and 0 <= min_p <= 1):
        raise ValueError(f"need temperature >= 0, top_p and min_p in 0..1; got {temperature}, {top_p}, {min_p}")
    if temperature == 0:
        token = logits.argmax(1)
        chosen = logits.gather(1, token[:, None])[:, 0].to(wide(logits.dtype))
        return token, chosen - torch.logsumexp(logits.to(wide(logits.dtype)), dim=1)
    if top_p < 1:
        logits = nucleus(logits, temperature, top_p)
    key, multiplier = row_keys(seeds, positions)
    rows, vocabulary = logits.shape
    token = torch.empty(rows, dtype=torch.int64)
    logprob = torch.empty(rows, dtype=torch.float32)
    index = torch.arange(vocabulary, dtype=torch.int32) * -1640531535
    step = max(1, CPU_TILE // vocabulary)
    for row in range(0, rows, step):
        part = slice(row, row + step)
        token[part], logprob[part] = _draw(
            logits[part], temperature, min_p, index, key[part, None], multiplier[part, None]
        )
    return token, logprob


def _draw(logits, temperature, min_p, index, key, multiplier):
    z = logits.float().mul(1.0 / temperature)
    z -= z.amax(1, keepdim=True)
    p = z.exp()
    if min_p > 0:
        p.masked_fill_(p < min_p, 0.0)
    x = index ^ key
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= multiplier
    x |= -(2**31) | 1
    race = x.float().mul_(2.0**-31 * (1 - 2.0**-23)).log1p_()
    race = torch.div(p, race, out=race)
    token = torch.from_numpy(race.numpy().argmin(1))
    return token, z.gather(1, token[:, None])[:, 0] - p.sum(1).log()


def row_keys(seeds, positions):
    x = seeds * -7046029254386353131 + positions * -4417276706812531889
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    x = x ^ ((x >> 31) & 0x1FFFFFFFF)
    return x.to(torch.int32), (x >> 32).to(torch.int32) | 1


def nucleus(logits, temperature, top_p):
    """logits with -inf outside the smallest set of most probable tokens whose mass reaches top_p."""
    z = logits.float() / temperature
    mass = torch.logsumexp(z, dim=1, keepdim=True)
    size = 256
    while True:
        size = min(size, z.shape[1])
        best = z.topk(size, dim=1).values
        reached = (best - mass).exp().cumsum(1)
        if size == z.shape[1] or bool((reached[:, -1] >= top_p).all()):
            break
        size *= 8
    rank = (reached < top_p).sum(1, keepdim=True).clamp(max=size - 1)
    cut = best.gather(1, rank)
    ties = rank + 1 - (best > cut).sum(1, keepdim=True)
    tied = z == cut
    keep = (z > cut) | (tied & (tied.cumsum(1) <= ties))
    return logits.masked_fill(~keep, float("-inf"))
