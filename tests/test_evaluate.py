"""evaluate.py: estimators against brute force, the budget curve against hand-made chains, curation,
bad input.

A scripted sampler says what it is told to, so every number below was computed by hand. Models run
only where --resume is to tell one from another."""

import errno
import gzip
import itertools
import json
import math
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cli
import cot
import evaluate
import sft
import tasks
from cli import UserError
from evaluate import Result, Settings
from model import random_init, save_pretrained
from sample import Completion, Sampler, SamplingParams
from tasks import Problem, countdown_problem
from tokenizer import demo_tokenizer

EOS = 0


class Letters:
    """A tokenizer of one token per character; 0 ends a turn."""

    eos_ids = (EOS,)

    def encode(self, text):
        return [ord(character) for character in text]

    def decode(self, tokens, skip_special=False):
        return "".join(chr(token) for token in tokens if token != EOS)

    def chat(self, messages, add_generation_prompt=True):
        return self.encode(messages[0]["content"] + "\n")

    def opening(self, messages):
        return "\n"


class Script:
    """A sampler that answers prompt i with `chains[i]`, and forced answers with `answer`; it keeps
    those prompts."""

    def __init__(self, chains, answer="0}"):
        self.chains, self.answer, self.forced = chains, answer, []
        self.model = SimpleNamespace(config=SimpleNamespace(context=100_000))

    def release(self):
        self.released = True

    def generate(self, prompts, n, params, progress=False):
        if params.temperature == 0:
            self.forced += [Letters().decode(prompt) for prompt in prompts]
            return [[completion(self.answer)] for _ in prompts]
        return [[completion(text, params.max_tokens) for text in row[:n]] for row in self.chains]


def completion(text, max_tokens=10_000):
    tokens = ([ord(character) for character in text] + [EOS])[:max_tokens]
    return Completion(tokens, [0.0] * len(tokens), "stop" if tokens[-1] == EOS else "length")


COUNTDOWN = countdown_problem([3, 5, 7], 22)
SOLVED = "3*5=15, 15+7=22 is 22\ncheck 3*5+7=22 ok\n\\boxed{(3*5)+7}"
FALSE_CLAIM = "3+5=8, 8+7=15 is 22\ncheck 3+5+7=15 ok\n\\boxed{(3+5)+7}"


# --- pass@k ---------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(1, 9), st.data())
def test_pass_at_k_is_the_chance_over_all_subsets(n, data):
    """Guards against the biased 1 - (1 - c/n)^k and against an off-by-one in the product."""
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert evaluate.pass_at_k(n, c, k) == pytest.approx(
        np.mean([any(subset) for subset in subsets])
    )


def test_pass_at_k_of_many_samples():
    """Guards against binomials that overflow: C(4000, 2000) is no float."""
    exact = 1 - math.comb(3990, 2000) / math.comb(4000, 2000)
    assert evaluate.pass_at_k(4000, 10, 2000) == pytest.approx(exact)


@pytest.mark.parametrize("n, c, k", [(4, 5, 1), (4, 0, 5), (4, 0, 0), (4, -1, 1)])
def test_pass_at_k_refuses_the_impossible(n, c, k):
    """Guards against a silent number where there are fewer samples than k."""
    with pytest.raises(ValueError):
        evaluate.pass_at_k(n, c, k)


def test_interval_has_its_coverage():
    """Guards against an interval over samples instead of problems, or a percentile on the wrong
    side.

    200 draws of 100 problems, four samples of each, with a true mean of 0.3: a 95 % interval should
    miss it in about 10; 24 is 4.5 sigma. (One sample of each would be 0 or 1, and no bootstrap.)"""
    rng = np.random.default_rng(1)
    missed = 0
    for _ in range(200):
        low, high = evaluate.interval(rng.binomial(4, 0.3, 100) / 4)
        missed += not low <= 0.3 <= high
    assert 1 <= missed <= 24


@pytest.mark.parametrize("solved, count", [(0, 20), (20, 20), (3, 20), (1, 1), (0, 1)])
def test_interval_of_zeros_and_ones_is_wilsons(solved, count):
    """Guards against 0 of 20 reported as 0 % for certain: a bootstrap of equal values has no width.
    The ends of Wilson's interval are the shares p from which what was found is 1.96 deviations
    away."""
    share = solved / count
    low, high = evaluate.interval([1.0] * solved + [0.0] * (count - solved))
    assert 0 <= low <= share <= high <= 1 and low < high
    for end in (low, high):
        if end not in (0, 1):
            deviations = abs(share - end) / math.sqrt(end * (1 - end) / count)
            assert deviations == pytest.approx(1.96)


