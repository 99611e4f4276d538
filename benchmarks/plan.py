"""Will a training run fit its GPUs, with which flags, and how fast would it be? From a model's
config.json alone.

    python benchmarks/plan.py --model Qwen2.5-32B --gpus 64 --gpu-gb 80 --max-tokens 16384    # RL
    python benchmarks/plan.py --model Qwen2.5-7B --gpus 8 --sft                              # SFT

Flags that rl.py and sft.py have, too, mean the same there. A run that does not fit as asked is
planned with the first flags that make it fit (`choices`); the table ends with all of its flags, to
be copied.

Counted on meta tensors, which have shapes and no memory: parameters from the model itself,
activations from what autograd would really save in one block. What lies where follows parallel.py
(FSDP2 divides masters, gradients, AdamW and anchor among the GPUs), tensor_parallel.py (the
sampler's copy is whole on each GPU, or cut over --sampler-ranks of them) and sample.py (its cache).
Training and sampling take turns:

    in training     masters, AdamW, anchor + gradients, gathered blocks, activations
    in sampling     masters, AdamW, anchor + the sampler's copy and its KV cache

The sampler gives its memory back while the policy is trained; only if that is little (`STAYS`) it
keeps it, and counts in training, too.
"""

import itertools
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

import cli
import rl
from cli import UserError
from model import Block, ModelConfig, Transformer, model_folder, read_config, rotations
from parallel import MICRO_TOKENS
from rollout import share_of

GB = 10**9
MASTERS = "fp32 masters"
ADAMW = "AdamW, two moments"
ANCHOR = "anchor, fp32"
START = "first policy, fp32"
GRADIENTS = "gradients, fp32"
GATHERED = "weights to compute with"
ACTIVATIONS = "activations"
COPY = "sampler's copy"
CACHE = "KV cache"
TRAINING = "in training"
SAMPLING = "in sampling"
PEAK = "peak"
SAVED = (MASTERS, ADAMW, ANCHOR)  # what a checkpoint holds

USABLE = 0.9  # of a GPU's memory: the rest is for CUDA's context, NCCL's buffers and fragmentation
STAYS = 0.25  # of a GPU's memory: what the sampler may hold while the policy is trained
# As sample.py has them: keys and values get so much of what is free, and all prompts that are read
# in one forward so many tokens of it.
CACHE_SHARE = 0.8
PREFILL_TOKENS = 4096

# Name, bf16 operations and bytes a second of the GPU that has so many GB.
CARDS = {80: ("H100", 989e12, 3.35e12), 141: ("H200", 989e12, 4.8e12)}
# Our targets: the share of those operations in training, and how many times longer a step of decoding
# takes than reading the weights and the cache. (One H100 reached 0.46 to 0.49 with 12 of 7B's layers,
# where recomputation counts as work, and 1.3.)
MATRIX_SHARE = 0.4
DECODE_FACTOR = 1.4


@dataclass(frozen=True)
class Config:
    model: str
    """Hugging Face folder, or run folder. Only its config.json is read."""
    gpus: int
    """GPUs of the run, over all nodes."""
    gpu_gb: float = 80.0
    """Memory of one GPU, in GB (A100 and H100: 80, H200: 141)."""
    max_tokens: int | None = None
    """Longest response in RL; in SFT the longest sequence (--max-length there). None: the model's
    context."""
    sft: bool = False
    """Plan for sft.py instead of rl.py: no anchor, no sampler."""
    recipe: str = "t1"
    """The algorithm of RL: without a KL, it holds no anchor."""
    start_kl: bool = False
    """Also log the KL to the first policy: one more copy of it, unless the anchor never moves."""
    prompts: int = 32
    """Prompts per step of RL (T1: 32)."""
    samples: int = 64
    """K, responses per prompt (T1: 64)."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the matrix products and of the sampler's copy."""
    micro_tokens: int | None = None
    """Tokens per forward pass of a GPU (None: 8,192); a longer sequence stands alone."""
    recompute: bool = False
    """Recompute activations in the backward pass: a third more time for far less memory."""
    sampler_ranks: int = 1
    """GPUs that share one copy of the policy to sample from, each with a slice of every layer."""
    offload: bool = False
    """Masters, gradients, AdamW and anchor lie in the host's memory."""

    @property
    def width(self) -> int:
        """Bytes of a number in a matrix product."""
        return 2 if self.dtype == "bfloat16" else 4

    @property
    def alone(self) -> bool:
        """One process in fp32: it needs no FSDP, and samples from the policy itself."""
        return self.gpus == 1 and self.dtype == "float32" and not self.offload


