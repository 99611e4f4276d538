"""What a decode step computes: logits for one more token of each sequence, from keys and values that are cached.

    decoder = ModelDecoder(model)                       # or CPUDecoder(model, pack=True): `sample.Batch` chooses
    cache = [decoder.allocate(rows, capacity) for each layer]   # (keys, values) [rows, Hkv, capacity, Dh]
    decoder.bind([views of the cache, [B, Hkv, L, Dh]]) # whenever B or L changes, or the cache has moved
    logits = decoder(tokens, positions)                 # [B], [B] -> [B, V]; key and value are written at `positions`

`ModelDecoder` is the model itself: any device, any dtype. On CUDA the sampler captures it as a graph, which is to make
its many small operations cheap (not yet measured on a GPU).

A CPU has no graphs. With one sequence those small operations were a third of a token's time; with 64, a quarter of it
went to laying all weights out anew for every step's products. `CPUDecoder` does the same sums with less: weights that
are laid out once (MKL's packed matrices), half as many operations, in place where it can, keys stored as the product
with the queries reads them. It is equal to the model in every family up to rounding (tests/test_decode.py).
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from model import Block, RMSNorm, Transformer, rotations

Cache = list[tuple[Tensor, Tensor]]
PACK_ROWS = 128  # rows that a packed layout is made for; measured, it serves 1 to 256 well, and more no worse than none


class ModelDecoder:
    """The decode step of `model` itself."""

    def __init__(self, model: Transformer) -> None:
        self.model, self.cache = model, []

    def allocate(self, rows: int, capacity: int) -> tuple[Tensor, Tensor]:
        """Empty keys and values [rows, Hkv, capacity, Dh] of a layer.

        Zeros, because a masked position still enters the product 0 * value, and 0 * NaN is NaN.
        """
        shape = rows, self.model.config.kv_heads, capacity, self.model.config.head_dim
        return self.model.head_weight.new_zeros(shape), self.model.head_weight.new_zeros(shape)

    def bind(self, cache: Cache) -> None:
        """Use these keys and values from now on, and let go of the former."""
        self.cache = cache

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        keys = self.cache[0][0]
        row, bias = torch.arange(len(tokens), device=keys.device), causal_bias(positions, keys)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.cache[layer]
            keys[row, :, positions], values[row, :, positions] = k[:, :, 0], v[:, :, 0]
            # The query heads that share a key head stand as query positions of that head: nothing is repeated.
            grouped = q.reshape(len(q), keys.shape[1], -1, q.shape[-1])
            return F.scaled_dot_product_attention(grouped, keys, values, attn_mask=bias[:, None, None]).reshape(q.shape)

        hidden = self.model(tokens[:, None], positions=positions[:, None], attend=attend)
        return self.model.logits(hidden[:, 0])


def causal_bias(positions: Tensor, keys: Tensor) -> Tensor:
    """[B, L]: 0 where a cached position is to be seen, -inf beyond `positions` [B]."""
    beyond = torch.arange(keys.shape[2], device=keys.device) > positions[:, None]
    return torch.zeros_like(beyond, dtype=keys.dtype).masked_fill_(beyond, -torch.inf)


class CPUDecoder:
    """The same, on a CPU in fp32 (or float64, for tests). It writes in place: under no_grad or inference_mode only.

    pack: lay the weights out, where `can_pack`, for products with several rows. It takes memory for another copy of the
    weights, and the time of about two steps. Of weights that are updated some would be seen here and some not: make a
    new decoder.
    """

    def __init__(self, model: Transformer, pack: bool) -> None:
        self.config, self.embedding = model.config, model.embed.weight
        self.blocks = [CPUBlock(block, pack) for block in model.blocks]
        self.norm, self.head = rms_norm(model.norm), product(model.head_weight, None, pack)
        self.cache = []

    def allocate(self, rows: int, capacity: int) -> tuple[Tensor, Tensor]:
        """The same; in memory keys lie as [rows, Hkv, Dh, capacity], which is how their product with q reads them."""
        kv_heads, head_dim, new_zeros = self.config.kv_heads, self.config.head_dim, self.embedding.new_zeros
        return new_zeros(rows, kv_heads, head_dim, capacity).mT, new_zeros(rows, kv_heads, capacity, head_dim)

    def bind(self, cache: Cache) -> None:
        """Use these keys and values from now on, and let go of the former."""
        # With rows and heads as one dimension, which a batched product needs: keys [B * Hkv, Dh, L], values
        # [B * Hkv, L, Dh]. Views of the same memory, made here and not in every step.
        flat = (-1, *cache[0][0].shape[2:]) if cache else ()
        self.cache = [(keys, values, keys.view(flat).mT, values.view(flat)) for keys, values in cache]

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        keys = self.cache[0][0]
        place = torch.arange(len(tokens)), slice(None), positions
        bias = causal_bias(positions, keys)[:, None].expand(-1, self.config.kv_heads, -1).reshape(-1, 1, keys.shape[2])
        rotation = rotations(self.config, positions[:, None])[:, 0]
        x = F.embedding(tokens, self.embedding)
        for block, cached in zip(self.blocks, self.cache):
            block(x, rotation, place, bias, *cached)
        return self.head(self.norm(x))


class CPUBlock:
    """`model.Block` for one token of each row: adds to the residual stream x [B, D], where it is."""

    def __init__(self, block: Block, pack: bool) -> None:
        config = block.config
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        self.rope_dim = config.rope_dim or config.head_dim
        norms = block.attention_norm, block.mlp_norm, block.q_norm, block.k_norm
        self.attention_norm, self.mlp_norm, self.q_norm, self.k_norm = map(rms_norm, norms)
        post_norms = block.post_attention_norm, block.post_mlp_norm
        self.post_attention_norm, self.post_mlp_norm = map(rms_norm, post_norms if config.post_norms else (None, None))
        linears = block.qkv, block.out, block.gate_up, block.down
        self.qkv, self.out, self.gate_up, self.down = (product(linear.weight, linear.bias, pack) for linear in linears)

    def __call__(
        self, x: Tensor, rotation: Tensor, place: tuple, bias: Tensor, keys: Tensor, values: Tensor, keys_t: Tensor,
        flat_values: Tensor,
    ) -> None:  # fmt: skip
        """rotation [B, 1, rope_dim / 2]; place of this token's key; bias [B * Hkv, 1, L]; then what `bind` made."""
        rows, heads, kv_heads, head_dim = len(x), self.heads, self.kv_heads, self.head_dim
        qkv = self.qkv(self.attention_norm(x)).view(rows, heads + 2 * kv_heads, head_dim)
        q, k, v = qkv.split_with_sizes([heads, kv_heads, kv_heads], 1)
        if self.q_norm:
            q.copy_(self.q_norm(q)), k.copy_(self.k_norm(k))
        pairs = qkv[:, : heads + kv_heads, : self.rope_dim]
        torch.view_as_complex(pairs.view(rows, heads + kv_heads, -1, 2)).mul_(rotation)  # turns q and k where they are
        keys[place], values[place] = k, v
        scores = torch.baddbmm(bias, q.reshape(rows * kv_heads, -1, head_dim), keys_t, alpha=head_dim**-0.5)
        mixed = self.out(torch.bmm(scores.softmax(-1), flat_values).view(rows, -1))
        x += self.post_attention_norm(mixed) if self.post_attention_norm else mixed

        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, -1)
        added = self.down(F.silu(gate).mul_(up))
        x += self.post_mlp_norm(added) if self.post_mlp_norm else added


