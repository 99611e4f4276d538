r"""Is the final answer of a response equal to the reference? The reward: what RL optimises.

    python verify.py "so it is \boxed{\frac{1}{2}}" "0.5"  # verdict, how each was read, who decided
    python verify.py --file pairs.jsonl  # the same of every {"response": ..., "gold": ...}; a table

A response is hostile input: whatever a policy found to be rewarded. None of it reaches eval, a
backtracking regular expression, or sympy as text. The way of an answer:

1. `last_boxed` takes it out of the response.
2. `judge` compares the two texts: the letter of a choice, the same words, the same tokens
   (`latex.py`).
3. `maths.read` makes a tree of each, strictly; what it does not read is wrong, unless 2 found it
   equal.
4. `judges.py` compares the trees: small judges in turn, each of which says equal, different, or
   does not know. They know of labels, units, sets, lists, shapes, relations; the last compares
   values (`equality.py`, `values.py`), exactly, or to all the digits that the sizes ask for.
5. Integrals, limits, endless sums and equations that have to be solved are asked of sympy
   (`algebra.py`): as trees, in a worker process with limits, and only if nobody else could decide.

The reference decides the form: its unit, currency, degree or % may be missing in the answer,
another one is wrong. `x = 3` is 3. Parenthesised tuples are ordered, bare lists and braces are
sets. Decimals are exact, unless the caller passes a tolerance. Words left over that are no unit,
and chains such as x = 4 = 3, are wrong.
"""

import contextlib
import functools
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import tyro

import cli
import latex
import maths
from judges import Judges
from latex import MAX_CHARS, ParseError, bare, literal
from maths import show
from units import known_unit, read_unit
from values import Undecided, exact_arithmetic  # noqa: F401 (the countdown checker's)

APPLIED = {*"fghFGH", "Gamma", "zeta"}  # f(x + 1) is never a product
WORKER_BYTES = 2 << 30  # of address space: a worker that wants more is told that there is none
LOCK = threading.Lock()  # mpmath caches its constants without one


@dataclass(frozen=True)
class Verdict:
    """What became of one response, and what that is worth.

    score: 1 for a right answer and 0 for any other, unless the judge says what else: a task of
    one's own may give half for the right form, `Verdict("wrong", score=0.5)`.
    """

    outcome: str  # correct, wrong, no_answer (no box), unparsed, or timeout (nothing was decided)
    answer: str | None = None  # as it stands in the response
    answer_read: str = ""  # how it was read, in prefix notation, or why it was not
    gold_read: str = ""
    decided_by: str = ""  # the judge that knew
    score: float | None = None  # None becomes 1 or 0, by the outcome

    def __post_init__(self) -> None:
        if self.score is None:
            object.__setattr__(self, "score", float(self.correct))  # the dataclass is frozen

    @property
    def correct(self) -> bool:
        return self.outcome == "correct"


