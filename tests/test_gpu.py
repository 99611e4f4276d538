"""Training, sampling and whole runs on a CUDA device, against the same on a CPU.

All of it skips where there is no GPU; `make gpu` runs it on one. The kernels, the decode step and
attention without a mask have GPU tests of their own (test_kernels.py, test_sample.py,
test_readme.py for the README's commands).

Tolerances. In float32 a GPU adds up in another order: gradients agree to 1e-5 or so, and a draw
changes only where two tokens are within 1e-6 of a tie. In bfloat16 a number is rounded to 8 bits:
an error of up to 0.4 % at every operation. How that adds up is hard to say in advance, but a CPU
rounds at the same places: a GPU must not be twice as far from float64 as the CPU is in bfloat16.
"""

import dataclasses
import json
import random
from pathlib import Path

import pytest
import test_rl_runs as runs
import torch

import parallel
import rl
import sft
from model import ModelConfig, Transformer, load_pretrained, random_init
from packing import Example
from parallel import Scorer, World
from sample import Sampler, SamplingParams

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

ON_CPU = World(0, 1, torch.device("cpu"))
ON_GPU = World(0, 1, torch.device(DEVICE))
QWEN2 = ModelConfig(
    vocab_size=500,
    dim=96,
    layers=3,
    heads=6,
    kv_heads=2,
    head_dim=16,
    mlp_dim=160,
    family="qwen2",
    qkv_bias=True,
    context=1024,
)
SHAPES = {
    "qwen2": QWEN2,
    "qwen3": dataclasses.replace(QWEN2, family="qwen3", qkv_bias=False, qk_norm=True, tied=True),
}


def examples_of(seed: int = 0) -> list[Example]:
    """Four responses to each of five prompts, and four sequences alone; up to 400 tokens each."""
    rng = random.Random(seed)
    examples = []
    for samples in (4, 4, 4, 4, 4, 1, 1, 1, 1):
        prompt = [rng.randrange(500) for _ in range(rng.randint(1, 90))]
        for _ in range(samples):
            response = [rng.randrange(500) for _ in range(rng.randint(1, 310))]
            end = len(prompt) + len(response)
            examples.append(Example(prompt + response, [(len(prompt), end)]))
    return examples


def scored(
    shape: ModelConfig,
    world: World,
    dtype: torch.dtype,
    recompute: bool = False,
    offload: bool = False,
) -> dict[str, torch.Tensor]:
    """Log-prob, entropy and every gradient, in float64 on the CPU. dtype: of the products."""
    model = random_init(shape, 0)
    if dtype == torch.float64:
        model = model.double()
    scorer: Scorer = parallel.shard(model, world, dtype, recompute, offload)
    examples = examples_of()
    count = sum(example.targets for example in examples)
    weights = torch.randn(count, generator=torch.Generator().manual_seed(0)).to(world.device)
    found = {name: torch.zeros(count, dtype=torch.float64) for name in ("logprob", "entropy")}
    dim = parallel.row_dim(scorer.model)
    for places, packed in parallel.micro_batches(examples, 2048, dim, world):
        logprob, entropy = parallel.log_probs(scorer, packed, 1.2)
        chosen = weights[places.to(world.device)]
        ((chosen * logprob).sum() + 0.1 * entropy.sum()).backward()
        found["logprob"][places] = logprob.detach().double().cpu()
        found["entropy"][places] = entropy.detach().double().cpu()
    for name, parameter in scorer.model.named_parameters():
        found[name] = parallel.whole(parameter.grad).double().cpu()
    return found


