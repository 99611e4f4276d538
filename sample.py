"""The sampler: K completions per prompt, batched, with a KV cache. Also a command to try a model.

    python sample.py --model runs/demo "numbers 19 17 43, target 41"    # one streamed answer
    python sample.py --model DIR          # a chat; Ctrl-C stops an answer, Ctrl-D ends the chat
    python sample.py --model DIR "What is 3/4 of 28?" --n 8 --verify 21 # how many of 8 are right?

Rollouts are most of RL's cost, and T1 takes many per prompt (K = 64, temperature 1.2). So:

- Continuous batching: when a sequence has ended, another takes its place (see `Batch`). Hardly a
  step is spent on a sequence that has ended: none on a CPU; a GPU is asked every few steps.
- A prompt is prefilled once, all but its last token, and its keys and values are copied to the K
  rows that share it. The last token goes through the ordinary decode step of each row, so there is
  only one way to draw a token.
- The cache grows with the longest live row. Its budget is kept by running fewer rows at once.
- Each token is drawn from a counter, not from a stream: the draw depends on (seed, key, sample
  index, position) and on the logits, and on nobody else in the batch. (Matrix products round
  differently for different batch sizes. In fp32 that can change a draw only where two tokens are
  within about 1e-6 of a tie: some ten thousand draws of our tests, in other batches, see none. In
  bf16 the logits themselves differ by 1e-2, and draws do change.)
- The decode step is one function of fixed tensors that never waits for a result. On CUDA it is
  captured as a graph; on a CPU it is written for few and cheap operations (decode.py).

The log-probs are those of the very distribution the token was drawn from: after temperature, top-p
and min-p.
"""

import contextlib
import math
import re
import signal
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

import cli
import kernels
import tasks
from cli import UserError
from decode import Cache, KVCache, cache_block, make_decoder, round_up
from devices import pick_device, pick_dtype
from kernels.sampling import splitmix64
from model import Transformer, causal_attention, load_pretrained
from tasks import Problem
from tensor_parallel import least_of_team
from tokenizer import Tokenizer, load_tokenizer

GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: SplitMix64 adds it before each hash
MOST_TOKENS = 10_240
"""What a limit on responses that is left out is at most: T1's, of its 9B and 14B models."""


