"""One step of T1 on one problem: every number from four responses to one token's gradient.

    python guide/trace.py       # a few seconds on a CPU; GUIDE.md quotes every line of it

A tiny model is taught some chains of thought, so that its probabilities mean something. The four
responses are written by hand, because so small a model would not find a right one. All else is what
rl.py does: the same judge, the same functions, the same formulas. Everything is float64, so that
every machine prints the same digits.
"""

import copy
import dataclasses
import random
import sys
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


import cot
import kernels
import rl
import rollout
import tasks
from model import ModelConfig, Transformer, random_init
from sample import Completion
from tokenizer import Tokenizer, demo_tokenizer

RECIPE = rl.RECIPES["t1"]
LEARNING_RATE = 2e-4  # T1's 1.5e-6 is for 9 billion weights; with it a tiny model would not move
CHAINS = 400
CHAINS_PER_STEP = 10
TEACHING_STEPS = 150
TEACHING_RATE = 1e-2
TRAILING_STEPS = 15  # the last steps of the teaching, in which the anchor already trails the policy

PROBLEM = tasks.countdown_problem([3, 5, 7], 22)
CHECKED = "check (5*3)+7=15+7=22 ok\n\\boxed{(5*3)+7}"
RESPONSES = {
    "1": f"7-3=4, 5*4=20 not 22\n5*3=15, 15+7=22 is 22\n{CHECKED}",  # fails, notices, succeeds
    "2": "7*5=35, 35-3=22 is 22\ncheck (7*5)-3=35-3=22 ok\n\\boxed{(7*5)-3}",  # bends a sum
    "3": "7*3=21, " + "21-5=16, 16+5=21, " * 4,  # goes round in circles, never ends
    "4": f"5*3=15, 15+7=22 is 22\n{CHECKED}",  # succeeds at once
}
ENDLESS = "3"  # cut off at the longest length allowed, so that it has no stop token
TRACED = ("1", " not ")  # the token whose gradient is shown: here it could have claimed success


# --- what is asked of rl.py: no other lines here know how its functions are called ----------------


def find_pattern(completion: Completion, text: str) -> str | None:
    return rollout.unexpected_pattern(completion, text, PROBLEM.question)


def penalised(rewards: Tensor, patterns: list[str | None]) -> Tensor:
    return rl.penalise(rewards, patterns)


def centred(logprob: Tensor, anchor_logprob: Tensor, lengths: list[int]) -> Tensor:
    """Log-probs of all trained tokens, flat, to one centred KL for each response."""
    return rl.centred_kl(logprob, anchor_logprob, torch.tensor(lengths))


def surrogate_loss(logprob: Tensor, old: Tensor, advantage: Tensor) -> Tensor:
    """PPO's clipped loss; all flat, one value for each trained token."""
    every = torch.ones_like(logprob)
    clip = (RECIPE.clip_low, RECIPE.clip_high)
    return rl.ppo_clip_loss(logprob, old, advantage, every, *clip, len(logprob))


def mean_entropy(entropy: Tensor) -> Tensor:
    return rl.entropy_bonus(entropy, torch.ones_like(entropy), len(entropy))


# --- a policy, its anchor, and the log-probs of a text --------------------------------------------


def small_model(tokenizer: Tokenizer) -> Transformer:
    shape = ModelConfig(
        tokenizer.vocab_size,
        dim=48,
        layers=2,
        heads=2,
        kv_heads=1,
        head_dim=24,
        mlp_dim=96,
        context=256,
        tied=True,
    )
    return random_init(shape, seed=0, dtype=torch.float64)


def chain_tokens(tokenizer: Tokenizer) -> list[tuple[list[int], list[int]]]:
    """The training chains, as sft.py has them: (prompt, response with its stop token)."""
    rng = random.Random(0)
    rows = []
    for problem in islice(tasks.countdown(seed=0), 4 * CHAINS):
        chain = cot.countdown_chain(problem, rng, attempts=3)
        if chain is not None:
            response = tokenizer.encode(chain["response"]) + list(tokenizer.eos_ids)
            rows.append((tasks.prompt_ids(problem, tokenizer), response))
    return rows[:CHAINS]


