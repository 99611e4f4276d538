"""parallel.py: any number of ranks and any split of the work must give one and the same run.

The file is also the program that the tests start under torchrun (`worker`, at the end): it trains a
tiny model on 2 and on 4 ranks, and leaves its gradients, losses, weights and checkpoints for the
tests to compare with one process.
"""

import dataclasses
import errno
import itertools
import json
import math
import os
import resource
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from torch.distributed.checkpoint import FileSystemWriter

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for the worker; pytest has it already

import cli  # noqa: E402
import parallel  # noqa: E402
import rl  # noqa: E402
import runfolder  # noqa: E402
import sft  # noqa: E402
from cli import UserError  # noqa: E402
from model import ModelConfig, Transformer, random_init  # noqa: E402
from muon import Muon  # noqa: E402
from packing import Example, Unit, pack, positions_and_mask, share_stems  # noqa: E402
from parallel import World  # noqa: E402

ALONE = World(0, 1, torch.device("cpu"))
STOP = 7
SHAPE = ModelConfig(
    vocab_size=50, dim=24, layers=2, heads=3, kv_heads=1, head_dim=8, mlp_dim=40, tied=True
)


def examples(count: int = 11) -> list[Example]:
    """Responses of uneven lengths, the longest many times the shortest, to four prompts of 1 to 6
    tokens; the STOP that ends each is the prompts' first token, too."""
    generator = torch.Generator().manual_seed(5)
    prompts = [
        torch.randint(0, 50, (length,), generator=generator).tolist() for length in (1, 2, 4, 6)
    ]
    made = []
    for i in range(count):
        prompt, response = len(prompts[i % 4]), 1 + (i * i) % 23
        tokens = prompts[i % 4] + torch.randint(0, 50, (response,), generator=generator).tolist()
        tokens[0] = tokens[-1] = STOP
        made.append(Example(tokens, [(prompt, prompt + response)]))
    return made


def make_scorer(world: World, dtype: torch.dtype = torch.float64) -> parallel.Scorer:
    return parallel.shard(random_init(SHAPE, seed=0, dtype=dtype), world)


def loss_and_gradients(
    scorer, batch: list[Example], micro_tokens: int, world: World
) -> tuple[float, dict]:
    """This rank's part of the loss, and the gradients, of a step over `batch`: likelihood plus an
    entropy term.
    """
    count = sum(example.targets for example in batch)
    total = 0.0
    for _, packed in parallel.micro_batches(batch, micro_tokens, 200, world):
        logprob, entropy = parallel.log_probs(scorer, packed, temperature=1.2)
        loss = -(logprob + 0.1 * entropy).sum() / count
        loss.backward()
        total += loss.item()
    return total, {name: p.grad for name, p in scorer.named_parameters()}


def whole(tensors: dict) -> dict:
    return {
        name: t.full_tensor() if hasattr(t, "full_tensor") else t.clone()
        for name, t in tensors.items()
    }


def train(scorer, optimizer, world: World, steps: range, micro_tokens: int = 60) -> list[float]:
    norms = []
    for step in steps:
        scorer.zero_grad()
        loss_and_gradients(scorer, examples(4 + step), micro_tokens, world)
        norms.append(parallel.clip_grad_norm(scorer, 1.0))
        optimizer.step()
    return norms


def assert_close(got: dict, wanted: dict, relative: float = 1e-6) -> None:
    """Each tensor is off by at most `relative` of its own size."""
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (got[name] - tensor).norm() <= relative * tensor.norm(), name