@dataclass(frozen=True)
class SamplingParams:
    """How to draw.

    `temperature` 0 is argmax. Top-p and min-p cut the tempered distribution. `seed` picks the
    draws.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise UserError(f"max_tokens must be at least 1, not {self.max_tokens}")
        if self.temperature != 0 and not 1e-3 <= self.temperature < float("inf"):
            # Below 0.001, logits / temperature can overflow.
            raise UserError(
                f"temperature must be 0 (argmax), or 0.001 or more, not {self.temperature}"
            )
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be in (0, 1], not {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p must be in [0, 1], not {self.min_p}")


@dataclass(frozen=True)
class Completion:
    tokens: list[int]  # the stop token included, if there is one: the policy chose it too
    logprobs: list[float]  # under the distribution each token was drawn from
    finish_reason: str  # "stop", or "length": max_tokens or the model's context ran out

    def text(self, tokenizer: Tokenizer, skip_special: bool = True) -> str:
        """What was said, without the stop token, and without other special tokens if wanted."""
        tokens = self.tokens[:-1] if self.finish_reason == "stop" else self.tokens
        return tokenizer.decode(tokens, skip_special=skip_special)


def sequence_seed(seed: int, key: int, sample: int) -> int:
    """The signed 64-bit seed of one completion: nearby numbers give unrelated seeds."""
    state = 0
    for word in (seed, key, sample):
        state = splitmix64(state + word + GOLDEN)
    return (state + 2**63) % 2**64 - 2**63


@dataclass
class Job:
    """One prompt, and the completions of it that have yet to start."""

    index: int
    prompt: list[int]
    seeds: deque[tuple[int, int]]  # (sample index, its 64-bit seed)
    prefix: Cache = field(default_factory=list)  # once prefilled; [Hkv, len(prompt) - 1, Dh] each


# --- the batch ------------------------------------------------------------------------------------


class Batch:
    """The sequences that are being decoded: rows 0 .. live - 1 of every tensor here.

    Five sequences in four slots (p: prompt, o: drawn, S: a stop token):

        row 0   p p p o o o                       row 0   p p p o o o
        row 1   p p o o o S   has ended           row 1   p o o           was row 3
        row 2   p p p p o                 ->      row 2   p p p p o
        row 3   p o o                             row 3   p p             the next sequence
        live = 4                                  live = 4

    `harvest` takes row 1 away and moves the last row into the hole, so that the live rows stay
    together, and a step's cost is that of the live rows. `add` starts the next sequence behind
    them. What stands in rows from `live` on is garbage that nobody reads.

    A row has position + 1 tokens. The last of them has not been through the model yet: a decode
    step takes it, writes its key and value into the cache, and draws the token that follows it.

    slots: rows at most. limit: tokens of a sequence at most, its prompt included. pack: see
    decode.CPUDecoder.
    """

    def __init__(
        self,
        model: Transformer,
        params: SamplingParams,
        eos_ids: list[int],
        slots: int,
        limit: int,
        pack: bool = False,
    ) -> None:
        weight = model.head_weight
        device = weight.device
        self.params = params
        self.slots = slots
        self.limit = limit
        self.live = 0
        self.longest = 0  # no live row's position is above it
        self.owners: list[tuple[int, int]] = []  # row -> (prompt index, sample index)

        self.row = torch.arange(slots, device=device)
        self.position = torch.zeros_like(self.row)  # of the row's last token
        self.start = torch.zeros_like(self.row)  # position of its first drawn token
        self.end = torch.zeros_like(self.row)  # how many tokens it may have, with its prompt
        self.seed = torch.zeros_like(self.row)
        self.done = torch.ones_like(self.row, dtype=torch.bool)
        self.eos = torch.tensor(sorted(eos_ids), dtype=torch.int64, device=device)
        self.tokens = torch.zeros(slots, limit + 1, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(slots, limit + 1, dtype=torch.float32, device=device)

        self.decoder = make_decoder(model, pack)
        self.cache = KVCache(self.decoder, limit)
        self.bound: tuple[int, int] | None = None  # rows and length that `decoder` works on
        self.cuda = weight.is_cuda
        self.graphs: dict[tuple[int, int], torch.cuda.CUDAGraph | None] = {}

    def add(self, job: Job, count: int) -> None:
        """Start `count` completions of a prefilled job. The cache must have room for them."""
        rows = slice(self.live, self.live + count)
        last = len(job.prompt) - 1
        self.cache.write(rows, job.prefix)
        started = [job.seeds.popleft() for _ in range(count)]
        self.owners += [(job.index, sample) for sample, _ in started]
        self.seed[rows] = torch.tensor([seed for _, seed in started], device=self.seed.device)
        self.tokens[rows, : last + 1] = torch.tensor(job.prompt, device=self.tokens.device)
        self.position[rows] = last
        self.start[rows] = last + 1
        self.end[rows] = min(last + 1 + self.params.max_tokens, self.limit)
        self.done[rows] = False
        self.live += count
        self.longest = max(self.longest, last)

    def reserve(self, rows: int, length: int) -> None:
        """Make room in the cache for `rows` rows of `length` positions."""
        if self.cache.holds(rows, length):
            return
        # The cache will move. Graphs read the old tensors, and the decoder would keep them alive.
        self.graphs.clear()
        self.decoder.bind([])
        self.bound = None
        if self.cuda:
            self.pool = torch.cuda.graph_pool_handle()  # the old one died with the last graph
        self.cache.grow(rows, length, keep=self.live)

    def decode(self) -> None:
        """One token for every live row. A row that has ended stands still until `harvest`."""
        rows = self.live
        if self.cuda:
            rows = min(round_up(rows, 8), self.slots)  # fewer shapes, so fewer graphs
        length = round_up(self.longest + 1, self.cache.block)
        self.reserve(rows, length)
        if self.bound != (rows, length):
            self.decoder.bind(self.cache.view(rows, length))
            self.bound = (rows, length)
        if self.cuda:
            self.replay(rows, length)
        else:
            self.step(rows)
        # Counted here, because asking the device would mean to wait for it.
        self.longest = min(self.longest + 1, self.limit - 1)

    def step(self, rows: int) -> None:
        """The decode step on rows 0 .. rows - 1. It reads and writes tensors, and nothing else."""
        row = self.row[:rows]
        position = self.position[:rows]
        done = self.done[:rows]
        params = self.params
        logits = self.decoder(self.tokens[row, position], position)
        following = position + 1
        token, logprob = kernels.sample_token(
            logits,
            params.temperature,
            params.top_p,
            params.min_p,
            self.seed[:rows],
            following - self.start[:rows],
        )
        # A row that is done writes just past its end, where nobody reads.
        self.tokens[row, following] = token
        self.logprobs[row, following] = logprob
        position += ~done
        done |= torch.isin(token, self.eos) | (following + 1 >= self.end[:rows])

    def replay(self, rows: int, length: int) -> None:
        """The decode step as a CUDA graph, one for each shape. (Not yet measured on a GPU.)

        The first step of a shape runs without one, which warms up what a capture needs. The second
        is captured; from then on the graph is replayed.
        """
        shape = (rows, length)
        if shape not in self.graphs:
            self.graphs[shape] = None
            self.step(rows)
            return
        if self.graphs[shape] is None:
            graph = torch.cuda.CUDAGraph()
            # One pool of memory serves all graphs, because only one of them runs at a time.
            with torch.cuda.graph(graph, pool=self.pool):
                self.step(rows)
            self.graphs[shape] = graph
        self.graphs[shape].replay()

    def harvest(self) -> list[tuple[tuple[int, int], Completion]]:
        """Take away the rows that have ended; (owner, completion) of each."""
        ended = self.done[: self.live].nonzero().flatten().tolist()  # this waits for the device
        if not ended:
            return []
        width = self.longest + 1
        tokens = self.tokens[ended, :width].tolist()
        logprobs = self.logprobs[ended, :width].tolist()
        starts = self.start[ended].tolist()
        lasts = self.position[ended].tolist()
        eos = set(self.eos.tolist())
        harvested = []
        for i, row in enumerate(ended):
            drawn = slice(starts[i], lasts[i] + 1)
            reason = "stop" if tokens[i][lasts[i]] in eos else "length"
            completion = Completion(tokens[i][drawn], logprobs[i][drawn], reason)
            harvested.append((self.owners[row], completion))
        self.remove(ended)
        return harvested

    def remove(self, ended: list[int]) -> None:
        """Move the last rows into the holes that the ended ones leave."""
        live = self.live - len(ended)
        holes = [row for row in ended if row < live]
        movers = sorted(set(range(live, self.live)) - set(ended))  # as many as there are holes
        if holes:
            rows = (self.position, self.start, self.end, self.seed, self.done)
            for tensor in (*rows, self.tokens, self.logprobs):
                tensor[holes] = tensor[movers]
            self.cache.move_rows(movers, holes, self.longest + 1)
            for hole, mover in zip(holes, movers):
                self.owners[hole] = self.owners[mover]
        del self.owners[live:]
        # A CUDA step may compute some rows beyond `live`: they stand still, at a place that exists.
        self.done[live : self.live] = True
        self.position[live : self.live] = 0
        self.live = live
        self.longest = 0
        if live:
            self.longest = int(self.position[:live].max())


# --- prompts that wait for their turn -------------------------------------------------------------


class Queue:
    """The jobs with completions to start, the longest prompts first.

    A job is `waiting` until its prompt is prefilled, then `ready` until its last completion has
    started. chunk: tokens, padding included, that one prefill may hold, and so the keys and values
    of all that are ready.
    """

    def __init__(self, model: Transformer, jobs: list[Job], chunk: int) -> None:
        self.model = model
        self.chunk = chunk
        self.waiting = deque(sorted(jobs, key=lambda job: -len(job.prompt)))
        self.ready: deque[Job] = deque()
        self.unstarted = sum(len(job.seeds) for job in jobs)  # completions

    def refill(self, batch: Batch) -> None:
        """Start completions until every slot is taken."""
        while batch.live < batch.slots and self.unstarted:
            if not self.ready:
                self.prefill_next()
            job = self.ready[0]
            count = min(len(job.seeds), batch.slots - batch.live)
            # Room for all that will start in this call: the cache then moves once, not job by job.
            rows = min(batch.slots, batch.live + self.unstarted)
            batch.reserve(rows, max(len(job.prompt), batch.longest + 1))
            batch.add(job, count)
            self.unstarted -= count
            if not job.seeds:
                job.prefix = []  # frees its keys and values
                self.ready.popleft()

    def prefill_next(self) -> None:
        """Prefill as many of the waiting prompts as fit into one chunk, and one at least."""
        jobs = [self.waiting.popleft()]
        width = len(jobs[0].prompt)  # no later prompt is longer
        while self.waiting and (len(jobs) + 1) * width <= self.chunk:
            jobs.append(self.waiting.popleft())
        prefill(self.model, jobs)
        self.ready.extend(jobs)


def prefill(model: Transformer, jobs: list[Job]) -> None:
    """Keys and values of every prompt's tokens but the last, in one padded forward."""
    width = max(len(job.prompt) for job in jobs) - 1
    if width == 0:
        return
    # Padding stands on the right, where causal attention cannot see it: no mask is needed.
    rows = []
    for job in jobs:
        padding = [0] * (width + 1 - len(job.prompt))
        rows.append(job.prompt[:-1] + padding)
    tokens = torch.tensor(rows, device=model.head_weight.device)
    positions = torch.arange(width, device=tokens.device).expand_as(tokens)
    layers = []

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # A copy, because k and v are views that keep all of the layer's projections alive.
        layers.append(torch.stack((k, v)).unbind())
        return causal_attention(None, layer, q, k, v)

    model(tokens, positions=positions, attend=attend)
    for i, job in enumerate(jobs):
        length = len(job.prompt) - 1
        job.prefix = [(k[i, :, :length], v[i, :, :length]) for k, v in layers]


