"""rl.py: every idea against numbers worked out by hand, every recipe against a plain float64
computation.

RLSP is in test_rlsp.py; what needs more than one process, or a process killed half-way, in
test_rl_runs.py.
"""

import copy
import dataclasses
import itertools
import json
import math
import random
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
import tyro
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import alarms
import cli
import cot
import evaluate
import parallel
import relatives
import rl
import rollout
import sample
import sft
import tasks
from cli import UserError
from kernels import logprob_entropy
from model import ModelConfig, random_init, save_pretrained
from packing import Example, pack
from parallel import World
from rollout import Response
from sample import Completion, SamplingParams
from tasks import Problem
from tokenizer import demo_tokenizer
from verify import Verdict

ALONE = World(0, 1, torch.device("cpu"))
TOKENIZER = demo_tokenizer(cot.WORDS)
STOP = min(TOKENIZER.eos_ids)
SHAPE = ModelConfig(
    vocab_size=TOKENIZER.vocab_size,
    dim=24,
    layers=2,
    heads=3,
    kv_heads=1,
    head_dim=8,
    mlp_dim=40,
    tied=True,
    context=128,
    eos_ids=(STOP,),
)


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def same(got: Tensor, *wanted: float, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(
        got.double().flatten(), tensor(*wanted), rtol=tolerance, atol=tolerance
    )


# --- T1, one idea at a time -----------------------------------------------------------------------


def test_penalise_overrides_the_answer():
    """Bug: a penalty added to the reward, so that a right answer behind garbage still pays."""
    rewards = rl.penalise(tensor(1, 0, 1, 0), [None, "repeated", "garbled", None])
    same(rewards, 1, -1, -1, 0)
    same(rl.penalise(tensor(1, 0, 1, 0), [None, "repeated", "garbled", None], to=0.0), 1, 0, 0, 0)


@pytest.mark.parametrize(
    ("tokens", "reason", "text", "pattern"),
    [
        ([1, 2, STOP], "stop", "a right answer", None),
        ([1, 2, 3], "length", "a right answer", "overlong"),
        (list(range(20)) * 4 + [STOP], "stop", "fine", "repeated"),
        (list(range(20)) * 3 + [STOP], "stop", "fine", None),
        ([1, STOP], "stop", "a \ufffd b", "garbled"),
        ([1, STOP], "stop", "wait, ответ", "garbled"),
    ],
)
def test_unexpected_patterns(tokens, reason, text, pattern):
    """Bug: a response that never ended looks fine; a 20-gram counted at three instead of four
    times.
    """
    completion = Completion(tokens, [], reason)
    assert rollout.unexpected_pattern(completion, text, "what is it?") == pattern
    others = tuple(name for name in tasks.PATTERNS if name != pattern)
    assert rollout.unexpected_pattern(completion, text, "what is it?", others) is None
    assert rollout.unexpected_pattern(completion, text, "what is it?", ()) is None


def test_the_language_of_earlier_turns_is_no_foreign_one():
    """Bug: "2+2?" as the last turn of a Russian chat makes every Russian response garbled."""
    completion = Completion([*TOKENIZER.encode("ответ 4"), STOP], [], "stop")
    for earlier, pattern in (((("system", "отвечай"),), None), ((), "garbled")):
        asked = Problem("2+2?", "4", earlier=earlier)
        prompt = tasks.prompt_ids(asked, TOKENIZER)
        [found] = rollout.judge(
            [asked], [prompt], [completion], TOKENIZER, rl.Config("", ""), ALONE
        )
        assert found.pattern == pattern


def test_repetition_at_another_scale():
    """Bug: --repeat-ngram and --repeat-times that do not reach the check, or are taken for each
    other.
    """
    once, twice = (
        Completion([1, 2, 3, 4, STOP], [], "stop"),
        Completion([1, 2, 3, 9, 1, 2, 3, STOP], [], "stop"),
    )
    assert rollout.unexpected_pattern(once, "", "", ngram=3, times=2) is None
    assert rollout.unexpected_pattern(twice, "", "", ngram=3, times=2) == "repeated"
    assert rollout.unexpected_pattern(twice, "", "", ngram=3, times=3) is None
    assert rollout.unexpected_pattern(twice, "", "", ngram=4, times=2) is None


def test_a_response_that_the_policy_finds_unlikely():
    """Bug: a sum for a mean, so that long responses are unexpected; or on by default."""
    likely = Completion([*range(2, 102), STOP], [-0.5] * 101, "stop")
    unlikely = Completion([8, STOP], [-9.0, -0.5], "stop")
    for completion in (likely, unlikely):
        assert rollout.unexpected_pattern(completion, "", "") is None
    assert rollout.unexpected_pattern(likely, "", "", least_logprob=-4.0) is None
    assert rollout.unexpected_pattern(unlikely, "", "", least_logprob=-4.0) == "perplexity"
    assert rollout.unexpected_pattern(unlikely, "", "", least_logprob=-4.75) is None
    asked = Problem("1+1?", "2")
    said = Completion([*TOKENIZER.encode("2"), STOP], [-9.0, -0.5], "stop")
    for least, pattern in ((None, None), (-4.0, "perplexity")):  # the flag reaches the judging
        config = rl.Config("", "", least_logprob=least)
        [found] = rollout.judge([asked], [[1]], [said], TOKENIZER, config, ALONE)
        assert found.pattern == pattern


def test_centred_kl_by_hand():
    """Bug: tokens of the next response counted, tokens averaged instead of summed, or the mean left
    in, which pushes all responses one way."""
    logprob, anchor = tensor(-1, -2, -1, -1, -1), tensor(-2, -2.5, -1, -2, -3)
    same(rl.centred_kl(logprob, anchor, torch.tensor([2, 3])), 1.5 - 2.25, 3 - 2.25)


def test_centring_cancels_in_leave_one_out():
    """Bug: a KL centred in another way than by one constant for all; under leave-one-out that
    constant must cancel.
    """
    generator = torch.Generator().manual_seed(0)
    logprob, anchor = torch.randn(2, 30, generator=generator, dtype=torch.float64)
    rewards = torch.randn(6, generator=generator, dtype=torch.float64)
    plain = rewards - 0.3 * (logprob - anchor).view(6, 5).sum(dim=1)
    centred = rewards - 0.3 * rl.centred_kl(logprob, anchor, torch.tensor([5] * 6))
    assert not torch.allclose(plain, centred)
    same(
        rl.leave_one_out(centred.view(2, 3)),
        *rl.leave_one_out(plain.view(2, 3)).flatten().tolist(),
        tolerance=1e-12,
    )


def test_leave_one_out_by_hand():
    """Bug: the response's own reward in its baseline (which is GRPO's mean, and biased)."""
    same(rl.leave_one_out(tensor(1, 0, 0, 0).view(1, 4)), 1, -1 / 3, -1 / 3, -1 / 3)
    same(rl.leave_one_out(tensor(1, 0, -1, 1).view(2, 2)), 1, -1, -2, 2)


@given(st.integers(1, 4), st.integers(2, 6), st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_leave_one_out_is_its_definition(prompts, samples, seed):
    """Bug: the shortcut by the group's mean differs from the definition for some K."""
    rewards = torch.randn(
        prompts, samples, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    wanted = [
        rewards[p, i] - sum(rewards[p, j] for j in range(samples) if j != i) / (samples - 1)
        for p in range(prompts)
        for i in range(samples)
    ]
    same(rl.leave_one_out(rewards), *(float(value) for value in wanted), tolerance=1e-12)


def test_leave_one_out_of_one_sample_is_refused():
    """Bug: K = 1 divides by zero, and a run trains on NaN."""
    with pytest.raises(UserError, match="at least 2"):
        rl.leave_one_out(torch.ones(3, 1))


def test_ppo_at_ratio_one_is_the_policy_gradient():
    """Bug: one epoch of one minibatch is not T1's on-policy update: the gradient must be -A / M at
    every token, times its weight, exactly."""
    logprob = torch.randn(5, requires_grad=True)
    advantage, weight = torch.tensor([0.7, 0.7, -1.3, -1.3, -1.3]), torch.tensor([1.0, 1, 1, 2, 0])
    rl.ppo_clip_loss(logprob, logprob.detach(), advantage, weight, 0.2, 0.2, 5).backward()
    assert torch.equal(logprob.grad, -advantage * weight / 5)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.5, 2.0, -2 * 1.3, 0.0),  # has gone far enough up: clipped at 1 + clip_high
        (1.5, -2.0, 2 * 1.5, 2 * 1.5),  # went up but should go down: never clipped
        (0.5, 2.0, -2 * 0.5, -2 * 0.5),  # went down but should go up: never clipped
        (0.5, -2.0, 2 * 0.8, 0.0),  # has gone far enough down: clipped at 1 - clip_low
    ],
)
def test_clipping_both_ways(ratio, advantage, loss, gradient):
    """Bug: clip_low and clip_high swapped, or the maximum taken for negative advantages (no way
    back).
    """
    logprob = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    value = rl.ppo_clip_loss(
        logprob, torch.zeros(1), torch.tensor([advantage]), torch.ones(1), 0.2, 0.3, 1
    )
    value.backward()
    same(value, loss)
    same(logprob.grad, gradient)


