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


# --- nowhere to write -----------------------------------------------------------------------------


@dataclasses.dataclass
class Flags:
    out: str = ""


REFUSALS = ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES", "ENAMETOOLONG", "EIO", "EPIPE")


@pytest.mark.parametrize("name", REFUSALS)
def test_what_the_system_refuses_is_one_line(name, capsys):
    """Bug: a disk that is full where nobody thought of it ends in a traceback."""
    code = getattr(errno, name)

    def main(config):
        raise OSError(code, os.strerror(code), "runs/a")

    with pytest.raises(SystemExit) as left:
        run(main, Flags)
    assert left.value.code == 2
    assert capsys.readouterr().err == f"error: runs/a: {os.strerror(code)}\n"


@pytest.mark.parametrize("text", ["a\nb", "a\r\nb", "a\u2028b"])
def test_an_error_is_one_line_whatever_it_quotes(text, capsys):
    """Bug: a template's own message, or a name with a line break, makes several lines of one."""

    def main(config):
        raise cli.UserError(text)

    with pytest.raises(SystemExit):
        run(main, Flags)
    assert capsys.readouterr().err == "error: a b\n"


def test_a_bug_of_ours_keeps_its_traceback():
    """Bug: every OSError is taken for the user's, and a wrong path in our code shows as one line."""

    def main(config):
        open("nowhere/at/all")  # noqa: SIM115

    with pytest.raises(FileNotFoundError):
        run(main, Flags)


def test_output_to_a_full_disk_is_one_line():
    """Bug: python verify.py ... > file on a full disk: exit code 120 and "Exception ignored"."""
    words = [sys.executable, "verify.py", r"\boxed{1}", "1"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(words, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (2, "error: No space left on device\n")


def full(*args, **more):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    """Bug: half a file, or a rest of one that keeps the disk full; for texts and for figures."""
    file = tmp_path / "file"
    file.write_text("old")

    class Figure:
        def savefig(self, path, **more):
            Path(path).write_text("half")
            full()

    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 1, "loss": 2.0}\n')
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", Figure.savefig)
    with pytest.raises(cli.UserError, match=r"cannot write .*/file: No space left"):
        runfolder.plot(metrics, file, {"loss": ["loss"]})
    with pytest.raises(cli.UserError, match=r"cannot write .*/file: No space left"):
        evaluate.plot_budgets({}, file)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(cli.UserError, match=r"cannot write .*/file: No space left"):
        cli.write_text(file, "new")
    assert file.read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"file", "metrics.jsonl"}


def test_names_that_are_too_long_are_refused_at_the_start(tmp_path):
    """Bug: cot.py works for hours, and then its --out has a name that the disk does not take."""
    for length in (248, 255, 300):
        with pytest.raises(cli.UserError, match="File name too long"):
            cli.check_parent(tmp_path / ("x" * length))
    cli.check_parent(tmp_path / ("x" * 200))


# --- one process at a time ------------------------------------------------------------------------

HOLD = """
import sys, time
import cli
with cli.holding(sys.argv[1], folder=bool(sys.argv[2])):
    print("held", flush=True)
    time.sleep(60)
"""


@contextlib.contextmanager
def held(path: Path, folder: bool = False):
    """Another process that holds `path`."""
    words = [sys.executable, "-c", HOLD, str(path), "folder" * folder]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("folder", [False, True])
def test_one_process_at_a_time(tmp_path, folder):
    """Bug: two processes write one file or folder. Or a killed one keeps it closed for ever."""
    out = tmp_path / "new" / "run"
    with held(out, folder) as other:
        (out.parent / "link").symlink_to(out)
        for spelling in (out, out.parent / "link", out.parent / ".." / "new" / "run"):
            wanted = f"{spelling} is in use by process {other.pid} on .*: wait for it"
            with pytest.raises(cli.UserError, match=wanted), cli.holding(spelling, folder):
                pass
        with cli.holding(tmp_path / "other", folder):
            pass
    (out.parent / "link").unlink()
    with cli.holding(out, folder):  # it was killed, and its file is still there
        pass
    if folder:
        out.rmdir()  # the killed one had made it; else it is empty
    assert not list(out.parent.iterdir())  # and none is left by one that ended well


def test_a_folder_is_held_under_its_other_names(tmp_path):
    """Bug: the lock lies beside the folder. Whoever sees the folder through another mount, which
    has other neighbours, does not see the lock, and both write. (A new name has new neighbours,
    too, and needs no right to mount.)"""
    (tmp_path / "one" / "run").mkdir(parents=True)
    other = tmp_path / "other"
    other.mkdir()
    with held(tmp_path / "one" / "run", folder=True):
        (tmp_path / "one" / "run").rename(other / "out")
        refused = pytest.raises(cli.UserError, match="in use by")
        with refused, cli.holding(other / "out", folder=True):
            pass


def test_what_a_killed_process_leaves_is_new(tmp_path):
    """Bug: a run that was killed before it began, or the root of a volume, takes no new run."""
    for name in ("out", "out/.lock", "out/config.json.partial", "out/lost+found"):
        assert cli.is_new(tmp_path / "out")
        (tmp_path / name).mkdir()
    assert cli.is_new(tmp_path / "out")
    (tmp_path / "out" / "config.json").touch()
    (tmp_path / "link").symlink_to("nowhere")
    assert not cli.is_new(tmp_path / "out") and cli.is_new(tmp_path / "link")


