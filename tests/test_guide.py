"""GUIDE.md is what a student believes: its numbers are computed here, or printed by its command."""

import importlib.util
import json
import math
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import kernels
import rl
from verify import Verdict

ROOT = Path(__file__).resolve().parent.parent
GUIDE = (ROOT / "GUIDE.md").read_text()
PROSE = re.sub(r"```.*?```", "", GUIDE, flags=re.DOTALL)


def load(name: str) -> ModuleType:
    """guide/NAME.py under a name of its own: `trace` is also a module of Python's."""
    spec = importlib.util.spec_from_file_location(f"guide_{name}", ROOT / "guide" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def trace() -> ModuleType:
    return load("trace")


@pytest.fixture(scope="module")
def step(trace):
    return trace.run()


def part(number: int) -> str:
    """The text of one numbered part of the guide."""
    return re.search(rf"^## {number}\. .*?(?=^## |\Z)", GUIDE, flags=re.MULTILINE | re.DOTALL)[0]


# --- the traced step ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def printed() -> str:
    command = [sys.executable, str(ROOT / "guide" / "trace.py")]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout


def test_the_guide_quotes_what_the_trace_prints(printed):
    """A change of a formula, or of the tiny model, would leave yesterday's numbers in the guide."""
    blocks = re.findall(r"```text\n(.*?)```", part(10), flags=re.DOTALL)
    quoted = "\n".join(block for block in blocks if re.match(r"\d\. ", block))
    lines = [line for line in quoted.split("\n") if line]
    assert lines == [line for line in printed.split("\n") if line]


def test_numbers_between_the_quotes_are_of_the_trace(printed):
    """The text repeats numbers to explain them: with other digits it would only confuse."""
    known = {float(number) for number in re.findall(r"\d+\.\d+", printed)}
    entropy = float(re.search(r"entropy here (\S+)", printed)[1])
    known |= {math.exp(-entropy), 1.2, 0.8, 0.99}  # 1 / e^H; temperature, clip and decay of T1
    prose = re.sub(r"```.*?```", "", part(10), flags=re.DOTALL)
    for number in re.findall(r"\d+\.\d+", prose):
        digits = len(number.split(".")[1])
        assert any(round(value, digits) == float(number) for value in known), number


def test_traced_gradient_is_autograds(trace, step):
    """The guide prints a formula beside autograd's result: it could lack a sign or a factor."""
    advantage, entropy = trace.gradient_by_formula(step)
    torch.testing.assert_close(
        advantage + entropy, step.logits.grad[step.traced], atol=1e-12, rtol=1e-9
    )


def test_traced_gradient_is_a_finite_difference(trace, step):
    """Autograd runs through the kernels' own backward; here the loss is moved, by one logit."""
    per_token = step.spread(step.advantages)
    targets = torch.tensor([token for _, response in step.rows for token in response])

    def loss_at(token: int, change: float) -> float:
        logits = step.logits.detach().clone()
        logits[step.traced, token] += change
        logprob, entropy = kernels.logprob_entropy(logits, targets, trace.RECIPE.temperature)
        surrogate = trace.surrogate_loss(logprob, step.old, per_token)
        return (surrogate - trace.RECIPE.entropy_coef * trace.mean_entropy(entropy)).item()

    assert abs(loss_at(0, 0.0) - step.loss) < 1e-12
    likely = step.logits[step.traced].argsort(descending=True)[:5].tolist()
    for token in likely:
        slope = (loss_at(token, 1e-4) - loss_at(token, -1e-4)) / 2e-4
        assert abs(slope - step.logits.grad[step.traced, token].item()) < 1e-8


def test_traced_advantages_by_hand(step):
    """The trace goes through rl.py's functions; this sum does not."""
    rewards = [1.0, 0.0, -1.0, 1.0]
    kl = (step.sums(step.old) - step.sums(step.anchor_old)).tolist()
    shaped = [reward - 2e-4 * k for reward, k in zip(rewards, kl)]
    for i, advantage in enumerate(step.advantages.tolist()):
        others = [value for j, value in enumerate(shaped) if j != i]
        assert abs(advantage - (shaped[i] - sum(others) / 3)) < 1e-12
    lengths = step.lengths
    assert lengths == [53, 39, 54, 39]
    assert sum(lengths) == 185


# --- the numbers of the course --------------------------------------------------------------------


def group(right: int, samples: int) -> tuple[str, str]:
    """Leave-one-out advantages of a right and of a wrong response, as the guide writes them."""
    rewards = (torch.arange(samples) < right).double()
    advantages = rl.leave_one_out(rewards[None])[0]
    return f"{advantages[0]:+.2f}", f"{advantages[-1]:+.2f}"


@pytest.mark.parametrize("right", [1, 38, 59])
def test_leave_one_out_numbers(right):
    """The table from which "rare failures dominate" is read."""
    up, down = group(right, 64)
    assert f"| {right} of 64 | {up} | {down} |" in GUIDE


def test_own_reward_in_the_baseline_shrinks():
    """(K-1)/K of the gradient, and the identity with the group's mean."""
    rewards = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with_own = rewards - rewards.mean(dim=1, keepdim=True)
    torch.testing.assert_close(with_own, 3 / 4 * rl.leave_one_out(rewards))
    assert f"to {3 / 4} for K = 4, to {63 / 64:.3f} for K = 64" in " ".join(PROSE.split())


def test_shares_of_equal_groups():
    """How much a small K loses, in part 3 and in the first answer."""
    wrong = [f"{100 * 0.95**samples:.0f} %" for samples in (4, 64)]
    equal = [
        f"{100 * (0.9**samples + 0.1**samples):.{digits}f} %"
        for samples, digits in ((4, 0), (64, 1))
    ]
    text = " ".join(PROSE.split())
    assert f"With K = 4, all four fail in {wrong[0]} of the groups." in text
    assert f"With K = 64 all fail in {wrong[1]}." in text
    assert f"{wrong[0]} of the groups are all wrong, instead of {wrong[1]}" in text
    assert f"{equal[0]} are equal, instead of {equal[1]}" in text


def test_entropy_numbers():
    """H and dH/dz of (0.9, 0.1), by the kernels that training uses."""
    logits = torch.tensor([[0.9, 0.1]], dtype=torch.float64).log().requires_grad_()
    _, entropy = kernels.logprob_entropy(logits, torch.tensor([0]))
    entropy.sum().backward()
    down, up = logits.grad[0].tolist()
    assert f"H       = {entropy.item():.3f}" in GUIDE
    assert f"dH/dz_1 = -0.9 * (log 0.9 + 0.325) = {down:.3f}" in GUIDE
    assert f"dH/dz_2 = -0.1 * (log 0.1 + 0.325) = {up:+.3f}" in GUIDE
    times = 0.1 / (-down * 1e-3)
    assert 480 < times < 520, "five hundred times as much"


def test_anchor_and_kl_numbers():
    """What is left of the start after 56 steps, when half is, and what a nat costs."""
    recipe = load("trace").RECIPE
    assert (recipe.anchor_decay, recipe.kl_coef, recipe.entropy_coef) == (0.99, 2e-4, 1e-3)
    assert f"0.99^56 = {0.99**56:.2f}" in GUIDE
    assert f"Half is left after {math.log(0.5) / math.log(0.99):.0f} steps" in " ".join(
        PROSE.split()
    )
    anchor = torch.nn.Linear(1, 1, bias=False).double()
    policy = torch.nn.Linear(1, 1, bias=False).double()
    torch.nn.init.ones_(anchor.weight)
    torch.nn.init.zeros_(policy.weight)
    for _ in range(56):
        rl.update_anchor(anchor, policy, recipe.anchor_decay)
    assert f"{anchor.weight.item():.2f}" == "0.57"
    assert "One nat costs 0.0002" in GUIDE
    assert f"A right answer is worth {1 / recipe.kl_coef:,.0f} nats" in " ".join(PROSE.split())


# --- what it names --------------------------------------------------------------------------------


FILES = "py|md|png|json|jsonl"
NAMES = re.findall(rf"`([a-z]+\.(?!(?:{FILES})\b)\w+)(?:\.\w+)?`", PROSE)


@pytest.mark.parametrize("name", sorted(set(NAMES)))
def test_functions_exist(name):
    """Each answer says where one sees it: a function that moved must move there too."""
    module, function = name.split(".")
    files = [ROOT / f"{module}.py", *(ROOT / module).glob("*.py")]
    text = "\n".join(path.read_text() for path in files if path.exists())
    assert re.search(rf"^(def|class) {function}\b", text, flags=re.MULTILINE), f"no {name}"


def test_links_lead_somewhere():
    """Pictures are drawn by a script, and titles change."""
    for target in re.findall(r"\]\(([^)#]+)\)", GUIDE):
        assert (ROOT / target).exists(), target
    anchors = set()
    for title in re.findall(r"^## (.*)$", GUIDE, flags=re.MULTILINE):
        anchors.add(re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-"))
    assert set(re.findall(r"\]\(#([^)]+)\)", GUIDE)) == anchors


def test_pictures_are_drawn_and_small(tmp_path):
    """The script draws every picture that the guide shows; none is too large for a page."""
    pictures = load("pictures")
    pictures.main(tmp_path)
    shown = set(re.findall(r"\]\(guide/(\w+\.png)\)", GUIDE))
    assert shown == set(pictures.PICTURES) == {path.name for path in tmp_path.glob("*.png")}
    for name in shown:
        assert (ROOT / "guide" / name).stat().st_size < 80_000, name


def metric_names(table: str) -> set[str]:
    """The names in the first column of a table."""
    names = set()
    for line in table.split("\n"):
        if line.startswith("| `"):
            names |= set(re.findall(r"`(\w+)`", line.split("|")[1]))
    return names


def logged(command: list[str], out: Path) -> set[str]:
    """Run a command for a step; the metrics it wrote."""
    subprocess.run(
        [sys.executable, *command, "--out", str(out)], check=True, cwd=ROOT, capture_output=True
    )
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return set().union(*(json.loads(line) for line in lines))


def test_every_metric_is_explained(tmp_path):
    """A metric that nobody explains is looked at by nobody; one that is gone is searched for."""
    of_rl, of_sft = part(12).split("`sft.py` writes these")
    sft = [
        "sft.py",
        "--task",
        "countdown",
        "--steps",
        "1",
        "--chains",
        "40",
        "--batch-tokens",
        "512",
    ]
    assert logged(sft, tmp_path / "sft") == metric_names(of_sft)
    # Two tokens of an untaught model are garbled now and then: the only rewards that can differ.
    few = ["--steps", "1", "--prompts", "4", "--samples", "8", "--max-tokens", "2"]
    rl_flags = ["--model", str(tmp_path / "sft"), "--task", "countdown", "--patterns", "garbled"]
    more = ["--start-kl", "--entropy-target", "0.1"]
    found = logged(["rl.py", *rl_flags, *few, *more], tmp_path / "rl")
    assert found == metric_names(of_rl) - {"value_loss"}  # the critic's, which T1 has not


def test_half_for_the_right_format(tmp_path):
    """The answer to question 7 is copied and run: it must be a whole file, and pay what it says."""
    code = re.search(r"```python\n(# half\.py.*?)```", GUIDE, flags=re.DOTALL)[1]
    (tmp_path / "half.py").write_text(code)
    reward = runpy.run_path(str(tmp_path / "half.py"))["reward"]
    assert rl.RECIPES.pop("mine").reward is reward
    verdicts = [Verdict(outcome) for outcome in ("correct", "wrong", "no_answer")]
    responses = [SimpleNamespace(verdict=verdict) for verdict in verdicts]
    assert reward(responses, None).tolist() == [1.0, 0.5, 0.0]
