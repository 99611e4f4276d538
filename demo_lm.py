"""A real language model learns, on a laptop CPU: taught by its own attempts, and by T1's RL.

    python demo_lm.py                    # `make demo-lm`: SmolLM2-135M-Instruct from the hub
    python demo_lm.py --model DIR        # a folder of it, or of another model
    python demo_lm.py --task digits --out runs/demo-lm-digits    # where longer thinking pays

It takes 8 GB of memory and 10 GB of disk: checkpoints hold the optimizer, too. Each stage is the
very command that a large run would use; a stage that is done is not repeated:

1. cot.py       the model attempts the training problems; a wrong attempt and a right one are merged
                into a chain that fails, notices, tries again and verifies
2. sft.py       the model learns these few chains
3. rl.py        T1's reinforcement learning
4. evaluate.py  held-out problems, which share no pair of numbers with the others: the model as it
                came, after SFT, after RL
5. the figure, the closing table, and summary.json

**sums** (the default): "What is 17 + 25?", of the numbers from 2 to 30. As it comes, the model
writes essays about them, and hardly ever a box. So its gain has two parts, the form and the
arithmetic. The curve against the thinking budget tells them apart: where a budget cuts a response
off, a box is opened for the model, and it has only to fill it.

**digits**: "What is 4837 + 2695?" Of such sums the model gets hardly any right, so a program writes
its chains: half of them leap to the sum, half work digit by digit. All of them end right, so
imitation has no reason to prefer either. A leap is short, and more often wrong. RL pays for right
answers only, and has to find out that these take longer thinking: it chooses between two ways that
it was shown.

`--baseline` afterwards asks what SFT alone would have given: for `sums`, five epochs on the same
chains instead of two and RL; for `digits`, the half of the chains that works, so that SFT is told
which way is better.
"""

import dataclasses
import json
import random
import shlex
import textwrap
import zlib
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal

from matplotlib.figure import Figure

import cli
import cot
import evaluate
import rl
import sft
import tasks
from cli import UserError
from demo import Stages, going_on_in, in_order, open_folder, words_of
from evaluate import Result
from runfolder import read_metrics
from sample import SamplingParams

LARGEST = 30  # of the numbers of `sums`, from 2
BASELINE = {"sums": "more SFT", "digits": "SFT, worked chains alone"}
MAX_TOKENS = {"sums": 128, "digits": 96}
"""Of a response, in RL and in evaluation: most of the chains that are shown are shorter."""
BUDGETS = {"sums": "16,32,64,128", "digits": "12,24,48,96"}
LR = {"sums": 4e-5, "digits": 1e-5}


