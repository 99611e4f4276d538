"""benchmarks/: their code runs at toy size, a row that fails is one line, and RESULTS.md takes the rows up.

Nothing here measures. (plan.py is tested in test_plan.py.)
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cli
from benchmarks import (
    fill_results,
    kernels_bench,
    ready,
    rl_bench,
    rows,
    sample_bench,
    small_tasks,
    train_bench,
)
from benchmarks.fill_results import fill
from cli import UserError

ROOT = Path(__file__).resolve().parent.parent
RESULTS = (ROOT / "benchmarks" / "RESULTS.md").read_text()
MACHINE = {"card": "H1", "date": "2026-12-01", "torch": "2.13", "triton": "3.9", "driver": "580.1"}


def lines_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


# --- they run -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> list[dict]:
    """The lines of every benchmark that `make gpu` runs, at toy size."""
    file = tmp_path_factory.mktemp("rows") / "gpu.jsonl"
    train_bench.main(train_bench.Config(smoke=True, json=str(file)))
    kernels_bench.main(kernels_bench.Config(smoke=True, json=str(file)))
    sample_bench.main(sample_bench.Config(gpu=True, smoke=True, json=str(file)))
    sample_bench.main(sample_bench.Config(gpu=True, smoke=True, peers=True, json=str(file)))
    return lines_of(file)


def test_every_table_gets_its_rows(measured):
    """Bug: a benchmark that nobody has run since the code under it changed; a row without its line
    of JSON."""
    counts = {}
    for row in measured:
        counts[row["table"]] = counts.get(row["table"], 0) + 1
        assert all(isinstance(row[name], str) for name in MACHINE)
    assert counts == {"training": 2, "step": 1, "kernels": 26, "decode": 2, "sampling": 1}
    for row in measured:
        for name, value in row.items():
            assert isinstance(value, str) or 0 <= value < float("inf"), (row, name)


def test_columns_are_those_of_results(measured):
    """Bug: a number is renamed in a benchmark and is silently missing in RESULTS.md."""
    filled = fill(RESULTS, measured)
    for row in measured:
        (line,) = (line for line in filled.split("\n") if line.startswith(f"| {row['row']} |"))
        for name, value in row.items():
            if name not in ("table", "row", *MACHINE):
                assert fill_results.written(value) in line, (name, line)


def test_scripts_run_from_anywhere(tmp_path):
    """Bug: a benchmark that finds the project's modules only from the project's own folder."""
    for script in ("train_bench.py", "kernels_bench.py", "sample_bench.py", "fill_results.py"):
        command = [sys.executable, str(ROOT / "benchmarks" / script), "--help"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0 and "usage" in done.stdout, done.stderr


def test_layers_are_left_out_only_where_they_do_not_fit():
    """Bug: a row that claims to be 7B's and is not, or that ends for lack of memory."""
    shape = rows.SHAPES["Qwen2.5-7B"]
    for gb, layers, recompute in ((80, range(8, 20), True), (1000, [28], False)):
        setting = train_bench.choose(shape, 8192, gb * rows.GB)
        assert setting.shape.layers in layers and setting.recompute == recompute
        assert setting.planned <= 0.9 * gb * rows.GB
    assert train_bench.choose(shape, 8192, 8 * rows.GB) is None


def test_peak_is_that_of_the_card():
    """Bug: the share of an H100 PCIe, or of a card that we do not know, by another card's peak."""
    assert train_bench.peak_operations("NVIDIA H100 80GB HBM3") == 989e12
    assert train_bench.peak_operations("NVIDIA H200") == 989e12
    assert train_bench.peak_operations("NVIDIA H100 PCIe") is None
    assert train_bench.peak_operations("NVIDIA A10G") is None


# --- rows that do not run -------------------------------------------------------------------------


def test_a_row_that_fails_is_one_line(capsys):
    """Bug: a 7B row on a card of 24 GB, or one failing peer, ends all rows that come after it."""
    with rows.skipping("one"):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 GiB")
    with rows.skipping("two", ImportError):
        raise ModuleNotFoundError("No module named 'liger_kernel'")
    with pytest.raises(ValueError), rows.skipping("three"):
        raise ValueError("a bug of ours is none of these")
    assert rows.fits("four", 1e9, "cpu")
    assert not rows.fits("five", 1e18, "cpu")
    one, two, five = capsys.readouterr().out.splitlines()
    assert one == "one: skipped: OutOfMemoryError: CUDA out of memory. Tried to allocate 20 GiB"
    assert two == "two: skipped: ModuleNotFoundError: No module named 'liger_kernel'"
    assert re.fullmatch(r"five: skipped: needs 1000000000\.0 GB, [\d.]+ are free", five)


