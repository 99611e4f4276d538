"""Problems: where they come from, how they are put to the model, and how a response is judged.

A `Problem` is a question, its reference answer, and the name of its task. A `Task` says what is
particular to such problems: the judge that compares a response with the problem, the instruction
that follows the question, and a few things more that may be left out. There are three of them:

    math        any problem file; `verify.py` decides whether the last \\boxed{} equals the answer,
                `worked.py` whether it is more than the question put into a box
    choice      the same with options to choose from, shuffled; the answer is a letter
    countdown   the demo's: reach a target with all of the given numbers, each used exactly once
                numbers 3 5 7, target 22      ->  \\boxed{(5*3)+7}

Countdown suits RL for reasoning: it takes several tries, is easy to check exactly, and rewards
trying and failing. Problems whose multiset of numbers hashes to 0 modulo 10 are held out, all
others are for training: the two never share a set of numbers.

A task of your own is a function and a line, in a file of your own (see `rl.command`):

    def judge_reverse(problem: Problem, response: str) -> Verdict:
        boxed = verify.last_boxed(response)
        if boxed is None:
            return Verdict("no_answer")
        return Verdict("correct" if boxed == problem.answer[::-1] else "wrong")

    tasks.TASKS["reverse"] = Task(judge_reverse, instruction="\\nAnswer in \\\\boxed{}.")

Problem files name it, `"task": "reverse"`, and `rl.py --task reverse` knows it if the Task also has
`problems`.

    python tasks.py --show problems.jsonl    # three problems of a file or data set, as they are put
"""

import math
import random
import re
import unicodedata
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import cli
import hub
import verify
import worked
from cli import UserError, read_rows
from tokenizer import Tokenizer
from verify import Verdict

LARGEST = 99
"""Of the values in a countdown chain: the demo's tokenizer has a token for each number up to it."""
LARGEST_GIVEN = 21
"""The numbers of a problem are drawn from 1 to this: three of them make eight values on average."""


@dataclass(frozen=True)
class Problem:
    question: str
    answer: str
    task: str = "math"
    earlier: tuple[tuple[str, str], ...] = ()
    """(role, content) of every turn before the question, where a problem file has a chat."""


@dataclass(frozen=True)
class Task:
    """What is particular to the problems of one name; see `TASKS`."""

    judge: Callable[[Problem, str], Verdict]
    """Compares a response with its problem. Must not raise: a response may hold anything."""
    instruction: str = ""
    """Follows the question in the prompt: how to answer."""
    read_answer: Callable[[str], str] = str
    """The reference answer from a problem file's `answer`; UserError if it is none."""
    diagnose: Callable[[Problem, str], str] | None = None
    """By which kind of failure a response fails, or "correct". None: the verdict's outcome."""
    problems: Callable[[Any, bool], Iterator[Problem]] | None = None
    """For `--task NAME`: (the command's flags, held out or for training?) -> an endless stream, or
    a UserError for flags that it cannot take. It is seeded by `flags.seed` and by nothing else:
    every rank draws it, and --resume does again."""
    forced: str = "\nThe final answer is \\boxed{"
    """Opens the answer behind a chain of thought that is cut (evaluate.py's --budgets)."""


# --- countdown ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Walk:
    """One attempt at a countdown: its steps in order, the expression they make, and its value."""

    steps: tuple[str, ...]  # "7-3=4", "5*4=20"
    expression: str  # "(7-3)*5"
    value: int


