"""rl.py as a run: on several ranks, killed half-way, resumed, exported. The numbers must not know
of any of it.

The file is also the program that the tests start under torchrun (`worker`, at the end). Runs that
are to be killed are forked, which saves the imports; they are processes of their own, and die by
SIGKILL.
"""

import dataclasses
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # for the worker; pytest has them already

import test_rl as hand  # noqa: E402
import test_rlsp as critical  # noqa: E402

import cli  # noqa: E402
import parallel  # noqa: E402
import rl  # noqa: E402
import rlsp  # noqa: E402
import rollout  # noqa: E402
import runfolder  # noqa: E402
import tasks  # noqa: E402
from cli import UserError  # noqa: E402
from model import ModelConfig, load_pretrained, random_init, save_pretrained  # noqa: E402
from packing import Example, pack  # noqa: E402
from parallel import World  # noqa: E402
from sample import Sampler, SamplingParams  # noqa: E402

ALONE = World(0, 1, torch.device("cpu"))
STEPS = 4
CASES = {
    "whole": (10**6, range(8)),
    "split": (40, range(8)),
    "lonely": (10**6, [0]),
}  # micro_tokens, responses
TIMINGS = ("seconds_sampling", "seconds_verifying", "seconds_training", "tokens_per_second")


def flags(
    model: Path | str, out: Path | str, config_class: type[rl.Config] = rl.Config, **more
) -> rl.Config:
    few = {
        "prompts": 4,
        "samples": 6,
        "max_tokens": 24,
        "minibatches": 2,
        "checkpoint_every": 2,
        "show_every": 0,
    }
    chosen = few | {"task": "countdown", "steps": STEPS, "lr": 1e-3, "device": "cpu"} | more
    return config_class(model=str(model), out=str(out), **chosen)


def rlsp_flags(model: Path | str, out: Path | str, **more) -> rlsp.Config:
    at_once = {"length_cost": 2.0, "critic_first": 0}  # the policy learns from the first step on
    return flags(model, out, rlsp.Config, **at_once | more)


RUNS = {"t1": (flags, rl.main), "rlsp": (rlsp_flags, rlsp.main)}


def save_babbler(folder: Path, shape: ModelConfig = hand.SHAPE) -> None:
    """A model that has seen some arithmetic: its responses end now and then, and are not all
    garbled.
    """
    model, rng = random_init(shape, 0), random.Random(0)
    scorer = parallel.shard(model, ALONE)
    optimizer = parallel.adamw(scorer.parameters(), 1e-2)
    for _ in range(60):
        batch = []
        for problem, _ in zip(tasks.countdown(rng.randrange(10**6)), range(16)):
            x, y = rng.randrange(40), rng.randrange(40)
            prompt = tasks.prompt_ids(problem, hand.TOKENIZER)
            tokens = (
                prompt
                + hand.TOKENIZER.encode(f"{x}+{y}={x + y} not 7\n" * rng.randrange(3))
                + [hand.STOP]
            )
            batch.append(Example(tokens, [(len(prompt), len(tokens))]))
        optimizer.zero_grad()
        logprob, _ = parallel.log_probs(scorer, pack(batch))
        (-logprob.sum() / sum(example.targets for example in batch)).backward()
        optimizer.step()
    save_pretrained(model, folder, hand.TOKENIZER)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_pretrained(folder).named_parameters())


def metrics(run: Path) -> list[dict]:
    """All of metrics.jsonl but the timings, which differ by nature."""
    return [
        {k: v for k, v in row.items() if k not in TIMINGS}
        for row in runfolder.read_metrics(run / "metrics.jsonl")
    ]


def assert_same_run(one: Path, other: Path) -> None:
    """Bit for bit: the final policy and every metric."""
    assert metrics(one) == metrics(other) and len(metrics(one)) == STEPS
    pairs = weights(one).items(), weights(other).items()
    assert all(torch.equal(a, b) and name == same for (name, a), (same, b) in zip(*pairs))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "babbler"
    save_babbler(folder)
    return folder


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory) -> tuple[Path, float]:
    """(a run that nothing disturbed, the seconds it took)."""
    began, out = time.perf_counter(), tmp_path_factory.mktemp("runs") / "whole"
    rl.main(flags(model, out))
    return out, time.perf_counter() - began


