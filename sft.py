"""T1 stage 1, the training: supervised fine-tuning on chains that try, fail, notice and verify.

    python sft.py --task countdown --out runs/sft                # a small model from random weights
    python sft.py --model Qwen/Qwen2.5-0.5B --data chains.jsonl --out runs/sft      # as the paper
    torchrun --standalone --nproc_per_node=8 sft.py --model DIR --data chains.jsonl --out runs/sft
    python sft.py ... --out runs/sft --resume                    # goes on where it was killed

The loss is the mean negative log-likelihood of the response tokens of a step, the stop token
included. Training data is JSONL; each line holds one of

    {"problem": "...", "response": "..."}               or `question`; `task` says how it is asked
    {"messages": [{"role": ..., "content": ...}, ...]}  a chat; every assistant turn is trained on
    {..., "stop": false}                                the (last) response was cut off: it is
                                                        trained on without a stop token

OUT holds config.json, inputs.json, metrics.jsonl, metrics.png, checkpoints/ and, at the end, model/
(a Hugging Face folder).

What we do differently from the paper, and why:

1. T1 names 3 epochs and a learning rate of 1e-5, and no more: they are the defaults with --model.
   Warm-up, cosine decay to a tenth, AdamW's betas, weight decay and gradient norm are the field's
   usual values. Random weights learn nothing at 1e-5: without --model the defaults are the demo's.
2. Sequences are packed into rows, and attention stays within a sequence. Only speed changes: a test
   shows that the loss of a sequence does not depend on its neighbours.
3. The loss is divided once, by the trained tokens of the whole step. A mean per micro-batch would
   make the weight of a token depend on how the step was cut over micro-batches and GPUs.
4. --random-positions P: a share P of the sequences stands not at the positions 0, 1, 2, ... but at
   a sorted random choice of all positions that the model has (Ruoss et al., arXiv 2305.16843). A
   model that was trained on short chains has never seen the positions beyond them. What it writes
   there is garbled, so RL finds no success there to reinforce. With random positions only the order
   counts, and the model can go on beyond the longest chain. For random weights; a pretrained model
   knows its positions.
5. A response that is longer than --max-length is cut, and no stop token is trained on it: the paper
   is silent.
6. `--optimizer muon` moves the matrices of the blocks by Muon (muon.py). Small models from random
   weights want it; T1 uses AdamW.
"""

import dataclasses
import itertools
import math
import random
import shlex
import time
from typing import Literal

import torch
from tqdm import tqdm

import cli
import cot
import parallel
import pretrained
import runfolder
import tasks
from cli import UserError
from model import ModelConfig, Transformer, random_init, without_weights
from muon import make_optimizers
from packing import Example
from parallel import Scorer, World
from runfolder import Run
from tokenizer import (
    Tokenizer,
    continued,
    demo_tokenizer,
    load_tokenizer,
    require_stop_token,
)

MAY_CHANGE = (
    "out", "data", "model", "resume", "steps", "epochs", "device", "micro_tokens", "eval_every",
    "checkpoint_every", "keep", "log", "recompute", "offload",
)  # fmt: skip
"""Flags that --resume accepts with another value: a folder or a file may have moved (what it holds
must be the same, see `Run.check_inputs`). All others would make it another run."""

PRETRAINED = {
    "lr": 1e-5,
    "optimizer": "adamw",
    "weight_decay": 0.1,
    "batch_tokens": 32_768,
    "random_positions": 0.0,
}
"""Defaults of the flags that suit a pretrained model (--model) ..."""
RANDOM_WEIGHTS = {
    "lr": 6e-3,
    "optimizer": "muon",
    "weight_decay": 0.0,
    "batch_tokens": 1024,
    "random_positions": 0.7,
}
"""... and a start from random weights (no --model): the demo's."""


