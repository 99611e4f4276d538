"""How good is a policy, and does thinking longer make it better: pass@k, maj@k, accuracy against thinking budget.

    python evaluate.py --model runs/sft runs/rl --task countdown --n 16 --k 1,16 --budgets 24,48,96,192 --out runs/eval
    python evaluate.py --model DIR --data math500.jsonl --n 32 --budgets 256,512,1024 --out runs/math500
    python evaluate.py --model DIR --data train.jsonl --n 16 --curate kept.jsonl          # T1's choice of problems

What is measured, for n samples of each problem:

- **pass@k**, unbiased (Chen et al. 2021): of c correct among n samples, 1 - C(n-c, k) / C(n, k), averaged over the
  problems. pass@1 is the plain mean; AIME's "mean of 32 samples" is pass@1 with `--n 32`. The 95 % interval is a
  bootstrap over problems: their difficulty varies far more than the samples of one problem do.
- **maj@k**: the answer most frequent among k samples; the n samples give n // k votes.
- **accuracy against budget**, T1's inference scaling: a chain that is not finished after B tokens is cut there, a box
  is opened behind it, and the model under test (or `--answer-model`, T1's SFT model) completes the answer greedily.
  Chains are sampled once, at the largest budget. The answer's own few tokens are not counted.
- **failures**: the share of all samples that failed by each kind (countdown: see `tasks.diagnose_countdown`).
"""

import json
import sys
from collections import Counter
from dataclasses import asdict, dataclass, replace
from itertools import combinations, islice
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import cli
import tasks
import verify
from cli import UserError
from cot import load_sampler
from sample import Completion, Sampler, SamplingParams
from tasks import Problem
from tokenizer import Tokenizer

