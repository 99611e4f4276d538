"""T1 stage 1, the training: supervised fine-tuning on chains of thought that try, fail, notice and verify.

    python sft.py --task countdown --chains 34000 --steps 3400 --batch-tokens 1024 --optimizer muon --lr 6e-3 \\
        --weight-decay 0 --random-positions 0.7 --out runs/sft                       # the demo's, from random weights
    python sft.py --model Qwen2.5-0.5B --data chains.jsonl --out runs/sft            # 3 epochs at 1e-5, as the paper
    torchrun --standalone --nproc_per_node=8 sft.py --model DIR --data chains.jsonl --out runs/sft
    python sft.py ... --out runs/sft --resume                                        # goes on where it was killed

The loss is the mean negative log-likelihood of the step's response tokens, the stop token included. Training data is
JSONL; each line holds one of

    {"problem": "...", "response": "..."}               `question` is read too; `task` decides how it is prompted
    {"messages": [{"role": ..., "content": ...}, ...]}  a chat; every assistant turn is trained on
    {..., "stop": false}                                the (last) response is cut off: no stop token is trained on it

OUT holds config.json, metrics.jsonl, metrics.png, checkpoints/ and, at the end, model/ (a Hugging Face folder).

What we do differently from the paper, and why:

1. T1 gives 3 epochs and a learning rate of 1e-5, and no more: those are the defaults. Warm-up, cosine decay to a tenth,
   AdamW's betas, weight decay and clipping are the field's usual values.
2. Sequences are packed into rows, and attention stays within a sequence. Only speed changes: a test shows that a
   sequence's loss does not depend on its neighbours.
3. The loss is divided once, by the trained tokens of the whole step. A mean per micro-batch would make a token's weight
   depend on how the step was cut over micro-batches and GPUs.
4. --random-positions P: a share P of the sequences stand not at the positions 0, 1, 2, ... but at a sorted random
   choice of all positions that the model has (Ruoss et al., arXiv 2305.16843). A model trained on short chains has
   never seen the positions beyond them, and what it writes there is garbled: no success, and so nothing for RL to
   reinforce. With random positions order is all that counts, and it can go on beyond the longest chain. For a model
   trained from random weights; a pretrained one knows its positions.
5. A response that is longer than --max-length is cut, and then no stop token is trained on it: the paper is silent.
6. `--optimizer muon` moves the blocks' matrices by Muon (muon.py). The demo wants it; the default is AdamW, T1's usual.
"""

import dataclasses
import hashlib
import itertools
import math
import random
import time
from typing import Literal

import torch
from tqdm import tqdm

import cli
import cot
import memory
import parallel
import runfolder
import tasks
from cli import UserError
from model import ModelConfig, Transformer, load_pretrained, model_folder, random_init, read_config
from muon import make_optimizers
from packing import Example
from parallel import Scorer, World
from tokenizer import Tokenizer, demo_tokenizer, load_tokenizer

MAY_CHANGE = (
    "out", "plan", "gpu_gb", "resume", "steps", "epochs", "device", "micro_tokens", "eval_every", "checkpoint_every",
    "keep", "log", "recompute",
)  # fmt: skip
"""Flags that --resume accepts with another value (a folder may have moved). All others would make it another run."""


