"""The README names files, functions, tests and flags; each must exist, or a reader is sent to look for a ghost."""

import ast
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cot
import demo
import sft
from model import ModelConfig, random_init, save_pretrained
from tokenizer import demo_tokenizer

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def names_in(path: Path) -> set[str]:
    """Functions, classes, their methods and fields, and module-level names of a file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


@pytest.mark.parametrize(
    "name", sorted(set(re.findall(r"`((?:[\w]+/)*[\w]+\.(?:py|md|txt))`", README)))
)
def test_files_exist(name: str):
    """A file that was renamed or merged leaves the README's table behind."""
    assert (ROOT / name).exists() or (ROOT / "tests" / name).exists()


@pytest.mark.parametrize(
    "module, name", sorted(set(re.findall(r"`([a-z]+)\.([A-Za-z_]+)`", README)))
)
def test_functions_exist(module: str, name: str):
    """The T1 map must point at code: a function that moved must move there too."""
    if name in ("py", "json", "md", "png", "txt", "jsonl"):
        pytest.skip("a file, checked above")
    path = (
        ROOT / f"{module}.py" if (ROOT / f"{module}.py").exists() else ROOT / module / "__init__.py"
    )
    assert name in names_in(path), f"README.md names {module}.{name}"


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(test_\w+)`", README))))
def test_tests_exist(name: str):
    """An idea whose test is gone is an idea without proof."""
    tests = set().union(*(names_in(path) for path in (ROOT / "tests").glob("test_*.py")))
    assert name in tests


def test_flags_exist():
    """Commands are copied from the README: a flag that is gone makes the first try fail."""
    for script, rest in re.findall(
        r"^(?:\$ )?(?:python|torchrun [^\n]*?) ?([\w/]+\.py)([^\n#]*)", README, flags=re.M
    ):
        known = {name.replace("_", "-") for name in fields(ROOT / script)}
        for flag in re.findall(r"--([a-z-]+)", rest):
            assert flag in known, f"README.md: {script} has no --{flag}"


def test_no_figure_is_left_to_fill_in():
    """A placeholder that was forgotten, or a number that the code has left behind."""
    results = (ROOT / "benchmarks" / "RESULTS.md").read_text()
    assert not re.findall(
        r"\b[A-Z]+_(?:SAMPLE|TABLE|TIMES|PLAN|ROWS?|RATIO|VERSION)\b|@[A-Z]{2,}", README + results
    )
    assert f"{demo.Config.chains:,} chains" in README
    assert (
        f"{sum(p.numel() for p in sft.begin(sft.Config(out=''))[0].parameters()):,} parameters"
        in README
    )


GUIDE = (ROOT / "GUIDE.md").read_text()
ON_GPUS = (
    README.split("### On GPUs")[1].split("## ")[0]
    + GUIDE.split("### Larger models and several nodes")[1].split("## ")[0]
)
RECIPES = [
    line
    for block in re.findall(r"```bash\n(.*?)```", ON_GPUS, flags=re.S)
    for line in block.strip().split("\n")
    if not line.startswith("#")
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A folder with what the recipes for GPUs name: random weights in the shape of Qwen2.5, chains, and problems."""
    folder, tokenizer = tmp_path_factory.mktemp("recipes"), demo_tokenizer(cot.WORDS)
    shape = ModelConfig(
        tokenizer.vocab_size, dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp_dim=64, family="qwen2",
        qkv_bias=True, context=12_000, eos_ids=tuple(tokenizer.eos_ids),
    )  # fmt: skip
    save_pretrained(random_init(shape, 0), folder / "qwen", tokenizer)
    rows = [
        {"problem": f"What is {n} + 1?", "answer": str(n + 1), "response": f"\\boxed{{{n + 1}}}"}
        for n in range(20)
    ]
    shutil.copytree(
        folder / "qwen", folder / "runs" / "sft" / "model"
    )  # for RL, where its SFT has not run
    for name in ("chains.jsonl", "train.jsonl"):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


ON_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
@pytest.mark.parametrize("number", range(len(RECIPES)))
def test_recipes_for_gpus_run(tiny: Path, number: int, device: str):
    """Guards against recipes that nobody has tried: a flag that is gone, FSDP that refuses bf16, a missing rendezvous.
    As in README and guide, but for sizes, processes and the device; RL starts from the SFT run before it."""
    words = shlex.split(RECIPES[number])
    script = next(word for word in words if word.endswith(".py"))
    port = socket.create_server(("localhost", 0)).getsockname()[1]
    small = {
        "sft.py": f"--device {device} --steps 1 --batch-tokens 128",
        "rl.py": f"--device {device} --steps 1 --prompts 2 --samples 2 --max-tokens 8",
    }
    renamed = {
        "--nproc_per_node=8": f"--nproc_per_node={2 if device == 'cpu' else 1}",
        "--nnodes=4": "--nnodes=1",
        "Qwen/Qwen2.5-0.5B": "qwen",
    }
    renamed |= {
        "Qwen/Qwen2.5-7B": "qwen",
        "--rdzv-endpoint=HOST:29500": f"--rdzv-endpoint=localhost:{port}",
    }
    words = [renamed.get(word, word) for word in words]
    words[0:1] = {
        "python": [sys.executable],
        "torchrun": [sys.executable, "-m", "torch.distributed.run"],
    }[words[0]]
    words[words.index(script)] = str(ROOT / script)
    out = tiny / words[words.index("--out") + 1]
    shutil.rmtree(out, ignore_errors=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(
        [*words, *small[script].split()],
        cwd=tiny,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (out / "model" / "config.json").exists()


def fields(path: Path) -> set[str]:
    """Annotated fields of the dataclasses in a file."""
    tree = ast.parse(path.read_text())
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    return {
        n.target.id
        for c in classes
        for n in c.body
        if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
    }
