"""Fixtures: the problem sets and the real weights that some tests need. Absent ones skip their tests, saying why.

`.ci/run` makes sure that both are present. Elsewhere: put the problem sets in `../shared` (or name the folder in
NANOT1_SHARED), and a Hugging Face folder of SmolLM2-135M-Instruct in `.cache/SmolLM2-135M` (or NANOT1_SMOLLM2).
"""

import os
import signal
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

torch.set_num_threads(1)  # the tests' tensors are small: a second thread only spins
# A shell's background job ignores Ctrl-C, and so would the processes that the tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def present(variable: str, default: Path, needed: str) -> Path:
    folder = Path(os.environ.get(variable, default))
    if not (folder / needed).exists():
        pytest.skip(f"{needed} is not in {folder} (set {variable} to the folder that has it)")
    return folder


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of problem sets (`data/`) and labelled answers (`verify/`)."""
    return present("NANOT1_SHARED", ROOT.parent / "shared", "data/gsm8k_test.jsonl")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, real weights, as a Hugging Face folder."""
    return present("NANOT1_SMOLLM2", ROOT / ".cache" / "SmolLM2-135M", "model.safetensors")
