"""Where the policy meets the problems: K responses to each prompt of a step, judged.

    problems -> prompts -> `draw` K responses to each -> `judge` them -> a list of `Response`

The work is shared out over the ranks, and then all ranks have all responses. From there on every
rank computes the same rewards and advantages, so nothing about the algorithm knows of ranks.
"""

import contextlib
import math
import random
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import parallel
import tasks
from cli import UserError
from packing import Example
from parallel import World
from sample import MOST_TOKENS, Completion, Sampler, SamplingParams
from tasks import Problem
from tokenizer import Tokenizer
from verify import Verdict

NOTHING = torch.zeros(0)


@dataclass
class Response:
    """What was asked and said, what it was found to be, and what the step makes of it."""

    problem: Problem
    prompt: list[int]
    completion: Completion
    text: str
    verdict: Verdict
    pattern: str | None  # the unexpected pattern that it shows

    # What the step adds. But for the reward, one value for each of its tokens: `flat` and `give`.
    reward: float = math.nan  # after penalties, before the KL
    old: Tensor = NOTHING  # log-probs of the policy before the step
    anchor: Tensor = NOTHING  # log-probs of the anchor
    weight: Tensor = NOTHING  # how much the loss counts a token
    advantage: Tensor = NOTHING

    @property
    def example(self) -> Example:
        """The sequence to train on: all tokens of the response, the stop token included."""
        begin = len(self.prompt)
        end = begin + len(self.completion.tokens)
        return Example(self.prompt + self.completion.tokens, [(begin, end)])

    def __str__(self) -> str:
        outcome = self.verdict.outcome
        if self.pattern:
            outcome += f", {self.pattern}"
        return (
            f"--- {self.problem.question}\n{self.text}\n--- {outcome}; "
            f"reference {self.problem.answer}; reward {self.reward:g}; "
            f"{len(self.completion.tokens):,} tokens"
        )


def outcome(responses: list[Response], config: Any = None) -> Tensor:
    """The outcome reward: the score of each verdict, 1 for right and 0 for wrong. [N], float64."""
    return torch.tensor([response.verdict.score for response in responses], dtype=torch.float64)


def lengths(responses: list[Response]) -> Tensor:
    """How many tokens each response has, the stop token included. [N], int64."""
    return torch.tensor([len(response.completion.tokens) for response in responses])


def flat(responses: list[Response], name: str) -> Tensor:
    """One value per trained token, response after response, [M]: `old`, `advantage`, ..."""
    return torch.cat([getattr(response, name) for response in responses])


def give(responses: list[Response], name: str, values: Tensor) -> None:
    """The inverse of `flat`: each response gets its part of `values` [M] under that name."""
    parts = values.split(lengths(responses).tolist())
    for response, part in zip(responses, parts, strict=True):
        setattr(response, name, part)


# --- drawing and judging --------------------------------------------------------------------------


