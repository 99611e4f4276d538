"""The sampler: K completions per prompt, batched, with a KV cache; also a command to talk to a checkpoint.

    python sample.py --model runs/demo "numbers 19 17 43, target 41"    # one streamed answer
    python sample.py --model DIR                                        # a chat; Ctrl-C stops an answer, Ctrl-D ends
    python sample.py --model DIR "What is 3/4 of 28?" --n 8 --verify 21 # how many of 8 answers are right?

Rollouts are most of RL's cost, and T1 takes many per prompt (K = 64, temperature 1.2). So:

- Continuous batching. Live sequences are rows 0..live-1 of one batch. A finished row is removed by moving the last row
  into its place, and the queue refills the end: no step is spent on a row that has finished, or on one never started.
- A prompt is prefilled once, all but its last token, and its keys and values are copied to the K rows that share it.
  The last token goes through the ordinary decode step of each row, so there is no second way to draw a token.
- The cache grows with the longest live row, and never past its budget: there are then fewer rows instead.
- Each token is drawn from a counter, not from a stream: the draw depends on (seed, key, sample index, position) and on
  the logits, and so on nobody else in the batch. (Matrix products round differently for different batch sizes. In fp32
  that can change a draw only where two tokens are within about 1e-6 of a tie: our tests, some ten thousand draws in
  other batches, see none. In bf16 the logits themselves differ by 1e-2, and draws do change.)
- The decode step is one function of fixed tensors that never asks the host anything; on CUDA it is captured as a graph,
  on a CPU it is written for few and cheap operations (decode.py).

The log-probs are those of the very distribution the token was drawn from: after temperature, top-p and min-p.
"""