# --- many ranks -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> dict[int, dict]:
    """What `worker` found on 2 and on 4 ranks, and what torchrun said. 4 start from the checkpoint
    that 2 wrote.
    """
    folder = tmp_path_factory.mktemp("ranks")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    found: dict = {"folder": folder}
    for size in (2, 4):
        command = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={size}",
            __file__,
            str(folder),
        ]
        done = subprocess.run(
            [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=200
        )
        assert (folder / f"{size}.pt").exists(), done.stderr
        found[size] = torch.load(folder / f"{size}.pt") | {
            "stderr": done.stderr,
            "exit": done.returncode,
        }
    return found


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("case", ["whole", "split", "lonely"])
def test_gradients_do_not_depend_on_ranks(ranks, size, case):
    """Bug: FSDP's default averages over ranks, and a rank with few tokens then counts as much as
    one with many. With one sequence ("lonely") all ranks but one have nothing to train on, and must
    neither hang nor change anything."""
    batch, _ = CASES[case]
    loss, gradients = loss_and_gradients(make_scorer(ALONE), batch, 10**6, ALONE)
    assert ranks[size][case]["loss"] == pytest.approx(loss, rel=1e-6)
    assert_close(ranks[size][case]["gradients"], gradients)


@pytest.mark.parametrize("size", [2, 4])
def test_first_updates_do_not_depend_on_ranks(ranks, size):
    """Bug: gradients agree, but clipping uses a rank's own norm, or AdamW's moments are mixed up
    between shards.
    """
    scorer = make_scorer(ALONE, torch.float32)
    norms = train(
        scorer, parallel.adamw(scorer.parameters(), 1e-2, 0.1), ALONE, range(3), micro_tokens=10**6
    )
    assert ranks[size]["norms"] == pytest.approx(norms, rel=1e-6)
    assert_close(ranks[size]["after 3"], dict(scorer.named_parameters()), 2e-6)


@pytest.mark.parametrize("size", [2, 4])
def test_muon_does_not_depend_on_ranks(ranks, size):
    """Bug: each rank makes its own rows orthogonal, which are not the rows of the orthogonal
    matrix.
    """
    assert_close(ranks[size]["muon"], dict(train_by_muon(ALONE).named_parameters()), 2e-5)


@pytest.mark.parametrize("size", [1, 4])
def test_checkpoint_of_two_ranks_resumes_on_any_number(ranks, size):
    """Bug: moments saved by shard, so that only the same number of ranks can read them back."""
    if size == 1:
        scorer = make_scorer(ALONE, torch.float32)
        optimizer = parallel.adamw(scorer.parameters(), 1e-2, 0.1)
        saved = parallel.complete_checkpoints(ranks["folder"] / "checkpoints")[0]
        state = parallel.load_checkpoint(saved, {"policy": scorer, "adamw": optimizer}, ALONE)
        assert (state["step"], state["ranks"], state["cursor"]) == (3, 2, 12)
        train(scorer, optimizer, ALONE, range(3, 5))
        resumed = dict(scorer.named_parameters())
    else:
        resumed = ranks[size]["after 5"]
    assert_close(resumed, ranks[2]["after 5"], 2e-6)


@pytest.mark.parametrize("size", [2, 4])
def test_weights_are_gathered_whole(ranks, size):
    """Bug: the sampler of a sharded run gets rank 0's slices."""
    for name, tensor in ranks[size]["copied"].items():
        assert torch.equal(tensor, ranks[size]["after 5"][f"model.{name}"].bfloat16()), name


@pytest.mark.parametrize("size", [2, 4])
def test_work_is_shared_out_in_order(ranks, size):
    """Bug: results that come back in the order of the ranks, or work that only one of them does."""
    assert [item for item, _ in ranks[size]["shared out"]] == [5, 3, 9, 1, 7]
    assert {rank for _, rank in ranks[size]["shared out"]} == set(range(size))


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_that_disagree_say_on_what(ranks, size):
    """Bug: one node started with another flag; the run hangs, or trains something in between."""
    assert ranks[size]["disagreement"] == f"ranks disagree on lr: 0 on 0, {size - 1} on {size - 1}"


@pytest.mark.parametrize("size", [2, 4])
def test_bad_input_on_one_rank_ends_all_with_one_line(ranks, size):
    """Bug: one rank finds a bad file and leaves; the others wait for it until a timeout, or drown
    it in tracebacks. (What torchrun itself reports about its children comes after our line.)"""
    ours = ranks[size]["stderr"].split("torch/distributed/elastic")[0]
    assert ranks[size]["exit"] != 0
    assert ours.count("error: line 3 is bad") == 1
    assert "Traceback" not in ours


# --- one process ----------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_tokens", [1, 40, 10**6])
def test_gradients_do_not_depend_on_micro_batches(micro_tokens):
    """Bug: the loss divided by each micro-batch's own token count, so that short micro-batches
    weigh more.
    """
    batch = examples()
    wanted_loss, wanted = loss_and_gradients(make_scorer(ALONE), batch, 10**6, ALONE)
    loss, gradients = loss_and_gradients(make_scorer(ALONE), batch, micro_tokens, ALONE)
    assert loss == pytest.approx(wanted_loss, rel=1e-6)
    assert_close(gradients, wanted)


def by_example(batch: list[Example], values: torch.Tensor) -> list[torch.Tensor]:
    """One value per trained token, cut into those of each example."""
    return list(values.split([example.targets for example in batch]))


def test_score_is_the_plain_computation():
    """Bug: targets off by one, temperature forgotten, or values of other tokens than they are said
    to be of.
    """
    scorer, batch, temperature = make_scorer(ALONE), examples(5), 1.7
    packed = pack(batch, row_length=64)
    logprob, entropy = parallel.log_probs(scorer, packed, temperature)
    got = zip(batch, by_example(batch, logprob), by_example(batch, entropy))
    for example, example_logprob, example_entropy in got:
        tokens = torch.tensor([example.tokens])
        table = (scorer.model.logits(scorer.model(tokens))[0] / temperature).log_softmax(-1)
        start, end = max(example.spans[0][0], 1), example.spans[0][1]
        wanted = torch.stack([table[t - 1, example.tokens[t]] for t in range(start, end)])
        torch.testing.assert_close(example_logprob.double(), wanted, rtol=1e-6, atol=1e-6)
        rows = table[start - 1 : end - 1]
        torch.testing.assert_close(
            example_entropy.double(), -(rows.exp() * rows).sum(-1), rtol=1e-6, atol=1e-6
        )


def test_documents_in_a_row_do_not_see_each_other():
    """Bug: attention or positions run on from one packed document into the next."""
    scorer = make_scorer(ALONE)
    first, second = Example([1, 2, 3, 4, 5], [(2, 5)]), Example([6, 7, 8, 9], [(1, 4)])
    changed = Example([40, 41, 42, 43, 44], [(2, 5)])

    def log_probs(*batch):
        packed = pack(list(batch), row_length=16)
        assert packed.tokens.shape[0] == 1  # in one row, or the test shows nothing
        return by_example(batch, parallel.log_probs(scorer, packed)[0])

    assert torch.equal(log_probs(first, second)[1], log_probs(changed, second)[1])
    assert not torch.equal(log_probs(first, second)[0], log_probs(changed, second)[0])
    alone = pack([second])
    torch.testing.assert_close(log_probs(first, second)[1], parallel.log_probs(scorer, alone)[0])


def test_responses_share_a_prompt():
    """Bug: K responses packed behind one copy of their prompt see each other, stand at other
    positions than alone, or pull at the prompt with another gradient. Against rows that hold one
    whole sequence each."""
    batch = examples()
    units, row_length = share_stems(batch, 200)
    together, *alone = pack(batch, row_length, units), *(pack([example]) for example in batch)
    assert together.parents is not None
    assert sum(unit.length for unit in units) < sum(len(example.tokens) for example in batch)
    scorer, reference = make_scorer(ALONE), make_scorer(ALONE)
    logprob, entropy = parallel.log_probs(scorer, together)
    (logprob + entropy.square()).sum().backward()
    for got, got_entropy, packed in zip(
        by_example(batch, logprob), by_example(batch, entropy), alone
    ):
        wanted, wanted_entropy = parallel.log_probs(reference, packed)
        (wanted + wanted_entropy.square()).sum().backward()
        torch.testing.assert_close(got, wanted)
        torch.testing.assert_close(got_entropy, wanted_entropy)
    for mine, theirs in zip(scorer.parameters(), reference.parameters()):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-6, atol=1e-6)


def test_shared_prompt_by_hand():
    """Bug: a branch that predicts from another branch's last token, or begins after the prompt's
    last token, whose position must predict each branch's own first token."""
    batch = [
        Example([1, 2, 3, 4, 5], [(3, 5)]),
        Example([9, 9], [(1, 2)]),
        Example([1, 2, 3, 7, 8, 6], [(3, 6)]),
    ]
    units, _ = share_stems(batch, 99)
    assert units == [Unit([2, 0], 9), Unit([1], 2)]
    packed = pack(batch, units=units)
    assert packed.tokens.tolist() == [[1, 2, 3, 7, 8, 6, 3, 4, 5], [9, 9, 0, 0, 0, 0, 0, 0, 0]]
    assert packed.documents.tolist() == [[0, 0, 1, 1, 1, 1, 2, 2, 2], [0, 0, 1, 1, 1, 1, 1, 1, 1]]
    assert packed.parents.tolist() == [[-1, -1, 0, 0, 0, 0, 0, 0, 0], [-1] * 9]
    assert packed.targets.tolist() == [4, 5, 9, 7, 8, 6]
    assert packed.index.tolist() == [6, 7, 9, 2, 3, 4]
    positions, visible = positions_and_mask(packed.tokens, packed.documents, packed.parents)
    assert positions[0].tolist() == [0, 1, 2, 3, 4, 5, 2, 3, 4]
    assert visible[0, 0, 7].tolist() == [True, True, False, False, False, False, True, True, False]