def test_entropy_bonus_is_of_the_whole_distribution():
    """Bug: entropy estimated from the sampled token's log-prob, whose gradient is that of the
    likelihood; or the temperature left out. Value and gradient against float64 autograd."""
    logits = torch.randn(3, 11, dtype=torch.float64, requires_grad=True)
    table = (logits / 1.3).log_softmax(-1)
    wanted = (-(table.exp() * table).sum(-1) * tensor(1, 0, 1)).sum() / 7
    (gradient,) = torch.autograd.grad(wanted, logits)
    _, entropy = logprob_entropy(logits, torch.tensor([0, 1, 2]), 1.3)
    bonus = rl.entropy_bonus(entropy, tensor(1, 0, 1), 7)
    same(bonus, wanted.item())
    torch.testing.assert_close(
        torch.autograd.grad(bonus, logits)[0], gradient, rtol=1e-6, atol=1e-9
    )


def test_anchor_after_n_steps():
    """Bug: decay and 1 - decay swapped. Towards a policy that stands still: ref_n = a^n ref_0 + (1
    - a^n) p.
    """
    anchor, policy = nn.Linear(3, 2).double(), nn.Linear(3, 2).double()
    start, before = copy.deepcopy(anchor), copy.deepcopy(policy)
    for _ in range(5):
        rl.update_anchor(anchor, policy, 0.9)
    for moved, first, target in zip(anchor.parameters(), start.parameters(), policy.parameters()):
        torch.testing.assert_close(moved, 0.9**5 * first + (1 - 0.9**5) * target)
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), before.parameters()))


def test_minibatches_are_a_partition():
    """Bug: a remainder dropped, or the same shuffle in every epoch and step."""
    config = rl.Config(model="", out="", epochs=3, minibatches=4)
    parts = list(rl.minibatches(11, config, step=5))
    epochs = [parts[i : i + 4] for i in range(0, 12, 4)]
    assert [sorted(i for part in epoch for i in part) for epoch in epochs] == [list(range(11))] * 3
    assert epochs[0] != epochs[1] and epochs != [list(rl.minibatches(11, config, step=6))]
    assert [len(part) for part in rl.minibatches(3, config, step=1)] == [
        1
    ] * 9  # never an empty update


@given(st.integers(1, 30), st.integers(0, 3))
@settings(max_examples=20, deadline=None)
def test_every_epoch_draws_every_problem_once(size, seed):
    """Bug: resume skips a round of data, or problems are drawn with repetition."""
    problems = [Problem(str(i), "") for i in range(size)]
    for epoch in range(3):
        drawn = [
            rollout.nth_problem(problems, epoch * size + i, seed).question for i in range(size)
        ]
        assert sorted(drawn, key=int) == [str(i) for i in range(size)]


# --- the relatives --------------------------------------------------------------------------------


def test_baselines_of_the_relatives():
    """Bug: Dr. GRPO dividing by the deviation, GRPO by the biased one, or a baseline over the wrong
    axis.
    """
    rewards = tensor(1, 0, 0, 0, 1, 1, 1, 0).view(2, 4)
    same(relatives.group_mean(rewards)[0], 0.75, -0.25, -0.25, -0.25)
    same(
        relatives.group_normalised(rewards)[0],
        *(value / 0.5001 for value in (0.75, -0.25, -0.25, -0.25)),
    )
    same(relatives.batch_mean(rewards)[1], 0.5, 0.5, 0.5, -0.5)


def test_k3_is_zero_at_the_anchor_and_never_negative():
    """Bug: the ratio upside down. At r = anchor / policy = 2 it is 1 - ln 2; its gradient by log
    policy, 1 - r.
    """
    logprob = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    value = relatives.k3_kl(logprob, tensor(math.log(2), 0))
    value.sum().backward()
    same(value, 1 - math.log(2), 0)
    same(logprob.grad, -1, 0)


def test_soft_overlong_by_hand():
    """Bug: the penalty begins at the limit, or falls below -1. Limit 100, buffer 20: from 80 down
    to -1 at 100.
    """
    same(relatives.soft_overlong(tensor(10, 80, 90, 100, 120), 100, 20), 0, 0, -0.5, -1, -1)


def test_soft_overlong_of_short_responses():
    """Bug: a fifth of --max-tokens 4 is no token at all, and the reward is divided by it."""
    responses = make_responses(make_learner())[:3]  # of 3, 9 and 1 tokens, the first right
    same(relatives.outcome_and_length(responses, step_config(max_tokens=4)[0]), 1, -1, 0)


def test_averages_by_hand():
    """Bug: a loss averaged otherwise than its paper says. Weights of a token of each response, over
    the 6 tokens.
    """
    lengths = torch.tensor([2, 4])
    same(relatives.every_token(lengths, 10) / 6, 1 / 6, 1 / 6)
    same(
        relatives.every_response(lengths, 10) / 6, 1 / (2 * 2), 1 / (2 * 4)
    )  # 1 / (responses * tokens)
    same(relatives.by_the_limit(lengths, 10) / 6, 1 / (2 * 10), 1 / (2 * 10))


def test_truncated_importance_by_hand():
    """Bug: sampler over trainer, or truncated from below: one token with a huge weight then rules
    the step.
    """
    same(
        rl.truncated_importance(tensor(-1, -1, -3), tensor(-1, -3, -1), most=2.0),
        1,
        2,
        math.exp(-2),
    )


# --- watching over a run --------------------------------------------------------------------------


def run_of(**series: list[float]) -> list[dict]:
    steady = {"accuracy": 0.5, "entropy": 1.0, "truncated": 0.05, "skipped": 0}
    length = max(map(len, series.values()), default=12)
    return [steady | {name: values[i] for name, values in series.items()} for i in range(length)]


def test_alarms_name_what_goes_wrong():
    """Bug: an alarm that never rings, or rings in a healthy run; rows without entropy (nothing
    trained) crash it.
    """
    assert (
        alarms.of([])
        == alarms.of(run_of())
        == alarms.of(run_of(accuracy=[0.1 * i for i in range(10)]))
        == []
    )
    collapse = [0.6] * 8 + [0.2] * 5
    for series, name in [
        ({"accuracy": collapse}, "reward collapse"),
        ({"entropy": [1.0] * 8 + [0.1] * 5}, "entropy collapse"),
        ({"truncated": [0.05] * 8 + [0.4] * 5}, "length run-away"),
        ({"skipped": [0] * 8 + [1]}, "not finite"),
    ]:
        (alarm,) = alarms.of(run_of(**series))
        assert alarm.startswith(name) and "--" in alarm
    silent = run_of(accuracy=collapse)
    for row in silent:
        del row["entropy"]
    assert len(alarms.of(silent)) == 1