import re
from collections import deque
from collections.abc import Callable, Iterator
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
from decode import Cache, CPUDecoder, ModelDecoder
from model import Transformer, causal_attention, load_pretrained
from tasks import Problem
from tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class SamplingParams:
    """How to draw: `temperature` 0 is argmax; top-p and min-p cut the tempered distribution; `seed` picks the draws."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise UserError(f"max_tokens must be at least 1, not {self.max_tokens}")
        if self.temperature != 0 and not 1e-3 <= self.temperature < float("inf"):  # below, logits / T can overflow
            raise UserError(f"temperature must be 0 (argmax), or 0.001 or more, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be in (0, 1], not {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p must be in [0, 1], not {self.min_p}")


@dataclass(frozen=True)
class Completion:
    tokens: list[int]  # the stop token included, where there is one: it is part of what the policy chose
    logprobs: list[float]  # under the distribution each token was drawn from
    finish_reason: str  # "stop", or "length": max_tokens or the model's context ran out


def sequence_seed(seed: int, key: int, sample: int) -> int:
    """The signed 64-bit seed of one completion. Splitmix64 after each word: nearby keys give unrelated draws."""
    state = 0
    for word in (seed, key, sample):
        state = (state + word + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ state >> 27) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return state - 2**64 if state >= 2**63 else state


@dataclass
class Job:
    """One prompt and the completions of it that have yet to start."""

    index: int
    prompt: list[int]
    seeds: deque[tuple[int, int]]  # (sample index, its 64-bit seed)
    prefix: Cache = field(default_factory=list)  # once prefilled; keys and values [kv_heads, len(prompt) - 1, Dh]


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def cache_block(device: torch.device) -> int:
    """Cached positions are held and attended to in multiples of this: on CUDA each multiple is a graph of its own."""
    return 256 if device.type == "cuda" else 16


class Batch:
    """The live sequences. Rows 0..live-1 of every tensor; what lies above is garbage that nobody reads.

    Row r has `position[r] + 1` tokens, of which the last has not been through the model yet.
    """

    def __init__(
        self, model: Transformer, params: SamplingParams, eos_ids: list[int], slots: int, limit: int, pack: bool = False
    ) -> None:
        weight = model.head_weight
        self.params, self.slots, self.limit, self.cuda = params, slots, limit, weight.is_cuda
        fp32_on_cpu = weight.device.type == "cpu" and weight.dtype == torch.float32
        self.decoder = CPUDecoder(model, pack) if fp32_on_cpu else ModelDecoder(model)
        self.bound = (0, 0)  # rows and length of the views of the cache that `decoder` holds
        self.block = cache_block(weight.device)
        self.live = self.longest = 0  # `longest`: no live row's position is above it
        self.owners: list[tuple[int, int]] = []  # row -> (prompt index, sample index)
        self.row = torch.arange(slots, device=weight.device)
        self.position, self.start, self.end, self.seed = (torch.zeros_like(self.row) for _ in range(4))
        self.done = torch.ones_like(self.row, dtype=torch.bool)
        self.eos = torch.tensor(sorted(eos_ids), dtype=torch.int64, device=weight.device)
        self.tokens = torch.zeros(slots, limit + 1, dtype=torch.int64, device=weight.device)
        self.logprobs = torch.zeros(slots, limit + 1, dtype=torch.float32, device=weight.device)
        self.cache: Cache = [self.decoder.allocate(0, 0)] * model.config.layers  # [rows, kv_heads, capacity, head_dim]
        self.graphs: dict[tuple[int, int], Callable[[], None] | None] = {}

    def resize(self, rows: int, capacity: int) -> None:
        """Move the cache into tensors of another size, a layer at a time: the peak is one layer above the sum."""
        self.graphs.clear()
        self.decoder.bind([])
        self.bound = (0, 0)
        self.pool = torch.cuda.graph_pool_handle() if self.cuda else None  # a pool of graphs dies with the last of them
        for layer in range(len(self.cache)):
            self.cache[layer] = self.moved(*self.cache[layer], rows, capacity)

    def moved(self, keys: Tensor, values: Tensor, rows: int, capacity: int) -> tuple[Tensor, Tensor]:
        """A layer's keys and values in larger tensors. (A function, because its names let go of the old ones.)"""
        new_keys, new_values = self.decoder.allocate(rows, capacity)
        new_keys[: self.live, :, : keys.shape[2]] = keys[: self.live]
        new_values[: self.live, :, : values.shape[2]] = values[: self.live]
        return new_keys, new_values

    def reserve(self, rows: int, length: int) -> None:
        """Room for `rows` rows of `length` cached positions."""
        old_rows, _, capacity, _ = self.cache[0][0].shape
        if rows > old_rows or length > capacity:
            growth = max(length, capacity * 2)  # geometric: the copies cost O(1) per position
            self.resize(rows, min(round_up(growth, self.block), round_up(self.limit, self.block)))

    def add(self, job: Job, count: int) -> None:
        """Start `count` completions of a prefilled job."""
        rows = slice(self.live, self.live + count)
        cached = len(job.prompt) - 1
        if cached:
            for (keys, values), (prompt_keys, prompt_values) in zip(self.cache, job.prefix):
                keys[rows, :, :cached], values[rows, :, :cached] = prompt_keys, prompt_values
        started = [job.seeds.popleft() for _ in range(count)]
        self.owners += [(job.index, sample) for sample, _ in started]
        self.seed[rows] = torch.tensor([seed for _, seed in started], device=self.seed.device)
        self.tokens[rows, : cached + 1] = torch.tensor(job.prompt, device=self.tokens.device)
        self.position[rows] = cached
        self.start[rows] = cached + 1
        self.end[rows] = min(cached + 1 + self.params.max_tokens, self.limit)
        self.done[rows] = False
        self.live += count
        self.longest = max(self.longest, cached)

    def decode(self) -> None:
        """One token for every live row. A row that has finished stands still until `harvest` takes it away."""
        rows = min(round_up(self.live, 8), self.slots) if self.cuda else self.live
        length = round_up(self.longest + 1, self.block)
        self.reserve(rows, length)
        key = (rows, length)
        if key != self.bound:
            self.decoder.bind([(keys[:rows, :, :length], values[:rows, :, :length]) for keys, values in self.cache])
            self.bound = key
        if not self.cuda:
            self.step(rows)
        elif key not in self.graphs:  # the first step of a shape runs eagerly, which warms up what capture needs
            self.graphs[key] = None
            self.step(rows)
        else:  # not yet measured on a GPU
            if self.graphs[key] is None:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=self.pool):  # one pool: only one graph runs at a time
                    self.step(rows)
                self.graphs[key] = graph.replay
            self.graphs[key]()
        self.longest = min(self.longest + 1, self.limit - 1)

    def step(self, rows: int) -> None:
        """The decode step on rows 0..rows-1, in the cache that `decoder` is bound to. Reads and writes tensors only."""
        row, position, done = self.row[:rows], self.position[:rows], self.done[:rows]
        logits = self.decoder(self.tokens[row, position], position)
        params, following = self.params, position + 1
        token, logprob = kernels.sample_token(
            logits, params.temperature, params.top_p, params.min_p, self.seed[:rows], following - self.start[:rows]
        )
        self.tokens[row, following] = token  # a row that is done writes just past its end, where nobody reads
        self.logprobs[row, following] = logprob
        position += ~done
        done |= torch.isin(token, self.eos) | (following + 1 >= self.end[:rows])

    def harvest(self) -> list[tuple[tuple[int, int], Completion]]:
        """Take the finished rows away; (owner, completion) of each."""
        dead = self.done[: self.live].nonzero().flatten().tolist()  # the one place that waits for the device
        if not dead:
            return []
        width = self.longest + 1
        tokens, logprobs = self.tokens[dead, :width].tolist(), self.logprobs[dead, :width].tolist()
        spans = zip(self.start[dead].tolist(), self.position[dead].tolist())
        eos, finished = set(self.eos.tolist()), []
        for i, (start, last) in enumerate(spans):
            reason = "stop" if tokens[i][last] in eos else "length"
            completion = Completion(tokens[i][start : last + 1], logprobs[i][start : last + 1], reason)
            finished.append((self.owners[dead[i]], completion))
        self.remove(dead)
        return finished

    def remove(self, dead: list[int]) -> None:
        """Close the gaps with the last rows, so that a step's cost is that of its live rows."""
        live, gone = self.live - len(dead), set(dead)
        movers = [row for row in range(live, self.live) if row not in gone]
        holes = [row for row in dead if row < live]
        if holes:
            for tensor in (self.position, self.start, self.end, self.seed, self.done, self.tokens, self.logprobs):
                tensor[holes] = tensor[movers]
            for tensor in (tensor for pair in self.cache for tensor in pair):
                tensor[holes, :, : self.longest + 1] = tensor[movers, :, : self.longest + 1]
            for hole, mover in zip(holes, movers):
                self.owners[hole] = self.owners[mover]
        del self.owners[live:]
        self.done[live : self.live], self.position[live : self.live] = True, 0
        self.live = live
        self.longest = int(self.position[:live].max()) if live else 0


