"""RL samples per second: our step beside TRL's GRPOTrainer and RLOOTrainer, on one model, CPU or GPU, in one run.

    python benchmarks/rl_bench.py           # the demo's SFT model; where there is none, one trained here
    python benchmarks/rl_bench.py --model .cache/SmolLM2-135M --prompts 8 --samples 8 --max-tokens 64 --steps 2

A step is everything: sampling, rewards, log-probs of the reference, one update. All have the same prompts, K, length
limit, temperature 1, batch and reference model, in fp32 (bf16 products on a GPU). The contenders take turns, each in a
process of its own, and the medians over all steps but each process's first are printed.

The reward is a coin toss (one bit of a checksum of the response): so every group has mixed rewards, nothing is dropped,
and the step does not depend on what the model can do. Ours: the recipe `grpo`, which is what GRPOTrainer computes, and
`t1`, which adds the penalties, the entropy bonus and the moving anchor. TRL is installed into .cache/trl the first
time; where that is not possible (no network), ours runs alone. A peer that fails is one line.
"""

import json
import statistics
import subprocess
import sys
import time
import zlib
from dataclasses import asdict, dataclass, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import cli  # noqa: E402
import tasks  # noqa: E402
from benchmarks.rows import RowFile, skipping  # noqa: E402
from devices import pick_dtype  # noqa: E402
from model import model_folder  # noqa: E402
from verify import Verdict  # noqa: E402

CONTENDERS = ("nanot1 grpo", "nanot1 t1", "trl grpo", "trl rloo")
TRL = ROOT / ".cache" / "trl"
BETA = 0.04  # weight of the KL: not 0, so that everyone pays for a reference model, as T1 does


@dataclass
class Config:
    model: str = ""
    """Hugging Face or run folder. Default: runs/demo/sft, or else a model trained here for a minute."""
    prompts: int = 32
    """Prompts per step."""
    samples: int = 16
    """K, responses per prompt."""
    max_tokens: int = 256
    """Longest response."""
    steps: int = 3
    """Timed steps per process and round; one more, not timed, comes first."""
    rounds: int = 2
    """How often each contender has its turn."""
    contender: Literal["all", "nanot1 grpo", "nanot1 t1", "trl grpo", "trl rloo"] = "all"
    """One alone, in this process: prints a JSON line."""
    json: str = ""
    """File to append a line of JSON to for each contender. Default: benchmarks/gpu.jsonl on a GPU, none elsewhere."""


def coin(response: str) -> float:
    return float(zlib.crc32(response.encode()) & 1)


def problems(config: Config) -> list[tasks.Problem]:
    return list(islice(tasks.countdown(0), config.prompts * (config.steps + 1)))


# ---------------------------------------------------------------------------------------------------- ours


def run_ours(config: Config, recipe: str) -> dict:
    import parallel
    import rl

    def judge(problem: tasks.Problem, response: str) -> Verdict:
        return Verdict("correct" if coin(response) else "wrong")

    tasks.TASKS["countdown"] = replace(tasks.TASKS["countdown"], judge=judge)
    flags = rl.Config(
        model=config.model, out="", task="countdown", recipe=recipe, steps=config.steps + 1,
        prompts=config.prompts, samples=config.samples, max_tokens=config.max_tokens,
        temperature=1.0, kl_coef=BETA, lr=1e-6,
    )  # fmt: skip
    seconds, lengths, dropped = [], [], []
    with parallel.session("auto") as world:
        flags = replace(flags, dtype=pick_dtype("auto", world.device))
        learner = rl.make_learner(flags, rl.resolve(flags), problems(config), world)
        for step in range(1, config.steps + 2):
            began = time.perf_counter()
            metrics, _ = rl.run_step(learner, step)
            seconds.append(time.perf_counter() - began)
            lengths.append(metrics["length"])
            dropped.append(metrics["dropped"])
    return {
        "seconds": seconds[1:],
        "length": statistics.mean(lengths),
        "dropped": statistics.mean(dropped),
    }


# ---------------------------------------------------------------------------------------------------- TRL


