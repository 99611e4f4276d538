"""T1 stage 2: reinforcement learning that rewards thinking further (arXiv 2501.11651), and its relatives.

    python rl.py --model DIR --task countdown --steps 100 --out runs/rl
    torchrun --standalone --nproc_per_node=8 rl.py --recipe t1 --model DIR --data problems.jsonl --out runs/rl
    python rl.py ... --out runs/rl --resume                                  # goes on where it was killed, bit for bit
    python rl.py --model DIR --out runs/rl --export DIR2 [--step 30]         # a checkpoint as a model folder

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
7. The learning rate may rise at the start (--warmup) and fall at the end (--cooldown). Neither is the default, for
   the demo ends no better with them (benchmarks/RESULTS.md). With a cool-down the number of steps is part of
   the run: --resume then refuses another.
8. Centring the KL matters only to a baseline that does not subtract it anyway; leave-one-out does, see `centred_kl`.

GRPO, Dr. GRPO, DAPO, REINFORCE and RLSP are the same loop with other pieces: relatives.py; what each takes: recipes.py.
"""

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import cli
import parallel
import relatives
import runfolder
from cli import UserError
from model import load_pretrained
from muon import make_optimizers
from packing import Example, Packed
from parallel import Scorer, World
from recipes import MAY_CHANGE, Config, Recipe, check, resolve
from relatives import Critic
from rollout import Rollouts, Stopwatch, nth_problem, read_problems, roll_out, unexpected_pattern
from sample import Sampler, SamplingParams
from tasks import Problem
from tokenizer import Tokenizer, load_tokenizer

# --- T1, one idea per function ----------------------------------------------------------------------------------------


def penalise(values: Tensor, patterns: list[str | None], to: float = -1.0) -> Tensor:
    """T1's penalty: -1 (or `to`) for every response that shows an unexpected pattern, whatever its answer. [N] -> [N].

    By --penalty set, as T1, the values are the rewards: a group in which all K responses run away is then a group of
    equal rewards, and is not pushed back. By --penalty advantage, as the code that T1's authors published later, the
    rewards are set to 0, and then the *advantages* to -1: now it is.
    """
    return torch.where(unexpected(patterns), to, values)


def unexpected(patterns: list[str | None]) -> Tensor:
    """Which responses show an unexpected pattern, bool [N]."""
    return torch.tensor([pattern is not None for pattern in patterns])


