"""Loading shard by shard, and --offload: what a rank holds is little, and no number changes.

The file is also the program that the tests start under torchrun (`worker` and `measure`, at the
end).
"""

import ctypes
import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # for the worker; pytest has them already

import test_parallel as hand  # noqa: E402
import test_rl_runs as runs  # noqa: E402

import cli  # noqa: E402
import parallel  # noqa: E402
import pretrained  # noqa: E402
import rl  # noqa: E402
import rlsp  # noqa: E402
import runfolder  # noqa: E402
import sft  # noqa: E402
from cli import UserError  # noqa: E402
from model import (  # noqa: E402
    ModelConfig,
    Transformer,
    load_pretrained,
    random_init,
    save_pretrained,
    without_weights,
)
from parallel import World  # noqa: E402

ALONE = World(0, 1, torch.device("cpu"))

# Odd sizes: cuts go through heads and through the seams of `qkv`; on four ranks the last has no row
# of the norms of six.
SMALL = ModelConfig(51, dim=25, layers=2, heads=3, kv_heads=1, head_dim=6, mlp_dim=37)
FAMILIES = {
    "llama": dataclasses.replace(SMALL, tied=True, qkv_bias=True, out_bias=True, mlp_bias=True),
    "qwen2": dataclasses.replace(SMALL, family="qwen2", qkv_bias=True),
    "qwen3": dataclasses.replace(SMALL, family="qwen3", qk_norm=True, tied=True),
    "glm4": dataclasses.replace(SMALL, family="glm4", post_norms=True, rope_dim=2),
}


def save_random(config: ModelConfig, folder: Path) -> None:
    """A model whose every parameter is random, biases and norms too."""
    model = random_init(config, 0)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    save_pretrained(model, folder)


def load_sharded(folder: Path, world: World, **how) -> torch.nn.Module:
    scorer = parallel.shard(without_weights(folder), world, **how)
    parallel.load_weights(scorer, folder)
    return scorer


