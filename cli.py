"""What every command of nanoT1 shares: flags, reading and writing files, reports of bad input.

A command is a dataclass of flags (the string under each field is its `--help`) and a function
`main(config)`:

    if __name__ == "__main__":
        cli.run(main, Config)

Bad input of any kind (a flag, a file, a checkpoint, a line of JSON) is raised as `UserError`, with
one line that says what is wrong and where. `run` prints that line and exits with code 2. So it does
where the system refuses to read or write (a full disk, no permission). Any other exception is a bug
of ours and keeps its traceback.
"""

import contextlib
import csv
import dataclasses
import errno
import fcntl
import gzip
import hashlib
import io
import json
import os
import re
import signal
import socket
import sys
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import Any, NoReturn, TypeVar, get_type_hints

import tyro

Flags = TypeVar("Flags")

STOPS = (signal.SIGINT, signal.SIGTERM)  # Ctrl-C, and what a scheduler sends
REFUSALS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EIO, errno.EMFILE, errno.EPIPE),
)
"""Errors of the system that are not ours: a disk, a permission, a name, a pipe that has closed."""


class UserError(Exception):
    """The input is bad, not the program: one line that says what and where."""


class WriteError(UserError):
    """The system refuses to write: a full disk, no permission."""


def run(
    main: Callable[[Flags], None],
    flags: type[Flags],
    args: list[str] | None = None,
    refused: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Read the dataclass `flags` from the command line (or from `args`) and call `main` with it.

    refused: {a flag that one would look for: why there is none}, unless `flags` has it.
    Exit codes: 0, 2 (bad input, or nowhere to write), 130 (Ctrl-C, or a scheduler's SIGTERM).
    """
    with handling(interrupt):
        try:
            own = {"--" + field.name.replace("_", "-") for field in dataclasses.fields(flags)}
            for word in sys.argv[1:] if args is None else args:
                name = word.partition("=")[0].replace("_", "-")
                if name in refused and name not in own:
                    raise UserError(f"there is no {name}: {refused[name]}")
            read = tyro.cli(flags, args=args, description=sys.modules[main.__module__].__doc__)
            main(expand_home(read))
            sys.stdout.flush()  # a full disk behind `> file` shows here, and not after us
        except UserError as error:
            leave(f"error: {error}", 2)
        except OSError as error:
            if error.errno not in REFUSALS:
                raise
            where = f"{error.filename}: " if error.filename else ""
            leave(f"error: {where}{error.strerror}", 2)
        except KeyboardInterrupt as interruption:
            print(file=sys.stderr)  # the terminal has put ^C there
            leave(f"interrupted: {str(interruption) or 'nothing was written'}", 130)


def interrupt(number: int, frame: FrameType | None) -> None:
    """What Ctrl-C and SIGTERM do: a KeyboardInterrupt, once.

    A second one ends the process at once, which loses nothing that is whole. But to its ranks
    torchrun passes on what the terminal has told them already: they let the second one pass.
    """
    again = signal.SIG_IGN if os.environ.get("RANK") else signal.SIG_DFL
    for stop in STOPS:
        signal.signal(stop, again)
    raise KeyboardInterrupt


@contextlib.contextmanager
def handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """`handler` meets Ctrl-C and SIGTERM in the block; then whoever called us has his own again."""
    before = {stop: signal.signal(stop, handler) for stop in STOPS}
    try:
        yield
    finally:
        for stop, other in before.items():
            signal.signal(stop, other or signal.SIG_DFL)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait until the block has ended: for what must not be left half begun."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python interrupts the main thread alone
        return
    came = []

    def hold(number: int, frame: FrameType | None) -> None:
        came.append(number)

    with handling(hold):
        yield
    if came:
        signal.raise_signal(came[0])


def leave(line: str, code: int) -> NoReturn:
    """Say the line, in one line whatever it quotes, and exit."""
    print(" ".join(line.splitlines()), file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:  # it would be flushed once more on the way out, with a traceback
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


POSITIONAL = tyro.conf.Positional[str].__metadata__[0]


def expand_home(flags: Flags) -> Flags:
    """The flags with `~` and `~/x` as a shell expands them.

    A shell does so only at the beginning of a bare word, not in --data=~/x and not in quotes. What
    is positional is no path but a text, such as a question, and stays as it is.
    """
    hints = get_type_hints(type(flags), include_extras=True)
    expanded = {}
    for field in dataclasses.fields(flags):
        if POSITIONAL not in getattr(hints[field.name], "__metadata__", ()):
            expanded[field.name] = expand_value(getattr(flags, field.name))
    return dataclasses.replace(flags, **expanded)


def expand_value(value: Any) -> Any:
    """One flag's value; of a list, each of its own."""
    if isinstance(value, list | tuple):
        return type(value)(map(expand_value, value))
    if isinstance(value, str | Path):
        return type(value)(os.path.expanduser(value))
    return value


def changed(flags: Any, *names: str) -> list[str]:
    """Those of the named flags that are not at their defaults, as words of a command."""
    defaults = {field.name: field.default for field in dataclasses.fields(flags)}
    words = []
    for name in names:
        value = getattr(flags, name)
        if value != defaults[name]:
            words.append(f"--{name.replace('_', '-')}={value}")
    return words


# --- reading --------------------------------------------------------------------------------------

GZIP, PARQUET = b"\x1f\x8b", b"PAR1"
"""How files of these kinds begin, whatever their names say."""
NOT_READ = {
    b"BZh": "a bzip2 file: unpack it first",
    b"\xfd7zXZ": "an xz file: unpack it first",
    b"\x28\xb5\x2f\xfd": "a zstd file: unpack it first",
    b"PK\x03\x04": "a zip file: unpack it first",
    b"version https://git-lfs": "only Git LFS's pointer to the file: `git lfs pull` fetches it",
}
"""The same for files of rows that people try, and what to say of them."""


def parse_json(text: str | bytes, where: str) -> dict:
    """The object that `text` spells in JSON; UserError begins with `where` if it spells none."""
    return an_object(load_json(text, where), where)


def load_json(text: str | bytes, where: str) -> Any:
    """What `text` spells in JSON; UserError begins with `where` if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        # Not only bad JSON: also bytes that are not UTF-8, a number of 5,000 digits, and brackets
        # that are nested 100,000 deep.
        raise UserError(f"{where}: not JSON ({getattr(error, 'msg', error)})") from None


def an_object(value: Any, where: str) -> dict:
    """The value, if it is an object of JSON; else a UserError that begins with `where`."""
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected an object, found {type(value).__name__}")
    return value


def read_bytes(path: str | Path) -> bytes:
    """What a file holds, unpacked if it is gzipped; UserError if it cannot be read."""
    try:
        content = Path(path).read_bytes()
        return gzip.decompress(content) if content.startswith(GZIP) else content
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read {path}: {reason}") from None


def decode(content: bytes, path: str | Path) -> str:
    """The text that UTF-8 spells, without a byte order mark; UserError names `path`."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {path}: {error}") from None


def read_text(path: str | Path) -> str:
    """A UTF-8 file; UserError if it cannot be read."""
    return decode(read_bytes(path), path)


def read_json(path: str | Path) -> dict:
    """The object that a JSON file holds."""
    return parse_json(read_text(path), f"cannot read {path}")


def read_rows(path: str | Path) -> dict[str, dict]:
    """{place: object}, for every row of a JSONL file, of a JSON list, both gzipped or not, of a
    Parquet file or of a CSV file with a header.

    place: "FILE, line 3" or "FILE, row 3", for what there is to say about it. A field that is null
    is left out: Parquet has every column in every row. UserError names the place of the first bad
    row.
    """
    content = read_bytes(path)
    for beginning, what in NOT_READ.items():
        if content.startswith(beginning):
            raise UserError(f"{path} is {what}")
    rows = {}
    table = None
    if content.startswith(PARQUET):
        table = parse_parquet(content, path)
    elif str(path).endswith(".csv"):
        table = parse_csv(content, path)
    elif str(path).endswith((".json", ".json.gz")) and content.lstrip().startswith(b"["):
        table = parse_list(content, path)
    if table is not None:
        for number, row in enumerate(table, start=1):
            rows[f"{path}, row {number}"] = row
    else:
        # Not splitlines(), which also splits at U+2028: a JSON string may hold that character.
        for number, line in enumerate(decode(content, path).split("\n"), start=1):
            line = line.removeprefix("\ufeff")  # files that were joined have marks further down
            if line.strip():
                where = f"{path}, line {number}"
                rows[where] = parse_json(line, where)
    if not rows:
        raise UserError(f"{path} holds no problems")
    return {where: without_nulls(writable(row)) for where, row in rows.items()}


def without_nulls(row: dict) -> dict:
    return {name: value for name, value in row.items() if value is not None}


def writable(value: Any) -> Any:
    """What JSON spelled, with U+FFFD for halves of surrogate pairs: "\\ud83d" is good JSON, but no
    text that can be printed or written."""
    if isinstance(value, dict):
        return {writable(key): writable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [writable(item) for item in value]
    if isinstance(value, str):
        return re.sub("[\ud800-\udfff]", "\ufffd", value)
    return value


def parse_list(content: bytes, path: str | Path) -> list[dict]:
    """The objects of a JSON list."""
    rows = load_json(decode(content, path), str(path))
    return [an_object(row, f"{path}, row {number}") for number, row in enumerate(rows, start=1)]


def parse_csv(content: bytes, path: str | Path) -> list[dict]:
    """The rows of a CSV file with a header."""
    try:
        rows = list(csv.DictReader(io.StringIO(decode(content, path), newline="")))
    except csv.Error as error:
        raise UserError(f"cannot read {path}: {error}") from None
    for number, row in enumerate(rows, start=1):
        if None in row:  # where `csv` puts what is left over: the other fields may be wrong, too
            raise UserError(f"{path}, row {number}: more fields than the header has")
    return rows


def parse_parquet(content: bytes, path: str | Path) -> list[dict]:
    """The rows of a Parquet file, as JSON would hold them: a date becomes text, and so do bytes if
    they are UTF-8; others, such as pictures, become null.
    """

    def as_json(value: Any) -> str | None:
        if not isinstance(value, bytes):
            return str(value)
        with contextlib.suppress(UnicodeDecodeError):
            return value.decode()
        return None

    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            f"{path} is a Parquet file, and pyarrow is not installed: pip install pyarrow"
        ) from None
    try:
        rows = pyarrow.parquet.read_table(pyarrow.BufferReader(content)).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        # The last two: a time in nanoseconds, or one that Python has no year for.
        raise UserError(f"cannot read {path}: {str(error).splitlines()[0]}") from None
    return json.loads(json.dumps(rows, default=as_json))


def read_jsonl(path: str | Path) -> list[dict]:
    """The objects that `read_rows` reads, without their places."""
    return list(read_rows(path).values())


def fingerprint(value: Any) -> str:
    """The same for equal values, in any process: of text, numbers, and lists or dataclasses of
    them."""
    return hashlib.sha256(repr(value).encode()).hexdigest()


# --- writing --------------------------------------------------------------------------------------


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Around whatever writes `path`: where the system refuses, a WriteError says why."""
    try:
        yield
    except OSError as error:
        raise WriteError(f"cannot write {path}: {error.strerror or error}") from None


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A name to write to. It becomes `path` when the block has gone well: all of a file or nothing.

    A killed process leaves the old file, never half a new one.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            os.replace(partial, path)
        finally:
            with contextlib.suppress(OSError):
                partial.unlink()  # what a failure leaves takes room on a full disk


def write_text(path: str | Path, text: str) -> None:
    """Write a file to the disk, whole or not at all."""
    with whole_file(path) as partial, open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_jsonl(path: str | Path, rows: list[dict]) -> None:
    """Write a JSONL file, whole or not at all."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    write_text(path, "".join(lines))


def check_parent(path: str | Path) -> None:
    """UserError if `path` cannot be created: a command that writes at its end asks at its start."""
    nearest = next(parent for parent in Path(path).absolute().parents if parent.exists())
    if not nearest.is_dir():
        raise UserError(f"cannot write {path}: {nearest} is not a folder")
    if not os.access(nearest, os.W_OK):
        raise UserError(f"cannot write {path}: no permission to write in {nearest}")
    path = Path(path)
    with writing(path), contextlib.suppress(FileNotFoundError):
        os.stat(path.with_name(f".{path.name}.partial"))  # a name that is too long shows here


LEFTOVERS = (".lock", ".partial", "lost+found")
"""How names end that do not count: of a killed process, or of a file system of its own."""


def is_new(folder: str | Path) -> bool:
    """Whether nothing is there yet, or only an empty folder."""
    folder = Path(folder)
    if not folder.is_dir():
        return not folder.exists()
    return all(entry.name.endswith(LEFTOVERS) for entry in folder.iterdir())


def sync_folder(folder: Path) -> None:
    """Flush a folder (or a file) to the disk: only then does a rename in it outlive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


# --- one process at a time ------------------------------------------------------------------------


@contextlib.contextmanager
def holding(path: str | Path, folder: bool = False) -> Iterator[None]:
    """Keep other processes from writing `path` while the block runs. UserError if one is at it.

    The lock is on a file, PATH.lock. Of a `folder` it is PATH/.lock: the same file under whatever
    name, or through whatever mount, the folder is reached. The folder is made for it, and removed
    again if it stays empty.
    """
    name = Path(f"{os.path.realpath(path)}.lock")
    if folder:
        name = Path(os.path.realpath(path), ".lock")
    made = [place for place in name.parents if not place.exists()]  # the innermost first
    lock = None
    with contextlib.suppress(OSError):  # no place for it, or no locks there: we go without
        name.parent.mkdir(parents=True, exist_ok=True)
        lock = take_lock(name, path)
    try:
        yield
    finally:
        if lock:
            name.unlink(missing_ok=True)
            lock.close()
        for place in made:
            with contextlib.suppress(OSError):
                place.rmdir()  # if it is still empty


def take_lock(name: Path, path: str | Path) -> Any:
    """The open file `name`, locked. UserError if another process has it, and so `path`.

    The kernel's lock is on the open file, not on its name: it ends with its process, however that
    ends.
    """
    while True:
        lock = open(name, "a+", encoding="utf-8")  # noqa: SIM115 (open as long as it is held)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read() or "another process"
            raise UserError(f"{path} is in use by {holder}: wait for it, or end it") from None
        except OSError:  # a mount without locks
            lock.close()
            name.unlink(missing_ok=True)
            raise
        if name.exists() and os.path.samestat(os.fstat(lock.fileno()), name.stat()):
            break
        lock.close()  # its last owner has just removed it: what we hold has no name any more
    with contextlib.suppress(OSError):  # a full disk must not cost us the lock
        os.ftruncate(lock.fileno(), 0)
        os.write(lock.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
    return lock


@contextlib.contextmanager
def telling(kept: Callable[[], str]) -> Iterator[None]:
    """Where the block is interrupted, or cannot write: what it leaves and how to go on, for `run`
    to print."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(kept()) from None
    except WriteError as error:
        raise UserError(f"{error}; {kept()}") from None