# --- many ranks -----------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request, model, tmp_path_factory) -> dict:
    """What `worker` left behind on 2 and on 4 ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={request.param}",
        __file__,
    ]
    done = subprocess.run(
        [sys.executable, *command, str(model), str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=290,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(folder / "found.pt") | {"folder": folder, "size": request.param}


@lru_cache
def gradients(world: World, case: str, recipe: str) -> dict[str, torch.Tensor]:
    """The change of the (float64) models' weights by one step of plain gradient descent."""
    micro_tokens, rows = CASES[case]
    if recipe == "rlsp":
        learner, train_step = (
            critical.make_learner(world, micro_tokens=micro_tokens),
            rlsp.train_step,
        )
    else:
        learner, train_step = hand.make_learner(world=world), rl.train_step
        learner.config, learner.recipe = hand.step_config(micro_tokens=micro_tokens)
    responses = hand.make_responses(hand.make_learner())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rl, "minibatches", lambda *_: [list(rows)])  # of what the step has kept
        return hand.take_step(learner, responses, train_step)[0]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("recipe", ["t1", "rlsp"])
def test_gradients_do_not_depend_on_ranks(ranks, case, recipe):
    """Bug: gradients averaged over ranks or micro-batches; a rank with nothing to train on
    ("lonely") hangs or adds.
    """
    hand.assert_close(ranks[f"{case} {recipe}"], gradients(ALONE, case, recipe))


@pytest.fixture(scope="module")
def alone(model, tmp_path_factory) -> dict[str, Path]:
    """Three steps of each recipe in one process, to compare with."""
    folder = tmp_path_factory.mktemp("alone")
    for recipe, (made, main) in RUNS.items():
        main(made(model, folder / recipe, steps=3))
    return {recipe: folder / recipe for recipe in ("t1", "rlsp")}


@pytest.mark.parametrize("recipe", ["t1", "rlsp"])
def test_first_updates_do_not_depend_on_ranks(ranks, recipe, alone, model):
    """Bug: anything in the loop that knows its rank: draws, the order of responses, clipping,
    Adam's moments, the anchor, the sampler's copy of the weights. Real rollouts, three steps of two
    updates, fp32."""
    start, one, many = weights(model), weights(alone[recipe]), weights(ranks["folder"] / recipe)
    for name in start:
        assert (one[name] - start[name]).norm() > 1e-3 * start[
            name
        ].norm()  # it did learn something
        assert (many[name] - one[name]).norm() <= 1e-6 * one[name].norm(), name
    for row, other in zip(metrics(alone[recipe]), metrics(ranks["folder"] / recipe), strict=True):
        # The largest gap between sampler and trainer is rounding and nothing else, and that knows
        # how rows are packed.
        assert max(row.pop("mismatch_max"), other.pop("mismatch_max")) < 2e-5
        assert other == pytest.approx(row, rel=1e-4, abs=2e-6)
        assert row.get("dropped", 0) < 1


def drawn(model: Path, world: World) -> list[list[int]]:
    """The responses to a single prompt."""
    prompt = tasks.prompt_ids(next(tasks.countdown(3)), hand.TOKENIZER)
    sampler = Sampler(load_pretrained(model), hand.TOKENIZER)
    completions = rollout.draw(sampler, [prompt], [7], 6, SamplingParams(20), world)
    return [completion.tokens for completion in completions]


def test_ranks_share_one_prompt(ranks, model):
    """Bug: ranks without a prompt of their own wait, or draw samples that another rank draws."""
    assert ranks["drawn"] == drawn(model, ALONE) and len(set(map(tuple, ranks["drawn"]))) > 3


