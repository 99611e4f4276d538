"""The folder that `sft.py` and `rl.py` write their run into: config.json, metrics.jsonl, a figure; and the guard.

Read in this order: opening a folder, or refusing to (nothing is ever overwritten); its metrics; their figure; what lets
a step pass. The checkpoints in it are `parallel.Checkpoints`'.
"""

import contextlib
import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

from cli import UserError, check_parent, write_text
from parallel import World, barrier, same_on_all_ranks


def check_run(out: str | Path, config: Any, resume: bool, may_change: tuple[str, ...]) -> dict[str, Any]:
    """UserError if this run cannot be started in, or resumed from, the folder `out`. Writes nothing: for the first
    second of a command. Arguments as for `open_run`; returns the flags as JSON holds them."""
    flags = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    same_on_all_ranks(flags)
    out = Path(out)
    if not resume:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{out} exists already: --resume to continue the run in it, or choose another --out")
        check_parent(out)
        return flags
    if not out.is_dir():
        raise UserError(f"--resume: there is no run in {out}")
    try:
        first = json.loads((out / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"--resume: {out} is no run, or only half of one: no readable config.json in it") from None
    names = [name for name in flags if name not in may_change and flags[name] != first.get(name)]
    if names:
        changes = (f"--{name.replace('_', '-')} {first.get(name)} (now {flags[name]})" for name in names)
        raise UserError(f"--resume: {out} was started with other flags: {', '.join(changes)}")
    return flags


def open_run(out: str | Path, config: Any, resume: bool, may_change: tuple[str, ...], world: World) -> Path:
    """`check_run`, then create the folder with its config.json (unless resumed). Nothing is ever overwritten.

    config: the command's dataclass. may_change: its fields that may differ from the first start (`steps`, `resume`).
    Call it when all inputs have been read: a run whose data does not exist should leave no folder behind.
    """
    out, flags = Path(out), check_run(out, config, resume, may_change)
    barrier()  # all have looked before anything is there
    if world.main and not resume:
        staging = out.with_name(out.name + ".partial")  # so that no kill leaves a folder without its config.json
        (staging / "checkpoints").mkdir(parents=True, exist_ok=True)
        write_text(staging / "config.json", json.dumps(flags, indent=2) + "\n")
        staging.rename(out)
    return out


class MetricsLog:
    """metrics.jsonl: one line per step, flushed; on other ranks than 0 it swallows everything.

    A resumed run goes on from its checkpoint's `step`: lines after that are cut off, as they will be written again, so
    the file ends up as that of a run never interrupted.
    """

    def __init__(self, out: Path, step: int, world: World, backend: str = "none"):
        self.path = out / "metrics.jsonl"
        self.file = self.tensorboard = self.wandb = None
        if not world.main:
            return
        kept = [row for row in read_metrics(self.path) if row["step"] <= step]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (open as long as the run)
        try:
            if backend == "tensorboard":
                from torch.utils.tensorboard import SummaryWriter

                self.tensorboard = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)
            elif backend == "wandb":
                import wandb

                self.wandb = wandb.init(project="nanoT1", name=out.name, dir=str(out))
        except ImportError:
            raise UserError(f"--log {backend}: {backend} is not installed") from None

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        if self.file is None:
            return
        self.file.write(json.dumps({"step": step} | metrics) + "\n")
        self.file.flush()
        if self.tensorboard:
            for name, value in metrics.items():
                self.tensorboard.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(metrics, step=step)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line that was cut off by a kill is left out."""
    rows = []
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            rows.append(json.loads(line))
    return rows


def plot(metrics: str | Path, path: str | Path, panels: dict[str, list[str]]) -> None:
    """Draw a metrics.jsonl: one panel per title, with a line for each of its metrics over the steps."""
    from matplotlib.figure import Figure  # here, not above: a second of importing that the other ranks need not pay

    rows = read_metrics(metrics)
    columns = min(3, len(panels))
    height = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.2 * columns, 2.8 * height), layout="constrained")
    axes = figure.subplots(height, columns, squeeze=False)
    for axis, (title, names) in zip(axes.flat, panels.items()):
        for name in names:
            points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            axis.plot([x for x, _ in points], [y for _, y in points], label=name, linewidth=1.2)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        if len(names) > 1:
            axis.legend(fontsize=7)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    partial = Path(path).with_suffix(".partial")
    figure.savefig(partial, format="png", dpi=120)
    os.replace(partial, path)


@dataclasses.dataclass
class Guard:
    """Lets a step pass if its numbers are finite; skips and counts it if not; UserError after `limit` in a row."""

    limit: int = 5
    skipped: int = 0
    in_a_row: int = 0

    def allows(self, **values: float) -> bool:
        """values: the step's loss and gradient norm, the same on every rank (so that all skip, or none)."""
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if not bad:
            self.in_a_row = 0
            return True
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        if self.in_a_row >= self.limit:
            raise UserError(f"stopped: {' and '.join(bad)} not finite for {self.limit} steps in a row")
        return False