def logits_of(model: Transformer, rows: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    """(logits [M, V], targets [M]) of all response tokens, response after response.

    Position t predicts token t + 1: the prompt's last token predicts the first of the response.
    Padding stands on the right, where causal attention cannot see it.
    """
    width = max(len(prompt) + len(response) for prompt, response in rows)
    tokens = torch.zeros(len(rows), width, dtype=torch.long)
    trained = torch.zeros(len(rows), width, dtype=torch.bool)
    for row, (prompt, response) in enumerate(rows):
        length = len(prompt) + len(response)
        tokens[row, :length] = torch.tensor(prompt + response)
        trained[row, len(prompt) : length] = True
    hidden = model(tokens)[:, :-1]
    return model.logits(hidden[trained[:, 1:]]), tokens[trained]


def log_probs(model: Transformer, rows: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    """(log-prob, entropy) of every response token at T1's temperature, both [M]."""
    logits, targets = logits_of(model, rows)
    return kernels.logprob_entropy(logits, targets, RECIPE.temperature)


def taught(tokenizer: Tokenizer) -> tuple[Transformer, Transformer]:
    """(policy, anchor): SFT on chains; in the last steps the anchor trails, as it does in RL."""
    policy = small_model(tokenizer)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=TEACHING_RATE, weight_decay=0.0)
    chains = chain_tokens(tokenizer)
    rng = random.Random(0)
    anchor = None
    for step in range(TEACHING_STEPS):
        optimizer.param_groups[0]["lr"] = TEACHING_RATE * (1 - step / TEACHING_STEPS)
        logits, targets = logits_of(policy, rng.sample(chains, CHAINS_PER_STEP))
        optimizer.zero_grad()
        F.cross_entropy(logits, targets).backward()
        optimizer.step()
        if step == TEACHING_STEPS - TRAILING_STEPS:
            anchor = copy.deepcopy(policy)
        if anchor is not None:
            rl.update_anchor(anchor, policy, RECIPE.anchor_decay)
    return policy, anchor


# --- the step -------------------------------------------------------------------------------------


@dataclasses.dataclass
class Step:
    """Everything that the trace prints, and that the test looks at."""

    tokenizer: Tokenizer
    rows: list[tuple[list[int], list[int]]]  # (prompt, response) in tokens
    outcomes: list[str]
    patterns: list[str | None]
    correct: Tensor  # [4], 1 or 0
    rewards: Tensor  # [4], after the penalties
    old: Tensor  # [M], log-probs of the policy before the step
    anchor_old: Tensor  # [M]
    centred: Tensor  # [4], the centred KL
    advantages: Tensor  # [4]
    logits: Tensor  # [M, V], with their gradient
    surrogate: float
    entropy: float
    loss: float
    traced: int  # which of the M tokens
    new: Tensor  # [M], log-probs after the step
    new_probs: Tensor  # [V], at the traced token
    anchor_gap: tuple[
        float, float
    ]  # largest |policy - anchor| of all weights: before, after it moved

    @property
    def lengths(self) -> list[int]:
        return [len(response) for _, response in self.rows]

    def spread(self, values: Tensor) -> Tensor:
        """One value per response to one per token: [4] -> [M]."""
        return values.repeat_interleave(torch.tensor(self.lengths))

    def sums(self, values: Tensor) -> Tensor:
        """One value per token to their sum over each response: [M] -> [4]."""
        return torch.stack([part.sum() for part in values.split(self.lengths)])


def place_of(word: str, name: str, rows: list[tuple[list[int], list[int]]], tok: Tokenizer) -> int:
    """Which of the M trained tokens is the first `word` of response `name`."""
    before = list(RESPONSES).index(name)
    offset = sum(len(response) for _, response in rows[:before])
    return offset + rows[before][1].index(tok.encode(word)[0])


def largest_gap(one: Transformer, other: Transformer) -> float:
    pairs = zip(one.parameters(), other.parameters())
    return max((a - b).abs().max().item() for a, b in pairs)


def judged(tokenizer: Tokenizer) -> tuple[list, list[str], list[str | None]]:
    """(rows, outcomes, patterns) of the four responses; a row is (prompt, response) in tokens."""
    rows = []
    outcomes = []
    patterns = []
    for name, text in RESPONSES.items():
        ended = name != ENDLESS
        response = tokenizer.encode(text)
        if ended:
            response += list(tokenizer.eos_ids)
        completion = Completion(response, [], "stop" if ended else "length")
        rows.append((tasks.prompt_ids(PROBLEM, tokenizer), response))
        outcomes.append(tasks.judge_countdown(PROBLEM, text).outcome)
        patterns.append(find_pattern(completion, text))
    return rows, outcomes, patterns


def run() -> Step:
    tokenizer = demo_tokenizer(cot.WORDS)
    policy, anchor = taught(tokenizer)

    # Responses, verdicts, rewards.
    rows, outcomes, patterns = judged(tokenizer)
    correct = torch.tensor([outcome == "correct" for outcome in outcomes]).double()
    rewards = penalised(correct, patterns)

    # Log-probs of policy and anchor; KL; advantages.
    lengths = [len(response) for _, response in rows]
    with torch.no_grad():
        old, _ = log_probs(policy, rows)
        anchor_old, _ = log_probs(anchor, rows)
    kl = centred(old, anchor_old, lengths)
    shaped = rewards - RECIPE.kl_coef * kl
    advantages = rl.leave_one_out(shaped[None])[0]  # one prompt: [1, 4]

    # Ratio, loss, gradient.
    logits, targets = logits_of(policy, rows)
    logits.retain_grad()
    logprob, entropy = kernels.logprob_entropy(logits, targets, RECIPE.temperature)
    per_token = advantages.repeat_interleave(torch.tensor(lengths))
    surrogate = surrogate_loss(logprob, old, per_token)
    bonus = mean_entropy(entropy)
    loss = surrogate - RECIPE.entropy_coef * bonus
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

    # What the step has changed; the anchor follows.
    traced = place_of(TRACED[1], TRACED[0], rows, tokenizer)
    with torch.no_grad():
        new, _ = log_probs(policy, rows)
        new_logits, _ = logits_of(policy, rows)
    gap = largest_gap(policy, anchor)
    rl.update_anchor(anchor, policy, RECIPE.anchor_decay)
    return Step(
        tokenizer=tokenizer,
        rows=rows,
        outcomes=outcomes,
        patterns=patterns,
        correct=correct,
        rewards=rewards,
        old=old,
        anchor_old=anchor_old,
        centred=kl,
        advantages=advantages,
        logits=logits,
        surrogate=surrogate.item(),
        entropy=bonus.item(),
        loss=loss.item(),
        traced=traced,
        new=new,
        new_probs=(new_logits[traced] / RECIPE.temperature).softmax(dim=0),
        anchor_gap=(gap, largest_gap(policy, anchor)),
    )


def gradient_by_formula(step: Step) -> tuple[Tensor, Tensor]:
    """dL/dz of the traced token's logits, [V] each: (from the advantage, from the entropy bonus).

    With p = softmax(z / tau), y the token that was written, M the trained tokens, at ratio 1:

        advantage  -(A / M) * ([i = y] - p_i) / tau
        entropy     (alpha / M) * p_i (log p_i + H) / tau
    """
    count = len(step.old)
    p = (step.logits[step.traced].detach() / RECIPE.temperature).softmax(dim=0)
    entropy = -(p * p.log()).sum()
    written = torch.zeros_like(p)
    written[step.tokenizer.encode(TRACED[1])[0]] = 1
    advantage = step.spread(step.advantages)[step.traced]
    from_advantage = -advantage / count * (written - p) / RECIPE.temperature
    from_entropy = RECIPE.entropy_coef / count * p * (p.log() + entropy) / RECIPE.temperature
    return from_advantage, from_entropy


# --- printing -------------------------------------------------------------------------------------


def show_responses(step: Step) -> None:
    prompt = step.rows[0][0]
    print(f"1. The prompt, {len(prompt)} tokens")
    print(f"   {step.tokenizer.decode(prompt)}")
    print()
    print("2. Four responses")
    for name, (_, response) in zip(RESPONSES, step.rows):
        lines = step.tokenizer.decode(response).strip("\n").split("\n")
        for i, line in enumerate(lines):
            label = name if i == 0 else " "
            print(f"   {label}  {line.rstrip()}")
    print()


def show_rewards(step: Step) -> None:
    print("3. Verdicts and rewards")
    print("      tokens  verdict    pattern    outcome  reward")
    for i, name in enumerate(RESPONSES):
        pattern = step.patterns[i] or "none"
        numbers = f"{step.correct[i]:7.0f}  {step.rewards[i]:6.0f}"
        print(f"   {name}  {step.lengths[i]:6}  {step.outcomes[i]:9}  {pattern:9}  {numbers}")
    print()


def show_kl(step: Step) -> None:
    print(f"4. KL to the anchor, in nats; each costs {RECIPE.kl_coef:.4f}")
    print("       log pi  log ref      k  k - mean      cost")
    policy_sums = step.sums(step.old)
    anchor_sums = step.sums(step.anchor_old)
    kl = policy_sums - anchor_sums
    cost = RECIPE.kl_coef * step.centred
    for i, name in enumerate(RESPONSES):
        scores = f"{policy_sums[i]:7.2f}  {anchor_sums[i]:7.2f}"
        print(f"   {name}  {scores}  {kl[i]:5.2f}  {step.centred[i]:8.2f}  {cost[i]:8.5f}")
    print()


def show_advantages(step: Step) -> None:
    print("5. Leave-one-out")
    print("      reward - cost  mean of the other 3  advantage")
    shaped = step.rewards - RECIPE.kl_coef * step.centred
    for i, name in enumerate(RESPONSES):
        others = (shaped.sum() - shaped[i]) / (len(shaped) - 1)
        print(f"   {name}  {shaped[i]:13.5f}  {others:19.5f}  {step.advantages[i]:9.5f}")
    print()


def show_loss(step: Step) -> None:
    print(f"6. Ratio and loss, over M = {len(step.old)} trained tokens")
    print("   every ratio is 1: old and new log-probs are of the same weights")
    print(f"   clipped loss      {step.surrogate:8.4f}   = -(sum of all tokens' advantages) / M")
    print(f"   mean entropy      {step.entropy:8.4f}   nats per token")
    print(f"   loss              {step.loss:8.4f}   = clipped loss - alpha * mean entropy")
    print()


def show_gradient(step: Step) -> None:
    name, word = TRACED
    count = len(step.old)
    p = (step.logits[step.traced].detach() / RECIPE.temperature).softmax(dim=0)
    from_advantage, from_entropy = gradient_by_formula(step)
    by_autograd = step.logits.grad[step.traced]
    entropy = -(p * p.log()).sum()
    print(f"7. One token's gradient: in response {name}, behind 7-3=4, 5*4=20, it wrote {word!r}")
    print(f"   entropy here {entropy:.4f} nats; M * dL/dz of each logit, by formula and autograd")
    print("   next token        p  from advantage  from entropy       sum  autograd")
    order = p.argsort(descending=True)
    groups = {repr(step.tokenizer.decode([int(i)])): [int(i)] for i in order[:3]}
    groups["all others"] = order[3:].tolist()
    for label, ids in groups.items():
        first = count * from_advantage[ids].sum()
        second = count * from_entropy[ids].sum()
        formula = f"{first:14.6f}  {second:12.6f}  {first + second:8.5f}"
        print(
            f"   {label:12} {p[ids].sum():6.4f}  {formula}  {count * by_autograd[ids].sum():8.5f}"
        )
    print()


def show_step(step: Step) -> None:
    ratio = (step.new - step.old).exp()
    outside = (ratio < 1 - RECIPE.clip_low) | (ratio > 1 + RECIPE.clip_high)
    word = step.tokenizer.encode(TRACED[1])[0]
    old, new = step.old[step.traced].exp(), step.new_probs[word]
    print(f"8. After one step of AdamW at {LEARNING_RATE}")
    print(f"   p({TRACED[1]!r}) at that place: {old:.4f} -> {new:.4f}, ratio {new / old:.4f}")
    print("      advantage  mean ratio  outside the clip")
    means = step.sums(ratio) / torch.tensor(step.lengths)
    shares = step.sums(outside.double()) / torch.tensor(step.lengths)
    for i, name in enumerate(RESPONSES):
        share = f"{100 * shares[i]:14.1f} %"
        print(f"   {name}  {step.advantages[i]:9.4f}  {means[i]:10.4f}  {share}")
    before, after = step.anchor_gap
    print(f"   the anchor follows: largest gap of a weight {before:.6f} -> {after:.6f}")


def main() -> None:
    torch.set_num_threads(1)
    step = run()
    show_responses(step)
    show_rewards(step)
    show_kl(step)
    show_advantages(step)
    show_loss(step)
    show_gradient(step)
    show_step(step)


if __name__ == "__main__":
    main()
