"""T1 in miniature: RL teaches a policy to think further than it was ever shown, on a laptop CPU.

    python demo.py                 # `make demo`: about sixteen minutes on 2 slow cores
    python demo.py --seed 1 --out runs/demo-1
    python demo.py --long --out runs/long          # more RL from the same SFT: half an hour in all
    python demo.py --baselines     # afterwards: what more SFT, and better data, would have given

Each stage is the very command that a large run would use; a stage that is done is not repeated, so
an interrupted demo goes on where it was stopped:

1. cot.py       synthesise chains of thought: a few attempts, merged up to the first that is right
2. sft.py       teach them to a small transformer with random weights
3. rl.py        T1's reinforcement learning; no held-out set of numbers comes up in 2 or 3
4. evaluate.py  the held-out problems: pass@1, pass@16, accuracy against thinking budget, and what
                the failures are made of
5. evaluate.py  the same curve for checkpoints on the way, after 30 and 60 % of RL
6. the figure, the closing table, and summary.json

Was it RL, or would more SFT, or better data, have given as much? Two baselines ask. *More SFT*: SFT
goes on from its model for the minutes that RL took, on the same data, with a warm-up and a decay of
its own. *The oracle's SFT*: in one go, for the minutes of SFT and RL together, on chains as long as
the task ever needs, which the policy never saw.
"""

import contextlib
import dataclasses
import json
import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from matplotlib.figure import Figure

import cli
import cot
import evaluate
import rl
import sft
import tasks
from cli import UserError
from evaluate import Result
from runfolder import read_metrics
from tokenizer import load_tokenizer

ATTEMPTS = 3  # in the longest chain that the model is ever shown: two fail, and one is right
ALL_ATTEMPTS = 99  # the oracle's: more than there are values to try
BUDGET = 336  # tokens a response may take in RL and in evaluation: room for some twenty attempts
BUDGETS = "42,56,84,112,168,224,336"
CURVE_SAMPLES = 2  # of each problem, for the curve: every cut chain costs a forced answer
LONG_STEPS, LONG_COOLDOWN = 240, 80  # --long
SHARES = (0.3, 0.6)  # of RL's steps, after which the curve is measured, too
PROBE = tasks.countdown_problem([3, 5, 7], 22)  # sixteen values to try; 64 responses are counted


@dataclass
class Config:
    out: str = "runs/demo"
    """Run folder; a demo that was interrupted goes on in it."""
    seed: int = 0
    """Decides the problems, the weights at the start, and every sampled token."""
    chains: int = 34_000
    """Chains of thought to train on."""
    sft_steps: int = 3400
    """Steps of SFT."""
    steps: int = 90
    """Steps of RL."""
    cooldown: int = 0
    """The last so many steps of RL, over which the learning rate falls to nearly 0."""
    heldout: int = 1024
    """Held-out problems; no set of numbers among them is ever trained on."""
    samples: int = 16
    """Responses to each held-out problem."""
    long: bool = False
    """As --steps 240 --cooldown 80: RL until it hardly rises. Takes about half an hour."""
    baselines: bool = False
    """Also train and measure the two baselines: about as long again."""


# --- the stages, as flags of the commands ---------------------------------------------------------


def chain_flags(config: Config, file: Path, attempts: int = ATTEMPTS) -> cot.Config:
    return cot.Config(str(file), seed=config.seed, count=config.chains, attempts=attempts)


def sft_flags(config: Config, out: Path, chains: Path, steps: int) -> sft.Config:
    """Small steps and many: 1,024 tokens. With four times as many it learned far less a minute."""
    return sft.Config(
        out=str(out),
        data=str(chains),
        seed=config.seed,
        steps=steps,
        lr=6e-3,
        optimizer="muon",
        weight_decay=0.0,
        batch_tokens=1024,
        random_positions=0.7,
        eval_every=500,
        checkpoint_every=500,
        resume=not cli.is_new(out),
    )