def errors(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> dict[str, float]:
    """Each tensor's distance from what is wanted, as a share of its length."""
    assert found.keys() == wanted.keys()
    return {
        name: ((found[name] - wanted[name]).norm() / wanted[name].norm()).item() for name in wanted
    }


# --- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("recompute", [False, True])
def test_training_in_bfloat16_is_as_near_as_bfloat16_can_be(name, recompute):
    """Bug: what only bfloat16 on CUDA runs (attention without a mask over packed rows with shared
    stems, the head's Triton kernels, autocast) computes something else: a response that does
    not see its stem, or sees its neighbour; a gradient that is lost or added up in bfloat16."""
    shape = SHAPES[name]
    truth = scored(shape, ON_CPU, torch.float64)
    rounding = errors(scored(shape, ON_CPU, torch.bfloat16), truth)
    for part, error in errors(scored(shape, ON_GPU, torch.bfloat16, recompute), truth).items():
        assert error < 2 * rounding[part] + 1e-3, (part, error, rounding[part])
        assert error < 0.1, part


def test_fsdp_and_sums_on_the_cpu():
    """Bug: FSDP's casts, which one process has only with --offload; or a process group for NCCL
    alone, in which a number that lies on the CPU cannot be summed."""
    truth = scored(QWEN2, ON_CPU, torch.float64)
    rounding = errors(scored(QWEN2, ON_CPU, torch.bfloat16), truth)
    for part, error in errors(scored(QWEN2, ON_GPU, torch.bfloat16, offload=True), truth).items():
        assert error < 2 * rounding[part] + 1e-3, (part, error, rounding[part])
    assert torch.distributed.is_initialized() and parallel.sum_over_ranks(1.5) == 1.5


@pytest.mark.parametrize("name", SHAPES)
def test_training_in_float32_is_that_of_the_cpu(name):
    """Bug: TF32 products, whose 10 bits nobody has asked for; or a mask that a GPU's attention
    reads otherwise."""
    shape = SHAPES[name]
    truth = scored(shape, ON_CPU, torch.float64)
    for part, error in errors(scored(shape, ON_GPU, torch.float32), truth).items():
        assert error < 2e-5, (part, error)


# --- sampling -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
def test_sampler_in_bfloat16_reports_the_policys_own_log_probs(name):
    """Bug: a decode step on CUDA that reads the keys of another row or of the row's last owner, or
    stops short of the last ones: fluent text, and log-probs that are not the policy's. Prompts
    from 1 to 300 tokens in few slots, so that rows end, move and are filled again; twice, so that
    graphs are replayed, the second time with other weights in the same tensors."""
    shape = SHAPES[name]
    rng = random.Random(1)
    prompts = [[rng.randrange(500) for _ in range(n)] for n in (1, 3, 17, 64, 250, 256, 257, 300)]
    model = Transformer(shape, torch.bfloat16, DEVICE)
    sampler = Sampler(model, eos_ids=list(range(0, 500, 60)), max_batch=9)
    for seed in (0, 1):
        model.load_state_dict(random_init(shape, seed, torch.bfloat16).state_dict())
        rows = sampler.generate(prompts, 4, SamplingParams(90, temperature=1.2, seed=seed))
        truth = random_init(shape, seed, torch.bfloat16).double()  # the same weights
        gaps = []
        for prompt, row in zip(prompts, rows, strict=True):
            for completion in row:
                tokens = torch.tensor([prompt + completion.tokens])
                logits = truth.logits(truth(tokens))[0, len(prompt) - 1 : -1] / 1.2
                drawn = torch.tensor(completion.tokens)
                logprob = logits.log_softmax(-1).gather(1, drawn[:, None])[:, 0]
                gaps.append((logprob - torch.tensor(completion.logprobs)).abs().detach())
        gap = torch.cat(gaps)
        assert len(gap) > 500
        # Logits of about 1, rounded to 8 bits in every block: some hundredths, and no outliers.
        assert gap.mean() < 0.02 and gap.max() < 0.2, (gap.mean(), gap.max())


# --- runs -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "babbler"
    runs.save_babbler(folder)
    return folder


def assert_near(one: Path, other: Path, tolerance: float) -> None:
    """The weights that two runs end with. A lost moment or a skipped step is 1e-3 or more."""
    ends = runs.weights(one), runs.weights(other)
    for name, weight in ends[0].items():
        assert (weight - ends[1][name]).norm() <= tolerance * weight.norm(), name


@pytest.mark.parametrize("recipe", ["t1", "grpo", "dapo"])
def test_rl_in_float32_is_that_of_the_cpu(model, tmp_path, recipe):
    """Bug: anything on the way from the draw to the update that a GPU does otherwise: another
    token, a loss from tensors that lie on two devices, an anchor that does not move."""
    flags = {"recipe": recipe, "steps": 2, "dtype": "float32"}
    for device in ("cpu", DEVICE):
        rl.main(runs.flags(model, tmp_path / f"on-{device}", device=device, **flags))
    on_cpu, on_gpu = (runs.metrics(tmp_path / f"on-{device}") for device in ("cpu", DEVICE))
    for row, other in zip(on_cpu, on_gpu, strict=True):
        assert max(row.pop("mismatch_max", 0), other.pop("mismatch_max", 0)) < 1e-4
        row.pop("mismatch", 0), other.pop("mismatch", 0)
        assert other == pytest.approx(row, rel=1e-3, abs=1e-5)
    assert_near(tmp_path / "on-cpu", tmp_path / f"on-{DEVICE}", 1e-4)


def test_rl_by_default_computes_in_bfloat16(model, tmp_path):
    """Bug: the default on a GPU is float32, ten times slower; or in bfloat16 the sampler's copy
    does not follow the policy, and its log-probs drift away."""
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("a card without bfloat16")
    out = tmp_path / "run"
    rl.main(runs.flags(model, out, device=DEVICE, steps=4))
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    check_mismatch(out)


def check_mismatch(run: Path) -> None:
    """The sampler's log-probs against the trainer's: bfloat16's rounding, and no more."""
    taught = [row for row in runs.metrics(run) if "mismatch" in row]
    assert taught
    for row in taught:
        assert 1e-6 < row["mismatch"] < 0.02 and row["mismatch_max"] < 0.5


@pytest.mark.parametrize("dtype", ["float32", "auto"])
def test_resume_on_a_gpu(model, tmp_path, dtype):
    """Bug: a checkpoint on CUDA forgets what a CPU's remembers (generators, moments, the anchor),
    or is loaded to the wrong device; a graph that was captured before goes on with old weights."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    rl.main(runs.flags(model, whole, device=DEVICE, dtype=dtype, steps=4))
    rl.main(runs.flags(model, cut, device=DEVICE, dtype=dtype, steps=2))
    rl.main(runs.flags(model, cut, device=DEVICE, dtype=dtype, steps=4, resume=True))
    assert [row["step"] for row in runs.metrics(cut)] == [1, 2, 3, 4]
    if dtype == "float32":  # in bfloat16 draws may change with the rounding
        assert_near(whole, cut, 1e-4)
    else:
        check_mismatch(cut)


def test_a_run_moves_between_devices(model, tmp_path):
    """Bug: a checkpoint that only the device it was written on can read."""
    out = tmp_path / "run"
    for steps, device in ((1, DEVICE), (2, "cpu"), (3, DEVICE)):
        flags = runs.flags(model, out, device=device, steps=steps, resume=steps > 1)
        rl.main(dataclasses.replace(flags, checkpoint_every=1))
    assert [row["step"] for row in runs.metrics(out)] == [1, 2, 3]
    assert all(weight.isfinite().all() for weight in load_pretrained(out).parameters())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_sft_in_float32_is_that_of_the_cpu(tmp_path, optimizer):
    """Bug: SFT's loss or an optimizer computes something else on CUDA."""
    losses = {}
    for device in ("cpu", DEVICE):
        out = tmp_path / device
        config = sft.Config(
            str(out), task="countdown", chains=200, steps=4, optimizer=optimizer,
            random_positions=0.5, device=device, dtype="float32",
        )  # fmt: skip
        sft.main(config)
        losses[device] = [row["loss"] for row in runs.metrics(out)]
    assert losses[DEVICE] == pytest.approx(losses["cpu"], rel=2e-3)
    assert losses["cpu"][-1] < losses["cpu"][0]