@dataclass
class Config:
    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    """The model to be taught: a Hugging Face folder, or a name of its hub."""
    out: str = "runs/demo-lm"
    """Run folder; a demo that was interrupted goes on in it."""
    task: Literal["sums", "digits"] = "sums"
    """What is to be learned, see above."""
    seed: int = 0
    """Decides the problems, the attempts, and every sampled token."""
    attempted: int = 256
    """sums: how many problems the model attempts, four times each."""
    chains: int = 400
    """digits: how many chains are written."""
    steps: int = 16
    """Steps of RL; after the first few of them the rate falls."""
    heldout: int = 150
    """Held-out problems."""
    samples: int = 1
    """Responses to each held-out problem."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """bfloat16: on a CPU that multiplies it (AVX512-BF16 or AMX) it samples twice as fast, and RL's
    training is no faster; on others all is slower. auto: bfloat16 on a GPU that has it, else
    float32."""
    baseline: bool = False
    """Also train and measure SFT that is to do without RL: some five minutes for sums."""


# --- the problems ---------------------------------------------------------------------------------


def is_heldout(x: int, y: int) -> bool:
    """One in five pairs of numbers is never trained on, in whatever order they come."""
    return zlib.crc32(repr(sorted((x, y))).encode()) % 5 == 0


def row(x: int, y: int) -> dict:
    """A line of a problem file."""
    return {"problem": f"What is {x} + {y}?", "answer": str(x + y)}


def sums() -> tuple[list[dict], list[dict]]:
    """(training, held-out) problems: all sums of two numbers, in both orders."""
    training, heldout = [], []
    for x, y in product(range(2, LARGEST + 1), repeat=2):
        (heldout if is_heldout(x, y) else training).append(row(x, y))
    return training, heldout


def long_sums(rng: random.Random, count: int) -> tuple[list[dict], list[dict]]:
    """(training, held-out) problems: sums of two numbers of four digits, about `count` in all."""
    training, heldout = [], []
    for _ in range(count):
        x, y = rng.randint(1000, 9999), rng.randint(1000, 9999)
        (heldout if is_heldout(x, y) else training).append(row(x, y))
    return training, heldout


def digit_by_digit(x: int, y: int) -> str:
    """x + y, column by column from the right, with what is carried: 57 + 65 becomes

        57+65: 7+5=12
        5+6: 5+6+1=12

    Each line first says what is left to add, so that its column is always the last one. So small a
    model often takes the wrong digit from the middle of a number: without this, 48 % of its sums
    came out right, and not 80 %.
    """
    lines = []
    carry = 0
    while x or y:
        addends = [x % 10, y % 10] + [1] * carry
        lines.append(f"{x}+{y}: {'+'.join(map(str, addends))}={sum(addends)}")
        carry = sum(addends) // 10
        x //= 10
        y //= 10
    return "\n".join(lines)


def digit_chain(problem: dict, leap: bool) -> dict:
    """A line of the file that sft.py reads: the box at once, or behind its digits."""
    box = f"\\boxed{{{problem['answer']}}}"
    _, _, x, _, y = problem["problem"].rstrip("?").split()
    response = box if leap else f"{digit_by_digit(int(x), int(y))}\n{box}"
    return problem | {"task": "math", "response": response}


def write_problems(config: Config, out: Path) -> None:
    """train.jsonl and heldout.jsonl; for `digits` also the chains, at problems of their own."""
    rng = random.Random(f"demo_lm {config.task} {config.seed}")
    if config.task == "sums":
        training, heldout = sums()
    else:
        training, heldout = long_sums(rng, 4 * config.chains + 8 * config.heldout)
    rng.shuffle(training)
    rng.shuffle(heldout)
    if len(heldout) < config.heldout:
        raise UserError(f"--heldout {config.heldout}: there are {len(heldout)}")
    if config.task == "digits":
        shown, training = training[: config.chains], training[config.chains :]
        chains = [digit_chain(problem, number % 2 == 0) for number, problem in enumerate(shown)]
        cli.write_jsonl(out / "chains.jsonl", chains)
    cli.write_jsonl(out / "heldout.jsonl", heldout[: config.heldout])
    cli.write_jsonl(out / "train.jsonl", training)


# --- the stages, as flags of the commands ---------------------------------------------------------


def attempt_flags(config: Config, out: Path) -> cot.Config:
    """Right attempts are short, and every token has to be learned and paid for."""
    return cot.Config(
        str(out / "chains.jsonl"),
        seed=config.seed,
        data=str(out / "train.jsonl"),
        model=(config.model,),
        limit=config.attempted,
        max_tokens=40,
        failures=1,
        dtype=config.dtype,
    )


def sft_flags(config: Config, out: Path, chains: Path, epochs: int = 2) -> sft.Config:
    return sft.Config(
        out=str(out),
        data=str(chains),
        model=config.model,
        seed=config.seed,
        epochs=epochs,
        lr=1e-4,
        batch_tokens=2048 if config.task == "sums" else 1024,
        heldout=8,
        keep=1,
        dtype=config.dtype,
        resume=not cli.is_new(out),
    )


def rl_flags(config: Config, out: Path) -> rl.Config:
    """At temperature 1: at T1's 1.2 so small a model writes gibberish. So fast a rate needs more of
    the KL penalty: without, one seed of three began to put scraps behind its box, and lost its way.
    """
    return rl.Config(
        model=str(out / "sft"),
        out=str(out / "rl"),
        data=str(out / "train.jsonl"),
        seed=config.seed,
        steps=config.steps,
        prompts=12,
        samples=8,
        max_tokens=MAX_TOKENS[config.task],
        lr=LR[config.task],
        warmup=2,
        cooldown=3 * config.steps // 4,
        temperature=1.0,
        kl_coef=0.005,
        checkpoint_every=4,
        show_every=4,
        dtype=config.dtype,
        resume=not cli.is_new(out / "rl"),
    )


def evaluate_flags(config: Config, models: list[str], out: Path) -> evaluate.Config:
    return evaluate.Config(
        model=models,
        data=str(out.parent / "heldout.jsonl"),
        n=config.samples,
        max_tokens=MAX_TOKENS[config.task],
        budgets=BUDGETS[config.task],
        curve_samples=1,
        seed=config.seed,
        dtype=config.dtype,
        out=str(out),
        resume=out.exists(),
    )


# --- what came of it ------------------------------------------------------------------------------


def names(config: Config, out: Path) -> dict[str, str]:
    """{what the figure and the table call it: the model}."""
    return {
        "as it comes": config.model,
        "SFT": str(out / "sft"),
        "RL": str(out / "rl"),
    }


def run_stages(config: Config, out: Path, stages: Stages) -> None:
    """From problems to everything that is measured; what is there already is not done again."""
    if not (out / "train.jsonl").exists():  # the last of the files that it writes
        write_problems(config, out)
    if config.task == "sums":
        flags = attempt_flags(config, out)
        stages.run("cot", "cot.py", Path(flags.out), flags, cot.main)
    chains = out / "chains.jsonl"
    flags = sft_flags(config, out / "sft", chains)
    stages.run("sft", "sft.py", out / "sft" / "model", flags, sft.main)
    stages.run("rl", "rl.py", out / "rl" / "model", rl_flags(config, out), rl.main)
    folder = out / "evaluation"
    flags = evaluate_flags(config, list(names(config, out).values()), folder)
    stages.run("evaluate", "evaluate.py", folder / "budgets.png", flags, evaluate.main)


def baseline(config: Config, out: Path, stages: Stages) -> Result:
    """SFT alone, measured on the same problems. Its seconds are not the demo's."""
    chains, epochs = out / "chains.jsonl", 5
    if config.task == "digits":
        worked = [chain for chain in cli.read_jsonl(chains) if "=" in chain["response"]]
        chains, epochs = out / "worked.jsonl", 4  # half the chains: each is seen twice as often
        cli.write_jsonl(chains, worked)
    flags = sft_flags(config, out / "baseline", chains, epochs)
    stages.run("baseline", "sft.py", out / "baseline" / "model", flags, sft.main)
    folder = out / "evaluation-baseline"
    flags = evaluate_flags(config, [str(out / "baseline")], folder)
    stages.run("evaluate baseline", "evaluate.py", folder / "budgets.png", flags, evaluate.main)
    [result] = in_order(folder)
    return result


