"""T1 in miniature, from nothing to a policy that thinks longer and answers better, on a laptop CPU.

    python demo.py                      # `make demo`: about ten minutes on 2 cores
    python demo.py --seed 1 --out runs/demo-1

Five stages, each the very command that a large run would use; a stage that is done is not repeated, so an interrupted
demo goes on where it was stopped:

1. cot.py       synthesise chains of thought that try, fail, notice and verify
2. sft.py       teach them to a small transformer with random weights
3. rl.py        T1's reinforcement learning; no set of numbers that is held out comes up in 2 or 3
4. evaluate.py  the held-out problems: pass@1, pass@16, accuracy against thinking budget, what the failures are made of
5. the figure, the closing table, and summary.json
"""

import dataclasses
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

import cli
import cot
import evaluate
import rl
import sft
from cli import UserError
from evaluate import Result
from runfolder import read_metrics

MOST = 8  # attempts in the longest chain the model is ever shown: 120 tokens
BUDGET = 224  # tokens a response may take in RL and in evaluation: nearly twice that
BUDGETS = "28,42,56,84,112,168,224"


@dataclass
class Config:
    out: str = "runs/demo"
    """Run folder; a demo that was interrupted goes on in it."""
    seed: int = 0
    """Decides the problems, the weights at the start, and every sampled token."""
    chains: int = 72_000
    """Chains of thought to train on."""
    steps: int = 56
    """Steps of RL."""
    heldout: int = 1024
    """Held-out problems; no set of numbers among them is ever trained on."""
    samples: int = 16
    """Responses to each held-out problem."""


def chain_flags(config: Config, out: Path) -> cot.Config:
    file = str(out / "chains.jsonl")
    return cot.Config(file, seed=config.seed, count=config.chains, most=MOST, give_up=0.2)


def sft_flags(config: Config, out: Path) -> sft.Config:
    """Small steps and many of them: 1,024 tokens each. With four times as many a step it learned far less a minute."""
    return sft.Config(
        out=str(out / "sft"),
        data=str(out / "chains.jsonl"),
        seed=config.seed,
        epochs=1,
        lr=6e-3,
        optimizer="muon",
        weight_decay=0.0,
        batch_tokens=1024,
        eval_every=500,
        checkpoint_every=500,
        resume=(out / "sft").exists(),
    )


def rl_flags(config: Config, out: Path) -> rl.Config:
    return rl.Config(
        model=str(out / "sft"),
        out=str(out / "rl"),
        task="countdown",
        seed=config.seed + 1000,  # another stream of problems; most are among the chains', none are held out
        steps=config.steps,
        prompts=96,
        samples=16,
        max_tokens=BUDGET,
        minibatches=2,
        micro_tokens=4096,
        lr=6e-4,
        warmup=4,
        cooldown=16,
        temperature=1.0,
        resume=(out / "rl").exists(),
    )


def evaluate_flags(config: Config, out: Path) -> evaluate.Config:
    return evaluate.Config(
        model=[str(out / "sft"), str(out / "rl")],
        task="countdown",
        limit=config.heldout,
        n=config.samples,
        k=",".join(str(k) for k in (1, 4, 16) if k <= config.samples),
        budgets=BUDGETS,
        curve_samples=4,
        max_tokens=BUDGET,
        seed=config.seed,
        max_batch=2048,
        out=str(out / "evaluation"),
        resume=(out / "evaluation").exists(),
    )


def command(script: str, flags: object) -> str:
    """The command line that does the same: what differs from the defaults."""
    words = ["python", script]
    for field in dataclasses.fields(flags):
        value = getattr(flags, field.name)
        if value == field.default or field.name == "resume":
            continue
        values = value if isinstance(value, list) else [value]
        words += ["--" + field.name.replace("_", "-"), *map(str, values)]
    return " ".join(words)


