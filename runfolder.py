"""The folder that `sft.py` and `rl.py` write a run into, and what they do alike around their steps.

It holds config.json, inputs.json, metrics.jsonl, metrics.png, checkpoints/ and, at the end, model/.
While a process is at it, .lock says which.

Read in this order: opening a folder, or refusing to (nothing is ever overwritten, and no two
processes write into one); its metrics; their figure; the guard that lets a step pass; and `Run`,
which holds them together around the steps of a training loop. How a checkpoint is written is in
parallel.py.
"""

import contextlib
import dataclasses
import importlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

import cli
from cli import UserError, check_parent, read_json, whole_file, write_text, writing
from devices import pick_dtype
from parallel import (
    Checkpoints,
    Scorer,
    World,
    barrier,
    complete_checkpoints,
    load_checkpoint,
    same_on_all_ranks,
    save_model,
    step_of,
)
from tokenizer import Tokenizer

# --- the folder -----------------------------------------------------------------------------------


@contextlib.contextmanager
def reserved(out: str | Path, world: World) -> Iterator[None]:
    """Keep the folder of a run to this command. UserError if another process runs in it.

    A command that is interrupted, or has no place to write, says what of the run is kept.
    """
    lock = contextlib.nullcontext()
    if world.main:
        lock = cli.holding(out, folder=True)
    with cli.telling(lambda: kept(Path(out))), lock:
        yield


def kept(out: Path) -> str:
    """What a run that ends early leaves in its folder, and how to go on."""
    saved = complete_checkpoints(out / "checkpoints")
    if saved:
        return f"checkpoint of step {step_of(saved[-1])} in {out}; go on with --resume"
    if (out / "config.json").exists():
        return f"no checkpoint yet in {out}; --resume starts from the first step"
    return "nothing was written"


def check_run(
    out: str | Path, config: Any, resume: bool, may_change: tuple[str, ...]
) -> dict[str, Any]:
    """UserError if this run cannot be started in, or resumed from, the folder `out`.

    Writes nothing: it is meant for the first second of a command. Arguments as for `open_run`.
    Returns the flags as JSON holds them.
    """
    flags = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    same_on_all_ranks(flags)
    check_backend(flags.get("log", "none"))
    out = Path(out)
    if resume:
        check_same_run(out, flags, may_change)
        return flags
    if not cli.is_new(out):
        raise UserError(
            f"{out} exists already: --resume to continue the run in it, or choose another --out"
        )
    check_parent(out)
    return flags


def with_dtype(config: Any, world: World) -> Any:
    """The flags with what --dtype auto stands for: a run keeps it, so config.json has to name it.

    A resumed run goes on in the dtype that it began with, on whatever device. UserError if the
    device does not have it.
    """
    name = config.dtype
    if config.resume and name == "auto":
        with contextlib.suppress(UserError):  # no run there: `check_run` says so
            name = read_json(Path(config.out) / "config.json").get("dtype", name)
    return dataclasses.replace(config, dtype=pick_dtype(name, world.device, say=world.main))


def check_same_run(out: Path, flags: dict[str, Any], may_change: tuple[str, ...]) -> None:
    """UserError if `out` holds no run, or one that was started with other flags."""
    if cli.is_new(out):
        raise UserError(f"--resume: there is no run in {out}")
    try:
        first = read_json(out / "config.json")
    except UserError:
        raise UserError(
            f"--resume: {out} is no run, or only half of one: no readable config.json in it"
        ) from None
    changes = []
    for name, value in flags.items():
        if name not in may_change and value != first.get(name):
            changes.append(f"--{name.replace('_', '-')} {first.get(name)} (now {value})")
    unknown = first.keys() - flags.keys()
    if changes and unknown:
        raise UserError(
            f"--resume: {out} is the run of another command, or of another version of this one: it "
            f"has --{min(unknown).replace('_', '-')}"
        )
    if changes:
        raise UserError(f"--resume: {out} was started with other flags: {', '.join(changes)}")


