"""T1 stage 2: reinforcement learning that rewards thinking further (arXiv 2501.11651).

    python rl.py --model DIR --task countdown --out runs/rl
    torchrun --standalone --nproc_per_node=8 rl.py --model DIR --data problems.jsonl --out runs/rl
    python rl.py ... --out runs/rl --resume                     # goes on where it was killed
    python rl.py --model DIR --out runs/rl --export DIR2        # a checkpoint as a model folder

One step: sample K responses to each prompt at a high temperature; judge them; turn outcomes into
rewards (penalties, KL to the anchor), rewards into advantages (leave-one-out); take PPO steps on
them with an entropy bonus; move the anchor. From the outcomes on, each is one function below, in
that order, and `train_step` calls them in that order (the two of the loss by `policy_gradient`).

With r_i the reward of the i-th of K responses y_i to a prompt x, y_it its t-th token, pi the policy
at the temperature, pi_old the same before the step (it sampled, up to rounding), ref the anchor, M
the number of tokens of the update, beta `kl_coef`, alpha `entropy_coef`, a `anchor_decay`, eps
`clip_low` and eps' `clip_high`:

    penalties       r'_i = -1 if y_i repeats itself, never ends, or is garbled; else r_i `penalise`
    centred KL      k_i = sum_t log pi_old(y_it) / ref(y_it);
                    r''_i = r'_i - beta * (k_i - mean k)                               `centred_kl`
    leave-one-out   A_i = r''_i - mean of the other K-1 rewards of the same prompt  `leave_one_out`
    PPO             L = -1/M sum_it min(w_it A_i, clip(w_it, 1-eps, 1+eps') A_i),
                    w = pi / pi_old                                                 `ppo_clip_loss`
    entropy bonus   L - alpha/M sum_it H(pi(. | x, y_<t)),
                    H of the whole next-token distribution                          `entropy_bonus`
    dynamic anchor  ref <- a * ref + (1 - a) * pi                                   `update_anchor`

Rewards and advantages are one number for each response, [N] = [P * K] for P prompts. Log-probs, and
all that the loss is made of, are one number for each trained token, response after response: [M],
be it of a batch or of a part. What the loss is divided by is always the update's M, `token_count`.

What we do differently from the paper (GUIDE.md says why, in the part named):

1. The update is a PPO loop. With one epoch and one minibatch, the default, every ratio is 1 (up to
   rounding), and the gradient is T1's own (4).
2. The loss is divided once, by the number of tokens M of the update. The paper does not say how it
   normalises (4).
3. Groups of K responses whose advantages are all zero are dropped before the trainer's first
   forward pass (3). A recipe whose baseline is the mean of the whole batch drops none.
4. The paper calls two numbers alpha, the entropy bonus's weight and the anchor's decay, and
   publishes neither. Ours, alpha and a above, were chosen on the demo (5, 6).
5. The temperature divides the logits in training, too, and training never truncates: no top-p, no
   min-p (8).
6. The KL is the sum of log-ratios of the sampled tokens: one pass of the anchor and no more (6).
7. The learning rate may rise at the start (--warmup) and fall at the end (--cooldown). Neither is
   the default; the demo warms up, and its --long cools down, too. With a cool-down the number of
   steps is part of the run: --resume then refuses another.
8. An answer has to be worked out: a formula of the question in the box earns nothing (17).
9. Patterns are found by rule. The perplexity, by which T1 filters too, is off (7).
10. Where the sampler computes in bf16, tokens have truncated importance weights (8).

Other algorithms are the same loop with other pieces, see `RECIPES` and relatives.py. To add one,
write a file of your own: README.md, "Fork it". rlsp.py goes further: flags, models and a
`train_step` of its own.

Reading it for the first time? Down to `RECIPES`, and `teaching_groups`, `advantages_of`,
`give_log_probs`, `minibatches` and `descend` behind it. The rest is metrics, flags and the run's
bookkeeping.
"""

import math
import random
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

import alarms
import cli
import parallel
import pretrained
import relatives
import rollout
import runfolder
import tasks
import tensor_parallel
from cli import UserError
from model import ModelConfig, Transformer, model_folder, read_config, without_weights
from muon import make_optimizers
from packing import Packed
from parallel import Scorer, World
from rollout import Response, Stopwatch, flat, give, lengths, outcome
from runfolder import Run
from sample import Sampler, SamplingParams
from tasks import Problem
from tensor_parallel import SlicedTransformer
from tokenizer import Tokenizer, load_tokenizer, require_stop_token

# --- T1, one idea per function --------------------------------------------------------------------


def penalise(values: Tensor, patterns: list[str | None], to: float | None = -1.0) -> Tensor:
    """T1's penalty: -1 (or `to`; None: nothing) for every response that shows an unexpected
    pattern, whatever its answer. [N] -> [N].

    Of the rewards; by --penalty advantage of the advantages, see `PENALTIES` and GUIDE.md, part 7.
    """
    if to is None:
        return values
    return torch.where(unexpected(patterns), to, values)


def unexpected(patterns: list[str | None]) -> Tensor:
    """Which responses show an unexpected pattern, bool [N]."""
    return torch.tensor([pattern is not None for pattern in patterns])


def centred_kl(logprob: Tensor, anchor_logprob: Tensor, lengths: Tensor) -> Tensor:
    """On-policy KL of each response to the anchor, in nats, less the mean of the batch.
    [M], [M], [N] -> [N].

    Centred, it cannot push all responses up or down at once; it only prefers those nearer to the
    anchor. Leave-one-out would cancel the mean anyway: what counts in the end is k_i less the mean
    k of the other K-1 responses to the prompt.
    """
    log_ratios = (logprob - anchor_logprob).double().split(lengths.tolist())
    kl = torch.stack([log_ratio.sum() for log_ratio in log_ratios])
    return kl - kl.mean()


def leave_one_out(rewards: Tensor) -> Tensor:
    """RLOO: each reward less the mean of the other K-1 of its prompt. [P, K] -> [P, K].

    An unbiased baseline: one's own reward is not in it. As a formula, (K r_i - sum r) / (K - 1).
    """
    samples = rewards.shape[1]
    if samples < 2:
        raise UserError("leave-one-out needs at least 2 samples per prompt, to compare them")
    return (rewards - rewards.mean(dim=1, keepdim=True)) * (samples / (samples - 1))


