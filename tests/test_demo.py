"""The demo from end to end at toy size, its resume, and CI's bars."""

import importlib.util
import json
from pathlib import Path

import pytest

import demo
from cli import UserError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def bars():
    spec = importlib.util.spec_from_file_location("check_demo", ROOT / ".ci" / "check_demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.bars


def test_the_demo_runs_and_a_second_start_repeats_nothing(tmp_path, monkeypatch, capsys):
    """Guards against a stage that breaks the next, and against a resumed demo that trains again."""
    monkeypatch.setattr(demo, "BUDGET", 12)
    monkeypatch.setattr(demo, "BUDGETS", "6,12")
    config = demo.Config(str(tmp_path / "demo"), chains=120, steps=1, heldout=4, samples=2)
    demo.main(config)
    first = json.loads((tmp_path / "demo" / "summary.json").read_text())
    assert {"seconds", "sft", "rl", "seed", "problems_heldout"} <= first.keys()
    assert {"pass@1", "mean_tokens", "budget_curve"} <= first["rl"].keys() and first["problems_heldout"] == 4
    assert (tmp_path / "demo" / "demo.png").stat().st_size > 0 and (
        tmp_path / "demo" / "model" / "config.json"
    ).exists()
    capsys.readouterr()
    demo.main(config)
    assert capsys.readouterr().out.count("is there already") == 4
    assert json.loads((tmp_path / "demo" / "summary.json").read_text()) == first
    with pytest.raises(UserError, match="other flags"):
        demo.main(demo.Config(config.out, chains=120, steps=2, heldout=4, samples=2))


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    """Guards against a demo that scatters its files over somebody's work."""
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="holds no demo"):
        demo.main(demo.Config(str(tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def summary(sft: float, rl: float, sixteen: float, rl_curve: list[float]) -> dict:
    def model(one: float, sixteen: float, curve: list[float]) -> dict:
        return {"pass@1": one, "pass@16": sixteen, "budget_curve": {str(8 * 2**i): y for i, y in enumerate(curve)}}

    return {
        "problems_heldout": 1024,
        "sft": model(sft, 0.99, [0.1, 0.4, sft]),
        "rl": model(rl, sixteen, rl_curve),
    }


def test_bars_hold_and_each_can_be_missed(bars):
    """Guards against a check that nothing can fail: a policy that has not learned must not pass."""
    assert all(holds for _, holds in bars(summary(0.6, 0.95, 0.99, [0.1, 0.6, 0.95])))
    for bad in (
        summary(0.6, 0.62, 0.99, [0.1, 0.6, 0.62]),
        summary(0.6, 0.95, 0.90, [0.1, 0.6, 0.95]),
        summary(0.6, 0.95, 0.99, [0.7, 0.6, 0.95]),
        summary(0.6, 0.95, 0.99, [0.1, 0.3, 0.95]),
    ):
        assert not all(holds for _, holds in bars(bad))
