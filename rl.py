"""T1 stage 2: reinforcement learning that rewards thinking further (arXiv 2501.11651), and its relatives.

    python rl.py --model DIR --task countdown --steps 100 --out runs/rl
    torchrun --standalone --nproc_per_node=8 rl.py --recipe t1 --model DIR --data problems.jsonl --out runs/rl

One step: sample K responses to each prompt at a high temperature; judge them; turn outcomes into rewards (penalties, KL
to the anchor), rewards into advantages (leave-one-out); take PPO steps on them with an entropy bonus; move the anchor.
Each of these is one pure function below, in that order, and `train_step` calls them in that order.

With r_i the reward of the i-th of K responses y_i to a prompt x, pi the policy at temperature tau, ref the anchor:

    penalties         r'_i = -1 if y_i repeats itself, never ends, or is garbled; else r_i              `penalise`
    centred KL        k_i = sum_t log pi(y_it)/ref(y_it);  r''_i = r'_i - beta * (k_i - mean k)         `centred_kl`
    leave-one-out     A_i = r''_i - mean of the other K-1 rewards of the same prompt                     `leave_one_out`
    PPO               L = -1/M sum_it min(w_it A_i, clip(w_it, 1-e, 1+e') A_i),  w = pi / pi_old         `ppo_clip_loss`
    entropy bonus     L - alpha/M sum_it H(pi(. | x, y_<t)), H of the whole next-token distribution      `entropy_bonus`
    dynamic anchor    ref <- a * ref + (1 - a) * pi                                                      `update_anchor`

What we do differently from the paper, and why:

1. The update is a PPO loop (minibatches, epochs, clipped ratios). With one of each, its default, the ratio is 1 and the
   gradient is T1's on-policy gradient exactly (a test shows it).
2. The loss is divided once by the number of tokens M of the update, so a token weighs the same however the batch is
   split over minibatches, micro-batches and GPUs. The paper does not say how it normalises.
3. Groups whose K rewards are all equal are dropped before any forward pass: they carry no gradient but the
   regularisers'. Their share is logged (`dropped`).
4. Neither coefficient that the paper calls alpha is published. Ours (`entropy_coef`, `anchor_decay`) were chosen on the
   demo; see the README.
5. The temperature divides the logits in the trainer just as in the sampler. Otherwise the ratio compares two different
   policies. Sampling in training never truncates (no top-p, no min-p): the ratio would be biased by what was cut.
6. The KL is estimated on the sampled tokens (the sum of log-ratios), which needs one pass of the anchor and no more.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from itertools import islice
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

import cli
import parallel
import tasks
from cli import UserError
from model import load_pretrained, model_folder, read_config
from parallel import Example, Scorer, World
from rollout import Rollouts, Stopwatch, nth_problem, roll_out
from sample import Sampler, SamplingParams
from tasks import Problem
from tokenizer import Tokenizer, load_tokenizer

# --- T1, one idea per function ----------------------------------------------------------------------------------------


def penalise(outcomes: Tensor, patterns: list[str | None]) -> Tensor:
    """T1's penalty: -1 for every response that shows an unexpected pattern, whatever its answer. Both are [N]."""
    shows = torch.tensor([pattern is not None for pattern in patterns])
    return torch.where(shows, -1.0, outcomes)


def centred_kl(logprob: Tensor, anchor_logprob: Tensor, mask: Tensor) -> Tensor:
    """On-policy KL of each response to the anchor, in nats, less its mean over the batch. Inputs [N, T], output [N].

    Centred, it cannot push all responses up or down at once; it only prefers those nearer to the anchor.
    """
    kl = ((logprob - anchor_logprob) * mask).sum(dim=1)
    return kl - kl.mean()


def leave_one_out(rewards: Tensor) -> Tensor:
    """RLOO: each reward less the mean of the other K-1 of its prompt, an unbiased baseline. [P, K] -> [P, K]."""
    samples = rewards.shape[1]
    if samples < 2:
        raise UserError("leave-one-out needs at least 2 samples per prompt: with 1 there is no other to compare with")
    return (rewards - rewards.mean(dim=1, keepdim=True)) * (samples / (samples - 1))


def ppo_clip_loss(
    logprob: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    mask: Tensor,
    clip_low: float,
    clip_high: float,
    token_count: float,
) -> Tensor:
    """PPO's clipped surrogate, summed over the tokens of the mask and divided once by the update's `token_count`.

    All tensors are [N, T] (`advantage` may be [N, 1]). At ratio 1 its gradient is -A * grad log pi: REINFORCE's.
    """
    ratio = (logprob - old_logprob).exp()
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage)
    return -(surrogate * mask).sum() / token_count


