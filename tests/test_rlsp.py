"""rlsp.py: rewards, opinions, GAE and the critic against numbers worked out by hand, and a step
against its paper.

That rl.py takes such a fork, with its flags and on many ranks, is what test_rl_runs.py and
test_fork.py show, too.
"""

import dataclasses

import pytest
import test_rl as hand
import torch
from test_rl import (  # noqa: F401
    ALONE,
    LENGTHS,
    TOKENIZER,
    command,
    make_responses,
    same,
    tensor,
    tiny,
    token_logprobs,
)

import parallel
import rlsp
import sample
from model import random_init
from parallel import World
from rollout import Response
from sample import Completion
from tasks import Problem
from verify import Verdict


def responses_of(*found: tuple[str, int]) -> list[Response]:
    """(outcome, characters / 4 before the box) of each."""
    made = []
    for outcome, length in found:
        text = "abcd" * length + "\\boxed{2} and some more"
        completion = Completion([0] * 7, [0.0] * 7, "stop")
        made.append(Response(Problem("1+1", "2"), [1], completion, text, Verdict(outcome), None))
    return made


def make_learner(world: World = ALONE, **given) -> rlsp.RLSPLearner:
    """test_rl's, with a critic: plain gradient descent at rate 1."""
    learner = hand.make_learner(world=world)
    double = lambda model: rlsp.Critic(model).double()  # noqa: E731
    critic = parallel.shard(random_init(hand.SHAPE, 2, torch.float64), world, wrap=double)
    learner.models["critic"] = critic
    learner.optimizers["critic_sgd"] = torch.optim.SGD(critic.parameters(), 1.0)
    given = {"length_cost": 2.0, "critic_first": 0, "value_clip": 1e9} | given
    learner.config, learner.recipe = hand.step_config(rlsp.Config, **given)
    return rlsp.RLSPLearner(**vars(learner))


def test_exploration_reward_by_hand():
    """Bug: a missing box scored as a wrong answer, or thinking longer made to cost more."""
    responses = responses_of(
        ("correct", 500), ("wrong", 1000), ("no_answer", 2000), ("timeout", 4000)
    )
    config = rlsp.Config(model="", out="")
    same(rlsp.exploration(responses, config), 1 - 2, 0 - 1, -0.5 - 0.5, 0 - 0.25)
    same(rlsp.correctness(responses), 1, 0, -0.5, 0)
    boxes = responses_of(("correct", 500))  # what stands between two boxes is no thought
    boxes[0].text += "abcd" * 500 + "\\boxed{2}"
    same(rlsp.exploration(boxes, config), 1 - 2)
    empty = responses_of(("wrong", 0))  # a box and no thought: as dear as can be, and finite
    same(rlsp.exploration(empty, config), -1000)


def test_opinions_and_the_length(monkeypatch):
    """Bug: opinion and correctness weighed the wrong way, or the length free beside them."""
    monkeypatch.setattr(rlsp, "opinions", lambda *_: tensor(*[0.5] * 12))
    learner = make_learner()
    learner.judge = (learner.sampler, None)
    responses = make_responses(learner)
    metrics = rlsp.train_step(learner, responses, 1)
    cost = rlsp.length_cost(responses, learner.config).sum().item()
    assert metrics["reward"] == pytest.approx((0.8 * (5 - 0.5) + 0.2 * 6 - cost) / 12)


def test_value_clip_by_hand():
    """Bug: the clip keeps a value from coming back. Old values 0, returns 1: one that has moved to
    0.5 has had enough (its loss is that of 0.2, no gradient); one that has moved away is pulled
    back."""
    values = tensor(0.1, 0.5, -0.5).requires_grad_()
    old, returns = torch.zeros(3), torch.ones(3)
    loss = rlsp.value_loss(values, old, returns, 0.2, 3)
    loss.backward()
    same(loss.detach(), 0.5 * (0.9**2 + 0.8**2 + 1.5**2) / 3)
    same(values.grad, -0.9 / 3, 0, -1.5 / 3)