@dataclasses.dataclass(frozen=True)
class Config:
    out: str
    """Folder of the run; it must be new, or --resume be given."""
    data: str | None = None
    """Training data, JSONL (see above). Either this or --task."""
    task: Literal["countdown"] | None = None
    """Train on chains of thought synthesised for this task instead."""
    chains: int = 20_000
    """With --task: how many chains to synthesise."""
    model: str | None = None
    """Checkpoint to start from: a Hugging Face folder or a run. None: the demo's small model with random weights."""
    resume: bool = False
    """Continue the run in --out from its last checkpoint; on a CPU, bitwise as if it had never been stopped."""
    seed: int = 0
    """Decides the initial weights, the synthesised chains, the held-out part and the order of the data."""
    epochs: int = 3
    """Passes over the data (the paper: 3)."""
    steps: int | None = None
    """Number of updates, instead of --epochs."""
    lr: float = 1e-5
    """Peak learning rate (the paper: 1e-5 for 9B to 32B; a random start wants 1e-3 or more)."""
    warmup: float = 0.05
    """Share of the steps over which the rate rises linearly: Adam's first steps have no variance estimate to trust."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """What moves the blocks' matrices. muon learns single facts, such as sums, in fewer steps: see muon.py."""
    weight_decay: float = 0.1
    """On matrices only; decay on norms' gains would rescale layers."""
    clip: float = 1.0
    """Largest global gradient norm, so that one odd batch cannot throw the weights."""
    batch_tokens: int = 32_768
    """Tokens per update, over all ranks: sequences vary in length, the size of an update should not."""
    micro_tokens: int | None = None
    """Tokens per forward pass of a rank (None: 8,192 on a GPU, 2,048 on a CPU): bounds memory, changes no result."""
    max_length: int | None = None
    """Longest sequence, prompt included (None: the model's context). Longer responses are cut, without a stop token."""
    random_positions: float = 0.0
    """Share of the sequences that stand at random positions, so that chains can outgrow the longest one shown."""
    heldout: int = 256
    """Sequences kept out of training to measure the loss on (at most a tenth of the data)."""
    eval_every: int = 50
    """Steps between measurements of the held-out loss."""
    checkpoint_every: int = 50
    """Steps between checkpoints: what a kill can cost in time (never in result)."""
    keep: int = 2
    """Checkpoints to keep; older ones are removed."""
    max_skips: int = 5
    """Stop after this many steps in a row whose loss or gradient is not finite; each one is skipped and counted."""
    device: str = "auto"
    """cpu, cuda, or auto: cuda where there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the matrix products run in; master weights are fp32 always. auto: bfloat16 on cuda, float32 on cpu."""
    recompute: bool = False
    """Recompute activations in the backward pass: a third more time for far less memory."""
    log: Literal["none", "tensorboard", "wandb"] = "none"
    """Where metrics go besides metrics.jsonl."""
    plan: int = 0
    """Print what each of so many GPUs would hold for --model, and whether it fits, and stop. Reads no weights."""
    gpu_gb: float = 80.0
    """With --plan: the memory of one GPU, in GB (A100 and H100: 80, H200: 141)."""


# --- data -------------------------------------------------------------------------------------------------------------


def stop_token(tokenizer: Tokenizer) -> int:
    """The token that ends an assistant's turn in the chat template (a model may know several that end *something*)."""
    rendered = tokenizer.chat(
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], add_generation_prompt=False
    )
    ends = [token for token in rendered if token in tokenizer.eos_ids] or list(tokenizer.eos_ids)
    if not ends:
        raise UserError("the model's tokenizer names no stop token (eos_token)")
    return ends[-1]


def conversation(row: dict, where: str) -> list[dict]:
    """The messages of a line of training data; UserError says `where` if it holds none, or no answer in them."""
    messages = row.get("messages")
    if messages is None:
        question, response = row.get("problem", row.get("question")), row.get("response")
        if not isinstance(question, str) or not isinstance(response, str):
            raise UserError(f"{where}: expected `messages`, or `problem` (or `question`) and `response`")
        task = tasks.known_task(row, where)
        prompt = tasks.messages(tasks.Problem(question, str(row.get("answer", "")), task))
        return prompt + [{"role": "assistant", "content": response}]
    valid = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    )
    if not valid:
        raise UserError(f"{where}: `messages` must be a list of objects with `role` and `content`")
    if not any(m["role"] == "assistant" for m in messages[1:]):
        raise UserError(f"{where}: no assistant turn to train on")
    return messages


def examples_of(row: dict, tokenizer: Tokenizer, stop: int, max_length: int, where: str) -> list[Example]:
    """Token sequences whose trained spans are the assistant's turns, each with the stop token that ends it.

    Turn by turn the prompt is rendered exactly as the sampler will see it. As long as the next prompt begins with what
    we have, one sequence carries all turns; where a template rewrites the past (Qwen3 drops old thoughts), a new one
    begins.
    """
    messages = conversation(row, where)
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    sequences: list[Example] = []
    tokens: list[int] = []
    spans: list[tuple[int, int]] = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant" or i == 0:
            continue
        prompt = tokenizer.chat(messages[:i], add_generation_prompt=True)
        if len(prompt) >= max_length:
            raise UserError(f"{where}: the prompt has {len(prompt)} tokens, the longest sequence {max_length}")
        if spans and prompt[: len(tokens)] != tokens:
            sequences.append(Example(tokens, spans))
            spans = []
        ends = row.get("stop", True) or i != last
        tokens = prompt + tokenizer.encode(message["content"]) + ([stop] if ends else [])
        tokens = tokens[:max_length]
        if len(tokens) > len(prompt):
            spans = spans + [(len(prompt), len(tokens))]
    return sequences + ([Example(tokens, spans)] if spans else [])