def test_positions_of_their_own():
    """Bug: a packed sequence's positions are its neighbour's, or are ignored; or its keys are
    shared with a sequence of the same prompt that stands elsewhere. Against the model itself at
    those positions."""
    scorer = make_scorer(ALONE)
    batch = [
        Example([1, 2, 3, 4, 5], [(3, 5)], [0, 4, 7, 8, 30]),
        Example([1, 2, 3, 7], [(3, 4)]),
        Example([1, 2, 3, 9, 9, 8], [(3, 6)], [1, 2, 5, 6, 9, 11]),
        Example([1, 2, 3, 6, 4, 4], [(3, 6)]),  # shares the prompt of the second, and of no other
    ]
    units, _ = share_stems(batch, 99)
    assert sorted(len(unit.members) for unit in units) == [1, 1, 2]
    for row_length in (5, 19):  # rows that are full to the end, and one row for all
        packed = pack(batch, row_length, units)
        assert packed.parents is not None
        got = by_example(batch, parallel.log_probs(scorer, packed)[0])
        for example, logprob in zip(batch, got):
            tokens, (start, end) = torch.tensor([example.tokens]), example.spans[0]
            positions = torch.tensor([example.positions or list(range(len(example.tokens)))])
            table = scorer.model.logits(scorer.model(tokens, positions=positions))[0].log_softmax(
                -1
            )
            wanted = table[range(start - 1, end - 1), example.tokens[start:end]]
            torch.testing.assert_close(logprob.double(), wanted, rtol=1e-6, atol=1e-6)
    plain = pack([dataclasses.replace(example, positions=None) for example in batch], row_length=21)
    moved = (torch.cat(got) - parallel.log_probs(scorer, plain)[0]).abs()
    assert moved[:2].min() > 1e-3 and moved[2] < 1e-6


def test_mask_comes_from_lengths_not_from_values():
    """Bug: a mask made by comparing tokens (with padding, or with the stop token) loses the
    response's stop token, or trains on the prompt's: the prompt here holds the stop token, which is
    also the padding's id."""
    packed = pack([Example([0, 5, 0, 6, 0], [(3, 5)]), Example([1, 2], [(1, 2)])], row_length=9)
    assert packed.tokens.tolist() == [[0, 5, 0, 6, 0, 1, 2]]
    assert packed.targets.tolist() == [6, 0, 2]
    assert packed.index.tolist() == [2, 3, 5]
    assert packed.documents.tolist() == [[0, 0, 0, 0, 0, 1, 1]]


def test_stop_token_has_gradient():
    """Bug (nanochat): the stop token is dropped when the response is stored, and stopping is never
    learned.
    """
    scorer = make_scorer(ALONE)
    packed = pack([Example([3, 4, 5, STOP], [(3, 4)])])  # the stop token is all that is trained on
    before, _ = parallel.log_probs(scorer, packed)
    (-before.sum()).backward()
    with torch.no_grad():
        for parameter in scorer.parameters():
            parameter -= 1e-3 * parameter.grad
        after, _ = parallel.log_probs(scorer, packed)
    assert after.sum() > before.sum()


def test_rows_are_as_long_as_is_cheapest():
    """Bug: rows that repeat a prompt for every response, or so long that attention costs more than
    that saves.
    """

    def cost(length: int, stem: int, dim: int) -> float:
        return length / (length - stem) * (1 + length / (3 * dim))

    for stem, dim in ((45, 576), (15, 96), (300, 3584)):
        batch = [Example([0] * (stem + 9), [(stem + 1, stem + 9)])] * 300
        units, chosen = share_stems(batch, dim)
        least = min(cost(length, stem, dim) for length in range(stem + 1, 9000))
        assert cost(chosen, stem, dim) == pytest.approx(least, rel=1e-4)
        assert all(chosen - 9 < unit.length <= chosen for unit in units[:-1])
    long = [Example([i] * 500, [(400, 500)]) for i in range(5)]  # stems that nobody shares
    assert share_stems(long, 576) == share_stems(long, 0) == ([Unit([i], 500) for i in range(5)], 0)


lengths_strategy = st.lists(st.integers(2, 60), min_size=0, max_size=40)


def batch_of(lengths: list[int], prompts: int) -> list[Example]:
    """Sequences of these lengths, to a few prompts; every token is another number, but those of a
    prompt.
    """
    batch = []
    for i, n in enumerate(lengths):
        start = 1 + i % prompts % (n - 1)
        batch.append(
            Example([100 * (i if t >= start else i % prompts) + t for t in range(n)], [(start, n)])
        )
    return batch


@given(
    lengths=lengths_strategy,
    row_length=st.integers(0, 200),
    prompts=st.integers(1, 50),
    dim=st.integers(0, 900),
)
@settings(max_examples=60, deadline=None)
def test_packing_loses_and_repeats_nothing(lengths, row_length, prompts, dim):
    """Bug: a sequence left out or cut when rows are full, a target from the next document, waste
    nobody noticed.
    """
    batch = batch_of(lengths, prompts)
    units, _ = share_stems(batch, dim)
    packed = pack(batch, row_length, units)
    lengths = [unit.length for unit in units]
    assert packed.targets.tolist() == [
        token for e in batch for token in e.tokens[slice(*e.spans[0])]
    ]
    assert len(packed.index) == len(set(packed.index.tolist())) == len(packed.targets)
    flat = packed.tokens.flatten()
    for example, places in zip(batch, by_example(batch, packed.index)):
        # the token before a target's place is the one that predicts it, and in a row the one before
        # the target
        assert [example.tokens[t - 1] for t in range(*example.spans[0])] == flat[places].tolist()
    rows = packed.tokens.shape[0]
    assert rows <= max(
        1, math.ceil(1.7 * sum(lengths) / max([row_length, *lengths, 1])) + 1
    )  # first fit's guarantee