def test_the_papers_numbers():
    """Bug: a default of T1's where RLSP's code has its own; a clip that no step uses."""
    config = rlsp.Config(model="", out="")
    recipe = rlsp.rl.RECIPES["rlsp"]
    assert (config.length_cost, config.critic_first, config.value_clip) == (1000, 4, 0.2)
    assert (recipe.lr, recipe.kl_coef, recipe.temperature, config.trace) == (2e-7, 0.05, 0.7, 1)
    losses = []
    for clip in (1e9, 1e-3):  # a second update, when values have moved
        learner = make_learner(value_clip=clip, epochs=2)
        losses.append(rlsp.train_step(learner, make_responses(learner), 1)["value_loss"])
    assert losses[0] < losses[1]


def test_at_first_only_the_critic_learns():
    """Bug: the policy follows a critic that knows nothing yet; or it stays frozen for ever."""
    learner = make_learner(critic_first=1)
    before = [p.detach().clone() for p in learner.policy.parameters()]
    values = [p.detach().clone() for p in learner.critic.parameters()]
    responses = make_responses(learner)
    rlsp.train_step(learner, responses, 1)
    assert all(map(torch.equal, before, learner.policy.parameters()))
    assert not all(map(torch.equal, values, learner.critic.parameters()))
    rlsp.train_step(learner, responses, 2)
    assert not all(map(torch.equal, before, learner.policy.parameters()))


@pytest.mark.parametrize(
    ("reply", "score"),
    [("7", 0.7), ("Score: 8.5/10", 0.85), ("0", 0), ("100", 1), ("very creative", 0.5), ("", 0.5)],
)
def test_judges_replies(reply, score):
    """Bug: a judge that does not answer as asked crashes the run, or pays more than 1."""
    assert rlsp.read_reply(reply) == pytest.approx(score)


def test_judge_cuts_what_is_too_long_for_it():
    """Bug: one long response, and the judge's context is exceeded after an hour of training."""
    tight = dataclasses.replace(hand.SHAPE, context=560)
    long, short = responses_of(("wrong", 1), ("wrong", 1))
    long.text, short.text = "a" * 2000, "4"
    sampler = sample.Sampler(random_init(tight, 0), TOKENIZER)
    scores = rlsp.opinions(sampler, TOKENIZER, [long, short], ALONE)
    assert scores.shape == (2,) and ((scores >= 0) & (scores <= 1)).all()


def test_gae_closed_forms():
    """Bug: the sum runs on into the next response, or the wrong way. trace 0: one step ahead; trace
    1: return less value. The second response's single token is worth 9 - 7, whatever stands beside
    it."""
    rewards, values, lengths = tensor(0, 1, 2, 9), tensor(0.5, 1.5, -1, 7), torch.tensor([3, 1])
    same(rlsp.gae(rewards, values, lengths, 0.9, 0.0), 0.9 * 1.5 - 0.5, 1 - 0.9 - 1.5, 2 + 1, 2)
    same(
        rlsp.gae(rewards, values, lengths, 0.9, 1.0),
        0.9 + 0.81 * 2 - 0.5,
        1 + 0.9 * 2 - 1.5,
        2 + 1,
        2,
    )
    deltas = [0.9 * 1.5 - 0.5, 1 - 0.9 - 1.5, 3.0]
    wanted = [sum((0.9 * 0.8) ** (j - i) * deltas[j] for j in range(i, 3)) for i in range(3)]
    same(rlsp.gae(rewards, values, lengths, 0.9, 0.8), *wanted, 2)


def test_critic_advantages_by_hand():
    """Bug: the reward paid at another response's token instead of the last; the KL subtracted
    twice; returns normalised."""
    kl, values, lengths = tensor(0.1, 0.2, 0, 0, 0), tensor(0.5, 0.5, 0, 0, 0), torch.tensor([2, 3])
    advantages, returns = rlsp.critic_advantages(tensor(1, 0), kl, values, lengths, trace=1.0)
    same(returns, 1 - 0.3, 1 - 0.2, 0, 0, 0)
    raw = tensor(0.2, 0.3, 0, 0, 0)
    same(advantages, *(raw - raw.mean()) / raw.std(unbiased=False))


