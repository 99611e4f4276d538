"""sft.py: what is trained on, in what order, and that a run killed at any moment ends as if it had
not been."""

import itertools
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cli
import cot
import demo
import parallel
import runfolder
import sft
import tasks
from cli import UserError
from model import load_pretrained
from muon import make_optimizers
from tokenizer import Tokenizer, demo_tokenizer, load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
KILLS = int(os.environ.get("NANOT1_KILLS", 2))  # 20 for the long form of the test
STEPS = 6 * KILLS
TINY = {
    "task": "countdown",
    "chains": 120,
    "lr": 3e-3,
    "batch_tokens": 700,
    "micro_tokens": 300,
    "device": "cpu",
    "optimizer": "muon",  # and AdamW for the embedding and the norms: both are in every test
    "random_positions": 0.5,  # drawn in every step: a resumed run, and every rank, draws the same
}


@pytest.fixture(scope="module")
def tokenizer():
    return demo_tokenizer(cot.WORDS)


def make(row: dict, tokenizer, max_length: int = 500):
    return sft.examples_of(
        row, tokenizer, sft.stop_token(tokenizer), max_length, "data.jsonl, example 3"
    )


def test_a_thought_that_the_template_opens_is_not_opened_twice():
    """Bug: SFT on <think><think>, where both the template and the data open the thought."""
    base = demo_tokenizer(cot.WORDS)
    template = base.chat_template.replace("<|assistant|>", "<|assistant|><think>\n")
    opening = Tokenizer(base.files | {"chat_template.jinja": template.encode()})
    for response in ("<think>\nso</think>4", "so</think>4"):
        [example] = make({"problem": "2+2", "answer": "4", "response": response}, opening)
        assert opening.decode(example.tokens).count("<think>") == 1
        assert trained_text(example, opening) == ["so</think>4<|end|>"]


def trained_text(example, tokenizer) -> list[str]:
    return [tokenizer.decode(example.tokens[start:end]) for start, end in example.spans]


def test_random_positions_are_a_sorted_choice():
    """Bug: positions that repeat, are out of order, or lie beyond the model's context; or a share
    of 0 or 1 that is not kept to. Short sequences must come to stand anywhere, the last position
    included."""
    example, rng = sft.Example([1, 2, 3], [(1, 3)]), random.Random(0)
    drawn = [sft.at_random_positions(example, 10, 1.0, rng).positions for _ in range(2_000)]
    assert all(sorted(set(positions)) == positions and len(positions) == 3 for positions in drawn)
    assert {place for positions in drawn for place in positions} == set(range(10))
    assert sft.at_random_positions(example, 10, 0.0, rng) is example
    moved = [
        sft.at_random_positions(example, 10, 0.7, rng).positions is not None for _ in range(2_000)
    ]
    assert sum(moved) / 2_000 == pytest.approx(0.7, abs=3 * (0.7 * 0.3 / 2_000) ** 0.5)


# --- what is trained on ---------------------------------------------------------------------------


def test_response_and_stop_token_are_trained(tokenizer):
    """Bug: the stop token missing from the response, so that a model never learns to end; or the
    prompt trained too."""
    row = {"problem": "numbers 3 5 7", "response": "3*5=15, 15+7=22 is 22\n", "task": "countdown"}
    (example,) = make(row, tokenizer)
    assert trained_text(example, tokenizer) == ["3*5=15, 15+7=22 is 22\n<|end|>"]
    prompt = tokenizer.chat(
        [{"role": "user", "content": "numbers 3 5 7"}], add_generation_prompt=True
    )
    assert example.tokens[: len(prompt)] == prompt and example.spans[0][0] == len(prompt)


