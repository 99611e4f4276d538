"""The paper's findings, rerun in miniature: each is a question, some runs, a figure and a verdict.

    python findings.py scaling        # does longer thinking gain more, the further RL has run?
    python findings.py temperature --seeds 5
    python findings.py all            # `make findings`: four to seven hours on 2 cores

It needs a CPU of two cores and 3 GB of disk. A *run* is the demo's RL, shortened, from the demo's
SFT model of the same seed, and what its checkpoints do on held-out problems. It is named by the
flags in which it differs from the base, and so is its folder:

    OUT/sft/three-attempts/seed-3/       chains.jsonl, sft/, and how good that model is
    OUT/rl/base/seed-3/                  rl/, step-6/, step-12/, and how good they are
    OUT/rl/temperature=1.0/seed-3/       the same at another temperature
    OUT/scaling.md, OUT/scaling.png      what came of a finding
    OUT/runs.json                        which commands are done, in how many seconds, on what

So findings share runs, and nothing runs twice. What is interrupted goes on with the same command,
to the same numbers. (How: jobs.py.)

A verdict is computed, not written. The paper says that one setting has more of something than
another. With each seed both answer the same held-out problems and, but in `initialisation`, began
with the same SFT model. Does the difference have the paper's sign with every seed, with none, or
only with some? One seed decides nothing. (Seeds begin at 3, for the demo's settings were chosen on
0 to 2.)

Read the nine findings first, each a function; then, in the file's order, what is run, measured and
claimed, how it is drawn, and what comes of it.
"""

import functools
import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import cli
import demo
import evaluate
import rl
import rlsp
from cli import UserError
from evaluate import Result
from jobs import Jobs, Stage, Task
from runfolder import read_metrics

# --- what is run ----------------------------------------------------------------------------------

HOT = 1.4  # the highest temperature
CHAINS = {
    "three-attempts": {},  # the demo's
    "one-attempt": {"attempts": 1},  # as if the way had been known from the start
    "giving-up": {"give_up": 0.2},  # about one chain in four ends without an answer
}
"""What SFT is shown: the flags of cot.py in which it differs from the demo's."""
FIRST_SEED = 3
MEASURES = {
    "evaluation": {},
    "evaluation-greedy": {"greedy": True},
    "evaluation-16": {"n": 16, "k": "1,16"},
    "evaluation-budgets": {"budgets": demo.BUDGETS},
}
"""How checkpoints are measured: flags of evaluate.py, on top of those that all share."""


@dataclass(frozen=True)
class Scale:
    """How much of everything, and what it costs: minutes of one core. A seed of all findings: 3 SFT
    models and 29 runs, 143 to 220 minutes."""

    chains: int = demo.Config.chains
    sft_steps: int = demo.Config.sft_steps  # 9 minutes for each kind of chains
    steps: int = 21  # of RL, each of 64 x 16 responses: 3 minutes
    long: int = demo.Config.steps  # of RL, in `scaling`: 14 minutes
    heldout: int = 256  # problems, others with each seed
    samples: int = 4  # of each: with the start of the processes, half a minute a run

    def demo(self, seed: int, steps: int) -> demo.Config:
        """The demo's flags at this scale."""
        return demo.Config(
            seed=seed,
            chains=self.chains,
            sft_steps=self.sft_steps,
            steps=steps,
            heldout=self.heldout,
            samples=self.samples,
        )

    def run(self, chains: str = "three-attempts", **flags: Any) -> "Run":
        """The run that differs from the base in these flags of rl.py.

        A flag at the base's own value is left out: the same run has one name. (Not beside another
        recipe, whose values are others.)
        """
        base = demo.rl_flags(self.demo(0, self.steps), Path())
        words = [] if chains == "three-attempts" else [f"chains={chains}"]
        differing = {}
        for name, value in sorted(flags.items()):
            usual = getattr(base, name, None)
            if usual is None:
                usual = getattr(rl.RECIPES["t1"], name, None)
            if value != usual or "recipe" in flags:
                differing[name] = value
                words.append(f"{name}={value}")
        steps = flags.get("steps", self.steps)
        return Run(",".join(words) or "base", chains, steps, tuple(differing.items()))


@dataclass(frozen=True)
class Run:
    """A run of RL, but for its seed."""

    name: str
    chains: str  # what its SFT model was shown, see CHAINS
    steps: int
    flags: tuple[tuple[str, Any], ...]  # of rl.py, in which it differs from the base

    @property
    def measured(self) -> list[int]:
        """The steps after which it is measured: about 30 and 60 % (the paper's), and 100 %."""
        every = max(1, round(0.3 * self.steps))
        return sorted({every, min(2 * every, self.steps), self.steps})


def sft_home(chains: str, seed: int) -> Path:
    return Path("sft", chains, f"seed-{seed}")


