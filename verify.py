r"""Is the final answer of a response equal to the reference? The reward, hence the one thing that RL optimises.

    python verify.py "so it is \boxed{\frac{1}{2}}" "0.5"   # the verdict, and how each side was read
    python verify.py --file pairs.jsonl                     # a table of outcomes of {"response": ..., "gold": ...}

A response is hostile input: whatever a policy found to be rewarded. None of it reaches eval, a backtracking regular
expression, or sympy (which computes while it builds: 9^{9^9}, or the root of a 1200-bit number). Four bounded steps:

1. `last_boxed` takes the answer out of the response.
2. `maths.read` makes a tree of LaTeX or plain ASCII maths.
3. `maths.Evaluator` gives a tree its value at a point: an exact rational, or else a number of 60 digits or more.
4. `Checker.match` compares by kind. Two expressions are equal if they agree at several points, exactly or relative to
   their own size. That needs no simplifying, and finds forms that a rewriting system misses; it is a numerical test,
   not a proof: two expressions that differ only outside of the sampled reals (ln x, ln |x|) pass for equal.

The reference decides the form: a unit, currency, degree or % of the reference may be missing in the answer, a different
one is wrong. `x = 3` is 3. Parenthesised tuples are ordered, bare lists and braces are sets. Decimals are exact, unless
the caller passes a tolerance. Words left over that are not a unit, and chains such as x = 4 = 3, are wrong.
"""

import functools
import itertools
import json
import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path

import tyro
from tqdm import tqdm

import cli
import maths
from maths import MINUS_ONE, Node, ParseError, Undefined, is_label, members, names, read, relations, show, times, walk

exact_arithmetic = maths.exact_arithmetic  # the countdown checker, on the same tokens


@dataclass(frozen=True)
class Verdict:
    """What became of one response; only "correct" is worth a reward."""

    outcome: str  # "correct", "wrong", "no_answer" (no box), "unparsed", "timeout" (nothing was decided)
    answer: str | None = None  # as it stands in the response
    answer_read: str = ""  # how it was read, in prefix notation, or why it was not
    gold_read: str = ""

    @property
    def correct(self) -> bool:
        return self.outcome == "correct"


