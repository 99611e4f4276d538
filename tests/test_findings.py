"""findings.py and jobs.py: runs and their names, verdicts and columns by hand, every finding from
end to end on runs of two steps, and what happens to what is interrupted, fails, or is not ours.

Commands run in this process, one after the other, for every start of one costs seconds; two tests
start real ones."""

import contextlib
import importlib
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import tyro

import behaviours
import cli
import cot
import demo
import findings
import jobs
import pretrained
import rl
import runfolder
from benchmarks import keep_findings
from cli import UserError
from evaluate import Result
from findings import AT_SAME_KL, COLUMNS, FINDINGS, FIRST_SEED, Claim, Config, Scale, Seen
from jobs import Jobs, Stage, Task
from model import load_pretrained
from runfolder import read_metrics

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "benchmarks" / "findings"
TINY = Scale(chains=120, sft_steps=2, steps=2, long=3, heldout=4, samples=2)


class InProcess:
    """A command that runs here as soon as it is waited for."""

    started: list[str] = []  # noqa: RUF012 (emptied by the tests that read it)

    def __init__(self, words: list[str], folder: Path, log: Path):
        self.words, self.folder, self.log = words, folder, log
        InProcess.started.append(" ".join(words))

    def wait(self) -> int:
        module = importlib.import_module(self.words[0].removesuffix(".py"))
        flags = tyro.cli(module.Config, args=self.words[1:])
        said = io.StringIO()
        code = 0
        with contextlib.chdir(self.folder), contextlib.redirect_stdout(said):
            try:
                module.main(flags)
            except (UserError, KeyboardInterrupt) as error:
                said.write(f"error: {error}\n")
                code = 2
        with open(self.log, "a", encoding="utf-8") as file:
            file.write(said.getvalue())
        return code


@pytest.fixture
def tiny(monkeypatch):
    """Everything small, and in this process."""
    rl_flags = demo.rl_flags
    few = {"prompts": 4, "samples": 4}
    monkeypatch.setattr(demo, "rl_flags", lambda *given: replace(rl_flags(*given), **few))
    for module in (runfolder, behaviours):  # the commands' own figures would take half of the time
        monkeypatch.setattr(module, "plot", lambda *_: None)
    monkeypatch.setattr(findings, "SCALE", TINY)
    monkeypatch.setattr(jobs, "launch", InProcess)
    monkeypatch.setattr(demo, "BUDGET", 12)
    # The second lies beyond the longest chain: so a gain is defined.
    monkeypatch.setitem(findings.MEASURES, "evaluation-budgets", {"budgets": "12,90,96"})
    InProcess.started.clear()


@pytest.fixture(scope="session")
def out(tmp_path_factory) -> Path:
    """The folder that all findings share: what one has run, the next one finds."""
    return tmp_path_factory.mktemp("findings") / "out"


# --- names and plans ------------------------------------------------------------------------------


def test_a_run_has_one_name_and_a_name_one_run():
    """Guards against two settings in one folder, of which the second would take the first one's
    results, and against a run that is done twice under two names."""
    scale = Scale()
    names: dict[str, findings.Run] = {}
    for finding in FINDINGS.values():
        for run, _ in finding(scale).settings.values():
            assert names.setdefault(run.name, run) == run
    flags = [(run.chains, run.flags) for run in names.values()]
    assert len(set(flags)) == len(flags)

    base = scale.run()
    assert base.name == "base" and base.flags == ()
    same = {"temperature": 1.2, "penalty": "set", "samples": 16, "kl_coef": 2e-4}
    assert scale.run(**same, steps=scale.steps) == base
    assert scale.run(samples=4, prompts=24) == scale.run(prompts=24, samples=4)
    assert scale.run(samples=4, prompts=24).name == "prompts=24,samples=4"
    assert scale.run("one-attempt").name == "chains=one-attempt"
    # T1's own temperature is no default of GRPO's.
    assert scale.run(recipe="grpo", temperature=1.2).flags != scale.run(recipe="grpo").flags

    settings = {name: finding(scale).settings for name, finding in FINDINGS.items()}
    assert settings["exchange"] == settings["oversampling"]
    assert settings["behaviours"] == settings["scaling"]
    hot = str(findings.HOT)
    assert settings["temperature"][hot] == settings["penalties"][f"set, {hot}"]
    with_base = ("temperature", "penalties", "regularisers", "initialisation", "relatives")
    for name in with_base:
        assert (base, scale.steps) in settings[name].values(), name