# --- the sampler ----------------------------------------------------------------------------------


class Sampler:
    """Samples from `model`, with the weights it has at the time of the call.

    Nothing that is cached outlives one `generate`.

    max_batch: sequences decoded at once, at most. eos_ids: the tokens that end a completion
    (default: the tokenizer's). cache_bytes: what keys and values may take (default: half of the
    memory that is free when `generate` starts); where that is little, fewer sequences run at once.
    On a CPU, a second copy of the weights comes on top while `generate` runs, if there is room.
    prefill_tokens: prompt tokens in one forward, unless a single prompt is longer.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None = None,
        max_batch: int = 256,
        eos_ids: list[int] | None = None,
        cache_bytes: int | None = None,
        prefill_tokens: int | None = None,
    ) -> None:
        if max_batch < 1:
            raise UserError(f"max_batch must be at least 1, not {max_batch}")
        if eos_ids is None:
            eos_ids = tokenizer.eos_ids if tokenizer else []
        if not prefill_tokens:
            prefill_tokens = 4096 if model.head_weight.is_cuda else 1024  # a CPU has small caches
        self.model = model
        self.max_batch = max_batch
        self.eos_ids = list(eos_ids)
        self.cache_bytes = cache_bytes
        self.prefill_tokens = prefill_tokens

    @torch.inference_mode()
    def generate(
        self,
        prompts: list[list[int]],
        n: int,
        params: SamplingParams,
        keys: list[int] | None = None,
        firsts: list[int] | None = None,
        progress: bool = False,
    ) -> list[list[Completion]]:
        """n completions of each prompt: [prompt][sample].

        Completion j of prompt i is drawn with (params.seed, keys[i], firsts[i] + j). keys: default
        0, 1, 2, ...; firsts: default 0. Ranks that split the prompts, or the samples of one prompt,
        give global numbers, and draw what one rank would draw.

        A completion ends at the model's context even where max_tokens is more. UserError: an empty
        prompt, one that fills the context, or one whose completion cannot fit in `cache_bytes`.
        """
        keys = range(len(prompts)) if keys is None else keys
        firsts = [0] * len(prompts) if firsts is None else firsts
        jobs = []
        for i, (prompt, key, first) in enumerate(zip(prompts, keys, firsts, strict=True)):
            seeds = [(j, sequence_seed(params.seed, key, first + j)) for j in range(n)]
            jobs.append(Job(i, prompt, deque(seeds)))
        results: list[list[Completion]] = [[None] * n for _ in prompts]
        if not jobs or n < 1:
            return results

        batch, queue = self.prepare(jobs, params)
        # On CUDA a look at who has ended waits for the device: it is taken every eight steps.
        steps = 8 if batch.cuda else 1
        generated = 0
        with tqdm(total=len(prompts) * n, desc="sampling", unit="seq", disable=not progress) as bar:
            while batch.live or queue.unstarted:
                queue.refill(batch)
                for _ in range(steps):
                    batch.decode()
                for (i, j), completion in batch.harvest():
                    results[i][j] = completion
                    generated += len(completion.tokens)
                    bar.update()
                seconds = bar.format_dict["elapsed"]
                if seconds:
                    bar.set_postfix_str(f"{generated / seconds:.0f} tok/s", refresh=False)
        return results

    @torch.inference_mode()
    def stream(self, prompt: list[int], params: SamplingParams) -> Iterator[int]:
        """The tokens of `generate([prompt], 1, params)[0][0]`, each as soon as it is drawn."""
        job = Job(0, prompt, deque([(0, sequence_seed(params.seed, 0, 0))]))
        batch, queue = self.prepare([job], params)
        queue.refill(batch)
        while not batch.done[0]:
            batch.decode()
            yield int(batch.tokens[0, batch.position[0]])

    def prepare(self, jobs: list[Job], params: SamplingParams) -> tuple[Batch, Queue]:
        """An empty batch of as many slots as the memory allows, and the queue that fills it.

        Memory is counted in cached positions, of a key and a value in every layer:

            slots * row + chunk <= budget

        row: a sequence at its longest; chunk: prompts that are prefilled. Counting every row at its
        longest wastes some of a small budget, but no sequence is ever thrown out half-way.
        """
        config = self.model.config
        weight = self.model.head_weight
        lengths = [len(job.prompt) for job in jobs]
        longest = max(lengths)
        if min(lengths) < 1:
            raise UserError("cannot sample from an empty prompt")
        if longest >= config.context:
            raise UserError(
                f"a prompt of {longest} tokens fills the model's context of {config.context}"
            )
        limit = min(longest + params.max_tokens, config.context)

        # One layer more than there are: when the cache grows, one layer at a time is there twice.
        numbers = 2 * (config.layers + 1) * config.kv_heads * config.head_dim
        position_bytes = numbers * weight.element_size()
        free = least_of_team(self.model, free_memory(weight.device))
        budget = (self.cache_bytes or free // 2) // position_bytes
        row = round_up(limit, cache_block(weight.device))
        if row + longest > budget:
            needed = (row + longest) * position_bytes
            raise UserError(f"a sequence of {limit} tokens needs {needed:,} bytes of KV cache")
        chunk = max(longest, min(self.prefill_tokens, budget // 4))
        chunk = min(chunk, budget - row)
        total = sum(len(job.seeds) for job in jobs)
        slots = min(self.max_batch, total, (budget - chunk) // row)

        # Packing pays after some seven steps. Its copy of the weights comes out of the memory that
        # the cache leaves; a quarter of what is free, at most.
        several_steps = total * params.max_tokens > 8 * slots
        weight_bytes = sum(parameter.nbytes for parameter in self.model.parameters())
        pack = slots > 1 and several_steps and 4 * weight_bytes < free
        batch = Batch(self.model, params, self.eos_ids, slots, limit, pack)
        return batch, Queue(self.model, jobs, chunk)


def free_memory(device: torch.device) -> int:
    """Bytes that can be had now, also those that torch or the page cache could give back."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    return int(min(machine_memory(Path("/")), container_memory(Path("/"))))