def centred_kl(logprob: Tensor, anchor_logprob: Tensor, mask: Tensor) -> Tensor:
    """On-policy KL of each response to the anchor, in nats, less its mean over the batch. Inputs [N, T], output [N].

    Centred, it cannot push all responses up or down at once; it only prefers those nearer to the anchor. As in the
    paper; with leave-one-out, or any baseline that subtracts a constant from all, the mean cancels: it changes nothing.
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


def adapt_entropy_coef(coef: float, entropy: float, target: float, rate: float = 0.05) -> float:
    """Adaptive entropy: the coefficient rises while entropy is below `target` and falls above it, in log space."""
    return coef * math.exp(rate * max(-1.0, min(1.0, (target - entropy) / target)))


def truncated_importance(old: Tensor, sampled: Tensor, most: float = 2.0) -> Tensor:
    """Weights of tokens that a slightly different policy sampled (in bf16, say): min(pi_old / pi_sampler, most)."""
    return (old - sampled).exp().clamp(max=most)


# --- one step ---------------------------------------------------------------------------------------------------------


@dataclass
class Learner:
    """The policy and everything that moves with it, or is asked about its responses."""

    policy: Scorer
    anchor: Scorer | None  # None: the recipe has no KL
    optimizers: dict[str, torch.optim.Optimizer]  # by name; "adamw" has the critic's parameters too, if there is one
    sampler: Sampler
    tokenizer: Tokenizer
    world: World
    exact: bool  # sampler and trainer both compute in fp32 on the same weights: their log-probs agree to 1e-5
    critic: Critic | None = None
    start: Scorer | None = None  # the policy that the run began with, if the KL to it is to be logged
    judge: tuple[Sampler, Tokenizer] | None = None

    def cut(self, config: Config) -> tuple[int | None, int, World]:
        """How to cut work into micro-batches: the arguments of `parallel.micro_batches` after the examples."""
        return config.micro_tokens, self.policy.model.config.dim, self.world


def collect(learner: Learner, problems: list[Problem], cursor: int, config: Config, recipe: Recipe, watch: Stopwatch):
    """(rollouts, new cursor). Dynamic sampling draws prompts until `prompts` groups are mixed, or 3 times as many."""
    params = SamplingParams(config.max_tokens, recipe.temperature, seed=config.seed)
    rollouts = Rollouts([], [], [], [], [], [])
    find_pattern = partial(
        unexpected_pattern, patterns=config.patterns, ngram=config.repeat_ngram, times=config.repeat_times
    )
    for _ in range(3 if recipe.resample else 1):
        numbers = range(cursor, cursor + config.prompts)
        # Problems made by program come as they were made, so that a longer run begins as a shorter one.
        numbered = [(n, problems[n] if config.task else nth_problem(problems, n, config.seed)) for n in numbers]
        rollouts += roll_out(
            learner.sampler, learner.tokenizer, numbered, config.samples, params, learner.world, watch, find_pattern
        )
        cursor = numbers.stop
        if mixed_groups(rollouts.outcomes(), config.samples).sum() >= config.prompts:
            break
    return rollouts, cursor


def shape_rewards(learner: Learner, rollouts: Rollouts, config: Config, recipe: Recipe) -> Tensor:
    """What each response earns before the KL, [N]."""
    rewards, lengths = rollouts.outcomes(), rollouts.lengths()
    if recipe.reward == "soft_overlong":
        rewards = rewards + relatives.soft_overlong(lengths, config.max_tokens, config.max_tokens // 5)
    if recipe.reward == "exploration":
        judged = (
            relatives.judge(*learner.judge, rollouts.problems, rollouts.texts, learner.world) if learner.judge else None
        )
        rewards = relatives.exploration_reward(rollouts.verdicts, lengths, config.length_cost, judged)
    if recipe.penalty == "none":
        return rewards
    return penalise(rewards, rollouts.patterns, to=-1.0 if recipe.penalty == "set" else 0.0)


def mixed_groups(rewards: Tensor, samples: int) -> Tensor:
    """Which groups hold different rewards; the others have no gradient under a group's baseline. [N] -> bool [P]."""
    groups = rewards.view(-1, samples)
    return (groups != groups[:, :1]).any(dim=1)


@torch.no_grad()
def per_token(function: Callable[[Packed], Tensor], examples: list[Example], cut: tuple) -> list[Tensor]:
    """What `function` (packed rows -> [R, T]) says of every response token: a tensor per example, on every rank.

    cut: see `Learner.cut`.
    """
    found = {}
    for rows, packed in parallel.micro_batches(examples, *cut):
        values = packed.extract(function(packed).cpu())
        found |= dict(zip(rows, (value.clone() for value in values)))  # a view is pickled with all that it views
    merged = {i: values for share in parallel.gather_objects(found) for i, values in share.items()}
    return [merged[i] for i in range(len(examples))]


def minibatches(size: int, config: Config, step: int) -> Iterator[list[int]]:
    """The PPO loop: `epochs` passes over the batch, each shuffled anew and cut into `minibatches` parts."""
    for epoch in range(config.epochs):
        order = list(range(size))
        random.Random(f"minibatches {config.seed} {step} {epoch}").shuffle(order)
        yield from (order[part :: config.minibatches] for part in range(min(config.minibatches, size)))


ADVANTAGES = {
    "leave_one_out": leave_one_out,
    "group_mean": relatives.group_mean,
    "group_normalised": relatives.group_normalised,
    "batch_mean": relatives.batch_mean,
}