def test_what_is_run_is_the_demo_but_for_what_is_asked():
    """Guards against a base that drifts from the demo's flags, a setting whose flag does not reach
    the command, a KL from another seed's model, and runs before the SFT model that they start
    from."""
    scale = Scale()
    tasks = findings.plan(scale, [FINDINGS[name](scale) for name in FINDINGS], 2)
    homes = [task.home for task in tasks]
    assert len(set(homes)) == len(homes)
    for task in tasks:
        assert task.needs is None or homes.index(task.needs) < homes.index(task.home)
    assert len([task for task in tasks if task.needs is None]) == 2 * len(findings.CHAINS)

    by_home = {str(task.home): task for task in tasks}
    first = by_home["rl/temperature=0.8/seed-4"].stages
    usual = demo.rl_flags(demo.Config(seed=4, steps=scale.steps), Path())
    changed = {
        name: value for name, value in vars(first[0].flags).items() if value != getattr(usual, name)
    }
    assert changed.keys() == {"model", "out", "temperature", "checkpoint_every", "keep_every"}
    assert changed["temperature"] == 0.8 and changed["keep_every"] == 6
    assert changed["model"] == "sft/three-attempts/seed-4/sft"
    assert [stage.flags.step for stage in first[1:3]] == [6, 12]
    assert first[3].flags.kl_from == changed["model"] and first[3].flags.budgets == ""
    assert [Path(model).name for model in first[3].flags.model] == ["step-6", "step-12", "rl"]
    rlsp = by_home["rl/length_cost=5.0,recipe=rlsp/seed-3"].stages[0]
    assert rlsp.script == "rlsp.py" and rlsp.flags.length_cost == 5
    # The base is measured twice: as everybody, and of 16 samples for `regularisers`.
    assert [stage.makes.name for stage in by_home["rl/base/seed-3"].stages[-2:]] == [
        "evaluation",
        "evaluation-16",
    ]
    chains = by_home["sft/one-attempt/seed-3"].stages[0].flags
    assert chains.attempts == 1 and chains == replace(
        demo.chain_flags(demo.Config(seed=3), chains.out), attempts=1
    )


@pytest.mark.parametrize(
    "steps, wanted", [(90, [27, 54, 90]), (21, [6, 12, 21]), (1, [1]), (2, [1, 2])]
)
def test_what_is_measured_is_kept(steps: int, wanted: list[int]):
    """Guards against a checkpoint that is measured and was not kept: --keep-every is the first."""
    run = Scale().run(steps=steps)
    assert run.measured == wanted
    assert all(step % wanted[0] == 0 for step in wanted[:-1])


def test_equal_responses_are_equal():
    """Guards against a comparison at equal responses in which one setting has more of them."""
    scale = Scale()
    drawn = {}
    for label, (run, _) in FINDINGS["oversampling"](scale).settings.items():
        prompts, samples = map(int, label.split(" x "))
        # A flag at the base's value is left out.
        assert dict(run.flags).get("samples", 16) == samples
        assert dict(run.flags).get("prompts", 64) == prompts
        drawn[label] = run.steps * prompts * samples
    assert drawn["24 x 64"] == drawn["96 x 16"] == drawn["384 x 4"] == scale.steps * 64 * 16
    assert len({run.steps for run, _ in FINDINGS["oversampling"](scale).settings.values()}) == 1