def open_run(
    out: str | Path, config: Any, resume: bool, may_change: tuple[str, ...], world: World
) -> Path:
    """`check_run`, then create the folder with its config.json, unless the run is resumed.

    config: the command's dataclass. may_change: its fields that may differ from the first start
    (`steps`, `resume`). Call it when all inputs have been read: a run whose data does not exist
    should leave no folder behind.
    """
    out = Path(out)
    flags = check_run(out, config, resume, may_change)
    barrier()  # no rank creates anything before all of them have looked
    if world.main and not resume:
        with writing(out):
            # A link may lead to a folder that is not there yet.
            Path(os.path.realpath(out)).mkdir(parents=True, exist_ok=True)
            # First of all: a kill leaves a folder that is new, or a run that can be resumed.
            write_text(out / "config.json", json.dumps(flags, indent=2) + "\n")
            (out / "checkpoints").mkdir()
    return out


# --- metrics --------------------------------------------------------------------------------------


class MetricsLog:
    """metrics.jsonl: one line per step. On ranks other than 0 it swallows everything.

    A resumed run goes on after its checkpoint's `step`. The lines after that are cut off, for these
    steps are done again; so the file ends up as that of a run which was never interrupted.

    remembered: the rows that the checkpoint holds, see `Run.save`. A power cut may have taken their
    lines, or one may be damaged. A row that is in neither is gone, and is named.
    """

    def __init__(
        self,
        out: Path,
        step: int,
        world: World,
        backend: str = "none",
        remembered: Iterable[dict[str, Any]] = (),
    ):
        self.path = out / "metrics.jsonl"
        self.main = world.main
        self.tensorboard = None
        self.wandb = None
        if not self.main:
            return
        if backend == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            with writing(out / "tensorboard"):
                self.tensorboard = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)
        elif backend == "wandb":
            self.wandb = start_wandb(out)
        found = (*read_metrics(self.path), *filter(is_row, remembered))
        rows = {row["step"]: row for row in found}
        lost = [number for number in range(1, step + 1) if number not in rows]
        if lost:
            print(f"{self.path}: the lines of {len(lost)} steps are missing, from {lost[0]} on")
        kept = [json.dumps(rows[number]) + "\n" for number in sorted(rows) if number <= step]
        write_text(self.path, "".join(kept))

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        if not self.main:
            return
        with writing(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step} | metrics) + "\n")
        if self.tensorboard:
            with writing(self.path.with_name("tensorboard")):
                for name, value in metrics.items():
                    self.tensorboard.add_scalar(name, value, step)
        if self.wandb:
            try:
                self.wandb.log(metrics, step=step)
            except Exception as error:  # a network, a quota: the run is worth more than its picture
                tqdm.write(f"--log wandb: {first_line(error)}; the run goes on without it")
                self.wandb = None


def start_wandb(out: Path) -> Any:
    """A run of Weights & Biases, named like the folder. UserError where it refuses to start."""
    import wandb

    try:
        return wandb.init(project="nanoT1", name=out.name, dir=str(out))
    except Exception as error:  # nobody is logged in, no network, ...
        raise UserError(
            f"--log wandb: {first_line(error)} (`wandb login`, or WANDB_MODE=offline; then "
            f"--resume {out})"
        ) from None


def check_backend(backend: str) -> None:
    """UserError if what --log names is not installed, or cannot be imported."""
    try:
        if backend == "tensorboard":
            importlib.import_module("torch.utils.tensorboard")
        elif backend == "wandb":
            importlib.import_module("wandb").init  # noqa: B018 (a mere folder `wandb` has none)
    except (ModuleNotFoundError, AttributeError):
        raise UserError(
            f"--log {backend}: {backend} is not installed: pip install {backend}"
        ) from None
    except Exception as error:  # its own dependencies do not fit together
        raise UserError(
            f"--log {backend}: {backend} cannot be imported ({first_line(error)})"
        ) from None