def test_checkpoint_of_several_ranks_resumes_on_one(ranks, model, tmp_path):
    """Bug: a checkpoint that only the same number of ranks can read; or a resumed sampler with the
    starting weights.
    """
    run = tmp_path / "run"
    shutil.copytree(ranks["folder"] / "t1", run)
    shutil.rmtree(run / "model")
    shutil.rmtree(run / "checkpoints" / "step-000003")
    flagged = json.loads((run / "config.json").read_text())
    rl.main(dataclasses.replace(rl.Config(**flagged), out=str(run), steps=3, resume=True))
    one, many = weights(run), weights(ranks["folder"] / "t1")
    for name in one:
        assert (many[name] - one[name]).norm() <= 1e-6 * one[name].norm(), name


def test_resumed_ranks_sample_from_the_resumed_weights(ranks):
    """Bug: after --resume the sampler of a run of several ranks still has the weights that the run
    began with.
    """
    if ranks["size"] == 4:
        pytest.skip("the worker does it on two ranks")
    assert metrics(ranks["folder"] / "resumed") == metrics(ranks["folder"] / "t1")


# --- one process ----------------------------------------------------------------------------------


def test_a_run_says_where_it_begins_and_ends(model, tmp_path, capsys):
    """Bug: nobody knows what is trained, or where the model is when it is done."""
    out = tmp_path / "run"
    rl.main(flags(model, out, steps=1))
    first, *_, last = capsys.readouterr().out.splitlines()
    count = sum(parameter.numel() for parameter in load_pretrained(out).parameters())
    for word in (model, f"{count:,} parameters", "4 x 6 responses", "24 tokens", "1 x cpu", out):
        assert str(word) in first
    assert f"{out}/model" in last and "python evaluate.py" in last and "sample.py" in last
    rl.main(flags(model, out, steps=2, resume=True))
    assert "2 steps, 1 of them done" in capsys.readouterr().out


def test_a_run_that_has_not_learned_says_so(model, tmp_path, capsys):
    """Bug: "the model is in ..." at the end of a run that has never changed it."""
    rl.main(flags(model, tmp_path / "run", steps=1, max_tokens=1, penalty="none"))
    *_, note, last = capsys.readouterr().out.splitlines()
    assert "no update; responses are cut off" in note and "the model is in" in last


def test_a_resumed_run_goes_on_in_its_dtype(model, tmp_path):
    """Bug: --dtype auto, the default, is noted as "auto": a run that began in bfloat16 is resumed
    on a CPU in float32, or not at all."""
    out = tmp_path / "run"
    rl.main(flags(model, out, steps=1, dtype="bfloat16"))
    rl.main(flags(model, out, steps=2, resume=True))
    assert [row["step"] for row in metrics(out)] == [1, 2]
    for row in metrics(out):
        assert row["mismatch"] > 1e-5  # in float32 it is rounding: below 1e-6
    rl.main(flags(model, tmp_path / "other", steps=1))
    assert json.loads((tmp_path / "other" / "config.json").read_text())["dtype"] == "float32"
    with pytest.raises(UserError, match=r"--dtype float32 \(now bfloat16\)"):
        rl.main(flags(model, tmp_path / "other", steps=2, resume=True, dtype="bfloat16"))


def test_a_policy_that_ends_as_nan_is_not_exported(model, tmp_path):
    """Bug: the last update makes NaN of the weights, the run ends well, and its model is NaN."""
    policy = parallel.shard(load_pretrained(model), ALONE)
    next(policy.parameters()).data[0] = float("nan")
    with pytest.raises(UserError, match=r"embed\.weight holds NaN"):
        parallel.save_model(policy, tmp_path / "model", hand.TOKENIZER, ALONE)
    assert not (tmp_path / "model").exists()


def test_same_seed_same_run(whole, model, tmp_path):
    """Bug: something random that no seed governs."""
    rl.main(flags(model, tmp_path / "again"))
    assert_same_run(tmp_path / "again", whole[0])
    assert any(row["dropped"] < 1 and row["loss"] != 0 for row in metrics(whole[0]))


