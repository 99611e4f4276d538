"""Where the policy meets the problems: K responses to each prompt of a step, judged, on every rank.

Prompts, or parts of their K samples, are spread over the ranks; each samples and judges its own, and then all ranks get
all responses. From there on every rank computes the same rewards and advantages, so nothing about the algorithm knows
of ranks.
"""

import contextlib
import random
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import islice

import torch
from torch import Tensor
from tqdm import tqdm

import parallel
import relatives
import tasks
from cli import UserError
from model import model_folder, read_config
from packing import Example
from parallel import World
from recipes import Config, Recipe
from sample import Completion, Sampler, SamplingParams
from tasks import Problem
from tokenizer import Tokenizer, load_tokenizer
from verify import Verdict


@dataclass
class Rollouts:
    """P * K judged responses, prompt after prompt; the same on every rank."""

    problems: list[Problem]
    examples: list[Example]
    completions: list[Completion]
    texts: list[str]
    verdicts: list[Verdict]
    patterns: list[str | None]

    def select(self, rows: Iterable[int]) -> "Rollouts":
        return Rollouts(*([getattr(self, f.name)[i] for i in rows] for f in fields(self)))

    def outcomes(self) -> Tensor:
        """1 for a right response, 0 for any other, [N]."""
        return torch.tensor([float(verdict.correct) for verdict in self.verdicts])

    def lengths(self) -> Tensor:
        """Tokens of each response, the stop token included, [N]."""
        return torch.tensor([float(len(completion.tokens)) for completion in self.completions])

    def unended(self) -> Tensor:
        """1 for a response without a stop token, 0 for any other, [N]."""
        return torch.tensor([float(completion.finish_reason == "length") for completion in self.completions])

    def show(self, number: int) -> str:
        """One response, word for word: people want to read what the policy says."""
        i = number % len(self.texts)
        verdict = self.patterns[i] or self.verdicts[i].outcome
        return f"--- {self.problems[i].question}\n{self.texts[i]}\n--- {verdict}"

    def __add__(self, other: "Rollouts") -> "Rollouts":
        return Rollouts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


def unexpected_pattern(
    completion: Completion,
    text: str,
    question: str,
    patterns: tuple[str, ...] = tasks.PATTERNS,
    ngram: int = 20,
    times: int = 4,
) -> str | None:
    """The first of the `patterns` that a response shows, or None. ngram, times: see `tasks.repeats`."""
    if "overlong" in patterns and completion.finish_reason == "length":
        return "overlong"
    if "repeated" in patterns and tasks.repeats(completion.tokens, ngram, times):
        return "repeated"
    if "garbled" in patterns and tasks.garbled(text, question):
        return "garbled"
    return None


def read_problems(config: Config, recipe: Recipe) -> list[Problem]:
    """The problems to train on, all of which the models have room for. By program: as many as the run can use."""
    context, tokenizer = read_config(model_folder(config.model)).context, load_tokenizer(config.model)
    if config.data:
        problems = tasks.load(config.data)
    else:
        stream = tasks.countdown(
            config.seed, numbers=config.numbers, operators=config.operators, largest=config.largest
        )
        problems = list(islice(stream, config.steps * config.prompts * (3 if recipe.resample else 1)))
    source = config.data or config.task
    check_room((tasks.prompt_ids(problem, tokenizer) for problem in problems), config.max_tokens, context, source)
    if config.judge:
        reader, context = load_tokenizer(config.judge), read_config(model_folder(config.judge)).context
        prompts = (relatives.judge_prompt(problem, "", reader) for problem in problems)
        check_room(prompts, relatives.JUDGE_ROOM, context, f"--judge, {source}")
    return problems


def check_room(prompts: Iterable[list[int]], room: int, context: int, source: str) -> None:
    """UserError naming the first prompt that leaves no room for a response in the model's context."""
    for number, prompt in enumerate(tqdm(prompts, "prompts", leave=False, delay=2), start=1):
        if len(prompt) + room > context:
            raise UserError(
                f"{source}, problem {number}: its prompt's {len(prompt)} tokens and {room} for the response do not fit "
                f"into the model's context of {context}"
            )


def nth_problem(problems: list[Problem], number: int, seed: int) -> Problem:
    """The number-th draw from an endless series of epochs, each a fresh shuffle: no state to save but the number."""
    epoch, place = divmod(number, len(problems))
    return problems[shuffled(len(problems), seed, epoch)[place]]


@lru_cache(maxsize=2)
def shuffled(size: int, seed: int, epoch: int) -> list[int]:
    order = list(range(size))
    random.Random(f"problems {seed} {epoch}").shuffle(order)
    return order


class Stopwatch:
    """Seconds spent in each named part of a step."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def share_of(prompts: int, samples: int, ranks: int) -> int:
    """How many of a prompt's K samples one rank draws: all, or the largest divisor of K that leaves no rank idle."""
    return max((n for n in range(1, samples + 1) if samples % n == 0 and prompts * samples // n >= ranks), default=1)


def roll_out(
    sampler: Sampler,
    tokenizer: Tokenizer,
    numbered: list[tuple[int, Problem]],
    samples: int,
    params: SamplingParams,
    world: World,
    watch: Stopwatch,
    unexpected: Callable[[Completion, str, str], str | None] = unexpected_pattern,
) -> Rollouts:
    """Sample K responses to each problem and judge them. Each rank takes some of the prompts; all get everything.

    Where there are more ranks than prompts, several ranks share the K responses to one. The number of a problem is the
    key of its random draws, so the tokens do not depend on which rank draws them. unexpected: (completion, text,
    question) -> the unexpected pattern that it shows, or None.
    """
    prompts = [tasks.prompt_ids(problem, tokenizer) for _, problem in numbered]
    share = share_of(len(prompts), samples, world.size)
    pieces = [(i, first) for i in range(len(prompts)) for first in range(0, samples, share)]
    work = [len(prompts[i]) + share * params.max_tokens for i, _ in pieces]
    mine = [pieces[p] for p in parallel.balance(work, world.size)[world.rank]]
    with watch("sampling"):
        keys, firsts = [numbered[i][0] for i, _ in mine], [first for _, first in mine]
        groups = sampler.generate([prompts[i] for i, _ in mine], share, params, keys, firsts)
    with watch("verifying"):
        asked = [numbered[i][1] for i, _ in mine for _ in range(share)]
        completions = [completion for group in groups for completion in group]
        texts = [tokenizer.decode(c.tokens[: -1 if c.finish_reason == "stop" else None]) for c in completions]
        rows = zip(completions, texts, asked)
        shown = [unexpected(completion, text, problem.question) for completion, text, problem in rows]
        judged = list(zip(asked, completions, texts, tasks.score(asked, texts), shown))
    shares = parallel.gather_objects((mine, judged))
    rows = {piece: done[j * share : (j + 1) * share] for owned, done in shares for j, piece in enumerate(owned)}
    columns = [list(column) for column in zip(*(row for piece in pieces for row in rows[piece]))]
    repeated = [prompt for prompt in prompts for _ in range(samples)]
    examples = [Example(p + c.tokens, [(len(p), len(p) + len(c.tokens))]) for p, c in zip(repeated, columns[1])]
    return Rollouts(columns[0], examples, *columns[1:])
