"""The demo on a language model: its problems, its chains, and all of it from end to end at toy size."""

import dataclasses
import json
import random
import runpy
import sys
from pathlib import Path

import pytest
import torch

import cot
import demo_lm
import tasks
from cli import UserError, read_jsonl
from model import ModelConfig, Transformer, save_pretrained
from tokenizer import demo_tokenizer


@pytest.fixture
def tiny(tmp_path) -> str:
    """A model of random weights, as a folder."""
    tokenizer = demo_tokenizer(["What is ", " + ", " - ", "\\boxed{"])
    torch.manual_seed(0)
    shape = {"dim": 32, "layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 16, "mlp_dim": 32}
    config = ModelConfig(vocab_size=tokenizer.vocab_size, **shape)
    save_pretrained(Transformer(config), tmp_path / "tiny", tokenizer)
    return str(tmp_path / "tiny")


def numbers(row: dict) -> tuple[int, int]:
    """The pair that a problem is about, the smaller one first."""
    _, _, x, _, y = row["problem"].rstrip("?").split()
    return tuple(sorted((int(x), int(y))))


def test_sums_share_no_pair_of_numbers():
    """Guards against a held-out sum that was trained on with its terms turned round, and against a
    wrong reference answer."""
    training, heldout = demo_lm.sums()
    assert not set(map(numbers, training)) & set(map(numbers, heldout))
    assert len(training) + len(heldout) == 29 * 29
    assert len(heldout) > 100
    for row in training + heldout:
        assert int(row["answer"]) == sum(numbers(row))


def test_long_sums_are_held_out_the_same_way():
    training, heldout = demo_lm.long_sums(random.Random(0), 500)
    assert not set(map(numbers, training)) & set(map(numbers, heldout))
    assert len(heldout) > 60


@pytest.mark.parametrize(
    "x, y, lines",
    [
        (4837, 2695, ["4837+2695: 7+5=12", "483+269: 3+9+1=13", "48+26: 8+6+1=15", "4+2: 4+2+1=7"]),
        (1000, 9999, ["1000+9999: 0+9=9", "100+999: 0+9=9", "10+99: 0+9=9", "1+9: 1+9=10"]),
        (55, 55, ["55+55: 5+5=10", "5+5: 5+5+1=11"]),
    ],
)
def test_columns_by_hand(x, y, lines):
    """Guards against a carry that is lost or kept too long."""
    assert demo_lm.digit_by_digit(x, y).split("\n") == lines


def test_both_kinds_of_chain_end_right():
    """Guards against data that prefers one way to the other: of leap and work, both are right."""
    row = demo_lm.row(4837, 2695)
    for leap in (True, False):
        chain = demo_lm.digit_chain(row, leap)
        problem = tasks.read_problem(chain, "here")
        assert tasks.judge_all([problem], [chain["response"]])[0].correct
        assert ("7+5=12" in chain["response"]) != leap


FEW = {"attempted": 4, "chains": 8, "steps": 2, "heldout": 3, "samples": 2}


@pytest.mark.parametrize("task", ["sums", "digits"])
def test_the_demo_runs_and_a_second_start_repeats_nothing(
    task, tiny, tmp_path, monkeypatch, capsys
):
    """Guards against a stage that breaks the next, and against one that is done twice."""
    monkeypatch.setitem(demo_lm.MAX_TOKENS, task, 12)
    monkeypatch.setitem(demo_lm.BUDGETS, task, "4,12")

    def right_and_wrong(path, chats, n, *_):
        said = []
        for chat in chats:
            expression = chat[0]["content"].split("?")[0].removeprefix("What is ")
            said.append([f"{expression} = {eval(expression)}", f"{expression} = 999"])
        return said

    monkeypatch.setattr(cot, "ask", right_and_wrong)
    config = demo_lm.Config(tiny, str(tmp_path / "out"), task, **FEW)
    demo_lm.main(config)
    first = capsys.readouterr().out
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["task"] == task and summary["chains"] == (4 if task == "sums" else 8)
    for name in ("as it comes", "SFT", "RL"):
        assert {"4", "12"} == summary[name]["budget_curve"].keys()
        assert f"\n{name}: What is " in first, "each model shows what it says"
    assert (tmp_path / "out" / "demo_lm.png").stat().st_size > 0

    demo_lm.main(config)
    again = capsys.readouterr().out
    assert again.count("is there already") == (4 if task == "sums" else 3)
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary

    asked = dataclasses.replace(config, baseline=True)
    demo_lm.main(asked)
    more = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert {"4", "12"} == more.pop(demo_lm.BASELINE[task])["budget_curve"].keys()
    assert more == summary, "the baseline changes nothing of the demo, its seconds included"
    if task == "digits":
        told = read_jsonl(tmp_path / "out" / "worked.jsonl")
        assert len(told) == 4 and all("=" in chain["response"] for chain in told)
    capsys.readouterr()

    # the table of several seeds: every model is a column
    benchmarks = Path(demo_lm.__file__).parent / "benchmarks"
    monkeypatch.syspath_prepend(str(benchmarks))
    monkeypatch.setattr(sys, "argv", ["demo_lm_seeds.py", config.out, config.out])
    runpy.run_path(str(benchmarks / "demo_lm_seeds.py"), run_name="__main__")
    table = capsys.readouterr().out
    assert f"| | as it comes | SFT | RL | {demo_lm.BASELINE[task]} |" in table
    assert "| thought cut at 12 tokens, % |" in table


def test_chains_and_problems_of_digits_are_apart(tiny, tmp_path):
    """Guards against RL on problems whose chains SFT has shown, and against held-out ones in
    either."""
    config = demo_lm.Config(tiny, str(tmp_path), "digits", **FEW)
    demo_lm.write_problems(config, tmp_path)
    pairs = []
    for name in ("chains", "train", "heldout"):
        rows = read_jsonl(tmp_path / f"{name}.jsonl")
        pairs.append(set(map(numbers, rows)))
    assert pairs[0] and pairs[1] and len(pairs[2]) == FEW["heldout"]
    assert not (pairs[0] & pairs[1] or pairs[0] & pairs[2] or pairs[1] & pairs[2])


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"steps": 0}, "at least 1"),
        ({"heldout": 10_000}, "--heldout 10000"),
        ({"model": "no/such/folder"}, "no/such/folder"),
    ],
)
def test_bad_flags_are_one_line(flags, message, tmp_path):
    """Guards against a traceback, or a stage that runs for minutes before it is told."""
    with pytest.raises(UserError, match=message):
        demo_lm.main(demo_lm.Config(**{"out": str(tmp_path / "out")} | flags))