def test_no_interval_is_a_point(capsys):
    """Guards against certainty from a few problems that happen to score the same: half of the
    samples of each, or no gain on any."""
    low, high = evaluate.interval([0.5] * 20)
    assert 0.4 < low < 0.45 and high == pytest.approx(1 - low)
    low, high = evaluate.interval([0.5] * 2000)
    assert 0.499 < low < 0.5 and high == pytest.approx(1 - low)
    evaluate.print_gain(result_of([0.25] * 20), result_of([0.25] * 20))
    gained = capsys.readouterr().out
    low, high = map(float, re.search(r"\[(.*), (.*)\]", gained).groups())
    assert low == -16.1 and high == 16.1 and "+0.0 points" in gained  # 3.84 / (20 + 3.84)


def test_more_orders_of_the_options_are_no_more_problems(capsys):
    """Guards against --shuffles 4 that halves the intervals: the same questions, asked again."""
    rates = [0.0, 0.25, 0.5, 1.0] * 5
    once, again = result_of(rates), replace(result_of(rates * 4), orders=4)
    assert again.summary() == once.summary() | {"problems": 20}
    other = replace(result_of([1 - rate for rate in rates] + rates), orders=2)
    assert other.summary()["pass@1_ci"] == pytest.approx(evaluate.interval([0.5] * 20))
    evaluate.print_gain(result_of([0] * 20), once)
    evaluate.print_gain(replace(result_of([0] * 80), orders=4), again)
    first, second = capsys.readouterr().out.strip().split("\n")
    assert first == second


# --- maj@k ----------------------------------------------------------------------------------------


def test_majority_votes_in_groups_and_shares_ties():
    """Guards against a None (no answer) that wins the vote, and against ties that go to whoever
    came first."""
    right = {"a": True, "b": False, "c": False, None: False}

    def maj(answers, k):
        return evaluate.maj_at_k(answers, [right[answer] for answer in answers], k)

    assert maj(["a", "a", "b", "b"], 4) == 0.5
    assert maj(["b", "b", "a"], 3) == 0.0
    assert maj([None, None, "a"], 3) == 1.0
    assert maj([None, None, None], 3) == 0.0
    assert (
        maj(["a", "a", "c", "b", "b", "c", "a"], 3) == 0.5
    )  # groups aac and bbc; the seventh is left over


def test_equal_answers_vote_together():
    """Guards against a majority split by spelling: 1/2, 0.5 and \\frac12 are one wrong answer,
    three to two."""
    responses = [
        f"\\boxed{{{answer}}}" for answer in ("1/2", "0.5", "\\frac{1}{2}", "2", "2.0")
    ] + ["no box"]
    correct = [False, False, False, True, True, False]
    names = evaluate.answer_classes(Problem("?", "2"), responses, correct)
    assert len({*names[:3]}) == 1 and names[3] == names[4] != names[0] and names[5] is None
    assert evaluate.maj_at_k(names[:5], correct[:5], 5) == 0.0


# --- budgets --------------------------------------------------------------------------------------


def test_budget_curve_cuts_forces_and_scores():
    """Guards against a chain judged beyond its budget, and against answers generated for chains
    that had ended.

    The chain solves the problem in its 55 characters and the stop token: at 22 the answer must be
    forced."""
    sampler = Script([], answer="(3*5)+7} and \\boxed{9} besides")
    problems, chains = [COUNTDOWN], [[completion(SOLVED), completion(FALSE_CLAIM)]]
    curve = evaluate.budget_curve(sampler, Letters(), problems, chains, [22, 1000])
    assert curve == {22: [1.0], 1000: [0.5]}  # what stands behind the closed box is no answer
    prompt = f"{COUNTDOWN.question}\n"
    assert sampler.forced == [
        prompt + SOLVED[:22] + "\\boxed{",
        prompt + FALSE_CLAIM[:22] + "\n\\boxed{",
    ]


def test_budget_curve_generates_nothing_for_answers_that_stand():
    """Guards against wasted generation, and against a second box forced behind the first (the last
    one counts)."""
    sampler = Script([], answer="1}")
    chains = [[completion(SOLVED + " and so on")]]
    assert evaluate.budget_curve(sampler, Letters(), [COUNTDOWN], chains, [len(SOLVED), 500]) == {
        len(SOLVED): [1.0],
        500: [1.0],
    }
    assert sampler.forced == []