# --- one process ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_any_rows_can_be_read_alone(tmp_path, family):
    """Bug: a cut through a head whose pairs are apart on disk, or through a seam of `qkv`, brings
    rows of its neighbours.
    """
    config = FAMILIES[family]
    save_random(config, tmp_path / "model")
    whole = load_pretrained(tmp_path / "model")
    for name, wanted in whole.named_parameters():
        cuts = [0, 1, len(wanted) // 3, len(wanted) // 2 + 1, len(wanted)]
        for first, end in itertools.combinations_with_replacement(cuts, 2):
            part = torch.full_like(wanted[first:end], 9.0)
            pretrained.fill(tmp_path / "model", config, {name: (part, first)})
            assert torch.equal(part, wanted[first:end]), (name, first, end)


def test_shards_of_a_broken_model_are_refused(tmp_path):
    """Bug: rows are copied from a tensor of another shape, or a NaN is read over."""
    save_random(SMALL, tmp_path / "model")
    wider = dataclasses.replace(SMALL, mlp_dim=38)
    for name, message in (("down", r"\[25, 37\], .* \[25, 38\]"), ("gate_up", r"\[38, 25\]")):
        part = torch.zeros(3, 38 if name == "down" else 25)
        with pytest.raises(UserError, match=message):
            pretrained.fill(tmp_path / "model", wider, {f"blocks.1.{name}.weight": (part, 2)})
    broken = load_pretrained(tmp_path / "model")
    broken.norm.weight.data[20] = float("nan")
    save_pretrained(broken, tmp_path / "model")
    pretrained.fill(tmp_path / "model", SMALL, {"norm.weight": (torch.zeros(7), 0)})
    with pytest.raises(UserError, match=r"model\.norm\.weight holds NaN"):
        pretrained.fill(tmp_path / "model", SMALL, {"norm.weight": (torch.zeros(7), 18)})


def test_a_process_alone_reads_what_it_wraps(tmp_path):
    """Bug: reading the transformer's weights wipes the critic's head, which is in no file."""
    save_random(SMALL, tmp_path / "model")
    critic = load_sharded(tmp_path / "model", ALONE, wrap=rlsp.Critic)
    assert not critic.value.weight.any() and not critic.value.bias.any()
    wanted = dict(load_pretrained(tmp_path / "model").named_parameters())
    found = dict(critic.model.named_parameters())
    assert found.keys() == wanted.keys() - {"head.weight"}
    assert all(torch.equal(found[name], wanted[name]) for name in found)


def test_segments_grow_unless_told_otherwise(monkeypatch):
    """Bug: the allocator is set up after CUDA has begun, which changes nothing; or what the user
    has set is overwritten.
    """
    seen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    note = lambda number: seen.append((number, os.environ.get("PYTORCH_ALLOC_CONF")))  # noqa: E731
    monkeypatch.setattr(torch.cuda, "set_device", note)
    monkeypatch.setattr(os, "environ", {})
    assert parallel.start("cuda:1") == World(0, 1, torch.device("cuda:1"))
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setattr(os, "environ", {name: "garbage_collection_threshold:0.8"})
        parallel.start("cuda")
    assert seen == [
        (1, "expandable_segments:True"),
        (0, "garbage_collection_threshold:0.8"),
        (0, None),
    ]


# --- many ranks -----------------------------------------------------------------------------------


def torchrun(size: int, *arguments: str | Path) -> None:
    """This file on `size` ranks."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={size}", __file__]
    done = subprocess.run(
        [sys.executable, *command, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=290,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder of models, one of each family, and "babbler", which RL can begin with."""
    folder = tmp_path_factory.mktemp("models")
    for family, config in FAMILIES.items():
        save_random(config, folder / family)
    runs.save_babbler(folder / "babbler")
    return folder


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request, models, tmp_path_factory) -> dict:
    """What `worker` left behind on 2 and on 4 ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    torchrun(request.param, "worker", models, folder)
    return torch.load(folder / "found.pt") | {"folder": folder, "size": request.param}


HOW = {
    "fp32": {},
    "bf16": {"dtype": torch.bfloat16},
    "offloaded": {"dtype": torch.bfloat16, "offload": True},
    "critic": {"wrap": rlsp.Critic},
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("family", FAMILIES)
def test_shards_are_the_whole_model_bit_for_bit(ranks, models, family, how):
    """Bug: a rank reads its neighbour's rows, or the padding that FSDP adds before the first
    forward takes the place of weights."""
    wanted = dict(load_pretrained(models / family).named_parameters())
    for when in ("loaded", "after a forward"):
        found = dict(ranks[f"{family} {how} {when}"])
        if how == "critic":
            assert not found.pop("value.weight").any() and not found.pop("value.bias").any()
            wanted.pop("head.weight", None)
        assert found.keys() == {f"model.{name}" for name in wanted}
        for name, tensor in wanted.items():
            assert torch.equal(found[f"model.{name}"], tensor), (name, when)


VARIANTS = {
    f"{recompute}, {offload}": {"checkpoint_activations": recompute, "offload": offload}
    for recompute in (False, True)
    for offload in (False, True)
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_with_all_that_saves_memory(ranks, dtype, variant):
    """Bug: a gradient that is summed twice where blocks are computed again, left on the way to the
    host, or rounded to bf16 before it is summed over ranks. Against one process in fp32: bf16 keeps
    8 bits of each factor, and recomputing and offloading change no bit."""
    _, wanted = hand.loss_and_gradients(
        hand.make_scorer(ALONE, torch.float32), hand.examples(), 10**6, ALONE
    )
    found = ranks[f"gradients {dtype} {variant}"]
    hand.assert_close(found, wanted, 2e-6 if dtype == torch.float32 else 3e-2)
    plain = ranks[f"gradients {dtype} False, False"]
    assert all(torch.equal(found[name], plain[name]) for name in plain)


@pytest.mark.parametrize("run", ["t1", "rlsp", "sft"])
def test_offloading_changes_no_number_of_a_run(ranks, run):
    """Bug: with --offload the sampler keeps old weights, the anchor stands still, clipping or AdamW
    sees other numbers; or a run cannot be resumed with it."""
    if ranks["size"] == 4:
        pytest.skip("the worker does it on two ranks")
    plain, offloaded = ranks["folder"] / run, ranks["folder"] / f"{run} offloaded"
    one, other = runs.weights(plain), runs.weights(offloaded)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert numbers(plain) == numbers(offloaded) and len(numbers(plain)) == 2


def numbers(run: Path) -> list[dict]:
    """metrics.jsonl without what depends on the clock."""
    rows = runfolder.read_metrics(run / "metrics.jsonl")
    timed = ("seconds", "tokens_per_second")
    return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in rows]


def test_offloading_changes_no_number_of_a_process_alone(models, tmp_path):
    """Bug: a process alone, offloaded, samples from weights that are never brought to it. (In a
    process of its own: FSDP needs a process group, which no other test should find.)"""
    command = [sys.executable, __file__, "alone", str(models), str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-4000:]
    one, other = runs.weights(tmp_path / "t1"), runs.weights(tmp_path / "t1 offloaded")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert numbers(tmp_path / "t1") == numbers(tmp_path / "t1 offloaded")


def test_weights_are_rounded_before_they_are_gathered(ranks):
    """Bug: the sampler's bf16 copy is gathered in fp32, twice the bytes over the network."""
    assert ranks["gathered"] == {torch.bfloat16}


MB = 2**20
DEEP = ModelConfig(1000, dim=512, layers=16, heads=8, kv_heads=2, head_dim=64, mlp_dim=1408)
SLACK = 16 * MB  # page tables, allocators, and the mapping of the tensor that is being read