def test_cut_off_chains_have_no_stop_token(tokenizer):
    """Bug: a chain that was cut off in the middle teaches the model to stop in the middle."""
    row = {"problem": "numbers 3 5 7", "response": "3*5=15 not 22\n", "task": "countdown"}
    assert trained_text(make(row | {"stop": False}, tokenizer)[0], tokenizer) == ["3*5=15 not 22\n"]
    (whole,) = make(row, tokenizer)
    (cut,) = make(
        row, tokenizer, max_length=len(whole.tokens) - 2
    )  # too long: cut, and again no stop token
    assert cut.tokens == whole.tokens[:-2] and cut.spans == [(whole.spans[0][0], len(cut.tokens))]


def test_responses_that_are_cut_are_counted(tokenizer, tmp_path, capsys):
    """Bug: --max-length cuts half of the data, no stop token is trained on it, and nobody is told.
    A response that just fits is not cut."""
    rows = [{"problem": "1", "response": "3*5=15 " * n, "task": "countdown"} for n in (1, 3, 3, 9)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fits = len(make(rows[1], tokenizer)[0].tokens)
    config = sft.Config(out="", data=str(data))
    world = parallel.World(0, 1, torch.device("cpu"))
    for max_length, count in ((500, 0), (fits, 1), (fits - 1, 3)):
        sft.read_examples(config, tokenizer, max_length, world)
        said = capsys.readouterr().out.splitlines()
        assert len(said) == min(count, 1)
        assert not count or f"{count} of 4 responses do not fit into --max-length" in said[0]
    sft.read_examples(config, tokenizer, fits, parallel.World(1, 2, torch.device("cpu")))
    assert not capsys.readouterr().out


def test_a_stop_token_spelled_in_the_prompt_is_not_trained(tokenizer):
    """Bug: masks found by looking for the stop token begin or end at the one that the user
    typed."""
    messages = [
        {"role": "user", "content": "say <|end|>"},
        {"role": "assistant", "content": "<|end|>"},
        {"role": "user", "content": "again"},
        {"role": "assistant", "content": "no"},
    ]
    (example,) = make({"messages": messages}, tokenizer)
    assert trained_text(example, tokenizer) == ["<|end|><|end|>", "no<|end|>"]
    assert (
        example.tokens.count(sft.stop_token(tokenizer)) == 2
    )  # the spelled ones are plain characters


def test_every_assistant_turn_is_trained(tokenizer, smollm2):
    """Bug: only the last turn trained, or a turn's tokens not those that its prompt leads to. With
    the chat template of a real model, the tokens are exactly the template's own rendering of the
    whole conversation."""
    real = load_tokenizer(smollm2)
    messages = [
        {"role": role, "content": f"{role} {i}"} for i in range(3) for role in ("user", "assistant")
    ]
    (example,) = make({"messages": messages}, real)
    assert trained_text(example, real) == [f"assistant {i}<|im_end|>" for i in range(3)]
    rendered = real.chat(messages, add_generation_prompt=False)
    assert rendered[: len(example.tokens)] == example.tokens


def test_a_template_that_rewrites_the_past_makes_several_sequences(tokenizer):
    """Bug: a template that drops old thoughts (Qwen3) gives a later prompt that does not begin with
    what was trained; spans counted as if it did point at the wrong tokens."""

    class Forgetful:
        eos_ids = tokenizer.eos_ids
        encode = staticmethod(tokenizer.encode)

        @staticmethod
        def chat(messages, add_generation_prompt=True):
            return tokenizer.chat(messages[-2:], add_generation_prompt)

    messages = [
        {"role": role, "content": f"{role}{i}"} for i in range(3) for role in ("user", "assistant")
    ]
    made = make({"messages": messages}, Forgetful())
    assert [trained_text(e, tokenizer) for e in made] == [
        [f"assistant{i}<|end|>"] for i in range(3)
    ]


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=30),
    batch_tokens=st.integers(20, 200),
    epochs=st.integers(1, 3),
)
@settings(max_examples=60, deadline=None)
def test_the_schedule_visits_everything_once_per_epoch(lengths, batch_tokens, epochs):
    """Bug (nano-aha-moment): data skipped at epoch borders or after a resume; more steps change the
    first ones."""
    batches = sft.schedule(lengths, batch_tokens, epochs, None, seed=1)
    seen = [i for batch in batches for i in batch]
    for epoch in range(epochs):
        assert sorted(seen[epoch * len(lengths) : (epoch + 1) * len(lengths)]) == list(
            range(len(lengths))
        )
    assert all(len(b) == 1 or sum(lengths[i] for i in b) <= batch_tokens for b in batches)
    more = sft.schedule(lengths, batch_tokens, epochs, len(batches) + 3, seed=1)
    assert len(more) == len(batches) + 3 and more[: len(batches) - 1] == batches[:-1]


