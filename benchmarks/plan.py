"""Will a training run fit its GPUs, and how fast would it be? From a model's config.json alone.

    python benchmarks/plan.py --model Qwen2.5-32B --gpus 64 --gpu-gb 80 --max-tokens 16384    # RL
    python benchmarks/plan.py --model Qwen2.5-7B --gpus 8 --sft --recompute                  # SFT

Flags that rl.py and sft.py have, too, mean the same there. Counted on meta tensors, which have
shapes and no memory: parameters from the model itself, activations from what autograd would really
save in one block. What is divided by the number of GPUs, and what is not, follows parallel.py
(FSDP2: masters, gradients, AdamW and anchor are divided; the sampler's copy is whole on every GPU)
and sample.py.
"""

import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

import cli
from cli import UserError
from model import Block, ModelConfig, Transformer, model_folder, read_config, rotations
from parallel import MICRO_TOKENS
from rollout import share_of

GB = 10**9
MASTERS = "fp32 masters"
ADAMW = "AdamW, two moments"
ANCHOR = "EMA anchor, fp32"
COPY = "inference copy, bf16"
CACHE = "KV cache, bf16"
HELD = (MASTERS, ADAMW, ANCHOR, COPY)  # all the time, in training and in sampling
SAVED = (MASTERS, ADAMW, ANCHOR)  # what a checkpoint holds
USABLE = 0.9  # of a GPU's memory: the rest is for CUDA's context, NCCL's buffers and fragmentation
MOST_AT_ONCE = 64  # sequences that a GPU is planned to decode at once

# Name, bf16 operations and bytes a second of the GPU that has so many GB.
CARDS = {80: ("H100", 989e12, 3.35e12), 141: ("H200", 989e12, 4.8e12)}
# Our targets, not measured: the share of those operations in training, and how many times longer a
# step of decoding takes than reading the weights and the cache.
MATRIX_SHARE = 0.4
DECODE_FACTOR = 1.4


@dataclass
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
    prompts: int = 32
    """Prompts per step of RL (T1: 32)."""
    samples: int = 64
    """K, responses per prompt (T1: 64)."""
    micro_tokens: int | None = None
    """Tokens per forward pass of a GPU (None: 8,192); a longer sequence stands alone."""
    recompute: bool = False
    """Recompute activations in the backward pass: a third more time for far less memory."""