# ------------------------------------------------------------------------------------------------ 1. extraction


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}`; None if there is none, or if it is never closed."""
    opening, start = None, len(text)
    while opening is None and (start := text.rfind(r"\boxed", 0, start)) >= 0:
        opening = re.compile(r"\\boxed\s{0,9}\{").match(text, start)
    depth, begin = 1, opening.end() if opening else len(text)
    for brace in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, begin, begin + 50 * maths.MAX_CHARS):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)  # `\{` is skipped as a pair
        if depth == 0:
            return text[begin : brace.start()].strip()
    return None


def lenient_answer(text: str) -> str | None:
    """For foreign models that do not box: what follows "####" or "answer is", else the last number. Never a reward."""
    text = text[-5 * maths.MAX_CHARS :]
    if named := re.findall(r"(?:####|answer(?: is)?:?)[ *]*([^\n]+)", text, re.IGNORECASE):
        formula = re.search(r"\$([^$]+)\$|\\\(([^\n]+?)\\\)", named[-1])
        return formula[1] or formula[2] if formula else re.split(r"\.\s|\*\*", named[-1])[0]
    return (re.findall(r"-?[0-9][0-9,]*(?:\.[0-9]+)?(?:/[0-9]+)?", text) or [None])[-1]


def reference_answer(field: str | int | float) -> str:
    r"""The answer in a dataset's field: GSM8K's `... #### 18`, AMC's 27.0, a solution's `\boxed{}`, or plain LaTeX."""
    text = str(field).rsplit("####", 1)[-1].strip()
    return re.sub(r"^(-?[0-9]+)\.0$", r"\1", last_boxed(text) or text)


# ------------------------------------------------------------------------------------------------ 3. comparison


class Checker(maths.Evaluator):
    """One answer against one reference, by kind of answer."""

    def __init__(self, digits: int, deadline: float, tolerance: float):
        super().__init__(digits, deadline)
        self.tolerance = tolerance

    def agree(self, evaluate) -> bool:
        """Do the two values that `evaluate(precision)` gives agree? Exactly if rational, else up to rounding."""
        previous = None
        for precision in (1, 2):
            a, b = evaluate(precision)
            if isinstance(a, Fraction) and isinstance(b, Fraction):
                return a == b
            a, b = self.mp.convert(a), self.mp.convert(b)
            if not (self.mp.isfinite(a) and self.mp.isfinite(b)):
                return a == b  # before any gap, which is infinite, hence as large as the size
            gap, size, unit = abs(a - b), max(abs(a), abs(b)), self.mp.mpf(10) ** (-self.digits)
            if gap <= size * unit ** (precision * 0.8):
                return True
            if size > 1e-9 and gap > size * unit**0.5:
                return False
            if previous is not None and gap <= previous * unit**0.4:
                return True  # what looked like a difference was rounding: it shrank with the precision
            previous = gap
        return False

    def same(self, a: Node, b: Node) -> bool:
        """Equal wherever both have a real value (or, failing such, a complex one), at several points."""
        constant, imaginary = not names(a, b), ("name", "i") in walk(a) + walk(b)
        for real in (False,) if constant or imaginary else (True, False):
            agreed = 0
            for point in range(1 if constant else len(maths.RANGES)):
                try:
                    if not self.agree(lambda p, at=point, r=real: (self.at(a, at, r, p), self.at(b, at, r, p))):
                        return False
                except Undefined:
                    continue
                agreed += 1
                if agreed == 6 or constant:
                    return True
            if agreed >= 3:
                return True
        return False

    def prints(self, decimal: Node, exact: Node, digits: int) -> bool:
        """Is `decimal`, of at least so many digits, what a computer prints for a number that no decimal writes out?"""
        text = decimal[1].lstrip("-") if decimal[0] == "num" else ""
        if not re.fullmatch(r"[0-9]*\.[0-9]+", text) or len(text.replace(".", "").lstrip("0")) < digits:
            return False
        x = self.at(exact)
        if digits and isinstance(x, Fraction) and 10**400 % x.denominator == 0:
            return False
        return abs(self.mp.convert(self.at(("+", decimal, times(MINUS_ONE, exact))))) < self.mp.mpf(10) ** -len(
            text.split(".")[1]
        )

    def same_number(self, gold: Node, answer: Node) -> bool:
        if inner_units(gold) != inner_units(answer):
            return False
        if self.same(gold, answer):
            return True
        if names(gold, answer):
            return False
        gap = self.at(("+", gold, times(MINUS_ONE, answer)))  # Undefined, if one is infinite
        close = self.tolerance and abs(gap) <= self.tolerance * abs(self.at(gold))
        return bool(close) or self.prints(gold, answer, 15) or self.prints(answer, gold, 15)

    def match(self, gold: Node | str, answer: Node | str) -> bool:
        """Is the answer what the reference says, kind by kind?"""
        try:
            trees = isinstance(gold, tuple) and isinstance(answer, tuple)
            return gold == answer or (trees and self.match_kinds(gold, answer))
        except (Undefined, TypeError):
            return False

    def match_kinds(self, gold: Node, answer: Node) -> bool:
        kinds, golds, answers = {gold[0], answer[0]}, members(gold), members(answer)
        bounds = any((m[0] == "chain" and "=" not in m[1].split()) or m == ("name", "ℝ") for m in golds + answers)
        if (bounds or kinds & {"∪", "∩", "∖"}) and self.same_set(gold, answer):
            return True
        if kinds & {"list", "or"}:
            if "tuple" in kinds:  # x = 1, y = 2 is (1, 2)
                order, named = (gold, answers) if gold[0] == "tuple" else (answer, golds)
                listed = [self.unlabel(m) for m in named]
                return all(label for label, _ in listed) and self.match(order, (*order[:2], *(x for _, x in listed)))
            if len(golds) * len(answers) > 2500:
                return False
            found = [[self.match(g, a) for a in answers] for g in golds]
            return all(map(any, found)) and all(map(any, zip(*found))) and bool(found) == bool(answers)
        if "chain" in kinds:
            return self.match_chains(gold, answer)
        if kinds & {"unit", "%"}:
            return self.match_units(gold, answer)
        if kinds == {"base", "num"}:
            return gold[0] == "base" and gold[1] == answer[1]
        if kinds == {":"} and not all(part[0] == "num" and len(part[1]) == 2 for part in gold[2:]):  # 3:5, but not 3:05
            pairs = zip(gold[2:], answer[2:])
            return len(gold) == len(answer) and all(self.same(("*", g, answer[1]), ("*", a, gold[1])) for g, a in pairs)
        if kinds == {"tuple", "matrix"}:
            gold, answer = as_vector(gold), as_vector(answer)
        if kinds & {"tuple", "matrix", "row", "base", ":", "text"}:
            return len(gold) == len(answer) and all(map(self.match, gold, answer))
        return self.same_number(gold, answer)

    def match_units(self, gold: Node, answer: Node) -> bool:
        """The reference's unit may be missing; % counts as a hundredth, or, if it is the reference's, for nothing."""
        if gold[0] == answer[0]:
            return self.match(gold[1], answer[1]) and gold[2:] == answer[2:]
        if answer[0] == "%" or (gold[0], answer[0]) == ("%", "unit"):
            return gold[0] != "unit" and answer[0] == "%" and self.same_number(gold, answer)
        bare_gold, bare = gold[1] if gold[0] in ("unit", "%") else gold, answer[1] if answer[0] == "unit" else answer
        return self.match(bare_gold, bare) or self.same_number(gold, answer)

    def unlabel(self, node: Node) -> tuple[Node | None, Node | None]:
        """(name, value) of `x = 3`, `x = 6/2 = 3` or `6/2 = 3`; (None, node) of any other; no value if it is false."""
        if node[0] != "chain" or not set(node[1].split()) <= {"=", "≈", "∈"}:
            return None, node
        signs, parts, label = node[1].split(), list(node[2:]), None
        if len(parts) == 2 and is_label(parts[1]) and not is_label(parts[0]):
            parts.reverse()
        if is_label(parts[0]):
            label, signs, parts = parts[0], signs[1:], parts[1:]
        elif names(*parts):
            return None, node
        for sign, left, right in zip(signs, parts, parts[1:]):
            if not self.match(left, right) and not (sign == "≈" and self.prints(right, left, 0)):
                return label, None
        return label, parts[0]

    def match_chains(self, gold: Node, answer: Node) -> bool:
        (gold_label, gold_value), (label, value) = self.unlabel(gold), self.unlabel(answer)
        if gold_value is None or value is None:
            return False
        if gold[0] != answer[0]:
            return (gold_value, value) != (gold, answer) and self.match(gold_value, value)
        if gold_label == label and gold_value != gold and self.match(gold_value, value):
            return True
        golds, answers = relations(gold), relations(answer)
        if len(golds) > 1 or len(answers) > 1:
            return self.match(("list", *golds), ("list", *answers))
        (sign, a), (other, b) = ((part[1], ("+", part[3], times(MINUS_ONE, part[2]))) for part in golds + answers)
        if inner_units(gold) != inner_units(answer):
            return False
        ratio = self.at(("*", a, ("^", b, MINUS_ONE)))  # is one side a multiple, a positive one for <, of the other?
        multiple = ratio != 0 and (sign in ("=", "!=", "≈") or ratio > 0)
        return sign == other and multiple and self.same(("*", a, ("frozen", b)), ("*", b, ("frozen", a)))

    def ends(self, node: Node | str) -> list:
        """The reals at which membership of a set can change: Undefined unless all of them are found."""
        if isinstance(node, str) or (node[0] == "name" and node != ("name", "infty")):
            return []
        if node[0] == "chain" and node[1] != "∈":
            return [x for pair in itertools.pairwise(node[2:]) for x in self.crossings(*pair)]
        if names(node) or node[0] in ("tuple", "list", "or", "chain", "∪", "∩", "∖"):
            return [x for child in node[1:] for x in self.ends(child)]
        return [self.mp.convert(self.at(node))]

    def crossings(self, a: Node, b: Node) -> list:
        """The kinks of a - b, which must be linear between them, and where each of its lines is zero."""

        def line(*points) -> list:
            """The zero of the line through the values of a - b at two points."""
            u, v = (
                self.mp.convert(self.at(a, real=True, **dict.fromkeys(free, p)))
                - self.mp.convert(self.at(b, real=True, **dict.fromkeys(free, p)))
                for p in points
            )
            flat = u == v or not self.mp.isfinite(u - v)
            return [] if flat else [points[0] - u * (points[1] - points[0]) / (v - u)]

        free = names(a, b)
        kinks = sorted(self.kinks(a) + self.kinks(b))
        grid = [kinks[0] - 1, *kinks, kinks[-1] + 1] if kinks else [self.mp.mpf(0), self.mp.mpf(1)]
        return kinks + [x for pair in itertools.pairwise(grid) for x in line(*pair)]

    def kinks(self, node: Node) -> list:
        """Where |linear| terms have their corners; Undefined if the node is not a sum of such and linear terms."""
        named = [child for child in node[1:] if isinstance(child, tuple) and names(child)]
        match node:
            case ("name", _):
                return []
            case ("call", "abs", inner) if named and not self.kinks(inner):
                return self.crossings(inner, ("num", "0"))
            case ("+", *_) | ("*", *_) if node[0] == "+" or len(named) <= 1:
                return [x for child in named for x in self.kinks(child)]
        if named:
            raise Undefined("not linear")
        return []

    def order(self, a, b) -> int:
        """-1, 0 or 1 for a < b, a = b (up to rounding), a > b."""
        a, b = self.mp.convert(a), self.mp.convert(b)
        near = (
            self.mp.isfinite(a)
            and self.mp.isfinite(b)
            and abs(a - b) <= max(abs(a), abs(b), 1) * self.mp.mpf(10) ** (-self.digits // 2)
        )
        return 0 if near or a == b else 1 if a > b else -1

    def contains(self, node: Node, x) -> bool:
        match node:
            case ("tuple", brackets, low, high):
                above, below = self.order(x, self.at(low)), self.order(self.at(high), x)
                return above >= (brackets[0] != "[") and below >= (brackets[1] != "]")
            case ("∪" | "or", *parts):
                return any(self.contains(part, x) for part in parts)
            case ("list", *parts) if parts and parts[0][0] != "chain":
                return any(self.order(self.at(part), x) == 0 for part in parts)
            case ("∩" | "list", *parts):
                return all(self.contains(part, x) for part in parts)
            case ("∖", whole, part):
                return self.contains(whole, x) and not self.contains(part, x)
            case ("name", "ℝ"):
                return True
            case ("chain", "∈", _, inner):
                return self.contains(inner, x)
            case ("chain", signs, *parts) if len(names(node)) == 1:
                values = [self.at(part, real=True, **dict.fromkeys(names(node), x)) for part in parts]
                truths = {"<": (-1,), "<=": (-1, 0), ">": (1,), ">=": (0, 1), "!=": (-1, 1)}
                return all(self.order(a, b) in truths[s] for s, a, b in zip(signs.split(), values, values[1:]))
        raise Undefined("not a set of reals")

    def same_set(self, gold: Node, answer: Node) -> bool:
        """The same members among: every end, both its sides, a point between any two, and far away."""
        if max(len(names(gold)), len(names(answer))) > 1 or inner_units(gold) != inner_units(answer):
            return False
        try:
            ends = sorted({x for x in self.ends(gold) + self.ends(answer) if abs(x) != self.mp.inf})
            if len(ends) > 40:
                return False
            points = [x + step for x in ends for step in (0, self.mp.mpf("1e-9"), -self.mp.mpf("1e-9"))]
            points += [(a + b) / 2 for a, b in itertools.pairwise(ends)]
            points += [self.mp.mpf(0), *(x for end in ends[:1] + ends[-1:] for x in (end - 9, end + 9))]
            return all(self.contains(gold, x) == self.contains(answer, x) for x in points)
        except (Undefined, TypeError, KeyError):
            return False


def inner_units(node: Node) -> set[str]:
    """The units below the root, which do not count in the value: 60 in `0 + (60 h)`."""
    return {part[2] for part in walk(node) if part[0] == "unit" and part is not node} - {"degree"}


def as_vector(node: Node) -> Node:
    """A row or a column as a tuple."""
    if node[0] != "matrix" or 2 not in (len(node), len(node[1])):
        return node
    return ("tuple", "()", *(cell for row in node[1:] for cell in row[1:]))


LOCK = threading.Lock()  # mpmath caches its constants without one


# ------------------------------------------------------------------------------------------------ verdicts


def plain(text: str) -> str:
    """The words of an answer, without fonts, brackets and articles; a single letter keeps its case."""
    text = re.sub(r"\\(?:text\w*|mbox|math\w\w|operatorname|left|right)(?![a-z])|[\\${}()~]", " ", text)
    words = [word for word in (w.rstrip(".,:;") for w in text.split()) if word.lower() not in ("", "an", "the")]
    return " ".join(words) if len(words) == 1 and len(words[0]) == 1 else " ".join(words).lower()


def judge(answer: str, gold: str, deadline: float, tolerance: float) -> Verdict:
    if max(len(answer), len(gold)) > maths.MAX_CHARS:  # before any regular expression meets it
        return Verdict("unparsed", answer, "too long")
    words = re.sub(r"\\(?:text\w*|math\w\w| )|[{}$~]", " ", answer).strip()
    if choice := re.fullmatch(r"\(?([A-J])\)([^A-Za-z()]+)", words):  # (C) 26
        answer = choice[1] if re.fullmatch("[A-J]", plain(gold)) else choice[2].lstrip(" \t\n.:")
    squeezed = [re.sub(r"\\(?:left|right)(?![a-z])|(?<!\w)\s+|\s+(?!\w)", "", text) for text in (answer, gold)]
    if squeezed[0] == squeezed[1] != "":
        return Verdict("correct", answer, answer, gold)
    try:
        gold_read = read(gold)
    except ParseError:
        gold_read = ("text", gold)
    if gold_read[0] == "text" or re.fullmatch("[A-Za-z]{3,}", gold):
        same = plain(answer) == plain(gold) != ""
        return Verdict("correct" if same else "wrong", answer, plain(answer), plain(gold))
    try:
        answer_read = read(answer)
    except ParseError as error:
        return Verdict("unparsed", answer, str(error), show(gold_read))
    reading = (answer, show(answer_read), show(gold_read))
    huge = sum(map(int, re.findall(r"\^\{?([0-9]{1,3})", answer + gold)))  # \sqrt{10^{60} + 1} is not 10^{30}
    digits = maths.DIGITS + sum(map(str.isdigit, answer + gold)) % 1000 + min(huge, 200)
    pairs = [(gold_read, answer_read)]
    if re.search(r"[0-9],[0-9]{3}", answer + " " + gold):  # 1,234 may be two numbers after all
        pairs.append((read(gold, loose=False), read(answer, loose=False)))
    with LOCK:
        right = any(Checker(digits, deadline, tolerance).match(*pair) for pair in pairs)
    return Verdict("correct" if right else "wrong", *reading)


def verify(response: str, gold: str, timeout: float = 2.0, lenient: bool = False, tolerance: float = 0.0) -> Verdict:
    """The verdict on a response. Never raises, whatever the two strings are.

    `timeout`: seconds of this thread's CPU time, so that a busy machine changes nothing; the bounds end everything well
    before. `lenient`: an answer that is not boxed will do. `tolerance`: relative, for numbers.
    """
    answer = last_boxed(response)
    if answer is None and lenient:
        answer = lenient_answer(response)
    if answer is None:
        return Verdict("no_answer")
    try:
        return judge(answer, gold, time.thread_time() + timeout, tolerance)
    except TimeoutError:
        return Verdict("timeout", answer)
    except Exception as error:  # a bug of ours must not end a run of days; the fuzz tests call `judge`, which shows it
        return Verdict("unparsed", answer, f"{type(error).__name__}: {error}")


def is_correct(response: str, gold: str) -> bool:
    return verify(response, gold).correct


# ------------------------------------------------------------------------------------------------ many at once


class Pool:
    """Threads with a worker process each: subprocesses, which import nothing of the caller's (torch, `__main__`)."""

    def __init__(self, workers: int):
        self.threads, self.local = ThreadPoolExecutor(workers), threading.local()

    def check(self, pair: tuple[str, str], timeout: float) -> Verdict:
        worker = getattr(self.local, "worker", None)
        if worker is None or worker.poll() is not None:
            command = [sys.executable, "-c", "import verify; verify.serve()"]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "encoding": "utf-8"}
            worker = subprocess.Popen(command, cwd=Path(__file__).parent, **pipes)  # it ends with us: see `serve`
            if worker.stdout.readline() != "ready\n":  # importing does not count
                worker.kill()
                raise RuntimeError(f"a worker of verify_many did not start: {' '.join(command)}, code {worker.wait()}")
            self.local.worker = worker
        last_resort = threading.Timer(5 * timeout + 1, worker.kill)
        last_resort.start()
        try:
            worker.stdin.write(json.dumps([*pair, timeout]) + "\n")
            worker.stdin.flush()
            return Verdict(**json.loads(worker.stdout.readline()))
        except (OSError, ValueError):  # it was killed, by us or for lack of memory: nothing was decided
            worker.kill()
            self.local.worker = None
            return Verdict("timeout")
        finally:
            last_resort.cancel()


shared_pool = functools.cache(Pool)  # for the life of the process: training calls verify_many thousands of times


def serve() -> None:
    """A worker: a JSON pair per line in, a verdict per line out, until the parent closes the pipe or dies."""
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(asdict(verify(*json.loads(line)))), flush=True)