@dataclasses.dataclass(frozen=True)
class Config:
    out: str
    """Folder of the run; it must be new, or --resume be given."""
    data: str | None = None
    """Training data, JSONL (see above). Either this or --task."""
    task: Literal["countdown"] | None = None
    """Train on chains of thought that are made by program for this task instead."""
    chains: int = 20_000
    """With --task: how many chains to make."""
    model: str | None = None
    """Checkpoint to start from: a run, a Hugging Face folder, or a name of its hub. None: the
    demo's small model, with random weights."""
    resume: bool = False
    """Go on from the last checkpoint in --out; on a CPU bitwise as if it had never been stopped."""
    seed: int = 0
    """Decides the initial weights, the chains, the held-out part and the order of the data."""
    epochs: int = 3
    """Passes over the data (the paper: 3)."""
    steps: int | None = None
    """Number of updates, instead of --epochs."""
    lr: float | None = None
    """Peak learning rate. None: 1e-5 with --model (the paper's, for 9B to 32B), 6e-3 without."""
    warmup: float = 0.05
    """Share of the steps over which the rate rises linearly: Adam's first steps have no variance
    estimate to trust."""
    optimizer: Literal["adamw", "muon"] | None = None
    """What moves the blocks' matrices. None: adamw with --model, muon without; muon learns single
    facts, such as sums, in fewer steps (see muon.py)."""
    weight_decay: float | None = None
    """On matrices only; on norms it would rescale layers. None: 0.1 with --model, 0 without."""
    max_grad_norm: float = 1.0
    """Largest global gradient norm, so that one odd batch cannot throw the weights."""
    batch_tokens: int | None = None
    """Tokens per update, over all ranks: sequences vary in length, an update's size should not.
    None: 32,768 with --model, 1,024 without (small models want many small steps)."""
    micro_tokens: int | None = None
    """Tokens per forward pass of a rank: bounds memory, changes no result. None: 8,192 on a GPU,
    2,048 on a CPU."""
    max_length: int | None = None
    """Longest sequence, prompt included; longer responses are cut, without a stop token. None: the
    model's context."""
    random_positions: float | None = None
    """Share of the sequences that stand at random positions, so that chains can outgrow the longest
    one shown. None: 0 with --model, 0.7 without."""
    heldout: int = 256
    """Sequences kept out of training to measure the loss on (at most a tenth of the data). Where
    the data repeats a sequence, or a problem, training still sees the other ones."""
    eval_every: int = 50
    """Steps between measurements of the held-out loss."""
    checkpoint_every: int = 50
    """Steps between checkpoints: what a kill can cost in time (never in result)."""
    keep: int = 2
    """Checkpoints to keep; older ones are removed."""
    max_skips: int = 5
    """Stop after so many steps in a row whose loss or gradient is not finite; each is skipped."""
    template_args: str = ""
    """JSON that the chat template is to know, such as '{"enable_thinking": false}'."""
    device: str = "auto"
    """cpu, cuda, or auto: cuda where there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the matrix products run in. auto: bfloat16 on a GPU that has it, else float32; with
    --resume, what the run began with. Master weights are float32 in any case."""
    recompute: bool = False
    """Recompute activations in the backward pass: a third more time for far less memory."""
    offload: bool = False
    """Keep master weights, gradients and AdamW's moments in the host's memory: slower, for a GPU
    that has no room for them."""
    log: Literal["none", "tensorboard", "wandb"] = "none"
    """Where metrics go besides metrics.jsonl."""


def with_defaults(config: Config) -> Config:
    """The flags that were left out, filled in by what the run starts from."""
    defaults = RANDOM_WEIGHTS if config.model is None else PRETRAINED
    left_out = {name: value for name, value in defaults.items() if getattr(config, name) is None}
    return dataclasses.replace(config, **left_out)


POSITIVE = (
    "chains", "epochs", "steps", "lr", "max_grad_norm", "batch_tokens", "micro_tokens",
    "max_length", "eval_every", "checkpoint_every", "keep", "max_skips",
)  # fmt: skip


def check_flags(config: Config) -> None:
    """UserError for what can be known to be wrong before anything is loaded."""
    if (config.data is None) == (config.task is None):
        raise UserError("give either --data FILE or --task countdown")
    for name in POSITIVE:
        value = getattr(config, name)
        if value is not None and value <= 0:
            raise UserError(f"--{name.replace('_', '-')} must be positive, not {value}")
    if config.template_args and config.model is None:
        raise UserError("--template-args is for the chat template of a --model")
    if not 0 <= config.random_positions <= 1:
        raise UserError(f"--random-positions is a share from 0 to 1, not {config.random_positions}")


# --- data -----------------------------------------------------------------------------------------