def check_flags(config: Config) -> None:
    if config.gpu_gb <= 0:
        raise UserError(f"--gpu-gb must be above 0, not {config.gpu_gb}")
    for name in ("gpus", "max_tokens", "prompts", "samples", "micro_tokens"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {value}")


# --- memory ---------------------------------------------------------------------------------------


def plan(shape: ModelConfig, config: Config, at_once: int = 1) -> dict[str, int]:
    """Bytes on each GPU by what they are for, and their "peak": training and sampling take turns.

    config: its `max_tokens` is known by now. at_once: sequences that one GPU decodes at once.
    """
    model = Transformer(shape, device="meta")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    block = sum(parameter.numel() for parameter in model.blocks[0].parameters())
    outside = parameters - shape.layers * block  # embedding, head, final norm: FSDP's root group
    held = {
        MASTERS: 4 * parameters // config.gpus,
        ADAMW: 8 * parameters // config.gpus,
        ANCHOR: 0,
        COPY: 0,
    }
    training = {
        "gradients, fp32": 4 * parameters // config.gpus,
        # bf16 weights and fp32 gradients: of the block at work, the next one, and the root group
        "gathered by FSDP": 6 * (2 * block + outside),
        "activations": activation_bytes(shape, config),
    }
    sampling = {CACHE: 0}
    if not config.sft:
        held[ANCHOR] = 4 * parameters // config.gpus
        held[COPY] = 2 * parameters
        position = 2 * 2 * shape.layers * shape.kv_heads * shape.head_dim  # keys and values, bf16
        sampling[CACHE] = at_once * config.max_tokens * position
    peak = sum(held.values()) + max(sum(training.values()), sum(sampling.values()))
    return held | training | sampling | {"peak": peak}


def activation_bytes(shape: ModelConfig, config: Config) -> int:
    """What a forward pass keeps for the backward pass, in bf16 with an fp32 residual stream."""
    micro_tokens = config.micro_tokens or MICRO_TOKENS["cuda"]
    tokens = max(micro_tokens, config.max_tokens)
    mask = 3 * tokens * config.max_tokens  # of packed documents: bool, and bf16 for attention
    stream = 4 * tokens * shape.dim
    in_block = saved_bytes(shape, tokens)
    if (
        config.recompute
    ):  # a block's input is kept; the rest of one block is there while it is recomputed
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


def saved_bytes(shape: ModelConfig, tokens: int) -> int:
    """Bytes that autograd keeps of one block's forward over `tokens` tokens."""
    block = Block(shape, 0, dtype=torch.bfloat16, device="meta")
    weights = {parameter.untyped_storage()._cdata for parameter in block.parameters()}
    # By storage, so that views count once. Holding the tensors keeps the keys unique.
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    x = torch.empty(1, tokens, shape.dim, device="meta", requires_grad=True)
    rotation = rotations(shape, torch.arange(tokens, device="meta")[None])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        block(x, rotation, lambda layer, q, k, v: Flash.apply(q, k, v))
    kept = [tensor for key, tensor in saved.items() if key not in weights]
    return sum(tensor.untyped_storage().nbytes() for tensor in kept)


def responses_per_gpu(config: Config) -> int:
    """The most responses that one GPU draws in a step."""
    share = share_of(config.prompts, config.samples, config.gpus)
    return math.ceil(config.prompts * config.samples / share / config.gpus) * share


def sequences_at_once(shape: ModelConfig, config: Config) -> int:
    """How many sequences of full length a GPU decodes at once.

    The sampler takes half of the memory that is free, and decodes fewer sequences where that is
    little; 64 at most are counted, and no more than there are to draw.
    """
    one = plan(shape, config)
    free = USABLE * config.gpu_gb * GB - sum(one[name] for name in HELD)
    fitting = int(free / 2 // one[CACHE])
    return max(1, min(MOST_AT_ONCE, responses_per_gpu(config), fitting))


# --- time -----------------------------------------------------------------------------------------


def training_operations(shape: ModelConfig, length: int, recompute: bool) -> float:
    """Floating-point operations per token of a forward and a backward over sequences of `length`.

    6 for every weight that multiplies (8 where the forward is done twice), and as many for every
    number that a query meets in attention, half of the sequence's.
    """
    block = sum(parameter.numel() for parameter in Block(shape, 0, device="meta").parameters())
    weights = shape.layers * block + shape.vocab_size * shape.dim
    attention = shape.layers * length * shape.heads * shape.head_dim
    return operations_per_weight(recompute) * (weights + attention)


def operations_per_weight(recompute: bool) -> int:
    return 8 if recompute else 6


def speed_lines(
    shape: ModelConfig, config: Config, held: dict[str, int], at_once: int
) -> list[str]:
    """How fast the run would be if it reached our targets, as lines of the table."""
    card, operations, bandwidth = CARDS[config.gpu_gb]
    lines = [
        f"if an {card} reaches {MATRIX_SHARE:.0%} of {operations / 1e12:.0f} TFLOP/s in training, "
        f"and decodes in {DECODE_FACTOR} times what reading takes at {bandwidth / 1e12:g} TB/s "
        "(our targets, not measured):"
    ]
    per_token = training_operations(shape, config.max_tokens, config.recompute)
    speed = config.gpus * MATRIX_SHARE * operations / per_token
    if config.sft:
        return [*lines, f"{'training, tokens/s':22}{speed:9,.0f}"]
    responses = config.prompts * config.samples
    tokens = responses * config.max_tokens
    rounds = math.ceil(responses_per_gpu(config) / at_once)
    step_bytes = held[COPY] + held[CACHE] / 2  # a cache is half full on average
    sampling = rounds * config.max_tokens * DECODE_FACTOR * step_bytes / bandwidth
    # Beside the policy's forward and backward (one epoch): its log-probs and the anchor's. Each is
    # a forward, two operations per weight.
    scoring = 4 / operations_per_weight(config.recompute)
    training = tokens / speed * (1 + scoring)
    lines.append(
        f"{responses:,} responses of full length, minutes: sampling {sampling / 60:.1f}, "
        f"training {training / 60:.1f}; {tokens / (sampling + training):,.0f} tokens/s"
    )
    return lines


# --- the table ------------------------------------------------------------------------------------


def table(shape: ModelConfig, config: Config) -> str:
    """`plan` line by line, whether it fits, and how fast it would be at best."""
    check_flags(config)
    config = replace(config, max_tokens=config.max_tokens or shape.context)
    at_once = 1 if config.sft else sequences_at_once(shape, config)
    held = plan(shape, config, at_once)
    parameters = held[MASTERS] * config.gpus / 4 / GB
    lines = [
        f"{parameters:.2f}B parameters, sequences of {config.max_tokens} tokens; "
        f"GB on each of {config.gpus} GPUs"
    ]
    for name, size in held.items():
        if size:
            lines.append(f"{name:22}{size / GB:9.1f}")
    if not config.sft:
        lines.append(f"{'sequences at once':22}{at_once:>9}")
    saved = sum(held[name] for name in SAVED)  # `parallel.Checkpoints` writes from a copy
    lines.append(f"{'checkpoint, on host':22}{saved / GB:9.1f}")
    fits = held["peak"] <= USABLE * config.gpu_gb * GB
    label = f"fits {config.gpu_gb:g} GB ({USABLE:.0%})"
    lines.append(f"{label:22}{'yes' if fits else 'no':>9}")
    if fits and config.gpu_gb in CARDS:
        lines += speed_lines(shape, config, held, at_once)
    return "\n".join(lines)


def main(config: Config) -> None:
    print(table(read_config(model_folder(config.model)), config))


if __name__ == "__main__":
    cli.run(main, Config)