@given(
    lengths=st.lists(st.one_of(st.integers(2, 60), st.just(400)), max_size=40),
    prompts=st.integers(1, 50),
    budget=st.integers(1, 900),
    dim=st.integers(0, 900),
    size=st.integers(1, 5),
)
@settings(max_examples=100, deadline=None)
def test_every_rank_gets_as_many_micro_batches(lengths, prompts, budget, dim, size):
    """Bug: ranks that run different numbers of micro-batches wait for each other for ever; a
    sequence trained twice; more tokens in a micro-batch than --micro-tokens allows, by padding or
    by prompts that stand in it again."""
    batch, cpu = batch_of(lengths, prompts), torch.device("cpu")
    shares = [
        list(parallel.micro_batches(batch, budget, dim, World(rank, size, cpu)))
        for rank in range(size)
    ]
    assert len({len(share) for share in shares}) == 1
    targets = torch.tensor(
        [token for example in batch for token in example.tokens[slice(*example.spans[0])]]
    )
    placed = [place for share in shares for places, _ in share for place in places.tolist()]
    assert sorted(placed) == list(range(len(targets)))
    for places, packed in (micro for share in shares for micro in share):
        assert packed.tokens.numel() <= max([budget, *lengths])
        assert packed.targets.tolist() == targets[places].tolist()


def test_values_of_all_are_in_the_order_of_the_examples():
    """Bug: values that come back in the order in which micro-batches were packed."""
    batch = examples()
    wanted = [token for example in batch for token in example.tokens[slice(*example.spans[0])]]
    for micro_tokens in (1, 40, 10**6):
        values = parallel.values_of_all(
            lambda packed: packed.targets.float(), batch, micro_tokens, 200, ALONE
        )
        assert values.tolist() == wanted


@given(lengths=st.lists(st.integers(1, 1000), min_size=1, max_size=60), bins=st.integers(1, 8))
@settings(max_examples=100, deadline=None)
def test_balance_spreads_by_length(lengths, bins):
    """Bug: as many sequences on each rank, but all of the long ones on one, for which the others
    wait.
    """
    loads = [sum(lengths[i] for i in share) for share in parallel.balance(lengths, bins)]
    assert max(loads) <= sum(lengths) / bins + max(lengths)


def test_norms_do_not_decay():
    """Bug: weight decay pulls RMSNorm gains from 1 to 0 (with zero gradients, decay is all that
    moves a weight).
    """
    scorer = make_scorer(ALONE)
    optimizer = parallel.adamw(scorer.parameters(), lr=0.1, weight_decay=0.5)
    before = {name: p.detach().clone() for name, p in scorer.named_parameters()}
    for parameter in scorer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in scorer.named_parameters():
        factor = 1.0 if parameter.ndim == 1 else 1 - 0.1 * 0.5
        torch.testing.assert_close(parameter.detach(), factor * before[name])


# --- the dtype of the products --------------------------------------------------------------------


def bfloat16_errors(truth: dict, **flags) -> dict[str, float]:
    """How far the gradients of a step in bf16 are from the truth, as shares of their lengths."""
    scorer = parallel.shard(random_init(SHAPE, seed=0), ALONE, torch.bfloat16, **flags)
    gradients = whole(loss_and_gradients(scorer, examples(), 64, ALONE)[1])
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
    return {
        name: ((gradients[name].double() - wanted).norm() / wanted.norm()).item()
        for name, wanted in truth.items()
    }


@pytest.mark.parametrize("recompute", [False, True])
def test_one_process_computes_in_bfloat16_as_fsdp_does(recompute):
    """Bug: one process, which needs no FSDP, computes in float32 whatever --dtype says, or in its
    recomputation alone; or rounds more than FSDP does, a gradient's sum for one."""
    _, truth = loss_and_gradients(make_scorer(ALONE), examples(), 64, ALONE)
    alone = bfloat16_errors(truth, checkpoint_activations=recompute)
    try:
        under_fsdp = bfloat16_errors(truth, offload=True)  # which asks for FSDP
    finally:
        torch.distributed.destroy_process_group()
    for name in truth:
        assert 1e-4 < alone[name] < 1.5 * under_fsdp[name] + 2e-3, name


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_messages_on_the_cpu_have_a_backend(monkeypatch, device):
    """Bug: on a GPU machine torch makes a group for the GPU alone, and the first sum of a loss,
    which is done on the CPU, ends the run."""
    asked = []

    def refuse(backend, **options):
        asked.append(backend)
        raise InterruptedError

    monkeypatch.setattr(parallel.dist, "init_process_group", refuse)
    monkeypatch.setattr(parallel, "can_use_varlen", lambda *place: False)
    with pytest.raises(InterruptedError):
        world = World(0, 1, torch.device(device))
        parallel.shard(random_init(SHAPE, seed=0), world, torch.bfloat16, offload=True)
    assert asked == ["gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"]


# --- checkpoints ----------------------------------------------------------------------------------


def save(folder: Path, step: int, parts: dict, state: dict) -> None:
    checkpoints = parallel.Checkpoints(folder, ALONE, keep=2)
    checkpoints.save(step, parts, state)
    checkpoints.finish()


def test_checkpoint_restores_everything_bitwise(tmp_path):
    """Bug (nanoGPT): no generator state, or moments rounded on their way; the resumed run is
    another run.
    """
    scorer = make_scorer(ALONE, torch.float32)
    optimizer = parallel.adamw(scorer.parameters(), 1e-2)
    train(scorer, optimizer, ALONE, range(2))
    save(tmp_path, 2, {"policy": scorer, "adamw": optimizer}, {"cursor": 5})
    drawn = torch.rand(3)
    train(scorer, optimizer, ALONE, range(2, 4))

    fresh = parallel.shard(random_init(SHAPE, seed=9), ALONE)
    again = parallel.adamw(fresh.parameters(), 1e-2)
    state = parallel.load_checkpoint(
        tmp_path / "step-000002", {"policy": fresh, "adamw": again}, ALONE
    )
    assert state == {"step": 2, "ranks": 1, "cursor": 5}
    assert torch.equal(torch.rand(3), drawn)
    train(fresh, again, ALONE, range(2, 4))
    for one, other in zip(scorer.parameters(), fresh.parameters()):
        assert torch.equal(one, other)


def test_only_complete_checkpoints_count(tmp_path):
    """Bug: a write cut off by a kill is taken for the newest checkpoint; or the disk fills up with
    old ones.
    """
    scorer = make_scorer(ALONE)
    (tmp_path / "step-000004.partial").mkdir(parents=True)
    (tmp_path / "step-000004.partial" / "half").write_text("garbage")
    for step in (1, 2, 3):
        save(tmp_path, step, {"policy": scorer}, {})
    assert [path.name for path in parallel.complete_checkpoints(tmp_path)] == [
        "step-000002",
        "step-000003",
    ]
    save(tmp_path, 4, {"policy": scorer}, {})
    assert not (tmp_path / "step-000004" / "half").exists()


