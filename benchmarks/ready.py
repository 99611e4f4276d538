"""Can this Python run `make gpu`? Its packages, the GPU, and what Triton needs to compile its kernels.

    python benchmarks/ready.py          # one line: the card and the versions; or what is missing, exit code 2

Nothing of the project is imported before its packages are known to be there: with `make gpu PYTHON=python3` this is
the first line of ours that runs.
"""

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
ELSEWHERE = ("pyarrow", "ruff", "accelerate", "gguf")  # only other tests and `make lint` use these


def missing_packages(file: Path) -> list[str]:
    """The lines of a requirements file that the packages of this Python do not meet."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return ["packaging"]
    missing = []
    for line in file.read_text().splitlines():
        line = line.split("#")[0].strip()
        if line.startswith("-r "):
            missing += missing_packages(file.parent / line.removeprefix("-r ").strip())
        elif line:
            wanted = Requirement(line)
            applies = not wanted.marker or wanted.marker.evaluate()
            if applies and wanted.name not in ELSEWHERE and not is_met(wanted):
                missing.append(str(wanted))
    return missing


def is_met(wanted) -> bool:
    """Whether a package is installed in a version that a requirement allows."""
    try:
        return wanted.specifier.contains(version(wanted.name), prereleases=True)
    except PackageNotFoundError:
        return False


def main() -> None:
    missing = missing_packages(ROOT / "requirements-dev.txt")
    if missing:
        leave(
            f"{sys.executable} does not have {', '.join(missing)}: "
            f"{sys.executable} -m pip install -r requirements-dev.txt"
        )
    import torch

    from cli import UserError
    from devices import driver_version, pick_device
    from kernels.jit import triton

    try:
        pick_device("cuda")
    except UserError as error:
        leave(str(error))
    print(
        f"{torch.cuda.get_device_name()}, driver {driver_version()}, torch {torch.__version__} "
        f"for CUDA {torch.version.cuda}, triton {triton.__version__ if triton else 'none'}"
    )


def leave(reason: str) -> NoReturn:
    print(f"error: {reason}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