def rl_flags(config: Config, out: Path) -> rl.Config:
    every = max(1, config.steps // 10)
    return rl.Config(
        model=str(out / "sft"),
        out=str(out / "rl"),
        task="countdown",
        seed=config.seed + 1000,  # another order of the same problems; none of them is held out
        steps=config.steps,
        prompts=64,
        samples=16,
        max_tokens=BUDGET,
        minibatches=2,
        micro_tokens=4096,
        lr=5e-4,
        warmup=4,
        cooldown=config.cooldown,
        checkpoint_every=every,
        keep_every=every,
        resume=not cli.is_new(out / "rl"),
    )


def evaluate_flags(config: Config, models: list[Path], out: Path) -> evaluate.Config:
    return evaluate.Config(
        model=[str(model) for model in models],
        task="countdown",
        limit=config.heldout,
        n=config.samples,
        k=",".join(str(k) for k in (1, 4, 16) if k <= config.samples),
        budgets=BUDGETS,
        curve_samples=CURVE_SAMPLES,
        max_tokens=BUDGET,
        seed=config.seed,
        max_batch=2048,
        out=str(out),
        resume=out.exists(),
    )


def curve_flags(config: Config, models: list[Path], out: Path) -> evaluate.Config:
    """The curve alone, of as many samples as the others have in theirs."""
    samples = min(CURVE_SAMPLES, config.samples)
    return replace(evaluate_flags(config, models, out), n=samples, k="1", curve_samples=None)


def probe_flags(config: Config, models: list[Path], out: Path) -> evaluate.Config:
    return evaluate.Config(
        model=[str(model) for model in models],
        data=str(out / "probe.jsonl"),
        n=64,
        budgets=str(BUDGET),  # the curve's figure is written last: then all is measured
        max_tokens=BUDGET,
        seed=config.seed,
        out=str(out / "probe"),
        resume=(out / "probe").exists(),
    )


# --- running them ---------------------------------------------------------------------------------


def words_of(flags: object) -> list[str]:
    """The words of a command line that say the same: what differs from the defaults."""
    words = []
    for field in dataclasses.fields(flags):
        name, value = field.name.replace("_", "-"), getattr(flags, field.name)
        if value == field.default or name == "resume":
            continue
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
            continue
        values = value if isinstance(value, list | tuple) else [value]
        words += [f"--{name}", *map(str, values)]
    return words


class Stages:
    """Runs each stage unless what it makes is there; `seconds` adds up what each took, over
    interruptions too."""

    def __init__(self, out: Path, seconds: dict[str, float]):
        self.out, self.seconds = out, seconds

    def run(self, name: str, script: str, done: Path, flags: object, main: Callable) -> None:
        print(f"\n$ {shlex.join(['python', script, *words_of(flags)])}", flush=True)
        if done.exists():
            print(f"  {done} is there already")
            return
        began = time.perf_counter()
        try:
            main(flags)
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began
            cli.write_text(self.out / "seconds.json", json.dumps(self.seconds))


def check_flags(config: Config) -> None:
    counts = (config.sft_steps, config.steps, config.heldout, config.samples)
    if config.chains < 100 or min(counts) < 1:
        raise UserError("--chains must be at least 100, and all other counts at least 1")


@contextlib.contextmanager
def going_on_in(out: str) -> Iterator[None]:
    """Hold a demo's folder; whoever interrupts it is told how it goes on."""

    def kept() -> str:
        return f"finished stages are in {out}; the same command goes on"

    with cli.telling(kept), cli.holding(out, folder=True):
        yield


def open_folder(flags: dict, out: Path) -> dict[str, float]:
    """The seconds spent so far. A folder of other flags, or of something else, is left as it is."""
    file, seconds = out / "demo.json", out / "seconds.json"
    if not file.exists() and not cli.is_new(out):
        raise UserError(f"{out} exists and holds no demo: choose another --out")
    try:
        started = json.loads(file.read_text()) if file.exists() else flags
        spent = json.loads(seconds.read_text()) if seconds.exists() else {}
    except (OSError, ValueError):
        raise UserError(f"{file} or {seconds} is damaged: choose another --out") from None
    if started != flags:
        raise UserError(f"{out} holds a demo with other flags ({started}): choose another --out")
    cli.write_text(file, json.dumps(flags))
    return spent


def checkpoints(config: Config, out: Path) -> dict[float, Path]:
    """{share of RL's steps: the policy after it, as a model folder}, for those of SHARES."""
    every = rl_flags(config, out).keep_every
    folders = {}
    for share in SHARES:
        step = max(1, round(share * config.steps / every)) * every
        folders[share] = out / f"rl-step-{step}"
        if not folders[share].exists():
            flags = rl.Config(model=str(out / "sft"), out=str(out / "rl"))
            rl.main(replace(flags, export=str(folders[share]), step=step))
    return folders


def baselines(config: Config, out: Path, stages: Stages) -> dict[str, Result]:
    """{"more_sft", "best_sft": measured}. Their steps follow from the seconds of SFT and RL."""
    longer = stages.seconds.get("rl", 0.0) / max(stages.seconds.get("sft", 0.0), 1e-9)
    file = out / "steps_more.json"
    if not file.exists():  # an interrupted baseline goes on with the steps that it began with
        cli.write_text(file, json.dumps(max(1, round(longer * config.sft_steps))))
    steps_more = json.loads(file.read_text())

    chains, oracle = out / "chains.jsonl", out / "oracle.jsonl"
    flags = chain_flags(config, oracle, ALL_ATTEMPTS)
    stages.run("oracle chains", "cot.py", oracle, flags, cot.main)
    more = replace(sft_flags(config, out / "more_sft", chains, steps_more), model=str(out / "sft"))
    stages.run("more_sft", "sft.py", out / "more_sft" / "model", more, sft.main)
    best = sft_flags(config, out / "best_sft", oracle, config.sft_steps + steps_more)
    stages.run("best_sft", "sft.py", out / "best_sft" / "model", best, sft.main)

    folders, evaluation = [out / "more_sft", out / "best_sft"], out / "evaluation-baselines"
    flags = evaluate_flags(config, folders, evaluation)
    done = evaluation / "budgets.png"
    stages.run("evaluate baselines", "evaluate.py", done, flags, evaluate.main)
    return dict(zip(("more_sft", "best_sft"), in_order(evaluation)))


# --- what came of it ------------------------------------------------------------------------------


def longest_shown(chains: Path, model: Path) -> dict[str, int]:
    """The most attempts, and the most tokens (with the stop token), of any chain in the data."""
    tokenizer = load_tokenizer(str(model))
    responses = [row["response"] for row in cli.read_jsonl(chains)]
    return {
        "attempts": max(len(tasks.attempts(response)) for response in responses),
        "tokens": max(len(tokenizer.encode(response)) + 1 for response in responses),
    }


def draw(
    results: dict[str, Result], shown: dict[str, int], metrics: list[dict], path: Path
) -> None:
    """What to look at: accuracy against thinking budget, RL's course, what the failures are."""
    figure = Figure(figsize=(14, 4), layout="constrained")
    budgets, course, failures = figure.subplots(1, 3)
    evaluate.draw_budgets(budgets, results)
    budgets.axvline(shown["tokens"], color="gray", linestyle="--", label="longest chain shown")
    budgets.legend(loc="upper left", fontsize=8)  # where no curve runs

    steps = [row["step"] for row in metrics]
    accuracy = [row["accuracy"] for row in metrics]
    course.plot(steps, accuracy, color="C1", label="accuracy of the samples")
    course.set(xlabel="step of RL", ylabel="accuracy", title="The course of RL")
    length = course.twinx()
    length.plot(steps, [row["length"] for row in metrics], color="C2", label="mean length")
    length.set_ylabel("tokens")
    course.legend(handles=[*course.lines, *length.lines], loc="lower right")

    ends = {name: results[name] for name in ("SFT", "RL")}
    kinds = sorted({kind for result in ends.values() for kind in result.failures})
    for i, (name, result) in enumerate(ends.items()):
        places = [place + 0.4 * i for place in range(len(kinds))]
        shares = [100 * result.failures.get(kind, 0) for kind in kinds]
        failures.barh(places, shares, height=0.4, label=name)
    failures.set_yticks([place + 0.2 for place in range(len(kinds))], kinds)
    failures.set(xlabel="% of all responses", title="What the failures are made of")
    failures.legend()
    with cli.whole_file(path) as partial:
        figure.savefig(partial, format="png", dpi=130)


def run_stages(config: Config, out: Path, stages: Stages) -> None:
    """From chains to everything that is measured; what is there already is not done again."""
    chains = out / "chains.jsonl"
    trained = [out / "sft", out / "rl"]
    stages.run("cot", "cot.py", chains, chain_flags(config, chains), cot.main)
    flags = sft_flags(config, out / "sft", chains, config.sft_steps)
    stages.run("sft", "sft.py", out / "sft" / "model", flags, sft.main)
    stages.run("rl", "rl.py", out / "rl" / "model", rl_flags(config, out), rl.main)

    flags = evaluate_flags(config, trained, out / "evaluation")
    stages.run("evaluate", "evaluate.py", out / "evaluation" / "budgets.png", flags, evaluate.main)
    on_the_way = checkpoints(config, out)
    flags = curve_flags(config, list(on_the_way.values()), out / "curves")
    stages.run("curves", "evaluate.py", out / "curves" / "budgets.png", flags, evaluate.main)
    probe = {"problem": PROBE.question, "answer": PROBE.answer, "task": PROBE.task}
    cli.write_jsonl(out / "probe.jsonl", [probe])
    flags = probe_flags(config, trained, out)
    stages.run("probe", "evaluate.py", out / "probe" / "budgets.png", flags, evaluate.main)
    if not (out / "model").exists():  # so that runs/demo is itself a --model
        with cli.writing(out / "model"):
            shutil.copytree(out / "rl" / "model", out / "model.partial", dirs_exist_ok=True)
            (out / "model.partial").rename(out / "model")


def read_results(config: Config, out: Path) -> dict[str, Result]:
    """{"SFT", "30% of RL", "60% of RL", "RL": measured}."""
    start, end = in_order(out / "evaluation")
    results = {"SFT": start}
    folders = checkpoints(config, out)
    curves = dict(zip(dict.fromkeys(folders.values()), in_order(out / "curves")))
    for share, folder in folders.items():
        results[f"{share:.0%} of RL"] = curves[folder]
    return results | {"RL": end}


def in_order(folder: Path) -> list[Result]:
    """What evaluate.py measured there, in the order of its command. (Not by the models' names: they
    are paths, and the whole demo may have been moved.)"""
    return list(evaluate.load_results(folder / "results.json").values())


def summarise(config: Config, out: Path, results: dict[str, Result], shown: dict[str, int]) -> dict:
    """The numbers of summary.json, but for the baselines and the seconds."""
    probed = in_order(out / "probe")
    summary = {
        "seed": config.seed,
        "problems_heldout": config.heldout,
        "sft": results["SFT"].summary(),
        "rl": results["RL"].summary(),
        "longest_shown": shown,
        "beyond_shown": {},
        "rl_curves": {},
        "probe": {"problem": PROBE.question},
    }
    for name, probe in zip(("sft", "rl"), probed):
        summary["beyond_shown"][name] = results[name.upper()].right_beyond(shown["attempts"])
        summary["probe"][name] = sum(probe.correct[0])
    for share in SHARES:
        curve = results[f"{share:.0%} of RL"].summary()["budget_curve"]
        summary["rl_curves"][str(share)] = curve
    summary["rl_curves"]["1.0"] = summary["rl"]["budget_curve"]
    return summary


def print_ending(config: Config, out: Path, summary: dict) -> None:
    """What the table does not say, and what to do next."""
    shown, probe = summary["longest_shown"], summary["probe"]
    print(f"the chains shown had up to {shown['attempts']} attempts and {shown['tokens']} tokens")
    for name in ("sft", "rl"):
        share = 100 * summary["beyond_shown"][name]
        print(f"{name.upper()}: right at a later attempt than that: {share:.1f} % of all responses")
    print(f"{probe['problem']}: {probe['sft']} of 64 right after SFT, {probe['rl']} after RL")
    print(f"\nin {summary['seconds']:.0f} s; the figure is {out / 'demo.png'}")
    if not config.baselines:
        long = " --long" if config.long else ""
        again = f"python demo.py{long} --seed {config.seed} --out {out} --baselines"
        print(f"Was it the data? Ask the baselines:  {again}")
    print(f'Watch it think:  python sample.py --model {out} "numbers 3 5 7, target 22"')


def lengthened(config: Config) -> Config:
    """The flags with what --long stands for."""
    return replace(config, steps=LONG_STEPS, cooldown=LONG_COOLDOWN) if config.long else config


def main(config: Config) -> None:
    with going_on_in(config.out):
        demonstrate(config)


def demonstrate(config: Config) -> None:
    """All stages that are not done yet, and what came of them."""
    config = lengthened(config)
    check_flags(config)
    out = Path(config.out)
    flags = dataclasses.asdict(config)
    del flags["out"], flags["baselines"], flags["long"]  # what --long changes stands there
    seconds = open_folder(flags, out)
    stages = Stages(out, seconds)
    run_stages(config, out, stages)
    results = read_results(config, out)
    shown = longest_shown(out / "chains.jsonl", out / "sft")
    draw(results, shown, read_metrics(out / "rl" / "metrics.jsonl"), out / "demo.png")

    summary = summarise(config, out, results, shown)
    ends = {"SFT": results["SFT"], "RL": results["RL"]}
    if config.baselines or (out / "evaluation-baselines" / "budgets.png").exists():
        found = baselines(config, out, stages)
        summary["baselines"] = {name: result.summary() for name, result in found.items()}
        for name, result in found.items():
            summary["beyond_shown"][name] = result.right_beyond(shown["attempts"])
        ends |= {"more SFT": found["more_sft"], "oracle's SFT": found["best_sft"]}
    main_stages = ("cot", "sft", "rl", "evaluate", "curves", "probe")
    summary["seconds"] = round(sum(seconds.get(name, 0.0) for name in main_stages), 1)
    summary["seconds_by_stage"] = {name: round(value, 1) for name, value in seconds.items()}
    cli.write_text(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    print(f"\n{evaluate.table(ends)}\n")
    print_ending(config, out, summary)


if __name__ == "__main__":
    cli.run(main, Config)