def run_home(run: Run, seed: int) -> Path:
    return Path("rl", run.name, f"seed-{seed}")


def measurement(
    scale: Scale, measure: str, models: list[Path], seed: int, start: Path | None = None
) -> Stage:
    """The models on held-out problems, beside the last of them. start: to take the KL from."""
    out = models[-1].with_name(measure)
    flags = demo.evaluate_flags(scale.demo(seed, scale.steps), models, out)
    kl_from = None if start is None else str(start)
    plain = replace(flags, k="1", budgets="", curve_samples=None, kl_from=kl_from, resume=False)
    return Stage(out, "evaluate.py", replace(plain, **MEASURES[measure]))


def sft_task(scale: Scale, chains: str, seed: int, measures: Sequence[str]) -> Task:
    """Chains, SFT on them, and how good the model is."""
    home = sft_home(chains, seed)
    config, file, model = scale.demo(seed, scale.steps), home / "chains.jsonl", home / "sft"
    made = replace(demo.chain_flags(config, file), **CHAINS[chains])
    trained = replace(demo.sft_flags(config, model, file, scale.sft_steps), resume=False)
    stages = [Stage(file, "cot.py", made, resumes=False), Stage(model, "sft.py", trained)]
    stages += [measurement(scale, measure, [model], seed) for measure in measures]
    return Task(home, stages)


def run_task(scale: Scale, run: Run, seed: int, measures: Sequence[str]) -> Task:
    """RL, its policies on the way as models, and how good they are."""
    home, start = run_home(run, seed), sft_home(run.chains, seed)
    flags = replace(
        demo.rl_flags(scale.demo(seed, run.steps), home),
        model=str(start / "sft"),
        checkpoint_every=run.measured[0],
        keep_every=run.measured[0],
        resume=False,
    )
    script, differing = "rl.py", dict(run.flags)
    if differing.get("recipe") == "rlsp":
        script, flags = "rlsp.py", rlsp.Config(**vars(flags))
    stages = [Stage(home / "rl", script, replace(flags, **differing))]
    models = [home / f"step-{step}" for step in run.measured[:-1]]
    for step, model in zip(run.measured, models):
        flags = rl.Config(str(start / "sft"), str(home / "rl"), export=str(model), step=step)
        stages.append(Stage(model, "rl.py", flags, resumes=False))
    models.append(home / "rl")
    for measure in measures:
        stages.append(measurement(scale, measure, models, seed, start / "sft"))
    return Task(home, stages, needs=start)


def seeds_of(count: int) -> range:
    return range(FIRST_SEED, FIRST_SEED + count)


def plan(scale: Scale, findings: Sequence["Finding"], seeds: int) -> list[Task]:
    """What the findings need, each once: SFT models first, then runs in the findings' order."""
    models: dict[str, dict[str, None]] = {}  # chains -> measures (the keys, in order)
    runs: dict[Run, dict[str, None]] = {}
    for finding in findings:
        for run, _ in finding.settings.values():
            models.setdefault(run.chains, {})[finding.measure] = None
            runs.setdefault(run, {})[finding.measure] = None
    tasks = []
    numbers = seeds_of(seeds)
    for chains, measures in models.items():
        tasks += [sft_task(scale, chains, seed, list(measures)) for seed in numbers]
    for run, measures in runs.items():
        tasks += [run_task(scale, run, seed, list(measures)) for seed in numbers]
    return tasks


# --- what is measured -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """A setting with one seed: a run after `step` of its steps."""

    step: int
    course: dict[int, Result]  # step -> the policy on held-out problems; 0: the SFT model
    metrics: list[dict]  # of the run's steps, from 1 on
    shown: int  # tokens of the longest chain that SFT was shown

    @property
    def result(self) -> Result:
        return self.course[self.step]

    def on_the_way(self) -> list["Seen"]:
        """The same setting wherever it was measured, from the SFT model on."""
        return [replace(self, step=step) for step in self.course if step <= self.step]


def see(out: Path, run: Run, step: int, seed: int, measure: str) -> Seen:
    home, start = out / run_home(run, seed), out / sft_home(run.chains, seed)
    course = {}
    for folder, steps in ((start, [0]), (home, run.measured)):
        results = evaluate.load_results(folder / measure / "results.json")
        course |= dict(zip(steps, results.values()))  # in the order of the command
    return Seen(step, course, read_metrics(home / "rl" / "metrics.jsonl"), longest_shown(start))


@functools.cache
def longest_shown(home: Path) -> int:
    return demo.longest_shown(home / "chains.jsonl", home / "sft")["tokens"]


def at_budget(seen: Seen, budget: int) -> float:
    """Accuracy in percent."""
    return 100 * float(np.mean(seen.result.curve[budget]))


def just_beyond(seen: Seen) -> float:
    """Accuracy in percent at the smallest budget beyond the longest chain shown."""
    return at_budget(seen, min(budget for budget in seen.result.curve if budget >= seen.shown))