def test_checkpoints_that_are_kept_for_good(tmp_path):
    """Bug: the checkpoints that the curves of RL are measured on are removed with the other old
    ones.
    """
    scorer, checkpoints = (
        make_scorer(ALONE),
        parallel.Checkpoints(tmp_path, ALONE, keep=1, keep_every=2),
    )
    for step in range(1, 6):
        checkpoints.save(step, {"policy": scorer}, {})
    checkpoints.finish()
    assert [parallel.step_of(path) for path in parallel.complete_checkpoints(tmp_path)] == [2, 4, 5]


@contextmanager
def signals_interrupt():
    """As in a command that `cli.run` started."""
    with cli.handling(cli.interrupt), pytest.raises(KeyboardInterrupt):
        yield


def test_a_checkpoint_is_begun_wholly_or_not_at_all(tmp_path, monkeypatch):
    """Bug: SIGTERM while a checkpoint is begun leaves half of it, which nobody completes."""
    begin, checkpoints = parallel.dcp.async_save, parallel.Checkpoints(tmp_path, ALONE)

    def interrupted(*args, **more):
        signal.raise_signal(signal.SIGTERM)
        return begin(*args, **more)

    monkeypatch.setattr(parallel.dcp, "async_save", interrupted)
    with signals_interrupt():
        checkpoints.save(1, {"policy": make_scorer(ALONE)}, {})
    checkpoints.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def test_a_checkpoint_is_waited_for_once_more(tmp_path, monkeypatch):
    """Bug: SIGTERM while the next checkpoint waits for this one, and nobody waits any longer."""
    go_on, write = threading.Event(), FileSystemWriter.write_data

    def slowly(self, *args):
        assert go_on.wait(60)
        return write(self, *args)

    monkeypatch.setattr(FileSystemWriter, "write_data", slowly)
    checkpoints = parallel.Checkpoints(tmp_path, ALONE)
    parts = {"policy": make_scorer(ALONE)}
    checkpoints.save(1, parts, {})
    with signals_interrupt():
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
        checkpoints.save(2, parts, {})
    go_on.set()
    checkpoints.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """Bug: a checkpoint that holds what the weights became while it was written, that looks
    complete before it is, or whose failure nobody hears of."""
    go_on, write = threading.Event(), FileSystemWriter.write_data

    def slowly(self, *args):
        assert go_on.wait(60)
        return write(self, *args)

    monkeypatch.setattr(FileSystemWriter, "write_data", slowly)
    scorer = make_scorer(ALONE, torch.float32)
    optimizer = parallel.adamw(scorer.parameters(), 1e-2)
    train(scorer, optimizer, ALONE, range(1))
    before = [parameter.detach().clone() for parameter in scorer.parameters()]
    moments = [optimizer.state[parameter]["exp_avg"].clone() for parameter in scorer.parameters()]
    checkpoints = parallel.Checkpoints(tmp_path, ALONE)
    checkpoints.save(1, {"policy": scorer, "adamw": optimizer}, {})
    train(scorer, optimizer, ALONE, range(1, 3))
    assert not parallel.complete_checkpoints(tmp_path) and not torch.equal(
        next(scorer.parameters()), before[0]
    )
    go_on.set()
    checkpoints.finish()
    parallel.load_checkpoint(
        tmp_path / "step-000001", {"policy": scorer, "adamw": optimizer}, ALONE
    )
    assert all(torch.equal(*pair) for pair in zip(scorer.parameters(), before))
    assert all(
        torch.equal(optimizer.state[p]["exp_avg"], m) for p, m in zip(scorer.parameters(), moments)
    )

    monkeypatch.setattr(
        parallel, "write_text", lambda *_: (_ for _ in ()).throw(OSError("disk full"))
    )
    checkpoints.save(2, {"policy": scorer}, {})
    with pytest.raises(UserError, match="cannot write a checkpoint"):
        checkpoints.finish()


@contextmanager
def small_files():
    """Files may have 1,000 bytes: as on a full disk, torch's own code is what fails. Not a fixture:
    pytest reports a test before its fixtures end, into a log that may itself be longer than that.
    """
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_checkpoint_that_does_not_fit_says_so(tmp_path):
    """Bug: the disk is full, and all that is said is "(CheckpointException)"."""
    line = r"cannot write a checkpoint into .*, where [\d.]+ GB are free: File too large$"
    with small_files(), pytest.raises(UserError, match=line):
        save(tmp_path, 1, {"policy": make_scorer(ALONE)}, {})
    assert not parallel.complete_checkpoints(tmp_path)


def test_a_model_that_does_not_fit_says_so(tmp_path):
    """Bug: a run of days ends in a traceback, for its model does not fit onto the disk; or the old
    model is gone."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").write_text("whole")
    line = r"cannot write .*/model: File too large$"
    with small_files(), pytest.raises(UserError, match=line):
        parallel.save_model(make_scorer(ALONE), tmp_path / "model", None, ALONE)
    assert (tmp_path / "model" / "old").read_text() == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]  # no half that fills the disk


def test_bad_checkpoints_are_named(tmp_path):
    """Bug: a checkpoint of another model, or a damaged one, ends in a traceback from deep inside
    torch.
    """
    scorer = make_scorer(ALONE)
    save(tmp_path, 1, {"policy": scorer}, {})
    saved = tmp_path / "step-000001"
    with pytest.raises(UserError, match="does not hold value_head"):
        parallel.load_checkpoint(saved, {"policy": scorer, "value_head": torch.zeros(3)}, ALONE)
    wider = parallel.Scorer(random_init(dataclasses.replace(SHAPE, vocab_size=60), 0))
    with pytest.raises(
        UserError, match=r"model.embed.weight has shape \[50, 24\], expected \[60, 24\]"
    ):
        parallel.load_checkpoint(saved, {"policy": wider}, ALONE)
    (saved / "state.json").write_text('{"step": 1')
    with pytest.raises(UserError, match="is damaged"):
        parallel.load_checkpoint(saved, {"policy": scorer}, ALONE)


STATES = {  # state.json, damaged
    "no state": '{"step": 1}',
    "no object": "7",
    "null": '{"step": 1, "seen": null}',
    "text": '{"step": 1, "seen": "5"}',
    "true": '{"step": 1, "seen": true}',
    "step": '{"step": [1], "seen": 5}',
}


@pytest.mark.parametrize("damage", ["truncated", "missing", "scrambled", *STATES])
def test_damaged_checkpoints_are_one_line(tmp_path, damage):
    """Bug: a data file cut off by a full disk ends in pages of traceback; torch's exception is no
    Exception. A counter that is none ends in one later on. Or nobody says that an earlier one is
    there to go on from.
    """
    scorer = make_scorer(ALONE)
    save(tmp_path, 1, {"policy": scorer}, {"seen": 5})
    saved = tmp_path / "step-000001"
    assert (
        parallel.load_checkpoint(saved, {"policy": scorer}, ALONE, needed={"seen": 0})["seen"] == 5
    )
    (data,) = saved.glob("*.distcp")
    if damage == "truncated":
        data.write_bytes(data.read_bytes()[:1000])
    elif damage == "missing":
        data.unlink()
    elif damage == "scrambled":
        data.write_bytes(bytes(len(data.read_bytes())))
    else:
        (saved / "state.json").write_text(STATES[damage])
    for earlier in ("the start", "step 0"):
        line = rf"step-000001 is damaged \(\w+\): remove it to go on from {earlier}$"
        with pytest.raises(UserError, match=line):
            parallel.load_checkpoint(saved, {"policy": scorer}, ALONE, needed={"seen": 0})
        (tmp_path / "step-000000").mkdir(exist_ok=True)


def test_a_forks_counters_are_not_damage():
    """Bug: what a fork notes in a checkpoint is refused, for JSON gives it back as another type."""
    for like, value in ((1, 1.5), (0.5, 1), ((1,), [1]), (None, 7), ({}, {"a": 1}), (True, False)):
        assert parallel.same_kind(value, like)
    for like, value in ((1, True), ({}, []), ("a", 1), ([], None)):
        assert not parallel.same_kind(value, like)


def test_unknown_devices_are_one_line():
    """Bug: a typing mistake in --device shows as torch's traceback."""
    for device in ("foo", "cuda:x", "mps:", ""):
        with pytest.raises(UserError, match="--device"):
            parallel.start(device)