class Sampler:
    """Samples from `model`, whatever its weights are at the time: nothing that is cached outlives one `generate`.

    max_batch: sequences decoded at once, at most. cache_bytes: what keys and values may take (default: half of the
    memory that is free when `generate` starts); where that is little, fewer sequences run at once. On a CPU a second
    copy of the weights comes to it while `generate` runs, if there is room. eos_ids: the tokens that end a completion
    (default: the tokenizer's).
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
        stops = (tokenizer.eos_ids if tokenizer else []) if eos_ids is None else eos_ids
        self.model, self.eos_ids, self.max_batch, self.cache_bytes = model, list(stops), max_batch, cache_bytes
        self.prefill_tokens = prefill_tokens or (4096 if model.head_weight.is_cuda else 1024)  # a CPU has its caches

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
        """n completions of each prompt. Completion j of prompt i is drawn with (params.seed, keys[i], firsts[i] + j).

        keys: default 0, 1, 2, ...; firsts: default 0. Ranks that split the prompts, or the samples of one, give global
        numbers, and draw what one rank would. A completion ends at the model's context even where max_tokens is more.
        UserError: an empty prompt, one that fills the context, or one whose completion cannot fit in `cache_bytes`.
        """
        keys = range(len(prompts)) if keys is None else keys
        firsts = [0] * len(prompts) if firsts is None else firsts
        jobs = [
            Job(i, prompt, deque((sample, sequence_seed(params.seed, key, first + sample)) for sample in range(n)))
            for i, (prompt, key, first) in enumerate(zip(prompts, keys, firsts, strict=True))
        ]
        results: list[list[Completion]] = [[None] * n for _ in prompts]
        if not jobs or n < 1:
            return results
        batch, chunk = self.make_batch(jobs, params)
        waiting, ready = deque(sorted(jobs, key=lambda job: -len(job.prompt))), deque()
        steps_between_checks = 8 if batch.cuda else 1
        generated = 0
        with tqdm(total=len(prompts) * n, desc="sampling", unit="seq", disable=not progress) as bar:
            while batch.live or ready or waiting:
                self.refill(batch, waiting, ready, chunk)
                for _ in range(steps_between_checks):
                    batch.decode()
                for (prompt, sample), completion in batch.harvest():
                    results[prompt][sample] = completion
                    generated += len(completion.tokens)
                    bar.update()
                if bar.format_dict["elapsed"]:
                    bar.set_postfix_str(f"{generated / bar.format_dict['elapsed']:.0f} tok/s", refresh=False)
        return results

    @torch.inference_mode()
    def stream(self, prompt: list[int], params: SamplingParams) -> Iterator[int]:
        """The tokens of `generate([prompt], 1, params)[0][0]`, each as soon as it is drawn."""
        job = Job(0, prompt, deque([(0, sequence_seed(params.seed, 0, 0))]))
        batch, chunk = self.make_batch([job], params)
        self.refill(batch, deque([job]), deque(), chunk)
        while not batch.done[0]:
            batch.decode()
            yield int(batch.tokens[0, batch.position[0]])

    def make_batch(self, jobs: list[Job], params: SamplingParams) -> tuple[Batch, int]:
        """An empty batch of as many slots as the budget allows, and how many tokens one prefill may hold.

        Slots are counted for every row at its longest: that wastes some of a small budget, but throws no sequence out.
        """
        config = self.model.config
        shortest, longest = (f(len(job.prompt) for job in jobs) for f in (min, max))
        if shortest < 1:
            raise UserError("cannot sample from an empty prompt")
        if longest >= config.context:
            raise UserError(f"a prompt of {longest} tokens fills the model's context of {config.context}")
        limit = min(longest + params.max_tokens, config.context)
        weight = self.model.head_weight
        row_bytes = 2 * (config.layers + 1) * config.kv_heads * config.head_dim * weight.element_size()
        free = free_memory(weight.device)
        budget = (self.cache_bytes or free // 2) // row_bytes  # in cached positions
        row = round_up(limit, cache_block(weight.device))
        if row + longest > budget:
            raise UserError(f"a sequence of {limit} tokens needs {(row + longest) * row_bytes:,} bytes of KV cache")
        chunk = min(max(longest, min(self.prefill_tokens, budget // 4)), budget - row)
        total = sum(len(job.seeds) for job in jobs)
        slots = min(self.max_batch, total, (budget - chunk) // row)
        # Packing pays after some seven steps, and takes memory that the cache does not: at most a quarter.
        worth_packing = slots > 1 and total * params.max_tokens > 8 * slots
        pack = worth_packing and 4 * sum(parameter.nbytes for parameter in self.model.parameters()) < free
        return Batch(self.model, params, self.eos_ids, slots, limit, pack), chunk

    def refill(self, batch: Batch, waiting: deque[Job], ready: deque[Job], chunk: int) -> None:
        """Start sequences until every slot is taken. Prompts are prefilled a chunk at a time, as they are needed."""
        while batch.live < batch.slots and (ready or waiting):
            if not ready:
                while waiting and (not ready or (len(ready) + 1) * len(ready[0].prompt) <= chunk):
                    ready.append(waiting.popleft())  # longest first: ready[0] is as wide as the padded chunk
                self.prefill(list(ready))
            job = ready[0]
            count = min(len(job.seeds), batch.slots - batch.live)
            to_come = sum(len(job.seeds) for queue in (ready, waiting) for job in queue)
            batch.reserve(min(batch.slots, batch.live + to_come), max(len(job.prompt), batch.longest + 1))
            batch.add(job, count)
            if not job.seeds:
                job.prefix = []
                ready.popleft()

    def prefill(self, jobs: list[Job]) -> None:
        """Keys and values of every prompt's tokens but the last, in one padded forward."""
        width = max(len(job.prompt) for job in jobs) - 1
        if not width:
            return
        # Padding stands on the right, where causal attention cannot see it: no mask is needed.
        rows = [job.prompt[:-1] + [0] * (width + 1 - len(job.prompt)) for job in jobs]
        tokens = torch.tensor(rows, device=self.model.head_weight.device)
        layers = []

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            layers.append(torch.stack((k, v)).unbind())  # a copy: k and v hold on to all of the layer's projections
            return causal_attention(None, layer, q, k, v)

        self.model(tokens, positions=torch.arange(width, device=tokens.device).expand_as(tokens), attend=attend)
        for i, job in enumerate(jobs):
            job.prefix = [(k[i, :, : len(job.prompt) - 1], v[i, :, : len(job.prompt) - 1]) for k, v in layers]


