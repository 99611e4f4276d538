"""What a decode step computes between its matrix products, in three kernels.

One more token for B sequences needs every weight of the model once, and few numbers besides. So the
time to read the weights is the least that a step can take. What stands between the products is
small, [B, D] numbers at a time, but PyTorch makes a kernel of each operation on them: 15 in a layer
of Qwen2. Each has to be started, to fetch its input from memory and to put its result back there.
Here one kernel does all that stands between one product (or attention) and the next. A layer is

    add_norm        stream += what the layer before has added;  x = RMSNorm(stream)
    qkv             a product
    rotary_write    turn queries and keys; put the keys and values into the cache
    attention
    out             a product
    add_norm        stream += attention's result;  x = RMSNorm(stream)
    gate_up         a product
    silu_mul        silu(gate) * up
    down            a product

All three compute in fp32 and round once, at the end. They have no backward: sampling needs none.

**add_norm.** x / sqrt(mean(x^2) + eps) * weight needs the whole row before its first result. A row
of the stream, a few thousand numbers, fits into the registers of one program. It is read once,
added to, written back, summed up and scaled: every number crosses the memory bus once each way.

**rotary_write.** A rotation by the angle a takes the pair (x0, x1) of neighbours to

    x0 cos a - x1 sin a
    x1 cos a + x0 sin a

Both lines are x_i cos a + x_j sin a, but for a sign, where j is i's neighbour: i with its last bit
flipped, i ^ 1. So every lane computes one number from two. Numbers beyond the rotated part of a
head have cos a = 1 and sin a = 0. A program has one head of one row: a query, a key (which also may
have to be normalised first, over the head) or a value (which is only copied).

**silu_mul.** silu(z) = z / (1 + exp(-z)). Nothing but one read and one write of each number.
"""

import torch
import torch.nn.functional as F

from .jit import constexpr, jit, tl, triton, use_triton, wide


