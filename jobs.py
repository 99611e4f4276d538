"""Commands that wait for each other, several at a time, each of them run once: what findings.py
stands on.

A `Stage` is one command and the folder or file that it makes; a `Task` is stages that run one after
the other, perhaps behind another task. `Jobs` runs tasks as processes of one thread. It notes in
OUT/runs.json what is done, so that the same tasks, given again, go on where they were stopped.
Beside what a command makes stands its log: `rl.log` beside `rl`.
"""

import dataclasses
import functools
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

import cli
import demo
from cli import UserError

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Stage:
    """One command. It runs in OUT, and its paths are relative to it: so OUT may be moved."""

    makes: Path
    script: str
    flags: Any  # the script's Config
    resumes: bool = True  # False: what it makes is whole as soon as it is there

    def record(self) -> dict:
        """The flags as JSON holds them: another record is another command."""
        flags = dataclasses.asdict(self.flags) | {"resume": False}
        return json.loads(json.dumps(flags, default=str))


@dataclass(frozen=True)
class Task:
    home: Path  # its name, and the folder that holds what its stages make
    stages: list[Stage]
    needs: Path | None = None  # the home of the task that it waits for, if any


class Failed(Exception):
    """A command has failed: its log, and that one's last line."""


def launch(words: list[str], folder: Path, log: Path) -> subprocess.Popen:
    """Start a script of ours in `folder`, on one thread; what it says is added to `log`."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with open(log, "a", encoding="utf-8") as file:
        return subprocess.Popen(
            [sys.executable, str(HERE / words[0]), *words[1:]],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            process_group=0,  # a terminal's Ctrl-C is for us alone: we let it end its checkpoint
        )


def last_line(log: Path) -> str:
    """The last thing that a command said. Every redrawing of a progress bar is a line."""
    lines = cli.read_text(log).replace("\r", "\n").split("\n") if log.exists() else []
    said = [line for line in lines if line.strip()]
    return said[-1] if said else "it said nothing"


@functools.cache
def machine() -> str:
    """The CPU's name and how many cores it has, for whoever compares seconds."""
    name = "a CPU"
    known = Path("/proc/cpuinfo")
    for line in known.read_text().split("\n") if known.exists() else []:
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
    return f"{name}, {os.cpu_count()} cores"


class Jobs:
    """Runs tasks in the folder `out`, `count` processes at a time."""

    def __init__(self, out: Path, count: int):
        """UserError if `out` is something else's."""
        self.out, self.count = out, count
        self.file = out / "runs.json"
        if not self.file.exists() and not cli.is_new(out):
            raise UserError(f"{out} exists and holds no findings: choose another --out")
        self.known = cli.read_json(self.file) if self.file.exists() else {}
        self.lock = threading.Lock()  # of `known`, and of what follows
        self.processes: list[subprocess.Popen] = []
        self.stopping = False

    def has(self, stage: Stage) -> bool:
        done = self.known.get(str(stage.makes), {}).get("done", False)
        return done and (self.out / stage.makes).exists()

    def is_done(self, task: Task) -> bool:
        return all(self.has(stage) for stage in task.stages)

    def cost(self, tasks: list[Task]) -> str:
        """What these have taken, over all interruptions, and on which machines."""
        known = [self.known[str(stage.makes)] for task in tasks for stage in task.stages]
        minutes = sum(command["seconds"] for command in known) / 60
        machines = sorted({command["machine"] for command in known})
        shared = "processes of one core side by side, shared runs included"
        return f"{minutes:.0f} minutes, {shared}; {'; '.join(machines)}."

    def check(self, task: Task) -> None:
        """UserError if something of it was begun with other flags, or is not ours."""
        for stage in task.stages:
            made, name = self.out / stage.makes, str(stage.makes)
            if cli.is_new(made):
                continue
            if name not in self.known:
                raise UserError(f"{made} is there, but not in {self.file}: choose another --out")
            before, changes = self.known[name]["flags"], []
            for flag, value in stage.record().items():
                if before.get(flag, value) != value:  # a flag that is new is at its default
                    changes.append(f"--{flag.replace('_', '-')} {before[flag]}, now {value}")
            if changes:
                raise UserError(
                    f"{made} was made with other flags ({'; '.join(changes)}): "
                    "remove it, or choose another --out"
                )

    def run(self, tasks: list[Task]) -> dict[Path, str]:
        """Do what is not done yet. {home of a task that failed: why}; the others are done."""
        futures: dict[Path, Future] = {}
        bar = tqdm(total=len(tasks), desc="runs", unit="run", smoothing=0)
        with bar, ThreadPoolExecutor(self.count) as pool:
            # First in, first out: what a task waits for has begun before it.
            for task in tasks:
                needed = futures.get(task.needs)
                futures[task.home] = pool.submit(self.run_task, task, needed)
            try:
                for _ in as_completed(futures.values()):
                    bar.update()
            except KeyboardInterrupt:
                self.stop()
                pool.shutdown(cancel_futures=True)
                raise
        failures = {}
        for home, future in futures.items():
            try:
                future.result()
            except Failed as failure:
                failures[home] = str(failure)
        return failures

    def stop(self) -> None:
        """End the processes. Each completes the checkpoint that it is writing."""
        with self.lock:
            self.stopping = True
            for process in self.processes:
                process.terminate()

    def run_task(self, task: Task, needed: Future | None) -> None:
        try:
            if needed:
                needed.result()
        except (Failed, CancelledError):
            raise Failed(f"not begun: it needs {task.needs}") from None
        for stage in task.stages:
            if not self.has(stage):
                self.run_stage(stage)

    def run_stage(self, stage: Stage) -> None:
        made = self.out / stage.makes
        made.parent.mkdir(parents=True, exist_ok=True)
        if made.exists() and not stage.resumes:  # a kill came before it was noted
            self.note(stage, 0.0, done=True)
            return
        words = [stage.script, *demo.words_of(stage.flags)]
        if not cli.is_new(made):
            words.append("--resume")
        log = made.with_name(made.name + ".log")
        self.note(stage, 0.0, done=False)
        began = time.perf_counter()
        with self.lock:
            if self.stopping:
                raise Failed("interrupted")
            process = launch(words, self.out, log)
            self.processes.append(process)
        code = process.wait()
        with self.lock:
            self.processes.remove(process)
        self.note(stage, time.perf_counter() - began, done=code == 0)
        if code:
            raise Failed(f"{log}: {last_line(log)}")

    def note(self, stage: Stage, seconds: float, done: bool) -> None:
        """Remember that a command was begun, or is done, and add to its seconds."""
        with self.lock:
            before = self.known.get(str(stage.makes), {})
            self.known[str(stage.makes)] = {
                "flags": stage.record(),
                "seconds": before.get("seconds", 0.0) + seconds,
                "machine": machine(),
                "done": done,
            }
            cli.write_text(self.file, json.dumps(self.known, indent=1) + "\n")