def free_memory(device: torch.device) -> int:
    """Bytes that can be had now, those that torch or the page cache could give back included. 8 GiB: nothing tells."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    try:
        return int(re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())[1]) * 1024
    except (OSError, TypeError):  # not Linux
        return 8 * 2**30


@dataclass
class Config:
    model: str
    """Folder of a run (runs/demo) or a Hugging Face folder."""
    question: tyro.conf.Positional[str | None] = None
    """What to ask, put as it is. None: a chat."""
    n: int = 1
    """Answers to sample; more than one are shown when all are done."""
    verify: str | None = None
    """The right answer: show a verdict on each of the n. (A countdown is judged by the target in its question.)"""
    max_tokens: int = 1024
    """Longest answer. Reasoning models need thousands, the demo a hundred or two."""
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
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 on CUDA, which halves what a step has to read; float32 elsewhere."""


def main(config: Config) -> None:
    if config.n < 1:
        raise UserError(f"--n must be at least 1, not {config.n}")
    if config.question is None and (config.n > 1 or config.verify is not None):
        raise UserError("--n and --verify need a question")
    gpu = torch.cuda.is_available()
    if config.device == "cuda" and not gpu:
        raise UserError("--device cuda: no GPU is visible to torch")
    device = "cuda" if gpu and config.device != "cpu" else "cpu"
    dtype = {"auto": "bfloat16" if device == "cuda" else "float32"}.get(config.dtype, config.dtype)
    tokenizer = load_tokenizer(config.model)
    sampler = Sampler(load_pretrained(config.model, getattr(torch, dtype), device), tokenizer)
    params = SamplingParams(config.max_tokens, config.temperature, config.top_p, config.min_p, config.seed)
    if config.question is None:
        chat(sampler, tokenizer, params)
    elif config.n > 1 or config.verify is not None:
        show_verdicts(sampler, tokenizer, params, config)
    else:
        prompt = tokenizer.chat([{"role": "user", "content": config.question}])
        show(tokenizer, sampler.stream(prompt, params))