OF_RL = ("recipe", "start_kl", "prompts", "samples", "sampler_ranks")
"""Flags that sft.py has not."""


def check_flags(shape: ModelConfig, config: Config) -> None:
    if config.gpu_gb <= 0:
        raise UserError(f"--gpu-gb must be above 0, not {config.gpu_gb}")
    for name in ("gpus", "max_tokens", "prompts", "samples", "micro_tokens", "sampler_ranks"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    for name in OF_RL:
        if config.sft and getattr(config, name) != getattr(Config, name):
            raise UserError(f"--sft: sft.py has no --{name.replace('_', '-')}")
    if config.recipe not in rl.RECIPES:
        raise UserError(f"--recipe {config.recipe} is none of {', '.join(rl.RECIPES)}")
    if not can_cut(shape, config, config.sampler_ranks):
        raise UserError(
            f"--sampler-ranks {config.sampler_ranks} must divide the number of GPUs, "
            f"{config.gpus}, and the model's {shape.kv_heads} key/value heads and mlp_dim of "
            f"{shape.mlp_dim:,}"
        )


def can_cut(shape: ModelConfig, config: Config, ranks: int) -> bool:
    """Whether so many GPUs can share one copy of the policy."""
    divided = (config.gpus, shape.heads, shape.kv_heads, shape.mlp_dim)
    return all(number % ranks == 0 for number in divided)


# --- memory ---------------------------------------------------------------------------------------


class Counts(NamedTuple):
    """Numbers of parameters."""

    all: int
    block: int
    outside: int  # embedding, head, final norm: FSDP's root group
    largest: int  # of the largest tensor


@lru_cache
def counts(shape: ModelConfig) -> Counts:
    model = Transformer(shape, device="meta")
    sizes = [parameter.numel() for parameter in model.parameters()]
    block = sum(parameter.numel() for parameter in model.blocks[0].parameters())
    return Counts(sum(sizes), block, sum(sizes) - shape.layers * block, max(sizes))


def sliced(shape: ModelConfig, ranks: int) -> ModelConfig:
    """What each of the GPUs that share a copy holds: embedding, head and norms are whole."""
    return replace(
        shape,
        heads=shape.heads // ranks,
        kv_heads=shape.kv_heads // ranks,
        mlp_dim=shape.mlp_dim // ranks,
    )


def shards(shape: ModelConfig, config: Config) -> dict[str, int]:
    """Bytes of what is divided among the GPUs, of one of them: on it, or on its host."""
    recipe = rl.RECIPES[config.recipe]
    anchor = not config.sft and recipe.kl_coef > 0
    stays = anchor and recipe.anchor_decay == 1  # then it is the first policy
    start = not config.sft and config.start_kl and not stays
    shard = 4 * counts(shape).all // config.gpus
    return {
        MASTERS: shard,
        ADAMW: 2 * shard,
        ANCHOR: shard * anchor,
        START: shard * start,
        GRADIENTS: shard,
    }


def plan(shape: ModelConfig, config: Config, at_once: int = 1) -> dict[str, int]:
    """Bytes on each GPU: by what they are for, then of each phase, and the "peak".

    config: its `max_tokens` is known by now. at_once: sequences of full length that are decoded at
    once, on each GPU or by those that share a copy.
    """
    held = shards(shape, config)
    if config.offload:
        held = dict.fromkeys(held, 0)
    training = {
        GRADIENTS: held.pop(GRADIENTS),
        GATHERED: gathered_bytes(shape, config),
        ACTIVATIONS: activation_bytes(shape, config),
    }
    sampling = {COPY: 0, CACHE: 0}
    if not config.sft:
        if not config.alone:
            sampling[COPY] = config.width * counts(sliced(shape, config.sampler_ranks)).all
        sampling[CACHE] = at_once * config.max_tokens * shape.layers * position_bytes(shape, config)
    always = sum(held.values())
    sampler = sum(sampling.values())
    stays = sampler if sampler <= STAYS * config.gpu_gb * GB else 0
    phases = {
        TRAINING: always + sum(training.values()) + stays,
        SAMPLING: always + sampler,
    }
    return held | training | sampling | phases | {PEAK: max(phases.values())}


def position_bytes(shape: ModelConfig, config: Config) -> int:
    """Of the key and the value of one token in one layer."""
    return 2 * config.width * shape.kv_heads // config.sampler_ranks * shape.head_dim


def gathered_bytes(shape: ModelConfig, config: Config) -> int:
    """Weights and fp32 gradients, whole, of the block at work, the next one, and the root group.

    On one GPU without --offload: copies of the weights in bf16, and the gradients of the block at
    work.
    """
    if config.alone:
        return 0
    if config.gpus == 1 and not config.offload:  # autocast: all weights, rounded, are kept
        return config.width * (counts(shape).all + counts(shape).block)
    numbers = 2 * counts(shape).block + counts(shape).outside
    on_their_way = 0
    if config.offload:  # fp32 shards, which come from the host
        on_their_way = 4 * numbers // config.gpus
    return (config.width + 4) * numbers + on_their_way


def activation_bytes(shape: ModelConfig, config: Config) -> int:
    """What a forward pass over sequences of full length keeps for the backward pass. The residual
    stream is fp32.
    """
    micro_tokens = config.micro_tokens or MICRO_TOKENS["cuda"]
    tokens = max(micro_tokens, config.max_tokens)
    mask = 0  # in bf16, attention is told where each document starts
    if config.dtype == "float32":
        mask = (1 + 4) * tokens * config.max_tokens  # of packed documents: bool, and float32
    stream = 4 * tokens * shape.dim
    in_block = saved_bytes(shape, tokens, config.dtype)
    if config.recompute:
        # A block's input is kept; the rest of one block is there while it is recomputed.
        return mask + 4 * stream + shape.layers * stream + in_block
    return mask + 4 * stream + shape.layers * in_block


class Flash(torch.autograd.Function):
    """What a fused attention keeps for its backward pass: inputs, output, and one number per query
    and head."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:3], dtype=torch.float32))
        return out


def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention on a GPU, as far as memory goes: float32 repeats keys and values for each query."""
    group = q.shape[1] // k.shape[1]
    if group > 1 and q.dtype == torch.float32:
        k = k.repeat_interleave(group, 1)
        v = v.repeat_interleave(group, 1)
    return Flash.apply(q, k, v)


@lru_cache
def saved_bytes(shape: ModelConfig, tokens: int, dtype: str = "bfloat16") -> int:
    """Bytes that autograd keeps of one block's forward over `tokens` tokens."""
    block = Block(shape, 0, dtype=getattr(torch, dtype), device="meta")
    weights = {parameter.untyped_storage()._cdata for parameter in block.parameters()}
    # By storage, so that views count once. Holding the tensors keeps the keys unique.
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    x = torch.empty(1, tokens, shape.dim, device="meta", requires_grad=True)
    rotation = rotations(shape, torch.arange(tokens, device="meta")[None])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        block(x, rotation, attend)
    kept = [tensor for key, tensor in saved.items() if key not in weights]
    return sum(tensor.untyped_storage().nbytes() for tensor in kept)


def on_host(shape: ModelConfig, config: Config) -> dict[str, int]:
    """Bytes of the host's memory for each GPU: at all times, while a checkpoint is written (from a
    copy), and while the model is read, tensor by tensor, into shards that lie on the GPU or here.
    """
    mine = shards(shape, config)
    offloaded = sum(mine.values()) if config.offload else 0
    masters = mine[MASTERS] if config.offload else 0
    return {
        "offloaded": offloaded,
        "checkpoint": sum(mine[name] for name in SAVED),
        "loading": masters + 4 * counts(shape).largest,
    }


# --- does it fit? ---------------------------------------------------------------------------------


class Outcome(NamedTuple):
    at_once: int  # sequences of full length that are decoded at once
    parts: dict[str, int]  # see `plan`
    missing: int  # bytes that a GPU has too few; 0: it fits


def outcome(shape: ModelConfig, config: Config) -> Outcome:
    """The plan with as many sequences at once as fit.

    Those are of full length, so their number is a floor. Real ones are shorter, and the sampler
    runs as many as fit by what they have drawn; if they outgrow the memory, it puts some off.
    """
    one = plan(shape, config)
    if config.sft:
        return Outcome(0, one, max(0, one[PEAK] - usable(config)))
    at_once = cached_positions(shape, config) // config.max_tokens
    if not at_once:
        layers = shape.layers + 1
        row = config.max_tokens * layers * position_bytes(shape, config)
        needed = one[SAMPLING] - one[CACHE] + math.ceil(row / CACHE_SHARE)
        return Outcome(0, one, max(one[PEAK], needed) - usable(config))
    at_once = min(at_once, rl.Config.max_batch, responses_of_sampler(config))
    parts = plan(shape, config, at_once)
    return Outcome(at_once, parts, max(0, parts[PEAK] - usable(config)))


def usable(config: Config) -> int:
    """Bytes of a GPU."""
    return int(USABLE * config.gpu_gb * GB)


def cached_positions(shape: ModelConfig, config: Config) -> int:
    """For how many tokens the sampler holds keys and values, of all sequences together: as
    `sample.Sampler.prepare` counts.

    One layer more is counted than there are: when the cache grows, one at a time is there twice.
    """
    one = plan(shape, config)
    free = usable(config) - (one[SAMPLING] - one[CACHE])
    position = (shape.layers + 1) * position_bytes(shape, config)
    positions = max(0, int(CACHE_SHARE * free / position))
    prefill = min(PREFILL_TOKENS, positions // 4, positions - config.max_tokens)
    return positions - max(0, prefill)


def responses_of_sampler(config: Config) -> int:
    """The most responses that one GPU, or those that share a copy, draw in a step."""
    samplers = config.gpus // config.sampler_ranks
    share = share_of(config.prompts, config.samples, samplers)
    return math.ceil(config.prompts * config.samples / share / samplers) * share


def choices(shape: ModelConfig, config: Config) -> Iterator[Config]:
    """The run as asked, then with flags that make it smaller: first with those that cost the least.

    --recompute takes a third more time in training. Smaller --micro-tokens, down to the longest
    sequence, which stands alone anyway, mean smaller matrix products. With --sampler-ranks GPUs
    wait for one another in every layer, with --offload for the host.
    """
    sizes = [config.micro_tokens or MICRO_TOKENS["cuda"]]
    while sizes[-1] > config.max_tokens:
        sizes.append(max(sizes[-1] // 2, config.max_tokens))
    sizes[0] = config.micro_tokens  # as it was asked for
    ranks = [config.sampler_ranks, *larger_teams(shape, config)]
    combinations = itertools.product((False, True), ranks, sizes, (False, True))
    for offload, sampler_ranks, micro_tokens, recompute in combinations:  # the last varies fastest
        yield replace(
            config,
            offload=offload or config.offload,
            sampler_ranks=sampler_ranks,
            micro_tokens=micro_tokens,
            recompute=recompute or config.recompute,
        )


def larger_teams(shape: ModelConfig, config: Config) -> list[int]:
    """More --sampler-ranks than it has, of one node of 8 GPUs."""
    if config.sft:
        return []
    return [n for n in (2, 4, 8) if n > config.sampler_ranks and can_cut(shape, config, n)]


def first_that_fits(shape: ModelConfig, config: Config) -> Config:
    """Of the `choices`; if none fits, the one that lacks the least."""
    best = config
    least = math.inf
    for choice in choices(shape, config):
        missing = outcome(shape, choice).missing
        if missing < least:
            best = choice
            least = missing
        if not missing:
            break
    return best


NOT_OF_A_RUN = ("model", "gpus", "gpu_gb", "sft")
"""Flags that neither rl.py nor sft.py has, or that every run has its own."""


def flags_of(config: Config, beside: Config | None = None) -> str:
    """A run's flags that are not at their defaults, or not as they are `beside`."""
    words = []
    for field in fields(config):
        value = getattr(config, field.name)
        usual = getattr(beside, field.name) if beside else field.default
        if field.name in NOT_OF_A_RUN or value == usual:
            continue
        name = field.name
        if config.sft and name == "max_tokens":
            name = "max_length"
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            words.append(str(value))
    return " ".join(words)


# --- time -----------------------------------------------------------------------------------------


def training_operations(shape: ModelConfig, length: int, recompute: bool) -> float:
    """Floating-point operations per token of a forward and a backward over sequences of `length`.

    6 for every weight that multiplies (8 where the forward is done twice), and as many for every
    number that a query meets in attention, half of the sequence's.
    """
    weights = shape.layers * counts(shape).block + shape.vocab_size * shape.dim
    attention = shape.layers * length * shape.heads * shape.head_dim
    return operations_per_weight(recompute) * (weights + attention)


def operations_per_weight(recompute: bool) -> int:
    return 8 if recompute else 6


def training_seconds(shape: ModelConfig, config: Config, tokens: int) -> float:
    """Of so many tokens in sequences of full length, if training reached our target."""
    _, operations, _ = CARDS[config.gpu_gb]
    per_token = training_operations(shape, config.max_tokens, config.recompute)
    # Beside a forward and a backward (one epoch): the log-probs of the policy, the anchor and the
    # first policy, a forward each, of two operations per weight.
    held = shards(shape, config)
    scored = 0
    if not config.sft:
        scored = sum(held[name] > 0 for name in (MASTERS, ANCHOR, START))
    scoring = 2 * scored / operations_per_weight(config.recompute)
    return tokens * per_token * (1 + scoring) / (config.gpus * MATRIX_SHARE * operations)


def sampling_seconds(shape: ModelConfig, config: Config) -> float:
    """Of a step's responses, all of full length, if decoding reached our target."""
    _, _, bandwidth = CARDS[config.gpu_gb]
    found = outcome(shape, config)
    rounds = math.ceil(responses_of_sampler(config) / found.at_once)
    # A cache is half full on average.
    step_bytes = found.parts[COPY] + found.parts[CACHE] / 2
    return rounds * config.max_tokens * DECODE_FACTOR * step_bytes / bandwidth


def speed_lines(shape: ModelConfig, config: Config) -> list[str]:
    """How fast the run would be if it reached our targets, as lines of the table."""
    card, operations, bandwidth = CARDS[config.gpu_gb]
    lines = [
        f"if an {card} reaches {MATRIX_SHARE:.0%} of {operations / 1e12:.0f} TFLOP/s in training, "
        f"and decodes in {DECODE_FACTOR} times what reading takes at {bandwidth / 1e12:g} TB/s "
        "(our targets):"
    ]
    if config.sft:
        speed = 1 / training_seconds(shape, config, 1)
        return [*lines, f"{'training, tokens/s':22}{speed:9,.0f}"]
    responses = config.prompts * config.samples
    tokens = responses * config.max_tokens
    training = training_seconds(shape, config, tokens)
    sampling = sampling_seconds(shape, config)
    lines.append(
        f"{responses:,} responses of full length, minutes: sampling {sampling / 60:.1f}, "
        f"training {training / 60:.1f}; {tokens / (sampling + training):,.0f} tokens/s"
    )
    times = []
    for ranks in larger_teams(shape, config):
        seconds = sampling_seconds(shape, replace(config, sampler_ranks=ranks))
        times.append(f"{seconds / 60:.1f} with --sampler-ranks {ranks}")
    if times:
        lines.append(f"sampling, if GPUs did not wait for one another: {', '.join(times)}")
    return lines


# --- the table ------------------------------------------------------------------------------------


def table(shape: ModelConfig, asked: Config) -> str:
    """`plan` line by line, whether it fits, with which flags, and how fast it would be at best."""
    check_flags(shape, asked)
    asked = replace(asked, max_tokens=asked.max_tokens or shape.context)
    config = first_that_fits(shape, asked)
    found = outcome(shape, config)
    lines = [
        f"{counts(shape).all / GB:.2f}B parameters, sequences of {config.max_tokens} tokens; "
        f"GB on each of {config.gpus} GPUs"
    ]
    if config != asked:
        lacking = outcome(shape, asked).missing / GB
        added = flags_of(config, beside=asked)
        lines.append(f"{lacking:.1f} GB are missing as asked: planned with {added}")
    lines += [line(name, size) for name, size in found.parts.items() if size]
    if not config.sft:
        where = f"{config.sampler_ranks} GPUs" if config.sampler_ranks > 1 else "each GPU"
        count = f"{'sequences at once':22}{found.at_once:9}"
        lines.append(f"{count}  on {where}; more, where they are not of full length")
    hosted = on_host(shape, config).items()
    lines += [line(f"{name}, on host", size) for name, size in hosted if size]

    label = f"fits {config.gpu_gb:g} GB ({USABLE:.0%})"
    lines.append(f"{label:22}{'no' if found.missing else 'yes':>9}")
    if found.missing:
        lines.append(
            f"{found.missing / GB:.1f} GB are missing on each GPU with these flags, and more with "
            "others: more or larger GPUs, or shorter sequences"
        )
        return "\n".join(lines)
    script = "sft.py" if config.sft else "rl.py"
    lines.append(f"the flags of {script}: {flags_of(config)}")
    in_bf16 = config.dtype == "bfloat16" and not config.offload  # what our targets are about
    if in_bf16 and config.gpu_gb in CARDS:
        lines += speed_lines(shape, config)
    return "\n".join(lines)


def line(name: str, size: int) -> str:
    return f"{name:22}{size / GB:9.1f}"


def main(config: Config) -> None:
    print(table(read_config(model_folder(config.model)), config))


if __name__ == "__main__":
    cli.run(main, Config)