# --- by hand --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "gaps, wanted",
    [
        ([0.1, 2.0, 3.0], "agrees"),
        ([-0.1, -2.0], "contradicts"),
        ([5.0, 5.0, -0.1], "undecided by 3 seeds"),
        ([5.0, 0.0], "undecided by 2 seeds"),
        ([-5.0, 0.0], "undecided by 2 seeds"),
        ([math.nan, 1.0], "undecided by 2 seeds"),
        ([0.0], "undecided by 1 seed"),
        ([3.0], "undecided by 1 seed"),
    ],
)
def test_a_verdict_needs_every_seed(gaps, wanted):
    """Guards against a mean that hides a seed of the other sign, and against equal settings (which a
    policy that learned nothing gives) that count for either side."""
    assert findings.verdict(gaps) == wanted


def test_the_sentence_counts_what_the_paper_says():
    """Guards against a sentence that counts our own questions as agreement with the paper, or that
    forgets what contradicts it."""
    rows = {"a": [1.0, 2.0], "b": [-1.0, -2.0], "c": [1.0, -1.0]}
    gaps = {Claim(what, "", ""): row for what, row in rows.items()}
    ours = {Claim("d", "", "", in_paper=False): [1.0, 1.0]}
    assert findings.sentence(gaps | ours, 2) == (
        "With 2 seeds this miniature agrees with the paper in 1 of 3 comparisons, contradicts it in "
        "1, and leaves 1 undecided."
    )
    for nothing in ({}, ours):
        assert "says nothing" in findings.sentence(nothing, 2)


def test_numbers_are_rounded_alike():
    """Guards against 1.2e-05 and -0.000 in a table, and an interval of one seed."""
    assert findings.spread([77.14, 79.06]) == "78.1 [77.1, 79.1]"
    assert findings.spread([-0.00001, 0.25]) == "0.12 [0.000, 0.25]"
    assert findings.spread([-4.567]) == "-4.57"


def result(right: list[float], kl: float = 0.0, **more) -> Result:
    """Of problems with these pass rates, of ten samples each."""
    correct = [[n < round(10 * rate) for n in range(10)] for rate in right]
    given = {
        "correct": correct,
        "lengths": [[4] * 10 for _ in right],
        "truncated": 0.0,
        "majority": {},
        "curve": {},
        "failures": {},
        "ks": [1],
        "attempts": [[2] * 10 for _ in right],
        "repeats": 0.25,
        "lost": 0.0,
        "kl": [kl] * len(right),
    }
    return Result(**given | more)


def test_columns_by_hand():
    """Guards against a gain that counts budgets below the chains shown, metrics of later steps than
    a setting's, a mean over the whole course for "late", and shares where percent is meant."""
    curve = {10: [0.0, 0.2], 60: [0.5, 0.5], 100: [0.5, 0.7], 300: [1.0, 0.9]}
    metrics = []
    for step in range(1, 10):
        row = {"step": step, "length": 50.0, "truncated": step / 10, "tokens_per_second": 100.0}
        metrics.append(row | {"seconds_sampling": 3.0, "seconds_training": 2.0})
    course = {0: result([0.1, 0.3]), 6: result([0.5, 0.7], 3.0, curve=curve), 9: result([1, 1])}
    seen = Seen(6, course, metrics, shown=67)
    assert COLUMNS["accuracy, %"](seen) == pytest.approx(60)
    assert COLUMNS["gain, points"](seen) == pytest.approx(95 - 60)
    assert COLUMNS["at the least budget, %"](seen) == pytest.approx(10)
    assert COLUMNS["at the largest, %"](seen) == pytest.approx(95)
    assert COLUMNS["KL from SFT"](seen) == 3.0
    assert COLUMNS["KL from SFT"](replace(seen, step=0)) == 0.0
    assert COLUMNS["overlong in RL, %"](seen) == pytest.approx(55)  # steps 5 and 6
    assert COLUMNS["attempts that repeat, %"](seen) == 25
    # Of ten samples the first four are right: with 5, 3, 4 and 1 attempts.
    tried = result([0.4], attempts=[[5, 3, 4, 1, 6, 2, 2, 2, 2, 2]])
    assert COLUMNS["with more than were shown, %"](replace(seen, course={6: tried})) == 30
    assert COLUMNS["right, with more, %"](replace(seen, course={6: tried})) == 20
    assert COLUMNS["responses drawn, thousands"](seen) == pytest.approx(6 * 10 / 1000)
    assert math.isnan(COLUMNS["overlong in RL, %"](replace(seen, step=0)))
    assert [point.step for point in seen.on_the_way()] == [0, 6]


