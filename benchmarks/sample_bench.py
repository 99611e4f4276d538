"""The sampler beside transformers' `generate` and continuous batching: the same weights, prompts and limits, taking
turns in one run; medians.

    python benchmarks/sample_bench.py                       # CPU: SmolLM2-135M (real weights) and the demo's model
    python benchmarks/sample_bench.py --only one demo --rounds 5
    python benchmarks/sample_bench.py --profile             # CPU: where the time of a decode step goes
    python benchmarks/sample_bench.py --gpu                 # CUDA, bf16: decode steps, random weights in real shapes
    python benchmarks/sample_bench.py --gpu --peers         # CUDA, bf16: rollouts beside the peers
    python benchmarks/sample_bench.py --gpu --smoke         # anywhere: the same rows end to end, at toy size

What counts is tokens that somebody wants: those up to a completion's stop token, that token included. `generate` goes
on with a batch until its last row has ended, and what it writes into the other rows until then is padding.

On a GPU two things are measured. A decode step of sequences that stand at 2,048 tokens, against the time that reading
its weights, keys and values takes at the bandwidth of a large copy measured in the same run. And rollouts as RL needs
them: 16 prompts x 64, whose lengths are spread (random weights do not end: one token in 128 is made a stop token, up
to 512 tokens). Continuous batching takes part on a GPU only: that is what it is made for.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import transformers  # noqa: E402

import cli  # noqa: E402
import sft  # noqa: E402
import tasks  # noqa: E402
from benchmarks.rows import SHAPES, TOY, RowFile, fits, random_model, skipping  # noqa: E402
from devices import pick_device  # noqa: E402
from model import ModelConfig, Transformer, load_pretrained, save_pretrained  # noqa: E402
from sample import Batch, Sampler, SamplingParams  # noqa: E402
from tokenizer import load_tokenizer  # noqa: E402

Rows = list[list[int]]  # completions, one after another


@dataclass
class Config:
    only: list[Literal["one", "equal", "rl", "demo"]] = field(
        default_factory=lambda: ["one", "equal", "rl", "demo"]
    )
    """The CPU rows to measure."""
    rounds: int = 3
    """How often each side has its turn."""
    rl_rounds: int = 1
    """The same for the RL-shaped row, in which `generate` takes minutes."""
    model: str = str(ROOT / ".cache" / "SmolLM2-135M")
    """Real weights for the CPU rows."""
    demo_model: str = str(ROOT / "runs" / "demo")
    """The demo's policy; where there is none, random weights in its shape, with one token in 50 a stop token."""
    data: str = str(ROOT.parent / "shared" / "data" / "gsm8k_test.jsonl")
    """Problems of the RL-shaped row."""
    profile: bool = False
    """The operations that a decode step on a CPU spends most on, instead."""
    gpu: bool = False
    """The CUDA rows instead: decode steps ..."""
    peers: bool = False
    """... or, with this, rollouts beside `generate` and continuous batching."""
    smoke: bool = False
    """With --gpu: toy sizes on the CPU, to see that every row runs."""
    json: str = ""
    """With --gpu: file to append a line of JSON to for each row. Default: benchmarks/gpu.jsonl on a GPU, else none."""