@pytest.fixture(scope="module")
def deep(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("deep") / "model"
    save_pretrained(random_init(DEEP, 0), folder)
    return folder


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is Linux's")
@pytest.mark.parametrize("size", [2, 4])
def test_a_rank_needs_memory_for_its_shards_only(deep, tmp_path, size):
    """Bug: every rank has the whole model in the host's memory, if only while it loads: 245 GB for
    7B on 8 ranks. The rank's peak may grow by its shards and the largest tensor."""
    torchrun(size, "measure", deep, tmp_path)
    model = Transformer(DEEP, device="meta")
    total = sum(parameter.nbytes for parameter in model.parameters())
    largest = max(parameter.nbytes for parameter in model.parameters())
    found = json.loads((tmp_path / "grown.json").read_text())
    for grown in found["sharded"]:
        assert total / size <= grown <= total / size + largest + SLACK
    assert found["whole"] >= total  # or the counter does not count


# --- the programs that torchrun starts ------------------------------------------------------------


def worker(models: Path, folder: Path, world: World) -> None:
    found = {}
    for family, (how, options) in itertools.product(FAMILIES, HOW.items()):
        scorer = load_sharded(models / family, world, **options)
        found[f"{family} {how} loaded"] = hand.whole(dict(scorer.named_parameters()))
        packed = hand.pack(hand.examples(3))
        more = [] if how == "critic" else [1.0]
        with torch.no_grad():
            parallel.forward(scorer, packed, *more)
        found[f"{family} {how} after a forward"] = hand.whole(dict(scorer.named_parameters()))
    for dtype, (variant, options) in itertools.product(
        (torch.float32, torch.bfloat16), VARIANTS.items()
    ):
        scorer = parallel.shard(random_init(hand.SHAPE, 0), world, dtype, **options)
        _, gradients = hand.loss_and_gradients(scorer, hand.examples(), 40, world)
        found[f"gradients {dtype} {variant}"] = hand.whole(gradients)
    found["gathered"] = gathered_dtypes(world)
    if world.size == 2:
        train_with_and_without(models, folder, world)
    if world.main:
        torch.save(found, folder / "found.pt")


def gathered_dtypes(world: World) -> set[torch.dtype]:
    """Of what `copy_weights` gathers for a sampler in bf16."""
    seen = set()

    def watched(tensor: torch.Tensor) -> torch.Tensor:
        seen.add(tensor.dtype)
        return gather(tensor)

    gather = parallel.whole
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "whole", watched)
        parallel.copy_weights(
            hand.make_scorer(world, torch.float32), Transformer(hand.SHAPE, torch.bfloat16)
        )
    return seen


def train_with_and_without(models: Path, folder: Path, world: World) -> None:
    """Two steps of each kind of run, without --offload; and again, with it in the second step."""
    model = models / "babbler"
    rows = [{"problem": f"{n}+1", "response": f"{n}+1={n + 1}"} for n in range(20)]
    data = folder / "data.jsonl"
    if world.main:
        cli.write_jsonl(data, rows)
    parallel.barrier()

    def train(out: Path, steps: int, **more) -> None:
        few = {"steps": steps, "checkpoint_every": 1} | more
        name = out.name.split()[0]
        if name == "t1":
            rl.train(runs.flags(model, out, **few), world)
        elif name == "rlsp":
            rl.train(runs.rlsp_flags(model, out, **few), world, rlsp.make_learner, rlsp.train_step)
        else:  # Muon gathers matrices and scatters updates
            config = sft.Config(
                out=str(out), data=str(data), model=str(model), optimizer="muon", lr=1e-3,
                batch_tokens=400, heldout=4, eval_every=1, device="cpu", **few,
            )  # fmt: skip
            sft.train(sft.with_defaults(config), world)

    for name in ("t1", "rlsp", "sft") if world.size > 1 else ("t1",):
        train(folder / name, 2)
        train(folder / f"{name} offloaded", 1)
        train(folder / f"{name} offloaded", 2, resume=True, offload=True)


def resident(name: str) -> int:
    """VmRSS, this process's resident memory, or VmHWM, the most that it was; in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(name)


def measure(model: Path, folder: Path, world: World) -> None:
    """By how much the peak of resident memory grows while the model is loaded."""
    tiny = parallel.shard(random_init(hand.SHAPE, 0), world)  # whatever FSDP needs for itself
    hand.loss_and_gradients(tiny, hand.examples(3), 60, world)

    def grown(load) -> int:
        # What was freed goes back to the system: a load that used it again would seem to need less.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak is the present again
        before = resident("VmRSS")
        held = load()
        after = resident("VmHWM")
        del held
        return after - before

    sharded = parallel.gather_objects(grown(lambda: load_sharded(model, world)))
    if world.main:
        whole = grown(lambda: load_pretrained(model))
        text = json.dumps({"sharded": sharded, "whole": whole})
        (folder / "grown.json").write_text(text)


if __name__ == "__main__":
    torch.set_num_threads(1)
    program, first, second = sys.argv[1:]
    programs = {"worker": worker, "measure": measure, "alone": train_with_and_without}
    with parallel.session("cpu") as this_world:
        programs[program](Path(first), Path(second), this_world)