def test_holding_leaves_no_folders(tmp_path):
    """Bug: a command that is refused leaves the folders above its --out."""
    for folder in (False, True):
        with pytest.raises(cli.UserError), cli.holding(tmp_path / "a" / "b" / "c", folder):
            raise cli.UserError("no such file")
        assert not list(tmp_path.iterdir())
    with cli.holding("/proc/nowhere/x"):  # no lock can be made there: the command says the rest
        pass


@pytest.mark.parametrize(
    "command, flags",
    [
        (cot, {"count": 1}),
        (demo, {}),
        (evaluate, {"model": ["m"], "task": "countdown"}),
        (sft, {"task": "countdown"}),
        (rl, {"model": "m", "task": "countdown"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_commands_hold_their_out(command, flags, tmp_path):
    """Bug: the later of two processes overwrites what the other has measured, or deletes it."""
    lock = "out.lock" if command is cot else "out/.lock"
    refused = pytest.raises(cli.UserError, match="in use by process")
    with held(tmp_path / "out", folder=command is not cot), refused:
        command.main(command.Config(out=str(tmp_path / "out"), **flags))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / lock]


# --- signals --------------------------------------------------------------------------------------

SFT = "sft.py --task countdown --chains 200 --checkpoint-every 1 --batch-tokens 300 --device cpu"


def start(*more: str) -> subprocess.Popen:
    words = [sys.executable, *SFT.split(), *more]
    return subprocess.Popen(
        words,
        cwd=ROOT,
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )


def test_what_must_not_be_half_begun_is_not_interrupted():
    """Bug: Ctrl-C between two lines that belong together. Or it is held back, and forgotten; or the
    program can no longer be stopped after it.
    """
    done = []
    with cli.handling(cli.interrupt):
        with cli.uninterrupted():
            pass
        assert all(signal.getsignal(stop) is cli.interrupt for stop in cli.STOPS)
        with pytest.raises(KeyboardInterrupt), cli.uninterrupted():
            signal.raise_signal(signal.SIGINT)
            done.append("the rest of the block")
        assert done


@pytest.fixture(scope="module")
def half(tmp_path_factory) -> tuple[Path, str]:
    """(a run that SIGTERM has ended, what it said last); while it was live another tried to resume
    it.
    """
    out = tmp_path_factory.mktemp("signals") / "run"
    process = start("--steps", "4000", "--out", str(out))
    while process.poll() is None and len(parallel.complete_checkpoints(out / "checkpoints")) < 2:
        time.sleep(0.05)
    beside = start("--steps", "4000", "--out", str(out), "--resume")
    assert "is in use by process" in beside.communicate()[1] and beside.returncode == 2
    process.terminate()
    said = process.communicate()[1]
    assert process.returncode == 130
    return out, said


def newest(out: Path) -> int:
    return parallel.step_of(parallel.complete_checkpoints(out / "checkpoints")[-1])


def test_sigterm_says_what_is_kept(half):
    """Bug: a scheduler ends the job, and its log says nothing; a --resume beside a live run deletes
    the checkpoint that this one is writing, and both die.
    """
    out, said = half
    line = f"interrupted: checkpoint of step {newest(out)} in {out}; go on with --resume"
    assert said.splitlines()[-1] == line
    assert "Traceback" not in said
    assert not list(out.glob("checkpoints/*.partial"))
    assert not (out / ".lock").exists()


def test_ctrl_c_says_how_to_go_on(half, tmp_path):
    """Bug: Ctrl-C says "interrupted", and not that the run can go on, nor from where."""
    out = tmp_path / "run"
    shutil.copytree(half[0], out)
    begun = newest(out)
    process = start("--steps", "4000", "--out", str(out), "--resume")
    while process.poll() is None and newest(out) == begun:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate()[1]
    assert process.returncode == 130 and "Traceback" not in said
    assert newest(out) > begun
    line = f"interrupted: checkpoint of step {newest(out)} in {out}; go on with --resume"
    assert said.splitlines()[-1] == line


def interrupted(*args, **more):
    raise KeyboardInterrupt


def test_other_commands_say_what_is_kept(tmp_path, monkeypatch, capsys):
    """Bug: whoever stops a command has to look for what it has left."""
    monkeypatch.setattr(cot, "by_program", interrupted)
    monkeypatch.setattr(evaluate, "measure", interrupted)
    monkeypatch.setattr(sft, "begin", interrupted)
    cases = (
        (cot, ["--out", str(tmp_path / "a")], "nothing was written"),
        (evaluate, ["--model", "m", "--task", "countdown"], "nothing was written"),
        (sft, ["--task", "countdown", "--out", str(tmp_path / "b")], "nothing was written"),
        (demo, ["--out", str(tmp_path / "c")], "the same command goes on"),
    )
    for command, args, wanted in cases:
        with pytest.raises(SystemExit) as left:
            run(command.main, command.Config, args)
        assert left.value.code == 130
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith("interrupted: ") and said.endswith(wanted)
    out = tmp_path / "e"
    out.mkdir()
    (out / "results.json").write_text("{}")
    args = ["--model", "m", "--task", "countdown", "--out", str(out)]
    with pytest.raises(SystemExit):
        run(evaluate.main, evaluate.Config, args)
    assert "results.json; go on with --resume" in capsys.readouterr().err
