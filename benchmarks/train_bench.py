"""Training on one GPU: tokens per second, share of the card's peak and memory; and the parts of one step of RL.

    python benchmarks/train_bench.py                  # CUDA, bf16: random weights in the shapes of real models
    python benchmarks/train_bench.py --only step
    python benchmarks/train_bench.py --smoke          # anywhere: the same rows end to end, at toy size

A training step is `parallel.Scorer` as rl.py uses it (log-probs and entropies of packed sequences, bf16 products, fp32
masters), gradients of all micro-batches, clipping and AdamW. Operations are counted by plan.py's
`training_operations`; the peak is the one that the card's maker names. Where all layers do not fit beside AdamW's
moments (16 bytes a parameter), as many as plan.py finds room for are trained: every layer does the same work, so the
share of the peak is nearly that of all.

A step of RL is rl.py's own, at T1's 32 prompts x 64: random weights, one token in 128 a stop token, and a coin as the
reward, so that every group teaches. Parts in seconds, from rl.py's metrics, after steps that were not counted.
"""

import dataclasses
import sys
import tempfile
import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import cli
import cot
import parallel
import rl
import rollout
from benchmarks import plan
from benchmarks.fill_results import written
from benchmarks.rows import GB, SHAPES, SMOLLM2, TOY, RowFile, random_model, skipping
from devices import pick_device, pick_dtype
from model import ModelConfig, random_init, save_pretrained
from packing import Example
from parallel import Scorer, World
from rollout import Response
from tokenizer import demo_tokenizer


@dataclass
class Config:
    only: list[Literal["training", "step"]] = field(default_factory=lambda: ["training", "step"])
    """The rows to measure."""
    smoke: bool = False
    """Toy sizes, to see that every row runs."""
    json: str = ""
    """File to append a line of JSON to for each row. Default: benchmarks/gpu.jsonl on a GPU, none elsewhere."""


# ---------------------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class Setting:
    """What one row trains: a shape, with as many layers as fit, on sequences of `length` tokens."""

    shape: ModelConfig
    length: int
    recompute: bool
    planned: int  # bytes, of plan.py


def choose(shape: ModelConfig, length: int, memory: float) -> Setting | None:
    """The first that fits into `memory` bytes: as it is, with --recompute, and then with fewer and fewer layers."""
    for layers in range(shape.layers, 0, -1):
        cut = dataclasses.replace(shape, layers=layers)
        for recompute in (False, True):
            asked = plan.Config("", gpus=1, max_tokens=length, sft=True, recompute=recompute)
            planned = plan.plan(cut, asked)["peak"]
            if planned <= plan.USABLE * memory:
                return Setting(cut, length, recompute, planned)
    return None


def examples_of(length: int, tokens: int, vocabulary: int) -> list[Example]:
    """`tokens` tokens of sequences; all but the first eighth of each is trained on."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(vocabulary, (tokens // length, length), generator=generator)
    return [Example(row, [(length // 8, length)]) for row in drawn.tolist()]


def make_scorer(setting: Setting, world: World, dtype: torch.dtype) -> Scorer:
    """The model that is trained: fp32 masters, products in `dtype`."""
    model = random_model(setting.shape, torch.float32, world.device)
    return parallel.shard(model, world, dtype, setting.recompute)


def training_step(
    scorer: Scorer, optimizer: torch.optim.Optimizer, examples: list[Example], world: World
) -> None:
    """One update. The gradient of log-prob and entropy both, as T1's loss has it."""
    count = sum(example.targets for example in examples)
    dim = parallel.row_dim(scorer.model)
    for _, packed in parallel.micro_batches(examples, None, dim, world):
        logprob, entropy = parallel.log_probs(scorer, packed, 1.2)
        (-(logprob.sum() + 1e-3 * entropy.sum()) / count).backward()
    parallel.clip_grad_norm(scorer, 1.0)  # its norm is a number: this waits for the device
    optimizer.step()
    optimizer.zero_grad()


def training_row(name: str, setting: Setting, world: World, config: Config, file: RowFile) -> None:
    """Time a few updates of 32,768 tokens, and print a row of the table."""
    dtype = getattr(torch, pick_dtype("auto", world.device))
    on_gpu = world.device.type == "cuda"
    scorer = make_scorer(setting, world, dtype)
    optimizer = parallel.adamw(scorer.parameters(), 1e-6)
    tokens = 256 if config.smoke else 32_768
    examples = examples_of(setting.length, tokens, setting.shape.vocab_size)
    training_step(scorer, optimizer, examples, world)  # compiles, and makes AdamW's moments
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    repeats = 1 if config.smoke else 3
    began = time.perf_counter()
    for _ in range(repeats):
        training_step(scorer, optimizer, examples, world)
    if on_gpu:
        torch.cuda.synchronize()
    speed = repeats * tokens / (time.perf_counter() - began)
    operations = plan.training_operations(setting.shape, setting.length, setting.recompute)
    peak = peak_operations(torch.cuda.get_device_name()) if on_gpu else None
    numbers = {
        "layers": setting.shape.layers,
        "recompute": "yes" if setting.recompute else "no",
        "tokens/s": speed,
        "TFLOP/s": speed * operations / 1e12,
        "planned GB": setting.planned / GB,
    }
    if peak:
        numbers["share of peak"] = speed * operations / peak
    if on_gpu:
        numbers["peak GB"] = torch.cuda.max_memory_allocated() / GB
    print_row(name, numbers, TRAINING_COLUMNS)
    file.add("training", name, **numbers)


