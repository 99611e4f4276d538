"""RLSP (arXiv 2502.06773): PPO with a critic, and a reward for exploring. A fork of rl.py.

    python rlsp.py --model DIR --task countdown --samples 8 --length-cost 20 --out runs/rlsp
    torchrun --standalone --nproc_per_node=8 rlsp.py --model DIR --data problems.jsonl --out runs/r
    python rlsp.py ... --judge DIR2          # a second model's opinion beside the length's cost

It is here to show how a second paper is added: flags, a reward, a model and a `train_step` of its
own, made of rl.py's pieces. All that rl.py's flags, torchrun and --resume do, they do here.

RLSP is PPO as it first was, with a learned critic, and rewards exploration beside correctness:

    reward      1 / 0 / -0.5 for right / wrong / no boxed answer                       `correctness`
                with --judge 0.8 of that + 0.2 of a second model's opinion of
                creativity and effort                                                     `opinions`
                less c / length of the thought, which is what stands before the box    `length_cost`
    KL          at every token, to where the run began: r_t = -beta * log pi/ref `critic_advantages`
    advantage   A_t = sum_l (discount * trace)^l * delta_{t+l},                                `gae`
                delta_t = r_t + discount * V(s_{t+1}) - V(s_t); discount 1 here
    critic      a transformer of its own, begun as the policy's copy, and a linear head     `Critic`

As in its released code: the length is that of the text before the first box, in characters / 4; a
judge whose reply holds no number says 0.5; lambda is 1; the temperature 0.7; the policy stands
still for the first 4 steps, while the critic learns; the critic's error is clipped (`value_loss`).
Its 8B script takes rollouts of 512 and updates of 128 (--prompts 512 --samples 1 --minibatches 4),
rates of 2e-7 for the policy and 2e-6 for the critic (here always 10 times the policy's), beta 0.05.

What we do differently: advantages are brought to mean 0 and deviation 1, its code does that to
rewards. The KL's coefficient stays as it is. A right answer is one that the task's judge accepts,
not one that is equal as text. The length's cost is taken from the reward as a whole, not from the
0.8 of it. The judge's prompt and its scale from 0 to 10 are ours. Left out, --prompts, --samples
and --minibatches are rl.py's, 32 x 64 in one update.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import parallel
import pretrained
import rl
import rollout
from cli import UserError
from model import Transformer, load_pretrained, model_folder, read_config
from packing import Packed
from parallel import World
from rl import Learner, Recipe, flat, give, lengths
from rollout import Response
from sample import Sampler, SamplingParams
from tasks import Problem
from tokenizer import Tokenizer, load_tokenizer


@dataclass
class Config(rl.Config):
    recipe: str = "rlsp"
    """rlsp; other algorithms are rl.py's."""
    length_cost: float = 1000.0
    """c of the reward's - c / length, in tokens (1000 suits chains of thousands)."""
    judge: str = ""
    """Model folder, or a name of the hub, of a judge of creativity and effort: 0.2 of its opinion
    stands beside 0.8 of the correctness."""
    critic_first: int = 4
    """Steps in which only the critic learns: a policy that follows a new critic is misled."""
    value_clip: float = 0.2
    """A value may move so far from what it was before the step, for the loss to count it."""
    trace: float = 1.0
    """GAE's lambda: 0 trusts the critic one step ahead, 1 only the whole return, which is unbiased.
    """


# --- the reward -----------------------------------------------------------------------------------


def correctness(responses: list[Response]) -> Tensor:
    """1 if right, 0 if not, -0.5 without a boxed answer. [N]."""
    worth = {"correct": 1.0, "no_answer": -0.5}
    outcomes = [response.verdict.outcome for response in responses]
    return torch.tensor([worth.get(name, 0.0) for name in outcomes], dtype=torch.float64)


def length_cost(responses: list[Response], config: Config) -> Tensor:
    """c / length of each thought: thinking longer costs less. [N].

    The thought is the text before the first box, in characters / 4: about as many tokens.
    """
    thoughts = [response.text.partition("\\boxed")[0] for response in responses]
    sizes = [max(1.0, len(thought) / 4) for thought in thoughts]
    return config.length_cost / torch.tensor(sizes, dtype=torch.float64)


def exploration(responses: list[Response], config: Config) -> Tensor:
    """Correctness less the length's cost. [N]."""
    return correctness(responses) - length_cost(responses, config)


rl.MAY_CHANGE += ("judge",)  # its folder may move; what it holds is checked
rl.RECIPES["rlsp"] = Recipe(
    reward=exploration, advantage=None, lr=2e-7, kl_coef=0.05, temperature=0.7
)

QUESTION = """Here is a problem and an attempt at it.

Problem: {problem}

Attempt: {response}

Do not judge whether the attempt is right. How creative is it, and how much effort does it make: \
does it try several ways, notice its mistakes, check its result? Reply with one number from 0 \
(none at all) to 10 (as much as one can)."""
ROOM = 24  # tokens kept free for the reply, and for cut text that is encoded a little longer