def test_a_thought_that_the_prompt_has_opened_is_closed():
    """Guards against looking for the opening in the response alone, where R1-Distill has none."""

    class Opening(Letters):
        def chat(self, messages, add_generation_prompt=True):
            return self.encode(messages[0]["content"] + "\n<think>\n")

        def opening(self, messages):
            return "\n<think>\n"

    sampler = Script([], answer="1}")
    chains = [[completion("3*5=15, 15+9=24 not 22\n")]]
    evaluate.budget_curve(sampler, Opening(), [COUNTDOWN], chains, [10])
    assert sampler.forced[0].endswith("\n<think>\n3*5=15, 15\n</think>\n\\boxed{")


def test_budget_curve_completes_a_box_that_was_cut():
    """Guards against \\boxed{(3*\\boxed{: a cut inside the box is continued, not opened again."""
    sampler = Script([], answer="5)+7} tail }")
    cut = SOLVED.index("5)+7}")
    assert evaluate.budget_curve(
        sampler, Letters(), [COUNTDOWN], [[completion(SOLVED)]], [cut]
    ) == {cut: [1.0]}
    assert sampler.forced[0].endswith("\\boxed{(3*")


def test_a_thought_is_closed_before_the_answer():
    """Guards against forcing an answer inside <think>, where no model gives one."""
    assert (
        evaluate.forced_prefix(Problem("?", "1"), "<think>so")
        == "\n</think>\n\nThe final answer is \\boxed{"
    )
    assert (
        evaluate.forced_prefix(Problem("?", "1"), "<think>so</think>\n")
        == "\nThe final answer is \\boxed{"
    )


# --- evaluate() -----------------------------------------------------------------------------------


def test_evaluate_counts_by_hand():
    """Guards against samples attributed to the wrong problem, and chains counted beyond max_tokens.

    Problem 1: solved, false claim, never ends. Problem 2: three times solved. max_tokens cuts the
    third chain only."""
    chains = [[SOLVED, FALSE_CLAIM, "3+5=8, 8+7=15 not 22\n" * 40], [SOLVED] * 3]
    params = SamplingParams(max_tokens=100, temperature=1.0)
    asked = Settings(3, ks=(1, 3), budgets=(10, 200))
    result = evaluate.evaluate(Script(chains), Letters(), [COUNTDOWN] * 2, params, asked)
    summary = result.summary()
    assert result.rates() == [pytest.approx(1 / 3), 1.0]
    assert summary["pass@1"] == pytest.approx(2 / 3) and summary["pass@3"] == 1.0
    assert summary["maj@3"] == pytest.approx((0.5 + 1) / 2)
    assert summary["failures"] == {
        "false claim": pytest.approx(1 / 6),
        "cut off": pytest.approx(1 / 6),
    }
    assert summary["truncated"] == pytest.approx(1 / 6)
    assert result.attempts == [[1, 1, 4], [1, 1, 1]] and summary["attempts"] == pytest.approx(1.5)
    assert summary["repeats"] == pytest.approx(3 / 9) and summary["lost"] == pytest.approx(1 / 6)
    assert result.lengths == [[len(SOLVED) + 1, len(FALSE_CLAIM) + 1, 100], [len(SOLVED) + 1] * 3]
    assert summary["budget_curve"] == {10: 0.0, 200: pytest.approx(2 / 3)}
    low, high = summary["pass@1_ci"]
    assert low <= summary["pass@1"] <= high


def test_what_was_cut_off_is_told_from_what_has_no_box():
    """Guards against a --max-tokens that is too small reported as a model that gives no answer, and
    against a box, right or wrong, that no longer counts because something followed it."""
    chains = ["so it is 22", "3+5=8, 8" * 50, SOLVED + " so" * 99, FALSE_CLAIM + " so" * 99]
    params = SamplingParams(max_tokens=100)
    result = evaluate.evaluate(Script([chains]), Letters(), [COUNTDOWN], params, Settings(4))
    assert result.failures == {"no answer": 0.25, "cut off": 0.25, "false claim": 0.25}
    assert result.correct == [[False, False, True, False]]


def test_the_greedy_response_beside_the_samples():
    """Guards against "greedy" that is one of the samples, and against a cost where nobody asks."""
    policy = Script([[FALSE_CLAIM] * 2], answer=SOLVED)
    params = SamplingParams(max_tokens=100)
    result = evaluate.evaluate(policy, Letters(), [COUNTDOWN], params, Settings(2, greedy=True))
    assert result.greedy == [1.0] and result.rates() == [0.0]
    assert "greedy pass@1" in evaluate.table({"m": result})
    silent = evaluate.evaluate(Script([[SOLVED]]), Letters(), [COUNTDOWN], params, Settings(1))
    assert silent.greedy == [] and "greedy" not in evaluate.table({"m": silent})


