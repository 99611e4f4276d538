"""How good is a policy, and does thinking longer make it better?

    python evaluate.py --model runs/sft runs/rl --task countdown --k 1,16 --budgets 24,48,96,192
    python evaluate.py --model DIR --data math500.jsonl --n 32 --budgets 256,512,1024 --out OUT
    python evaluate.py --model DIR --data train.jsonl --n 16 --curate kept.jsonl --curate-upto 0.3

What is measured, for n samples of each problem:

- **pass@k**, unbiased (Chen et al. 2021): of c correct among n samples, 1 - C(n-c, k) / C(n, k),
  averaged over the problems. pass@1 is the plain mean; AIME's "mean of 32 samples" is pass@1 with
  `--n 32`. The 95 % interval is a bootstrap over problems: their difficulty varies far more than
  the samples of one problem do. Where every problem scores 0 or 1, or all the same, it is not
  (see `interval`): 0 of 20 is not 0 for certain, but up to 16 %.
- **maj@k**: the answer most frequent among k samples; the n samples give n // k votes.
- **accuracy against budget**, T1's inference scaling: a chain that is not finished after B tokens
  is cut there, a box is opened behind it, and the model under test (or `--answer-model`; in T1 the
  base or SFT model) completes the answer greedily. Chains are sampled once, at the largest budget.
  The few tokens of the answer itself are not counted.
- **entropy** of the policy, in nats per token, and with `--kl-from` its KL from another model (the
  one that RL began with, say), in nats per response: means of -log pi and of log pi / start over
  what was sampled. In metrics.jsonl both are of RL's temperature, and of the responses that taught
  something; here they can be compared between runs. (A mean per token: copied tokens lower it.
  Where the sampler leaves tokens out, at temperature 0 or by --top-p, there is no entropy to say.)
- **failures**: the share of all samples that failed by each kind (countdown: see
  `tasks.diagnose_countdown`). `no answer` ended without a box, `cut off` was still thinking at
  --max-tokens.

Read in this order: the estimators; answers, and which are equal; the curve; one model's result
(`evaluate`); tables and figures; the command.
"""

import contextlib
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import combinations, islice, pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import behaviours
import cli
import parallel
import pretrained
import tasks
import verify
from cli import UserError
from cot import Loading, load_sampler
from devices import pick_device, pick_dtype
from model import Transformer
from packing import Example
from parallel import Scorer, World
from sample import MOST_TOKENS, Completion, Sampler, SamplingParams
from tasks import Problem
from tokenizer import Tokenizer, load_tokenizer, open_thought

# --- estimators -----------------------------------------------------------------------------------


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that k of n samples, c of them correct, hold a correct one.

    A product, because C(n, k) would overflow. Where n - c < k, one of its factors is 0.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, not n={n}, c={c}, k={k}")
    return 1.0 - float(np.prod(1.0 - k / np.arange(n - c + 1, n + 1)))


def maj_at_k(answers: list[str | None], correct: list[bool], k: int) -> float:
    """Share of the n // k groups of k samples whose most frequent answer is correct.

    answers: one name per class of equal answers (see `answer_classes`); None, no answer, has no
    vote. A tie is shared evenly.
    """
    right = dict(zip(answers, correct))
    wins = []
    for start in range(0, len(answers) - k + 1, k):
        votes = Counter(name for name in answers[start : start + k] if name is not None)
        most = max(votes.values(), default=0)
        winners = [name for name, count in votes.items() if count == most]
        wins.append(sum(right[name] for name in winners) / max(1, len(winners)))
    return sum(wins) / len(wins)


