"""benchmarks/step_counts.py: what it counts is what the rows, the cache and the passes really are."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import parallel
from model import ModelConfig
from packing import positions_and_mask
from parallel import World

FILE = Path(__file__).resolve().parent.parent / "benchmarks" / "step_counts.py"
sys.path.insert(0, str(FILE.parent))

import plan  # noqa: E402
import step_counts as counting  # noqa: E402
from step_counts import Group, Load  # noqa: E402

SHAPE = ModelConfig(vocab_size=64, dim=64, layers=3, heads=4, kv_heads=2, head_dim=16, mlp_dim=160)
GROUPS = [Group(7, [30, 12, 5, 1]), Group(2, [40, 3, 60, 9]), Group(11, [8, 8, 2, 25])]


def test_loads_are_those_of_the_packed_rows():
    """Guards against places, pairs or targets that are counted from the lengths otherwise than the
    packed rows have them: here they are counted in the rows and their masks, one by one."""
    examples = counting.examples_of(GROUPS)
    for gpus, tokens in ((1, 1000), (1, 64), (2, 64), (3, 100)):
        counted = counting.micro_batches(examples, tokens, gpus)
        for rank in range(gpus):
            world = World(rank, gpus, torch.device("cpu"))
            made = parallel.micro_batches(examples, tokens, counting.ANY_LENGTH, world)
            for (_, packed), load in zip(made, [of_gpus[rank] for of_gpus in counted], strict=True):
                # Where there is nothing to do, one place all the same.
                assert max(load.tokens, 1) == packed.tokens.numel()
                assert load.targets == len(packed.targets)
                assert load.pairs == pairs_in(packed)


def pairs_in(packed) -> int:
    """Pairs of a query and a key that it sees, but for the padding's."""
    _, visible = positions_and_mask(packed.tokens, packed.documents, packed.parents)
    if visible is None:
        width = packed.tokens.shape[1]
        visible = torch.ones(len(packed.tokens), 1, width, width, dtype=torch.bool).tril()
    # The last token of a sequence predicts nothing, but it has its place: behind the last target.
    last = {}
    for place in packed.index.tolist():
        row, column = divmod(place, packed.tokens.shape[1])
        last[row] = max(last.get(row, 0), column + 1)
    return sum(int(visible[row, 0, : end + 1].sum()) for row, end in last.items())


def test_the_least_counts_every_token_once():
    """Guards against a "least" that has stems twice, or a token too few: by hand for two prompts."""
    groups = [Group(5, [3, 2]), Group(3, [4, 1])]
    load = counting.least_load(groups, counting.examples_of(groups), 2)
    tokens = (4 + (1 + 3) + (1 + 2)) + (2 + (1 + 4) + (1 + 1))
    pairs = (10 + (4 * 4 + 10) + (3 * 4 + 6)) + (3 + (5 * 2 + 15) + (2 * 2 + 3))
    assert load == Load(tokens / 2, pairs / 2, (3 + 2 + 4 + 1) / 2)


def test_operations_agree_with_the_plan():
    """Guards against a factor of two between both scripts: training on one long sequence."""
    length = 4096
    load = Load(length, length * length / 2, length)
    forward = sum(counting.operations_of(SHAPE, load))
    assert 3 * forward == pytest.approx(length * plan.training_operations(SHAPE, length, False))
    # Attention's scores and the head's logits are made again in any case, the blocks on demand.
    matrices, attention, head = counting.operations_of(SHAPE, load)
    once = counting.training_operations(SHAPE, load, recompute=False)
    assert once == pytest.approx(3 * forward + attention / 2 + head)
    again = counting.training_operations(SHAPE, load, recompute=True)
    assert again == pytest.approx(once + matrices + attention)


def test_sampling_by_hand():
    """Guards against keys that a token does not read, or a prompt that each response reads anew:
    responses of 2 and 3 tokens to a prompt of 4, in as many steps as there are."""
    work = counting.sampling_work(SHAPE, [Group(4, [2, 3])], steps=3, prefilled=3)
    read = (4 + 5) + (4 + 5 + 6)
    parameters = plan.counts(SHAPE).all
    assert work.memory == 3 * 2 * parameters + read * 2 * 2 * 3 * 2 * 16
    matrices, attention, head = counting.operations_of(SHAPE, Load(3 + 5, read, 5))
    assert work.operations == matrices + attention + head


def test_schedule_evicts_only_where_memory_is_short():
    """Guards against a count without the sampler's rules: with plenty of memory all run at once;
    with less, steps and prefills grow; and it ends even where only one sequence fits."""
    prompts = sum(group.prompt - 1 for group in GROUPS)
    steps, prefilled = counting.schedule(GROUPS, 10**6)
    assert (steps, prefilled) == (64, prompts)  # 60 tokens, in steps of eight
    before = (steps, prefilled)
    evicting = 0
    for positions in (400, 200, 100, 71):
        steps, prefilled = counting.schedule(GROUPS, positions)
        assert steps >= before[0] and prefilled >= prompts
        evicting += prefilled > prompts
        before = (steps, prefilled)
    assert evicting >= 2
    alone = sum(8 * -(-tokens // 8) for group in GROUPS for tokens in group.responses)
    assert before[0] <= alone
    # Of six sequences of 10 tokens, 100 positions hold five at twice that: the sixth has to wait,
    # and is not started to be evicted at once.
    assert counting.schedule([Group(10, [8] * 6)], 100) == (16, 9)


def test_no_part_is_below_the_least():
    """Guards against a least that is not: it must be below ours in every column, on one GPU, where
    nothing is gathered, and on eight."""
    for gpus in (1, 8):
        config = counting.Config(gpus=gpus, prompts=8, samples=8, max_tokens=2048, mean_tokens=700)
        flags = counting.flags_for(SHAPE, config)
        groups = counting.draw_lengths(config)
        examples = counting.examples_of(groups)
        loads = counting.micro_batches(examples, 8192, gpus)
        best = counting.least_load(groups, examples, gpus)
        parts = counting.parts_of(SHAPE, groups, loads, best, flags)
        for name, (ours, least) in parts.items():
            for mine, lowest in zip(ours, least):
                assert mine >= lowest * (1 - 1e-12), name
        assert parts["weights to sampler"][0].link == 2 * plan.counts(SHAPE).all * (gpus - 1) / gpus


def test_lengths_have_the_mean_that_was_asked_for():
    """Guards against a spread that moves the mean, and against lengths above the limit."""
    config = counting.Config(prompts=2000, samples=4, max_tokens=100_000, prompt_tokens=100)
    groups = counting.draw_lengths(config)
    drawn = [tokens for group in groups for tokens in group.responses]
    assert sum(drawn) / len(drawn) == pytest.approx(2000, rel=0.05)
    assert sum(group.prompt for group in groups) / 2000 == pytest.approx(100, rel=0.05)
    cut = counting.draw_lengths(counting.Config(max_tokens=500))
    assert max(max(group.responses) for group in cut) == 500


def test_the_command_prints_every_part():
    """Guards against a command that cannot be run from elsewhere."""
    words = ["--prompts", "8", "--samples", "8", "--mean-tokens", "200", "--max-tokens", "1024"]
    done = subprocess.run([sys.executable, FILE, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("7.62B parameters on 8 H100s; 8 prompts of ")
    for name in ("weights to sampler", "sampling", "log-probs, anchor", "training", "in all"):
        assert re.search(rf"^{name} +[\d.,]+ ", done.stdout, re.MULTILINE), name
    done = subprocess.run([sys.executable, FILE, "--gpus", "1"], capture_output=True, text=True)
    assert done.returncode == 2 and "GPU" in done.stderr
