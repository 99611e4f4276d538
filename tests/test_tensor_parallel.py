"""tensor_parallel.py: ranks that share one copy of a model draw what one rank draws, and a run of
rl.py does not know of them. Between rollouts the copy's memory can be given back.

The file is also the program that the tests start under torchrun (`worker`, at the end).
"""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # for the worker; pytest has them already

import test_rl as hand  # noqa: E402
import test_rl_runs as runs  # noqa: E402
from test_decode import random_model  # noqa: E402

import parallel  # noqa: E402
import rl  # noqa: E402
import rollout  # noqa: E402
import sample  # noqa: E402
import tensor_parallel  # noqa: E402
from cli import UserError  # noqa: E402
from model import ModelConfig, Transformer  # noqa: E402
from parallel import World  # noqa: E402
from tensor_parallel import SlicedTransformer  # noqa: E402

ALONE = runs.ALONE
TEAMS = {2: (2,), 4: (2, 4)}  # by the number of ranks
SHAPE = {
    "vocab_size": 50,
    "dim": 32,
    "layers": 2,
    "heads": 8,
    "kv_heads": 4,
    "head_dim": 8,
    "mlp_dim": 48,
}
FAMILIES = {
    "llama": ModelConfig(**SHAPE, tied=True, qkv_bias=True, out_bias=True, mlp_bias=True),
    "qwen2": ModelConfig(**SHAPE, family="qwen2", qkv_bias=True),
    "qwen3": ModelConfig(**SHAPE | {"kv_heads": 8, "head_dim": 16}, family="qwen3", qk_norm=True),
    "glm4": ModelConfig(**SHAPE, family="glm4", qkv_bias=True, rope_dim=4, post_norms=True),
}
DTYPES = {"fp32": torch.float32, "fp64": torch.float64}  # by CPUDecoder, by ModelDecoder
TRAINED = dataclasses.replace(hand.SHAPE, heads=4, kv_heads=4)
ITEMS = [5, 3, 9, 1, 7]

Drawn = list[tuple[list[int], list[float], str]]  # tokens, log-probs, reason


def drawn(model: Transformer, world: World, team: int = 1) -> Drawn:
    """12 completions, more than run at once, of prompts of uneven lengths."""
    prompts = [[5, 6, 7, 8, 9], [4], list(range(10, 40)), [3, 30]]
    sampler = sample.Sampler(model, eos_ids=[1, 2, 3], max_batch=5)
    params = sample.SamplingParams(24, temperature=1.2, top_p=0.9, seed=3)
    found = rollout.draw(sampler, prompts, [0, 1, 2, 7], 3, params, world, team)
    return [(done.tokens, done.logprobs, done.finish_reason) for done in found]


def assert_same_draws(got: Drawn, wanted: Drawn) -> None:
    assert [tokens for tokens, _, _ in got] == [tokens for tokens, _, _ in wanted]
    assert [reason for _, _, reason in got] == [reason for _, _, reason in wanted]
    for (_, logprobs, _), (_, others, _) in zip(got, wanted, strict=True):
        assert logprobs == pytest.approx(others, abs=1e-4)


# --- many ranks -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A model of four key/value heads that knows some arithmetic."""
    folder = tmp_path_factory.mktemp("models") / "babbler"
    runs.save_babbler(folder, TRAINED)
    return folder


@pytest.fixture(scope="module")
def alone(model, tmp_path_factory) -> Path:
    """Three steps in one process, to compare with."""
    out = tmp_path_factory.mktemp("alone") / "run"
    rl.main(runs.flags(model, out, steps=3))
    return out