def show(tokenizer: Tokenizer, tokens: Iterator[int]) -> str:
    """Print the text as its tokens come. Ctrl-C ends it: what has been said until then is returned."""
    said, pending = "", []
    try:
        for token in tokens:
            pending.append(token)
            text = tokenizer.decode(pending, skip_special=True)
            if not text.endswith("\ufffd"):  # a character may be spread over several tokens
                print(text, end="", flush=True)
                said, pending = said + text, []
    except KeyboardInterrupt:
        pass
    print(flush=True)
    return said + tokenizer.decode(pending, skip_special=True)


def chat(sampler: Sampler, tokenizer: Tokenizer, params: SamplingParams) -> None:
    """Questions from the terminal until Ctrl-D. The oldest turns are forgotten to leave room for an answer."""
    messages, context = [], sampler.model.config.context
    room = min(params.max_tokens, context // 4)
    while True:
        try:
            question = input("> ").strip()
        except KeyboardInterrupt:  # one that came too late for the answer it was meant for
            question = ""
        except EOFError:
            return
        if not question:
            continue
        messages.append({"role": "user", "content": question})
        while len(prompt := tokenizer.chat(messages)) + room > context and len(messages) > 1:
            del messages[:2]
        turn = replace(params, seed=params.seed + len(messages))
        try:
            messages.append({"role": "assistant", "content": show(tokenizer, sampler.stream(prompt, turn))})
        except UserError as error:  # this question alone is too long
            print(f"error: {error}")
            messages.pop()


def show_verdicts(sampler: Sampler, tokenizer: Tokenizer, params: SamplingParams, config: Config) -> None:
    """n answers to one question, and with --verify how many of them are right."""
    countdown = re.fullmatch(r"numbers (\d+(?: \d+)+), target (\d+)(?:, operators ([-+*/ ]+))?", config.question)
    if countdown:
        numbers, target, operators = countdown.groups(default="+-*")
        problem = tasks.countdown_problem([int(x) for x in numbers.split()], int(target), operators.replace(" ", ""))
    else:
        problem = Problem(config.question, config.verify or "")
    messages = tasks.messages(problem) if config.verify is not None else [{"role": "user", "content": config.question}]
    completions = sampler.generate([tokenizer.chat(messages)], config.n, params, progress=True)[0]
    answers = [tokenizer.decode(completion.tokens, skip_special=True) for completion in completions]
    verdicts = tasks.judge_all([problem] * config.n, answers) if config.verify is not None else [None] * config.n
    for number, (answer, completion, verdict) in enumerate(zip(answers, completions, verdicts), start=1):
        outcome = f", {verdict.outcome}" if verdict else ""
        print(f"--- {number}: {len(completion.tokens)} tokens{outcome}\n{answer.strip()}")
    if config.verify is not None:
        print(f"--- {sum(verdict.correct for verdict in verdicts)} of {config.n} right")


if __name__ == "__main__":
    cli.run(main, Config)
