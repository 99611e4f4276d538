"""Will it fit, and how long would it take? A training run on GPUs, from a model's config.json alone: `--plan`.

    print(table(read_config(model_folder("path/to/Qwen2.5-32B")), 64, sequence_length=8192, prompts=32, samples=64))

Counted on meta tensors, which have shapes and no memory: parameters from the model itself, activations from what
autograd would really save in one block. What is divided by the number of GPUs and what is not follows parallel.py
(FSDP2: masters, gradients, AdamW and anchor are divided; the sampler's copy is whole on every GPU) and sample.py.
"""

import math

import torch
from torch import Tensor

from cli import UserError
from model import Block, ModelConfig, Transformer, rotations
from parallel import MICRO_TOKENS
from rollout import share_of

GB = 10**9
HELD = ("fp32 masters", "AdamW, two moments", "EMA anchor, fp32", "inference copy, bf16")  # in both phases
CACHE = "KV cache, bf16"
CARDS = {80: ("H100", 989e12, 3.35e12), 141: ("H200", 989e12, 4.8e12)}  # by GB: bf16 operations and bytes per second
MATRIX_SHARE, DECODE_FACTOR = 0.4, 1.4  # our targets: of the operations; times the bytes of weights and cache
USABLE = 0.9  # of a GPU's memory: the CUDA context, NCCL's buffers and fragmentation take the rest