def ppo_clip_loss(
    logprob: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    weight: Tensor,
    clip_low: float,
    clip_high: float,
    token_count: float,
) -> Tensor:
    """PPO's clipped surrogate: summed over tokens, divided once by the update's `token_count`.

    All tensors are [M]. weight: 1 for T1 in fp32; else a recipe's average, times the importance
    weight where the sampler computes in bf16. At ratio 1 the gradient is -A * grad log pi, the
    plain policy gradient (GUIDE.md, part 2; it is called REINFORCE).
    """
    ratio = (logprob - old_logprob).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    surrogate = torch.minimum(ratio * advantage, clipped * advantage)
    return -(surrogate * weight).sum() / token_count


def entropy_bonus(entropy: Tensor, weight: Tensor, token_count: float) -> Tensor:
    """Mean entropy, in nats, of the whole distribution that a token came from. [M] -> scalar."""
    return (entropy * weight).sum() / token_count


@torch.no_grad()
def update_anchor(anchor: nn.Module, policy: nn.Module, decay: float) -> None:
    """The dynamic anchor: ref <- decay * ref + (1 - decay) * policy.

    Shards move where they lie, so no rank talks to another.
    """
    for slow, fast in zip(anchor.parameters(), policy.parameters()):
        parallel.local(slow).lerp_(parallel.local(fast), 1 - decay)


# --- one step of T1 -------------------------------------------------------------------------------


def train_step(learner: "Learner", responses: list[Response], step: int) -> dict[str, float]:
    """One step of T1 on P * K judged responses, prompt after prompt; its metrics.

    `recipe` has the pieces in which algorithms differ. T1's are `outcome`, `leave_one_out`, and no
    KL in the loss.
    """
    config, recipe = learner.config, learner.recipe

    # What each response is worth, and which groups leave before any forward pass.
    outcomes = rewards_of(responses, config, recipe)
    rewards = penalise(outcomes, patterns_of(responses), PENALTIES[recipe.penalty].reward)
    for response, reward in zip(responses, rewards.tolist()):
        response.reward = reward
    metrics = describe(responses, rewards, config.samples) | {"loss": 0.0}
    teaching = teaching_groups(responses, rewards, config, recipe)
    groups = torch.arange(len(responses)).view(-1, config.samples)  # numbers of the responses
    # A recipe with `resample` may have drawn more than are wanted.
    kept = groups[teaching][: config.prompts].flatten()
    if drops_groups(recipe, config.samples):
        metrics["dropped"] = 1 - len(kept) / len(responses)
    batch = [responses[i] for i in kept.tolist()]

    if batch:
        # From rewards to advantages, which all tokens of a response share.
        metrics |= give_log_probs(learner, batch)  # .old, .anchor and .weight of each response
        sizes = lengths(batch)
        less_kl = rewards[kept]
        if learner.anchor and not recipe.kl_loss:
            kl = centred_kl(flat(batch, "old"), flat(batch, "anchor"), sizes)
            less_kl = less_kl - recipe.kl_coef * kl
        advantages = advantages_of(less_kl, patterns_of(batch), config, recipe)
        give(batch, "advantage", advantages.repeat_interleave(sizes))

        # The PPO loop: one update for each minibatch.
        tally = Tally()
        for chosen in minibatches(len(batch), config, step):
            policy_gradient(learner, [batch[i] for i in chosen], tally)
            descend(learner, tally)
        metrics |= tally.metrics(learner.exact)

    if learner.anchor:
        update_anchor(learner.anchor, learner.policy, recipe.anchor_decay)
    return metrics


def policy_gradient(learner: "Learner", responses: list[Response], tally: "Tally") -> None:
    """The loss of one minibatch, micro-batch by micro-batch; its gradient is left in the policy."""
    recipe = learner.recipe
    device = learner.world.device
    dtype = next(learner.policy.parameters()).dtype
    old_logprob = flat(responses, "old").to(device, dtype)
    anchor_logprob = flat(responses, "anchor").to(device, dtype)
    advantage = flat(responses, "advantage").to(device, dtype)
    weight = flat(responses, "weight").to(device, dtype)
    token_count = len(old_logprob)
    for at, packed in learner.micro_batches(responses):
        logprob, entropy = parallel.log_probs(learner.policy, packed, recipe.temperature)
        old = old_logprob[at]
        loss = ppo_clip_loss(
            logprob, old, advantage[at], weight[at], recipe.clip_low, recipe.clip_high, token_count
        )
        loss = loss - recipe.entropy_coef * entropy_bonus(entropy, weight[at], token_count)
        if recipe.kl_loss and learner.anchor:
            kl = recipe.kl_loss(logprob, anchor_logprob[at])
            loss = loss + recipe.kl_coef * (kl * weight[at]).sum() / token_count
        loss.backward()
        tally.add(loss, logprob, entropy, old, recipe)


# --- recipes --------------------------------------------------------------------------------------


class Penalty(NamedTuple):
    """What an unexpected pattern sets the reward to, and the advantage. None: it leaves it."""

    reward: float | None = None
    advantage: float | None = None


PENALTIES = {
    "set": Penalty(reward=-1.0),
    "advantage": Penalty(reward=0.0, advantage=-1.0),
    "none": Penalty(),
}
"""By --penalty. `set` is T1's. `advantage` is of later code of the same lab: a group that runs away
as a whole is pushed back, too."""


@dataclass(frozen=True)
class Recipe:
    """What an algorithm is made of. Its numbers are overridden by the flags of the same names."""

    reward: Callable[[list[Response], "Config"], Tensor] = outcome
    """(judged responses, flags) -> [N], before penalties. Every rank calls it, on all responses."""
    advantage: Callable[[Tensor], Tensor] | None = leave_one_out
    """Rewards [P, K] -> advantages [P, K]. None: a train_step of one's own makes them (rlsp.py)."""
    average: Callable[[Tensor, int], Tensor] = relatives.every_token
    """(lengths [N], max_tokens) -> [N]: how much the loss counts a token of each response."""
    kl_loss: Callable[[Tensor, Tensor], Tensor] | None = None
    """(log-probs [M], the anchor's [M]) -> [M], a term of the loss. None: in the reward, as T1."""
    resample: bool = False
    """Dynamic sampling: only groups with unequal outcomes, drawn until there are enough of them."""
    penalty: str = "none"
    """What an unexpected pattern costs: see `PENALTIES`."""
    lr: float = 1e-6
    temperature: float = 1.0
    kl_coef: float = 0.0
    entropy_coef: float = 0.0
    anchor_decay: float = 1.0
    clip_low: float = 0.2
    clip_high: float = 0.2

    def __post_init__(self) -> None:
        if self.penalty not in PENALTIES:
            raise UserError(f"penalty {self.penalty!r} is none of {', '.join(PENALTIES)}")


