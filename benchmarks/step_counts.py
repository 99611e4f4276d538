"""What one step of RL has to compute and to move, part by part, beside the least possible.

    python benchmarks/step_counts.py                   # Qwen2.5-7B on 8 H100s, T1's 32 x 64
    python benchmarks/step_counts.py --mean-tokens 500 --max-tokens 2048

Counted, not measured, and nothing is run. Shapes come from config.json, flags and the room for
keys and values from plan.py, rows and micro-batches from packing.py and parallel.py, for lengths
that are drawn to spread as RL's do. All groups are trained on, by one update.

All numbers are one GPU's. Ours are those of the GPU that the others wait for: in each micro-batch
the one with the most to do, in sampling the one that ends last. The least possible is an equal
share of the whole, without padding, with every stem once, no activation recomputed, all weights
gathered once for each pass, and in sampling read once for each token of the longest response.
Seconds are those of an H100 that is held up by nothing but the largest of the three: operations,
its own memory, or what it receives over NVLink.

Of forward and backward passes, memory traffic is not counted: with thousands of tokens in each,
operations bound them. Nor are the logits of a decode step, a few hundredths of the weights.
"""

import math
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import plan
import torch

import cli
from cli import UserError
from model import ModelConfig, model_folder, read_config
from packing import Example, Unit, fill_rows, share_stems
from parallel import MICRO_TOKENS, World, balance, spread
from rollout import share_of

QWEN_7B = ModelConfig(152064, 3584, 28, 28, 4, 128, 18944, family="qwen2", qkv_bias=True)
CARD_GB = 80
NVLINK = 450e9  # bytes a second that an H100 can receive
ANY_LENGTH = 10**9  # a model so wide that no row is too long: attention in bf16 needs no mask
HARVEST = 8  # steps of decoding between two looks at who has ended, on a GPU: sample.py
UPDATE_BYTES = 28 + 12  # of each parameter: AdamW's reading and writing, and the anchor's


@dataclass(frozen=True)
class Config:
    model: str = ""
    """Hugging Face folder; only its config.json is read. Left out: Qwen2.5-7B's shape."""
    gpus: int = 8
    """GPUs of one node: H100s of 80 GB."""
    prompts: int = 32
    """Prompts per step (T1: 32)."""
    samples: int = 64
    """K, responses per prompt (T1: 64)."""
    prompt_tokens: int = 150
    """Mean length of a prompt."""
    mean_tokens: int = 2000
    """Mean length of a response, before the longest are cut off."""
    max_tokens: int = 8192
    """Length at which a response is cut off."""
    spread: float = 0.5
    """Standard deviation of the logarithm of a length: of the prompts' means, and of the responses
    to one prompt around its mean."""
    seed: int = 0
    """Seed of the lengths."""


class Work(NamedTuple):
    """Of one GPU."""

    operations: float = 0.0
    memory: float = 0.0  # bytes read and written
    link: float = 0.0  # bytes received from other GPUs

    @property
    def seconds(self) -> float:
        _, operations, bandwidth = plan.CARDS[CARD_GB]
        return max(self.operations / operations, self.memory / bandwidth, self.link / NVLINK)


class Load(NamedTuple):
    """What a forward pass works on."""

    tokens: float  # places of its rows, padding included
    pairs: float  # of a query and a key that it sees
    targets: float  # tokens that meet the vocabulary


class Group(NamedTuple):
    """One prompt, and responses to it, in tokens."""

    prompt: int
    responses: list[int]


def draw_lengths(config: Config) -> list[Group]:
    """Log-normal lengths: means that differ from prompt to prompt, responses around them."""
    rng = random.Random(config.seed)

    def around(mean: float) -> float:
        return mean * math.exp(rng.gauss(0, config.spread) - config.spread**2 / 2)

    groups = []
    for _ in range(config.prompts):
        prompt = max(2, round(around(config.prompt_tokens)))
        mean = around(config.mean_tokens)
        drawn = [round(around(mean)) for _ in range(config.samples)]
        groups.append(Group(prompt, [min(max(1, n), config.max_tokens) for n in drawn]))
    return groups


def examples_of(groups: list[Group]) -> list[Example]:
    """Sequences of those lengths. All that counts of their tokens is which prompts are the same."""
    examples = []
    for number, group in enumerate(groups):
        for tokens in group.responses:
            end = group.prompt + tokens
            examples.append(Example([number] * end, [(group.prompt, end)]))
    return examples


# --- forward and backward passes ------------------------------------------------------------------


def load_of(units: list[Unit], examples: list[Example], tokens: int) -> Load:
    """Of a forward pass over these units, in rows of so many `tokens`."""
    pairs = 0
    targets = 0
    for unit in units:
        stem = 0
        if len(unit.members) > 1:
            stem = len(examples[unit.members[0]].stem)
        pairs += stem * (stem + 1) // 2
        for i in unit.members:
            own = len(examples[i].tokens) - stem
            pairs += own * stem + own * (own + 1) // 2
            targets += examples[i].targets
    return Load(tokens, pairs, targets)