def test_entropy_and_kl_from_the_start():
    """Guards against a KL of the wrong sign, of the prompt, of padding, or of another temperature;
    against one that is a mean over tokens; and against one that a policy has from itself."""
    tokenizer = demo_tokenizer(cot.WORDS)
    start, policy = (random_init(sft.small_shape(tokenizer), seed) for seed in (0, 1))
    prompts = [tokenizer.encode("numbers 3 5 7"), tokenizer.encode("numbers 9, target 9")]
    params = SamplingParams(max_tokens=12, temperature=0.7)
    drawn = Sampler(policy, tokenizer).generate(prompts, 2, params)
    chains = [chain for row in drawn for chain in row]
    repeated = [prompt for prompt in prompts for _ in range(2)]
    for model in (start, policy):
        wanted = []
        for prompt, chain in zip(repeated, chains):
            with torch.no_grad():
                logits = model.logits(model(torch.tensor([prompt + chain.tokens])))[0] / 0.7
            logprobs = logits.log_softmax(-1)[len(prompt) - 1 : -1]
            own = logprobs.gather(1, torch.tensor(chain.tokens)[:, None])
            wanted.append(sum(chain.logprobs) - own.sum().item())
        found = evaluate.kl_from(model, repeated, chains, 0.7)
        assert found == pytest.approx(wanted, abs=1e-3)
    assert found == pytest.approx([0] * 4, abs=1e-3), "of the policy itself"

    problems = [COUNTDOWN, countdown_problem([1, 2, 3], 6)]
    sampler = Sampler(policy, tokenizer)
    result = evaluate.evaluate(sampler, tokenizer, problems, params, Settings(2), None, start)
    asked = [tasks.prompt_ids(problem, tokenizer) for problem in problems]
    again = sampler.generate(asked, 2, params)
    flat = [chain for row in again for chain in row]
    kl = evaluate.kl_from(start, [p for p in asked for _ in range(2)], flat, 0.7)
    assert result.kl == pytest.approx([(kl[0] + kl[1]) / 2, (kl[2] + kl[3]) / 2])
    logprobs = [logprob for chain in flat for logprob in chain.logprobs]
    assert result.entropy == pytest.approx(-sum(logprobs) / len(logprobs))
    assert "KL from --kl-from" in evaluate.table({"m": result})