RECIPES = {
    "t1": Recipe(
        penalty="set",
        lr=1.5e-6,
        temperature=1.2,
        kl_coef=2e-4,
        entropy_coef=1e-3,
        anchor_decay=0.99,
    ),
    "grpo": Recipe(
        advantage=relatives.group_normalised,
        average=relatives.every_response,
        kl_loss=relatives.k3_kl,
        kl_coef=0.04,
    ),
    "dr_grpo": Recipe(advantage=relatives.group_mean, average=relatives.by_the_limit),
    "dapo": Recipe(
        reward=relatives.outcome_and_length,
        advantage=relatives.group_normalised,
        resample=True,
        clip_high=0.28,
    ),
    "reinforce": Recipe(advantage=relatives.batch_mean),
}


# --- the pieces of a step (at first reading: the functions that the docstring names) --------------


@dataclass
class Learner:
    """The policy, everything that moves with it, and what it is asked."""

    config: "Config"  # the flags, with `max_tokens` and `dtype` resolved
    recipe: Recipe  # with the numbers that flags override
    problems: list[Problem]
    world: World
    tokenizer: Tokenizer
    sampler: Sampler
    models: dict[str, nn.Module]  # that are trained: "policy", and what a fork adds
    optimizers: dict[str, torch.optim.Optimizer]
    anchor: Scorer | None = None  # None: the recipe has no KL
    start: Scorer | None = None  # the first policy of the run, if the KL to it is to be logged
    exact: bool = True  # sampler and trainer compute in fp32: their log-probs agree
    guard: runfolder.Guard = field(default_factory=runfolder.Guard)
    cursor: int = 0  # how many problems have been drawn
    inputs: dict[str, str] = field(default_factory=dict)  # see `Run.check_inputs`

    def __post_init__(self) -> None:
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group.setdefault("initial_lr", group["lr"])

    @property
    def policy(self) -> Scorer:
        return self.models["policy"]

    def micro_batches(self, responses: list[Response]) -> Iterator[tuple[Tensor, Packed]]:
        """This rank's part of the responses, see `parallel.micro_batches`."""
        examples = [response.example for response in responses]
        tokens = self.config.micro_tokens
        dim = parallel.row_dim(self.policy.model)
        return parallel.micro_batches(examples, tokens, dim, self.world)

    def logprobs(self, scorer: Scorer, responses: list[Response]) -> Tensor:
        """Of each token of the responses, [M], on every rank."""
        temperature = self.recipe.temperature
        return self.token_values(
            lambda packed: parallel.log_probs(scorer, packed, temperature)[0], responses
        )

    def token_values(
        self, function: Callable[[Packed], Tensor], responses: list[Response]
    ) -> Tensor:
        """What `function` says of each token of the responses, see `parallel.values_of_all`."""
        examples = [response.example for response in responses]
        dim = parallel.row_dim(self.policy.model)
        return parallel.values_of_all(function, examples, self.config.micro_tokens, dim, self.world)


def patterns_of(responses: list[Response]) -> list[str | None]:
    return [response.pattern for response in responses]


def unequal_groups(values: Tensor, samples: int) -> Tensor:
    """Which groups of `samples` hold different values. [N] -> bool [P]."""
    groups = values.view(-1, samples)
    return (groups != groups[:, :1]).any(dim=1)


def rewards_of(responses: list[Response], config: "Config", recipe: Recipe) -> Tensor:
    """The recipe's reward of each response, [N].

    In float64: rounding stays far below any advantage that is not zero.
    """
    rewards = torch.as_tensor(recipe.reward(responses, config)).double()
    if rewards.shape != (len(responses),):
        raise UserError(
            f"recipe {config.recipe}: its reward must be of shape [{len(responses)}], "
            f"one number for each response, and not of {list(rewards.shape)}"
        )
    return rewards


def advantages_of(
    rewards: Tensor, patterns: list[str | None], config: "Config", recipe: Recipe
) -> Tensor:
    """The recipe's advantage of each response; by --penalty advantage, -1 where a pattern shows.
    [N] -> [N].
    """
    groups = rewards.view(-1, config.samples)
    advantages = recipe.advantage(groups)
    if advantages.shape != groups.shape:
        raise UserError(
            f"recipe {config.recipe}: its advantage must be of the rewards' shape "
            f"{list(groups.shape)}, and not of {list(advantages.shape)}"
        )
    return penalise(advantages.flatten(), patterns, PENALTIES[recipe.penalty].advantage)


def teaching_groups(
    responses: list[Response], rewards: Tensor, config: "Config", recipe: Recipe
) -> Tensor:
    """Which groups have an advantage that is not zero, bool [P].

    The recipe's own advantage is asked: where the baseline is a mean over the batch, say, a group
    of equal rewards does teach. The KL is not in the rewards yet, so equal verdicts are equal
    rewards. Of the groups that are kept the advantages are computed again, with it.
    """
    advantages = advantages_of(rewards, patterns_of(responses), config, recipe)
    shape = (-1, config.samples)
    rounding = 1e-9 * rewards.view(shape).abs().amax(dim=1, keepdim=True)
    zero = advantages.view(shape).abs() <= rounding  # not of a NaN: the guard is to see it
    teaching = ~zero.all(dim=1)
    if recipe.resample:
        wanted = unequal_groups(outcome(responses), config.samples)
        if recipe.penalty == "advantage":  # what is penalised teaches, whatever the outcomes
            punished = unexpected(patterns_of(responses))
            wanted = wanted | punished.view(-1, config.samples).any(dim=1)
        teaching = teaching & wanted
    return teaching