def verify_many(pairs: list[tuple[str, str]], workers: int | None = None, timeout: float = 2.0) -> list[Verdict]:
    """One verdict per (response, gold), in order. `workers`: processes, by default one per core and at most 8."""
    pool = shared_pool(workers or min(8, os.cpu_count() or 1))
    return list(pool.threads.map(lambda pair: pool.check(pair, timeout), pairs))


# ------------------------------------------------------------------------------------------------ command line


@dataclass
class Config:
    response: tyro.conf.Positional[str] = ""
    """A response, with its answer in \\boxed{}."""
    gold: tyro.conf.Positional[str] = ""
    """The reference that it is compared with."""
    file: str = ""
    """A JSONL file of pairs instead: `response` and `gold` on every line; prints a table of outcomes."""
    lenient: bool = False
    """Take an answer that is not boxed, too: for foreign models, never for a reward."""


def main(config: Config) -> None:
    if bool(config.file) == bool(config.response or config.gold) or bool(config.response) != bool(config.gold):
        raise cli.UserError("expected a response and a reference, or --file pairs.jsonl: see --help")
    if not config.file:
        verdict = verify(config.response, config.gold, lenient=config.lenient)
        for title, text in zip(("verdict", "extracted", "read as", "reference"), asdict(verdict).values()):
            print(f"{title:10s} {text}")
        return
    rows = cli.read_jsonl(config.file)
    for number, row in enumerate(rows, start=1):
        for field in ("response", "gold"):
            if isinstance(row.get(field), bool) or not isinstance(row.get(field), str | int | float):
                raise cli.UserError(
                    f"{config.file}, line {number} (blank ones aside): `{field}` is missing, or not a text or a number"
                )
    pairs = [(str(row["response"]), str(row["gold"])) for row in rows]
    outcomes = [verify(*pair, lenient=config.lenient).outcome for pair in tqdm(pairs)]
    for outcome in sorted(set(outcomes)):
        print(f"{outcome:10s} {outcomes.count(outcome):7d}  {outcomes.count(outcome) / len(rows):6.1%}")


if __name__ == "__main__":
    cli.run(main, Config)