def test_what_is_left_out_follows_from_the_start(finished):
    """Bug: 1e-5 from random weights, which teaches nothing, or the demo's 6e-3 on a pretrained
    model, which ruins it; a flag that is given and not kept to. The run's config.json says what was
    taken."""
    small = sft.with_defaults(sft.Config(out="", task="countdown"))
    assert (small.lr, small.optimizer, small.batch_tokens, small.random_positions) == (
        6e-3,
        "muon",
        1024,
        0.7,
    )
    stated = demo.sft_flags(demo.Config(), Path("sft"), Path("chains.jsonl"), steps=1)
    for name, value in sft.RANDOM_WEIGHTS.items():
        assert getattr(stated, name) == value
    paper = sft.with_defaults(sft.Config(out="", data="chains.jsonl", model="Qwen2.5-7B"))
    assert (paper.lr, paper.optimizer, paper.epochs, paper.random_positions) == (
        1e-5,
        "adamw",
        3,
        0.0,
    )
    given = sft.with_defaults(sft.Config(out="", task="countdown", lr=1e-3, random_positions=0.0))
    assert (given.lr, given.random_positions, given.optimizer) == (1e-3, 0.0, "muon")
    assert json.loads((finished / "config.json").read_text())["weight_decay"] == 0.0


def test_learning_rate_rises_then_falls():
    """Bug: a first step at full rate, or a schedule that reaches zero before the end."""
    rates = [sft.learning_rate(step, 100, peak=1.0, warmup=0.1) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert rates[10] == pytest.approx(1.0) and rates[55] == pytest.approx(0.55)
    assert sorted(rates[10:], reverse=True) == rates[10:] and rates[-1] == pytest.approx(
        0.1, rel=0.02
    )


def test_loss_is_the_mean_over_trained_tokens(tokenizer):
    """Bug: padding or prompts in the denominator. One number, computed by hand, however the step is
    cut up."""
    model, _ = sft.begin(sft.Config(out=""))
    rows = [
        cot.countdown_chain(p, random.Random(1), 99)
        for p in itertools.islice(tasks.countdown(0), 7)
    ]
    examples = [e for row in rows for e in make(row, tokenizer)]
    total = 0.0
    for example in examples:
        table = model.logits(model(torch.tensor([example.tokens])))[0].double().log_softmax(-1)
        total -= sum(
            table[t - 1, example.tokens[t]].item() for s, e in example.spans for t in range(s, e)
        )
    world = parallel.World(0, 1, torch.device("cpu"))
    for micro_tokens in (100, 10**6):
        loss, count = sft.loss_of(parallel.Scorer(model), examples, micro_tokens, world)
        assert count == sum(end - start for e in examples for start, end in e.spans)
        assert loss == pytest.approx(total / count, rel=1e-6)


# --- whole runs -----------------------------------------------------------------------------------


def test_a_run_says_where_it_begins_and_ends(tmp_path, capsys):
    """Bug: nobody knows what is trained, or where the model is when it is done."""
    out = tmp_path / "run"
    run(out, steps=2)
    first, *_, last = capsys.readouterr().out.splitlines()
    count = sum(parameter.numel() for parameter in load_pretrained(out).parameters())
    for word in (f"{count:,} parameters", "108 sequences of countdown", "12 held out", "2 steps"):
        assert word in first
    assert "700 tokens a step" in first and "cpu" in first and str(out) in first
    assert f"{out}/model" in last and f"python rl.py --model {out} --task countdown" in last


def test_a_model_without_a_stop_token(finished, tmp_path):
    """Bug: a model that names no stop token is taught everything but to stop."""
    shutil.copytree(finished / "model", tmp_path / "endless")
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        raw = json.loads((tmp_path / "endless" / name).read_text())
        raw = {key: value for key, value in raw.items() if not key.startswith("eos_token")}
        (tmp_path / "endless" / name).write_text(json.dumps(raw))
    with pytest.raises(UserError, match=r"names no stop token.*eos_token_id"):
        run(tmp_path / "new", model=str(tmp_path / "endless"))
    assert not (tmp_path / "new").exists()


def run(out: Path, **flags) -> None:
    torch.set_num_threads(1)  # in the processes that the tests start, too
    sft.main(
        sft.Config(
            out=str(out),
            **(TINY | {"steps": STEPS, "eval_every": STEPS // 2, "checkpoint_every": 4} | flags),
        )
    )


def metrics(out: Path) -> list[dict]:
    """A run's metrics without those that a clock measured."""
    rows = runfolder.read_metrics(out / "metrics.jsonl")
    return [
        {k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")} for row in rows
    ]


def weights(out: Path) -> bytes:
    return (out / "model" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A tiny run, never interrupted."""
    out = tmp_path_factory.mktemp("sft") / "finished"
    run(out)
    return out


def test_a_run_learns_and_leaves_a_model(finished):
    """Bug: the loss goes down and the folder at the end holds the weights of the start, or no
    tokenizer."""
    rows = metrics(finished)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[-1]["heldout_loss"] < rows[STEPS // 2 - 1]["heldout_loss"] < rows[0]["loss"] - 0.5
    model, tokenizer = load_pretrained(finished), load_tokenizer(finished)
    assert tokenizer.vocab_size == model.config.vocab_size
    flags = json.loads((finished / "config.json").read_text())
    examples = sft.read_examples(
        sft.Config(**flags), tokenizer, 512, parallel.World(0, 1, torch.device("cpu"))
    )
    loss, _ = sft.loss_of(
        parallel.Scorer(model), examples, 4000, parallel.World(0, 1, torch.device("cpu"))
    )
    assert loss == pytest.approx(rows[-1]["loss"], abs=0.3)
    assert (finished / "metrics.png").exists()


@pytest.mark.parametrize("moment", ["any", "write"])
def test_killed_runs_resume_bitwise(finished, tmp_path, moment):
    """Bug: anything not in the checkpoint (order of the data, moments, metrics) makes the resumed
    run another run.

    The run is killed (SIGKILL) at random moments, or just while a checkpoint is being written, and
    resumed until it gets through. NANOT1_KILLS=20 for the long form."""
    context = multiprocessing.get_context(
        "forkserver"
    )  # a server imports torch once; each run is a process of its own
    context.set_forkserver_preload(["sft"])
    out, rng = tmp_path / "killed", random.Random(f"{moment} {time.time()}")
    saved = lambda: parallel.complete_checkpoints(out / "checkpoints")  # noqa: E731
    half_saved = lambda: list((out / "checkpoints").glob("*.partial"))  # noqa: E731
    for life in range(KILLS + 1):
        flags = {"resume": (out / "config.json").exists(), "checkpoint_every": 1}
        before, process = saved(), context.Process(target=run, args=(out,), kwargs=flags)
        process.start()
        if life == KILLS:
            process.join()
            assert process.exitcode == 0
            break
        if moment == "write" or rng.random() < 0.7:  # else it may not live to see its first step
            while process.is_alive() and saved() == before:
                time.sleep(0.001)
        if moment == "write":
            while process.is_alive() and not half_saved():
                pass
            time.sleep(rng.uniform(0, 0.02))
        else:
            process.join(rng.uniform(0, 0.3))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert metrics(out) == metrics(finished)
    assert weights(out) == weights(finished)


def test_two_ranks_train_the_same_run(finished, tmp_path):
    """Bug: under torchrun each rank sees other data, or the loss is scaled by the number of
    ranks."""
    out = tmp_path / "two"
    flags = TINY | {"steps": 3, "out": out}
    arguments = [
        part
        for name, value in flags.items()
        for part in ("--" + name.replace("_", "-"), str(value))
    ]
    command = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "sft.py",
        *arguments,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment,
        check=True,
        capture_output=True,
        timeout=200,
    )
    run(tmp_path / "one", steps=3)
    for one, two in zip(metrics(tmp_path / "one"), metrics(out), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=2e-5)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=2e-4)
    load_pretrained(out)


def test_steps_that_are_not_finite_are_skipped(tmp_path, monkeypatch):
    """Bug: one step with an infinite loss turns every weight into NaN, and the run goes on without
    a word."""
    real, calls = sft.loss_of, []

    def sometimes_bad(scorer, *arguments, backward=False):
        loss, count = real(scorer, *arguments, backward=backward)
        if backward:
            calls.append(loss)
            if len(calls) == 2:
                next(scorer.parameters()).grad.fill_(math.nan)
        return loss, count

    monkeypatch.setattr(sft, "loss_of", sometimes_bad)
    run(tmp_path / "run", steps=4, heldout=0)
    rows = metrics(tmp_path / "run")
    assert [row["skipped"] for row in rows] == [0, 1, 1, 1]
    assert math.isnan(rows[1]["grad_norm"]) and all(math.isfinite(row["loss"]) for row in rows)


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"problem": "a", "resp', "line 2: not JSON"),
        ('{"problem": "a"}', "example 2: expected `messages`, or `problem`"),
        ('{"problem": null, "response": "b"}', "example 2: no `problem` (or `question`)"),
        ('{"messages": [{"role": "user"}]}', "example 2: `messages` must be a list of objects"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "example 2: no assistant turn"),
        (
            '{"problem": "a", "response": "b", "task": "chess"}',
            "example 2: task 'chess' is none of",
        ),
        (json.dumps({"problem": "long " * 400, "response": "b"}), "example 2: the prompt has"),
        (None, "no such file"),
    ],
)
def test_bad_data_is_named_and_leaves_no_folder(tmp_path, capsys, line, complaint):
    """Bug: a traceback, or a complaint without the line; or a run folder left behind that blocks
    the next attempt."""
    data, out = tmp_path / "data.jsonl", tmp_path / "run"
    if line is not None:
        data.write_text('{"problem": "a", "response": "b"}\n' + line + "\n")
    with pytest.raises(SystemExit) as end:
        cli.run(sft.main, sft.Config, ["--data", str(data), "--out", str(out), "--device", "cpu"])
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert end.value.code == 2
    assert last.split("error: ")[1].startswith(
        complaint if line is None else f"{data}, {complaint}"
    )
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--task", "countdown"], "exists already: --resume"),
        (["--task", "countdown", "--resume", "--lr", "1"], "--lr 0.003 (now 1.0)"),
        ([], "give either --data FILE or --task countdown"),
        (["--task", "countdown", "--batch-tokens", "0"], "--batch-tokens must be positive"),
        (["--task", "countdown", "--model", "absent"], "no such folder: absent"),
        (["--task", "countdown", "--warp", "9"], "--warp"),
        (["--task", "countdown", "--random-positions", "2"], "--random-positions is a share"),
        (
            ["--task", "countdown", "--random-positions", "1", "--max-length", "999"],
            "--max-length 999 is beyond",
        ),
    ],
)
def test_bad_flags_change_nothing(finished, tmp_path, capsys, arguments, complaint):
    """Bug: a finished run overwritten by a repeated command, or an unknown flag ignored."""
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    folder = finished if "exists" in complaint or "--resume" in arguments else tmp_path / "new"
    with pytest.raises(SystemExit) as end:
        cli.run(sft.main, sft.Config, [*arguments, "--out", str(folder)])
    assert end.value.code == 2
    assert complaint in capsys.readouterr().err
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "new").exists()


def test_a_moved_folder_resumes(finished, tmp_path):
    """Bug: --resume calls a run that was copied elsewhere another run, because --out is one of its
    flags."""
    shutil.copytree(finished, tmp_path / "moved")
    shutil.rmtree(tmp_path / "moved" / "model")
    run(
        tmp_path / "moved", resume=True, recompute=True
    )  # which the README recommends where memory runs out
    assert (tmp_path / "moved" / "model" / "model.safetensors").exists()


def test_resuming_with_other_data_is_refused(tmp_path):
    """Bug: the data file edited between kill and resume; the second half of the run trains on a
    shifted order."""
    data = tmp_path / "data.jsonl"
    rows = [
        json.dumps({"problem": f"{i}", "response": f"{i}", "task": "countdown"}) for i in range(20)
    ]
    data.write_text("\n".join(rows))
    flags = {"task": None, "data": str(data), "batch_tokens": 40, "steps": 2}
    run(tmp_path / "run", **flags)
    data.write_text("\n".join(rows[:-1] + [rows[0]]))
    under_way = tmp_path / "run" / "checkpoints" / "step-000009.partial"  # another process's, say
    under_way.mkdir()
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match="the training data is not what"):
        run(tmp_path / "run", **flags, resume=True)
    assert under_way.exists() and (tmp_path / "run" / "metrics.jsonl").read_text() == metrics


def test_resuming_knows_contents_and_not_paths(finished, tmp_path):
    """Bug: a file or a model that was moved makes it another run; or a model that was trained again
    in place, or data that was changed before the first checkpoint, does not."""
    rows = [{"problem": f"{i}", "response": f"{i}", "task": "countdown"} for i in range(20)]
    cli.write_jsonl(tmp_path / "data.jsonl", rows)
    shutil.copytree(finished / "model", tmp_path / "model")
    flags = {"task": None, "data": str(tmp_path / "data.jsonl"), "model": str(tmp_path / "model")}
    flags |= {"weight_decay": 0.0, "batch_tokens": 40}
    run(tmp_path / "run", **flags, steps=1)
    for name in ("data.jsonl", "model"):
        (tmp_path / name).rename(tmp_path / f"moved-{name}")
    moved = {"data": str(tmp_path / "moved-data.jsonl"), "model": str(tmp_path / "moved-model")}
    run(tmp_path / "run", **flags | moved, steps=2, resume=True)
    assert len(metrics(tmp_path / "run")) == 2

    with pytest.raises(UserError, match="the model is not what"):  # random weights from here on
        run(tmp_path / "run", **flags | moved | {"model": None}, steps=3, resume=True)
    file = tmp_path / "moved-model" / "model.safetensors"
    trained = file.read_bytes()
    file.write_bytes(trained[:-1] + b"!")
    with pytest.raises(UserError, match="the model is not what"):
        run(tmp_path / "run", **flags | moved, steps=3, resume=True)
    file.write_bytes(trained)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    cli.write_jsonl(tmp_path / "moved-data.jsonl", rows[::-1])
    with pytest.raises(UserError, match="the training data is not what"):
        run(tmp_path / "run", **flags | moved, steps=3, resume=True)


@pytest.mark.parametrize("optimizer, names", [("adamw", {"adamw"}), ("muon", {"adamw", "muon"})])
def test_every_parameter_has_one_optimizer(optimizer, names):
    """Bug: a matrix that two optimizers move, or none does."""
    scorer = parallel.Scorer(sft.begin(sft.Config(out=""))[0])
    optimizers = make_optimizers(scorer, optimizer, lr=1e-3)
    moved = [
        id(p)
        for part in optimizers.values()
        for group in part.param_groups
        for p in group["params"]
    ]
    assert optimizers.keys() == names
    assert sorted(moved) == sorted(id(parameter) for parameter in scorer.parameters())