def drops_groups(recipe: Recipe, samples: int) -> bool:
    """Whether a recipe may drop one group and keep another.

    Where the baseline is a mean over the batch, a group of equal rewards does teach something.
    """
    rewards = torch.zeros(2, samples, dtype=torch.float64)
    rewards[1, 0] = 1.0
    return recipe.resample or not recipe.advantage(rewards)[0].any()


def describe(responses: list[Response], rewards: Tensor, samples: int) -> dict[str, float]:
    """Metrics of all responses of a step."""
    correct = torch.tensor([float(response.verdict.correct) for response in responses])
    reasons = [response.completion.finish_reason for response in responses]
    return {
        "reward": rewards.mean().item(),
        "accuracy": correct.mean().item(),
        "pass_at_k": correct.view(-1, samples).amax(dim=1).mean().item(),
        "length": lengths(responses).double().mean().item(),
        "unexpected": unexpected(patterns_of(responses)).double().mean().item(),
        "truncated": reasons.count("length") / len(reasons),
    }


def give_log_probs(learner: Learner, responses: list[Response]) -> dict[str, float]:
    """Set each response's `old`, `anchor` and `weight`: [its tokens] each. Returns metrics.

    old: the sampler's own log-probs if it computes in fp32, else computed here. weight: how much
    the loss counts a token: the recipe's average, times the importance weight if `old` is not the
    sampler's.
    """
    config, recipe = learner.config, learner.recipe
    sizes = lengths(responses)
    weight = recipe.average(sizes, config.max_tokens).repeat_interleave(sizes)
    drawn = [response.completion.logprobs for response in responses]
    sampled = torch.cat([torch.tensor(logprobs, dtype=torch.float64) for logprobs in drawn])
    metrics = {}
    if learner.exact:
        old = sampled
    else:
        old = learner.logprobs(learner.policy, responses)
        weight = weight * truncated_importance(old, sampled)
        gap = (old - sampled).abs()
        metrics["mismatch"] = gap.mean().item()
        metrics["mismatch_max"] = gap.max().item()
    if learner.anchor:
        anchor = learner.logprobs(learner.anchor, responses)
        give(responses, "anchor", anchor)
        metrics["kl"] = (old - anchor).double().sum().item() / len(responses)
    if learner.start:
        start = learner.logprobs(learner.start, responses)
        metrics["kl_start"] = (old - start).double().sum().item() / len(responses)
    give(responses, "old", old)
    give(responses, "weight", weight)
    return metrics


def truncated_importance(old: Tensor, sampled: Tensor, most: float = 2.0) -> Tensor:
    """Weights of tokens that a slightly different policy sampled (in bf16, say). [M] -> [M].

    min(pi_old / pi_sampler, most)
    """
    return (old - sampled).exp().clamp(max=most)


def minibatches(size: int, config: "Config", step: int) -> Iterator[list[int]]:
    """The PPO loop: `epochs` passes over the batch, each shuffled and cut into `minibatches`."""
    for epoch in range(config.epochs):
        order = list(range(size))
        random.Random(f"minibatches {config.seed} {step} {epoch}").shuffle(order)
        parts = min(config.minibatches, size)
        yield from (order[part::parts] for part in range(parts))


class Tally:
    """The metrics of a step's updates: summed over this rank's tokens, in the end over all.

    The sums stay on the device (0.0 until there are any): to look at one would be to wait for it.
    """

    def __init__(self) -> None:
        self.losses: list[float] = []  # of the updates that are done
        self.norms: list[float] = []
        self.loss: float | Tensor = 0.0  # of the update that is under way
        names = ("tokens", "entropy", "clipped", "gap", "gap_tokens")
        self.sums: dict[str, float | Tensor] = dict.fromkeys(names, 0.0)
        self.widest_gap: float | Tensor = 0.0

    @torch.no_grad()
    def add(self, loss: Tensor, logprob: Tensor, entropy: Tensor, old: Tensor, recipe: Recipe):
        """Count a micro-batch."""
        self.loss = self.loss + loss.double()
        gap = logprob - old
        ratio = gap.exp()
        outside = (ratio < 1 - recipe.clip_low) | (ratio > 1 + recipe.clip_high)
        tokens = torch.ones_like(gap)
        found = {"tokens": tokens, "entropy": entropy, "clipped": outside}
        first_update = not self.losses
        if first_update:  # the policy is still the one that has sampled
            found |= {"gap": gap.abs(), "gap_tokens": tokens}
            if len(gap):
                self.widest_gap = gap.abs().max().clamp(min=self.widest_gap)
        for name, values in found.items():
            self.sums[name] = self.sums[name] + values.sum().double()

    def metrics(self, exact: bool) -> dict[str, float]:
        totals = parallel.sum_over_ranks(torch.stack(list(self.sums.values()))).tolist()
        sums = dict(zip(self.sums, totals))
        found = {
            "loss": sum(self.losses) / len(self.losses),
            "grad_norm": sum(self.norms) / len(self.norms),
            "entropy": sums["entropy"] / sums["tokens"],
            "clip_fraction": sums["clipped"] / sums["tokens"],
        }
        if exact:  # otherwise `give_log_probs` has compared all of the tokens
            found["mismatch"] = sums["gap"] / sums["gap_tokens"]
            found["mismatch_max"] = max(parallel.gather_objects(float(self.widest_gap)))
        return found


def zero_grad(learner: Learner) -> None:
    for optimizer in learner.optimizers.values():
        optimizer.zero_grad()


def descend(learner: Learner, tally: Tally) -> None:
    """One optimizer step with the gradients that stand in the models, unless the guard objects."""
    loss = float(parallel.sum_over_ranks(tally.loss))
    limit = learner.config.max_grad_norm
    norms = {name: parallel.clip_grad_norm(m, limit) for name, m in learner.models.items()}
    tally.losses.append(loss)
    tally.norms.append(norms["policy"])
    tally.loss = 0.0
    gradients = {f"gradient of the {name}": norm for name, norm in norms.items()}
    if learner.guard.allows(loss=loss, **gradients):
        for optimizer in learner.optimizers.values():
            optimizer.step()
    zero_grad(learner)  # the sampler can use the room


# --- around a step --------------------------------------------------------------------------------