def micro_batches(examples: list[Example], tokens: int, gpus: int) -> list[list[Load]]:
    """[number of the micro-batch][GPU], cut and packed as `parallel.micro_batches` does."""
    units, row_length = share_stems(examples, ANY_LENGTH, tokens)
    lengths = [unit.length for unit in units]
    by_gpu = []
    for rank in range(gpus):
        loads = []
        for part in spread(lengths, row_length, tokens, World(rank, gpus, torch.device("cpu"))):
            rows, width = fill_rows([lengths[u] for u in part], row_length)
            loads.append(load_of([units[u] for u in part], examples, len(rows) * width))
        by_gpu.append(loads)
    return [list(loads) for loads in zip(*by_gpu, strict=True)]


def least_load(groups: list[Group], examples: list[Example], gpus: int) -> Load:
    """A GPU's equal share of all sequences, each prompt's stem once, without padding."""
    units = []
    first = 0
    for group in groups:
        members = list(range(first, first + len(group.responses)))
        first += len(group.responses)
        # Each response has the last token of the prompt for itself.
        own = sum(group.responses) + len(group.responses)
        units.append(Unit(members, group.prompt - 1 + own))
    whole = load_of(units, examples, sum(unit.length for unit in units))
    return Load(*(value / gpus for value in whole))


def operations_of(shape: ModelConfig, load: Load) -> tuple[float, float, float]:
    """Of a forward pass: the blocks' matrices, attention, and the head."""
    matrices = 2 * shape.layers * plan.counts(shape).block * load.tokens
    attention = 4 * shape.layers * shape.heads * shape.head_dim * load.pairs
    head = 2 * shape.vocab_size * shape.dim * load.targets
    return matrices, attention, head


def training_operations(shape: ModelConfig, load: Load, recompute: bool) -> float:
    """Of a forward and a backward pass as we do it: each matrix is multiplied three times.

    What is computed once more: the blocks by --recompute, the scores of attention and the head's
    logits in any case.
    """
    matrices, attention, head = operations_of(shape, load)
    again = (matrices + attention) * recompute
    return 3 * matrices + 3.5 * attention + 4 * head + again


def slowest(loads: list[list[Load]], operations: Callable[[Load], float]) -> float:
    """Micro-batch after micro-batch, the most that any GPU has to do."""
    return sum(max(map(operations, of_gpus)) for of_gpus in loads)


# --- sampling -------------------------------------------------------------------------------------


def pieces_of(groups: list[Group], gpus: int, max_tokens: int) -> list[list[Group]]:
    """What each GPU draws: shared out as `rollout.draw` does, by all that it knows beforehand."""
    samples = len(groups[0].responses)
    share = share_of(len(groups), samples, gpus)
    pieces = []
    for group in groups:
        for first in range(0, samples, share):
            pieces.append(Group(group.prompt, group.responses[first : first + share]))
    work = [piece.prompt + share * max_tokens for piece in pieces]
    return [[pieces[i] for i in mine] for mine in balance(work, gpus)]


