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
- The cache grows with the longest live row, and as many rows run as fit at present. As they grow,
  the shortest are evicted: they wait, are prefilled once more, and go on as if nothing had been.
- Each token is drawn from a counter, not from a stream: the draw depends on (seed, key, sample
  index, position) and on the logits, and on nobody else in the batch. (Matrix products round
  differently for different batch sizes. In fp32 that can change a draw only where two tokens are
  within about 1e-6 of a tie: some ten thousand draws of our tests, in other batches, see none. In
  bf16 the logits themselves differ by 1e-2, and draws do change.)
- The decode step is one function of fixed tensors that never waits for a result. On CUDA it is
  captured as a graph, which serves until the tensors move, so for many calls; on a CPU it is
  written for few and cheap operations (decode.py).

The log-probs are those of the very distribution the token was drawn from: after temperature, top-p
and min-p.
"""

import contextlib
import math
import re
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
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
from decode import Cache, GPUDecoder, KVCache, ModelDecoder, cache_block, make_decoder, round_up
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
class Sequence:
    """One completion that is not ready yet."""

    index: int  # of its prompt
    sample: int  # which of the prompt's completions
    seed: int
    start: int  # the position of its first drawn token, so the length of its prompt
    tokens: list[int]  # its prompt's and, if it was evicted, those drawn until then
    logprobs: list[float] = field(default_factory=list)  # of those drawn


@dataclass
class Job:
    """One prompt, and the completions of it that have yet to start."""

    prompt: list[int]
    sequences: deque[Sequence]
    prefix: Cache = field(default_factory=list)  # once prefilled; [Hkv, len(prompt) - 1, Dh] each


# --- the batch ------------------------------------------------------------------------------------


@dataclass
class Captured:
    """A decode step of one shape as a CUDA graph (None until it is captured).

    A graph knows addresses, and keeps nothing alive: the decoder is here so that what `bind` made
    for this shape lives as long as the graph.
    """

    decoder: ModelDecoder | GPUDecoder
    graph: torch.cuda.CUDAGraph | None = None


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

    Rows share the cache's budget, and all have room for the longest. As they grow, fewer fit:
    `evict` takes the shortest away, to be started again later. `room` says how many may start.

    On CUDA a step depends on the number of rows and on where the tensors lie, and on nothing else
    that the host knows. It is captured once for each of a few numbers of rows (`bucket`). The
    graphs are valid until the cache or the weights move: a batch can be used again (`restart`).

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
        self.most = slots  # rows that there are; a call may want fewer
        self.widest = limit
        self.eos_ids = set(eos_ids)
        self.weights = addresses(model)

        self.row = torch.arange(slots, device=device)
        # Of each row: the position of its last token, that of its first drawn one, how many tokens
        # it may have with its prompt, and its seed. In one tensor, so that one operation moves all.
        self.state = torch.zeros(4, slots, dtype=torch.int64, device=device)
        self.position, self.start, self.end, self.seed = self.state
        self.done = torch.ones(slots, dtype=torch.bool, device=device)
        self.eos = torch.tensor(sorted(self.eos_ids), dtype=torch.int64, device=device)
        # By position, where they were drawn in this batch; and the last token of each row.
        self.tokens = torch.zeros(slots, limit + 1, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(slots, limit + 1, dtype=torch.float32, device=device)

        self.decoder = make_decoder(model, pack)
        self.cache = KVCache(self.decoder)
        self.bound: tuple[int, int] | None = None  # rows and length that `decoder` works on
        self.captures = can_capture(device)
        self.graphs: dict[tuple, Captured] = {}
        self.restart(params, slots, limit, slots * round_up(limit, self.cache.block))

    def restart(self, params: SamplingParams, slots: int, limit: int, budget: int) -> None:
        """Forget all sequences. budget: see KVCache.

        slots, limit: at most those that it was made with. What is decided from here on depends on
        these numbers, and no more on those: so a batch that is used again does as a new one does.
        """
        self.params = params
        self.slots = slots
        self.limit = limit
        self.live = 0
        self.longest = 0  # no live row's position is above it
        self.sequences: list[Sequence] = []  # of the live rows
        self.position.zero_()
        self.done.fill_(True)
        self.cache.restart(limit, budget)

    def serves(self, model: Transformer, eos_ids: list[int], slots: int, limit: int) -> bool:
        """Whether it can be used again for this, graphs and all."""
        fits = slots <= self.most and limit <= self.widest
        return fits and set(eos_ids) == self.eos_ids and addresses(model) == self.weights

    def room(self, length: int) -> int:
        """How many rows there may be once a sequence of `length` tokens has started.

        As many as fit at twice the length of the longest: so a sequence that is evicted has drawn
        at least as many tokens as the longest one had when it started. What is prefilled again
        is, over a whole generation, at most two tokens for each one drawn.
        """
        longest = max(self.longest + 1, length)
        return min(self.slots, self.cache.most_rows(2 * longest))

    def add(self, sequences: list[Sequence]) -> slice:
        """Start sequences, and return their rows. The cache must have room for them.

        The caller writes the keys and values of all their tokens but the last.
        """
        rows = slice(self.live, self.live + len(sequences))
        columns = []
        for sequence in sequences:
            last = len(sequence.tokens) - 1
            end = min(sequence.start + self.params.max_tokens, self.limit)
            columns.append((last, sequence.start, end, sequence.seed, sequence.tokens[-1]))
            self.longest = max(self.longest, last)
        columns = torch.tensor(columns, device=self.state.device).T
        self.state[:, rows] = columns[:4]
        self.tokens[self.row[rows], self.position[rows]] = columns[4]
        self.done[rows] = False
        self.sequences += sequences
        self.live += len(sequences)
        return rows

    def reserve(self, rows: int, length: int) -> None:
        """Make room in the cache for `rows` rows of `length` positions, which must fit its budget.

        What a bucket adds to the rows gets room, too.
        """
        capacity = self.cache.capacity_for(rows, length)
        rows = self.bucket(rows, capacity)
        if self.cache.holds(rows, capacity):
            if capacity == self.cache.capacity:
                return
        else:
            # The cache will move. Graphs read the old tensors, and decoders keep them alive.
            self.graphs.clear()
            self.decoder.bind([])
            if self.captures:
                self.pool = torch.cuda.graph_pool_handle()  # the old one died with the last graph
        self.bound = None
        self.cache.lay_out(rows, capacity, keep=self.live)

    def bucket(self, rows: int, capacity: int) -> int:
        """Rows that a step computes for `rows` live ones. On CUDA few numbers, so few graphs."""
        if not self.captures:
            return rows
        bucket = round_up(rows, 64)
        for small in (32, 16, 8):
            if rows <= small:
                bucket = small
        return min(bucket, self.slots, self.cache.budget // capacity)

    def decode(self) -> None:
        """One token for every live row. A row that has ended stands still until `harvest`."""
        self.reserve(self.live, self.longest + 1)
        if self.captures:
            self.replay()
        else:
            length = round_up(self.longest + 1, self.cache.block)
            if self.bound != (self.live, length):
                self.decoder.bind(self.cache.view(self.live, length))
                self.bound = (self.live, length)
            self.step(self.live)
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
        # Not torch.isin: with many stop tokens it sorts, and then it waits for the result.
        stopped = (token[:, None] == self.eos).any(1)
        done |= stopped | (following + 1 >= self.end[:rows])

    def replay(self) -> None:
        """The decode step as a CUDA graph, one for each shape.

        The first step of a shape runs without one, which warms up what a capture needs. The second
        is captured; from then on the graph is replayed.
        """
        capacity = self.cache.capacity
        rows = self.bucket(self.live, capacity)
        params = self.params
        # The numbers of the draw are arguments of its kernel: a graph holds them as they were.
        key = (rows, capacity, params.temperature, params.top_p, params.min_p)
        captured = self.graphs.get(key)
        if captured is None:
            captured = self.graphs[key] = Captured(copy(self.decoder))
            captured.decoder.bind(self.cache.view(rows, capacity))
            self.decoder = captured.decoder
            self.step(rows)
            return
        self.decoder = captured.decoder
        if captured.graph is None:
            captured.graph = torch.cuda.CUDAGraph()
            # One pool of memory serves all graphs, because only one of them runs at a time. Other
            # threads may use CUDA meanwhile: one of them writes checkpoints.
            mode = {"pool": self.pool, "capture_error_mode": "thread_local"}
            with torch.cuda.graph(captured.graph, **mode):
                self.step(rows)
        captured.graph.replay()

    def harvest(self) -> list[tuple[Sequence, Completion]]:
        """Take away the rows that have ended."""
        done = self.done[: self.live].tolist()  # this waits for the device
        ended = [row for row in range(self.live) if done[row]]
        if not ended:
            return []
        positions = self.position[: self.live].tolist()
        harvested = []
        for sequence in self.take(ended, positions):
            tokens = sequence.tokens[sequence.start :]
            reason = "stop" if tokens[-1] in self.eos_ids else "length"
            harvested.append((sequence, Completion(tokens, sequence.logprobs, reason)))
        return harvested

    def evict(self, count: int) -> list[Sequence]:
        """Take away `count` live rows that have not ended: the shortest ones.

        They are the cheapest to prefill again. The longest stays, so it will end.
        """
        positions = self.position[: self.live].tolist()
        rows = sorted(range(self.live), key=positions.__getitem__)[:count]
        return self.take(sorted(rows), positions)

    def take(self, rows: list[int], positions: list[int]) -> list[Sequence]:
        """Remove rows; their sequences, with what they have drawn. positions: of the live rows."""
        index = torch.tensor(rows, device=self.state.device)
        width = max(positions[row] for row in rows) + 1
        tokens = self.tokens[index, :width].tolist()
        logprobs = self.logprobs[index, :width].tolist()
        taken = []
        for i, row in enumerate(rows):
            sequence = self.sequences[row]
            drawn = slice(len(sequence.tokens), positions[row] + 1)
            sequence.tokens = sequence.tokens + tokens[i][drawn]  # a new list: the old is a prompt
            sequence.logprobs += logprobs[i][drawn]
            taken.append(sequence)
        gone = set(rows)
        self.remove(rows, gone)
        staying = [position for row, position in enumerate(positions) if row not in gone]
        self.longest = max(staying, default=0)
        return taken

    def remove(self, rows: list[int], gone: set[int]) -> None:
        """Move the last rows into the holes that `rows` (as a set: `gone`) leave."""
        live = self.live - len(rows)
        holes = [row for row in rows if row < live]
        movers = [row for row in range(live, self.live) if row not in gone]  # as many as holes
        if holes:
            targets, sources = torch.tensor([holes, movers], device=self.state.device)
            length = self.longest + 1
            self.state[:, targets] = self.state[:, sources]
            self.tokens[targets, :length] = self.tokens[sources, :length]
            self.logprobs[targets, :length] = self.logprobs[sources, :length]
            self.cache.move_rows(sources, targets, length)
            for hole, mover in zip(holes, movers):
                self.sequences[hole] = self.sequences[mover]
        del self.sequences[live:]
        self.done[:live] = False
        # A CUDA step may compute some rows beyond `live`: they stand still, at a place that exists.
        self.done[live : self.live] = True
        self.position[live : self.live] = 0
        self.live = live


def can_capture(device: torch.device) -> bool:
    """Whether the decode step becomes a CUDA graph."""
    return device.type == "cuda"


def addresses(model: Transformer) -> list[int]:
    """Where the weights lie in memory."""
    return [parameter.data_ptr() for parameter in model.parameters()]


# --- prompts that wait for their turn -------------------------------------------------------------


class Queue:
    """The completions that have yet to start, those with the longest prompts first.

    A job is `waiting` until its prompt is prefilled, then `ready` until its last completion has
    started. Completions that were evicted come last: they have the least left to do.

    chunk: tokens, padding included, that one prefill may hold, and so the keys and values of all
    that are ready.
    """

    def __init__(self, model: Transformer, jobs: list[Job], chunk: int) -> None:
        self.model = model
        self.chunk = chunk
        self.waiting = deque(sorted(jobs, key=lambda job: -len(job.prompt)))
        self.ready: deque[Job] = deque()
        self.evicted: list[Sequence] = []  # the longest first
        self.unstarted = sum(len(job.sequences) for job in jobs)  # completions, evicted ones too

    def refill(self, batch: Batch) -> None:
        """Start completions until there is no more room."""
        while self.ready or self.waiting:
            job = (self.ready or self.waiting)[0]
            rows = min(batch.room(len(job.prompt)), batch.live + self.unstarted)
            if rows <= batch.live:
                return
            if not self.ready:
                self.prefill_next()
            # Room for all that will start in this call: the cache then moves once, not job by job.
            batch.reserve(rows, max(len(job.prompt), batch.longest + 1))
            count = min(len(job.sequences), rows - batch.live)
            started = [job.sequences.popleft() for _ in range(count)]
            batch.cache.write(batch.add(started), job.prefix)
            self.unstarted -= count
            if not job.sequences:
                job.prefix = []  # frees its keys and values
                self.ready.popleft()
        self.resume(batch)

    def resume(self, batch: Batch) -> None:
        """Start evicted completions again, each where it was."""
        while self.evicted:
            length = len(self.evicted[0].tokens)
            rows = min(batch.room(length), batch.live + len(self.evicted))
            if rows <= batch.live:
                return
            batch.reserve(rows, max(length, batch.longest + 1))
            count = min(rows - batch.live, max(1, self.chunk // length))
            sequences = self.evicted[:count]
            del self.evicted[:count]
            # Keys and values go straight into the cache: the budget has no room for them twice.
            write = partial(batch.cache.write_layer, batch.add(sequences))
            prefill(self.model, [sequence.tokens for sequence in sequences], write)
            self.unstarted -= count

    def evict(self, batch: Batch, steps: int) -> None:
        """Take back the completions that leave no room for `steps` steps of the others."""
        count = batch.live - batch.cache.most_rows(batch.longest + steps)
        if count > 0:
            self.evicted += batch.evict(count)
            self.evicted.sort(key=lambda sequence: -len(sequence.tokens))
            self.unstarted += count

    def prefill_next(self) -> None:
        """Prefill as many of the waiting prompts as fit into one chunk, and one at least."""
        jobs = [self.waiting.popleft()]
        width = len(jobs[0].prompt)  # no later prompt is longer
        while self.waiting and (len(jobs) + 1) * width <= self.chunk:
            jobs.append(self.waiting.popleft())
        layers: Cache = []

        def keep(layer: int, k: Tensor, v: Tensor) -> None:
            # A copy, because k and v are views that keep all of the layer's projections alive.
            layers.append(torch.stack((k, v)).unbind())

        prefill(self.model, [job.prompt for job in jobs], keep)
        for i, job in enumerate(jobs):
            length = len(job.prompt) - 1
            job.prefix = [(k[i, :, :length], v[i, :, :length]) for k, v in layers]
        self.ready.extend(jobs)


def prefill(
    model: Transformer, sequences: list[list[int]], keep: Callable[[int, Tensor, Tensor], None]
) -> None:
    """Every sequence's tokens but the last, in one padded forward.

    keep(layer, k, v) gets their keys and values [N, Hkv, longest - 1, Dh], layer after layer.
    """
    width = max(map(len, sequences)) - 1
    if width == 0:
        return
    # Padding stands on the right, where causal attention cannot see it: no mask is needed.
    rows = []
    for tokens in sequences:
        padding = [0] * (width + 1 - len(tokens))
        rows.append(tokens[:-1] + padding)
    tokens = torch.tensor(rows, device=model.head_weight.device)
    positions = torch.arange(width, device=tokens.device).expand_as(tokens)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keep(layer, k, v)
        return causal_attention(None, layer, q, k, v)

    model(tokens, positions=positions, attend=attend)


# --- the sampler ----------------------------------------------------------------------------------


class Sampler:
    """Samples from `model`, with the weights it has at the time of the call.

    On CUDA the batch is kept for the next `generate`, its cache and its graphs with it, until
    `release`. It is made anew when it does not fit a call, or when the weights lie elsewhere in
    memory; new weights at the old place are fine. On a CPU nothing outlives one `generate`.

    max_batch: sequences decoded at once, at most. eos_ids: the tokens that end a completion
    (default: the tokenizer's). cache_bytes: what keys and values may take (default: of the memory
    that is free when `generate` starts, four fifths on CUDA, half on a CPU); where that is little,
    fewer sequences run at once. On a CPU, a second copy of the weights comes on top while
    `generate` runs, if there is room. prefill_tokens: prompt tokens in one forward, unless a single
    prompt is longer.
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
        if tokenizer:
            tokenizer.meet(model.config.vocab_size)
        if eos_ids is None:
            eos_ids = tokenizer.eos_ids if tokenizer else []
        if not prefill_tokens:
            prefill_tokens = 4096 if model.head_weight.is_cuda else 1024  # a CPU has small caches
        self.model = model
        self.max_batch = max_batch
        self.eos_ids = list(eos_ids)
        self.cache_bytes = cache_bytes
        self.prefill_tokens = prefill_tokens
        self.kept: Batch | None = None  # of the last call, on CUDA

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
            seeds = [sequence_seed(params.seed, key, first + j) for j in range(n)]
            jobs.append(new_job(i, prompt, seeds))
        results: list[list[Completion]] = [[None] * n for _ in prompts]
        if not jobs or n < 1:
            return results

        batch, queue = self.prepare(jobs, params)
        # On CUDA a look at who has ended waits for the device: it is taken every eight steps.
        steps = 8 if batch.captures else 1
        generated = 0
        with tqdm(total=len(prompts) * n, desc="sampling", unit="seq", disable=not progress) as bar:
            while batch.live or queue.unstarted:
                queue.refill(batch)
                queue.evict(batch, steps)
                for _ in range(steps):
                    batch.decode()
                for sequence, completion in batch.harvest():
                    results[sequence.index][sequence.sample] = completion
                    generated += len(completion.tokens)
                    bar.update()
                seconds = bar.format_dict["elapsed"]
                if seconds:
                    bar.set_postfix_str(f"{generated / seconds:.0f} tok/s", refresh=False)
        self.keep(batch)
        return results

    @torch.inference_mode()
    def stream(self, prompt: list[int], params: SamplingParams) -> Iterator[int]:
        """The tokens of `generate([prompt], 1, params)[0][0]`, each as soon as it is drawn."""
        job = new_job(0, prompt, [sequence_seed(params.seed, 0, 0)])
        batch, queue = self.prepare([job], params)
        queue.refill(batch)
        while not batch.done[0]:
            batch.decode()
            yield int(batch.tokens[0, batch.position[0]])
        self.keep(batch)

    def keep(self, batch: Batch) -> None:
        """Use this batch again, where that saves the capture of graphs.

        A CPU's batch holds copies of the weights, and saves nothing.
        """
        if batch.captures:
            self.kept = batch

    def held_bytes(self) -> int:
        """Of the weights, and of what is kept from one call to the next."""
        held = sum(parameter.nbytes for parameter in self.model.parameters())
        if self.kept:
            held += self.kept.cache.nbytes
        return held

    def release(self) -> None:
        """Give up what is kept from one call to the next: a cache, and graphs."""
        self.kept = None

    def prepare(self, jobs: list[Job], params: SamplingParams) -> tuple[Batch, Queue]:
        """An empty batch, and the queue that fills it.

        Memory is counted in cached positions, of a key and a value in every layer:

            rows * capacity + chunk <= budget          at all times
            row + chunk <= budget                      so that any sequence can run, alone

        row: a sequence at its longest; chunk: prompts that are prefilled. `Batch.room` says how
        many rows there are at first; as they grow, some are evicted. How many rows a step has
        follows from the prompts, the draws and `free` below alone, and not from what is kept: ranks
        that agree on these take the same steps.
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
        free = free_memory(weight.device)
        if self.kept:
            free += self.kept.cache.nbytes
        free = least_of_team(self.model, free)
        share = free * 4 // 5 if weight.is_cuda else free // 2
        budget = (self.cache_bytes or share) // position_bytes
        row = round_up(limit, cache_block(weight.device))
        if row + longest > budget:
            needed = (row + longest) * position_bytes
            raise UserError(f"a sequence of {limit} tokens needs {needed:,} bytes of KV cache")
        chunk = max(longest, min(self.prefill_tokens, budget // 4))
        chunk = min(chunk, budget - row)
        total = sum(len(job.sequences) for job in jobs)
        slots = min(self.max_batch, total)

        # Packing pays after some seven steps. Its copy of the weights comes out of the memory that
        # the cache leaves; a quarter of what is free, at most.
        several_steps = total * params.max_tokens > 8 * slots
        weight_bytes = sum(parameter.nbytes for parameter in self.model.parameters())
        pack = slots > 1 and several_steps and 4 * weight_bytes < free
        if not self.reusable(slots, limit, budget - chunk):
            self.release()  # first, so that both are never there at once
            self.kept = Batch(self.model, params, self.eos_ids, slots, row, pack)
        # Taken out while it is in use: a stream that is left half-way keeps its batch to itself.
        batch, self.kept = self.kept, None
        batch.restart(params, slots, limit, budget - chunk)
        return batch, Queue(self.model, jobs, chunk)

    def reusable(self, slots: int, limit: int, budget: int) -> bool:
        """Whether the batch that is kept serves for this, in a budget of so many positions."""
        batch = self.kept
        if batch is None or batch.cache.positions > budget:
            return False
        return batch.serves(self.model, self.eos_ids, slots, limit)


def new_job(index: int, prompt: list[int], seeds: list[int]) -> Job:
    """The completions of prompt number `index`, one for each seed."""
    start = len(prompt)
    sequences = [Sequence(index, j, seed, start, prompt) for j, seed in enumerate(seeds)]
    return Job(prompt, deque(sequences))


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
            mounts, total = ("", "unified"), ""
            # Above the first of them the kernel kills; above the second, it lets nothing go on.
            limits, usage = ("memory.max", "memory.high"), "memory.current"
        elif "memory" in controllers.split(","):
            mounts, total = ("memory", controllers), "total_"
            limits, usage = ("memory.limit_in_bytes",), "memory.usage_in_bytes"
        else:
            continue
        for mount in mounts:
            # From the root down. In a container the path may be the host's: the root is there.
            folder = root / "sys/fs/cgroup" / mount
            for part in ("", *Path(path).parts[1:]):
                folder = folder / part
                for limit in limits:
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
    """Folder of a run (runs/demo), a Hugging Face folder, or a name of its hub."""
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