def machine_memory(root: Path) -> int:
    """Bytes that the machine can give. root: the file system's, which only a test replaces."""
    try:
        text = (root / "proc/meminfo").read_text()
        return int(re.search(r"MemAvailable: +(\d+) kB", text)[1]) * 1024
    except (OSError, TypeError):
        return 8 * 2**30  # not Linux: a guess


def container_memory(root: Path) -> float:
    """Bytes that the control groups of this process leave to it; inf without a limit.

    A container's memory is a limit on its group, of which /proc/meminfo knows nothing. Groups lie
    within groups, and a limit holds for all within: the least counts. root: as above.
    """
    least = math.inf
    try:
        text = (root / "proc/self/cgroup").read_text()
    except OSError:
        return least  # not Linux
    for controllers, path in re.findall(r"^\d+:([^:]*):(.*)$", text, re.MULTILINE):
        if not controllers:  # control groups of version 2, alone or beside those of version 1
            mounts, limit, usage, total = ("", "unified"), "memory.max", "memory.current", ""
        elif "memory" in controllers.split(","):
            mounts, total = ("memory",), "total_"
            limit, usage = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        for mount in mounts:
            # From the root down. In a container the path may be the host's: the root is there.
            folder = root / "sys/fs/cgroup" / mount
            for part in ("", *Path(path).parts[1:]):
                folder = folder / part
                least = min(least, room_in_group(folder, limit, usage, total))
    return least


