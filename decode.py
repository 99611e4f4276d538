"""What a decode step computes: the logits of one more token for each sequence of a batch.

    decoder = make_decoder(model, pack=True)       # the one for its device and dtype
    cache = KVCache(decoder)                       # keys and values of the tokens before
    cache.restart(limit=2048, budget=16_384)       # positions: of a row, and of all
    cache.lay_out(rows=8, capacity=112, keep=0)    # [8, Hkv, 112, Dh] in every layer
    decoder.bind(cache.view(rows=8, length=64))    # again when these or the cache's layout change
    logits = decoder(tokens, positions)            # [B], [B] -> [B, V]

A step also writes the key and value of its token into the cache, at `positions`.

`ModelDecoder` is the model itself: any device, any dtype. It does much that one token does not
need. The two others compute the same for less; each equals the model in every family, up to
rounding (tests/test_decode.py).

`GPUDecoder` is for bf16 on CUDA. A step cannot be shorter than the time to read the weights and
the cached keys and values. The model starts many small kernels besides, and reads every row up to
the end of the longest. Here three kernels do the small work (kernels/decoding.py), and attention
reads what each row has, and no more. No shape depends on how long the rows are: a CUDA graph of the
step serves as long as the cache stays where it is.

`CPUDecoder` is for fp32 on a CPU, which has no graphs. With one sequence the small operations were
a third of a token's time. With 64, a quarter of the time went into laying all weights out anew, for
every step's products. It computes with less work: its weights are laid out once (MKL's packed
matrices), it takes half as many operations, in place where it can, and keys are stored in the order
in which their product with the queries reads them.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import add_norm, rotary_write, silu_mul
from kernels.jit import wide
from model import Block, RMSNorm, Transformer, can_use_varlen, rotations
from tensor_parallel import SummedLinear

Cache = list[tuple[Tensor, Tensor]]  # keys and values of every layer
# Rows that a packed layout is made for. Measured: it serves 1 to 256 rows well, and with more it is
# no worse than no packing.
PACK_ROWS = 128


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def cache_block(device: torch.device) -> int:
    """Cached positions are held in multiples of this, and on a CPU attended to.

    On CUDA the blocks are large, so that there are few sizes of rows: each has its own graphs.
    """
    return 256 if device.type == "cuda" else 16


class KVCache:
    """The keys and values of all layers: some rows, of `capacity` positions each.

    layers[i] is (keys, values), [rows, Hkv, capacity, Dh] each. The memory of each is one piece,
    which can be cut into many short rows or into few long ones:

        24 positions, capacity 4:  | row 0 | row 1 | row 2 | row 3 | row 4 | row 5 |
                      capacity 8:  | row 0         | row 1         | row 2         |

    `lay_out` cuts it anew where it lies, and moves only if there is too little of it. So a cache
    takes no more than it once needed; and on CUDA, where a graph is tied to addresses, graphs stay
    valid as rows grow.

    `restart` must come before anything else.
    """

    def __init__(self, decoder: "ModelDecoder | GPUDecoder | CPUDecoder") -> None:
        self.allocate = decoder.allocate
        self.layers: Cache = [decoder.allocate(0, 0)] * decoder.config.layers
        self.block = cache_block(self.layers[0][0].device)
        self.positions = 0  # that the memory of a layer has room for

    def restart(self, limit: int, budget: int) -> None:
        """Forget all rows; the memory stays.

        limit: positions that a row needs at most. budget: positions of all rows together, at most;
        one row of `limit` (rounded up to a block) must fit.
        """
        self.budget = budget
        self.capacity = 0
        self.sizes = row_sizes(limit, self.block)

    @property
    def nbytes(self) -> int:
        """What all keys and values take."""
        return sum(tensor.untyped_storage().nbytes() for pair in self.layers for tensor in pair)

    def size(self, length: int) -> int:
        """The size of rows that hold `length` positions, or `limit` if that is less."""
        place = bisect_left(self.sizes, length)
        return self.sizes[min(place, len(self.sizes) - 1)]

    def most_rows(self, length: int) -> int:
        """How many rows of `length` positions (`limit` if that is less) fit the budget."""
        return self.budget // self.size(length)

    def capacity_for(self, rows: int, length: int) -> int:
        """What the capacity should be for `rows` rows of `length` positions, which must fit.

        The present one, if they fit as they are. If they have to grow, the next power of two (of
        blocks), if the budget allows: so, over a whole generation, the copies cost only a few
        writes per position, and whatever the prompts are, the capacities are the same.
        """
        capacity = self.capacity
        if length > capacity:
            blocks = -(-length // self.block)
            capacity = self.size(self.block << (blocks - 1).bit_length())
        if rows * capacity > self.budget:
            most = bisect_right(self.sizes, self.budget // rows) - 1
            capacity = self.sizes[most]
        return capacity

    def holds(self, rows: int, capacity: int) -> bool:
        """Whether the memory can be cut into `rows` rows of `capacity` positions."""
        return rows * capacity <= self.positions

    def lay_out(self, rows: int, capacity: int, keep: int) -> None:
        """Cut the memory into rows of `capacity` positions, `rows` of them or more.

        The first `keep` rows are kept, as far as they fit. One layer after the other: if they move,
        there is never more than one layer of memory in use twice.
        """
        moves = not self.holds(rows, capacity)
        if moves:
            self.positions = rows * capacity
        for layer in range(len(self.layers)):
            if moves:
                self.layers[layer] = self.moved(layer, rows, capacity, keep)
            else:
                self.layers[layer] = self.cut(layer, capacity, keep)
        self.capacity = capacity

    def moved(self, layer: int, rows: int, capacity: int, keep: int) -> tuple[Tensor, Tensor]:
        """One layer in new tensors.

        This is a function so that no name refers to the old tensors after it: they are freed before
        the next layer moves.
        """
        pair = self.allocate(rows, capacity)
        for new, old in zip(pair, self.layers[layer]):
            length = min(capacity, old.shape[2])
            new[:keep, :, :length] = old[:keep, :, :length]
        return pair

    def cut(self, layer: int, capacity: int, keep: int) -> tuple[Tensor, Tensor]:
        """One layer in the same memory."""
        pair = []
        for old in self.layers[layer]:
            length = min(capacity, old.shape[2])
            kept = old[:keep, :, :length].clone()
            new = as_rows(old, self.positions // capacity, capacity)
            new[:keep, :, :length] = kept
            pair.append(new)
        return tuple(pair)

    def view(self, rows: int, length: int) -> Cache:
        """The first `rows` rows and `length` positions, for `bind`."""
        part = (slice(rows), slice(None), slice(length))
        return [(keys[part], values[part]) for keys, values in self.layers]

    def write(self, rows: slice, prompt: Cache) -> None:
        """Copy the keys and values [Hkv, L, Dh] of a prompt into the first L positions of rows."""
        for layer, (keys, values) in enumerate(prompt):
            self.write_layer(rows, layer, keys, values)

    def write_layer(self, rows: slice, layer: int, keys: Tensor, values: Tensor) -> None:
        """The same for one layer. [rows, Hkv, L, Dh]: each row gets its own."""
        length = keys.shape[-2]
        for tensor, new in zip(self.layers[layer], (keys, values)):
            tensor[rows, :, :length] = new

    def move_rows(self, sources: Tensor, targets: Tensor, length: int) -> None:
        """Copy the first `length` positions of some rows over those of others."""
        for pair in self.layers:
            for tensor in pair:
                tensor[targets, :, :length] = tensor[sources, :, :length]


def row_sizes(limit: int, block: int) -> list[int]:
    """The capacities that a cache's rows may have, up to `limit` (rounded up to a block).

    Few, because on CUDA each makes graphs of its own; and close, so that little is left empty: one
    is at most a block, or a quarter, more than the one before.
    """
    sizes = []
    size = block
    while size < limit:
        sizes.append(size)
        power = 2 ** (size.bit_length() - 1)
        size += max(block, power // 4)
    return [*sizes, round_up(limit, block)]


def as_rows(tensor: Tensor, rows: int, capacity: int) -> Tensor:
    """The memory of keys or values as [rows, Hkv, capacity, Dh].

    Decoders differ in the order in which the dimensions lie in memory. It stays as it is.
    """
    shape = (rows, tensor.shape[1], capacity, tensor.shape[3])
    stride = [0] * 4
    step = 1
    for dimension in sorted(range(4), key=tensor.stride):
        stride[dimension] = step
        step *= shape[dimension]
    return tensor.as_strided(shape, stride)


def make_decoder(model: Transformer, pack: bool) -> "ModelDecoder | GPUDecoder | CPUDecoder":
    """The fastest decoder of `model` where it is, in its dtype. pack: see CPUDecoder."""
    weight = model.head_weight
    if weight.device.type == "cpu" and weight.dtype == torch.float32:
        return CPUDecoder(model, pack)
    if can_use_varlen(model.config, weight.dtype, weight.device):
        return GPUDecoder(model)
    return ModelDecoder(model)


class ModelDecoder:
    """The decode step of `model` itself."""

    def __init__(self, model: Transformer) -> None:
        self.model = model
        self.config = model.config
        self.cache: Cache = []

    def allocate(self, rows: int, capacity: int) -> tuple[Tensor, Tensor]:
        """Empty keys and values [rows, Hkv, capacity, Dh] of a layer.

        They are zeros: a masked position still enters the product 0 * value, and 0 * NaN is NaN.
        """
        shape = (rows, self.config.kv_heads, capacity, self.config.head_dim)
        return self.model.head_weight.new_zeros(shape), self.model.head_weight.new_zeros(shape)

    def bind(self, cache: Cache) -> None:
        """Use these keys and values from now on, and forget the former ones."""
        self.cache = cache

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """tokens [B] at positions [B] -> logits [B, V] of the tokens that follow them."""
        keys = self.cache[0][0]
        row = torch.arange(len(tokens), device=keys.device)
        bias = causal_bias(positions, keys)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.cache[layer]
            keys[row, :, positions] = k[:, :, 0]
            values[row, :, positions] = v[:, :, 0]
            # The query heads that share a key head stand as query positions of that head: so no key
            # is repeated.
            grouped = q.reshape(len(q), keys.shape[1], -1, q.shape[-1])
            mask = bias[:, None, None]
            mixed = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask)
            return mixed.reshape(q.shape)

        hidden = self.model(tokens[:, None], positions=positions[:, None], attend=attend)
        return self.model.logits(hidden[:, 0])


def causal_bias(positions: Tensor, keys: Tensor) -> Tensor:
    """[B, L]: 0 where a cached position is to be seen, -inf beyond `positions` [B]."""
    beyond = torch.arange(keys.shape[2], device=keys.device) > positions[:, None]
    return torch.zeros_like(beyond, dtype=keys.dtype).masked_fill_(beyond, -torch.inf)


class GPUStep(NamedTuple):
    """What the layers of one decode step have in common.

    It is made in the step: so a CUDA graph owns it, and nobody can free what the graph reads.
    """

    rotation: Tensor  # [B, rope_dim / 2, 2]: cos and sin
    places: Tensor  # [B]: of this token's keys in a layer's flat ones
    query_starts: Tensor  # [B + 1] int32: query b is row b's only one
    key_starts: Tensor  # [B + 1] int32: the keys of row b begin at b * capacity...
    key_counts: Tensor  # [B] int32: ...and are position + 1


class GPUDecoder:
    """The same as ModelDecoder, for bf16 on CUDA. (Tests give it float64 and another attention.)

    It writes in place, so it runs under no_grad or inference_mode only. Nothing in a step waits for
    the device. What is launched depends on the number of rows and on the cache that is bound, and
    not on positions. It reads the model's own weights, so changes in place are seen at once.
    """

    def __init__(self, model: Transformer) -> None:
        self.model = model
        self.config = model.config
        self.capacity = 0  # positions from one row's keys to the next row's
        self.cache: Cache = []  # flat: [rows * capacity, Hkv, Dh]

    def allocate(self, rows: int, capacity: int) -> tuple[Tensor, Tensor]:
        """The same; in memory, keys and values lie as [rows, capacity, Hkv, Dh].

        Nothing is written there: no position beyond a row's own is read, so it may hold NaN.
        """
        shape = (rows, capacity, self.config.kv_heads, self.config.head_dim)
        keys = self.model.head_weight.new_empty(shape)
        values = self.model.head_weight.new_empty(shape)
        return keys.transpose(1, 2), values.transpose(1, 2)

    def bind(self, cache: Cache) -> None:
        """Use these keys and values from now on, and forget the former ones.

        A step may have fewer rows than are bound.
        """
        self.cache = [(flat(keys), flat(values)) for keys, values in cache]
        if cache:
            self.capacity = row_capacity(cache[0][0])

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """tokens [B] at positions [B] -> logits [B, V] of the tokens that follow them."""
        model = self.model
        eps = self.config.norm_eps
        step = self.shared(positions)
        # The embeddings are added to an empty stream, so that every norm follows an addition.
        added = model.embed(tokens)
        stream = torch.zeros_like(added, dtype=wide(added.dtype))
        for block, cache in zip(model.blocks, self.cache):
            x = add_norm(stream, added, block.attention_norm.weight, eps)
            added = self.attention(block, x, step, cache)
            x = add_norm(stream, added, block.mlp_norm.weight, eps)
            added = block.post_mlp_norm(block.down(silu_mul(block.gate_up(x))))
        return model.logits(add_norm(stream, added, model.norm.weight, eps))

    def shared(self, positions: Tensor) -> GPUStep:
        """What all layers of a step need, made once."""
        rows = len(positions)
        capacity = self.capacity
        integers = {"dtype": torch.int32, "device": positions.device}
        rotation = rotations(self.config, positions[:, None])[:, 0, 0]
        key_starts = torch.arange(0, (rows + 1) * capacity, capacity, **integers)
        return GPUStep(
            rotation=torch.view_as_real(rotation),
            places=key_starts[:-1] + positions,
            query_starts=torch.arange(rows + 1, **integers),
            key_starts=key_starts,
            key_counts=positions.int() + 1,
        )

    def attention(
        self, block: Block, x: Tensor, step: GPUStep, cache: tuple[Tensor, Tensor]
    ) -> Tensor:
        """What attention adds to the stream, for its normalised copy x [B, D]."""
        # Imported here: it brings torch's compiler, which would make every command start later.
        from torch.nn.attention.varlen import varlen_attn

        keys, values = cache
        norms = None
        if self.config.qk_norm:
            norms = (block.q_norm.weight, block.k_norm.weight)
        qkv = block.qkv(x)
        q = rotary_write(qkv, step.rotation, step.places, keys, values, norms, self.config.norm_eps)
        # How the work is split over the chip depends on the greatest lengths, which must be known
        # here: one query, and as many keys as a row can hold. (`block_table` is not for us: pages
        # that are split give wrong results in torch 2.13, pytorch#194167.)
        mixed = varlen_attn(
            q,
            keys,
            values,
            step.query_starts,
            step.key_starts,
            max_q=1,
            max_k=self.capacity,
            enable_gqa=True,
            seqused_k=step.key_counts,
        )
        return block.post_attention_norm(block.out(mixed.flatten(1)))


def row_capacity(cached: Tensor) -> int:
    """Positions that lie between two rows of keys or values [rows, Hkv, L, Dh] in memory.

    They may be more than the L of this view.
    """
    return cached.stride(0) // cached.stride(2)


def flat(cached: Tensor) -> Tensor:
    """[rows * capacity, Hkv, Dh]: the memory of keys or values [rows, Hkv, L, Dh]."""
    rows, kv_heads, _, head_dim = cached.shape
    places = rows * row_capacity(cached)
    return cached.as_strided((places, kv_heads, head_dim), (kv_heads * head_dim, head_dim, 1))


class Step(NamedTuple):
    """What the blocks of one decode step have in common."""

    rotation: Tensor  # [B, 1, rope_dim / 2]
    place: tuple  # the index of this token's keys [B, Hkv, Dh] in the cache
    bias: Tensor  # [B * Hkv, 1, L], of `causal_bias`


class LayerCache(NamedTuple):
    """One layer of a bound cache, in the two shapes in which it is used; both are views of it."""

    keys: Tensor  # [B, Hkv, L, Dh], to write to
    values: Tensor
    flat_keys: Tensor  # [B * Hkv, Dh, L], for a batched product, which wants one batch dimension
    flat_values: Tensor  # [B * Hkv, L, Dh]


class CPUDecoder:
    """The same as ModelDecoder, on a CPU, in fp32 (or float64, for tests).

    It writes in place, so it runs under no_grad or inference_mode only.

    pack: lay the weights out, where `can_pack`, for products with several rows. That takes memory
    for another copy of the weights, and the time of about two steps.

    A decoder holds copies of some weights (the packed ones, the norms') and refers to others. After
    the model's weights have changed it would mix old and new ones: make a new decoder.
    """

    def __init__(self, model: Transformer, pack: bool) -> None:
        self.config = model.config
        self.embedding = model.embed.weight
        self.blocks = [CPUBlock(block, pack) for block in model.blocks]
        self.norm = rms_norm(model.norm)
        self.head = product(model.head_weight, None, pack)
        self.cache: list[LayerCache] = []

    def allocate(self, rows: int, capacity: int) -> tuple[Tensor, Tensor]:
        """The same; in memory, keys lie as [rows, Hkv, Dh, capacity]."""
        kv_heads = self.config.kv_heads
        head_dim = self.config.head_dim
        keys = self.embedding.new_zeros(rows, kv_heads, head_dim, capacity).mT
        values = self.embedding.new_zeros(rows, kv_heads, capacity, head_dim)
        return keys, values

    def bind(self, cache: Cache) -> None:
        """Use these keys and values from now on, and forget the former ones."""
        # The flat views are made here, once, and not in every step.
        self.cache = []
        for keys, values in cache:
            flat = (-1, *keys.shape[2:])
            self.cache.append(LayerCache(keys, values, keys.view(flat).mT, values.view(flat)))

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """tokens [B] at positions [B] -> logits [B, V] of the tokens that follow them."""
        keys = self.cache[0].keys
        _, kv_heads, length, _ = keys.shape
        bias = causal_bias(positions, keys)[:, None].expand(-1, kv_heads, -1)
        step = Step(
            rotation=rotations(self.config, positions[:, None])[:, 0],
            place=(torch.arange(len(tokens)), slice(None), positions),
            bias=bias.reshape(-1, 1, length),
        )
        x = F.embedding(tokens, self.embedding)
        for block, cache in zip(self.blocks, self.cache):
            block(x, step, cache)
        return self.head(self.norm(x))


class CPUBlock:
    """`model.Block` for one token of each row: adds to the residual stream x [B, D], in place."""

    def __init__(self, block: Block, pack: bool) -> None:
        config = block.config
        self.heads = config.heads
        self.kv_heads = config.kv_heads
        self.head_dim = config.head_dim
        self.rope_dim = config.rope_dim or config.head_dim

        self.attention_norm = rms_norm(block.attention_norm)
        self.qkv = linear(block.qkv, pack)
        self.q_norm = rms_norm(block.q_norm)
        self.k_norm = rms_norm(block.k_norm)
        self.out = linear(block.out, pack)
        self.mlp_norm = rms_norm(block.mlp_norm)
        self.gate_up = linear(block.gate_up, pack)
        self.down = linear(block.down, pack)
        self.post_attention_norm = None
        self.post_mlp_norm = None
        if config.post_norms:
            self.post_attention_norm = rms_norm(block.post_attention_norm)
            self.post_mlp_norm = rms_norm(block.post_mlp_norm)

    def __call__(self, x: Tensor, step: Step, cache: LayerCache) -> None:
        added = self.out(self.attention(self.attention_norm(x), step, cache))
        if self.post_attention_norm:
            added = self.post_attention_norm(added)
        x += added

        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, -1)
        added = self.down(F.silu(gate).mul_(up))
        if self.post_mlp_norm:
            added = self.post_mlp_norm(added)
        x += added

    def attention(self, x: Tensor, step: Step, cache: LayerCache) -> Tensor:
        """[B, H * Dh]: the mixed values, for the normalised stream x [B, D]."""
        rows = len(x)
        turned = self.heads + self.kv_heads  # q and k are rotated, v is not
        qkv = self.qkv(x).view(rows, turned + self.kv_heads, self.head_dim)
        q, k, v = qkv.split_with_sizes([self.heads, self.kv_heads, self.kv_heads], 1)
        if self.q_norm:
            q.copy_(self.q_norm(q))
            k.copy_(self.k_norm(k))
        # q and k are views of qkv: the rotation turns them where they are.
        pairs = qkv[:, :turned, : self.rope_dim].view(rows, turned, -1, 2)
        torch.view_as_complex(pairs).mul_(step.rotation)
        cache.keys[step.place] = k
        cache.values[step.place] = v

        # The query heads that share a key head are rows of one product with its keys.
        q = q.reshape(rows * self.kv_heads, -1, self.head_dim)
        scores = torch.baddbmm(step.bias, q, cache.flat_keys, alpha=self.head_dim**-0.5)
        return torch.bmm(scores.softmax(-1), cache.flat_values).view(rows, -1)


def rms_norm(norm: RMSNorm | None) -> Callable[[Tensor], Tensor] | None:
    """x / sqrt(mean(x^2) + eps) * weight in four operations, where F.rms_norm takes six.

    For D numbers the root is hypot(|x|, sqrt(D eps)) / sqrt(D), with hypot(a, b) = sqrt(a^2 + b^2).
    """
    if norm is None:
        return None
    dim = len(norm.weight)
    weight = norm.weight.detach() * dim**0.5
    floor = norm.weight.new_tensor((dim * norm.eps) ** 0.5)

    def apply(x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x.div(torch.hypot(length, floor)).mul_(weight)

    return apply


def can_pack(weight: Tensor) -> bool:
    """Whether MKL can lay out this matrix: fp32 on the CPU of a build that has it (x86)."""
    fp32_on_cpu = weight.device.type == "cpu" and weight.dtype == torch.float32
    return (
        fp32_on_cpu and torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    )


def linear(layer: nn.Linear, pack: bool) -> Callable[[Tensor], Tensor]:
    """`layer` as a function, by `product`; one that is cut over ranks with its sum over them."""
    if isinstance(layer, SummedLinear):
        columns = product(layer.weight, None, pack)
        return lambda x: layer.complete(columns(x))
    return product(layer.weight, layer.bias, pack)


def product(weight: Tensor, bias: Tensor | None, pack: bool) -> Callable[[Tensor], Tensor]:
    """The function x [B, in] -> x @ weight.T + bias [B, out]."""
    if not (pack and can_pack(weight)):
        # Transposed here, once. F.linear does it in every call: 1.5 % of one row's step.
        transposed = weight.detach().T
        if bias is None:
            return partial(torch.mm, mat2=transposed)
        return partial(torch.addmm, bias, mat2=transposed)

    packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, PACK_ROWS)
    linear = torch.ops.mkl._mkl_linear.default
    # The last argument says for how many rows the layout was made. If it were not the number of
    # rows of x, the operation would take the plain product. So we say len(x), which is not true,
    # but MKL's layout serves any number of rows (tests/test_decode.py tries them).
    return lambda x: linear(x, packed, weight, bias, len(x))