def first_line(error: Exception) -> str:
    """The first line of what somebody else's library says."""
    return str(error).split("\n")[0] or type(error).__name__


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, without damaged lines: a kill cuts the last one, a disk any."""
    if not Path(path).exists():
        return []
    rows = []
    for line in cli.read_bytes(path).decode("utf-8", errors="replace").split("\n"):
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
            if is_row(row):
                rows.append(row)
    return rows


def is_row(value: Any) -> bool:
    """Whether this is what a line of metrics.jsonl holds: the step, and other numbers by name."""
    if not isinstance(value, dict) or type(value.get("step")) is not int:
        return False
    return value["step"] > 0 and {*map(type, value.values())} <= {int, float}


def without_update(row: dict[str, Any]) -> bool:
    """Whether a step, a line of metrics.jsonl, had nothing to learn from: all groups dropped, or
    no gradient."""
    return row.get("dropped") == 1 or row.get("grad_norm", row.get("loss")) == 0


def line_of(rows: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """The steps and values of one metric, as they are drawn.

    A step without an update says nothing of what only updates have (entropy, KL, loss): a NaN
    leaves a gap there. What is measured only now and then (the held-out loss) has no gaps.
    """
    steps = []
    values = []
    for row in rows:
        value = row.get(name)
        if without_update(row) and (value is None or name == "loss"):
            value = math.nan
        if value is not None:
            steps.append(row["step"])
            values.append(value)
    return steps, values


def plot(metrics: str | Path, path: str | Path, panels: dict[str, list[str]]) -> None:
    """Draw a metrics.jsonl: one panel per title, with a line over the steps for each metric.

    Of several lines in a panel each lies on a wider, paler one, so that equal ones are all seen.
    """
    # Not at the top: importing it takes a second, which the other ranks need not pay.
    from matplotlib.figure import Figure

    rows = read_metrics(metrics)
    columns = min(3, len(panels))
    height = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.2 * columns, 2.8 * height), layout="constrained")
    axes = figure.subplots(height, columns, squeeze=False).flatten()
    for axis, (title, names) in zip(axes, panels.items()):
        measured = [name for name in names if any(row.get(name) is not None for row in rows)]
        for number, name in enumerate(measured):
            above = len(measured) - 1 - number  # how many lines will lie on this one
            width = 1.2 + 2 * above
            axis.plot(
                *line_of(rows, name),
                label=name,
                linewidth=width,
                alpha=1 / (1 + 0.6 * above),
                marker=".",  # for a single step between two gaps; on the line it is not seen
                markersize=2 * width,
                markeredgewidth=0,
            )
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        if measured and len(names) > 1:
            axis.legend(fontsize=7)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    with whole_file(path) as partial:
        figure.savefig(partial, format="png", dpi=120)


# --- the guard ------------------------------------------------------------------------------------


@dataclasses.dataclass
class Guard:
    """Lets a step pass if its numbers are finite. If not, the step is skipped and counted.

    UserError after `limit` such steps in a row.
    """

    limit: int = 5
    skipped: int = 0
    in_a_row: int = 0

    def allows(self, **values: float) -> bool:
        """values: the step's loss and gradient norm, the same on every rank: all skip, or none."""
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if not bad:
            self.in_a_row = 0
            return True
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row >= self.limit:
            raise UserError(
                f"stopped: {' and '.join(bad)} not finite for {self.limit} steps in a row"
            )
        return False


# --- around the steps -----------------------------------------------------------------------------