def room_in_group(folder: Path, limit: str, usage: str, total: str) -> float:
    """Bytes below a group's limit; inf without one. limit, usage: files of the group.

    Cached files count as used, but the kernel gives them up before it kills. total: what the names
    of their sizes begin with.
    """
    try:
        room = int((folder / limit).read_text()) - int((folder / usage).read_text())
    except (OSError, ValueError):  # no such group here, or "max"
        return math.inf
    cached = 0
    with contextlib.suppress(OSError):
        text = (folder / "memory.stat").read_text()
        sizes = re.findall(rf"^{total}(?:in)?active_file (\d+)$", text, re.MULTILINE)
        cached = sum(map(int, sizes))
    return max(0, room + cached)


# --- the command ----------------------------------------------------------------------------------


@dataclass
class Config:
    model: str
    """Folder of a run (runs/demo) or a Hugging Face folder."""
    question: tyro.conf.Positional[str | None] = None
    """What to ask, put as it is. None: a chat."""
    n: int = 1
    """Answers to sample; more than one are shown when all are done."""
    verify: str | None = None
    """The right answer: show a verdict on each of the n. (A countdown is judged by the target in
    its question.)"""
    max_tokens: int | None = None
    """Longest answer. None: what the model's context has room for, 10,240 at most."""
    temperature: float = 0.7
    """0: always the likeliest token. 1: the policy itself. T1 explores at 1.2 in training."""
    top_p: float = 1.0
    """Keep the likeliest tokens that together have this probability. 0.95 is usual for maths."""
    min_p: float = 0.0
    """Drop tokens below this share of the likeliest one's probability."""
    seed: int = 0
    """The same seed gives the same answers."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU where there is one."""
    template_args: str = ""
    """JSON that the chat template is to know, such as '{"enable_thinking": false}'."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 on a GPU that has it, which halves what a step has to read; else float32."""


