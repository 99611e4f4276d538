"""cli.py: what goes wrong around a command. Paths, full disks, two processes, signals."""

import contextlib
import dataclasses
import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import cli
import cot
import demo
import evaluate
import parallel
import rl
import rlsp
import runfolder
import sample
import sft
import verify
from benchmarks import plan

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def run(main, flags, args=()):
    """`cli.run`, without leaving its signal handlers to the other tests."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        cli.run(main, flags, list(args))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


# --- paths ----------------------------------------------------------------------------------------

RL_PATHS = ("model", "out", "data", "export")
PATHS = {  # every flag that names a file or a folder
    sft: ("out", "data", "model"),
    rl: RL_PATHS,
    rlsp: (*RL_PATHS, "judge"),
    evaluate: ("model", "data", "answer-model", "curate", "out"),
    cot: ("out", "data", "model", "critic", "rewrite"),
    sample: ("model",),
    demo: ("out",),
    verify: ("file",),
    plan: ("model",),
}


@pytest.mark.parametrize("command", PATHS, ids=lambda command: command.__name__)
@pytest.mark.parametrize("form", ["--{}=~/x", "--{} ~/x", "--{} ~"])
def test_paths_of_all_commands_begin_at_home(command, form, monkeypatch, tmp_path):
    """Bug: --out ~/x in quotes, or --out=~/x, makes a folder called `~` where one stands."""
    monkeypatch.setenv("HOME", str(tmp_path))
    seen = []

    def main(config):
        seen.append(config)

    args = ["--gpus", "8"] if command is plan else []
    for name in PATHS[command]:
        args += form.format(name).split()
    run(main, command.Config, args)
    wanted = str(tmp_path) if form.endswith("~") else f"{tmp_path}/x"
    for name in PATHS[command]:
        value = getattr(seen[0], name.replace("-", "_"))
        assert value in (wanted, [wanted], (wanted,)), name


def test_lists_defaults_and_a_forks_flags_begin_at_home(monkeypatch, tmp_path):
    """Bug: only the flags that we knew are expanded, or only the first of several models."""

    @dataclasses.dataclass
    class Fork(rl.Config):
        critic: Path = Path("~/critic")

    monkeypatch.setenv("HOME", str(tmp_path))
    seen = []
    run(lambda config: seen.append(config), Fork, ["--model", "m", "--out", "~/x"])
    assert seen[0].critic == tmp_path / "critic"
    several = ["--model", "~/a", "b~", "~/c"]
    run(lambda config: seen.append(config), evaluate.Config, several)
    assert seen[1].model == [f"{tmp_path}/a", "b~", f"{tmp_path}/c"]


def test_a_question_is_no_path(monkeypatch, tmp_path):
    """Bug: a question or an answer that begins with ~ is rewritten."""
    monkeypatch.setenv("HOME", str(tmp_path))
    seen = []
    run(lambda config: seen.append(config), sample.Config, ["--model", "m", "~/x is what?"])
    assert seen[0].question == "~/x is what?"
    run(lambda config: seen.append(config), verify.Config, ["~ 5", "~/5"])
    assert (seen[1].response, seen[1].gold) == ("~ 5", "~/5")
