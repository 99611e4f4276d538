"""devices.py: what --device and --dtype stand for, and the line that says why a GPU cannot be used.

No GPU is needed: torch, the driver and the compiler are replaced by what they would say.
"""

import dataclasses
import json
import sysconfig
from pathlib import Path

import pytest
import torch

import devices
import runfolder
from cli import UserError
from parallel import World

CLOSED = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023"
OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build"
CPU = torch.device("cpu")
CUDA = torch.device("cuda")


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine without a GPU, whose driver and torch build a test may choose."""

    def say(driver: str = "", build: str | None = "13.0", control: bool = True) -> None:
        (tmp_path / "version").write_text(driver)
        if control:
            (tmp_path / "nvidiactl").touch()
        monkeypatch.setattr(torch.version, "cuda", build)

    monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(devices, "DRIVER_FILE", tmp_path / "version")
    monkeypatch.setattr(devices, "CONTROL_DEVICE", tmp_path / "nvidiactl")
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CUDA_VISIBLE_DEVICES", "RANK", "CC", "CPATH", "C_INCLUDE_PATH"):
        monkeypatch.delenv(name, raising=False)
    return say


def refusal(name: str) -> str:
    with pytest.raises(UserError) as refused:
        devices.pick_device(name)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_an_old_driver_is_one_line(machine, capsys):
    """Bug: "no CUDA device" beside a GPU that works: nobody thinks of the driver, or of another
    build of torch."""
    machine(CLOSED)
    said = refusal("cuda")
    for words in ("--device cuda", "535.104.05", "CUDA 13.0", "R580 or newer", "torch==2.13.0"):
        assert words in said
    assert "--index-url https://download.pytorch.org/whl/cu126" in said
    assert devices.pick_device("auto") == "cpu"
    out, err = capsys.readouterr()
    assert out == "" and err == said.replace("--device cuda", "computing on the CPU") + "\n"


def test_a_gpu_that_is_hidden_or_absent_is_no_news(machine, monkeypatch, capsys):
    """Bug: a container on a machine with a GPU, or CUDA_VISIBLE_DEVICES=, is told to install
    another torch."""
    machine(CLOSED, control=False)  # the host's file is seen, its GPUs are not
    assert devices.driver_version() is None
    assert devices.pick_device("auto") == "cpu"
    assert refusal("cuda") == "--device cuda: this machine has no CUDA device"
    machine(CLOSED)
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert devices.pick_device("auto") == "cpu"
        assert refusal("cuda:1") == "--device cuda:1: this machine has no CUDA device"
    assert capsys.readouterr() == ("", "")


def test_other_reasons_are_not_the_drivers_age(machine):
    """Bug: a CPU build of torch, or a new driver that torch cannot reach, is called too old."""
    machine(OPEN, build=None)
    assert "torch 2.13.0 is built for the CPU alone: pip install" in refusal("cuda")
    machine(OPEN)
    assert refusal("cuda").endswith("torch 2.13.0 sees no GPU, though driver 580.65.06 shows one")
    machine(CLOSED, build="12.6")
    assert "though driver 535.104.05 shows one" in refusal("cuda")


def test_nvidia_smi_tells_where_there_is_no_file(machine, tmp_path):
    """Bug: under WSL there is no /proc/driver/nvidia, and an old driver is not found."""
    machine(control=False)
    tool = tmp_path / "nvidia-smi"
    for code, found in ((0, "551.23"), (9, None)):
        tool.write_text(f"#!/bin/sh\necho 551.23\necho 551.23\nexit {code}\n")
        tool.chmod(0o755)
        assert devices.driver_version() == found


def test_only_rank_0_tells(machine, monkeypatch, capsys):
    """Bug: the same line from every rank of torchrun."""
    machine(CLOSED)
    for rank, said in (("0", True), ("3", False)):
        monkeypatch.setenv("RANK", rank)
        devices.pick_device("auto")
        assert bool(capsys.readouterr().err) == said


def test_other_names_are_refused():
    """Bug: --device gpu is taken for something."""
    for name in ("gpu", "cuda:", "cuda:x", ""):
        assert refusal(name) == f"--device {name}: cpu, cuda or auto"


def test_what_triton_needs_is_one_line(machine, monkeypatch, tmp_path):
    """Bug: hours into a run, or after minutes of loading, pages of Triton and gcc about a compiler
    or Python.h that are not there."""
    machine()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(devices, "triton", object())
    include = tmp_path / "include"
    monkeypatch.setattr(sysconfig, "get_paths", lambda scheme: {"include": str(include)})
    assert "no gcc or clang: apt install gcc" in refusal("auto")
    monkeypatch.setenv("CC", "/opt/cc -m64")
    assert "no /opt/cc: apt install gcc" in refusal("cuda")
    monkeypatch.delenv("CC")
    (tmp_path / "clang").write_text("#!/bin/sh\n")
    (tmp_path / "clang").chmod(0o755)
    said = refusal("cuda")
    assert f"{include} has no Python.h: apt install python3." in said and said.endswith("-dev")
    include.mkdir()
    (include / "Python.h").touch()
    assert devices.pick_device("auto") == "cuda"
    assert devices.pick_device("cuda:1") == "cuda:1"


def test_the_cpu_needs_no_compiler(machine, monkeypatch):
    """Bug: a machine without gcc cannot train on its CPU; or one without Triton on its GPU."""
    machine()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(devices, "triton", object())
    assert devices.pick_device("cpu") == "cpu"
    monkeypatch.setattr(devices, "triton", None)
    assert devices.pick_device("auto") == "cuda"


def test_this_machine_can_compile():
    """Bug: the check refuses a machine on which Triton works, such as that of this suite."""
    if devices.triton is not None:
        devices.check_compiler()


# --- the dtype ------------------------------------------------------------------------------------


@pytest.fixture
def card(monkeypatch):
    """A card of the compute capability that the test names."""

    def of(capability: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    return of


def test_auto_dtype_follows_the_device(card, capsys):
    """Bug: float32 on a GPU, ten times slower than need be; bfloat16 on a CPU, or on a card whose
    attention kernels do not have it."""
    assert devices.pick_dtype("auto", CPU) == "float32"
    assert devices.pick_dtype("bfloat16", CPU) == "bfloat16"
    for capability in ((8, 0), (9, 0), (12, 0)):
        card(capability)
        assert devices.pick_dtype("auto", CUDA) == "bfloat16"
        assert devices.pick_dtype("float32", CUDA) == "float32"
    card((7, 5))
    assert devices.pick_dtype("float32", CUDA) == "float32"
    assert devices.pick_dtype("auto", CUDA, say=False) == "float32"
    assert capsys.readouterr().err == ""
    assert devices.pick_dtype("auto", "cuda:1") == "float32"
    said = "computing in float32: Tesla T4 is of compute capability 7.5, and needs 8.0 for bfloat16"
    assert capsys.readouterr().err == said + "\n"
    with pytest.raises(UserError, match=r"--dtype bfloat16: Tesla T4 .* 7\.5, and needs 8\.0"):
        devices.pick_dtype("bfloat16", CUDA)


@dataclasses.dataclass
class Flags:
    out: str
    resume: bool = False
    dtype: str = "auto"


def test_a_run_keeps_its_dtype(card, tmp_path):
    """Bug: --resume on another machine goes on in another dtype, and nobody is told."""
    card((9, 0))
    out = tmp_path / "run"
    on_gpu, on_cpu = World(0, 1, CUDA), World(0, 1, CPU)
    flags = runfolder.with_dtype(Flags(str(out)), on_gpu)
    assert flags.dtype == "bfloat16"
    runfolder.open_run(out, flags, False, ("resume",), on_gpu)
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"

    resumed = runfolder.with_dtype(Flags(str(out), resume=True), on_cpu)
    assert resumed.dtype == "bfloat16"
    runfolder.check_run(out, resumed, True, ("resume",))
    other = runfolder.with_dtype(Flags(str(out), True, "float32"), on_cpu)
    with pytest.raises(UserError, match=r"other flags: --dtype bfloat16 \(now float32\)"):
        runfolder.check_run(out, other, True, ("resume",))
    card((7, 0))
    with pytest.raises(UserError, match="--dtype bfloat16: Tesla T4"):
        runfolder.with_dtype(Flags(str(out), resume=True), on_gpu)
    absent = Flags(str(Path(tmp_path) / "absent"), resume=True)
    assert runfolder.with_dtype(absent, on_cpu).dtype == "float32"  # `check_run` has the word