def draw(results: dict[str, Result], metrics: list[dict], path: Path) -> None:
    """Accuracy against thinking budget, the course of RL, and what it does to length."""
    figure = Figure(figsize=(14, 4), layout="constrained")
    budgets, course, length = figure.subplots(1, 3)
    evaluate.draw_budgets(budgets, results)

    steps = [row["step"] for row in metrics]
    course.plot(steps, [row["accuracy"] for row in metrics], label="accuracy of the samples")
    course.plot(steps, [row["pass_at_k"] for row in metrics], label="some of K right")
    course.plot(steps, [row["truncated"] for row in metrics], label="share that never ends")
    course.set(xlabel="step of RL", title="The course of RL")
    course.legend()

    length.plot(steps, [row["length"] for row in metrics], color="C3")
    length.set(xlabel="step of RL", ylabel="tokens", title="Mean length of a response")
    length.set_ylim(bottom=0)
    with cli.whole_file(path) as partial:
        figure.savefig(partial, format="png", dpi=130)


def show_samples(config: Config, out: Path, count: int = 2) -> None:
    """What each model says to the first held-out problems."""
    problems = tasks.load(out / "heldout.jsonl")[:count]
    params = SamplingParams(MAX_TOKENS[config.task], temperature=1.0, seed=config.seed)
    for name, model in names(config, out).items():
        sampler, tokenizer = cot.load_sampler(model, loading=cot.Loading(dtype=config.dtype))
        prompts = [tasks.prompt_ids(problem, tokenizer) for problem in problems]
        for problem, [answer] in zip(problems, sampler.generate(prompts, 1, params)):
            print(f"\n{name}: {problem.question}")
            print(textwrap.indent(answer.text(tokenizer), "  "))


def summarise(config: Config, out: Path, results: dict[str, Result]) -> dict:
    """The numbers of summary.json, but for the seconds."""
    summary = {
        "task": config.task,
        "seed": config.seed,
        "model": config.model,
        "chains": len(cli.read_jsonl(out / "chains.jsonl")),
    }
    return summary | {name: result.summary() for name, result in results.items()}


def main(config: Config) -> None:
    with going_on_in(config.out):
        demonstrate(config)


def demonstrate(config: Config) -> None:
    """All stages that are not done yet, and what came of them."""
    counts = (config.attempted, config.chains, config.steps, config.heldout, config.samples)
    if min(counts) < 1:
        raise UserError("all counts must be at least 1")
    out = Path(config.out)
    flags = dataclasses.asdict(config)
    del flags["out"], flags["baseline"]
    seconds = open_folder(flags, out)
    stages = Stages(out, seconds)
    run_stages(config, out, stages)
    of_demo = {name: value for name, value in seconds.items() if "baseline" not in name}

    results = dict(zip(names(config, out), in_order(out / "evaluation")))
    metrics = read_metrics(out / "rl" / "metrics.jsonl")
    draw(results, metrics, out / "demo_lm.png")
    summary = summarise(config, out, results)
    summary["seconds"] = round(sum(of_demo.values()), 1)
    summary["seconds_by_stage"] = {name: round(value, 1) for name, value in of_demo.items()}
    if config.baseline or (out / "evaluation-baseline" / "budgets.png").exists():
        name = BASELINE[config.task]
        results[name] = baseline(config, out, stages)
        summary[name] = results[name].summary()
    cli.write_text(out / "summary.json", json.dumps(summary, indent=2) + "\n")

    show_samples(config, out)
    print(f"\n{evaluate.table(results)}\n")
    evaluate.print_gain(results["SFT"], results["RL"])
    print(f"in {summary['seconds']:.0f} s; the figure is {out / 'demo_lm.png'}")
    if BASELINE[config.task] not in results:
        again = shlex.join(["python", "demo_lm.py", *words_of(config), "--baseline"])
        print(f"What would SFT alone have given?  {again}")
    if config.task == "sums":
        print("Where longer thinking pays:  python demo_lm.py --task digits --out DIR")
    asked = cli.read_jsonl(out / "heldout.jsonl")[0]
    words = ["python", "sample.py", "--model", str(out / "rl")]
    words += ["--verify", asked["answer"], asked["problem"]]
    print(f"Ask it:  {shlex.join(words)}")


if __name__ == "__main__":
    cli.run(main, Config)
