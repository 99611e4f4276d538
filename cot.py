"""T1 stage 1, the data: chains of thought that try, fail, notice, try again and verify.

    python cot.py --out chains.jsonl --count 20000                           # countdown, by program
    python cot.py --out chains.jsonl --data gsm8k.jsonl --model DIR [DIR2 ...] --n 4

Both write JSONL that `sft.py --data` reads: `problem`, `answer`, `task` and `response`.

**By program** (countdown): the paper's way in miniature. Several attempts at a problem are drawn,
each at another value that the numbers can make. They are merged up to the first that is right; a
problem without a right one is dropped. Every attempt spells its arithmetic out and compares what it
came to with the target; then a check evaluates the whole expression again; then comes the box:

    25-7=18, 18+3=21 not 4
    7*3=21, 25-21=4 is 4
    check 25-(7*3)=25-21=4 ok
    \\boxed{25-(7*3)}

Such chains hold a shortcut. It is not planted: it follows from ending every chain in success, as
T1's chains do. Where three attempts were drawn, the third that is shown always succeeds. So a model
learns to *claim* success at the third attempt sooner than it learns to look whether the value is
the target, and it never sees what comes after a third failure. More imitation makes better guesses.
That it pays to look, and to think on, is left for RL to find.

**From models' own attempts** (any problem file): T1's four steps, called in order by `by_attempts`.

1. `sample_attempts` from one or several checkpoints, and verify them.
2. `criticise` the wrong ones (where they fail) and the right one (why it holds) with a critic.
   Where there is no critic, or it says nothing usable, a plain template says it, or a second
   right attempt stands there as the check.
3. `merge` them into one response that tries, notices, tries again, verifies and ends in the box.
4. `rewrite`, with `--rewrite DIR`: a model makes one fluent text of it, kept only where its answer
   is still right.

A problem without a right attempt is dropped: there is nothing to end its chain.

Where this differs from the paper: T1 merges and rewrites with strong models, here the merging is by
program; and how many failures a chain shows is drawn at random, so that fewer chains end at the
same place.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

import cli
import tasks
import verify
from cli import UserError
from devices import pick_device, pick_dtype
from model import load_pretrained
from sample import Sampler, SamplingParams
from tasks import Problem
from tokenizer import Tokenizer, load_tokenizer

# --- by program -----------------------------------------------------------------------------------


def step_by_step(expression: str) -> str:
    """Evaluate an expression, innermost brackets first: "(7-3)*5" -> "(7-3)*5=4*5=20"."""
    forms = [expression]
    while not forms[-1].isdigit():
        form = forms[-1]
        inner = re.search(r"\((\d+)([-+*/])(\d+)\)|^(\d+)([-+*/])(\d+)$", form)
        x, operator, y = (part for part in inner.groups() if part)
        results = {
            "+": int(x) + int(y),
            "-": int(x) - int(y),
            "*": int(x) * int(y),
            "/": int(x) // int(y),
        }
        forms.append(form[: inner.start()] + str(results[operator]) + form[inner.end() :])
    return "=".join(forms)


def countdown_chain(
    problem: Problem, rng: random.Random, attempts: int, give_up: float = 0.0
) -> dict | None:
    """One chain for a countdown problem.

    `attempts` of the values that the numbers can make are drawn, in random order. The chain shows
    those up to the first that is the target. Where none of them is, it shows all of them and gives
    up, without a box, with chance `give_up`; else there is no chain: None.
    """
    target, numbers, operators = tasks.read_countdown(problem.answer)
    walks = tasks.ways(numbers, operators)
    if target not in walks:
        raise UserError(f"there is no way from {numbers} to {target} with {operators}")
    lines = []
    for walk in rng.sample(list(walks.values()), min(attempts, len(walks))):
        steps = ", ".join(walk.steps)
        if walk.value != target:
            lines.append(f"{steps}{tasks.FAILURE}{target}")
            continue
        lines.append(f"{steps}{tasks.CLAIM}{target}")
        lines.append(f"check {step_by_step(walk.expression)} ok")
        lines.append(f"\\boxed{{{walk.expression}}}")
        return training_row(problem, "\n".join(lines))
    if give_up and rng.random() < give_up:  # without it no number is drawn: the chains stay as ever
        return training_row(problem, "\n".join([*lines, GIVE_UP]))
    return None


def training_row(problem: Problem, response: str) -> dict:
    """A line of the file that `sft.py --data` reads."""
    return {
        "problem": problem.question,
        "answer": problem.answer,
        "task": problem.task,
        "response": response,
    }


GIVE_UP = "give up"
"""The last line of a chain that ends without an answer. The demo's tokenizer spells it byte by
byte: a word of its own would move the numbers of all others."""
WORDS = [
    tasks.FAILURE, tasks.CLAIM, ", ", "check ", " ok\n", "\\boxed{",
    "numbers ", "target ", "operators ",
]  # fmt: skip
"""What the demo's tokenizer holds as one token each, besides the numbers up to 99."""