def schedule(pieces: list[Group], positions: int) -> tuple[int, int]:
    """(steps until all have ended, tokens that went through a prefill), by sample.py's rules.

    positions: tokens that the cache has room for. Every row has room for the longest. Sequences
    start while all would fit at twice that; when they no longer fit, the shortest are evicted, and
    prefilled again with what they have drawn once there is room.
    """
    waiting = []  # [tokens so far, tokens in the end], the longest prompts first
    for prompt, responses in sorted(pieces, key=lambda piece: -piece.prompt):
        waiting += [[prompt, prompt + tokens] for tokens in responses]
    evicted: list[list[int]] = []  # the longest first
    live: list[list[int]] = []
    steps = 0
    prefilled = sum(piece.prompt - 1 for piece in pieces)
    while live or waiting or evicted:
        queue = waiting or evicted
        while queue:
            longest = max([queue[0][0], *(length for length, _ in live)])
            if live and len(live) >= positions // (2 * longest):
                break
            if queue is evicted:
                prefilled += queue[0][0] - 1
            live.append(queue.pop(0))
        live.sort(reverse=True)
        fitting = max(1, positions // (live[0][0] + HARVEST))
        evicted = sorted(evicted + live[fitting:], reverse=True)
        live = [[min(length + HARVEST, end), end] for length, end in live[:fitting]]
        live = [[length, end] for length, end in live if length < end]
        steps += HARVEST
    return steps, prefilled


def sampling_work(shape: ModelConfig, pieces: list[Group], steps: float, prefilled: float) -> Work:
    """A step reads the weights; a token reads the keys and values of all before it."""
    read = 0
    drawn = 0
    for prompt, responses in pieces:
        for tokens in responses:
            read += tokens * prompt + tokens * (tokens - 1) // 2  # from the prompt's last token on
            drawn += tokens
    operations = sum(operations_of(shape, Load(prefilled + drawn, read, drawn)))
    position = 2 * 2 * shape.layers * shape.kv_heads * shape.head_dim
    return Work(operations, memory=2 * plan.counts(shape).all * steps + position * read)


# --- the table ------------------------------------------------------------------------------------


def flags_for(shape: ModelConfig, config: Config) -> plan.Config:
    """The first flags by which the run fits."""
    asked = plan.Config(
        model=config.model,
        gpus=config.gpus,
        gpu_gb=CARD_GB,
        max_tokens=config.max_tokens,
        prompts=config.prompts,
        samples=config.samples,
    )
    plan.check_flags(shape, asked)
    flags = plan.first_that_fits(shape, asked)
    if plan.outcome(shape, flags).missing or flags.sampler_ranks > 1 or flags.offload:
        raise UserError("counted are models that one GPU of 80 GB can sample from: this is larger")
    return flags


def parts_of(
    shape: ModelConfig, groups: list[Group], loads: list[list[Load]], best: Load, flags: plan.Config
) -> dict[str, tuple[Work, Work]]:
    """{part of the step: (ours, the least)}."""
    gpus = flags.gpus
    parameters = plan.counts(shape).all
    received = parameters * (gpus - 1) / gpus  # numbers, when all are gathered once
    passes = len(loads)

    drawn = []
    for mine in pieces_of(groups, gpus, flags.max_tokens):
        steps, prefilled = schedule(mine, plan.cached_positions(shape, flags))
        drawn.append(sampling_work(shape, mine, steps, prefilled))
    longest = max(max(group.responses) for group in groups)
    stems = sum(group.prompt - 1 for group in groups)
    drawn_best = sampling_work(shape, groups, longest * gpus, stems)
    drawn_best = Work(*(value / gpus for value in drawn_best))

    def forward(load: Load) -> float:
        return sum(operations_of(shape, load))

    def both(load: Load) -> float:
        return training_operations(shape, load, flags.recompute)

    scored = Work(slowest(loads, forward), link=2 * received * passes)
    scored_best = Work(forward(best), link=2 * received)
    # The backward pass gathers the weights again, and sums gradients of four bytes.
    trained = Work(slowest(loads, both), link=(2 + 2 + 4) * received * passes)
    trained_best = Work(3 * forward(best), link=(2 + 4) * received)
    # Gathered into a buffer, read there, written.
    copied = Work(memory=3 * 2 * parameters, link=2 * received)
    copied_best = Work(memory=2 * parameters, link=2 * received)
    update = Work(memory=UPDATE_BYTES * parameters / gpus)
    return {
        "weights to sampler": (copied, copied_best),
        "sampling": (max(drawn, key=lambda work: work.seconds), drawn_best),
        "log-probs, policy": (scored, scored_best),
        "log-probs, anchor": (scored, scored_best),
        "training": (trained, trained_best),
        "AdamW and anchor": (update, update),
    }


def table(shape: ModelConfig, config: Config) -> str:
    """What was assumed, what packing makes of it, and the parts."""
    flags = flags_for(shape, config)
    groups = draw_lengths(config)
    examples = examples_of(groups)
    loads = micro_batches(examples, flags.micro_tokens or MICRO_TOKENS["cuda"], config.gpus)
    best = least_load(groups, examples, config.gpus)

    drawn = [tokens for group in groups for tokens in group.responses]
    prompts = [group.prompt for group in groups]
    whole = sum(len(example.tokens) for example in examples)
    needed = best.tokens * config.gpus
    places = sum(load.tokens for of_gpus in loads for load in of_gpus)
    lines = [
        f"{plan.counts(shape).all / 1e9:.2f}B parameters on {config.gpus} H100s; {len(prompts)} "
        f"prompts of {sum(prompts) / len(prompts):.0f} tokens x {config.samples} responses of "
        f"{sum(drawn) / len(drawn):,.0f} on average, the longest {max(drawn):,}",
        f"flags, by plan.py: {plan.flags_of(flags)}; the cache holds "
        f"{plan.cached_positions(shape, flags):,} tokens on each GPU",
        f"{whole:,} tokens of prompts and responses, {needed:,.0f} with each stem once, "
        f"{places:,} places in {len(loads)} micro-batches on each GPU",
        f"{'of one GPU':20}{'PFLOP':>8}{'least':>8}{'memory GB':>11}{'least':>9}"
        f"{'NVLink GB':>11}{'least':>8}{'seconds':>9}{'least':>8}",
    ]
    total = total_best = 0.0
    for name, (ours, least) in parts_of(shape, groups, loads, best, flags).items():
        total += ours.seconds
        total_best += least.seconds
        lines.append(
            f"{name:20}{ours.operations / 1e15:8.2f}{least.operations / 1e15:8.2f}"
            f"{ours.memory / 1e9:11,.0f}{least.memory / 1e9:9,.0f}"
            f"{ours.link / 1e9:11,.0f}{least.link / 1e9:8,.0f}"
            f"{ours.seconds:9.2f}{least.seconds:8.2f}"
        )
    lines.append(f"{'in all':75}{total:9.2f}{total_best:8.2f}")
    return "\n".join(lines)


def main(config: Config) -> None:
    shape = QWEN_7B
    if config.model:
        shape = read_config(model_folder(config.model))
    print(table(shape, config))


if __name__ == "__main__":
    cli.run(main, Config)