def fork(config: rl.Config) -> int:
    """Start a run in a process of its own; its id."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115
            # tqdm's lock is shared with the parent: a child that is killed while it holds it would
            # stop us for ever.
            tqdm.set_lock(threading.RLock())
            rl.main(config)
            code = 0
        finally:
            os._exit(code)
    return process


def kill_during(process: int, out: Path, moment: float | str) -> None:
    """SIGKILL after `moment` seconds, or while a checkpoint is being written."""
    began = time.perf_counter()
    while os.waitpid(process, os.WNOHANG) == (0, 0):
        writing = moment == "write" and any(out.glob("checkpoints/*.partial"))
        if writing or (moment != "write" and time.perf_counter() - began > moment):
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            return
        time.sleep(0.0005)


MOMENTS = (
    ["write", *((i + 0.5) / 19 for i in range(19))]
    if os.environ.get("NANOT1_SLOW")
    else ["write", 0.35, 0.8]
)


@pytest.mark.parametrize("moment", MOMENTS)
def test_kill_9_loses_nothing(whole, model, tmp_path, moment):
    """Bug: anything that a checkpoint forgets (moments, anchor, data position, counters), a
    half-written one that is taken for whole, or metrics written twice. Killed at a share of the
    run's time, and once more after resuming."""
    reference, seconds = whole
    out = tmp_path / "run"
    rng = random.Random(str(moment))
    for attempt in range(2):
        if not (out / "config.json").exists():
            shutil.rmtree(out, ignore_errors=True)  # killed before it began: no run to resume
        when = (
            "write" if moment == "write" else seconds * (moment if attempt == 0 else rng.random())
        )
        kill_during(fork(flags(model, out, resume=out.exists())), out, when)
    if not (out / "config.json").exists():
        shutil.rmtree(out, ignore_errors=True)
    rl.main(flags(model, out, resume=out.exists()))
    assert_same_run(out, reference)


def test_resuming_a_finished_run_changes_nothing(whole, model, tmp_path):
    """Bug: one more step at every --resume; and a longer run must begin as the shorter one did."""
    shutil.copytree(whole[0], tmp_path / "run")
    rl.main(flags(model, tmp_path / "run", resume=True))
    assert_same_run(tmp_path / "run", whole[0])
    rl.main(flags(model, tmp_path / "short", steps=3))
    rl.main(flags(model, tmp_path / "short", resume=True))
    assert_same_run(tmp_path / "short", whole[0])


def test_a_cut_line_of_metrics_leaves_no_hole(whole, model, tmp_path):
    """Bug: the last lines did not reach the disk, but the checkpoint behind them did: the resumed
    run's metrics lack these steps."""
    shutil.copytree(whole[0], tmp_path / "run")
    file = tmp_path / "run" / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:-2]) + lines[-2][:20])
    rl.main(flags(model, tmp_path / "run", resume=True))
    assert_same_run(tmp_path / "run", whole[0])


def test_rlsp_resumes_bitwise(model, tmp_path):
    """Bug: the critic, its head or its moments are not in the checkpoint."""
    rlsp.main(rlsp_flags(model, tmp_path / "straight", samples=1, prompts=8))
    rlsp.main(rlsp_flags(model, tmp_path / "broken", samples=1, prompts=8, steps=2))
    rlsp.main(rlsp_flags(model, tmp_path / "broken", samples=1, prompts=8, resume=True))
    assert_same_run(tmp_path / "broken", tmp_path / "straight")
    assert metrics(tmp_path / "straight")[-1]["value_loss"] > 0