def stop_token(tokenizer: Tokenizer) -> int:
    """The token that ends an assistant's turn in the chat template.

    A model may know several tokens that end *something*.
    """
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rendered = tokenizer.chat(turns, add_generation_prompt=False)
    ends = [token for token in rendered if token in tokenizer.eos_ids] or list(tokenizer.eos_ids)
    return ends[-1]


def conversation(row: dict, where: str) -> list[dict]:
    """The messages of a line of training data; UserError says `where` if it holds no answer."""
    if row.get("messages") is None:
        response = row.get("response")
        if not isinstance(response, str):
            raise UserError(
                f"{where}: expected `messages`, or `problem` (or `question`) and `response`"
            )
        question, earlier = tasks.read_question(row, where)
        task = tasks.known_task(row, where)
        prompt = tasks.messages(tasks.Problem(question, "", task, earlier))
        return prompt + [{"role": "assistant", "content": response}]
    messages = tasks.read_chat(row["messages"], f"{where}: `messages`")
    if not any(message["role"] == "assistant" for message in messages[1:]):
        raise UserError(f"{where}: no assistant turn to train on")
    return messages


def examples_of(
    row: dict, tokenizer: Tokenizer, stop: int, max_length: int, where: str
) -> list[Example]:
    """Token sequences whose trained spans are the assistant's turns, each with its stop token.

    Turn by turn the prompt is rendered exactly as the sampler will see it. As long as the next
    prompt begins with the tokens so far, one sequence carries all turns. Where a template rewrites
    the past (Qwen3 drops old thoughts), a new one begins.
    """
    messages = conversation(row, where)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i > 0]
    sequences: list[Example] = []
    tokens: list[int] = []
    spans: list[tuple[int, int]] = []
    for i in turns:
        prompt = tokenizer.chat(messages[:i], add_generation_prompt=True)
        if len(prompt) >= max_length:
            raise UserError(
                f"{where}: the prompt has {len(prompt)} tokens, the longest sequence {max_length}"
            )
        if spans and prompt[: len(tokens)] != tokens:
            sequences.append(Example(tokens, spans))
            spans = []
        response = messages[i]["content"]
        if response.lstrip().startswith(("<", "[")):  # <think>, which the template may have opened
            response = continued(tokenizer.opening(messages[:i]), response)
        tokens = prompt + tokenizer.encode(response)
        if row.get("stop", True) or i != turns[-1]:
            tokens = tokens + [stop]
        tokens = tokens[:max_length]
        if len(tokens) > len(prompt):
            spans = spans + [(len(prompt), len(tokens))]
    if spans:
        sequences.append(Example(tokens, spans))
    return sequences


def read_examples(
    config: Config, tokenizer: Tokenizer, max_length: int, world: World
) -> list[Example]:
    """All training sequences, in the order of the data. Says how many had to be cut."""
    if config.data is not None:
        source = config.data
        rows = list(tasks.read_files(config.data).values())
    else:
        source = "chain"
        chains = cot.Config(out="", seed=config.seed, count=config.chains)
        rows = list(cot.by_program(chains, show=world.main))
    stop = stop_token(tokenizer)
    examples: list[Example] = []
    cut = 0
    bar = tqdm(rows, "tokens", disable=not world.main, leave=False)
    for number, row in enumerate(bar, start=1):
        made = examples_of(row, tokenizer, stop, max_length, f"{source}, example {number}")
        if made and len(made[-1].tokens) == max_length and made[-1].tokens[-1] != stop:
            cut += 1
        examples += made
    if cut and world.main:
        print(
            f"{cut:,} of {len(rows):,} responses do not fit into --max-length ({max_length:,} "
            "tokens, prompt included): they are cut, and trained on without a stop token"
        )
    examples = [example for example in examples if example.targets]
    if not examples:
        raise UserError(f"{source}: nothing to train on, every response is empty")
    return examples


@dataclasses.dataclass
class Data:
    """What a run trains on and is measured on; the same on every rank."""

    examples: list[Example]
    heldout: list[Example]
    batches: list[list[int]]  # the numbers of the examples of each step