def returns_by_hand(learner: rlsp.RLSPLearner, responses: list[Response]) -> list[torch.Tensor]:
    """No boxed answer: the last one; a cost of 2 / length; the KL of all tokens from there on."""
    found = []
    for i, response in enumerate(responses):
        thought = response.text.split("\\boxed")[0]
        reward = hand.RIGHT[i] - (0.5 if i == 11 else 0) - 2 / max(1, len(thought) / 4)
        reference, _ = token_logprobs(learner.anchor.model, response.example, 1.2)
        spent = 0.05 * (
            torch.tensor(response.completion.logprobs, dtype=torch.float64) - reference.detach()
        )
        found.append(torch.stack([reward - spent[t:].sum() for t in range(LENGTHS[i])]))
    return found


def test_critic_learns_the_returns():
    """Bug: the value head reads the position after the token, is left out of the optimizer, or gets
    the policy's gradient. Its first gradient, at values of 0, is -(sum of returns) / M for the
    bias."""
    learner = make_learner()
    responses = make_responses(learner)
    returns = torch.cat(returns_by_hand(learner, responses))
    metrics = rlsp.train_step(learner, responses, 1)
    same(learner.critic.value.bias, returns.mean().item(), tolerance=1e-5)
    assert metrics["value_loss"] == pytest.approx(0.5 * (returns**2).mean().item(), rel=1e-5)


def test_a_step_is_the_papers_formula():
    """Bug: any piece (reward, KL per token, advantages, clipping, average) that is not what the
    paper says; a group of equal rewards that is dropped, though a critic tells its tokens apart."""
    learner = make_learner()
    responses = make_responses(learner)
    returns = returns_by_hand(learner, responses)
    table = torch.cat(returns)
    loss = 0.0
    for response, row in zip(responses, returns):
        advantage = (row - table.mean()) / table.std(unbiased=False)
        logprob, _ = token_logprobs(learner.policy.model, response.example, 1.2)
        ratio = (logprob - torch.tensor(response.completion.logprobs, dtype=torch.float64)).exp()
        surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        loss = loss - surrogate.sum() / sum(LENGTHS)
    named = dict(learner.policy.model.named_parameters())
    wanted = dict(zip(named, torch.autograd.grad(loss, list(named.values()))))
    gradient, metrics = hand.take_step(learner, responses, rlsp.train_step)
    policy = {
        name.removeprefix("policy "): value
        for name, value in gradient.items()
        if name.startswith("policy ")
    }
    assert metrics["clip_fraction"] > 0.1 and metrics["loss"] == pytest.approx(
        loss.item(), rel=1e-5
    )
    hand.assert_close(policy, wanted, 1e-5)


def test_gradients_do_not_depend_on_micro_batches():
    """Bug: a loss divided by each micro-batch's own tokens, so that a short one weighs as much as a
    long one.
    """
    wanted, metrics = hand.take_step(
        make_learner(), make_responses(make_learner()), rlsp.train_step
    )
    for micro_tokens in (1, 40):
        learner = make_learner(micro_tokens=micro_tokens)
        got, others = hand.take_step(learner, make_responses(make_learner()), rlsp.train_step)
        hand.assert_close(got, wanted)
        assert others == pytest.approx(metrics, rel=1e-5)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("--judge", "nowhere"), "nowhere"),
        (("--trace", "-0.1"), "--trace"),
        (("--penalty", "advantage"), "--penalty advantage"),
        (("--recipe", "t1"), "--recipe t1"),
        (("--prompts", "0"), "--prompts"),
    ],
)
def test_bad_flags(command, flags, complaint):  # noqa: F811
    """Bug: a mistake that shows after the first rollout, an hour later, as a traceback."""
    line = command(*hand.COUNTDOWN, *flags, main=rlsp.main, config_class=rlsp.Config)
    assert complaint in line and line.startswith("error: ") and "\n" not in line


def test_judge_without_room(command, tiny):  # noqa: F811
    """Bug: a judge whose context is shorter than its own instructions stops the run after the first
    rollout.
    """
    line = command(*hand.COUNTDOWN, "--judge", str(tiny), main=rlsp.main, config_class=rlsp.Config)
    assert line.startswith("error: --judge, countdown, problem 1") and "\n" not in line
