"""The algorithms of rl.py as plain values, and its flags.

A recipe says which baseline, which reward, where the KL enters, what is averaged over, and the numbers that go with it
in its paper. What the words mean is in rl.py (T1) and relatives.py (all others).
"""

import math
from dataclasses import dataclass, fields, replace
from typing import Literal

from cli import UserError
from tasks import LARGEST_GIVEN, PATTERNS, check_largest, check_numbers, check_operators


@dataclass(frozen=True)
class Recipe:
    """What an algorithm is made of. Its numbers can be overridden by the flags of the same names."""

    advantage: Literal["leave_one_out", "group_mean", "group_normalised", "batch_mean", "critic"]
    reward: Literal["outcome", "soft_overlong", "exploration"] = "outcome"  # see `rl.shape_rewards`
    penalty: Literal["set", "advantage", "none"] = "none"  # what an unexpected pattern costs, see `rl.penalise`
    kl: Literal["reward", "loss"] = "reward"  # where the KL to the anchor enters, if kl_coef is not 0
    mean: Literal["token", "sequence", "constant"] = "token"  # see `relatives.token_weights`
    resample: bool = False  # dynamic sampling: prompts are drawn until enough groups hold right and wrong responses
    lr: float = 1e-6
    temperature: float = 1.0
    kl_coef: float = 0.0
    entropy_coef: float = 0.0
    anchor_decay: float = 1.0
    clip_low: float = 0.2
    clip_high: float = 0.2

    @property
    def by_group(self) -> bool:
        """Whether a group of equal rewards has only zero advantages, so that nothing is lost by dropping it."""
        return self.advantage not in ("batch_mean", "critic")


RECIPES = {
    "t1": Recipe(
        "leave_one_out", penalty="set", lr=1.5e-6, temperature=1.2, kl_coef=2e-4, entropy_coef=1e-3, anchor_decay=0.99
    ),
    "rlsp": Recipe("critic", "exploration", lr=2e-7, kl_coef=0.05),
    "grpo": Recipe("group_normalised", kl="loss", mean="sequence", kl_coef=0.04),
    "dr_grpo": Recipe("group_mean", mean="constant"),
    "dapo": Recipe("group_normalised", "soft_overlong", resample=True, clip_high=0.28),
    "reinforce": Recipe("batch_mean"),
}


@dataclass
class Config:
    model: str
    """Hugging Face folder, or run folder, of the policy to start from (T1: the SFT model)."""
    out: str
    """Run folder: config.json, metrics.jsonl, checkpoints/, a figure, and in the end the policy in OUT/model."""
    task: Literal["countdown", ""] = ""
    """Problems made by program, instead of --data."""
    data: str = ""
    """Problem file, JSONL: `problem` (or `question`) and `answer`."""
    recipe: Literal["t1", "rlsp", "grpo", "dr_grpo", "dapo", "reinforce"] = "t1"
    """The algorithm; the README has the table of what each switches."""
    steps: int = 100
    """Rollout batches, each followed by epochs * minibatches updates."""
    seed: int = 0
    """Seed of the problems' order and of every sampled token."""
    prompts: int = 32
    """Prompts per step (T1: 32)."""
    samples: int = 64
    """K, responses per prompt: oversampling (T1: 64; more is better, and buys more reward per KL)."""
    max_tokens: int = 1024
    """Length at which a response is cut off, and counts as overlong."""
    epochs: int = 1
    """Passes of the PPO loop over each rollout batch (1, with 1 minibatch, is exactly on-policy)."""
    minibatches: int = 1
    """Updates per pass."""
    lr: float | None = None
    """Learning rate (T1: 1.5e-6; a small model wants more)."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """What moves the blocks' matrices; muon is for small models, see muon.py."""
    temperature: float | None = None
    """Sampling temperature; it divides the logits in training too (T1: 1.2; at or below 1 training may collapse)."""
    kl_coef: float | None = None
    """Weight of the KL to the anchor (T1: 2e-4)."""
    penalty: Literal["set", "advantage", "none"] | None = None
    """What an unexpected pattern costs: set: reward -1 (T1). advantage: reward 0, then advantage -1, even where all K
    show one. none: nothing."""
    patterns: tuple[Literal["overlong", "repeated", "garbled"], ...] = PATTERNS
    """Which patterns are unexpected; T1 ablates them."""
    repeat_ngram: int = 20
    """A response repeats itself if some n-gram of so many tokens ..."""
    repeat_times: int = 4
    """... stands in it so many times. (T1 names no numbers; short chains want smaller ones.)"""
    entropy_coef: float | None = None
    """Weight of the token-level entropy bonus: raise it if entropy collapses, lower it if responses turn garbled."""
    entropy_target: float | None = None
    """Entropy in nats per token to be held by adapting --entropy-coef at every step (none: it stays as it is)."""
    anchor_decay: float | None = None
    """Decay of the anchor's moving average: 1 keeps it where the run began, 0 makes it the policy itself."""
    clip_low: float | None = None
    """PPO: the ratio's lower bound is 1 - clip_low."""
    clip_high: float | None = None
    """PPO: the ratio's upper bound is 1 + clip_high (DAPO raises it, so that rare tokens can grow)."""
    length_cost: float = 1000.0
    """RLSP: c of the reward's - c / length, in tokens (1000 suits chains of thousands)."""
    judge: str = ""
    """RLSP: model folder of a judge of creativity and effort, whose score replaces the length in the reward."""
    trace: float = 1.0
    """RLSP: GAE's lambda: 0 trusts the critic one step ahead, 1 only the whole return, which is unbiased."""
    numbers: int = 3
    """Countdown: how many numbers."""
    largest: int = LARGEST_GIVEN
    """Countdown: the numbers are drawn from 1 to this."""
    operators: str = "+-*"
    """Countdown: which operators; / divides exactly."""
    warmup: int = 0
    """Steps over which the learning rate rises to its value: Adam's first steps are its wildest."""
    cooldown: int = 0
    """Steps at the end over which it falls again: at a constant rate a small policy jitters around its own average."""
    max_grad_norm: float = 1.0
    """Longer gradients are scaled down to this."""
    micro_tokens: int | None = None
    """Tokens per forward pass of a rank (None: 8,192 on a GPU, 2,048 on a CPU): bounds memory, changes no result."""
    recompute: bool = False
    """Recompute activations in the backward pass: a third more time for far less memory."""
    checkpoint_every: int = 10
    """Steps between checkpoints; the last two are kept."""
    keep_every: int = 0
    """Also keep, for good, the checkpoint of every so many steps (0: none): to measure how RL went, see --step."""
    start_kl: bool = False
    """Also log the KL to the policy that the run began with: one more copy of the weights,
    and one more pass."""
    show_every: int = 10
    """Steps between responses shown on the terminal (0: none)."""
    resume: bool = False
    """Go on from the newest checkpoint in --out."""
    export: str = ""
    """Do not train: write the policy of a checkpoint in --out to this Hugging Face folder."""
    step: int | None = None
    """With --export: the checkpoint of this step (none: the newest)."""
    max_batch: int = 1024
    """Sequences decoded at once, at most."""
    log: Literal["none", "tensorboard", "wandb"] = "none"
    """Where the metrics go besides metrics.jsonl."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the matrix products and of the sampler's copy; the master weights are float32 in any case."""