def draw(
    sampler: Sampler,
    prompts: list[list[int]],
    keys: list[int],
    samples: int,
    params: SamplingParams,
    world: World,
    team: int = 1,
) -> list[Completion]:
    """`samples` completions of each prompt, prompt after prompt.

    Each rank takes some of the prompts. Where there are more ranks than prompts, several of them
    share the samples of one. keys: one for each prompt; they seed the draws, so that the tokens do
    not depend on which rank draws them. team: so many ranks share one copy of the model, see
    tensor_parallel.py; they take one share of the work.
    """
    share = share_of(len(prompts), samples, world.size // team)
    pieces = []  # (prompt, first sample): `share` completions each
    for i in range(len(prompts)):
        pieces += [(i, first) for first in range(0, samples, share)]

    def draw_mine(mine: list[tuple[int, int]]) -> list[list[Completion]]:
        chosen = [prompts[i] for i, _ in mine]
        firsts = [first for _, first in mine]
        return sampler.generate(chosen, share, params, [keys[i] for i, _ in mine], firsts)

    work = [len(prompts[i]) + share * params.max_tokens for i, _ in pieces]
    groups = parallel.share_out(draw_mine, pieces, work, world, team)
    return [completion for group in groups for completion in group]


def share_of(prompts: int, samples: int, ranks: int) -> int:
    """How many of a prompt's K samples one rank (or team of ranks) draws.

    All of them, or the largest divisor of K that leaves no rank idle.
    """
    for share in range(samples, 1, -1):
        if samples % share == 0 and prompts * samples // share >= ranks:
            return share
    return 1


def judge(
    problems: list[Problem],
    prompts: list[list[int]],
    completions: list[Completion],
    tokenizer: Tokenizer,
    config: Any,
    world: World,
) -> list[Response]:
    """Verdict and unexpected pattern of each completion: of K for each problem, one after another.

    config: its flags --patterns, --repeat-ngram and --repeat-times.
    """
    samples = len(completions) // len(problems)
    asked = [problem for problem in problems for _ in range(samples)]
    given = [prompt for prompt in prompts for _ in range(samples)]

    def judge_mine(mine: list[int]) -> list[tuple[str, Verdict, str | None]]:
        texts = [completions[i].text(tokenizer, skip_special=False) for i in mine]
        verdicts = tasks.judge_all([asked[i] for i in mine], texts)
        patterns = []
        for i, text in zip(mine, texts):
            pattern = unexpected_pattern(
                completions[i],
                text,
                " ".join(turn["content"] for turn in tasks.messages(asked[i])),
                config.patterns,
                config.repeat_ngram,
                config.repeat_times,
            )
            patterns.append(pattern)
        return list(zip(texts, verdicts, patterns))

    work = [len(completion.tokens) for completion in completions]
    judged = parallel.share_out(judge_mine, list(range(len(work))), work, world)
    rows = zip(asked, given, completions, judged, strict=True)
    return [Response(problem, prompt, done, *found) for problem, prompt, done, found in rows]


def unexpected_pattern(
    completion: Completion,
    text: str,
    question: str,
    patterns: tuple[str, ...] = tasks.PATTERNS,
    ngram: int = 20,
    times: int = 4,
) -> str | None:
    """The first of the `patterns` that a response shows, or None.

    ngram, times: see `tasks.repeats`.
    """
    if "overlong" in patterns and completion.finish_reason == "length":
        return "overlong"
    if "repeated" in patterns and tasks.repeats(completion.tokens, ngram, times):
        return "repeated"
    if "garbled" in patterns and tasks.garbled(text, question):
        return "garbled"
    return None


class Stopwatch:
    """Seconds spent in each named part of a step."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


# --- which problems -------------------------------------------------------------------------------


def read_problems(config: Any, needed: int) -> list[Problem]:
    """The problems to train on: all of --data, or the first `needed` that --task makes."""
    if config.data:
        return tasks.load(config.data, config.fields, config.seed)
    stream = tasks.made(config.task, config)
    problems = list(islice(stream, needed))
    if len(problems) < needed:
        raise UserError(
            f"--task {config.task}: makes {len(problems)} problems, the run needs {needed}"
        )
    return problems


def nth_problem(problems: list[Problem], number: int, seed: int) -> Problem:
    """The number-th draw from an endless series of epochs, each a fresh shuffle: no state to save
    but the number.
    """
    epoch, place = divmod(number, len(problems))
    return problems[shuffled(len(problems), seed, epoch)[place]]


@lru_cache(maxsize=2)
def shuffled(size: int, seed: int, epoch: int) -> list[int]:
    order = list(range(size))
    random.Random(f"problems {seed} {epoch}").shuffle(order)
    return order


def room_for_responses(
    prompts: Iterable[list[int]], asked: int | None, context: int, source: str
) -> int:
    """How many tokens a response may have: what was `asked` for, or else what the model's context
    leaves behind the longest prompt, MOST_TOKENS at most.

    UserError naming the first prompt that leaves no room for `asked` tokens, or for any.
    """
    longest = 0
    for number, prompt in enumerate(tqdm(prompts, "prompts", leave=False, delay=2), start=1):
        if len(prompt) + (asked or 1) > context:
            raise UserError(
                f"{source}, problem {number}: its prompt's {len(prompt)} tokens and {asked or 1} "
                f"for the response do not fit into the model's context of {context}"
            )
        longest = max(longest, len(prompt))
    return asked or min(context - longest, MOST_TOKENS)