@dataclass
class Batch:
    """What the PPO loop trains on: one entry per response in each list, a number or a tensor with one per token."""

    examples: list[Example]
    old: list[Tensor]  # log-probs of the policy that sampled
    anchor: list[Tensor]  # log-probs of the anchor; empty if nothing weighs them
    advantages: list[float] | list[Tensor]
    weights: list[Tensor]  # per token, see `token_weights`; times the truncated importance weights
    returns: list[Tensor] = field(default_factory=list)  # the critic's targets; empty without one


def prepare(learner: Learner, rollouts: Rollouts, config: Config, recipe: Recipe) -> tuple[Batch, dict[str, float]]:
    """Rewards to advantages. Groups that carry no gradient are dropped first, before any forward pass."""
    rewards, outcomes = shape_rewards(learner, rollouts, config, recipe), rollouts.outcomes()
    mixed = mixed_groups(outcomes if recipe.resample else rewards, config.samples)
    shown = unexpected(rollouts.patterns)
    if recipe.penalty == "advantage":
        mixed = mixed | shown.view(-1, config.samples).any(dim=1)
    metrics = {
        "reward": rewards.mean().item(),
        "accuracy": outcomes.mean().item(),
        "pass_at_k": outcomes.view(-1, config.samples).amax(dim=1).mean().item(),
        "length": rollouts.lengths().mean().item(),
        "dropped": 1 - mixed.float().mean().item(),
        "unexpected": shown.float().mean().item(),
        "truncated": rollouts.unended().mean().item(),
    }
    groups = mixed.nonzero().flatten().tolist()[: config.prompts] if recipe.by_group else range(len(mixed))
    if not groups:
        return Batch([], [], [], [], []), metrics
    rows = [group * config.samples + i for group in groups for i in range(config.samples)]
    kept, rewards = rollouts.select(rows), rewards[rows]
    lengths = kept.lengths()
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).float()

    def padded(values: list[Tensor]) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(values, batch_first=True)

    def ragged(grid: Tensor) -> list[Tensor]:
        return [row[: int(length)] for row, length in zip(grid, lengths)]

    def logprobs(scorer: Scorer) -> list[Tensor]:
        return per_token(lambda packed: parallel.score(scorer, packed, recipe.temperature)[0], *passes)

    passes = (kept.examples, learner.cut(config))
    sampled = [torch.tensor(c.logprobs) for c in kept.completions]
    old = sampled if learner.exact else logprobs(learner.policy)
    anchor, kl = [], torch.zeros_like(mask)
    if learner.anchor:
        anchor = logprobs(learner.anchor)
        kl = (padded(old) - padded(anchor)) * mask
        metrics["kl"] = kl.sum(dim=1).mean().item()
    if learner.start:
        moved = (padded(old) - padded(logprobs(learner.start))) * mask
        metrics["kl_start"] = moved.sum(dim=1).mean().item()

    weights = relatives.token_weights(lengths, mask, recipe.mean, config.max_tokens)
    if not learner.exact:
        weights = weights * truncated_importance(padded(old), padded(sampled))
        gap = (padded(old) - padded(sampled)).abs() * mask
        metrics |= {"mismatch": (gap.sum() / mask.sum()).item(), "mismatch_max": gap.max().item()}
    batch = Batch(kept.examples, old, anchor, [], ragged(weights))

    if recipe.advantage == "critic":
        values = padded(per_token(lambda packed: relatives.values_of(learner.critic, packed), *passes))
        advantages, returns = relatives.critic_advantages(rewards, recipe.kl_coef * kl, values, mask, config.trace)
        batch.advantages, batch.returns = ragged(advantages), ragged(returns)
    else:
        if anchor and recipe.kl == "reward":
            rewards = rewards - recipe.kl_coef * centred_kl(padded(old), padded(anchor), mask)
        advantages = ADVANTAGES[recipe.advantage](rewards.view(-1, config.samples)).flatten()
        if recipe.penalty == "advantage":
            advantages = penalise(advantages, kept.patterns)
        batch.advantages = advantages.tolist()
    return batch, metrics