def by_program(config: "Config", show: bool = True) -> Iterator[dict]:
    """`count` chains for countdown training problems; the held-out problems are never used.

    Where there are fewer problems than chains, a problem has several. show: a progress bar.
    """
    problems = tasks.made("countdown", config)
    rng = random.Random(f"chains {config.seed}")
    share = config.give_up
    chains = (countdown_chain(problem, rng, config.attempts, share) for problem in problems)
    found = (chain for chain in chains if chain is not None)
    yield from tqdm(islice(found, config.count), "chains", config.count, disable=not show)


# --- from models' own attempts --------------------------------------------------------------------


@dataclass
class Attempt:
    """A model's response to a problem."""

    text: str
    answer: str | None
    correct: bool
    critique: str | None = None  # None: the template's


@dataclass
class Draft:
    """What a chain will be made of."""

    problem: Problem
    failures: list[Attempt]  # with different answers, in the order in which they are shown
    right: list[Attempt]  # the first ends the chain, the second may confirm it


@dataclass(frozen=True)
class Loading:
    """How checkpoints are loaded: the flags of these names."""

    template_args: str = ""
    dtype: str = "auto"


LOADING = Loading()


def load_sampler(
    path: str, max_batch: int = 256, loading: Loading = LOADING
) -> tuple[Sampler, Tokenizer]:
    """A policy ready to sample: on a GPU, in bf16, where there is one; see devices.py."""
    device = pick_device()
    policy = load_pretrained(path, getattr(torch, pick_dtype(loading.dtype, device)), device)
    tokenizer = load_tokenizer(path, loading.template_args)
    return Sampler(policy, tokenizer, max_batch=max_batch), tokenizer


def ask(
    path: str,
    chats: list[list[dict]],
    n: int,
    params: SamplingParams,
    what: str,
    loading: Loading = LOADING,
) -> list[list[str]]:
    """What a checkpoint answers to each chat: up to n answers, without those that never end or are
    garbled.

    A chat that leaves no room for an answer gets none, and is no error: one long set of notes must
    not undo hours of attempts. what: for the terminal.
    """
    sampler, tokenizer = load_sampler(path, loading=loading)
    print(f"{what}: {len(chats)} x {n} from {path}")
    prompts = [tokenizer.chat(chat, add_generation_prompt=True) for chat in chats]
    room = sampler.model.config.context - params.max_tokens
    fitting = [i for i, prompt in enumerate(prompts) if len(prompt) <= room]
    if len(fitting) < len(prompts):
        missing = len(prompts) - len(fitting)
        print(f"{what}: {missing} prompts leave no room for {params.max_tokens} tokens: skipped")
    answers = sampler.generate(
        [prompts[i] for i in fitting], n, params, keys=fitting, progress=True
    )
    texts: list[list[str]] = [[] for _ in chats]
    for i, row in zip(fitting, answers):
        asked = " ".join(turn["content"] for turn in chats[i])
        for answer in row:
            text = tokenizer.decode(answer.tokens[:-1], True).strip()
            if answer.finish_reason == "stop" and text and not tasks.garbled(text, asked):
                texts[i].append(text)
    return texts