# ---------------------------------------------------------------------------- extraction


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}`; None if there is none, or if it is never closed."""
    opening, start = None, len(text)
    while opening is None and (start := text.rfind(r"\boxed", 0, start)) >= 0:
        opening = re.compile(r"\\boxed\s{0,9}\{").match(text, start)
    depth, begin = 1, opening.end() if opening else len(text)
    for brace in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, begin, begin + 50 * MAX_CHARS):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)  # `\{` is skipped as a pair
        if depth == 0:
            return text[begin : brace.start()].strip()
    return None


def lenient_answer(text: str) -> str | None:
    """For foreign models that do not box.

    What follows "####" or "answer is", else the last number. Never a reward.
    """
    text = text[-5 * MAX_CHARS :]
    if named := re.findall(r"(?:####|answer(?: is)?:?)[ *]*([^\n]+)", text, re.IGNORECASE):
        formula = re.search(r"\$([^$]+)\$|\\\(([^\n]+?)\\\)", named[-1])
        return formula[1] or formula[2] if formula else re.split(r"\.\s|\*\*", named[-1])[0]
    return (re.findall(r"-?[0-9][0-9,]*(?:\.[0-9]+)?(?:/[0-9]+)?", text) or [None])[-1]


def reference_answer(field: str | int | float) -> str:
    r"""The answer in a dataset's field.

    GSM8K's `... #### 18`, AMC's 27.0, a solution's `\boxed{}`, or plain LaTeX.
    """
    text = str(field).rsplit("####", 1)[-1].strip()
    return re.sub(r"^(-?[0-9]+)\.0$", r"\1", last_boxed(text) or text)


# ---------------------------------------------------------------------------- the two texts


ALONE = r"\s*\)?\s*"
WITH_TEXT = r"(?:\s*\)|[.:]|\s+[-–])+\s*([^\s.:)].*)"  # the option's text behind the letter
HEDGE = r"(?:or|and|not|[Nn]o,|but|nor|maybe|\(?[A-J][.,:)])(?![a-z])|[,/?&]|[A-J]$"
OTHER_CHOICE = r"\b(?i:alternatively|perhaps|wait|actually|wrong|except)\b|[B-J]\?|/\s*[A-J]$|"
OTHER_CHOICE += r"\b(?:or|nor|not)\s*\(?[A-J]\b|\b(?:and|be|is|think|[Ee]ither)\s*\(?[A-J]$|"
OTHER_CHOICE += r"\b(?i:also|option|choice)\s*\(?[A-J]\b|\b[A-J] it is\b|"
OTHER_CHOICE += r"\b[A-J]\)?,\s*\(?[A-J]\)?,?\s*(?:and|or)\s*\(?[A-J]\b"  # B, C and D


def same_words(gold: str, answer: str) -> bool:
    """`no` and \\text{No}; I,II and I, II: the same words but for the case of the first letter.

    Only of words: \\sqrt{a} b and \\sqrt{a b} have the same letters, and mgh is not Mgh.
    """
    if is_formula(gold) or is_formula(answer):
        return False
    in_text = r"\text{" in gold + answer
    gold, answer = (
        re.sub("^(?:an?|the) (?=[a-z]{4})", "", bare(text)).replace(", ", ",")
        for text in (gold, answer)
    )
    if not re.fullmatch("[A-Za-z][A-Za-z ,'-]+", gold):
        return False
    if gold == answer:
        return True
    first = re.match("[A-Za-z]+", gold)[0]
    is_prose = in_text or len(first) > 3 or first.lower() in latex.SMALL_WORDS | {"yes", "odd"}
    return is_prose and answer in (gold[0].swapcase() + gold[1:], gold.upper())


def is_formula(text: str) -> bool:
    """Whether a text has more than words, fonts and lists: commands, braces, stars, a minus."""
    inside = r"\\(?:text\w*|mbox|math[a-z][a-z]|operatorname|boldsymbol|bm)\s*\{([^{}\\]*)\}"
    outside = re.sub(r"\\[,;:! ]|\\(?:left|right)(?![a-z])", " ", re.sub(inside, r"\1", text))
    return re.search(r"[\\{}*]|\s-\s", outside) is not None


def same_choice(gold: str, answer: str) -> bool | None:
    """The letter of a choice, with its text or without; None if either names no single letter.

    `(C) 3.5 m/s`, `C.` and `C: the rate doubles` are C; `C or D`, `C/D` and
    `(D) Both (C) and (A)` are not.
    """
    gold, answer = bare(gold).strip("()"), bare(answer)
    several = re.sub(r"\band\b|[\s,;&]", "", gold)
    if re.fullmatch("[A-J]{2,6}", several) and "".join(sorted(set(several))) == several:
        if re.search(r"\bor\b", answer):
            return False
        letters = re.sub(r"\band\b|[\s,;&()]", "", answer)
        listed = several != gold or letters != answer  # BA is no way to write AB
        same = "".join(sorted(letters)) == several if listed else letters == several
        return True if same else None
    if not re.fullmatch("[A-J]", gold):
        return None
    chosen = re.fullmatch(rf"\(?\s*([A-J])(?:{ALONE}|{WITH_TEXT})", answer)
    if not chosen:
        return None
    rest = chosen[2] or ""
    hedged = re.match(HEDGE, rest) or re.search(OTHER_CHOICE, rest)
    return chosen[1] == gold and not hedged


def is_word(gold: str) -> bool:
    """IV, abc and odd are words, which have an order; ab, sinx and xpi are products."""
    if re.search(r"\\(?!text|math|mbox|bf|rm|bm|boldsymbol|left|right)[A-Za-z]", gold):
        return False
    word = bare(gold)
    if word == "DNE":
        return False
    product = re.fullmatch("[a-z]{2}", word) or latex.glued(word)
    return re.fullmatch("[A-Z]{2,}|[A-Z]?[a-z]{2,}", word) is not None and not product


def without_stars(answer: str) -> str:
    """**26** is 26 in Markdown."""
    return re.sub(r"^\s*(\*{2,3})(.*)\1\s*$", r"\2", answer)


def without_letter(answer: str) -> str:
    """(C) 26 and C. 26 are 26, where the reference is no letter."""
    letter = re.fullmatch(r"\(?[A-J](?:\)|[.:]\s)([^A-Za-z()]+)", bare(answer))
    return letter[1].lstrip(" \t\n.:") if letter else answer


def one_spelling(tokens: list[latex.Token]) -> list[latex.Token]:
    """\\varphi is \\phi, where not both of them stand."""
    texts = {token.text for token in tokens}
    found = []
    for token in tokens:
        plain = re.sub("^var(?=(?:epsilon|theta|rho|sigma|phi)(?:_|$))", "", token.text)
        found.append(token if plain in texts else token._replace(text=plain))
    return found


def with_units_of(gold: list[latex.Token], answer: list[latex.Token]) -> list[latex.Token]:
    """The answer's tokens; 5.0 J with the reference's \\text{J}, if the reference ends in it."""

    def spelled(tokens: list[latex.Token]) -> list[str]:
        return [known_unit(token.text) or token.text for token in tokens if token.text != "*"]

    unit = trailing_unit(gold)
    if not unit:
        return answer
    wanted = spelled(unit)
    for end in range(1, len(answer)):
        number = answer[end - 1].kind == "num" or answer[end - 1].text in (")", "}")
        letters = any(token.kind == "name" for token in answer[end:])
        if number and letters and spelled(answer[end:]) == wanted:
            return [*answer[:end], *unit]
    return answer


def trailing_unit(tokens: list[latex.Token]) -> list[latex.Token]:
    """The unit in \\text that an answer ends in, or nothing."""
    padded = [*tokens, *[maths.END] * 5]  # it looks ahead
    for start, token in enumerate(tokens):
        if token.kind == "word" and known_unit(token.text):
            unit, end = read_unit(padded, start)
            if unit and end == len(tokens):
                return tokens[start:]
    return []


# ---------------------------------------------------------------------------- verdicts


def judge(answer: str, gold: str, deadline: float, tolerance: float, algebra=None) -> Verdict:
    """The verdict on an answer; its outcome is "undecided" where sympy may know more."""
    if max(len(answer), len(gold)) > MAX_CHARS:  # before any regular expression meets it
        return Verdict("unparsed", answer, "too long")
    text = without_stars(answer)
    choice = same_choice(gold, text)
    if choice is not None:
        outcome = "correct" if choice else "wrong"
        return Verdict(outcome, answer, bare(text), bare(gold), "same_choice")
    if same_words(gold, text):
        return Verdict("correct", answer, bare(text), bare(gold), "same_words")
    text = without_letter(text)
    try:
        gold_tokens = latex.trimmed(latex.tokenise(gold))
        tokens = latex.trimmed(latex.tokenise(text))
    except ParseError as error:
        return Verdict("unparsed", answer, str(error))
    tokens = with_units_of(gold_tokens, one_spelling(tokens))
    gold_tokens = one_spelling(gold_tokens)
    literals = literal(tokens), literal(gold_tokens)
    if literals[0] == literals[1] != "":
        return Verdict("correct", answer, *literals, "literal")
    if not tokens:
        return Verdict("unparsed", answer, "nothing", literals[1], "literal")
    functions = maths.applied_names(tokens) | maths.applied_names(gold_tokens) | APPLIED
    try:
        word = is_word(gold) and not any(token.text in "=*^/" for token in tokens)  # W = mgh
        gold_read = None if word else maths.read(gold_tokens, functions)
    except ParseError:
        gold_read = None
    if gold_read is None or not gold_tokens:  # what is not read is only compared as it stands
        return Verdict("wrong", answer, *literals, "unread")
    try:
        answer_read = maths.read(tokens, functions)
    except ParseError as error:
        return Verdict("unparsed", answer, str(error), show(gold_read), "unread")
    judges = Judges(deadline, tolerance, algebra)
    with LOCK:
        right = judges.match(gold_read, answer_read)
    outcome = "correct" if right else "undecided" if judges.wants_algebra else "wrong"
    return Verdict(outcome, answer, show(answer_read), show(gold_read), judges.decided_by)


def decide(
    response: str, gold: str, timeout: float, lenient: bool, tolerance: float, algebra=None
) -> Verdict:
    """The verdict on a response, never an exception; "undecided" where sympy may know more."""
    answer = last_boxed(response)
    if answer is None and lenient:
        answer = lenient_answer(response)
    if answer is None:
        return Verdict("no_answer")
    try:
        return judge(answer, gold, time.thread_time() + timeout, tolerance, algebra)
    except TimeoutError:
        return Verdict("timeout", answer)
    except Exception as error:  # a bug of ours must not end a run of days; the fuzz calls `judge`
        return Verdict("unparsed", answer, f"{type(error).__name__}: {error}")


def verify(
    response: str, gold: str, timeout: float = 2.0, lenient: bool = False, tolerance: float = 0.0
) -> Verdict:
    """The verdict on a response. Never raises, whatever the two strings are.

    `timeout`: seconds of this thread's CPU time, so that a busy machine changes nothing; the bounds
    end everything well before. What sympy is asked has a second of its own (`algebra.SECONDS`).
    `lenient`: an answer that is not boxed will do. `tolerance`: relative, for numbers.
    """
    verdict = decide(response, gold, timeout, lenient, tolerance)
    if verdict.outcome == "undecided":
        pool = shared_pool(1, os.getpid())
        verdict = pool.threads.submit(
            pool.check, (response, gold), timeout, lenient, tolerance
        ).result()
    return verdict


def is_correct(response: str, gold: str) -> bool:
    return verify(response, gold).correct


# ---------------------------------------------------------------------------- many at once


class Pool:
    """Threads with a worker process each.

    Subprocesses, which import nothing of the caller's (torch, `__main__`).
    """

    def __init__(self, workers: int):
        self.threads, self.local = ThreadPoolExecutor(workers), threading.local()

    def check(
        self, pair: tuple[str, str], timeout: float, lenient: bool = False, tolerance: float = 0.0
    ) -> Verdict:
        worker = getattr(self.local, "worker", None)
        if worker is None or worker.poll() is not None:
            command = [sys.executable, "-c", "import verify; verify.serve()"]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "encoding": "utf-8"}
            # It ends with us: see `serve`. In a group of its own, which Ctrl-C does not reach.
            worker = subprocess.Popen(command, cwd=Path(__file__).parent, process_group=0, **pipes)
            if worker.stdout.readline() != "ready\n":  # importing does not count
                worker.kill()
                reason = f"{' '.join(command)}, code {worker.wait()}"
                raise RuntimeError(f"a worker of verify_many did not start: {reason}")
            self.local.worker = worker
        last_resort = threading.Timer(5 * timeout + 1, worker.kill)
        last_resort.start()
        try:
            worker.stdin.write(json.dumps([*pair, timeout, lenient, tolerance]) + "\n")
            worker.stdin.flush()
            return Verdict(**json.loads(worker.stdout.readline()))
        # it was killed, by us or for lack of memory: nothing was decided
        except (
            OSError,
            ValueError,
        ):
            worker.kill()
            self.local.worker = None
            return Verdict("timeout")
        finally:
            last_resort.cancel()


@functools.cache  # for the life of the process; a fork is another one, without our threads
def shared_pool(workers: int, process: int) -> Pool:
    return Pool(workers)


def serve() -> None:
    """A worker.

    A JSON pair per line in, a verdict per line out, until the parent closes the pipe or dies.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # the parent has died: end without a traceback
    with contextlib.suppress(ValueError, OSError):  # where the system has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (WORKER_BYTES, WORKER_BYTES))
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        verdict = decide(*request)
        if verdict.outcome == "undecided":
            import algebra  # only here: half a second, 40 MB

            try:
                with algebra.limited():
                    verdict = decide(*request, algebra)
            except Undecided as error:
                verdict = replace(verdict, outcome="wrong", decided_by=str(error))
        print(json.dumps(asdict(verdict)), flush=True)


def verify_many(
    pairs: list[tuple[str, str]], workers: int | None = None, timeout: float = 2.0
) -> list[Verdict]:
    """One verdict per (response, gold), in order.

    `workers`: processes, by default one per core and at most 8.
    """
    pool = shared_pool(workers or min(8, os.cpu_count() or 1), os.getpid())
    return list(pool.threads.map(lambda pair: pool.check(pair, timeout), pairs))


# ---------------------------------------------------------------------------- command line


@dataclass
class Config:
    response: tyro.conf.Positional[str] = ""
    """A response, with its answer in \\boxed{}."""
    gold: tyro.conf.Positional[str] = ""
    """The reference that it is compared with."""
    file: str = ""
    """A JSONL file of pairs instead.

    `response` and `gold` on every line; prints a table of outcomes.
    """
    lenient: bool = False
    """Take an answer that is not boxed, too: for foreign models, never for a reward."""


def main(config: Config) -> None:
    pair = bool(config.response) and bool(config.gold)
    if pair == bool(config.file) or bool(config.response) != bool(config.gold):
        raise cli.UserError(
            "expected a response and a reference, or --file pairs.jsonl: see --help"
        )
    if pair:
        print(explained(verify(config.response, config.gold, lenient=config.lenient)))
        return
    verdicts = []
    for number, (response, gold) in enumerate(read_pairs(config.file), start=1):
        verdicts.append(verify(response, gold, lenient=config.lenient))
        print(f"--- {number}\n{explained(verdicts[-1])}")
    print("---")
    outcomes = [verdict.outcome for verdict in verdicts]
    for outcome in sorted(set(outcomes)):
        count = outcomes.count(outcome)
        print(f"{outcome:10s} {count:7d}  {count / len(outcomes):6.1%}")


def explained(verdict: Verdict) -> str:
    """How each side was read, and which judge decided."""
    titles = ("verdict", "extracted", "read as", "reference", "decided by")
    rows = zip(titles, asdict(verdict).values())
    return "\n".join(f"{title:10s} {text}" for title, text in rows)


def read_pairs(file: str) -> list[tuple[str, str]]:
    pairs = []
    for number, row in enumerate(cli.read_jsonl(file), start=1):
        for field in ("response", "gold"):
            value = row.get(field)
            if isinstance(value, bool) or not isinstance(value, str | int | float):
                where = f"{file}, line {number} (blank ones aside)"
                raise cli.UserError(f"{where}: `{field}` is missing, or not a text or a number")
        pairs.append((str(row["response"]), str(row["gold"])))
    return pairs


if __name__ == "__main__":
    cli.run(main, Config)