def parameter_groups(learner: Learner) -> list[dict]:
    """Of all optimizers; each group has a learning rate."""
    return [group for optimizer in learner.optimizers.values() for group in optimizer.param_groups]


def zero_grad(learner: Learner) -> None:
    for optimizer in learner.optimizers.values():
        optimizer.zero_grad()


def update(learner: Learner, batch: Batch, config: Config, recipe: Recipe, step: int, guard: runfolder.Guard) -> dict:
    """The PPO loop over one batch: one optimizer step per minibatch."""
    sums = dict.fromkeys(("tokens", "entropy", "clipped", "value_loss", "gap", "gap_tokens"), 0.0)
    losses, norms = [], []
    widest = 0.0  # largest |log pi - log pi_old| of the first update, before the policy has moved
    for number, rows in enumerate(minibatches(len(batch.examples), config, step)):
        zero_grad(learner)
        token_count = sum(batch.examples[i].targets for i in rows)
        total = 0.0
        for part, packed in parallel.micro_batches([batch.examples[i] for i in rows], *learner.cut(config)):
            chosen, packed = [rows[j] for j in part], packed.to(learner.world.device)
            old, advantage, weight = (
                packed.place([values[i] for i in chosen]) for values in (batch.old, batch.advantages, batch.weights)
            )
            logprob, entropy = parallel.score(learner.policy, packed, recipe.temperature)
            loss = ppo_clip_loss(logprob, old, advantage, weight, recipe.clip_low, recipe.clip_high, token_count)
            loss = loss - recipe.entropy_coef * entropy_bonus(entropy, weight, token_count)
            if batch.anchor and recipe.kl == "loss":
                anchor = packed.place([batch.anchor[i] for i in chosen])
                loss = loss + recipe.kl_coef * relatives.k3_kl(logprob, anchor, weight, token_count)
            loss.backward()
            total += loss.item()
            if batch.returns:
                returns = packed.place([batch.returns[i] for i in chosen])
                values = relatives.values_of(learner.critic, packed)
                missed = relatives.value_loss(values, returns, packed.mask, token_count)
                missed.backward()
                sums["value_loss"] += missed.item() * token_count
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
        losses.append(parallel.sum_over_ranks(total))
        norms.append(parallel.clip_grad_norm(learner.policy, config.max_grad_norm))
        critic_norm = parallel.clip_grad_norm(learner.critic, config.max_grad_norm) if learner.critic else 0.0
        if guard.allows(loss=losses[-1], gradient=norms[-1], critic=critic_norm):
            for optimizer in learner.optimizers.values():
                optimizer.step()
    zero_grad(learner)  # the sampler can use the room
    sums = {name: parallel.sum_over_ranks(value) for name, value in sums.items()}
    metrics = {"loss": sum(losses) / len(losses), "grad_norm": sum(norms) / len(norms)}
    metrics |= {"entropy": sums["entropy"] / sums["tokens"], "clip_fraction": sums["clipped"] / sums["tokens"]}
    if learner.critic:
        metrics["value_loss"] = sums["value_loss"] / sums["tokens"]
    if learner.exact:
        metrics["mismatch"] = sums["gap"] / sums["gap_tokens"]
        metrics["mismatch_max"] = max(parallel.gather_objects(widest))
    return metrics