def main(config: Config) -> None:
    check_flags(config)
    device = pick_device(config.device)
    dtype = getattr(torch, pick_dtype(config.dtype, device))
    tokenizer = load_tokenizer(config.model, config.template_args)
    sampler = Sampler(load_pretrained(config.model, dtype, device), tokenizer)
    most = config.max_tokens
    if most is None:
        most = MOST_TOKENS  # the sampler ends earlier where the context does
    params = SamplingParams(most, config.temperature, config.top_p, config.min_p, config.seed)
    if config.question is None:
        chat(sampler, tokenizer, params)
    elif config.n > 1 or config.verify is not None:
        show_verdicts(sampler, tokenizer, params, config)
    else:
        prompt = tokenizer.chat([{"role": "user", "content": config.question}])
        answer(sampler, tokenizer, prompt, params)


def check_flags(config: Config) -> None:
    if config.n < 1:
        raise UserError(f"--n must be at least 1, not {config.n}")
    if config.question is None and (config.n > 1 or config.verify is not None):
        raise UserError("--n and --verify need a question")


def answer(
    sampler: Sampler, tokenizer: Tokenizer, prompt: list[int], params: SamplingParams
) -> str:
    """Print an answer as it is drawn, and return it. A line on stderr says if it was cut off."""
    drawn: list[int] = []

    def watched() -> Iterator[int]:
        for token in sampler.stream(prompt, params):
            drawn.append(token)
            yield token

    said = show(tokenizer, watched())
    room = sampler.model.config.context - len(prompt)
    if len(drawn) == min(room, params.max_tokens) and drawn[-1] not in sampler.eos_ids:
        print(f"[{cut_off(len(drawn), room)}]", file=sys.stderr)
    return said