def peer(
    model: transformers.PreTrainedModel,
    prompts: Rows,
    n: int,
    params: SamplingParams,
    eos: list[int],
) -> Rows:
    """transformers' `generate` on left-padded prompts, n samples each, cut after the stop token."""
    width = max(map(len, prompts))
    ids = torch.tensor(
        [[0] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device
    )
    mask = torch.tensor(
        [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device
    )
    out = model.generate(
        ids, attention_mask=mask, num_return_sequences=n, max_new_tokens=params.max_tokens, do_sample=True,
        temperature=params.temperature, top_p=1.0, top_k=0, eos_token_id=eos or None, pad_token_id=0,
    )  # fmt: skip
    rows, stops = out[:, width:].tolist(), set(eos)
    ends = [
        next((i + 1 for i, token in enumerate(row) if token in stops), len(row)) for row in rows
    ]
    return [row[:end] for row, end in zip(rows, ends)]


def continuous(
    model: transformers.PreTrainedModel,
    prompts: Rows,
    n: int,
    params: SamplingParams,
    eos: list[int],
) -> Rows:
    """transformers' own continuous batching, each prompt n times."""
    config = transformers.GenerationConfig(
        max_new_tokens=params.max_tokens, do_sample=True, temperature=params.temperature, top_p=1.0, top_k=0,
        eos_token_id=eos or None, pad_token_id=0,
    )  # fmt: skip
    outputs = model.generate_batch(
        [prompt for prompt in prompts for _ in range(n)], generation_config=config
    )
    if len(outputs) < len(prompts) * n:
        raise RuntimeError(
            f"continuous batching ended {len(outputs)} of {len(prompts) * n} sequences"
        )
    return [output.generated_tokens for output in outputs.values()]


def compare(
    name: str, bar: float, rounds: int, contenders: dict[str, Callable[[], Rows]]
) -> list[float]:
    """Take turns, and print a row of the table: medians of tokens that count per second, and their ratio.

    Returns the medians, ours first."""
    speeds: dict[str, list[float]] = {contender: [] for contender in contenders}
    for _ in range(rounds):
        for contender, run in contenders.items():
            start = time.perf_counter()
            tokens = sum(map(len, run()))
            speeds[contender].append(tokens / (time.perf_counter() - start))
            print(
                f"  {name}, {contender}: {tokens} tokens, {speeds[contender][-1]:.1f} tok/s",
                file=sys.stderr,
            )
    medians = [statistics.median(values) for values in speeds.values()]
    ours, *others = medians
    for contender, other in zip(list(contenders)[1:], others):
        print(
            f"| {name} | {contender} | {other:.0f} | {ours:.0f} | {ours / other:.2f}x | >= {bar}x |",
            flush=True,
        )
    return medians


def ours(sampler: Sampler, prompts: Rows, n: int, params: SamplingParams) -> Rows:
    return [completion.tokens for row in sampler.generate(prompts, n, params) for completion in row]


def versus(
    name: str,
    bar: float,
    rounds: int,
    sampler: Sampler,
    theirs,
    prompts: Rows,
    n: int,
    params,
    other=peer,
) -> list[float]:
    """`compare` ours with `other` (`peer` or `continuous`), both warmed up."""
    eos, short = sampler.eos_ids, SamplingParams(2)
    ours(sampler, prompts[:1], 2, short), other(theirs, prompts[:1], 2, short, eos)
    contenders = {
        "nanoT1": lambda: ours(sampler, prompts, n, params),
        {peer: "generate", continuous: "continuous batching"}[other]: lambda: other(
            theirs, prompts, n, params, eos
        ),
    }
    return compare(name, bar, rounds, contenders)


def cpu_rows(config: Config) -> None:
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads, fp32"
    )
    print(
        "\n| tokens that count per second | peer | peer's | nanoT1 | ratio | bar |\n|---|---|---|---|---|---|",
        flush=True,
    )
    if {"one", "equal", "rl"} & set(config.only):
        model, tokenizer = load_pretrained(config.model), load_tokenizer(config.model)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            config.model, dtype=torch.float32
        )
        text = tokenizer.encode(
            "It was a bright cold day in April, and the clocks were striking thirteen. " * 20
        )
        endless = Sampler(model, eos_ids=[])
        if "one" in config.only:
            versus(
                "one sequence, 64 tokens",
                1.3,
                config.rounds,
                endless,
                theirs,
                [text[:32]],
                1,
                SamplingParams(64),
            )
        if "equal" in config.only:
            prompts = [text[i : i + 32] for i in range(64)]  # 64 times the row above
            versus(
                "64 equal sequences, 64 tokens",
                1.5,
                config.rounds,
                endless,
                theirs,
                prompts,
                1,
                SamplingParams(64),
            )
            prompts = [
                text[i : i + 64] for i in range(64)
            ]  # mostly prefill, which is matrix products on either side
            versus(
                "64 longer prompts, 24 tokens",
                1.5,
                config.rounds,
                endless,
                theirs,
                prompts,
                1,
                SamplingParams(24),
            )
        if "rl" in config.only:
            prompts = [
                tasks.prompt_ids(problem, tokenizer) for problem in tasks.load(config.data)[:8]
            ]
            sampler, params = Sampler(model, tokenizer), SamplingParams(256, temperature=1.2)
            versus(
                "RL: 8 GSM8K x 8, T 1.2, <= 256",
                2.5,
                config.rl_rounds,
                sampler,
                theirs,
                prompts,
                8,
                params,
            )
    if "demo" in config.only:
        demo_row(config)