def opinions(
    sampler: Sampler, tokenizer: Tokenizer, responses: list[Response], world: World
) -> Tensor:
    """A second model's opinion of each response, [N] in [0, 1]. One too long for it is cut."""
    context = sampler.model.config.context
    prompts = []
    for response in responses:
        room = context - ROOM - len(question(response.problem, "", tokenizer))
        text = tokenizer.decode(tokenizer.encode(response.text)[:room])
        prompts.append(question(response.problem, text, tokenizer))

    def ask(mine: list[list[int]]) -> list[float]:
        replies = sampler.generate(mine, 1, SamplingParams(max_tokens=8, temperature=0.0))
        return [read_reply(tokenizer.decode(reply.tokens)) for (reply,) in replies]

    costs = [len(prompt) for prompt in prompts]
    return torch.tensor(parallel.share_out(ask, prompts, costs, world), dtype=torch.float64)


def question(problem: Problem, response: str, tokenizer: Tokenizer) -> list[int]:
    text = QUESTION.format(problem=problem.question, response=response)
    return tokenizer.chat([{"role": "user", "content": text}])


def read_reply(reply: str) -> float:
    """The first number of a reply, from 0 to 10, as one in [0, 1]; without a number, 0.5."""
    number = re.search(r"\d+(?:\.\d+)?", reply)
    return min(float(number[0]), 10.0) / 10 if number else 0.5


# --- the critic -----------------------------------------------------------------------------------