def plan(
    config: ModelConfig,
    gpus: int,
    sequence_length: int,
    rl: bool,
    sequences: int = 1,
    micro_tokens: int | None = None,
    checkpoint_activations: bool = True,
) -> dict[str, int]:
    """Bytes per GPU by what they are for, and their "peak" (training and sampling take turns).

    sequences: completions that one GPU decodes at once (RL). micro_tokens: tokens of one forward and backward on one
    GPU, in rows of `sequence_length`; default one such row.
    """
    model = Transformer(config, device="meta")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    block = sum(parameter.numel() for parameter in model.blocks[0].parameters())
    outside = parameters - config.layers * block  # embedding, head, final norm: FSDP's root group
    tokens = micro_tokens or sequence_length
    stream = 4 * tokens * config.dim
    working = saved_bytes(config, tokens)
    # The mask of packed documents: bool, and in bf16 for the attention kernel.
    activations = 3 * tokens * sequence_length + 4 * stream
    activations += config.layers * stream + working if checkpoint_activations else config.layers * working
    anchor, copy = (4 * parameters // gpus, 2 * parameters) if rl else (0, 0)
    held = dict(zip(HELD, (4 * parameters // gpus, 8 * parameters // gpus, anchor, copy)))
    training = {
        "gradients, fp32": 4 * parameters // gpus,
        # bf16 weights and fp32 gradients, of the block at work, of the next one, and of the root group
        "gathered by FSDP": 6 * (2 * block + outside),
        "activations": activations,
    }
    kv_bytes = 2 * 2 * config.layers * config.kv_heads * config.head_dim
    sampling = {CACHE: sequences * sequence_length * kv_bytes if rl else 0}
    peak = sum(held.values()) + max(sum(training.values()), sum(sampling.values()))
    return held | training | sampling | {"peak": peak}


def table(
    config: ModelConfig,
    gpus: int,
    sequence_length: int,
    prompts: int = 0,
    samples: int = 0,
    gpu_gb: float = 80.0,
    micro_tokens: int | None = None,
    checkpoint_activations: bool = True,
) -> str:
    """`plan` line by line, whether it fits GPUs of `gpu_gb` GB, and how fast it would be at best.

    prompts, samples: of one step of T1, K samples each; 0: supervised fine-tuning. sequence_length: of a response, or
    (SFT) of a whole sequence. micro_tokens: as the flag; a longer sequence stands alone. The sampler takes half of the
    memory that is free and decodes fewer sequences at once where that is little: counted is the cache of as many of
    full length as find room, 64 at most.
    """
    if gpu_gb <= 0:
        raise UserError(f"--gpu-gb must be above 0, not {gpu_gb}")
    micro_tokens = MICRO_TOKENS["cuda"] if micro_tokens is None else micro_tokens
    for name, value in {"plan": gpus, "max-tokens": sequence_length, "micro-tokens": micro_tokens}.items():
        if value < 1:
            raise UserError(f"--{name} must be at least 1, not {value}")
    responses, share = prompts * samples, share_of(prompts, samples, gpus)
    tokens = max(micro_tokens, sequence_length)
    held = plan(config, gpus, sequence_length, bool(responses), 1, tokens, checkpoint_activations)
    at_once = 1
    if responses:
        room = USABLE * gpu_gb * GB - sum(held[name] for name in HELD)
        own = math.ceil(responses / share / gpus) * share
        at_once = max(1, min(64, own, int(room / 2 // held[CACHE])))
        held = plan(config, gpus, sequence_length, True, at_once, tokens, checkpoint_activations)
    parameters = held["fp32 masters"] * gpus / 4 / GB
    lines = [f"{parameters:.2f}B parameters, sequences of {sequence_length} tokens; GB on each of {gpus} GPUs"]
    lines += [f"{name:22}{size / GB:9.1f}" for name, size in held.items() if size]
    if responses:
        lines.append(f"{'sequences at once':22}{at_once:>9}")
    state = sum(held[name] for name in HELD[:3])
    lines.append(f"{'checkpoint, on host':22}{state / GB:9.1f}")  # `parallel.Checkpoints` writes from a copy
    fits = held["peak"] <= USABLE * gpu_gb * GB
    lines.append(f"{f'fits {gpu_gb:g} GB ({USABLE:.0%})':22}{'yes' if fits else 'no':>9}")
    if fits and gpu_gb in CARDS:
        card, operations, bandwidth = CARDS[gpu_gb]
        lines.append(
            f"if an {card} reaches {MATRIX_SHARE:.0%} of {operations / 1e12:.0f} TFLOP/s in training, and decodes in "
            f"{DECODE_FACTOR} times what reading takes at {bandwidth / 1e12:g} TB/s (our targets, not measured):"
        )
        speed = gpus * MATRIX_SHARE * operations / training_operations(config, sequence_length, checkpoint_activations)
        if not responses:
            return "\n".join([*lines, f"{'training, tokens/s':22}{speed:9,.0f}"])
        rounds = math.ceil(own / at_once)
        step_bytes = held["inference copy, bf16"] + held[CACHE] / 2  # a cache is half full on average
        sampling = rounds * sequence_length * DECODE_FACTOR * step_bytes / bandwidth
        # beside the policy's forward and backward (one epoch): its log-probs and the anchor's, a forward each
        training = responses * sequence_length / speed * (1 + 4 / (8 if checkpoint_activations else 6))
        lines.append(f"{responses:,} responses of full length, minutes: sampling {sampling / 60:.1f}, ")
        tokens_per_second = responses * sequence_length / (sampling + training)
        lines[-1] += f"training {training / 60:.1f}; {tokens_per_second:,.0f} tokens/s"
    return "\n".join(lines)


def training_operations(config: ModelConfig, sequence_length: int, recompute: bool) -> float:
    """Floating-point operations per token of a forward and a backward: 6 for every weight that multiplies (8 with the
    forward done twice), and as many for every number that a query meets in attention, half of the sequence's."""
    block = sum(parameter.numel() for parameter in Block(config, 0, device="meta").parameters())
    weights = config.layers * block + config.vocab_size * config.dim
    attention = config.layers * sequence_length * config.heads * config.head_dim
    return (8 if recompute else 6) * (weights + attention)


class Flash(torch.autograd.Function):
    """What a fused attention keeps for its backward pass: inputs, output, and one number per query and head."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:3], dtype=torch.float32))
        return out


def saved_bytes(config: ModelConfig, tokens: int) -> int:
    """Bytes that autograd keeps of one block's forward over `tokens` tokens, in bf16 with an fp32 stream."""
    block = Block(config, 0, dtype=torch.bfloat16, device="meta")
    weights = {parameter.untyped_storage()._cdata for parameter in block.parameters()}
    saved: dict[int, Tensor] = {}  # by storage, so that views count once; holding them keeps the keys unique

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    x = torch.empty(1, tokens, config.dim, device="meta", requires_grad=True)
    rotation = rotations(config, torch.arange(tokens, device="meta")[None])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        block(x, rotation, lambda layer, q, k, v: Flash.apply(q, k, v))
    return sum(tensor.untyped_storage().nbytes() for key, tensor in saved.items() if key not in weights)