def rms_norm(norm: RMSNorm | None) -> Callable[[Tensor], Tensor] | None:
    """x / sqrt(mean(x^2) + eps) * weight in four operations, where F.rms_norm takes six.

    With D entries the root is hypot(|x|, sqrt(D eps)) / sqrt(D).
    """
    if norm is None:
        return None
    dim = len(norm.weight)
    weight, floor = norm.weight.detach() * dim**0.5, norm.weight.new_tensor((dim * norm.eps) ** 0.5)

    def apply(x: Tensor) -> Tensor:
        return x.div(torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), floor)).mul_(weight)

    return apply


def can_pack(weight: Tensor) -> bool:
    """Whether MKL can lay out this matrix: fp32 on the CPU of a build that has it (x86)."""
    on_cpu = weight.device.type == "cpu" and weight.dtype == torch.float32
    return on_cpu and torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()


def product(weight: Tensor, bias: Tensor | None, pack: bool) -> Callable[[Tensor], Tensor]:
    """x [B, in] -> x @ weight.T + bias [B, out]."""
    if not (pack and can_pack(weight)):
        transposed = weight.detach().T  # here and not, as F.linear does it, in every call: 1.5 % of one row's step
        return partial(torch.mm, mat2=transposed) if bias is None else partial(torch.addmm, bias, mat2=transposed)
    packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, PACK_ROWS)
    linear = torch.ops.mkl._mkl_linear.default
    # The last argument says how many rows the layout is for, and were it not the number that x has, the plain product
    # would be taken. MKL's layout serves any number of rows (tests/test_decode.py tries them).
    return lambda x: linear(x, packed, weight, bias, len(x))