class Run:
    """What `sft.py` and `rl.py` do alike around their steps.

        with Run(config, MAY_CHANGE, world) as run:   # opens the folder: all inputs are read by now
            run.check_inputs({"model": fingerprint})  # a resumed run must have read the same
            state = run.restore(parts, {"cursor": 0})     # as the last checkpoint has it, if any
            for step in run.steps(100, "rl"):             # 1 to 100, or on from where it was killed
                ...
                run.record(step, metrics, shown={"loss": ...})
                if run.is_due(step, config.checkpoint_every):
                    run.save(step, state)
            run.finish(scorer, tokenizer)                 # OUT/model

    If one process is alone, a checkpoint that is being written is completed first, however the
    block ends.

    config: the command's dataclass, with `out`, `resume` and `log`. may_change: see `open_run`.
    keep, keep_every: see `parallel.Checkpoints`. max_skips: the guard's limit.
    """

    def __init__(
        self,
        config: Any,
        may_change: tuple[str, ...],
        world: World,
        keep: int = 2,
        keep_every: int = 0,
        max_skips: int = 5,
    ):
        self.config = config
        self.world = world
        self.keep = keep
        self.keep_every = keep_every
        self.out = open_run(config.out, config, config.resume, may_change, world)
        self.guard = Guard(max_skips)
        self.checkpoints: Checkpoints | None = None  # from the first step on
        self.bar: tqdm | None = None  # as well
        self.rows: list[dict[str, Any]] = []  # of metrics.jsonl, since the last checkpoint

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *failure: object) -> None:
        if self.bar is not None:
            self.bar.close()  # before anybody says how the run ended: the last line is theirs
        # Where other ranks have left, there is nobody to complete it with.
        if self.checkpoints and self.world.size == 1:
            self.checkpoints.finish()

    def check_inputs(self, inputs: dict[str, str]) -> None:
        """UserError if the run in this folder was started from other contents than these.

        inputs: what is read ("model", ...) -> its fingerprint, the same on every rank. A new run
        notes them in inputs.json. Paths would not do: a file may move, or change where it is.
        """
        noted = self.out / "inputs.json"
        started = inputs
        if noted.exists():
            started = read_json(noted)
        elif self.world.main and complete_checkpoints(self.out / "checkpoints"):
            print(f"{noted} is missing: not known whether {' and '.join(inputs)} are as they were")
        same_on_all_ranks(inputs)  # and no rank notes them before all have looked
        for name in sorted(started.keys() | inputs.keys()):
            if started.get(name) != inputs.get(name):
                raise UserError(f"--resume: the {name} is not what {self.out} was started with")
        if self.world.main:
            write_text(noted, json.dumps(inputs, indent=2) + "\n")

    def restore(self, parts: dict[str, Any], state: dict[str, Any]) -> dict[str, Any]:
        """Fill `parts` in place from the last checkpoint; returns `state` as it was then.

        parts: modules, optimizers and tensors, see `parallel.named_tensors`. state: the caller's
        own counters, whatever JSON can hold. Without a checkpoint both are as they were given.
        """
        self.parts = parts
        self.done = 0
        saved = complete_checkpoints(self.out / "checkpoints")
        if saved:
            needed = state | {"skipped": 0, "in_a_row": 0, "rows": []}
            found = load_checkpoint(saved[-1], parts, self.world, needed)
            self.done = found["step"]
            self.guard.skipped = found["skipped"]
            self.guard.in_a_row = found["in_a_row"]
            self.rows = found["rows"]
            state = {name: found[name] for name in state}
        return state

    def steps(self, total: int, name: str) -> Iterator[int]:
        """The numbers of the steps that are left, up to `total`, under a progress bar.

        Only now is metrics.jsonl cut back to the checkpoint, and is a checkpoint that was begun and
        not finished removed: a run that `restore` or its caller refuses keeps its files.
        """
        folder = self.out / "checkpoints"
        self.checkpoints = Checkpoints(folder, self.world, self.keep, self.keep_every)
        self.log = MetricsLog(self.out, self.done, self.world, self.config.log, self.rows)
        self.rows = []
        self.total = total
        self.bar = tqdm(
            range(self.done + 1, total + 1),
            initial=self.done,
            total=total,
            desc=name,
            unit="step",
            disable=not self.world.main,
        )
        return iter(self.bar)

    def is_due(self, step: int, every: int) -> bool:
        """Is it time for what is done at every so many steps, and after the last one?"""
        return step % every == 0 or step == self.total

    def record(self, step: int, metrics: dict[str, Any], shown: dict[str, str]) -> None:
        """A line of metrics.jsonl; `shown` goes behind the progress bar."""
        self.log.write(step, metrics)
        self.rows.append({"step": step} | metrics)
        self.bar.set_postfix(shown)

    def say(self, text: str) -> None:
        """Print above the progress bar, on rank 0."""
        if self.world.main:
            self.bar.write(text)

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write a checkpoint of `parts` and `state`. Every rank calls it.

        It remembers the metrics since the one before it, whose lines may not be on the disk yet.
        """
        counters = {"skipped": self.guard.skipped, "in_a_row": self.guard.in_a_row}
        self.checkpoints.save(step, self.parts, state | counters | {"rows": self.rows})
        self.rows = []

    def plot(self, panels: dict[str, list[str]]) -> None:
        """metrics.png: see the function `plot`."""
        if self.world.main:
            plot(self.log.path, self.out / "metrics.png", panels)

    def finish(self, scorer: Scorer, tokenizer: Tokenizer) -> None:
        """Wait for the last checkpoint, and write the policy to OUT/model. Every rank calls it."""
        self.checkpoints.finish()
        save_model(scorer, self.out / "model", tokenizer, self.world)