RANKS = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29517"}


@pytest.mark.parametrize(
    "changed, said",
    [
        *[({name: None}, f"RANK is set, but not {name}") for name in RANKS if name != "RANK"],
        (dict.fromkeys(RANKS, None) | {"RANK": "0"}, "not WORLD_SIZE, MASTER_PORT, MASTER_ADDR"),
        ({"WORLD_SIZE": ""}, "not WORLD_SIZE"),
        ({"RANK": "first"}, "RANK is 'first' and no whole number"),
        ({"RANK": "1"}, "RANK is 1, but there are 1 ranks"),
        ({"MASTER_PORT": "99999"}, "cannot join the ranks"),
    ],
)
def test_half_of_torchruns_variables_is_one_line(changed, said, monkeypatch):
    """Bug: a cluster or an old shell has set RANK: the traceback of a KeyError, or of a rendezvous."""
    for name, value in (RANKS | changed).items():
        monkeypatch.setenv(name, "" if value is None else value)
        if value is None:
            monkeypatch.delenv(name)
    with pytest.raises(UserError, match=said):
        parallel.start("cpu")


def test_a_gpu_that_is_not_there_is_one_line(monkeypatch):
    """Bug: more ranks than GPUs, or no LOCAL_RANK to choose one by, shows as torch's traceback."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="cuda:2: this machine has 2 CUDA devices"):
        parallel.start("cuda:2")
    for name, value in RANKS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(UserError, match="RANK is set, but not LOCAL_RANK"):
        parallel.start("cuda")
    monkeypatch.setenv("LOCAL_RANK", "7")
    with pytest.raises(UserError, match="cuda:7: this machine has 2 CUDA devices"):
        parallel.start("cuda")


# --- the run folder -------------------------------------------------------------------------------


@dataclasses.dataclass
class Flags:
    lr: float = 0.1
    steps: int = 10


def test_run_folders_are_never_overwritten(tmp_path):
    """Bug: a command repeated without --resume starts over the top of a finished run."""
    out = runfolder.open_run(tmp_path / "run", Flags(), False, ("steps",), ALONE)
    assert json.loads((out / "config.json").read_text()) == {"lr": 0.1, "steps": 10}
    with pytest.raises(UserError, match="exists already: --resume"):
        runfolder.open_run(out, Flags(), False, ("steps",), ALONE)
    runfolder.open_run(out, Flags(steps=20), True, ("steps",), ALONE)
    with pytest.raises(UserError, match=r"was started with other flags: --lr 0.1 \(now 0.2\)$"):
        runfolder.open_run(out, Flags(lr=0.2), True, ("steps",), ALONE)
    with pytest.raises(UserError, match="there is no run in"):
        runfolder.open_run(tmp_path / "other", Flags(), True, ("steps",), ALONE)
    (out / "config.json").write_text('{"lr": 0.')
    with pytest.raises(UserError, match="only half of one"):
        runfolder.open_run(out, Flags(), True, ("steps",), ALONE)
    assert (out / "config.json").read_text() == '{"lr": 0.'


def test_a_run_takes_the_folder_that_is_there(tmp_path):
    """Bug: the run's folder is made elsewhere and renamed, which a mount point (docker -v) or a
    link refuses, after everything is loaded."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "dangling").symlink_to(tmp_path / "absent")
    inode = (tmp_path / "empty").stat().st_ino
    for name in ("link", "dangling", "new/run"):
        out = runfolder.open_run(tmp_path / name, Flags(), False, (), ALONE)
        assert (out / "config.json").exists() and (out / "checkpoints").is_dir()
    assert (tmp_path / "empty").stat().st_ino == inode  # as a mount point wants it
    assert {path.name for path in tmp_path.iterdir()} == {
        "empty", "link", "dangling", "absent", "new",
    }  # fmt: skip


def test_the_run_of_another_command_is_named(tmp_path):
    """Bug: sft.py --resume in a run of rl.py lists every flag that one of them has."""

    @dataclasses.dataclass
    class Other:
        out: str = ""
        recipe: str = "t1"

    out = runfolder.open_run(tmp_path / "run", Other(), False, (), ALONE)
    with pytest.raises(UserError, match=r"is the run of another command.*it has --out$"):
        runfolder.open_run(out, Flags(), True, (), ALONE)


