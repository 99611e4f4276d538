"""Eight small tasks, from easy to hard: is there one of which a small model gets anything right, as it comes?

    python benchmarks/small_tasks.py runs/small        # writes runs/small/NAME.jsonl, 40 problems each
    for file in runs/small/*.jsonl; do
        python evaluate.py --model MODEL --data $file --n 4 --k 1,4 --temperature 0.8 --max-tokens 128 --lenient
    done

RL needs a right response in a group of K, and cot.py a right attempt for a chain: where nothing is right, nothing
is learned. The answer counts wherever in the text it stands (--lenient), for a model as it comes seldom boxes it.
"""

import operator
import random
import sys
from collections.abc import Callable
from functools import reduce
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cli

COUNT = 40
SIGNS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
NAMES = ("Tom", "Ann", "Ben", "Mia", "Sam", "Eva", "Leo", "Zoe")
THINGS = ("apples", "books", "coins", "pens", "cards", "shells")


def terms(
    sign: str, low: int, high: int, count: int = 2
) -> Callable[[random.Random], tuple[str, int]]:
    """What draws "What is 5 + 3?" and 8. Of a difference the larger number comes first."""

    def draw(rng: random.Random) -> tuple[str, int]:
        numbers = [rng.randint(low, high) for _ in range(count)]
        if sign == "-":
            numbers.sort(reverse=True)
        expression = f" {sign} ".join(map(str, numbers))
        return f"What is {expression}?", reduce(SIGNS[sign], numbers)

    return draw


def one_step(rng: random.Random) -> tuple[str, int]:
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    has, more = rng.randint(2, 20), rng.randint(2, 20)
    question = (
        f"{name} has {has} {thing} and buys {more} more. How many {thing} does {name} have now?"
    )
    return question, has + more


def two_steps(rng: random.Random) -> tuple[str, int]:
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    has, more = rng.randint(5, 20), rng.randint(5, 20)
    less = rng.randint(2, 9)
    question = f"{name} has {has} {thing}, buys {more} more, and gives {less} away."
    return f"{question} How many {thing} does {name} have now?", has + more - less


TASKS = {
    "sum-to-30": terms("+", 2, 30),
    "difference-to-30": terms("-", 2, 30),
    "product-to-12": terms("*", 2, 12),
    "sum-of-three": terms("+", 2, 20, 3),
    "sum-to-99": terms("+", 11, 99),
    "sum-to-999": terms("+", 101, 999),
    "one-step": one_step,
    "two-steps": two_steps,
}


def write(folder: Path) -> None:
    for name, draw in TASKS.items():
        rng = random.Random(name)
        answers: dict[str, int] = {}
        while len(answers) < COUNT:
            question, answer = draw(rng)
            answers[question] = answer
        rows = [
            {"problem": question, "answer": str(answer)} for question, answer in answers.items()
        ]
        cli.write_jsonl(folder / f"{name}.jsonl", rows)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    write(Path(sys.argv[1]))