def test_a_failing_peer_takes_nobody_with_it(monkeypatch, capsys, tmp_path):
    """Bug: `generate` raises, and the rows behind it are lost; or TRL fails, and so do ours."""
    file = tmp_path / "gpu.jsonl"

    def broken(*_):
        raise AttributeError("DynamicCache has no attribute 'x'")

    monkeypatch.setattr(sample_bench, "peer", broken)
    sample_bench.main(sample_bench.Config(gpu=True, smoke=True, peers=True, json=str(file)))
    said = capsys.readouterr().out
    assert "generate: skipped: AttributeError: DynamicCache has no attribute 'x'" in said
    assert not file.exists()

    def run_child(config: rl_bench.Config, name: str) -> dict:
        if name == "trl grpo":
            raise UserError("trl grpo failed (exit code 1); its messages are above")
        return {"seconds": [2.0, 4.0], "length": 10.0, "dropped": 0.0}

    monkeypatch.setattr(rl_bench, "model_folder", Path)
    monkeypatch.setattr(rl_bench, "install_trl", lambda: True)
    monkeypatch.setattr(rl_bench, "run_child", run_child)
    rl_bench.main(rl_bench.Config(model="m", prompts=3, samples=4, json=str(file)))
    assert "trl grpo: skipped: UserError" in capsys.readouterr().out
    assert [row["row"] for row in lines_of(file)] == ["nanot1 grpo", "nanot1 t1", "trl rloo"]
    assert lines_of(file)[0]["samples/s"] == 4.0
    fill(RESULTS, lines_of(file))  # its columns, too


# --- RESULTS.md -----------------------------------------------------------------------------------


EMPTY = """Text with a | in it.

<!-- gpu: decode -->
| row | ms | least ms | ratio | bar |
|---|---|---|---|---|
| Qwen2.5-7B, batch of 1 | not measured | | | <= 1.4 |
| Qwen2.5-7B, batch of 64 | not measured | | | <= 1.4 |
<!-- end -->

<!-- gpu: kernels -->
| row | ms | of limit | time / ours | extra MiB | bar |
|---|---|---|---|---|---|
| 1 softmax: ours | not measured | | | | of limit >= 0.85 |
<!-- end -->
"""


def test_results_are_filled_by_the_script(tmp_path, capsys):
    """Bug: a bar that is overwritten, a row that lands in another table, an old measurement that
    outlives a new one, or "not measured" beside a number."""
    row = {"table": "decode", "row": "Qwen2.5-7B, batch of 64"} | MACHINE
    more = {"table": "kernels", "row": "1 softmax: PyTorch"} | MACHINE
    made_up = [
        row | {"ms": 9.0, "least ms": 4.0, "ratio": 2.25, "card": "old"},
        row | {"ms": 5.1234, "least ms": 4.0, "ratio": 1.28},
        more | {"ms": 1234.5, "of limit": 0.31},
    ]
    file, copy = tmp_path / "gpu.jsonl", tmp_path / "RESULTS.md"
    file.write_text("".join(json.dumps(line) + "\n" for line in made_up))
    copy.write_text(EMPTY)
    for _ in range(2):  # the second time changes nothing
        fill_results.main(fill_results.Config(str(file), str(copy)))
        filled = copy.read_text()
        lines = filled.split("\n")
        assert "| Qwen2.5-7B, batch of 64 | 5.12 | 4 | 1.28 | <= 1.4 |" in lines
        assert "| Qwen2.5-7B, batch of 1 | not measured |  |  | <= 1.4 |" in lines
        assert "| 1 softmax: PyTorch | 1,234 | 0.31 |  |  |  |" in lines
        described = "H1, 2026-12-01, torch 2.13, triton 3.9, driver 580.1."
        assert lines.count(described) == 2 and "old, 2026-12-01" not in filled
    removed = set(EMPTY.split("\n")) - set(lines)
    assert removed and all(line.startswith("|") for line in removed)
    assert filled.count("not measured") == EMPTY.count("not measured") - 1