def begin_step(learner: Learner, step: int) -> None:
    """The learning rate of this step, and the newest weights for the sampler."""
    config = learner.config
    rise = step / max(config.warmup, 1)
    fall = (config.steps + 1 - step) / (config.cooldown + 1)
    for optimizer in learner.optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * min(1.0, rise, fall)
    if learner.sampler.model is not learner.policy.model:
        # Before the rollout, not after the update: a resumed run has new weights, too. And a copy
        # may hold no memory by now, see `make_room`.
        parallel.copy_weights(learner.policy, learner.sampler.model)


def collect(learner: Learner, watch: Stopwatch) -> list[Response]:
    """K judged responses to each of the next prompts, prompt after prompt, the same on every rank.

    By dynamic sampling new prompts are drawn until `prompts` groups have unequal outcomes, but at
    most 3 times as many.
    """
    config, tokenizer, world = learner.config, learner.tokenizer, learner.world
    params = SamplingParams(config.max_tokens, learner.recipe.temperature, seed=config.seed)
    responses: list[Response] = []
    for _ in range(3 if learner.recipe.resample else 1):
        keys = list(range(learner.cursor, learner.cursor + config.prompts))
        learner.cursor += config.prompts
        problems = [nth_problem(learner, number) for number in keys]
        prompts = [tasks.prompt_ids(problem, tokenizer) for problem in problems]
        with watch("sampling"):
            completions = rollout.draw(
                learner.sampler, prompts, keys, config.samples, params, world, config.sampler_ranks
            )
        with watch("verifying"):
            responses += rollout.judge(problems, prompts, completions, tokenizer, config, world)
        if unequal_groups(outcome(responses), config.samples).sum() >= config.prompts:
            break
    return responses


def make_room(learner: Learner) -> None:
    """Give back what the sampler holds, where training needs the room. See `begin_step`."""
    sampler = learner.sampler
    if not is_large(sampler):
        return
    sampler.release()
    if sampler.model is not learner.policy.model:
        parallel.free_weights(sampler.model)


def is_large(sampler: Sampler) -> bool:
    """Whether a sampler holds more than a quarter of a GPU's memory.

    A smaller one stays as it is: its CUDA graphs end when what they read moves. So does every one
    on a CPU, where memory that is given back costs time, and is seldom what a run lacks.
    """
    device = sampler.model.head_weight.device
    if device.type != "cuda":
        return False
    return sampler.held_bytes() > torch.cuda.get_device_properties(device).total_memory // 4


def nth_problem(learner: Learner, number: int) -> Problem:
    """The number-th problem that the run draws, counted over all steps."""
    if learner.config.task:  # as they were made, so that a longer run begins as a shorter one
        return learner.problems[number]
    return rollout.nth_problem(learner.problems, number, learner.config.seed)


def run_step(
    learner: Learner, step: int, train_step: Callable[..., dict[str, float]] = train_step
) -> tuple[dict[str, float], list[Response]]:
    """Sample, judge and train: (metrics, all responses). The learner moves on."""
    watch = Stopwatch()
    begin_step(learner, step)
    responses = collect(learner, watch)
    make_room(learner)
    with watch("training"):
        metrics = train_step(learner, responses, step)
    end_step(learner, responses, metrics, watch)
    return metrics, responses


def adapt_entropy_coef(coef: float, entropy: float, target: float, rate: float = 0.05) -> float:
    """Adaptive entropy: the coefficient rises while entropy is below `target`, falls above it."""
    return coef * math.exp(rate * max(-1.0, min(1.0, (target - entropy) / target)))


def end_step(
    learner: Learner, responses: list[Response], metrics: dict[str, float], watch: Stopwatch
) -> None:
    """Adapt the entropy coefficient, and complete the metrics of the step."""
    config, recipe = learner.config, learner.recipe
    if config.entropy_target and "entropy" in metrics:
        coef = recipe.entropy_coef
        metrics["entropy_coef"] = coef
        coef = adapt_entropy_coef(coef, metrics["entropy"], config.entropy_target)
        learner.recipe = replace(recipe, entropy_coef=coef)
    metrics["max_tokens"] = config.max_tokens
    metrics["skipped"] = learner.guard.skipped
    metrics["tokens_per_second"] = lengths(responses).sum().item() / sum(watch.seconds.values())
    metrics |= {f"seconds_{name}": value for name, value in watch.seconds.items()}


# --- the flags ------------------------------------------------------------------------------------