def entropy_bonus(entropy: Tensor, mask: Tensor, token_count: float) -> Tensor:
    """Mean entropy, in nats, of the whole next-token distribution at the response's positions. [N, T] -> scalar."""
    return (entropy * mask).sum() / token_count


@torch.no_grad()
def update_anchor(anchor: torch.nn.Module, policy: torch.nn.Module, decay: float) -> None:
    """The dynamic anchor: ref <- decay * ref + (1 - decay) * policy. After n steps towards a fixed policy p:
    ref_n = decay^n ref_0 + (1 - decay^n) p. Shards move where they lie, so no rank talks to another."""
    for reference, parameter in zip(anchor.parameters(), policy.parameters()):
        parallel.local(reference).lerp_(parallel.local(parameter), 1 - decay)


# --- the relatives ----------------------------------------------------------------------------------------------------


def group_mean(rewards: Tensor) -> Tensor:
    """Dr. GRPO (arXiv 2503.20783): each reward less its prompt's mean. [P, K] -> [P, K]."""
    return rewards - rewards.mean(dim=1, keepdim=True)


def group_normalised(rewards: Tensor) -> Tensor:
    """GRPO (arXiv 2402.03300): also divided by the prompt's standard deviation. [P, K] -> [P, K]."""
    return group_mean(rewards) / (rewards.std(dim=1, keepdim=True) + 1e-4)


def batch_mean(rewards: Tensor) -> Tensor:
    """REINFORCE with the plainest baseline, the mean of the whole batch. [P, K] -> [P, K]."""
    return rewards - rewards.mean()


def k3_kl(logprob: Tensor, anchor_logprob: Tensor, mask: Tensor, token_count: float) -> Tensor:
    """GRPO's KL term of the loss: r - log r - 1 with r = anchor/policy, never negative. [N, T] -> scalar."""
    log_ratio = anchor_logprob - logprob
    return ((log_ratio.exp() - log_ratio - 1) * mask).sum() / token_count


def soft_overlong(lengths: Tensor, max_tokens: int, buffer: int) -> Tensor:
    """DAPO (arXiv 2503.14476): 0 up to max_tokens - buffer, then falling linearly to -1 at max_tokens. [N] -> [N]."""
    return ((max_tokens - buffer - lengths) / buffer).clamp(-1, 0)


def truncated_importance(old: Tensor, sampled: Tensor, most: float = 2.0) -> Tensor:
    """Weights of tokens that a slightly different policy sampled (in bf16, say): min(pi_old / pi_sampler, most)."""
    return (old - sampled).exp().clamp(max=most)


def token_weights(lengths: Tensor, mask: Tensor, mean: str, max_tokens: int) -> Tensor:
    """How a loss is averaged, as weights [N, T] for a sum that is then divided by the token count.

    "token": every token weighs the same (T1, DAPO). "sequence": every response weighs the same (GRPO: so a token of a
    long wrong answer weighs less). "constant": divided by max_tokens, whatever the lengths (Dr. GRPO).
    """
    if mean == "token":
        return mask
    average = lengths.sum() / len(lengths)
    return mask * (average / (lengths[:, None] if mean == "sequence" else max_tokens))


# --- recipes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """What an algorithm is made of. Its numbers can be overridden by the flags of the same names."""

    advantage: Callable[[Tensor], Tensor]  # rewards [P, K] -> advantages [P, K]
    penalty: Literal["patterns", "soft_overlong", "none"] = "none"
    kl: Literal["reward", "loss"] = "reward"  # where the KL to the anchor enters, if kl_coef is not 0
    mean: Literal["token", "sequence", "constant"] = "token"  # see `token_weights`
    resample: bool = False  # dynamic sampling: further prompts are drawn until enough groups have mixed rewards
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
        return self.advantage is not batch_mean