class Critic(nn.Module):
    """V(prompt and response so far): the reward that is still to come, before each trained token.

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
        hidden, _ = parallel.trained_places(self.model, packed)
        values = self.value(hidden.to(self.value.weight.dtype)).float()
        if len(packed.index) == 0:
            values = values[:0]
        return values.sum(dim=1)  # [M, 1] -> [M], not as a view, of which FSDP warns


def gae(rewards: Tensor, values: Tensor, lengths: Tensor, discount: float, trace: float) -> Tensor:
    """Generalised advantage estimation (arXiv 1506.02438), of each token. [M], [M], [N] -> [M].

    rewards[t] is paid for token t, values[t] is expected before it; nothing follows a response's
    last token. trace 0: one step ahead; 1: the whole return.
    """
    sizes = lengths.tolist()
    # [N, T], from the end of all responses to their beginning. Behind a response stand zeros, of
    # which nothing comes.
    paid = pad_sequence(rewards.split(sizes), batch_first=True)
    expected = pad_sequence(values.split(sizes), batch_first=True)
    advantages = torch.zeros_like(paid)
    following = torch.zeros_like(paid[:, 0])
    next_value = torch.zeros_like(paid[:, 0])
    for t in reversed(range(paid.shape[1])):
        delta = paid[:, t] + discount * next_value - expected[:, t]
        following = delta + discount * trace * following
        advantages[:, t] = following
        next_value = expected[:, t]
    return torch.cat([row[:size] for row, size in zip(advantages, sizes)])


def critic_advantages(
    rewards: Tensor, kl: Tensor, values: Tensor, lengths: Tensor, trace: float
) -> tuple[Tensor, Tensor]:
    """(advantages [M], returns [M]) from rewards [N], paid at the last token, and the KL's cost
    [M].

    Advantages are brought to mean 0 and deviation 1 over the batch's tokens, as usual in PPO;
    returns, the critic's targets, are not.
    """
    paid = -kl
    last = lengths.cumsum(0) - 1
    paid[last] += rewards.to(paid.dtype)
    advantages = gae(paid, values, lengths, 1.0, trace)
    returns = advantages + values
    deviation = advantages.std(unbiased=False)
    return (advantages - advantages.mean()) / (deviation + 1e-8), returns


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, clip: float, token_count: float
) -> Tensor:
    """Half the squared error of the critic, divided once by the update's tokens. [M] -> scalar.

    PPO's clip, of values: one that has moved by more than `clip` towards its return since the step
    began has no gradient. old_values: before the step.
    """
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    worse = torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)
    return 0.5 * worse.sum() / token_count


# --- one step of RLSP -----------------------------------------------------------------------------


@dataclass
class RLSPLearner(Learner):
    judge: tuple[Sampler, Tokenizer] | None = None

    @property
    def critic(self) -> Critic:
        return self.models["critic"]


def train_step(learner: RLSPLearner, responses: list[Response], step: int) -> dict[str, float]:
    """One step of RLSP on judged responses. Returns its metrics."""
    config, recipe = learner.config, learner.recipe
    rewards = rl.rewards_of(responses, config, recipe)
    if learner.judge:
        opinion = opinions(*learner.judge, responses, learner.world)
        judge, _ = learner.judge
        if rl.is_large(judge):
            judge.release()  # training needs the room
        rewards = 0.8 * correctness(responses) + 0.2 * opinion - length_cost(responses, config)
    penalty = rl.PENALTIES[recipe.penalty].reward
    rewards = rl.penalise(rewards, rl.patterns_of(responses), penalty)
    for response, reward in zip(responses, rewards.tolist()):
        response.reward = reward
    metrics = rl.describe(responses, rewards, config.samples)
    metrics |= rl.give_log_probs(learner, responses)

    # From rewards to an advantage for every token.
    sizes = lengths(responses)
    kl = torch.zeros(int(sizes.sum()))
    if learner.anchor:
        kl = recipe.kl_coef * (flat(responses, "old") - flat(responses, "anchor"))
    values = learner.token_values(
        lambda packed: parallel.forward(learner.critic, packed), responses
    )
    advantages, returns = critic_advantages(rewards, kl, values, sizes, config.trace)
    give(responses, "advantage", advantages)

    # The PPO loop: one update of policy and critic for each minibatch.
    tally = rl.Tally()
    missed = 0.0
    targets = torch.stack([values, returns]).split(sizes.tolist(), dim=1)
    for rows in rl.minibatches(len(responses), config, step):
        chosen = [responses[i] for i in rows]
        rl.policy_gradient(learner, chosen, tally)
        if step <= config.critic_first:  # the gradient was computed for the metrics
            learner.policy.zero_grad()
        old_values, wanted = torch.cat([targets[i] for i in rows], dim=1)
        missed += critic_gradient(learner, chosen, old_values, wanted)
        rl.descend(learner, tally)
    metrics |= tally.metrics(learner.exact)
    if step <= config.critic_first:
        del metrics["grad_norm"]  # of 0, which would look as if nothing could be learned
    missed = float(parallel.sum_over_ranks(missed))
    metrics["value_loss"] = missed / (config.epochs * len(returns))
    if learner.anchor:
        rl.update_anchor(learner.anchor, learner.policy, recipe.anchor_decay)
    return metrics


def critic_gradient(
    learner: RLSPLearner, responses: list[Response], old_values: Tensor, returns: Tensor
) -> Tensor:
    """The critic's gradient of one minibatch; its loss, summed over this rank's tokens, fp64."""
    old_values = old_values.to(learner.world.device)
    returns = returns.to(learner.world.device)
    clip = learner.config.value_clip
    summed = torch.zeros((), dtype=torch.float64, device=returns.device)
    for at, packed in learner.micro_batches(responses):
        values = parallel.forward(learner.critic, packed)
        loss = value_loss(values, old_values[at], returns[at], clip, len(returns))
        loss.backward()
        summed += loss.detach() * len(returns)
    return summed


# --- the run --------------------------------------------------------------------------------------


def make_learner(
    config: Config, recipe: Recipe, problems: list[Problem], world: World
) -> RLSPLearner:
    """What rl.py loads, and the critic and the judge."""
    check_flags(config)
    judge = load_judge(config, problems, world) if config.judge else None
    learner = rl.make_learner(config, recipe, problems, world)
    critic = rl.load_trained(config, world, wrap=Critic)
    learner.models["critic"] = critic
    learner.optimizers["critic_adamw"] = parallel.adamw(critic.parameters(), 10 * recipe.lr)
    if config.judge:
        learner.inputs["judge"] = pretrained.fingerprint(config.judge)
    return RLSPLearner(**vars(learner), judge=judge)


def load_judge(config: Config, problems: list[Problem], world: World) -> tuple[Sampler, Tokenizer]:
    """UserError if it has no room for its instructions and one of the problems."""
    tokenizer = load_tokenizer(config.judge)
    context = read_config(model_folder(config.judge)).context
    prompts = (question(problem, "", tokenizer) for problem in problems)
    source = f"--judge, {config.data or config.task}"
    rollout.room_for_responses(prompts, ROOM, context, source)
    model = load_pretrained(config.judge, getattr(torch, config.dtype), world.device)
    return Sampler(model, tokenizer, config.max_batch), tokenizer


def check_flags(config: Config) -> None:
    if config.recipe != "rlsp":
        raise UserError(f"--recipe {config.recipe}: rlsp.py has its own; others are rl.py's")
    if not 0 <= config.trace <= 1:
        raise UserError(f"--trace must lie between 0 and 1, but is {config.trace}")
    if config.critic_first < 0 or config.value_clip <= 0:
        raise UserError("--critic-first must not be below 0, and --value-clip must be above 0")
    if config.penalty == "advantage":
        raise UserError("--penalty advantage: RLSP has an advantage per token, not per response")


def main(config: Config) -> None:
    rl.main(config, make_learner, train_step)


if __name__ == "__main__":
    rl.command(Config, main)