def cut_off(count: int, room: int) -> str:
    """What to say of an answer of `count` tokens that has no end; `room`: behind its prompt."""
    if count < room:
        return f"cut off at --max-tokens {count:,}"
    return f"cut off after {count:,} tokens: the model's context is full"


def show(tokenizer: Tokenizer, tokens: Iterator[int]) -> str:
    """Print the text as its tokens come, and return it. Ctrl-C ends it where it is."""
    said = ""
    before: list[int] = []  # printed last: SentencePiece drops the space that begins a text
    pending: list[int] = []  # tokens that are not printed yet: a character may have several

    def new_text() -> str:
        known = tokenizer.decode(before, skip_special=True)
        return tokenizer.decode(before + pending, skip_special=True).removeprefix(known)

    try:
        for token in tokens:
            pending.append(token)
            text = new_text()
            if text and not text.endswith("\ufffd"):
                print(text, end="", flush=True)
                said += text
                before, pending = pending, []
    except KeyboardInterrupt:
        pass
    print(flush=True)
    return said + new_text()


def chat(sampler: Sampler, tokenizer: Tokenizer, params: SamplingParams) -> None:
    """Questions from the terminal until Ctrl-D. Old turns are forgotten to leave room to answer."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # each Ctrl-C stops one answer
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # this ends the chat, and not an answer
    messages: list[dict] = []
    context = sampler.model.config.context
    room = min(params.max_tokens, context // 4)
    while True:
        try:
            question = input("> ").strip()
        except KeyboardInterrupt:
            continue  # it was meant for the answer, and came too late
        except EOFError:
            return
        if not question:
            continue
        messages.append({"role": "user", "content": question})
        prompt = tokenizer.chat(messages)
        while len(prompt) + room > context and len(messages) > 1:
            del messages[:2]  # the oldest question and its answer
            prompt = tokenizer.chat(messages)
        turn = replace(params, seed=params.seed + len(messages))
        try:
            said = answer(sampler, tokenizer, prompt, turn)
        except UserError as error:  # this question alone is too long
            print(f"error: {error}")
            messages.pop()
        else:
            messages.append({"role": "assistant", "content": said})


def show_verdicts(
    sampler: Sampler, tokenizer: Tokenizer, params: SamplingParams, config: Config
) -> None:
    """n answers to one question, and with --verify how many of them are right."""
    judged = config.verify is not None
    problem = problem_of(config.question, config.verify or "")
    messages = [{"role": "user", "content": config.question}]
    if judged:
        messages = tasks.messages(problem)
    prompt = tokenizer.chat(messages)
    completions = sampler.generate([prompt], config.n, params, progress=True)[0]
    answers = [completion.text(tokenizer) for completion in completions]
    outcomes = [""] * config.n
    if judged:
        verdicts = tasks.judge_all([problem] * config.n, answers)
        outcomes = [f", {verdict.outcome}" for verdict in verdicts]
    room = sampler.model.config.context - len(prompt)
    for i, completion in enumerate(completions):
        count = len(completion.tokens)
        length = f"{count} tokens"
        if completion.finish_reason == "length":
            length = cut_off(count, room)
        print(f"--- {i + 1}: {length}{outcomes[i]}\n{answers[i].strip()}")
    if judged:
        right = sum(verdict.correct for verdict in verdicts)
        print(f"--- {right} of {config.n} right")


def problem_of(question: str, answer: str) -> Problem:
    """The problem that a question puts; a countdown is recognised by its form."""
    form = r"numbers (\d+(?: \d+)+), target (\d+)(?:, operators ([-+*/ ]+))?"
    countdown = re.fullmatch(form, question)
    if not countdown:
        return Problem(question, answer)
    numbers, target, operators = countdown.groups(default="+-*")
    numbers = [int(number) for number in numbers.split()]
    return tasks.countdown_problem(numbers, int(target), operators.replace(" ", ""))


if __name__ == "__main__":
    cli.run(main, Config)