@dataclass
class Config:
    model: str
    """The policy to start from (T1: the SFT model): a run's folder, a Hugging Face folder, or a
    name of its hub."""
    out: str
    """Run folder: config.json, metrics.jsonl, checkpoints/, a figure, and in the end OUT/model."""
    task: str = ""
    """Problems made by program, instead of --data: countdown."""
    data: str = ""
    """Problems: a file with `problem` (or `question`, `prompt`) and `answer`, or a data set's name,
    such as openai/gsm8k:main/train (hub.py)."""
    fields: str = ""
    """What these are called there, if otherwise: problem=NAME,answer=NAME."""
    recipe: str = "t1"
    """The algorithm: t1, grpo, dr_grpo, dapo or reinforce; `RECIPES` in rl.py says what each is."""
    steps: int = 100
    """Rollout batches, each followed by epochs * minibatches updates."""
    seed: int = 0
    """Seed of the problems' order and of every sampled token."""
    prompts: int = 32
    """Prompts per step (T1: 32)."""
    samples: int = 64
    """K, responses per prompt: oversampling (T1: 64; the paper finds that more is better)."""
    max_tokens: int | None = None
    """Length at which a response is cut off, and counts as overlong (T1: 10,240; 16,384 for 32B).
    None: what the model's context has room for behind the longest prompt, 10,240 at most."""
    epochs: int = 1
    """Passes of the PPO loop over each rollout batch (1, with 1 minibatch, is exactly on-policy).
    """
    minibatches: int = 1
    """Updates per pass."""
    lr: float | None = None
    """Learning rate (T1: 1.5e-6; a small model wants more)."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """What moves the blocks' matrices; muon is for small models, see muon.py."""
    temperature: float | None = None
    """Sampling temperature; it divides the logits in training too (T1: 1.2; at or below 1 training
    may collapse)."""
    kl_coef: float | None = None
    """Weight of the KL to the anchor (T1: 2e-4)."""
    penalty: Literal["set", "advantage", "none"] | None = None
    """What an unexpected pattern costs: set: reward -1 (T1). advantage: reward 0, then advantage
    -1, even where all K show one. none: nothing."""
    patterns: tuple[Literal["overlong", "repeated", "garbled"], ...] = tasks.PATTERNS
    """Which patterns are unexpected; T1 ablates them."""
    repeat_ngram: int = 20
    """A response repeats itself if some n-gram of so many tokens ..."""
    repeat_times: int = 4
    """... stands in it so many times. (T1 names no numbers; short chains want smaller ones.)"""
    least_logprob: float | None = None
    """A response is unexpected, too, if the mean log-prob of its tokens is below this; -4 is a
    perplexity of 55. (None: not looked at. T1 filters by perplexity, and names no number.)"""
    entropy_coef: float | None = None
    """Weight of the token-level entropy bonus: raise it if entropy collapses, lower it if responses
    turn garbled."""
    entropy_target: float | None = None
    """Entropy in nats per token to be held by adapting --entropy-coef at every step (none: it stays
    as it is)."""
    anchor_decay: float | None = None
    """Decay of the anchor's moving average: 1 keeps it where the run began, 0 makes it the policy
    itself."""
    clip_low: float | None = None
    """PPO: the ratio's lower bound is 1 - clip_low."""
    clip_high: float | None = None
    """PPO: the ratio's upper bound is 1 + clip_high (DAPO raises it, so that rare tokens can grow).
    """
    numbers: int = 3
    """Countdown: how many numbers."""
    largest: int = tasks.LARGEST_GIVEN
    """Countdown: the numbers are drawn from 1 to this."""
    operators: str = "+-*"
    """Countdown: which operators; / divides exactly."""
    warmup: int = 0
    """Steps over which the learning rate rises to its value: Adam's first steps are its wildest."""
    cooldown: int = 0
    """Steps at the end over which it falls again: at a constant rate a small policy jitters around
    its own average."""
    max_grad_norm: float = 1.0
    """Longer gradients are scaled down to this."""
    micro_tokens: int | None = None
    """Tokens per forward pass of a rank (None: 8,192 on a GPU, 2,048 on a CPU): bounds memory,
    changes no result beyond rounding."""
    recompute: bool = False
    """Recompute activations in the backward pass: a third more time for far less memory."""
    offload: bool = False
    """Keep master weights, gradients, AdamW's moments and the anchor in the host's memory: slower,
    for a GPU that has no room for them."""
    checkpoint_every: int = 10
    """Steps between checkpoints; the last two are kept."""
    keep_every: int = 0
    """Also keep, for good, the checkpoint of every so many steps (0: none): to measure how RL went,
    see --step."""
    start_kl: bool = False
    """Also log the KL to the policy that the run began with: one more copy of the weights, and one
    more pass."""
    show_every: int = 10
    """Steps between responses shown on the terminal, a right one and a wrong one (0: none)."""
    resume: bool = False
    """Go on from the newest checkpoint in --out."""
    export: str = ""
    """Do not train: write the policy of a checkpoint in --out to this Hugging Face folder."""
    step: int | None = None
    """With --export: the checkpoint of this step (none: the newest)."""
    max_batch: int = 1024
    """Sequences decoded at once, at most."""
    sampler_ranks: int = 1
    """Ranks, best of one node, that share one copy of the policy to sample from, each with a slice
    of every layer: for a policy that is too large for one GPU (see tensor_parallel.py)."""
    log: Literal["none", "tensorboard", "wandb"] = "none"
    """Where the metrics go besides metrics.jsonl."""
    template_args: str = ""
    """JSON that the chat template is to know, such as '{"enable_thinking": false}'."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the matrix products run in, and the sampler. auto: bfloat16 on a GPU that has it, else
    float32; with --resume, what the run began with. Master weights are float32 in any case."""


OVERRIDES = (
    *("lr", "temperature", "penalty", "kl_coef"),
    *("entropy_coef", "anchor_decay", "clip_low", "clip_high"),
)
"""Flags that override what the recipe has of the same name."""

MAY_CHANGE = (
    *("out", "data", "model", "steps", "resume", "export", "step", "log", "show_every", "device"),
    *("checkpoint_every", "keep_every", "micro_tokens", "max_batch", "recompute", "offload"),
    "sampler_ranks",
)
"""Flags that --resume accepts with another value: a folder or a file may have moved (what it holds
must be the same, see `Run.check_inputs`). All others would make it another run."""


def resolve(config: Config) -> Recipe:
    """The recipe with the numbers that flags override."""
    if config.recipe not in RECIPES:
        raise UserError(f"--recipe {config.recipe} is none of {', '.join(RECIPES)}")
    flags = {name: getattr(config, name) for name in OVERRIDES}
    given = {name: value for name, value in flags.items() if value is not None}
    return replace(RECIPES[config.recipe], **given)


def check_flags(config: Config, recipe: Recipe) -> None:
    """What can be known to be wrong before anything is loaded."""
    check_problems(config)
    check_numbers(config, recipe)
    if config.step is not None and not config.export:
        raise UserError(
            f"--step {config.step} says which checkpoint to --export; "
            "for the length of a run, see --steps"
        )
    if config.keep_every % config.checkpoint_every:
        raise UserError(
            f"--keep-every {config.keep_every} must be a multiple of --checkpoint-every"
        )
    if config.samples == 1 and recipe.advantage:
        check_one_sample(config, recipe)
    if config.entropy_target is not None and min(config.entropy_target, recipe.entropy_coef) <= 0:
        raise UserError(
            "--entropy-target must be above 0, and so must --entropy-coef, from which it starts"
        )


def check_problems(config: Config) -> None:
    """Where problems come from: a file, or a task that makes them."""
    if bool(config.task) == bool(config.data):
        raise UserError("exactly one of --task and --data says where the problems come from")
    if config.task:
        tasks.made(config.task, config)  # for its checks