POPULATIONS = {  # how likely the policy solves a problem that is drawn
    "even": lambda rng: rng.random(),
    "always or never": lambda rng: float(rng.random() < 0.5),
    "mostly hard": lambda rng: rng.betavariate(0.3, 2),
    "mostly easy": lambda rng: rng.betavariate(2, 0.3),
    "rare": lambda rng: rng.random() * (rng.random() < 0.05),
}


def simulated(rng: random.Random, population: str, samples: int, steps: int, left=1.0) -> list:
    """Steps of 8 prompts of a policy that does not change; it solves `left` times what it did."""
    rows = []
    for _ in range(steps):
        solved = [left * POPULATIONS[population](rng) for _ in range(8)]
        endless = [rng.betavariate(0.2, 1.2) for _ in range(8)]  # 0.14 in the mean, mostly 0
        drawn = {}
        for name, chances in (("accuracy", solved), ("truncated", endless)):
            drawn[name] = [rng.random() < chance for chance in chances for _ in range(samples)]
        rates = {name: sum(values) / len(values) for name, values in drawn.items()}
        entropy = sum(rng.lognormvariate(0, 1) for _ in range(8)) / 8
        row = rates | {"entropy": entropy, "skipped": 0}
        if samples > 1 and population in ("even", "mostly hard", "mostly easy"):  # can be learned
            groups = [drawn["accuracy"][i : i + samples] for i in range(0, 8 * samples, samples)]
            row["dropped"] = sum(len(set(group)) == 1 for group in groups) / 8
        rows.append(row)
    return rows


def first_alarm(rows: list[dict], after: int = 0) -> int | None:
    """The step at which the first alarm rings."""
    return next((n for n in range(after, len(rows) + 1) if alarms.of(rows[:n])), None)


@pytest.mark.parametrize("samples", [1, 8])
def test_alarms_are_silent_on_a_policy_that_does_not_change(samples):
    """Bug: the best of 100 noisy steps taken for what the policy could do: with 8 prompts every run
    had its "collapse", and nobody listens to the alarm that is true."""
    rng = random.Random(0)
    rung = 0
    for population in POPULATIONS:
        for _ in range(40):
            rung += first_alarm(simulated(rng, population, samples, 100)) is not None
    assert rung < 0.02 * 40 * len(POPULATIONS)


@pytest.mark.parametrize("left", [0.0, 0.1])
def test_a_real_collapse_is_seen_within_ten_steps(left):
    """Bug: an alarm so careful that it rings when the run is over."""
    rng = random.Random(0)
    waited = []
    for population in ("even", "always or never", "mostly easy"):
        for _ in range(20):
            rows = simulated(rng, population, 8, 40)
            rows += simulated(rng, population, 8, 20, left)
            waited.append((first_alarm(rows, after=41) or 99) - 40)
    assert sorted(waited)[len(waited) // 2] <= 5
    assert sum(steps <= 10 for steps in waited) > 0.9 * len(waited)


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ({"truncated": 1.0, "unexpected": 1.0, "accuracy": 0.0}, "--max-tokens"),
        ({"unexpected": 0.9, "accuracy": 0.0}, "--temperature"),
        ({"accuracy": 0.0}, "too hard"),
        ({"accuracy": 1.0}, "too easy"),
        ({"accuracy": 0.5}, "--samples"),
    ],
)
def test_a_run_that_learns_nothing_says_why(state, reason):
    """Bug: 50 steps in which every group is dropped pass without a word: nothing has changed for
    the worse, so nothing rings. It must ring from the start, once and not at every step."""
    row = {"truncated": 0.0, "unexpected": 0.0, "skipped": 0, "loss": 0.0, "max_tokens": 8} | state
    for idle in (row | {"dropped": 1.0}, row):  # the second: a recipe that drops no single group
        assert all("learned" not in alarm for alarm in alarms.of([idle] * 9))
        alarm = alarms.of([idle] * 50)[-1]
        assert alarm.startswith("nothing is learned: no update for 10 steps") and reason in alarm
        learns = idle | {"dropped": 0.9, "loss": 0.1, "grad_norm": 1.0}
        assert all("learned" not in alarm for alarm in alarms.of([idle] * 9 + [learns] + [idle]))


def test_responses_that_never_end_are_named():
    """Bug: a run whose responses are all cut off from its first step on is silent, for their share
    never rose; with --penalty advantage there are updates, too."""
    row = {"accuracy": 0.0, "entropy": 1.0, "truncated": 1.0, "skipped": 0, "loss": 1.0}
    (alarm,) = alarms.of([row] * 5)
    assert "--max-tokens" in alarm and "--temperature" in alarm
    assert alarms.of([row | {"truncated": 0.85}] * 5) == [alarm]
    assert not alarms.of([row | {"truncated": 0.5, "accuracy": 0.1}] * 50)


LEARNS = {"accuracy": 0.3, "truncated": 0.0, "skipped": 0, "loss": 0.1, "grad_norm": 1.0}
IDLE = LEARNS | {"dropped": 1.0, "loss": 0.0}


@pytest.mark.parametrize(
    ("rows", "name"),
    [
        ([LEARNS | {"accuracy": 0.0}] * 20, "nothing is right"),  # penalties differ: it is updated
        ([LEARNS | {"dropped": 0.97}] * 20, "little is learned"),
        ([*[IDLE] * 7, LEARNS | {"dropped": 0.0}] * 3, "little is learned"),
        ([LEARNS | {"grad_norm": 0.0}] * 10, "nothing is learned"),
        ([LEARNS | {"accuracy": 0.0}] * 19, None),
        ([*[LEARNS | {"accuracy": 0.0}] * 40, LEARNS], None),
        ([LEARNS | {"dropped": 0.7}] * 100, None),
        ([{}] * 30, None),  # a fork's own metrics
    ],
)
def test_a_run_that_learns_next_to_nothing_says_so(rows, name):
    """Bug: a single update in eight steps, or one that only unlearns what is penalised, silences
    the alarm for all that is lost."""
    assert [alarm.split(":")[0] for alarm in alarms.of(rows)] == [name] * (name is not None)


def test_a_run_without_any_update_says_so_at_its_end():
    """Bug: a run too short for an alarm ends with "the model is in ...": the starting model."""
    (line,) = alarms.in_vain([IDLE] * 9)
    assert "no update" in line and "--samples" in line
    assert not alarms.in_vain([*[IDLE] * 9, LEARNS]) and not alarms.in_vain([])


class Said:
    """A run that keeps what it is told to print."""

    def __init__(self, **flags):
        self.world, self.config, self.said = ALONE, rl.Config(model="", out="", **flags), []

    def say(self, text: str) -> None:
        self.said.append(text)


def test_an_alarm_is_named_once():
    """Bug: the same alarm at every step; or again because the likely reason has become another."""
    run = Said(show_every=0)
    row = {"accuracy": 0.0, "truncated": 0.0, "skipped": 0, "loss": 0.0, "dropped": 1.0}
    history = []
    for step in range(1, 40):
        history.append(row | {"accuracy": float(step > 20)})
        rl.report(run, step, history, [])
    (line,) = run.said
    assert line.startswith("step 10: nothing is learned")


@pytest.mark.parametrize("step", [10, 20, 30, 40])
def test_a_right_and_a_wrong_response_are_shown(step):
    """Bug: one response, by chance always a wrong one, without what it should have said; an
    overlong one whose verdict is hidden."""
    responses = make_responses(make_learner())
    for number, response in enumerate(responses):
        response.problem = Problem(f"question {number}", f"reference {number}")
        response.reward = 0.5
    run = Said(show_every=10)
    rl.report(run, step, [], responses)
    right, wrong = run.said
    assert "correct" in right and "correct" not in wrong
    for text in run.said:
        number = int(text.split()[2])
        assert f"reference {number}; reward 0.5; {LENGTHS[number]} tokens" in text
        assert PATTERNS[number] is None or PATTERNS[number] in text
    for kind, count in ((RIGHT.index(1), 1), (RIGHT.index(0), 1)):
        run = Said(show_every=10)
        rl.report(run, step, [], [responses[kind]] * 3)
        assert len(run.said) == count