def read_data(config: Config, tokenizer: Tokenizer, max_length: int, world: World) -> Data:
    """Read the sequences, keep some out, and lay out the steps."""
    examples = read_examples(config, tokenizer, max_length, world)
    random.Random(f"held out of seed {config.seed}").shuffle(examples)
    count = min(config.heldout, len(examples) // 10)
    heldout = examples[:count]
    examples = examples[count:]
    lengths = [len(example.tokens) for example in examples]
    batches = schedule(lengths, config.batch_tokens, config.epochs, config.steps, config.seed)
    return Data(examples, heldout, batches)


def schedule(
    lengths: list[int], batch_tokens: int, epochs: int, steps: int | None, seed: int
) -> list[list[int]]:
    """The sequences of every step, by number. lengths: in tokens, of all sequences.

    Each epoch is shuffled anew, and a step ends where the next sequence would exceed
    `batch_tokens`. All of it follows from the arguments: a run's place in the data is its step
    number, and nothing else has to be saved.
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


def batch_of(step: int, data: Data, config: Config, context: int) -> list[Example]:
    """The sequences of a step (from 1), some of them at random positions below `context`.

    They are drawn anew for every step, from its number: --resume needs nothing saved.
    """
    batch = [data.examples[i] for i in data.batches[step - 1]]
    share = config.random_positions
    if share == 0:
        return batch
    rng = random.Random(f"positions {config.seed} {step - 1}")
    return [at_random_positions(example, context, share, rng) for example in batch]


def at_random_positions(
    example: Example, context: int, share: float, rng: random.Random
) -> Example:
    """With chance `share` the example at a sorted random choice of the positions 0..context-1."""
    if rng.random() >= share:
        return example
    positions = sorted(rng.sample(range(context), len(example.tokens)))
    return dataclasses.replace(example, positions=positions)


# --- training -------------------------------------------------------------------------------------


def begin(config: Config) -> tuple[Transformer, Tokenizer]:
    """The model to start from and its tokenizer. That of --model comes without its weights."""
    if config.model is not None:
        return without_weights(config.model), load_tokenizer(config.model, config.template_args)
    tokenizer = demo_tokenizer(cot.WORDS)
    return random_init(small_shape(tokenizer), config.seed), tokenizer


def small_shape(tokenizer: Tokenizer) -> ModelConfig:
    """The demo's transformer, in the style of Qwen3 and small enough for a laptop."""
    return ModelConfig(
        tokenizer.vocab_size,
        dim=96,
        layers=4,
        heads=3,
        kv_heads=1,
        head_dim=32,
        mlp_dim=288,
        family="qwen3",
        qk_norm=True,
        rope_theta=1e6,
        context=512,
        tied=True,
        eos_ids=tuple(tokenizer.eos_ids),
    )


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """The rate of a step (from 0): it rises from 0 over the first share `warmup` of the steps, then
    falls by a cosine to a tenth of the peak."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return peak * (step + 1) / rising
    progress = (step - rising) / max(1, steps - rising)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def loss_of(
    scorer: Scorer,
    examples: list[Example],
    micro_tokens: int | None,
    world: World,
    backward: bool = False,
) -> tuple[float, int]:
    """(mean negative log-likelihood, trained tokens) over all ranks; with `backward`, its gradient
    in every `.grad`.

    Every micro-batch's sum is divided by the token count of the whole step, so that adding them up,
    over micro-batches here and over ranks in FSDP, is the mean.
    """
    count = sum(example.targets for example in examples)
    total = torch.zeros((), device=world.device)
    dim = parallel.row_dim(scorer.model)
    for _, packed in parallel.micro_batches(examples, micro_tokens, dim, world):
        logprob, _ = parallel.log_probs(scorer, packed)
        loss = -logprob.sum() / count
        if backward:
            loss.backward()
        total += loss.detach()
    return parallel.sum_over_ranks(total).item(), count


def update(
    scorer: Scorer,
    optimizers: dict[str, torch.optim.Optimizer],
    batch: list[Example],
    rate: float,
    run: Run,
    config: Config,
) -> dict[str, float]:
    """One update: the gradient of the loss, no longer than --max-grad-norm, if it is finite.

    Returns the metrics of the step.
    """
    began = time.perf_counter()
    scorer.zero_grad()
    loss, count = loss_of(scorer, batch, config.micro_tokens, run.world, backward=True)
    norm = parallel.clip_grad_norm(scorer, config.max_grad_norm)
    if run.guard.allows(loss=loss, gradient=norm):
        for optimizer in optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
    seconds = time.perf_counter() - began
    return {
        "loss": loss,
        "lr": rate,
        "grad_norm": norm,
        "trained_tokens": count,
        "skipped": run.guard.skipped,
        "seconds": seconds,
        "tokens_per_second": sum(len(example.tokens) for example in batch) / seconds,
    }


def opening(config: Config, data: Data, run: Run, scorer: Scorer) -> str:
    """The first line: what is trained, on what, where, and where it is written."""
    parameters = sum(parameter.numel() for parameter in scorer.parameters())
    tokens = sum(len(example.tokens) for example in data.examples)
    return (
        f"sft: {config.model or 'random weights'}, {parameters:,} parameters; "
        f"{len(data.examples):,} sequences of {config.data or config.task}, {tokens:,} tokens, and "
        f"{len(data.heldout):,} held out; {config.batch_tokens:,} tokens a step; "
        f"{len(data.batches):,} steps, {run.done:,} of them done, on {run.world.size} x "
        f"{run.world.device.type}; writes to {run.out}"
    )


def closing(config: Config) -> str:
    """The last line: where the model is, and what to run next."""
    template = cli.changed(config, "template_args")
    source = ["--task", config.task] if config.task else ["--data", "PROBLEMS.jsonl"]
    rl = shlex.join(["--model", config.out, *source, *template, "--out", "RUN"])
    sample = shlex.join(["--model", config.out, *template])
    return (
        f"the model is in {config.out}/model; next: python rl.py {rl}, or python sample.py {sample}"
    )


PANELS = {
    "loss": ["heldout_loss", "loss"],
    "gradient norm": ["grad_norm"],
    "learning rate": ["lr"],
}


def train(config: Config, world: World) -> None:
    """A run, from its flags to OUT/model."""
    check_flags(config)
    config = runfolder.with_dtype(config, world)
    runfolder.check_run(config.out, config, config.resume, MAY_CHANGE)
    model, tokenizer = begin(config)
    tokenizer.meet(model.config.vocab_size)
    require_stop_token(tokenizer, model.config.vocab_size, config.model or "the demo's model")
    context = model.config.context
    max_length = config.max_length or context
    if config.random_positions and max_length > context:
        raise UserError(
            f"--random-positions: --max-length {max_length} is beyond the context of {context}"
        )
    dtype = getattr(torch, config.dtype)
    scorer = parallel.shard(model, world, dtype, config.recompute, config.offload)
    if config.model is not None:
        parallel.load_weights(scorer, config.model)
    data = read_data(config, tokenizer, max_length, world)
    optimizers = make_optimizers(scorer, config.optimizer, config.lr, config.weight_decay)

    with Run(config, MAY_CHANGE, world, keep=config.keep, max_skips=config.max_skips) as run:
        inputs = {"training data": cli.fingerprint((data.examples, data.heldout))}
        if config.model is not None:
            inputs["model"] = pretrained.fingerprint(config.model)
        run.check_inputs(inputs)
        run.restore({"policy": scorer} | optimizers, {})

        total = len(data.batches)
        steps = run.steps(total, "sft")
        run.say(opening(config, data, run, scorer))
        for step in steps:
            batch = batch_of(step, data, config, context)
            rate = learning_rate(step - 1, total, config.lr, config.warmup)
            metrics = update(scorer, optimizers, batch, rate, run, config)
            loss = f"{metrics['loss']:.4f}"
            measured = data.heldout and run.is_due(step, config.eval_every)
            if measured:
                with torch.no_grad():
                    heldout_loss, _ = loss_of(scorer, data.heldout, config.micro_tokens, world)
                metrics["heldout_loss"] = heldout_loss
                run.say(f"step {step}: loss {loss}, held-out {heldout_loss:.4f}")
            speed = f"{metrics['tokens_per_second']:,.0f}"
            run.record(step, metrics, shown={"loss": loss, "tokens/s": speed})
            if run.is_due(step, config.checkpoint_every):
                run.save(step, {})
            if measured:
                run.plot(PANELS)
        run.finish(scorer, tokenizer)
        run.say(closing(config))


def main(config: Config) -> None:
    with parallel.session(config.device) as world, runfolder.reserved(config.out, world):
        train(with_defaults(config), world)


if __name__ == "__main__":
    cli.run(main, Config)
