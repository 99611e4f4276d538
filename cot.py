"""T1 stage 1, the data: chains of thought that try, fail, notice, try again and verify.

    python cot.py --out chains.jsonl --count 20000                                    # countdown, by program
    python cot.py --out chains.jsonl --data gsm8k.jsonl --model DIR [DIR2 ...] --n 4   # from models' own attempts

Both write JSONL that `sft.py --data` reads: `problem`, `answer`, `task` and `response`.

**By program** (countdown), the paper's way in miniature. Several attempts at a problem are drawn, each at another
value that the numbers can make; they are merged up to the first that is right; a problem without a right one is
dropped. Every attempt spells its arithmetic out and compares what it came to with the target; then a check evaluates
the whole expression again; then the box:

    25-7=18, 18+3=21 not 4
    7*3=21, 25-21=4 is 4
    check 25-(7*3)=25-21=4 ok
    \\boxed{25-(7*3)}

Such chains hold a shortcut, and it is not planted: it follows from ending every chain in success, as T1's are. Where
three attempts were drawn, the third that is shown always succeeds, so a model learns to *claim* success at the third
attempt sooner than it learns to look whether the value is the target; and it never sees what comes after a third
failure. More imitation makes better guesses of it; that it pays to look, and to think on, is left for RL to find.

**From models' own attempts** (any problem file), T1's four steps: `sample_attempts` from one or several checkpoints
and verify them; `criticise` the wrong ones (where they fail) and the right one (why it holds) with a critic, or with a
plain template where there is no critic or it says nothing usable; `merge` them into one response that tries, notices,
tries again, verifies and ends in the box; with `--rewrite DIR`, let a model rewrite that into one fluent text, kept
only where its answer is still right. A problem without a right attempt is dropped: there is nothing to end its chain.

Where this differs from the paper: T1 merges and rewrites with strong models, here the merging is by program; and how
many failures a chain shows is drawn at random, so that fewer chains end at the same place.
"""

import json
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
from model import load_pretrained
from sample import Sampler, SamplingParams
from tasks import Problem
from tokenizer import Tokenizer, load_tokenizer

# ---------------------------------------------------------------------------------------------------- by program