def sample_attempts(
    problems: list[Problem],
    models: list[str],
    n: int,
    params: SamplingParams,
    loading: Loading = LOADING,
) -> list[list[Attempt]]:
    """Step 1. n attempts per problem and checkpoint, verified.

    An answer need not be boxed yet: merging boxes it.
    """
    chats = [tasks.messages(problem) for problem in problems]
    said: list[tuple[int, str]] = []  # (number of the problem, text)
    for path in models:
        answers = ask(path, chats, n, params, "attempts", loading)
        for number, texts in enumerate(answers):
            said += [(number, text) for text in texts]
    boxed = [tasks.boxed(text) for _, text in said]
    verdicts = tasks.judge_all([problems[number] for number, _ in said], boxed)
    attempts: list[list[Attempt]] = [[] for _ in problems]
    for (number, text), response, verdict in zip(said, boxed, verdicts):
        answer = verify.last_boxed(response)
        if answer:
            answer = answer.rstrip(". ")  # of a sentence that ended in the answer
        attempts[number].append(Attempt(text, answer, verdict.correct))
    return attempts


def choose(
    attempts: list[Attempt], most: int, rng: random.Random
) -> tuple[list[Attempt], list[Attempt]]:
    """(failures with different answers, right attempts), shuffled.

    How many failures is random: at most `most`, and at least 1 where there are any.
    """
    failures = {attempt.answer: attempt for attempt in attempts if not attempt.correct}
    right = {attempt.text: attempt for attempt in attempts if attempt.correct}
    shuffled_failures = rng.sample(list(failures.values()), len(failures))
    shuffled_right = rng.sample(list(right.values()), len(right))
    most = min(most, len(failures))
    shown = rng.randint(min(1, most), most)
    return shuffled_failures[:shown], shuffled_right


def draft_chains(
    problems: list[Problem], attempts: list[list[Attempt]], most: int, rng: random.Random
) -> list[Draft]:
    """What each problem's chain will show; UserError if no problem has a right attempt."""
    drafts = []
    for problem, row in zip(problems, attempts):
        failures, right = choose(row, most, rng)
        if right:
            drafts.append(Draft(problem, failures, right))
    tried = [attempt for row in attempts for attempt in row]
    solved = sum(attempt.correct for attempt in tried)
    print(
        f"{len(tried)} attempts ended, {solved} of them right; "
        f"{len(drafts)} of {len(problems)} problems have a right one"
    )
    if not drafts:
        raise UserError(
            f"no attempt at any of the {len(problems)} problems is right: "
            "a stronger --model, or a larger --n"
        )
    return drafts


def critic_chat(problem: Problem, attempt: Attempt) -> list[dict]:
    """The question to the critic.

    It is told the verdict, but not the reference answer, which it could only repeat.
    """
    wanted = "right. In two or three sentences, say how one can check that it is right."
    if not attempt.correct:
        wanted = (
            "wrong. In two or three sentences, say which step goes wrong, and why. "
            "Do not solve the problem."
        )
    content = (
        f"Problem: {problem.question}\n\nAttempt: {unboxed(attempt.text)}\n\n"
        f"The attempt's answer, {attempt.answer}, is {wanted}"
    )
    return [{"role": "user", "content": content}]


def usable(critique: str, problem: Problem, attempt: Attempt) -> bool:
    """Short, no box, and on a failure not the answer, which would make the next attempt a copy."""
    answer = rf"(?<![\w.]){re.escape(problem.answer)}(?!\w)"
    if not attempt.correct and re.search(answer, critique):
        return False
    return 20 <= len(critique) <= 800 and "\\boxed" not in critique