def test_checkpoint_without_a_critic_is_refused(whole, model, tmp_path):
    """Bug: a run goes on with a value head that nothing has trained."""
    shutil.copytree(whole[0], tmp_path / "run")
    changed = json.loads((tmp_path / "run" / "config.json").read_text())
    changed |= {"recipe": "rlsp", "length_cost": 2.0, "judge": "", "trace": 1.0}
    changed |= {"critic_first": 0, "value_clip": 0.2}
    (tmp_path / "run" / "config.json").write_text(json.dumps(changed))
    with pytest.raises(UserError, match=r"does not hold critic\."):
        rlsp.main(rlsp_flags(model, tmp_path / "run", resume=True))


def test_another_recipe_of_the_same_name_is_refused(whole, model, tmp_path, monkeypatch):
    """Bug: a fork's recipe is edited, its run resumed, and half of it is another algorithm."""
    shutil.copytree(whole[0], tmp_path / "run")
    edited = dataclasses.replace(rl.RECIPES["t1"], reward=rlsp.exploration)
    monkeypatch.setitem(rl.RECIPES, "t1", edited)
    with pytest.raises(
        UserError, match="another recipe t1: reward was outcome, and is exploration"
    ):
        rl.main(flags(model, tmp_path / "run", resume=True))


def test_max_tokens_left_out(model, tmp_path):
    """Bug: the shortest command fails on the model that sft.py has made; or a resumed run finds
    another limit.
    """
    rl.main(flags(model, tmp_path / "run", max_tokens=None, steps=1, samples=2, prompts=2))
    prompt = tasks.prompt_ids(next(tasks.countdown(0)), hand.TOKENIZER)
    room = hand.SHAPE.context - len(prompt)
    assert [row["max_tokens"] for row in metrics(tmp_path / "run")] == [room]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["max_tokens"] is None
    state = tmp_path / "run" / "checkpoints" / "step-000001" / "state.json"
    begun = json.loads(state.read_text()) | {
        "max_tokens": room - 3
    }  # as if its prompts had been longer
    state.write_text(json.dumps(begun))
    rl.main(
        flags(model, tmp_path / "run", max_tokens=None, steps=2, samples=2, prompts=2, resume=True)
    )
    assert [row["max_tokens"] for row in metrics(tmp_path / "run")] == [room, room - 3]
    assert rollout.room_for_responses([[0] * 100], None, 131_072, "") == 10_240


def test_other_flags_are_refused_on_resume(whole, model, tmp_path):
    """Bug: a resumed run is silently another run."""
    shutil.copytree(whole[0], tmp_path / "run")
    with pytest.raises(UserError, match="--lr"):
        rl.main(flags(model, tmp_path / "run", lr=2e-3, resume=True))


@pytest.fixture
def from_file(model, tmp_path) -> rl.Config:
    """Flags of a run of one step, which has begun, on a copy of the model and a problem file."""
    shutil.copytree(model, tmp_path / "model")
    write_problems(tmp_path / "data.jsonl", range(4))
    few = {"steps": 1, "prompts": 2, "samples": 2, "max_tokens": 4, "checkpoint_every": 1}
    config = flags(tmp_path / "model", tmp_path / "run", data=str(tmp_path / "data.jsonl"), **few)
    config = dataclasses.replace(config, task="")
    rl.main(config)
    return dataclasses.replace(config, steps=2, resume=True)


def write_problems(path: Path, numbers) -> None:
    problems = list(itertools.islice(tasks.countdown(0), 8))
    rows = [{"problem": problems[i].question, "answer": problems[i].answer} for i in numbers]
    cli.write_jsonl(path, [row | {"task": "countdown"} for row in rows])


@pytest.mark.parametrize("numbers", [[0, 1, 2, 4], [0, 1, 3, 2], [0, 1, 2], range(5)])
@pytest.mark.parametrize("begun", [True, False])
def test_other_problems_of_the_same_path_are_refused(from_file, tmp_path, numbers, begun):
    """Bug: problems edited between kill and resume, before the first checkpoint or after; the order
    of the epochs is another from then on."""
    if not begun:
        shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000001")
    write_problems(tmp_path / "data.jsonl", numbers)
    with pytest.raises(UserError, match="the training data is not what"):
        rl.main(from_file)
    assert len(metrics(tmp_path / "run")) == 1