@pytest.fixture(scope="module", params=TEAMS)
def ranks(request, model, tmp_path_factory) -> dict:
    """What `worker` left behind on 2 and on 4 ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={request.param}"]
    done = subprocess.run(
        [sys.executable, *launch, __file__, str(model), str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=290,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(folder / "found.pt") | {"folder": folder, "size": request.param}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_team_draws_what_one_rank_draws(ranks, family, dtype):
    """Bug: a slice of other rows or columns than its place, in any family; a sum left out (in the
    CPU's own decode step, or in the prefill), or a bias added once per rank; two teams that draw
    the same work, or draw it in another order."""
    wanted = drawn(random_model(FAMILIES[family], DTYPES[dtype]), ALONE)
    assert len({len(tokens) for tokens, _, _ in wanted}) > 4  # they end at different steps
    for team in TEAMS[ranks["size"]]:
        assert_same_draws(ranks[f"{family} {dtype} {team}"], wanted)


def test_a_team_decides_by_its_least_free_memory(ranks):
    """Bug: each rank makes as many slots as its own memory has room for: they decode different
    rows, and add those up."""
    wanted = drawn(random_model(FAMILIES["qwen2"], torch.float32), ALONE)
    for team in TEAMS[ranks["size"]]:
        assert_same_draws(ranks[f"uneven memory {team}"], wanted)


def test_slices_take_their_share_of_the_memory(ranks):
    """Bug: a rank that holds more of the blocks than its share, or of the keys and values."""
    whole = random_model(FAMILIES["qwen2"], torch.float32)
    matrices = sum(p.numel() for p in whole.blocks.parameters() if p.ndim == 2)
    for team in TEAMS[ranks["size"]]:
        blocks, cache = ranks[f"sizes {team}"]
        assert blocks == matrices // team and cache == SHAPE["kv_heads"] // team


def test_the_first_rank_of_a_team_reports(ranks):
    """Bug: every rank of a team sends all of its results to all others."""
    for team in TEAMS[ranks["size"]]:
        reported = ranks[f"shared out {team}"]
        assert [item for item, _ in reported] == ITEMS
        assert {rank for _, rank in reported} == set(range(0, ranks["size"], team))


def test_a_run_does_not_know_of_teams(ranks, alone, model):
    """Bug: an update that depends on how the sampler is cut; or slices that keep the weights of the
    run's beginning. Three steps of two updates."""
    for team in TEAMS[ranks["size"]]:
        assert_same_update(ranks["folder"] / f"team-{team}", alone, model)


def test_a_run_goes_on_with_another_team(ranks, alone, model):
    """Bug: --resume refuses another --sampler-ranks, or a resumed team samples from other weights.
    Two steps in teams of two, then one without teams (on 2 ranks) or in one of four."""
    assert_same_update(ranks["folder"] / "resumed", alone, model)


def test_bf16_slices_are_near_the_trainer(ranks):
    """Bug: in bf16, too, a sum left out or slices of other weights: the log-probs of sampler and
    trainer would differ by whole nats."""
    [row] = runs.metrics(ranks["folder"] / "bf16")
    assert 0 < row["mismatch"] < 0.03 and row["mismatch_max"] < 0.5


def assert_same_update(run: Path, alone: Path, model: Path) -> None:
    start, one, many = runs.weights(model), runs.weights(alone), runs.weights(run)
    for name in start:
        # It did learn something, and the same.
        assert (one[name] - start[name]).norm() > 1e-3 * start[name].norm()
        assert (many[name] - one[name]).norm() <= 1e-6 * one[name].norm(), name
    for row, other in zip(runs.metrics(alone), runs.metrics(run), strict=True):
        assert max(row.pop("mismatch_max"), other.pop("mismatch_max")) < 2e-5
        assert other == pytest.approx(row, rel=1e-4, abs=2e-6)


# --- one process ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ranks, size, mlp_dim, said",
    [
        (2, 3, 48, "the number of ranks, 3"),
        (8, 8, 48, "the model's number of key/value heads, 4"),
        (4, 8, 42, "the width of the model's MLP, 42"),
    ],
)
def test_models_that_cannot_be_cut_are_one_line(ranks, size, mlp_dim, said):
    """Bug: heads or rows that do not come out even are cut all the same, or end in a traceback."""
    shape = ModelConfig(**SHAPE | {"mlp_dim": mlp_dim})
    with pytest.raises(UserError, match=f"^--sampler-ranks {ranks} must divide {said}$"):
        tensor_parallel.check(shape, ranks, size)
    tensor_parallel.check(ModelConfig(**SHAPE), 4, 8)


@pytest.mark.parametrize(
    "given, said", [(2, "2 must divide the number of ranks, 1"), (0, "must be at least 1")]
)
def test_a_team_of_more_ranks_than_there_are_is_one_line(model, tmp_path, given, said):
    """Bug: --sampler-ranks on one process is ignored, or ends in a traceback behind a run folder
    that the next try refuses."""
    with pytest.raises(UserError, match=f"--sampler-ranks {said}"):
        rl.main(runs.flags(model, tmp_path / "run", sampler_ranks=given))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_copy_is_given_back_while_training(model, tmp_path, monkeypatch, dtype):
    """Bug: the copy's memory stays, or comes back with other weights. In fp32 one process samples
    from the policy itself: giving that back would lose it."""
    sizes = []

    def watched(learner, responses, step):
        parameters = learner.sampler.model.parameters()
        sizes.append(sum(parameter.untyped_storage().size() for parameter in parameters))
        return rl.train_step(learner, responses, step)

    more = {"dtype": dtype, "steps": 2}
    rl.main(runs.flags(model, tmp_path / "kept", **more), train_step=watched)
    monkeypatch.setattr(rl, "is_large", lambda copy: True)
    rl.main(runs.flags(model, tmp_path / "given back", **more), train_step=watched)
    assert min(sizes[:2]) > 0 and set(sizes[2:]) == ({0} if dtype == "bfloat16" else {sizes[0]})
    assert runs.metrics(tmp_path / "kept") == runs.metrics(tmp_path / "given back")
    kept, given = runs.weights(tmp_path / "kept"), runs.weights(tmp_path / "given back")
    assert all(torch.equal(kept[name], given[name]) for name in kept)