def test_entropy_coefficient_moves_towards_its_target():
    """Bug: the sign, or steps that grow with the distance until the coefficient is off by orders of
    magnitude.
    """
    assert rl.adapt_entropy_coef(1e-3, 0.5, 1.0) == pytest.approx(1e-3 * math.exp(0.025))
    assert rl.adapt_entropy_coef(1e-3, 1.0, 1.0) == 1e-3
    assert rl.adapt_entropy_coef(1e-3, 99.0, 1.0) == pytest.approx(1e-3 * math.exp(-0.05))


# --- from responses to a gradient -----------------------------------------------------------------


def make_learner(
    dtype: torch.dtype = torch.float64, lr: float = 1.0, world: World = ALONE
) -> rl.Learner:
    """Plain gradient descent at rate 1: the change of the weights *is* the gradient."""
    policy = parallel.shard(random_init(SHAPE, 0, dtype), world)
    anchor = parallel.shard(random_init(SHAPE, 1, dtype), world)
    config, recipe = step_config()
    return rl.Learner(
        config,
        recipe,
        [],
        world,
        TOKENIZER,
        sample.Sampler(policy.model, TOKENIZER),
        {"policy": policy},
        {"sgd": torch.optim.SGD(policy.parameters(), lr)},
        anchor,
    )


LENGTHS = (3, 9, 1, 5, 12, 2, 7, 4, 6, 8, 3, 10)  # of 3 prompts * 4 responses
RIGHT = (1, 0, 0, 1, 0, 0, 0, 0, 1, 1, 1, 0)  # the second prompt is never solved
PATTERNS = (None, "repeated", None, None, None, None, None, None, None, "garbled", None, "overlong")