def check_numbers(config: Config, recipe: Recipe) -> None:
    """Every number in its range."""

    def require(holds: bool, name: str, wanted: str, value: float) -> None:
        if not holds:
            raise UserError(f"--{name.replace('_', '-')} must {wanted}, but is {value}")

    counts = ("steps", "prompts", "samples", "epochs", "minibatches", "checkpoint_every")
    sizes = ("max_tokens", "micro_tokens", "max_batch", "sampler_ranks", "repeat_ngram")
    for name in (*counts, *sizes):
        value = getattr(config, name)
        require(value is None or value >= 1, name, "be at least 1", value)
    require(config.repeat_times >= 2, "repeat_times", "be at least 2", config.repeat_times)
    require(config.max_grad_norm > 0, "max_grad_norm", "be above 0", config.max_grad_norm)
    for name in ("warmup", "cooldown", "show_every", "keep_every"):
        value = getattr(config, name)
        require(value >= 0, name, "not be below 0", value)
    for name in ("lr", "temperature"):
        value = getattr(recipe, name)
        require(0 < value < math.inf, name, "be above 0 in training", value)
    for name in ("kl_coef", "entropy_coef", "clip_low", "clip_high"):
        value = getattr(recipe, name)
        require(value >= 0, name, "not be below 0", value)
    decay = recipe.anchor_decay
    require(0 <= decay <= 1, "anchor_decay", "lie between 0 and 1", decay)


def check_one_sample(config: Config, recipe: Recipe) -> None:
    """--samples 1 makes sense only if a response need not be compared with others of its prompt."""
    try:
        advantages = recipe.advantage(torch.tensor([[0.0], [1.0]], dtype=torch.float64))
    except UserError as error:
        raise UserError(f"--samples 1: {error}") from None
    if not advantages.isfinite().all() or not advantages.any():
        raise UserError(
            f"--samples 1: the recipe {config.recipe} compares the responses to one prompt"
        )


# --- the run --------------------------------------------------------------------------------------


def make_learner(config: Config, recipe: Recipe, problems: list[Problem], world: World) -> Learner:
    """Load the models. config: with `max_tokens` and `dtype` resolved."""
    shape = read_config(model_folder(config.model))
    tensor_parallel.check(shape, config.sampler_ranks, world.size)
    dtype = getattr(torch, config.dtype)
    policy = load_trained(config, world)
    exact = dtype == torch.float32
    # One process in fp32 samples from the policy itself; otherwise the sampler has its own copy.
    alone = exact and world.size == 1 and not config.offload
    actor = policy.model if alone else empty_copy(shape, config.sampler_ranks, dtype, world)
    tokenizer = load_tokenizer(config.model, config.template_args)
    anchor = load_trained(config, world) if recipe.kl_coef else None
    start = None
    if config.start_kl:
        stays = anchor and recipe.anchor_decay == 1
        start = anchor if stays else load_trained(config, world)
    return Learner(
        config=config,
        recipe=recipe,
        problems=problems,
        world=world,
        tokenizer=tokenizer,
        sampler=Sampler(actor, tokenizer, max_batch=config.max_batch),
        models={"policy": policy},
        optimizers=make_optimizers(policy, config.optimizer, recipe.lr),
        anchor=anchor,
        start=start,
        exact=exact,
        inputs={"model": pretrained.fingerprint(config.model)},
    )


def empty_copy(shape: ModelConfig, ranks: int, dtype: torch.dtype, world: World) -> Transformer:
    """A model to sample from, whole or in slices. `begin_step` gives it the policy's weights."""
    if ranks > 1:
        return SlicedTransformer(shape, ranks, dtype, world.device)
    return Transformer(shape, dtype, "meta").to_empty(device=world.device)


def load_trained(config: Config, world: World, wrap: Callable = Scorer) -> Any:
    """The model of --model in a `wrap`, sharded over the ranks."""
    model = without_weights(config.model)
    dtype = getattr(torch, config.dtype)
    scorer = parallel.shard(model, world, dtype, config.recompute, config.offload, wrap)
    parallel.load_weights(scorer, config.model)
    return scorer


def export(config: Config, world: World) -> None:
    """The policy of a checkpoint in --out as a Hugging Face folder: of a run that is not finished,
    or of --step.
    """
    saved = parallel.complete_checkpoints(Path(config.out) / "checkpoints")
    if not saved:
        raise UserError(f"--export: there is no whole checkpoint in {config.out}")
    newest = saved[-1]
    if config.step is not None:
        by_step = {parallel.step_of(path): path for path in saved}
        if config.step not in by_step:
            held = ", ".join(map(str, by_step))
            raise UserError(
                f"--export --step {config.step}: {config.out} holds the steps {held} "
                "(see --keep-every)"
            )
        newest = by_step[config.step]
    if Path(config.export).exists():
        raise UserError(f"--export: {config.export} exists already")
    cli.check_parent(config.export)
    policy = parallel.shard(without_weights(config.model), world)
    parallel.load_checkpoint(newest, {"policy": policy}, world)
    parallel.save_model(policy, Path(config.export), load_tokenizer(config.model), world)


SHOWN = ("reward", "accuracy", "length", "entropy", "tokens_per_second")
"""Metrics behind the progress bar."""

PANELS = {
    "reward": ["pass_at_k", "accuracy", "reward"],
    "length (tokens)": ["length"],
    "entropy (nats per token)": ["entropy"],
    "KL to the anchor and to the start (nats per response)": ["kl", "kl_start"],
    "share of responses": ["unexpected", "truncated"],
    "share of groups dropped": ["dropped"],
    "loss": ["loss"],
    "gradient norm": ["grad_norm"],
    "sampler against trainer": ["mismatch_max", "mismatch"],
}


def tensors_of(learner: Learner) -> dict[str, Any]:
    """What a checkpoint holds, by name."""
    anchor = {"anchor": learner.anchor} if learner.anchor else {}
    return learner.models | anchor | learner.optimizers


def state_of(learner: Learner) -> dict[str, Any]:
    """What a checkpoint holds besides tensors, and what `Run` and the recipe add."""
    return {
        "cursor": learner.cursor,
        "entropy_coef": learner.recipe.entropy_coef,
        "max_tokens": learner.config.max_tokens,
    }