def combine(x: int, operator: str, y: int) -> int:
    """x operator y for x >= y, or 0 where the result is not a whole number in 1..LARGEST."""
    result = {"+": x + y, "-": x - y, "*": x * y, "/": x // y if x % y == 0 else 0}[operator]
    return result if result <= LARGEST else 0


def ways(numbers: list[int], operators: str) -> dict[int, Walk]:
    """{value: the first walk found to it}, for every value that all of the numbers make.

    All intermediate values stay whole and within 1..LARGEST. One way to each: 43+19-17 and 43-17+19
    are the same sum.
    """
    found: dict[int, Walk] = {}

    def extend(pool: list[tuple[int, str]], steps: list[str]) -> None:
        if len(pool) == 1:
            value, expression = pool[0]
            expression = expression.removeprefix("(").removesuffix(")")
            found.setdefault(value, Walk(tuple(steps), expression, value))
            return
        for i, j in combinations(range(len(pool)), 2):
            rest = [member for k, member in enumerate(pool) if k not in (i, j)]
            (y, right), (x, left) = sorted((pool[i], pool[j]), key=lambda member: member[0])
            for operator in operators:
                if result := combine(x, operator, y):
                    made = (result, f"({left}{operator}{right})")
                    extend([made, *rest], [*steps, f"{x}{operator}{y}={result}"])

    extend([(number, str(number)) for number in sorted(numbers, reverse=True)], [])
    return found


def countdown_problem(numbers: list[int], target: int, operators: str = "+-*") -> Problem:
    """The question names the operators only where they are not the usual + - *."""
    allowed = "" if operators == "+-*" else f", operators {' '.join(operators)}"
    question = f"numbers {' '.join(map(str, numbers))}, target {target}{allowed}"
    return Problem(
        question, f"{target} from {' '.join(map(str, numbers))} with {operators}", "countdown"
    )


def read_countdown(answer: str) -> tuple[int, list[int], str]:
    """(target, numbers, operators) of a countdown problem's `answer`."""
    match = re.fullmatch(r"(\d+) from (\d+(?: \d+)+) with ([-+*/]+)", answer)
    if not match:
        raise UserError(f"not a countdown answer ('22 from 3 5 7 with +-*'): {answer!r}")
    return int(match[1]), [int(number) for number in match[2].split()], match[3]


def checked_countdown(answer: str) -> str:
    """A problem file's `answer` as it is, if it can be read, and has a solution as far as is known:
    for 4 numbers the search would take 50 ms a problem."""
    target, numbers, operators = read_countdown(answer)
    if len(numbers) <= 3 and not solvable(numbers, target, operators):
        raise UserError(f"the countdown {answer!r} has no solution")
    return answer


def solvable(numbers: list[int | Fraction], target: int, operators: str) -> bool:
    """Do all of the numbers make the target? Exactly as the judge sees it, where 7/2*4 is 14."""
    if len(numbers) == 1:
        return numbers[0] == target
    for x, y, *rest in permutations(numbers):
        results = {"+": x + y, "-": x - y, "*": x * y}
        if y:
            results["/"] = Fraction(x, y)
        for operator in results.keys() & set(operators):
            if solvable([results[operator], *rest], target, operators):
                return True
    return False


def countdown(
    seed: int,
    heldout: bool = False,
    numbers: int = 3,
    operators: str = "+-*",
    largest: int = LARGEST_GIVEN,
) -> Iterator[Problem]:
    """A stream of solvable problems, of `numbers` numbers from 1 to `largest`; see `draw_problems`.

    UserError at once for numbers or operators that there are no problems of.
    """
    if not 2 <= numbers <= 4:
        raise UserError(f"--numbers must be 2, 3 or 4, not {numbers}")
    if not 2 <= largest <= LARGEST:
        raise UserError(f"--largest {largest}: from 2 to {LARGEST}")
    if not operators or set(operators) - set("+-*/"):
        raise UserError(f"--operators {operators!r}: some of + - * /")
    return draw_problems(seed, heldout, numbers, operators, largest)


def draw_problems(
    seed: int, heldout: bool, numbers: int, operators: str, largest: int
) -> Iterator[Problem]:
    """Held-out and training problems share no set of numbers.

    All problems are distinct, for as long as there are new ones (100,000 draws in a row find none).
    Then the training problems begin again, in another order; the held-out ones, which are to be
    counted, end in a UserError.
    """
    rng = random.Random(f"countdown {seed} {heldout}")
    seen = set()
    idle = 0
    while True:
        drawn = [rng.randint(1, largest) for _ in range(numbers)]
        target = None
        if is_heldout(drawn) == heldout:
            target = draw_target(drawn, operators, rng)
        problem = (*sorted(drawn), target)
        if target is not None and problem not in seen:
            seen.add(problem)
            idle = 0
            yield countdown_problem(drawn, target, operators)
            continue
        idle += 1
        if idle < 100_000:
            continue
        if heldout or not seen:
            raise UserError(
                f"only {len(seen)} distinct problems of {numbers} numbers from 1 to {largest} "
                f"with the operators {operators} were found"
            )
        seen.clear()
        idle = 0


def is_heldout(numbers: list[int]) -> bool:
    """One in ten sets of numbers is never trained on, in whatever order they come."""
    return zlib.crc32(repr(sorted(numbers)).encode()) % 10 == 0


def draw_target(numbers: list[int], operators: str, rng: random.Random) -> int | None:
    """One of the values that the numbers can make; None where they make none."""
    values = reachable(tuple(sorted(numbers)), operators)
    return rng.choice(values) if values else None


@lru_cache(maxsize=100_000)
def reachable(numbers: tuple[int, ...], operators: str) -> list[int]:
    """The values that `ways` finds; remembered, for a stream often draws the same numbers again."""
    return list(ways(list(numbers), operators))


def judge_countdown(problem: Problem, response: str) -> Verdict:
    """Exact: own parser, exact rationals, only the allowed operators, every number used once."""
    target, numbers, operators = read_countdown(problem.answer)
    boxed = verify.last_boxed(response)
    if boxed is None:
        return Verdict("no_answer")
    try:
        value, used = verify.exact_arithmetic(boxed, operators)
    except verify.ParseError:
        return Verdict("unparsed")
    return Verdict("correct" if value == target and sorted(used) == sorted(numbers) else "wrong")


CLAIM, FAILURE = " is ", " not "
"""What stands between an attempt's value and the target: "62-17=45 not 41", "24+17=41 is 41"."""


def attempts(response: str) -> list[str]:
    """What each attempt of a countdown response came to: the number before " not " or " is "."""
    return re.findall(rf"=(\d+)(?:{FAILURE}|{CLAIM})\d+$", response, re.MULTILINE)


def diagnose_countdown(problem: Problem, response: str) -> str:
    """What a countdown response is, or fails by; the kinds are those of evaluate.py's table.

    `no answer`: no box. `malformed`: the box holds no arithmetic. `wrong numbers`: not each of the
    given numbers once. Otherwise the value is not the target, and the last attempt that was claimed
    to be says why: `wrong arithmetic`: one of its steps is false. `false claim`: all of them are
    right (or nothing was claimed, or the box holds another expression than the attempt).
    """
    target, numbers, operators = read_countdown(problem.answer)
    boxed = verify.last_boxed(response)
    if boxed is None:
        return "no answer"
    try:
        value, used = verify.exact_arithmetic(boxed, operators)
    except verify.ParseError:
        return "malformed"
    if sorted(used) != sorted(numbers):
        return "wrong numbers"
    if value == target:
        return "correct"
    claimed = [line for line in response.split("\n") if CLAIM in line]
    steps = re.findall(r"(\d+)([-+*/])(\d+)=(\d+)", claimed[-1]) if claimed else []
    return "false claim" if all(holds(*step) for step in steps) else "wrong arithmetic"


def holds(x: str, operator: str, y: str, result: str) -> bool:
    """Is x operator y the result? Never raises, whatever a garbled response holds: 7/0, say."""
    try:
        value, _ = verify.exact_arithmetic(f"{x}{operator}{y}", "+-*/")
        wanted, _ = verify.exact_arithmetic(result, "")
    except verify.ParseError:
        return False
    return value == wanted


# --- problem files --------------------------------------------------------------------------------


def load(source: str | Path, fields: str = "", seed: int = 0) -> list[Problem]:
    """The problems of a file (`cli.read_rows` has its formats) or of a data set (`hub.py`): see
    `read_source` and `read_problem`."""
    rows = read_source(source, fields, seed)
    return [read_problem(row, where) for where, row in rows.items()]


def read_source(source: str | Path, fields: str = "", seed: int = 0) -> dict[str, dict]:
    """{place: row} of a file, or of a data set by name, with `problem` and `answer` in each row.

    fields: what they are called there, "problem=Question,answer=Solution"; "": one of `QUESTIONS`,
    one of `ANSWERS`. seed: of the order of the options, where there are some.
    """
    known = hub.Known("") if Path(source).exists() else hub.named(str(source))
    renamed = known.fields | read_fields(fields)
    rows = {}
    for where, row in read_files(source).items():
        rows[where] = with_choices(rename(row, renamed, where), known.options, seed, where)
    return rows


def read_files(source: str | Path) -> dict[str, dict]:
    """{place: row} as it stands in a file, or in the files of a data set by name."""
    if Path(source).exists():
        return read_rows(source)
    rows = {}
    for file in hub.fetch_data(hub.named(str(source)).source):
        rows |= read_rows(file)
    return rows


def read_fields(text: str) -> dict[str, str]:
    """--fields: "problem=Question,answer=Solution" -> {"problem": "Question", ...}."""
    pairs = [part.partition("=") for part in text.split(",") if part]
    for ours, _, theirs in pairs:
        if ours not in ("problem", "answer") or not theirs:
            raise UserError(f"--fields takes problem=NAME,answer=NAME, not {text!r}")
    return {ours: theirs for ours, _, theirs in pairs}


def rename(row: dict, fields: dict[str, str], where: str) -> dict:
    """The row with our names for its fields: those that --fields gives, or the usual ones, also
    with capitals."""
    found = dict(row)
    for ours, theirs in fields.items():
        if theirs not in row:
            raise UserError(f"{where}: no field `{theirs}` (it has {', '.join(row)})")
        found[ours] = row[theirs]
    lower = {name.lower(): value for name, value in row.items() if not blank(value)}
    if not any(name in found for name in QUESTIONS):
        asked = [lower[name] for name in QUESTIONS if name in lower]
        found |= dict(zip(["problem"], asked))
    if blank(found.get("answer")):
        answers = [lower[name] for name in ANSWERS if name in lower]
        if answers and isinstance(answers[0], list) and len(answers[0]) == 1:
            answers = answers[0]  # OlympiadBench lists the one answer that there is
        found |= dict(zip(["answer"], answers))
    return found


def with_choices(row: dict, columns: tuple[str, ...], seed: int, where: str) -> dict:
    """A multiple-choice row as a problem whose answer is a letter; any other row as it is.

    The options are those of its `options` or `choices`, or stand in `columns`, the right one first.
    They are shuffled by `seed` and the question, for a model may like one letter better; not where
    an option speaks of others ("both A and B", "all of the above").
    """
    listed = [row.get(name) for name in columns]
    options = row.get("options") or row.get("choices") or listed
    texts_only = isinstance(options, list) and all(isinstance(text, str) for text in options)
    if not options or not texts_only or row.get("task", "choice") != "choice":
        return row
    if len(options) > len(LETTERS):
        raise UserError(f"{where}: {len(options)} options, {len(LETTERS)} at most")
    texts = [re.sub(r"^\(?[A-J][).:]\s*", "", text) for text in options]
    right = 0 if columns else right_option(row, options, texts, where)
    question, earlier = read_question(row, where)
    order = list(range(len(texts)))
    others = r"\b(?:above|below|both|neither|[A-J] (?:and|or) [A-J])\b"
    if not any(re.search(others, text, re.IGNORECASE) for text in texts):
        random.Random(f"options {seed} {question}").shuffle(order)
    lines = [f"({LETTERS[place]}) {texts[number]}" for place, number in enumerate(order)]
    turns = [*earlier, ("user", "\n".join([question, *lines]))]
    chat = [{"role": role, "content": content} for role, content in turns]
    # Without its options: where the row is written and read again, they are in their order already.
    rest = {name: value for name, value in row.items() if name not in OPTIONS}
    return rest | {"problem": chat, "answer": LETTERS[order.index(right)], "task": "choice"}


LETTERS = "ABCDEFGHIJ"
OPTIONS = ("options", "choices", "correct")
"""Fields that only a row whose options are yet to be put has."""


def right_option(row: dict, options: list[str], texts: list[str], where: str) -> int:
    """Which option a row's answer names: by its letter, its number or its text."""
    answer = row.get("correct", row.get("answer"))
    letter = answer.strip().strip("().") if isinstance(answer, str) else ""
    if len(letter) == 1 and letter in LETTERS[: len(options)]:
        return LETTERS.index(letter)
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(options):
        return answer
    for known in (options, texts):
        if answer in known:
            return known.index(answer)
    raise UserError(f"{where}: the answer {answer!r} is none of its {len(options)} options")


def read_problem(row: dict, where: str) -> Problem:
    """The problem in a row: its question, `answer`, and `task` where it is not `math`.

    UserError says `where`, and which field no model could be asked or judged by.
    """
    question, earlier = read_question(row, where)
    field = row.get("answer", "")
    # true is no answer either: nobody says whether a response should box "true", "True" or "yes".
    if isinstance(field, bool) or not isinstance(field, str | int | float):
        raise UserError(f"{where}: `answer` is a {type(field).__name__}, no text and no number")
    if isinstance(field, float) and not math.isfinite(field):
        raise UserError(f"{where}: `answer` is {field}")
    if blank(field):
        raise UserError(f"{where}: no `answer`")
    task = known_task(row, where)
    try:
        answer = TASKS[task].read_answer(str(field))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return Problem(question, answer, task, earlier)


QUESTIONS = ("problem", "question", "prompt", "messages")
"""The fields that a question may stand in; the first that is not empty counts."""
ANSWERS = ("answer", "final_answer", "solution", "label", "target")
"""The same for the reference answer. Of a solution it is what stands in its last box."""


def read_question(row: dict, where: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    """(question, the turns before it) of a row: a text, or a chat whose last turn is the question.

    UserError says `where`. A chat that ends in an assistant's turn is refused: it is no prompt, and
    may hold the solution.
    """
    name = next((name for name in QUESTIONS if not blank(row.get(name))), "problem")
    question = row.get(name, "")
    earlier = []
    if not isinstance(question, str | list):
        raise UserError(f"{where}: `{name}` is a {type(question).__name__}, no text and no chat")
    if isinstance(question, list) and question:
        *before, last = read_chat(question, f"{where}: `{name}`")
        if last["role"] != "user":
            raise UserError(
                f"{where}: `{name}` ends in a turn of the {last['role']}, not of the user"
            )
        earlier = [(turn["role"], turn["content"]) for turn in before]
        question = last["content"]
    if blank(question):
        raise UserError(f"{where}: no `problem` (or `question`)")
    return question, tuple(earlier)


def blank(value: object) -> bool:
    """Nothing at all, or a text with nothing to see: white space, and what only formats (category
    Cf), such as a space of no width."""
    if isinstance(value, str):
        return all(char.isspace() or unicodedata.category(char) == "Cf" for char in value)
    return value is None or value == []


def read_chat(value: object, where: str) -> list[dict]:
    """A chat of a row, with the content of each message as one text; UserError says `where`.

    A content may be in parts, [{"type": "text", "text": "..."}], as OpenAI has them.
    """
    refusal = UserError(f"{where} must be a list of objects with `role` and `content`")
    if not isinstance(value, list):
        raise refusal
    chat = []
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise refusal
        content = text_of(message.get("content"))
        if content is None:
            raise refusal
        chat.append(message | {"content": content})
    return chat


def text_of(content: object) -> str | None:
    """The text of a message's content; None if it is none, or has a picture among its parts."""
    if not isinstance(content, list):
        return content if isinstance(content, str) else None
    try:
        return "".join(part["text"] for part in content)
    except (LookupError, TypeError):
        return None


def known_task(row: dict, where: str) -> str:
    """The `task` of a row, `math` where it names none; UserError says `where` if it is unknown."""
    task = row.get("task", "math")
    if not isinstance(task, str) or task not in TASKS:
        raise UserError(f"{where}: task {task!r} is none of {', '.join(TASKS)}")
    return task


def messages(problem: Problem) -> list[dict]:
    """The chat that puts the problem: the question, and behind it what its task has to say."""
    turns = [*problem.earlier, ("user", problem.question + TASKS[problem.task].instruction)]
    return [{"role": role, "content": content} for role, content in turns]


def prompt_ids(problem: Problem, tokenizer: Tokenizer) -> list[int]:
    return tokenizer.chat(messages(problem), add_generation_prompt=True)


def boxed(response: str) -> str:
    """The response, its answer boxed at the end where it was not: for models not taught to.

    Never for a reward.
    """
    if verify.last_boxed(response) is not None:
        return response
    answer = verify.lenient_answer(response)
    return response if answer is None else f"{response}\n\\boxed{{{answer}}}"


# --- reward ---------------------------------------------------------------------------------------


def read_math(field: str) -> str:
    """The reference in an `answer`; UserError if no response could be right, not even one that
    boxes it as it stands.
    """
    answer = verify.reference_answer(re.sub(INVISIBLE, "", field))
    empty = "\ufffd" in answer or not re.sub(HOLDS_NOTHING, "", answer)
    if empty or not verify.is_correct(f"\\boxed{{{answer}}}", answer):
        raise UserError(f"`answer` holds nothing that a response could match: {field[-60:]!r}")
    return answer


INVISIBLE = "[\u00ad\u200b\u200e\u200f\u2060-\u2064\ufeff]"
"""Soft hyphens, spaces of no width and the like: no response repeats them."""
HOLDS_NOTHING = r"\\(?:left|right|q?quad|[,;:! ])|</?\w+>|[(){}\[\].\s]"
"""Brackets, tags, spaces: what may stand around an answer, and is none. (> is an answer.)"""


def judge_math(problem: Problem, response: str) -> Verdict:
    """Does the last box of the response hold the reference answer, worked out?"""
    return worked_out(problem, verify.verify(response, problem.answer))


def worked_out(problem: Problem, verdict: Verdict) -> Verdict:
    """The verdict, or "wrong" where the judge would have to do the work: see worked.py."""
    if not verdict.correct or verdict.decided_by in ("same_choice", "same_words"):
        return verdict
    if not worked.left_to_judge(problem.question, verdict.answer, problem.answer):
        return verdict
    return replace(verdict, outcome="wrong", decided_by="not worked out", score=0.0)


TASKS = {
    "math": Task(
        judge_math,
        instruction="\nReason step by step, and put your final answer within \\boxed{}.",
        read_answer=read_math,
    ),
    "choice": Task(
        judge_math,  # which knows a letter, with the option's text or without
        instruction="\nReason step by step, and put the letter of the right option within "
        "\\boxed{}.",
        read_answer=read_math,
    ),
    "countdown": Task(
        judge_countdown,
        read_answer=checked_countdown,
        diagnose=diagnose_countdown,
        problems=lambda flags, heldout: countdown(
            flags.seed, heldout, flags.numbers, flags.operators, flags.largest
        ),
        forced="\\boxed{",
    ),
}


def made(name: str, flags: Any, heldout: bool = False) -> Iterator[Problem]:
    """The endless stream of `--task NAME`. UserError for a task that makes no problems, or for
    flags that it cannot take: nothing need be loaded to know."""
    makers = [known for known, task in TASKS.items() if task.problems]
    if name not in makers:
        raise UserError(f"--task {name} is none of {', '.join(makers)}")
    return TASKS[name].problems(flags, heldout)


def judge_all(
    problems: list[Problem], responses: list[str], workers: int | None = None
) -> list[Verdict]:
    """One verdict per (problem, response), in order.

    Maths answers go through the worker processes of `verify_many`: some take long.
    """
    verdicts: list[Verdict | None] = [None] * len(problems)
    pooled = []
    for i, (problem, response) in enumerate(zip(problems, responses, strict=True)):
        judge = TASKS[problem.task].judge
        if judge is judge_math:
            pooled.append(i)
        else:
            verdicts[i] = judge(problem, response)
    if pooled:
        pairs = [(responses[i], problems[i].answer) for i in pooled]
        for i, verdict in zip(pooled, verify.verify_many(pairs, workers=workers)):
            verdicts[i] = worked_out(problems[i], verdict)
    return verdicts


def diagnose(problem: Problem, response: str, verdict: Verdict) -> str:
    """By which kind of failure a response fails, or "correct": a row of evaluate.py's table."""
    if by_task := TASKS[problem.task].diagnose:
        return by_task(problem, response)
    return verdict.outcome.replace("_", " ")


PATTERNS = ("overlong", "repeated", "garbled")
"""T1's unexpected patterns: no stop token in time; an n-gram again and again; broken characters."""


def repeats(tokens: list[int], ngram: int = 20, times: int = 4) -> bool:
    """Unexpected pattern: some n-gram of tokens stands `times` times or more in the response.

    They may overlap: a loop of p tokens counts once it is ngram + (times - 1) * p long, and a rule
    of 23 dashes, one token each, does.
    """
    counts: dict[tuple[int, ...], int] = {}
    for i in range(len(tokens) - ngram + 1):
        key = tuple(tokens[i : i + ngram])
        counts[key] = counts.get(key, 0) + 1
        if counts[key] >= times:
            return True
    return False


def garbled(text: str, question: str = "") -> bool:
    """Unexpected pattern: broken characters, control characters, or letters of a foreign script.

    Foreign: neither Latin nor Greek (maths uses both) and not of the question's language; so a
    Chinese answer to a Chinese question is fine, and a Cyrillic word in an English chain is not.
    """
    letters = filter(str.isalpha, set(question))
    expected = {"LATIN", "GREEK", *map(script, letters)}
    for asked in tuple(expected):
        expected |= SAME_LANGUAGE.get(asked, set())
    for character in set(text) - set("\n\t\r"):
        category = unicodedata.category(character)
        if character == "\ufffd" or category in ("Cc", "Cs", "Co"):
            return True
        if character.isalpha() and category != "Lm" and script(character) not in expected:
            return True
    return False


SAME_LANGUAGE = {
    "HIRAGANA": {"KATAKANA", "CJK"},
    "KATAKANA": {"HIRAGANA", "CJK"},
    "HANGUL": {"CJK"},
    "BOPOMOFO": {"CJK"},
}
"""Scripts that tell the language, and what it is written in besides. Not the other way round: CJK
alone is most likely Chinese."""


def script(letter: str) -> str:
    """The script of a letter by its Unicode name ("LATIN", "CJK", ...).

    NFKC first, which turns maths' letters into the plain ones that they stand for: the micro sign
    into a mu, the Planck constant and double-struck R into Latin letters. Only the infinite
    cardinals would become Hebrew.
    """
    if letter in "\u2135\u2136\u2137\u2138":
        return "LATIN"
    plain = unicodedata.normalize("NFKC", letter)[0]
    name = unicodedata.name(plain, "UNKNOWN").split(" ")[0].split("-")[0]
    return "CJK" if name == "IDEOGRAPHIC" else name  # a mark for "closed", among Chinese characters


# --- the command ----------------------------------------------------------------------------------


@dataclass
class Config:
    show: str
    """A problem file, or a data set's name."""
    fields: str = ""
    """What `problem` and `answer` are called there, if otherwise: problem=NAME,answer=NAME."""


def main(config: Config) -> None:
    """Three problems, spread over the whole, as they are put to a model."""
    problems = load(config.show, config.fields)
    print(f"{config.show}: {len(problems):,} problems; three of them as they are put to a model:")
    for number in (0, len(problems) // 2, len(problems) - 1):
        problem = problems[number]
        print(f"\n--- {number + 1}, task {problem.task}")
        for message in messages(problem):
            print(f"{message['role']}: {message['content']}")
        print(f"reference: {problem.answer}")


if __name__ == "__main__":
    cli.run(main, Config)
