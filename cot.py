"""T1 stage 1, the data: chains of thought that try, fail, notice, try again and verify.

    python cot.py --out chains.jsonl --count 20000                                    # countdown, by program
    python cot.py --out chains.jsonl --data gsm8k.jsonl --model DIR [DIR ...] --n 4   # from a model's own attempts

Both write JSONL that `sft.py --data` reads: `problem`, `answer`, `response`, and `stop` (false where the chain is cut
off before its end, so that no stop token is trained on it).

**By program** (countdown). A chain is a list of attempts with their arithmetic spelled out, each followed by " no" or
" yes"; then a check that evaluates the whole expression again; then the box:

    25-7=18, 18+3=21 no
    7*3=21, 25-21=4 yes
    check 25-(7*3)=25-21=4 ok
    \\boxed{25-(7*3)}

The trap here is a shortcut. If every chain held at most six attempts and ended well, then "the sixth attempt succeeds"
would be a law of the data, and a model learns it sooner than arithmetic: it would claim success at the sixth attempt
whatever came out. So the chance that an attempt succeeds is made the same at every position (`hazard`), and a chain
that has not succeeded after `most` attempts is simply cut off: position says nothing, only the value does.
"""

import random
import re

import tasks
from cli import UserError
from tasks import Problem, Walk


def check(expression: str) -> str:
    """Evaluate an expression step by step, innermost brackets first: "(7-3)*5" -> "(7-3)*5=4*5=20"."""
    forms = [expression]
    while not forms[-1].isdigit():
        inner = re.search(r"\((\d+)([-+*/])(\d+)\)|^(\d+)([-+*/])(\d+)$", forms[-1])
        x, operator, y = (part for part in inner.groups() if part)
        value = {"+": int(x) + int(y), "-": int(x) - int(y), "*": int(x) * int(y), "/": int(x) // int(y)}[operator]
        forms.append(forms[-1][: inner.start()] + str(value) + forms[-1][inner.end() :])
    return "=".join(forms)


def solve(target: int, numbers: list[int], operators: str, rng: random.Random, tries: int = 100_000) -> Walk:
    """A random solution: random walks until one ends at the target."""
    for _ in range(tries):
        walk = tasks.random_walk(numbers, operators, rng)
        if walk.value == target:
            return walk
    raise UserError(f"no way found from {numbers} to {target} with {operators} in {tries} tries")


def countdown_chain(problem: Problem, rng: random.Random, most: int = 8, hazard: float = 0.25) -> dict:
    """One chain for a countdown problem: each attempt succeeds with chance `hazard`; cut off after `most` failures."""
    target, numbers, operators = tasks.read_countdown(problem.answer)
    lines, tried = [], set()
    while len(lines) < most and rng.random() > hazard:
        walk = tasks.random_walk(numbers, operators, rng)
        for _ in range(20):  # a failure that is new, where there is one left
            if walk.value != target and walk.expression not in tried:
                break
            walk = tasks.random_walk(numbers, operators, rng)
        else:
            break
        tried.add(walk.expression)
        lines.append(f"{', '.join(walk.steps)} no\n")
    solved = len(lines) < most
    if solved:
        walk = solve(target, numbers, operators, rng)
        lines.append(f"{', '.join(walk.steps)} yes\n")
        lines.append(f"check {check(walk.expression)} ok\n\\boxed{{{walk.expression}}}")
    row = {"problem": problem.question, "answer": problem.answer, "task": "countdown"}
    return row | {"response": "".join(lines), "stop": solved}


WORDS = [" no\n", " yes\n", ", ", "check ", " ok\n", "\\boxed{", "numbers ", "target ", "operators "]
"""What the demo's tokenizer holds as one token each, besides the numbers up to 99."""
