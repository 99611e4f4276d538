"""A fork of rl.py in one file of its own, anywhere: the README's promise, as a user would try it.

A graded reward, an advantage, a task with a judge and problems of its own, and a flag. Each is a
function and a line.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rl
import runfolder
import sft
from model import load_pretrained, read_config, save_pretrained

ROOT = Path(__file__).resolve().parent.parent

FORK = '''"""A recipe and a task of one's own."""

import dataclasses
import itertools

import rl
import tasks
import verify


@dataclasses.dataclass
class Config(rl.Config):
    longest: int = 9
    """Longest word."""


def judge(problem, response):
    if problem.answer in response:
        return verify.Verdict("correct")
    shared = sum(letter in response for letter in problem.answer)
    return verify.Verdict("wrong", score=0.5 * shared / len(problem.answer))


def problems(flags, heldout):
    for number in itertools.count(flags.seed):
        word = "abc"[number % 3] * (1 + number % flags.longest)
        yield tasks.Problem(f"Spell {word} backwards.", word[::-1], "reverse")


def reward(responses, config):
    return rl.outcome(responses, config) - 0.001 * rl.lengths(responses)


def advantage(rewards):
    return rewards - rewards.median(dim=1, keepdim=True).values


tasks.TASKS["reverse"] = tasks.Task(judge, instruction=" Nothing else.", problems=problems)
own = {"reward": reward, "advantage": advantage, "penalty": "none"}
rl.RECIPES["mine"] = dataclasses.replace(rl.RECIPES["t1"], **own)

if __name__ == "__main__":
    rl.command(Config)
'''
FLAGS = {
    "recipe": "mine",
    "task": "reverse",
    "longest": 5,
    "prompts": 3,
    "samples": 4,
    "lr": 1e-3,
    "device": "cpu",
    "max-tokens": 16,
    "checkpoint-every": 1,
    "show-every": 0,
}


@pytest.fixture(scope="module")
def fork(tmp_path_factory) -> Path:
    """A folder that holds the fork's file and a small model, far from rl.py."""
    folder = tmp_path_factory.mktemp("fork")
    (folder / "my_recipe.py").write_text(FORK)
    model, tokenizer = sft.begin(sft.Config(out=""))
    save_pretrained(model, folder / "model", tokenizer)
    return folder


def run(fork: Path, out: str, ranks: int = 1, **more) -> subprocess.CompletedProcess:
    words = [sys.executable]
    if ranks > 1:
        words += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    words += ["my_recipe.py", "--model", "model", "--out", out]
    for name, value in (FLAGS | more).items():
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    return subprocess.run(
        words, cwd=fork, env=environment, capture_output=True, text=True, timeout=200
    )


def metrics(folder: Path) -> list[dict]:
    return runfolder.read_metrics(folder / "metrics.jsonl")


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_fork_runs_and_is_resumed(fork, ranks):
    """Bug: a fork's names are refused, its functions not called or only on one rank, its flags
    unknown, or its run not resumed because a function is no JSON."""
    straight, broken = f"straight-{ranks}", f"broken-{ranks}"
    for done in (
        run(fork, straight, ranks, steps=3),
        run(fork, broken, ranks, steps=2),
        run(fork, broken, ranks, steps=3, resume=True),
    ):
        assert done.returncode == 0, done.stderr[-3000:]
    rows, others = metrics(fork / straight), metrics(fork / broken)
    assert [row["loss"] for row in rows] == [row["loss"] for row in others] and len(rows) == 3
    one, other = load_pretrained(fork / straight), load_pretrained(fork / broken)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters()))
    start = load_pretrained(fork / "model")
    assert any(not torch.equal(a, b) for a, b in zip(one.parameters(), start.parameters()))
    rewards = [row["reward"] for row in rows]
    assert any(reward % 0.5 for reward in rewards) and all(
        row["dropped"] < 1 for row in rows
    )  # graded
    config = json.loads((fork / straight / "config.json").read_text())
    assert config["recipe"] == "mine" and config["longest"] == 5


def test_a_fork_on_two_ranks_is_that_on_one(fork):
    """Bug: a fork's reward sees a rank's own responses alone, or in another order."""
    for ranks in (1, 2):
        if not (fork / f"straight-{ranks}").exists():
            run(fork, f"straight-{ranks}", ranks, steps=3)
    one, two = metrics(fork / "straight-1"), metrics(fork / "straight-2")
    for row, other in zip(one, two, strict=True):
        for name in ("reward", "accuracy", "length", "loss", "dropped"):
            assert other[name] == pytest.approx(row[name], rel=1e-4, abs=1e-6)


MEASURE = '''"""evaluate.py for the fork's task."""

import dataclasses

import cli
import evaluate
import my_recipe  # which registers the task


@dataclasses.dataclass
class Config(evaluate.Config):
    longest: int = my_recipe.Config.longest


if __name__ == "__main__":
    cli.run(evaluate.main, Config)
'''


def test_a_task_of_ones_own_is_evaluated(fork):
    """Bug: evaluate.py knows the project's own task only, and a fork's policy cannot be measured:
    no pass@k, no vote among its answers, no curve against the budget."""
    (fork / "measure.py").write_text(MEASURE)
    words = (
        "measure.py --model model --task reverse --limit 3 --n 4 --k 1,4 --budgets 4,8 --out own"
    )
    done = subprocess.run(
        [sys.executable, *words.split()],
        cwd=fork,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    [model] = json.loads((fork / "own" / "results.json").read_text())["models"].values()
    summary = model["summary"]
    assert summary["problems"] == 3 and summary["samples"] == 4
    assert set(summary["budget_curve"]) == {"4", "8"} and "maj@4" in summary


def test_unknown_names_are_one_line(fork):
    """Bug: a misspelt recipe ends in a KeyError, or trains something else."""
    for flag, choices in (
        ("recipe", "t1, grpo, dr_grpo, dapo, reinforce, mine"),
        ("task", "countdown, reverse"),
    ):
        done = run(fork, "nowhere", **{flag: "mina"})
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert f"error: --{flag} mina is none of {choices}" in done.stderr
    assert not (fork / "nowhere").exists()


def test_a_finite_task_says_so(fork, tmp_path):
    """Bug: a generator that ends stops the run in the middle, as an IndexError."""
    (fork / "finite.py").write_text(FORK.replace("itertools.count(flags.seed)", "range(5)"))
    words = [
        sys.executable,
        "finite.py",
        "--model",
        "model",
        "--out",
        "finite",
        "--task",
        "reverse",
        "--steps",
        "2",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        words, cwd=fork, env=environment, capture_output=True, text=True, timeout=100
    )
    assert (
        done.returncode == 2
        and "error: --task reverse: makes 5 problems, the run needs 64" in done.stderr
    )


def test_the_shortest_command_fits_the_demos_model(fork, tmp_path, monkeypatch):
    """Bug: rl.py's default of --max-tokens does not fit the model that sft.py makes by default."""
    seen = {}

    def stop(learner, step, train_step):
        seen["max_tokens"] = learner.config.max_tokens
        raise KeyboardInterrupt

    monkeypatch.setattr(rl, "run_step", stop)
    with pytest.raises(KeyboardInterrupt):
        rl.main(rl.Config(model=str(fork / "model"), task="countdown", out=str(tmp_path / "run")))
    context = read_config(fork / "model").context
    assert context == 512 and context - 40 < seen["max_tokens"] < context