def check(expression: str) -> str:
    """Evaluate an expression step by step, innermost brackets first: "(7-3)*5" -> "(7-3)*5=4*5=20"."""
    forms = [expression]
    while not forms[-1].isdigit():
        inner = re.search(r"\((\d+)([-+*/])(\d+)\)|^(\d+)([-+*/])(\d+)$", forms[-1])
        x, operator, y = (part for part in inner.groups() if part)
        value = {"+": int(x) + int(y), "-": int(x) - int(y), "*": int(x) * int(y), "/": int(x) // int(y)}[operator]
        forms.append(forms[-1][: inner.start()] + str(value) + forms[-1][inner.end() :])
    return "=".join(forms)


def countdown_chain(problem: Problem, rng: random.Random, attempts: int) -> dict | None:
    """One chain for a countdown problem: of `attempts` values that the numbers can make, drawn in random order, those
    up to the first that is the target. None where none of them is."""
    target, numbers, operators = tasks.read_countdown(problem.answer)
    walks = tasks.ways(numbers, operators)
    if target not in walks:
        raise UserError(f"there is no way from {numbers} to {target} with {operators}")
    text = ""
    for walk in rng.sample(list(walks.values()), min(attempts, len(walks))):
        steps = ", ".join(walk.steps)
        if walk.value == target:
            text += f"{steps}{tasks.CLAIM}{target}\n"
            text += f"check {check(walk.expression)} ok\n\\boxed{{{walk.expression}}}"
            return {"problem": problem.question, "answer": problem.answer, "task": "countdown", "response": text}
        text += f"{steps}{tasks.FAILURE}{target}\n"
    return None


WORDS = [tasks.FAILURE, tasks.CLAIM, ", ", "check ", " ok\n", "\\boxed{", "numbers ", "target ", "operators "]
"""What the demo's tokenizer holds as one token each, besides the numbers up to 99."""


def by_program(config: "Config", show: bool = True) -> Iterator[dict]:
    """`count` chains for countdown training problems, several for each where there are fewer problems than chains. The
    held-out problems are never used. show: a progress bar."""
    problems = tasks.countdown(config.seed, numbers=config.numbers, operators=config.operators, largest=config.largest)
    rng = random.Random(f"chains {config.seed}")
    chains = (countdown_chain(problem, rng, config.attempts) for problem in problems)
    found = islice((chain for chain in chains if chain is not None), config.count)
    yield from tqdm(found, "chains", config.count, disable=not show)


# ---------------------------------------------------------------------------------------------------- by attempts


@dataclass(frozen=True)
class Attempt:
    text: str
    answer: str | None
    correct: bool


def load_sampler(path: str, max_batch: int = 256) -> tuple[Sampler, Tokenizer]:
    """A policy ready to sample: bf16 on a GPU, fp32 without one."""
    gpu = torch.cuda.is_available()
    policy = load_pretrained(path, dtype=torch.bfloat16 if gpu else torch.float32, device="cuda" if gpu else "cpu")
    tokenizer = load_tokenizer(path)
    return Sampler(policy, tokenizer, max_batch=max_batch), tokenizer


def ask(path: str, chats: list[list[dict]], n: int, params: SamplingParams, what: str) -> list[list[str]]:
    """What a checkpoint answers to each chat, up to n answers; those that never end or are garbled are left out, and so
    are chats without room for an answer: one long set of notes must not undo hours of attempts."""
    sampler, tokenizer = load_sampler(path)
    print(f"{what}: {len(chats)} x {n} from {path}")
    prompts = [tokenizer.chat(chat, add_generation_prompt=True) for chat in chats]
    fits = [i for i, prompt in enumerate(prompts) if len(prompt) + params.max_tokens <= sampler.model.config.context]
    if len(fits) < len(prompts):
        print(f"{what}: {len(prompts) - len(fits)} prompts leave no room for {params.max_tokens} tokens: skipped")
    answers = sampler.generate([prompts[i] for i in fits], n, params, keys=fits, progress=True)
    texts: list[list[str]] = [[] for _ in chats]
    for i, row in zip(fits, answers):
        texts[i] = [tokenizer.decode(a.tokens[:-1], True).strip() for a in row if a.finish_reason == "stop"]
    contents = [chat[-1]["content"] for chat in chats]
    return [[t for t in row if t and not tasks.garbled(t, asked)] for row, asked in zip(texts, contents)]


def sample_attempts(problems: list[Problem], models: list[str], n: int, params: SamplingParams) -> list[list[Attempt]]:
    """Step 1. n attempts per problem and checkpoint, verified. An answer need not be boxed yet: merging boxes it."""
    chats = [tasks.messages(problem) for problem in problems]
    by_model = [ask(path, chats, n, params, "attempts") for path in models]
    texts = [[text for row in rows for text in row] for rows in zip(*by_model)]
    flat = [(problem, tasks.boxed(text)) for problem, row in zip(problems, texts) for text in row]
    verdicts = tasks.judge_all([problem for problem, _ in flat], [boxed for _, boxed in flat])
    answers = [verify.last_boxed(boxed) for _, boxed in flat]
    judged = iter([(a and a.rstrip(". "), verdict.correct) for a, verdict in zip(answers, verdicts)])
    return [[Attempt(text, *next(judged)) for text in row] for row in texts]


def choose(attempts: list[Attempt], most: int, rng: random.Random) -> tuple[list[Attempt], list[Attempt]]:
    """(failures with different answers, right attempts), shuffled; at most `most` failures, how many is random."""
    failures = {attempt.answer: attempt for attempt in attempts if not attempt.correct}
    right = {attempt.text: attempt for attempt in attempts if attempt.correct}
    failures, right = (rng.sample(list(found.values()), len(found)) for found in (failures, right))
    return failures[: rng.randint(min(1, len(failures), most), min(len(failures), most))], right


def critic_chat(problem: Problem, attempt: Attempt) -> list[dict]:
    """The question to the critic. It is told the verdict, not the reference answer, which it could only repeat."""
    wanted = "right. In two or three sentences, say how one can check that it is right."
    if not attempt.correct:
        wanted = "wrong. In two or three sentences, say which step goes wrong, and why. Do not solve the problem."
    attempted = f"Problem: {problem.question}\n\nAttempt: {unboxed(attempt.text)}"
    return [{"role": "user", "content": f"{attempted}\n\nThe attempt's answer, {attempt.answer}, is {wanted}"}]


def usable(critique: str, problem: Problem, attempt: Attempt) -> bool:
    """Short, no box, and on a failure not the reference answer, which would make the next attempt a copy."""
    tells = re.search(rf"(?<![\w.]){re.escape(problem.answer)}(?!\w)", critique) and not attempt.correct
    return 20 <= len(critique) <= 800 and "\\boxed" not in critique and not tells


def criticise(path: str | None, pairs: list[tuple[Problem, Attempt]], params: SamplingParams) -> list[str | None]:
    """Step 2. A critique of each attempt; None, for the template, where there is no critic or nothing usable."""
    if path is None or not pairs:
        return [None] * len(pairs)
    critiques = ask(path, [critic_chat(*pair) for pair in pairs], 1, params, "critiques")
    return [row[0] if row and usable(row[0], *pair) else None for row, pair in zip(critiques, pairs)]


def unboxed(text: str) -> str:
    """\\boxed{5} -> 5: only the end of a chain is boxed."""
    return re.sub(r"\\boxed\s*\{([^{}]*)\}", r"\1", text).replace("\\boxed", "").strip()


def merge(failures: list[tuple[Attempt, str | None]], right: list[Attempt], confirmation: str | None) -> str:
    """Step 3. One response: attempts that fail and are noticed, one that holds and is verified, the box.

    A critique of None becomes the template. Success is confirmed by a second right attempt where there is one.
    """
    parts = []
    for attempt, critique in failures:
        doubt = f"it comes to {attempt.answer}, but that does not hold" if attempt.answer else "it comes to no answer"
        parts += [unboxed(attempt.text), f"Wait, let me check this: {doubt}. {critique or 'A step above is wrong.'}"]
        parts.append("Let me try again, in another way.")
    parts.append(unboxed(right[0].text))
    if confirmation:
        parts.append(f"Let me verify this. {confirmation}")
    elif len(right) > 1:
        parts += ["Let me verify this by working it out once more.", unboxed(right[1].text), "Both ways agree."]
    else:
        parts.append("Let me verify this: going over the steps again, each follows from those before it.")
    return "\n\n".join([*parts, f"So the answer is \\boxed{{{right[0].answer}}}"])


REWRITING = (
    "Rewrite these notes as one fluent chain of thought in the first person. Keep the failed attempts, how they are "
    "noticed, and the verification. End with the answer in \\boxed{}."
)


def rewrite(path: str, rows: list[dict], params: SamplingParams) -> None:
    """Step 4. Let a checkpoint rewrite each merged response; one whose answer is no longer right is not taken."""
    wishes = [f"{row['problem']}\n\nNotes: {row['response']}\n\n{REWRITING}" for row in rows]
    answers = ask(path, [[{"role": "user", "content": wish}] for wish in wishes], 1, params, "rewriting")
    texts = [answer[0] if answer else "" for answer in answers]
    problems = [Problem(row["problem"], row["answer"], row["task"]) for row in rows]
    for row, text, verdict in zip(rows, texts, tasks.judge_all(problems, texts)):
        if verdict.correct:
            row["response"] = text


def by_attempts(config: "Config") -> list[dict]:
    problems = tasks.load(config.data)[: config.limit]
    params = SamplingParams(config.max_tokens, config.temperature, seed=config.seed)
    rng = random.Random(f"attempts {config.seed}")
    attempts = sample_attempts(problems, config.model, config.n, params)
    tried, solved = sum(map(len, attempts)), sum(attempt.correct for row in attempts for attempt in row)
    chosen = [(problem, *choose(row, config.failures, rng)) for problem, row in zip(problems, attempts)]
    chosen = [(problem, failures, right) for problem, failures, right in chosen if right]
    print(f"{tried} attempts ended, {solved} of them right; {len(chosen)} of {len(problems)} problems have a right one")
    if not chosen:
        raise UserError(
            f"no attempt at any of the {len(problems)} problems is right: a stronger --model, or a larger --n"
        )
    pairs = [(problem, attempt) for problem, failures, right in chosen for attempt in [*failures, right[0]]]
    critiques = iter(criticise(config.critic, pairs, params))
    rows = []
    for problem, failures, right in chosen:
        response = merge([(attempt, next(critiques)) for attempt in failures], right, next(critiques))
        row = {"problem": problem.question, "answer": problem.answer, "task": problem.task, "response": response}
        rows.append(row | {"failures": len(failures)})
    if config.rewrite:
        rewrite(config.rewrite, rows, replace(params, max_tokens=config.rewrite_tokens))
    return rows


# ---------------------------------------------------------------------------------------------------- command


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
    """By program: attempts drawn at a problem, the most that a chain can show. 99: all there are."""
    data: str | None = None
    """From attempts: the problem file, JSONL with `problem` (or `question`) and `answer`."""
    model: tuple[str, ...] = ()
    """From attempts: the checkpoints that attempt the problems; several give chains that change their mind more."""
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
    """From attempts: checkpoint that writes the critiques; a plain template without it."""
    rewrite: str | None = None
    """From attempts: checkpoint that rewrites the merged chains; they stay as merged without it."""
    rewrite_tokens: int = 1024
    """From attempts: longest rewriting; it holds several attempts, so it needs more room than one of them."""


def main(config: Config) -> None:
    if Path(config.out).exists():
        raise UserError(f"{config.out} exists already: choose another --out")
    cli.check_parent(config.out)
    if bool(config.data) != bool(config.model):
        raise UserError("--data and --model belong together: a problem file, and checkpoints that attempt it")
    if min(config.max_tokens, config.rewrite_tokens) < 1:
        raise UserError("--max-tokens and --rewrite-tokens must be at least 1")
    if min(config.count, config.n, config.attempts, config.limit or 1) < 1 or config.failures < 0:
        raise UserError("--count, --n, --attempts and --limit must be at least 1, --failures at least 0")
    tasks.check_largest(config.largest)
    tasks.check_operators(config.operators)
    rows = by_attempts(config) if config.data else list(by_program(config))
    cli.write_text(config.out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"wrote {len(rows)} chains to {config.out}")


if __name__ == "__main__":
    cli.run(main, Config)