TRAINING_COLUMNS = (
    "layers",
    "recompute",
    "tokens/s",
    "TFLOP/s",
    "share of peak",
    "peak GB",
    "planned GB",
)
STEP_COLUMNS = ("sampling s", "verifying s", "training s", "tokens/s")


def print_header(title: str, columns: tuple[str, ...]) -> None:
    print(f"\n| {title} | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 1))


def print_row(name: str, numbers: dict[str, float | str], columns: tuple[str, ...]) -> None:
    texts = [written(numbers.get(column, "")) for column in columns]
    print(f"| {name} | " + " | ".join(texts) + " |", flush=True)


def peak_operations(card: str) -> float | None:
    """bf16 operations a second that the maker names for this card; None where we do not know them."""
    if "PCIe" in card or "NVL" in card:  # slower than the namesakes that plan.py knows
        return None
    known = [operations for name, operations, _ in plan.CARDS.values() if name in card]
    return known[0] if known else None


def training_rows(config: Config, world: World, file: RowFile) -> None:
    """Every shape at every length, those that fit."""
    shapes = {"toy": TOY} if config.smoke else SHAPES
    lengths = (64, 128) if config.smoke else (2048, 8192)
    memory = torch.cuda.mem_get_info()[1] if world.device.type == "cuda" else 8 * GB
    print_header("training", TRAINING_COLUMNS)
    for name, shape in shapes.items():
        for length in lengths:
            row = f"{name}, {length:,} tokens"
            setting = choose(shape, length, memory)
            if setting is None:
                print(f"{row}: skipped: not one layer fits into {memory / GB:.0f} GB")
                continue
            with skipping(row):
                training_row(row, setting, world, config, file)


# ---------------------------------------------------------------------------------------------------- one step of RL


def coin(responses: list[Response], config: rl.Config) -> torch.Tensor:
    """One bit of a checksum of each response: mixed in every group, whatever the policy."""
    bits = [zlib.crc32(response.text.encode()) & 1 for response in responses]
    return torch.tensor(bits, dtype=torch.float64)


def step_row(config: Config, world: World, file: RowFile) -> None:
    """The third step of a run of RL, part by part."""
    rl.RECIPES["coin"] = dataclasses.replace(rl.RECIPES["t1"], reward=coin)
    name, shape, size = "SmolLM2-135M, 32 x 64, <= 512 tokens", SMOLLM2, (32, 64, 512)
    if config.smoke:
        name, shape, size = "toy, 2 x 2, <= 8 tokens", TOY, (2, 2, 8)
    prompts, samples, most = size
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(random_init(shape, 0), folder, demo_tokenizer(cot.WORDS))
        flags = rl.Config(
            model=folder, out="", task="countdown", recipe="coin", steps=3, prompts=prompts, samples=samples,
            max_tokens=most, patterns=(), lr=1e-6, dtype=pick_dtype("auto", world.device),
        )  # fmt: skip
        problems = rollout.read_problems(flags, 3 * prompts)
        learner = rl.make_learner(flags, rl.resolve(flags), problems, world)
    learner.sampler.eos_ids = list(range(0, shape.vocab_size, 128))
    for step in (1, 2, 3):  # the first two compile kernels and capture graphs
        metrics, responses = rl.run_step(learner, step)
    drawn = sum(len(response.completion.tokens) for response in responses)
    numbers = {
        f"{part} s": metrics[f"seconds_{part}"] for part in ("sampling", "verifying", "training")
    }
    numbers["tokens/s"] = drawn / sum(numbers.values())
    print_header("one step of RL", STEP_COLUMNS)
    print_row(name, numbers, STEP_COLUMNS)
    file.add("step", name, **numbers)


def main(config: Config) -> None:
    device = "cpu" if config.smoke else pick_device("cuda")
    file = RowFile(config.json, keep=device == "cuda")
    with parallel.session(device) as world:
        if "training" in config.only:
            training_rows(config, world, file)
        if "step" in config.only:
            with skipping("one step of RL"):
                step_row(config, world, file)


if __name__ == "__main__":
    cli.run(main, Config)