def add_norm(
    stream: torch.Tensor, added: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """stream += added, in place; returns stream / rms(stream) * weight in the dtype of weight.

    stream [B, D], fp32 or float64, contiguous; added [B, D], any floating dtype; weight [D].
    """
    if not use_triton(stream):
        stream += added
        return F.rms_norm(stream, weight.shape, weight.to(stream.dtype), eps).to(weight.dtype)
    added = added.contiguous()
    out = torch.empty_like(stream, dtype=weight.dtype)
    rows, columns = stream.shape
    lanes = triton.next_power_of_2(columns)
    warps = min(16, max(1, lanes // 256))
    add_norm_kernel[(rows,)](
        stream, added, weight, out, columns, eps, LANES=lanes, num_warps=warps
    )  # fmt: skip
    return out


def rotary_write(
    qkv: torch.Tensor,
    rotation: torch.Tensor,
    places: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    norms: tuple[torch.Tensor, torch.Tensor] | None = None,
    eps: float = 0.0,
) -> torch.Tensor:
    """Rotated queries [B, H, Dh]; the rotated keys, and the values, are written into the cache.

    qkv [B, (H + 2 Hkv) * Dh]: what the product gave, queries, keys and values one after the other.
    rotation [B, rope_dim / 2, 2]: cos and sin of the angle of each pair; rope_dim may be below Dh.
    keys, values [N, Hkv, Dh], contiguous: the cache; row b's go to places[b] (int64).
    norms: weights [Dh] of an RMSNorm on each head's query and key, before the rotation (Qwen3).
    """
    _, kv_heads, head_dim = keys.shape
    rows = len(qkv)
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    if not use_triton(qkv):
        split = qkv.view(rows, -1, head_dim).split([heads, kv_heads, kv_heads], 1)
        q, k, v = [part.to(wide(part.dtype)) for part in split]
        if norms:
            q = F.rms_norm(q, (head_dim,), norms[0].to(q.dtype), eps)
            k = F.rms_norm(k, (head_dim,), norms[1].to(k.dtype), eps)
        keys[places] = turn(k, rotation).to(keys.dtype)
        values[places] = v.to(values.dtype)
        return turn(q, rotation).to(qkv.dtype)
    qkv = qkv.contiguous()
    out = qkv.new_empty(rows, heads, head_dim)
    q_weight, k_weight = norms or (qkv, qkv)  # without norms nothing is read from there
    rotary_write_kernel[(rows, heads + 2 * kv_heads)](
        qkv, rotation, places, q_weight, k_weight, out, keys, values,
        heads, kv_heads, head_dim, 2 * rotation.shape[1], eps,
        NORM=norms is not None, LANES=triton.next_power_of_2(head_dim), num_warps=1,
    )  # fmt: skip
    return out


def turn(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """x [B, heads, Dh] with its first pairs turned by rotation [B, rope_dim / 2, 2]."""
    rope_dim = 2 * rotation.shape[1]
    x0, x1 = x[..., :rope_dim].unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotation[:, None].unbind(-1)
    turned = torch.stack([x0 * cos - x1 * sin, x1 * cos + x0 * sin], -1).flatten(-2)
    return torch.cat([turned, x[..., rope_dim:]], -1)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up [B, M], for gate_up [B, 2 M]: the gates of a row, then its ups."""
    if not use_triton(gate_up):
        gate, up = gate_up.to(wide(gate_up.dtype)).chunk(2, -1)
        return (F.silu(gate) * up).to(gate_up.dtype)
    gate_up = gate_up.contiguous()
    rows, columns = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, columns)
    block = min(1024, triton.next_power_of_2(columns))
    silu_mul_kernel[(rows, triton.cdiv(columns, block))](
        gate_up, out, columns, BLOCK=block, num_warps=max(1, block // 256)
    )  # fmt: skip
    return out


@jit
def add_norm_kernel(
    stream, added, weight, out, columns, eps, LANES: constexpr
):  # one program per row  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    here = lane < columns
    x = tl.load(stream + row * columns + lane, here, 0.0)
    x += tl.load(added + row * columns + lane, here, 0.0).to(tl.float32)
    tl.store(stream + row * columns + lane, x, here)
    scale = tl.rsqrt(tl.sum(x * x, 0) / columns + eps)
    y = x * scale * tl.load(weight + lane, here, 0.0).to(tl.float32)
    tl.store(out + row * columns + lane, y.to(out.dtype.element_ty), here)


@jit
def rotary_write_kernel(
    qkv, rotation, places, q_weight, k_weight, out, keys, values,
    heads, kv_heads, head_dim, rope_dim, eps,
    NORM: constexpr, LANES: constexpr,
):  # one program per row and head  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # int64: a cache may have more than 2^31 numbers
    head = tl.program_id(1)
    place = tl.load(places + row)
    lane = tl.arange(0, LANES)
    here = lane < head_dim
    partner = lane ^ 1
    source = qkv + (row * (heads + 2 * kv_heads) + head) * head_dim
    if head >= heads + kv_heads:
        kv_head = head - heads - kv_heads
        value = tl.load(source + lane, here, 0.0)
        tl.store(values + (place * kv_heads + kv_head) * head_dim + lane, value, here)
        return

    target = keys + (place * kv_heads + head - heads) * head_dim
    weight = k_weight
    if head < heads:
        target = out + (row * heads + head) * head_dim
        weight = q_weight
    x = tl.load(source + lane, here, 0.0).to(tl.float32)
    y = tl.load(source + partner, here, 0.0).to(tl.float32)
    if NORM:
        scale = tl.rsqrt(tl.sum(x * x, 0) / head_dim + eps)
        x *= scale * tl.load(weight + lane, here, 0.0).to(tl.float32)
        y *= scale * tl.load(weight + partner, here, 0.0).to(tl.float32)
    rotated = lane < rope_dim
    angle = rotation + row * rope_dim + lane - lane % 2  # of this lane's pair: cos, then sin
    cos = tl.load(angle, rotated, 1.0)
    sin = tl.load(angle + 1, rotated, 0.0)
    x = x * cos + y * tl.where(lane % 2 == 0, -sin, sin)
    tl.store(target + lane, x.to(out.dtype.element_ty), here)


@jit
def silu_mul_kernel(gate_up, out, columns, BLOCK: constexpr):  # one program per row and BLOCK
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = column < columns
    gate = tl.load(gate_up + 2 * row * columns + column, here, 0.0).to(tl.float32)
    up = tl.load(gate_up + (2 * row + 1) * columns + column, here, 0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    tl.store(out + row * columns + column, y.to(out.dtype.element_ty), here)