def written(recipe: Recipe) -> dict[str, Any]:
    """A recipe as JSON holds it: numbers as they are, functions by their names."""
    found = {}
    for spec in fields(recipe):
        value = getattr(recipe, spec.name)
        if callable(value):  # not by their module: that is __main__ or not, by how rl.py is started
            value = getattr(value, "__qualname__", type(value).__name__)
        found[spec.name] = value
    return found


def take_up(learner: Learner, state: dict[str, Any]) -> None:
    """Put the learner where the run stands. UserError if that was begun with another recipe."""
    for name, value in written(learner.recipe).items():
        if state["recipe"].get(name) != value:
            raise UserError(
                f"--resume: the run was started with another recipe {learner.config.recipe}: "
                f"{name} was {state['recipe'].get(name)}, and is {value}"
            )
    learner.cursor = state["cursor"]
    learner.recipe = replace(learner.recipe, entropy_coef=state["entropy_coef"])
    # As the run began: more --steps may bring a longer prompt, behind which there is less room.
    learner.config = replace(learner.config, max_tokens=state["max_tokens"])


def train(
    config: Config,
    world: World,
    make_learner: Callable[..., Learner] = make_learner,
    train_step: Callable[..., dict[str, float]] = train_step,
) -> None:
    """A run from its first step, or from its last checkpoint, to its end."""
    recipe = resolve(config)
    check_flags(config, recipe)
    config = runfolder.with_dtype(config, world)
    may_change = MAY_CHANGE
    if config.cooldown:  # it is counted from the end: the steps already taken had the wrong rate
        may_change = tuple(name for name in MAY_CHANGE if name != "steps")
    runfolder.check_run(config.out, config, config.resume, may_change)
    draws = config.steps * config.prompts * (3 if recipe.resample else 1)
    problems = rollout.read_problems(config, draws)
    room = room_for_responses(config, problems)
    learner = make_learner(replace(config, max_tokens=room), recipe, problems, world)
    with Run(config, may_change, world, keep_every=config.keep_every) as run:
        learner.guard = run.guard
        if config.data:
            learner.inputs["training data"] = cli.fingerprint(problems)
        run.check_inputs(learner.inputs)
        pieces = {"recipe": written(recipe)}
        state = run.restore(tensors_of(learner), pieces | state_of(learner))
        take_up(learner, state)

        steps = run.steps(config.steps, "rl")
        run.say(opening(learner, run))
        history = runfolder.read_metrics(run.log.path)
        for step in steps:
            metrics, responses = run_step(learner, step, train_step)
            names = [name for name in SHOWN if name in metrics]
            run.record(step, metrics, shown={name: f"{metrics[name]:.3g}" for name in names})
            history.append(metrics)
            report(run, step, history, responses)
            if run.is_due(step, config.checkpoint_every):
                run.save(step, pieces | state_of(learner))
                run.plot(PANELS)
        run.finish(learner.policy, learner.tokenizer)
        for line in (*alarms.in_vain(history), closing(config)):
            run.say(line)


def room_for_responses(config: Config, problems: list[Problem]) -> int:
    """--max-tokens, or what that is where it is left out.

    UserError if a prompt has no room, or if no token of the model ends a response.
    """
    shape = read_config(model_folder(config.model))
    tokenizer = load_tokenizer(config.model, config.template_args)
    require_stop_token(tokenizer, shape.vocab_size, config.model)
    prompts = (tasks.prompt_ids(problem, tokenizer) for problem in problems)
    source = config.data or config.task
    return rollout.room_for_responses(prompts, config.max_tokens, shape.context, source)


def report(run: Run, step: int, history: list[dict], responses: list[Response]) -> None:
    """On the terminal: alarms, and now and then a right and a wrong response, word for word."""
    if not run.world.main:
        return
    # An alarm is named when it begins, not for as long as it lasts.
    before = [alarm.split(":")[0] for alarm in alarms.of(history[:-1])]
    for alarm in alarms.of(history):
        if alarm.split(":")[0] not in before:
            run.say(f"step {step}: {alarm}")
    every = run.config.show_every
    if every and step % every == 0:
        right = [response for response in responses if response.verdict.correct]
        wrong = [response for response in responses if not response.verdict.correct]
        for kind in (right, wrong):
            if kind:
                run.say(str(kind[step % len(kind)]))


def opening(learner: Learner, run: Run) -> str:
    """The first line: what is trained, on what, where, and where it is written."""
    config = run.config
    parameters = sum(parameter.numel() for parameter in learner.policy.parameters())
    return (
        f"rl: {config.model}, {parameters:,} parameters; {len(learner.problems):,} problems of "
        f"{config.data or config.task}; {config.prompts} x {config.samples} responses a step, of "
        f"{learner.config.max_tokens:,} tokens at most; {config.steps:,} steps, {run.done:,} of "
        f"them done, on {run.world.size} x {run.world.device.type}; writes to {run.out}"
    )


def closing(config: Config) -> str:
    """The last line: where the model is, and what to run next."""
    template = cli.changed(config, "template_args")
    source = ["--data", "TEST.jsonl"]
    if config.task:
        source = ["--task", config.task, *cli.changed(config, "numbers", "largest", "operators")]
    evaluate = shlex.join(["--model", config.model, config.out, *source, *template])
    sample = shlex.join(["--model", config.out, *template])
    return (
        f"the model is in {config.out}/model; next: python evaluate.py {evaluate}, "
        f"or python sample.py {sample}"
    )


def main(
    config: Config,
    make_learner: Callable[..., Learner] = make_learner,
    train_step: Callable[..., dict[str, float]] = train_step,
) -> None:
    """The command. A fork with models or a step of its own calls it with these (see rlsp.py)."""
    with parallel.session(config.device) as world:
        if config.export:
            export(config, world)
            return
        with runfolder.reserved(config.out, world):
            train(config, world, make_learner, train_step)


WHOLE = (
    "training samples from the whole distribution, for with some tokens left out pi / pi_old is not"
    " the ratio of what was sampled (GUIDE.md, part 8)"
)


def command(config_class: type[Config] = Config, main: Callable[[Config], None] = main) -> None:
    """Read the flags and run: what a fork's file ends with.

    config_class: a subclass of Config, for flags of one's own.
    """
    cli.run(main, config_class, refused={"--top-p": WHOLE, "--min-p": WHOLE})


if __name__ == "__main__":
    command()