def criticise(
    path: str, drafts: list[Draft], params: SamplingParams, loading: Loading = LOADING
) -> None:
    """Step 2. Gives the attempts that are shown the critic's critique, where it is usable."""
    pairs = []
    for draft in drafts:
        pairs += [(draft.problem, attempt) for attempt in [*draft.failures, draft.right[0]]]
    chats = [critic_chat(problem, attempt) for problem, attempt in pairs]
    critiques = ask(path, chats, 1, params, "critiques", loading)
    for (problem, attempt), said in zip(pairs, critiques):
        if said and usable(said[0], problem, attempt):
            attempt.critique = said[0]


def unboxed(text: str) -> str:
    """\\boxed{5} -> 5: only the end of a chain is boxed."""
    return re.sub(r"\\boxed\s*\{([^{}]*)\}", r"\1", text).replace("\\boxed", "").strip()


def merge(draft: Draft) -> str:
    """Step 3. One response: attempts that fail and are noticed, one that holds and is verified, the
    box."""
    parts = []
    for attempt in draft.failures:
        doubt = "it comes to no answer"
        if attempt.answer:
            doubt = f"it comes to {attempt.answer}, but that does not hold"
        critique = attempt.critique or "A step above is wrong."
        parts.append(unboxed(attempt.text))
        parts.append(f"Wait, let me check this: {doubt}. {critique}")
        parts.append("Let me try again, in another way.")
    right = draft.right[0]
    parts.append(unboxed(right.text))
    if right.critique:
        parts.append(f"Let me verify this. {right.critique}")
    elif len(draft.right) > 1:
        parts.append("Let me verify this by working it out once more.")
        parts.append(unboxed(draft.right[1].text))
        parts.append("Both ways agree.")
    else:
        parts.append(
            "Let me verify this: going over the steps again, each follows from those before it."
        )
    parts.append(f"So the answer is \\boxed{{{right.answer}}}")
    return "\n\n".join(parts)


REWRITING = (
    "Rewrite these notes as one fluent chain of thought in the first person. Keep the failed "
    "attempts, how they are noticed, and the verification. End with the answer in \\boxed{}."
)


def rewrite(
    path: str, rows: list[dict], params: SamplingParams, loading: Loading = LOADING
) -> None:
    """Step 4. A checkpoint rewrites each response; one that is no longer right is not taken."""
    chats = []
    for row in rows:
        wish = f"{row['problem']}\n\nNotes: {row['response']}\n\n{REWRITING}"
        chats.append([{"role": "user", "content": wish}])
    answers = ask(path, chats, 1, params, "rewriting", loading)
    texts = [answer[0] if answer else "" for answer in answers]
    problems = [Problem(row["problem"], row["answer"], row["task"]) for row in rows]
    for row, text, verdict in zip(rows, texts, tasks.judge_all(problems, texts)):
        if verdict.correct:
            row["response"] = text


def by_attempts(config: "Config") -> list[dict]:
    """Chains from the attempts of `--model` at the problems of `--data`: T1's four steps."""
    problems = tasks.load(config.data, config.fields, config.seed)[: config.limit]
    params = SamplingParams(config.max_tokens, config.temperature, seed=config.seed)
    rng = random.Random(f"attempts {config.seed}")

    loading = Loading(config.template_args, config.dtype)
    attempts = sample_attempts(problems, config.model, config.n, params, loading)
    drafts = draft_chains(problems, attempts, config.failures, rng)
    if config.critic:
        criticise(config.critic, drafts, params, loading)
    rows = []
    for draft in drafts:
        row = training_row(draft.problem, merge(draft))
        rows.append(row | {"failures": len(draft.failures)})
    if config.rewrite:
        params = replace(params, max_tokens=config.rewrite_tokens)
        rewrite(config.rewrite, rows, params, loading)
    for draft, row in zip(drafts, rows):
        if draft.problem.earlier:  # then sft.py needs the whole chat
            answer = {"role": "assistant", "content": row["response"]}
            row["messages"] = [*tasks.messages(draft.problem), answer]
    return rows