# ---------------------------------------------------------------------------------------------------- estimators


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that k of n samples, c of them correct, hold a correct one. A product: C(n, k) would overflow."""
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, not n={n}, c={c}, k={k}")
    return 1.0 - float(np.prod(1.0 - k / np.arange(n - c + 1, n + 1)))  # holds a factor 0 where n - c < k


def maj_at_k(answers: list[str | None], correct: list[bool], k: int) -> float:
    """Share of the n // k groups of k samples whose most frequent answer is correct; a tie is shared evenly.

    `answers`: one name per class of equal answers (see `answer_classes`); None, no answer, has no vote.
    """
    right = dict(zip(answers, correct))
    wins = []
    for start in range(0, len(answers) - k + 1, k):
        votes = Counter(answer for answer in answers[start : start + k] if answer is not None)
        first = [answer for answer, count in votes.items() if count == max(votes.values())]
        wins.append(sum(right[answer] for answer in first) / len(first) if first else 0.0)
    return sum(wins) / len(wins)


def interval(values: list[float], resamples: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of per-problem values. Its own fixed seed: same values, same interval."""
    values, rng = np.asarray(values), np.random.default_rng(0)
    means = [values[rng.integers(0, len(values), len(values))].mean() for _ in range(resamples)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


# ---------------------------------------------------------------------------------------------------- answers


def answer_classes(problem: Problem, responses: list[str], correct: list[bool]) -> list[str | None]:
    """The boxed answers of one problem's responses, equal ones under one name, for the majority vote.

    Correct answers equal the reference, so they are one class; wrong ones are compared pair by pair with `verify`
    (1/2 and 0.5 vote together). Countdown expressions are compared as text: equal values are not equal answers there.
    """
    boxes = [verify.last_boxed(response) for response in responses]
    names = [None if box is None else "".join(box.split()) for box in boxes]
    if problem.task != "countdown":
        wrong = list(dict.fromkeys(name for name, right in zip(names, correct) if name is not None and not right))
        pairs = list(combinations(wrong, 2))
        equal = verify.verify_many([(f"\\boxed{{{b}}}", a) for a, b in pairs]) if pairs else []
        first = {name: name for name in wrong}
        for (a, b), verdict in zip(pairs, equal):
            if verdict.correct and first[b] == b:
                first[b] = first[a]
        names = [first.get(name, name) for name in names]
        names = ["correct" if right else name for name, right in zip(names, correct)]
    return names


def completion_text(tokenizer: Tokenizer, completion: Completion) -> str:
    """What the model said, without the stop token and other special tokens."""
    stopped = completion.finish_reason == "stop"
    return tokenizer.decode(completion.tokens[:-1] if stopped else completion.tokens, skip_special=True)


def cut(completion: Completion, budget: int) -> Completion:
    """What the same sampling gives under a smaller budget: completions are prefixes of one another."""
    if len(completion.tokens) <= budget:
        return completion
    return Completion(completion.tokens[:budget], completion.logprobs[:budget], "length")


def close_box(text: str, answer: str) -> str:
    """`text` ends in an opened box: the text with `answer` up to the brace that closes it, or all of it."""
    ends = (i + 1 for i, c in enumerate(answer) if c == "}" and verify.last_boxed(text + answer[: i + 1]) is not None)
    return text + answer[: next(ends, None)]


# ---------------------------------------------------------------------------------------------------- the curve

ANSWER_TOKENS = 48  # a forced answer's most tokens


def forced_prefix(problem: Problem, text: str) -> str:
    """What is written behind a cut chain so that a model ends it: the thought is closed, the box is opened."""
    if "\\boxed{" in text:  # the cut fell inside the box
        return ""
    closing = "\n</think>" if "<think>" in text and "</think>" not in text else ""
    newline = "" if text.endswith("\n") and not closing else "\n"
    return closing + newline + ("\\boxed{" if problem.task == "countdown" else "\nThe final answer is \\boxed{")


def budget_curve(
    sampler: Sampler,
    tokenizer: Tokenizer,
    problems: list[Problem],
    completions: list[list[Completion]],
    budgets: list[int],
    progress: bool = False,
) -> dict[int, list[float]]:
    """T1's inference scaling: {budget: accuracy per problem} of chains cut at each budget, the answer then forced.

    `sampler` writes the forced answers, greedily, from its own model. Nothing is generated for a chain that stopped
    within the budget or whose answer already stands in its box.
    """
    budgets = sorted(set(budgets))
    texts: dict[tuple[int, int, int], str] = {}  # (budget, problem, sample) -> the response to judge
    forced, prompts = [], []
    for i, (problem, chains) in enumerate(zip(problems, completions)):
        prompt = tasks.prompt_ids(problem, tokenizer)
        for j, chain in enumerate(chains):
            for budget in budgets:
                short = cut(chain, budget)
                texts[budget, i, j] = text = completion_text(tokenizer, short)
                if short.finish_reason == "length" and verify.last_boxed(text) is None:
                    prefix = forced_prefix(problem, text)
                    texts[budget, i, j] += prefix
                    forced.append((budget, i, j))
                    prompts.append(prompt + short.tokens + tokenizer.encode(prefix))
    if prompts:
        greedy = SamplingParams(max_tokens=ANSWER_TOKENS, temperature=0.0)
        for key, [answer] in zip(forced, sampler.generate(prompts, 1, greedy, progress=progress)):
            texts[key] = close_box(texts[key], completion_text(tokenizer, answer))
    verdicts = tasks.judge_all([problems[i] for _, i, _ in texts], list(texts.values()))
    curve = {budget: [0.0] * len(problems) for budget in budgets}
    for (budget, i, _), verdict in zip(texts, verdicts):
        curve[budget][i] += verdict.correct / len(completions[i])
    return curve


# ---------------------------------------------------------------------------------------------------- one model


@dataclass
class Result:
    """One model's samples, judged: [P][n] where P problems have n samples each. Plain lists, so that JSON holds it."""

    correct: list[list[bool]]
    lengths: list[list[int]]  # tokens, the stop token included
    truncated: float  # share of samples without a stop token
    majority: dict[str, list[float]]  # "maj@k" -> per problem
    curve: dict[int, list[float]]  # thinking budget -> accuracy per problem
    failures: dict[str, float]  # kind -> share of all samples
    ks: list[int]
    attempts: list[list[int]]  # countdown: how many attempts a sample made (0 elsewhere)
    repeats: float  # countdown: share of the attempts that came to what an earlier one of the sample had come to
    lost: float  # countdown: share of all samples that failed after such a repeat

    def rates(self) -> list[float]:
        """The pass rate of each problem."""
        return [sum(row) / len(row) for row in self.correct]

    def right_beyond(self, attempts: int) -> float:
        """The share of all samples that are right, at an attempt beyond so many."""
        return float(np.mean(np.array(self.correct) & (np.array(self.attempts) > attempts)))

    def per_problem(self) -> dict[str, list[float]]:
        """Every score whose mean over the problems is reported, by name."""
        passes = {f"pass@{k}": [pass_at_k(len(row), sum(row), k) for row in self.correct] for k in self.ks}
        return passes | self.majority

    def summary(self) -> dict:
        scores = {}
        attempts = float(np.mean(self.attempts))
        for name, values in self.per_problem().items():
            scores[name], scores[f"{name}_ci"] = float(np.mean(values)), interval(values)
        return scores | {
            "mean_tokens": float(np.mean(self.lengths)),
            "truncated": self.truncated,
            "budget_curve": {budget: float(np.mean(values)) for budget, values in self.curve.items()},
            "failures": self.failures,
            "attempts": attempts,
            "repeats": self.repeats,
            "lost": self.lost,
            "problems": len(self.correct),
            "samples": len(self.correct[0]),
        }


def evaluate(
    sampler: Sampler,
    tokenizer: Tokenizer,
    problems: list[Problem],
    samples: int,
    params: SamplingParams,
    budgets: list[int] = (),
    ks: list[int] = (1,),
    answer_sampler: Sampler | None = None,
    lenient: bool = False,
    progress: bool = False,
    curve_samples: int | None = None,
) -> Result:
    """Sample every problem `samples` times and measure all of the above.

    pass@k and the rest judge chains of at most `params.max_tokens`; budgets may be larger, chains are then sampled
    once at the largest and cut. `answer_sampler` forces the curve's answers instead of the model under test (it must
    share its tokenizer). `lenient` also finds the answers of models that do not box them.
    """
    if not problems:
        raise UserError("no problems to evaluate")
    if samples < max(ks) or min(ks) < 1 or min(budgets, default=1) < 1:
        raise UserError(f"needs samples >= k >= 1 and budgets >= 1, not {samples} samples, k {ks}, budgets {budgets}")
    prompts = [tasks.prompt_ids(problem, tokenizer) for problem in problems]
    context, needed = sampler.model.config.context, max(map(len, prompts)) + max(budgets, default=0) + 2 * ANSWER_TOKENS
    if budgets and needed > context:
        raise UserError(f"a budget of {max(budgets)} needs a context of {needed} tokens, the model's is {context}")
    longest = replace(params, max_tokens=max(params.max_tokens, *budgets, 1))
    sampled = sampler.generate(prompts, samples, longest, progress=progress)
    cuttable = [row[:curve_samples] for row in sampled]  # each budget costs a forced answer per unfinished chain
    chains = [[cut(chain, params.max_tokens) for chain in row] for row in sampled]
    texts = [[completion_text(tokenizer, chain) for chain in row] for row in chains]
    if lenient:
        texts = [[tasks.boxed(text) for text in row] for row in texts]
    flat = [(problem, text) for problem, row in zip(problems, texts) for text in row]
    verdicts = tasks.judge_all([problem for problem, _ in flat], [text for _, text in flat])
    kinds = Counter(
        tasks.diagnose(problem, text, verdict)
        for (problem, text), verdict in zip(flat, verdicts)
    )
    correct = [[v.correct for v in verdicts[i : i + samples]] for i in range(0, len(flat), samples)]
    tried = [tasks.attempts(text) for _, text in flat]
    total = again = lost = 0
    for values, verdict in zip(tried, verdicts):
        repeated = len(values) - len(set(values))
        total += len(values)
        again += repeated
        lost += repeated > 0 and not verdict.correct
    classes = [answer_classes(*row) for row in zip(problems, texts, correct)] if max(ks) > 2 else []
    return Result(
        correct=correct,
        lengths=[[len(chain.tokens) for chain in row] for row in chains],
        truncated=sum(chain.finish_reason == "length" for row in chains for chain in row) / len(flat),
        majority={f"maj@{k}": [maj_at_k(a, c, k) for a, c in zip(classes, correct)] for k in ks if k > 2},
        curve=budget_curve(answer_sampler or sampler, tokenizer, problems, cuttable, list(budgets), progress),
        failures={kind: count / len(flat) for kind, count in kinds.most_common() if kind != "correct"},
        ks=list(ks),
        attempts=[[len(values) for values in tried[i : i + samples]] for i in range(0, len(flat), samples)],
        repeats=again / max(1, total),
        lost=lost / len(flat),
    )


# ---------------------------------------------------------------------------------------------------- output


def draw_budgets(axes: Axes, results: dict[str, Result]) -> None:
    """Accuracy against thinking budget, one line per model, with its 95 % interval as a band."""
    for name, result in results.items():
        budgets = sorted(result.curve)
        low, high = zip(*(interval(result.curve[budget]) for budget in budgets))
        axes.plot(budgets, [np.mean(result.curve[budget]) for budget in budgets], marker="o", label=name)
        axes.fill_between(budgets, low, high, alpha=0.2)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set(xlabel="thinking budget (tokens)", ylabel="accuracy", title="Accuracy against thinking budget")
    axes.grid(alpha=0.3)
    axes.legend()


def plot_budgets(results: dict[str, Result], path: str | Path) -> None:
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")  # not pyplot: no display, no global state
    draw_budgets(figure.subplots(), results)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def table(results: dict[str, Result]) -> str:
    """Scores, curve and failures as text: one row per number, one column per model."""
    summaries = {name: result.summary() for name, result in results.items()}
    rows = [("", list(results))]
    first = next(iter(summaries.values()))
    for name in [key for key in first if f"{key}_ci" in first]:
        cells = []
        for summary in summaries.values():
            low, high = summary[f"{name}_ci"]
            cells.append(f"{100 * summary[name]:.1f} % [{100 * low:.1f}, {100 * high:.1f}]")
        rows.append((name, cells))
    rows.append(("mean tokens", [f"{s['mean_tokens']:.1f}" for s in summaries.values()]))
    rows.append(("without an end", [f"{100 * s['truncated']:.1f} %" for s in summaries.values()]))
    if first["attempts"]:
        rows.append(("attempts", [f"{s['attempts']:.2f}" for s in summaries.values()]))
        rows.append(("... that repeat a value", [f"{100 * s['repeats']:.1f} %" for s in summaries.values()]))
        rows.append(("repeats, and fails", [f"{100 * s['lost']:.1f} %" for s in summaries.values()]))
    for budget in first["budget_curve"]:
        rows.append((f"at {budget} tokens", [f"{100 * s['budget_curve'][budget]:.1f} %" for s in summaries.values()]))
    for kind in dict.fromkeys(kind for summary in summaries.values() for kind in summary["failures"]):
        rows.append((f"fails: {kind}", [f"{100 * s['failures'].get(kind, 0):.1f} %" for s in summaries.values()]))
    width = 2 + max(len(cell) for _, cells in rows for cell in cells)
    return "\n".join(f"{label:<26}" + "".join(f"{cell:>{width}}" for cell in cells) for label, cells in rows)


def curate(rows: list[dict], result: Result, path: str | Path, above: float = 0.0, upto: float = 1.0) -> None:
    """T1's choice of problems: keep those neither always nor never solved, with their `difficulty` (1 - pass rate).

    Of those, the ones whose pass rate is greater than `above`, and at most `upto` (T1: about 0.3).
    """
    rates = result.rates()
    chosen = [max(0, above) < rate <= upto and rate < 1 for rate in rates]
    kept = [row | {"difficulty": round(1 - rate, 4)} for row, rate, keep in zip(rows, rates, chosen) if keep]
    print("pass rate    problems")
    labels = ["0", *(f"{i / 10:.1f} to {(i + 1) / 10:.1f}" for i in range(10)), "1"]
    counts = Counter(0 if rate == 0 else 11 if rate == 1 else 1 + int(10 * rate) for rate in rates)
    for i, label in enumerate(labels):
        print(f"{label:<12} {counts[i]:>6}  {'#' * round(50 * counts[i] / len(rates))}")
    if not kept:
        raise UserError(
            f"each of the {len(rows)} problems is always or never solved, or outside of the bounds: "
            f"nothing to write to {path}"
        )
    cli.write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))
    print(f"kept {len(kept)} of {len(rows)} problems in {path}")