def test_a_line_without_a_place_is_refused(tmp_path):
    """Bug: a row of a table, or a number, that RESULTS.md does not have is dropped without a word."""
    row = {"row": "x"} | MACHINE
    with pytest.raises(UserError, match="no table 'speed' for 'x'"):
        fill(RESULTS, [row | {"table": "speed"}])
    with pytest.raises(UserError, match="table 'decode' has no column 'us'"):
        fill(RESULTS, [row | {"table": "decode", "us": 1.0}])
    file = tmp_path / "gpu.jsonl"
    file.write_text(json.dumps({"table": "decode", "row": "x"}) + "\n")
    with pytest.raises(UserError, match="line 1: no 'card'"):
        fill_results.main(fill_results.Config(str(file), str(tmp_path / "RESULTS.md")))


def test_every_number_of_a_gpu_was_measured():
    """Bug: a number on a GPU that nobody has measured, or that a newer one has not replaced."""
    tables = re.findall(r"<!-- gpu: (\w+) -->", RESULTS)
    assert tables == ["training", "step", "rl", "decode", "sampling", "kernels"]
    assert fill(RESULTS, lines_of(rows.FILE)) == RESULTS
    known = {row["row"] for row in lines_of(rows.FILE)}
    for table in re.findall(r"<!-- gpu: \w+ -->\n(.*?)<!-- end -->", RESULTS, flags=re.DOTALL):
        for line in table.split("\n")[2:]:
            if line.startswith("|") and "not measured" not in line:
                assert line.split(" | ")[0].removeprefix("| ") in known


# --- make gpu -------------------------------------------------------------------------------------


def test_make_gpu_says_what_is_missing(monkeypatch, tmp_path, capsys):
    """Bug: PYTHON=python3 without hypothesis ends in pytest's traceback, and without a GPU in that
    of a kernel, after minutes."""
    needed = tmp_path / "requirements-dev.txt"
    (tmp_path / "requirements.txt").write_text("torch>=99  # a comment\nnumpy>=1\n")
    needed.write_text('-r requirements.txt\nnosuchpackage>=2\nx; sys_platform == "win32"\nruff\n')
    assert ready.missing_packages(needed) == ["torch>=99", "nosuchpackage>=2"]
    monkeypatch.setattr(ready, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match="2"):
        ready.main()
    said = capsys.readouterr().err
    assert "does not have torch>=99, nosuchpackage>=2: " in said
    assert said.endswith("-m pip install -r requirements-dev.txt\n") and said.count("\n") == 1


def test_make_gpu_measures_on_where_something_fails(tmp_path):
    """Bug: one failing test, and an hour with a rented card ends without a row. And without a GPU:
    one line, before anything else runs."""
    python, calls = tmp_path / "python", tmp_path / "calls"
    python.write_text(f'#!/bin/sh\necho "$@" >> {calls}\ncase "$*" in *pytest*) exit 1;; esac\n')
    python.chmod(0o755)
    command = ["make", "-C", str(ROOT), "gpu", f"PYTHON={python}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert [call.split("/")[-1] for call in calls.read_text().splitlines()] == [
        "ready.py",
        "-m pytest -m gpu",
        "kernels_bench.py",
        "sample_bench.py --gpu",
        "train_bench.py",
    ]
    command = [sys.executable, str(ROOT / "benchmarks" / "ready.py")]
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=hidden, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_rows_go_nowhere_unless_asked(tmp_path):
    """Bug: a toy run, or one on a CPU, leaves its numbers among those of a GPU."""
    assert rows.RowFile("", keep=False).path is None
    assert rows.RowFile("", keep=True).path == rows.FILE
    file = rows.RowFile(str(tmp_path / "x.jsonl"), keep=False)
    file.add("decode", "x", ms=1.0)
    (line,) = cli.read_jsonl(tmp_path / "x.jsonl")
    assert line["table"] == "decode" and line["ms"] == 1.0 and set(MACHINE) < set(line)


# --- tasks for a small model ----------------------------------------------------------------------


def test_small_tasks_have_right_answers(tmp_path):
    """Guards against a wrong reference answer, and against one problem that stands forty times."""
    small_tasks.write(tmp_path)
    for name in small_tasks.TASKS:
        rows = cli.read_jsonl(tmp_path / f"{name}.jsonl")
        assert len({row["problem"] for row in rows}) == small_tasks.COUNT
        for row in rows:
            if "-step" in name:
                numbers = [int(number) for number in re.findall(r"\d+", row["problem"])]
                expected = numbers[0] + numbers[1] - sum(numbers[2:])
            else:
                expected = eval(row["problem"].removeprefix("What is ").rstrip("?"))
            assert int(row["answer"]) == expected >= 0
