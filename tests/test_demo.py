"""The demo from end to end at toy size, its resume, and CI's bars."""

import dataclasses
import importlib.util
import json
import runpy
import sys
from pathlib import Path

import pytest
import tyro

import demo
import demo_lm
import evaluate
from cli import UserError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def bars():
    spec = importlib.util.spec_from_file_location("check_demo", ROOT / ".ci" / "check_demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.bars


def test_long_is_more_rl_from_the_same_sft():
    """Guards against a --long that changes the SFT model that RL starts from, or the short demo."""
    short, long = demo.Config(), demo.lengthened(demo.Config(long=True))
    assert demo.lengthened(short) == short
    assert long.steps > 2 * short.steps and 0 < long.cooldown < long.steps
    assert dataclasses.replace(long, steps=short.steps, cooldown=0, long=False) == short
    assert demo.rl_flags(long, Path("out")).cooldown == long.cooldown


def test_printed_commands_are_the_flags(tmp_path):
    """Guards against a command on the terminal that cannot be run, or that does something else: a
    tuple in brackets, "--lenient True"."""
    out = tmp_path / "a folder"
    config = demo.Config(str(out))
    other = demo_lm.Config(out=str(out))
    stages = [
        demo.chain_flags(config, out / "chains.jsonl"),
        demo.sft_flags(config, out / "sft", out / "chains.jsonl", 5),
        demo.rl_flags(config, out),
        demo.evaluate_flags(config, [out / "sft", out / "rl"], out / "evaluation"),
        demo_lm.attempt_flags(other, out),
        demo_lm.sft_flags(other, out / "sft", out / "chains.jsonl"),
        demo_lm.rl_flags(other, out),
        demo_lm.evaluate_flags(other, ["a", "b"], out / "evaluation"),
        evaluate.Config(["a"], task="countdown", lenient=True),
    ]
    for flags in stages:
        assert tyro.cli(type(flags), args=demo.words_of(flags)) == flags


def test_a_killed_start_of_rl_is_no_run(tmp_path):
    """Guards against a demo that can never go on: RL was killed while it loaded, its folder holds
    only a lock, and --resume finds no run."""
    (tmp_path / "rl").mkdir()
    (tmp_path / "rl" / ".lock").touch()
    assert not demo.rl_flags(demo.Config(), tmp_path).resume
    assert not demo_lm.rl_flags(demo_lm.Config(), tmp_path).resume
    (tmp_path / "rl" / "config.json").touch()
    assert demo.rl_flags(demo.Config(), tmp_path).resume


def test_the_demo_runs_and_a_second_start_repeats_nothing(tmp_path, monkeypatch, capsys):
    """Guards against a stage that breaks the next, a resumed demo that trains again, and baselines
    that do not add to what was measured."""
    monkeypatch.setattr(demo, "BUDGET", 12)
    monkeypatch.setattr(demo, "BUDGETS", "6,12")
    few = {"chains": 120, "sft_steps": 2, "steps": 2, "heldout": 4, "samples": 2}
    config = demo.Config(str(tmp_path / "demo"), **few)
    demo.main(config)
    file = tmp_path / "demo" / "summary.json"
    first = json.loads(file.read_text())
    assert (
        first["problems_heldout"] == 4
        and {"pass@1", "mean_tokens", "budget_curve"} <= first["rl"].keys()
    )
    assert (
        first["longest_shown"]["attempts"] == demo.ATTEMPTS
        and first["longest_shown"]["tokens"] > 30
    )
    assert first["probe"].keys() == {"problem", "sft", "rl"}
    assert first["beyond_shown"].keys() == {"sft", "rl"} and "baselines" not in first
    assert list(first["rl_curves"]) == ["0.3", "0.6", "1.0"]
    assert all(list(curve) == ["6", "12"] for curve in first["rl_curves"].values())
    assert first["rl_curves"]["1.0"] == first["rl"]["budget_curve"]
    assert (tmp_path / "demo" / "demo.png").stat().st_size > 0
    assert (tmp_path / "demo" / "model" / "config.json").exists()
    assert "--baselines" in capsys.readouterr().out

    demo.main(config)
    assert capsys.readouterr().out.count("is there already") == 6
    assert json.loads(file.read_text()) == first

    (tmp_path / "demo").rename(tmp_path / "moved")  # whose results name the models by their paths
    demo.main(dataclasses.replace(config, out=str(tmp_path / "moved")))
    assert json.loads((tmp_path / "moved" / "summary.json").read_text()) == first
    (tmp_path / "moved").rename(tmp_path / "demo")
    capsys.readouterr()

    demo.main(dataclasses.replace(config, baselines=True))
    capsys.readouterr()
    both = json.loads(file.read_text())
    assert (
        both["baselines"].keys() == {"more_sft", "best_sft"}
        and "pass@1" in both["baselines"]["best_sft"]
    )
    stages = both.pop("seconds_by_stage")
    assert stages.items() > first.pop("seconds_by_stage").items()
    flags = json.loads((tmp_path / "demo" / "more_sft" / "config.json").read_text())
    assert flags["model"] == str(tmp_path / "demo" / "sft") and flags["data"] == str(
        tmp_path / "demo" / "chains.jsonl"
    )
    # Not from `stages`, whose tenths of a second are too coarse where SFT takes one second.
    seconds = json.loads((tmp_path / "demo" / "seconds.json").read_text())
    assert flags["steps"] == max(1, round(seconds["rl"] / seconds["sft"] * few["sft_steps"]))
    oracle = json.loads((tmp_path / "demo" / "best_sft" / "config.json").read_text())
    assert oracle["steps"] == few["sft_steps"] + flags["steps"] and oracle["data"].endswith(
        "oracle.jsonl"
    )
    both.pop("baselines")
    both["beyond_shown"] = {name: both["beyond_shown"][name] for name in ("sft", "rl")}
    assert both == first, "the baselines change nothing of the demo, its seconds included"
    with pytest.raises(UserError, match="other flags"):
        demo.main(dataclasses.replace(config, steps=3))

    folder = str(tmp_path / "demo")
    monkeypatch.setattr(sys, "argv", ["demo_seeds.py", folder, folder])
    runpy.run_path(str(ROOT / "benchmarks" / "demo_seeds.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert (
        "| | SFT | 30% of RL | 60% of RL | 100% of RL |" in printed and "| 12 tokens |" in printed
    )
    assert "| | SFT | more SFT | RL | the oracle's SFT |" in printed and "| fails: " in printed


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    """Guards against a demo that scatters its files over somebody's work."""
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="holds no demo"):
        demo.main(demo.Config(str(tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def summary() -> dict:
    """Of a demo that has reached every bar."""
    curves = {"sft": {"30": 0.5, "70": 0.7, "120": 0.71}, "rl": {"30": 0.4, "70": 0.8, "120": 0.95}}

    def model(name: str, one: float, failing: float) -> dict:
        failures = {"false claim": failing, "wrong numbers": failing, "wrong arithmetic": failing}
        scores = {"pass@1": one, "pass@1_ci": [one - 0.01, one + 0.01], "pass@16": 0.99}
        return scores | {"budget_curve": curves[name], "failures": failures}

    return {
        "problems_heldout": 1024,
        "sft": model("sft", 0.71, 0.05),
        "rl": model("rl", 0.95, 0.02),
        "longest_shown": {"attempts": 3, "tokens": 60},
        "beyond_shown": {"sft": 0.05, "rl": 0.2},
        "rl_curves": {
            "0.3": {"70": 0.75, "120": 0.8},
            "0.6": {"70": 0.8, "120": 0.9},
            "1.0": {"70": 0.8, "120": 0.95},
        },
        "probe": {"problem": "numbers 3 5 7, target 22", "sft": 9, "rl": 60},
        "baselines": {"more_sft": model("sft", 0.8, 0.05), "best_sft": model("sft", 0.96, 0.05)},
    }


MISSES = [
    (("problems_heldout",), 512),
    (("sft", "pass@1"), 0.86),
    (("rl", "pass@16"), 0.98),
    (("beyond_shown", "rl"), 0.09),
    (("sft", "budget_curve", "70"), 0.67),
    (("rl_curves", "1.0", "70"), 0.94),
    (("rl_curves", "0.6", "120"), 0.79),  # below RL's after 30 %
    (("sft", "budget_curve"), {"30": 0.5, "70": 0.81, "120": 0.81}),  # above RL's after 30 %
    (("rl", "failures", "false claim"), 0.06),
    (("rl", "failures", "wrong numbers"), 0.06),
    (("rl", "failures", "wrong arithmetic"), 0.06),
    (("probe", "rl"), 19),
    (("baselines", "more_sft", "pass@1_ci"), [0.93, 0.945]),
    (("baselines", "best_sft", "pass@1"), 0.975),
]


@pytest.mark.parametrize("path, value", MISSES)
def test_each_bar_can_be_missed(bars, path, value):
    """Guards against a check that nothing can fail: a policy that has not learned must not pass,
    nor one that learned something else. One number is spoilt, and just that is found."""
    good = summary()
    assert all(holds for _, holds in bars(good))
    place = good
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    missed = [claim for claim, holds in bars(good) if not holds]
    assert len(missed) == 1, missed


def test_bars_without_baselines(bars):
    """Guards against CI failing for want of the baselines, which are outside of the demo's
    minutes."""
    plain = summary()
    del plain["baselines"]
    assert len(bars(plain)) == len(bars(summary())) - 2 and all(holds for _, holds in bars(plain))