def test_another_model_of_the_same_path_is_refused(from_file, tmp_path):
    """Bug: a model trained again in place; its tokenizer, or the KL to the start, is another."""
    save_pretrained(random_init(hand.SHAPE, 9), tmp_path / "model", hand.TOKENIZER)
    with pytest.raises(UserError, match="the model is not what"):
        rl.main(from_file)


def test_inputs_that_nobody_knows_any_more_are_named(from_file, tmp_path, capsys):
    """Bug: without inputs.json a run goes on with any data and any model, and nothing is said."""
    (tmp_path / "run" / "inputs.json").unlink()
    rl.main(from_file)
    said = capsys.readouterr().out
    assert "inputs.json is missing: not known whether model and training data are as" in said
    rl.main(dataclasses.replace(from_file, steps=3))
    assert "inputs.json" not in capsys.readouterr().out


def test_inputs_may_move(from_file, tmp_path):
    """Bug: the same problems and the same model are refused under another path."""
    for name in ("data.jsonl", "model", "run"):
        (tmp_path / name).rename(tmp_path / f"moved-{name}")
    moved = {"data": "moved-data.jsonl", "model": "moved-model", "out": "moved-run"}
    moved = {name: str(tmp_path / path) for name, path in moved.items()}
    rl.main(dataclasses.replace(from_file, **moved))
    assert len(metrics(tmp_path / "moved-run")) == 2


def test_another_judge_of_the_same_path_is_refused(model, tmp_path, monkeypatch):
    """Bug: RLSP's judge is trusted by its name where the policy no longer is."""
    monkeypatch.setattr(rlsp, "load_judge", lambda *_: None)
    shutil.copytree(model, tmp_path / "judge")
    more = {"judge": str(tmp_path / "judge"), "prompts": 2, "samples": 2, "max_tokens": 4}
    rlsp.main(rlsp_flags(model, tmp_path / "run", **more, steps=1))
    save_pretrained(random_init(hand.SHAPE, 9), tmp_path / "judge", hand.TOKENIZER)
    with pytest.raises(UserError, match="the judge is not what"):
        rlsp.main(rlsp_flags(model, tmp_path / "run", **more, steps=2, resume=True))


def test_a_cooldown_fixes_the_number_of_steps(whole, model, tmp_path):
    """Bug: a run whose rate had begun to fall is resumed with more steps, and its rate jumps up
    again.
    """
    shutil.copytree(whole[0], tmp_path / "run")
    changed = json.loads((tmp_path / "run" / "config.json").read_text()) | {"cooldown": 2}
    (tmp_path / "run" / "config.json").write_text(json.dumps(changed))
    with pytest.raises(UserError, match="--steps"):
        rl.main(flags(model, tmp_path / "run", cooldown=2, steps=50, resume=True))


def test_export_writes_the_newest_policy(whole, model, tmp_path):
    """Bug: the exported folder holds the starting weights, or overwrites something."""
    rl.main(flags(model, whole[0], export=str(tmp_path / "exported")))
    exported, final = weights(tmp_path / "exported"), weights(whole[0])
    assert all(torch.equal(exported[name], final[name]) for name in final)
    with pytest.raises(UserError, match="exists already"):
        rl.main(flags(model, whole[0], export=str(tmp_path / "exported")))


def test_export_of_a_step_is_the_policy_of_that_step(model, tmp_path):
    """Bug: --step exports the newest policy, or the step's checkpoint has gone: a run of two steps
    ends where one of four was after two."""
    long, short = (
        flags(model, tmp_path / "long", keep_every=2, checkpoint_every=1),
        flags(model, tmp_path / "short"),
    )
    rl.main(long)
    rl.main(dataclasses.replace(short, steps=2))
    rl.main(dataclasses.replace(long, export=str(tmp_path / "exported"), step=2))
    exported, wanted = weights(tmp_path / "exported"), weights(tmp_path / "short")
    assert all(torch.equal(exported[name], wanted[name]) for name in wanted)
    with pytest.raises(UserError, match=r"--step 1: .* holds the steps 2, 3, 4"):
        rl.main(dataclasses.replace(long, export=str(tmp_path / "other"), step=1))
    assert not (tmp_path / "other").exists()


