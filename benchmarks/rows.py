"""What the benchmarks on a GPU share: shapes of models, lines of JSON beside the printed rows, rows that are skipped.

    file = RowFile(config.json, keep=CUDA)               # "": benchmarks/gpu.jsonl, or no file if not `keep`
    if fits("Qwen2.5-7B, 64 rows", needed, "cuda"):      # if not: "Qwen2.5-7B, 64 rows: skipped: ..."
        with skipping("Qwen2.5-7B, 64 rows"):            # the same where memory runs out all the same
            file.add("decode", "Qwen2.5-7B, 64 rows", ms=5.2)

fill_results.py fills RESULTS.md from these lines.
"""

import contextlib
import gc
import json
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import torch

from cli import check_parent, writing
from devices import driver_version
from kernels.jit import triton
from model import ModelConfig, Transformer
from sample import free_memory

FILE = Path(__file__).resolve().parent / "gpu.jsonl"
GB = 10**9


def qwen(
    dim: int, layers: int, heads: int, kv_heads: int, mlp: int, vocabulary: int, tied: bool
) -> ModelConfig:
    return ModelConfig(
        vocabulary, dim=dim, layers=layers, heads=heads, kv_heads=kv_heads, head_dim=dim // heads, mlp_dim=mlp,
        family="qwen2", qkv_bias=True, context=32_768, tied=tied,
    )  # fmt: skip


SHAPES = {
    "Qwen2.5-0.5B": qwen(896, 24, 14, 2, 4864, 151936, tied=True),
    "Qwen2.5-1.5B": qwen(1536, 28, 12, 2, 8960, 151936, tied=True),
    "Qwen2.5-7B": qwen(3584, 28, 28, 4, 18944, 152064, tied=False),
}
SMOLLM2 = ModelConfig(49152, 576, 30, 9, 3, 64, 1536, context=8192, tied=True)
TOY = ModelConfig(512, 64, 2, 4, 2, 16, 128, context=512, tied=True)  # for --smoke


@torch.no_grad()
def random_model(shape: ModelConfig, dtype: torch.dtype, device: str | torch.device) -> Transformer:
    """Random weights that are made on the device itself."""
    model = Transformer(shape, dtype, device)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, 0.02)
        else:
            parameter.fill_(1)
    return model


# ---------------------------------------------------------------------------------------------------- lines of JSON


class RowFile:
    """Where rows go: the file `path`; if that is empty FILE, where the rows are to be kept, and else nowhere."""

    def __init__(self, path: str, keep: bool):
        self.path = Path(path) if path else None
        if keep and not path:
            self.path = FILE
        if self.path:
            check_parent(self.path)
            self.machine = machine()

    def add(self, table: str, row: str, **numbers: float | str) -> None:
        """Append a line. table, row: as RESULTS.md calls them. numbers: by the names of its columns there."""
        if self.path:
            line = {"table": table, "row": row} | self.machine | numbers
            with writing(self.path), open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def machine() -> dict[str, str]:
    """What a number depends on besides our code."""
    return {
        "card": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "triton": triton.__version__ if triton else "none",
        "driver": driver_version() or "none",
    }


# ---------------------------------------------------------------------------------------------------- skipped rows


def fits(row: str, needed: float, device: str) -> bool:
    """Whether so many bytes are free on the device. If not, a line says that the row is skipped."""
    free = free_memory(torch.device(device))
    if needed > free:
        print(f"{row}: skipped: needs {needed / GB:.1f} GB, {free / GB:.1f} are free", flush=True)
    return needed <= free


@contextlib.contextmanager
def skipping(row: str, *errors: type[Exception]) -> Iterator[None]:
    """Around the measuring of a row: where memory runs out, or one of `errors` is raised, a line says so, and the
    next row has its turn."""
    try:
        yield
    except (torch.cuda.OutOfMemoryError, *errors) as error:
        reason = " ".join(str(error).split())[:120]
        print(f"{row}: skipped: {type(error).__name__}: {reason}", flush=True)
    gc.collect()  # the frames of an exception hold tensors
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