@pytest.mark.parametrize("cut", [{"temperature": 0.0}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_no_entropy_where_tokens_are_left_out(cut):
    """Guards against -log p of the likeliest token, or of a cut distribution, called entropy."""
    tokenizer = demo_tokenizer(cot.WORDS)
    sampler = Sampler(random_init(sft.small_shape(tokenizer), 0), tokenizer)
    params = SamplingParams(**({"max_tokens": 8, "temperature": 1.0} | cut))
    result = evaluate.evaluate(sampler, tokenizer, [COUNTDOWN], params, Settings(2))
    assert "entropy" not in evaluate.table({"m": result})


def test_kl_in_bfloat16_is_that_of_float32():
    """Guards against a KL that is rounding: in bfloat16 the policy's own log-probs and those of the
    model it began with are rounded in different programs."""
    tokenizer = demo_tokenizer(cot.WORDS)
    prompts = [tokenizer.encode("numbers 3 5 7")] * 8
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        start, policy = (random_init(sft.small_shape(tokenizer), seed) for seed in (0, 1))
        start, policy = start.to(dtype), policy.to(dtype)
        drawn = Sampler(policy, tokenizer).generate(prompts, 1, SamplingParams(max_tokens=64))
        chains = [row[0] for row in drawn]
        found[dtype] = [
            evaluate.kl_from(start, prompts, chains, 1.0),
            evaluate.kl_from(policy, prompts, chains, 1.0),
        ]
    exact, rounded = found.values()
    assert abs(sum(rounded[1])) < 0.05 * sum(exact[0]), "of the policy itself"
    assert sum(rounded[0]) == pytest.approx(sum(exact[0]), rel=0.3), "other samples, much the same"


def test_forced_answers_in_two_rounds_are_those_of_one(monkeypatch):
    """Guards against an answer that is cut where the first round ends, begins again there, or goes on
    from another text than its own."""
    tokenizer = demo_tokenizer(cot.WORDS)
    sampler = Sampler(random_init(sft.small_shape(tokenizer), 4), tokenizer)
    texts = [f"numbers {i} 5\n" + r"\boxed{\frac{1" for i in range(12)]
    begun = [tokenizer.encode(text) for text in texts]
    monkeypatch.setattr(evaluate, "ANSWER_TOKENS", 12)
    greedy = SamplingParams(max_tokens=12, temperature=0.0)
    wanted = []
    for text, [answer] in zip(texts, sampler.generate(begun, 1, greedy)):
        wanted.append(evaluate.close_box(text, answer.text(tokenizer)))
    for at_first in (1, 5, 8):
        monkeypatch.setattr(evaluate, "AT_FIRST", at_first)
        assert evaluate.with_answers(sampler, tokenizer, begun, texts) == wanted
    rounds = []
    monkeypatch.setattr(sampler, "generate", lambda *flags, **_: rounds.append(flags) or [])
    assert evaluate.with_answers(sampler, tokenizer, [], []) == [] and not rounds


def test_a_long_answer_gets_a_second_round():
    """Guards against a box that counts as closed by a brace of the fraction in it, and against a
    second round for a box that is closed."""

    fraction = r"\boxed{\frac{1"
    answers = {r"\boxed{": "7} and more", fraction: "}{2} + 3} so", fraction + "}{2} + 3": "} so"}

    class Scripted(Script):
        def generate(self, prompts, n, params, progress=False):
            rows = []
            for prompt in prompts:
                text = Letters().decode(prompt)
                self.forced.append((text, params.max_tokens))
                rows.append([completion(answers[text], params.max_tokens)])
            return rows

    sampler, texts = Scripted([]), [r"\boxed{", fraction]
    begun = [[ord(character) for character in text] for text in texts]
    found = evaluate.with_answers(sampler, Letters(), begun, texts)
    assert found == [r"\boxed{7}", r"\boxed{\frac{1}{2} + 3}"]
    asked = [(r"\boxed{", 8), (fraction, 8), (fraction + "}{2} + 3", 40)]
    assert sampler.forced == asked


def test_an_answer_model_writes_the_forced_answers():
    """Guards against --answer-model being ignored: T1 lets the SFT model answer from the RL model's
    chain."""
    policy, answerer = Script([[SOLVED]], answer="0}"), Script([], answer="(3*5)+7}")
    params = SamplingParams(max_tokens=100)
    asked = Settings(1, budgets=(10,))
    result = evaluate.evaluate(policy, Letters(), [COUNTDOWN], params, asked, answerer)
    assert result.curve == {10: [1.0]} and not policy.forced and policy.released


@pytest.mark.parametrize(
    "change",
    [{"ks": (4,)}, {"ks": (0,)}, {"budgets": (0,)}, {"budgets": (10**6,)}, {"problems": []}],
)
def test_evaluate_refuses_bad_requests(change):
    """Guards against a crash, or a silent nan, after the sampling has been paid for."""
    asked = {"problems": [COUNTDOWN]} | change
    problems, sampler = asked.pop("problems"), Script([[SOLVED] * 3])
    with pytest.raises(UserError):
        evaluate.evaluate(sampler, Letters(), problems, SamplingParams(64), Settings(3, **asked))


def test_without_max_tokens_the_context_is_used():
    """Guards against a default that does not fit the model's context, or that stops a long thought
    where the model has room for it; T1's longest responses are the limit."""
    longest = len(COUNTDOWN.question) + 3
    problems, config = (
        [COUNTDOWN, Problem("?" * (longest - 1), "1")],
        evaluate.Config(["m"], seed=5),
    )
    prompts = [len(tasks.prompt_ids(problem, Letters())) for problem in problems]
    for context, wanted in ((500, 500 - max(prompts)), (10**6, 10_240), (max(prompts), 1)):
        sampler = SimpleNamespace(model=SimpleNamespace(config=SimpleNamespace(context=context)))
        params = evaluate.sampling_params(config, (), sampler, Letters(), problems)
        assert params == SamplingParams(wanted, 1.0, seed=5)
    given = evaluate.sampling_params(replace(config, max_tokens=7), (), None, Letters(), problems)
    assert given.max_tokens == 7
    given = evaluate.sampling_params(config, (24, 192), None, Letters(), problems)
    assert (
        given.max_tokens == 192
    )  # and not thousands of tokens that no point of the curve asks for


# --- files ----------------------------------------------------------------------------------------


def result_of(rates, n=4):
    correct = [[i < rate * n for i in range(n)] for rate in rates]
    numbers = [[5] * n for _ in rates]
    curve = {8: [0.0] * len(rates), 16: list(rates)}
    return Result(
        correct,
        numbers,
        0.0,
        {},
        curve,
        {"wrong": 0.5},
        [1],
        attempts=numbers,
        repeats=0.1,
        lost=0.05,
    )


def test_curation_keeps_what_is_neither_always_nor_never_solved(tmp_path, capsys):
    """Guards against T1's curation inverted, and against rows that lose their other fields."""
    rows = [{"problem": f"p{i}", "answer": "1", "source": "x"} for i in range(4)]
    evaluate.curate(rows, result_of([0, 0.25, 0.75, 1]), tmp_path / "kept.jsonl")
    kept = [json.loads(line) for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
    assert kept == [rows[1] | {"difficulty": 0.75}, rows[2] | {"difficulty": 0.25}]
    histogram = capsys.readouterr().out
    assert histogram.count("#" * 12 + "\n") == 4 and "kept 2 of 4" in histogram


def test_curation_by_pass_rate(tmp_path):
    """Guards against bounds that are off by one problem: above the lower one, at most the upper
    one; T1 keeps at most 0.3. And against an upper bound of 1 that keeps what is always solved."""
    rows = [{"problem": f"p{i}"} for i in range(5)]
    for number, (above, upto, wanted) in enumerate(
        [(0.0, 0.5, [1, 2]), (0.25, 0.75, [2, 3]), (0.0, 1.0, [1, 2, 3])]
    ):
        out = tmp_path / f"{number}.jsonl"
        evaluate.curate(rows, result_of([0, 0.25, 0.5, 0.75, 1]), out, above, upto)
        assert [json.loads(line)["problem"] for line in out.read_text().splitlines()] == [
            f"p{i}" for i in wanted
        ]


def test_right_beyond_by_hand():
    """Guards against wrong responses, or those at the bound itself, counted as right beyond the
    longest chain shown."""
    result = result_of([0.5, 0.5], n=2)  # the first sample of each problem is right
    result.attempts = [[4, 9], [3, 9]]
    assert (
        result.right_beyond(3) == 0.25
        and result.right_beyond(2) == 0.5
        and result.right_beyond(4) == 0
    )


def test_curation_of_nothing_writes_nothing(tmp_path):
    """Guards against an empty problem file that fails later, in another command."""
    with pytest.raises(UserError, match="always or never"):
        evaluate.curate([{"problem": "p"}], result_of([1.0]), tmp_path / "kept.jsonl")
    assert not list(tmp_path.iterdir())


def test_figure_and_table_hold_every_model(tmp_path):
    """Guards against a figure that needs a display, and a table that drops failures only one model
    has."""
    results = {"sft": result_of([0.25, 0.5]), "rl": result_of([0.5, 1.0])}
    results["rl"].failures = {"timeout": 0.25}
    evaluate.plot_budgets(results, tmp_path / "new" / "budgets.png")
    assert (tmp_path / "new" / "budgets.png").read_bytes().startswith(b"\x89PNG")
    lines = {line[:26].strip(): line[26:] for line in evaluate.table(results).splitlines()}
    assert lines["fails: timeout"].split() == ["0.0", "%", "25.0", "%"]
    assert lines["pass@1"].split("%")[0].strip() == "37.5" and "75.0 % [" in lines["pass@1"]


def test_results_survive_the_file(tmp_path):
    """Guards against budgets that come back as strings, and against mixing runs of different
    flags."""
    path, result = tmp_path / "results.json", result_of([0.25, 1.0])
    evaluate.write_results(path, {"n": 4}, {"m": result})
    assert evaluate.load_results(path, {"n": 4}) == evaluate.load_results(path) == {"m": result}
    with pytest.raises(UserError, match="--n"):
        evaluate.load_results(path, {"n": 8})
    whole = json.loads(path.read_text())
    damages = [
        *[{"curve": value} for value in ({"x": [1.0, 1.0]}, None, {"4": [1.0]}, {"4": None})],
        *[{"correct": value} for value in (None, [], [[], []], ["x", "y"], 7)],
        *({"lengths": None}, {"majority": {"maj@4": 1}}, {"ks": [0]}, {"more": 1}),
        *({"failures": None}, {"truncated": "x"}),
    ]
    for damage in damages:
        result = whole["models"]["m"]["result"] | damage
        path.write_text(json.dumps(whole | {"models": {"m": {"result": result}}}))
        with pytest.raises(UserError, match="not a results file"):
            evaluate.load_results(path)
    for text in ("{", "", '{"models": []}', '{"models": {"m": null}}'):
        path.write_text(text)
        with pytest.raises(UserError, match="not a results file"):
            evaluate.load_results(path)


def test_what_cannot_be_written_is_printed(measured, monkeypatch, capsys):
    """Guards against hours of sampling whose numbers nobody sees, because the disk is full."""

    def full(path, text):
        with cli.writing(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    capsys.readouterr()
    monkeypatch.setattr(cli, "write_text", full)
    for out, kept in (("new", "nothing was written"), ("out", "go on with --resume")):
        flags = replace(measured, model=["model", "./model"], out=out)
        with pytest.raises(UserError, match=rf"results\.json: No space left on device; .*{kept}$"):
            evaluate.main(flags)
        assert "pass@1" in capsys.readouterr().out


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two small models with random weights."""
    folder, tokenizer = tmp_path_factory.mktemp("models"), demo_tokenizer(cot.WORDS)
    for seed, name in enumerate(("one", "other")):
        save_pretrained(random_init(sft.small_shape(tokenizer), seed), folder / name, tokenizer)
    return folder


CHAT = [{"role": "user", "content": "3+1?"}]
ROWS = [{"problem": f"{i}+1?", "answer": str(i + 1), "note": i} for i in range(4)]


@pytest.fixture
def measured(models, tmp_path, monkeypatch):
    """(flags of evaluate.py, which has measured a copy of the first model with them)."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(models / "one", "model")
    cli.write_jsonl("data.jsonl", ROWS)
    flags = evaluate.Config(["model"], data="data.jsonl", n=2, max_tokens=4, out="out")
    evaluate.main(flags)
    return replace(flags, resume=True)


def forbid_sampling(monkeypatch):
    monkeypatch.setattr(evaluate, "evaluate", lambda *_: pytest.fail("measured again"))


@pytest.mark.parametrize(
    "rows",
    [
        [*ROWS[:3], {"problem": "5+5?", "answer": "10"}],
        [*ROWS[:3], ROWS[3] | {"answer": "7"}],
        [*ROWS[:3], ROWS[3] | {"task": "other"}],
        [*ROWS[:3], {"answer": "4", "prompt": [{"role": "system", "content": ""}, *CHAT]}],
        ROWS[::-1],
        ROWS[:3],
        [*ROWS, *ROWS],
    ],
)
def test_resuming_with_other_problems_is_refused(measured, monkeypatch, rows):
    """Guards against old numbers under new problems of the same path, tracebacks where there are
    more or fewer of them, and new rows that --curate pairs with old rates."""
    forbid_sampling(monkeypatch)
    monkeypatch.setitem(tasks.TASKS, "other", tasks.Task(tasks.judge_math))
    before = Path("out/results.json").read_bytes()
    cli.write_jsonl("data.jsonl", rows)
    for flags in (measured, replace(measured, curate="kept.jsonl")):
        with pytest.raises(UserError, match=r"results\.json was measured with another --data"):
            evaluate.main(flags)
    assert Path("out/results.json").read_bytes() == before and not Path("kept.jsonl").exists()


def test_results_stand_in_the_order_of_the_flags(measured, models):
    """Guards against one model's numbers under another's name: the demos read the file by its
    order, and the second of two models may have been measured first."""
    shutil.copytree(models / "other", "first")
    evaluate.main(replace(measured, model=["first", "model"]))
    assert list(evaluate.load_results("out/results.json")) == ["first", "model"]
    evaluate.main(replace(measured, model=["model"]))
    assert list(evaluate.load_results("out/results.json")) == ["first", "model"]


def test_a_file_that_is_older_than_a_flag_is_still_good(measured, monkeypatch):
    """Guards against measurements of hours that a new flag of evaluate.py makes useless, and
    against those of the flag's other values being taken for them."""
    found = json.loads(Path("out/results.json").read_text())
    assert found["flags"].pop("dtype") == "float32" and found["flags"].pop("kl_from") is None
    Path("out/results.json").write_text(json.dumps(found))
    forbid_sampling(monkeypatch)
    evaluate.main(measured)
    evaluate.main(replace(measured, dtype="float32"))
    with pytest.raises(UserError, match="measured with another --dtype"):
        evaluate.main(replace(measured, dtype="bfloat16"))


def test_dtype_reaches_every_model_and_is_part_of_the_result(measured, monkeypatch):
    """Guards against a model that computes in another dtype than was asked for, and against old
    numbers of another dtype."""
    with pytest.raises(UserError, match="measured with another --dtype"):
        evaluate.main(replace(measured, dtype="bfloat16"))
    seen = []

    def evaluated(sampler, *_):
        seen.append(sampler.model.embed.weight.dtype)
        raise UserError("seen")

    monkeypatch.setattr(evaluate, "evaluate", evaluated)
    with pytest.raises(UserError, match="seen"):
        evaluate.main(replace(measured, out="new", dtype="bfloat16"))
    assert seen == [torch.bfloat16]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "chat_template.jinja"])
def test_resuming_with_another_model_of_the_same_name_is_refused(
    measured, models, monkeypatch, name
):
    """Guards against the old numbers of a model that was trained again in place, or that is asked
    in another template; the last byte counts."""
    forbid_sampling(monkeypatch)
    with open(f"model/{name}", "r+b") as file:
        content = bytearray(file.read())
        content[-1] ^= 1
        file.seek(0)
        file.write(content)
    if name == "config.json":
        raw = json.loads(Path(models / "one" / name).read_text())
        Path("model", name).write_text(json.dumps(raw | {"rms_norm_eps": 1.0}))
    with pytest.raises(UserError, match=r"results\.json was measured with another model"):
        evaluate.main(measured)


def test_resuming_with_another_answer_model_is_refused(models, tmp_path, monkeypatch):
    """Guards against a curve whose forced answers are those of a model that is no longer there."""
    monkeypatch.chdir(tmp_path)
    for name in ("model", "answerer"):
        shutil.copytree(models / "one", name)
    flags = evaluate.Config(["model"], task="countdown", limit=2, n=1, budgets="4", out="out")
    flags = replace(flags, answer_model="answerer")
    evaluate.main(flags)
    forbid_sampling(monkeypatch)
    Path("answerer").rename("moved")
    evaluate.main(replace(flags, resume=True, answer_model="moved"))
    shutil.copytree(models / "other", "answerer")
    with pytest.raises(UserError, match=r"measured with another --answer-model"):
        evaluate.main(replace(flags, resume=True))


def test_resuming_after_a_move_measures_nothing_again(measured, monkeypatch):
    """Guards against the same problems refused because their file was moved, packed or given a
    field that is not part of a problem; --curate writes the rows as they are now."""
    forbid_sampling(monkeypatch)
    rows = [row | {"note": "new"} for row in ROWS]
    Path("moved.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    Path("data.jsonl").unlink()
    evaluate.main(replace(measured, data="moved.gz"))
    results = json.loads(Path("out/results.json").read_text())
    results["models"]["model"]["result"]["correct"][1] = [True, False]
    Path("out/results.json").write_text(json.dumps(results))
    evaluate.main(replace(measured, data="moved.gz", curate="kept.jsonl"))
    assert cli.read_jsonl("kept.jsonl") == [rows[1] | {"difficulty": 0.5}]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=12))
def test_pass_at_1_is_the_mean_rate(counts):
    """Guards against pass@1 and the pass rate drifting apart (AIME's mean of n samples is
    pass@1)."""
    result = result_of([count / 4 for count in counts])
    assert np.mean(result.per_problem()["pass@1"]) == pytest.approx(sum(counts) / (4 * len(counts)))


@pytest.mark.parametrize(
    "flags, message",
    [
        ({}, "name the problems"),
        ({"data": "x.jsonl", "task": "countdown"}, "name the problems"),
        ({"data": "absent.jsonl"}, "absent.jsonl"),
        ({"task": "countdown", "budgets": "10,x"}, "--budgets"),
        ({"task": "countdown", "k": "0"}, "--k"),
        ({"task": "countdown", "k": "32", "n": 16}, "--n 16"),
        ({"task": "countdown", "limit": 0}, "--limit"),
        ({"task": "countdown", "kl_from": "absent", "top_p": 0.9}, "--kl-from"),
        ({"task": "countdown", "kl_from": "absent", "temperature": 0.0}, "--kl-from"),
        ({"task": "countdown", "limit": 2_000}, "distinct problems of 3 numbers from 1 to 21"),
        ({"task": "countdown", "numbers": 5}, "--numbers"),
        ({"task": "countdown", "curate_upto": 0.3}, "--curate FILE"),
        ({"task": "countdown", "largest": 100}, "--largest"),
        (
            {"task": "countdown", "curate": "kept.jsonl", "curate_above": 0.5, "curate_upto": 0.3},
            "--curate-above",
        ),
        ({"task": "countdown", "curate": "kept.jsonl", "model": ["a", "b"]}, "--curate"),
        ({"task": "countdown", "curate": "new", "out": "new"}, "--curate new is where --out"),
        ({"data": "x.jsonl", "curate": "kept.jsonl", "shuffles": 2}, "--shuffles times"),
        (
            {"task": "countdown", "curate": "new/results.json", "out": "./new"},
            "is where --out writes",
        ),
        ({"task": "countdown", "limit": 2}, "absent"),
        ({"task": "countdown", "out": "."}, "exists"),
        ({"task": "countdown", "out": "results.json"}, "results.json is not a folder"),
        (
            {"task": "countdown", "curate": "results.json/kept.jsonl"},
            "results.json is not a folder",
        ),
    ],
)
def test_bad_flags_are_refused_in_one_line(flags, message, tmp_path, monkeypatch):
    """Guards against a bad flag that surfaces after an hour of sampling, or as a traceback."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results.json").write_text("mine")
    with pytest.raises(UserError, match=message) as error:
        evaluate.main(evaluate.Config(**{"model": ["absent"]} | flags))
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"] and Path(
        "results.json"
    ).read_text() == "mine"