def test_switches_reach_the_run_and_are_resumed(model, tmp_path):
    """Bug: a switch that is not passed on; Muon's momentum, or the policy of the start, lost when a
    run is resumed."""
    more = {
        "optimizer": "muon",
        "start_kl": True,
        "penalty": "advantage",
        "patterns": ("repeated",),
        "steps": 3,
    }
    more |= {"repeat_ngram": 1, "repeat_times": 2, "checkpoint_every": 1}
    rl.main(flags(model, tmp_path / "straight", **more))
    rl.main(flags(model, tmp_path / "broken", **more | {"steps": 2}))
    rl.main(flags(model, tmp_path / "broken", **more, resume=True))
    straight = metrics(tmp_path / "straight")
    assert straight == metrics(tmp_path / "broken") and straight[0]["unexpected"] > 0.2
    assert (
        straight[0]["kl_start"] == pytest.approx(0, abs=1e-4)
        and straight[2]["kl_start"] != straight[2]["kl"]
    )
    start, one, other = weights(model), weights(tmp_path / "straight"), weights(tmp_path / "broken")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert all((one[name] - start[name]).abs().max() > 1e-4 for name in one)
    plain = more | {"steps": 1, "patterns": ("garbled",)}
    rl.main(flags(model, tmp_path / "plain", **plain))
    assert metrics(tmp_path / "plain")[0]["unexpected"] < straight[0]["unexpected"]


def test_bfloat16_keeps_fp32_masters_and_corrects_the_sampler(model, tmp_path):
    """Bug: masters in bf16 lose Adam's small steps; or the sampler's own log-probs are taken for
    the trainer's.
    """
    rl.main(flags(model, tmp_path / "run", dtype="bfloat16", lr=1e-6, steps=2))
    first = metrics(tmp_path / "run")[0]
    assert 0 < first["mismatch"] < first["mismatch_max"] < 0.5 and first["dropped"] < 1
    start, end = weights(model), weights(tmp_path / "run")
    moved = [(end[name] - start[name]).abs().max().item() for name in start]
    assert all(
        0 < change < 1e-5 for change in moved
    )  # 4 Adam steps of 1e-6, too small for bf16 to hold


def test_adaptive_entropy_is_resumed(model, tmp_path):
    """Bug: the adapted coefficient starts anew at every --resume."""
    more = {"entropy_target": 2.0, "steps": 3}
    rl.main(flags(model, tmp_path / "straight", **more))
    rl.main(flags(model, tmp_path / "broken", **more | {"steps": 2}))
    rl.main(flags(model, tmp_path / "broken", **more, resume=True))
    assert metrics(tmp_path / "broken") == metrics(tmp_path / "straight")
    assert len({row["entropy_coef"] for row in metrics(tmp_path / "straight")}) > 1


# --- the program that torchrun starts -------------------------------------------------------------


def worker(model: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    found = {}
    with parallel.session("cpu") as world:
        for case in CASES:
            for recipe in ("t1", "rlsp"):
                found[f"{case} {recipe}"] = gradients(world, case, recipe)
        found["drawn"] = drawn(model, world)
        rl.train(flags(model, folder / "t1", steps=3), world)
        rl.train(
            rlsp_flags(model, folder / "rlsp", steps=3), world, rlsp.make_learner, rlsp.train_step
        )
        if world.size == 2:
            rl.train(flags(model, folder / "resumed", steps=2), world)
            rl.train(flags(model, folder / "resumed", steps=3, resume=True), world)
        if world.main:
            torch.save(found, folder / "found.pt")


if __name__ == "__main__":
    worker(Path(sys.argv[1]), Path(sys.argv[2]))