# ---------------------------------------------------------------------------------------------------- command


@dataclass
class Config:
    model: list[str]
    """Run folders or Hugging Face folders to compare, in the order of the table (SFT before RL)."""
    data: str | None = None
    """Problems: JSONL with `problem` (or `question`) and `answer`."""
    task: Literal["countdown"] | None = None
    """Generated problems instead of --data: the held-out ones."""
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
    """Longest response that pass@k judges. The largest budget, or else 1024, unless given."""
    temperature: float = 1.0
    """1.0 samples the policy itself; 0 is greedy (then n = 1 says all)."""
    top_p: float = 1.0
    """Nucleus. 0.95 is usual for reporting maths scores."""
    min_p: float = 0.0
    """Drops tokens below this share of the most likely one."""
    seed: int = 0
    """Of the problems and the samples: the same seed gives the same numbers."""
    answer_model: str | None = None
    """Who writes the forced answer of a cut chain: T1 uses the SFT model. The model under test unless given."""
    lenient: bool = False
    """Accept an answer outside a box ("the answer is 7", the last number), for models not taught to box it."""
    curate: str | None = None
    """Write the problems that the (one) model neither always nor never solves to this JSONL, with their difficulty."""
    curate_above: float = 0.0
    """With --curate: only problems with a pass rate above this."""
    curate_upto: float = 1.0
    """With --curate: only problems with a pass rate of at most this (T1 keeps hard ones: about 0.3)."""
    numbers: int = 3
    """Countdown: how many numbers."""
    largest: int = tasks.LARGEST_GIVEN
    """Countdown: the numbers are drawn from 1 to this."""
    operators: str = "+-*"
    """Countdown: which operators; / divides exactly."""
    out: str | None = None
    """Folder for results.json and budgets.png."""
    resume: bool = False
    """Take models already measured from OUT/results.json instead of measuring them again."""
    max_batch: int = 256
    """Sequences sampled at once: lower it where memory is short. Does not change the numbers."""