def train_step(
    step: int, learner: Learner, problems: list[Problem], state: dict, config: Config, guard: runfolder.Guard
):
    """(metrics, rollouts) of one step of T1; `state` (the data position, the entropy coefficient) moves on."""
    recipe, watch = replace(resolve(config), entropy_coef=state["entropy_coef"]), Stopwatch()
    rise, fall = step / max(config.warmup, 1), (config.steps + 1 - step) / (config.cooldown + 1)
    for group in parameter_groups(learner):
        group["lr"] = group["initial_lr"] * min(1.0, rise, fall)
    if learner.sampler.model is not learner.policy.model:
        parallel.copy_weights(learner.policy, learner.sampler.model)  # before the rollout: a resumed run has new ones
    rollouts, state["cursor"] = collect(learner, problems, state["cursor"], config, recipe, watch)
    with watch("training"):
        batch, metrics = prepare(learner, rollouts, config, recipe)
        metrics |= update(learner, batch, config, recipe, step, guard) if batch.examples else {"loss": 0.0}
        if learner.anchor:
            update_anchor(learner.anchor, learner.policy, recipe.anchor_decay)
    if config.entropy_target and "entropy" in metrics:
        metrics["entropy_coef"] = recipe.entropy_coef
        state["entropy_coef"] = adapt_entropy_coef(recipe.entropy_coef, metrics["entropy"], config.entropy_target)
    tokens = sum(len(c.tokens) for c in rollouts.completions)
    seconds = {f"seconds_{name}": value for name, value in watch.seconds.items()}
    metrics |= {"skipped": guard.skipped, "tokens_per_second": tokens / sum(watch.seconds.values())} | seconds
    return metrics, rollouts


# --- the run ----------------------------------------------------------------------------------------------------------


def alarms(history: list[dict], window: int = 5) -> list[str]:
    """What is going wrong, each with the knob that the paper turns: the last `window` steps against the rest."""

    def means(name: str) -> list[float]:
        values = [row[name] for row in history if name in row]
        return [sum(values[i : i + window]) / window for i in range(len(values) - window + 1)] or [math.nan]

    accuracy, entropy, truncated = means("accuracy"), means("entropy"), means("truncated")
    found = []
    if accuracy[-1] < 2 / 3 * max(accuracy):
        found.append(
            "reward collapse: accuracy fell by a third; raise --temperature (T1: 1.2) or --kl-coef, lower --lr"
        )
    if entropy[-1] < entropy[0] / 5:
        found.append("entropy collapse: a fifth of what it was; raise --entropy-coef or --temperature (T1: 1.2)")
    if truncated[-1] > max(0.2, 2 * truncated[0]):
        found.append("length run-away: too many responses never end; T1 penalises them; lower --entropy-coef")
    if len(history) > 1 and history[-1]["skipped"] > history[-2]["skipped"]:
        found.append("not finite: an update was skipped; lower --lr or --max-grad-norm, or use --dtype float32")
    return found


def make_learner(config: Config, recipe: Recipe, world: World) -> Learner:
    dtype = getattr(torch, config.dtype)

    def trained(wrap: type = Scorer) -> Scorer | Critic:
        return parallel.shard(load_pretrained(config.model), world, dtype, config.recompute, wrap)

    policy = trained()
    exact = dtype == torch.float32
    # One process in fp32 samples from the policy itself; otherwise the sampler has a copy of its own.
    alone = exact and world.size == 1
    actor = policy.model if alone else load_pretrained(config.model, dtype, world.device)
    tokenizer = load_tokenizer(config.model)
    optimizers = make_optimizers(policy, config.optimizer, recipe.lr)
    sampler = Sampler(actor, tokenizer, max_batch=config.max_batch)
    anchor = trained() if recipe.kl_coef else None
    learner = Learner(policy, anchor, optimizers, sampler, tokenizer, world, exact)
    if config.start_kl:
        learner.start = anchor if anchor and recipe.anchor_decay == 1 else trained()
    if recipe.advantage == "critic":
        learner.critic = trained(Critic)
        for group in parallel.adamw(learner.critic.parameters(), 10 * recipe.lr).param_groups:
            optimizers["adamw"].add_param_group(group)
    if config.judge:
        reader = load_tokenizer(config.judge)
        learner.judge = Sampler(load_pretrained(config.judge, dtype, world.device), reader, config.max_batch), reader
    for group in parameter_groups(learner):
        group["initial_lr"] = group["lr"]
    return learner