def gain(seen: Seen) -> float:
    """Points from there to the largest budget."""
    return at_budget(seen, max(seen.result.curve)) - just_beyond(seen)


def rise(seen: Seen) -> float:
    """Points of accuracy above the SFT model that the run began with."""
    return 100 * float(np.mean(seen.result.rates()) - np.mean(seen.course[0].rates()))


def made_more(seen: Seen) -> float:
    """Percent of responses with more attempts than any of the demo's chains has."""
    return 100 * float(np.mean(np.array(seen.result.attempts) > demo.ATTEMPTS))


def late(seen: Seen, name: str) -> float:
    """Mean of a metric of RL's own samples over the last third of its steps; NaN without any."""
    rows = seen.metrics[: seen.step]
    values = [row[name] for row in rows[-max(1, len(rows) // 3) :] if name in row]
    return sum(values) / len(values) if values else math.nan


def thousands_drawn(seen: Seen) -> float:
    """Responses that RL has sampled: DAPO draws until enough groups teach."""
    total = 0.0
    for row in seen.metrics[: seen.step]:
        seconds = sum(value for name, value in row.items() if name.startswith("seconds_"))
        total += row["tokens_per_second"] * seconds / row["length"]
    return total / 1000


COLUMNS: dict[str, Callable[[Seen], float]] = {
    # of held-out problems, sampled at temperature 1
    "accuracy, %": lambda seen: 100 * float(np.mean(seen.result.rates())),
    "greedy accuracy, %": lambda seen: 100 * float(np.mean(seen.result.greedy)),
    "gain by RL, points": rise,
    "pass@16, %": lambda seen: 100 * float(np.mean(seen.result.per_problem()["pass@16"])),
    "tokens": lambda seen: float(np.mean(seen.result.lengths)),
    "entropy": lambda seen: seen.result.entropy,  # nats per token
    "KL from SFT": lambda seen: float(np.mean(seen.result.kl)) if seen.step else 0.0,  # nats each
    # The mean is made by a few responses that left the road: a problem in hundreds may hold half.
    "median KL": lambda seen: float(np.median(seen.result.kl)) if seen.step else 0.0,
    "at the least budget, %": lambda seen: at_budget(seen, min(seen.result.curve)),
    "just beyond the chains shown, %": just_beyond,
    "at the largest, %": lambda seen: at_budget(seen, max(seen.result.curve)),
    "gain, points": gain,
    "attempts": lambda seen: float(np.mean(seen.result.attempts)),
    "with more than were shown, %": made_more,
    "right, with more, %": lambda seen: 100 * seen.result.right_beyond(demo.ATTEMPTS),
    "failures noticed": lambda seen: seen.result.behaviours["reflects"],
    "checks": lambda seen: seen.result.behaviours["verifies"],
    "attempts that repeat, %": lambda seen: 100 * seen.result.repeats,
    "false claims, %": lambda seen: 100 * seen.result.failures.get("false claim", 0.0),
    "wrong sums, %": lambda seen: 100 * seen.result.failures.get("wrong arithmetic", 0.0),
    "no answer, %": lambda seen: 100 * seen.result.failures.get("no answer", 0.0),
    # of RL's own samples, at its own temperature
    "overlong in RL, %": lambda seen: 100 * late(seen, "truncated"),
    "unexpected in RL, %": lambda seen: 100 * late(seen, "unexpected"),  # whether penalised or not
    "tokens in RL": lambda seen: late(seen, "length"),
    "responses drawn, thousands": thousands_drawn,
}
"""One number of a setting with one seed: what tables and figures are made of."""


# --- what is claimed ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """That the setting `more` has more of something than the setting `less`."""

    what: str  # a column, or AT_SAME_KL
    more: str
    less: str
    in_paper: bool = True  # False: a question of ours, with which nothing agrees

    def gap(self, more: Seen, less: Seen) -> float:
        if self.what == AT_SAME_KL:
            return at_same_kl(more, less)
        return COLUMNS[self.what](more) - COLUMNS[self.what](less)


AT_SAME_KL = "accuracy, % (at the same KL from SFT)"


def at_same_kl(more: Seen, less: Seen) -> float:
    """Points of accuracy that `more` is above `less` at the largest KL that both have reached.

    Between two measured checkpoints accuracy is taken to be linear in the root of the KL, with
    which it rises at first. Linear in the KL itself, a run that moves far in its first steps would
    look worse than one that goes the same way slowly.
    """
    courses = []
    for seen in (more, less):
        points = seen.on_the_way()
        moved = [math.sqrt(max(0.0, COLUMNS["KL from SFT"](at))) for at in points]
        pairs = zip(moved, [COLUMNS["accuracy, %"](at) for at in points])
        courses.append(sorted(pairs))
    both = min(course[-1][0] for course in courses)
    above, below = (np.interp(both, *zip(*course)) for course in courses)
    return float(above - below)


def verdict(gaps: Sequence[float]) -> str:
    """gaps: what `more` has more than `less`, with each seed. One seed alone decides nothing."""
    if len(gaps) == 1:
        return "undecided by 1 seed"
    if all(gap > 0 for gap in gaps):
        return "agrees"
    if all(gap < 0 for gap in gaps):
        return "contradicts"
    return f"undecided by {len(gaps)} seeds"


@dataclass(frozen=True)
class Finding:
    question: str
    paper: str  # what it says, with its numbers
    settings: dict[str, tuple[Run, int]]  # label -> a run, and after how many of its steps
    columns: tuple[str, ...]  # of the table
    panels: tuple[tuple[Callable, str], ...]  # of the figure: how something is drawn, and what
    claims: tuple[Claim, ...] = ()  # none: the paper does not say
    measure: str = "evaluation"
    limits: str = ""  # what a miniature cannot show, and why


def at_end(runs: dict[str, Run]) -> dict[str, tuple[Run, int]]:
    return {label: (run, run.steps) for label, run in runs.items()}


# --- how it is drawn: the mean of the seeds, and from the lowest of them to the highest -----------

Table = dict[str, list[Seen]]  # label -> the setting with each seed


def draw_band(axes: Axes, places: Sequence[float], rows: list[list[float]], label: str) -> None:
    values = np.array(rows)
    axes.plot(places, values.mean(axis=0), marker=".", label=label)
    axes.fill_between(places, values.min(axis=0), values.max(axis=0), alpha=0.15)


def course(axes: Axes, table: Table, name: str) -> None:
    """A column against the step of RL. An SFT model is no line: it is where the others begin."""
    for label, row in table.items():
        if row[0].step == 0:
            continue
        values = [[COLUMNS[name](point) for point in seen.on_the_way()] for seen in row]
        draw_band(axes, [point.step for point in row[0].on_the_way()], values, label)
    axes.set(xlabel="step of RL", title=name)


def metric(axes: Axes, table: Table, name: str) -> None:
    """A line of metrics.jsonl: RL's own samples, step by step."""
    for label, row in table.items():
        lines = [seen.metrics[: seen.step] for seen in row]
        steps = [line["step"] for line in lines[0]]
        draw_band(axes, steps, [[line.get(name, math.nan) for line in run] for run in lines], label)
    axes.set(xlabel="step of RL", title=f"in RL: {name}")


def ends(axes: Axes, table: Table, name: str) -> None:
    """A column of each setting."""
    for place, row in enumerate(table.values()):
        values = [COLUMNS[name](seen) for seen in row]
        mean = float(np.mean(values))
        axes.errorbar(place, mean, [[mean - min(values)], [max(values) - mean]], fmt="o", capsize=4)
    axes.set_xticks(range(len(table)), list(table), rotation=30, ha="right")
    # Else a tenth of a point would fill the picture.
    low, high = axes.get_ylim()
    least = 10 if name.endswith(("%", "points")) else 0.5 * max(abs(low), abs(high))
    more = max(0.0, least - (high - low)) / 2
    axes.set(title=name, ylim=(low - more, high + more))


def budgets(axes: Axes, table: Table, name: str) -> None:
    """T1's inference scaling: accuracy against the thinking budget."""
    for label, row in table.items():
        places = sorted(row[0].result.curve)
        draw_band(axes, places, [[at_budget(seen, at) for at in places] for seen in row], label)
        for seen in row:
            axes.axvline(seen.shown, color="gray", linestyle="--", linewidth=0.5)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set(xlabel="thinking budget (tokens); dashed: longest chain shown", title=name)


def against_kl(axes: Axes, table: Table, name: str) -> None:
    """A column against the KL from the SFT model: the mean at each step, and pale, each seed."""
    for number, (label, row) in enumerate(table.items()):
        curves = []  # [seed, KL or column, step]
        for seen in row:
            points = seen.on_the_way()
            curves.append([[COLUMNS[what](at) for at in points] for what in ("KL from SFT", name)])
            axes.plot(*curves[-1], f"C{number}-", alpha=0.3)
        axes.plot(*np.mean(curves, axis=0), f"C{number}.-", label=label)
    axes.set(xlabel="KL from SFT (nats per response)", title=name)


def by_attempts(axes: Axes, table: Table, name: str) -> None:
    """Accuracy of the responses that made 1, 2, 3, ... attempts, of all seeds together; where
    fewer than one response in 200 made so many, chance would speak."""
    for label, row in table.items():
        shares: dict[int, list[tuple[float, float]]] = {}  # attempts made -> (share, of it right)
        for seen in row:
            for made, cell in seen.result.by_attempts().items():
                shares.setdefault(int(made.removesuffix("+")), []).append(cell)
        places, values = [], []
        for made, cells in sorted(shares.items()):
            weights, right = zip(*cells)
            if sum(weights) >= 0.005 * len(row):
                places.append(made)
                values.append(100 * float(np.average(right, weights=weights)))
        axes.plot(places, values, marker="o", label=label)
    axes.set(xlabel="attempts made (the last: or more)", title=name)


MOST_BESIDE = 3  # panels


def draw(finding: Finding, table: Table, path: Path) -> None:
    count = len(finding.panels)
    lines = math.ceil(count / MOST_BESIDE)
    columns = math.ceil(count / lines)
    figure = Figure(figsize=(4.6 * columns, 4 * lines), layout="constrained")
    places = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes, (panel, name) in zip(places, finding.panels):
        panel(axes, table, name)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=7)
    with cli.whole_file(path) as partial:
        figure.savefig(partial, format="png", dpi=130)


# --- the nine findings ----------------------------------------------------------------------------


def scaled(scale: Scale) -> dict[str, tuple[Run, int]]:
    """The demo's own RL, as it goes on."""
    run = scale.run(steps=scale.long)
    settings = {"SFT": (run, 0)}
    for step in run.measured:
        settings[f"{step / run.steps:.0%} of RL"] = (run, step)
    return settings


def scaling(scale: Scale) -> Finding:
    settings = scaled(scale)
    begun, *_, end = list(settings)[1:]
    return Finding(
        question="Does thinking longer gain more, the further RL has run?",
        paper=(
            "The curves of RL start together and fan out: from 1,024 to 16,384 tokens SFT gains "
            "2.8 points of AIME24, and RL 2.4 after 30 % of its steps, 16.0 after 60 %, 22.1 in "
            "the end."
        ),
        settings=settings,
        columns=(
            *("accuracy, %", "at the least budget, %", "just beyond the chains shown, %"),
            *("at the largest, %", "gain, points"),
        ),
        panels=((budgets, "accuracy, %"), (ends, "gain, points")),
        claims=(Claim("gain, points", end, "SFT"), Claim("gain, points", end, begun)),
        measure="evaluation-budgets",
        limits=(
            "The gain is from the first budget that is longer than every chain SFT was shown, to "
            "the largest. Below that, every model gains by finishing a chain at all."
        ),
    )


def oversampled(scale: Scale) -> dict[str, tuple[Run, int]]:
    """24 x 64 responses a step are half as many again as the base has: so two thirds of its steps.

    The anchor stays where RL began: so the KL in the reward and the KL that `exchange` measures are
    to the same model.
    """
    runs = {}
    for prompts, samples in ((24, 4), (24, 16), (24, 64), (96, 16), (384, 4)):
        flags = {"prompts": prompts, "samples": samples, "anchor_decay": 1.0}
        runs[f"{prompts} x {samples}"] = scale.run(steps=max(1, scale.steps * 2 // 3), **flags)
    return at_end(runs)


def oversampling(scale: Scale) -> Finding:
    settings = oversampled(scale)
    _, steps = settings["24 x 64"]
    return Finding(
        question="Do more responses to each prompt teach more?",
        paper=(
            "K = 4, 16 and 64 responses to each prompt end at 31.8, 35.8 and 39.4 % of "
            "Omni-MATH-500 after 260 steps; a larger K also thinks longer."
        ),
        settings=settings,
        columns=("accuracy, %", "tokens", "entropy", "responses drawn, thousands"),
        panels=((course, "accuracy, %"), (course, "tokens"), (metric, "dropped")),
        claims=(
            Claim("accuracy, %", "24 x 64", "24 x 16"),
            Claim("accuracy, %", "24 x 64", "24 x 4"),
            Claim("tokens", "24 x 64", "24 x 4"),
            Claim("accuracy, %", "24 x 64", "96 x 16", in_paper=False),
            Claim("accuracy, %", "24 x 64", "384 x 4", in_paper=False),
        ),
        limits=(
            "The last two ask more than the paper, which varied K alone: is it K, or the number "
            f"of responses? The paper's runs were 260 steps, these are {steps}: a stall that comes "
            "later does not show."
        ),
    )


def exchange(scale: Scale) -> Finding:
    return Finding(
        question="Does a larger K pay less KL for the same accuracy?",
        paper="The larger K, the more reward for the same KL from the model that RL began with.",
        settings=oversampled(scale),
        columns=("accuracy, %", "KL from SFT", "median KL"),
        panels=((against_kl, "accuracy, %"), (course, "KL from SFT")),
        claims=(
            Claim(AT_SAME_KL, "24 x 64", "24 x 16"),
            Claim(AT_SAME_KL, "24 x 64", "24 x 4"),
            Claim(AT_SAME_KL, "24 x 64", "384 x 4", in_paper=False),
        ),
        limits=(
            "The KL is of held-out responses. RL's own metric is of the groups that teach, which"
            " are harder ones where K is small. Four checkpoints a run make a coarse curve."
        ),
    )


def temperature(scale: Scale) -> Finding:
    degrees = (0.8, 1.0, 1.1, 1.2, 1.3, HOT)
    return Finding(
        question="At which temperature should RL sample?",
        paper=(
            "Of 0.9 to 1.3, about 1.2 is best: at or below 1.0 training tends to collapse, and "
            "above 1.2 accuracy falls."
        ),
        settings=at_end({str(degree): scale.run(temperature=degree) for degree in degrees}),
        columns=("greedy accuracy, %", "accuracy, %", "entropy", "tokens", "unexpected in RL, %"),
        panels=((ends, "greedy accuracy, %"), (ends, "tokens"), (ends, "unexpected in RL, %")),
        claims=(
            Claim("greedy accuracy, %", "1.2", "1.0"),
            Claim("greedy accuracy, %", "1.2", "1.3"),
            Claim("greedy accuracy, %", "1.2", "0.8", in_paper=False),
        ),
        measure="evaluation-greedy",
        limits=(
            "The claims are of greedy responses: for a policy that was trained hotter, temperature "
            "1 is colder than its training, so accuracy and entropy there are no fair comparison. "
            "A collapse may take more steps than these."
        ),
    )


def penalties(scale: Scale) -> Finding:
    runs = {}
    for degree in (1.2, HOT):
        for penalty in ("none", "set", "advantage"):
            runs[f"{penalty}, {degree}"] = scale.run(penalty=penalty, temperature=degree)
    claims = []
    for degree in (1.2, HOT):
        without, with_it = f"none, {degree}", f"set, {degree}"
        claims.append(Claim("overlong in RL, %", without, with_it))
        claims.append(Claim("tokens in RL", without, with_it))
        claims.append(Claim("accuracy, %", with_it, without))
    return Finding(
        question="What do the penalties for overlong, repeated and garbled responses hold off?",
        paper="Without them accuracy rises, and then falls, as length and garbage run away.",
        settings=at_end(runs),
        columns=("accuracy, %", "tokens in RL", "overlong in RL, %", "unexpected in RL, %"),
        panels=((metric, "truncated"), (metric, "length"), (course, "accuracy, %")),
        claims=tuple(claims),
        limits=(
            "Hardly a response of this task runs away, at 1.2 or hotter: little is held off. "
            "That `advantage` pushes back a group which runs away as a whole is of later code, "
            "not of the paper."
        ),
    )


def regularisers(scale: Scale) -> Finding:
    names = {"entropy_coef": "entropy bonus", "anchor_decay": "anchor decay", "kl_coef": "KL"}
    values = {"entropy_coef": (0.0, 1e-2), "anchor_decay": (1.0, 0.9), "kl_coef": (0.0, 2e-2)}
    runs = {"T1": scale.run()}  # 1e-3, 0.99, 2e-4
    for flag, changed in values.items():
        for value in changed:
            runs[f"{names[flag]} {value:g}"] = scale.run(**{flag: value})
    return Finding(
        question="Do entropy bonus and moving anchor keep the policy diverse, and free to move?",
        paper=(
            "An entropy bonus, and an anchor that follows the policy, let it explore; the KL "
            "penalty (2e-4) is to hold it near the anchor. No ablation of their numbers is known"
            " to us."
        ),
        settings=at_end(runs),
        columns=("accuracy, %", "pass@16, %", "entropy", "KL from SFT", "median KL"),
        panels=((metric, "entropy"), (ends, "pass@16, %"), (ends, "accuracy, %")),
        claims=(
            Claim("entropy", "T1", "entropy bonus 0", in_paper=False),
            Claim("entropy", "entropy bonus 0.01", "T1", in_paper=False),
            Claim("pass@16, %", "T1", "entropy bonus 0", in_paper=False),
            Claim("KL from SFT", "KL 0", "KL 0.02", in_paper=False),
        ),
        measure="evaluation-16",
        limits=(
            "A coefficient of 2e-4 on four nats is 0.0008 of a reward of 1, far below what one "
            "response more or less moves: it cannot show in so few steps. 2e-2 can."
        ),
    )


def behaviours(scale: Scale) -> Finding:
    settings = scaled(scale)
    end = list(settings)[-1]
    counted = ("attempts", "failures noticed", "checks")
    more = ("with more than were shown, %", "right, with more, %")
    return Finding(
        question="What do chains do more often, the further RL has run?",
        paper="Reflecting, trying another way and verifying all grow with RL.",
        settings=settings,
        columns=("accuracy, %", *counted, *more, "attempts that repeat, %", "false claims, %"),
        panels=(
            (ends, "attempts"),
            (ends, "checks"),
            (ends, "right, with more, %"),
            (ends, "attempts that repeat, %"),
            (ends, "false claims, %"),
            (by_attempts, "accuracy by attempts made, %"),
        ),
        # Not of failures noticed: these are all attempts but the last.
        claims=(Claim("attempts", end, "SFT"), Claim("checks", end, "SFT")),
        measure="evaluation-budgets",
        limits=(
            "A chain of this task checks once, where it claims success, so there is hardly room "
            "for more checks. What is counted are kinds of lines, not thoughts."
        ),
    )


def initialisation(scale: Scale) -> Finding:
    names = {"one-attempt": "one attempt", "three-attempts": "three", "giving-up": "giving up"}
    runs = {label: scale.run(chains) for chains, label in names.items()}
    settings = {f"{label}, SFT": (run, 0) for label, run in runs.items()}
    settings |= {f"{label}, RL": (run, run.steps) for label, run in runs.items()}
    return Finding(
        question="Does it matter to RL what chains SFT was shown?",
        paper="Chains that try, fail and verify widen what RL can reach; imitation alone does not.",
        settings=settings,
        columns=(
            *("accuracy, %", "gain by RL, points", "tokens", "attempts"),
            *("wrong sums, %", "false claims, %", "no answer, %"),
        ),
        panels=((course, "accuracy, %"), (course, "tokens"), (course, "attempts")),
        claims=(
            Claim("gain by RL, points", "three, RL", "one attempt, RL"),
            Claim("accuracy, %", "three, RL", "one attempt, RL"),
            Claim("accuracy, %", "three, RL", "giving up, RL", in_paper=False),
        ),
        limits=(
            "All three have as many steps of SFT, and chains of one attempt have fewer tokens. "
            "Giving up is ours, not the paper's: RL has first to unlearn it."
        ),
    )


def relatives(scale: Scale) -> Finding:
    # DAPO draws until enough groups teach, here about twice: of half the prompts, as much in all.
    half = demo.rl_flags(scale.demo(0, scale.steps), Path()).prompts // 2
    runs = {"t1": scale.run()}
    for recipe in ("grpo", "dr_grpo", "dapo", "reinforce"):
        more = {"prompts": half} if recipe == "dapo" else {}
        runs[recipe] = scale.run(recipe=recipe, **more)
    # It takes c / (tokens of the thought) from the reward. The released c of 1,000 is for thousands
    # of tokens; here a thought has some 40.
    runs["rlsp"] = scale.run(recipe="rlsp", length_cost=5.0)
    return Finding(
        question="How do GRPO, Dr. GRPO, DAPO, REINFORCE and RLSP do on as many responses?",
        paper="It does not compare with them.",
        settings=at_end(runs),
        columns=(
            *("accuracy, %", "tokens", "entropy", "KL from SFT", "median KL"),
            *("unexpected in RL, %", "responses drawn, thousands"),
        ),
        panels=((course, "accuracy, %"), (course, "tokens"), (course, "KL from SFT")),
        limits=(
            "All have the demo's learning rate, chosen for T1; the temperature and the rest are "
            "each recipe's own. RLSP's policy stands still for its first 4 steps. A race is not "
            "decided in so few steps, at one rate."
        ),
    )


FINDINGS: dict[str, Callable[[Scale], Finding]] = {
    finding.__name__: finding
    for finding in (
        *(scaling, oversampling, exchange, temperature, penalties),
        *(regularisers, behaviours, initialisation, relatives),
    )
}
SCALE = Scale()


# --- what comes of it -----------------------------------------------------------------------------


def spread(values: Sequence[float]) -> str:
    """The mean of the seeds [the lowest, the highest]; of one seed, its value."""
    mean = rounded(float(np.mean(values)))
    if len(values) == 1:
        return mean
    return f"{mean} [{rounded(min(values))}, {rounded(max(values))}]"


def rounded(value: float) -> str:
    """One digit behind the point from 10 on, two from 0.1 on, else three; and no -0."""
    digits = 1 if abs(value) >= 10 else 2 if abs(value) >= 0.1 else 3
    return f"{round(value, digits) + 0.0:.{digits}f}"


def markdown(finding: Finding, table: Table) -> str:
    """The settings' columns."""
    lines = [f"| | {' | '.join(finding.columns)} |", "|---" * (len(finding.columns) + 1) + "|"]
    for label, row in table.items():
        cells = [spread([COLUMNS[name](seen) for seen in row]) for name in finding.columns]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def verdicts(finding: Finding, table: Table) -> dict[Claim, list[float]]:
    """What each claim's `more` has more than its `less`, with each seed."""
    found = {}
    for claim in finding.claims:
        pairs = zip(table[claim.more], table[claim.less])
        found[claim] = [claim.gap(more, less) for more, less in pairs]
    return found


def sentence(gaps: dict[Claim, list[float]], seeds: int) -> str:
    """Whether all of this agrees with the paper, in one sentence."""
    words = [verdict(row) for claim, row in gaps.items() if claim.in_paper]
    if not words:
        return "The paper says nothing with which this could agree."
    agrees, contradicts = words.count("agrees"), words.count("contradicts")
    undecided = len(words) - agrees - contradicts
    return (
        f"With {seeds} seed{'s' if seeds > 1 else ''} this miniature agrees with the paper in "
        f"{agrees} of {len(words)} comparisons, contradicts it in {contradicts}, and leaves "
        f"{undecided} undecided."
    )


def report(config: "Config", name: str, cost: str) -> str:
    """Write a finding's figure and page, and print it. Returns the verdict's sentence."""
    finding, out = FINDINGS[name](SCALE), Path(config.out)
    table = {}
    for label, (run, step) in finding.settings.items():
        table[label] = [
            see(out, run, step, seed, finding.measure) for seed in seeds_of(config.seeds)
        ]
    draw(finding, table, out / f"{name}.png")
    gaps = verdicts(finding, table)
    ending = sentence(gaps, config.seeds)
    claims = []
    for claim, row in gaps.items():
        what = f"{claim.what}: {claim.more} above {claim.less}"
        word = verdict(row)
        if not claim.in_paper:
            what += " (our question)"
            word = {"agrees": "yes", "contradicts": "no"}.get(word, word)
        claims.append(f"- {what}: **{word}**, by {spread(row)}")
    if claims and config.seeds > 1:
        chance = 2**config.seeds
        claims.append(
            f"\nBy chance alone all seeds agree once in {chance}, and contradict as often. "
            "(Claims of one setting share its runs: chance then repeats itself.)"
        )
    paragraphs = [
        f"# {name}: {finding.question}",
        "    " + shlex.join(["python", "findings.py", name, *cli.changed(config, "seeds")]),
        f"The paper: {finding.paper}",
        markdown(finding, table),
        f"The mean of the seeds [the lowest, the highest]. {ending}",
        "\n".join(claims),
        finding.limits,
        cost,
    ]
    text = "\n\n".join(paragraph for paragraph in paragraphs if paragraph)
    cli.write_text(out / f"{name}.md", f"{text}\n\n![{name}]({name}.png)\n")
    print(f"\n{text}\n\nThe figure is {out / f'{name}.png'}")
    return ending


# --- command --------------------------------------------------------------------------------------


@dataclass
class Config:
    name: tyro.conf.Positional[str]
    """The finding, or `all` of them."""
    seeds: int = 3
    """How many, from 3 on: each with chains, an SFT model and held-out problems of its own."""
    jobs: int = 2
    """Processes side by side, each on one core."""
    out: str = "runs/findings"
    """Folder of all runs, tables and figures; what is done in it is not done again."""


def main(config: Config) -> None:
    if config.name != "all" and config.name not in FINDINGS:
        raise UserError(f"{config.name} is no finding: all, {', '.join(FINDINGS)}")
    if min(config.seeds, config.jobs) < 1:
        raise UserError("--seeds and --jobs must be at least 1")
    cli.check_parent(config.out)

    def kept() -> str:
        return f"what is done is in {config.out}; the same command goes on"

    with cli.telling(kept), cli.holding(config.out, folder=True):
        find(config)


def find(config: Config) -> None:
    """Run what is not done yet, and report what is complete."""
    names = list(FINDINGS) if config.name == "all" else [config.name]
    jobs = Jobs(Path(config.out), config.jobs)
    tasks = plan(SCALE, [FINDINGS[name](SCALE) for name in names], config.seeds)
    for task in tasks:
        jobs.check(task)
    missing = [task for task in tasks if not jobs.is_done(task)]
    models = sum(task.needs is None for task in tasks)
    print(
        f"{', '.join(names)}: {models} x SFT and {len(tasks) - models} x RL; "
        f"{len(tasks) - len(missing)} of these {len(tasks)} are there already"
    )
    failures = jobs.run(missing) if missing else {}
    endings = {}
    for name in names:
        needed = plan(SCALE, [FINDINGS[name](SCALE)], config.seeds)
        if all(jobs.is_done(task) for task in needed):
            endings[name] = report(config, name, jobs.cost(needed))
    if len(names) > 1:
        print("\n" + "\n".join(f"{name}: {ending}" for name, ending in endings.items()))
    if failures:
        for home, why in failures.items():
            print(f"failed: {home}: {why}")
        raise UserError(f"{len(failures)} of {len(tasks)} failed: the same command tries again")
    seeds = cli.changed(config, "seeds")
    if config.name == "all":  # what is undecided wants more of them
        seeds = [f"--seeds={2 * config.seeds}"]
    following = ["python", "findings.py", "all", *seeds, *cli.changed(config, "jobs", "out")]
    print(f"\nnext: {shlex.join(following)}    # what is there is not done again")


if __name__ == "__main__":
    cli.run(main, Config)