def run_trl(config: Config, name: str) -> dict:
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    trainer_class, config_class, own = {
        "grpo": (trl.GRPOTrainer, trl.GRPOConfig, {"loss_type": "grpo"}),
        "rloo": (trl.RLOOTrainer, trl.RLOOConfig, {}),
    }[name]
    ends, lengths = [], []

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            ends.append(time.perf_counter())

    def reward(completions, completion_ids, **kwargs):
        lengths.extend(map(len, completion_ids))
        return [coin(completion[0]["content"]) for completion in completions]

    gpu, batch = torch.cuda.is_available(), config.prompts * config.samples
    args = config_class(
        output_dir=str(ROOT / ".cache" / "trl-out"), max_steps=config.steps + 1, learning_rate=1e-6, beta=BETA,
        num_generations=config.samples, max_completion_length=config.max_tokens, temperature=1.0,
        per_device_train_batch_size=batch, gradient_accumulation_steps=1, steps_per_generation=1,
        gradient_checkpointing=False, use_cpu=not gpu, bf16=gpu, dataloader_pin_memory=gpu, report_to="none",
        save_strategy="no", logging_strategy="no", disable_tqdm=True, shuffle_dataset=False, **own,
    )  # fmt: skip
    trainer_class(
        model=AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32),
        args=args,
        reward_funcs=reward,
        train_dataset=Dataset.from_list(
            [{"prompt": tasks.messages(problem)} for problem in problems(config)]
        ),
        processing_class=AutoTokenizer.from_pretrained(config.model),
        callbacks=[Clock()],
    ).train()
    seconds = [after - before for before, after in pairwise(ends)]
    return {"seconds": seconds, "length": statistics.mean(lengths), "dropped": 0.0}


def install_trl() -> bool:
    """TRL in an environment of its own, with the torch that we run (a looser range would pull another build)."""
    if not (TRL / "ready").exists():
        print("installing TRL into .cache/trl", file=sys.stderr)
        pip, version = (
            [str(TRL / "bin" / "python"), "-m", "pip", "install", "-q"],
            torch.__version__.split("+")[0],
        )
        for command in (
            [sys.executable, "-m", "venv", str(TRL)],
            [*pip, f"torch=={version}"],
            [*pip, "trl", "-r", str(ROOT / "requirements.txt"), f"torch=={version}"],
        ):
            if subprocess.run(command).returncode:
                return False
        (TRL / "ready").touch()
    return True


# ---------------------------------------------------------------------------------------------------- the run


def demo_model(config: Config) -> str:
    """The demo's SFT model; where the demo was not run, one trained on a tenth of its chains."""
    made = ROOT / ".cache" / "bench-sft"
    for folder in (ROOT / "runs" / "demo" / "sft", made):
        if (folder / "model" / "config.json").exists():
            return str(folder / "model")
    flags = ["--task", "countdown", "--chains", "4000", "--epochs", "1"]
    resume = ["--resume"] if made.exists() else []
    subprocess.run(
        [sys.executable, "sft.py", *flags, "--out", str(made), *resume], cwd=ROOT, check=True
    )
    return str(made / "model")


def run_child(config: Config, contender: str) -> dict:
    python = str(TRL / "bin" / "python") if contender.startswith("trl") else sys.executable
    flags = [
        f"--{name.replace('_', '-')}={value}"
        for name, value in (asdict(config) | {"contender": contender}).items()
    ]
    child = subprocess.run([python, __file__, *flags], stdout=subprocess.PIPE, text=True)
    if child.returncode:
        raise cli.UserError(
            f"{contender} failed (exit code {child.returncode}); its messages are above"
        )
    return json.loads(child.stdout.strip().split("\n")[-1])


def main(config: Config) -> None:
    config.model = str(model_folder(config.model or demo_model(config)))  # TRL knows no run folders
    if config.contender != "all":
        family, name = config.contender.split()
        print(json.dumps(run_ours(config, name) if family == "nanot1" else run_trl(config, name)))
        return
    contenders = [name for name in CONTENDERS if name.startswith("nanot1")]
    if install_trl():
        contenders = list(CONTENDERS)
    else:
        print("TRL cannot be installed here: ours alone", file=sys.stderr)
    file = RowFile(config.json, keep=torch.cuda.is_available())
    runs: dict[str, list[dict]] = {}
    for _ in range(config.rounds):
        for name in contenders:
            failures = (cli.UserError,) if name.startswith("trl") else ()
            with skipping(name, *failures):
                found = run_child(config, name)
                runs.setdefault(name, []).append(found)
                print(f"{name}: {found}", file=sys.stderr)
    batch = config.prompts * config.samples
    print(
        f"{config.model}: {config.prompts} prompts x {config.samples}, at most {config.max_tokens} tokens"
    )
    print(f"{'':<14}{'samples/s':>10}{'s/step':>9}{'(min to max)':>16}{'tokens':>8}{'dropped':>9}")
    for name, parts in runs.items():
        seconds = [value for part in parts for value in part["seconds"]]
        step, spread = statistics.median(seconds), f"({min(seconds):.2f} to {max(seconds):.2f})"
        length, dropped = (
            statistics.mean(part[key] for part in parts) for key in ("length", "dropped")
        )
        print(
            f"{name:<14}{batch / step:>10.1f}{step:>9.2f}{spread:>16}{length:>8.1f}{100 * dropped:>8.0f}%"
        )
        file.add("rl", name, **{"samples/s": batch / step, "s/step": step, "tokens": length})


if __name__ == "__main__":
    cli.run(main, Config)