def integers(text: str, flag: str) -> list[int]:
    """ "1,8,32" -> [1, 8, 32]"""
    try:
        values = [int(part) for part in text.split(",")] if text else []
    except ValueError:
        values = [0]
    if any(value < 1 for value in values):
        raise UserError(f"{flag} takes whole numbers above 0, separated by commas, not {text!r}")
    return values


def read_problems(config: Config) -> tuple[list[Problem], list[dict]]:
    """The problems, and the JSONL rows they stand for."""
    if (config.data is None) == (config.task is None):
        raise UserError("name the problems: either --data FILE.jsonl or --task countdown")
    if config.limit is not None and config.limit < 1:
        raise UserError(f"--limit {config.limit}: at least one problem")
    if config.data:
        return tasks.load(config.data)[: config.limit], cli.read_jsonl(config.data)[: config.limit]
    tasks.check_numbers(config.numbers)
    tasks.check_largest(config.largest)
    stream = tasks.countdown(config.seed, True, config.numbers, config.operators, config.largest)
    problems = list(islice(stream, config.limit or 1024))
    return problems, [{"problem": p.question, "answer": p.answer, "task": p.task} for p in problems]


def main(config: Config) -> None:
    budgets, ks = integers(config.budgets, "--budgets"), integers(config.k, "--k") or [1]
    problems, rows = read_problems(config)
    if config.n < max(ks):
        raise UserError(f"--n {config.n} samples cannot give pass@{max(ks)}: raise --n")
    if not config.curate and (config.curate_above, config.curate_upto) != (0, 1):
        raise UserError("--curate-above and --curate-upto say what --curate FILE keeps: give that, too")
    if not 0 <= config.curate_above < config.curate_upto <= 1:
        raise UserError("--curate-above and --curate-upto are pass rates from 0 to 1, the first below the second")
    if config.curate and (len(config.model) > 1 or config.n < 2 or Path(config.curate).exists()):
        raise UserError("--curate needs one --model, --n of at least 2, and a file that does not exist yet")
    if config.curate:
        cli.check_parent(config.curate)
    results: dict[str, Result] = {}
    saved = Path(config.out) / "results.json" if config.out else None
    unmeasured = ("model", "out", "resume", "curate", "curate_above", "curate_upto", "max_batch")
    flags = {k: v for k, v in asdict(config).items() if k not in unmeasured}
    if saved:
        cli.check_parent(saved)
    if saved and saved.exists():
        if not config.resume:
            raise UserError(f"{saved} exists: choose another --out, or --resume to add to it")
        results = load_results(saved, flags)
    params = SamplingParams(
        config.max_tokens or max(budgets, default=1024), config.temperature, config.top_p, config.min_p, config.seed
    )
    answerer, vocabulary = None, None
    if config.answer_model:
        answerer, vocabulary = load_sampler(config.answer_model, config.max_batch)
    for name in config.model:
        if name in results:
            continue
        sampler, tokenizer = load_sampler(name, config.max_batch)
        if vocabulary and vocabulary.files["tokenizer.json"] != tokenizer.files["tokenizer.json"]:
            raise UserError(
                f"--answer-model {config.answer_model} cannot go on in {name}'s tokens: other tokenizer.json"
            )
        print(f"{name}: {len(problems)} problems, {config.n} samples each", file=sys.stderr)
        results[name] = evaluate(
            sampler,
            tokenizer,
            problems,
            config.n,
            params,
            budgets,
            ks,
            answerer,
            config.lenient,
            True,
            config.curve_samples,
        )
        if saved:
            write_results(saved, flags, results)
    results = {name: results[name] for name in config.model}
    print(table(results))
    if len(results) == 2:
        before, after = (np.array(result.rates()) for result in results.values())
        low, high = interval(after - before)  # paired: problems' difficulty cancels, so this is the narrower interval
        print(f"pass@1 gained: {100 * np.mean(after - before):+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]")
    if saved and budgets:
        plot_budgets(results, saved.with_name("budgets.png"))
    if config.curate:
        curate(rows, results[config.model[0]], config.curate, config.curate_above, config.curate_upto)


def write_results(path: Path, flags: dict, results: dict[str, Result]) -> None:
    models = {name: {"summary": result.summary(), "result": asdict(result)} for name, result in results.items()}
    cli.write_text(path, json.dumps({"flags": flags, "models": models}))


def load_results(path: str | Path, flags: dict | None = None) -> dict[str, Result]:
    """The models measured in a results.json; UserError where they were not measured with these `flags`."""
    try:
        found = json.loads(Path(path).read_text())
        results = {name: Result(**model["result"]) for name, model in found["models"].items()}
        changed = [f"--{name.replace('_', '-')}" for name in flags or () if found["flags"].get(name) != flags[name]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is not a results file of evaluate.py") from None
    if changed:
        raise UserError(f"{path} was measured with another {', '.join(changed)}")
    for result in results.values():
        result.curve = {int(budget): values for budget, values in result.curve.items()}  # JSON's keys are strings
    return results


if __name__ == "__main__":
    cli.run(main, Config)