def test_a_disk_that_is_full_says_what_is_kept(tmp_path):
    """Bug: a run of days ends in "no space left", and nobody says that it can go on, nor how."""
    out = tmp_path / "run"
    (out / "checkpoints" / "step-000007").mkdir(parents=True)
    how = f"checkpoint of step 7 in {out}; go on with --resume"
    refused = pytest.raises(UserError, match=rf"^cannot write .*: No space left on device; {how}$")
    with refused, runfolder.reserved(out, ALONE), cli.writing(out / "metrics.jsonl"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    checkpoints = parallel.Checkpoints(out / "checkpoints", ALONE)
    refused = pytest.raises(UserError, match=rf"^cannot write .*: File too large; {how}$")
    with refused, runfolder.reserved(out, ALONE), small_files():
        checkpoints.save(8, {"policy": make_scorer(ALONE)}, {})
        checkpoints.finish()


def test_metrics_go_on_from_the_checkpoint(tmp_path):
    """Bug: steps done again after a kill stand in metrics.jsonl twice; a half-written last line
    breaks the plot.
    """
    log = runfolder.MetricsLog(tmp_path, 0, ALONE)
    for step in (1, 2, 3):
        log.write(step, {"loss": step / 3})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    runfolder.MetricsLog(tmp_path, 2, ALONE).write(3, {"loss": 1.0})
    rows = runfolder.read_metrics(tmp_path / "metrics.jsonl")
    assert rows == [
        {"step": 1, "loss": 1 / 3},
        {"step": 2, "loss": 2 / 3},
        {"step": 3, "loss": 1.0},
    ]
    runfolder.plot(
        tmp_path / "metrics.jsonl",
        tmp_path / "metrics.png",
        {"loss": ["loss", "absent"], "b": ["b"]},
    )
    assert (tmp_path / "metrics.png").read_bytes().startswith(b"\x89PNG")


def test_metrics_on_a_full_disk_are_one_line(tmp_path, monkeypatch):
    """Bug: the line that does not fit onto the disk ends a run in a traceback."""
    log = runfolder.MetricsLog(tmp_path, 0, ALONE)
    monkeypatch.setattr(log, "path", Path("/dev/full"))
    with pytest.raises(UserError, match="cannot write /dev/full: No space left on device"):
        log.write(1, {"loss": 1.0})


NOT_JSON = (b'{"step": 2, "lo', b"\0" * 40, b"\xff\xfe", b"7", b"[" * 9999)
NO_METRICS = (
    *(b'{"step": 2, "loss": null}', b'{"step": 2, "loss": "x"}', b'{"step": 2, "loss": []}'),
    *(b'{"step": true}', b'{"step": 0}', b'{"step": -1}', b'{"step": 2.0}', b'{"loss": 1}'),
)


@pytest.mark.parametrize("damage", [*NOT_JSON, *NO_METRICS])
def test_damaged_metrics_lose_nothing_else(tmp_path, damage, capsys):
    """Bug: a damaged line, the last or any, takes all lines behind it along when a run is resumed,
    or ends it in a traceback."""
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "loss": step / 3} for step in (1, 2, 3, 4)]
    lines = [json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join([lines[0], damage, *lines[2:]]) + b"\n")
    runfolder.MetricsLog(tmp_path, 4, ALONE)
    assert runfolder.read_metrics(path) == [rows[0], *rows[2:]]
    assert "the lines of 1 steps are missing, from 2 on" in capsys.readouterr().out
    path.write_bytes(b"\n".join([*lines[:3], damage]))  # a line that is joined to it, too
    runfolder.MetricsLog(tmp_path, 4, ALONE, remembered=rows[2:]).write(5, {"loss": 2.0})
    assert runfolder.read_metrics(path) == [*rows, {"step": 5, "loss": 2.0}]
    assert not capsys.readouterr().out
    runfolder.MetricsLog(tmp_path, 4, ALONE, remembered=[7, {"step": None}, {"step": "x"}])
    assert runfolder.read_metrics(path) == rows


def test_metrics_that_are_no_file_are_one_line(tmp_path):
    """Bug: a metrics.jsonl that cannot be read ends in a traceback."""
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"cannot read .*metrics.jsonl: Is a directory"):
        runfolder.MetricsLog(tmp_path, 0, ALONE)


@pytest.mark.parametrize(
    "backend, broken", [("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")]
)
def test_a_missing_logger_is_refused_at_once(tmp_path, backend, broken, monkeypatch):
    """Bug: --log wandb without wandb leaves a folder that the next try refuses. (A mere folder of
    that name is none.)"""

    @dataclasses.dataclass
    class Logged(Flags):
        log: str = "none"

    monkeypatch.setitem(sys.modules, broken, None)
    line = f"--log {backend}: {backend} is not installed: pip install {backend}$"
    with pytest.raises(UserError, match=line):
        runfolder.open_run(tmp_path / "run", Logged(log=backend), False, (), ALONE)
    monkeypatch.delitem(sys.modules, broken)
    if backend == "wandb":
        (tmp_path / "wandb").mkdir()
        monkeypatch.setattr(sys, "path", [str(tmp_path)])
        with pytest.raises(UserError, match="wandb is not installed"):
            runfolder.check_run(tmp_path / "run", Logged(log=backend), False, ())
        monkeypatch.delitem(sys.modules, "wandb")
        (tmp_path / "wandb" / "__init__.py").write_text("raise TypeError('Descriptors\\ncannot')")
        with pytest.raises(UserError, match=r"wandb cannot be imported \(Descriptors\)$"):
            runfolder.check_run(tmp_path / "run", Logged(log=backend), False, ())
    assert not list(tmp_path.glob("run*"))


def test_a_logger_that_refuses_is_one_line(tmp_path, monkeypatch):
    """Bug: --log wandb without a login ends in pages of somebody else's traceback."""

    def init(**flags):
        raise ConnectionError("api_key not configured (no-tty)\nmore")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    with pytest.raises(UserError, match=r"^--log wandb: api_key .*no-tty\) \(.*--resume \S+\)$"):
        runfolder.MetricsLog(tmp_path, 0, ALONE, "wandb")


def test_a_logger_that_fails_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    """Bug: the network is away for a moment, and a run of days ends in a traceback."""

    class Failing:
        def log(self, metrics, step):
            raise RuntimeError("network gone\nmore")

    wandb = SimpleNamespace(init=lambda **flags: Failing())
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    log = runfolder.MetricsLog(tmp_path, 0, ALONE, "wandb")
    for step in (1, 2):
        log.write(step, {"loss": 1.0})
    assert len(runfolder.read_metrics(log.path)) == 2
    assert capsys.readouterr().out == "--log wandb: network gone; the run goes on without it\n"