def demo_row(config: Config) -> None:
    """64 countdown problems x 16 with the demo's policy."""
    trained = Path(config.demo_model).exists()
    if trained:
        model, tokenizer = load_pretrained(config.demo_model), load_tokenizer(config.demo_model)
        eos = list(tokenizer.eos_ids)
    else:
        model, tokenizer = sft.begin(sft.Config(out=""))
        eos = list(range(tokenizer.vocab_size // 50))
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    problems = tasks.countdown(seed=0, heldout=True)
    prompts = [tasks.prompt_ids(next(problems), tokenizer) for _ in range(64)]
    name = f"demo model ({'trained' if trained else 'random'}), 64 x 16, <= 256"
    sampler = Sampler(model, max_batch=1024, eos_ids=eos)
    versus(name, 4, config.rounds, sampler, theirs, prompts, 16, SamplingParams(256))


def bandwidth(device: str, size: int) -> float:
    """Bytes per second that a copy of `size` bytes reads and writes."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds_of(lambda: target.copy_(source), 20, device)


def seconds_of(run: Callable[[], object], repeats: int, device: str) -> float:
    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    run()
    wait()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    wait()
    return (time.perf_counter() - start) / repeats


def standing(model: Transformer, rows: int, position: int, pack: bool = False) -> Batch:
    """A batch of `rows` sequences in mid-generation, with room for 100 tokens more."""
    batch = Batch(model, SamplingParams(2048), [], rows, position + 512, pack)
    batch.reserve(rows, position + 100)
    batch.live, batch.longest = rows, position
    batch.position += position
    batch.end += position + 512
    batch.done.fill_(False)
    return batch


@torch.inference_mode()
def profile_rows(model: Transformer) -> None:
    """Milliseconds of a decode step, and of the ten operations in it that take longest."""
    for rows, position in ((1, 64), (64, 64), (64, 256)):
        batch = standing(model, rows, position, pack=rows > 1)
        for _ in range(5):
            batch.decode()
        times = []
        for _ in range(40):
            start = time.perf_counter()
            batch.decode()
            times.append(time.perf_counter() - start)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            for _ in range(5):
                batch.decode()
        spent = sorted(
            ((op.self_cpu_time_total / 5e3, op.key) for op in profiler.key_averages()), reverse=True
        )
        listed = ", ".join(f"{key.removeprefix('aten::')} {ms:.1f}" for ms, key in spent[:10])
        median = 1e3 * statistics.median(times)
        print(
            f"{rows} x 1 token at position {position} to {position + 50}: {median:.1f} ms; {listed}",
            flush=True,
        )


DECODE_BARS = {"Qwen2.5-0.5B": "<= 1.6x at 64", "Qwen2.5-7B": "<= 1.4x"}


def decode_rows(config: Config, device: str, file: RowFile) -> None:
    """Decode steps of each shape, at 1, 64 and 256 rows."""
    size = 2**20 if config.smoke else 2**31
    speed = bandwidth(device, size)
    print(f"a copy moves {speed / 1e12:.2f} TB/s\n")
    print(
        "| decode step | ms | bytes / bandwidth, ms | ratio | bar |\n|---|---|---|---|---|",
        flush=True,
    )
    shapes = {name: SHAPES[name] for name in DECODE_BARS}
    if config.smoke:
        shapes = {"toy": TOY}
    for name, shape in shapes.items():
        with skipping(name):
            decode_shape(name, shape, speed, device, file)


def decode_shape(name: str, shape: ModelConfig, speed: float, device: str, file: RowFile) -> None:
    """The rows of one shape, as many as fit."""
    meta = Transformer(shape, torch.bfloat16, "meta")
    if not fits(name, sum(parameter.nbytes for parameter in meta.parameters()), device):
        return
    model = random_model(shape, torch.bfloat16, device)
    context, batches = (2048, (1, 64, 256)) if device == "cuda" else (128, (1, 4))
    for rows in batches:
        row = f"{name}, batch of {rows}"
        # The last block of a cache may be empty; and when a layer's grows, it is there twice.
        needed = 1.1 * rows * (context + 256) * position_bytes(shape) + 8 * rows * shape.vocab_size
        if fits(row, needed, device):
            with skipping(row):
                step_row(row, model, rows, context, speed, file)


def position_bytes(shape: ModelConfig) -> int:
    """Of a key and a value in every layer, in bf16."""
    return 2 * 2 * shape.layers * shape.kv_heads * shape.head_dim


@torch.inference_mode()
def step_row(
    row: str, model: Transformer, rows: int, context: int, speed: float, file: RowFile
) -> None:
    """One decode step of `rows` sequences that stand at `context` tokens, against the bytes that it must read."""
    device = model.head_weight.device.type
    batch = standing(model, rows, context - 100)
    for _ in range(3):
        batch.decode()
    measured = seconds_of(batch.decode, 50 if device == "cuda" else 2, device)
    cached = rows * (context - 70) * position_bytes(model.config)  # on average over these steps
    weights = sum(parameter.nbytes for parameter in model.parameters())
    if not model.config.tied:
        weights -= model.embed.weight.nbytes  # of which a step reads one row for each sequence
    least = (weights + cached) / speed
    ratio = measured / least
    bar = DECODE_BARS.get(row.split(",")[0], "")
    print(
        f"| {row} | {1e3 * measured:.2f} | {1e3 * least:.2f} | {ratio:.2f}x | {bar} |", flush=True
    )
    file.add("decode", row, **{"ms": 1e3 * measured, "least ms": 1e3 * least, "ratio": ratio})


def peer_rows(config: Config, device: str, file: RowFile) -> None:
    """Rollouts beside each peer. One that fails is one line."""
    print(
        "| tokens that count per second | peer | peer's | nanoT1 | ratio | bar |\n|---|---|---|---|---|---|",
        flush=True,
    )
    name, shape, samples, most = "RL: 16 x 64, <= 512", SHAPES["Qwen2.5-0.5B"], 64, 512
    if config.smoke:
        name, shape, samples, most = "toy: 16 x 2, <= 8", TOY, 2, 8
    model = random_model(shape, torch.bfloat16, device)
    eos = list(range(0, shape.vocab_size, 128))
    prompts = [[1 + (7 * i + j) % 400 for j in range(64 + 4 * i)] for i in range(16)]
    sampler, params = Sampler(model, max_batch=1024, eos_ids=eos), SamplingParams(most)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(
            device
        )
    contenders = [("generate", 10, peer)]
    if device == "cuda":
        contenders.append(("continuous batching", 2, continuous))
    for peer_name, bar, other in contenders:
        with skipping(f"{name}, {peer_name}", Exception):
            mine, peers = versus(name, bar, 1, sampler, theirs, prompts, samples, params, other)
            numbers = {"peer's": peers, "nanoT1": mine, "ratio": mine / peers}
            file.add("sampling", f"{name}, {peer_name}", **numbers)


def gpu_rows(config: Config) -> None:
    device = "cpu" if config.smoke else pick_device("cuda")
    file = RowFile(config.json, keep=device == "cuda")
    card = torch.cuda.get_device_name() if device == "cuda" else "CPU, toy sizes"
    print(f"{card}, torch {torch.__version__}, bf16")
    measure = peer_rows if config.peers else decode_rows
    measure(config, device, file)


def main(config: Config) -> None:
    transformers.logging.set_verbosity_error()
    if config.profile:
        profile_rows(load_pretrained(config.model))
    elif config.gpu:
        gpu_rows(config)
    else:
        cpu_rows(config)


if __name__ == "__main__":
    cli.run(main, Config)
