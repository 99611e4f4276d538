"""What every command of nanoT1 shares: one way to read flags, one way to say that an input is bad.

A command is a dataclass of flags (the string under each field is its `--help`) and a function `main(config)`:

    if __name__ == "__main__":
        cli.run(main, Config)

Bad input of any kind (a flag, a file, a checkpoint, a line of JSON) is raised as `UserError` with one line that says
what is wrong and where. `run` prints that line and exits with code 2. Any other exception is a bug of ours, and keeps
its traceback.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import tyro

Config = TypeVar("Config")


class UserError(Exception):
    """The input is bad, not the program: one line that says what and where."""


def run(main: Callable[[Config], None], config_class: type[Config], args: list[str] | None = None) -> None:
    """Read `config_class` from the command line and call `main` with it. Exit codes: 0, 2 (bad input), 130 (Ctrl-C)."""
    try:
        main(tyro.cli(config_class, args=args, description=sys.modules[main.__module__].__doc__))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)


def read_json(path: str | Path) -> dict:
    """The object that a JSON file holds."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # not UTF-8, not JSON, numbers too long, nested too deep
        raise UserError(f"cannot read {path}: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected an object, found {type(value).__name__}")
    return value


def read_jsonl(path: str | Path) -> list[dict]:
    """The objects of a JSONL file; UserError names the file and line of the first one that is not a JSON object."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines(): JSON strings may hold U+2028
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # also a number of 5,000 digits, and brackets 100,000 deep
            raise UserError(f"{path}, line {number}: not JSON ({getattr(error, 'msg', error)})") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: expected an object, found {type(row).__name__}")
        rows.append(row)
    if not rows:
        raise UserError(f"{path} holds no problems")
    return rows


def write_text(path: str | Path, text: str) -> None:
    """Write a whole file or nothing: a killed process leaves the old file, never half of a new one."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None


def check_parent(path: str | Path) -> None:
    """UserError if `path` cannot be created: for a command that writes at its end, to find out at its start."""
    nearest = next(parent for parent in Path(path).absolute().parents if parent.exists())
    if not nearest.is_dir():
        raise UserError(f"cannot write {path}: {nearest} is not a folder")
    if not os.access(nearest, os.W_OK):
        raise UserError(f"cannot write {path}: no permission to write in {nearest}")


def sync_folder(folder: Path) -> None:
    """Flush a folder to the disk: only then does a rename in it outlive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