@torch.no_grad()
def test_weights_that_were_kept_stay_where_they_are():
    """Bug: every copy of the weights moves them, and graphs that were captured read freed memory."""
    scorer = parallel.shard(random_model(FAMILIES["qwen3"], torch.float32), ALONE)
    copy = Transformer(FAMILIES["qwen3"])
    places = [parameter.data_ptr() for parameter in copy.parameters()]
    parallel.copy_weights(scorer, copy)
    assert places == [parameter.data_ptr() for parameter in copy.parameters()]
    parallel.free_weights(copy)
    parallel.copy_weights(scorer, copy)
    for name, parameter in copy.named_parameters():
        assert torch.equal(parameter, scorer.model.get_parameter(name)), name


@pytest.mark.parametrize(
    "device, gb, large", [("cuda", 19, False), ("cuda", 21, True), ("cpu", 79, False)]
)
def test_a_copy_is_large_from_a_quarter_of_the_gpu_on(monkeypatch, device, gb, large):
    """Bug: a small copy is given back at every step, and its graphs with it; or a large one stays
    until training has no room."""
    card = SimpleNamespace(total_memory=80 * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    halves = [torch.empty(gb * 10**9 // 4, dtype=torch.bfloat16, device="meta") for _ in range(2)]
    weight = SimpleNamespace(device=torch.device(device))
    copy = SimpleNamespace(head_weight=weight, parameters=lambda: halves)
    assert rl.is_large(copy) == large


# --- the program that torchrun starts -------------------------------------------------------------


def slices_of(family: str, dtype: str, world: World, team: int) -> SlicedTransformer:
    """This rank's, copied from shards."""
    config = FAMILIES[family]
    scorer = parallel.shard(random_model(config, DTYPES[dtype]), world)
    slices = SlicedTransformer(config, team, DTYPES[dtype], world.device)
    parallel.copy_weights(scorer, slices)
    return slices


def draws_of_teams(world: World, team: int) -> dict:
    found = {}
    for family in FAMILIES:
        for dtype in DTYPES:
            slices = slices_of(family, dtype, world, team)
            found[f"{family} {dtype} {team}"] = drawn(slices, world, team)
    slices = slices_of("qwen2", "fp32", world, team)
    matrices = [p.numel() for p in slices.blocks.parameters() if p.ndim == 2]
    found[f"sizes {team}"] = (sum(matrices), slices.config.kv_heads)
    with pytest.MonkeyPatch.context() as patch:
        # From one sequence at once on the first rank to all five on the last.
        patch.setattr(sample, "free_memory", lambda device: 100_000 * (1 + world.rank))
        found[f"uneven memory {team}"] = drawn(slices, world, team)
    found[f"shared out {team}"] = parallel.share_out(
        lambda mine: [(item, world.rank) for item in mine], ITEMS, ITEMS, world, team
    )
    return found


def worker(model: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    found = {}
    with parallel.session("cpu") as world:
        for team in TEAMS[world.size]:
            found |= draws_of_teams(world, team)
            rl.train(runs.flags(model, folder / f"team-{team}", steps=3, sampler_ranks=team), world)
        rl.train(
            runs.flags(model, folder / "bf16", steps=1, dtype="bfloat16", sampler_ranks=2), world
        )
        rl.is_large = lambda copy: True  # given back and filled again
        later = 4 if world.size == 4 else 1
        resumed = folder / "resumed"
        rl.train(runs.flags(model, resumed, steps=2, sampler_ranks=2), world)
        rl.train(runs.flags(model, resumed, steps=3, sampler_ranks=later, resume=True), world)
        if world.main:
            torch.save(found, folder / "found.pt")


if __name__ == "__main__":
    worker(Path(sys.argv[1]), Path(sys.argv[2]))