# --- command --------------------------------------------------------------------------------------


@dataclass
class Config:
    out: str
    """The JSONL file to write; it must not exist yet."""
    seed: int = 0
    """The same seed gives the same chains."""
    count: int = 20_000
    """By program: number of chains."""
    numbers: Literal[3, 4] = 3
    """By program: how many numbers a countdown has."""
    largest: int = tasks.LARGEST_GIVEN
    """By program: the numbers are drawn from 1 to this (99 at most)."""
    operators: str = "+-*"
    """By program: the operators allowed; add / for exact division."""
    attempts: int = 3
    """By program: attempts drawn at a problem, the most that a chain shows. 99: all there are."""
    give_up: float = 0.0
    """By program: of the problems at which no drawn attempt is right, this share has a chain, too,
    and it gives up. (findings.py asks what RL makes of it; T1's chains all end well.)"""
    data: str | None = None
    """From attempts: the problems, a file with `problem` (or `question`) and `answer`, or a data
    set's name (hub.py)."""
    fields: str = ""
    """From attempts: what these are called there, if otherwise: problem=NAME,answer=NAME."""
    model: tuple[str, ...] = ()
    """From attempts: the checkpoints that attempt the problems; several give chains that change
    their mind more."""
    n: int = 4
    """From attempts: attempts per problem and checkpoint."""
    limit: int | None = None
    """From attempts: only the first so many problems."""
    max_tokens: int = 512
    """From attempts: longest attempt; one that is not finished by then is not used."""
    temperature: float = 0.8
    """From attempts: below RL's 1.2, for attempts that are different but still coherent."""
    failures: int = 3
    """From attempts: at most so many failed attempts in one chain."""
    critic: str | None = None
    """From attempts: checkpoint that writes the critiques. Without it a plain template, and a
    second right attempt as the check, where there is one."""
    rewrite: str | None = None
    """From attempts: checkpoint that rewrites the merged chains; they stay as merged without it."""
    rewrite_tokens: int = 1024
    """From attempts: longest rewriting; it holds several attempts, and needs more room than one."""
    template_args: str = ""
    """From attempts: JSON that the chat template is to know, such as '{"enable_thinking": false}'.
    """
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """From attempts: what the checkpoints compute in. auto: bfloat16 on a GPU that has it, else
    float32."""


def check_flags(config: Config) -> None:
    """UserError for what can be known to be wrong before anything is sampled."""
    if Path(config.out).exists():
        raise UserError(f"{config.out} exists already: choose another --out")
    cli.check_parent(config.out)
    if bool(config.data) != bool(config.model):
        raise UserError(
            "--data and --model belong together: a problem file, and checkpoints that attempt it"
        )
    if min(config.max_tokens, config.rewrite_tokens) < 1:
        raise UserError("--max-tokens and --rewrite-tokens must be at least 1")
    counts = (config.count, config.n, config.attempts, config.limit or 1)
    if min(counts) < 1 or config.failures < 0:
        raise UserError(
            "--count, --n, --attempts and --limit must be at least 1, --failures at least 0"
        )
    if not 0 <= config.give_up <= 1:
        raise UserError(f"--give-up {config.give_up}: a share from 0 to 1")
    tasks.made("countdown", config)  # for its checks


def main(config: Config) -> None:
    check_flags(config)
    with cli.holding(config.out):
        rows = by_attempts(config) if config.data else list(by_program(config))
        cli.write_jsonl(config.out, rows)
    print(f"wrote {len(rows)} chains to {config.out}")


if __name__ == "__main__":
    cli.run(main, Config)