def test_accuracy_at_the_same_kl_by_hand():
    """Guards against a comparison at the end, where the one that moved less would win or lose by
    that alone. Here `more` has 30 points after 4 nats, and `less` 20 after 8: at 4 nats, 10."""
    more = Seen(2, {0: result([0.0]), 1: result([0.3], 4.0), 2: result([0.3], 4.0)}, [], 0)
    less = Seen(2, {0: result([0.0]), 1: result([0.1], 4.0), 2: result([0.2], 8.0)}, [], 0)
    claim = Claim(AT_SAME_KL, "more", "less")
    assert claim.gap(more, less) == pytest.approx(20) and claim.gap(less, more) == pytest.approx(
        -20
    )
    assert Claim("KL from SFT", "", "").gap(more, less) == -4


def test_the_same_way_at_another_pace_is_no_gain():
    """Guards against a comparison that punishes whoever moves further between two checkpoints:
    both here go along one curve, accuracy = 0.2 sqrt(KL)."""
    slow = Seen(2, {0: result([0.0]), 1: result([0.1], 0.25), 2: result([0.2], 1.0)}, [], 0)
    fast = Seen(2, {0: result([0.0]), 1: result([0.3], 2.25), 2: result([0.4], 4.0)}, [], 0)
    assert Claim(AT_SAME_KL, "more", "less").gap(fast, slow) == pytest.approx(0)


# --- from end to end ------------------------------------------------------------------------------


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("name", FINDINGS)
def test_every_finding_runs(name: str, out: Path, capsys):
    """Guards against a finding that nobody has run: a flag that is gone, a column or a panel of
    something that was not measured, a claim about a setting that there is not; and against a second
    start that runs anything again."""
    config = Config(name, seeds=1, jobs=1, out=str(out))
    findings.main(config)
    printed = capsys.readouterr().out
    finding = FINDINGS[name](TINY)
    page = (out / f"{name}.md").read_text()
    assert page.startswith(f"# {name}: {finding.question}") and finding.paper in page
    assert f"python findings.py {name} --seeds=1" in page and f"![{name}]({name}.png)" in page
    rows = [line.split(" | ") for line in page.split("\n") if line.startswith("| ")]
    assert len(rows) == 1 + len(finding.settings)
    assert {len(row) for row in rows} == {1 + len(finding.columns)}
    assert page.count("**") == 2 * len(finding.claims)
    assert page.count("our question") == sum(not claim.in_paper for claim in finding.claims)
    assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert page.split("\n\n![")[0] in printed
    assert printed.rstrip().split("\n")[-1].startswith("next: python findings.py all")

    InProcess.started.clear()
    findings.main(config)
    assert not InProcess.started and (out / f"{name}.md").read_text() == page


@pytest.mark.usefixtures("tiny")
def test_all_of_them_share_their_runs(out: Path, capsys):
    """Guards against `all` that runs what single findings have run, or that forgets one of them.
    (Alone, it runs what is not there yet.)"""
    findings.main(Config("all", seeds=1, jobs=1, out=str(out)))
    printed = capsys.readouterr().out
    assert all(f"\n{name}: " in printed and (out / f"{name}.md").exists() for name in FINDINGS)
    homes = [path.parent for path in out.glob("rl/*/seed-3/rl")]
    assert len(homes) == len(
        {run for f in FINDINGS.values() for run, _ in f(TINY).settings.values()}
    )
    known = json.loads((out / "runs.json").read_text())
    assert all(command["done"] for command in known.values())
    measured = json.loads((out / "rl/base/seed-3/evaluation/results.json").read_text())
    assert len(measured["models"]) == 2 and all(
        len(model["result"]["kl"]) == TINY.heldout for model in measured["models"].values()
    )