def read_examples(config: Config, tokenizer: Tokenizer, max_length: int, world: World) -> list[Example]:
    """All training sequences, in the order of the data."""
    if (config.data is None) == (config.task is None):
        raise UserError("give either --data FILE or --task countdown")
    if config.data is not None:
        rows, source = cli.read_jsonl(config.data), config.data
    else:
        flags = cot.Config(out="", seed=config.seed, count=config.chains)
        rows, source = list(cot.by_program(flags, show=world.main)), "chain"
    stop = stop_token(tokenizer)
    examples = []
    for number, row in enumerate(tqdm(rows, "tokens", disable=not world.main, leave=False), start=1):
        examples += examples_of(row, tokenizer, stop, max_length, f"{source}, example {number}")
    examples = [example for example in examples if example.targets]
    if not examples:
        raise UserError(f"{source}: nothing to train on, every response is empty")
    return examples


def plan(lengths: list[int], batch_tokens: int, epochs: int, steps: int | None, seed: int) -> list[list[int]]:
    """The sequences of every step: each epoch shuffled anew, cut wherever the next would exceed `batch_tokens`.

    All of it follows from the arguments, so that a run's data position is its step number, and nothing to be saved.
    """
    batches: list[list[int]] = [[]]
    load = 0
    for epoch in itertools.count():
        if steps is None and epoch == epochs:
            return batches
        order = list(range(len(lengths)))
        random.Random(f"epoch {epoch} of seed {seed}").shuffle(order)
        for i in order:
            if batches[-1] and load + lengths[i] > batch_tokens:
                if len(batches) == steps:
                    return batches
                batches.append([])
                load = 0
            batches[-1].append(i)
            load += lengths[i]


def at_random_positions(example: Example, context: int, share: float, rng: random.Random) -> Example:
    """With chance `share` the example at a sorted random choice of the positions 0..context-1, else as it is."""
    if rng.random() >= share:
        return example
    positions = sorted(rng.sample(range(context), len(example.tokens)))
    return dataclasses.replace(example, positions=positions)


# --- training ---------------------------------------------------------------------------------------------------------


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Linear from 0 over the first share `warmup` of the steps, then a cosine down to a tenth of the peak."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return peak * (step + 1) / rising
    progress = (step - rising) / max(1, steps - rising)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def loss_of(
    scorer: Scorer, examples: list[Example], micro_tokens: int | None, world: World, backward: bool = False
) -> tuple[float, int]:
    """(mean negative log-likelihood, trained tokens) over all ranks; with `backward`, its gradient in every `.grad`.

    Every micro-batch's sum is divided by the token count of the whole step, so that adding them up, over micro-batches
    here and over ranks in FSDP, is the mean.
    """
    count = sum(example.targets for example in examples)
    total = torch.zeros((), device=world.device)
    for _, packed in parallel.micro_batches(examples, micro_tokens, scorer.model.config.dim, world):
        logprob, _ = parallel.score(scorer, packed)
        loss = -logprob.sum() / count
        if backward:
            loss.backward()
        total += loss.detach()
    return parallel.sum_over_ranks(total).item(), count


def begin(config: Config) -> tuple[Transformer, Tokenizer]:
    """The model to start from and its tokenizer; without --model, the demo's, small enough for a laptop."""
    if config.model is not None:
        return load_pretrained(config.model), load_tokenizer(config.model)
    tokenizer = demo_tokenizer(cot.WORDS)
    shape = ModelConfig(
        tokenizer.vocab_size, dim=96, layers=4, heads=3, kv_heads=1, head_dim=32, mlp_dim=288, family="qwen3",
        qk_norm=True, rope_theta=1e6, context=512, tied=True, eos_ids=tuple(tokenizer.eos_ids),
    )  # fmt: skip
    return random_init(shape, config.seed), tokenizer


def check(config: Config) -> None:
    positive = (
        "epochs",
        "lr",
        "clip",
        "batch_tokens",
        "micro_tokens",
        "eval_every",
        "checkpoint_every",
        "keep",
        "chains",
    )
    for name in (*positive, "steps", "max_length", "max_skips"):
        value = getattr(config, name)
        if value is not None and value <= 0:
            raise UserError(f"--{name.replace('_', '-')} must be positive, not {value}")
    if not 0 <= config.random_positions <= 1:
        raise UserError(f"--random-positions is a share from 0 to 1, not {config.random_positions}")


