"""The sampler beside transformers' `generate` and continuous batching: the same weights, prompts and limits, taking
turns in one run; medians.

    python benchmarks/sample_bench.py                       # CPU: SmolLM2-135M (real weights) and the demo's model
    python benchmarks/sample_bench.py --only one demo --rounds 5
    python benchmarks/sample_bench.py --profile             # CPU: where the time of a decode step goes
    python benchmarks/sample_bench.py --gpu                 # CUDA, bf16: random weights in the shapes of real models

What counts is tokens that somebody wants: those up to a completion's stop token, that token included. `generate` goes
on with a batch until its last row has ended, and what it writes into the other rows until then is padding.

On a GPU two things are measured. A decode step, against the time that reading its weights, keys and values takes at the
bandwidth of a large copy measured in the same run. And rollouts as RL needs them: 16 prompts x 64, whose lengths are
spread (random weights do not end: one token in 128 is made a stop token, up to 512 tokens). Continuous batching takes
part on a GPU only: that is what it is made for.
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
    """The CUDA rows instead."""


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


def compare(name: str, bar: float, rounds: int, contenders: dict[str, Callable[[], Rows]]) -> None:
    """Take turns, and print a row of the table: medians of tokens that count per second, and their ratio."""
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
    ours, *others = (statistics.median(values) for values in speeds.values())
    for contender, other in zip(list(contenders)[1:], others):
        print(
            f"| {name} | {contender} | {other:.0f} | {ours:.0f} | {ours / other:.2f}x | >= {bar}x |",
            flush=True,
        )


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
) -> None:
    """`compare` ours with `other` (`peer` or `continuous`), both warmed up."""
    eos, short = sampler.eos_ids, SamplingParams(2)
    ours(sampler, prompts[:1], 2, short), other(theirs, prompts[:1], 2, short, eos)
    contenders = {
        "nanoT1": lambda: ours(sampler, prompts, n, params),
        {peer: "generate", continuous: "continuous batching"}[other]: lambda: other(
            theirs, prompts, n, params, eos
        ),
    }
    compare(name, bar, rounds, contenders)


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


def shape(
    dim: int, layers: int, heads: int, kv_heads: int, mlp: int, vocabulary: int, tied: bool
) -> ModelConfig:
    return ModelConfig(
        vocabulary, dim=dim, layers=layers, heads=heads, kv_heads=kv_heads, head_dim=dim // heads, mlp_dim=mlp,
        family="qwen2", qkv_bias=True, context=8192, tied=tied,
    )  # fmt: skip


SHAPES = {
    "SmolLM2-135M": shape(576, 30, 9, 3, 1536, 49152, True),
    "Qwen2.5-0.5B": shape(896, 24, 14, 2, 4864, 151936, True),
    "Qwen2.5-7B": shape(3584, 28, 28, 4, 18944, 152064, False),
}


def gpu_model(config: ModelConfig) -> Transformer:
    model = Transformer(config, dtype=torch.bfloat16, device="cuda")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02) if parameter.ndim > 1 else parameter.fill_(1)
    return model


def bandwidth() -> float:
    """Bytes per second that a large copy reads and writes."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of(lambda: target.copy_(source), 20)


def seconds_of(run: Callable[[], object], repeats: int) -> float:
    run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    torch.cuda.synchronize()
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


@torch.inference_mode()
def step_row(name: str, model: Transformer, rows: int, speed: float, context: int = 512) -> None:
    """One decode step of `rows` sequences that stand at `context` tokens, against the bytes that it must read."""
    batch = standing(model, rows, context - 100)
    for _ in range(3):
        batch.decode()
    measured = seconds_of(batch.decode, 50)
    config = model.config
    cached = 2 * config.layers * config.kv_heads * config.head_dim * 2 * rows * (context - 70)
    weights = sum(
        parameter.nbytes for name, parameter in model.named_parameters() if name != "embed.weight"
    )
    weights += model.head_weight.nbytes if config.tied else 0
    least = (weights + cached) / speed
    print(
        f"| {name} | {rows} | {measured * 1e3:.2f} | {least * 1e3:.2f} | {measured / least:.2f}x |",
        flush=True,
    )


def gpu_rows(config: Config) -> None:
    speed = bandwidth()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bf16, {speed / 1e12:.2f} TB/s measured\n"
    )
    print(
        "| decode step, 7B bar <= 1.4x | batch | ms | bytes / bandwidth, ms | ratio |\n|---|---|---|---|---|",
        flush=True,
    )
    for name, model_shape in SHAPES.items():
        model = gpu_model(model_shape)
        for rows in (1, 64, 256):
            step_row(name, model, rows, speed)
    print(
        "\n| tokens that count per second | peer | peer's | nanoT1 | ratio | bar |\n|---|---|---|---|---|---|",
        flush=True,
    )
    model = gpu_model(SHAPES["Qwen2.5-0.5B"])
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16
        ).cuda()
    eos = list(range(0, model.config.vocab_size, 128))
    prompts = [[1 + (7 * i + j) % 1000 for j in range(64 + 4 * i)] for i in range(16)]
    sampler, params = Sampler(model, max_batch=1024, eos_ids=eos), SamplingParams(512)
    versus("RL: 16 x 64, <= 512", 10, 1, sampler, theirs, prompts, 64, params)
    versus("RL: 16 x 64, <= 512", 2, 1, sampler, theirs, prompts, 64, params, continuous)


def main(config: Config) -> None:
    transformers.logging.set_verbosity_error()
    if config.profile:
        profile_rows(load_pretrained(config.model))
    elif not config.gpu:
        cpu_rows(config)
    elif torch.cuda.is_available():
        gpu_rows(config)
    else:
        raise cli.UserError("--gpu: no GPU is visible to torch")


if __name__ == "__main__":
    cli.run(main, Config)