def stage(name: str, out: Path, done: Path, flags: object, run: Callable, seconds: dict[str, float]) -> None:
    """Run one stage unless what it makes is there; `seconds` adds up what it took, over interruptions too."""
    print(f"\n$ {command(name + '.py', flags)}", flush=True)
    if done.exists():
        print(f"  {done} is there already")
        return
    began = time.perf_counter()
    try:
        run(flags)
    finally:
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - began
        cli.write_text(out / "seconds.json", json.dumps(seconds))


def draw(results: dict[str, Result], metrics: list[dict], path: Path) -> None:
    """What to look at: accuracy against thinking budget, RL's course, and what the failures are made of."""
    figure = Figure(figsize=(14, 4), layout="constrained")
    budgets, course, failures = figure.subplots(1, 3)
    evaluate.draw_budgets(budgets, results)
    steps = [row["step"] for row in metrics]
    course.plot(steps, [row["accuracy"] for row in metrics], color="C1", label="accuracy of the samples")
    course.set(xlabel="step of RL", ylabel="accuracy", title="RL: more right, and longer")
    length = course.twinx()
    length.plot(steps, [row["length"] for row in metrics], color="C2", label="mean length")
    length.set_ylabel("tokens")
    course.legend(handles=[*course.lines, *length.lines], loc="lower right")
    kinds = sorted({kind for result in results.values() for kind in result.failures})
    for i, (name, result) in enumerate(results.items()):
        places = [place + 0.4 * i for place in range(len(kinds))]
        failures.barh(places, [100 * result.failures.get(kind, 0) for kind in kinds], height=0.4, label=name)
    failures.set_yticks([place + 0.2 for place in range(len(kinds))], kinds)
    failures.set(xlabel="% of all responses", title="What the failures are made of")
    failures.legend()
    figure.savefig(path, dpi=130)


def open_folder(config: Config, out: Path) -> dict[str, float]:
    """The seconds spent so far. A folder made with other flags, or by something else, is left as it is."""
    if config.chains < 100 or min(config.steps, config.heldout, config.samples) < 1:
        raise UserError("--chains must be at least 100; --steps, --heldout and --samples at least 1")
    flags = {name: value for name, value in dataclasses.asdict(config).items() if name != "out"}
    file, seconds = out / "demo.json", out / "seconds.json"
    if not file.exists() and out.exists() and (not out.is_dir() or any(out.iterdir())):
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


def main(config: Config) -> None:
    out = Path(config.out)
    seconds = open_folder(config, out)
    stage("cot", out, out / "chains.jsonl", chain_flags(config, out), cot.main, seconds)
    stage("sft", out, out / "sft" / "model", sft_flags(config, out), sft.main, seconds)
    stage("rl", out, out / "rl" / "model", rl_flags(config, out), rl.main, seconds)
    stage("evaluate", out, out / "summary.json", evaluate_flags(config, out), evaluate.main, seconds)
    if not (out / "model").exists():  # so that runs/demo is itself a --model
        shutil.copytree(out / "rl" / "model", out / "model.partial", dirs_exist_ok=True)
        (out / "model.partial").rename(out / "model")

    measured = evaluate.load_results(out / "evaluation" / "results.json")
    results = {"SFT": measured[str(out / "sft")], "RL": measured[str(out / "rl")]}
    draw(results, read_metrics(out / "rl" / "metrics.jsonl"), out / "demo.png")
    summary = {
        "seconds": round(sum(seconds.values()), 1),
        "seconds_by_stage": {name: round(value, 1) for name, value in seconds.items()},
        "sft": results["SFT"].summary(),
        "rl": results["RL"].summary(),
        "seed": config.seed,
        "problems_heldout": config.heldout,
    }
    cli.write_text(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    print(f"\n{evaluate.table(results)}\n\nin {summary['seconds']:.0f} s; the figure is {out / 'demo.png'}")
    print(f'Watch it think:  python sample.py --model {out} "numbers 19 17 43, target 41"')


if __name__ == "__main__":
    cli.run(main, Config)
