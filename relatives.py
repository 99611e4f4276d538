"""What people compare T1 with, where it differs from T1: the pieces from which rl.py's other recipes are made.

First GRPO, Dr. GRPO, DAPO and plain REINFORCE: baselines, averages and penalties, one pure function each. Then RLSP
(arXiv 2502.06773), which is PPO as it first was, with a learned critic, and rewards exploration beside correctness:

    reward      1 / 0 / -0.5 for right / wrong / no boxed answer, less c / length               `exploration_reward`
                or 0.8 of that + 0.2 of a second model's opinion of creativity and effort       `judge`
    KL          at every token, to where the run began: r_t = -beta * log pi/ref                `critic_advantages`
    advantage   A_t = sum_l (discount * trace)^l * delta_{t+l},                                 `gae`
                delta_t = r_t + discount * V(s_{t+1}) - V(s_t); discount 1 here
    critic      a transformer of its own, begun as the policy's copy, and a linear head         `Critic`

Its released 8B script: rollouts of 512, updates of 128 (--prompts 512 --samples 1 --minibatches 4), actor 2e-7, critic
2e-6 (here always 10 times the actor's), beta 0.05. What it leaves open, or we do otherwise: --trace is 1, because below
1 a reward at the end of a long chain hardly reaches its beginning; the value loss is not clipped.
"""

import re

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

import parallel
from model import Transformer
from packing import Packed
from parallel import World
from sample import Sampler, SamplingParams
from tasks import Problem
from tokenizer import Tokenizer
from verify import Verdict

# --- GRPO, Dr. GRPO, DAPO, REINFORCE ----------------------------------------------------------------------------------


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


def token_weights(lengths: Tensor, mask: Tensor, mean: str, max_tokens: int) -> Tensor:
    """How a loss is averaged, as weights [N, T] for a sum that is then divided by the token count.

    "token": every token weighs the same (T1, DAPO). "sequence": every response weighs the same (GRPO: so a token of a
    long wrong answer weighs less). "constant": divided by max_tokens, whatever the lengths (Dr. GRPO).
    """
    if mean == "token":
        return mask
    average = lengths.sum() / len(lengths)
    return mask * (average / (lengths[:, None] if mean == "sequence" else max_tokens))


# --- RLSP: the reward -------------------------------------------------------------------------------------------------


def exploration_reward(verdicts: list[Verdict], lengths: Tensor, cost: float, judged: Tensor | None = None) -> Tensor:
    """1 if right, 0 if not, -0.5 without a boxed answer; less cost / length: thinking longer costs less. [N].

    judged: a judge's scores in [0, 1], which then stand in for the length: 0.8 * correctness + 0.2 * judged.
    """
    worth = {"correct": 1.0, "no_answer": -0.5}
    correctness = torch.tensor([worth.get(verdict.outcome, 0.0) for verdict in verdicts])
    return correctness - cost / lengths if judged is None else 0.8 * correctness + 0.2 * judged


JUDGE_ROOM = 24  # tokens kept free for the judge's reply, and for cut text that is encoded a little longer
JUDGE_PROMPT = """Here is a problem and an attempt at it.

Problem: {problem}

Attempt: {response}

Do not judge whether the attempt is right. How creative is it, and how much effort does it make: does it try several \
ways, notice its mistakes, check its result? Reply with one number from 0 (none at all) to 10 (as much as one can)."""


def parse_score(reply: str) -> float:
    """The first number of a judge's reply, from 0 to 10, as a score in [0, 1]; a reply without a number scores 0."""
    number = re.search(r"\d+(?:\.\d+)?", reply)
    return min(float(number[0]), 10.0) / 10 if number else 0.0


def judge_prompt(problem: Problem, response: str, tokenizer: Tokenizer) -> list[int]:
    question = JUDGE_PROMPT.format(problem=problem.question, response=response)
    return tokenizer.chat([{"role": "user", "content": question}])