@pytest.mark.usefixtures("tiny")
def test_what_is_seen_is_of_its_step(out: Path):
    """Guards against the results of one checkpoint shown as another's: those of the SFT model, of
    the policies on the way and of the last one are told apart by their fingerprints."""
    findings.main(Config("scaling", seeds=1, jobs=1, out=str(out)))
    run = TINY.run(steps=TINY.long)
    home = out / findings.run_home(run, FIRST_SEED)
    seen = findings.see(out, run, 1, FIRST_SEED, "evaluation-budgets")
    models = {0: out / "sft/three-attempts/seed-3/sft", 1: home / "step-1", 2: home / "step-2"}
    models[3] = home / "rl"
    assert list(seen.course) == list(models) and len(seen.metrics) == 3
    for step, model in models.items():
        assert seen.course[step].fingerprint == pretrained.fingerprint(str(model)), step


# --- what is kept ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("tiny")
def test_tables_come_from_what_was_kept(out, tmp_path, capsys):
    """Guards against an archive from which other tables come than from the runs, or that wants them
    run again; and against a model, a checkpoint or a path of this machine in it."""
    findings.main(Config("scaling", seeds=1, jobs=1, out=str(out)))
    page = (out / "scaling.md").read_text()
    kept, again = tmp_path / "runs.tar.xz", tmp_path / "again"
    keep_findings.main(keep_findings.Config(str(out), str(kept)))
    with tarfile.open(kept) as archive:
        names = archive.getnames()
        archive.extractall(again, filter="data")
    assert not any("checkpoints" in name or name.endswith("safetensors") for name in names)
    for file in again.rglob("*.json*"):
        assert str(tmp_path.parent) not in file.read_text(), file
    InProcess.started.clear()
    findings.main(Config("scaling", seeds=1, jobs=1, out=str(again)))
    assert not InProcess.started
    assert (again / "scaling.md").read_text() == page.replace(str(out), str(again))
    with pytest.raises(UserError, match="holds no findings"):
        keep_findings.main(keep_findings.Config(str(tmp_path), str(kept)))


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    """The archive that this project keeps, unpacked."""
    folder = tmp_path_factory.mktemp("kept")
    with tarfile.open(PAGES / "runs.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.mark.parametrize("name", FINDINGS)
def test_pages_are_what_the_archive_says(name, kept, monkeypatch):
    """Guards against a page of a question or a column that the code no longer has, of other runs
    than those that are kept, or with a number that somebody has mended; and a finding without one.
    Nothing is run: what is not kept would be an error here."""
    page = PAGES / f"{name}.md"
    seeds = int(re.search(rf"findings.py {name}(?: --seeds=(\d+))?\n", page.read_text())[1] or 3)
    monkeypatch.setattr(findings, "draw", lambda *_: None)
    monkeypatch.setattr(jobs, "launch", None)
    findings.main(Config(name, seeds=seeds, out=str(kept)))
    assert (kept / page.name).read_text() == page.read_text()
    assert page.with_suffix(".png").exists()


# --- interrupted, failed, not ours ----------------------------------------------------------------


def begun(out: Path, folder: Path) -> Path:
    """A folder with the SFT model and nothing else."""
    findings.main(Config("penalties", seeds=1, jobs=1, out=str(out)))  # all done, perhaps
    shutil.copytree(out / "sft", folder / "sft")
    known = json.loads((out / "runs.json").read_text())
    kept = {name: command for name, command in known.items() if name.startswith("sft/three")}
    (folder / "runs.json").write_text(json.dumps(kept))
    return folder


@pytest.mark.usefixtures("tiny")
def test_an_interrupted_run_goes_on_to_the_same_numbers(out, tmp_path, monkeypatch):
    """Guards against a run that begins again, goes on from another state, or counts as done: one is
    interrupted in its second step, where it has learned something."""
    folder, run_step = begun(out, tmp_path / "again"), rl.run_step

    def interrupted(learner, step, train_step):
        if step == 2:
            raise KeyboardInterrupt
        return run_step(learner, step, train_step)

    run = TINY.run(penalty="advantage")
    task = findings.run_task(TINY, run, FIRST_SEED, ["evaluation"])
    monkeypatch.setattr(rl, "run_step", interrupted)
    assert list(Jobs(folder, 1).run([task])) == [task.home]
    assert not Jobs(folder, 1).is_done(task)
    monkeypatch.setattr(rl, "run_step", run_step)
    InProcess.started.clear()
    assert Jobs(folder, 1).run([task]) == {} and Jobs(folder, 1).is_done(task)
    assert InProcess.started[0].endswith("--resume") and len(InProcess.started) == 3

    course = []
    for root in (out, folder):
        home = root / task.home
        rows = read_metrics(home / "rl" / "metrics.jsonl")
        numbers = [[row["reward"], row["loss"], row["grad_norm"]] for row in rows]
        models = json.loads((home / "evaluation" / "results.json").read_text())["models"]
        course.append((numbers, models))
    assert course[0] == course[1] and course[0][0][1][2] > 0
    weights = [load_pretrained(root / task.home / "rl" / "model") for root in (out, folder)]
    pairs = zip(weights[0].parameters(), weights[1].parameters())
    assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.usefixtures("tiny")
def test_a_failing_run_is_named_and_the_others_are_done(out, tmp_path, monkeypatch, capsys):
    """Guards against one bad run that stops hours of others, that is lost in their output, that a
    finding is reported without, or that is never tried again."""
    folder, main = begun(out, tmp_path / "again"), rl.main

    def fails_hot(config):
        if config.temperature == findings.HOT and config.penalty == "none" and not config.export:
            raise UserError("the sampler is on fire")
        main(config)

    monkeypatch.setattr(rl, "main", fails_hot)
    monkeypatch.setattr(sys, "argv", ["findings.py"])
    args = ["penalties", "--seeds", "1", "--jobs", "1", "--out", str(folder)]
    with pytest.raises(SystemExit) as ended:
        cli.run(findings.main, Config, args)
    assert ended.value.code == 2
    printed = capsys.readouterr()
    home = f"rl/penalty=none,temperature={findings.HOT}/seed-3"
    assert f"failed: {home}: {folder / home}/rl.log: error: the sampler is on fire" in printed.out
    assert "1 of 7 failed" in printed.err and not (folder / "penalties.md").exists()
    assert len(list(folder.glob("rl/*/seed-3/evaluation/results.json"))) == 5

    monkeypatch.setattr(rl, "main", main)
    InProcess.started.clear()
    findings.main(Config("penalties", seeds=1, jobs=1, out=str(folder)))
    assert InProcess.started and all(home in line for line in InProcess.started)
    assert (folder / "penalties.md").exists()


@pytest.mark.usefixtures("tiny")
def test_runs_wait_for_their_sft_model(tmp_path):
    """Guards against RL that starts without its model, with a message about that one missing, where
    what went wrong is the SFT before it."""
    bad = cot.Config("chains.jsonl", count=0)
    first = Task(Path("a"), [Stage(Path("a/chains.jsonl"), "cot.py", bad, resumes=False)])
    second = Task(Path("b"), [Stage(Path("b/rl"), "rl.py", rl.Config("", ""))], needs=first.home)
    failures = Jobs(tmp_path, 2).run([first, second])
    assert "--count" in failures[Path("a")] and failures[Path("b")] == "not begun: it needs a"
    assert len(InProcess.started) == 1


@pytest.mark.usefixtures("tiny")
def test_real_commands(tmp_path, monkeypatch):
    """Guards against a command that is started in the wrong folder, with flags that it does not
    know, or on all cores; and against an exit code that is not looked at. Two at a time."""
    monkeypatch.undo()
    good = cot.Config("a b/chains.jsonl", count=5)  # a folder with a space
    bad = cot.Config("c/chains.jsonl", count=0)
    tasks = []
    for flags in (good, bad):
        makes = Path(flags.out)
        tasks.append(Task(makes.parent, [Stage(makes, "cot.py", flags, resumes=False)]))
    work = Jobs(tmp_path / "out", 2)
    failures = work.run(tasks)
    assert list(failures) == [Path("c")]
    assert re.search(r"c/chains\.jsonl\.log: error: --count", failures[Path("c")])
    assert len(cli.read_jsonl(tmp_path / "out" / "a b" / "chains.jsonl")) == 5
    assert work.is_done(tasks[0]) and not work.is_done(tasks[1])
    known = json.loads((tmp_path / "out" / "runs.json").read_text())
    minutes = sum(command["seconds"] for command in known.values()) / 60
    assert re.fullmatch(
        rf"{minutes:.0f} minutes, processes of one core side by side, .+ cores\.", work.cost(tasks)
    )


def test_ctrl_c_in_a_terminal_does_not_reach_the_commands(tmp_path):
    """Guards against a terminal's Ctrl-C, which goes to a whole group of processes, ending commands
    in the middle of a checkpoint: only `stop` may, which they let end it."""
    process = jobs.launch(["cot.py", "--help"], tmp_path, tmp_path / "log")
    assert os.getpgid(process.pid) != os.getpgid(0)
    assert process.wait() == 0


@pytest.mark.usefixtures("tiny")
def test_ctrl_c_ends_the_processes(tmp_path, monkeypatch):
    """Guards against processes that go on computing behind a prompt that has returned, and against
    the next ones being started all the same, behind one that was done just then."""
    children = []
    waiting = "sleep 60 & trap 'kill $!; exit 0' TERM; wait"

    def sleeping(words: list[str], folder: Path, log: Path) -> subprocess.Popen:
        (folder / Path(words[words.index("--out") + 1])).write_text("")
        children.append(subprocess.Popen(["sh", "-c", waiting]))
        if len(children) == 2:
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        return children[-1]

    monkeypatch.setattr(jobs, "launch", sleeping)
    began = time.perf_counter()
    with pytest.raises(KeyboardInterrupt, match="the same command goes on"):
        findings.main(Config("scaling", seeds=3, jobs=2, out=str(tmp_path / "out")))
    assert time.perf_counter() - began < 20
    assert len(children) == 2 and all(child.poll() == 0 for child in children)


@pytest.mark.usefixtures("tiny")
def test_a_run_of_another_base_is_refused(out, tmp_path, monkeypatch):
    """Guards against numbers of two bases in one table: the constants were changed, and the runs are
    the old ones."""
    folder = begun(out, tmp_path / "again")
    before = (folder / "runs.json").read_text()
    monkeypatch.setattr(findings, "SCALE", replace(TINY, sft_steps=3))
    with pytest.raises(UserError, match=r"sft was made with other flags \(--steps 2, now 3\)"):
        findings.main(Config("penalties", seeds=1, jobs=1, out=str(folder)))
    monkeypatch.setattr(findings, "SCALE", replace(TINY, heldout=5))
    with pytest.raises(UserError, match=r"evaluation was made with .*--limit 4, now 5"):
        findings.main(Config("penalties", seeds=1, jobs=1, out=str(folder)))
    assert (folder / "runs.json").read_text() == before and not InProcess.started


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    "flags, message",
    [
        ({"name": "overfitting"}, "overfitting is no finding: all, scaling, oversampling"),
        ({"seeds": 0}, "--seeds"),
        ({"jobs": 0}, "--jobs"),
        ({"out": "mine"}, "mine exists and holds no findings"),
        ({"out": "mine/thesis.tex"}, "thesis.tex exists and holds no findings"),
        ({"out": "mine/thesis.tex/new"}, "thesis.tex is not a folder"),
    ],
)
def test_bad_flags_are_refused_in_one_line(flags, message, tmp_path, monkeypatch):
    """Guards against hours of runs scattered over somebody's work, and against a traceback."""
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    Path("mine/thesis.tex").write_text("")
    with pytest.raises(UserError, match=message) as error:
        findings.main(Config(**{"name": "scaling", "out": "new"} | flags))
    assert "\n" not in str(error.value) and not InProcess.started
    assert sorted(map(str, Path().rglob("*"))) == ["mine", "mine/thesis.tex"]
