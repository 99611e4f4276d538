"""The sampler's model cut over several ranks, for a policy whose copy one GPU cannot hold.

    torchrun --standalone --nproc_per_node=8 rl.py ... --sampler-ranks 4      # two teams of four

    model = SlicedTransformer(config, ranks, dtype, device)   # this rank's slices, no values yet
    parallel.copy_weights(scorer, model)                      # their values, from the policy
    Sampler(model, tokenizer).generate(...)                   # all ranks of a team, in lockstep

In training no rank holds the whole model (FSDP2). To sample, each needs all of it for every token:
65.5 GB in bf16 for 32B. So a team of T ranks, neighbours and best on one node, shares one copy
(Megatron-LM, arXiv 1909.08053). Each holds 1/T of every block's matrices, and of the keys and
values.

One block on two ranks, for B rows of a batch:

                  rank 0                          rank 1
    x [B, D]      the whole stream                the same
    qkv           the rows of its heads, of q,    the rows of the other heads
                  of k and of v
    attention     its heads, and a cache of       the other heads, and a cache of
                  their keys and values           theirs
    out           the columns of its heads        the other columns
                  a part of y [B, D]    -----> all-reduce: the sum <-----    the other part
    x + y         the whole stream                the same
    gate_up       half of gate, half of up        the other rows
    down          the same half, as columns       the other columns
                  a part of y [B, D]    -----> all-reduce: the sum <-----    the other part

What a head gives is read by its own columns of `out`, and a number inside the MLP by one column of
`down`. A rank holds both ends, so that only the two sums need the others.

Why the samples are one rank's: an all-reduce gives the same bits to every rank, and what is not cut
(embedding, norms, head) is the same everywhere. So are the logits, then, and a draw is a function
of a counter and the logits (sample.py). All ranks of a team draw the same tokens, and end and
start the same sequences at the same step. A rank alone adds up in another order: that moves an fp32
logit by some 1e-6, as another batch would.

What it costs: embedding and head are whole on every rank, 3.1 GB for 32B in bf16 beside 62.4 / T
for its blocks. To cut the head would mean gathering logits [B, V] at every step. The parts of a sum
are rounded and added in the weights' dtype. In bf16 that adds some rounding to what every product
has; in fp32 each of the 2 * layers sums of a step would move twice the bytes.
"""

from dataclasses import replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from cli import UserError
from model import ModelConfig, Transformer


def check(config: ModelConfig, ranks: int, world_size: int) -> None:
    """UserError if the model cannot be cut over `ranks` of `world_size` ranks."""
    counts = {
        "the number of ranks": world_size,
        "the model's number of key/value heads": config.kv_heads,  # which divides that of heads
        "the width of the model's MLP": config.mlp_dim,
    }
    for name, count in counts.items():
        if count % ranks:
            raise UserError(f"--sampler-ranks {ranks} must divide {name}, {count:,}")


class SlicedTransformer(Transformer):
    """This rank's slices of a model: a Transformer of fewer heads and a narrower MLP.

    Its forward gives the whole model's hidden states if all ranks of the team call it with the
    same arguments. No gradients flow through it.

    config: the whole model's. ranks: of a team: 0 .. ranks - 1 are one, the next so many another.
    Every rank of the run makes its slices at the same time. They have memory, but no values yet.
    """

    def __init__(
        self, config: ModelConfig, ranks: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        narrow = replace(
            config,
            heads=config.heads // ranks,
            kv_heads=config.kv_heads // ranks,
            mlp_dim=config.mlp_dim // ranks,
        )
        super().__init__(narrow, dtype, "meta")
        self.ranks = ranks
        self.group, _ = dist.new_subgroups(ranks)
        self.place = dist.get_rank(self.group)  # which of the slices are ours
        for block in self.blocks:
            block.out = SummedLinear(block.out, self.group)
            block.down = SummedLinear(block.down, self.group)
        self.to_empty(device=device)

    def slice_of(self, name: str, whole: Tensor) -> Tensor:
        """What this rank holds of the whole model's parameter of that name."""
        config = self.config
        layer = name.split(".")[-2]
        if layer == "qkv":
            heads = (config.heads, config.kv_heads, config.kv_heads)
            return self.rows_of(whole, [count * config.head_dim for count in heads])
        if layer == "gate_up":
            return self.rows_of(whole, [config.mlp_dim, config.mlp_dim])
        if layer in ("out", "down") and whole.ndim == 2:
            return whole.chunk(self.ranks, dim=1)[self.place]
        return whole  # embedding, head, norms, and the biases behind the sums

    def rows_of(self, whole: Tensor, counts: list[int]) -> Tensor:
        """This rank's rows of matrices that stand one below the other: `counts` of each."""
        pieces = whole.split([self.ranks * count for count in counts])
        return torch.cat([piece.chunk(self.ranks)[self.place] for piece in pieces])


class SummedLinear(nn.Linear):
    """Some columns of a linear layer, whose other columns the other ranks of the team hold.

    Every rank has the whole bias: it is added behind the sum.
    """

    def __init__(self, columns: nn.Linear, group: dist.ProcessGroup) -> None:
        has_bias = columns.bias is not None
        super().__init__(columns.in_features, columns.out_features, has_bias, device="meta")
        self.weight = columns.weight
        self.bias = columns.bias
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        return self.complete(F.linear(x, self.weight))

    def complete(self, partial: Tensor) -> Tensor:
        """In place: the sum over the ranks of what their columns make of x, and the bias."""
        # NCCL's all-reduce can be captured in a CUDA graph, if the group has done one before: so it
        # has, for no shape's first step is captured.
        dist.all_reduce(partial, group=self.group)
        if self.bias is not None:
            partial += self.bias
        return partial


def least_of_team(model: Transformer, number: int) -> int:
    """The least `number` of the ranks that share the model, on each of them.

    For what a rank finds out by itself, such as its free memory, and what is decided by it: ranks
    in lockstep have to decide alike.
    """
    if not isinstance(model, SlicedTransformer):
        return number
    least = torch.tensor(number, device=model.head_weight.device)
    dist.all_reduce(least, dist.ReduceOp.MIN, group=model.group)
    return int(least)