RECIPES = {
    "t1": Recipe(
        leave_one_out, "patterns", lr=1.5e-6, temperature=1.2, kl_coef=2e-4, entropy_coef=1e-3, anchor_decay=0.99
    ),
    "grpo": Recipe(group_normalised, kl="loss", mean="sequence", kl_coef=0.04),
    "dr_grpo": Recipe(group_mean, mean="constant"),
    "dapo": Recipe(group_normalised, "soft_overlong", resample=True, clip_high=0.28),
    "reinforce": Recipe(batch_mean),
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
    recipe: Literal["t1", "grpo", "dr_grpo", "dapo", "reinforce"] = "t1"
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
    """Learning rate of AdamW (T1: 1.5e-6; a small model wants more)."""
    temperature: float | None = None
    """Sampling temperature; it divides the logits in training too (T1: 1.2; at or below 1 training may collapse)."""
    kl_coef: float | None = None
    """Weight of the KL to the anchor (T1: 2e-4)."""
    entropy_coef: float | None = None
    """Weight of the token-level entropy bonus: raise it if entropy collapses, lower it if responses turn garbled."""
    anchor_decay: float | None = None
    """Decay of the anchor's moving average: 1 keeps it where the run began, 0 makes it the policy itself."""
    clip_low: float | None = None
    """PPO: the ratio's lower bound is 1 - clip_low."""
    clip_high: float | None = None
    """PPO: the ratio's upper bound is 1 + clip_high (DAPO raises it, so that rare tokens can grow)."""
    numbers: int = 3
    """Countdown: how many numbers."""
    operators: str = "+-*"
    """Countdown: which operators; / divides exactly."""
    warmup: int = 0
    """Steps over which the learning rate rises to its value: Adam's first steps are its wildest."""
    max_grad_norm: float = 1.0
    """Longer gradients are scaled down to this."""
    micro_tokens: int = 16384
    """Tokens per forward pass: bounds the memory, changes no result."""
    checkpoint_every: int = 10
    """Steps between checkpoints."""
    show_every: int = 10
    """Steps between responses shown on the terminal (0: none)."""
    resume: bool = False
    """Go on from the newest checkpoint in --out."""
    max_batch: int = 1024
    """Sequences decoded at once, at most."""
    log: Literal["none", "tensorboard", "wandb"] = "none"
    """Where the metrics go besides metrics.jsonl."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the matrix products and of the sampler's copy; the master weights are float32 in any case."""


def resolve(config: Config) -> Recipe:
    """The recipe with the numbers that flags override."""
    recipe = RECIPES[config.recipe]
    given = {f.name: getattr(config, f.name) for f in fields(recipe) if getattr(config, f.name, None) is not None}
    return replace(recipe, **given)


def check(config: Config, recipe: Recipe) -> None:
    """What can be known to be wrong before anything is loaded."""
    if bool(config.task) == bool(config.data):
        raise UserError("exactly one of --task and --data says where the problems come from")
    for name in ("steps", "prompts", "samples", "max_tokens", "epochs", "minibatches", "micro_tokens"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(config, name)}")
    if config.samples < 2 and recipe.by_group:
        raise UserError(f"--samples 1: the recipe {config.recipe} compares each response with others of its prompt")
    if recipe.temperature <= 0:
        raise UserError(f"--temperature must be above 0 in training, not {recipe.temperature}")


# --- one step ---------------------------------------------------------------------------------------------------------


@dataclass
class Learner:
    """The policy and everything that moves with it. `old` log-probs are the sampler's own if `exact`."""

    policy: Scorer
    anchor: Scorer
    optimizer: torch.optim.Optimizer
    sampler: Sampler
    tokenizer: Tokenizer
    world: World
    exact: bool  # sampler and trainer both compute in fp32 on the same weights: their log-probs agree to 1e-5


def shape_rewards(rollouts: Rollouts, config: Config, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """(rewards before the KL, whether each was right), both [N]."""
    outcomes = torch.tensor([float(verdict.correct) for verdict in rollouts.verdicts])
    if recipe.penalty == "patterns":
        return penalise(outcomes, rollouts.patterns), outcomes
    if recipe.penalty == "soft_overlong":
        lengths = torch.tensor([len(c.tokens) for c in rollouts.completions])
        return outcomes + soft_overlong(lengths, config.max_tokens, config.max_tokens // 5), outcomes
    return outcomes, outcomes


@torch.no_grad()
def response_logprobs(scorer: Scorer, examples: list[Example], temperature: float, tokens: int, world: World):
    """Log-prob of every response token under `scorer`: one fp32 tensor per example, on every rank."""
    found = {}
    for rows in parallel.micro_batches([len(example.tokens) for example in examples], tokens, world):
        packed = parallel.pack([examples[i] for i in rows])
        logprob, _ = parallel.score(scorer, packed, temperature)
        found |= dict(zip(rows, packed.extract(logprob.cpu())))
    merged = {i: values for share in parallel.gather_objects(found) for i, values in share.items()}
    return [merged[i] for i in range(len(examples))]


def minibatches(size: int, config: Config, step: int) -> Iterator[list[int]]:
    """The PPO loop: `epochs` passes over the batch, each shuffled anew and cut into `minibatches` parts."""
    for epoch in range(config.epochs):
        order = list(range(size))
        random.Random(f"minibatches {config.seed} {step} {epoch}").shuffle(order)
        yield from (order[part :: config.minibatches] for part in range(min(config.minibatches, size)))


@dataclass
class Batch:
    """What the PPO loop trains on: one entry per response in each list, a number or a tensor with one per token."""

    examples: list[Example]
    old: list[Tensor]  # log-probs of the policy that sampled
    anchor: list[Tensor]  # log-probs of the anchor; empty if nothing weighs them
    advantages: list[float]
    weights: list[Tensor]  # per token, see `token_weights`; times the truncated importance weights


def mixed_groups(rewards: Tensor, samples: int) -> Tensor:
    """Which groups hold different rewards; the others have no gradient under a group's baseline. [N] -> bool [P]."""
    groups = rewards.view(-1, samples)
    return (groups != groups[:, :1]).any(dim=1)


def prepare(learner: Learner, rollouts: Rollouts, config: Config, recipe: Recipe) -> tuple[Batch, dict[str, float]]:
    """Rewards to advantages. Groups that carry no gradient are dropped first, before any forward pass."""
    rewards, outcomes = shape_rewards(rollouts, config, recipe)
    mixed = mixed_groups(rewards, config.samples)
    metrics = {
        "reward": rewards.mean().item(),
        "accuracy": outcomes.mean().item(),
        "pass_at_k": outcomes.view(-1, config.samples).amax(dim=1).mean().item(),
        "length": sum(len(c.tokens) for c in rollouts.completions) / len(outcomes),
        "dropped": 1 - mixed.float().mean().item(),
        "penalised": sum(pattern is not None for pattern in rollouts.patterns) / len(outcomes),
        "truncated": rollouts.patterns.count("overlong") / len(outcomes),
    }
    rows = [i for i in range(len(outcomes)) if mixed[i // config.samples] or not recipe.by_group]
    if not rows:
        return Batch([], [], [], [], []), metrics
    kept, rewards = rollouts.select(rows), rewards[rows]
    lengths = torch.tensor([len(c.tokens) for c in kept.completions])
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).float()

    def padded(values: list[Tensor]) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(values, batch_first=True)

    sampled = [torch.tensor(c.logprobs) for c in kept.completions]
    passes = (kept.examples, recipe.temperature, config.micro_tokens, learner.world)
    old = sampled if learner.exact else response_logprobs(learner.policy, *passes)
    anchor = response_logprobs(learner.anchor, *passes) if recipe.kl_coef else []
    if anchor:
        metrics["kl"] = ((padded(old) - padded(anchor)) * mask).sum(dim=1).mean().item()
    if recipe.kl_coef and recipe.kl == "reward":
        rewards = rewards - recipe.kl_coef * centred_kl(padded(old), padded(anchor), mask)
    advantages = recipe.advantage(rewards.view(-1, config.samples)).flatten()

    weights = token_weights(lengths, mask, recipe.mean, config.max_tokens)
    if not learner.exact:
        weights = weights * truncated_importance(padded(old), padded(sampled))
        gap = (padded(old) - padded(sampled)).abs() * mask
        metrics |= {"mismatch": (gap.sum() / mask.sum()).item(), "mismatch_max": gap.max().item()}
    rows_of = [row[:length] for row, length in zip(weights, lengths)]
    return Batch(kept.examples, old, anchor, advantages.tolist(), rows_of), metrics


def update(learner: Learner, batch: Batch, config: Config, recipe: Recipe, step: int, guard: parallel.Guard) -> dict:
    """The PPO loop over one batch: one optimizer step per minibatch."""
    sums = dict.fromkeys(("tokens", "entropy", "clipped", "loss", "grad_norm", "updates", "gap", "gap_tokens"), 0.0)
    widest = 0.0  # largest |log pi - log pi_old| of the first update, before the policy has moved
    for number, rows in enumerate(minibatches(len(batch.examples), config, step)):
        learner.optimizer.zero_grad()
        token_count = sum(batch.examples[i].targets for i in rows)
        total = 0.0
        for part in parallel.micro_batches(
            [len(batch.examples[i].tokens) for i in rows], config.micro_tokens, learner.world
        ):
            chosen = [rows[j] for j in part]
            packed = parallel.pack([batch.examples[i] for i in chosen]).to(learner.world.device)
            old, advantage, weight = (
                packed.place([values[i] for i in chosen]) for values in (batch.old, batch.advantages, batch.weights)
            )
            logprob, entropy = parallel.score(learner.policy, packed, recipe.temperature)
            loss = ppo_clip_loss(logprob, old, advantage, weight, recipe.clip_low, recipe.clip_high, token_count)
            loss = loss - recipe.entropy_coef * entropy_bonus(entropy, weight, token_count)
            if batch.anchor and recipe.kl == "loss":
                anchor = packed.place([batch.anchor[i] for i in chosen])
                loss = loss + recipe.kl_coef * k3_kl(logprob, anchor, weight, token_count)
            loss.backward()
            total += loss.item()
            with torch.no_grad():
                gap = (logprob - old)[packed.mask]
                outside = (gap.exp() < 1 - recipe.clip_low) | (gap.exp() > 1 + recipe.clip_high)
                sums["tokens"] += len(gap)
                sums["entropy"] += entropy.sum().item()
                sums["clipped"] += outside.sum().item()
                if number == 0:
                    sums["gap"] += gap.abs().sum().item()
                    sums["gap_tokens"] += len(gap)
                    widest = max(widest, gap.abs().max().item() if len(gap) else 0.0)
        norm = parallel.clip_grad_norm(learner.policy, config.max_grad_norm)
        total = parallel.sum_over_ranks(total)
        if guard.allows(loss=total, gradient=norm):
            learner.optimizer.step()
        sums["loss"] += total / learner.world.size  # already a sum over ranks, and summed over them again below
        sums["grad_norm"] += norm / learner.world.size
        sums["updates"] += 1 / learner.world.size
    sums = {name: parallel.sum_over_ranks(value) for name, value in sums.items()}
    metrics = {
        "loss": sums["loss"] / max(sums["updates"], 1),
        "grad_norm": sums["grad_norm"] / max(sums["updates"], 1),
        "entropy": sums["entropy"] / max(sums["tokens"], 1),
        "clip_fraction": sums["clipped"] / max(sums["tokens"], 1),
    }
    if learner.exact:
        metrics["mismatch"] = sums["gap"] / max(sums["gap_tokens"], 1)
        metrics["mismatch_max"] = max(parallel.gather_objects(widest))
    return metrics


# --- the run ----------------------------------------------------------------------------------------------------------


def read_problems(config: Config) -> list[Problem]:
    """The problems to train on, all of which the model has room for. By program: as many as the run can use."""
    context = read_config(model_folder(config.model)).context
    tokenizer = load_tokenizer(config.model)
    if config.data:
        problems = tasks.load(config.data)
    else:
        stream = tasks.countdown(config.seed, numbers=config.numbers, operators=config.operators)
        problems = list(
            islice(stream, min(config.steps * config.prompts * (4 if resolve(config).resample else 1), 100_000))
        )
    for number, problem in enumerate(problems, start=1):
        length = len(tasks.prompt_ids(problem, tokenizer))
        if length + config.max_tokens > context:
            raise UserError(
                f"{config.data or config.task}, problem {number}: the prompt of {length} tokens and --max-tokens "
                f"{config.max_tokens} exceed the model's context of {context}"
            )
    return problems


def collect(learner: Learner, problems: list[Problem], cursor: int, config: Config, recipe: Recipe, watch: Stopwatch):
    """(rollouts, new cursor). With dynamic sampling, prompts are drawn until `prompts` groups are mixed (3 rounds)."""
    params = SamplingParams(config.max_tokens, recipe.temperature, seed=config.seed)
    wanted = config.prompts * config.samples
    found = Rollouts([], [], [], [], [], [])
    for _ in range(3):
        numbered = [(n, nth_problem(problems, n, config.seed)) for n in range(cursor, cursor + config.prompts)]
        cursor += config.prompts
        drawn = roll_out(learner.sampler, learner.tokenizer, numbered, config.samples, params, learner.world, watch)
        if not recipe.resample:
            return drawn, cursor
        mixed = mixed_groups(shape_rewards(drawn, config, recipe)[0], config.samples)
        found += drawn.select(i for i in range(wanted) if mixed[i // config.samples])
        if len(found.texts) >= wanted:
            break
    return found.select(range(min(len(found.texts), wanted))), cursor


def report(step: int, rollouts: Rollouts, learner: Learner) -> None:
    """One response, word for word: people want to read what the policy says."""
    i = step % len(rollouts.texts)
    verdict = rollouts.patterns[i] or rollouts.verdicts[i].outcome
    tqdm.write(f"--- step {step}: {rollouts.problems[i].question}\n{rollouts.texts[i]}\n--- {verdict}")


def make_learner(config: Config, recipe: Recipe, world: World) -> Learner:
    tokenizer = load_tokenizer(config.model)
    dtype = getattr(torch, config.dtype)
    policy = parallel.shard(load_pretrained(config.model), world, dtype)
    anchor = parallel.shard(load_pretrained(config.model), world, dtype)
    exact = dtype == torch.float32
    # One process in fp32 samples from the policy itself; otherwise the sampler has a copy of its own.
    alone = exact and world.size == 1
    actor = policy.model if alone else load_pretrained(config.model, dtype, world.device)
    sampler = Sampler(actor, tokenizer, max_batch=config.max_batch)
    return Learner(policy, anchor, parallel.adamw(policy, recipe.lr), sampler, tokenizer, world, exact)


def train_step(
    step: int, learner: Learner, problems: list[Problem], cursor: int, config: Config, guard: parallel.Guard
):
    """(metrics, rollouts, new cursor) of one step of T1."""
    recipe, watch = resolve(config), Stopwatch()
    for group in learner.optimizer.param_groups:
        group["lr"] = recipe.lr * min(1.0, step / max(config.warmup, 1))
    rollouts, cursor = collect(learner, problems, cursor, config, recipe, watch)
    with watch("training"):
        batch, metrics = prepare(learner, rollouts, config, recipe)
        if batch.examples:
            metrics |= update(learner, batch, config, recipe, step, guard)
            update_anchor(learner.anchor, learner.policy, recipe.anchor_decay)
        if learner.sampler.model is not learner.policy.model:
            parallel.copy_weights(learner.policy, learner.sampler.model)
    tokens = sum(len(c.tokens) for c in rollouts.completions)
    seconds = {f"seconds_{name}": value for name, value in watch.seconds.items()}
    metrics |= {"skipped": guard.skipped, "tokens_per_second": tokens / sum(watch.seconds.values())} | seconds
    return metrics, rollouts, cursor


PANELS = {
    "reward": ["reward", "accuracy", "pass_at_k"],
    "length (tokens)": ["length"],
    "entropy (nats per token)": ["entropy"],
    "KL to the anchor (nats per response)": ["kl"],
    "share of responses": ["penalised", "truncated", "dropped"],
    "sampler against trainer": ["mismatch", "mismatch_max"],
}


def main(config: Config) -> None:
    recipe = resolve(config)
    check(config, recipe)
    with parallel.session(config.device) as world:
        problems = read_problems(config)
        learner = make_learner(config, recipe, world)
        out = parallel.open_run(config.out, config, config.resume, ("steps", "resume", "log", "show_every"), world)
        parts = {"policy": learner.policy, "anchor": learner.anchor, "optimizer": learner.optimizer}
        state = {"step": 0, "cursor": 0, "skipped": 0}
        if saved := parallel.complete_checkpoints(out / "checkpoints"):
            state = parallel.load_checkpoint(saved[-1], parts, world)
        guard = parallel.Guard(skipped=state["skipped"])
        log = parallel.MetricsLog(out, state["step"], world, config.log)
        steps = range(state["step"] + 1, config.steps + 1)
        with tqdm(
            steps, initial=state["step"], total=config.steps, desc="rl", unit="step", disable=not world.main
        ) as bar:
            for step in bar:
                metrics, rollouts, state["cursor"] = train_step(step, learner, problems, state["cursor"], config, guard)
                log.write(step, metrics)
                shown = ("reward", "accuracy", "length", "entropy", "tokens_per_second")
                bar.set_postfix({name: f"{metrics[name]:.3g}" for name in shown if name in metrics})
                if world.main and config.show_every and step % config.show_every == 0:
                    report(step, rollouts, learner)
                if step % config.checkpoint_every == 0 or step == config.steps:
                    state["skipped"] = guard.skipped
                    parallel.save_checkpoint(out / "checkpoints", step, parts, state, world)
                    if world.main:
                        parallel.plot(out / "metrics.jsonl", out / "metrics.png", PANELS)
        parallel.save_model(learner.policy, out / "model", learner.tokenizer, world)


if __name__ == "__main__":
    cli.run(main, Config)
