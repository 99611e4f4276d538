"""Keep what findings.py has measured, without models and checkpoints: a small archive for this folder.

    python benchmarks/keep_findings.py runs/findings          # -> benchmarks/findings/runs.tar.xz

    mkdir -p runs/findings && tar xf benchmarks/findings/runs.tar.xz -C runs/findings
    python findings.py all --seeds 1                          # its tables and figures, and nothing is run

What was unpacked counts as done, so `--seeds 3` runs the seeds that are not in it. (Of the chains that
SFT was shown only the longest is kept: how long it is, is all that the tables ask.)
"""

import io
import json
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tyro

import cli
from cli import UserError
from tokenizer import load_tokenizer

KEPT = ("runs.json", "results.json", "metrics.jsonl", "config.json", "inputs.json")
"""Files; and a tokenizer's, see `keeps`."""


@dataclass
class Config:
    runs: tyro.conf.Positional[str]
    """The folder of findings.py: its --out."""
    out: str = str(Path(__file__).resolve().parent / "findings" / "runs.tar.xz")
    """The archive, which is written anew."""


def keeps(file: Path) -> bool:
    """Whether a file of the runs is kept: what was measured, and how to count tokens."""
    if file.name == "metrics.jsonl" and file.parent.name == "sft":
        return False
    return file.name in KEPT or "tokenizer" in file.name


def longest(chains: Path) -> bytes:
    """The chain of the most tokens, as a line."""
    tokenizer = load_tokenizer(str(chains.with_name("sft")))
    rows = cli.read_jsonl(chains)
    row = max(rows, key=lambda row: len(tokenizer.encode(row["response"])))
    return (json.dumps(row) + "\n").encode()


def main(config: Config) -> None:
    root = Path(config.runs)
    if not (root / "runs.json").exists():
        raise UserError(f"{root} holds no findings: it has no runs.json")
    cli.check_parent(config.out)
    with cli.whole_file(Path(config.out)) as partial, tarfile.open(partial, "w:xz") as archive:
        for path in sorted(root.rglob("*")):
            name = str(path.relative_to(root))
            if "checkpoints" in Path(name).parts:
                continue
            if path.name == "chains.jsonl":
                text = longest(path)
                entry = tarfile.TarInfo(name)
                entry.size = len(text)
                archive.addfile(entry, io.BytesIO(text))
            elif path.is_dir() or keeps(path):
                archive.add(path, name, recursive=False, filter=anonymous)
    size = Path(config.out).stat().st_size
    print(f"kept {root} in {config.out}: {size / 1e6:.1f} MB")


def anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """Without owner and time: the same runs are the same archive."""
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    return entry


if __name__ == "__main__":
    cli.run(main, Config)