def export(config: Config, world: World) -> None:
    """The policy of a checkpoint in --out as a Hugging Face folder: of a run that is not finished, or of --step."""
    saved = parallel.complete_checkpoints(Path(config.out) / "checkpoints")
    if not saved:
        raise UserError(f"--export: there is no whole checkpoint in {config.out}")
    if config.step is not None:
        steps = [parallel.step_of(path) for path in saved]
        if config.step not in steps:
            held = ", ".join(map(str, steps))
            raise UserError(f"--export --step {config.step}: {config.out} holds the steps {held} (see --keep-every)")
        saved = [saved[steps.index(config.step)]]
    if Path(config.export).exists():
        raise UserError(f"--export: {config.export} exists already")
    cli.check_parent(config.export)
    policy = parallel.shard(load_pretrained(config.model), world)
    parallel.load_checkpoint(saved[-1], {"policy": policy}, world)
    parallel.save_model(policy, Path(config.export), load_tokenizer(config.model), world)


PANELS = {
    "reward": ["reward", "accuracy", "pass_at_k"],
    "length (tokens)": ["length"],
    "entropy (nats per token)": ["entropy"],
    "KL to the anchor and to the start (nats per response)": ["kl", "kl_start"],
    "share of responses": ["unexpected", "truncated", "dropped"],
    "sampler against trainer": ["mismatch", "mismatch_max"],
}


def train(config: Config, world: World) -> None:
    recipe = resolve(config)
    check(config, recipe)
    # The cool-down is counted from the end: with another number of steps, the steps already taken had the wrong rate.
    may_change = tuple(name for name in MAY_CHANGE if name != "steps" or not config.cooldown)
    runfolder.check_run(config.out, config, config.resume, may_change)
    problems = read_problems(config, recipe)
    learner = make_learner(config, recipe, world)
    out = runfolder.open_run(config.out, config, config.resume, may_change, world)
    parts = {"policy": learner.policy, "anchor": learner.anchor, "critic": learner.critic}
    parts = {name: part for name, part in parts.items() if part is not None} | learner.optimizers
    state, guard, done = {"cursor": 0, "entropy_coef": recipe.entropy_coef}, runfolder.Guard(), 0
    if saved := parallel.complete_checkpoints(out / "checkpoints"):
        found = parallel.load_checkpoint(saved[-1], parts, world, (*state, "skipped", "in_a_row"))
        done, state = found["step"], {name: found[name] for name in state}
        guard.skipped, guard.in_a_row = found["skipped"], found["in_a_row"]
    log = runfolder.MetricsLog(out, done, world, config.log)
    history = runfolder.read_metrics(log.path)
    checkpoints = parallel.Checkpoints(out / "checkpoints", world, keep_every=config.keep_every)
    steps = range(done + 1, config.steps + 1)
    bar = tqdm(steps, initial=done, total=config.steps, desc="rl", unit="step", disable=not world.main)
    for step in bar:
        metrics, rollouts = train_step(step, learner, problems, state, config, guard)
        log.write(step, metrics)
        history.append(metrics)
        if world.main:
            shown = ("reward", "accuracy", "length", "entropy", "tokens_per_second")
            bar.set_postfix({name: f"{metrics[name]:.3g}" for name in shown if name in metrics})
            before = alarms(history[:-1])  # an alarm is named when it begins, not for as long as it lasts
            for alarm in alarms(history):
                if alarm not in before:
                    bar.write(f"step {step}: {alarm}")
            if config.show_every and step % config.show_every == 0:
                bar.write(rollouts.show(step))
        if step % config.checkpoint_every == 0 or step == config.steps:
            counters = {"skipped": guard.skipped, "in_a_row": guard.in_a_row}
            checkpoints.save(step, parts, state | counters)
            if world.main:
                runfolder.plot(out / "metrics.jsonl", out / "metrics.png", PANELS)
    checkpoints.finish()
    parallel.save_model(learner.policy, out / "model", learner.tokenizer, world)


def main(config: Config) -> None:
    with parallel.session(config.device) as world:
        (export if config.export else train)(config, world)


if __name__ == "__main__":
    cli.run(main, Config)