MAY_CHANGE = (
    "out", "steps", "resume", "export", "step", "log", "show_every", "checkpoint_every", "keep_every",
    "micro_tokens", "max_batch", "device", "recompute",
)  # fmt: skip
"""Flags that --resume accepts with another value (a folder may have moved). All others would make it another run."""


def resolve(config: Config) -> Recipe:
    """The recipe with the numbers that flags override."""
    recipe = RECIPES[config.recipe]
    given = {f.name: getattr(config, f.name) for f in fields(recipe) if getattr(config, f.name, None) is not None}
    return replace(recipe, **given)


def check(config: Config, recipe: Recipe) -> None:
    """What can be known to be wrong before anything is loaded."""
    if bool(config.task) == bool(config.data):
        raise UserError("exactly one of --task and --data says where the problems come from")
    counts = "steps prompts samples max_tokens epochs minibatches micro_tokens checkpoint_every max_batch repeat_ngram"
    for name in counts.split():
        if (value := getattr(config, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    for name in ("lr", "temperature"):
        if not 0 < getattr(recipe, name) < math.inf:
            raise UserError(f"--{name} must be above 0 in training, not {getattr(recipe, name)}")
    for name in ("warmup", "cooldown", "show_every", "keep_every"):
        if getattr(config, name) < 0:
            raise UserError(f"--{name.replace('_', '-')} must not be below 0, but is {getattr(config, name)}")
    for name in ("kl_coef", "entropy_coef", "clip_low", "clip_high"):
        if not getattr(recipe, name) >= 0:
            raise UserError(f"--{name.replace('_', '-')} must not be below 0, but is {getattr(recipe, name)}")
    for name, value in (("anchor-decay", recipe.anchor_decay), ("trace", config.trace)):
        if not 0 <= value <= 1:
            raise UserError(f"--{name} must lie between 0 and 1, but is {value}")
    if config.repeat_times < 2:
        raise UserError(f"--repeat-times must be at least 2, not {config.repeat_times}")
    if not config.max_grad_norm > 0:
        raise UserError(f"--max-grad-norm must be above 0, not {config.max_grad_norm}")
    if recipe.reward == "soft_overlong" and config.max_tokens < 5:
        raise UserError(f"--max-tokens {config.max_tokens}: the recipe {config.recipe} lets a fifth of it be a buffer")
    check_numbers(config.numbers)
    check_largest(config.largest)
    check_operators(config.operators)
    if config.step is not None and not config.export:
        raise UserError(f"--step {config.step} says which checkpoint to --export; for the length of a run, see --steps")
    if config.keep_every % config.checkpoint_every:
        raise UserError(f"--keep-every {config.keep_every} must be a multiple of --checkpoint-every")
    if recipe.penalty == "advantage" and recipe.advantage == "critic":
        raise UserError(f"--penalty advantage: the recipe {config.recipe} has an advantage per token, not per response")
    if config.samples < 2 and recipe.by_group:
        raise UserError(f"--samples 1: the recipe {config.recipe} compares each response with others of its prompt")
    if config.judge and recipe.reward != "exploration":
        raise UserError(f"--judge: the recipe {config.recipe} has no use for a judge (rlsp has)")
    if config.entropy_target is not None and min(config.entropy_target, recipe.entropy_coef) <= 0:
        raise UserError("--entropy-target must be above 0, and so must --entropy-coef, from which it starts")