def make_responses(learner: rl.Learner, noise: float = 0.3) -> list[Response]:
    """Uneven responses to prompts that hold the stop token; `noise` moves the policy away from what
    it was when it sampled, so that some ratios are clipped."""
    generator = torch.Generator().manual_seed(3)
    responses = []
    for i, length in enumerate(LENGTHS):
        prompt = [STOP, 5 + i // 4, STOP] * (1 + i // 4)
        tokens = torch.randint(0, STOP, (length - 1,), generator=generator).tolist() + [STOP]
        example = Example(prompt + tokens, [(len(prompt), len(prompt) + length)])
        logprob = token_logprobs(learner.policy.model, example, 1.2)[0].detach()
        drift = noise * torch.randn(length, generator=generator)
        reason = "length" if PATTERNS[i] == "overlong" else "stop"
        completion = Completion(tokens, (logprob + drift).tolist(), reason)
        verdict = Verdict("correct" if RIGHT[i] else "no_answer" if i == 11 else "wrong")
        responses.append(
            Response(Problem(str(i // 4), ""), prompt, completion, "", verdict, PATTERNS[i])
        )
        assert responses[-1].example == example
    return responses


def token_logprobs(model, example: Example, temperature: float) -> tuple[Tensor, Tensor]:
    """(log-probs, entropies) of the response's tokens, from the whole table of logits."""
    start, end = example.spans[0]
    table = (model.logits(model(torch.tensor([example.tokens]))[0]) / temperature).log_softmax(-1)[
        start - 1 : end - 1
    ]
    return table[range(end - start), example.tokens[start:end]], -(table.exp() * table).sum(-1)


FEW = {"samples": 4, "max_tokens": 12, "temperature": 1.2, "max_grad_norm": math.inf, "prompts": 3}


def step_config(config_class: type[rl.Config] = rl.Config, **given) -> tuple[rl.Config, rl.Recipe]:
    config = config_class(model="", out="", task="countdown", **FEW | given)
    return config, rl.resolve(config)


def take_step(
    learner: rl.Learner, responses: list[Response], step=rl.train_step
) -> tuple[dict, dict]:
    """(gradient by parameter of all that is trained, metrics) of one step on these responses."""
    before = parameters(learner)
    metrics = step(learner, responses, 1)
    changes = {name: before[name] - after for name, after in parameters(learner).items()}
    return {name: change for name, change in changes.items() if change.any()}, metrics


def parameters(learner: rl.Learner) -> dict[str, Tensor]:
    found = {}
    for part, module in learner.models.items():
        found |= {
            f"{part} {name.removeprefix('model.')}": whole(p)
            for name, p in module.named_parameters()
        }
    return found


def whole(parameter: Tensor) -> Tensor:
    return (
        (parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter)
        .detach()
        .clone()
    )


def train_once(
    learner: rl.Learner, responses: list[Response], **given
) -> tuple[dict[str, Tensor], dict, nn.Module]:
    """(the policy's gradient by parameter, metrics, the policy before) of one step with the flags
    `given`.
    """
    learner.config, learner.recipe = step_config(**given)
    learner.anchor = learner.anchor if learner.recipe.kl_coef else None
    before = copy.deepcopy(learner.policy.model)
    gradient, metrics = take_step(learner, responses)
    return (
        {name.removeprefix("policy "): value for name, value in gradient.items()},
        metrics,
        before,
    )


def assert_close(got: dict[str, Tensor], wanted: dict[str, Tensor], relative: float = 1e-6) -> None:
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert value.norm() > 0, name
        assert (got[name] - value).norm() <= relative * value.norm(), name


def straight_line(recipe: str, model, anchor, responses: list[Response]) -> Tensor:
    """The loss of `recipe` as its paper writes it: one response and one token at a time, in
    float64.
    """
    rewards = [float(right) for right in RIGHT]
    if recipe == "t1":
        rewards = [-1.0 if pattern else reward for reward, pattern in zip(rewards, PATTERNS)]
    if recipe == "dapo":  # limit 12, buffer 12 // 5 = 2
        rewards = [
            r + min(0.0, max(-1.0, (12 - 2 - length) / 2)) for r, length in zip(rewards, LENGTHS)
        ]
    groups = [range(4 * p, 4 * p + 4) for p in range(3)]
    if recipe != "reinforce":  # the second prompt's answers are all wrong
        groups = [groups[0], groups[2]]
    kept = [i for group in groups for i in group]

    scores = {i: token_logprobs(model, responses[i].example, 1.2) for i in kept}
    references = {i: token_logprobs(anchor, responses[i].example, 1.2)[0].detach() for i in kept}
    olds = {i: torch.tensor(responses[i].completion.logprobs, dtype=torch.float64) for i in kept}
    if recipe == "t1":
        kls = {i: float((olds[i] - references[i]).sum()) for i in kept}
        for i in kept:
            rewards[i] -= 2e-4 * (kls[i] - sum(kls.values()) / len(kls))

    loss = torch.zeros((), dtype=torch.float64)
    total_tokens = sum(LENGTHS[i] for i in kept)
    for group in groups:
        for i in group:
            mean = sum(rewards[j] for j in group) / 4
            deviation = math.sqrt(sum((rewards[j] - mean) ** 2 for j in group) / 3)
            advantage = {
                "t1": rewards[i] - sum(rewards[j] for j in group if j != i) / 3,
                "grpo": (rewards[i] - mean) / (deviation + 1e-4),
                "dr_grpo": rewards[i] - mean,
                "dapo": (rewards[i] - mean) / (deviation + 1e-4),
                "reinforce": rewards[i] - sum(rewards) / 12,
            }[recipe]
            scale = {"grpo": 1 / (len(kept) * LENGTHS[i]), "dr_grpo": 1 / (len(kept) * 12)}.get(
                recipe, 1 / total_tokens
            )
            logprobs, entropies = scores[i]
            for t in range(LENGTHS[i]):
                ratio = (logprobs[t] - olds[i][t]).exp()
                clipped = ratio.clamp(0.8, 1.28 if recipe == "dapo" else 1.2)
                loss = loss - scale * torch.minimum(ratio * advantage, clipped * advantage)
                if recipe == "t1":
                    loss = loss - 1e-3 * scale * entropies[t]
                if recipe == "grpo":
                    upside = (references[i][t] - logprobs[t]).exp()
                    loss = loss + 0.04 * scale * (upside - (references[i][t] - logprobs[t]) - 1)
    return loss


@pytest.mark.parametrize("recipe", ["t1", "grpo", "dr_grpo", "dapo", "reinforce"])
def test_recipe_is_its_papers_formula(recipe):
    """Bug: any piece of a recipe (reward, baseline, clipping, average, KL, entropy) that is not
    what its paper says.
    """
    learner = make_learner()
    responses, anchor = make_responses(learner), copy.deepcopy(learner.anchor.model)
    gradient, metrics, before = train_once(learner, responses, recipe=recipe)
    loss = straight_line(recipe, before, anchor, responses)
    wanted = dict(
        zip(dict(before.named_parameters()), torch.autograd.grad(loss, list(before.parameters())))
    )
    assert metrics["clip_fraction"] > 0.1  # or the clipping is not put to the test
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert_close(gradient, wanted, 1e-5)


@pytest.mark.parametrize("recipe", ["t1", "grpo", "dr_grpo", "dapo", "reinforce"])
def test_gradients_do_not_depend_on_micro_batches(recipe):
    """Bug: a loss divided by each micro-batch's own tokens, so that a short one weighs as much as a
    long one.
    """
    wanted, metrics, _ = train_once(make_learner(), make_responses(make_learner()), recipe=recipe)
    for micro_tokens in (1, 40):
        got, others, _ = train_once(
            make_learner(), make_responses(make_learner()), recipe=recipe, micro_tokens=micro_tokens
        )
        assert_close(got, wanted)
        assert others == pytest.approx(metrics, rel=1e-5)


def test_one_minibatch_of_one_epoch_is_on_policy():
    """Bug: the PPO loop does not reduce to T1's gradient, that of -1/M sum A log pi, when nothing
    is reused.
    """
    learner = make_learner()
    responses = make_responses(learner, noise=0.0)
    gradient, metrics, before = train_once(learner, responses, kl_coef=0.0, entropy_coef=0.0)
    advantages = rl.leave_one_out(rl.penalise(tensor(*RIGHT), list(PATTERNS)).view(3, 4)).flatten()
    kept = [i for i in range(12) if i // 4 != 1]
    loss = sum(
        -advantages[i] * token_logprobs(before, responses[i].example, 1.2)[0].sum() for i in kept
    )
    loss = loss / sum(LENGTHS[i] for i in kept)
    wanted = dict(
        zip(dict(before.named_parameters()), torch.autograd.grad(loss, list(before.parameters())))
    )
    assert_close(gradient, wanted, 1e-5)
    assert metrics["clip_fraction"] == 0 and metrics["mismatch_max"] < 1e-5


def test_importance_weights_where_the_sampler_differs():
    """Bug: in bf16 the ratio is taken to the sampler's log-probs, or the correction is not
    truncated. Here the sampler is off by 0.1 and by 2 nats: ratios to the trainer's own old
    log-probs are 1, weights exp(-0.1) and 2."""
    learner = make_learner()
    learner.exact = False
    responses = make_responses(learner, noise=0.0)
    for i, response in enumerate(responses):
        shift, drawn = 0.1 if i % 2 else -2.0, response.completion
        response.completion = Completion(drawn.tokens, [v + shift for v in drawn.logprobs], "stop")
    gradient, metrics, before = train_once(learner, responses, recipe="reinforce")
    loss = 0.0
    for i, right in enumerate(RIGHT):
        weight = math.exp(-0.1) if i % 2 else 2.0
        loss = (
            loss
            - weight
            * (right - sum(RIGHT) / 12)
            * token_logprobs(before, responses[i].example, 1.2)[0].sum()
        )
    gradients = torch.autograd.grad(loss / sum(LENGTHS), list(before.parameters()))
    assert_close(gradient, dict(zip(dict(before.named_parameters()), gradients)), 1e-5)
    assert metrics["clip_fraction"] == 0
    assert metrics["mismatch_max"] == pytest.approx(2, rel=1e-5)


def test_sampler_and_trainer_agree():
    """Bug: a temperature, position, mask or cache that differs between sampler and trainer makes
    every ratio wrong. Ragged prompts, temperature 1.4, responses that ended and responses that were
    cut off."""
    model = random_init(SHAPE, 0)
    for parameter in model.parameters():
        parameter.data *= 2 if parameter.ndim > 1 else 1  # logits far from uniform
    prompts = [list(range(1, 2 + 3 * i)) for i in range(6)]
    done = sample.Sampler(model, TOKENIZER, max_batch=7, eos_ids=list(range(40))).generate(
        prompts, 4, SamplingParams(16, 1.4, seed=1)
    )
    pairs = [(p, c) for p, group in zip(prompts, done) for c in group]
    assert {c.finish_reason for _, c in pairs} == {"stop", "length"}
    examples = [Example(p + c.tokens, [(len(p), len(p) + len(c.tokens))]) for p, c in pairs]
    scorer = parallel.shard(model, ALONE)
    scored = parallel.values_of_all(
        lambda packed: parallel.log_probs(scorer, packed, 1.4)[0], examples, 64, 80, ALONE
    )
    for (_, completion), logprob in zip(
        pairs, scored.split([example.targets for example in examples])
    ):
        torch.testing.assert_close(logprob, torch.tensor(completion.logprobs), rtol=0, atol=1e-4)


class Scripted:
    """A tokenizer whose chat prompt is full of stop tokens, and a sampler that answers with what it
    was told.
    """

    eos_ids = (STOP,)

    def chat(self, messages, add_generation_prompt=True):
        return [STOP, 3, STOP, STOP]

    def decode(self, tokens, skip_special=False):
        return TOKENIZER.decode(tokens)

    def generate(self, prompts, n, params, keys=None, firsts=None):
        self.keys = keys
        ended, cut = (
            Completion([65, STOP], [-1.0, -2.0], "stop"),
            Completion([66, 67], [-3.0, -4.0], "length"),
        )
        return [[ended, cut] for _ in prompts]


def test_masks_come_from_lengths():
    """Bug: a mask made from token values stops at the first stop token, which may stand in the
    prompt; or the sampled stop token is dropped, and stopping is never trained."""
    scripted, problem = Scripted(), Problem("q", "22 from 3 5 7 with +-*", "countdown")
    learner = make_learner()
    learner.config, _ = step_config(samples=2, prompts=1)
    learner.problems, learner.cursor = [problem] * 18, 17
    learner.sampler = learner.tokenizer = scripted
    ended, cut = rl.collect(learner, rollout.Stopwatch())
    assert scripted.keys == [17] and learner.cursor == 18
    assert ended.example == Example([STOP, 3, STOP, STOP, 65, STOP], [(4, 6)])
    assert cut.example == Example([STOP, 3, STOP, STOP, 66, 67], [(4, 6)])
    assert [ended.pattern, cut.pattern] == [None, "overlong"]
    packed = pack([ended.example, cut.example])
    assert packed.targets.tolist() == [65, STOP, 66, 67]


def test_values_go_to_their_responses_and_back():
    """Bug: a token gets the value of a neighbour's token, or a response that of another."""
    responses = make_responses(make_learner())
    values = torch.arange(sum(LENGTHS))
    rl.give(responses, "advantage", values)
    assert torch.equal(rl.flat(responses, "advantage"), values)
    assert responses[1].advantage.tolist() == list(range(3, 12))
    assert rl.flat([responses[2], responses[0]], "advantage").tolist() == [12, 0, 1, 2]


def test_the_stop_token_is_trained():
    """Bug: stopping never gets gradient. A response that is only the stop token, with a positive
    advantage, must become likelier, and with a negative one less likely."""
    for advantage in (1.0, -1.0):
        learner = make_learner(lr=0.1)
        completion = Completion([STOP], [0.0], "stop")
        response = Response(Problem("", ""), [STOP, 5], completion, "", Verdict("wrong"), None)
        before = token_logprobs(learner.policy.model, response.example, 1.2)[0].detach()
        response.old, response.weight, response.advantage = (
            before.float(),
            torch.ones(1),
            torch.tensor([advantage]),
        )
        tally = rl.Tally()
        rl.policy_gradient(learner, [response], tally)
        rl.descend(learner, tally)
        after = token_logprobs(learner.policy.model, response.example, 1.2)[0].detach()
        assert (after - before) * advantage > 1e-3


def test_no_rank_is_idle_while_samples_can_be_shared():
    """Bug: 64 GPUs and 32 prompts, of which half wait while the others draw 64 samples each."""
    shares = {
        (32, 64, 32): 64,
        (32, 64, 64): 32,
        (32, 64, 33): 32,
        (3, 6, 4): 3,
        (1, 7, 2): 1,
        (1, 4, 9): 1,
    }
    assert {case: rollout.share_of(*case) for case in shares} == shares


class Counting(nn.Module):
    """Passes calls on and counts the response tokens that went through."""

    def __init__(self, scorer):
        super().__init__()
        self.scorer, self.model, self.tokens = scorer, scorer.model, 0

    def forward(self, packed, temperature):
        self.tokens += len(packed.index)
        return self.scorer(packed, temperature)


def test_equal_groups_are_dropped_before_any_forward():
    """Bug: groups without gradient are dropped after the anchor has scored them, or not at all."""
    learner = make_learner()
    responses = make_responses(learner)
    learner.anchor = Counting(learner.anchor)
    metrics = rl.train_step(learner, responses, 1)
    assert metrics["dropped"] == pytest.approx(1 / 3)
    kept = responses[:4] + responses[8:]
    assert learner.anchor.tokens == rl.lengths(kept).sum()
    assert [len(response.advantage) > 0 for response in responses] == [True] * 4 + [False] * 4 + [
        True
    ] * 4
    learner.anchor.tokens = 0
    metrics = rl.train_step(learner, responses[4:8], 1)
    assert metrics["dropped"] == 1 and metrics["loss"] == 0 and learner.anchor.tokens == 0


@pytest.mark.parametrize(
    ("advantage", "kept"),
    [
        (rl.leave_one_out, [True, False, True]),
        (relatives.group_mean, [True, False, True]),
        (relatives.group_normalised, [True, False, True]),
        (relatives.batch_mean, [True, True, True]),
        (lambda rewards: rewards - rewards.median(dim=1, keepdim=True).values, [True, False, True]),
        (lambda rewards: rewards, [True, True, True]),
        (lambda rewards: rewards * math.nan, [True, True, True]),  # for the guard to see
    ],
)
def test_only_zero_advantages_are_dropped(advantage, kept):
    """Bug: whether groups of equal rewards are dropped is guessed from the name of the advantage:
    with one that a fork brings, a third of its data is lost and nobody told. 0.3 is no binary
    number: means of it are off by rounding."""
    config, recipe = step_config(penalty="none")
    rewards = torch.tensor(
        [0.3, 0.3, 0.3, 0.1] + [0.3] * 4 + [0.1, 0.1, 0.1, 0.3], dtype=torch.float64
    )
    recipe = dataclasses.replace(recipe, advantage=advantage)
    assert (
        rl.teaching_groups(make_responses(make_learner()), rewards, config, recipe).tolist() == kept
    )


def test_what_is_dropped_is_what_is_logged():
    """Bug: `dropped` 1.0 in steps of a recipe that drops no single group (its baseline is the mean
    of the batch); or groups that dynamic sampling has too many of, counted as if they had taught.
    """
    learner = make_learner()
    responses = make_responses(learner)
    for recipe, wanted in (("reinforce", None), ("dr_grpo", 1 / 3), ("dapo", 1 / 3)):
        _, metrics, _ = train_once(make_learner(), responses, recipe=recipe)
        assert metrics.get("dropped") == (wanted and pytest.approx(wanted)), recipe
    _, metrics, _ = train_once(make_learner(), responses, recipe="dapo", prompts=1)
    assert metrics["dropped"] == pytest.approx(2 / 3)
    for samples in (1, 4):
        given = {"recipe": "reinforce", "samples": samples, "prompts": 12 // samples}
        same_reward = [dataclasses.replace(r, verdict=Verdict("wrong")) for r in responses]
        _, metrics, _ = train_once(make_learner(), same_reward, **given)
        assert "dropped" not in metrics and metrics["loss"] == 0


@pytest.mark.parametrize(
    ("piece", "function", "complaint"),
    [
        (
            "reward",
            lambda responses, config: 1.0,
            r"its reward must be of shape \[12\].* not of \[\]",
        ),
        (
            "advantage",
            lambda rewards: rewards.flatten(),
            r"its advantage must be .*\[3, 4\], and not of \[12\]",
        ),
    ],
)
def test_pieces_of_another_shape_are_refused(piece, function, complaint):
    """Bug: a fork's function of another shape is broadcast, and trains on something."""
    learner = make_learner()
    learner.recipe = dataclasses.replace(learner.recipe, **{piece: function})
    with pytest.raises(UserError, match=complaint):
        rl.train_step(learner, make_responses(learner), 1)


def test_a_graded_reward():
    """Bug: a score between right and wrong that is rounded on its way, or counted as right."""
    learner = make_learner()
    learner.config, learner.recipe = step_config(penalty="none", kl_coef=0.0)
    responses = make_responses(learner)[4:8]
    for response, score in zip(responses, (0.5, 0.0, 0.25, 0.25)):
        response.verdict = Verdict("wrong", score=score)
    metrics = rl.train_step(learner, responses, 1)
    assert (
        metrics["reward"] == 0.25
        and metrics["accuracy"] == metrics["pass_at_k"] == 0
        and metrics["dropped"] == 0
    )
    same(torch.stack([response.advantage[0] for response in responses]), 1 / 3, -1 / 3, 0, 0)


def advantages_by(penalty: str, rows: slice = slice(12), **given) -> tuple[list[float], dict]:
    learner = make_learner()
    learner.config, learner.recipe = step_config(penalty=penalty, kl_coef=0.0, **given)
    responses = make_responses(learner)[rows]
    metrics = rl.train_step(learner, responses, 1)
    return [
        response.advantage[0].item() for response in responses if len(response.advantage)
    ], metrics


def test_penalties_by_hand():
    """Bug: --penalty advantage that leaves -1 in the others' baseline, or spares a group in which
    all run away.
    """
    first = {  # of right, repeated and wrong, wrong, right
        "set": (1 - 0 / 3, -1 - 2 / 3, 0 - 1 / 3, 1 - 0 / 3),
        "advantage": (1 - 1 / 3, -1, 0 - 2 / 3, 1 - 1 / 3),
        "none": (1 - 1 / 3, 0 - 2 / 3, 0 - 2 / 3, 1 - 1 / 3),
    }
    for penalty, wanted in first.items():
        same(torch.tensor(advantages_by(penalty)[0][:4]), *wanted)
    rewards = {"set": (2 - 1 + 2 - 1 - 1) / 12, "advantage": (2 + 2) / 12, "none": 5 / 12}
    for penalty, wanted in rewards.items():
        metrics = advantages_by(penalty)[1]
        assert metrics["reward"] == pytest.approx(wanted) and metrics[
            "unexpected"
        ] == pytest.approx(3 / 12)


@pytest.mark.parametrize(
    ("penalty", "wanted"), [("set", []), ("advantage", [-1.0] * 4), ("none", [])]
)
def test_a_group_that_runs_away_whole(monkeypatch, penalty, wanted):
    """Bug: all K responses never end, their rewards are equal, the group is dropped, and nothing
    stops them. By T1's own penalty it is so; --penalty advantage pushes them back."""
    monkeypatch.setattr(f"{__name__}.PATTERNS", ("overlong",) * 12)
    monkeypatch.setattr(f"{__name__}.RIGHT", (0,) * 12)
    assert advantages_by(penalty, slice(4))[0] == wanted


def test_kl_to_the_start_by_hand():
    """Bug: the KL to the start taken of the anchor, averaged over tokens, or over other responses
    too.
    """
    learner = make_learner()
    responses = make_responses(learner)[:4]
    learner.start = parallel.shard(random_init(SHAPE, 5, torch.float64), ALONE)
    metrics = rl.give_log_probs(learner, responses)
    moved = 0.0
    for response in responses:
        start, _ = token_logprobs(learner.start.model, response.example, 1.2)
        moved += (response.old - start).sum().item() / len(responses)
    assert (
        metrics["kl_start"] == pytest.approx(moved, rel=1e-4)
        and metrics["kl_start"] != metrics["kl"]
    )


def test_the_kl_to_the_start_needs_no_penalty():
    """Bug: --kl-coef 0 loads no anchor, and then --start-kl logs nothing."""
    learner = make_learner()
    learner.anchor = None
    learner.start = parallel.shard(random_init(SHAPE, 5, torch.float64), ALONE)
    _, metrics, _ = train_once(learner, make_responses(learner), recipe="t1", kl_coef=0.0)
    assert metrics["kl_start"] != 0 and "kl" not in metrics


def test_metrics_by_hand():
    """Bug: a share taken of the kept responses instead of all, or accuracy after the penalties."""
    learner = make_learner()
    _, metrics, _ = train_once(learner, make_responses(learner), recipe="t1")
    assert metrics["accuracy"] == pytest.approx(5 / 12)
    assert metrics["pass_at_k"] == pytest.approx(2 / 3)
    assert metrics["unexpected"] == pytest.approx(3 / 12)
    assert metrics["truncated"] == pytest.approx(1 / 12)
    assert metrics["reward"] == pytest.approx((2 - 1 + 2 - 1 - 1) / 12)
    assert metrics["length"] == pytest.approx(sum(LENGTHS) / 12)


class NeverWaits(TorchDispatchMode):
    """Fails where a value of a tensor is looked at, for which a GPU would be waited for."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default, "waits for the device"
        return function(*args, **(kwargs or {}))


def test_tally_is_what_its_parts_add_up_to():
    """Bug: each micro-batch is waited for, several times; or the sums that are looked at in the end
    count a micro-batch without tokens, or the gaps of later updates, which are no rounding."""
    generator = torch.Generator().manual_seed(4)
    recipe = rl.RECIPES["t1"]
    tally = rl.Tally()
    batches = []  # of two updates: three micro-batches, one of them empty; and two
    for update, sizes in enumerate([(5, 0, 3), (4, 2)]):
        for size in sizes:
            values = torch.randn(3, size, generator=generator)
            batches.append((update, size - 1.0, *values))
            with NeverWaits():
                tally.add(torch.tensor(size - 1.0), *values, recipe)
        tally.losses.append(float(tally.loss))
        tally.norms.append(7.0)
        tally.loss = 0.0
    logprob, entropy, old = (torch.cat([batch[i] for batch in batches]) for i in (2, 3, 4))
    ratio = (logprob - old).exp()
    first = torch.cat([batch[2] - batch[4] for batch in batches if batch[0] == 0]).abs()
    assert tally.metrics(exact=True) == pytest.approx(
        {
            "loss": (5 + 4) / 2,
            "grad_norm": 7.0,
            "entropy": entropy.mean().item(),
            "clip_fraction": ((ratio - 1).abs() > 0.2).double().mean().item(),
            "mismatch": first.mean().item(),
            "mismatch_max": first.max().item(),
        }
    )


def test_nothing_finite_nothing_moved():
    """Bug: one NaN in a reward or log-prob, and the weights are NaN for good."""
    learner = make_learner()
    responses = make_responses(learner)
    responses[0].completion = Completion(
        responses[0].completion.tokens, [math.nan] * LENGTHS[0], "stop"
    )
    before = copy.deepcopy(learner.policy.model)
    rl.train_step(learner, responses, 1)
    assert learner.guard.skipped == 1
    assert all(
        torch.equal(a, b) for a, b in zip(before.parameters(), learner.policy.model.parameters())
    )


def test_dynamic_sampling_without_a_mixed_group():
    """Bug: DAPO draws and draws where nothing is ever solved; or an empty batch crashes the
    metrics.
    """
    learner = make_learner(dtype=torch.float32)
    learner.config, learner.recipe = step_config(recipe="dapo", prompts=2, samples=3, max_tokens=4)
    learner.problems = list(itertools.islice(tasks.countdown(0), 6))
    metrics, responses = rl.run_step(learner, 1)
    assert learner.cursor == 6 and len(responses) == 18
    assert metrics["dropped"] == 1 and metrics["accuracy"] == 0 and metrics["loss"] == 0


@pytest.mark.parametrize(
    ("penalty", "kept"), [("advantage", [True, True, False]), ("set", 3 * [False])]
)
def test_a_punished_group_teaches_under_dynamic_sampling(penalty, kept):
    """Bug: DAPO leaves out groups of equal outcomes, and with them those in which all ran away.

    Nothing is right in any of three groups; in the first all are overlong, in the second one is.
    """
    learner = make_learner()
    config, recipe = step_config(recipe="dapo", penalty=penalty)
    responses = make_responses(learner)
    for number, response in enumerate(responses):
        response.verdict = Verdict("wrong")
        response.pattern = "overlong" if number < 5 else None
    rewards = rl.rewards_of(responses, config, rl.RECIPES["reinforce"])
    to = rl.PENALTIES[penalty].reward
    rewards = rl.penalise(rewards, rl.patterns_of(responses), to)
    assert rl.teaching_groups(responses, rewards, config, recipe).tolist() == kept


# --- bad input: one line, exit code 2, before any rollout -----------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_pretrained(random_init(SHAPE, 0), folder, TOKENIZER)
    return folder


@pytest.fixture
def command(tiny, tmp_path, monkeypatch, capsys):
    """Runs rl.py with flags that must be refused; returns the line that says why."""

    def forbidden(*_, **__):
        raise AssertionError("a rollout was begun")

    monkeypatch.setattr(sample.Sampler, "generate", forbidden)

    def run(*flags: str, model: Path = tiny, main=rl.main, config_class=rl.Config) -> str:
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        with pytest.raises(SystemExit) as stopped:
            cli.run(
                main, config_class, ["--model", str(model), "--out", str(tmp_path / "run"), *flags]
            )
        assert stopped.value.code == 2
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
        return (
            capsys.readouterr().err.rstrip("\n").split("\r")[-1]
        )  # after a progress bar that has left

    return run


COUNTDOWN = ("--task", "countdown", "--steps", "2", "--max-tokens", "32")


@pytest.mark.parametrize("named", [None, [], 10**6, -1])
def test_a_model_without_a_stop_token(command, tiny, tmp_path, named):
    """Bug: a policy that cannot end a response is trained for hours on responses that are all cut
    off; or one that names a token which it cannot draw."""
    shutil.copytree(tiny, tmp_path / "endless")
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        raw = json.loads((tmp_path / "endless" / name).read_text())
        raw = {key: value for key, value in raw.items() if not key.startswith("eos_token")}
        if named is not None and name == "generation_config.json":
            raw["eos_token_id"] = named
        (tmp_path / "endless" / name).write_text(json.dumps(raw))
    line = command(*COUNTDOWN, model=tmp_path / "endless")
    assert f"{tmp_path / 'endless'} names no stop token" in line and "eos_token_id" in line
    assert "\n" not in line


def test_the_last_line_keeps_to_the_run():
    """Bug: the evaluation that is suggested asks other problems than the run's, or in another
    template; or its words fall apart in a shell."""
    thinking = '{"enable_thinking": false}'
    flags = rl.Config("my model", "out", task="countdown", numbers=4, operators="-+")
    line = rl.closing(dataclasses.replace(flags, template_args=thinking))
    evaluating, sampling = line.partition("; next: ")[2].split(", or ")
    _, script, *words = shlex.split(evaluating)
    read = tyro.cli(evaluate.Config, args=words)
    assert script == "evaluate.py" and read.model == ["my model", "out"]
    assert (read.task, read.numbers, read.operators) == ("countdown", 4, "-+")
    assert read.template_args == thinking and "--largest" not in line
    assert shlex.split(sampling)[-1] == f"--template-args={thinking}"
    line = sft.closing(sft.Config("out", data="x", model="m", template_args=thinking))
    assert line.count(shlex.quote(f"--template-args={thinking}")) == 2


def test_a_token_that_the_model_does_not_have(command, tiny, tmp_path):
    """Bug: IndexError, and a folder of a run that has not begun, where a token was added to the
    tokenizer and no row to the embedding."""
    shutil.copytree(tiny, tmp_path / "small")
    file = tmp_path / "small" / "tokenizer.json"
    raw = json.loads(file.read_text())
    new = max(raw["added_tokens"], key=lambda token: token["id"])
    raw["added_tokens"].append(new | {"id": new["id"] + 1, "content": "<|new|>"})
    file.write_text(json.dumps(raw))
    (tmp_path / "small" / "chat_template.jinja").write_text("<|new|>{{ messages[0].content }}")
    wanted = f"{tmp_path / 'small'}: token {new['id'] + 1}, '<|new|>', of its tokenizer is beyond"
    chains = ("--task", "countdown", "--chains", "50", "--steps", "1")
    assert wanted in command(*COUNTDOWN, model=tmp_path / "small")
    assert wanted in command(
        *chains, model=tmp_path / "small", main=sft.main, config_class=sft.Config
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite(command, tmp_path, bad):
    """Bug: a model of NaN is trained (every group is dropped, so no guard sees it), and a model of
    NaN is exported."""
    model = random_init(SHAPE, 0)
    model.blocks[1].down.weight.data[3, 5] = bad
    save_pretrained(model, tmp_path / "broken", TOKENIZER)
    line = command(*COUNTDOWN, model=tmp_path / "broken")
    assert "model.safetensors: model.layers.1.mlp.down_proj.weight holds NaN" in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ((), "--task"),
        ((*COUNTDOWN, "--data", "x.jsonl"), "--task"),
        ((*COUNTDOWN, "--samples", "1"), "--samples 1"),
        ((*COUNTDOWN, "--prompts", "0"), "--prompts"),
        ((*COUNTDOWN, "--temperature", "0"), "--temperature"),
        ((*COUNTDOWN, "--recipe", "grpo", "--samples", "1"), "--samples 1"),
        ((*COUNTDOWN, "--recipe", "dr_grpo", "--samples", "1"), "--samples 1"),
        (
            (*COUNTDOWN, "--recipe", "chess"),
            "--recipe chess is none of t1, grpo, dr_grpo, dapo, reinforce",
        ),
        (("--task", "chess"), "--task chess is none of countdown"),
        (("--task", "math"), "--task math is none of countdown"),
        ((*COUNTDOWN, "--entropy-target", "1", "--entropy-coef", "0"), "--entropy-target"),
        ((*COUNTDOWN, "--export", "somewhere"), "no whole checkpoint"),
        ((*COUNTDOWN, "--resume"), "no run in"),
        ((*COUNTDOWN, "--cooldown", "-1"), "--cooldown"),
        ((*COUNTDOWN, "--warmup", "-1"), "--warmup"),
        ((*COUNTDOWN, "--operators", "x"), "--operators"),
        ((*COUNTDOWN, "--operators", ""), "--operators"),
        ((*COUNTDOWN, "--numbers", "7"), "--numbers"),
        ((*COUNTDOWN, "--anchor-decay", "1.5"), "--anchor-decay"),
        ((*COUNTDOWN, "--clip-low", "-1"), "--clip-low"),
        ((*COUNTDOWN, "--clip-high", "nan"), "--clip-high"),
        ((*COUNTDOWN, "--kl-coef", "-1"), "--kl-coef"),
        ((*COUNTDOWN, "--max-grad-norm", "0"), "--max-grad-norm"),
        ((*COUNTDOWN, "--largest", "1"), "--largest"),
        ((*COUNTDOWN, "--repeat-ngram", "0"), "--repeat-ngram"),
        ((*COUNTDOWN, "--repeat-times", "1"), "--repeat-times"),
        ((*COUNTDOWN, "--keep-every", "15"), "--keep-every 15"),
        ((*COUNTDOWN, "--step", "30"), "--step 30"),
        ((*COUNTDOWN, "--device", "foo"), "--device foo"),
        (("--data", "nowhere.jsonl"), "nowhere.jsonl"),
        (("--task", "countdown", "--max-tokens", "120"), "context of 128"),
    ],
)
def test_bad_flags(command, flags, complaint):
    """Bug: a mistake that shows after the first rollout, an hour later, as a traceback."""
    line = command(*flags)
    assert complaint in line and line.startswith("error: ") and "\n" not in line


@pytest.mark.parametrize("flag", ["--top-p", "--top_p=0.95", "--min-p"])
def test_a_truncated_distribution_is_refused_with_the_reason(monkeypatch, capsys, flag):
    """Bug: the flag that everybody sets is just unknown, and one puts it into a fork, where it biases
    every ratio."""
    monkeypatch.setattr(sys, "argv", ["rl.py", "--model", "m", "--out", "o", flag, "0.95"])
    with pytest.raises(SystemExit) as stopped:
        rl.command()
    assert stopped.value.code == 2
    name = flag.partition("=")[0].replace("_", "-")
    line = capsys.readouterr().err
    assert line.startswith(f"error: there is no {name}: training samples from the whole")


def test_a_fork_may_have_the_flag(monkeypatch):
    """Bug: a fork that corrects for top-p, and has the flag, cannot be given it."""

    @dataclasses.dataclass
    class Config(rl.Config):
        top_p: float = 1.0

    monkeypatch.setattr(sys, "argv", ["mine.py", "--model", "m", "--out", "o", "--top-p", "0.9"])
    taken = []
    rl.command(Config, lambda config: taken.append(config))
    assert taken[0].top_p == 0.9


def test_unknown_flag(command):
    """Bug: a misspelt flag is ignored, and the run trains with the default."""
    assert "--tempreature" in command(*COUNTDOWN, "--tempreature", "1.0")


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        ("", "holds no problems"),
        ('{"problem": "1+1", "answer": "2"}\n{"problem": ', "line 2"),
        ('{"problem": "1+1"}', "no `answer`"),
        (
            '{"problem": "1+1", "answer": "2"}\n'
            + json.dumps({"problem": "1 " * 80, "answer": "2"}),
            "problem 2",
        ),
    ],
)
def test_bad_data(command, tmp_path, lines, complaint):
    """Bug: a bad line skipped in silence; a prompt too long for the model stops the run when it is
    first drawn.
    """
    (tmp_path / "data.jsonl").write_text(lines)
    line = command("--data", str(tmp_path / "data.jsonl"), "--max-tokens", "8")
    assert complaint in line and "data.jsonl" in line and "\n" not in line


def test_bad_folders(command, tmp_path):
    """Bug: a run's folder overwritten by the next; a half-written one taken for a whole one."""
    assert "no such folder" in command(*COUNTDOWN, model=tmp_path / "nowhere")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_text("{}")
    assert "holds no model" in command(*COUNTDOWN, model=tmp_path / "half")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    assert "exists already" in command(*COUNTDOWN)
    assert "only half of one" in command(*COUNTDOWN, "--resume")