def train(config: Config, world: World) -> None:
    check(config)
    runfolder.check_run(config.out, config, config.resume, MAY_CHANGE)
    model, tokenizer = begin(config)
    max_length = config.max_length or model.config.context
    if config.random_positions and max_length > model.config.context:
        raise UserError(
            f"--random-positions: --max-length {max_length} is beyond the context of {model.config.context}"
        )
    examples = read_examples(config, tokenizer, max_length, world)
    heldout_count = min(config.heldout, len(examples) // 10)
    random.Random(f"held out of seed {config.seed}").shuffle(examples)
    heldout, examples = examples[:heldout_count], examples[heldout_count:]
    batches = plan([len(e.tokens) for e in examples], config.batch_tokens, config.epochs, config.steps, config.seed)
    steps = len(batches)
    fingerprint = hashlib.sha256(repr((examples, heldout)).encode()).hexdigest()

    out = runfolder.open_run(config.out, config, config.resume, MAY_CHANGE, world)
    dtype = config.dtype if config.dtype != "auto" else "bfloat16" if world.device.type == "cuda" else "float32"
    scorer = parallel.shard(model, world, getattr(torch, dtype), config.recompute)
    optimizers = make_optimizers(scorer, config.optimizer, config.lr, config.weight_decay)
    parts = {"policy": scorer} | optimizers
    guard, step = runfolder.Guard(config.max_skips), 0
    if saved := parallel.complete_checkpoints(out / "checkpoints"):
        state = parallel.load_checkpoint(saved[-1], parts, world, ("data", "skipped", "in_a_row"))
        if state["data"] != fingerprint:
            raise UserError(f"--resume: the training data is not what {out} was started with")
        step, guard.skipped, guard.in_a_row = state["step"], state["skipped"], state["in_a_row"]

    log = runfolder.MetricsLog(out, step, world, config.log)
    checkpoints = parallel.Checkpoints(out / "checkpoints", world, config.keep)
    bar = tqdm(total=steps, initial=step, desc="sft", unit="step", disable=not world.main)
    while step < steps:
        began = time.perf_counter()
        batch = [examples[i] for i in batches[step]]
        if config.random_positions:  # drawn anew for every step, from its number: nothing to be saved for --resume
            rng = random.Random(f"positions {config.seed} {step}")
            batch = [at_random_positions(e, model.config.context, config.random_positions, rng) for e in batch]
        rate = learning_rate(step, steps, config.lr, config.warmup)
        scorer.zero_grad()
        loss, count = loss_of(scorer, batch, config.micro_tokens, world, backward=True)
        norm = parallel.clip_grad_norm(scorer, config.clip)
        if guard.allows(loss=loss, gradient=norm):
            for optimizer in optimizers.values():
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.step()
        step += 1
        seconds = time.perf_counter() - began
        speed = sum(len(example.tokens) for example in batch) / seconds
        metrics = {"loss": loss, "lr": rate, "grad_norm": norm, "trained_tokens": count, "skipped": guard.skipped}
        metrics |= {"seconds": seconds, "tokens_per_second": speed}
        measured = bool(heldout) and (step % config.eval_every == 0 or step == steps)
        if measured:
            with torch.no_grad():
                metrics["heldout_loss"], _ = loss_of(scorer, heldout, config.micro_tokens, world)
            if world.main:
                bar.write(f"step {step}: loss {loss:.4f}, held-out {metrics['heldout_loss']:.4f}")
        log.write(step, metrics)
        bar.set_postfix_str(f"loss {loss:.4f}, {speed:,.0f} tokens/s")
        bar.update()
        if step % config.checkpoint_every == 0 or step == steps:
            state = {"data": fingerprint, "skipped": guard.skipped, "in_a_row": guard.in_a_row}
            checkpoints.save(step, parts, state)
        if measured and world.main:
            panels = {"loss": ["loss", "heldout_loss"], "gradient norm": ["grad_norm"], "learning rate": ["lr"]}
            runfolder.plot(out / "metrics.jsonl", out / "metrics.png", panels)
    bar.close()
    checkpoints.finish()
    parallel.save_model(scorer, out / "model", tokenizer, world)


def main(config: Config) -> None:
    if config.plan:
        if config.model is None:
            raise UserError("--plan needs --model: the demo's model fits anywhere")
        shape = read_config(model_folder(config.model))
        length = config.max_length or shape.context
        print(memory.table(shape, config.plan, length, 0, 0, config.gpu_gb, config.micro_tokens, config.recompute))
        return
    with parallel.session(config.device) as world:
        train(config, world)


if __name__ == "__main__":
    cli.run(main, Config)