def interval(values: Sequence[float], least: float = 0.0) -> tuple[float, float]:
    """95 % interval of the mean of per-problem values from `least` to 1.

    A bootstrap of 2,000 samples, with a fixed seed of its own: the same values give the same
    interval. Of equal values it would have no width. Then the interval allows for the problems that
    none of those asked stands for: 0 of 20 scored otherwise, so up to 16 % of all problems may.
    Values of 0 and 1 have Wilson's interval.

    Problems count as independent. Countdown's are not quite, for several share a set of numbers:
    of 256 of them the error is 1.05 to 1.17 times as large.
    """
    values = np.asarray(values)
    count = len(values)
    if (values == values[0]).all():
        value = float(values[0])
        _, otherwise = wilson(0.0, count)
        return value - otherwise * (value - least), value + otherwise * (1 - value)
    if np.isin(values, (0, 1)).all():
        return wilson(float(values.mean()), count)
    rng = np.random.default_rng(0)
    means = []
    for _ in range(20):  # a hundred samples at once: all of them might not fit into memory
        means.append(values[rng.integers(0, count, (100, count))].mean(axis=1))
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def wilson(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of the chance of what was found in this share of `count` trials."""
    z = 1.96
    center = share + z**2 / (2 * count)
    width = z * np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    low, high = (center - width) / (1 + z**2 / count), (center + width) / (1 + z**2 / count)
    # Rounding could leave a share of 0 or 1 itself outside, or the ends outside of 0 to 1.
    return min(share, max(0.0, float(low))), max(share, min(1.0, float(high)))


def over_orders(values: Sequence[float], orders: int) -> np.ndarray:
    """The mean over the orders of its options, of each problem: [orders * P] -> [P].

    For intervals: the same problem asked again is no further problem.
    """
    return np.reshape(values, (orders, -1)).mean(axis=0)


# --- answers --------------------------------------------------------------------------------------


def answer_classes(problem: Problem, responses: list[str], correct: list[bool]) -> list[str | None]:
    """The boxed answers of one problem's responses, for the vote: equal ones have one name.

    In maths, correct answers equal the reference, so they are one class; wrong ones are compared
    with each other by `verify` (1/2 and 0.5 vote together). The answers of any other task are
    compared as text: countdown's expressions of equal value are not equal. None: no box.
    """
    boxes = [verify.last_boxed(response) for response in responses]
    names = [None if box is None else "".join(box.split()) for box in boxes]
    if problem.task != "math":
        return names
    wrong = [name for name, right in zip(names, correct) if name is not None and not right]
    first = first_equal(list(dict.fromkeys(wrong)))
    return ["correct" if right else first.get(name) for name, right in zip(names, correct)]


def first_equal(answers: list[str]) -> dict[str, str]:
    """{answer: the first of the answers that equals it}; answers: all different as text."""
    first = {answer: answer for answer in answers}
    pairs = list(combinations(answers, 2))
    if not pairs:
        return first
    verdicts = verify.verify_many([(f"\\boxed{{{b}}}", a) for a, b in pairs])
    for (a, b), verdict in zip(pairs, verdicts):
        if verdict.correct and first[b] == b:
            first[b] = first[a]
    return first


# --- the curve ------------------------------------------------------------------------------------

ANSWER_TOKENS = 48  # a forced answer's most tokens
AT_FIRST = 8  # of these: enough for most answers


def shorten(completion: Completion, budget: int) -> Completion:
    """What the same sampling gives under a smaller budget: a prefix of the completion."""
    if len(completion.tokens) <= budget:
        return completion
    return Completion(completion.tokens[:budget], completion.logprobs[:budget], "length")


def forced_prefix(problem: Problem, text: str, opening: str = "") -> str:
    """What is written behind a cut chain: it closes the thought and opens a box.

    opening: what the template opens the answer with, perhaps a thought.
    """
    if "\\boxed{" in text:  # the cut fell inside the box
        return ""
    forced = tasks.TASKS[problem.task].forced
    if closing := open_thought(opening + text):
        return f"\n{closing}\n" + forced
    if text.endswith("\n"):
        return forced
    return "\n" + forced


def close_box(text: str, answer: str) -> str:
    """`text` ends in an opened box: the text with `answer` up to the brace that closes the box.

    All of the answer, if it closes none.
    """
    for end, character in enumerate(answer, start=1):
        if character == "}" and verify.last_boxed(text + answer[:end]) is not None:
            return text + answer[:end]
    return text + answer


@dataclass
class CutChain:
    """A chain cut at a budget: the response that is judged in its place."""

    budget: int
    problem: int  # its number
    thought: str  # of the chain, up to the budget
    text: str
    written: list[int] | None  # what the forced answer continues; None: the chain has its answer
    correct: bool = False  # known in the end


def cut_chain(
    chain: Completion,
    budget: int,
    number: int,
    problem: Problem,
    opening: str,
    tokenizer: Tokenizer,
) -> CutChain:
    """A chain that did not end within the budget, nor boxed an answer, is to be completed."""
    short = shorten(chain, budget)
    text = short.text(tokenizer)
    if short.finish_reason == "stop" or verify.last_boxed(text) is not None:
        return CutChain(budget, number, text, text, None)
    prefix = forced_prefix(problem, text, opening)
    written = short.tokens + tokenizer.encode(prefix)
    return CutChain(budget, number, text, text + prefix, written)


def budget_curve(
    sampler: Sampler,
    tokenizer: Tokenizer,
    problems: list[Problem],
    completions: list[list[Completion]],
    budgets: list[int],
) -> dict[int, list[float]]:
    """T1's inference scaling: {budget: accuracy per problem} of chains cut at each budget."""
    cuts = answered_cuts(sampler, tokenizer, problems, completions, budgets)
    return curve_of(cuts, [len(chains) for chains in completions])


def curve_of(cuts: list[CutChain], samples: list[int]) -> dict[int, list[float]]:
    """{budget: accuracy per problem} of what `answered_cuts` has judged; samples: per problem."""
    curve: dict[int, list[float]] = {}
    for cut in cuts:
        accuracies = curve.setdefault(cut.budget, [0.0] * len(samples))
        accuracies[cut.problem] += cut.correct / samples[cut.problem]
    return dict(sorted(curve.items()))


def turning_steps(cuts: list[CutChain]) -> list[tuple[str, bool]]:
    """Of every cut with a wrong answer: (how its chain goes on to the next budget, does that turn
    it right?). For `behaviours.turning_words`."""
    steps = []
    for cut, longer in pairwise(cuts):
        same_chain = cut.problem == longer.problem and cut.budget < longer.budget
        if same_chain and not cut.correct and longer.thought != cut.thought:
            steps.append((longer.thought[len(cut.thought) :], longer.correct))
    return steps


def answered_cuts(
    sampler: Sampler,
    tokenizer: Tokenizer,
    problems: list[Problem],
    completions: list[list[Completion]],
    budgets: list[int],
) -> list[CutChain]:
    """Every chain cut at every budget, with an answer, judged; chain by chain, budgets rising.

    `sampler` writes the forced answers, greedily, from its own model. Nothing is generated for a
    chain that stopped within the budget or whose answer already stands in its box.
    """
    budgets = sorted(set(budgets))
    cuts: list[CutChain] = []
    prompts = [tasks.prompt_ids(problem, tokenizer) for problem in problems]
    for number, (problem, chains) in enumerate(zip(problems, completions)):
        opening = tokenizer.opening(tasks.messages(problem))
        for chain in chains:
            for budget in budgets:
                cuts.append(cut_chain(chain, budget, number, problem, opening, tokenizer))

    open_ended = [cut for cut in cuts if cut.written is not None]
    begun = [prompts[cut.problem] + cut.written for cut in open_ended]
    texts = [cut.text for cut in open_ended]
    for cut, text in zip(open_ended, with_answers(sampler, tokenizer, begun, texts)):
        cut.text = text

    verdicts = tasks.judge_all([problems[cut.problem] for cut in cuts], [cut.text for cut in cuts])
    for cut, verdict in zip(cuts, verdicts):
        cut.correct = verdict.correct
    return cuts


def with_answers(
    sampler: Sampler, tokenizer: Tokenizer, begun: list[list[int]], texts: list[str]
) -> list[str]:
    """The texts, each of which ends in an opened box, with the greedy answer that closes it.

    begun: what the sampler continues, prompt and text. An answer has at most `ANSWER_TOKENS`. What
    would follow its brace is not wanted: so all get a few tokens at first, and only those whose box
    is still open get the rest.
    """
    tokens: list[list[int]] = [[] for _ in begun]
    closed = list(texts)
    unfinished = list(range(len(begun)))
    for most in (AT_FIRST, ANSWER_TOKENS - AT_FIRST):
        if not unfinished:
            break
        greedy = SamplingParams(max_tokens=most, temperature=0.0)
        prompts = [begun[i] + tokens[i] for i in unfinished]
        answers = sampler.generate(prompts, 1, greedy, progress=True)
        going_on = []
        for i, [answer] in zip(unfinished, answers):
            tokens[i] += answer.tokens
            closed[i] = close_box(texts[i], replace(answer, tokens=tokens[i]).text(tokenizer))
            if answer.finish_reason == "length" and verify.last_boxed(closed[i]) is None:
                going_on.append(i)
        unfinished = going_on
    return closed


# --- how far from where it began ------------------------------------------------------------------


def kl_from(
    start: Transformer, prompts: list[list[int]], chains: list[Completion], temperature: float
) -> list[float]:
    """log pi / start of each chain, in nats: its mean is the KL. prompts: of each chain."""
    examples = []
    for prompt, chain in zip(prompts, chains):
        end = len(prompt) + len(chain.tokens)
        examples.append(Example(prompt + chain.tokens, [(len(prompt), end)]))
    scorer = Scorer(start)
    alone = World(0, 1, start.head_weight.device)
    values = parallel.values_of_all(
        lambda packed: parallel.log_probs(scorer, packed, temperature)[0],
        examples,
        None,
        parallel.row_dim(start),
        alone,
    )
    sizes = [len(chain.tokens) for chain in chains]
    expected = [part.double().sum().item() for part in torch.split(values, sizes)]
    return [sum(chain.logprobs) - begun for chain, begun in zip(chains, expected)]


# --- one model ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What is measured, of every model alike."""

    samples: int  # of each problem
    ks: tuple[int, ...] = (1,)  # of pass@k and maj@k
    budgets: tuple[int, ...] = ()  # of the curve
    curve_samples: int | None = None  # chains of each problem for the curve; None: all
    lenient: bool = False  # also find the answers of models that do not box them
    greedy: bool = False  # also one greedy response to each problem

    def __post_init__(self) -> None:
        if min((*self.ks, *self.budgets)) < 1:
            raise UserError("--k and --budgets are whole numbers above 0")
        if self.samples < max(self.ks):
            raise UserError(
                f"--n {self.samples} samples cannot give pass@{max(self.ks)}: raise --n"
            )


@dataclass(frozen=True)
class Judged:
    """One sample, judged."""

    text: str
    length: int  # tokens, the stop token included
    ended: bool  # by a stop token
    correct: bool
    kind: str  # "correct", or by what it fails
    tried: list[str]  # countdown: what each attempt came to
    shown: dict[str, int]  # how often each behaviour, see behaviours.py

    @property
    def repeats(self) -> int:
        """How many attempts came to what an earlier one had come to."""
        return len(self.tried) - len(set(self.tried))


@dataclass
class Result:
    """One model's samples, judged: [P][n] where P problems have n samples each.

    Plain lists, so that JSON holds it.
    """

    correct: list[list[bool]]
    lengths: list[list[int]]  # tokens, the stop token included
    truncated: float  # share of samples without a stop token
    majority: dict[str, list[float]]  # "maj@k" -> per problem
    curve: dict[int, list[float]]  # thinking budget -> accuracy per problem
    failures: dict[str, float]  # kind -> share of all samples
    ks: list[int]
    attempts: list[list[int]]  # countdown: how many attempts a sample made (0 elsewhere)
    repeats: float  # countdown: share of the attempts that are repeats, see `Judged.repeats`
    lost: float  # countdown: share of all samples that failed after a repeat
    behaviours: dict[str, float] = field(default_factory=dict)  # times per response
    turning_words: list[tuple[str, float, int]] = field(default_factory=list)  # see behaviours.py
    greedy: list[float] = field(default_factory=list)  # of each problem: is its greedy one right?
    entropy: float = 0.0  # nats per token, of what was sampled; 0: not of the whole distribution
    kl: list[float] = field(default_factory=list)  # --kl-from: of each problem, nats per response
    fingerprint: str = ""  # of the model: another one may stand under its name by now
    orders: int = 1  # --shuffles: the problems stand here so many times, all of them in each order

    def rates(self) -> list[float]:
        """The pass rate of each problem."""
        return [sum(row) / len(row) for row in self.correct]

    def by_attempts(self) -> dict[str, tuple[float, float]]:
        """See `behaviours.by_attempts`; {} where no response made any."""
        if not np.any(self.attempts):
            return {}
        made = [attempts for row in self.attempts for attempts in row]
        return behaviours.by_attempts(made, [right for row in self.correct for right in row])

    def right_beyond(self, attempts: int) -> float:
        """The share of all samples that are right, at an attempt beyond so many."""
        return float(np.mean(np.array(self.correct) & (np.array(self.attempts) > attempts)))

    def per_problem(self) -> dict[str, list[float]]:
        """Every score whose mean over the problems is reported, by name."""
        scores = {}
        for k in self.ks:
            scores[f"pass@{k}"] = [pass_at_k(len(row), sum(row), k) for row in self.correct]
        if self.greedy:
            scores["greedy pass@1"] = self.greedy
        return scores | self.majority

    def summary(self) -> dict:
        scores = {}
        for name, values in self.per_problem().items():
            scores[name] = float(np.mean(values))
            scores[f"{name}_ci"] = interval(over_orders(values, self.orders))
        curve = {budget: float(np.mean(values)) for budget, values in self.curve.items()}
        if self.kl:
            scores["kl"] = float(np.mean(self.kl))
        return scores | {
            "entropy": self.entropy,
            "mean_tokens": float(np.mean(self.lengths)),
            "truncated": self.truncated,
            "budget_curve": curve,
            "failures": self.failures,
            "attempts": float(np.mean(self.attempts)),
            "repeats": self.repeats,
            "lost": self.lost,
            "behaviours": self.behaviours,
            "by_attempts": self.by_attempts(),
            "turning_words": self.turning_words,
            "problems": len(self.correct) // self.orders,
            "samples": len(self.correct[0]),
        }


def evaluate(
    sampler: Sampler,
    tokenizer: Tokenizer,
    problems: list[Problem],
    params: SamplingParams,
    settings: Settings,
    answer_sampler: Sampler | None = None,
    start: Transformer | None = None,
) -> Result:
    """Sample every problem `settings.samples` times and measure all of the above.

    pass@k and the rest judge chains of at most `params.max_tokens`. Budgets may be larger: chains
    are sampled once, at the largest, and cut. `answer_sampler` forces the curve's answers instead
    of the model under test (it must share its tokenizer). start: the model to measure the KL from.
    """
    if not problems:
        raise UserError("no problems to evaluate")
    prompts = [tasks.prompt_ids(problem, tokenizer) for problem in problems]
    context = sampler.model.config.context
    needed = max(map(len, prompts)) + max(settings.budgets, default=0) + 2 * ANSWER_TOKENS
    if settings.budgets and needed > context:
        raise UserError(
            f"a budget of {max(settings.budgets)} needs a context of {needed} tokens, "
            f"the model's is {context}"
        )
    longest = replace(params, max_tokens=max((params.max_tokens, *settings.budgets)))
    sampled = sampler.generate(prompts, settings.samples, longest, progress=True)

    asked = [problem for problem in problems for _ in range(settings.samples)]
    chains = [shorten(chain, params.max_tokens) for row in sampled for chain in row]
    responses = judge_chains(asked, chains, tokenizer, settings.lenient)
    # Each budget costs a forced answer for every chain that is not finished: hence `curve_samples`.
    cuttable = [row[: settings.curve_samples] for row in sampled]
    answerer = answer_sampler or sampler
    if answer_sampler:
        sampler.release()  # the other model needs the room
    cuts = answered_cuts(answerer, tokenizer, problems, cuttable, list(settings.budgets))
    curve = curve_of(cuts, [len(chains) for chains in cuttable])
    result = result_of(problems, responses, settings, curve)
    result.turning_words = behaviours.turning_words(turning_steps(cuts))
    if is_whole(params):
        drawn = [logprob for chain in chains for logprob in chain.logprobs]
        result.entropy = -float(np.mean(drawn))
    if start:
        repeated = [prompt for prompt in prompts for _ in range(settings.samples)]
        found = np.reshape(kl_from(start, repeated, chains, params.temperature), (len(prompts), -1))
        result.kl = found.mean(axis=1).tolist()
    if settings.greedy:
        likeliest = sampler.generate(prompts, 1, replace(params, temperature=0.0), progress=True)
        chains = [chain for [chain] in likeliest]
        judged = judge_chains(problems, chains, tokenizer, settings.lenient)
        result.greedy = [float(response.correct) for response in judged]
    return result


def judge_chains(
    problems: list[Problem], chains: list[Completion], tokenizer: Tokenizer, lenient: bool
) -> list[Judged]:
    """The chains as judged responses; `problems` names the problem of each chain."""
    texts = [chain.text(tokenizer) for chain in chains]
    if lenient:
        texts = [tasks.boxed(text) for text in texts]
    responses = []
    verdicts = tasks.judge_all(problems, texts)
    for problem, chain, text, verdict in zip(problems, chains, texts, verdicts):
        ended = chain.finish_reason == "stop"
        kind = tasks.diagnose(problem, text, verdict)
        if verdict.outcome == "no_answer" and not ended:
            kind = "cut off"
        response = Judged(
            text=text,
            length=len(chain.tokens),
            ended=ended,
            correct=verdict.correct,
            kind=kind,
            tried=tasks.attempts(text),
            shown=behaviours.count(problem, text),
        )
        responses.append(response)
    return responses


def result_of(
    problems: list[Problem],
    responses: list[Judged],
    settings: Settings,
    curve: dict[int, list[float]],
) -> Result:
    """The numbers of all responses, problem by problem."""

    def by_problem(read: Callable[[Judged], Any]) -> list[list[Any]]:
        values = [read(response) for response in responses]
        n = settings.samples
        return [values[start : start + n] for start in range(0, len(values), n)]

    count = len(responses)
    kinds = Counter(response.kind for response in responses)
    failures = {kind: times / count for kind, times in kinds.most_common() if kind != "correct"}
    attempts = sum(len(response.tried) for response in responses)
    repeated = sum(response.repeats for response in responses)
    lost = sum(response.repeats > 0 and not response.correct for response in responses)
    correct = by_problem(lambda response: response.correct)
    texts = by_problem(lambda response: response.text)
    return Result(
        correct=correct,
        lengths=by_problem(lambda response: response.length),
        truncated=sum(not response.ended for response in responses) / count,
        majority=majority(problems, texts, correct, settings.ks),
        curve=curve,
        failures=failures,
        ks=list(settings.ks),
        attempts=by_problem(lambda response: len(response.tried)),
        repeats=repeated / max(1, attempts),
        lost=lost / count,
        behaviours=mean_counts([response.shown for response in responses]),
    )


def mean_counts(shown: list[dict[str, int]]) -> dict[str, float]:
    """How often each behaviour is shown, per response."""
    total: Counter[str] = Counter()
    for counts in shown:
        total.update(counts)
    return {name: total[name] / len(shown) for name in shown[0]}


def majority(
    problems: list[Problem], texts: list[list[str]], correct: list[list[bool]], ks: tuple[int, ...]
) -> dict[str, list[float]]:
    """{"maj@k": per problem}, for every k above 2: two samples have no majority."""
    ks = [k for k in ks if k > 2]
    if not ks:
        return {}
    classes = [answer_classes(*row) for row in zip(problems, texts, correct)]
    found = {}
    for k in ks:
        found[f"maj@{k}"] = [maj_at_k(names, right, k) for names, right in zip(classes, correct)]
    return found


# --- tables and figures ---------------------------------------------------------------------------


def draw_budgets(axes: Axes, results: dict[str, Result]) -> None:
    """Accuracy against thinking budget: a line per model, with its 95 % interval as a band."""
    for name, result in results.items():
        budgets = sorted(result.curve)
        means = [np.mean(result.curve[budget]) for budget in budgets]
        intervals = [
            interval(over_orders(result.curve[budget], result.orders)) for budget in budgets
        ]
        low, high = zip(*intervals)
        axes.plot(budgets, means, marker="o", label=name)
        axes.fill_between(budgets, low, high, alpha=0.2)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set(xlabel="thinking budget (tokens)", ylabel="accuracy")
    axes.set_title("Accuracy against thinking budget")
    axes.grid(alpha=0.3)
    axes.legend()


def plot_budgets(results: dict[str, Result], path: str | Path) -> None:
    figure = Figure(
        figsize=(6.4, 4.2), layout="constrained"
    )  # not pyplot: no display, no global state
    draw_budgets(figure.subplots(), results)
    with cli.whole_file(path) as partial:
        figure.savefig(partial, format="png", dpi=150)


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def table(results: dict[str, Result]) -> str:
    """Scores, curve and failures as text: one row per number, one column per model."""
    columns = [cells_of(result.summary()) for result in results.values()]
    labels = dict.fromkeys(label for cells in columns for label in cells)
    rows = {"": list(results)}
    for label in labels:
        missing = percent(0) if label.startswith("fails: ") else "-"
        rows[label] = [cells.get(label, missing) for cells in columns]
    return aligned(rows)


def aligned(rows: dict[str, list[str]]) -> str:
    """{label: cells} as text, the columns one below the other."""
    first = max(26, *(len(label) + 2 for label in rows))
    width = 2 + max(len(cell) for row in rows.values() for cell in row)
    lines = []
    for label, row in rows.items():
        padded = [f"{cell:>{width}}" for cell in row]
        lines.append(f"{label:<{first}}" + "".join(padded))
    return "\n".join(lines)


def cells_of(summary: dict) -> dict[str, str]:
    """One model's column of the table: {label: cell}."""
    cells = {}
    for name in summary:
        if f"{name}_ci" in summary:
            low, high = summary[f"{name}_ci"]
            cells[name] = f"{percent(summary[name])} [{100 * low:.1f}, {100 * high:.1f}]"
    cells["mean tokens"] = f"{summary['mean_tokens']:.1f}"
    cells["without an end"] = percent(summary["truncated"])
    if summary["entropy"]:
        cells["entropy (nats per token)"] = f"{summary['entropy']:.3f}"
    if "kl" in summary:
        cells["KL from --kl-from (nats)"] = f"{summary['kl']:.2f}"
    if summary["attempts"]:
        cells["attempts"] = f"{summary['attempts']:.2f}"
        cells["... that repeat a value"] = percent(summary["repeats"])
        cells["repeats, and fails"] = percent(summary["lost"])
    for name, times in summary["behaviours"].items():
        cells[name] = f"{times:.2f}"
    for made, (share, accuracy) in summary["by_attempts"].items():
        cells[f"right of {made} attempts"] = f"{percent(accuracy)} (of {percent(share)})"
    for budget, accuracy in summary["budget_curve"].items():
        cells[f"at {budget} tokens"] = percent(accuracy)
    for kind, share in summary["failures"].items():
        cells[f"fails: {kind}"] = percent(share)
    return cells


def curate(
    rows: list[dict], result: Result, path: str | Path, above: float = 0.0, upto: float = 1.0
) -> None:
    """Write the problems that are solved sometimes, but not always, with their `difficulty`.

    Kept are pass rates greater than `above` and at most `upto`. (T1 drops what is too easy; one
    reader: above 0.3. Never solved is dropped by us.) The difficulty is 1 less the pass rate.
    """
    rates = result.rates()
    print_histogram(rates)
    kept = []
    for row, rate in zip(rows, rates):
        if max(0, above) < rate <= upto and rate < 1:
            kept.append(row | {"difficulty": round(1 - rate, 4)})
    if not kept:
        raise UserError(
            f"each of the {len(rows)} problems is always or never solved, or outside of the bounds:"
            f" nothing to write to {path}"
        )
    cli.write_jsonl(path, kept)
    print(f"kept {len(kept)} of {len(rows)} problems in {path}")


def print_histogram(rates: list[float]) -> None:
    """How many problems have which pass rate: never solved, always solved, and ten bins between."""
    bins = [f"{i / 10:.1f} to {(i + 1) / 10:.1f}" for i in range(10)]
    counts: Counter[str] = Counter()
    for rate in rates:
        between = 0 < rate < 1
        counts[bins[int(10 * rate)] if between else f"{rate:.0f}"] += 1
    print("pass rate    problems")
    for label in ["0", *bins, "1"]:
        print(f"{label:<12} {counts[label]:>6}  {'#' * round(50 * counts[label] / len(rates))}")


# --- command --------------------------------------------------------------------------------------

UNMEASURED = ("model", "out", "resume", "curate", "curate_above", "curate_upto", "max_batch")
"""Flags that change none of a model's numbers: --resume accepts them with another value."""


def measured_by(config: "Config", problems: list[Problem]) -> dict[str, Any]:
    """What a result depends on besides its model: the flags, with the contents of what they name
    instead of its path."""
    flags = {name: value for name, value in asdict(config).items() if name not in UNMEASURED}
    flags["data"] = cli.fingerprint(problems)
    flags["dtype"] = pick_dtype(config.dtype, pick_device(), say=False)
    if config.answer_model:
        flags["answer_model"] = pretrained.fingerprint(config.answer_model)
    if config.kl_from:
        flags["kl_from"] = pretrained.fingerprint(config.kl_from)
    return flags


@dataclass
class Config:
    model: list[str]
    """Run folders, Hugging Face folders or names of its hub to compare, in the order of the table
    (SFT before RL)."""
    data: str | None = None
    """Problems: a file with `problem` (or `question`, `prompt`) and `answer`, or a data set's name,
    such as gsm8k or openai/gsm8k:main/test (hub.py)."""
    fields: str = ""
    """What these are called there, if otherwise: problem=NAME,answer=NAME."""
    shuffles: int = 1
    """Multiple choice: in how many orders the options are put; the accuracy is the mean."""
    task: str | None = None
    """Generated problems instead of --data, the held-out ones: countdown, or a task of your own."""
    suite: Literal["", "t1"] = ""
    """t1: the paper's four sets, instead of --data, as it measures them, with its own rows."""
    limit: int | None = None
    """The first so many problems: all of a file, 1024 of a task, unless given."""
    n: int = 16
    """Samples per problem. More narrow pass@k; 32 is what AIME is reported with."""
    k: str = "1"
    """The k of pass@k and maj@k, separated by commas; none above n."""
    budgets: str = ""
    """Thinking budgets in tokens, separated by commas, for accuracy against budget."""
    curve_samples: int | None = None
    """Samples per problem whose chains are cut at the budgets: all of them, unless given."""
    max_tokens: int | None = None
    """Longest response that pass@k judges. None: the largest of --budgets, or without these what
    the model's context has room for, T1's 10,240 at most."""
    temperature: float = 1.0
    """1.0 samples the policy itself; 0 is greedy (then n = 1 says all)."""
    greedy: bool = False
    """Also one greedy response to each problem: what `pass@1` means in some reports."""
    top_p: float = 1.0
    """Nucleus. 0.95 is usual for reporting maths scores."""
    min_p: float = 0.0
    """Drops tokens below this share of the most likely one."""
    seed: int = 0
    """Of the problems and the samples: the same seed gives the same numbers."""
    answer_model: str | None = None
    """Who writes the forced answer of a cut chain (T1: the base or SFT model). None: the model
    under test."""
    kl_from: str | None = None
    """Also measure every model's KL from this one, such as the SFT model that RL began with."""
    lenient: bool = False
    """Accept an answer outside a box ("the answer is 7", the last number), for models not taught to
    box it."""
    curate: str | None = None
    """Write the problems that the (one) model solves sometimes, but not always, to this JSONL, with
    their difficulty."""
    curate_above: float = 0.0
    """With --curate: only problems with a pass rate above this."""
    curate_upto: float = 1.0
    """With --curate: only problems with a pass rate of at most this (T1, one reader: 0.3)."""
    numbers: int = 3
    """Countdown: how many numbers."""
    largest: int = tasks.LARGEST_GIVEN
    """Countdown: the numbers are drawn from 1 to this."""
    operators: str = "+-*"
    """Countdown: which operators; / divides exactly."""
    template_args: str = ""
    """JSON that the chat template is to know, such as '{"enable_thinking": false}'."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the models compute in. auto: bfloat16 on a GPU that has it, else float32."""
    out: str | None = None
    """Folder for results.json, budgets.png and behaviours.png."""
    resume: bool = False
    """Take models already measured from OUT/results.json instead of measuring them again."""
    max_batch: int = 256
    """Sequences sampled at once: lower it where memory is short. Does not change the numbers."""


def integers(text: str, flag: str) -> tuple[int, ...]:
    """ "1,8,32" -> (1, 8, 32)"""
    try:
        return tuple(int(part) for part in text.split(",") if text)
    except ValueError:
        raise UserError(f"{flag} takes whole numbers, separated by commas, not {text!r}") from None


def read_settings(config: Config) -> Settings:
    """What the flags ask for; UserError for flags that do not go together."""
    ks = integers(config.k, "--k") or (1,)
    budgets = integers(config.budgets, "--budgets")
    if (config.data is None) == (config.task is None):
        raise UserError(
            "name the problems: either --data FILE.jsonl, or --task countdown, or --suite t1"
        )
    if config.limit is not None and config.limit < 1:
        raise UserError(f"--limit {config.limit}: at least one problem")
    if config.shuffles < 1 or (config.shuffles > 1 and config.task):
        raise UserError(f"--shuffles {config.shuffles}: at least 1, and more only with --data")
    above, upto = config.curate_above, config.curate_upto
    if not config.curate and (above, upto) != (0, 1):
        raise UserError(
            "--curate-above and --curate-upto say what --curate FILE keeps: give that, too"
        )
    if not 0 <= above < upto <= 1:
        raise UserError(
            "--curate-above and --curate-upto are pass rates from 0 to 1, the first below the other"
        )
    if config.curate:
        out = Path(os.path.realpath(config.out or ""))
        pictures = (out / "budgets.png", out / "behaviours.png")
        written = (out, out / "results.json", *pictures)
        if config.out and Path(os.path.realpath(config.curate)) in written:
            raise UserError(f"--curate {config.curate} is where --out writes: choose another file")
        if len(config.model) > 1 or config.n < 2 or Path(config.curate).exists():
            raise UserError(
                "--curate needs one --model, --n of at least 2, and a file that does not exist yet"
            )
        if config.shuffles > 1:
            raise UserError("--curate would write each problem --shuffles times: leave that out")
        cli.check_parent(config.curate)
    # Made for its checks: the number of tokens may follow from a model that is not loaded yet.
    max_tokens = 1 if config.max_tokens is None else config.max_tokens
    params = SamplingParams(max_tokens, config.temperature, config.top_p, config.min_p)
    if config.kl_from and not is_whole(params):
        raise UserError("--kl-from is of a whole policy: no --top-p, --min-p or --temperature 0")
    return Settings(config.n, ks, budgets, config.curve_samples, config.lenient, config.greedy)


def read_problems(config: Config) -> tuple[list[Problem], list[dict]]:
    """The problems, and the JSONL rows they stand for."""
    if config.data:
        problems, chosen = [], []
        for order in range(config.shuffles):
            rows = tasks.read_source(config.data, config.fields, config.seed + order)
            for where, row in islice(rows.items(), config.limit):
                problems.append(tasks.read_problem(row, where))
                chosen.append(row)
        return problems, chosen
    stream = tasks.made(config.task, config, heldout=True)
    problems = list(islice(stream, config.limit or 1024))
    rows = [{"problem": p.question, "answer": p.answer, "task": p.task} for p in problems]
    return problems, rows


def is_whole(params: SamplingParams) -> bool:
    """Whether every token may be drawn: only then is -log p of those drawn an entropy."""
    return params.temperature > 0 and params.top_p == 1 and params.min_p == 0


def sampling_params(
    config: Config,
    budgets: tuple[int, ...],
    sampler: Sampler,
    tokenizer: Tokenizer,
    problems: list[Problem],
) -> SamplingParams:
    """How a model is sampled. Without --max-tokens: up to the largest budget, or, without budgets,
    as long as its context leaves room behind the prompts."""
    max_tokens = config.max_tokens
    if max_tokens is None and budgets:
        max_tokens = max(budgets)
    elif max_tokens is None:
        longest = max(len(tasks.prompt_ids(problem, tokenizer)) for problem in problems)
        # At least 1: the sampler says which prompt fills the context.
        max_tokens = max(1, min(MOST_TOKENS, sampler.model.config.context - longest))
    return SamplingParams(max_tokens, config.temperature, config.top_p, config.min_p, config.seed)


def measure(
    config: Config, settings: Settings, problems: list[Problem], file: Path | None
) -> dict[str, Result]:
    """The result of every model, in the order of the flags; `file` (results.json) grows with each.

    Those that `file` holds already are taken from there, with --resume; without, it is in the way.
    """
    if file:
        cli.check_parent(file)
        if file.exists() and not config.resume:
            raise UserError(f"{file} exists: choose another --out, or --resume to add to it")
    flags = measured_by(config, problems)
    fingerprints = {name: pretrained.fingerprint(name) for name in config.model}
    results: dict[str, Result] = {}
    if file and file.exists():
        results = load_results(file, flags)
    for name in results.keys() & fingerprints.keys():
        if results[name].fingerprint != fingerprints[name]:
            raise UserError(f"{file} was measured with another {name}: choose another --out")
    answerer, start = load_others(config)
    for name in config.model:
        if name in results:
            continue
        sampler, tokenizer = load_sampler(name, config.max_batch, loading_of(config))
        params = sampling_params(config, settings.budgets, sampler, tokenizer, problems)
        print(
            f"{name}: {len(problems)} problems, {config.n} samples each, "
            f"at most {params.max_tokens} tokens",
            file=sys.stderr,
        )
        result = evaluate(sampler, tokenizer, problems, params, settings, answerer, start)
        del sampler  # its weights and its cache, before the next model is loaded
        if answerer:
            answerer.release()
        results[name] = replace(result, fingerprint=fingerprints[name], orders=config.shuffles)
        # In the order of the flags, by which others read the file; then what it had besides.
        order = [other for other in (*config.model, *results) if other in results]
        results = {other: results[other] for other in order}
        if file:
            try:
                write_results(file, flags, results)
            except cli.WriteError:  # they took hours: the terminal has them at least
                print(table(results))
                raise
    return {name: results[name] for name in config.model}


def loading_of(config: Config) -> Loading:
    return Loading(config.template_args, config.dtype)


def load_others(config: Config) -> tuple[Sampler | None, Transformer | None]:
    """The models of --answer-model and --kl-from. UserError if one has other tokens than the models
    that are measured.
    """
    loaded = []
    for flag in ("answer_model", "kl_from"):
        other = getattr(config, flag)
        if other is None:
            loaded.append(None)
            continue
        sampler, tokenizer = load_sampler(other, config.max_batch, loading_of(config))
        for name in config.model:
            own = load_tokenizer(name, config.template_args)
            if own.files["tokenizer.json"] != tokenizer.files["tokenizer.json"]:
                raise UserError(
                    f"--{flag.replace('_', '-')} {other} cannot go on in {name}'s tokens: "
                    "other tokenizer.json"
                )
        loaded.append(sampler)
    answerer, start = loaded
    return answerer, start.model if start else None


def print_gain(before: Result, after: Result) -> None:
    """The gain of pass@1, by problem: their difficulty cancels, so the interval is narrow."""
    gain = over_orders(np.array(after.rates()) - np.array(before.rates()), after.orders)
    low, high = interval(gain, least=-1.0)
    print(f"pass@1 gained: {100 * np.mean(gain):+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]")


def main(config: Config) -> None:
    def kept() -> str:
        files = []
        if config.out:
            names = "*/results.json" if config.suite else "results.json"
            files = sorted(map(str, Path(config.out).glob(names)))
        if not files:
            return "nothing was written"
        return f"the models measured so far are in {', '.join(files)}; go on with --resume"

    with contextlib.ExitStack() as held:
        held.enter_context(cli.telling(kept))
        if config.out:
            held.enter_context(cli.holding(config.out, folder=True))
        if config.curate:
            held.enter_context(cli.holding(config.curate))
        if config.suite:
            compare_suite(config)
        else:
            compare(config)


SUITE = {"math500": 1, "aime24": 32, "omni-math": 1, "gpqa-diamond": 1}
"""The paper's sets, and how many samples of each problem their pass@1 is the mean of. Of Omni-MATH
it takes 500 problems that it does not name; here are all 4,428. Temperature is not said."""
PAPER = {
    "T1-SFT, GLM-4-9B": (60.2, 4.1, 20.0, 37.2),
    "T1, GLM-4-9B": (65.8, 9.2, 24.4, 38.1),
    "T1-SFT, Qwen2.5-14B": (77.2, 10.3, 28.5, 42.3),
    "T1, Qwen2.5-14B": (87.4, 30.5, 38.6, 48.3),
    "T1-SFT, Qwen2.5-32B": (83.4, 24.9, 34.6, 49.5),
    "T1, Qwen2.5-32B": (92.4, 50.6, 49.6, 56.1),
}
"""pass@1 in percent on the sets of `SUITE`, from the paper's table."""


def compare_suite(config: Config) -> None:
    """Measure the models on every set of `SUITE`, each in a folder of its own in --out."""
    if config.data or config.task or config.curate:
        raise UserError("--suite names its own problems: no --data, --task or --curate beside it")
    if config.budgets or config.greedy or config.k != "1" or config.n != Config([]).n:
        raise UserError("--suite shows pass@1 alone: no --n, --k, --greedy or --budgets beside it")
    parts = []  # all are fetched before the first is measured: one of them is gated
    for name, samples in SUITE.items():
        out = str(Path(config.out) / name) if config.out else None
        part = replace(config, suite="", data=name, n=samples, out=out)
        settings = read_settings(part)
        problems, _ = read_problems(part)
        parts.append((part, settings, problems))
    ours: dict[str, list[str]] = {model: [] for model in config.model}
    for part, settings, problems in parts:
        file = Path(part.out) / "results.json" if part.out else None
        for model, result in measure(part, settings, problems, file).items():
            ours[model].append(cells_of(result.summary())["pass@1"])
    rows = {"": list(SUITE)} | ours
    for model, numbers in PAPER.items():
        rows[f"paper: {model}"] = [f"{number} %" for number in numbers]
    print(aligned(rows))


def compare(config: Config) -> None:
    """Measure the models; the table, the figure, and the problems that --curate keeps."""
    settings = read_settings(config)
    problems, rows = read_problems(config)
    file = Path(config.out) / "results.json" if config.out else None
    results = measure(config, settings, problems, file)
    print(table(results))
    if len(results) == 2:
        print_gain(*results.values())
    print_turning_words(results)
    if file:
        counts = {name: result.behaviours for name, result in results.items()}
        attempts = {name: result.by_attempts() for name, result in results.items()}
        behaviours.plot(counts, attempts, file.with_name("behaviours.png"))
    if file and settings.budgets:
        plot_budgets(results, file.with_name("budgets.png"))
    if config.curate:
        [result] = results.values()
        curate(rows, result, config.curate, config.curate_above, config.curate_upto)


def print_turning_words(results: dict[str, Result]) -> None:
    """T1's key steps: the words where an answer turns from wrong to right between two budgets."""
    for name, result in results.items():
        if result.turning_words:
            words = [f"{word} {lift:.1f}x" for word, lift, _ in result.turning_words]
            print(f"{name}, where answers turn right: {', '.join(words)}")


def write_results(path: Path, flags: dict, results: dict[str, Result]) -> None:
    models = {}
    for name, result in results.items():
        models[name] = {"summary": result.summary(), "result": asdict(result)}
    cli.write_text(path, json.dumps({"flags": flags, "models": models}))


def load_results(path: str | Path, flags: dict | None = None) -> dict[str, Result]:
    """The models of a results.json; UserError where they were not measured with these `flags`."""
    flags = flags or {}
    try:
        found = cli.read_json(path)
        results = {name: read_result(model) for name, model in found["models"].items()}
        before = usual_flags() | found["flags"]
        changed = [name for name in flags if before[name] != flags[name]]
        for result in results.values():
            result.orders = before["shuffles"]  # as old files do not say
    except (UserError, LookupError, TypeError, AttributeError, ValueError, ArithmeticError):
        raise UserError(f"{path} is not a results file of evaluate.py") from None
    if changed:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in changed)
        raise UserError(f"{path} was measured with another {names}")
    return results


def usual_flags() -> dict[str, Any]:
    """Every flag as it is when left out: so it was in a file that is older than the flag."""
    flags = {flag.name: flag.default for flag in fields(Config)}
    return flags | {"dtype": pick_dtype("auto", pick_device(), say=False)}


def read_result(model: dict) -> Result:
    """A model's result as it was; any of Python's exceptions if it is not one, or damaged."""
    result = Result(**model["result"])
    result.curve = {int(budget): values for budget, values in result.curve.items()}
    for values in (*result.curve.values(), *result.majority.values()):
        if len(values) != len(result.correct):
            raise ValueError(f"{len(values)} values for {len(result.correct)} problems")
    table({"": result})  # what cannot be shown is damaged
    return result


if __name__ == "__main__":
    cli.run(main, Config)