def judge(
    sampler: Sampler, tokenizer: Tokenizer, problems: list[Problem], responses: list[str], world: World
) -> Tensor:
    """A second model's score of each response, [N] in [0, 1], on every rank. A response too long for it is cut."""
    prompts = []
    for problem, response in zip(problems, responses):
        room = sampler.model.config.context - JUDGE_ROOM - len(judge_prompt(problem, "", tokenizer))
        prompts.append(judge_prompt(problem, tokenizer.decode(tokenizer.encode(response)[:room]), tokenizer))
    mine = parallel.balance([len(prompt) for prompt in prompts], world.size)[world.rank]
    replies = sampler.generate([prompts[i] for i in mine], 1, SamplingParams(max_tokens=8, temperature=0.0))
    scores = {i: parse_score(tokenizer.decode(reply.tokens)) for i, (reply,) in zip(mine, replies)}
    merged = {i: value for share in parallel.gather_objects(scores) for i, value in share.items()}
    return torch.tensor([merged[i] for i in range(len(prompts))])


# --- RLSP: the critic -------------------------------------------------------------------------------------------------


def gae(rewards: Tensor, values: Tensor, mask: Tensor, discount: float, trace: float) -> Tensor:
    """Generalised advantage estimation (arXiv 1506.02438). All [N, T]; nothing follows a response's last token.

    rewards[t] is paid for token t, values[t] is expected before it. trace 0: one step ahead; 1: the whole return.
    """
    advantages = torch.zeros_like(rewards)
    following, value = torch.zeros_like(rewards[:, 0]), torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + discount * value - values[:, t]
        advantages[:, t] = following = (delta + discount * trace * following) * mask[:, t]
        value = values[:, t] * mask[:, t]
    return advantages


def critic_advantages(rewards: Tensor, kl: Tensor, values: Tensor, mask: Tensor, trace: float) -> tuple[Tensor, Tensor]:
    """(advantages, returns), both [N, T], from rewards [N] paid at the last token and the KL's cost [N, T] at each.

    Advantages are brought to mean 0 and deviation 1 over the batch's tokens, as usual in PPO; returns, the critic's
    targets, are not.
    """
    last = mask * (mask.cumsum(dim=1) == mask.sum(dim=1, keepdim=True))
    advantages = gae(rewards[:, None] * last - kl * mask, values, mask, 1.0, trace)
    returns = advantages + values
    mean = (advantages * mask).sum() / mask.sum()
    deviation = (((advantages - mean) ** 2 * mask).sum() / mask.sum()).sqrt()
    return (advantages - mean) / (deviation + 1e-8) * mask, returns


class Critic(nn.Module):
    """V(prompt and response so far), one number per position: the reward that is still to come.

    The head starts at zero, so that at first every value is 0 and the critic does not mislead.
    """

    def __init__(self, model: Transformer):
        super().__init__()
        model.head = None  # it predicts no tokens
        self.model = model
        self.value = nn.Linear(model.config.dim, 1)
        nn.init.zeros_(self.value.weight)
        nn.init.zeros_(self.value.bias)

    def forward(self, packed: Packed) -> Tensor:
        hidden = self.model(packed.tokens, packed.documents, packed.positions, parents=packed.parents)
        return self.value(hidden.to(self.value.weight.dtype)).squeeze(-1).float()


def values_of(critic: Critic, packed: Packed) -> Tensor:
    """[R, T]: what is expected before each response token, at the position that predicts it; 0 elsewhere."""
    packed = packed.to(next(critic.parameters()).device)
    values = critic(packed) * packed.mask
    if isinstance(critic, FSDPModule) and not torch.is_grad_enabled():
        critic.reshard()  # see parallel.score
    return values


def value_loss(values: Tensor, returns: Tensor, mask: Tensor, token_count: float) -> Tensor:
    """Half the squared error of the critic, divided once by the update's tokens. [R, T] -> scalar."""
    return 0.5 * ((values - returns) ** 2 * mask).sum() / token_count
