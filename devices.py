"""What a command computes on, and in which dtype: the meaning of `--device` and `--dtype`.

    device = pick_device("auto")            # "cuda" where torch sees a GPU, else "cpu"
    dtype = pick_dtype("auto", device)      # "bfloat16" where a GPU has it, else "float32"

Where a GPU is there and cannot be used, one line says why and what to install: an old driver, no C
compiler for Triton, a card without bfloat16.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path

import torch

from cli import UserError
from kernels.jit import triton

OLDEST_DRIVERS = {"12": 525, "13": 580}
"""By major version of CUDA: the first series of NVIDIA's driver that runs it."""
BFLOAT16_SINCE = (8, 0)
"""The first compute capability whose matrix products and attention kernels take bfloat16."""
DRIVER_FILE = Path("/proc/driver/nvidia/version")
CONTROL_DEVICE = Path("/dev/nvidiactl")


# --- the device -----------------------------------------------------------------------------------


def pick_device(name: str = "auto") -> str:
    """What --device stands for here: "cpu", "cuda" or "cuda:N".

    auto takes the GPU that torch sees. If torch does not see one that the driver shows, it takes
    the CPU and says why. UserError: another name, a GPU asked for that cannot be used, or no
    compiler for the kernels that a GPU runs.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise UserError(f"--device {name}: cpu, cuda or auto")
    if name == "cpu":
        return name
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own words about an old driver; ours say more
        available = torch.cuda.is_available()
    if available:
        check_compiler()
        return "cuda" if name == "auto" else name
    reason = unused_gpu()
    if name != "auto":
        raise UserError(f"--device {name}: {reason or 'this machine has no CUDA device'}")
    if reason and os.environ.get("RANK", "0") == "0":
        print(f"computing on the CPU: {reason}", file=sys.stderr)
    return "cpu"


def unused_gpu() -> str:
    """Why torch does not see a GPU that the driver shows; "" if there is none, or it is hidden."""
    driver = driver_version()
    if driver is None or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return ""
    version = torch.__version__.split("+")[0]
    install = (
        f"pip install --force-reinstall torch=={version} "
        "--index-url https://download.pytorch.org/whl/cu126"
    )
    if torch.version.cuda is None:
        return f"torch {version} is built for the CPU alone: {install}"
    needed = OLDEST_DRIVERS.get(torch.version.cuda.split(".")[0], 0)
    if int(driver.split(".")[0]) >= needed:
        return f"torch {version} sees no GPU, though driver {driver} shows one"
    return (
        f"the driver is {driver}, and torch {version} is built for CUDA {torch.version.cuda}, "
        f"which needs R{needed} or newer: update it, or {install}"
    )


def driver_version() -> str | None:
    """The version of the NVIDIA driver that gives this process a GPU, "580.65.06"; else None."""
    text = ""
    # A container may see the host's file without having its GPUs: the device tells.
    if CONTROL_DEVICE.exists() and DRIVER_FILE.exists():
        text = DRIVER_FILE.read_text()
    elif shutil.which("nvidia-smi"):
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        answer = subprocess.run(asked, capture_output=True, text=True)
        text = answer.stdout if answer.returncode == 0 else ""
    found = re.search(r"\b\d{3}\.\d+[.\d]*", text)
    return found[0] if found else None


def check_compiler() -> None:
    """UserError if Triton cannot compile the small C module that it starts its kernels from.

    It does so when the first kernel is launched, and fails with pages. Without Triton, PyTorch's
    own operations take the place of its kernels.
    """
    if triton is None:
        return
    chosen = os.environ.get("CC")
    names = [chosen.split()[0]] if chosen else ["gcc", "clang"]
    if not any(map(shutil.which, names)):
        raise UserError(
            f"Triton's kernels need a C compiler, and there is no {' or '.join(names)}: "
            "apt install gcc (or set CC)"
        )
    scheme = sysconfig.get_default_scheme()
    if scheme == "posix_local":  # Debian's own; its headers lie where posix_prefix has them
        scheme = "posix_prefix"
    folder = Path(sysconfig.get_paths(scheme=scheme)["include"])
    elsewhere = os.environ.get("CPATH") or os.environ.get("C_INCLUDE_PATH")
    if not (folder / "Python.h").exists() and not elsewhere:
        python = f"python{sys.version_info.major}.{sys.version_info.minor}"
        raise UserError(
            f"Triton's kernels need Python's headers, and {folder} has no Python.h: "
            f"apt install {python}-dev"
        )


# --- the dtype ------------------------------------------------------------------------------------


def pick_dtype(name: str, device: str | torch.device, say: bool = True) -> str:
    """What --dtype stands for on this device: "float32" or "bfloat16".

    auto is bfloat16 on a GPU that has it, and float32 on older ones and on a CPU. say: whether to
    tell of an older one. UserError: bfloat16 asked of a GPU that does not have it.
    """
    if torch.device(device).type != "cuda":
        return "float32" if name == "auto" else name
    capability = torch.cuda.get_device_capability(device)
    if name == "float32" or capability >= BFLOAT16_SINCE:
        return "bfloat16" if name == "auto" else name
    card = f"{torch.cuda.get_device_name(device)} is of compute capability "
    card += ".".join(map(str, capability))
    if name == "bfloat16":
        raise UserError(f"--dtype bfloat16: {card}, and needs 8.0 for it: --dtype float32")
    if say:
        print(f"computing in float32: {card}, and needs 8.0 for bfloat16", file=sys.stderr)
    return "float32"