def drawn(monkeypatch, folder: Path, rows: list[dict], panels: dict[str, list[str]]) -> list:
    """The panels of a figure: for each its lines, in the order in which they are drawn."""
    figures = []
    save = Figure.savefig

    def watched(figure, *arguments, **options):
        figures.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", watched)
    cli.write_jsonl(folder / "metrics.jsonl", rows)
    runfolder.plot(folder / "metrics.jsonl", folder / "metrics.png", panels)
    return [axis.get_lines() for axis in figures[0].axes]


@pytest.mark.parametrize("panels", [rl.PANELS, sft.PANELS, {"three": ["a", "b", "c"]}])
def test_no_line_of_the_figure_hides_another(monkeypatch, tmp_path, panels):
    """Bug: equal metrics (accuracy and pass@1; unexpected and truncated) are one line to the eye:
    the one that was drawn last."""
    names = [name for panel in panels.values() for name in panel]
    rows = [{"step": step, "grad_norm": 1.0} | dict.fromkeys(names, 0.5) for step in range(1, 4)]
    for lines in drawn(monkeypatch, tmp_path, rows, panels):
        assert all(len(line.get_ydata()) == 3 for line in lines)
        widths = [line.get_linewidth() for line in lines]
        assert all(below > above + 1 for below, above in itertools.pairwise(widths))


@pytest.mark.parametrize("dropped", [{"dropped": 1.0}, {}])
def test_the_figure_has_gaps_where_nothing_was_learned(monkeypatch, tmp_path, dropped):
    """Bug: entropy and KL are drawn straight through steps that had none, and the loss as 0."""
    learnt = {"loss": 0.3, "entropy": 1.0, "grad_norm": 2.0, "length": 9}
    idle = {"loss": 0.0, "length": 9} | dropped
    rows = [{"step": step} | (idle if step in (3, 4, 6) else learnt) for step in range(1, 9)]
    names = ["loss", "entropy", "grad_norm", "length"]
    panels = drawn(monkeypatch, tmp_path, rows, {name: [name] for name in names})
    lines = dict(zip(names, [line for [line] in panels[:4]]))
    for name in ("loss", "entropy", "grad_norm"):
        values = lines[name].get_ydata()
        assert [math.isnan(value) for value in values] == [
            step in (3, 4, 6) for step in range(1, 9)
        ]
        assert lines[name].get_marker() != "None"  # step 5 stands alone
    assert len(lines["length"].get_ydata()) == 8
    assert all(map(math.isfinite, lines["length"].get_ydata()))


def test_what_is_measured_now_and_then_has_no_gaps(monkeypatch, tmp_path):
    """Bug: the held-out loss, of every 50th step, is drawn as lonely points."""
    rows = [{"step": step, "loss": 0.3, "grad_norm": 1.0} for step in range(1, 9)]
    rows[1]["heldout_loss"] = rows[7]["heldout_loss"] = 0.2
    heldout, loss = drawn(monkeypatch, tmp_path, rows, sft.PANELS)[0]
    assert list(heldout.get_xdata()) == [2, 8] and list(heldout.get_ydata()) == [0.2, 0.2]
    assert len(loss.get_ydata()) == 8


def test_guard_skips_then_stops():
    """Bug: one NaN step ruins the weights for good; or a run of only NaN goes on for days."""
    guard = runfolder.Guard(limit=3)
    assert guard.allows(loss=1.0, gradient=2.0)
    assert not guard.allows(loss=math.nan, gradient=2.0)
    assert not guard.allows(loss=1.0, gradient=math.inf)
    assert guard.allows(loss=1.0, gradient=2.0) and guard.skipped == 2
    assert not guard.allows(loss=math.nan, gradient=1.0) and not guard.allows(
        loss=math.nan, gradient=1.0
    )
    with pytest.raises(UserError, match="loss not finite for 3 steps in a row"):
        guard.allows(loss=math.nan, gradient=1.0)


# --- the program under torchrun -------------------------------------------------------------------


def train_by_muon(world: World) -> parallel.Scorer:
    scorer = make_scorer(world, torch.float32)
    train(
        scorer,
        Muon([p for p in scorer.model.blocks.parameters() if p.ndim == 2], 1e-3),
        world,
        range(3),
    )
    return scorer


CASES = {"whole": (examples(), 10**6), "split": (examples(), 40), "lonely": (examples()[3:4], 40)}


def worker(folder: Path, world: World) -> None:
    found: dict = {}
    for name, (batch, micro_tokens) in CASES.items():
        loss, gradients = loss_and_gradients(make_scorer(world), batch, micro_tokens, world)
        found[name] = {"loss": parallel.sum_over_ranks(loss), "gradients": whole(gradients)}
    scorer = make_scorer(world, torch.float32)
    optimizer = parallel.adamw(scorer.parameters(), 1e-2, 0.1)
    found["norms"] = train(scorer, optimizer, world, range(3))
    found["after 3"] = whole(dict(scorer.named_parameters()))
    if saved := parallel.complete_checkpoints(folder / "checkpoints"):
        scorer = parallel.shard(random_init(SHAPE, seed=9), world)  # to be overwritten
        optimizer = parallel.adamw(scorer.parameters(), 1e-2, 0.1)
        assert (
            parallel.load_checkpoint(saved[0], {"policy": scorer, "adamw": optimizer}, world)[
                "step"
            ]
            == 3
        )
    else:
        parts = {"policy": scorer, "adamw": optimizer}
        checkpoints = parallel.Checkpoints(folder / "checkpoints", world)
        checkpoints.save(3, parts, {"cursor": 12})
    train(scorer, optimizer, world, range(3, 5))  # while that is written
    found["after 5"] = whole(dict(scorer.named_parameters()))
    if not saved:
        checkpoints.finish()
    found["muon"] = whole(dict(train_by_muon(world).named_parameters()))
    plain = Transformer(SHAPE, dtype=torch.bfloat16)
    parallel.copy_weights(scorer, plain)
    found["copied"] = dict(plain.state_dict())
    items = [5, 3, 9, 1, 7]
    found["shared out"] = parallel.share_out(
        lambda mine: [(item, world.rank) for item in mine], items, items, world
    )
    try:
        parallel.same_on_all_ranks({"lr": 0 if world.rank < world.size - 1 else world.rank})
    except UserError as error:
        found["disagreement"] = str(error)
    if world.main:
        torch.save(found, folder / f"{world.size}.pt")
    parallel.barrier()
    if world.rank == 1:
        raise UserError("line 3 is bad")
    parallel.barrier()  # where the others are when rank 1 leaves


if __name__ == "__main__":
    try:
        with parallel.session("cpu") as this_world:
            worker(Path(sys.argv[1]), this_world)
    except UserError as failure:
        print(f"error: {failure}", file=sys.stderr)
        sys.exit(2)
